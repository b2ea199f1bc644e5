"""Continuous covariates: standardised by the training cells, for good; no unit makes a difference."""

import numpy as np
import pandas as pd
import pytest
import torch
from lightning.pytorch.callbacks import LambdaCallback
from sklearn.metrics import adjusted_rand_score

import scvae_tools as svt

N_CELLS = 120


def cells(seed=0, n_cells=N_CELLS, **columns):
    adata = svt.datasets.simulate(n_cells, 20, 2, separation=2.0, random_state=seed)
    values = np.random.default_rng(seed).uniform(500, 5000, n_cells)
    adata.obs["depth"] = values
    for name, column in columns.items():
        adata.obs[name] = column
    return adata


def new_model(adata, mixture="vade", keys=("depth",), **options):
    svt.SCVAE.setup_anndata(adata, continuous_covariate_keys=list(keys))
    options = {"encode_covariates": True, "n_latent": 2, "n_hidden": 8} | options
    return svt.SCVAE(adata, mixture=mixture, n_components=2 if mixture else None, **options)


def trained(adata, epochs=6, **options):
    model = new_model(adata, **options)
    model.train(epochs, progress=False)
    return model


def test_the_networks_see_the_numbers_of_the_training_cells_at_mean_0_and_standard_deviation_1():
    adata = cells()
    model = trained(adata)
    values = adata.obs["depth"].to_numpy()
    of_training = values[model.train_indices]
    tensors = next(iter(model._make_data_loader(adata, batch_size=N_CELLS)))
    _, _, covariates = model.module.data(tensors)
    expected = (values - of_training.mean()) / of_training.std()
    np.testing.assert_allclose(covariates.continuous[:, 0], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("mixture", [False, "gmvae", "vade"])
def test_the_unit_of_a_column_makes_no_difference(mixture):
    adata = cells()
    one = trained(adata, mixture=mixture)
    other = trained(cells(depth=adata.obs["depth"].to_numpy() / 60 - 1000), mixture=mixture)
    numbers = one.history.select_dtypes("number")
    np.testing.assert_allclose(other.history[numbers.columns], numbers, rtol=1e-3, atol=1e-3)


def test_a_column_of_thousands_does_not_drown_the_clusters():
    adata = svt.datasets.simulate(400, 100, 3, separation=2.0, random_state=0)
    adata.obs["n_genes"] = np.random.default_rng(0).uniform(500, 5000, adata.n_obs)
    options = {"n_components": 3, "max_epochs": 40, "batch_size": 64, "progress": False}
    svt.tl.scvae(adata, continuous_covariate_keys=["n_genes"], **options)
    assert adjusted_rand_score(adata.obs["component"], adata.obs["scvae"]) > 0.95
    assert adata.uns["scvae"]["elbo"]["train"]["kl_z"] > 0.5


def test_new_cells_are_standardised_as_those_of_the_training():
    adata = cells()
    model = trained(adata)
    alone = adata[:1].copy()  # whose own standard deviation is 0
    np.testing.assert_allclose(
        model.get_latent_representation(alone), model.get_latent_representation()[:1], rtol=1e-4, atol=1e-5
    )


def test_training_on_and_another_split_keep_the_units():
    model = trained(cells())
    mean = model.module.continuous_mean.clone()
    model.train(2, validation_indices=np.arange(60), progress=False)
    assert torch.equal(model.module.continuous_mean, mean)


def test_units_are_saved_and_are_those_of_the_reference_for_a_query(tmp_path):
    adata = cells()
    model = trained(adata)
    model.save(tmp_path / "model")
    loaded = svt.SCVAE.load(tmp_path / "model", adata)
    np.testing.assert_array_equal(loaded.get_latent_representation(), model.get_latent_representation())
    query = svt.SCVAE.load_query_data(cells(seed=1, n_cells=40), model)
    query.train(2, progress=False)
    assert torch.equal(query.module.continuous_mean, model.module.continuous_mean)
    assert torch.equal(query.module.continuous_sd, model.module.continuous_sd)


def test_weights_from_before_have_the_units_that_they_were_trained_with():
    model = new_model(cells())
    state = {name: value for name, value in model.module.state_dict().items() if not name.startswith("continuous_")}
    model.module.load_state_dict(state)
    mean, sd = model.module.continuous_mean, model.module.continuous_sd
    assert (mean.tolist(), sd.tolist(), bool(model.module.continuous_is_set)) == ([0.0], [1.0], True)
    model.train(2, progress=False)
    assert mean.tolist() == [0.0]


@pytest.mark.parametrize("value", [0.0, 2024.0, 1e6])
def test_a_constant_column_is_left_out_with_a_word(value):
    adata = cells(year=value)
    model = new_model(adata, keys=["depth", "year"])
    with pytest.warns(UserWarning, match="`continuous_covariate_keys`: 'year' has the same value in all"):
        model.train(4, progress=False)
    before = model.get_elbo()
    assert np.isfinite(before)
    other = cells(year=value + np.arange(N_CELLS))
    assert model.get_elbo(other) == pytest.approx(before, rel=1e-5)


def test_a_training_that_ends_in_an_error_leaves_the_units_open():
    model = new_model(cells())

    def stop(*_):
        raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        model.train(3, progress=False, callbacks=[LambdaCallback(on_train_epoch_start=stop)])
    assert not model.module.continuous_is_set
    assert model.module.continuous_mean.tolist() == [0.0]


def test_sampled_cells_and_marker_genes_have_the_covariates_of_cells_of_the_data():
    adata = cells()
    model = trained(adata, 20, mixture="gmvae")
    rows = torch.arange(50)
    _, covariates = model.module.reference(rows)
    sd, mean = (float(each) for each in (model.module.continuous_sd, model.module.continuous_mean))
    known = covariates.continuous[:, 0].double().numpy() * sd + mean
    assert np.isin(np.round(known), np.round(adata.obs["depth"])).all()
    assert np.isfinite(model.sample(20).X.data).all()
    assert isinstance(model.get_normalized_expression(), pd.DataFrame)
