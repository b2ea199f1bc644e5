"""Held-out ELBO, agreement with labels and time, beside scVI on the same cells.

    python benchmarks/pbmc.py FILE.h5ad --n-components 8 [--labels cell_type] [--seeds 0 1 2]

Every model trains on the same 90 % of the cells and is judged on the same 10 %; NB likelihood, one hidden layer of 128,
10 latent dimensions. scVI trains its default number of epochs and is clustered by k-means with the true k.
"""

from __future__ import annotations

import argparse
import logging
import time
import warnings
from functools import partial

import anndata
import numpy as np
import pandas as pd
import torch
from sklearn.cluster import KMeans
from sklearn.metrics import adjusted_rand_score

import scvae_tools as svt


def fit_ours(
    adata: anndata.AnnData, validation: np.ndarray, k: int, seed: int, mixture: str
) -> tuple[float, np.ndarray]:
    """Our model with its defaults: held-out ELBO and components."""
    svt.SCVAE.setup_anndata(adata)
    model = svt.SCVAE(adata, mixture=mixture, n_components=k, random_state=seed)
    model.train(validation_indices=validation, random_state=seed, progress=False)
    return model.get_elbo(indices=validation, n_samples=5), model.predict()


def fit_scvi(adata: anndata.AnnData, validation: np.ndarray, k: int, seed: int) -> tuple[float, np.ndarray]:
    """ScVI with the same layers and split: held-out ELBO and k-means of its latent space."""
    import scvi

    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    torch.manual_seed(seed)
    scvi.model.SCVI.setup_anndata(adata)
    model = scvi.model.SCVI(adata, gene_likelihood="nb", n_hidden=128, n_layers=1, n_latent=10)
    train = np.setdiff1d(np.arange(adata.n_obs), validation)
    model.train(datasplitter_kwargs={"external_indexing": [train, validation]}, enable_progress_bar=False)
    elbo = np.mean([float(model.get_elbo(indices=validation)) for _ in range(5)])
    latent = model.get_latent_representation()
    return elbo, KMeans(k, n_init=10, random_state=seed).fit_predict(latent)


FITS = {
    "scvae-tools gmvae": partial(fit_ours, mixture="gmvae"),
    "scvae-tools vade": partial(fit_ours, mixture="vade"),
    "scVI + k-means": fit_scvi,
}


def main() -> None:
    """Run and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file")
    parser.add_argument("--n-components", type=int, required=True)
    parser.add_argument("--labels", default="cell_type")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    rows = []
    for seed in options.seeds:
        adata = anndata.read_h5ad(options.file)
        known = ~adata.obs[options.labels].astype(str).isin(["NA", "ambiguous", "unknown"])
        validation = np.random.default_rng(seed).permutation(adata.n_obs)[: adata.n_obs // 10]
        for name, fit in FITS.items():
            start = time.perf_counter()
            elbo, clusters = fit(adata.copy(), validation, options.n_components, seed)
            ari = adjusted_rand_score(adata.obs.loc[known, options.labels], clusters[known.to_numpy()])
            row = {"model": name, "seed": seed, "held-out ELBO": elbo, "ARI": ari, "used": len(set(clusters))}
            rows.append(row | {"seconds": time.perf_counter() - start})
            print(pd.DataFrame(rows[-1:]).round(3).to_string(header=len(rows) == 1, index=False), flush=True)
    table = pd.DataFrame(rows).drop(columns="seed").groupby("model", sort=False)
    print("\nMean over seeds\n", table.mean().round(3).to_string(), sep="")


if __name__ == "__main__":
    main()
