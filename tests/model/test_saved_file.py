"""Saved files: values come back as they were, and reading them runs no code."""

from __future__ import annotations

import json
import pickle
import zipfile

import numpy as np
import pandas as pd
import pytest
import torch

import scvae_tools as svt
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


#: Attributes that every model has.
NEEDED = {
    "registry_": {"model_name": "SCVAE", "setup_args": {}, "field_registries": {}},
    "init_params_": {"kwargs": {}, "non_kwargs": {}},
}


@pytest.mark.parametrize("name", VALUES)
def test_values_come_back_as_they_were(name, tmp_path):
    path = tmp_path / "model.pt"
    write_saved(path, {"w": torch.ones(2)}, NEEDED | {"value_": VALUES[name]}, ["g1", "g2"])
    state, attributes, var_names, versions = read_saved(path)
    assert versions is None
    found, expected = attributes["value_"], VALUES[name]
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


# -- files that are damaged, or were tampered with ---------------------------------------------------------------------


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """File of a small model."""
    folder = tmp_path_factory.mktemp("model")
    adata = svt.datasets.simulate(60, 10, 2, random_state=0)
    svt.SCVAE.setup_anndata(adata)
    model = svt.SCVAE(adata, n_components=2, n_hidden=4, n_latent=2)
    model.train(2, progress=False)
    model.save(folder, overwrite=True)
    return folder / "model.pt"


def refused(path, found):
    rule = r"model\.pt' must be a model that `SCVAE\.save` wrote; found "
    return pytest.raises(ValueError, match=rf"^'.*{rule}{found}\. Take another copy of the file, or train and save")


def copied(saved, tmp_path, change):
    """Copy of a saved model whose content was changed."""
    content = torch.load(saved, weights_only=True)
    changed = change(content)
    torch.save(content if changed is None else changed, tmp_path / "model.pt")
    return tmp_path


def of_attributes(change):
    """Change of a part of the attributes, which are JSON text."""

    def changed(content):
        attributes = json.loads(content["attributes"])
        change(attributes)
        content["attributes"] = json.dumps(attributes)

    return changed


def of_a_weight(change):
    def changed(content):
        name = max(content["state"], key=lambda each: content["state"][each].numel())
        change(content["state"], name)

    return changed


UNREADABLE = "content that cannot be read"
TAMPERED = {
    "of a later version": (
        lambda content: content.update(format=99, scvae_tools_version="7.1"),
        r"the format 99 of version 7\.1 of scvae-tools, where this one, .*, reads formats up to 1 \(`pip install.*\)",
    ),
    "a format that is no number": (lambda content: content.update(format="1"), "a str as 'format' in the content"),
    "no format": (lambda content: content.pop("format") and None, "no 'format' in the content"),
    "a list": (lambda content: [content], "a list as the content"),
    "a tensor": (lambda content: torch.ones(3), "a Tensor as the content"),
    "no weights": (lambda content: content.pop("state") and None, "no 'state' in the content"),
    "weights that are none": (
        lambda content: content.update(state={"w": 1}),
        "something else than tensors in the weights",
    ),
    "no attributes": (lambda content: content.update(attributes=None), "a NoneType as 'attributes' in the content"),
    "attributes that are cut": (
        lambda content: content.update(attributes=content["attributes"][:-9]),
        "attributes that are no JSON of ours",
    ),
    "attributes that are deep": (
        lambda content: content.update(attributes="[" * 10**5),
        "attributes that are no JSON of ours",
    ),
    "attributes that are a list": (lambda content: content.update(attributes="[]"), "a list as the attributes"),
    "an array that is wide": (
        of_attributes(lambda its: its.update(x_={"__array__": ["a"], "dtype": "U2000000000"})),
        "attributes that are no JSON of ours",
    ),
    "an attribute that hides a method": (
        of_attributes(lambda its: its.update(save=1)),
        "an attribute of the name 'save'",
    ),
    "no registry": (of_attributes(lambda its: its.pop("registry_")), "no 'registry_' in the attributes"),
    "a registry that is none": (
        of_attributes(lambda its: its.update(registry_=[])),
        "a list as 'registry_' in the attr.*",
    ),
    "an empty registry": (of_attributes(lambda its: its.update(registry_={})), "no 'model_name' in the registry"),
    "a registry without fields": (of_attributes(lambda its: its["registry_"].update(field_registries={})), UNREADABLE),
    "no arguments": (of_attributes(lambda its: its.pop("init_params_")), "no 'init_params_' in the attributes"),
    "an unknown argument": (of_attributes(lambda its: its["init_params_"]["non_kwargs"].update(x=1)), UNREADABLE),
    "an argument that cannot be": (
        of_attributes(lambda its: its["init_params_"]["non_kwargs"].update(likelihood=3)),
        UNREADABLE,
    ),
    "a network that is huge": (
        of_attributes(lambda its: its["init_params_"]["non_kwargs"].update(n_hidden=10**9)),
        r"n_hidden=1000000000 with [\d,]+ weights in all",
    ),
    "genes that are none": (lambda content: content.update(var_names="gene"), "a str as 'var_names' in the content"),
    "versions that are none": (lambda content: content.update(versions=[1]), "a list as the versions"),
    "versions without weights": (
        lambda content: content["versions"]["versions"].update(end={"epoch": 1, "elbo": 0.0}),
        "no 'state' in the version 'end'",
    ),
    "weights of other shapes": (of_a_weight(lambda its, name: its.update({name: torch.ones(3, 3)})), UNREADABLE),
    "weights of other names": (of_a_weight(lambda its, name: its.update(x=its.pop(name))), UNREADABLE),
    "weights that grow": (
        of_a_weight(lambda its, name: its.update({name: torch.ones(1).expand(10**6, 10**3)})),
        "a tensor of 4 GB that is not stored as such",
    ),
    "sparse weights": (
        of_a_weight(lambda its, name: its.update({name: torch.eye(3).to_sparse()})),
        "a tensor of .* that is not stored as such",
    ),
}


@pytest.mark.parametrize("name", TAMPERED)
def test_a_model_that_was_tampered_with_is_refused_with_what_was_found(name, saved, tmp_path):
    change, found = TAMPERED[name]
    with refused(tmp_path, found):
        svt.SCVAE.load(copied(saved, tmp_path, change))


@pytest.mark.parametrize(
    ("content", "found"),
    [
        (b"", "0 bytes of something else, or a part of such a file"),
        (b"<html>", "6 bytes of something else, or a part of such a file"),
        (pickle.dumps({"format": 1}), r"\d+ bytes of something else, or a part of such a file"),
    ],
)
def test_another_file_is_refused(content, found, tmp_path):
    (tmp_path / "model.pt").write_bytes(content)
    with refused(tmp_path, found):
        svt.SCVAE.load(tmp_path)


@pytest.mark.parametrize("share", [0.01, 0.3, 0.7, 0.99])
def test_every_cut_of_a_model_is_refused(share, saved, tmp_path):
    whole = saved.read_bytes()
    (tmp_path / "model.pt").write_bytes(whole[: int(share * len(whole))])
    with refused(tmp_path, r"[\d.]+ (kB|bytes) of something else, or a part of such a file"):
        svt.SCVAE.load(tmp_path)


def test_a_folder_in_place_of_the_file_is_refused(tmp_path):
    (tmp_path / "model.pt").mkdir()
    with refused(tmp_path, ".*"):
        svt.SCVAE.load(tmp_path)


def test_a_model_that_unpacks_to_more_than_its_size_is_refused_before_it_is_read(saved, tmp_path, monkeypatch):
    with zipfile.ZipFile(saved) as source, zipfile.ZipFile(tmp_path / "model.pt", "w", zipfile.ZIP_DEFLATED) as target:
        for entry in source.namelist():
            target.writestr(entry, source.read(entry))
        target.writestr("archive/data/99", bytes(10**8))
    monkeypatch.setattr(torch, "load", None)
    with refused(tmp_path, r"[\d.]+ kB that unpack to 100 MB"):
        svt.SCVAE.load(tmp_path)


def test_a_registry_of_other_data_is_refused_with_data_too(saved, tmp_path):
    change = of_attributes(lambda its: its["registry_"].update(field_registries={"X": 1}))
    with refused(tmp_path, "a registry of other data sets or of none"):
        svt.SCVAE.load(copied(saved, tmp_path, change), svt.datasets.simulate(60, 10, 2, random_state=0))


# -- what a saved model knows of its cells -----------------------------------------------------------------------------


# -- folders of models: no method runs code that is in them ------------------------------------------------------------
