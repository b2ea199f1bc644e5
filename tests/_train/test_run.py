"""Stages, guards and the isolation of what is global."""

from __future__ import annotations

import signal
import subprocess
import sys

import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import Callback

import scvae_tools as svt
from scvae_tools._data.loader import CountDataset
from scvae_tools._train.recorder import RateRecorder
from scvae_tools._train.run import matmul_precision, refuse_non_finite, sigint_restored
from scvae_tools._train.stages import Stage


@pytest.mark.parametrize("precision", ["highest", "high", "medium", None])
def test_the_precision_of_products_is_set_inside_only(precision):
    before = torch.get_float32_matmul_precision()
    with matmul_precision(precision):
        assert torch.get_float32_matmul_precision() == (precision or before)
    assert torch.get_float32_matmul_precision() == before


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
svt.tl.scvae(svt.datasets.poisson_toy(100), mixture=False, max_epochs=8, progress=False)
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
    if self.epoch_of_stage == 1 and self.stage.name == "vae":
        os.kill(os.getpid(), signal.SIGINT)
    return step(self, batch, index)
TrainingPlan.training_step = stop
adata = svt.datasets.poisson_toy(100)
svt.tl.scvae(adata, n_components=2, max_epochs=12, progress=False)
print(sorted(adata.obsm), len(adata.uns["scvae"]["history"]))
os.kill(os.getpid(), signal.SIGINT)
"""
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=300)
    assert "['X_scvae', 'scvae_probs'] 3" in ended.stdout
    assert "interrupted in stage 'vae' after 1 of" in ended.stderr
    assert "KeyboardInterrupt" in ended.stderr  # the handler is Python's again


# -- numbers that are not finite where the bound is --------------------------------------------------------------------

SMALL = {"n_hidden": 4, "n_latent": 2, "n_components": 2}


def set_up(**options):
    adata = svt.datasets.simulate(60, 20, 2, random_state=0)
    svt.SCVAE.setup_anndata(adata)
    return svt.SCVAE(adata, **SMALL | options)


@torch.no_grad()
def break_rate(module):
    module.decoder.heads["log_rate"].bias += 100.0  # exp(100) is beyond float32


#: What goes wrong in a training at a high learning rate, and what the error calls it.
BROKEN = {
    "λ": break_rate,
    "a mean or variance of the mixture": lambda module: module.mixture.log_diagonal.data.fill_(-60.0),
    "a mean or variance of the mixture without an inverse": lambda module: module.mixture.log_diagonal.data.fill_(
        -200.0
    ),
    "a weight of the model": lambda module: module.z_mean.weight.data.fill_(torch.nan),
    r"q\(z\|x\)": lambda module: module.z_variance.bias.data.fill_(200.0),
}


@pytest.mark.parametrize("term", BROKEN)
@pytest.mark.parametrize("covariance", ["full", "diag"])
def test_what_is_not_finite_though_the_bound_is_is_named(term, covariance):
    model = set_up(covariance=covariance)
    model.train(3, progress=False)
    probe = RateRecorder(CountDataset(model.adata_manager, model.module.likelihood), np.arange(60), 0)
    refuse_non_finite(model.module, probe, Stage("mixture", 1), 3)
    BROKEN[term](model.module)
    match = rf"^{term.replace(' without an inverse', '')} became NaN or infinite in epoch 3 \(stage 'mixture'\)$"
    with pytest.raises(svt.NonFiniteError, match=match):
        refuse_non_finite(model.module, probe, Stage("mixture", 1), 3)


class Breaks(Callback):
    """Callback that makes λ infinite at the end of a fit, of the first or of each."""

    def __init__(self, n_times):
        self.n_left = n_times

    def on_train_end(self, trainer, pl_module):
        if self.n_left > 0:
            self.n_left -= 1
            pl_module.exchange(average=True)  # which is kept
            break_rate(pl_module.module)


def test_a_stage_that_ends_with_infinite_rates_is_tried_again_at_a_tenth_of_the_rate():
    model = set_up(mixture=False)
    message = r"^λ became NaN or infinite in epoch 1 \(stage 'vae'\); trying this stage once more with lr=0\.0001\.$"
    with pytest.warns(UserWarning, match=message):
        model.train(1, train_size=1.0, progress=False, callbacks=[Breaks(1)])
    assert np.isfinite(model.get_lambda()).all()
    assert len(model.history) == 1


def test_an_error_leaves_the_model_as_it_was_and_says_what_helps():
    model = set_up(mixture=False)
    before = {name: value.clone() for name, value in model.module.state_dict().items()}
    match = r"^Training stopped: λ became NaN .* Try a lower `lr`"
    with pytest.warns(UserWarning, match="trying"), pytest.raises(svt.NonFiniteError, match=match):
        model.train(1, train_size=1.0, progress=False, callbacks=[Breaks(2)])
    assert not model.is_trained_
    for name, value in model.module.state_dict().items():
        torch.testing.assert_close(value, before[name], rtol=0, atol=0)


def test_infinite_rates_of_single_cells_are_said():
    model = set_up(mixture=False)
    model.train(1, progress=False)
    break_rate(model.module)
    with pytest.warns(UserWarning, match=r"λ of 60 cells is NaN or infinite\. Try a lower `lr`"):
        model.get_lambda(batch_size=16)


def test_a_variance_that_is_0_in_float32_is_no_error():
    model = set_up()
    model.train(2, progress=False)
    model.module.z_variance.bias.data.fill_(-1000.0)
    _, variance = model.get_latent_representation(return_dist=True)
    assert np.isfinite(variance).all()
