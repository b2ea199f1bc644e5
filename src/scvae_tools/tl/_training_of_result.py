"""What a result was trained with, noted by `scvae` in its ``params``, and read again to train the same model anew."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from scvae_tools._checks import as_plain, cell_positions
from scvae_tools._data.counts import read_counts, resolve_mask_var
from scvae_tools._data.roles import ROLES, check_obs, obs_keys_of
from scvae_tools._keys import Keys
from scvae_tools._messages import listed
from scvae_tools.model._scvae import SCVAE
from scvae_tools.tl._comparison_grid import options_of
from scvae_tools.tl._models import kept_model
from scvae_tools.tl._trainable_cells import TrainableCells

if TYPE_CHECKING:
    from anndata import AnnData

#: Params that are noted beside the arguments themselves; see `noted_beside`.
LIMITS, GIVEN_AS_NONE, N_GENES, NON_INTEGER = "n_components_limits", "given_as_none", "n_genes", "allow_non_integer"


def noted_beside(
    n_components: Any, training: Mapping[str, Any], *, n_genes: int, allow_non_integer: bool
) -> dict[str, Any]:
    """Params that tell, beside the arguments in the params, how a model was trained; those that are None say nothing.

    Params have the number of components that was found in place of the limits that were given, and never hold None,
    which files do not.

    Parameters
    ----------
    n_components
        As in `scvae`.
    training
        Arguments of `SCVAE.train`.
    n_genes
        Number of genes used, by which it is noticed that these are others.
    allow_non_integer
        As in `scvae`.
    """
    defaults = {name: each.default for name, each in inspect.signature(SCVAE.train).parameters.items()}
    without = [name for name, value in training.items() if value is None and defaults.get(name) is not None]
    return {
        LIMITS: list(n_components) if isinstance(n_components, tuple | list) else None,
        GIVEN_AS_NONE: without or None,
        N_GENES: n_genes,
        NON_INTEGER: allow_non_integer or None,
    }


@dataclass(frozen=True)
class TrainingOfResult:
    """Arguments that a result was trained with, to train the same model on other cells or with other seeds."""

    obs_keys: dict[str, Any]
    of_model: dict[str, Any]  # arguments of `SCVAE`, without the seed
    of_training: dict[str, Any]  # of `SCVAE.train`, without the seed and the cells to hold out
    validation_indices: list | None
    random_state: int
    layer: str | None
    mask_var: str | None
    n_genes: int
    allow_non_integer: bool

    @classmethod
    def read(cls, adata: AnnData, key: str) -> TrainingOfResult:
        """Training of the results that `scvae` stored under a key.

        Raises
        ------
        ValueError
            If there are none, or it is not noted how the model was trained.
        """
        stored = adata.uns.get(Keys(key).uns)
        params = stored.get("params") if isinstance(stored, Mapping) else None
        if not isinstance(params, Mapping) or N_GENES not in params:
            raise _no_result(adata, key, stored)
        params = {name: as_plain(value) for name, value in params.items()}
        params |= dict.fromkeys(params.get(GIVEN_AS_NONE, ()))
        if params["mixture"] and "curve" in stored.get("components", {}):
            limits = params.get(LIMITS)
            params["n_components"] = None if limits is None else tuple(limits)
        of_model, of_training = options_of(SCVAE.__init__, params), options_of(SCVAE.train, params)
        columns = dict.fromkeys((*ROLES, "unlabeled_category")) | params
        return cls(
            obs_keys=obs_keys_of(columns),
            of_model={name: value for name, value in of_model.items() if name != "random_state"},
            of_training={
                name: value
                for name, value in of_training.items()
                if name not in ("random_state", "validation_indices", "record_rates", "devices")
            },
            validation_indices=params.get("validation_indices"),
            random_state=params["random_state"],
            layer=params.get("layer"),
            mask_var=params.get("mask_var"),
            n_genes=params[N_GENES],
            allow_non_integer=params.get(NON_INTEGER, False),
        )

    @property
    def is_mixture(self) -> bool:
        """Whether the model has components."""
        return self.of_model["mixture"] is not False

    @property
    def is_supervised(self) -> bool:
        """Whether labels train the components."""
        return self.obs_keys["labels_key"] is not None and self.of_model.get("y_term") in (None, "cross-entropy")

    def cells(self, adata: AnnData, key: str, mask_var: str | np.ndarray | None) -> TrainableCells:
        """Cells of an AnnData as the model was trained on them.

        Parameters
        ----------
        adata, key
            The AnnData, and the key of the results.
        mask_var
            Genes, where the result was trained on those of an array; None for those that are noted.

        Raises
        ------
        CountsError
            If the counts are not raw counts.
        ValueError
            If columns of ``obs`` are gone or wrong, or the genes are not as many as the model has.
        """
        check_obs(adata, **self.obs_keys)
        mask = self._genes(adata, key, mask_var)
        counts = read_counts(adata, layer=self.layer, mask_var=mask, allow_non_integer=self.allow_non_integer)
        names = adata.var_names if mask is None else adata.var_names[mask]
        return TrainableCells(counts=counts, obs=adata.obs, names=names, allow_non_integer=self.allow_non_integer)

    def _genes(self, adata: AnnData, key: str, mask_var: str | np.ndarray | None) -> np.ndarray | None:
        mask = resolve_mask_var(adata, self.mask_var if mask_var is None else mask_var)
        n_genes = adata.n_vars if mask is None else int(np.sum(mask))
        model = kept_model(adata, key)
        if n_genes != self.n_genes and mask_var is None and model is not None:
            mask = adata.var_names.isin(model.var_names)
            n_genes = int(mask.sum())
        if n_genes != self.n_genes:
            raise ValueError(
                f"`mask_var` must choose the {self.n_genes:,} genes that the result under {key!r} was trained on; "
                f"found {n_genes:,}. Pass the array of the genes that was given to svt.tl.scvae, which the result does "
                "not hold, or the AnnData with all genes that it was given."
            )
        return mask

    def held_out(self, n_cells: int, positions: np.ndarray | None) -> np.ndarray | None:
        """Cells to hold out by ``validation_indices`` among those at some positions; None for a random draw."""
        if self.validation_indices is None:
            return None
        held_out = cell_positions(self.validation_indices, n_cells, "validation_indices", may_be_none=True)
        return held_out if positions is None else np.flatnonzero(np.isin(positions, held_out))


def _no_result(adata: AnnData, key: str, stored: object) -> ValueError:
    """Error for results that are not there, or of which it is not noted how they were trained."""
    known = [
        name
        for name, value in adata.uns.items()
        if isinstance(value, Mapping) and N_GENES in (value.get("params") or {})
    ]
    found = f"results under {listed(known)}" if known else "none in adata"
    if isinstance(stored, Mapping) and "history" in stored:
        found = "one that does not, as svt.tl.predict and earlier versions write it"
    other = f", or pass key={known[0]!r}" if known else ""
    return ValueError(
        f"adata.uns[{key!r}] must hold a result of svt.tl.scvae, which notes how it was trained; found {found}. Run "
        f"svt.tl.scvae(adata, key_added={key!r}) first{other}."
    )
