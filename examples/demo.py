"""The main job on 700 real cells: counts in; latent space, clusters and λ out; pictures and a file in ``demo/``."""

from __future__ import annotations

import time
from pathlib import Path

import matplotlib as mpl

mpl.use("Agg")

import scanpy as sc
from sklearn.metrics import adjusted_rand_score

import scvae_tools as svt


def main(folder: Path = Path("demo")) -> None:
    """Fit, report, draw, save."""
    folder.mkdir(exist_ok=True)
    adata = svt.datasets.pbmc68k_reduced()
    print(
        f"Data: 700 peripheral blood mononuclear cells (10x Genomics), {adata.n_vars} genes, raw counts up to "
        f"{adata.X.max():.0f}, {1 - adata.X.nnz / adata.n_obs / adata.n_vars:.1%} zeros"
    )

    start = time.perf_counter()
    svt.tl.scvae(adata, likelihood="nb", mixture=True)
    seconds = time.perf_counter() - start

    result = adata.uns["scvae"]
    history = result["history"]
    stages = ", ".join(f"{len(rows)} {stage}" for stage, rows in history.groupby("stage", sort=False))
    print(f"Time: {seconds:.1f} s for {len(history)} epochs ({stages})")
    for subset, terms in result["elbo"].items():
        print(
            f"ELBO, {subset}: {terms['elbo']:.1f} nats per cell = log-likelihood {terms['log_likelihood']:.1f} "
            f"- KL z {terms['kl_z']:.1f} - KL y {terms['kl_y']:.1f}"
        )
    found = result["components"]
    print(
        f"Components: {found['n_components']} found, {found['n_used']} in use; "
        f"as many as {found['n_effective']:.1f} of equal size"
    )
    print(f"ARI against bulk_labels: {adjusted_rand_score(adata.obs['bulk_labels'], adata.obs['scvae']):.3f}")

    sc.pp.neighbors(adata, use_rep="X_scvae")
    sc.tl.umap(adata)
    svt.pl.training(adata, save=folder / "training.png")
    svt.pl.components(adata, save=folder / "components.png")
    svt.pl.clusters(adata, labels_key="bulk_labels", save=folder / "clusters.png")
    adata.write_h5ad(folder / "pbmc.h5ad")
    names = ("pbmc.h5ad", "clusters.png", "components.png", "training.png")
    print("Written:", ", ".join(str(folder / name) for name in names))


if __name__ == "__main__":
    main()
