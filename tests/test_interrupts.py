"""Ctrl-C that is held back; the tests press it by a signal to their own process."""

from __future__ import annotations

import json
import os
import signal
import threading

import anndata
import numpy as np
import pytest

import scvae_tools as svt
from scvae_tools._cli import _commands, main
from scvae_tools._interrupts import interrupts_held
from scvae_tools._messages import InterruptedTraining
from scvae_tools._train import run
from scvae_tools.model import _training
from scvae_tools.tl import _scvae


@pytest.fixture(autouse=True)
def handler():
    """The handler that Python and Jupyter have."""
    former = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    signal.signal(signal.SIGINT, former)


def press():
    os.kill(os.getpid(), signal.SIGINT)


@pytest.mark.parametrize("n_presses", [1, 2])
def test_the_second_press_raises_at_once_and_the_first_at_the_end_if_nobody_acts_on_it(n_presses):
    done = []

    def work():
        with interrupts_held():
            for _ in range(n_presses):
                press()
                done.append("pressed")

    with pytest.raises(KeyboardInterrupt):
        work()
    assert done == ["pressed"]


def test_a_press_that_was_acted_on_is_not_raised():
    with interrupts_held() as held:
        press()
        assert held.take()
        assert not held.take()
    assert held.was_pressed


def test_where_it_is_let_through_it_raises_as_ever():
    with interrupts_held() as held, pytest.raises(KeyboardInterrupt), held.let_through():
        press()


def test_one_that_waits_is_raised_before_anything_else_that_lets_it_through():
    done = []
    with interrupts_held() as held:
        press()
        with pytest.raises(KeyboardInterrupt), held.let_through():
            done.append("not reached")
    assert done == []


def test_contexts_within_each_other_are_one():
    with interrupts_held() as outer:
        with interrupts_held() as inner:
            press()
        assert inner is outer
        assert outer.take()


def test_a_handler_of_the_program_stays():
    pressed = []
    signal.signal(signal.SIGINT, lambda *_: pressed.append(True))
    with interrupts_held() as held:
        press()
    assert pressed == [True]
    assert not held.was_pressed
    signal.signal(signal.SIGINT, signal.default_int_handler)


def test_another_thread_holds_nothing_back():
    found = []

    def run():
        with interrupts_held():
            found.append(signal.getsignal(signal.SIGINT))

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert found == [signal.default_int_handler]


# -- where work would be lost ------------------------------------------------------------------------------------------


def press_in(monkeypatch, owner, name, n_presses=1):
    """Press Ctrl-C when a function is called for the first time."""
    function, left = getattr(owner, name), [n_presses]

    def pressed(*args, **kwargs):
        while left[0]:
            left[0] -= 1
            press()
        return function(*args, **kwargs)

    monkeypatch.setattr(owner, name, pressed)


def fit(adata, **options):
    svt.tl.scvae(adata, **{"n_components": 2, "max_epochs": 6, "progress": False} | options)


ALL = {"X_scvae", "scvae_probs"}
NOT_TRAINED = "interrupted in stage '{}' after 0 of"
NO_RATE = "layers['scvae_lambda'] is left out"


@pytest.mark.parametrize(
    ("owner", "name", "stages", "message"),
    [
        (run, "copied", ["warm-up"], NOT_TRAINED.format("vae")),
        (_training, "start_mixture", ["warm-up", "vae"], NOT_TRAINED.format("mixture")),
        (_scvae, "elbo_of", ["warm-up", "vae", "mixture"], NO_RATE),
        (_scvae, "write_rate", ["warm-up", "vae", "mixture"], NO_RATE),
    ],
)
def test_nothing_that_was_trained_is_lost(owner, name, stages, message, monkeypatch, caplog):
    adata = svt.datasets.poisson_toy(100)
    press_in(monkeypatch, owner, name)
    with pytest.warns(InterruptedTraining) as caught:
        fit(adata)
    caught = [str(each.message) for each in caught if each.category is InterruptedTraining]
    assert [message in each for each in caught] == [True]
    assert adata.uns["scvae"]["history"]["stage"].unique().tolist() == stages
    assert set(adata.obsm) == ALL
    assert set(adata.layers) - {None} == ({"scvae_lambda"} if message != NO_RATE else set())
    assert np.isfinite(adata.obsm["X_scvae"]).all()
    assert "Press it again" in caplog.text


def test_of_a_plain_model_the_weights_are_kept_between_stages(monkeypatch):
    adata = svt.datasets.poisson_toy(100)
    press_in(monkeypatch, run, "copied")
    with pytest.warns(InterruptedTraining, match=NOT_TRAINED.format("vae")):
        fit(adata, mixture=False, n_components=None)
    assert adata.uns["scvae"]["history"]["stage"].unique().tolist() == ["warm-up"]


def test_a_second_press_ends_the_call_and_leaves_the_data_as_they_were(monkeypatch):
    adata = svt.datasets.poisson_toy(100)
    press_in(monkeypatch, _training, "start_mixture", 2)
    with pytest.raises(KeyboardInterrupt):
        fit(adata)
    assert not set(adata.obsm) | set(adata.uns) | set(adata.layers) - {None}  # None is X, in anndata 0.13


def test_before_the_first_epoch_it_ends_the_call_at_once(monkeypatch):
    press_in(monkeypatch, _training.TrainingMixin, "_split")
    monkeypatch.setattr(run.lightning.Trainer, "fit", lambda *_, **__: pytest.fail("trained"))
    with pytest.raises(KeyboardInterrupt):
        fit(svt.datasets.poisson_toy(100))


def test_the_command_line_writes_its_files_before_it_ends(tmp_path, monkeypatch, capsys):
    cells, output = tmp_path / "cells.h5ad", tmp_path / "out.h5ad"
    svt.datasets.poisson_toy(100).write_h5ad(cells)
    press_in(monkeypatch, _commands, "write_adata")
    assert main(["fit", str(cells), "-o", str(output), "--epochs", "3", "--json"]) == 130
    assert json.loads(capsys.readouterr().out)["interrupted"]
    assert np.isfinite(anndata.read_h5ad(output).obsm["X_scvae"]).all()
