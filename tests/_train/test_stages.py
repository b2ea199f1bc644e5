"""Stages of a training."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import Callback

import scvae_tools as svt
from scvae_tools._data.loader import CountDataset
from scvae_tools._train.stages import Stage, default_max_epochs, default_patience, noise_edge, plan_stages


@pytest.mark.parametrize(("n_cells", "epochs"), [(10, 400), (700, 400), (4_271, 120), (20_000, 26), (1_000_000, 20)])
def test_the_default_number_of_epochs_gives_about_4000_steps(n_cells, epochs):
    assert default_max_epochs(n_cells) == epochs


@pytest.mark.parametrize("mixture", [False, True])
@pytest.mark.parametrize("max_epochs", [*range(1, 12), 100, 399])
def test_stages_share_all_epochs_and_a_mixture_gets_at_least_one(max_epochs, mixture):
    stages = plan_stages(max_epochs, mixture=mixture)
    assert sum(stage.max_epochs for stage in stages) == max_epochs
    assert all(stage.max_epochs > 0 for stage in stages)
    assert stages[-1].is_mixture == mixture
    assert [stage.name for stage in stages if stage.warms_up] in ([], ["warm-up"])


def test_a_trained_model_goes_on_where_it_was():
    names = [stage.name for stage in plan_stages(10, mixture=True, resumes_vae=True)]
    assert names == ["vae", "mixture"]
    assert [stage.name for stage in plan_stages(10, mixture=True, resumes_mixture=True)] == ["mixture"]


@pytest.mark.parametrize(("mixture", "last"), [(False, "vae"), (True, "mixture")])
def test_dropout_acts_in_the_last_stage_alone(mixture, last):
    adata = svt.datasets.simulate(100, 20, 2, random_state=0)
    svt.SCVAE.setup_anndata(adata)
    options = {"n_components": 2} if mixture else {}
    model = svt.SCVAE(adata, mixture=mixture, n_hidden=8, n_latent=2, dropout_rate=0.3, **options)
    rates = {}

    class Note(Callback):
        def on_train_batch_start(self, trainer, pl_module, *_):
            hidden = (*pl_module.module.encoder.layers.modules(), *pl_module.module.decoder.px_decoder.modules())
            layers = [each for each in hidden if isinstance(each, torch.nn.Dropout)]
            rates.setdefault(pl_module.stage.name, set()).update(layer.p for layer in layers if layer.training)

    model.train(10, progress=False, callbacks=[Note()])
    assert rates[last] == {0.3}
    assert {rate for stage in rates if stage != last for rate in rates[stage]} == {0.0}


@pytest.mark.parametrize(("start", "weights"), [(0.0, [0.0, 0.25, 1.0, 1.0]), (5.0, [5.0, 4.0, 1.0, 1.0])])
def test_the_weight_of_the_kl_goes_in_a_straight_line_to_one(start, weights):
    stage = Stage("warm-up", 10, warms_up=True, kl_weight_start=start)
    assert [stage.kl_weight(share) for share in (0.0, 0.25, 1.0, 1.2)] == pytest.approx(weights)
    assert Stage("vae", 10, kl_weight_start=start).kl_weight(0.1) == 1.0


@pytest.mark.parametrize(("n_cells", "n_genes"), [(900, 500), (300, 1200)])
def test_the_noise_edge_is_the_largest_eigenvalue_of_cells_that_do_not_differ(n_cells, n_genes):
    noise = np.random.default_rng(0).standard_normal((n_cells, n_genes))
    largest = np.linalg.svd(noise, compute_uv=False)[0] ** 2 / n_cells
    assert largest == pytest.approx(noise_edge(n_cells, n_genes), rel=0.05)


def test_a_training_starts_at_the_noise_edge_unless_told_otherwise():
    adata = svt.datasets.simulate(100, 90, 2, random_state=0)
    svt.SCVAE.setup_anndata(adata)
    weights = {}
    for start in (None, 0.0):
        model = svt.SCVAE(adata, mixture=False, n_hidden=8, n_latent=2)
        model.train(8, progress=False, kl_weight_start=start)
        weights[start] = model.history["kl_weight"].to_numpy()
    assert weights[None][0] == pytest.approx(4.0)  # (1 + sqrt(90 / 90))^2: 90 training cells
    assert weights[0.0][0] == 0.0
    assert all(each[-1] == 1.0 for each in weights.values())


@pytest.mark.parametrize(("n_steps", "epochs"), [(1, 640), (8, 80), (30, 22), (32, 20), (5_000, 20)])
def test_the_default_patience_is_twenty_epochs_or_640_steps(n_steps, epochs):
    assert default_patience(n_steps) == epochs
    assert default_patience(n_steps, is_mixture=True) == 20  # whose dimensions are there


def test_a_given_patience_is_that_of_all_stages():
    adata = svt.datasets.simulate(100, 20, 2, random_state=0)
    svt.SCVAE.setup_anndata(adata)
    model = svt.SCVAE(adata, n_components=2, n_hidden=8, n_latent=2)
    for patience, epochs in ((None, [640, 640, 20]), (3, [3, 3, 3])):
        dataset = CountDataset(model.adata_manager, model.module.likelihood)
        stages = model._with_defaults(plan_stages(20, mixture=True), dataset, 0.0, patience, n_steps=1)
        assert [stage.patience for stage in stages] == epochs


def test_the_noise_edge_is_that_of_the_cells_that_are_trained_on():
    adata = svt.datasets.simulate(100, 90, 2, random_state=0)
    svt.SCVAE.setup_anndata(adata)
    model = svt.SCVAE(adata, mixture=False, n_hidden=8, n_latent=2)
    model.train(8, progress=False, validation_indices=range(60))
    assert model.history["kl_weight"][0] == pytest.approx(6.25)  # (1 + sqrt(90 / 40))^2
