"""The model of a tool: found beside its results, or in a folder, and gone when the results are."""

from __future__ import annotations

import gc
import json
import pickle
import weakref

import anndata as ad
import numpy as np
import pandas as pd
import pytest

import scvae_tools as svt

FIT = {"n_components": 3, "n_latent": 3, "n_hidden": 8, "max_epochs": 4, "progress": False}


def make_adata(seed=0):
    adata = svt.datasets.simulate(90, 12, 3, random_state=seed)
    adata.obs["type"] = pd.Categorical(np.arange(90) % 3)
    return adata


def fit(adata, **options):
    return svt.tl.scvae(adata, **FIT | options)


@pytest.fixture(scope="module")
def fitted():
    adata = make_adata()
    return adata, fit(adata, return_model=True)


#: Every tool that takes a model, and may do without; what it computes, from a copy of the AnnData.
TOOLS = {
    "rank_components": lambda a, *m: svt.tl.rank_components(a, *m) or a.uns["rank_components"]["scores"],
    "dendrogram": lambda a, *m: svt.tl.dendrogram(a, *m) or a.uns["dendrogram_scvae"]["linkage"],
    "ppc": lambda a, *m: svt.tl.ppc(a, *m, n_samples=2) or a.uns["scvae_ppc"]["genes"],
    "evaluate": lambda a, *m: svt.tl.evaluate(a, *m, labels_key="type"),
    "summarize_reconstruction": lambda a, *m: svt.tl.summarize_reconstruction(a, *m),
}


def assert_same(found, expected):
    if isinstance(found, pd.DataFrame):
        pd.testing.assert_frame_equal(found, expected)
    else:
        np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("name", TOOLS)
def test_a_tool_finds_the_model_of_the_results(name, fitted):
    adata, model = fitted
    assert_same(TOOLS[name](adata.copy()), TOOLS[name](adata.copy(), model))


@pytest.mark.parametrize("name", TOOLS)
def test_a_tool_takes_a_folder_as_text_or_path(name, fitted, tmp_path):
    adata, model = fitted
    model.save(tmp_path / "model")
    from_text = TOOLS[name](adata.copy(), str(tmp_path / "model"))
    assert_same(from_text, TOOLS[name](adata.copy(), tmp_path / "model"))
    if name != "evaluate":  # where the cells of the training are known by their counts, which no file of a model has
        assert_same(from_text, TOOLS[name](adata.copy(), model))


def test_predict_takes_a_folder_and_its_results_have_the_model_too(fitted, tmp_path):
    _, model = fitted
    model.save(tmp_path / "model")
    new = make_adata(seed=1)
    svt.tl.predict(new, tmp_path / "model")
    np.testing.assert_array_equal(new.obs["scvae"], model.predict(new))
    svt.tl.dendrogram(new)
    assert list(svt.tl.evaluate(new)["subset"].unique()) == ["new"]


def test_evaluate_without_the_model_tells_the_cells_of_the_training_from_others(fitted):
    adata, model = fitted
    table = svt.tl.evaluate(adata.copy())
    assert dict(zip(table["subset"], table["n_cells"], strict=True)) == {
        "train": len(model.train_indices),
        "validation": len(model.validation_indices),
    }
    changed = adata.copy()
    changed.X[0, 0] += 1
    assert list(svt.tl.evaluate(changed)["subset"]) == ["new"]


@pytest.mark.parametrize("share", [lambda a: a.copy(), lambda a: a[:40], lambda a: a[:40].copy()], ids=range(3))
def test_copies_and_views_have_the_model_when_the_first_is_gone(share):
    adata = make_adata()
    fit(adata)
    other = share(adata)
    del adata
    gc.collect()
    svt.tl.ppc(other, n_samples=2)


# -- lifetime --------------------------------------------------------------------------------------------------------


def watch(adata, key="scvae"):
    """Weak reference to the networks that live with the results."""
    (holder,) = adata.uns[key]["history"].attrs.values()
    return weakref.ref(holder.model.module)


def test_model_and_cells_are_gone_with_the_anndata():
    adata = make_adata()
    fit(adata)
    module, cells = watch(adata), weakref.ref(adata)
    svt.tl.evaluate(adata)
    svt.tl.ppc(adata, n_samples=2)
    del adata
    gc.collect()
    assert cells() is None
    assert module() is None


def test_the_model_holds_no_counts():
    adata = make_adata()
    model = fit(adata, return_model=True)
    (holder,) = adata.uns["scvae"]["history"].attrs.values()
    private = weakref.ref(model.adata)
    assert holder.model.adata is None
    del model
    gc.collect()
    assert private() is None


def test_a_returned_model_does_not_keep_the_anndata_alive():
    adata = make_adata()
    model = fit(adata, return_model=True)
    cells = weakref.ref(adata)
    del adata
    gc.collect()
    assert cells() is None
    with pytest.raises(ValueError, match="`groupby` must name a column"):
        model.differential_expression(groupby="scvae")


def test_results_of_another_call_replace_the_model_and_other_keys_keep_theirs():
    adata = make_adata()
    fit(adata)
    fit(adata, key_added="other", n_components=2)
    first, other = watch(adata), watch(adata, "other")
    fit(adata)
    gc.collect()
    assert first() is None
    assert other() is not None
    svt.tl.dendrogram(adata, key="other")
    assert adata.uns["dendrogram_other"]["correlation_matrix"].shape == (2, 2)
    del adata.uns["other"]
    gc.collect()
    assert other() is None


def test_a_returned_copy_has_the_model_and_the_anndata_has_none():
    adata = make_adata()
    copied = fit(adata, copy=True)
    svt.tl.dendrogram(copied)
    with pytest.raises(ValueError, match=r"found no results\. Pass the `model`"):
        svt.tl.dendrogram(adata)


# -- files and other processes ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("ending", ["h5ad", "zarr"])
def test_no_file_holds_the_model_and_the_error_says_what_to_pass(ending, fitted, tmp_path):
    path = tmp_path / f"file.{ending}"
    (fitted[0].write_h5ad if ending == "h5ad" else fitted[0].write_zarr)(path)
    read = (ad.read_h5ad if ending == "h5ad" else ad.read_zarr)(path)
    for tool in TOOLS.values():
        with pytest.raises(
            ValueError, match=r"not in memory, as after reading a file\. Pass the `model`: .*return_model=True.*folder"
        ):
            tool(read)


def test_the_error_names_results_whose_model_is_in_memory(fitted):
    with pytest.raises(ValueError, match=r"adata\.uns\['other'\] .* found no results\. Pass key='scvae', whose model"):
        svt.tl.rank_components(fitted[0], key="other")


def test_what_is_no_model_is_refused(fitted, tmp_path):
    with pytest.raises(TypeError, match=r"must be an SCVAE, or the folder where one is saved; found a dict"):
        svt.tl.ppc(fitted[0], {})
    with pytest.raises(FileNotFoundError, match="nothing"):
        svt.tl.ppc(fitted[0], tmp_path / "nothing")


def test_the_history_can_be_pickled_and_written_as_json(fitted):
    history = fitted[0].uns["scvae"]["history"]
    assert json.loads(json.dumps(history.attrs)) == {"scvae_model": {}}
    copied = pickle.loads(pickle.dumps(history))
    pd.testing.assert_frame_equal(copied, history)
    assert copied.attrs["scvae_model"].model is None
