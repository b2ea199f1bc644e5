"""Files of simulated cells for benchmarks/scale.py, made in parts with little memory, and how they are opened."""

from __future__ import annotations

from contextlib import ExitStack, closing
from dataclasses import dataclass
from typing import TYPE_CHECKING

import anndata
import h5py
import numpy as np
import pandas as pd
import zarr
from anndata.io import read_elem, sparse_dataset, write_elem

import scvae_tools as svt

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from pathlib import Path

#: Cells of a part at most, and its cells times genes.
PART_CELLS, PART_ENTRIES = 20_000, 10**8
#: Shares of the types; the last type of the second is the rare one.
FIVE_TYPES = (0.4, 0.3, 0.2, 0.09, 0.01)
WITH_RARE = (0.4, 0.3, 0.2, 0.09, 0.009, 0.001)


@dataclass(frozen=True)
class Recipe:
    """What a file holds.

    Parameters
    ----------
    n_cells, n_genes
        Sizes.
    proportions
        Shares of the types.
    median_counts, gene_sd
        Of `svt.datasets.simulate`; those here leave about 300 counts a cell that are not 0.
    is_sorted
        Whether the cells are in the order of their types and batches; in random order otherwise.
    """

    n_cells: int
    n_genes: int = 2_000
    proportions: tuple[float, ...] = WITH_RARE
    median_counts: float = 530.0
    gene_sd: float = 1.5
    is_sorted: bool = False

    @property
    def name(self) -> str:
        """Name of the folder of its files."""
        order = "sorted" if self.is_sorted else "shuffled"
        return f"{self.n_cells}x{self.n_genes}-{len(self.proportions)}-types-{order}"

    def __str__(self) -> str:
        return f"{self.n_cells:,} x {self.n_genes:,}"


def wide(n_cells: int) -> Recipe:
    """Cells with as many genes as an unfiltered set, about 1,500 counts a cell that are not 0."""
    return Recipe(n_cells, 27_998, FIVE_TYPES, median_counts=3_000.0, gene_sd=2.15)


# -- making ------------------------------------------------------------------------------------------------------------


def simulated(recipe: Recipe) -> Iterator[anndata.AnnData]:
    """Parts of a set in random order, each with all types and both batches."""
    largest = min(PART_CELLS, PART_ENTRIES // recipe.n_genes)
    n_parts = -(-recipe.n_cells // largest)
    sizes = np.full(n_parts, recipe.n_cells // n_parts)
    sizes[: recipe.n_cells % n_parts] += 1
    first = 0
    for seed, size in enumerate(sizes.tolist()):
        part = svt.datasets.simulate(
            size,
            recipe.n_genes,
            len(recipe.proportions),
            proportions=recipe.proportions,
            median_counts=recipe.median_counts,
            gene_sd=recipe.gene_sd,
            n_batches=2,
            batch_effect=0.1,
            random_state=seed,
            gene_random_state=0,
        )
        number = np.arange(first, first + size)
        types = part.obs["component"].cat.rename_categories(lambda code: f"type{code}")
        columns = {"cell_type": types.array, "batch": part.obs["batch"].array, "number": number}
        obs = pd.DataFrame(columns, index=[f"cell{each}" for each in number])
        yield anndata.AnnData(part.X, obs, part.var[[]])
        first += size


def in_order(shuffled: anndata.AnnData) -> Iterator[anndata.AnnData]:
    """Parts of the same cells by type and batch, the counts of which are read from the file once for each of these."""
    for rows in shuffled.obs.groupby(["cell_type", "batch"], observed=True).indices.values():
        for start in range(0, shuffled.n_obs, PART_CELLS):
            own = rows[(rows >= start) & (rows < start + PART_CELLS)]
            if len(own) > 0:
                counts = shuffled.X[start : start + PART_CELLS][own - start]
                yield anndata.AnnData(counts, shuffled.obs.iloc[own].copy(), shuffled.var)


def write(parts: Iterable[anndata.AnnData], folder: Path) -> dict[str, float]:
    """Write the cells to "cells.zarr" and "cells.h5ad" in a folder, and return their number and that of the counts.

    Compression and chunks are those that anndata takes for the first part.
    """
    tables, n_values = [], 0
    with ExitStack() as files:
        groups = [
            zarr.open_group(folder / "cells.zarr", mode="w"),
            files.enter_context(closing(h5py.File(folder / "cells.h5ad", "w"))),
        ]
        for part in parts:
            for group in groups:
                if tables:
                    sparse_dataset(group["X"]).append(part.X)
                else:
                    write_elem(group, "/", part)
            tables.append(part.obs)
            n_values += part.X.nnz
        obs = pd.concat(tables)
        for group in groups:
            write_elem(group, "obs", obs)
    return {"cells": len(obs), "values_per_cell": round(n_values / len(obs), 1)}


# -- opening -----------------------------------------------------------------------------------------------------------


def opened(folder: Path, way: str) -> anndata.AnnData:
    """Cells of a folder whose counts stay in the file, for the ways "zarr" and "h5ad"; read for "memory"."""
    if way == "h5ad":
        return anndata.read_h5ad(folder / "cells.h5ad", backed="r")
    group = zarr.open_group(folder / "cells.zarr", mode="r")
    adata = anndata.AnnData(sparse_dataset(group["X"]), read_elem(group["obs"]), read_elem(group["var"]))
    return adata.to_memory() if way == "memory" else adata


def held_out(obs: pd.DataFrame, share: float) -> np.ndarray:
    """Positions of held-out cells, which are the same cells whatever the order of the file."""
    chosen = np.random.default_rng(0).permutation(len(obs))[: round(share * len(obs))]
    return np.flatnonzero(np.isin(obs["number"], chosen))
