"""The model without latent variables: its log-likelihood beside closed forms and another optimiser."""

from __future__ import annotations

import copy
import random
import warnings

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import torch
from independent import log_pmf
from scipy import optimize, stats

import scvae_tools as svt
from scvae_tools._data.loader import CountDataset
from scvae_tools._train.null_model import null_log_likelihoods, report
from scvae_tools.likelihoods import LIKELIHOODS

N_TRAIN = 300


def built(adata, *, likelihood="nb", batch_key=None, covariates=None, **options):
    """Model on the cells, its data, and a split."""
    svt.SCVAE.setup_anndata(adata, batch_key=batch_key, continuous_covariate_keys=covariates)
    model = svt.SCVAE(adata, likelihood=likelihood, mixture=False, n_latent=3, n_hidden=8, **options)
    cells = {"train": np.arange(N_TRAIN), "validation": np.arange(N_TRAIN, adata.n_obs)}
    return model.module, CountDataset(model.adata_manager, model.module.likelihood), cells


def fitted_by_scipy(module, x, size, train):
    """Log p(x) of all cells where each gene has one value for each head, fitted by L-BFGS in float64, (n,)."""
    likelihood, n_genes = module.likelihood, x.shape[1]
    names = [head.name for head in likelihood.heads]
    mean = (x[train].sum(0) + 0.5) / size[train].sum()
    start = likelihood.start(torch.as_tensor(mean * size.mean())) | {"log_rate": torch.as_tensor(np.log(mean))}
    initial = {head.name: np.full(n_genes, float(head.initial)) for head in likelihood.heads}
    first = np.concatenate([np.asarray(start.get(name, initial[name]), dtype=float) for name in names])

    def params_of(flat, cells):
        params = dict(zip(names, flat.reshape(len(names), -1), strict=True))
        log_size = torch.as_tensor(np.log(size[cells]))
        if likelihood.normalizes_rates:
            params["log_rate"] = params["log_rate"] - params["log_rate"].logsumexp(0)
        return params | {"log_rate": params["log_rate"] + log_size}

    def loss(flat):
        leaf = torch.tensor(flat, requires_grad=True)
        value = -likelihood.log_prob(torch.as_tensor(x[train]), params_of(leaf, train)).sum() / len(train)
        value.backward()
        return float(value.detach()), leaf.grad.numpy()

    found = optimize.minimize(loss, first, jac=True, method="L-BFGS-B", options={"maxiter": 100}).x
    every = np.arange(len(x))
    params = params_of(torch.tensor(found), every)
    return log_pmf(x, params, module.gene_likelihood).sum(1)


def test_of_poisson_counts_it_is_that_of_the_share_of_each_gene():
    adata = svt.datasets.simulate(400, 40, 1, likelihood="poisson", random_state=0)
    found = null_log_likelihoods(*built(adata, likelihood="poisson"), random_state=0)
    x = adata.X.toarray().astype(float)
    size, train = x.sum(1, keepdims=True), slice(N_TRAIN)
    share = x[train].sum(0) / size[train].sum()
    expected = stats.poisson.logpmf(x, size * share).sum(1)
    assert found["train"] == pytest.approx(expected[train].mean(), abs=0.01)
    assert found["validation"] == pytest.approx(expected[N_TRAIN:].mean(), abs=0.05)


def test_with_batches_it_has_shares_for_each_batch():
    adata = svt.datasets.simulate(400, 20, 1, likelihood="poisson", n_batches=2, batch_effect=1.0, random_state=0)
    found = null_log_likelihoods(*built(adata, likelihood="poisson", batch_key="batch"), random_state=0)
    x = adata.X.toarray().astype(float)
    size, expected = x.sum(1, keepdims=True), np.empty(len(x))
    for batch in adata.obs["batch"].unique():
        own = (adata.obs["batch"] == batch).to_numpy()
        train = own & (np.arange(len(x)) < N_TRAIN)
        expected[own] = stats.poisson.logpmf(x[own], size[own] * x[train].sum(0) / size[train].sum()).sum(1)
    assert found["validation"] == pytest.approx(expected[N_TRAIN:].mean(), abs=0.2)
    plain = null_log_likelihoods(*built(adata, likelihood="poisson"), random_state=0)
    assert found["validation"] > plain["validation"] + 1


# Without Lomax: of these counts its optimum lies at an infinite scale, where SciPy has no density.
@pytest.mark.parametrize("name", [name for name in LIKELIHOODS if name != "lomax"])
def test_it_is_the_optimum_that_another_optimiser_finds(name):
    adata = svt.datasets.simulate(400, 12, 1, likelihood="zinb", median_counts=120, random_state=1)
    module, dataset, cells = built(adata, likelihood=name)
    found = null_log_likelihoods(module, dataset, cells, random_state=0)
    x = module.likelihood.observed(adata.X).toarray().astype(float)
    expected = fitted_by_scipy(module, x, adata.X.toarray().sum(1, keepdims=True).astype(float), cells["train"])
    assert found["train"] == pytest.approx(expected[cells["train"]].mean(), abs=0.05)
    assert found["validation"] == pytest.approx(expected[cells["validation"]].mean(), abs=0.1)


def test_the_model_and_the_random_states_stay_as_they_were():
    module, dataset, cells = built(svt.datasets.simulate(400, 12, 1, random_state=1))
    before, states = (
        copy.deepcopy(module.state_dict()),
        (torch.get_rng_state(), np.random.get_state(), random.getstate()),  # noqa: NPY002
    )
    first = null_log_likelihoods(module, dataset, cells, random_state=0)
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())
    assert all(value.requires_grad and value.grad is None for value in module.parameters())
    assert torch.equal(torch.get_rng_state(), states[0])
    np.testing.assert_array_equal(np.random.get_state()[1], states[1][1])  # noqa: NPY002
    assert random.getstate() == states[2]
    assert first == null_log_likelihoods(module, dataset, cells, random_state=0)


def test_a_gene_without_counts_and_a_continuous_covariate_do_no_harm():
    adata = svt.datasets.simulate(400, 12, 1, random_state=1)
    counts = adata.X.toarray()
    counts[:, 3] = 0
    adata = ad.AnnData(counts, obs=pd.DataFrame({"age": np.linspace(0, 90, 400)}, index=adata.obs_names))
    found = null_log_likelihoods(*built(adata, covariates=["age"]), random_state=0)
    without = null_log_likelihoods(*built(adata), random_state=0)
    assert found["validation"] == pytest.approx(without["validation"], abs=1.0)


def test_a_latent_space_that_explains_nothing_is_warned_of():
    with pytest.warns(UserWarning, match=r"explains nothing: the ELBO .*-105.0 nats per cell.* -100.0"):
        report(-105.0, -100.0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        report(-95.0, -100.0)


def test_a_training_keeps_it_with_the_model_and_in_uns(tmp_path):
    adata = svt.datasets.simulate(400, 60, 3, median_counts=4000, separation=1.5, random_state=0)
    model = svt.tl.scvae(
        adata, mixture=False, n_latent=3, n_hidden=16, max_epochs=60, progress=False, return_model=True
    )
    known = model.null_log_likelihood
    assert set(known) == {"train", "validation"}
    assert adata.uns["scvae"]["null_log_likelihood"] == known
    assert adata.uns["scvae"]["elbo"]["validation"]["elbo"] > known["validation"]
    model.save(str(tmp_path / "model"))
    assert svt.SCVAE.load(str(tmp_path / "model")).null_log_likelihood == known
    adata.write_h5ad(tmp_path / "cells.h5ad")
    assert ad.read_h5ad(tmp_path / "cells.h5ad").uns["scvae"]["null_log_likelihood"] == known


def test_a_trial_of_a_few_steps_has_none():
    adata = svt.datasets.simulate(200, 20, 1, random_state=0)
    model = svt.tl.scvae(adata, mixture=False, max_epochs=2, progress=False, return_model=True)
    assert model.null_log_likelihood is None
    assert "null_log_likelihood" not in adata.uns["scvae"]
