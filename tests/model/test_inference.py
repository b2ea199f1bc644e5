"""Probabilities of the components that a trained model gives, and the temperature between them and q(y|x)."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import torch

import scvae_tools as svt

TRAINING = {"max_epochs": 20, "train_size": 0.5, "progress": False}


def overlapping_cells(seed=0):
    adata = svt.datasets.simulate(200, 30, 3, separation=1.0, median_counts=300, random_state=seed)
    adata.obs["label"] = np.where(np.arange(200) % 2 == 0, "unknown", adata.obs["component"].astype(str))
    return adata


def make_model(mixture, setup=(), **training):
    adata = overlapping_cells()
    svt.SCVAE.setup_anndata(adata, **dict(setup))
    model = svt.SCVAE(adata, mixture=mixture, n_components=3, n_hidden=8, n_latent=3)
    model.train(**TRAINING | training)
    return model


@pytest.fixture(scope="module", params=["gmvae", "vade"])
def model(request):
    return make_model(request.param)


def powered(probs, temperature):
    """Probabilities that are proportional to p^(1/T)."""
    power = probs.to_numpy(dtype=np.float64) ** (1 / temperature)
    return power / power.sum(1, keepdims=True)


def test_calibrated_probabilities_are_the_power_of_those_of_the_bound(model):
    raw, calibrated = model.predict(soft=True, calibrated=False), model.predict(soft=True)
    assert abs(np.log(model.temperature)) > 0.01
    np.testing.assert_allclose(calibrated, powered(raw, model.temperature), atol=1e-6)
    assert calibrated.to_numpy().dtype == np.float32
    np.testing.assert_array_equal(raw.to_numpy().argmax(1), calibrated.to_numpy().argmax(1))


def test_the_held_out_cells_alone_tell_the_temperature(model):
    from scvae_tools._train.temperature import temperature_of

    raw = model.predict(soft=True, calibrated=False, indices=model.validation_indices).to_numpy()
    assert model.temperature == pytest.approx(temperature_of(np.log(raw.astype(np.float64))), rel=1e-4)


def test_no_bound_and_no_latent_code_depends_on_the_temperature(model):
    def results():
        latent, kl = model.get_latent_representation(), model.get_kl_by_dimension()
        return [model.get_elbo_terms().to_numpy(), latent, kl, model.get_lambda(), model.get_marginal_ll()]

    found, temperature = results(), model.temperature
    model.module.set_temperature(5.0)
    try:
        for one, other in zip(found, results(), strict=True):
            np.testing.assert_array_equal(one, other)
    finally:
        model.module.set_temperature(temperature)


def test_a_saved_model_has_its_temperature_in_all_versions(model, tmp_path):
    model.save(tmp_path / "model")
    loaded = svt.SCVAE.load(tmp_path / "model", model.adata)
    assert loaded.temperature == model.temperature
    pd.testing.assert_frame_equal(loaded.predict(soft=True), model.predict(soft=True))
    for version in loaded.versions.index:
        loaded.use_version(version)
        assert float(loaded._state.versions[version].state["log_temperature"].exp()) == loaded.temperature


def test_minified_data_give_both_kinds_of_probabilities(model, tmp_path):
    model.save(tmp_path / "model")
    mini = svt.SCVAE.load(tmp_path / "model", model.adata.copy())
    mini.minify_adata()
    for calibrated in (True, False):
        expected = model.predict(soft=True, calibrated=calibrated)
        pd.testing.assert_frame_equal(mini.predict(soft=True, calibrated=calibrated), expected, atol=1e-6)


def test_the_tools_write_calibrated_probabilities(model):
    new = overlapping_cells(seed=1)
    svt.tl.predict(new, model)
    np.testing.assert_array_equal(new.obsm["scvae_probs"], model.predict(new, soft=True))
    assert new.uns["scvae"]["components"]["temperature"] == model.temperature
    some = svt.tl.ambiguous_cells(new)["probability"]
    top = model.predict(new, soft=True).max(axis=1)
    np.testing.assert_allclose(some, top[some.index], atol=1e-6)


def test_without_held_out_cells_probabilities_are_those_of_the_bound():
    model = make_model("gmvae", train_size=1.0)
    assert model.temperature == 1
    pd.testing.assert_frame_equal(model.predict(soft=True), model.predict(soft=True, calibrated=False))


@pytest.mark.parametrize("mixture", ["gmvae", "vade"])
def test_components_of_labels_have_a_temperature_too(mixture):
    model = make_model(mixture, {"labels_key": "label", "unlabeled_category": "unknown"})
    assert model.is_supervised
    assert np.isfinite(model.temperature)
    np.testing.assert_allclose(
        model.predict(soft=True), powered(model.predict(soft=True, calibrated=False), model.temperature), atol=1e-6
    )


def test_a_plain_vae_has_the_temperature_1():
    adata = overlapping_cells()
    svt.SCVAE.setup_anndata(adata)
    assert svt.SCVAE(adata, mixture=False, n_hidden=4, n_latent=2).temperature == 1


def test_further_training_finds_the_temperature_anew(model, tmp_path):
    model.save(tmp_path / "model")
    again = svt.SCVAE.load(tmp_path / "model", model.adata)
    again.module.set_temperature(50.0)
    again.train(2, progress=False)
    assert again.temperature < 40
    assert torch.equal(again.module.state_dict()["log_temperature"], again.module.log_temperature)
