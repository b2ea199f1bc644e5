"""Options of Lightning's trainer: one training for loggers and callbacks, one device, and clear refusals."""

from __future__ import annotations

import os
import warnings

import pandas as pd
import pytest
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import CSVLogger

import scvae_tools as svt
from scvae_tools._other_names import UnknownArgument
from scvae_tools._train.processes import Processes
from scvae_tools.model._trainer_options import (
    TRAINER_OPTIONS,
    check_one_device,
    check_trainer_options,
    whether_to_hold,
)


def new_model(n_cells=60, **options):
    adata = svt.datasets.simulate(n_cells, 8, 2, random_state=0)
    svt.SCVAE.setup_anndata(adata)
    return svt.SCVAE(adata, **{"n_components": 2, "n_latent": 2, "n_hidden": 4} | options)


class Seen(Callback):
    def __init__(self):
        self.epochs, self.steps = [], []

    def on_train_epoch_start(self, trainer, pl_module):
        assert trainer.current_epoch == pl_module.current_epoch
        self.epochs.append(trainer.current_epoch)
        self.steps.append(trainer.global_step)


# -- one training ----------------------------------------------------------------------------------------------------


def test_callbacks_see_epochs_and_steps_go_on_over_the_stages():
    seen, model = Seen(), new_model()
    model.train(8, batch_size=30, progress=False, callbacks=seen)
    assert list(model.history["stage"].unique()) == ["warm-up", "vae", "mixture"]
    assert seen.epochs == list(range(8))
    assert seen.steps == list(range(0, 16, 2))  # 54 training cells in steps of 30


def test_callbacks_see_them_go_on_where_a_stage_stopped_early():
    seen, model = Seen(), new_model()
    model.train(30, batch_size=30, patience=1, lr=0.05, progress=False, callbacks=[seen])
    assert len(model.history) < 30
    assert seen.epochs == list(range(len(model.history)))


def test_callbacks_see_them_go_on_after_a_break(tmp_path):
    class Break(Callback):
        def on_train_epoch_start(self, trainer, pl_module):
            if trainer.current_epoch == 4:
                raise RuntimeError("broken")

    options = {"batch_size": 30, "progress": False, "checkpoint": tmp_path / "training"}
    with pytest.raises(RuntimeError, match="broken"):
        new_model().train(8, callbacks=[Break()], **options)
    seen = Seen()
    new_model().train(8, callbacks=[seen], **options)
    assert seen.epochs == [4, 5, 6, 7]
    assert seen.steps == [8, 10, 12, 14]


def test_a_logger_gets_the_history(tmp_path):
    model = new_model()
    model.train(8, batch_size=30, progress=False, logger=CSVLogger(tmp_path, "", ""))
    logged = pd.read_csv(tmp_path / "metrics.csv").set_index("epoch")
    assert list(logged["step"].unique()) == list(range(1, 16, 2))
    for name in ("elbo_train", "elbo_validation", "kl_y_validation"):
        found = logged[name].dropna()
        expected = model.history[name].iloc[found.index]
        assert list(found) == pytest.approx(list(expected), rel=1e-5)


def test_a_tool_hands_options_on_and_writes_none_of_them(tmp_path, capsys):
    adata, seen = svt.datasets.simulate(60, 8, 2, random_state=0), Seen()
    small = {"n_components": 2, "n_latent": 2, "n_hidden": 4, "max_epochs": 4}
    svt.tl.scvae(adata, **small, callbacks=seen, enable_progress_bar=False)
    assert seen.epochs == [0, 1, 2, 3]
    assert capsys.readouterr().err == ""
    assert not {"callbacks", "enable_progress_bar"} & set(adata.uns["scvae"]["params"])
    adata.write_h5ad(tmp_path / "fitted.h5ad")


@pytest.mark.parametrize("callbacks", [None, [], ()])
def test_no_callbacks_can_be_said_in_any_way(callbacks):
    new_model(mixture=False, n_components=None).train(1, progress=False, callbacks=callbacks)


def test_max_steps_are_those_of_a_stage():
    model = new_model()
    model.train(8, batch_size=30, max_steps=2, progress=False)
    assert list(model.history["stage"]) == ["warm-up", "vae", "mixture"]


# -- names -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "ours"),
    {
        "plan_kwargs": "'lr': what scvi-tools takes there",
        "early_stopping_patience": "'patience'",
        "validation_size": "'train_size': the share",
        "datasplitter_kwargs": "'validation_indices': positions",
        "n_epochs_kl_warmup": "'n_warm_up_epochs'",
        "use_gpu": "'accelerator': 'gpu'",
    }.items(),
)
def test_a_name_of_scvi_tools_is_answered_with_ours(name, ours):
    with pytest.raises(UnknownArgument, match=f"^train has no argument '{name}'. Here it is {ours}"):
        new_model().train(**{name: 1})


def test_a_slip_in_an_option_of_the_trainer_is_answered_too():
    with pytest.raises(UnknownArgument, match="Did you mean 'accumulate_grad_batches'"):
        new_model().train(accumulate_gradient_batches=2)


def test_options_are_those_of_the_trainer():
    assert {"logger", "callbacks", "max_steps", "precision"} <= TRAINER_OPTIONS
    assert not {"self", "max_epochs", "devices"} & TRAINER_OPTIONS


@pytest.mark.parametrize(("name", "value"), [("fast_dev_run", True), ("num_sanity_val_steps", 2), ("barebones", True)])
def test_an_option_that_would_break_the_training_is_refused_and_its_default_is_not(name, value):
    with pytest.raises(ValueError, match=rf"`{name}` must be .*; found {value}\. "):
        new_model().train(1, **{name: value})
    assert check_trainer_options({name: type(value)(0)}, svt.SCVAE.train) == {}


# -- devices; trainings on several are in tests/_train/test_processes.py ---------------------------------------------

SEVERAL = [2, "2", [0, 1], (0, 1), -1, "-1", "0,1", []]


@pytest.mark.parametrize("strategy", ["ddp_spawn", "ddp_notebook", "ddp_fork", "fsdp", 3], ids=str)
def test_a_strategy_that_would_lose_the_result_is_refused_before_any_work(strategy):
    message = rf"`strategy` must be 'auto' or .*'ddp'.*; found {strategy!r}\. Several devices.*Pass devices=2.*!python"
    with pytest.raises(ValueError, match=message):
        new_model().train(1, strategy=strategy, devices=2)
    with pytest.raises(ValueError, match=message):
        svt.tl.scvae(svt.datasets.simulate(60, 8, 2), strategy=strategy)


def test_a_strategy_of_one_device_is_refused_for_several():
    with pytest.raises(ValueError, match="`strategy` must be 'ddp' for several devices; found 'single_device'"):
        new_model().train(1, strategy="single_device", devices=2)


@pytest.mark.parametrize(("name", "value"), [("sync_batchnorm", True), ("num_nodes", 0), ("num_nodes", "two")])
def test_an_option_of_several_devices_that_does_not_fit_is_refused(name, value):
    with pytest.raises(ValueError, match=rf"`{name}` must be .*; found {value!r}"):
        new_model().train(1, **{name: value})


def test_counts_are_not_held_on_several_devices():
    with pytest.raises(ValueError, match="`hold_on_device=True` is for a training on one device; found 2 processes"):
        whether_to_hold(True, {}, Processes(0, 2))
    assert whether_to_hold(None, {}, Processes(0, 2)) is False
    assert whether_to_hold(None, {}) is None


@pytest.mark.parametrize("devices", SEVERAL, ids=str)
def test_tools_that_train_many_models_take_one_device_for_each(devices):
    with pytest.raises(ValueError, match=r"`devices` must be 'auto', 1, .*on one device.*CUDA_VISIBLE"):
        check_one_device(devices)


def test_a_comparison_refuses_them_before_any_training():
    adata = svt.datasets.simulate(60, 8, 2, random_state=0)
    with pytest.raises(ValueError, match=r"must be a model that can be trained.*by one process on one device"):
        svt.tl.compare(adata, {"n_latent": [2]}, devices=2)


ONE = [
    {"devices": 1},
    {"devices": "1"},
    {"devices": "auto"},
    {"strategy": "auto"},
    {"strategy": "ddp"},
    {"num_nodes": 1},
]


@pytest.mark.parametrize("one", ONE, ids=str)
def test_one_device_can_be_said_in_any_way(one):
    new_model(mixture=False, n_components=None).train(1, accelerator="cpu", progress=False, **one)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"accelerator": None}, "`accelerator` must be one of 'auto', 'gpu', .*; found None"),
        ({"accelerator": 1}, "`accelerator` must be one of .*; found 1"),
        ({"accelerator": "cpu", "devices": [1]}, r"must be a device of this machine; found 'cpu' and \[1\]"),
        ({"accelerator": "cpu", "devices": ["x"]}, r"must be a device of this machine; found 'cpu' and \['x'\]"),
    ],
    ids=str,
)
def test_what_is_no_device_is_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        new_model().train(1, progress=False, **wrong)


@pytest.mark.parametrize("tasks", [{"SLURM_NTASKS": "4"}, {"SLURM_NTASKS": "4", "SLURM_NTASKS_PER_NODE": "4"}])
def test_tasks_of_a_job_of_slurm_do_no_harm_and_are_named(tasks, monkeypatch, tmp_path):
    for name, value in (tasks | {"SLURM_JOB_ID": "1", "SLURM_JOB_NAME": "train", "SLURM_NNODES": "2"}).items():
        monkeypatch.setenv(name, value)
    model = new_model()
    with pytest.warns(UserWarning, match=r"has 4 tasks \(SLURM_NTASKS\).*--ntasks=1"):
        model.train(4, progress=False)
    model.save(tmp_path / "model")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        svt.SCVAE.load(tmp_path / "model")
    assert os.environ["SLURM_JOB_NAME"] == "train"


def test_one_task_of_slurm_is_nothing_to_speak_of(monkeypatch):
    monkeypatch.setenv("SLURM_NTASKS", "1")
    monkeypatch.delenv("SLURM_JOB_NAME", raising=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        new_model(mixture=False, n_components=None).train(1, progress=False)
    assert "SLURM_JOB_NAME" not in os.environ
