"""Columns of obs in their roles: good ones pass, and bad ones are refused with the column, the cells and the remedy."""

from __future__ import annotations

import datetime as dt
import re
import warnings
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
import pytest
from adata_forms import N_CELLS, fingerprint, make_adata

import scvae_tools as svt
from scvae_tools._data.roles import check_obs

if TYPE_CHECKING:
    from anndata import AnnData


def make_obs() -> AnnData:
    adata = make_adata()
    adata.obs["donor"] = pd.Categorical(list("aabbbaa"), categories=["a", "b", "unused"])
    adata.obs["label"] = pd.Categorical(list("xyyyyyy"))
    adata.obs["site"] = ["s", "t", "t", "t", "t", "t", "s"]
    adata.obs["age"] = np.arange(N_CELLS)
    adata.obs["depth"] = np.linspace(0.5, 2, N_CELLS, dtype=np.float32)
    return adata


def test_good_columns_pass_unchanged_with_every_role():
    adata = make_obs()
    before = fingerprint(adata)
    check_obs(
        adata,
        batch_key="donor",
        labels_key="label",  # 'x' labels a single cell: allowed
        size_factor_key="depth",
        categorical_covariate_keys=["site", "label"],
        continuous_covariate_keys=("age", "depth"),
    )
    assert fingerprint(adata) == before


def test_no_columns_are_needed():
    check_obs(make_adata())


ROLES = {
    "batch_key": str,
    "labels_key": str,
    "size_factor_key": str,
    "categorical_covariate_keys": lambda key: [key],
    "continuous_covariate_keys": lambda key: [key],
}


@pytest.mark.parametrize("role", ROLES)
@pytest.mark.parametrize(
    ("key", "remedy"),
    [("doner", r"Did you mean 'donor'\?"), ("qqq", "Pass one of 'donor', 'label', 'site', 'age', 'depth'")],
)
def test_a_missing_column_is_refused_in_every_role(role, key, remedy):
    with pytest.raises(ValueError, match=f"`{role}` must name a column of adata.obs; found '{key}', .*{remedy}"):
        check_obs(make_obs(), **{role: ROLES[role](key)})


@pytest.mark.parametrize("role", ["batch_key", "labels_key", "categorical_covariate_keys"])
@pytest.mark.parametrize("column", ["donor", "site"])
def test_missing_categories_are_refused(role, column):
    adata = make_obs()
    adata.obs.loc[["cell1", "cell2", "cell4", "cell5"], column] = None
    message = rf"adata\.obs\['{column}'\] \(`{role}`\).*4 of 7 cells: 'cell1', 'cell2', 'cell4', \.\.\..*notna"
    with pytest.raises(ValueError, match=message):
        check_obs(adata, **{role: ROLES[role](column)})


@pytest.mark.parametrize("dtype", ["category", "object"])
def test_a_batch_of_a_single_cell_is_refused(dtype):
    adata = make_obs()
    adata.obs["donor"] = pd.Series(list("aacbbaa"), index=adata.obs_names, dtype=dtype)
    message = r"found one cell, 'cell2', in batch 'c' \(1 such of 3 batches\)\. Merge .* or remove it: .*!= 'c'"
    with pytest.raises(ValueError, match=message):
        check_obs(adata, batch_key="donor")


NUMERIC = ["size_factor_key", "continuous_covariate_keys"]


@pytest.mark.parametrize("role", NUMERIC)
@pytest.mark.parametrize("column", ["site", "donor"])
def test_a_column_that_is_not_numeric_is_refused(role, column):
    with pytest.raises(ValueError, match=rf"adata\.obs\['{column}'\] \(`{role}`\) must be numeric; found .*to_numeric"):
        check_obs(make_obs(), **{role: ROLES[role](column)})


@pytest.mark.parametrize("role", NUMERIC)
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, None])
def test_values_that_are_not_finite_are_refused(role, value):
    adata = make_obs()
    adata.obs["depth"] = adata.obs["depth"].astype("Float64" if value is None else "float64")
    adata.obs.loc[["cell3", "cell6"], "depth"] = value
    message = rf"adata\.obs\['depth'\] \(`{role}`\) must be finite; found .* in cell 'cell3' \(2 such of 7 cells\)"
    with pytest.raises(ValueError, match=message):
        check_obs(adata, **{role: ROLES[role]("depth")})


@pytest.mark.parametrize("value", [0, -1.5])
def test_size_factors_must_be_positive(value):
    adata = make_obs()
    adata.obs.loc["cell3", "depth"] = value
    with pytest.raises(ValueError, match=rf"must be above 0; found {value} in cell 'cell3' \(1 such of 7 cells\)"):
        check_obs(adata, size_factor_key="depth")


@pytest.mark.parametrize(
    ("values", "rule"),
    [
        ([1e-30, 1, 1, 1, 1, 1, 1e30], r"must be at most 1e\+18 in size; found 1e\+30 in cell 'cell6'"),
        ([1, 1e-20, 1, 1, 1, 1, 1], "must be at least 1e-18; found 1e-20 in cell 'cell1'"),
        (
            [2, 2, 2, 2, 2, 2e7, 2],
            "must be within a factor of 1,000,000 of its median, 2; found 20000000 in cell 'cell5'",
        ),
        (
            [2, 2, 2, 2, 1e-6, 2, 2],
            "must be within a factor of 1,000,000 of its median, 2; found 1e-06 in cell 'cell4'",
        ),
    ],
)
def test_size_factors_are_of_one_order_of_magnitude(values, rule):
    adata = make_obs()
    adata.obs["depth"] = values
    with pytest.raises(ValueError, match=rf"adata\.obs\['depth'\] \(`size_factor_key`\) {rule} \(1 such of 7 cells\)"):
        check_obs(adata, size_factor_key="depth")
    adata.obs["depth"] = np.geomspace(1e-3, 1e3, N_CELLS)
    check_obs(adata, size_factor_key="depth")


def test_covariates_are_numbers_whose_variance_is_one_too():
    adata = make_obs()
    adata.obs["age"] = np.linspace(-1e300, 1e300, N_CELLS)
    with pytest.raises(
        ValueError, match=r"must be at most 1e\+18 in size; found -1e\+300 in cell 'cell0' \(6 such of 7"
    ):
        check_obs(adata, continuous_covariate_keys=["age"])


#: Values that JSON does not hold, which a saved model would not know again; and values of several kinds.
UNFIT = {
    "Interval": pd.cut(np.arange(N_CELLS) % 2, 2),
    "Period": pd.period_range("2020", periods=2, freq="M")[np.arange(N_CELLS) % 2],
    "Timestamp": pd.to_datetime(["2020-01-01", "2020-01-02"])[np.arange(N_CELLS) % 2],
    "Timedelta": pd.to_timedelta(np.arange(N_CELLS) % 2, unit="D"),
    "date": [dt.date(2020, 1, 1 + i % 2) for i in range(N_CELLS)],
    "bytes": pd.Series([b"a", b"b", b"a", b"b", b"a", b"b", b"a"], dtype=object),
    "tuple": pd.Series([("a", 1), ("b", 2)] * 3 + [("a", 1)]),
    "list": pd.Series([["a"], ["b"]] * 3 + [["a"]]),
    "complex": (np.arange(N_CELLS) % 2) + 1j,
    "int, str": pd.Series(["a", 1] * 3 + ["a"], dtype=object),
    "bool, float": pd.Series([True, 0.5] * 3 + [True], dtype=object),
}


@pytest.mark.parametrize("role", ["batch_key", "labels_key", "categorical_covariate_keys"])
@pytest.mark.parametrize("types", UNFIT)
def test_categories_that_a_model_could_not_know_again_are_refused(types, role):
    adata = make_obs()
    adata.obs["site"] = UNFIT[types].values if isinstance(UNFIT[types], pd.Series) else UNFIT[types]
    message = (
        rf"adata\.obs\['site'\] \(`{role}`\) must hold categories of one kind, text, .*, numbers, .*; found "
        rf"the types {types}\. Make them text: adata\.obs\['site'\] = adata\.obs\['site'\]\.astype\(str\)\."
    )
    with pytest.raises(ValueError, match=message):
        check_obs(adata, **{role: ROLES[role]("site")})
    adata.obs["site"] = adata.obs["site"].astype(str)
    check_obs(adata, **{role: ROLES[role]("site")})


@pytest.mark.parametrize("role", ROLES)
def test_a_name_of_several_columns_is_refused(role):
    adata = make_obs()
    adata.obs = pd.concat([adata.obs, adata.obs[["depth"]]], axis=1)
    with pytest.raises(ValueError, match=rf"`{role}` must name one column of adata\.obs; found 2 columns 'depth'"):
        check_obs(adata, **{role: ROLES[role]("depth")})


@pytest.mark.parametrize("role", ["batch_key", "labels_key", "size_factor_key"])
def test_a_list_in_place_of_a_name_is_refused(role):
    with pytest.raises(TypeError, match=rf"`{role}` must be the name of one column .* Pass 'depth'."):
        check_obs(make_obs(), **{role: ["depth"]})


@pytest.mark.parametrize("role", ["categorical_covariate_keys", "continuous_covariate_keys"])
def test_a_covariate_is_named_once(role):
    with pytest.raises(ValueError, match=rf"`{role}` must name each column once; found 'age' again\. Leave it out"):
        check_obs(make_obs(), **{role: ["age", "depth", "age"]})
    with pytest.raises(TypeError, match=rf"`{role}` must be a list of names; found 5"):
        check_obs(make_obs(), **{role: 5})


@pytest.mark.parametrize("role", ["categorical_covariate_keys", "continuous_covariate_keys"])
def test_a_string_in_place_of_a_list_of_keys_is_refused(role):
    with pytest.raises(TypeError, match=rf"`{role}` must be a list of names; found the string 'age'\. Pass \['age'\]"):
        check_obs(make_obs(), **{role: "age"})


@pytest.mark.parametrize("name", ["Unknown", "unassigned", " NA", "n/a", "?"])
@pytest.mark.parametrize("call", ["scvae", "setup_anndata"])
def test_a_label_that_sounds_like_none_is_pointed_out(name, call):
    adata = svt.datasets.simulate(40, 10, 2, random_state=0)
    adata.obs["lab"] = np.where(np.arange(40) % 4 == 0, name, adata.obs["component"].astype(str))
    calls = {
        "scvae": lambda **keys: svt.tl.scvae(adata, max_epochs=4, n_hidden=4, progress=False, **keys),
        "setup_anndata": lambda **keys: svt.SCVAE.setup_anndata(adata, **keys),
    }
    match = rf"`labels_key`: {re.escape(repr(name))} in adata\.obs\['lab'\] \(10 of 40 cells\) is taken for a label"
    with pytest.warns(UserWarning, match=match):
        calls[call](labels_key="lab")
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        calls[call](labels_key="lab", unlabeled_category=name)
        adata.obs["lab"] = adata.obs["component"].astype(str)
        calls[call](labels_key="lab")


@pytest.mark.parametrize("several", [["batch", "donor"], ("batch", "donor"), np.array(["batch", "donor"])], ids=repr)
def test_several_batches_are_refused_with_what_to_do(several):
    adata = svt.datasets.simulate(40, 8, 2, n_batches=2, random_state=0)
    adata.obs["donor"] = pd.Categorical(np.arange(40) % 3)
    before = adata.copy()
    remedy = r"adata\.obs\['batch'\]\.astype\(str\) \+ '_' \+ adata\.obs\['donor'\].*categorical_covariate_keys"
    rule = r"^`batch_key` must be the name of one column of adata\.obs; found 2: \['batch', 'donor'\]\."
    calls = {
        "scvae": lambda: svt.tl.scvae(adata, batch_key=several),
        "setup": lambda: svt.SCVAE.setup_anndata(adata, batch_key=several),
        "compare": lambda: svt.tl.compare(adata, {"n_latent": [2]}, batch_key=several),
    }
    for call in calls.values():
        with pytest.raises(TypeError, match=f"{rule}.*{remedy}"):
            call()
    assert list(adata.uns) == list(before.uns)
    with pytest.raises(TypeError, match="`labels_key` must be the name of one column"):
        svt.tl.scvae(adata, labels_key=several)
