"""Names of other tools are answered with ours, by every public function, before any work."""

from __future__ import annotations

import inspect
import pickle

import pytest

import scvae_tools as svt
from scvae_tools._other_names import (
    OTHER_LETTERS,
    OTHER_NAMES,
    UnknownArgument,
    answers_other_names,
    hint_for,
    hint_for_value,
)
from scvae_tools.likelihoods import LIKELIHOODS

PUBLIC = [getattr(module, name) for module in (svt.tl, svt.pl) for name in module.__all__]
every_function = pytest.mark.parametrize("function", PUBLIC, ids=lambda f: f"{f.__module__}.{f.__name__}")


def arguments_of(*functions):
    return {name for function in functions for name in inspect.signature(function).parameters}


def test_the_names_in_the_table_are_arguments_of_ours_and_the_others_are_not():
    ours = arguments_of(*PUBLIC, svt.SCVAE, svt.SCVAE.train, svt.SCVAE.setup_anndata) | {"callbacks"}
    assert {name for name, _ in OTHER_NAMES.values()} | set(OTHER_LETTERS.values()) <= ours


#: Arguments that have the name in the table for a reason: those of scvi-tools' own methods, and other things.
SAME_NAME = {
    "compare": {"test_size"},  # of a third part of the cells
    "cut": {"n_clusters"},  # of a tree, which are fewer or more than the components
    "differential_expression": {"silent"},
    "get_feature_correlation_matrix": {"silent"},
    "get_normalized_expression": {"silent"},
    "posterior_predictive_sample": {"silent"},
    "load": {"device"},
    "to_device": {"device"},
    "prepare_query_anndata": {"inplace"},
    "sample": {"batch"},  # a category
}


def test_one_thing_has_one_name_in_all_public_functions():
    methods = [method for name, method in inspect.getmembers(svt.SCVAE, callable) if not name.startswith("_")]
    data_sets = [getattr(svt.datasets, name) for name in svt.datasets.__all__]
    for function in [*PUBLIC, *data_sets, svt.SCVAE, *methods]:
        found = set(OTHER_NAMES) & arguments_of(function)
        assert found <= SAME_NAME.get(function.__name__, set()), function


@every_function
def test_a_public_function_answers_other_names_and_slips(function):
    own = inspect.signature(function).parameters
    with pytest.raises(UnknownArgument, match=rf"^{function.__name__} has no argument "):
        function(None, **{next((other for other, (ours, _) in OTHER_NAMES.items() if ours in own), "xyzzy"): 1})


@every_function
def test_a_public_function_can_be_pickled(function):
    assert pickle.loads(pickle.dumps(function)) is function


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: svt.SCVAE(None, gene_likelihood="nb"),
            r"^SCVAE has no .* Here it is 'likelihood'\.",
        ),
        (lambda: svt.SCVAE(None, seed=1), "Here it is 'random_state'"),
        (lambda: svt.SCVAE.setup_anndata(None, batch="b"), "Here it is 'batch_key': the name of a column"),
        (lambda: svt.SCVAE.setup_anndata(None, layr="b"), "Did you mean 'layer'"),
        (lambda: svt.tl.scvae(None, resolution=1.0), "Here it is 'n_components': a number"),
        (lambda: svt.tl.scvae(svt.datasets.poisson_toy(20), early_stopping_patience=1), "Here it is 'patience'"),
        (lambda: svt.tl.scvae(svt.datasets.poisson_toy(20), n_latnt=1), "Did you mean 'n_latent'"),
        (lambda: svt.tl.compare(svt.datasets.poisson_toy(20), {"n_clusters": [1]}), "Here it is 'n_components'"),
        (lambda: svt.tl.compare(None, {}, verbosity=0), "Here it is 'progress'"),
        (lambda: svt.pl.kl(None, return_fig=True), "Here it is 'ax': each plot returns its Axes"),
        (
            lambda: svt.pl.kl(None, colour="red"),
            r"'colour'\. It takes data, key, ax, show, save\.$",
        ),
    ],
)
def test_a_wrong_name_gets_ours(call, message):
    with pytest.raises(UnknownArgument, match=message):
        call()


def test_names_so_common_that_an_error_would_help_nobody_are_taken():
    @answers_other_names
    def function(*, progress=True, labels_key=None, **kwargs):
        return progress, labels_key, kwargs

    assert function(verbose=False, labels="type") == (False, "type", {})
    assert function(verbose=False, progress=True) == (
        True,
        None,
        {"verbose": False},
    )  # both: for the function to refuse

    @answers_other_names
    def plain(*, progress=True):
        return progress

    assert plain(verbose=False) is False
    with pytest.raises(UnknownArgument, match="no argument 'verbose'"):
        plain(verbose=False, progress=True)
    with pytest.raises(UnknownArgument, match="no argument 'labels'"):
        plain(labels="type")
    adata = svt.datasets.poisson_toy(40)
    svt.tl.scvae(adata, mixture=False, max_epochs=1, n_hidden=4, verbose=False)
    assert "X_scvae" in adata.obsm


def test_the_error_is_of_both_kinds():
    assert issubclass(UnknownArgument, TypeError)
    assert issubclass(UnknownArgument, ValueError)


def test_a_decorated_function_is_called_as_before_and_keeps_its_signature():
    @answers_other_names
    def function(a, /, *args, batch_size=1, **kwargs):
        """Docstring."""
        return a, args, batch_size, kwargs

    assert function(1, 2, batch_size=3, free=4) == (1, (2,), 3, {"free": 4})
    assert list(inspect.signature(function).parameters) == ["a", "args", "batch_size", "kwargs"]
    assert function.__doc__ == "Docstring."
    with pytest.raises(UnknownArgument, match="Here it is 'batch_size'"):
        function(1, minibatch_size=2)


def test_hints():
    assert hint_for("seed", ["random_state"]) == "Here it is 'random_state'."
    assert hint_for("seed", ["key"]) == ""
    assert hint_for("n_latnt", ["n_latent", "key"]) == "Did you mean 'n_latent'?"


@pytest.mark.parametrize("value", ["negative_binomial", "Negative-Binomial", "zero inflated poisson", "lognormal"])
def test_a_likelihood_by_another_name_gets_ours(value):
    ours = hint_for_value("likelihood", value).rpartition(" is ")[2].strip("'.")
    assert ours in LIKELIHOODS
    with pytest.raises(ValueError, match=f"found {value!r}. Here {value!r} is {ours!r}."):
        svt.likelihoods.get_likelihood(value)
