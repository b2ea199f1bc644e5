"""Names that other tools, and former versions, have for arguments and values of ours: the one table of them.

Public functions and the command line read it where they are given a name that they do not know.
"""

from __future__ import annotations

import functools
import inspect
from difflib import get_close_matches
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    Function = TypeVar("Function", bound=Callable)

_SPLIT = "the share of the cells to train on; all others are held out"
_OF_PLAN = "what scvi-tools takes there are arguments of their own, such as lr, weight_decay and n_warm_up_epochs"
_STOPPING = "a stage ends when the validation ELBO has not risen for so many epochs"
_COLUMNS = "the name of a column"
#: Our name of an argument and, if it needs saying, what to pass; by the name that it has elsewhere.
OTHER_NAMES: dict[str, tuple[str, str]] = {
    # Training: scvi-tools, the original scVAE, Keras.
    "early_stopping_patience": ("patience", ""),
    "early_stopping_monitor": ("patience", _STOPPING),
    "early_stopping_mode": ("patience", _STOPPING),
    "early_stopping_min_delta": ("patience", _STOPPING),
    "early_stopping_warmup_epochs": ("patience", f"{_STOPPING}, and never during the warm-up"),
    "validation_size": ("train_size", _SPLIT),
    "test_size": ("train_size", _SPLIT),
    "shuffle_set_split": ("validation_indices", "positions of the cells to hold out"),
    "external_indexing": ("validation_indices", "positions of the cells to hold out"),
    "datasplitter_kwargs": ("validation_indices", "positions of the cells to hold out, or train_size, their share"),
    "plan_kwargs": ("lr", _OF_PLAN),
    "trainer_kwargs": ("callbacks", "options of Lightning's trainer are arguments of their own, such as callbacks"),
    "n_epochs_kl_warmup": ("n_warm_up_epochs", ""),
    "n_steps_kl_warmup": ("n_warm_up_epochs", "in epochs"),
    "warm_up": ("n_warm_up_epochs", ""),
    "number_of_warm_up_epochs": ("n_warm_up_epochs", ""),
    "learning_rate": ("lr", ""),
    "epochs": ("max_epochs", ""),
    "n_epochs": ("max_epochs", ""),
    "number_of_epochs": ("max_epochs", ""),
    "minibatch_size": ("batch_size", ""),
    "use_gpu": ("accelerator", "'gpu', or 'auto' for one if there is any"),
    "device": ("accelerator", "'auto', 'cpu', 'gpu' or 'mps'"),
    "gradient_clip_norm": ("gradient_clip", ""),
    "ckpt_path": ("checkpoint", "a folder"),
    # What is shown.
    "verbosity": ("progress", ""),
    "silent": ("progress", "the other way round"),
    "simple_progress_bar": ("progress", ""),
    "progress_bar": ("progress", ""),
    "show_progress": ("progress", ""),
    # Models.
    "gene_likelihood": ("likelihood", ""),
    "reconstruction_distribution": ("likelihood", ""),
    "distribution": ("likelihood", ""),
    "n_clusters": ("n_components", ""),
    "n_cluster": ("n_components", ""),
    "number_of_clusters": ("n_components", ""),
    "number_of_classes": ("n_components", ""),
    "k": ("n_components", ""),
    "resolution": ("n_components", "a number, the smallest and largest such as (4, 20), or None to find it"),
    "n_dims": ("n_latent", ""),
    "n_comps": ("n_latent", ""),
    "latent_dim": ("n_latent", ""),
    "latent_size": ("n_latent", ""),
    "hidden_sizes": ("n_hidden", ""),
    "model_type": ("mixture", "True or 'gmvae', 'vade', or False for a plain VAE"),
    "covariance_type": ("covariance", ""),
    "dropout": ("dropout_rate", ""),
    "use_layer_norm": ("normalization", "'layer', 'batch' or 'none'"),
    "use_batch_norm": ("normalization", "'layer', 'batch' or 'none'"),
    "use_observed_lib_size": ("use_size_factor", ""),
    # Data.
    "seed": ("random_state", ""),
    "random_seed": ("random_state", ""),
    "use_highly_variable": ("mask_var", "'highly_variable'"),
    "layer_key": ("layer", ""),
    "library_size_key": ("size_factor_key", ""),
    "batch": ("batch_key", _COLUMNS),
    "label_key": ("labels_key", _COLUMNS),
    "cell_type_key": ("labels_key", _COLUMNS),
    "categorical_covariates": ("categorical_covariate_keys", "names of columns"),
    "continuous_covariates": ("continuous_covariate_keys", "names of columns"),
    "inplace": ("copy", "the other way round"),
    # Pictures.
    "return_fig": ("ax", "each plot returns its Axes, whose figure is ax.figure"),
    "filename": ("save", ""),
}
#: Names that are taken for ours: of former versions, and so common that an error would help nobody.
ALSO_TAKEN = {"verbose": "progress", "labels": "labels_key"}
#: Options of the original scVAE's command line that are a letter, by our name of the argument.
OTHER_LETTERS = {
    "m": "mixture",
    "r": "likelihood",
    "l": "n_latent",
    "H": "n_hidden",
    "K": "n_components",
    "w": "n_warm_up_epochs",
    "e": "max_epochs",
    "M": "batch_size",
}
#: Our names of values, by those that they have elsewhere, in lower case and with underscores.
OTHER_VALUES = {
    "likelihood": {
        "negative_binomial": "nb",
        "negativebinomial": "nb",
        "zero_inflated_poisson": "zip",
        "zero_inflated_negative_binomial": "zinb",
        "normal": "gaussian",
        "lognormal": "log_normal",
    },
}


class UnknownArgument(TypeError, ValueError):  # noqa: N818
    """Error for an argument that a function does not have: Python's own kind, and that of other wrong arguments."""


def hint_for(name: str, known: Iterable[str]) -> str:
    """Sentence that says what to pass in place of an unknown name; empty if there is nothing like it."""
    known = list(known)
    ours, what = OTHER_NAMES.get(name, ("", ""))
    if ours in known:
        return f"Here it is {ours!r}{what and f': {what}'}."
    close = get_close_matches(str(name), known)
    return f"Did you mean {' or '.join(map(repr, close))}?" if close else ""


def hint_for_value(argument: str, value: object) -> str:
    """Sentence that says what a value of an argument is called here; empty if there is nothing like it."""
    name = str(value).lower().replace("-", "_").replace(" ", "_")
    ours = OTHER_VALUES[argument].get(name)
    return "" if ours is None else f" Here {value!r} is {ours!r}."


def unknown_argument(caller: str, name: str, known: Iterable[str], takes: str = "") -> UnknownArgument:
    """Error for an argument that the function named ``caller`` does not have.

    Parameters
    ----------
    caller, name
        Names of the function and of the argument.
    known
        Names of the arguments that it has.
    takes
        What it takes, as a sentence; empty for the names that are ``known``.
    """
    known = list(known)
    sentences = [f"{caller} has no argument {name!r}.", hint_for(name, known), takes or f"It takes {', '.join(known)}."]
    return UnknownArgument(" ".join(filter(None, sentences)))


def answers_other_names(function: Function) -> Function:
    """Decorator: an argument that the function does not have gets an error with our name for it, before any work.

    Of a function that takes further keywords by ``**``, only names are refused that have another name here.
    """
    parameters = inspect.signature(function).parameters.values()
    named = [p.name for p in parameters if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD, p.POSITIONAL_ONLY)]
    takes_others = any(p.kind is p.VAR_KEYWORD for p in parameters)

    @functools.wraps(function)
    def checked(*args: object, **kwargs: object) -> object:
        for name in set(ALSO_TAKEN) & set(kwargs) - set(named):
            if ALSO_TAKEN[name] in named and ALSO_TAKEN[name] not in kwargs:
                kwargs[ALSO_TAKEN[name]] = kwargs.pop(name)
        for name in kwargs:
            has_other_name = OTHER_NAMES.get(name, ("",))[0] in named
            if name not in named and (has_other_name or not takes_others):
                caller = type(args[0]).__name__ if function.__name__ == "__init__" else function.__name__
                raise unknown_argument(caller, name, [each for each in named if each not in ("self", "cls")])
        return function(*args, **kwargs)

    return checked
