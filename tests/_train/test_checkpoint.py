"""Versions of the weights, and trainings that go on after they were killed."""

from __future__ import annotations

import functools
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from lightning.pytorch.callbacks import Callback

import scvae_tools as svt
from scvae_tools._files import DiskFullError
from scvae_tools._train import checkpoint
from scvae_tools._train.checkpoint import CHECKPOINT_FILE
from scvae_tools._train.plan import NonFiniteError, TrainingPlan
from scvae_tools._train.torch_file import write_torch

N_CELLS, N_GENES = 150, 20


class KilledError(BaseException):
    """Stands for what ends a process: nothing catches it."""


class Break(Callback):
    """Do something in the middle of an epoch."""

    def __init__(self, epoch, act):
        self.epoch, self.act = epoch, act

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, index):
        if pl_module.row["epoch"] == self.epoch and index == 0:
            self.act()


class KeepAll(Callback):
    """Weights by epoch, as they are validated."""

    def __init__(self):
        self.weights = {}

    def on_validation_end(self, trainer, pl_module):
        copy = {name: value.clone() for name, value in pl_module.module.state_dict().items()}
        self.weights[pl_module.row["epoch"]] = copy


def die():
    raise KilledError


def make_adata(n_cells=N_CELLS):
    adata = svt.datasets.simulate(n_cells, N_GENES, 3, random_state=0)
    names = np.array(["type " + str(name) for name in adata.obs["component"]])
    adata.obs["label"] = np.where(np.arange(n_cells) % 4 == 0, names, "?")
    return adata


def make_model(mixture="gmvae", *, adata=None, labels=False, **options):
    adata = make_adata() if adata is None else adata
    svt.SCVAE.setup_anndata(adata, **({"labels_key": "label", "unlabeled_category": "?"} if labels else {}))
    if mixture and not labels:
        options = {"n_components": 3} | options
    return svt.SCVAE(adata, mixture=mixture, **({"n_hidden": 8, "n_latent": 3} | options))


def train(model, epoch=None, act=die, **options):
    """Train; if an epoch is given, something happens in the middle of it."""
    callbacks = [*options.pop("callbacks", []), *([] if epoch is None else [Break(epoch, act)])]
    model.train(**({"max_epochs": 10, "batch_size": 64, "lr": 1e-2, "progress": False} | options), callbacks=callbacks)
    return model


@functools.cache
def unbroken(mixture="gmvae"):
    return train(make_model(mixture))


def assert_same(found, expected):
    pd.testing.assert_frame_equal(found.history, expected.history, check_exact=True)
    pd.testing.assert_frame_equal(found.versions, expected.versions, check_exact=True)
    assert found.version == expected.version
    assert found.n_components == expected.n_components
    for version in expected.versions.index:
        found.use_version(version), expected.use_version(version)
        ours, theirs = found.module.state_dict(), expected.module.state_dict()
        assert ours.keys() == theirs.keys()
        assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []
    np.testing.assert_array_equal(found.train_indices, expected.train_indices)
    curves = found.component_curve_, expected.component_curve_
    assert (curves[0] is None) == (curves[1] is None)
    if curves[0] is not None:
        pd.testing.assert_frame_equal(*curves, check_exact=True)


# -- a training that is killed -----------------------------------------------------------------------------------------

# 10 epochs: of a mixture 2 of warm-up, 5 of the VAE, 3 of the mixture; without one 2 and 8.
BREAKS = {
    "in and after the warm-up": ({"mixture": False}, {}, [2, 3, 6]),
    "a VAE whose patience runs out": ({"mixture": False}, {"max_epochs": 20, "patience": 2, "lr": 0.05}, [8]),
    "without held-out cells": ({"mixture": False}, {"train_size": 1.0}, [5]),
    "batch norm that leaves a cell out": (
        {"mixture": False, "normalization": "batch"},
        {"batch_size": 67, "validation_indices": range(15)},
        [2, 5],
    ),
    "a patience that ran out before": ({"mixture": False}, {"patience": 1, "early_stopping": False, "lr": 0.1}, [9]),
    "before, at and after the beginning of a GMVAE": ({}, {"record_rates": True}, [5, 8, 9]),
    "VaDE": ({"mixture": "vade"}, {}, [9]),
    "components that were counted": ({"n_components": None}, {}, [9]),
    "components within a range": ({"mixture": "vade", "n_components": (2, 5)}, {}, [9]),
    "labels": ({"labels": True}, {}, [8, 9]),
}


@pytest.mark.parametrize("where", BREAKS)
def test_a_training_that_was_broken_off_comes_out_as_if_it_had_not_been(where, tmp_path):
    of_model, of_training, epochs = BREAKS[where]
    expected = train(make_model(**of_model), **of_training)
    assert len(expected.history) >= max(epochs)
    for epoch in epochs:
        with pytest.raises(KilledError):
            train(make_model(**of_model), epoch, checkpoint=tmp_path, **of_training)
    assert_same(train(make_model(**of_model), checkpoint=tmp_path, **of_training), expected)


def die_in_writing(monkeypatch, n_written):
    """The process ends while the file is written, after so many have been."""
    save, written = torch.save, []

    def die_midway(saved, stream):
        save(saved, stream)
        written.append(stream)
        if len(written) > n_written:
            stream.truncate(stream.size // 2)
            monkeypatch.setattr(shutil, "rmtree", lambda *_, **__: None)  # who is dead does not tidy up
            raise KilledError

    monkeypatch.setattr(torch, "save", die_midway)


@pytest.mark.parametrize("n_written", [0, 7, 10])
def test_what_dies_while_it_writes_leaves_the_epoch_before(n_written, tmp_path, monkeypatch):
    """After 7 epochs the mixture is to be found, after 10 nothing but the result to be written."""
    with monkeypatch.context() as patch:
        die_in_writing(patch, n_written)
        with pytest.raises(KilledError):
            train(make_model(), checkpoint=tmp_path)
    (temporary,) = tmp_path.glob(CHECKPOINT_FILE + ".*.tmp*")
    for each in (temporary, *temporary.iterdir()):
        os.utime(each, (0, 0))  # long ago
    assert (tmp_path / CHECKPOINT_FILE).exists() == (n_written > 0)
    resumed = train(make_model(), checkpoint=tmp_path)
    assert_same(resumed, unbroken())
    assert [path.name for path in tmp_path.iterdir()] == [CHECKPOINT_FILE]


@pytest.fixture
def nearly_full(monkeypatch):
    """Disk with room for a thousand bytes."""
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**9, 10**9 - 1000, 1000))


def test_a_full_disk_does_not_end_a_training_and_is_said_once(tmp_path, monkeypatch):
    write, written = checkpoint.write_torch, []

    def fill(saved, path):
        written.append(path)
        if len(written) > 3:
            raise DiskFullError(path, 10**6)
        write(saved, path)

    monkeypatch.setattr(checkpoint, "write_torch", fill)
    with pytest.warns(
        UserWarning, match=r"not up to date: .* takes 1 MB or more; found .* it starts again after"
    ) as said:
        model = train(make_model(), checkpoint=tmp_path)
    assert sum("not up to date" in str(each.message) for each in said) == 1
    assert len(written) > 5
    assert_same(model, unbroken())
    monkeypatch.setattr(checkpoint, "write_torch", write)
    assert_same(train(make_model(), checkpoint=tmp_path), unbroken())


def test_two_trainings_at_a_time_in_one_directory_are_refused(tmp_path):
    def begin_another():
        with pytest.raises(ValueError, match=r"must be of one training at a time; found another one that is running"):
            train(make_model(False), checkpoint=tmp_path, lr=0.02)

    model = train(make_model(False), 3, begin_another, checkpoint=tmp_path)
    assert_same(train(make_model(False), 1, checkpoint=tmp_path), model)  # the lock is gone: the result is loaded


def test_the_file_of_a_training_whose_lock_is_not_seen_is_not_overwritten(tmp_path):
    def write_from_elsewhere():
        write_torch({"theirs": 1}, tmp_path / CHECKPOINT_FILE)

    with pytest.warns(UserWarning, match="not up to date: another training has written to .*checkpoint.pt' since"):
        model = train(make_model(False), 3, write_from_elsewhere, checkpoint=tmp_path)
    assert_same(model, unbroken(False))
    assert torch.load(tmp_path / CHECKPOINT_FILE, weights_only=True) == {"theirs": 1}


def test_a_checkpoint_without_room_is_refused_before_the_training(tmp_path, nearly_full):
    model = make_model()
    with pytest.raises(DiskFullError, match=r"checkpoint\.pt' cannot be written.* found 1 kB free on its disk"):
        train(model, checkpoint=tmp_path)
    assert model.history is None


@pytest.mark.filterwarnings("ignore:kl_z became NaN or infinite in epoch 6.*once more with lr=0.001")
@pytest.mark.parametrize("epoch", [3, 4])
def test_a_second_attempt_at_a_lower_rate_is_gone_on_with(epoch, tmp_path, monkeypatch):
    """Of the VAE from epoch 3 on: broken off before it failed the first time, and in epoch 4 of the second attempt."""
    step = TrainingPlan.training_step

    def fail(self, *args):
        if self.lr > 5e-3 and self.row["epoch"] == 6:
            raise NonFiniteError("kl_z", self.stage.name, 6)
        if (self.lr > 5e-3) == (epoch == 3) and self.row["epoch"] == epoch and breaks:
            breaks.clear()
            raise KilledError
        return step(self, *args)

    breaks = []
    monkeypatch.setattr(TrainingPlan, "training_step", fail)
    expected = train(make_model(False))
    breaks = [True]
    with pytest.raises(KilledError):
        train(make_model(False), checkpoint=tmp_path)
    assert_same(train(make_model(False), checkpoint=tmp_path), expected)


def in_child(mixture, epoch, directory):
    """Train in a process that is killed; called in a process of its own."""
    if os.fork() == 0:
        train(make_model(mixture), epoch, lambda: os.kill(os.getpid(), signal.SIGKILL), checkpoint=directory)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.wait()[1])


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_process_that_is_killed_leaves_a_training_that_goes_on(tmp_path):
    cases = [("gmvae", 3, "a"), ("vade", 9, "b")]
    code = f"""
import sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
from test_checkpoint import in_child
print([in_child(mixture, epoch, {str(tmp_path)!r} + "/" + name) for mixture, epoch, name in {cases!r}])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=300)
    assert done.stdout.splitlines()[-1] == f"[-{signal.SIGKILL.value}, -{signal.SIGKILL.value}]", done.stderr
    for mixture, epoch, directory in cases:
        saved = torch.load(tmp_path / directory / CHECKPOINT_FILE, weights_only=True)
        assert saved["scvae_tools"]["is_finished"] is False
        keep = KeepAll()
        resumed = train(make_model(mixture), checkpoint=tmp_path / directory, callbacks=[keep])
        assert min(keep.weights) == epoch  # the epochs before were not trained again
        assert_same(resumed, unbroken(mixture))


def test_a_process_that_is_told_to_end_leaves_a_training_that_goes_on(tmp_path):
    with pytest.raises(SystemExit) as ended:
        train(make_model(False), 4, lambda: signal.raise_signal(signal.SIGTERM), checkpoint=tmp_path)
    assert ended.value.code == 128 + signal.SIGTERM
    assert_same(train(make_model(False), checkpoint=tmp_path), unbroken(False))


def press_ctrl_c():
    raise KeyboardInterrupt


@pytest.mark.parametrize("epoch", [5, 9])
def test_after_ctrl_c_the_warning_says_how_to_go_on(epoch, tmp_path):
    model = make_model()
    with pytest.warns(UserWarning, match=r"interrupted in stage .* build the model anew and train it with the same"):
        train(model, epoch, press_ctrl_c, checkpoint=tmp_path)
    assert model.is_mixture
    with pytest.raises(ValueError, match=rf"epochs before this training \(0 there, {epoch - 1} here\).*be built anew"):
        train(model, checkpoint=tmp_path)
    assert_same(train(make_model(), checkpoint=tmp_path), unbroken())


def test_the_same_call_after_the_end_loads_the_result(tmp_path):
    options = {"n_components": None}
    first = train(make_model(**options), checkpoint=tmp_path)
    again = train(make_model(**options), 1, die, checkpoint=tmp_path)
    assert_same(again, first)
    np.testing.assert_array_equal(again.predict(), first.predict())
    again.train(2, progress=False)
    assert list(again.history["stage"])[-2:] == ["mixture"] * 2


def test_the_global_random_state_is_left_alone_by_going_on(tmp_path):
    with pytest.raises(KilledError):
        train(make_model(False), 4, checkpoint=tmp_path)
    torch.manual_seed(3)
    np.random.seed(3)  # noqa: NPY002
    expected = float(torch.rand(1)), np.random.rand()  # noqa: NPY002
    torch.manual_seed(3)
    np.random.seed(3)  # noqa: NPY002
    train(make_model(False), checkpoint=tmp_path)
    assert (float(torch.rand(1)), np.random.rand()) == expected  # noqa: NPY002


def other_count():
    adata = make_adata()
    adata.X[0, 0] += 1
    return adata


def other_order():
    adata = make_adata()
    adata.X = adata.X[:, ::-1]
    return adata


def layered():
    adata = make_adata()
    adata.layers["raw"] = adata.X.copy()
    svt.SCVAE.setup_anndata(adata, layer="raw")
    return svt.SCVAE(adata, mixture=False, n_hidden=8, n_latent=3)


def other_gene():
    adata = make_adata()
    adata.var_names = [*adata.var_names[:-1], "another"]
    return adata


OTHERS = {
    "epochs": ({}, {"max_epochs": 12}, r"train\(max_epochs\) \(10 there, 12 here\)"),
    "learning rate": ({}, {"lr": 0.02}, r"train\(lr\) \(0.01 there, 0.02 here\)"),
    "seed": ({}, {"random_state": 1}, r"held-out cells \(others\), train\(random_state\) \(0 there, 1 here\)"),
    "held-out cells": ({}, {"validation_indices": [1, 2]}, r"found other ones: held-out cells \(others\)\. Pass"),
    "options of Lightning": ({}, {"accumulate_grad_batches": 2}, r"train\(accumulate_grad_batches\) \(None there, 2 h"),
    "likelihood": ({"likelihood": "poisson"}, {}, r"likelihood \('nb' there, 'poisson' here\)"),
    "width": ({"n_hidden": 9}, {}, r"n_hidden \(8 there, 9 here\)"),
    "initial weights": ({"random_state": 1}, {}, r"found other ones: random_state \(0 there, 1 here\)"),
    "number of cells": ({"adata": lambda: make_adata(140)}, {}, r"n_cells \(150 there, 140 here\)"),
    "counts": ({"adata": other_count}, {}, r"counts \(others\), data in 'observed_lib_size' \(others\)\. Pass"),
    "counts with the same sums": ({"adata": other_order}, {}, r"found other ones: counts \(others\)\. Pass"),
    "genes": ({"adata": other_gene}, {}, r"found other ones: names of the genes \(others\)\. Pass"),
}


@pytest.fixture(scope="module")
def broken_off(tmp_path_factory):
    directory = tmp_path_factory.mktemp("checkpoint")
    with pytest.raises(KilledError):
        train(make_model(False), 3, checkpoint=directory)
    return directory


@pytest.mark.parametrize("what", OTHERS)
def test_a_checkpoint_of_another_training_is_refused_with_what_differs(what, broken_off):
    of_model, of_training, message = OTHERS[what]
    model = make_model(False, **{name: value() if callable(value) else value for name, value in of_model.items()})
    before = {name: value.clone() for name, value in model.module.state_dict().items()}
    with pytest.raises(ValueError, match=message) as caught:
        train(model, checkpoint=broken_off, **of_training)
    assert "Pass another directory as `checkpoint`, or the same data and arguments." in str(caught.value)
    assert model.history is None
    assert model.train_indices is None
    assert all(torch.equal(before[name], value) for name, value in model.module.state_dict().items())


def labelled(unlabeled, labels=("a", "b", "?")):
    adata = make_adata()
    adata.obs["label"] = np.array(labels)[np.arange(N_CELLS) % 3]
    svt.SCVAE.setup_anndata(adata, labels_key="label", unlabeled_category=unlabeled)
    return svt.SCVAE(adata, n_hidden=8, n_latent=3, n_components=3)


def test_a_checkpoint_of_other_roles_of_the_labels_is_refused(tmp_path):
    train(labelled("?"), checkpoint=tmp_path, max_epochs=3)
    with pytest.raises(ValueError, match=r"ones: setup_anndata\(unlabeled_category\) \('\?' there, 'a' here\)\. Pass"):
        train(labelled("a"), checkpoint=tmp_path, max_epochs=3)
    with pytest.raises(ValueError, match=r"found other ones: names of the labels \(others\)\. Pass"):
        train(labelled("?", ("a", "c", "?")), checkpoint=tmp_path, max_epochs=3)


def test_a_checkpoint_of_another_layer_is_refused(broken_off):
    with pytest.raises(ValueError, match=r"found other ones: setup_anndata\(layer\) \(None there, 'raw' here\)\. Pass"):
        train(layered(), checkpoint=broken_off)


def test_a_checkpoint_of_a_second_training_is_refused_after_another_first_one(tmp_path):
    first, same, other = (train(make_model(False), max_epochs=2, lr=lr) for lr in (1e-2, 1e-2, 2e-2))
    train(first, max_epochs=3, checkpoint=tmp_path)
    with pytest.raises(ValueError, match=r"ones: weights at the beginning of this training \(others\)\. Pass"):
        train(other, max_epochs=3, checkpoint=tmp_path)
    assert_same(train(same, 1, die, max_epochs=3, checkpoint=tmp_path), first)


def test_a_checkpoint_of_the_query_of_another_reference_is_refused(tmp_path):
    def query(seed):
        adata = make_adata()
        adata.obs["batch"] = "a"
        svt.SCVAE.setup_anndata(adata, batch_key="batch")
        reference = svt.SCVAE(adata, mixture=False, n_hidden=8, n_latent=3)
        train(reference, max_epochs=2, random_state=seed)
        adata = make_adata()
        adata.obs["batch"] = "b"
        return svt.SCVAE.load_query_data(adata, reference)

    train(query(0), max_epochs=3, checkpoint=tmp_path)
    with pytest.raises(ValueError, match=r"ones: weights at the beginning of this training \(others\)\. Pass"):
        train(query(1), max_epochs=3, checkpoint=tmp_path)
    train(query(0), 1, die, max_epochs=3, checkpoint=tmp_path)


def test_a_checkpoint_written_before_counts_were_compared_is_refused(tmp_path):
    train(make_model(False), max_epochs=2, checkpoint=tmp_path)
    saved = torch.load(tmp_path / CHECKPOINT_FILE, weights_only=True)
    identity = json.loads(saved["scvae_tools"]["identity"])
    del identity["counts"]
    saved["scvae_tools"]["identity"] = json.dumps(identity)
    torch.save(saved, tmp_path / CHECKPOINT_FILE)
    with pytest.raises(ValueError, match=r"found other ones: counts \(others\)\. Pass"):
        train(make_model(False), max_epochs=2, checkpoint=tmp_path)


def test_where_and_how_visibly_is_computed_may_change(broken_off):
    directory = broken_off.with_name("copy")
    shutil.copytree(broken_off, directory)
    resumed = train(make_model(False), checkpoint=directory, progress=True, accelerator="cpu")
    assert_same(resumed, unbroken(False))


def test_more_epochs_of_a_finished_training_are_refused_with_the_way_to_train_further(tmp_path):
    train(make_model(False), checkpoint=tmp_path, max_epochs=2)
    with pytest.raises(ValueError, match="To train a finished model further, call `train` on it again"):
        train(make_model(False), checkpoint=tmp_path, max_epochs=3)


def test_what_is_no_checkpoint_is_refused(tmp_path):
    (tmp_path / CHECKPOINT_FILE).write_bytes(b"something else")
    with pytest.raises(ValueError, match=r"checkpoint.pt' must be a checkpoint of `SCVAE.train`; found 14 bytes of"):
        train(make_model(False), checkpoint=tmp_path)
    with pytest.raises(ValueError, match="`checkpoint` must be a directory; found the file"):
        train(make_model(False), checkpoint=tmp_path / CHECKPOINT_FILE)


@pytest.mark.parametrize(
    ("change", "found"),
    [
        (lambda ours: ours.update(format=99), "the format 99 of a later version of scvae-tools, where this one"),
        (lambda ours: ours.pop("rows"), "no 'rows' in the content"),
        (lambda ours: ours.update(stage="first"), "a str as 'stage' in the content"),
        (lambda ours: ours.update(identity="[1"), "content that cannot be read"),
        (lambda ours: ours.update(identity="{}"), "no 'epochs before this training' in the identity"),
        (lambda ours: ours["before"].popitem(), "content that cannot be read"),
        (lambda ours: ours.update(log_base_measure=torch.ones(3)), "content that cannot be read"),
        (lambda ours: ours.update(attributes="null"), "content that cannot be read"),
    ],
)
def test_a_checkpoint_that_was_tampered_with_is_refused_with_what_was_found(change, found, broken_off, tmp_path):
    saved = torch.load(broken_off / CHECKPOINT_FILE, weights_only=True)
    change(saved["scvae_tools"])
    torch.save(saved, tmp_path / CHECKPOINT_FILE)
    with pytest.raises(ValueError, match=rf"checkpoint\.pt' must be a checkpoint of `SCVAE\.train`; found {found}"):
        train(make_model(False), checkpoint=tmp_path)


def test_the_tool_goes_on_from_a_checkpoint(tmp_path, monkeypatch):
    options = {"n_components": 3, "n_hidden": 8, "n_latent": 3, "max_epochs": 6, "progress": False}
    expected, found = make_adata(), make_adata()
    svt.tl.scvae(expected, **options)
    step = TrainingPlan.training_step

    def training_step(self, *args):
        return die() if self.row["epoch"] == 4 else step(self, *args)

    with monkeypatch.context() as patch:
        patch.setattr(TrainingPlan, "training_step", training_step)
        with pytest.raises(KilledError):
            svt.tl.scvae(found, **options, checkpoint=str(tmp_path))
    assert "scvae" not in found.uns
    svt.tl.scvae(found, **options, checkpoint=str(tmp_path))
    np.testing.assert_array_equal(found.obsm["X_scvae"], expected.obsm["X_scvae"])
    assert found.obs["scvae"].equals(expected.obs["scvae"])
    pd.testing.assert_frame_equal(found.uns["scvae"]["history"], expected.uns["scvae"]["history"], check_exact=True)


# -- versions ----------------------------------------------------------------------------------------------------------


def stops_at(elbo, patience):
    """Positions of the best and of the epoch in which the patience first ran out; from the history alone."""
    for end in range(1, len(elbo) + 1):
        best = int(np.argmax(elbo[:end]))
        if end - 1 - best >= patience:
            return best, end - 1
    return None


def unstable(**options):
    """A training whose validation ELBO soon falls."""
    keep = KeepAll()
    model = make_model(False, n_hidden=64, dropout_rate=0.0)
    options = {"max_epochs": 25, "lr": 0.05, "patience": 2} | options
    return train(model, callbacks=[keep], **options), keep.weights


def weights_are(model, expected):
    return all(torch.equal(value, expected[name]) for name, value in model.module.state_dict().items())


@pytest.mark.parametrize("early_stopping", [True, False])
def test_versions_hold_the_weights_of_their_epochs(early_stopping):
    model, weights = unstable(early_stopping=early_stopping)
    rows = model.history[model.history["stage"] == "vae"].reset_index(drop=True)
    elbo = rows["elbo_validation"].to_numpy()
    best, stopped = stops_at(elbo, 2)
    epochs = {"end": len(rows) - 1, "best": int(elbo.argmax()), "early_stop": best}
    expected = pd.DataFrame(
        {"epoch": [rows["epoch"][i] for i in epochs.values()], "elbo_validation": elbo[[*epochs.values()]]},
        index=pd.Index(list(epochs), name="version", dtype=object),
    )
    pd.testing.assert_frame_equal(model.versions, expected, check_exact=True)
    assert (stopped == len(rows) - 1) == early_stopping
    assert model.version == "best"
    assert weights_are(model, weights[expected["epoch"]["best"]])
    for name in ("end", "early_stop", "best"):
        model.use_version(name)
        assert model.version == name
        assert weights_are(model, weights[expected["epoch"][name]])
    elbos = {name: (model.use_version(name), model.get_elbo(n_samples=20))[1] for name in ("best", "end")}
    assert elbos["best"] != elbos["end"]


@pytest.mark.parametrize("mixture", ["gmvae", "vade"])
def test_components_have_the_same_numbers_in_all_versions(mixture):
    keep = KeepAll()
    model = train(make_model(mixture, dropout_rate=0.0), callbacks=[keep], max_epochs=20, lr=0.05, patience=1)
    assert model.versions["epoch"].nunique() > 1
    recorded = {name: keep.weights[epoch] for name, epoch in model.versions["epoch"].items()}
    means = model.module.mixture.means.detach()
    distance = torch.cdist(means, recorded["best"]["mixture.means"])
    order = distance.argmin(1)
    assert torch.equal(means, recorded["best"]["mixture.means"][order])
    assert sorted(order.tolist()) == [0, 1, 2]
    for name in model.versions.index:
        model.use_version(name)
        for parameter, value in model.module.state_dict().items():
            if parameter == "log_temperature":  # each version has its own, which is set after the last epoch
                assert torch.isfinite(value)
                continue
            per_component = parameter.startswith(("mixture.", "y_logits", "y_embedding"))
            assert torch.equal(value, recorded[name][parameter][order if per_component else ...]), (name, parameter)


def test_without_held_out_cells_there_is_only_the_end():
    model = train(make_model(False), max_epochs=3, train_size=1.0)
    assert model.versions["epoch"].to_dict() == {"end": 3}
    assert np.isnan(model.versions["elbo_validation"]["end"])
    assert model.version == "end"
    with pytest.raises(ValueError, match=r"\('end'\); found 'best'. 'best' is not there: it needs held-out cells"):
        model.use_version("best")


def test_a_patience_that_did_not_run_out_leaves_no_early_stop():
    model = train(make_model(False), max_epochs=4)
    with pytest.raises(ValueError, match=r"\('end', 'best'\); found 'early_stop'.*`patience` epochs"):
        model.use_version("early_stop")
    with pytest.raises(ValueError, match=r"found 'last'\. The names are 'end', 'best', 'early_stop'"):
        model.use_version("last")


def test_before_a_training_there_are_no_versions():
    model = make_model(False)
    assert model.versions.empty
    assert model.version is None
    with pytest.raises(ValueError, match=r"\(none\); found 'end'. .* before a training has ended"):
        model.use_version("end")


@pytest.mark.parametrize(("epoch", "expected"), [(2, {"end": 1}), (5, {"end": 4}), (10, {"end": 9, "best": 0})])
def test_an_interrupted_training_has_the_versions_of_its_last_stage(epoch, expected):
    """Epochs of warm-up, VAE and mixture; without a trained mixture there is nothing to choose from."""
    model = make_model()
    with pytest.warns(UserWarning, match="interrupted"):
        train(model, epoch, press_ctrl_c)
    assert list(model.versions.index) == list(expected)
    assert model.versions["epoch"]["end"] == expected["end"]
    assert np.isnan(model.versions["elbo_validation"]["end"])
    before = model.get_lambda()
    model.use_version(model.version)
    np.testing.assert_array_equal(model.get_lambda(), before)


def test_training_further_goes_on_from_the_version_in_use_and_makes_its_own():
    model, weights = unstable()
    model.use_version("end")
    keep = KeepAll()
    train(model, max_epochs=2, lr=1e-12, callbacks=[keep])
    last = weights[max(weights)]
    assert all(torch.allclose(value, last[name], atol=1e-6) for name, value in keep.weights[max(keep.weights)].items())
    assert set(model.versions["epoch"]) <= {max(weights) + 1, max(weights) + 2}


# -- trainings that fail -----------------------------------------------------------------------------------------------


def split_of(model):
    return [None if at is None else at.tolist() for at in (model.train_indices, model.validation_indices)]


@pytest.mark.parametrize("error", [KilledError, ValueError, KeyboardInterrupt])
def test_a_first_training_that_fails_leaves_a_new_model(error):
    model = make_model()
    before = {name: value.clone() for name, value in model.module.state_dict().items()}

    def fail():
        raise error

    with pytest.raises(error):
        train(model, 1, fail)
    assert split_of(model) == [None, None]
    assert model.history is None
    assert not model.is_trained_
    assert weights_are(model, before)


def test_a_later_training_that_fails_leaves_versions_weights_and_split(tmp_path):
    model = train(make_model(), max_epochs=6)
    split, versions = split_of(model), model.versions
    before = {name: value.clone() for name, value in model.module.state_dict().items()}
    with pytest.raises(KilledError):
        train(model, 8, random_state=5)
    assert split_of(model) == split
    pd.testing.assert_frame_equal(model.versions, versions)
    assert (model.version, len(model.history)) == ("best", 6)
    assert weights_are(model, before)
    model.save(tmp_path / "model")
    assert weights_are(svt.SCVAE.load(tmp_path / "model", make_adata(), version="best"), before)


def test_a_training_that_fails_in_a_later_stage_is_left_after_the_stage_before():
    """Of 10 epochs 2 are of the warm-up, 5 of the VAE."""
    keep = KeepAll()
    model = make_model(dropout_rate=0.0)
    with pytest.raises(KilledError):
        train(model, 4, train_size=0.8, callbacks=[keep])
    assert list(model.history["epoch"]) == [1, 2]
    assert (model.version, len(model.train_indices), len(model.validation_indices)) == (None, 120, 30)
    assert weights_are(model, keep.weights[2])


@pytest.mark.parametrize("options", [{"validation_indices": range(N_CELLS)}, {"checkpoint": __file__ + "/nowhere"}])
def test_a_training_that_does_not_begin_leaves_the_split(options):
    model = train(make_model(False), max_epochs=2)
    split = split_of(model)
    with pytest.raises((ValueError, NotADirectoryError)):
        train(model, random_state=5, **options)
    assert split_of(model) == split


def test_what_goes_on_in_a_later_stage_and_fails_has_no_version_of_an_earlier_training(tmp_path):
    """Stages of the second training: 2 epochs of warm-up, then those of the VAE."""

    def second(epoch):
        model = train(make_model(False), max_epochs=3)
        with pytest.raises(KilledError):
            train(model, epoch, max_epochs=6, n_warm_up_epochs=2, checkpoint=tmp_path)
        return model

    assert list(second(7).history["stage"][3:]) == ["warm-up"] * 2
    model = second(7)
    assert len(model.history) == 5
    assert model.version is None
    assert model.versions.empty


# -- saved versions ----------------------------------------------------------------------------------------------------


def test_versions_are_saved_and_loaded(tmp_path):
    model, weights = unstable(early_stopping=False)
    model.save(tmp_path / "model")
    loaded = svt.SCVAE.load(tmp_path / "model", make_adata())
    pd.testing.assert_frame_equal(loaded.versions, model.versions, check_exact=True)
    assert loaded.version == "best"
    for name, epoch in model.versions["epoch"].items():
        assert weights_are(svt.SCVAE.load(tmp_path / "model", make_adata(), version=name), weights[epoch])
    model.use_version("end")
    model.save(tmp_path / "end")
    loaded = svt.SCVAE.load(tmp_path / "end", make_adata())
    assert loaded.version == "end"
    assert weights_are(loaded, weights[model.versions["epoch"]["end"]])
    loaded.use_version("best")
    assert weights_are(loaded, weights[model.versions["epoch"]["best"]])


def test_the_file_holds_each_of_the_weights_once(tmp_path):
    model, _ = unstable(early_stopping=True)  # where the best and the early stop are the same
    model.save(tmp_path / "all")
    model.save(tmp_path / "one", versions=False)
    both, one = ((tmp_path / name / "model.pt").stat().st_size for name in ("all", "one"))
    weights = sum(value.nbytes for value in model.module.state_dict().values())
    assert both - one == pytest.approx(weights, rel=0.25)
    loaded = svt.SCVAE.load(tmp_path / "one", make_adata())
    assert list(loaded.versions.index) == ["best"]
    np.testing.assert_array_equal(loaded.get_lambda(), model.get_lambda())
    with pytest.raises(ValueError, match=r"\('best'\); found 'end'.*saved with `versions=False`"):
        svt.SCVAE.load(tmp_path / "one", make_adata(), version="end")


def test_files_from_before_there_were_versions_load(tmp_path):
    model = train(make_model(), max_epochs=4)
    model.save(tmp_path / "model")
    path = tmp_path / "model" / "model.pt"
    saved = torch.load(path, weights_only=True)
    assert saved.pop("versions")["in_use"] == "best"
    torch.save(saved, path)
    loaded = svt.SCVAE.load(tmp_path / "model", make_adata())
    np.testing.assert_array_equal(loaded.get_lambda(), model.get_lambda())
    assert loaded.versions.empty
    assert loaded.version is None
    with pytest.raises(ValueError, match="must be given a version that the model has"):
        loaded.use_version("best")
    train(loaded, max_epochs=2)
    assert loaded.version == "best"


def test_minified_data_belong_to_the_version_they_were_made_with():
    model, _ = unstable()
    model.minify_adata()
    model.use_version("best")
    with pytest.raises(ValueError, match="Call `use_version` before `minify_adata`"):
        model.use_version("end")


def test_a_query_starts_from_the_version_in_use():
    adata = make_adata()
    adata.obs["batch"] = "a"
    svt.SCVAE.setup_anndata(adata, batch_key="batch")
    reference = train(svt.SCVAE(adata, mixture=False, n_hidden=8, n_latent=3), lr=0.05, max_epochs=4)
    reference.use_version("end")
    query = make_adata()
    query.obs["batch"] = "b"
    mapped = svt.SCVAE.load_query_data(query, reference)
    assert mapped.versions.empty
    assert torch.equal(mapped.module.z_mean.weight, reference.module.z_mean.weight)


# -- labels of held-out cells ------------------------------------------------------------------------------------------


def test_labels_of_held_out_cells_change_nothing():
    """They are for evaluation: neither weights of the components nor their start may see them."""
    held_out = np.arange(0, N_CELLS, 8)
    other = make_adata()
    labels = other.obs["label"].to_numpy().copy()
    labels[held_out] = np.roll(labels[held_out], 1)[::-1]
    assert (labels != other.obs["label"]).any()
    other.obs["label"] = labels
    models = [
        train(make_model(labels=True, adata=adata, weights="labels"), max_epochs=4, validation_indices=held_out)
        for adata in (make_adata(), other)
    ]
    first, second = (model.module.state_dict() for model in models)
    assert [name for name in first if not torch.equal(first[name], second[name])] == []


def test_the_weights_of_labels_are_their_shares_among_the_training_cells():
    adata = make_adata()
    adata.obs["label"] = ["type " + str(name) for name in adata.obs["component"]]
    svt.SCVAE.setup_anndata(adata, labels_key="label")
    model = svt.SCVAE(adata, weights="labels", n_hidden=8, n_latent=3)
    held_out = np.flatnonzero(adata.obs["label"] == "type 1")[:-5]
    train(model, max_epochs=3, validation_indices=held_out)
    counts = adata.obs["label"].drop(adata.obs_names[held_out]).value_counts().sort_index()
    assert counts["type 1"] == 5
    weights = model.module.mixture.log_weights().exp().detach().numpy()
    np.testing.assert_allclose(weights, counts / counts.sum(), atol=1e-6)


def with_a_rare_label():
    adata = make_adata()
    adata.obs["label"] = adata.obs["label"].astype(str)
    adata.obs.iloc[[7, 11], adata.obs.columns.get_loc("label")] = "rare"
    return adata


def test_a_random_draw_leaves_a_cell_of_each_label_to_train_on():
    moved = 0
    for seed in range(40):
        model = make_model(labels=True, adata=with_a_rare_label())
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            model._split(0.4, None)
            torch.manual_seed(seed)
            drawn = np.sort(torch.randperm(N_CELLS)[: round(0.4 * N_CELLS)].numpy())
        assert {7, 11} & set(model.train_indices)
        extra = set(model.train_indices) - set(drawn)
        assert extra == (set() if {7, 11} & set(drawn) else extra & {7, 11})
        moved += len(extra)
        np.testing.assert_array_equal(np.union1d(model.train_indices, model.validation_indices), np.arange(N_CELLS))
        assert len(model.train_indices) + len(model.validation_indices) == N_CELLS
    assert moved > 0


def test_held_out_cells_that_are_all_of_a_label_are_refused():
    model = make_model(labels=True, adata=with_a_rare_label())
    with pytest.raises(ValueError, match=r"found all cells labelled 'rare' held out.*those cells '\?' as their label"):
        train(model, validation_indices=[7, 11, 30])
    train(model, validation_indices=[7, 30], max_epochs=2)
    assert "rare" in model.components
