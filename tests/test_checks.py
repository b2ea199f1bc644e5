"""Checks of arguments: numbers of NumPy count as numbers, True and False do not, and messages say rule and finding."""

from __future__ import annotations

import inspect
from fractions import Fraction

import anndata
import numpy as np
import pytest

import scvae_tools as svt
from scvae_tools._checks import cell_positions, check_choice, check_key, check_number, check_share, check_whole

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


# -- every argument of a model and its training that is a whole number -------------------------------------------------

#: Arguments that take more than one kind of value, or whose size would cost time.
OF_MODEL = {"n_components": 2, "n_latent": 2, "n_layers": 1, "k_max": 0, "random_state": 0, "n_hidden": 4}
OF_TRAINING = {"max_epochs": 2, "batch_size": 32, "n_warm_up_epochs": 1, "n_samples": 1, "n_importance_samples": 1}


def model_of(**options):
    adata = svt.datasets.poisson_toy(40)
    svt.SCVAE.setup_anndata(adata)
    return svt.SCVAE(adata, **{"n_latent": 2, "n_hidden": 4} | options)


@pytest.mark.parametrize("name", OF_MODEL)
def test_arguments_of_a_model_may_be_numbers_of_numpy(name, tmp_path):
    model = model_of(**{name: np.int64(OF_MODEL[name])})
    model.train(2, progress=False)
    model.save(tmp_path / "model")
    assert svt.SCVAE.load(tmp_path / "model").module.n_latent == 2


@pytest.mark.parametrize("name", sorted(set(OF_MODEL) - {"random_state"}))
def test_arguments_of_a_model_are_no_truth_values(name):
    with pytest.raises(ValueError, match=f"`{name}` must be .*found True"):
        model_of(**{name: True})


@pytest.mark.parametrize("name", OF_TRAINING)
def test_arguments_of_training_may_be_numbers_of_numpy(name):
    model_of(mixture=False).train(**{"max_epochs": 2, "progress": False} | {name: np.int64(OF_TRAINING[name])})


@pytest.mark.parametrize("name", OF_TRAINING)
def test_arguments_of_training_are_no_truth_values(name):
    with pytest.raises(ValueError, match=f"`{name}` must be .*found True"):
        model_of().train(**{name: True})


def test_the_whole_numbers_among_the_arguments_are_all_here():
    for function, known in ((svt.SCVAE.__init__, OF_MODEL), (svt.SCVAE.train, OF_TRAINING)):
        whole = {
            name
            for name, parameter in inspect.signature(function).parameters.items()
            if type(parameter.default) is int or (name.startswith("n_") and parameter.default is None)
        }
        assert whole - {"patience", "random_state"} <= set(known), function


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
    needed = {"scvae": {}, "compare": {"grid": {"likelihood": ["nb"]}, "n_components": 2}}.get(name)
    needed = {"model": svt.SCVAE(_set_up(adata), mixture=False, n_hidden=4)} if needed is None else needed
    with pytest.raises(ValueError, match="`key_added` must be a text without a slash"):
        tool(adata, key_added=value, **needed)


def _set_up(adata):
    svt.SCVAE.setup_anndata(adata)
    return adata
