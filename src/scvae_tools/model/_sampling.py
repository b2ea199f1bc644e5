"""Sampling from a trained model: counts of given cells, of new cells, and expression of components."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from anndata import AnnData
from scipy import sparse
from scvi import REGISTRY_KEYS, settings
from scvi.utils import track
from torch import Tensor

from scvae_tools._data.loader import EVALUATION_BATCH_SIZE
from scvae_tools._module import memory
from scvae_tools._random import RandomStream, seeded
from scvae_tools.model._chunks import SparseRows, nonzero
from scvae_tools.model._decoding import Codes, DecodingMixin

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from sparse import GCXS
    from torch import Tensor

    from scvae_tools._module.covariates import Covariates


class SampledPart(NamedTuple):
    """Counts that were drawn for some cells."""

    cells: slice
    samples: slice
    counts: np.ndarray  # (n_draws, n_cells, n_genes)


class SamplingMixin(DecodingMixin):
    """Draws from `SCVAE`, in parts that fit into memory."""

    @torch.inference_mode()
    def posterior_predictive_sample(
        self,
        adata: AnnData | None = None,
        indices: Sequence[int] | None = None,
        transform_batch: str | Sequence[str] | None = None,
        n_samples: int = 1,
        gene_list: Sequence[str] | None = None,
        batch_size: int | None = None,
        dataloader: Iterable | None = None,
        silent: bool = True,  # noqa: FBT001, FBT002
        *,
        random_state: int = 0,
        **data_loader_kwargs: Any,
    ) -> GCXS:
        """Counts drawn from p(x|z) at draws of z from q(z|x).

        Parameters
        ----------
        adata, indices
            As in `get_elbo_terms`.
        transform_batch
            Batch in place of each cell's own; of several, the draws are averaged. None for its own.
        n_samples
            Draws per cell.
        gene_list
            As in `get_normalized_expression`. Counts of all genes are drawn, so that a gene's do not depend on it.
        batch_size
            Cells at a time, ``scvi.settings.batch_size`` (128) for None; fewer where their draws would take more than
            about ``CHUNK_BYTES`` (256 MB), which is the memory needed above the result. The draws depend on the
            number of cells at a time, and where those of one cell take more, on ``CHUNK_BYTES``.
        dataloader
            Batches, in place of ``adata``; their draws are made a few at a time if need be.
        silent
            Whether to show no progress over ``transform_batch``.
        random_state
            Seed of the draws.
        **data_loader_kwargs
            Further arguments of the loader that is made of ``adata``.

        Returns
        -------
        Sparse array of float32, compressed by cell, (n_cells, n_genes), or (n_cells, n_genes, n_samples) of several.

        Raises
        ------
        ValueError
            If no gene or a batch is not one of the model.
        """
        from sparse import GCXS

        genes, batches = self._genes_of_model(gene_list), self._batch_codes(transform_batch)
        n_genes = self._n_genes(genes)
        if dataloader is None:
            adata = self._validate_anndata(adata)
            fit = self._cells_at_once(adata, n_samples * self._drawn_bytes())
            batch_size = min(batch_size or settings.batch_size, fit)
        rows = SparseRows(np.intp)
        with seeded(random_state):
            for tensors in self._batches(adata, indices, batch_size, dataloader, **data_loader_kwargs):
                parts = (
                    nonzero(self._predictive_counts(tensors, n, batches, genes, silent=silent), first, n_samples)
                    for first, n in self._draws_at_once(tensors, n_samples)
                )
                rows.add(len(tensors[REGISTRY_KEYS.BATCH_KEY]), *parts)
        shape = (rows.n_rows, n_genes, n_samples) if n_samples > 1 else (rows.n_rows, n_genes)
        return GCXS(rows.arrays(), shape=shape, compressed_axes=(0,))

    def _draws_at_once(self, tensors: dict[str, Any], n_samples: int) -> Iterator[tuple[int, int]]:
        """First and number of the draws that fit into `CHUNK_BYTES` at a time; for a batch of one cell mostly all."""
        n_cells = len(tensors[REGISTRY_KEYS.BATCH_KEY])
        step = max(1, memory.CHUNK_BYTES // (n_cells * self._drawn_bytes()))
        return ((first, min(step, n_samples - first)) for first in range(0, n_samples, step))

    def _predictive_counts(
        self, tensors: dict[str, Any], n_samples: int, batches: list[int | None], genes: Tensor | None, *, silent: bool
    ) -> np.ndarray:
        """Posterior predictive counts, averaged over batches to transform to, (n, n_genes, n_samples)."""
        each = (
            self.module.sample(tensors, n_samples=n_samples, generative_kwargs={"transform_batch": batch})
            for batch in track(batches, disable=silent)
        )
        counts = sum(each) / len(batches) if len(batches) > 1 else next(each)
        counts = counts if genes is None else counts[:, genes.cpu()]
        return counts.reshape(*counts.shape[:2], n_samples).numpy()

    @torch.inference_mode()
    def iter_samples(
        self,
        adata: AnnData | None = None,
        indices: Sequence[int] | None = None,
        n_samples: int = 1,
        batch_size: int | None = None,
        *,
        random_state: int = 0,
    ) -> Iterator[SampledPart]:
        """Counts drawn from p(x|z) at draws of z from q(z|x), a part of the cells and draws at a time.

        What `posterior_predictive_sample` draws, where all of it would not fit into memory.

        Parameters
        ----------
        adata, indices, n_samples, batch_size, random_state
            As in `posterior_predictive_sample`.

        Yields
        ------
        Positions of the cells among those asked for, numbers of the draws, and the counts of all genes, (n_draws,
        n_cells, n_genes) float32.
        """
        adata = self._validate_anndata(adata)
        fit = self._cells_at_once(adata, n_samples * self._drawn_bytes())
        batches = self._batches(adata, indices, min(batch_size or settings.batch_size, fit))
        stream, start = RandomStream(random_state), 0
        while True:
            with stream.on():
                tensors = next(batches, None)
            if tensors is None:
                return
            stop = start + len(tensors[REGISTRY_KEYS.BATCH_KEY])
            for first, n in self._draws_at_once(tensors, n_samples):
                with stream.on():
                    counts = self._predictive_counts(tensors, n, [None], None, silent=True)  # (n, g, s)
                yield SampledPart(slice(start, stop), slice(first, first + n), np.moveaxis(counts, 2, 0))
            start = stop

    @torch.inference_mode()
    def iter_component_expression(
        self, components: Sequence[str], n_samples: int = 200, *, bytes_beside: int = 0, random_state: int = 0
    ) -> Iterator[tuple[slice, np.ndarray]]:
        """Log of normalized expression at draws of z from p(z|y) of some components, a part of the genes at a time.

        Batch and covariates of a draw are the same for all components. They are those of cells of the model's data,
        each batch as often as its share of the cells; of a model without data those of the cells that it keeps.

        Parameters
        ----------
        components
            Names of k components.
        n_samples
            Draws of z from each.
        bytes_beside
            Memory that the caller needs for each draw and gene beside what is decoded: parts are so small that all
            takes about ``CHUNK_BYTES`` (256 MB).
        random_state
            Seed of the draws.

        Yields
        ------
        Positions of the genes, and the natural log of λ over the size factor, (k, n_samples, n_genes) float64.
        """
        module, k = self.module, len(components)
        module.eval()
        with seeded(random_state):
            y = self._chosen_components(components, k)
            z = module.mixture.sample(y.repeat_interleave(n_samples)).unflatten(0, (k, n_samples))
            # A size factor of 1 makes the log of λ that of normalized expression, with no exponential in between.
            codes = Codes(z, torch.ones(n_samples, 1, device=module.device), self._covariates_of_cells(n_samples))
        step = max(1, memory.CHUNK_BYTES // (n_samples * (self._decoded_bytes(k) + bytes_beside)))
        for start in range(0, len(self.var_names), step):
            genes = slice(start, min(start + step, len(self.var_names)))
            px = self._decode(codes, None, slice(None), genes)
            log_share = px.params["log_rate"] if px.likelihood.rate_is_head else px.scale.log()
            yield genes, log_share.cpu().double().numpy()

    def _covariates_of_cells(self, n_samples: int) -> Covariates:
        """Batch and covariates of cells of the model's data, each batch within one draw of its share of the cells."""
        module = self.module
        if self.adata is None:
            _, known = module.reference(torch.arange(len(module.reference_batch), device=module.device))
        else:
            known = module.covariates_of(
                self._registered(REGISTRY_KEYS.BATCH_KEY, torch.long),
                self._registered(REGISTRY_KEYS.CAT_COVS_KEY, torch.long),
                self._registered(REGISTRY_KEYS.CONT_COVS_KEY, torch.float32),
            )
        batch = known.batch[:, 0].cpu()
        cells = torch.randperm(len(batch))
        cells = cells[torch.argsort(batch[cells], stable=True)]  # by batch, in random order within
        at = ((torch.rand((), dtype=torch.double) + torch.arange(n_samples)) * (len(batch) / n_samples)).long()
        known = known.rows(cells[at.clamp(max=len(batch) - 1)].to(module.device))
        return module.at_typical_size(known)  # not at the size factor of 1, with which they are decoded

    def _registered(self, key: str, dtype: torch.dtype) -> Tensor | None:
        """Registered column of the model's data; None if there is none under this key."""
        if key not in self.adata_manager.data_registry:
            return None
        # A copy: pandas hands out arrays that must not be written to, and torch takes none of these.
        return torch.as_tensor(
            np.array(self.adata_manager.get_from_registry(key)), dtype=dtype, device=self.module.device
        )

    def sample(
        self,
        n_cells: int = 1000,
        *,
        components: str | Sequence[str] | None = None,
        batch: str | None = None,
        batch_size: int | None = None,
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
            Cells decoded at a time, 512 for None; fewer where they would take more than about ``CHUNK_BYTES``
            (256 MB), which is the memory needed above the result. The counts drawn depend on it.
        random_state
            Seed.

        Returns
        -------
        Counts (n_cells, n_genes) as CSR float32, with ``obs["size_factor"]``, ``obs["batch"]``, for a mixture
        ``obs["component"]``, and ``obsm["X_latent"]``.
        """
        chosen = self._chosen_components(components, n_cells)
        fit = max(1, memory.CHUNK_BYTES // self._drawn_bytes())
        counts = SparseRows(np.int32)
        with seeded(random_state), torch.inference_mode():
            z, y = self.module.sample_latent(n_cells, chosen)
            rows = self._reference_rows(n_cells, batch)
            size, covariates = self.module.reference(rows)
            if batch is not None:
                covariates = covariates._replace(batch=torch.full_like(covariates.batch, self._batch_code(batch)))
            for at in torch.arange(n_cells, device=z.device).split(min(batch_size or EVALUATION_BATCH_SIZE, fit)):
                px = self.module.decode(z[at], size[at], covariates.rows(at))
                counts.add(len(at), nonzero(px.sample().cpu().numpy()[:, :, None]))
                del px  # before the next is decoded
        obs = pd.DataFrame(index=[f"sample{i}" for i in range(n_cells)])
        obs["size_factor"] = size[:, 0].cpu().numpy()
        obs["batch"] = pd.Categorical(self._batch_categories()[covariates.batch[:, 0].cpu().numpy()])
        if self.is_mixture:
            obs["component"] = pd.Categorical(np.array(self.components)[y.cpu().numpy()], categories=self.components)
        return AnnData(
            sparse.csr_matrix(counts.arrays(), shape=(n_cells, len(self.var_names))),
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

    def _reference_rows(self, n_cells: int, batch: str | None) -> torch.Tensor:
        """Random rows of the kept size factors and covariates, of the given batch if any are."""
        known = self.module.reference_batch[:, 0]
        rows = torch.arange(len(known), device=known.device)
        if batch is not None and (known == self._batch_code(batch)).any():
            rows = rows[known == self._batch_code(batch)]
        return rows[torch.randint(len(rows), (n_cells,), device=rows.device)]
