"""λ in the history, and counts whose probabilities underflow: the bound stays finite, and right."""

from __future__ import annotations

import random
import warnings

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import torch
from independent import array, log_pmf
from scipy import special

import scvae_tools as svt
from scvae_tools._data.loader import CountDataset
from scvae_tools._module.gene_sum import sum_over_genes
from scvae_tools._train import recorder as _stability
from scvae_tools._train.recorder import RateRecorder
from scvae_tools.likelihoods import LIKELIHOODS
from scvae_tools.model._scvae import SCVAE

COLUMNS = ["rate_at_zeros", "max_rate"]
N_BATCHES = 2
UNDERFLOW = 150 * np.log(2)  # e^-x is 0 in float32 above


# -- factories ---------------------------------------------------------------------------------------------------------


def make_cells(n_cells=90, n_genes=30, *, seed=0):
    return svt.datasets.simulate(n_cells, n_genes, 3, n_batches=N_BATCHES, random_state=seed)


def extreme_cells(n_cells=256, n_genes=50, *, seed=0):
    """Genes at 10^4 to 10^6 counts, of which a cell lacks some, beside genes at 10^-3; cells 1,000 times the others.

    Largest are counts of 10^7: float32 holds no larger whole numbers.
    """
    rng = np.random.default_rng(seed)
    rate = np.r_[np.logspace(4, 6, 6), np.ones(14), np.full(n_genes - 20, 1e-3)]
    size = np.logspace(-2.1, 0.9, n_cells)
    is_there = np.ones((n_cells, n_genes))
    is_there[:, :6] = rng.random((n_cells, 6)) < 0.7
    counts = rng.poisson(size[:, None] * rate * is_there)
    counts[counts.sum(1) == 0, 6] = 1
    return ad.AnnData(counts.astype(np.float32))


def make_model(adata, *, max_epochs=None, batch_key=None, training=None, **options):
    SCVAE.setup_anndata(adata, batch_key=batch_key)
    if options.get("mixture", True):
        options = {"n_components": 3} | options
    model = SCVAE(adata, **({"n_latent": 4, "n_hidden": 16} | options))
    if max_epochs is not None:
        model.train(max_epochs, **({"batch_size": 32, "progress": False} | (training or {})))
    return model


def make_recorder(model, indices=None, seed=0):
    dataset = CountDataset(model.adata_manager, model.module.likelihood)
    return RateRecorder(dataset, np.arange(model.adata.n_obs) if indices is None else indices, seed)


def counts_of(model):
    x = model.adata.X
    return (x.toarray() if hasattr(x, "toarray") else np.asarray(x)).astype(float)


def expected_record(model, cells):
    """The same by a loop over cells, in float64."""
    counts, rate = counts_of(model)[cells], model.get_lambda(indices=cells).astype(float)
    at_zeros = [sum(r for x, r in zip(*cell, strict=True) if x == 0) for cell in zip(counts, rate, strict=True)]
    return {"rate_at_zeros": np.mean(at_zeros), "max_rate": rate.max()}


# -- what is recorded --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("likelihood", "mixture"),
    [*((name, "gmvae") for name in LIKELIHOODS), ("nb", False), ("nb", "vade"), ("zip", False), ("zip", "vade")],
)
def test_the_last_epoch_records_the_rates_of_the_trained_model(likelihood, mixture):
    # Without validation cells the last weights are kept.
    training = {"record_rates": True, "train_size": 1.0}
    options = {"likelihood": likelihood, "mixture": mixture, "batch_key": "batch"}
    model = make_model(make_cells(), max_epochs=4, training=training, **options)
    expected = expected_record(model, np.arange(90))
    assert model.history[COLUMNS].iloc[-1].to_dict() == pytest.approx(expected, rel=1e-5)
    assert model.history[COLUMNS].notna().all(axis=None)
    assert model.history["max_rate"].nunique() == 4


def test_it_is_the_rate_before_zero_inflation():
    model = make_model(make_cells(), likelihood="zip", mixture=False)
    recorder = make_recorder(model)
    before = recorder.record(model.module)
    with torch.no_grad():
        model.module.decoder.heads["gate"].bias.add_(3.0)
    assert recorder.record(model.module) == before


@pytest.mark.parametrize(("n_training", "n_expected"), [(90, 90), (600, 512)])
def test_at_most_512_training_cells_are_looked_at(n_training, n_expected):
    model = make_model(make_cells(700, 5), mixture=False)
    training = np.random.default_rng(1).permutation(700)[:n_training]
    drawn = make_recorder(model, training).indices
    assert len(np.unique(drawn)) == len(drawn) == n_expected
    assert np.isin(drawn, training).all()


def test_the_cells_depend_on_the_seed_alone():
    model = make_model(make_cells(700, 5), mixture=False)
    np.random.seed(1)  # noqa: NPY002
    first = make_recorder(model).indices
    np.random.seed(2)  # noqa: NPY002
    assert (make_recorder(model).indices == first).all()
    assert (make_recorder(model, seed=1).indices != first).any()


@pytest.mark.parametrize("mixture", [False, "gmvae"])
def test_chunks_change_nothing(mixture, monkeypatch):
    model = make_model(make_cells(), mixture=mixture, max_epochs=3)
    recorder = make_recorder(model)
    whole = recorder.record(model.module)
    for n_bytes in (1, 20_000):
        monkeypatch.setattr(_stability, "CHUNK_BYTES", n_bytes)
        assert recorder._cells_at_once(model.module) < 90
        assert recorder.record(model.module) == pytest.approx(whole, rel=1e-5)


def test_a_few_zeros_beside_large_rates_are_not_lost():
    counts = np.full((4, 3), 1e6, dtype=np.float32)
    counts[:, 2] = 0
    model = make_model(ad.AnnData(counts), mixture=False, likelihood="poisson")
    model.is_trained_ = True  # as it starts, at the means
    expected = expected_record(model, np.arange(4))  # one gene at half a count, two at a million
    assert expected["rate_at_zeros"] < 10
    assert make_recorder(model).record(model.module) == pytest.approx(expected, rel=1e-5)


def test_recording_leaves_mode_and_random_states_as_they_were():
    model = make_model(make_cells(), mixture=False, dropout_rate=0.5)
    model.module.train()
    states = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()  # noqa: NPY002
    recorder = make_recorder(model)
    assert recorder.record(model.module) == recorder.record(model.module)  # without dropout
    assert model.module.training
    assert (torch.get_rng_state() == states[0]).all()
    assert (np.random.get_state()[1] == states[1]).all()  # noqa: NPY002
    assert random.getstate() == states[2]
    assert all(parameter.grad is None for parameter in model.module.parameters())


# -- what is not changed -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {"mixture": False, "dropout_rate": 0.3, "normalization": "batch"},
        {"mixture": "gmvae", "likelihood": "zinb"},
        {"mixture": "vade", "engine": "dense"},
    ],
    ids=lambda options: str(options["mixture"]),
)
def test_the_training_is_bit_for_bit_the_same_with_and_without(options):
    with_, without = (
        make_model(make_cells(), max_epochs=6, training={"record_rates": record}, **options) for record in (True, False)
    )
    for name, value in without.module.state_dict().items():
        assert torch.equal(value, with_.module.state_dict()[name]), name
    pd.testing.assert_frame_equal(with_.history.drop(columns=COLUMNS), without.history, check_exact=True)
    assert not set(COLUMNS) & set(without.history)


def test_epochs_without_and_with_recording_share_a_history():
    model = make_model(make_cells(), mixture=False, max_epochs=2)
    model.train(3, batch_size=32, progress=False, record_rates=True)
    assert model.history["max_rate"].isna().tolist() == [True, True, False, False, False]
    assert len(svt.pl.stability(model)) == 2


def test_scvae_records_and_plots_after_h5ad(tmp_path):
    adata = make_cells()
    svt.tl.scvae(adata, mixture=False, max_epochs=2, record_rates=True, progress=False)
    adata.write_h5ad(tmp_path / "cells.h5ad")
    read = ad.read_h5ad(tmp_path / "cells.h5ad")
    pd.testing.assert_frame_equal(read.uns["scvae"]["history"], adata.uns["scvae"]["history"])
    assert len(svt.pl.stability(read)) == 2


def test_scvae_without_recording_says_how_to_record():
    adata = make_cells()
    svt.tl.scvae(adata, mixture=False, max_epochs=1, progress=False)
    with pytest.raises(ValueError, match=r"svt\.tl\.scvae\(adata, key_added='scvae', record_rates=True\)"):
        svt.pl.stability(adata)


# -- counts whose probabilities underflow ------------------------------------------------------------------------------


def train_on_extreme_cells(max_epochs, **options):
    """Train as they did who lost a Poisson model at epoch 38: four layers, a plain VAE."""
    training = {"early_stopping": False, "record_rates": True, "batch_size": 128}
    options = {"mixture": False, "n_layers": 4, "n_hidden": 128, "n_latent": 10} | options
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*NaN or infinite")  # the stage would be repeated
        return make_model(extreme_cells(), max_epochs=max_epochs, training=training, **options)


def check_history(history, max_epochs):
    assert len(history) == max_epochs
    numbers = history.select_dtypes("number")
    assert {"elbo_train", "kl_z_validation", *COLUMNS} < set(numbers)
    assert np.isfinite(numbers).all(axis=None)
    # A product of probabilities would have been 0 in each of these epochs.
    assert (history[COLUMNS] > UNDERFLOW).all(axis=None)


@pytest.mark.slow
@pytest.mark.parametrize("use_size_factor", [True, False])
def test_500_epochs_of_poisson_with_extreme_rates_stay_finite(use_size_factor):
    model = train_on_extreme_cells(500, likelihood="poisson", use_size_factor=use_size_factor)
    check_history(model.history, 500)
    assert model.history["elbo_validation"].iloc[-1] > 1.2 * model.history["elbo_validation"].iloc[0]  # and they learn


@pytest.mark.parametrize(
    ("likelihood", "use_size_factor"),
    [(name, True) for name in LIKELIHOODS] + [(name, False) for name in LIKELIHOODS if name != "constrained_poisson"],
)
def test_every_likelihood_stays_finite_with_extreme_rates(likelihood, use_size_factor):
    model = train_on_extreme_cells(12, likelihood=likelihood, use_size_factor=use_size_factor)
    check_history(model.history, 12)


@pytest.fixture(scope="module")
def extreme():
    """Poisson model of extreme counts: the module, its cells, z at the posterior means, and log λ (n, g) float32."""
    model = train_on_extreme_cells(12, likelihood="poisson")
    (tensors,) = model._batches(None, None, None)
    x, size, covariates = model.module.data(tensors)
    with torch.no_grad():
        z = model.module.posterior(model.module.encode(x, size, covariates)).mean[0]
        log_rate = model.module.decoder(z, model.module.log_size(size), covariates)["log_rate"]
    return model.module, (x, size, covariates), z, log_rate


def test_multiplied_up_the_likelihood_of_these_cells_is_zero(extreme):
    _, (x, _, _), _, log_rate = extreme
    rate, counts = np.exp(array(log_rate)), array(x.dense())
    assert rate.dtype == counts.dtype == np.float32
    each = np.where(counts == 0, np.exp(-rate), np.float32(1))
    has_large_rate = np.where(counts == 0, rate, 0).sum(1) > 2 * UNDERFLOW
    assert has_large_rate.mean() > 0.5
    with np.errstate(divide="ignore"):
        logarithm = np.log(each.prod(1, dtype=np.float32))
    assert np.isneginf(logarithm[has_large_rate]).all()


def test_added_up_in_logs_it_is_that_of_scipy(extreme):
    _, (x, _, _), _, log_rate = extreme
    params = {"log_rate": log_rate.double()}
    found = array(sum_over_genes(LIKELIHOODS["poisson"], x.dense().double(), params))
    assert np.isfinite(found).all()
    np.testing.assert_allclose(found, log_pmf(array(x.dense()), params).sum(1), rtol=1e-9)


def test_as_it_is_trained_in_float32_it_is_that_of_scipy_but_for_rounding(extreme):
    module, (x, size, covariates), z, log_rate = extreme
    with torch.no_grad():
        found = array(module.log_likelihood(x, z, module.log_size(size), covariates))
    assert found.dtype == np.float32
    counts, log_rate = array(x.dense()).astype(float), array(log_rate).astype(float)
    expected = log_pmf(counts, {"log_rate": torch.tensor(log_rate)}).sum(1)
    # x log λ, λ and log x! are of the order of 10^8 and cancel: each is rounded, and so is log λ, by which λ changes.
    terms = counts * np.abs(log_rate) + np.exp(log_rate) * (1 + np.abs(log_rate)) + special.gammaln(counts + 1)
    assert (np.abs(found - expected) <= 4 * np.finfo(np.float32).eps * terms.sum(1)).all()
