"""Methods of scvi-tools that would fail or be wrong for `SCVAE`: those that can be right, the others refused."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import torch

from scvae_tools._checks import checked
from scvae_tools._data.roles import column_of_obs
from scvae_tools.model._inference import InferenceMixin

if TYPE_CHECKING:
    from collections.abc import Sequence

    from anndata import AnnData
    from scvi.data import AnnDataManager


class InheritedMixin(InferenceMixin):
    """Methods of scvi-tools for `SCVAE` that none of its other parts has."""

    @checked()
    def get_aggregated_posterior(
        self,
        adata: AnnData | None = None,
        indices: Sequence[int] | None = None,
        batch_size: int | None = None,
        dof: float | None = 3.0,
    ) -> torch.distributions.MixtureSameFamily:
        """Mean of q(z|x) over cells, as a distribution; each with the mean and variance of `get_latent_representation`.

        Parameters
        ----------
        adata, indices, batch_size
            As in `get_latent_representation`.
        dof
            Degrees of freedom of Student's t in place of the Gaussian of a cell, with its scale; None for the Gaussian.
        """
        mean, variance = self.get_latent_representation(adata, indices, batch_size=batch_size, return_dist=True)
        mean, scale = (torch.as_tensor(each, device=self.device) for each in (mean, np.sqrt(variance)))  # (n, d)
        normal, student = torch.distributions.Normal, torch.distributions.StudentT
        cells = torch.distributions.Independent(normal(mean, scale) if dof is None else student(dof, mean, scale), 1)
        weights = torch.distributions.Categorical(logits=torch.ones(len(mean), device=self.device))
        return torch.distributions.MixtureSameFamily(weights, cells)

    @checked()
    @torch.inference_mode()
    def differential_abundance(
        self,
        adata: AnnData | None = None,
        sample_key: str | None = None,
        batch_size: int = 128,
        num_cells_posterior: int | None = None,
        dof: float | None = None,
        *,
        random_state: int = 0,
    ) -> pd.DataFrame:
        """Log density of each cell's latent code among the cells of each sample, in nats.

        Parameters
        ----------
        adata
            As in `differential_expression`.
        sample_key
            Column of ``obs`` with the sample of each cell.
        batch_size
            Cells evaluated at a time.
        num_cells_posterior
            Most cells that stand for a sample, drawn at random; None for all.
        dof
            As in `get_aggregated_posterior`.
        random_state
            Seed of that draw.

        Returns
        -------
        Table of cells x samples, which is also written to ``adata.obsm["da_log_probs"]`` as in scvi-tools.
        """
        with self._columns_of_user(adata) as data:
            sample = column_of_obs(data, sample_key, "sample_key").astype(str).to_numpy()
        names = pd.unique(sample)
        latent = torch.as_tensor(self.get_latent_representation(adata, batch_size=batch_size), device=self.device)
        rng, densities = np.random.default_rng(random_state), []
        for name in names:
            cells = np.flatnonzero(sample == name)
            if num_cells_posterior is not None and num_cells_posterior < len(cells):
                cells = rng.choice(cells, num_cells_posterior, replace=False)
            posterior = self.get_aggregated_posterior(adata, cells, batch_size, dof)
            densities.append(torch.cat([posterior.log_prob(z) for z in latent.split(batch_size)]).cpu().numpy())
        table = pd.DataFrame(np.stack(densities, axis=1), index=data.obs_names, columns=names)
        others = None if adata is not None else self._annotated
        (data if others is None else others).obsm["da_log_probs"] = table
        return table

    def view_registry(self, hide_state_registries: bool = False) -> None:  # noqa: FBT001, FBT002
        """Print the registry: what `setup_anndata` was given, and what it found.

        Parameters
        ----------
        hide_state_registries
            Whether to leave out the details of each field.
        """
        self._require_manager("view_registry").view_registry(hide_state_registries)

    def _require_manager(self, caller: str) -> AnnDataManager:
        if self.adata_manager is None:
            raise ValueError(
                f"`{caller}` needs data; this model was loaded without. Pass them to `SCVAE.load`, or read "
                "`model.registry`."
            )
        return self.adata_manager

    def get_latent_library_size(self, *_: Any, **__: Any) -> None:
        """Refused: the size of a cell is known, and no latent variable."""
        key = self._obs_keys["size_factor_key"]
        size = "its total count over the genes of the model" if key is None else f"adata.obs[{key!r}]"
        raise NotImplementedError(
            f"A model of class {type(self).__name__} has no latent library size: the size factor of a cell is {size}. "
            "Read it there; `get_normalized_expression` divides by it."
        )

    def get_importance_weights(self, *_: Any, **__: Any) -> None:
        """Refused: those of scvi-tools are for its own prior and distributions."""
        raise NotImplementedError(
            "Importance weights of scvi-tools are for its prior N(0, I), which a model of class "
            f"{type(self).__name__} need not have. `get_marginal_ll` has the importance-weighted bound of log p(x); "
            "leave `weights` out of `get_normalized_expression`."
        )
