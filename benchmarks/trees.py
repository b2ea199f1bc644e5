"""Cuts of the tree of a mixture beside trainings with that number of components, on simulated cells; time and memory.

``python benchmarks/trees.py`` prints the adjusted Rand index against the simulated components, of clusters that are cut
from a model with fewer or more components and of models that are trained with the true number.
``python benchmarks/trees.py --cells 1000000`` prints the seconds and the memory of the tree and of cuts of so many
cells (without a model: latent codes and probabilities are those of simulated Gaussians).
``python benchmarks/trees.py --one-gaussian`` prints the overlap of the two parts of cells of one Gaussian.
"""

from __future__ import annotations

import argparse
import resource
import time

import anndata as ad
import numpy as np
import pandas as pd

import scvae_tools as svt

N_CELLS, N_GENES, N_TRUE = 1500, 200, 8


def compare_with_trainings(seeds: list[int], separation: float) -> None:
    """Print the adjusted Rand index of each model, by seed and number of components that it was trained with."""
    for seed in seeds:
        adata = svt.datasets.simulate(N_CELLS, N_GENES, N_TRUE, separation=separation, random_state=seed)
        truth = adata.obs["component"]
        for n_components in (N_TRUE // 2, N_TRUE, 2 * N_TRUE):
            options = {"n_components": n_components, "random_state": seed, "write_lambda": False, "progress": False}
            start = time.perf_counter()
            svt.tl.scvae(adata, **options)
            trained = time.perf_counter()
            svt.tl.tree(adata)
            built = time.perf_counter()
            svt.tl.cut(adata, n_clusters=N_TRUE)
            cut = time.perf_counter()
            row = {"seed": seed, "trained with": n_components, "ari": svt.metrics.ari(adata.obs["scvae_cut"], truth)}
            row |= {"ari as trained": svt.metrics.ari(adata.obs["scvae"], truth)}
            row |= {"s training": trained - start, "s tree": built - trained, "s cut": cut - built}
            print(", ".join(f"{name} {value:.3g}" for name, value in row.items()), flush=True)


def split_one_gaussian(n_seeds: int = 5, n_latent: int = 10) -> None:
    """Print the overlaps of the parts of cells of one Gaussian, in nats per cell of the smaller, by number of cells."""
    for n_cells in (50, 100, 200, 500, 1000, 3000):
        found = []
        for seed in range(n_seeds):
            adata = ad.AnnData(obs=pd.DataFrame(index=np.arange(n_cells).astype(str)))
            adata.obsm["X_scvae"] = np.random.default_rng(seed).normal(size=(n_cells, n_latent)).astype(np.float32)
            adata.obsm["scvae_probs"] = np.ones((n_cells, 1), np.float32)
            adata.obs["scvae"] = pd.Categorical(["0"] * n_cells)
            svt.tl.tree(adata, max_depth=1, random_state=seed)
            found.append(adata.uns["scvae_tree"]["nodes"]["overlap"].iloc[0])
        print(f"{n_cells:5} cells: {np.nanmin(found):.3f} to {np.nanmax(found):.3f}", flush=True)


def time_many(n_cells: int, n_components: int = 20, n_latent: int = 10) -> None:
    """Print seconds, in all and of the processor, and memory of a tree of many cells."""
    print(f"{svt.SCVAE.__name__} with torch is loaded, {n_cells:,} cells")
    rng = np.random.default_rng(0)
    centres = rng.normal(size=(n_components, n_latent)).astype(np.float32) * 2
    label = rng.integers(n_components, size=n_cells)
    latent = centres[label] + rng.normal(size=(n_cells, n_latent)).astype(np.float32)
    log_joint = latent @ centres.T - (centres**2).sum(1) / 2
    probs = np.exp(log_joint - log_joint.max(1, keepdims=True))
    probs /= probs.sum(1, keepdims=True)
    adata = ad.AnnData(obs=pd.DataFrame(index=np.arange(n_cells).astype(str)))
    adata.obsm["X_scvae"], adata.obsm["scvae_probs"] = latent, probs
    adata.obs["scvae"] = pd.Categorical.from_codes(probs.argmax(1), np.arange(n_components).astype(str))
    for name, call in {
        "tree, no parts": lambda: svt.tl.tree(adata, max_depth=0),
        "tree": lambda: svt.tl.tree(adata),
        "cut, n_clusters=5": lambda: svt.tl.cut(adata, n_clusters=5),
        "cut, below='3'": lambda: svt.tl.cut(adata, below="3"),
    }.items():
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        start = time.perf_counter(), time.process_time()
        call()
        seconds, of_processor = time.perf_counter() - start[0], time.process_time() - start[1]
        more = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
        print(
            f"{name:20} {seconds:8.1f} s ({of_processor:.1f} s of the processor), {more:8.0f} MiB more at most",
            flush=True,
        )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--separation", type=float, default=0.7)
    parser.add_argument("--cells", type=int)
    parser.add_argument("--one-gaussian", action="store_true")
    given = parser.parse_args()
    if given.one_gaussian:
        split_one_gaussian()
    elif given.cells:
        time_many(given.cells)
    else:
        compare_with_trainings(given.seeds, given.separation)
