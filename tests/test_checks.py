"""Checks of arguments: numbers of NumPy count as numbers, True and False do not, and messages say rule and finding."""

from __future__ import annotations

import inspect
import re
from fractions import Fraction
from typing import TYPE_CHECKING, Any, Literal

import anndata
import numpy as np
import pandas as pd
import pytest

import scvae_tools as svt
from scvae_tools._checks import cell_positions, check_choice, check_key, check_number, check_share, check_whole, checked

if TYPE_CHECKING:
    from collections.abc import Sequence

WHOLE = [3, np.int64(3), np.uint8(3), np.int32(3)]
NOT_WHOLE = [0, -1, 2.0, np.float32(2), True, np.True_, "3", None, float("nan"), [3]]


@pytest.mark.parametrize("value", WHOLE, ids=repr)
def test_whole_numbers_of_any_kind_become_those_of_python(value):
    found = check_whole("n", value)
    assert type(found) is int
    assert found == 3


@pytest.mark.parametrize("value", NOT_WHOLE, ids=repr)
def test_what_is_no_whole_number_is_refused(value):
    with pytest.raises(ValueError, match="`n` must be a whole number of at least 1; found ") as caught:
        check_whole("n", value)
    assert str(caught.value).endswith(f"found {value!r}.")


def test_none_is_accepted_where_it_means_something():
    assert check_whole("n", None, or_none=True) is None
    with pytest.raises(ValueError, match="at least 2, or None; found 1"):
        check_whole("n", 1, least=2, or_none=True)


@pytest.mark.parametrize("value", [0.5, 1, np.float32(0.5), np.int8(1), Fraction(1, 2)], ids=repr)
def test_numbers_of_any_kind_become_those_of_python(value):
    assert type(check_number("x", value, above=0)) is float
    assert check_share("x", value) == float(value)


@pytest.mark.parametrize(
    ("value", "limits", "rule"),
    [
        (0, {"above": 0}, "above 0"),
        (-1e-9, {"least": 0}, "at least 0"),
        (1, {"least": 0, "below": 1}, "at least 0 and below 1"),
        (1.1, {"least": 0, "most": 1}, "at least 0 and at most 1"),
        (float("nan"), {}, "a finite number;"),
        (float("inf"), {"least": 0}, "at least 0"),
        (True, {}, "a finite number;"),
        ("1", {}, "a finite number;"),
    ],
    ids=str,
)
def test_numbers_out_of_range_are_refused_with_the_rule(value, limits, rule):
    with pytest.raises(ValueError, match=rf"`x` must be .*{rule}.*found {value!r}"):
        check_number("x", value, **limits)


@pytest.mark.parametrize("value", [0, 1.01, -1, float("nan"), True, "a"], ids=repr)
def test_shares_are_above_0_and_up_to_1(value):
    with pytest.raises(ValueError, match=rf"`x` must be in \(0, 1\]; found {value!r}"):
        check_share("x", value)


def test_choices_are_told_apart_by_their_type():
    check_choice("x", None, (None, "a"))
    check_choice("x", "a", (None, "a"))
    for value in ("b", 1, ["a"], np.ones(2), True):
        with pytest.raises(ValueError, match="`x` must be one of None, 'a', 2; found "):
            check_choice("x", value, (None, "a", 2))


@pytest.mark.parametrize("indices", [[2, 0], np.array([2, 0]), np.array([-1, 0]), [2, -3]], ids=str)
def test_positions_may_count_from_the_end(indices):
    assert cell_positions(indices, 3).tolist() == [2, 0]


# -- every numeric argument of the public functions --------------------------------------------------------------------

#: Arguments that are checked where they are read: cells, and what Lightning and scvi-tools know.
CHECKED_ELSEWHERE = {"indices", "validation_indices", "idx1", "idx2", "device", "devices"}
#: Methods of scvi-tools that a model inherits, and that mean nothing for it, or need a package that we do not.
NOT_OF_SCVAE = {"get_importance_weights", "get_latent_library_size", "setup_annbatch"}


def public_functions():
    for room in (svt.tl, svt.pl, svt.datasets, svt.metrics, svt.likelihoods, svt.SCVAE):
        names = [name for name in dir(room) if not name.startswith("_")] + ["__init__"] * (room is svt.SCVAE)
        for name in names:
            function = getattr(room, name)
            if inspect.isroutine(function) and name not in NOT_OF_SCVAE and "checks" not in function.__name__:
                yield f"{room.__name__.split('.')[-1]}.{name}", function


def numeric_arguments():
    """Each numeric argument with a value that it takes; one of several kinds, such as ``n_hidden``, is left out."""
    for place, function in public_functions():
        for name, parameter in inspect.signature(function).parameters.items():
            if re.search(r"\b(int|float)\b", str(parameter.annotation)) and name not in CHECKED_ELSEWHERE:
                yield place, function, name, parameter.default


NUMERIC = list(numeric_arguments())
OF_SEVERAL_KINDS = {"n_components", "n_hidden", "dropout_rate", "weights", "proportions", "dimensions"}
ARGUMENTS = [pytest.param(*row[1:], id=f"{row[0]}-{row[2]}") for row in NUMERIC]
SINGLE = [row for row in ARGUMENTS if row.values[1] not in OF_SEVERAL_KINDS]


def test_the_numeric_arguments_are_found():
    assert len(NUMERIC) > 110
    assert {place.split(".")[0] for place, *_ in NUMERIC} == {"tl", "pl", "datasets", "metrics", "likelihoods", "SCVAE"}


@pytest.mark.parametrize(("function", "name", "default"), ARGUMENTS)
def test_each_may_be_a_number_of_numpy_and_becomes_one_of_python(function, name, default):
    is_number = isinstance(default, int | float)
    for value in (np.asarray(default if is_number else 1)[()], np.int64(1), np.uint8(1)):
        if value == 1 and name in ("n_samples", "fdr_target", "zero_inflation"):
            continue  # some need more, or less
        found = function.checks[name](name, value)
        assert type(found) in (int, float)
        assert found == value


@pytest.mark.parametrize(("function", "name", "default"), SINGLE)
def test_each_is_checked_before_anything_else_is_done(function, name, default):
    needed = {
        parameter.name: object()
        for parameter in inspect.signature(function).parameters.values()
        if parameter.default is parameter.empty and "VAR" not in parameter.kind.name
    }
    for value in (True, np.True_, float("nan"), "3", b"3", [3], -1, 3 + 1j, object()):
        with pytest.raises(ValueError, match=f"^`{name}` must be .*; found "):
            function(**needed | {name: value})


@pytest.mark.parametrize(("function", "name", "default"), SINGLE)
def test_none_passes_where_the_signature_has_it(function, name, default):
    annotation = str(inspect.signature(function).parameters[name].annotation)
    if "None" in annotation:
        assert function.checks[name](name, None) is None
    else:
        with pytest.raises(ValueError, match=f"`{name}` must be "):
            function.checks[name](name, None)


TOO_LARGE = {
    "n_latent": 5000,
    "k_max": 10_000,
    "n_layers": 1000,
    "n_hidden": 10**9,
    "n_components": 1001,
    "random_state": 10**30,
}


@pytest.mark.parametrize("name", TOO_LARGE)
def test_sizes_with_which_a_training_would_not_end_are_refused(name):
    with pytest.raises(ValueError, match=f"`{name}` must be at most .*; found {TOO_LARGE[name]}"):
        svt.tl.scvae(svt.datasets.poisson_toy(40), **{name: TOO_LARGE[name]})


def model_of(**options):
    adata = svt.datasets.poisson_toy(40)
    svt.SCVAE.setup_anndata(adata, allow_non_integer=np.False_)
    return svt.SCVAE(adata, **{"n_latent": 2, "n_hidden": 4} | options)


@pytest.mark.parametrize("name", ["n_components", "n_hidden", "dropout_rate"])
def test_arguments_of_several_kinds_are_no_truth_values(name):
    with pytest.raises(ValueError, match=f"`{name}` must be .*found True"):
        model_of(**{name: True})


def test_a_model_of_numbers_of_numpy_is_the_same_as_one_of_numbers_of_python(tmp_path):
    of_model = {"n_latent": 2, "n_hidden": [8, 4], "n_layers": 2, "n_components": 2, "weights": [0.25, 0.75]}
    of_model |= {
        "k_max": 2,
        "random_state": 3,
        "mixture": True,
        "linear_decoder": False,
        "dropout_rate": {"input": 0.25},
    }
    of_training = {"max_epochs": 3, "batch_size": 16, "lr": 0.25, "weight_decay": 0.5, "kl_weight": 0.5, "patience": 4}
    of_training |= {"gradient_clip": 10.0, "train_size": 0.75, "n_warm_up_epochs": 1, "n_samples": 2, "random_state": 3}
    of_training |= {"early_stopping": True, "free_nats_z": 0.5}
    of_numpy = {"dropout_rate": {"input": np.float32(0.25)}}
    plain = model_of(**of_model)
    model = model_of(**{name: np.asarray(value)[()] for name, value in of_model.items()} | of_numpy)
    assert repr(model.init_params_) == repr(plain.init_params_)
    plain.train(progress=False, checkpoint=tmp_path / "training", **of_training)
    in_numpy = {
        name: np.asarray(value, dtype=np.float32 if type(value) is float else None)[()]
        for name, value in of_training.items()
    }
    model.train(progress=np.False_, checkpoint=tmp_path / "training", **in_numpy)  # takes up the result of the other
    model.save(tmp_path / "model")
    loaded = svt.SCVAE.load(tmp_path / "model", svt.datasets.poisson_toy(40))
    expected = plain.get_elbo(n_samples=2)
    assert model.get_elbo(n_samples=np.int8(2)) == expected
    assert loaded.get_elbo(n_samples=np.int64(2)) == expected
    pd.testing.assert_frame_equal(model.history, plain.history)


@pytest.mark.parametrize("n_components", [np.int64(2), np.array([1, 2]), (np.int64(1), np.int16(2)), [1, 2]], ids=repr)
def test_numbers_of_components_may_be_those_of_numpy(n_components, tmp_path):
    adata = svt.datasets.poisson_toy(40)
    options = {"n_latent": np.int64(2), "n_hidden": np.array([4]), "lr": np.float32(0.001), "progress": np.False_}
    model = svt.tl.scvae(adata, n_components=n_components, max_epochs=np.int64(2), return_model=np.True_, **options)
    model.save(tmp_path / "model")
    assert type(adata.uns["scvae"]["params"]["lr"]) is float
    adata.write_h5ad(tmp_path / "cells.h5ad")


UNUSABLE_KEYS = ["a/b", "", " ", "_index", ".", "..", "a\0b", None, 5, True, ("a",), np.array("a")]


@pytest.mark.parametrize("value", UNUSABLE_KEYS, ids=repr)
def test_keys_that_files_cannot_hold_are_refused(value):
    match = r"`key` must be a text without a slash, .* Pass another, such as key='results'"
    with pytest.raises(ValueError, match=match):
        check_key("key", value)


@pytest.mark.parametrize("value", ["scvae", "Größe 2", "a.b", "_a", np.str_("x")], ids=repr)
def test_other_keys_are_those_that_files_hold(value, tmp_path):
    assert check_key("key", value) == value
    adata = anndata.AnnData(np.ones((2, 2), dtype=np.float32), obsm={value: np.ones((2, 1))}, uns={value: {"a": 1}})
    adata.obs[str(value)] = [1, 2]
    adata.write_h5ad(tmp_path / "x.h5ad")
    read = anndata.read_h5ad(tmp_path / "x.h5ad")
    assert value in read.obs
    assert value in read.obsm
    assert value in read.uns


def test_no_key_is_none_where_that_means_something():
    assert check_key("key", None, or_none=True) is None


#: Tools that store results, with what they need beside the AnnData.
STORES = [name for name in svt.tl.__all__ if "key_added" in inspect.signature(getattr(svt.tl, name)).parameters]


@pytest.mark.parametrize("value", ["a/b", "", 5], ids=repr)
@pytest.mark.parametrize("name", STORES)
def test_every_tool_refuses_such_a_key_before_anything_else(name, value):
    assert len(STORES) >= 7
    adata, tool = svt.datasets.poisson_toy(20), getattr(svt.tl, name)
    needed = {
        "scvae": {},
        "compare": {"grid": {"likelihood": ["nb"]}, "n_components": 2},
        "cut": {"n_clusters": 2},
    }.get(name)
    needed = {"model": svt.SCVAE(_set_up(adata), mixture=False, n_hidden=4)} if needed is None else needed
    with pytest.raises(ValueError, match="`key_added` must be a text without a slash"):
        tool(adata, key_added=value, **needed)


def _set_up(adata):
    svt.SCVAE.setup_anndata(adata)
    return adata


# -- texts and truth values --------------------------------------------------------------------------------------------

#: Public functions and methods, and the arguments of these kinds that each has.
CALLABLE = [getattr(module, name) for module in (svt.tl, svt.pl) for name in module.__all__]
CALLABLE += [getattr(svt.SCVAE, name) for name in ("train", "get_normalized_expression")]
OF_KIND = [
    (function, name)
    for function in CALLABLE
    for name, parameter in inspect.signature(function).parameters.items()
    if str(parameter.annotation) in ("str", "str | None", "bool", "bool | None")
]
NEITHER = [pd.Series([1.0, 2.0]), np.array(["a", "b"]), {"a": 1}, [True], pd.NA]


@pytest.mark.parametrize("value", NEITHER, ids=lambda value: type(value).__name__)
@pytest.mark.parametrize(("function", "name"), OF_KIND, ids=lambda each: getattr(each, "__name__", str(each)))
def test_texts_and_truth_values_that_are_neither_are_refused_first(function, name, value):
    assert len(OF_KIND) > 50
    required = [each.name for each in inspect.signature(function).parameters.values() if each.default is each.empty]
    given = dict.fromkeys((each for each in required if each not in ("args", "kwargs", "trainer_options")), None)
    with pytest.raises((TypeError, ValueError), match=rf"^`{name}` must be "):
        function(**given | {name: value})


@pytest.mark.parametrize("value", [1, 0, True, np.True_, np.int8(1)], ids=repr)
def test_truth_values_may_be_1_and_0(value):
    found = []

    @checked()
    def function(*, copy: bool):
        found.append(copy)

    function(copy=value)
    assert found == [bool(value)]
    assert type(found[0]) is bool
    with pytest.raises(ValueError, match="`copy` must be True or False; found 'yes'"):
        function(copy="yes")


@pytest.mark.parametrize("genes", ["gene0", [], {}, 3], ids=repr)
def test_genes_are_a_list_of_names(genes):
    model = svt.SCVAE(_set_up(svt.datasets.poisson_toy(20)), mixture=False, n_hidden=4)
    with pytest.raises((TypeError, ValueError), match="`gene_list` must "):
        model.get_lambda(gene_list=genes)
    with pytest.raises((TypeError, ValueError), match="`gene_list` must "):
        model.get_normalized_expression(gene_list=genes)


#: Public functions and methods, with their arguments of any kind that no table or missing value can be.
ALL_METHODS = [
    getattr(svt.SCVAE, name)
    for name in ("get_elbo", "get_normalized_expression", "differential_expression", "get_feature_correlation_matrix")
]
OF_ANY_KIND = [
    (function, name)
    for function in [getattr(module, name) for module in (svt.tl, svt.pl) for name in module.__all__] + ALL_METHODS
    for name, parameter in inspect.signature(function).parameters.items()
    if parameter.kind not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD) and name not in ("self", "adata")
]


@pytest.mark.parametrize(("function", "name"), OF_ANY_KIND, ids=lambda each: getattr(each, "__name__", str(each)))
def test_a_missing_value_of_pandas_is_refused_first_for_any_argument(function, name):
    assert len(OF_ANY_KIND) > 100
    required = [each.name for each in inspect.signature(function).parameters.values() if each.default is each.empty]
    given = dict.fromkeys((each for each in required if each not in ("args", "kwargs", "trainer_options")), None)
    with pytest.raises((TypeError, ValueError), match=rf"^`{name}` must .*(NA|NAType)"):
        function(**given | {name: pd.NA})


def test_tables_are_refused_where_none_is_taken():
    taken = []

    @checked()
    def function(kind: Literal["a", "b"] | None = None, options: dict[str, Any] | None = None, values: Any = None):
        taken.append(values)

    with pytest.raises(TypeError, match=r"^`kind` must be 'a', 'b' or None; found a Series"):
        function(pd.Series(["a"]))
    with pytest.raises(TypeError, match=r"^`options` must be .*; found a Index"):
        function(options=pd.Index(["a"]))
    with pytest.raises(ValueError, match=r"^`options` must be a value that is not missing; found <NA>"):
        function(options=pd.NA)
    function(values=pd.Series(["a"]))
    assert isinstance(taken[0], pd.Series)


@pytest.mark.parametrize("values", [pd.Series(["a", "b"]), pd.Index(["a", "b"]), np.array(["a", "b"])], ids=repr)
def test_names_may_come_in_a_column_or_an_array(values):
    taken = []

    @checked()
    def function(names: str | Sequence[str] | None = None):
        taken.append(names)

    function(values)
    assert taken == [["a", "b"]]
    with pytest.raises(ValueError, match=r"^`names` must be a value that is not missing; found <NA>"):
        function(["a", pd.NA])
