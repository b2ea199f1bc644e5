"""What the model must find again: λ and components of simulated data, and the figures promised for real data."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from sklearn.metrics import adjusted_rand_score

import scvae_tools as svt

SHARED_DATA = Path(__file__).parents[3] / "shared" / "data"
# Of 16 hidden units none can be spared.
TOY = {
    "likelihood": "poisson",
    "n_latent": 3,
    "n_hidden": 16,
    "dropout_rate": 0.0,
    "random_state": 1,
    "progress": False,
}


def read_shared(name):
    path = SHARED_DATA / f"{name}.h5ad"
    if not path.exists():
        pytest.skip(f"{name}.h5ad is not in ../shared/data")
    import anndata

    return anndata.read_h5ad(path)


@pytest.mark.parametrize("mixture", [False, "vade"])
def test_the_rates_of_the_poisson_toy_are_recovered(mixture):
    adata = svt.datasets.poisson_toy()
    svt.tl.scvae(adata, mixture=mixture, n_components=2 if mixture else None, max_epochs=30, **TOY)
    rate = adata.layers["scvae_lambda"].mean(0)
    assert np.abs(rate / adata.var["lambda"] - 1).mean() < 0.03


def test_each_cell_has_the_rates_of_the_poisson_toy_where_there_is_no_size_factor():
    adata = svt.datasets.poisson_toy()
    svt.tl.scvae(adata, mixture=False, use_size_factor=False, max_epochs=60, **TOY)
    error = np.abs(adata.layers["scvae_lambda"] / adata.var["lambda"].to_numpy() - 1)
    assert error.mean() < 0.03


@pytest.mark.parametrize("mixture", ["gmvae", "vade"])
def test_the_rates_of_each_component_of_the_mixture_toy_are_recovered(mixture):
    adata = svt.datasets.poisson_mixture_toy()
    options = {"n_components": 5, "use_size_factor": False, "max_epochs": 90, "lr": 2e-3}
    svt.tl.scvae(adata, mixture=mixture, **options, **TOY)
    assert adjusted_rand_score(adata.obs["component"], adata.obs["scvae"]) > 0.94
    rate, component = adata.layers["scvae_lambda"], adata.obs["component"].astype(int).to_numpy()
    found = np.stack([rate[component == c].mean(0) for c in range(5)])
    assert np.abs(found / adata.varm["lambda"].T - 1).mean() < 0.03


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("mixture", ["gmvae", "vade"])
def test_components_of_a_separated_simulation_are_recovered(mixture, seed):
    adata = svt.datasets.simulate(1000, 200, 5, separation=1.5, random_state=seed)
    svt.tl.scvae(adata, mixture=mixture, n_components=5, max_epochs=40, random_state=seed, progress=False)
    assert adjusted_rand_score(adata.obs["component"], adata.obs["scvae"]) >= 0.95


def test_batches_do_not_become_components():
    adata = svt.datasets.simulate(1000, 200, 3, n_batches=2, batch_effect=0.7, separation=1.5)
    svt.tl.scvae(adata, n_components=3, batch_key="batch", max_epochs=40, progress=False)
    assert adjusted_rand_score(adata.obs["component"], adata.obs["scvae"]) >= 0.95
    assert abs(adjusted_rand_score(adata.obs["batch"], adata.obs["scvae"])) < 0.05


@pytest.mark.slow
def test_pbmc_4k_is_clustered_better_than_by_the_original():
    # Original scVAE 2.1.4: ARI 0.443, held-out ELBO about -621 nats per cell, 28 minutes; scVI 1.4.2: -645.
    adata = read_shared("pbmc_10x_4k")
    svt.tl.scvae(adata, n_components=8, progress=False)
    result = adata.uns["scvae"]
    assert adata.obs["scvae"].nunique() == 8
    assert result["elbo"]["validation"]["elbo"] > -640
    assert adjusted_rand_score(adata.obs["cell_type"], adata.obs["scvae"]) > 0.65


@pytest.mark.slow
def test_all_genes_of_the_human_pancreas_train():
    adata = read_shared("baron_human1")
    assert adata.n_vars == 20_125
    svt.tl.scvae(adata, n_components=14, max_epochs=12, progress=False)
    history = adata.uns["scvae"]["history"]
    assert np.isfinite(adata.layers["scvae_lambda"]).all()
    assert history["elbo_validation"].iloc[-1] > history["elbo_validation"].iloc[0]
    known = adata.obs["cell_type"] != "NA"
    assert adjusted_rand_score(adata.obs.loc[known, "cell_type"], adata.obs.loc[known, "scvae"]) > 0.4
