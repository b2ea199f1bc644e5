"""Saved files: values come back as they were, and reading them runs no code."""

from __future__ import annotations

import inspect
import json
import os
import pickle
import stat
import threading
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

import scvae_tools as svt
from scvae_tools._files import ABANDONED, digest, write_atomically
from scvae_tools.model._saved_file import read_saved, write_saved

VALUES = {
    "number": 1.5,
    "nothing": None,
    "flag": True,
    "infinite": float("inf"),
    "numpy number": np.float32(0.1),
    "tuple": (1, "a", None),
    "nested": {"list": [1, {"b": (2,)}]},
    "integers": np.arange(5),
    "matrix": np.arange(6.0).reshape(2, 3),
    "names": np.array(["a", "b"], dtype=object),
    "mixed": np.array(["a", 1, True], dtype=object),
    "table": pd.DataFrame({"epoch": [1, 2], "elbo": [-1.5, np.nan], "stage": ["vae", "mixture"]}),
}


@pytest.mark.parametrize("name", VALUES)
def test_values_come_back_as_they_were(name, tmp_path):
    path = tmp_path / "model.pt"
    write_saved(path, {"w": torch.ones(2)}, {"value": VALUES[name]}, ["g1", "g2"])
    state, attributes, var_names, versions = read_saved(path)
    assert versions is None
    found, expected = attributes["value"], VALUES[name]
    assert torch.equal(state["w"], torch.ones(2))
    assert var_names == ["g1", "g2"]
    if isinstance(expected, pd.DataFrame):
        pd.testing.assert_frame_equal(found, expected)
    elif isinstance(expected, np.ndarray):
        assert found.dtype == expected.dtype
        np.testing.assert_array_equal(found, expected)
    else:
        assert found == expected


def test_what_is_not_plain_is_refused_by_name(tmp_path):
    with pytest.raises(TypeError, match=r"attributes\['a'\]\['b'\] is a set"):
        write_saved(tmp_path / "model.pt", {}, {"a": {"b": {1}}}, [])


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "model.pt"
    write_saved(path, {"w": torch.ones(2)}, {}, [])

    def fail(*_args, **_kwargs):
        raise OSError("disk full")

    monkeypatch.setattr(torch, "save", fail)
    with pytest.raises(OSError, match="disk full"):
        write_saved(path, {"w": torch.zeros(2)}, {}, [])
    assert torch.equal(read_saved(path).state["w"], torch.ones(2))


def test_nothing_but_the_whole_file_is_left_of_a_write_that_died_midway(tmp_path, monkeypatch):
    path, save = tmp_path / "model.pt", torch.save
    write_atomically({"w": torch.ones(2)}, path)

    def die_midway(saved, temporary):
        save(saved, temporary)
        os.truncate(temporary, temporary.stat().st_size // 2)
        raise KeyboardInterrupt

    monkeypatch.setattr(torch, "save", die_midway)
    with pytest.raises(KeyboardInterrupt):
        write_atomically({"w": torch.zeros(2)}, path)
    assert torch.equal(torch.load(path, weights_only=True)["w"], torch.ones(2))
    assert [each.name for each in tmp_path.iterdir()] == ["model.pt"]


def test_a_file_is_on_the_disk_before_it_gets_its_name(tmp_path, monkeypatch):
    done, flush, replace = [], os.fsync, Path.replace
    monkeypatch.setattr(os, "fsync", lambda descriptor: (done.append("flushed"), flush(descriptor)))
    monkeypatch.setattr(Path, "replace", lambda old, new: (done.append(new.name), replace(old, new)))
    write_atomically({"w": torch.ones(2)}, tmp_path / "model.pt")
    assert done[:2] == ["flushed", "model.pt"]


def test_writers_of_the_same_file_do_not_meet(tmp_path, monkeypatch):
    path, save, together = tmp_path / "model.pt", torch.save, threading.Barrier(2, timeout=30)

    def save_together(saved, temporary):
        save(saved, temporary)
        together.wait()

    monkeypatch.setattr(torch, "save", save_together)
    failed = []

    def write(value):
        try:
            write_atomically({"w": torch.full((2,), value)}, path)
        except OSError as error:
            failed.append(error)

    writers = [threading.Thread(target=write, args=(value,)) for value in (1.0, 2.0)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    assert failed == []
    assert [each.name for each in tmp_path.iterdir()] == ["model.pt"]


def test_a_saved_file_can_be_read_by_whoever_may_read_new_files(tmp_path):
    (tmp_path / "new").touch()
    write_atomically({"w": torch.ones(2)}, tmp_path / "model.pt")
    modes = [stat.S_IMODE((tmp_path / name).stat().st_mode) for name in ("new", "model.pt")]
    assert modes[0] == modes[1]


def test_abandoned_files_are_removed_and_those_in_use_are_not(tmp_path):
    ages = {"model.pt.a.tmp": ABANDONED + 60, "model.pt.b.tmp": ABANDONED - 60, "other.pt.c.tmp": ABANDONED + 60}
    for name, age in ages.items():
        (tmp_path / name).touch()
        os.utime(tmp_path / name, (time.time() - age,) * 2)
    write_atomically({"w": torch.ones(2)}, tmp_path / "model.pt")
    assert {each.name for each in tmp_path.iterdir()} == {"model.pt", "model.pt.b.tmp", "other.pt.c.tmp"}


def test_a_digest_depends_on_every_byte():
    values = np.arange(12.0)
    digests = {digest(values.reshape(3, 4)[:, ::-1]), digest(values), digest(values + 1e-12), digest(values, b"a")}
    assert len(digests) == 4
    assert digest(values.reshape(3, 4)) == digest(values) == digest(values[:5], values[5:])
    assert digest(values[:0]) == digest()


# -- what a saved model knows of its cells -----------------------------------------------------------------------------


def named(prefix, n_cells=60):
    adata = svt.datasets.simulate(n_cells, 10, 2, random_state=0)
    adata.obs_names = [f"{prefix}{i}" for i in range(n_cells)]
    adata.obs["batch"] = prefix
    return adata


def make_model():
    adata = named("cell")
    svt.SCVAE.setup_anndata(adata, batch_key="batch")
    model = svt.SCVAE(adata, mixture=False, n_hidden=4, n_latent=2)
    model.train(2, progress=False)
    return model


@pytest.fixture(scope="module")
def model():
    return make_model()


def split_of(model):
    return [model.train_indices, model.validation_indices, model.test_indices]


def of_same_batch(adata):
    adata.obs["batch"] = "cell"
    return adata


def test_the_split_is_that_of_the_cells_it_was_drawn_from(model, tmp_path):
    model.save(tmp_path / "model")
    same = svt.SCVAE.load(tmp_path / "model", named("cell"))
    for found, expected in zip(split_of(same), split_of(model), strict=True):
        np.testing.assert_array_equal(found, expected)
    other = svt.SCVAE.load(tmp_path / "model", of_same_batch(named("new")))
    assert split_of(other) == [None, None, None]
    svt.tl.evaluate(other.adata, other)
    assert other.adata.uns["scvae_evaluation"]["table"]["subset"].tolist() == ["new"]
    other.save(tmp_path / "other")
    assert split_of(svt.SCVAE.load(tmp_path / "other", of_same_batch(named("new")))) == [None, None, None]


def test_the_split_outlives_a_model_without_data(model, tmp_path):
    model.save(tmp_path / "model")
    svt.SCVAE.load(tmp_path / "model").save(tmp_path / "again")
    again = svt.SCVAE.load(tmp_path / "again", named("cell"))
    np.testing.assert_array_equal(again.train_indices, model.train_indices)
    assert svt.SCVAE.load(tmp_path / "again", of_same_batch(named("new"))).train_indices is None


def test_files_without_the_names_of_the_cells_keep_the_split(model, tmp_path):
    model.save(tmp_path / "model")
    path = tmp_path / "model" / "model.pt"
    saved = torch.load(path, weights_only=True)
    attributes = json.loads(saved["attributes"])
    assert attributes.pop("cells_").startswith("#")
    torch.save(saved | {"attributes": json.dumps(attributes)}, path)
    loaded = svt.SCVAE.load(tmp_path / "model", of_same_batch(named("new")))
    np.testing.assert_array_equal(loaded.train_indices, model.train_indices)


def test_a_query_does_not_take_its_cells_for_those_of_the_reference(model):
    assert split_of(svt.SCVAE.load_query_data(named("new"), model)) == [None, None, None]


def test_data_of_an_earlier_model_are_not_left_beside_the_next(model, tmp_path):
    model.save(tmp_path, overwrite=True, save_anndata=True)
    model.save(tmp_path, prefix="b_", overwrite=True, save_anndata=True)
    assert svt.SCVAE.load(tmp_path).adata.n_obs == 60
    model.save(tmp_path, overwrite=True)
    assert {each.name for each in tmp_path.iterdir()} == {"model.pt", "b_model.pt", "b_adata.h5ad"}
    assert svt.SCVAE.load(tmp_path).adata is None


# -- folders of models: no method runs code that is in them ------------------------------------------------------------

#: Arguments that a path goes into, and how to call each public method that has one.
PATHS = {"dir_path", "reference_model", "directory", "path", "checkpoint", "output_dir_path", "filename"}
READS_A_FOLDER = {
    "load": lambda folder, adata: svt.SCVAE.load(folder, adata),
    "load_query_data": lambda folder, adata: svt.SCVAE.load_query_data(adata, folder),
    "load_registry": lambda folder, adata: svt.SCVAE.load_registry(folder),
    "prepare_query_anndata": lambda folder, adata: svt.SCVAE.prepare_query_anndata(adata, folder),
    "view_setup_args": lambda folder, adata: svt.SCVAE.view_setup_args(folder),
    "convert_legacy_save": lambda folder, adata: svt.SCVAE.convert_legacy_save(folder, f"{folder}-new"),
    "prepare_query_mudata": lambda folder, adata: svt.SCVAE.prepare_query_mudata(adata, folder),
    "train": lambda folder, adata: trained_on(adata, checkpoint=folder),
}


def trained_on(adata, **training):
    svt.SCVAE.setup_anndata(adata)
    model = svt.SCVAE(adata, n_components=2, n_latent=2, n_hidden=4)
    model.train(2, progress=False, **training)
    return model


class Attack:
    """Makes a file when it is unpickled."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return Path.touch, (self.marker,)


def test_every_public_method_that_takes_a_path_is_tested():
    def takes_a_path(function):
        return bool(PATHS & set(inspect.signature(function).parameters))

    methods = inspect.getmembers(svt.SCVAE, lambda value: inspect.isfunction(value) or inspect.ismethod(value))
    found = {name for name, function in methods if not name.startswith("_") and takes_a_path(function)}
    assert found - {"save"} <= set(READS_A_FOLDER)
    assert {"load", "load_registry", "prepare_query_anndata"} <= found


@pytest.mark.parametrize("name", READS_A_FOLDER)
@pytest.mark.parametrize("form", ["torch", "pickle"])
def test_no_code_in_the_folder_of_a_model_runs(name, form, tmp_path):
    marker, folder = tmp_path / "marker", tmp_path / "model"
    folder.mkdir()
    for file in ("model.pt", "checkpoint.pt", "model_params.pt", "attr.pkl"):
        if form == "torch":
            torch.save({"attributes": Attack(marker), "attr_dict": Attack(marker)}, folder / file)
        else:
            (folder / file).write_bytes(pickle.dumps(Attack(marker)))
    (folder / "var_names.csv").write_text("gene0\n")
    with pytest.raises((ValueError, NotImplementedError, pickle.UnpicklingError)):
        READS_A_FOLDER[name](str(folder), named("new"))
    assert not marker.exists()


def test_the_registry_of_a_saved_model_can_be_read(tmp_path, capsys):
    model = trained_on(named("cell"))
    model.save(tmp_path / "model")
    model.save(tmp_path / "other", prefix="a_")
    for registry in (
        svt.SCVAE.load_registry(tmp_path / "model"),
        svt.SCVAE.load_registry(str(tmp_path / "other"), prefix="a_"),
    ):
        assert registry["setup_args"] == model.registry["setup_args"]
        assert set(registry["field_registries"]) == set(model.registry["field_registries"])
    svt.SCVAE.view_setup_args(str(tmp_path / "model"))
    assert "'batch_key': None" in capsys.readouterr().out
    with pytest.raises(FileNotFoundError, match="No saved model at"):
        svt.SCVAE.load_registry(tmp_path)


@pytest.mark.parametrize("of_folder", [True, False])
def test_new_data_are_given_the_genes_of_a_saved_model(of_folder, tmp_path):
    adata = named("cell")
    model = trained_on(adata)
    model.save(tmp_path / "model")
    reference = str(tmp_path / "model") if of_folder else model
    new = named("new")[:, list(reversed(range(2, adata.n_vars)))].copy()
    counts = new.to_df()
    found = svt.SCVAE.prepare_query_anndata(new, reference, inplace=False)
    assert list(found.var_names) == list(adata.var_names)
    pd.testing.assert_frame_equal(found.to_df()[counts.columns], counts, check_dtype=False)
    assert (found.to_df()[list(adata.var_names[:2])] == 0).all(axis=None)
    assert list(svt.SCVAE.prepare_query_anndata(new, reference, return_reference_var_names=True)) == list(
        adata.var_names
    )
    svt.SCVAE.prepare_query_anndata(new, reference)
    assert list(new.var_names) == list(adata.var_names)
    assert svt.SCVAE.load_query_data(new, reference).adata.n_obs == new.n_obs


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: svt.SCVAE.convert_legacy_save("old", "new"), "'old' cannot be converted.*SCVAE.load reads"),
        (lambda: svt.SCVAE.prepare_query_mudata(None, "model"), "one modality. Pass the AnnData"),
    ],
)
def test_what_is_refused_says_what_to_do(call, message):
    with pytest.raises(NotImplementedError, match=message):
        call()
