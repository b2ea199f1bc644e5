"""What a trained model says of cells: bounds, latent codes, components, rates, samples. Methods of `SCVAE`."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import torch
from anndata import AnnData
from scipy import sparse
from scvi import REGISTRY_KEYS
from scvi.model.base import RNASeqMixin, VAEMixin

from scvae_tools import _keys
from scvae_tools._batches import CountLoader
from scvae_tools._counts import cell_positions
from scvae_tools._gmvae import GMVAE, MixtureVAE
from scvae_tools._random import seeded, with_random_state
from scvae_tools._training import quiet

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

EVALUATION_BATCH_SIZE = 512
#: The parameters of p(x|z) that scvi-tools knows, by our heads.
SCVI_PARAMETERS = {"log_rate": ("mean", "mu"), "log_r": ("dispersions", "theta"), "gate": ("dropout", "zi_probs")}


class EvaluationMixin(RNASeqMixin, VAEMixin):
    """Evaluation of `SCVAE`, in place of that of scvi-tools where it knows one Gaussian prior only."""

    _data_loader_cls = CountLoader

    def _batches(
        self,
        adata: AnnData | None,
        indices: Sequence[int] | None,
        batch_size: int | None,
        dataloader: Iterable[dict[str, torch.Tensor]] | None = None,
        *,
        needs_counts: str | None = None,
    ) -> Iterator[dict[str, torch.Tensor]]:
        """Batches on the model's device, in evaluation mode and without gradients."""
        self._check_if_trained(warn=True)
        if needs_counts is not None and self.minified_data_type is not None:
            raise ValueError(f"{needs_counts} needs the counts, which minified data no longer hold.")
        if dataloader is None:
            adata = self._validate_anndata(adata)
            size = batch_size or EVALUATION_BATCH_SIZE
            dataloader = self._make_data_loader(adata, indices=indices, batch_size=size)
        self.module.eval()
        with seeded(0):
            batches = iter(dataloader)  # draws a seed for its workers, if any, from the global state
        with torch.inference_mode():
            for tensors in batches:
                yield {name: value.to(self.module.device) for name, value in tensors.items()}

    def _make_data_loader(self, adata: AnnData, indices: Sequence[int] | None = None, **options: Any) -> Iterable:
        """Loader of cells given by position or by one boolean each."""
        indices = cell_positions(indices, adata.n_obs)
        return super()._make_data_loader(adata, indices, likelihood=self.module.likelihood, **options)

    def get_elbo_terms(
        self,
        adata: AnnData | None = None,
        indices: Sequence[int] | None = None,
        batch_size: int | None = None,
        n_samples: int = 1,
        dataloader: Iterable | None = None,
        random_state: int = 0,
    ) -> pd.DataFrame:
        """Evidence lower bound of each cell and its terms, in nats.

        Parameters
        ----------
        adata
            Data with the model's genes; None for the data of the model.
        indices
            Positions of the cells, or one boolean per cell; None for all.
        batch_size
            Cells evaluated at a time.
        n_samples
            Monte Carlo samples of z per cell (and component).
        dataloader
            Batches, in place of ``adata``.
        random_state
            Seed of the samples.

        Returns
        -------
        One row per cell, with columns ``elbo``, ``log_likelihood``, ``kl_z`` and ``kl_y``.
        """
        names = ("elbo", "log_likelihood", "kl_z", "kl_y")
        rows = []
        with seeded(random_state):
            for tensors in self._batches(adata, indices, batch_size, dataloader, needs_counts="The ELBO"):
                bound = self.module.bound(*self.module.data(tensors), n_samples=n_samples)
                rows.append(torch.stack([getattr(bound, name) for name in names], dim=1).cpu())
        return pd.DataFrame(torch.cat(rows).double().numpy(), columns=list(names))

    def get_elbo(self, *args: Any, return_mean: bool = True, **kwargs: Any) -> float | np.ndarray:
        """Evidence lower bound in nats per cell; higher is better.

        Parameters
        ----------
        *args, **kwargs
            Those of `get_elbo_terms`.
        return_mean
            Whether to return the mean over cells, or each cell's, (n_cells,).
        """
        values = self.get_elbo_terms(*args, **kwargs)["elbo"].to_numpy()
        return float(values.mean()) if return_mean else values

    def get_reconstruction_error(
        self, *args: Any, return_mean: bool = True, **kwargs: Any
    ) -> dict[str, float | np.ndarray]:
        """Negative log-likelihood −E log p(x|z), in nats per cell, under the key of scvi-tools.

        Parameters
        ----------
        *args, **kwargs
            Those of `get_elbo_terms`.
        return_mean
            Whether to return the mean over cells, or each cell's, (n_cells,).
        """
        values = -self.get_elbo_terms(*args, **kwargs)["log_likelihood"].to_numpy()
        return {"reconstruction_loss": float(values.mean()) if return_mean else values}

    def get_marginal_ll(
        self,
        adata: AnnData | None = None,
        indices: Sequence[int] | None = None,
        n_mc_samples: int = 100,
        batch_size: int | None = None,
        return_mean: bool = True,  # noqa: FBT001, FBT002
        dataloader: Iterable | None = None,
        n_mc_samples_per_pass: int = 16,
        random_state: int = 0,
        **kwargs: Any,
    ) -> float | np.ndarray:
        """Importance-weighted lower bound of log p(x), in nats per cell; tight as the samples grow.

        The mixture's own prior and posterior are used: p(z) = Σ π_y p(z|y), q(z|x) = Σ q(y|x) q(z|x,y).

        Parameters
        ----------
        adata, indices, batch_size, dataloader, random_state
            As in `get_elbo_terms`.
        n_mc_samples, n_mc_samples_per_pass
            Importance samples per cell, and how many are evaluated at a time.
        return_mean
            Whether to return the mean over cells, or each cell's, (n_cells,).
        **kwargs
            Ignored; scvi-tools passes some.
        """
        values = []
        with seeded(random_state):
            for tensors in self._batches(adata, indices, batch_size or 128, dataloader, needs_counts="log p(x)"):
                data = self.module.data(tensors)
                values.append(self.module.importance_weighted_bound(*data, n_mc_samples, n_mc_samples_per_pass).cpu())
        values = torch.cat(values).double().numpy()
        return float(values.mean()) if return_mean else values

    def predict(
        self,
        adata: AnnData | None = None,
        indices: Sequence[int] | None = None,
        *,
        soft: bool = False,
        batch_size: int | None = None,
    ) -> np.ndarray | pd.DataFrame:
        """Most probable component of each cell, or the probabilities of all.

        Parameters
        ----------
        adata, indices, batch_size
            As in `get_elbo_terms`.
        soft
            Whether to return probabilities.

        Returns
        -------
        Names of components, (n_cells,), or a table of probabilities, cells x components.

        Raises
        ------
        ValueError
            If the model has no mixture, or was not trained.
        """
        if not self.is_mixture:
            kind = "has none" if not isinstance(self.module, MixtureVAE) else "has not been trained"
            raise ValueError(
                f"`predict` needs a mixture; this model {kind}. Build it with mixture=True or 'vade' and train it."
            )
        rows = []
        for tensors in self._batches(adata, indices, batch_size):
            if _keys.LATENT_PROBABILITIES in tensors:
                rows.append(tensors[_keys.LATENT_PROBABILITIES].cpu())
                continue
            posterior = self.module.posterior(self.module.encode(*self.module.data(tensors)))
            rows.append(self.module.probabilities(posterior).cpu())
        probabilities = torch.cat(rows).numpy()
        if not soft:
            return np.array(self.components)[probabilities.argmax(1)]
        names = (self.adata if adata is None else adata).obs_names
        index = names[cell_positions(indices, len(names))]
        return pd.DataFrame(probabilities, index=index, columns=self.components)

    def iter_lambda(
        self,
        adata: AnnData | None = None,
        indices: Sequence[int] | None = None,
        gene_list: Sequence[str] | None = None,
        batch_size: int | None = None,
    ) -> Iterator[np.ndarray]:
        """λ in chunks of cells; see `get_lambda`."""
        genes = self._gene_positions(gene_list)
        if self.minified_data_type is not None and isinstance(self.module, GMVAE):
            raise ValueError(
                "λ of a GMVAE needs q(z|x,y) of each component, which minified data do not hold. Call `get_lambda` "
                "before minifying, or `get_normalized_expression` now."
            )
        for tensors in self._batches(adata, indices, batch_size or self._rate_batch_size()):
            if REGISTRY_KEYS.LATENT_QZM_KEY in tensors:
                _, size, covariates = self.module.data(tensors)
                px = self.module.decode(tensors[REGISTRY_KEYS.LATENT_QZM_KEY], size, covariates, genes)
                yield px.mu.cpu().numpy()
                continue
            yield self.module.rate(*self.module.data(tensors), genes=genes).cpu().numpy()

    def get_lambda(
        self,
        adata: AnnData | None = None,
        indices: Sequence[int] | None = None,
        gene_list: Sequence[str] | None = None,
        batch_size: int | None = None,
        out: Any = None,
    ) -> Any:
        """Mean parameter λ of the count distribution before zero inflation, in counts.

        At the posterior means: λ = Σ_y q(y|x) λ(E[z|x,y]), the size factor of the cell included.

        Parameters
        ----------
        adata, indices, batch_size
            As in `get_elbo_terms`.
        gene_list
            Names of the genes; None for all.
        out
            Array-like of shape (n_cells, n_genes) to write into by rows, for example a memory map or a zarr array;
            None for a new array.

        Returns
        -------
        ``out``, or an array (n_cells, n_genes) float32.
        """
        start = 0
        n_cells = len(cell_positions(indices, (self.adata if adata is None else adata).n_obs))
        for chunk in self.iter_lambda(adata, indices, gene_list, batch_size):
            out = np.empty((n_cells, chunk.shape[1]), dtype=np.float32) if out is None else out
            out[start : start + len(chunk)] = chunk
            start += len(chunk)
        return out

    def _rate_batch_size(self, bytes_at_once: int = 2**28) -> int:
        """Cells whose λ of all components takes a quarter of a gigabyte."""
        return int(np.clip(bytes_at_once // (4 * len(self.var_names) * (self.n_components or 1)), 1, 4096))

    def _gene_positions(self, gene_list: Sequence[str] | None) -> torch.Tensor | None:
        if gene_list is None:
            return None
        positions = pd.Index(self.var_names).get_indexer(list(gene_list))
        if (positions < 0).any():
            unknown = [gene for gene, at in zip(gene_list, positions, strict=True) if at < 0]
            raise ValueError(
                f"`gene_list` must name genes of the model; {len(unknown)} are not, the first {unknown[0]!r}. "
                "`model.var_names` lists them."
            )
        return torch.as_tensor(positions, device=self.module.device)

    def get_likelihood_parameters(
        self,
        adata: AnnData | None = None,
        indices: Sequence[int] | None = None,
        n_samples: int = 1,
        give_mean: bool = False,  # noqa: FBT001, FBT002
        batch_size: int | None = None,
        dataloader: Iterable | None = None,
        random_state: int = 0,
    ) -> dict[str, np.ndarray]:
        """Parameters of p(x|z) at draws of z from q(z|x).

        Parameters
        ----------
        adata, indices, batch_size, dataloader, random_state
            As in `get_elbo_terms`.
        n_samples
            Draws of z per cell.
        give_mean
            Whether to average over the draws.

        Returns
        -------
        ``"mean"`` (λ, in counts) and, where the likelihood has them, ``"dispersions"`` (r) and ``"dropout"``
        (probability of an excess zero); each (n_cells, n_genes), or (n_samples, n_cells, n_genes).
        """
        named = [SCVI_PARAMETERS[head.name] for head in self.module.likelihood.heads]
        values: dict[str, list[torch.Tensor]] = {key: [] for key, _ in named}
        with seeded(random_state):
            for tensors in self._batches(adata, indices, batch_size or 128, dataloader):
                options = {"inference_kwargs": {"n_samples": n_samples}, "compute_loss": False}
                px = self.module(tensors, **options)[1]["px"]
                for key, attribute in named:
                    value = getattr(px, attribute).expand(px.batch_shape)
                    averages = give_mean and n_samples > 1
                    values[key].append((value.mean(0) if averages else value).cpu())
        return {key: torch.cat(value, dim=-2).numpy() for key, value in values.items()}

    def sample(
        self,
        n_cells: int = 1000,
        *,
        components: str | Sequence[str] | None = None,
        batch: str | None = None,
        batch_size: int = EVALUATION_BATCH_SIZE,
        random_state: int = 0,
    ) -> AnnData:
        """New cells from the generative model: y, z, then counts.

        Size factors and covariates are drawn, jointly, from those of the cells that the model was built on.

        Parameters
        ----------
        n_cells
            Their number.
        components
            Component of all, or of each; None to draw them from p(y).
        batch
            Category of the batch; None to draw it with the other covariates.
        batch_size
            Cells decoded at a time.
        random_state
            Seed.

        Returns
        -------
        Counts (n_cells, n_genes) as CSR float32, with ``obs["size_factor"]``, ``obs["batch"]``, for a mixture
        ``obs["component"]``, and ``obsm["X_latent"]``.
        """
        chosen = self._chosen_components(components, n_cells)
        with seeded(random_state), torch.inference_mode():
            z, y = self.module.sample_latent(n_cells, chosen)
            rows = self._reference_rows(n_cells, batch)
            size, covariates = self.module.reference(rows)
            if batch is not None:
                covariates = covariates._replace(batch=torch.full_like(covariates.batch, self._batch_code(batch)))
            counts = [
                sparse.csr_matrix(self.module.decode(z[at], size[at], covariates.rows(at)).sample().cpu().numpy())
                for at in torch.arange(n_cells, device=z.device).split(batch_size)
            ]
        obs = pd.DataFrame(index=[f"sample{i}" for i in range(n_cells)])
        obs["size_factor"] = size[:, 0].cpu().numpy()
        obs["batch"] = pd.Categorical(self._batch_categories()[covariates.batch[:, 0].cpu().numpy()])
        if self.is_mixture:
            obs["component"] = pd.Categorical(np.array(self.components)[y.cpu().numpy()], categories=self.components)
        return AnnData(
            sparse.vstack(counts, format="csr"),
            obs=obs,
            var=pd.DataFrame(index=self.var_names),
            obsm={"X_latent": z.cpu().numpy()},
        )

    def _chosen_components(self, components: str | Sequence[str] | None, n_cells: int) -> torch.Tensor | None:
        if components is None:
            return None
        if not self.is_mixture:
            raise ValueError("`components` needs a trained mixture; this model has none. Leave it out.")
        names = [components] * n_cells if isinstance(components, str | int) else list(components)
        if len(names) != n_cells:
            raise ValueError(f"`components` must be one, or one for each of {n_cells} cells; found {len(names)}.")
        positions = pd.Index(self.components).get_indexer([str(name) for name in names])
        if (positions < 0).any():
            unknown = names[int(np.argmax(positions < 0))]
            raise ValueError(f"`components` must be among {', '.join(self.components)}; found {unknown!r}.")
        return torch.as_tensor(positions, device=self.module.device)

    def _batch_categories(self) -> np.ndarray:
        state = self.registry["field_registries"][REGISTRY_KEYS.BATCH_KEY]["state_registry"]
        return np.asarray(state["categorical_mapping"])

    def _batch_code(self, batch: str) -> int:
        categories = self._batch_categories()
        if batch not in categories:
            raise ValueError(f"`batch` must be one of {', '.join(map(repr, categories))}; found {batch!r}.")
        return int(np.flatnonzero(categories == batch)[0])

    def _reference_rows(self, n_cells: int, batch: str | None) -> torch.Tensor:
        """Rows of the kept size factors and covariates; those of the batch, if it has any."""
        known = self.module.reference_batch[:, 0]
        rows = torch.arange(len(known), device=known.device)
        if batch is not None and (known == self._batch_code(batch)).any():
            rows = rows[known == self._batch_code(batch)]
        return rows[torch.randint(len(rows), (n_cells,), device=rows.device)]

    get_latent_representation = with_random_state(VAEMixin.get_latent_representation)
    get_normalized_expression = with_random_state(RNASeqMixin.get_normalized_expression)
    posterior_predictive_sample = with_random_state(RNASeqMixin.posterior_predictive_sample)
    get_feature_correlation_matrix = with_random_state(RNASeqMixin.get_feature_correlation_matrix)

    @functools.wraps(RNASeqMixin.differential_expression)
    def differential_expression(
        self, adata: AnnData | None = None, *args: Any, random_state: int = 0, **kwargs: Any
    ) -> pd.DataFrame:
        data = self._validate_anndata(adata)
        columns = set(data.obs)
        try:
            with seeded(random_state), quiet():
                return super().differential_expression(data, *args, **kwargs)
        finally:
            for column in set(data.obs) - columns:
                del data.obs[column]
