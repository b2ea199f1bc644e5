"""Decoding of draws of z, a part of the cells and genes at a time, in memory of a stated size.

Methods of `SCVAE`, for those in ``_expression.py`` and ``_sampling.py``.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from scipy import sparse
from scvi import REGISTRY_KEYS
from scvi.model.base import RNASeqMixin, VAEMixin
from torch import Tensor

from scvae_tools._checks import cell_positions, checked
from scvae_tools._data.loader import kept_counts
from scvae_tools._messages import warn
from scvae_tools._module import memory
from scvae_tools._random import RandomStream
from scvae_tools.model._cells import CellsMixin

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from anndata import AnnData

    from scvae_tools._module.covariates import Covariates
    from scvae_tools.likelihoods import CountDistribution

#: Most cells of a chunk: where few genes are asked for, more would save no time.
LARGEST_CHUNK = 4096


class DecodingMixin(RNASeqMixin, VAEMixin, CellsMixin):
    """Decoding by `SCVAE`, for its methods of expression and sampling."""

    # -- what fits into memory ---------------------------------------------------------------------------------------

    def _n_genes(self, genes: Tensor | None) -> int:
        return len(self.var_names) if genes is None else len(genes)

    def _decoded_bytes(self, n_values: int) -> int:
        """Memory in which so many values of each parameter are decoded."""
        return 4 * n_values * (len(self.module.likelihood.heads) + memory.DECODED_NUMBERS)

    def _drawn_bytes(self) -> int:
        """Memory in which a count of each gene is drawn."""
        return 4 * len(self.var_names) * (len(self.module.likelihood.heads) + memory.DRAWN_NUMBERS)

    def _cells_at_once(self, adata: AnnData, bytes_per_cell: int) -> int:
        """Number of cells that fit into `CHUNK_BYTES` when they are encoded and then take ``bytes_per_cell`` each."""
        manager = self.get_anndata_manager(adata, required=True)
        stored = kept_counts(manager)
        matrix = manager.get_from_registry(REGISTRY_KEYS.X_KEY) if stored is None else stored
        has_zeros = stored is not None or sparse.issparse(matrix)
        n_stored = matrix.nnz if has_zeros else adata.n_obs * adata.n_vars
        bytes_per_cell += memory.ENCODED_BYTES * n_stored / max(1, adata.n_obs)
        return int(np.clip(memory.CHUNK_BYTES // bytes_per_cell, 1, LARGEST_CHUNK))

    def _n_cells(self, adata: AnnData | None, indices: Sequence[int] | None, dataloader: Iterable | None) -> int | None:
        """Number of cells of the result; None if it is not known before all batches are read."""
        if dataloader is None:
            return len(cell_positions(indices, self._validate_anndata(adata).n_obs))
        known = getattr(dataloader, "indices", None)  # loaders of the model, and of scvi-tools
        return None if known is None else len(known)

    # -- draws of z, decoded in parts --------------------------------------------------------------------------------

    def _draw(
        self, tensors: dict[str, Any], n_samples: int, batch: int | None = None, *, at_typical_size: bool = False
    ) -> Codes:
        """Draws of z from q(z|x) of a batch, to be decoded as they are or as if of another batch of the data.

        With ``at_typical_size`` a decoder that sees the size factor sees the typical one for all: expression as if all
        cells had the same size.
        """
        outputs = self.module.inference(**self.module._get_inference_input(tensors), n_samples=n_samples)
        covariates = self.module.covariates(tensors)
        if batch is not None:
            covariates = covariates._replace(batch=torch.full_like(covariates.batch, batch))
        if at_typical_size:
            covariates = self.module.at_typical_size(covariates._replace(relative_size=None))
        return Codes(outputs["z"], outputs["size"], covariates)

    def _parts(self, codes: Codes, genes: Tensor | None) -> Iterator[tuple[slice, slice]]:
        """Cells and genes that can be decoded at a time."""
        return parts(len(codes), self._n_genes(genes), self._decoded_bytes(codes.n_draws))

    def _decode(self, codes: Codes, genes: Tensor | None, cells: slice, part: slice) -> CountDistribution:
        """p(x|z) of a part of the cells, and of a part of all genes or of the given ones."""
        if genes is not None:
            genes = genes[part]
        elif part != slice(0, len(self.var_names)):
            genes = torch.arange(part.start, part.stop, device=codes.z.device)
        codes = codes.rows(cells)
        return self.module.decode(codes.z, codes.size, codes.covariates, genes)

    @checked()
    @torch.inference_mode()
    def iter_decoded(
        self,
        adata: AnnData | None = None,
        indices: Sequence[int] | None = None,
        n_samples: int = 1,
        batch_size: int | None = None,
        *,
        overhead: float = 1.0,
        random_state: int = 0,
    ) -> Iterator[DecodedPart]:
        """p(x|z) at draws of z from q(z|x), a part of the cells and genes at a time.

        Parameters
        ----------
        adata, indices
            As in `get_elbo_terms`.
        n_samples
            Draws of z per cell.
        batch_size
            Cells encoded at a time, 512 for None. The draws depend on it.
        overhead
            Memory that the caller needs of each part, as a multiple of what is decoded: parts are so small that all
            takes about ``CHUNK_BYTES`` (256 MB).
        random_state
            Seed of the draws.

        Yields
        ------
        Positions of the cells among those asked for, of the genes, and p(x|z) of these, of shape (n_cells, n_genes), or
        (n_samples, n_cells, n_genes) of several draws.
        """
        stream, batches, start = RandomStream(random_state), self._batches(adata, indices, batch_size), 0
        n_bytes = int(overhead * self._decoded_bytes(n_samples))
        while True:
            with stream.on():
                tensors = next(batches, None)
                if tensors is None:
                    return
                codes = self._draw(tensors, n_samples)
            for cells, genes in parts(len(codes), len(self.var_names), n_bytes):
                at = slice(start + cells.start, start + cells.stop)
                yield DecodedPart(at, genes, self._decode(codes, None, cells, genes))
            start += len(codes)

    # -- names of genes and batches ----------------------------------------------------------------------------------

    def _gene_positions(self, gene_list: Sequence[str] | None) -> torch.Tensor | None:
        if gene_list is None:
            return None
        positions = places_of_genes(self.var_names, _names_in(gene_list), "gene_list")
        return torch.as_tensor(positions, device=self.module.device)

    def _genes_of_model(self, gene_list: Sequence[str] | None) -> Tensor | None:
        """Positions of the genes that the model has, in its order, as scvi-tools reads a list of genes."""
        if gene_list is None:
            return None
        names, known = _names_in(gene_list), pd.Index(self.var_names)
        unknown = [name for name in names if name not in known]
        if len(unknown) == len(names):
            raise ValueError(
                f"`gene_list` must name genes of the model; found none among its {len(names)} names. "
                "`model.var_names` lists them."
            )
        if unknown:
            warn(
                f"`gene_list`: {len(unknown)} of {len(names)} names are left out, the first {unknown[0]!r}, because "
                "the model has no such gene."
            )
        return torch.as_tensor(np.flatnonzero(known.isin(names)), device=self.module.device)

    def _batch_categories(self) -> np.ndarray:
        state = self.registry["field_registries"][REGISTRY_KEYS.BATCH_KEY]["state_registry"]
        return np.asarray(state["categorical_mapping"])

    def _batch_code(self, batch: str, name: str = "batch") -> int:
        categories = self._batch_categories().tolist()
        if batch in categories:
            return categories.index(batch)
        names = [str(category) for category in categories]  # of numbers, the names are what a shell can pass
        if str(batch) not in names:
            raise ValueError(f"`{name}` must be one of {', '.join(map(repr, names))}; found {str(batch)!r}.")
        return names.index(str(batch))

    def _batch_codes(self, batches: str | Sequence[str] | None) -> list[int | None]:
        """Codes of the batches to transform to; None, alone or in the list, for each cell's own."""
        batches = [batches] if batches is None or np.isscalar(batches) else list(batches)
        if not batches:
            raise ValueError("`transform_batch` must name a batch; found none. Pass None for each cell's own.")
        return [None if batch is None else self._batch_code(batch, "transform_batch") for batch in batches]


def _names_in(gene_list: Sequence[str]) -> list[str]:
    """Names of genes in a list, of which there is one at least."""
    if isinstance(gene_list, str) or not isinstance(gene_list, Iterable):
        raise TypeError(f"`gene_list` must be a list of names; found {gene_list!r}. Pass [{gene_list!r}] for one.")
    names = list(gene_list)
    if not names:
        raise ValueError("`gene_list` must name at least one gene; found none. Pass None for all.")
    return names


def places_of_genes(known: np.ndarray, names: Sequence[str], argument: str) -> list[int]:
    """Places of named genes among those of a model.

    Raises
    ------
    ValueError
        If a gene is none of the model, or several have its name.
    """
    places: dict[str, list[int]] = {}
    for place, name in enumerate(known.tolist()):
        places.setdefault(name, []).append(place)
    unknown = [name for name in names if name not in places]
    if unknown:
        raise ValueError(
            f"`{argument}` must name genes of the model; {len(unknown)} of {len(names)} are not, the first "
            f"{unknown[0]!r}. `model.var_names` lists them."
        )
    for name in names:
        if len(places[name]) > 1:
            raise ValueError(
                f"`{argument}` must name one gene each; found {name!r}, the name of {len(places[name])} genes of "
                "the model. Train on data with names of their own, for example after adata.var_names_make_unique()."
            )
    return [places[name][0] for name in names]


class DecodedPart(NamedTuple):
    """p(x|z) of some cells and genes."""

    cells: slice
    genes: slice
    px: CountDistribution


@dataclass(frozen=True)
class Codes:
    """Latent codes of some cells, with the other arguments of `VAE.decode`."""

    z: Tensor  # (n, d), or (s, n, d) of several draws
    size: Tensor  # (n, 1)
    covariates: Covariates

    def __len__(self) -> int:
        return len(self.size)

    @property
    def n_draws(self) -> int:
        """Number of draws of each cell, s."""
        return len(self.z) if self.z.ndim == 3 else 1

    def rows(self, at: slice | Tensor) -> Codes:
        """Codes of some of the cells."""
        return Codes(self.z[..., at, :], self.size[at], self.covariates.rows(at))

    def chosen(self, sample: np.ndarray, cell: np.ndarray) -> Codes:
        """Single draws (m,) of cells (m,), as the codes of m cells."""
        at = torch.as_tensor(cell, device=self.z.device)
        z = self.z[torch.as_tensor(sample, device=self.z.device), at] if self.z.ndim == 3 else self.z[at]
        return Codes(z, self.size[at], self.covariates.rows(at))


def parts(n_cells: int, n_genes: int, bytes_each: int) -> Iterator[tuple[slice, slice]]:
    """Slices of cells and genes that cover all, each within `CHUNK_BYTES`; with all genes of a cell if these fit."""
    genes = min(n_genes, max(1, memory.CHUNK_BYTES // bytes_each))
    cells = max(1, memory.CHUNK_BYTES // (bytes_each * genes))
    for cell in range(0, n_cells, cells):
        for gene in range(0, n_genes, genes):
            yield slice(cell, min(cell + cells, n_cells)), slice(gene, min(gene + genes, n_genes))
