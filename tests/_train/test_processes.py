"""Trainings by two processes on this machine: what each sees, what they agree on, and how they end."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pandas as pd
import pytest
import torch

import scvae_tools as svt
from scvae_tools._train import processes
from scvae_tools._train.checkpoint import CHECKPOINT_FILE, require_alike
from scvae_tools._train.processes import ALONE, join

N_CELLS, N_GENES, BATCH_SIZE, N_EPOCHS = 103, 12, 16, 6
HELD_OUT = list(range(0, N_CELLS, 8))  # 13, so that the shares differ
N_TRAIN = N_CELLS - len(HELD_OUT)
#: What all scripts begin with: cells that can be told apart by their size factor, and what each process notes.
BEGIN = f"""
import json, os, signal, sys
import numpy as np, torch, zarr
from lightning.pytorch.callbacks import Callback
import scvae_tools as svt
from scvae_tools._train.processes import Processes, present

def cells():
    adata = svt.datasets.simulate({N_CELLS}, {N_GENES}, 2, n_batches=2, random_state=0)
    adata.obs["size"] = 100.0 + np.arange({N_CELLS})
    return adata

class Notes(Callback):
    def __init__(self):
        self.cells, self.own, self.mean, self.sums, self.noise = [], [], [], [], []

    def on_fit_start(self, trainer, plan):
        note = lambda gradient: self.own.append(gradient[0, :3].tolist())
        self.hook = plan.module.z_mean.weight.register_hook(note)

    def on_fit_end(self, trainer, plan):
        self.hook.remove()

    def on_train_epoch_start(self, trainer, plan):
        self.cells.append([])
        self.noise.append(torch.get_rng_state().sum().item())

    def on_train_batch_end(self, trainer, plan, outputs, batch, index):
        self.cells[-1].append((batch["size_factor"].ravel() - 100).round().int().tolist())

    def on_before_optimizer_step(self, trainer, plan, optimizer):
        self.mean.append(plan.module.z_mean.weight.grad[0, :3].tolist())

    def on_validation_epoch_end(self, trainer, plan):
        self.sums.append([*plan._sums.tolist(), plan._n_cells])

options = {{"accelerator": "cpu", "devices": 2, "batch_size": {BATCH_SIZE}, "progress": False}}
options |= {{"validation_indices": {HELD_OUT}}}
of_model = {{"n_components": 2, "n_latent": 3, "n_hidden": 6, "size_factor_key": "size"}}
folder = sys.argv[1]

def note(name, **values):
    with open(f"{{folder}}/{{name}}-{{present().rank}}.json", "w") as file:
        json.dump(values, file)

def state_of(model):
    return {{name: value.tolist() for name, value in model.module.state_dict().items()}}
"""
TRAIN = f"""
adata, notes = cells(), Notes()
rate = zarr.open(f"{{folder}}/rate.zarr", mode="a", shape=adata.shape, dtype="f4")
model = svt.tl.scvae(adata, batch_key="batch", max_epochs={N_EPOCHS}, callbacks=[notes], return_model=True,
                     write_lambda=rate, record_rates=True, **of_model, **options)
model.save(folder + "/model")
loaded = svt.SCVAE.load(folder + "/model", adata)
note("memory", cells=notes.cells, own=notes.own, mean=notes.mean, sums=notes.sums, noise=notes.noise,
     state=state_of(model), history=model.history.to_dict("list"), of_loaded=state_of(loaded), number=present().number,
     probs=adata.obsm["scvae_probs"].tolist(), rate=float(np.abs(rate[:] - model.get_lambda()).max()),
     temperature=model.temperature, versions={{n: v.epoch for n, v in model._state.versions.items()}})

import scvae_tools._data.stored as stored
stored.LARGEST_WHOLE = 0
import anndata
Processes.of_first = lambda self, make: make()  # nothing of the first is sent: each computes for itself
if present().is_first:
    cells().write_h5ad(folder + "/cells.h5ad")
present().wait()
adata, notes = anndata.read_h5ad(folder + "/cells.h5ad", backed="r"), Notes()
model = svt.tl.scvae(adata, mixture="vade", normalization="batch", max_epochs=4, callbacks=[notes], return_model=True,
                     **of_model, **options)
note("file", cells=notes.cells, state=state_of(model), kind=type(model.counts_of_model()).__name__,
     history=model.history.to_dict("list"))
"""


def start(tmp_path, script, environment=None, name="train.py"):
    path = tmp_path / name
    path.write_text(BEGIN + script)
    command = [sys.executable, str(path), str(tmp_path)]
    return subprocess.Popen(
        command, env=os.environ | (environment or {}), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def finished(process, limit=300):
    """Code and output of a process; all that it left running is ended with it."""
    try:
        output, _ = process.communicate(timeout=limit)
    except subprocess.TimeoutExpired:
        process.kill()
        output, _ = process.communicate()
        pytest.fail(f"not ended after {limit} s: {output}")
    return process.returncode, output


def notes_of(folder, name):
    return [json.loads((folder / f"{name}-{rank}.json").read_text()) for rank in (0, 1)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("two")
    code, output = finished(start(path, TRAIN))
    assert code == 0, output
    assert "Warning: find_unused_parameters" not in output
    return path


# -- what two processes do ---------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("name", ["memory", "file"])
def test_both_processes_end_with_the_same_weights_to_the_bit(folder, name):
    one, other = notes_of(folder, name)
    assert one["state"] == other["state"]  # of "file", though nothing was sent but gradients and sums
    assert all(np.isfinite(value).all() for value in one["state"].values())
    pd.testing.assert_frame_equal(pd.DataFrame(one["history"]), pd.DataFrame(other["history"]))


@pytest.mark.slow
def test_both_have_the_same_results_and_files(folder):
    one, other = notes_of(folder, "memory")
    assert one["number"] == 2
    for name in ("probs", "temperature", "versions"):
        assert one[name] == other[name]
    assert one["of_loaded"] == other["of_loaded"] == one["state"]
    assert one["rate"] == other["rate"] < 1e-5
    assert sorted(path.name for path in (folder / "model").iterdir()) == ["model.pt"]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["memory", "file"])
def test_no_cell_is_trained_on_twice_in_an_epoch_and_the_steps_are_as_many(folder, name):
    found = notes_of(folder, name)
    train = set(range(N_CELLS)) - set(HELD_OUT)
    assert len(found[0]["cells"]) >= 3
    for one, other in zip(*(each["cells"] for each in found), strict=True):
        assert list(map(len, one)) == list(map(len, other))
        cells = [cell for step in one + other for cell in step]
        assert len(cells) == len(set(cells)) == N_TRAIN // 2 * 2
        assert set(cells) <= train


@pytest.mark.slow
def test_counts_in_a_file_stay_there(folder):
    assert [each["kind"] for each in notes_of(folder, "file")] == ["StoredCounts"] * 2


@pytest.mark.slow
def test_gradients_are_the_mean_of_those_of_the_processes(folder):
    one, other = notes_of(folder, "memory")
    own = np.array([one["own"], other["own"]])  # (2, n_steps, 3), before they were averaged
    assert own.shape[1] == len(one["mean"]) == N_EPOCHS * 3
    assert np.abs(own[0] - own[1]).max() > 1e-3
    np.testing.assert_allclose(own.mean(0), one["mean"], rtol=1e-4, atol=1e-6)
    assert one["mean"] == other["mean"]


@pytest.mark.slow
def test_the_bound_of_an_epoch_is_that_of_all_held_out_cells(folder):
    found = notes_of(folder, "memory")
    sums = np.array([each["sums"] for each in found])  # (2, n_epochs, 4)
    assert sums[:, :, 3].tolist() == [[7] * N_EPOCHS, [6] * N_EPOCHS]
    total = sums.sum(0)
    log_likelihood, kl_z, kl_y = (total[:, :3] / len(HELD_OUT)).T
    history = found[0]["history"]
    np.testing.assert_allclose(history["log_likelihood_validation"], log_likelihood, rtol=1e-6)
    np.testing.assert_allclose(history["elbo_validation"], log_likelihood - kl_z - kl_y, rtol=1e-6)


@pytest.mark.slow
def test_the_random_numbers_of_the_processes_differ(folder):
    one, other = notes_of(folder, "memory")
    assert all(a != b for a, b in zip(one["noise"], other["noise"], strict=True))


# -- how they end ------------------------------------------------------------------------------------------------------

GOES_ON = f"""
class Kill(Callback):
    def on_train_batch_end(self, trainer, plan, outputs, batch, index):
        if plan.row["epoch"] == 5 and index == 1 and present().rank == 1 and "KILL" in os.environ:
            os.kill(os.getpid(), signal.SIGKILL)

model = svt.SCVAE(cells_set_up(), n_components=2, n_latent=3, n_hidden=6)
model.train({N_EPOCHS}, strategy="ddp", checkpoint=sys.argv[1] + "/checkpoint", callbacks=[Kill()], **options)
note(os.environ["NAME"], state=state_of(model), history=model.history.to_dict("list"))
"""
GOES_ON = GOES_ON.replace("cells_set_up()", "(lambda a: svt.SCVAE.setup_anndata(a) or a)(cells())")


@pytest.mark.slow
def test_where_one_process_is_killed_the_other_ends_and_the_checkpoint_goes_on_to_the_bit(tmp_path):
    begin = time.monotonic()
    code, output = finished(start(tmp_path, GOES_ON, {"KILL": "1", "NAME": "killed"}))
    assert code != 0, output
    assert time.monotonic() - begin < 240
    saved = torch.load(tmp_path / "checkpoint" / CHECKPOINT_FILE, weights_only=True)["scvae_tools"]
    assert saved["is_finished"] is False
    assert not (tmp_path / "killed-0.json").exists()
    code, output = finished(start(tmp_path, GOES_ON, {"NAME": "resumed"}))
    assert code == 0, output
    (tmp_path / "checkpoint").rename(tmp_path / "former")
    code, output = finished(start(tmp_path, GOES_ON, {"NAME": "unbroken"}))
    assert code == 0, output
    for resumed, unbroken in zip(notes_of(tmp_path, "resumed"), notes_of(tmp_path, "unbroken"), strict=True):
        assert resumed["state"] == unbroken["state"]
        found, expected = (pd.DataFrame(each["history"]) for each in (resumed, unbroken))
        pd.testing.assert_frame_equal(found, expected, check_exact=False, rtol=1e-6)


@pytest.mark.slow
def test_ctrl_c_in_one_process_ends_the_training_of_both_with_a_result(tmp_path):
    script = """
class Press(Callback):
    def on_train_batch_end(self, trainer, plan, outputs, batch, index):
        if plan.row["epoch"] == 2 and index == 0 and present().rank == 1:
            signal.raise_signal(signal.SIGINT)

adata = cells()
model = svt.tl.scvae(adata, max_epochs=8, callbacks=[Press()], return_model=True, **of_model, **options)
note("interrupted", state=state_of(model), n=len(model.history), was=model.was_interrupted, mixture=model.is_mixture)
"""
    code, output = finished(start(tmp_path, script))
    assert code == 0, output
    one, other = notes_of(tmp_path, "interrupted")
    assert one == other
    assert (one["was"], one["mixture"]) == (True, True)
    assert one["n"] < 8


@pytest.mark.slow
def test_tasks_of_slurm_on_two_machines_train_together(tmp_path):
    """As srun starts them: the same command for each task, with the variables of the task."""
    script = """
options |= {"devices": 1, "strategy": "ddp"}
adata = cells()
model = svt.tl.scvae(adata, max_epochs=2, mixture=False, return_model=True, size_factor_key="size", n_latent=2,
                     n_hidden=4, **options)
model.save(folder + "/model")
note("task", state=state_of(model), number=present().number, rank=present().rank)
"""
    job = {"SLURM_JOB_ID": str(os.getpid()), "SLURM_JOB_NAME": "train", "SLURM_NTASKS": "2", "SLURM_NNODES": "2"}
    job |= {"SLURM_NTASKS_PER_NODE": "1", "SLURM_STEP_ID": "0", "MASTER_ADDR": "127.0.0.1", "SLURM_LOCALID": "0"}
    tasks = [start(tmp_path, script, job | {"SLURM_PROCID": n, "SLURM_NODEID": n}) for n in "01"]
    for code, output in map(finished, tasks):
        assert code == 0, output
    one, other = notes_of(tmp_path, "task")
    assert [each["number"] for each in (one, other)] == [2, 2]
    assert one["state"] == other["state"]


# -- one process -------------------------------------------------------------------------------------------------------


def test_one_process_has_nobody_to_wait_for():
    values = torch.tensor([1.0, 2.0])
    assert ALONE.total(values) is values
    assert (ALONE.any(True), ALONE.any(False)) == (True, False)
    assert ALONE.of_first(lambda: 3) == 3
    assert ALONE.gathered(4) == [4]
    assert ALONE.by_parts(lambda cells: cells * 2, np.arange(3)).tolist() == [0, 2, 4]
    assert ALONE.part_of(np.arange(3)).tolist() == [0, 1, 2]
    assert ALONE.trainer_options(has_unused=True) == {}
    ALONE.wait()
    assert processes.present() is ALONE


def test_parts_of_cells_are_equal_but_for_one_cell_and_whole_where_they_are_too_few():
    several = [processes.Processes(rank, 3) for rank in range(3)]
    parts = [each.part_of(np.arange(8)) for each in several]
    assert sorted(np.concatenate(parts)) == list(range(8))
    assert {len(part) for part in parts} == {2, 3}
    assert [each.part_of(np.arange(2)).tolist() for each in several] == [[0, 1]] * 3


def test_processes_with_other_data_are_told_in_what_they_differ():
    identities = [{"n_cells": 10, "counts": "#a"}, {"n_cells": 11, "counts": "#b"}]
    message = r"must have the same data.*n_cells \(10 in process 0, 11 in process 1\), counts \(others\)\. Seed what"
    with pytest.raises(ValueError, match=message):
        require_alike(identities)
    require_alike(identities[:1] * 2)


# -- what cannot be started is refused ---------------------------------------------------------------------------------


def test_a_notebook_is_told_to_run_a_script(monkeypatch):
    monkeypatch.setattr(sys, "ps1", ">>> ", raising=False)
    with pytest.raises(ValueError, match=r"`devices` must be one in a notebook.*`!python train.py`.*SCVAE.load"):
        svt.tl.scvae(svt.datasets.simulate(60, 8, 2), devices=2, accelerator="cpu")


def test_python_without_a_script_is_told_to_run_one():
    code = "import scvae_tools as svt; svt.tl.scvae(svt.datasets.simulate(60, 8, 2), devices=2, accelerator='cpu')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert done.returncode == 1
    assert "ValueError: `devices` must be one where there is no script" in done.stderr


def test_a_task_of_slurm_that_srun_has_not_started_does_not_wait_for_others(monkeypatch):
    for name, value in {"SLURM_NTASKS": "2", "SLURM_JOB_NAME": "train", "SLURM_JOB_ID": "1"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("SLURM_STEP_ID", raising=False)
    with pytest.raises(ValueError, match=r"2 tasks \(SLURM_NTASKS\).*`srun python train.py`.*--ntasks=1"):
        join("cpu", 2)


@pytest.mark.parametrize("devices", [[], (), "x", [1, 2], 0], ids=str)
def test_devices_that_there_are_not_are_refused(devices):
    with pytest.raises(ValueError, match=r"`.*devices`.* must be .*; found"):
        svt.tl.scvae(svt.datasets.simulate(60, 8, 2), devices=devices, accelerator="cpu")


def test_a_strategy_for_one_process_is_one_process():
    assert join("cpu", 1) is ALONE
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
