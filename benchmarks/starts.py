"""What the mixture may start from: the agreement with labels of partitions of one latent space.

    python benchmarks/starts.py FILE.h5ad ... [--labels cell_type] [--seeds 0 1 2] [--n-latent 10]

For the latent space of a plain VAE per file and seed, at the number of labels: k-means, Ward, the likeliest of many
mixtures with one covariance, single runs of a finer mixture that is merged, and what the package takes; then what it
takes where the number is not known. The adjusted Rand index, as mean and standard deviation over seeds.
"""

from __future__ import annotations

import argparse
import warnings
from pathlib import Path
from typing import TYPE_CHECKING

import anndata
import numpy as np
import pandas as pd
import torch
from sklearn.cluster import AgglomerativeClustering, KMeans
from sklearn.metrics import adjusted_rand_score
from sklearn.mixture import GaussianMixture

import scvae_tools as svt
from scvae_tools._train import mixture_start
from scvae_tools._train.stages import default_max_epochs
from scvae_tools._train.tied_mixtures import TiedMixtures

if TYPE_CHECKING:
    from collections.abc import Iterator

#: Share of the epochs that train the VAE before the mixture starts.
VAE_SHARE = 0.7
UNKNOWN = ("NA", "ambiguous", "unknown", "nan")


def latent_space(adata: anndata.AnnData, seed: int, n_latent: int) -> np.ndarray:
    """Latent means of a VAE trained as long as before a mixture."""
    svt.SCVAE.setup_anndata(adata)
    model = svt.SCVAE(adata, mixture=False, n_latent=n_latent, random_state=seed)
    model.train(round(VAE_SHARE * default_max_epochs(adata.n_obs)), random_state=seed, progress=False)
    return model.get_latent_representation().astype(float)


def merged(latent: np.ndarray, k: int, surplus: float, seed: int) -> np.ndarray:
    """One run: a mixture of so many times k components, merged to k."""
    levels = mixture_start.merged_fits(torch.as_tensor(latent), [round(surplus * k)], np.random.default_rng(seed))[0]
    return next((level.label.numpy() for level in levels if level.n_components == k), np.zeros(len(latent)))


def partitions(latent: np.ndarray, k: int, seed: int) -> Iterator[tuple[str, list[np.ndarray]]]:
    """Name, and the partitions whose agreement is averaged."""
    yield "k-means", [KMeans(k, n_init=10, random_state=seed).fit_predict(latent)]
    yield "Ward", [AgglomerativeClustering(k).fit_predict(latent)]
    tied = GaussianMixture(k, covariance_type="tied", n_init=50, random_state=seed)
    yield "one covariance, likeliest of 50", [tied.fit_predict(latent)]
    for surplus in mixture_start.SURPLUS:
        runs = [merged(latent, k, surplus, 100 * seed + run) for run in range(8)]
        yield f"merged from {surplus:g} k, single runs", runs
    for name, wanted in (("taken, k known", k), ("taken, k unknown", None)):
        start, _, _ = mixture_start.start_mixture(latent, wanted, random_state=seed)
        mixture = TiedMixtures(*(torch.as_tensor(each)[None] for each in start))
        yield name, [mixture.log_joint(torch.as_tensor(latent))[0].argmax(0).numpy()]


def main() -> None:
    """Run and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="+", type=Path)
    parser.add_argument("--labels", default="cell_type")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--n-latent", type=int, default=10)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    rows = []
    for file in options.files:
        labels = anndata.read_h5ad(file, backed="r").obs[options.labels].astype(str).to_numpy()
        known = ~np.isin(labels, UNKNOWN)
        k = len(np.unique(labels[known]))
        for seed in options.seeds:
            latent = latent_space(anndata.read_h5ad(file), seed, options.n_latent)
            for name, found in partitions(latent, k, seed):
                agreement = np.mean([adjusted_rand_score(labels[known], each[known]) for each in found])
                numbers = np.mean([len(np.unique(each)) for each in found])
                rows.append({"file": file.stem, "start": name, "ARI": agreement, "components": numbers})
            print(f"{file.stem}, seed {seed}: done", flush=True)
    table = pd.DataFrame(rows).groupby(["start", "file"], sort=False).agg(["mean", "std"]).unstack("file")
    print(table.round(3).to_string())


if __name__ == "__main__":
    main()
