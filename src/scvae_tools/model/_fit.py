"""How well cells fit a trained model: p-values against cells of the training data that were held out."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from scvae_tools._checks import checked
from scvae_tools._files import digest_of_names
from scvae_tools._module.sparse import Counts
from scvae_tools._random import seeded
from scvae_tools.model._fit_reference import N_REFERENCE, FitReference, drawn_evenly
from scvae_tools.model._inference import InferenceMixin

if TYPE_CHECKING:
    from collections.abc import Sequence

    from anndata import AnnData

#: Most held-out cells among which those of the reference are chosen, so that none of a rare component is left out.
N_LOOKED_AT = 20_000


class FitMixin(InferenceMixin):
    """Fit of cells to `SCVAE`."""

    #: References by the number of epochs of the weights and their version; read from a file, or made when needed.
    _fit_references: dict[tuple[int, str | None], FitReference] | None = None
    #: That of the model onto which the data of this one were mapped.
    _inherited_fit: FitReference | None = None

    @checked()
    def get_fit(
        self, adata: AnnData | None = None, indices: Sequence[int] | None = None, *, batch_size: int | None = None
    ) -> np.ndarray:
        """Probability of each cell that a cell like those of the training would fit the model as badly.

        Small values are of cells that the model does not know: of another type, doublets, or with other technical
        effects. It is a conformal p-value: of cells like those of the training, 5 % are below 0.05, at any total count.

        Parameters
        ----------
        adata, indices, batch_size
            As in `get_elbo_terms`.

        Returns
        -------
        (1 + number of reference cells that fit as badly) / (1 + their number), (n_cells,), above 0 and up to 1.

        Raises
        ------
        ValueError
            If the model is not trained, or was saved without reference cells and has no data to take them from.

        Notes
        -----
        A cell fits by log p(x|z) and log p(z) at the mean z of q(z|x), the two terms of log p(x, z). Each is compared
        with what is expected of a cell of its most probable component and its total count, in units of its spread, and
        the two are added up (docs/clustering.md).

        Reference cells are up to 2,000 of the cells that the training held out, as equally many of each component as
        there are; `save` writes what is needed of them. Where nothing was held out they are training cells, which fit
        better than new ones, so that the values of new cells are then too small. A cell is compared with those of
        its component where there are 100 of them, else with all. No value is below 1 / (1 + their number).

        After `load_query_data`, the reference is that of the reference model, also when the query has been trained,
        unless with ``unfrozen=True``.
        """
        reference = self._fit_reference()
        if reference is None:
            raise ValueError(self._why_no_fit())
        return reference.p_values(*self._fit_scores(adata, indices, batch_size))

    def n_fit_cells(self) -> int:
        """Number of cells that `get_fit` compares others with; 0 where it has none and cannot take them from data."""
        reference = self._fit_reference()
        return 0 if reference is None else reference.n_cells

    def _fit_reference(self) -> FitReference | None:
        """Reference of the weights in use, made from the model's data if need be and possible."""
        if self._inherited_fit is not None:
            return self._inherited_fit
        if self._fit_references is None:
            self._fit_references = {}
        key = self._state.n_epochs, self.version
        if key not in self._fit_references:
            cells = self._cells_of_reference()
            if cells is None:
                return None
            n_components = self.n_components if self.is_mixture else 1
            self._fit_references[key] = FitReference.of(*self._fit_scores(None, cells, None), n_components)
        return self._fit_references[key]

    def _fit_reference_if_possible(self) -> FitReference | None:
        """Reference of the weights in use; None also where the counts have changed since, or do not fit into memory.

        Neither is a reason not to save a model, or to map no cells onto it.
        """
        try:
            return self._fit_reference()
        except (ValueError, RuntimeError, OSError):
            return None

    def _cells_of_reference(self) -> np.ndarray | None:
        """Positions of the reference cells among those of the model; None where it has none."""
        has_counts = self.adata is not None and self.minified_data_type is None
        if not (self.is_trained_ and has_counts) or self.train_indices is None:
            return None
        if self._digest_of_cells not in (None, digest_of_names(self.adata.obs_names)):
            return None  # other cells, which a model without data has adopted
        cells = np.asarray(self.validation_indices if len(self.validation_indices) > 0 else self.train_indices)
        cells = np.sort(np.random.default_rng(0).permutation(cells)[:N_LOOKED_AT])
        if len(cells) <= N_REFERENCE or not self.is_mixture:
            return cells[drawn_evenly(np.zeros(len(cells), dtype=int), N_REFERENCE, 0)]
        return cells[drawn_evenly(self._probabilities(indices=cells).argmax(1).numpy(), N_REFERENCE, 0)]

    def _why_no_fit(self) -> str:
        if not self.is_trained_:
            return "The fit of cells is to a trained model; found one that is not trained. Call train()."
        return (
            "The fit of cells is compared with that of cells which the training held out; this model was saved without "
            "what is needed of them, as by earlier versions and for weights that were not in use, and has no data to "
            "take them from. Load it with its training data, SCVAE.load(folder, adata), and save it again."
        )

    @torch.inference_mode()
    def _fit_scores(
        self, adata: AnnData | None, indices: Sequence[int] | None, batch_size: int | None
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Scores, total count and component of cells, as `FitReference` takes them."""
        rows, module = [], self.module
        with seeded(0):
            for tensors in self._batches(adata, indices, batch_size, needs_counts="The fit of cells"):
                x, size, covariates = module.data(tensors)
                posterior = module.posterior(module.encode(x, size, covariates))
                z, component = posterior.moments()[0], module.probabilities(posterior).argmax(1)
                log_likelihood = module.log_likelihood(x, z, module.log_size(size), module.with_size(covariates, size))
                log_prior = module.prior.log_prob(z[None])[0]
                each = [log_likelihood, log_prior, Counts.of(x).total()[:, 0], component]
                rows.append(torch.stack([value.double().cpu() for value in each], dim=1))
        rows = torch.cat(rows).numpy()
        return rows[:, :2], rows[:, 2], rows[:, 3].astype(int)

    def _fits_to_plain(self) -> dict[str, Any]:
        """References for a file, by version."""
        self._fit_reference_if_possible()
        now = self._state.n_epochs
        references = {key[1] or "": each for key, each in (self._fit_references or {}).items() if key[0] == now}
        inherited = {} if self._inherited_fit is None else {"inherited": self._inherited_fit.to_plain()}
        return {"by_version": {name: each.to_plain() for name, each in references.items()}} | inherited

    def _take_fits(self, saved: dict[str, Any] | None) -> None:
        """Take over the references that `_fits_to_plain` wrote; none of files that were written without."""
        if not saved:
            return
        k, now = self.n_components if self.is_mixture else 1, self._state.n_epochs
        by_version = saved["by_version"].items()
        self._fit_references = {(now, name or None): FitReference.from_plain(each, k) for name, each in by_version}
        if "inherited" in saved:
            self._inherited_fit = FitReference.from_plain(saved["inherited"], k)
