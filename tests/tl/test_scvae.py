"""tl.scvae: which keys it writes, from which input, and that it leaves everything else as it was."""

from __future__ import annotations

import dataclasses
import functools
import gc
import hashlib
import inspect
import logging
import pickle
import random
import re
import signal
import subprocess
import sys
import warnings
import weakref
from types import SimpleNamespace
from typing import TYPE_CHECKING

import anndata
import h5py
import numpy as np
import pandas as pd
import pytest
import torch
from anndata import AnnData
from scipy import sparse, stats

import scvae_tools as svt
from scvae_tools._data.counts import CountsError
from scvae_tools._messages import InterruptedTraining
from scvae_tools._train.plan import NonFiniteError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

N_CELLS, N_GENES = 60, 20
SMALL = {"n_components": 2, "n_hidden": 8, "n_latent": 3, "max_epochs": 4, "progress": False}
MIXTURES = [False, True, "gmvae", "vade"]
ONE_OF_EACH = [False, True, "vade"]  # True is "gmvae"
CLUSTERING = [True, "gmvae", "vade"]
SLOTS = ("obs", "var", "obsm", "varm", "obsp", "varp", "layers", "uns")
TERMS = ["log_likelihood", "kl_z", "kl_y", "elbo"]

each_mixture = pytest.mark.parametrize("mixture", MIXTURES)
each_model = pytest.mark.parametrize("mixture", ONE_OF_EACH)
each_clustering = pytest.mark.parametrize("mixture", CLUSTERING)


# ---------------------------------------------------------------------------------------------------------------------
# Factories
# ---------------------------------------------------------------------------------------------------------------------


@functools.cache
def _simulated(n_cells: int) -> AnnData:
    adata = svt.datasets.simulate(n_cells, N_GENES, 2, n_batches=2, median_counts=200, separation=2, random_state=1)
    rng = np.random.default_rng(0)
    adata.obs["sex"] = pd.Categorical(rng.choice(["f", "m"], n_cells))
    adata.obs["age"] = rng.normal(size=n_cells)
    adata.obs["total"] = np.asarray(adata.X.sum(axis=1)).ravel()
    adata.var["kept"] = np.arange(N_GENES) % 4 != 1
    adata.obsm["X_pca"] = rng.normal(size=(n_cells, 2))
    adata.obsp["distances"] = sparse.eye(n_cells, format="csr")
    adata.varp["correlation"] = np.eye(N_GENES)
    return adata


def said(caught):
    """What a user hears: Python shows no deprecations from inside other packages."""
    return [warning for warning in caught if not issubclass(warning.category, DeprecationWarning)]


def make_adata(x: object = None, *, n_cells: int = N_CELLS, **layers: object) -> AnnData:
    """Simulated counts, something in every slot; ``x`` and ``layers`` replace or add matrices."""
    adata = _simulated(n_cells).copy()
    if x is not None:
        adata.X = x
    for name, matrix in layers.items():
        adata.layers[name] = matrix
    return adata


def make_counts() -> np.ndarray:
    """The simulated counts, (60, 20) float64."""
    return _simulated(N_CELLS).X.toarray().astype(np.float64)


def with_value(value: float) -> AnnData:
    """A value that is no count in cell3 and gene5, of X."""
    counts = make_counts()
    counts[3, 5] = value
    return make_adata(sparse.csr_matrix(counts))


def fit(adata: object, **options: object) -> object:
    return svt.tl.scvae(adata, **(SMALL | options))


def fitted(adata: AnnData | None = None, **options: object) -> AnnData:
    """The AnnData with the results of a small model."""
    adata = make_adata() if adata is None else adata
    fit(adata, **options)
    return adata


@functools.cache
def trained(mixture: bool | str) -> SimpleNamespace:
    """A run that several tests look at: the AnnData before, the one with results and the model."""
    adata = make_adata()
    # λ is asked for: a test that comes first may say that no memory is free.
    options = {"mixture": mixture, "write_lambda": True, "return_model": True}
    return SimpleNamespace(before=adata.copy(), adata=adata, model=fit(adata, **options))


def keys_of(adata: AnnData) -> dict[str, set[str]]:
    # From anndata 0.13 on the key None is X.
    return {slot: {key for key in getattr(adata, slot) if key is not None} for slot in SLOTS}


def documented_keys(mixture: bool | str, name: str = "scvae", *, linear_decoder: bool = False) -> dict[str, set[str]]:
    keys = {slot: set() for slot in SLOTS}
    keys |= {"obsm": {f"X_{name}"}, "layers": {f"{name}_lambda"}, "uns": {name}}
    if mixture:
        keys["obs"] |= {name}
        keys["obsm"] |= {f"{name}_probs"}
    if linear_decoder:
        keys["varm"] |= {f"{name}_loadings"}
    return keys


def added_keys(before: AnnData, after: AnnData) -> dict[str, set[str]]:
    old, new = keys_of(before), keys_of(after)
    assert all(old[slot] <= new[slot] for slot in SLOTS)
    return {slot: new[slot] - old[slot] for slot in SLOTS}


def matrix_bytes(matrix: object) -> tuple:
    if sparse.issparse(matrix):
        parts = (matrix.data, matrix.indices, matrix.indptr)
        return type(matrix).__name__, *((p.dtype.str, hashlib.sha256(p.tobytes()).hexdigest()) for p in parts)
    return str(matrix.dtype), hashlib.sha256(np.ascontiguousarray(matrix).tobytes()).hexdigest()


def fingerprint(adata: AnnData) -> dict[str, object]:
    """Everything in an AnnData, comparable with ``==``; NaN equals itself."""
    found: dict[str, object] = {"X": None if adata.X is None else matrix_bytes(adata.X), "is_view": adata.is_view}
    for slot in ("obsm", "varm", "obsp", "varp", "layers"):
        found[slot] = {k: matrix_bytes(v) for k, v in getattr(adata, slot).items() if k is not None}
    for slot in ("obs", "var"):
        frame = getattr(adata, slot)
        found[slot] = (frame.dtypes.to_dict(), pd.util.hash_pandas_object(frame).tolist())
    return found | {"uns": repr(adata.uns)}


def results_of(adata: AnnData, name: str = "scvae") -> dict[str, np.ndarray]:
    """All arrays that a run wrote."""
    history = adata.uns[name]["history"]
    found = {"latent": adata.obsm[f"X_{name}"], "lambda": adata.layers[f"{name}_lambda"]}
    found |= {f"history {column}": history[column].to_numpy() for column in history}
    if name in adata.obs:
        found |= {"component": adata.obs[name].to_numpy(), "probs": adata.obsm[f"{name}_probs"]}
    return found


def differing(first: dict[str, np.ndarray], second: dict[str, np.ndarray]) -> list[str]:
    """Names of the arrays that are not the same to the last bit."""
    assert set(first) == set(second)
    return [name for name in first if not np.array_equal(first[name], second[name])]


@pytest.fixture
def forbid_training(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: object, **kwargs: object) -> None:
        pytest.fail("the training began")

    monkeypatch.setattr("scvae_tools.model._training.run_stage", fail)


# ---------------------------------------------------------------------------------------------------------------------
# Keys
# ---------------------------------------------------------------------------------------------------------------------


@each_mixture
def test_exactly_the_documented_keys_are_added(mixture):
    run = trained(mixture)
    assert added_keys(run.before, run.adata) == documented_keys(mixture)


@each_mixture
def test_key_added_names_all_results(mixture):
    adata = make_adata()
    before = adata.copy()
    fit(adata, mixture=mixture, key_added="foo", max_epochs=2)
    assert added_keys(before, adata) == documented_keys(mixture, "foo")


def test_results_under_two_names_stand_side_by_side_and_equal_names_are_replaced():
    adata = fitted(mixture=False, key_added="one")
    one = results_of(adata, "one")
    fit(adata, mixture=False, key_added="two", random_state=1)
    assert differing(one, results_of(adata, "one")) == []
    fit(adata, mixture=False, key_added="one", random_state=1)
    assert differing(results_of(adata, "one"), results_of(adata, "two")) == []


def test_of_an_earlier_model_under_the_same_name_nothing_is_left_beside_the_new(monkeypatch):
    adata = make_adata()
    model = fit(adata, linear_decoder=True, return_model=True)
    svt.tl.ppc(adata, model)
    expected = documented_keys(True, linear_decoder=True)
    assert added_keys(make_adata(), adata) == expected | {"uns": {"scvae", "scvae_ppc"}}
    monkeypatch.setattr("scvae_tools.tl._lambda_layer._free_memory", lambda: 0)
    with pytest.warns(UserWarning, match="is left out"):
        fit(adata, mixture=False)
    assert added_keys(make_adata(), adata) == documented_keys(False) | {"layers": set()}


def test_what_has_the_name_of_a_result_by_chance_is_kept():
    adata = make_adata()
    adata.obs["vae"], adata.uns["vae_ppc"] = "mine", "mine"
    for _ in range(2):
        fit(adata, mixture=False, key_added="vae")
    assert set(adata.obs["vae"]) == {adata.uns["vae_ppc"]} == {"mine"}


@each_mixture
def test_everything_that_was_there_before_is_unchanged_byte_for_byte(mixture):
    run = trained(mixture)
    bare = run.adata.copy()
    for slot, keys in documented_keys(mixture).items():
        for key in keys:
            del getattr(bare, slot)[key]
    assert fingerprint(bare) == fingerprint(run.before)


@each_mixture
def test_no_trace_of_scvi_tools_is_left(mixture):
    assert not [key for keys in keys_of(trained(mixture).adata).values() for key in keys if "_scvi" in key]


@each_mixture
def test_latent_and_lambda_are_finite_float32_of_the_documented_shape(mixture):
    adata = trained(mixture).adata
    latent, rate = adata.obsm["X_scvae"], adata.layers["scvae_lambda"]
    assert (latent.shape, latent.dtype) == ((N_CELLS, 3), np.float32)
    assert (rate.shape, rate.dtype) == ((N_CELLS, N_GENES), np.float32)
    assert np.isfinite(latent).all()
    assert np.isfinite(rate).all()
    assert (rate > 0).all()


@each_clustering
@pytest.mark.parametrize("n_components", [1, 2, 4])
def test_components_are_numbered_by_decreasing_size_without_gaps(mixture, n_components):
    component = fitted(mixture=mixture, n_components=n_components, max_epochs=3, write_lambda=False).obs["scvae"]
    categories = list(component.cat.categories)
    sizes = component.value_counts(sort=False)[categories].to_numpy()
    assert categories == [str(number) for number in range(len(categories))]
    assert (np.diff(sizes) <= 0).all()
    assert (sizes > 0).all()
    assert not component.isna().any()


@each_clustering
def test_probabilities_are_in_the_order_of_the_categories_and_sum_to_one(mixture):
    adata = fitted(mixture=mixture, n_components=3)
    probabilities, component = adata.obsm["scvae_probs"], adata.obs["scvae"]
    assert (probabilities.shape, probabilities.dtype) == ((N_CELLS, 3), np.float32)
    np.testing.assert_allclose(probabilities.sum(axis=1), 1, rtol=1e-5)  # float32
    np.testing.assert_array_equal(probabilities.argmax(axis=1), component.cat.codes)
    assert (probabilities >= 0).all()


@pytest.mark.parametrize("mixture", [False, True])
def test_without_a_number_of_components_it_is_counted(mixture):
    adata = fitted(mixture=mixture, n_components=None, max_epochs=2)
    assert added_keys(make_adata(), adata) == documented_keys(mixture)
    if mixture:
        assert adata.uns["scvae"]["params"]["n_components"] == adata.obsm["scvae_probs"].shape[1] >= 1


@each_mixture
def test_uns_holds_what_is_documented(mixture):
    uns = trained(mixture).adata.uns["scvae"]
    of_mixture = {"components"} if mixture else set()
    assert set(uns) == {"params", "history", "elbo", "kl_by_dimension", "version"} | of_mixture
    assert uns["version"] == svt.__version__
    assert set(uns["elbo"]) == {"train", "validation"}


def test_params_are_those_of_the_call_without_none():
    options = {"likelihood": "zinb", "mixture": "vade", "n_components": 3, "n_layers": 2, "dropout_rate": 0.1}
    options |= {"layer": "counts", "mask_var": "kept", "batch_key": "batch", "categorical_covariate_keys": ["sex"]}
    options |= {"batch_size": 32, "train_size": 0.8, "early_stopping": False, "lr": 1e-4, "random_state": 7}
    adata = fitted(make_adata(counts=_simulated(N_CELLS).X), **options)
    params = adata.uns["scvae"]["params"]
    assert {name: params[name] for name in options} == options
    assert {"n_latent": 3, "n_hidden": 8}.items() <= params.items()
    assert not {"labels_key", "size_factor_key", "continuous_covariate_keys"} & set(params)


@each_mixture
def test_no_param_is_none(mixture):
    assert all(value is not None for value in trained(mixture).adata.uns["scvae"]["params"].values())


@each_mixture
def test_history_has_a_row_per_epoch(mixture):
    history = trained(mixture).adata.uns["scvae"]["history"]
    measured = [f"{term}_{subset}" for subset in ("train", "validation") for term in TERMS]
    assert set(history.columns) == {"epoch", "stage", "kl_weight", *measured}
    assert history["epoch"].tolist() == [1, 2, 3, 4]
    assert history["stage"].tolist() == ["warm-up", "vae", "vae", "mixture" if mixture else "vae"]
    first, *others = history["kl_weight"]
    assert first > 1
    assert others == [1, 1, 1]
    assert np.isfinite(history[measured]).all(axis=None)


@each_mixture
def test_bounds_in_history_are_the_sums_of_their_terms(mixture):
    history = trained(mixture).adata.uns["scvae"]["history"]
    for subset in ("train", "validation"):
        terms = (history[f"{term}_{subset}"] for term in TERMS)
        log_likelihood, kl_z, kl_y, elbo = terms
        np.testing.assert_allclose(elbo, log_likelihood - kl_z - kl_y, rtol=1e-9)


@each_mixture
@pytest.mark.parametrize("subset", ["train", "validation"])
def test_stored_elbo_is_log_likelihood_minus_both_divergences(mixture, subset):
    elbo = trained(mixture).adata.uns["scvae"]["elbo"][subset]
    assert set(elbo) == set(TERMS)
    assert elbo["elbo"] == pytest.approx(elbo["log_likelihood"] - elbo["kl_z"] - elbo["kl_y"], rel=1e-6)  # float32
    assert elbo["elbo"] < 0


def test_a_plain_vae_has_no_divergence_of_y():
    assert trained(False).adata.uns["scvae"]["elbo"]["train"]["kl_y"] == 0


@each_mixture
def test_results_survive_a_round_trip_through_h5ad(mixture, tmp_path: Path):
    adata = trained(mixture).adata
    adata.write_h5ad(tmp_path / "a.h5ad")
    read = anndata.read_h5ad(tmp_path / "a.h5ad")
    assert keys_of(read) == keys_of(adata)
    assert differing(results_of(adata), results_of(read)) == []
    uns, uns_read = adata.uns["scvae"], read.uns["scvae"]
    pd.testing.assert_frame_equal(uns["history"], uns_read["history"])
    assert (uns["params"], uns["elbo"], uns["version"]) == (uns_read["params"], uns_read["elbo"], uns_read["version"])
    if mixture:
        pd.testing.assert_series_equal(adata.obs["scvae"], read.obs["scvae"])


def test_params_of_all_kinds_can_be_written(tmp_path: Path):
    keys = {"categorical_covariate_keys": ["sex", "component"], "continuous_covariate_keys": ["age"]}
    adata = fitted(mixture=False, max_epochs=2, validation_indices=[1, 2, 3], **keys)
    adata.write_h5ad(tmp_path / "a.h5ad")
    params, read = adata.uns["scvae"]["params"], anndata.read_h5ad(tmp_path / "a.h5ad").uns["scvae"]["params"]
    assert set(params) == set(read)
    assert all(np.array_equal(params[name], read[name]) for name in params)


@each_mixture
def test_lambda_is_that_of_the_model(mixture):
    run = trained(mixture)
    np.testing.assert_array_equal(run.adata.layers["scvae_lambda"], run.model.get_lambda())


@each_mixture
def test_latent_is_that_of_the_model(mixture):
    run = trained(mixture)
    np.testing.assert_array_equal(run.adata.obsm["X_scvae"], run.model.get_latent_representation())


@each_clustering
def test_components_and_probabilities_are_those_that_the_model_predicts(mixture):
    run = trained(mixture)
    np.testing.assert_array_equal(run.adata.obs["scvae"].to_numpy(), run.model.predict())
    np.testing.assert_array_equal(run.adata.obsm["scvae_probs"], run.model.predict(soft=True).to_numpy())


# ---------------------------------------------------------------------------------------------------------------------
# What is returned, and what is kept
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("copy", [False, True])
@pytest.mark.parametrize("return_model", [False, True])
def test_what_is_returned_is_what_was_asked_for(copy, return_model):
    adata = make_adata()
    returned = fit(adata, mixture=False, copy=copy, return_model=return_model, max_epochs=2)
    kinds = [AnnData] * copy + [svt.SCVAE] * return_model
    parts = () if returned is None else returned if isinstance(returned, tuple) else (returned,)
    assert [type(part) for part in parts] == kinds
    assert isinstance(returned, tuple) == (len(kinds) == 2)


@each_model
def test_a_copy_holds_the_results_and_the_original_is_left_alone(mixture):
    adata = make_adata()
    before = fingerprint(adata)
    copied = fit(adata, mixture=mixture, copy=True)
    assert fingerprint(adata) == before
    assert differing(results_of(copied), results_of(trained(mixture).adata)) == []
    assert not np.shares_memory(copied.X.data, adata.X.data)


def test_the_model_is_trained_and_keeps_its_data():
    run = trained(True)
    assert run.model.is_trained
    assert run.model.adata is not run.adata
    assert len(run.model.train_indices) + len(run.model.validation_indices) == N_CELLS


def managers() -> set[str]:
    """Ids of what scvi-tools keeps in the class; models that are garbage may be among them."""
    return {*svt.SCVAE._setup_adata_manager_store, *svt.SCVAE._per_instance_manager_store}


def managers_left() -> set[str]:
    gc.collect()
    return managers()


@pytest.mark.parametrize(("mixture", "return_model"), [(False, True), (True, True), ("vade", True), ("vade", False)])
def test_nothing_keeps_the_anndata_alive(mixture, return_model):
    adata = make_adata()
    alive = weakref.ref(adata)
    model = fit(adata, mixture=mixture, return_model=return_model, max_epochs=2)
    del adata
    gc.collect()
    assert alive() is None
    assert (model is None) != return_model


@each_model
def test_a_model_and_its_data_go_when_the_last_name_goes(mixture):
    model = fit(make_adata(), mixture=mixture, return_model=True, max_epochs=2)
    alive = [weakref.ref(model), weakref.ref(model.adata), weakref.ref(model.module)]
    del model
    gc.collect()
    assert [reference() for reference in alive] == [None] * 3


@pytest.mark.parametrize("return_model", [False, True])
def test_the_managers_of_scvi_tools_do_not_pile_up(return_model):
    before = managers()
    model = fit(make_adata(), return_model=return_model, max_epochs=2)
    del model
    assert managers_left() <= before


@pytest.mark.parametrize("bad", [{"n_latent": 0}, {"likelihood": "normal"}, {"lr": -1.0}])
def test_the_managers_do_not_pile_up_after_an_error(bad):
    before = managers()
    with pytest.raises(ValueError, match="found"):
        fit(make_adata(), **bad)
    assert managers_left() <= before


# ---------------------------------------------------------------------------------------------------------------------
# Layers, genes and columns of obs
# ---------------------------------------------------------------------------------------------------------------------


def test_counts_in_a_layer_give_the_results_of_counts_in_x():
    adata = make_adata(sparse.csr_matrix(np.log1p(make_counts())), counts=_simulated(N_CELLS).X.copy())
    before = fingerprint(adata)
    fit(adata, layer="counts")
    assert differing(results_of(adata), results_of(trained(True).adata)) == []
    assert matrix_bytes(adata.X) == before["X"]
    assert matrix_bytes(adata.layers["counts"]) == before["layers"]["counts"]


def test_counts_in_a_layer_need_no_x():
    adata = make_adata(counts=_simulated(N_CELLS).X.copy())
    adata.X = None
    assert differing(results_of(fitted(adata, layer="counts")), results_of(trained(True).adata)) == []


@pytest.mark.parametrize(("mixture", "form"), [(False, "column"), (True, "array"), ("vade", "list")])
def test_masked_genes_give_the_results_of_the_subset(mixture, form):
    adata = make_adata()
    kept = adata.var["kept"].to_numpy()
    subset = fitted(adata[:, kept].copy(), mixture=mixture)
    mask = {"column": "kept", "array": kept, "list": kept.tolist()}[form]
    fit(adata, mixture=mixture, mask_var=mask, write_lambda=True)
    rate = adata.layers["scvae_lambda"]
    assert np.isnan(rate[:, ~kept]).all()
    full = results_of(adata) | {"lambda": rate[:, kept]}
    assert differing(full, results_of(subset)) == []
    assert rate.dtype == np.float32


def test_the_name_of_a_mask_is_a_param_and_an_array_is_not():
    adata = make_adata()
    fit(adata, mixture=False, max_epochs=1, mask_var="kept", key_added="named")
    fit(adata, mixture=False, max_epochs=1, mask_var=adata.var["kept"].to_numpy(), key_added="array")
    assert adata.uns["named"]["params"]["mask_var"] == "kept"
    assert "mask_var" not in adata.uns["array"]["params"]


def test_labels_that_the_y_term_leaves_out_do_not_change_the_results():
    given = fitted(labels_key="component", y_term="kl")
    assert differing(results_of(given), results_of(trained(True).adata)) == []


def test_components_bear_the_names_of_labels():
    adata = make_adata()
    names = "type " + adata.obs["component"].astype(str)
    adata.obs["label"] = np.where(np.arange(adata.n_obs) % 2 == 0, names, "?")
    results = fitted(adata, labels_key="label", unlabeled_category="?", n_components=None)
    assert set(results.obs["scvae"].cat.categories) <= set(names)
    assert results.uns["scvae"]["params"]["unlabeled_category"] == "?"
    assert "curve" not in results.uns["scvae"]["components"]


@each_mixture
def test_the_components_are_summed_up(mixture):
    adata = trained(mixture).adata
    summary = adata.uns["scvae"].get("components")
    if not mixture:
        assert summary is None
        return
    share = adata.obsm["scvae_probs"].mean(0, dtype=float)
    assert summary["n_components"] == len(share)
    assert summary["n_used"] == adata.obs["scvae"].nunique()
    assert summary["n_effective"] == pytest.approx(np.exp(stats.entropy(share)))
    assert summary["weights"].sum() == pytest.approx(1)
    assert summary["means"].shape == (len(share), adata.obsm["X_scvae"].shape[1])
    assert summary["covariances"].shape == (*summary["means"].shape, summary["means"].shape[1])
    chosen = summary["curve"].query("chosen") if "curve" in summary else None
    assert chosen is None or chosen["n_components"].tolist() == [len(share)]


def test_total_counts_as_size_factors_are_the_default():
    given, default = results_of(fitted(size_factor_key="total")), results_of(trained(True).adata)
    np.testing.assert_allclose(given["latent"], default["latent"], rtol=1e-4, atol=1e-5)  # sums in another order
    np.testing.assert_allclose(given["lambda"], default["lambda"], rtol=1e-4)


COLUMNS = {
    "batch_key": "batch",
    "labels_key": "component",
    "size_factor_key": "size_factor",
    "categorical_covariate_keys": ["sex"],
    "continuous_covariate_keys": ["age"],
}


@pytest.mark.parametrize(
    ("mixture", "names"),
    [(False, [name]) for name in COLUMNS] + [(mixture, list(COLUMNS)) for mixture in ONE_OF_EACH],
    ids=[*COLUMNS, *(f"all-{mixture}" for mixture in ONE_OF_EACH)],
)
def test_columns_of_obs_are_used_and_nothing_else_is_written(mixture, names):
    adata = make_adata()
    before = adata.copy()
    options = {name: COLUMNS[name] for name in names}
    model = fit(adata, mixture=mixture, return_model=True, max_epochs=2, **options)
    assert added_keys(before, adata) == documented_keys(mixture)
    assert model.summary_stats.n_batch == (2 if "batch_key" in names else 1)
    assert model.summary_stats.get("n_extra_categorical_covs", 0) == ("categorical_covariate_keys" in names)
    assert model.summary_stats.get("n_extra_continuous_covs", 0) == ("continuous_covariate_keys" in names)
    assert np.isfinite(adata.layers["scvae_lambda"]).all()
    params = adata.uns["scvae"]["params"]
    assert {name: params[name] for name in COLUMNS if name in params} == options


@pytest.mark.parametrize("name", ["batch_key", "size_factor_key", "continuous_covariate_keys"])
def test_a_column_of_obs_changes_lambda(name):
    changed = fitted(mixture=False, **{name: COLUMNS[name]}).layers["scvae_lambda"]
    assert not np.allclose(changed, trained(False).adata.layers["scvae_lambda"], rtol=1e-3)


@pytest.mark.parametrize("name", ["categorical_covariate_keys", "continuous_covariate_keys"])
def test_a_single_covariate_may_be_given_without_a_list(name):
    single = fitted(mixture=False, max_epochs=1, **{name: COLUMNS[name][0]})
    assert single.uns["scvae"]["params"][name] == COLUMNS[name]


def test_everything_at_once():
    adata = make_adata(counts=_simulated(N_CELLS).X.copy())
    options = {"likelihood": "zinb", "mixture": "vade", "key_added": "all", "write_lambda": True}
    fit(adata, layer="counts", mask_var="kept", **options, **COLUMNS)
    kept = adata.var["kept"].to_numpy()
    np.testing.assert_array_equal(np.isfinite(adata.layers["all_lambda"]).all(axis=0), kept)
    np.testing.assert_array_equal(np.isnan(adata.layers["all_lambda"]).all(axis=0), ~kept)


@pytest.mark.parametrize("likelihood", ["poisson", "nb", "zip", "zinb"])
def test_every_likelihood_trains(likelihood):
    adata = fitted(likelihood=likelihood, max_epochs=3)
    assert adata.uns["scvae"]["params"]["likelihood"] == likelihood
    assert np.isfinite(adata.uns["scvae"]["elbo"]["validation"]["elbo"])


# ---------------------------------------------------------------------------------------------------------------------
# The layer of λ
# ---------------------------------------------------------------------------------------------------------------------

N_BYTES = 4 * N_CELLS * N_GENES


@pytest.mark.parametrize(
    ("write_lambda", "free", "is_written"),
    [
        (True, 0, True),
        (True, 2**40, True),
        (False, 0, False),
        (False, 2**40, False),
        (None, 4 * N_BYTES, True),
    ],
)
@pytest.mark.filterwarnings("error::UserWarning")
def test_lambda_is_written_as_asked_for_or_where_it_fits(monkeypatch, write_lambda, free, is_written):
    monkeypatch.setattr("scvae_tools.tl._lambda_layer._free_memory", lambda: free)
    adata = fitted(mixture=False, max_epochs=1, write_lambda=write_lambda)
    assert ("scvae_lambda" in adata.layers) == is_written


def test_lambda_larger_than_a_quarter_of_the_memory_is_left_out_with_its_size_and_two_ways_to_get_it(monkeypatch):
    monkeypatch.setattr("scvae_tools.tl._lambda_layer._free_memory", lambda: 4 * N_BYTES - 1)
    adata = make_adata()
    with pytest.warns(UserWarning, match=r"'scvae_lambda'.* [MG]iB.*write_lambda=True.*model\.get_lambda") as caught:
        fit(adata, max_epochs=2)
    assert said(caught)[0].filename == fit.__code__.co_filename
    assert re.search(
        r"backed AnnData into its file.*array on disk.*zarr, h5py, or a memory map", str(said(caught)[0].message)
    )
    expected = documented_keys(True) | {"layers": set()}
    assert added_keys(make_adata(), adata) == expected


def test_lambda_larger_than_the_limit_is_left_out_unless_it_is_asked_for(monkeypatch):
    monkeypatch.setattr("scvae_tools.tl._lambda_layer.LARGEST_BY_DEFAULT", N_BYTES - 1)
    adata = make_adata()
    with pytest.warns(UserWarning, match=r"left out: it is dense and would take .*, in files too .*write_lambda=True"):
        fit(adata, max_epochs=1)
    assert "scvae_lambda" not in adata.layers
    fit(adata, max_epochs=1, write_lambda=True)
    assert "scvae_lambda" in adata.layers


def test_lambda_of_some_genes_is_left_out_unless_it_is_asked_for():
    adata = make_adata()
    with pytest.warns(UserWarning, match="left out: it would hold NaN for the genes that `mask_var` leaves out"):
        fit(adata, max_epochs=1, mask_var="kept")
    assert "scvae_lambda" not in adata.layers


def array_for_lambda(
    kind: str, path: Path, shape: tuple[int, ...] = (N_CELLS, N_GENES), dtype: str = "float32"
) -> object:
    if kind == "zarr":
        zarr = pytest.importorskip("zarr")
        return zarr.create_array(str(path / "lambda.zarr"), shape=shape, chunks=(7, 20), dtype=dtype)
    if kind == "h5py":
        return h5py.File(path / "lambda.h5", "w").create_dataset("lambda", shape, dtype)
    if kind == "memory map":
        return np.lib.format.open_memmap(path / "lambda.npy", "w+", dtype, shape)
    return np.zeros(shape, dtype)


each_array_for_lambda = pytest.mark.parametrize("kind", ["zarr", "h5py", "memory map", "array"])


@each_array_for_lambda
@pytest.mark.parametrize("mask_var", [None, "kept"])
def test_lambda_goes_into_an_array_which_becomes_the_layer(kind, mask_var, tmp_path: Path, monkeypatch):
    monkeypatch.setattr("scvae_tools.tl._lambda_layer._free_memory", lambda: 0)
    place, adata = array_for_lambda(kind, tmp_path), make_adata()
    fit(adata, write_lambda=place, mask_var=mask_var)
    expected = trained(True).adata if mask_var is None else fitted(mask_var=mask_var, write_lambda=True)
    np.testing.assert_array_equal(place[:], expected.layers["scvae_lambda"])
    assert added_keys(make_adata(), adata) == documented_keys(True)
    layer = adata.layers["scvae_lambda"]
    assert np.shares_memory(layer, place) if isinstance(place, np.ndarray) else layer is place


@each_array_for_lambda
def test_results_with_lambda_on_disk_can_be_written_viewed_and_copied(kind, tmp_path: Path):
    adata = fitted(write_lambda=array_for_lambda(kind, tmp_path))
    expected = results_of(trained(True).adata)
    adata.write_h5ad(tmp_path / "a.h5ad")
    assert differing(results_of(anndata.read_h5ad(tmp_path / "a.h5ad")), expected) == []
    np.testing.assert_array_equal(adata[5:9].layers["scvae_lambda"], expected["lambda"][5:9])
    assert differing(results_of(adata.to_memory()), expected) == []
    again = fit(adata, copy=True, key_added="again", mixture=False)
    assert differing(results_of(again), expected) == []
    assert differing(results_of(again, "again"), results_of(trained(False).adata)) == []


def test_a_copy_refers_to_the_array_and_the_original_to_nothing(tmp_path: Path):
    adata, place = make_adata(), array_for_lambda("zarr", tmp_path)
    before = fingerprint(adata)
    copied = fit(adata, write_lambda=place, copy=True)
    assert fingerprint(adata) == before
    assert copied.layers["scvae_lambda"] is place
    np.testing.assert_array_equal(place[:], trained(True).adata.layers["scvae_lambda"])


def test_a_view_refers_to_the_array(tmp_path: Path):
    view, place = make_adata()[:40], array_for_lambda("h5py", tmp_path, (40, N_GENES))
    fit(view, mixture=False, write_lambda=place)
    assert view.layers["scvae_lambda"] is place
    np.testing.assert_array_equal(place[:], fitted(make_adata()[:40].copy(), mixture=False).layers["scvae_lambda"])


def test_lambda_of_more_bits_is_the_same(tmp_path: Path):
    place = array_for_lambda("h5py", tmp_path, dtype="float64")
    fit(make_adata(), write_lambda=place)
    np.testing.assert_array_equal(place[:], trained(True).adata.layers["scvae_lambda"])


class Rows:
    """An array of a kind that AnnData does not know; it takes rows by slices and keeps their number."""

    shape, dtype = (N_CELLS, N_GENES), np.dtype("float32")

    def __init__(self) -> None:
        self.values, self.n_written = np.zeros(self.shape, self.dtype), []

    def __getitem__(self, rows: slice) -> np.ndarray:
        return self.values[rows]

    def __setitem__(self, rows: slice, values: np.ndarray) -> None:
        assert isinstance(rows, slice)
        self.n_written.append(len(values))
        self.values[rows] = values


def test_an_array_that_anndata_does_not_take_is_filled_alone(caplog):
    caplog.set_level(logging.INFO, logger="scvae_tools")
    place, adata = Rows(), make_adata()
    fit(adata, write_lambda=place)
    np.testing.assert_array_equal(place.values, trained(True).adata.layers["scvae_lambda"])
    assert added_keys(make_adata(), adata) == documented_keys(True) | {"layers": set()}
    assert re.search(r"in the array passed as `write_lambda` alone: AnnData takes no .*Rows as a layer", caplog.text)


@pytest.mark.parametrize("mask_var", [None, "kept"])
def test_lambda_is_written_in_chunks_of_the_stated_memory(mask_var, monkeypatch):
    expected = fitted(mixture=False, mask_var=mask_var, write_lambda=True).layers["scvae_lambda"]
    monkeypatch.setattr("scvae_tools._module.memory.CHUNK_BYTES", 4 * 7 * 4 * N_GENES)
    monkeypatch.setattr("scvae_tools._module.memory.ENCODED_BYTES", 0)  # of so few genes the counts are the larger part
    monkeypatch.setattr("scvae_tools._module.memory.DECODED_NUMBERS", -1)  # one number a value
    place, in_memory = Rows(), make_adata()
    fit(make_adata(), mixture=False, mask_var=mask_var, write_lambda=place)
    fit(in_memory, mixture=False, mask_var=mask_var, write_lambda=True)
    probed, *written = place.n_written
    assert probed == 1
    assert max(written) <= 7
    assert sum(written) == N_CELLS
    for found in (place.values, in_memory.layers["scvae_lambda"]):
        np.testing.assert_allclose(found, expected, rtol=1e-5)  # float32, in products of another shape


class Broken(Rows):
    def __setitem__(self, rows: slice, values: np.ndarray) -> None:
        raise OSError("no space left on device")


def closed_dataset(path: Path) -> h5py.Dataset:
    dataset = array_for_lambda("h5py", path)
    dataset.file.close()
    return dataset


def read_only(kind: str, path: Path) -> object:
    place = array_for_lambda(kind, path)
    if kind == "zarr":
        import zarr

        return zarr.open_array(str(path / "lambda.zarr"), mode="r")
    if kind == "h5py":
        place.file.close()
        return h5py.File(path / "lambda.h5", "r")["lambda"]
    return np.load(path / "lambda.npy", mmap_mode="r")


BAD_PLACES: dict[str, tuple[Callable, str]] = {
    "a word": (lambda path: "yes", r"found a str without shape or type\. Pass, for example, zarr\.create_array\("),
    "a number": (lambda path: 1, r"found a int without shape"),
    "a list": (lambda path: [[0.0]], r"found a list without shape"),
    "a closed file": (closed_dataset, r"found a h5py.*Dataset without shape"),
    "another shape": (lambda path: np.zeros((60, 19), "f4"), r" of shape \(60, 20\) .*found the shape \(60, 19\)"),
    "whole numbers": (lambda path: np.zeros((60, 20), int), r"found the type int64\. Pass"),
    "half precision": (lambda path: np.zeros((60, 20), "f2"), r"found the type float16"),
    "a sparse matrix": (lambda path: sparse.csr_matrix((60, 20), dtype="f4"), r"csr_matrix that takes none"),
    "a tensor": (lambda path: torch.zeros(60, 20), r"found a torch.*Tensor without shape or type"),
    "zarr, to be read": (functools.partial(read_only, "zarr"), r"that takes none .*Open it for writing"),
    "h5py, to be read": (functools.partial(read_only, "h5py"), r"that takes none .*Open it for writing"),
    "memory map, to be read": (functools.partial(read_only, "memory map"), r"that takes none \(assignment destination"),
    "a full disk": (lambda path: Broken(), r"that takes none \(no space left on device\)"),
}


@pytest.mark.usefixtures("forbid_training")
@pytest.mark.parametrize("case", BAD_PLACES)
def test_an_array_that_cannot_take_lambda_is_refused_before_any_training(case, tmp_path: Path):
    make, message = BAD_PLACES[case]
    adata = make_adata()
    before = fingerprint(adata)
    with pytest.raises(ValueError, match=r"`write_lambda` must be True, False, None, or an array.*" + message):
        fit(adata, write_lambda=make(tmp_path))
    assert fingerprint(adata) == before


def test_results_are_kept_where_lambda_cannot_be_written(tmp_path: Path, monkeypatch):
    """The disk is full, or Ctrl-C is pressed, after hours of training."""
    monkeypatch.setattr(svt.SCVAE, "iter_lambda", lambda self, cells=None: iter([np.zeros((1, 3))]))
    adata = make_adata()
    with pytest.raises(ValueError, match="broadcast"):
        fit(adata, write_lambda=array_for_lambda("memory map", tmp_path))
    assert added_keys(make_adata(), adata) == documented_keys(True) | {"layers": set()}


# -- in the file of a backed AnnData -----------------------------------------------------------------------------------


def backed(path: Path, form: str = "csr_matrix", mode: str = "r+", **layers: object) -> AnnData:
    """An AnnData backed by a new file."""
    make_adata(FORMS[form](), **layers).write_h5ad(path)
    return anndata.read_h5ad(path, backed=mode)


@pytest.mark.parametrize("form", ["csr_matrix", "csc_matrix", "dense float32"])
@pytest.mark.parametrize("mask_var", [None, "kept"])
def test_lambda_of_a_backed_anndata_is_in_its_file_at_once(form, mask_var, tmp_path: Path, monkeypatch):
    monkeypatch.setattr("scvae_tools.tl._lambda_layer._free_memory", lambda: 0)
    path = tmp_path / "a.h5ad"
    adata = backed(path, form, other=np.ones((N_CELLS, N_GENES)))
    fit(adata, write_lambda=True, mask_var=mask_var)
    expected = fitted(mask_var=mask_var, write_lambda=True).layers["scvae_lambda"]
    layer = adata.layers["scvae_lambda"]
    assert isinstance(layer, h5py.Dataset)
    np.testing.assert_array_equal(layer[:], expected)
    assert added_keys(make_adata(other=np.ones((N_CELLS, N_GENES))), adata) == documented_keys(True)
    read = anndata.read_h5ad(path)
    assert type(read.layers["scvae_lambda"]) is np.ndarray
    np.testing.assert_array_equal(read.layers["scvae_lambda"], expected)
    np.testing.assert_array_equal(read.layers["other"], 1)
    assert added_keys(make_adata(other=np.ones((N_CELLS, N_GENES))), read)["obsm"] == set()  # until adata.write()


def test_the_layer_in_the_file_is_in_the_format_of_anndata(tmp_path: Path):
    make_adata().write_h5ad(tmp_path / "expected.h5ad")
    expected = fitted(anndata.read_h5ad(tmp_path / "expected.h5ad"))
    expected.write_h5ad(tmp_path / "expected.h5ad")
    adata = backed(tmp_path / "a.h5ad")
    fit(adata, write_lambda=True)
    with h5py.File(tmp_path / "expected.h5ad") as file:
        layer = file["layers/scvae_lambda"]
        wanted = dict(layer.attrs), layer.dtype, layer.shape, dict(file["layers"].attrs)
    found = adata.layers["scvae_lambda"]
    assert (dict(found.attrs), found.dtype, found.shape, dict(found.parent.attrs)) == wanted


@pytest.mark.parametrize("n_times", [1, 3])
def test_a_backed_anndata_with_lambda_in_its_file_can_be_written_again(n_times, tmp_path: Path):
    path = tmp_path / "a.h5ad"
    adata = backed(path)
    fit(adata, write_lambda=True)
    for _ in range(n_times):
        adata.write()
        assert differing(results_of(anndata.read_h5ad(path)), results_of(trained(True).adata)) == []
        assert differing(results_of(adata), results_of(trained(True).adata)) == []
    assert adata.isbacked
    np.testing.assert_array_equal(adata.X[:].toarray(), make_counts())


def test_a_backed_anndata_with_lambda_in_its_file_can_be_written_to_another(tmp_path: Path):
    adata = backed(tmp_path / "a.h5ad")
    fit(adata, write_lambda=True)
    adata.write(tmp_path / "b.h5ad")
    for name in ("a.h5ad", "b.h5ad"):
        found = anndata.read_h5ad(tmp_path / name).layers["scvae_lambda"]
        np.testing.assert_array_equal(found, trained(True).adata.layers["scvae_lambda"])


def test_closing_the_file_leaves_lambda_readable_and_the_end_of_the_anndata_frees_the_file(tmp_path: Path):
    path = tmp_path / "a.h5ad"
    adata = backed(path)
    fit(adata, write_lambda=True)
    adata.file.close()
    np.testing.assert_array_equal(adata.layers["scvae_lambda"][:], trained(True).adata.layers["scvae_lambda"])
    np.testing.assert_array_equal(adata.X[:].toarray(), make_counts())  # opens the file again
    in_memory = adata.to_memory()
    assert differing(results_of(in_memory), results_of(trained(True).adata)) == []
    del adata
    gc.collect()
    with h5py.File(path, "w"):  # refused where the file is open
        pass


def test_lambda_in_the_file_is_replaced(tmp_path: Path):
    path = tmp_path / "a.h5ad"
    adata = backed(path, scvae_lambda=np.ones((N_CELLS, N_GENES)))
    for mixture in (False, True):
        fit(adata, write_lambda=True, mixture=mixture)
        expected = trained(mixture).adata.layers["scvae_lambda"]
        np.testing.assert_array_equal(adata.layers["scvae_lambda"][:], expected)
        np.testing.assert_array_equal(anndata.read_h5ad(path).layers["scvae_lambda"], expected)


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError])
def test_of_lambda_that_was_interrupted_nothing_is_left_in_the_file(error, tmp_path: Path, monkeypatch):
    def interrupted(self: svt.SCVAE, cells: AnnData | None = None) -> Iterator[np.ndarray]:
        yield np.zeros((30, N_GENES), np.float32)
        raise error

    monkeypatch.setattr(svt.SCVAE, "iter_lambda", interrupted)
    path = tmp_path / "a.h5ad"
    adata = backed(path, scvae_lambda=np.ones((N_CELLS, N_GENES)))
    with pytest.raises(error) if error is OSError else pytest.warns(InterruptedTraining, match="left out"):
        fit(adata, write_lambda=True)
    assert added_keys(make_adata(scvae_lambda=np.ones((N_CELLS, N_GENES))), adata)["obsm"] == {"X_scvae", "scvae_probs"}
    adata.file.close()
    read = anndata.read_h5ad(path)
    np.testing.assert_array_equal(read.layers["scvae_lambda"], 1)
    assert keys_of(read)["layers"] == {"scvae_lambda"}


@pytest.mark.usefixtures("forbid_training")
@pytest.mark.parametrize("is_closed", [False, True])
def test_lambda_for_a_file_that_is_open_to_be_read_is_refused_before_any_training(is_closed, tmp_path: Path):
    path = tmp_path / "a.h5ad"
    adata = backed(path, mode="r")
    before = path.read_bytes()
    if is_closed:
        adata.file.close()
    with pytest.raises(
        ValueError, match=r"found 'a\.h5ad' open to be read.*backed='r\+'.*np\.empty.*array on disk, or"
    ):
        fit(adata, write_lambda=True)
    assert path.read_bytes() == before


@pytest.mark.parametrize("mode", ["r", "r+"])
def test_lambda_of_a_backed_anndata_goes_where_it_is_told(mode, tmp_path: Path):
    path = tmp_path / "a.h5ad"
    adata = backed(path, mode=mode)
    place = array_for_lambda("array", tmp_path)
    fit(adata, write_lambda=place)
    assert np.shares_memory(adata.layers["scvae_lambda"], place)
    fit(adata, mixture=False)
    assert type(adata.layers["scvae_lambda"]) is np.ndarray
    copied = fit(adata, write_lambda=True, copy=True)
    assert type(copied.layers["scvae_lambda"]) is np.ndarray
    for found in (place, copied.layers["scvae_lambda"]):
        np.testing.assert_array_equal(found, trained(True).adata.layers["scvae_lambda"])
    adata.file.close()
    assert keys_of(anndata.read_h5ad(path)) == keys_of(make_adata())


# ---------------------------------------------------------------------------------------------------------------------
# Random numbers
# ---------------------------------------------------------------------------------------------------------------------


@each_model
def test_the_same_seed_gives_the_same_numbers(mixture):
    options = {"mixture": mixture, "random_state": 3, "batch_size": 16}
    assert differing(results_of(fitted(**options)), results_of(fitted(**options))) == []


@each_model
def test_another_seed_gives_other_numbers(mixture):
    first, second = (results_of(fitted(mixture=mixture, random_state=seed)) for seed in (0, 1))
    assert {"latent", "lambda", "history elbo_train"} <= set(differing(first, second))


@pytest.mark.parametrize(
    "options",
    [
        lambda: {"rng": np.random.default_rng(3)},
        lambda: {"rng": np.random.default_rng(3), "random_state": None},
        lambda: {"rng": 3},
        lambda: {"random_state": np.random.RandomState(3)},
        lambda: {"random_state": np.int64(3)},
    ],
    ids=["generator", "generator-and-none", "number-as-rng", "RandomState", "int64"],
)
def test_generators_are_accepted_and_reproducible(options):
    first, second = (fitted(mixture=False, max_epochs=2, **options()) for _ in range(2))
    assert differing(results_of(first), results_of(second)) == []
    seed = first.uns["scvae"]["params"]["random_state"]
    assert isinstance(seed, int)
    again = fitted(mixture=False, max_epochs=2, random_state=seed)
    assert differing(results_of(first), results_of(again)) == []


def test_a_number_means_the_same_as_random_state_and_as_rng():
    given = (fitted(mixture=False, max_epochs=2, **{name: 3}) for name in ("random_state", "rng"))
    assert differing(*map(results_of, given)) == []


def test_none_draws_a_new_seed_each_time():
    first, second = (fitted(mixture=False, max_epochs=1, random_state=None) for _ in range(2))
    assert "latent" in differing(results_of(first), results_of(second))


def test_a_seed_of_more_than_32_bits_works():
    assert fitted(random_state=2**33, max_epochs=2).uns["scvae"]["params"]["random_state"] == 2**33


@pytest.mark.usefixtures("forbid_training")
@pytest.mark.parametrize("random_state", [1, np.random.RandomState(1)], ids=["number", "RandomState"])
def test_random_state_and_rng_together_are_refused(random_state):
    with pytest.raises(ValueError, match=r"`random_state` and `rng`.* found both.*Pass one"):
        fit(make_adata(), random_state=random_state, rng=np.random.default_rng(2))


def global_random_states() -> list[bytes]:
    return [
        pickle.dumps(random.getstate()),
        pickle.dumps(np.random.get_state()),  # noqa: NPY002
        torch.get_rng_state().numpy().tobytes(),
    ]


@pytest.mark.parametrize(("mixture", "n_components"), [(False, 2), (True, 2), (True, None), ("vade", 2)])
def test_global_random_states_are_left_as_they_were(mixture, n_components):
    random.random(), np.random.random(), torch.rand(1)  # noqa: NPY002
    before = global_random_states()
    fit(make_adata(), mixture=mixture, n_components=n_components, max_epochs=2)
    assert global_random_states() == before


def test_global_random_states_are_left_as_they_were_after_an_error(monkeypatch):
    monkeypatch.setattr("scvae_tools._module.vae.VAE.bound", not_finite(lambda call: True))
    before = global_random_states()
    with pytest.warns(UserWarning, match="once more"), pytest.raises(NonFiniteError):
        fit(make_adata())
    assert global_random_states() == before


def test_global_random_states_do_not_change_the_results():
    torch.rand(7), np.random.random(7), random.random()  # noqa: NPY002
    assert differing(results_of(fitted()), results_of(trained(True).adata)) == []


def test_the_order_of_two_calls_does_not_matter():
    calls = [{"mixture": True, "random_state": 5}, {"mixture": "vade", "likelihood": "zip", "random_state": 6}]
    first, second = (results_of(fitted(**call)) for call in calls)
    second_again, first_again = (results_of(fitted(**call)) for call in calls[::-1])
    assert differing(first, first_again) == []
    assert differing(second, second_again) == []


# ---------------------------------------------------------------------------------------------------------------------
# Forms of input
# ---------------------------------------------------------------------------------------------------------------------

FORMS: dict[str, Callable[[], object]] = {
    "csr_matrix": lambda: sparse.csr_matrix(make_counts()),
    "csc_matrix": lambda: sparse.csc_matrix(make_counts()),
    "csr_array": lambda: sparse.csr_array(make_counts()),
    "csc_array": lambda: sparse.csc_array(make_counts()),
    "csr int32": lambda: sparse.csr_matrix(make_counts().astype(np.int32)),
    "dense int64": lambda: make_counts().astype(np.int64),
    "dense float32": lambda: make_counts().astype(np.float32),
    "dense float64": make_counts,
    "dense in column order": lambda: np.asfortranarray(make_counts()),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("slot", ["X", "layer"])
def test_the_form_of_the_matrix_does_not_matter(form, slot):
    matrix = FORMS[form]()
    adata = make_adata(matrix) if slot == "X" else make_adata(np.zeros((N_CELLS, N_GENES)), counts=matrix)
    before = fingerprint(adata)
    fit(adata, mixture=False, layer=None if slot == "X" else "counts")
    assert differing(results_of(adata), results_of(trained(False).adata)) == []
    assert matrix_bytes(adata.X) == before["X"]


def test_a_view_becomes_an_anndata_with_the_results_and_its_parent_stays():
    parent = anndata.concat([make_adata(), make_adata()], index_unique="-", merge="same", uns_merge="same")
    parent.obs["sex"] = parent.obs["sex"].astype("category")
    before = fingerprint(parent)
    view = parent[:N_CELLS]
    fit(view)
    assert not view.is_view
    assert differing(results_of(view), results_of(trained(True).adata)) == []
    assert fingerprint(parent) == before


def test_a_view_that_leads_to_an_error_stays_a_view():
    view = make_adata()[:30]
    with pytest.raises(ValueError, match="likelihood"):
        fit(view, likelihood="normal")
    assert view.is_view


def on_disk(tmp_path: Path, form: str) -> Path:
    """An h5ad file with X sparse by rows, by columns, or dense."""
    path = tmp_path / "counts.h5ad"
    make_adata(FORMS[form]()).write_h5ad(path)
    return path


each_form_on_disk = pytest.mark.parametrize("form", ["csr_matrix", "csc_matrix", "dense float32"])


@each_form_on_disk
@pytest.mark.parametrize("return_model", [False, True])
def test_backed_data_get_the_results_in_memory_and_the_file_stays(tmp_path: Path, form, return_model):
    path = on_disk(tmp_path, form)
    before = path.read_bytes()
    adata = anndata.read_h5ad(path, backed="r")
    fit(adata, return_model=return_model)
    assert adata.isbacked
    assert added_keys(make_adata(), adata) == documented_keys(True)
    assert differing(results_of(adata), results_of(trained(True).adata)) == []
    adata.file.close()
    assert path.read_bytes() == before


@each_form_on_disk
def test_masked_backed_data_give_the_results_of_masked_data_in_memory(tmp_path: Path, form):
    adata = anndata.read_h5ad(on_disk(tmp_path, form), backed="r")
    found, expected = (
        results_of(fitted(a, mixture=False, mask_var="kept", write_lambda=np.empty((N_CELLS, N_GENES), np.float32)))
        for a in (adata, make_adata())
    )
    adata.file.close()
    np.testing.assert_array_equal(found.pop("lambda"), expected.pop("lambda"))  # with NaN
    assert differing(found, expected) == []


@each_form_on_disk
def test_a_copy_of_backed_data_is_in_memory_or_refused_before_any_training(tmp_path: Path, form, monkeypatch):
    adata = anndata.read_h5ad(on_disk(tmp_path, form), backed="r")
    run, calls = svt.SCVAE._run, []
    monkeypatch.setattr(svt.SCVAE, "_run", lambda *args: (calls.append(1), run(*args)))
    try:
        copied = fit(adata, mixture=False, copy=True)
    except ValueError as error:
        assert not calls, f"refused after the training: {error}"  # noqa: PT017
    else:
        assert differing(results_of(copied), results_of(trained(False).adata)) == []
    finally:
        adata.file.close()


@each_form_on_disk
def test_a_view_of_backed_data_is_written_or_refused_before_any_training(tmp_path: Path, form, monkeypatch):
    adata = anndata.read_h5ad(on_disk(tmp_path, form), backed="r")
    run, calls = svt.SCVAE._run, []
    monkeypatch.setattr(svt.SCVAE, "_run", lambda *args: (calls.append(1), run(*args)))
    view = adata[:40]
    try:
        fit(view, mixture=False)
    except ValueError as error:
        assert not calls, f"refused after the training: {error}"  # noqa: PT017
    else:
        assert differing(results_of(view), results_of(fitted(make_adata()[:40].copy(), mixture=False))) == []
    finally:
        adata.file.close()


# ---------------------------------------------------------------------------------------------------------------------
# Bad input
# ---------------------------------------------------------------------------------------------------------------------


def with_an_empty_cell() -> AnnData:
    counts = make_counts()
    counts[4] = 0
    return make_adata(counts)


def with_a_batch_of_one_cell() -> AnnData:
    adata = make_adata()
    adata.obs["batch"] = pd.Categorical(["alone"] + ["a", "b"] * 29 + ["a"])
    return adata


def log_transformed() -> np.ndarray:
    counts = make_counts()
    return np.log1p(counts / counts.sum(axis=1, keepdims=True) * 1e4)


BAD_COUNTS: dict[str, tuple[Callable[[], AnnData], dict, str]] = {
    "NaN": (lambda: with_value(np.nan), {}, r"adata\.X must hold counts.*NaN.*'cell3', gene 'gene5'.*Remove"),
    "inf": (lambda: with_value(np.inf), {}, r"infinite.*'cell3', gene 'gene5'.*division by 0"),
    "negative": (lambda: with_value(-1), {}, r"negative value -1 in cell 'cell3', gene 'gene5'.*scaled"),
    "too large": (lambda: with_value(2.0**25), {}, r"too large value 33554432.*'cell3'.*2\*\*24"),
    "non-integer": (
        lambda: with_value(20.5),
        {},
        r"adata\.X must hold integer counts.*20\.5.*'cell3', gene 'gene5'.*`layer`.*allow_non_integer=True",
    ),
    "non-integer with counts in a layer": (
        lambda: make_adata(make_counts() + 0.5, counts=make_counts()),
        {},
        r"must hold integer counts.*pass layer='counts'",
    ),
    "non-integer layer": (
        lambda: make_adata(wrong=make_counts() + 0.5),
        {"layer": "wrong"},
        r"adata\.layers\['wrong'\] must hold integer counts.*pass layer=None",
    ),
    "log-transformed": (lambda: make_adata(log_transformed()), {}, r"non-integer.*looks log-transformed"),
    "no cells": (lambda: make_adata()[:0].copy(), {}, r"at least one cell.*found 0 cells.*filter"),
    "no genes": (lambda: make_adata()[:, :0].copy(), {}, r"one gene.*found 0 genes.*filter"),
    "a cell without counts": (with_an_empty_cell, {}, r"found 1 of 60 cells without.*'cell4'.*sc\.pp\.filter_cells"),
    "no layer of that name": (
        lambda: make_adata(counts=make_counts()),
        {"layer": "cuonts"},
        r"found 'cuonts'.*'counts'.*Pass one",
    ),
    "no mask of that name": (make_adata, {"mask_var": "highly_variable"}, r"found 'highly_variable'.*'kept'"),
    "a mask of another length": (make_adata, {"mask_var": np.ones(3, bool)}, r"shape \(20,\); found shape \(3,\)"),
    "a mask of numbers": (make_adata, {"mask_var": np.ones(N_GENES)}, r"must be boolean; found float64"),
    "a mask without genes": (make_adata, {"mask_var": np.zeros(N_GENES, bool)}, r"at least one gene; found none"),
}


@pytest.mark.usefixtures("forbid_training")
@pytest.mark.parametrize("case", BAD_COUNTS)
def test_what_are_no_counts_is_refused_before_any_training(case):
    make, options, message = BAD_COUNTS[case]
    adata = make()
    before = fingerprint(adata)
    with pytest.raises(CountsError, match=message):
        fit(adata, **options)
    assert fingerprint(adata) == before


BAD_ARGUMENTS: dict[str, tuple[dict, str]] = {
    "likelihood": ({"likelihood": "negbin"}, r"negbin.*"),
    "mixture": ({"mixture": "gmm"}, r"`mixture` must be False, True, 'gmvae'.* or 'vade'; found 'gmm'"),
    "mixture of another kind": ({"mixture": None}, r"`mixture` must be .*; found None"),
    "batch_key": ({"batch_key": "batc"}, r"`batch_key`.*found 'batc'.*Did you mean 'batch'"),
    "batch_key like no other": ({"batch_key": "zzz"}, r"`batch_key`.*found 'zzz'.*Pass one of .*'batch'"),
    "labels_key": ({"labels_key": "componant"}, r"`labels_key`.*Did you mean 'component'"),
    "size_factor_key": ({"size_factor_key": "sizefactor"}, r"`size_factor_key`.*Did you mean 'size_factor'"),
    "size factors that are words": ({"size_factor_key": "sex"}, r"must be numeric"),
    "size factors below 0": ({"size_factor_key": "age"}, r"must be above 0; found -.*Correct"),
    "categorical covariate": ({"categorical_covariate_keys": ["sx"]}, r"`categorical_covariate_keys`.*'sex'"),
    "continuous covariate": ({"continuous_covariate_keys": ["agee"]}, r"`continuous_covariate_keys`.*'age'"),
    "continuous covariate of words": ({"continuous_covariate_keys": ["sex"]}, r"must be numeric.*categorical"),
    "misspelt argument": ({"n_componets": 3}, r"no argument 'n_componets'\. Did you mean 'n_components'"),
    "misspelt argument of the model": ({"dispersions": "gene"}, r"'dispersions'\. Did you mean 'dispersion'"),
    "misspelt argument of the training": ({"patienc": 2}, r"'patienc'\. Did you mean 'patience'"),
    "unknown argument": (
        {"xyzzy": 1},
        r"no argument 'xyzzy'\. Beside its own, it takes .*dropout_rate.*patience",
    ),
    "more components than cells": (
        {"n_components": 61},
        r"`n_components` must be at most .*61 components for 60 cells",
    ),
    "no components": ({"n_components": 0}, r"`n_components` must be .*at least 1.*; found 0"),
    "components from many to few": ({"n_components": (9, 3)}, r"`n_components` must be .*; found \(9, 3\)"),
    "broken components": ({"n_components": 2.5}, r"`n_components` must be .*; found 2\.5"),
    "batch_size 0": ({"batch_size": 0}, r"`batch_size` must be .*at least 1; found 0"),
    "batch_size 2.5": ({"batch_size": 2.5}, r"`batch_size` must be .*found 2\.5"),
    "train_size 0": ({"train_size": 0}, r"`train_size` must be in \(0, 1\]; found 0"),
    "train_size 1.5": ({"train_size": 1.5}, r"`train_size` must be in \(0, 1\]; found 1\.5"),
    "train_size NaN": ({"train_size": float("nan")}, r"`train_size` must be .*found nan"),
    "max_epochs 0": ({"max_epochs": 0}, r"`max_epochs` must be .*at least 1.*found 0"),
    "max_epochs 1.5": ({"max_epochs": 1.5}, r"`max_epochs` must be .*found 1\.5"),
    "n_latent 0": ({"n_latent": 0}, r"`n_latent` must be .*at least 1; found 0"),
    "n_latent 1.5": ({"n_latent": 1.5}, r"`n_latent` must be .*found 1\.5"),
    "n_hidden 0": ({"n_hidden": 0}, r"`n_hidden` must be .*at least 1; found 0"),
    "n_layers 0": ({"n_layers": 0}, r"`n_layers` must be .*at least 1, or None; found 0"),
    "lr 0": ({"lr": 0}, r"`lr` must be a finite number above 0; found 0"),
    "lr NaN": ({"lr": float("nan")}, r"`lr` must be a finite number above 0; found nan"),
    "lr infinite": ({"lr": float("inf")}, r"`lr` must be .*found inf"),
    "dropout_rate 1": ({"dropout_rate": 1.0}, r"`dropout_rate` must be in \[0, 1\); found 1"),
    "dispersion": ({"dispersion": "cell"}, r"`dispersion` must be one of 'gene'.*found 'cell'"),
    "covariance": ({"covariance": "round"}, r"`covariance` must be one of 'diag'.*found 'round'"),
    "random_state -1": ({"random_state": -1}, r"`random_state` must be .*found -1"),
    "random_state 1.5": ({"random_state": 1.5}, r"`random_state` must be .*found 1\.5"),
}


@pytest.mark.usefixtures("forbid_training")
@pytest.mark.parametrize("case", BAD_ARGUMENTS)
def test_a_bad_argument_is_refused_before_any_training(case):
    options, message = BAD_ARGUMENTS[case]
    adata = make_adata()
    before = fingerprint(adata)
    with pytest.raises(ValueError, match=message):
        fit(adata, **options)
    assert fingerprint(adata) == before


@pytest.mark.usefixtures("forbid_training")
@pytest.mark.parametrize("known", ["poisson", "nb", "zip", "zinb"])
def test_an_unknown_likelihood_lists_the_known(known):
    with pytest.raises(ValueError, match=rf"\b{known}\b"):
        fit(make_adata(), likelihood="negbin")


@pytest.mark.usefixtures("forbid_training")
@pytest.mark.parametrize("n_components", [55, 60])
def test_more_components_than_training_cells_are_refused_before_any_training(n_components):
    with pytest.raises(ValueError, match=rf"`n_components` must be at most .*found {n_components} components for 54"):
        fit(make_adata(), n_components=n_components)


@pytest.mark.usefixtures("forbid_training")
def test_a_batch_of_one_cell_is_refused_with_its_name():
    adata = with_a_batch_of_one_cell()
    with pytest.raises(
        ValueError, match=r"at least two cells in every batch; found one cell, 'cell0', in batch 'alone'"
    ):
        fit(adata, batch_key="batch")


@pytest.mark.usefixtures("forbid_training")
def test_a_missing_category_is_refused_with_its_cell():
    adata = make_adata()
    adata.obs.loc["cell7", "batch"] = np.nan
    with pytest.raises(ValueError, match=r"a category for every cell; found none for 1 of 60 cells: 'cell7'"):
        fit(adata, batch_key="batch")


@pytest.mark.usefixtures("forbid_training")
def test_a_mudata_is_refused_with_the_modality_to_pass():
    mudata = pytest.importorskip("mudata")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        mdata = mudata.MuData({"rna": make_adata(), "atac": make_adata()})
    with pytest.raises(TypeError, match=r"must be an AnnData; found a MuData.*'rna', 'atac'.*mdata\.mod\['rna'\]"):
        fit(mdata)


@pytest.mark.usefixtures("forbid_training")
@pytest.mark.parametrize("data", [np.ones((3, 2)), sparse.eye(3), pd.DataFrame(), None], ids=lambda d: type(d).__name__)
def test_what_is_no_anndata_is_refused_with_its_type(data):
    with pytest.raises(TypeError, match=rf"`adata` must be an AnnData; found a {type(data).__name__}"):
        fit(data)


def test_estimated_counts_work_where_allowed_with_one_warning():
    adata = with_value(20.5)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fit(adata, allow_non_integer=True, max_epochs=2)
    messages = [str(w.message) for w in said(caught)]
    assert len(messages) == 1, messages
    assert re.search(r"adata\.X holds 1 non-integer value 20\.5 in cell 'cell3'.*estimated counts", messages[0])
    assert added_keys(make_adata(), adata) == documented_keys(True)


@each_model
def test_genes_without_counts_work_and_are_logged_once(mixture, caplog):
    counts = make_counts()
    counts[:, [3, 8]] = 0
    with caplog.at_level(logging.INFO, logger="scvae_tools"):
        adata = fitted(make_adata(counts), mixture=mixture)
    said = [record.getMessage() for record in caplog.records if "no count" in record.getMessage()]
    assert said == ["adata.X: 2 of 20 genes have no count in any cell."]
    assert np.isfinite(adata.layers["scvae_lambda"]).all()
    assert (adata.layers["scvae_lambda"][:, 3] < 1).all()


# ---------------------------------------------------------------------------------------------------------------------
# Awkward sizes
# ---------------------------------------------------------------------------------------------------------------------


@each_model
@pytest.mark.parametrize(
    ("normalization", "n_cells", "train_size"),
    [("layer", 65, 1.0), ("layer", 66, 0.985), ("none", 72, 0.9), ("batch", 66, 0.985)],
)
def test_a_last_minibatch_of_one_cell_works(mixture, normalization, n_cells, train_size):
    adata = make_adata(n_cells=n_cells)
    options = {"batch_size": 32, "train_size": train_size, "normalization": normalization, "max_epochs": 2}
    model = fit(adata, mixture=mixture, return_model=True, **options)
    assert len(model.train_indices) == 65  # 2 · 32 + 1
    assert np.isfinite(adata.obsm["X_scvae"]).all()


@each_model
def test_minibatches_of_one_cell_work(mixture):
    assert np.isfinite(fitted(make_adata(n_cells=10), mixture=mixture, batch_size=1).obsm["X_scvae"]).all()


@each_model
def test_training_on_all_cells_leaves_no_validation_columns(mixture, tmp_path: Path):
    adata = fitted(mixture=mixture, train_size=1.0)
    uns = adata.uns["scvae"]
    assert not [column for column in uns["history"] if "validation" in column]
    assert len(uns["history"]) == 4
    assert set(uns["elbo"]) == {"train"}
    assert added_keys(make_adata(), adata) == documented_keys(mixture)
    adata.write_h5ad(tmp_path / "a.h5ad")


@each_model
@pytest.mark.parametrize("max_epochs", [1, 2, 3])
def test_few_epochs_give_all_results(mixture, max_epochs):
    adata = fitted(mixture=mixture, max_epochs=max_epochs)
    assert added_keys(make_adata(), adata) == documented_keys(mixture)
    assert len(adata.uns["scvae"]["history"]) == max_epochs
    assert adata.uns["scvae"]["history"]["stage"].iloc[-1] == ("mixture" if mixture else "vae")


@each_model
def test_a_handful_of_cells_works(mixture):
    adata = fitted(make_adata(n_cells=4), mixture=mixture)
    assert added_keys(make_adata(n_cells=4), adata) == documented_keys(mixture)


def test_a_single_gene_works():
    adata = make_adata(make_counts() + 1)[:, :1].copy()
    assert fitted(adata).layers["scvae_lambda"].shape == (N_CELLS, 1)


@pytest.mark.parametrize(("early_stopping", "n_epochs"), [(False, 6), (True, 4)])
def test_a_stage_ends_early_where_the_bound_no_longer_rises(early_stopping, n_epochs, monkeypatch):
    # 2 epochs of warm-up, which are never cut, then 1 with the best bound and 1 of patience.
    monkeypatch.setattr("scvae_tools._module.vae.VAE.bound", falling())
    adata = fitted(mixture=False, max_epochs=6, patience=1, early_stopping=early_stopping)
    assert len(adata.uns["scvae"]["history"]) == n_epochs


# ---------------------------------------------------------------------------------------------------------------------
# What the user sees
# ---------------------------------------------------------------------------------------------------------------------

LOGGERS = ["lightning.pytorch", "lightning.fabric", "scvi", "scvae_tools"]


@each_model
def test_nothing_is_printed_or_warned_without_progress(mixture, capfd):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fit(make_adata(), mixture=mixture, batch_size=16)
    assert capfd.readouterr() == ("", "")
    assert [str(w.message) for w in said(caught)] == []


@each_model
def test_levels_of_loggers_are_left_as_they_were(mixture):
    levels = [logging.getLogger(name).level for name in LOGGERS]
    fit(make_adata(), mixture=mixture, max_epochs=2)
    assert [logging.getLogger(name).level for name in LOGGERS] == levels


def test_filters_of_warnings_are_left_as_they_were():
    before = list(warnings.filters)
    fit(make_adata(), mixture=False, max_epochs=2)
    assert list(warnings.filters) == before


@each_model
def test_progress_shows_epochs_and_bound_on_stderr_alone(mixture, capfd):
    fit(make_adata(), mixture=mixture, progress=True)
    out, err = capfd.readouterr()
    assert out == ""
    assert re.search(r"4/4.*epoch.*ELBO=-\d", err)
    assert err.endswith("\n")


# ---------------------------------------------------------------------------------------------------------------------
# Ctrl-C
# ---------------------------------------------------------------------------------------------------------------------


def interrupt_in(epoch: int) -> Callable:
    """A training step during which the user presses Ctrl-C in the given epoch."""
    from scvae_tools._train.plan import TrainingPlan

    step = TrainingPlan.training_step

    def training_step(self: TrainingPlan, *args: object) -> object:
        if self.row["epoch"] == epoch:
            raise KeyboardInterrupt
        return step(self, *args)

    return training_step


@each_model
def test_ctrl_c_in_the_first_epoch_leaves_everything_as_it_was(mixture, monkeypatch):
    monkeypatch.setattr("scvae_tools._train.plan.TrainingPlan.training_step", interrupt_in(1))
    adata = make_adata()
    before, handler, stores = fingerprint(adata), signal.getsignal(signal.SIGINT), managers()
    with pytest.raises(KeyboardInterrupt):
        fit(adata, mixture=mixture)
    assert fingerprint(adata) == before
    assert signal.getsignal(signal.SIGINT) is handler
    assert managers_left() <= stores


# 6 epochs: 1 of warm-up, 3 of the VAE and 2 of the mixture; 2 and 4 without a mixture.
@pytest.mark.parametrize(
    ("mixture", "epoch", "stage", "done"),
    [
        (False, 2, "warm-up", 1),
        (False, 3, "vae", 0),
        (False, 4, "vae", 1),
        (True, 2, "vae", 0),
        (True, 3, "vae", 1),
        (True, 5, "mixture", 0),
        (True, 6, "mixture", 1),
        ("vade", 4, "vae", 2),
        ("vade", 6, "mixture", 1),
    ],
)
def test_ctrl_c_later_writes_all_results_and_says_what_was_kept(mixture, epoch, stage, done, monkeypatch):
    monkeypatch.setattr("scvae_tools._train.plan.TrainingPlan.training_step", interrupt_in(epoch))
    adata, handler = make_adata(), signal.getsignal(signal.SIGINT)
    message = rf"interrupted in stage '{stage}' after {done} of its at most \d+ epochs\. Kept: the weights"
    with pytest.warns(UserWarning, match=message) as caught:
        fit(adata, mixture=mixture, max_epochs=6)
    caught = said(caught)
    assert len(caught) == 1
    assert caught[0].filename == fit.__code__.co_filename
    assert added_keys(make_adata(), adata) == documented_keys(mixture)
    assert adata.uns["scvae"]["history"]["epoch"].tolist() == list(range(1, epoch))
    assert np.isfinite(adata.obsm["X_scvae"]).all()
    assert signal.getsignal(signal.SIGINT) is handler
    assert ("fitted to this latent space" in str(caught[0].message)) == (stage != "mixture")


def test_after_ctrl_c_the_next_call_trains_to_the_end(monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr("scvae_tools._train.plan.TrainingPlan.training_step", interrupt_in(2))
        with pytest.warns(UserWarning, match="interrupted"):
            fit(make_adata())
    assert differing(results_of(fitted()), results_of(trained(True).adata)) == []


def test_ctrl_c_is_quiet_but_for_the_warning(monkeypatch, capfd):
    monkeypatch.setattr("scvae_tools._train.plan.TrainingPlan.training_step", interrupt_in(3))
    with pytest.warns(UserWarning, match="interrupted"):
        fit(make_adata())
    assert capfd.readouterr() == ("", "")


# ---------------------------------------------------------------------------------------------------------------------
# Numbers that are not finite
# ---------------------------------------------------------------------------------------------------------------------


def not_finite(is_bad: Callable[[int], bool], term: str = "kl_z", value: float = float("nan")) -> Callable:
    """A bound with a term that is not finite in the calls, counted from 0, that ``is_bad`` picks."""
    from scvae_tools._module.vae import VAE

    bound, calls = VAE.bound, iter(range(10**6))

    def broken(self: VAE, *args: object, **kwargs: object) -> object:
        found = bound(self, *args, **kwargs)
        return dataclasses.replace(found, **{term: getattr(found, term) * value}) if is_bad(next(calls)) else found

    return broken


def falling() -> Callable:
    """A bound that is worse at every call."""
    from scvae_tools._module.vae import VAE

    bound, calls = VAE.bound, iter(range(10**6))

    def worse(self: VAE, *args: object, **kwargs: object) -> object:
        found = bound(self, *args, **kwargs)
        return dataclasses.replace(found, log_likelihood=found.log_likelihood - 1e3 * next(calls))

    return worse


# With all cells in one minibatch an epoch calls twice: on the training cells, then on the validation cells.


@pytest.mark.parametrize(
    ("mixture", "epoch", "subset"),
    [(False, 1, 0), (False, 3, 1), (True, 1, 1), (True, 2, 0), ("vade", 2, 1)],
)
def test_a_stage_that_broke_down_once_is_tried_again_with_a_lower_learning_rate(mixture, epoch, subset, monkeypatch):
    monkeypatch.setattr("scvae_tools._module.vae.VAE.bound", not_finite(lambda call: call == 2 * (epoch - 1) + subset))
    adata = make_adata()
    message = rf"kl_z became NaN or infinite in epoch {epoch} \(.*; trying this stage once more with lr=0\.0002"
    with pytest.warns(UserWarning, match=message) as caught:
        fit(adata, mixture=mixture, lr=2e-3)
    assert len(said(caught)) == 1
    assert added_keys(make_adata(), adata) == documented_keys(mixture)
    assert adata.uns["scvae"]["history"]["epoch"].tolist() == [1, 2, 3, 4]
    assert np.isfinite(adata.uns["scvae"]["history"].select_dtypes("number")).all(axis=None)
    assert np.isfinite(adata.obsm["X_scvae"]).all()


@pytest.mark.parametrize(
    ("mixture", "term", "value"),
    [(False, "kl_z", np.nan), (True, "log_likelihood", np.inf), ("vade", "kl_y", np.nan)],
)
def test_training_that_breaks_down_twice_says_where_and_what_to_try(mixture, term, value, monkeypatch):
    monkeypatch.setattr("scvae_tools._module.vae.VAE.bound", not_finite(lambda call: call >= 2, term, value))
    adata = make_adata()
    before, stores = fingerprint(adata), managers()
    message = rf"{term} became NaN or infinite in epoch 2 \(stage 'vae'\).*Try a lower `lr`"
    with (
        pytest.warns(UserWarning, match=r"once more with lr=0\.0001"),
        pytest.raises(NonFiniteError, match=message) as caught,
    ):
        fit(adata, mixture=mixture)
    assert (caught.value.term, caught.value.stage, caught.value.epoch) == (term, "vae", 2)
    assert fingerprint(adata) == before
    caught.value.__traceback__ = None
    caught.value.__context__ = None
    del caught
    assert managers_left() <= stores


# ---------------------------------------------------------------------------------------------------------------------
# Import, signature and docstring
# ---------------------------------------------------------------------------------------------------------------------


def in_new_process(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout


@pytest.mark.parametrize("heavy", [["torch", "scvi", "lightning", "scanpy"]], ids=["heavy"])
@pytest.mark.parametrize(
    "code", ["import scvae_tools", "import scvae_tools; dir(scvae_tools)", "import scvae_tools.tl"]
)
def test_import_loads_no_heavy_package(code, heavy):
    found = in_new_process(f"{code}\nimport sys\nprint([name for name in {heavy} if name in sys.modules])")
    assert found.strip() == "[]"


def test_dir_lists_the_public_names():
    assert {"SCVAE", "datasets", "likelihoods", "pl", "tl", "__version__"} <= set(dir(svt))


@pytest.mark.parametrize("name", ["SCVAE", "datasets", "likelihoods", "pl", "tl"])
def test_public_names_exist(name):
    assert name in svt.__all__
    assert getattr(svt, name).__name__.rpartition(".")[2] == name


def test_an_unknown_attribute_is_an_attribute_error():
    with pytest.raises(AttributeError, match="module 'scvae_tools' has no attribute 'scvi'"):
        _ = svt.scvi


PARAMETERS = inspect.signature(svt.tl.scvae).parameters


def sections(function: Callable) -> dict[str, str]:
    """Sections of a NumPy docstring, by title."""
    parts = re.split(r"^(\w[\w ]*)\n-{3,}\n", inspect.getdoc(function), flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def test_all_but_the_data_is_passed_by_name():
    kinds = [parameter.kind for parameter in PARAMETERS.values()]
    kind = inspect.Parameter
    assert kinds[0] is kind.POSITIONAL_OR_KEYWORD
    assert set(kinds[1:-1]) == {kind.KEYWORD_ONLY}
    assert kinds[-1] is kind.VAR_KEYWORD
    with pytest.raises(TypeError, match="positional"):
        svt.tl.scvae(make_adata(), "nb")


def test_every_parameter_is_documented_once_and_in_order():
    names = [
        name.lstrip("*")
        for line in re.findall(r"^(\S.*)$", sections(svt.tl.scvae)["Parameters"], flags=re.MULTILINE)
        for name in line.split(", ")
    ]
    assert names == list(PARAMETERS)


@pytest.mark.parametrize("slot", [slot for slot, keys in documented_keys(True).items() for _ in sorted(keys)])
def test_every_slot_that_is_written_is_documented(slot):
    assert f"``adata.{slot}[" in sections(svt.tl.scvae)["Returns"]


def test_exactly_the_fields_that_are_written_are_documented():
    fields = re.findall(r"``adata\.(\w+)\[\"(\w+)\"\]`` :", sections(svt.tl.scvae)["Returns"])
    documented = documented_keys(True, linear_decoder=True)
    assert sorted(fields) == sorted((slot, key) for slot, keys in documented.items() for key in keys)


@pytest.mark.parametrize("error", ["CountsError", "ValueError", "NonFiniteError"])
def test_every_error_is_documented(error):
    assert re.search(rf"^{error}$", sections(svt.tl.scvae)["Raises"], flags=re.MULTILINE)
