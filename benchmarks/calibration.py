"""Probabilities of the components beside the truth, on simulated cells whose components overlap.

    python benchmarks/calibration.py [--quick] [--seeds 0 1]

Trains both kinds of mixture on simulated cells, k given, and matches the components with the true ones, one to one.
The expected calibration error (ECE) is that of q(y|x), of the calibrated probabilities that `svt.tl.scvae` writes, of
those at the best temperature that labels could have given, and of the true p(y|x), which shows what chance does. The
sets are the fewest components that together have a probability of 90 %; how many cells have their true component in
theirs is given for q(y|x) and the calibrated probabilities. "Found" are simulations where most cells of each component
are matched: elsewhere the model has other components than the truth, and no temperature can make up for that.
"""

from __future__ import annotations

import argparse
import warnings
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import pandas as pd
from scipy.optimize import linear_sum_assignment, minimize_scalar
from scipy.special import log_softmax, softmax
from scipy.stats import nbinom

import scvae_tools as svt

if TYPE_CHECKING:
    from anndata import AnnData

#: New cells of each simulation, which no model is trained on.
N_NEW = 2_000
LEVEL = 0.9
GROUPS = ("training", "held out", "new")
KINDS = ("gmvae", "vade")


class Simulation(NamedTuple):
    """Arguments of a simulation."""

    n_components: int
    separation: float
    n_cells: int
    n_genes: int
    median_counts: float
    seed: int


SIMULATIONS = (
    Simulation(2, 0.2, 2_000, 500, 2_000, 1),
    Simulation(2, 0.3, 1_000, 300, 800, 0),
    Simulation(3, 0.3, 2_000, 300, 800, 0),
    Simulation(3, 0.3, 1_000, 500, 2_000, 0),
    Simulation(4, 0.3, 1_000, 300, 800, 1),
    Simulation(4, 0.4, 2_000, 300, 800, 1),
    Simulation(5, 0.3, 2_000, 500, 2_000, 1),
)
QUICK = (SIMULATIONS[1], SIMULATIONS[5])


def simulated(of: Simulation, seed: int) -> AnnData:
    """Cells of a simulation and, after them, the new ones from the same components."""
    return svt.datasets.simulate(
        of.n_cells + N_NEW,
        of.n_genes,
        of.n_components,
        separation=of.separation,
        median_counts=of.median_counts,
        random_state=seed,
    )


def true_probabilities(adata: AnnData) -> np.ndarray:
    """True p(y|x) at the true parameters, (n_cells, k)."""
    counts, r = adata.X.toarray(), np.exp(adata.var["log_r"].to_numpy())
    size, log_share = adata.obs["size_factor"].to_numpy()[:, None], adata.varm["component_log_mean"]
    each = [nbinom.logpmf(counts, r, r / (r + size * np.exp(own))).sum(1) for own in log_share.T]
    return softmax(np.stack(each, axis=1), axis=1)  # equally large components


def matched(probs: np.ndarray, truth: np.ndarray) -> tuple[np.ndarray, bool]:
    """True component that each component stands for, (k,), and whether most cells of each one are matched."""
    k = probs.shape[1]
    found = np.zeros((k, k))
    np.add.at(found, (probs.argmax(1), truth), 1)
    of_component = linear_sum_assignment(-found)[1]
    own = found[np.arange(k), of_component]
    return of_component, bool((own > 0.5 * found.sum(1)).all() and (own > 0.5 * found.sum(0)[of_component]).all())


def error(probs: np.ndarray, is_right: np.ndarray) -> float:
    """Expected calibration error in ten bins."""
    top = probs.max(1)
    bins = np.minimum((top * 10).astype(int), 9)
    return sum(abs((is_right[bins == each] - top[bins == each]).sum()) for each in range(10)) / len(top)


def coverage(probs: np.ndarray, truth: np.ndarray) -> float:
    """Share of the cells whose true component is in their set."""
    order = np.argsort(-probs, axis=1)
    before = np.cumsum(np.take_along_axis(probs, order, axis=1), axis=1) - np.take_along_axis(probs, order, axis=1)
    return float(((order == truth[:, None]) & (before < LEVEL)).any(1).mean())


def best_temperature(probs: np.ndarray, truth: np.ndarray) -> float:
    """Temperature of the highest likelihood of the true components."""
    log_probs = np.log(np.maximum(probs, 1e-38))

    def surprise(log_t: float) -> float:
        return -log_softmax(log_probs * np.exp(-log_t), axis=1)[np.arange(len(truth)), truth].mean()

    return float(np.exp(minimize_scalar(surprise, bounds=(-4, 4), method="bounded").x))


def trained(cells: AnnData, of: Simulation, kind: str, seed: int) -> svt.SCVAE:
    """Model of the cells, at its defaults but for k and the kind of mixture."""
    svt.SCVAE.setup_anndata(cells)
    model = svt.SCVAE(cells, mixture=kind, n_components=of.n_components, random_state=seed)
    model.train(random_state=seed, progress=False)
    return model


def measure(of: Simulation, kind: str, seed: int) -> list[dict]:
    """Rows of a simulation, one for each group of cells."""
    both = simulated(of, seed)
    truth, true_probs = both.obs["component"].cat.codes.to_numpy(), true_probabilities(both)
    cells, new = both[: of.n_cells].copy(), both[of.n_cells :].copy()
    model = trained(cells, of, kind, seed)
    raw, shown = (
        np.concatenate([model.predict(each, soft=True, calibrated=how).to_numpy() for each in (cells, new)])
        for how in (False, True)
    )
    of_component, is_found = matched(raw, truth)
    own = np.argsort(of_component)[truth]  # the model's number of each cell's true component
    best = softmax(np.log(np.maximum(raw, 1e-38)) / best_temperature(raw[: of.n_cells], own[: of.n_cells]), axis=1)
    rows = []
    places = model.train_indices, model.validation_indices, np.arange(of.n_cells, len(truth))
    for group, at in zip(GROUPS, places, strict=True):
        is_right = raw[at].argmax(1) == own[at]
        rows.append(
            {
                "simulation": f"k={of.n_components}, s={of.separation}, n={of.n_cells}, seed {seed}",
                "kind": kind,
                "cells": group,
                "found": is_found,
                "accuracy": is_right.mean(),
                "T": model.temperature,
                "ECE of q(y|x)": error(raw[at], is_right),
                "ECE calibrated": error(shown[at], is_right),
                "ECE best T": error(best[at], is_right),
                "ECE truth": error(true_probs[at], true_probs[at].argmax(1) == truth[at]),
                "in set of q(y|x)": coverage(raw[at], own[at]),
                "in set calibrated": coverage(shown[at], own[at]),
            }
        )
    return rows


def main() -> None:
    """Run, print each simulation when it is there, and the means at the end."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="two simulations")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="added to the seed of each simulation")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    rows = []
    for added in options.seeds:
        for of in QUICK if options.quick else SIMULATIONS:
            for kind in KINDS:
                rows += measure(of, kind, of.seed + added)
                latest = pd.DataFrame(rows[-len(GROUPS) :]).round(3)
                print(latest.to_string(index=False, header=len(rows) == len(GROUPS)), flush=True)
    table = pd.DataFrame(rows).drop(columns="simulation").assign(simulations=1)
    how = dict.fromkeys(table.columns.drop(["kind", "cells", "found"]), "mean") | {"simulations": "sum"}
    print(table.groupby(["found", "kind", "cells"], sort=False).agg(how).round(3).to_string())


if __name__ == "__main__":
    main()
