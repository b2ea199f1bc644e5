"""Mixtures with one covariance, fitted at once, beside those of scikit-learn, fitted one by one.

    python benchmarks/mixture_fits.py [--threads 1] [--repeats 3]

16 fits, as many as the start of a mixture takes, to latent codes of 12 simulated clusters in 10 dimensions. The sides
take turns; seconds are medians. The last column is the largest difference of a probability.
"""

from __future__ import annotations

import argparse
import os
import time
import warnings

#: Cells and components.
SIZES = ((1_000, 20), (4_000, 20), (4_000, 40), (10_000, 20), (10_000, 60))
N_CLUSTERS, N_LATENT, DISTANCE = 12, 10, 4.0


def measure(n_cells: int, n_components: int, repeats: int) -> dict[str, float | str]:
    """Median seconds of both sides, turn by turn, and how far the probabilities are apart."""
    import numpy as np
    import torch
    from sklearn.mixture import GaussianMixture

    from scvae_tools._train.mixture_start import N_RUNS
    from scvae_tools._train.tied_mixtures import fit_tied_mixtures, n_fits_at_once

    rng = np.random.default_rng(0)
    centres = DISTANCE * rng.normal(size=(N_CLUSTERS, N_LATENT)) / (2 * N_LATENT) ** 0.5
    latent = centres[rng.integers(N_CLUSTERS, size=n_cells)] + rng.normal(size=(n_cells, N_LATENT))
    points, seeds = torch.as_tensor(latent), rng.integers(2**31, size=N_RUNS).tolist()
    n_at_once = n_fits_at_once(points, n_components)

    def ours() -> list[np.ndarray]:
        parts = [seeds[low : low + n_at_once] for low in range(0, N_RUNS, n_at_once)]
        return [probs.numpy() for part in parts for probs in fit_tied_mixtures(points, n_components, part)]

    def scikit_learn() -> list[np.ndarray]:
        mixtures = [GaussianMixture(n_components, covariance_type="tied", random_state=seed) for seed in seeds]
        return [mixture.fit(latent).predict_proba(latent).T for mixture in mixtures]

    seconds, found = {ours: [], scikit_learn: []}, {}
    for _ in range(repeats):
        for side, taken in seconds.items():
            start = time.perf_counter()
            found[side] = side()
            taken.append(time.perf_counter() - start)
    apart = max(np.abs(a - b).max() for a, b in zip(found[ours], found[scikit_learn], strict=True))
    medians = [float(np.median(taken)) for taken in seconds.values()]
    ratio = float(np.median(np.divide(seconds[scikit_learn], seconds[ours])))
    return {
        "cells": n_cells,
        "components": n_components,
        "ours, s": round(medians[0], 2),
        "scikit-learn, s": round(medians[1], 2),
        "ratio": round(ratio, 2),
        "apart": f"{apart:.0e}",
    }


def main() -> None:
    """Run, and print each row when it is there."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1, help="of both sides")
    parser.add_argument("--repeats", type=int, default=3, help="turns of each side")
    options = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = os.environ["OPENBLAS_NUM_THREADS"] = str(options.threads)  # before NumPy is loaded
    warnings.simplefilter("ignore")
    for size in SIZES:
        row = measure(*size, options.repeats)
        print("; ".join(f"{name} {value}" for name, value in row.items()), flush=True)


if __name__ == "__main__":
    main()
