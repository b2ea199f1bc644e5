"""Stages of a training."""

from __future__ import annotations

import pytest
import torch
from lightning.pytorch.callbacks import Callback

import scvae_tools as svt
from scvae_tools._train.stages import default_max_epochs, plan_stages


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
