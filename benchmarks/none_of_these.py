"""Cells of a type that a model has not seen: how well `SCVAE.get_fit` tells them, and how often it is wrong.

    python benchmarks/none_of_these.py [--seeds 0 1 2]

Simulated cells of six types; the last one is not trained on. One row per seed: area under the ROC curve, of known new
cells against unknown ones, by the fit and by the ELBO; shares of the known and of the unknown cells whose fit is below
0.05, of the known ones also in the shallow, middle and deep third by total count.
"""

from __future__ import annotations

import argparse

import numpy as np
import pandas as pd
from sklearn.metrics import roc_auc_score

import scvae_tools as svt

N_TRAINED = 3000


def cells(seed: int, separation: float):
    """Cells to train on, new cells of the same five types, and cells of a sixth."""
    adata = svt.datasets.simulate(
        6000,
        400,
        6,
        separation=separation,
        size_factor_sd=0.5,
        median_counts=1500,
        proportions=[0.3, 0.25, 0.2, 0.15, 0.02, 0.08],
        random_state=seed,
    )
    known = np.random.default_rng(0).permutation(np.flatnonzero(adata.obs["component"] != "5"))
    unknown = np.flatnonzero(adata.obs["component"] == "5")
    return (adata[np.sort(each)].copy() for each in (known[:N_TRAINED], known[N_TRAINED:], unknown))


def row_of(seed: int, separation: float) -> dict[str, float]:
    """Figures of one model."""
    train, known, unknown = cells(seed, separation)
    svt.SCVAE.setup_anndata(train)
    model = svt.SCVAE(train)
    model.train(40, progress=False)
    fit = [model.get_fit(each) for each in (known, unknown)]
    elbo = [model.get_elbo(each, return_mean=False) for each in (known, unknown)]
    total = np.asarray(known.X.sum(1)).ravel()
    third = np.searchsorted(np.quantile(total, [1 / 3, 2 / 3]), total)
    is_known = np.repeat([True, False], list(map(len, fit)))
    return {
        "separation": separation,
        "seed": seed,
        "AUC, fit": roc_auc_score(is_known, np.concatenate(fit)),
        "AUC, ELBO": roc_auc_score(is_known, np.concatenate(elbo)),
        "known": np.mean(fit[0] < 0.05),
        **{name: np.mean(fit[0][third == i] < 0.05) for i, name in enumerate(("shallow", "middle", "deep"))},
        "unknown": np.mean(fit[1] < 0.05),
    }


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--separations", type=float, nargs="+", default=[0.7, 1.0])
    given = parser.parse_args()
    rows = [row_of(seed, separation) for separation in given.separations for seed in given.seeds]
    print(pd.DataFrame(rows).round(3).to_string(index=False))


if __name__ == "__main__":
    main()
