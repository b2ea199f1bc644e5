"""Stages, guards and the isolation of what is global."""

from __future__ import annotations

import signal
import subprocess
import sys

import pytest
import torch

from scvae_tools._train.run import matmul_precision, sigint_restored


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
