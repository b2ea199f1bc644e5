"""Saved models: their split and data, and no code runs that is in their folder."""

from __future__ import annotations

import inspect
import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import anndata
import numpy as np
import pandas as pd
import pytest
import torch
from anndata import AnnData
from scipy import sparse

import scvae_tools as svt


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


# -- a save that is cut off --------------------------------------------------------------------------------------------


def cells_with(note):
    adata = named("cell")
    adata.obs["note"] = note
    return adata


KILLED = """
import os, signal, sys
from pathlib import Path
sys.path.insert(0, {tests!r})
from test_persistence import cells_with
import scvae_tools as svt
from scvae_tools import _files

model = svt.SCVAE.load({folder!r}, cells_with("new"))
rename, moved = _files._rename, []

def die(*positional, **named):
    if len(moved) == {n_renamed}:
        os.kill(os.getpid(), signal.SIGKILL)
    moved.append(rename(*positional, **named))

_files._rename = die
model.save({folder!r}, overwrite=True, save_anndata=True)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="needs SIGKILL")
def test_a_killed_save_leaves_the_former_model_with_the_former_data(tmp_path):
    former = trained_on(cells_with("former"))
    former.save(tmp_path, overwrite=True, save_anndata=True)
    kill_save(tmp_path, n_renamed=0)
    found = svt.SCVAE.load(tmp_path)
    assert set(found.adata.obs["note"]) == {"former"}
    found.save(tmp_path, overwrite=True, save_anndata=True)
    assert {"model.pt", "adata.h5ad"} <= {each.name for each in tmp_path.iterdir()}


@pytest.mark.skipif(sys.platform == "win32", reason="needs SIGKILL")
def test_a_save_that_is_killed_between_its_two_files_leaves_the_new_model_with_the_new_data(tmp_path):
    trained_on(cells_with("former")).save(tmp_path, overwrite=True, save_anndata=True)
    kill_save(tmp_path, n_renamed=1)
    assert set(svt.SCVAE.load(tmp_path).adata.obs["note"]) == {"new"}
    assert svt.SCVAE.load(tmp_path, cells_with("own")).adata.obs["note"].iloc[0] == "own"
    time.sleep(1.1)  # so long a temporary folder may still be without its lock
    kill_save(tmp_path, n_renamed=0)  # the one before is settled first
    assert len(list(tmp_path.glob("adata.h5ad.*"))) == 1  # and leaves nothing behind
    found = svt.SCVAE.load(tmp_path)
    assert set(found.adata.obs["note"]) == {"new"}
    assert set(anndata.read_h5ad(tmp_path / "adata.h5ad").obs["note"]) == {"new"}
    time.sleep(1.1)
    found.save(tmp_path, overwrite=True, save_anndata=True)
    assert {each.name for each in tmp_path.iterdir()} == {"model.pt", "adata.h5ad"}


def test_data_of_another_model_are_noticed(model, tmp_path):
    model.save(tmp_path / "a", save_anndata=True)
    model.save(tmp_path / "b", save_anndata=True)
    shutil.copy(tmp_path / "b" / "adata.h5ad", tmp_path / "a" / "adata.h5ad")
    with pytest.raises(
        ValueError, match=r"adata\.h5ad' must be the data that model\.pt was saved with; found those of an"
    ):
        svt.SCVAE.load(tmp_path / "a")


def kill_save(folder, **options):
    code = KILLED.format(tests=str(Path(__file__).parent), folder=str(folder), **options)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == -signal.SIGKILL, done.stderr


def test_data_that_an_earlier_model_left_are_not_those_of_a_model_without_data(model, tmp_path):
    model.save(tmp_path, overwrite=True, save_anndata=True)
    shutil.copy(tmp_path / "adata.h5ad", tmp_path / "former.h5ad")
    model.save(tmp_path, overwrite=True)
    shutil.move(tmp_path / "former.h5ad", tmp_path / "adata.h5ad")  # as if the process had ended before its removal
    assert svt.SCVAE.load(tmp_path).adata is None


def test_data_that_others_wrote_beside_a_model_are_taken(model, tmp_path):
    model.save(tmp_path, overwrite=True)
    cells_with("own").write_h5ad(tmp_path / "adata.h5ad")
    assert svt.SCVAE.load(tmp_path).adata.obs["note"].iloc[0] == "own"


def test_data_that_cannot_be_read_are_named_and_the_model_is_there_without_them(model, tmp_path):
    model.save(tmp_path, overwrite=True, save_anndata=True)
    os.truncate(tmp_path / "adata.h5ad", 1000)
    with pytest.raises(
        ValueError, match=r"adata\.h5ad' must be an AnnData; it cannot be read .* or pass `adata` to load"
    ):
        svt.SCVAE.load(tmp_path)
    assert svt.SCVAE.load(tmp_path, named("cell")).adata.n_obs == 60


def test_saving_leaves_the_data_as_they_were(tmp_path):
    adata = cells_with("some")
    trained_on(adata).save(tmp_path, overwrite=True, save_anndata=True)
    assert adata.obs["note"].dtype == cells_with("some").obs["note"].dtype


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
    assert found - {"save", "save_for_hub"} <= set(READS_A_FOLDER)
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


# -- files of earlier versions -----------------------------------------------------------------------------------------

EARLIER = Path(__file__).parents[1] / "references" / "model-0.1.0"
EXPECTED = json.loads((EARLIER / "expected.json").read_text())


def earlier_cells():
    counts = sparse.csr_matrix(np.array(EXPECTED["counts"], dtype=np.float32))
    n_cells, n_genes = counts.shape
    obs = pd.DataFrame(index=[f"cell{cell}" for cell in range(n_cells)])
    obs["batch"], obs["age"] = pd.Categorical(EXPECTED["batch"]), np.linspace(20, 80, n_cells)
    return AnnData(counts, obs=obs, var=pd.DataFrame(index=[f"gene{gene}" for gene in range(n_genes)]))


def assert_as_expected(model, expected):
    np.testing.assert_allclose(model.get_latent_representation(), expected["latent"], rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(
        model.predict(soft=True, calibrated=False), expected["probabilities"], rtol=1e-3, atol=1e-3
    )
    np.testing.assert_allclose(model.history["elbo_train"], expected["history"], atol=1e-2)
    assert (model.n_components, model.version) == (expected["n_components"], expected["version"])


@pytest.mark.parametrize("name", ["gmvae", "covariates"])
def test_a_model_that_version_0_1_0_saved_is_the_same_today(name):
    assert_as_expected(svt.SCVAE.load(EARLIER / name, earlier_cells()), EXPECTED[name])
    assert svt.SCVAE.load_registry(EARLIER / name)["setup_args"]["batch_key"] == "batch"


def test_probabilities_of_a_model_from_before_there_was_a_temperature_are_those_of_the_bound():
    model = svt.SCVAE.load(EARLIER / "gmvae", earlier_cells())
    assert model.temperature == 1
    pd.testing.assert_frame_equal(model.predict(soft=True), model.predict(soft=True, calibrated=False))


def test_a_training_that_version_0_1_0_began_goes_on_or_is_refused_by_a_later_one(tmp_path):
    shutil.copytree(EARLIER / "checkpoint", tmp_path / "checkpoint")
    adata = earlier_cells()
    svt.SCVAE.setup_anndata(adata, batch_key="batch")
    model = svt.SCVAE(adata, n_components=(2, 4), n_latent=2, n_hidden=4)
    options = {"checkpoint": tmp_path / "checkpoint", "progress": False}
    if svt.__version__ == "0.1.0":
        # What were the defaults.
        differing = r"kl_weight_start\) \(0.0 there, .*patience\) \(20 there"
        with pytest.raises(ValueError, match=differing):
            model.train(6, **options)
        model.train(6, patience=20, kl_weight_start=0, **options)
        assert_as_expected(model, EXPECTED["checkpoint"])
    else:
        with pytest.raises(ValueError, match="version of scvae-tools"):
            model.train(6, **options)
