"""Simulated cells for `splits.py`: one population in many guises, and two that differ in a few genes."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import anndata
import numpy as np
import pandas as pd
from scipy import sparse

if TYPE_CHECKING:
    from collections.abc import Callable

N_CELLS, N_GENES = 1_000, 500
MEDIAN_COUNTS, GENE_SD, INVERSE_DISPERSION = 2_000.0, 1.5, 5.0


class Draw(NamedTuple):
    """What makes the counts of cells."""

    log_share: np.ndarray  #: log of each gene's share, before it is normalised, (n_genes,) or (n_cells, n_genes)
    size: np.ndarray  #: expected counts, (n_cells,)


def base(rng: np.random.Generator, depth_sd: float = 0.4, n_cells: int = N_CELLS) -> Draw:
    """A population whose cells differ in size alone."""
    size = MEDIAN_COUNTS * np.exp(depth_sd * rng.standard_normal(n_cells))
    return Draw(GENE_SD * rng.standard_normal(N_GENES), size)


def counts(draw: Draw, rng: np.random.Generator, *, is_poisson: bool = False) -> np.ndarray:
    """Counts of cells, (n_cells, n_genes)."""
    share = np.exp(draw.log_share - draw.log_share.max(-1, keepdims=True))
    rate = draw.size[:, None] * share / share.sum(-1, keepdims=True)
    return rng.poisson(rate if is_poisson else rate * rng.gamma(INVERSE_DISPERSION, 1 / INVERSE_DISPERSION, rate.shape))


def one_population(rng: np.random.Generator, *, depth_sd: float, is_poisson: bool) -> np.ndarray:
    return counts(base(rng, depth_sd), rng, is_poisson=is_poisson)


def gradient(rng: np.random.Generator, *, n_dimensions: int) -> np.ndarray:
    """Cells spread evenly along a line or over a square, each direction with 100 genes of its own."""
    draw = base(rng)
    position = rng.uniform(-1.5, 1.5, (N_CELLS, n_dimensions))
    slope = np.zeros((n_dimensions, N_GENES))
    for direction in slope:
        direction[rng.choice(N_GENES, 100, replace=False)] = 0.5 * rng.standard_normal(100)
    return counts(draw._replace(log_share=draw.log_share + position @ slope), rng)


def ambient(rng: np.random.Generator) -> np.ndarray:
    """Cells with 5 to 60 % of their counts from a foreign profile."""
    draw = base(rng)
    own, foreign = (np.exp(x) / np.exp(x).sum() for x in (draw.log_share, GENE_SD * rng.standard_normal(N_GENES)))
    share = rng.beta(2, 6, N_CELLS)[:, None]
    return counts(draw._replace(log_share=np.log((1 - share) * own + share * foreign)), rng)


def doublets(rng: np.random.Generator) -> np.ndarray:
    """Cells of which a tenth are two cells of the same population."""
    x = one_population(rng, depth_sd=0.4, is_poisson=False)
    n = N_CELLS // 10
    return np.concatenate([x[: N_CELLS - n], x[:n] + x[n : 2 * n]])


def cell_cycle(rng: np.random.Generator) -> np.ndarray:
    """Cells spread evenly over a circle, whose 60 genes peak at angles of their own."""
    draw = base(rng)
    effect = np.zeros((N_CELLS, N_GENES))
    genes = rng.choice(N_GENES, 60, replace=False)
    effect[:, genes] = np.cos(rng.uniform(0, 2 * np.pi, (N_CELLS, 1)) - rng.uniform(0, 2 * np.pi, 60))
    return counts(draw._replace(log_share=draw.log_share + effect), rng)


NULLS: dict[str, Callable[[np.random.Generator], np.ndarray]] = {
    f"{name}, depth sd {sd:g}": lambda rng, sd=sd, name=name: one_population(
        rng, depth_sd=sd, is_poisson=name == "Poisson"
    )
    for name in ("NB", "Poisson")
    for sd in (0.4, 1.0)
}
NULLS |= {
    "gradient, 1 dimension": lambda rng: gradient(rng, n_dimensions=1),
    "gradient, 2 dimensions": lambda rng: gradient(rng, n_dimensions=2),
    "ambient counts": ambient,
    "doublets": doublets,
    "cell cycle": cell_cycle,
}


class Difference(NamedTuple):
    """How two populations differ."""

    n_genes: int
    fold: float
    share: float  #: of the smaller one

    def __str__(self) -> str:
        return f"{self.n_genes} genes x {self.fold:g}, {1 - self.share:.0%}/{self.share:.0%}"


DIFFERENCES = [
    Difference(n_genes, fold, share) for n_genes in (50, 20, 10) for fold in (2.5, 4.0) for share in (0.5, 0.05)
]


def two_populations(difference: Difference, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Counts, the population of each cell, and the genes that differ; half of them are higher in the smaller one."""
    draw = base(rng)
    is_second = rng.permutation(np.arange(N_CELLS) < round(difference.share * N_CELLS))
    genes = rng.choice(N_GENES, difference.n_genes, replace=False)
    effect = np.zeros(N_GENES)
    effect[genes] = np.log(difference.fold) * rng.permutation(np.resize([1, -1], difference.n_genes))
    x = counts(draw._replace(log_share=draw.log_share + np.outer(is_second, effect)), rng)
    return x, is_second, genes


def as_adata(x: np.ndarray, is_second: np.ndarray | None = None) -> anndata.AnnData:
    """AnnData of the genes that were seen."""
    adata = anndata.AnnData(sparse.csr_matrix(x[:, x.any(0)].astype(np.float32)))
    if is_second is not None:
        adata.obs["cell_type"] = pd.Categorical(is_second.astype(int).astype(str))
    return adata
