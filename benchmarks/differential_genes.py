"""False discoveries and power of `tl.rank_components` and `SCVAE.differential_expression` on cells of known truth.

    python benchmarks/differential_genes.py [--shares 0.5 0.05] [--folds 2.5] [--seeds 0 1 2] [--models labels found]
    python benchmarks/differential_genes.py --one-population [--seeds 0 1 2]
    python benchmarks/differential_genes.py --quick

Two populations of cells share a negative binomial for each gene but for some genes, whose share of the counts differs
by the fold given, half of them up and half of them down, so that no other gene's share differs. A model is trained with
the populations as labels, or without and two components. For each way to call genes at 5 %: the number called, the
share of these that do not differ (FDP), and the share of those that differ that is called (power). "by the decoder" and
"by the probabilities" are the s-values of `rank_components` and the calls of scvi-tools, which take the decoder's
weights as known.

`--one-population` trains two components on cells of one population: whatever is called was made by the cut.
"""

from __future__ import annotations

import argparse
import warnings
from itertools import product

import numpy as np
import pandas as pd
import scanpy as sc
from anndata import AnnData
from scipy import sparse

import scvae_tools as svt

LEVEL = 0.05
MEDIAN_COUNTS, SIZE_SD, GENE_SD, DISPERSION, DISPERSION_SD = 2000, 0.3, 1.5, 2.0, 0.5


def simulate(n_cells: int, n_genes: int, share: float, n_changed: int, fold: float, seed: int) -> AnnData:
    """Cells of two populations, ``obs["population"]``, with the true log fold changes in ``var["change"]``, in nats."""
    rng = np.random.default_rng(seed)
    log_mean = GENE_SD * rng.standard_normal(n_genes)
    up, down = np.split(rng.permutation(n_genes)[:n_changed], 2)
    log_mean[down] = log_mean[up]  # so that both populations have the same total
    change = np.zeros(n_genes)
    change[up], change[down] = np.log(fold), -np.log(fold)
    population = (rng.permutation(n_cells) < round(n_cells * share)).astype(int)
    profile = log_mean + np.array([-0.5, 0.5])[:, None] * change
    profile -= np.log(np.exp(profile).sum(1, keepdims=True))
    size = MEDIAN_COUNTS * np.exp(SIZE_SD * rng.standard_normal(n_cells))
    r = DISPERSION * np.exp(DISPERSION_SD * rng.standard_normal(n_genes))
    rate = size[:, None] * np.exp(profile[population])
    counts = rng.poisson(rate * rng.gamma(r, 1 / r, size=rate.shape)).astype(np.float32)
    adata = AnnData(sparse.csr_matrix(counts), var=pd.DataFrame({"change": change}).rename("gene{}".format))
    adata.obs["population"] = pd.Categorical(population.astype(str))
    return adata


def train(adata: AnnData, kind: str, seed: int, max_epochs: int | None) -> svt.SCVAE:
    """Model with two components, of the labels or found."""
    options = {"labels_key": "population"} if kind == "labels" else {}
    options |= {"max_epochs": max_epochs} if max_epochs else {}
    return svt.tl.scvae(
        adata, n_components=2, random_state=seed, return_model=True, progress=False, write_lambda=False, **options
    )


def called_by_probabilities(table: pd.DataFrame) -> pd.Series:
    """Calls of scvi-tools: the genes of the highest probability, whose mean is 1 − `LEVEL` at least."""
    wrong = (1 - table["proba_de"]).sort_values()
    n_called = (wrong.cumsum() / np.arange(1, len(wrong) + 1) <= LEVEL).sum()
    return pd.Series(np.arange(len(wrong)) < n_called, index=wrong.index)


def calls(adata: AnnData, model: svt.SCVAE) -> dict[str, pd.Series]:
    """Genes that each tool calls at `LEVEL`, between the component with fewer cells and the other one."""
    component = adata.obs["scvae"].value_counts().index[-1]
    found = {}
    for delta in (0.0, 0.25):
        svt.tl.rank_components(adata, model, delta=delta)
        result = adata.uns["rank_components"]
        table = sc.get.rank_genes_groups_df(adata, component, key="rank_components").set_index("names")
        by_decoder = pd.Series(result["s_values"][component] < LEVEL, table.index)
        found["rank_components, by the decoder"] = by_decoder
        found[f"rank_components, delta={delta}"] = table["pvals_adj"] < LEVEL
        found[f"rank_components, delta={delta}, and by the decoder"] = by_decoder & (table["pvals_adj"] < LEVEL)
    for delta in (0.0, 0.25):
        options = {"groupby": "scvae", "group1": component, "mode": "change", "delta": delta, "silent": True}
        table = model.differential_expression(**options)
        if delta > 0:
            found["differential_expression, by the probabilities"] = called_by_probabilities(table)
        found[f"differential_expression, delta={delta}"] = table[f"is_de_fdr_{LEVEL}"]
    return {name: value[adata.var_names].astype(bool) for name, value in found.items()}


def rates(called: pd.Series, change: pd.Series) -> dict[str, float]:
    """Number of called genes, false discovery proportion, and power (NaN where no gene differs)."""
    differs = change != 0
    n_called, n_right = int(called.sum()), int((called & differs).sum())
    power = n_right / differs.sum() if differs.any() else np.nan
    return {"called": n_called, "FDP": (n_called - n_right) / max(n_called, 1), "power": power}


def agreement(adata: AnnData) -> float:
    """Share of the cells in the component where most cells of their population are."""
    table = pd.crosstab(adata.obs["scvae"], adata.obs["population"]).to_numpy()
    return table.max(0).sum() / table.sum()


def main() -> None:
    """Run, and print a row for each data set and tool, then the means over the seeds."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shares", type=float, nargs="+", default=[0.5, 0.05])
    parser.add_argument("--folds", type=float, nargs="+", default=[2.5])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--models", nargs="+", choices=["labels", "found"], default=["labels"])
    parser.add_argument("--n-cells", type=int, default=1000)
    parser.add_argument("--n-genes", type=int, default=500)
    parser.add_argument("--max-epochs", type=int)
    parser.add_argument("--one-population", action="store_true")
    parser.add_argument("--quick", action="store_true", help="two small data sets, a minute")
    options = parser.parse_args()
    if options.quick:
        options.seeds, options.n_cells, options.n_genes, options.max_epochs = [0], 400, 200, 60
    if options.one_population:
        options.shares, options.folds, options.models = [0.5], [1.0], ["found"]
    warnings.simplefilter("ignore")
    rows = []
    for kind, share, fold, seed in product(options.models, options.shares, options.folds, options.seeds):
        adata = simulate(options.n_cells, options.n_genes, share, options.n_genes // 10, fold, seed)
        model = train(adata, kind, seed, options.max_epochs)
        about = {"model": kind, "share": share, "fold": fold, "seed": seed, "cells": agreement(adata)}
        if adata.obs["scvae"].nunique() < 2:
            print(f"{about}: one component has all cells, nothing to compare", flush=True)
            continue
        for tool, called in calls(adata, model).items():
            rows.append(about | {"tool": tool} | rates(called, adata.var["change"]))
            print("  ".join(f"{v:.3g}" if isinstance(v, float) else str(v) for v in rows[-1].values()), flush=True)
    if rows:
        table = pd.DataFrame(rows).groupby(["model", "share", "fold", "tool"], sort=False)
        print(table[["cells", "called", "FDP", "power"]].mean().round(3).to_string())


if __name__ == "__main__":
    main()
