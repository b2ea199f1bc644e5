"""Clusters that are found in one population, and in two that differ in a few genes, beside Leiden.

    python benchmarks/splits.py [--seeds 0 1 2] [--quick] [--only NAME ...] [--files FOLDER] [--json FILE]

Nulls: 1,000 simulated cells of one population (500 genes, negative binomial with r = 5 unless said, median 2,000
counts), which must stay one cluster. Differences: 1,000 cells of two populations that differ by a fold in some genes,
which must be found: two clusters, and an adjusted Rand index (ARI) of at least half that of an oracle that knows the
genes, the fold and the shares. ``--files`` adds each label of at least 150 cells in ``obs["cell_type"]`` of the .h5ad
files of a folder as a null of its own; ``obs["batch"]``, where there are several, is the ``batch_key``.

All by the main call with its defaults, the number of clusters unknown. Leiden: scanpy's defaults at resolution 1
(log-normalised counts, 50 principal components). "gain": held-out ELBO over the log-likelihood of a model without
latent variables, in nats per cell. Seconds: of the main call. ``--quick``: one seed, and half of the cases.
"""

from __future__ import annotations

import argparse
import json
import logging
import time
import warnings
from fnmatch import fnmatch
from pathlib import Path
from typing import TYPE_CHECKING

import _split_data as data
import anndata
import numpy as np
import pandas as pd
import scanpy as sc
from clustering import leiden
from sklearn.metrics import adjusted_rand_score

import scvae_tools as svt

if TYPE_CHECKING:
    from collections.abc import Iterator

SMALLEST_LABEL = 150
NULL, DIFFERENCE, REAL = "one population, simulated", "two populations, simulated", "one population, real"


def cases(options: argparse.Namespace, seed: int) -> Iterator[tuple[str, str, anndata.AnnData, float]]:
    """Kind and name of a case, its cells, and the ARI of the oracle (NaN for one population)."""
    for number, (name, draw) in enumerate(data.NULLS.items()):
        yield NULL, name, data.as_adata(draw(np.random.default_rng([seed, number]))), np.nan
    for number, difference in enumerate(data.DIFFERENCES):
        rng = np.random.default_rng([seed, 100 + number])
        x, is_second, genes = data.two_populations(difference, rng)
        yield DIFFERENCE, str(difference), data.as_adata(x, is_second), oracle(x, is_second, genes)
    for path in sorted(Path(options.files).glob("*.h5ad")) if options.files else ():
        adata = anndata.read_h5ad(path)
        sizes = adata.obs["cell_type"].value_counts()
        for label in sizes.index[sizes >= SMALLEST_LABEL]:
            own = adata[adata.obs["cell_type"] == label].copy()
            sc.pp.filter_genes(own, min_cells=1)
            yield REAL, f"{path.stem}: {label}", own, np.nan


def oracle(x: np.ndarray, is_second: np.ndarray, genes: np.ndarray) -> float:
    """ARI of the best classification by the genes that differ, from their log-likelihoods in both populations.

    The shares of the genes are estimated from the true labels; r is known.
    """
    size, r = x.sum(1, keepdims=True), data.INVERSE_DISPERSION
    first, second = (x[own].sum(0) + 0.5 for own in (~is_second, is_second))
    log_joint = []
    for total, own in ((first, ~is_second), (second, is_second)):
        rate = (size * total / size[own].sum())[:, genes]
        each = x[:, genes] * np.log(rate / (r + rate)) - r * np.log(r + rate)
        log_joint.append(each.sum(1) + np.log(own.mean()))
    return adjusted_rand_score(is_second, log_joint[1] > log_joint[0])


def n_of_leiden(adata: anndata.AnnData, seed: int) -> int:
    """Number of clusters of Leiden on 50 principal components of log-normalised counts."""
    other = anndata.AnnData(adata.X.copy())
    sc.pp.normalize_total(other)
    sc.pp.log1p(other)
    sc.pp.pca(other, n_comps=min(50, *(size - 1 for size in other.shape)), random_state=seed)
    return len(np.unique(leiden(other.obsm["X_pca"], None, seed)))


def measure(kind: str, name: str, adata: anndata.AnnData, of_oracle: float, seed: int) -> dict[str, object]:
    """Row of the results of one case."""
    start = time.perf_counter()
    own = adata.copy()
    has_batches = "batch" in own.obs and own.obs["batch"].nunique() > 1
    options = {"batch_key": "batch" if has_batches else None, "accelerator": "cpu"}
    svt.tl.scvae(own, random_state=seed, progress=False, write_lambda=False, **options)
    seconds = time.perf_counter() - start
    summary = own.uns["scvae"]
    sizes = own.obs["scvae"].value_counts()
    row = {
        "kind": kind,
        "case": name,
        "seed": seed,
        "clusters": len(sizes),
        "sizes": " ".join(map(str, sizes[:6])),
        "Leiden": n_of_leiden(adata, seed),
        "gain": summary["elbo"]["validation"]["elbo"] - summary["null_log_likelihood"]["validation"],
        "seconds": seconds,
    }
    if kind == DIFFERENCE:
        row["ARI"] = adjusted_rand_score(adata.obs["cell_type"], own.obs["scvae"])
        row["oracle"] = of_oracle
        row["found"] = len(sizes) == 2 and row["ARI"] >= 0.5 * of_oracle
    else:
        row["found"] = len(sizes) == 1
    return row


def summary_of(rows: list[dict[str, object]]) -> pd.DataFrame:
    """Share of the sets of each case that were right, and means over seeds."""
    table = pd.DataFrame(rows).drop(columns=["sizes", "seed"])
    return table.groupby(["kind", "case"], sort=False).mean(numeric_only=False).round(2)


def line(row: dict[str, object]) -> str:
    """Row in one line, printed as it comes."""
    values = {name: f"{value:.2f}" if isinstance(value, float) else value for name, value in row.items()}
    return "  ".join(f"{name} {value}" for name, value in values.items())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--only", nargs="+", help="names of cases, with * and ?")
    parser.add_argument("--files", help="folder of .h5ad files with labels in obs['cell_type']")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    if options.quick:
        options.seeds = options.seeds[:1]
    warnings.simplefilter("ignore")
    logging.disable(logging.INFO)
    sc.settings.verbosity = 0
    rows = []
    for seed in options.seeds:
        for number, (kind, name, adata, of_oracle) in enumerate(cases(options, seed)):
            if options.only and not any(fnmatch(name, pattern) for pattern in options.only):
                continue
            if options.quick and number % 2 and not options.only:
                continue
            rows.append(measure(kind, name, adata, of_oracle, seed))
            print(line(rows[-1]), flush=True)
    print(summary_of(rows).to_string())
    for kind, own in pd.DataFrame(rows).groupby("kind", sort=False):
        print(f"{kind}: right {own['found'].sum()} of {len(own)}")
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1, default=str))


if __name__ == "__main__":
    main()
