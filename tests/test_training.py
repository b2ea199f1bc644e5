"""Stages, guards and the isolation of what is global."""

from __future__ import annotations

import logging
import signal
import subprocess
import sys
import warnings

import pandas as pd
import pytest
import torch
from lightning.pytorch.callbacks import Callback

import scvae_tools as svt
from scvae_tools._train.plan import TrainingPlan
from scvae_tools._train.run import matmul_precision, sigint_restored
from scvae_tools._train.stages import Stage, default_max_epochs, plan_stages
from scvae_tools._upstream import quiet


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


@pytest.mark.parametrize("mixture", [False, "vade"])
@pytest.mark.parametrize(
    "training",
    [
        {},
        {"train_size": 1.0},
        {"train_size": 1.0, "record_rates": True},
        {"validation_indices": []},
        {"max_steps": 3},  # of two an epoch: Lightning cuts the second epoch short
        {"max_steps": 3, "train_size": 1.0},
        {"limit_train_batches": 1, "train_size": 1.0},
    ],
    ids=str,
)
def test_the_progress_bar_which_is_on_by_default_changes_nothing(mixture, training, capsys):
    def history(**progress):
        adata = svt.datasets.simulate(60, 12, 2, random_state=0)
        svt.SCVAE.setup_anndata(adata)
        model = svt.SCVAE(adata, mixture=mixture, n_hidden=4, n_latent=2, n_components=2 if mixture else None)
        model.train(6, batch_size=32, **training, **progress)
        return model.history

    shown = history()
    bar = capsys.readouterr().err
    pd.testing.assert_frame_equal(shown, history(progress=False))
    assert capsys.readouterr().err == ""
    last = shown.iloc[-1]
    elbo = last["elbo_train"] if pd.isna(last.get("elbo_validation")) else last["elbo_validation"]
    assert f"ELBO={elbo:.1f}" in bar


@pytest.mark.parametrize("train_size", [0.9, 1.0])
def test_the_main_job_runs_with_its_default_bar(train_size, capsys):
    adata = svt.datasets.simulate(60, 12, 2, random_state=0)
    svt.tl.scvae(adata, train_size=train_size, max_epochs=4, n_latent=2)
    assert len(adata.uns["scvae"]["history"]) == 4
    assert "4/4" in capsys.readouterr().err


def test_loggers_and_filters_are_silenced_inside_only():
    logger, filters = logging.getLogger("lightning.pytorch"), list(warnings.filters)
    level = logger.level
    with quiet():
        assert logger.level == logging.ERROR
    assert logger.level == level
    assert warnings.filters == filters


@pytest.mark.parametrize("precision", ["highest", "high", "medium", None])
def test_the_precision_of_products_is_set_inside_only(precision):
    before = torch.get_float32_matmul_precision()
    with matmul_precision(precision):
        assert torch.get_float32_matmul_precision() == (precision or before)
    assert torch.get_float32_matmul_precision() == before


def make_plan(gradient: torch.Tensor) -> tuple[TrainingPlan, torch.nn.Parameter]:
    parameter = torch.nn.Parameter(torch.zeros_like(gradient))
    parameter.grad = gradient.clone()
    return TrainingPlan(torch.nn.Module(), Stage("vae", 1), first_epoch=0, lr=1e-3, weight_decay=0), parameter


@pytest.mark.parametrize(("clip", "expected"), [(10.0, [3.0, 4.0]), (2.5, [1.5, 2.0]), (None, [3.0, 4.0])])
def test_gradients_longer_than_the_limit_are_shortened_to_it(clip, expected):
    plan, parameter = make_plan(torch.tensor([3.0, 4.0]))
    optimizer = torch.optim.Adam([parameter])
    if clip is None:  # what Lightning does itself where nothing is to be clipped needs a trainer
        plan.clip_gradients = lambda *_, **__: None
    plan.configure_gradient_clipping(optimizer, clip, None)
    assert parameter.grad.tolist() == pytest.approx(expected, rel=1e-5)  # torch divides by the norm plus 1e-6


def test_the_handler_of_ctrl_c_is_put_back():
    handler = signal.getsignal(signal.SIGINT)
    with sigint_restored():
        signal.signal(signal.SIGINT, signal.SIG_IGN)
    assert signal.getsignal(signal.SIGINT) is handler


def test_a_process_that_is_told_to_end_ends():
    code = """
import os, signal, scvae_tools as svt
from scvae_tools._train.plan import TrainingPlan
step = TrainingPlan.training_step
def stop(self, batch, index):
    if self.current_epoch == 1:
        os.kill(os.getpid(), signal.SIGTERM)
    return step(self, batch, index)
TrainingPlan.training_step = stop
svt.tl.scvae(svt.datasets.poisson_toy(100), mixture=False, max_epochs=8, verbose=False)
print("went on")
"""
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=300)
    assert ended.returncode == 128 + signal.SIGTERM
    assert "went on" not in ended.stdout


def test_ctrl_c_from_the_keyboard_keeps_the_best_weights():
    code = """
import os, signal, scvae_tools as svt
signal.signal(signal.SIGINT, signal.default_int_handler)
from scvae_tools._train.plan import TrainingPlan
step = TrainingPlan.training_step
def stop(self, batch, index):
    if self.current_epoch == 1 and self.stage.name == "vae":
        os.kill(os.getpid(), signal.SIGINT)
    return step(self, batch, index)
TrainingPlan.training_step = stop
adata = svt.datasets.poisson_toy(100)
svt.tl.scvae(adata, n_components=2, max_epochs=12, verbose=False)
print(sorted(adata.obsm), len(adata.uns["scvae"]["history"]))
os.kill(os.getpid(), signal.SIGINT)
"""
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=300)
    assert "['X_scvae', 'scvae_probs'] 3" in ended.stdout
    assert "interrupted in stage 'vae' after 1 of" in ended.stderr
    assert "KeyboardInterrupt" in ended.stderr  # the handler is Python's again
