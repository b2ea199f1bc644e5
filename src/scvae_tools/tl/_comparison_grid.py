"""Grid of a comparison: arguments are checked, combined, and built as models before any training."""

from __future__ import annotations

import inspect
import itertools
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from scvae_tools._checks import check_arguments, check_choice, is_number
from scvae_tools._data.roles import ROLES, obs_keys_of
from scvae_tools._other_names import unknown_argument
from scvae_tools._upstream import quiet
from scvae_tools.model._scvae import SCVAE
from scvae_tools.model._trainer_options import device_of
from scvae_tools.model._training import TrainingMixin

if TYPE_CHECKING:
    from scvae_tools.tl._comparison_cells import Cells

#: Columns of obs that the models are given.
OBS_KEYS = tuple(name for name, role in ROLES.items() if role.is_input)
#: Arguments of `SCVAE.train` that `compare` itself sets.
SET_BY_COMPARE = {"train_size", "validation_indices", "progress", "record_rates"}
#: Arguments that are a number or several; `SCVAE` checks them.
ONE_OR_SEVERAL = {"n_hidden", "dropout_rate"}


def defaults_of_models() -> dict[str, Any]:
    """Arguments that a combination may set, by name, with the values they have otherwise."""
    found = dict.fromkeys(OBS_KEYS) | {"max_epochs": None}
    for function in (SCVAE.__init__, SCVAE.train):
        parameters = inspect.signature(function).parameters.values()
        found |= {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY}
    return {name: value for name, value in found.items() if name not in SET_BY_COMPARE}


def check_names(
    grid: Mapping[str, Sequence[Any]],
    named: dict[str, Any],
    others: dict[str, Any],
    defaults: dict[str, Any],
    shared: set[str],
) -> tuple[dict[str, list], dict[str, Any]]:
    """Values to combine by argument, and the arguments that are the same for all.

    Parameters
    ----------
    grid
        Values by argument, as the user gave them.
    named, others
        Arguments that are the same for all models: those that `compare` has in its signature, and its ``**kwargs``.
    defaults
        Arguments that models can differ by, with their defaults.
    shared
        Names in the signature of `compare`.
    """
    if not isinstance(grid, Mapping) or not grid:
        raise ValueError(
            "`grid` must be a dict from the names of arguments to lists of values, such as {'likelihood': ['nb', "
            f"'zinb']}}; found {grid!r}."
        )
    for name in (*grid, *others):
        _check_name(name, defaults, shared)
    # Not by `in`: an array of names has no truth value.
    given = {
        name for name, value in named.items() if not (value is None or (isinstance(value, str) and value == "auto"))
    }
    given |= set(others)
    twice = [name for name in grid if name in given]
    if twice:
        raise ValueError(
            f"An argument is either in `grid` or the same for all models; found {twice[0]!r} in both. Leave one out."
        )
    fixed = {name: value for name, value in (named | others).items() if name not in grid}
    _check_no_labels(fixed)
    return {name: _check_values(name, given) for name, given in grid.items()}, fixed


def _check_name(name: str, defaults: dict[str, Any], shared: set[str]) -> None:
    if name in defaults:
        return
    if name in shared | SET_BY_COMPARE | {"unlabeled_category"}:
        raise ValueError(
            f"{name!r} is not what models can differ by: they share cells, counts and labels, and svt.tl.compare sets "
            "the split and the progress bar. Leave it out; pass what svt.tl.compare has an argument for to it."
        )
    raise unknown_argument("compare", name, defaults, f"Models can differ by {', '.join(sorted(defaults))}.")


def _check_values(name: str, given: Sequence[Any]) -> list:
    if isinstance(given, str) or not isinstance(given, list | tuple | range | np.ndarray | pd.Index | pd.Series):
        raise ValueError(f"`grid[{name!r}]` must be a list of values; found {given!r}. Pass [{given!r}].")
    values = [value.tolist() if isinstance(value, np.generic | np.ndarray) else value for value in given]
    if not values:
        raise ValueError(f"`grid[{name!r}]` must have at least one value; found none. Leave {name!r} out.")
    written = [as_json("gmvae" if name == "mixture" and value is True else value) for value in values]
    repeated = [value for i, value in enumerate(values) if written[i] in written[:i]]
    if repeated:
        same = " (True is 'gmvae')" if name == "mixture" else ""
        raise ValueError(f"`grid[{name!r}]` must have each value once; found {repeated[0]!r} again{same}.")
    for value in values:
        _check_no_labels({name: value})
    return values


def _check_no_labels(params: dict[str, Any]) -> None:
    """Refuse arguments that train on labels."""
    for name, value in {"y_term": "cross-entropy", "weights": "labels"}.items():
        if isinstance(params.get(name), str) and params[name] == value:
            raise ValueError(
                f"{name}={value!r} trains on labels, which svt.tl.compare uses for scores alone. Choose another, or "
                "train with svt.tl.scvae(adata, labels_key=...)."
            )


def combine(values: dict[str, list], fixed: dict[str, Any]) -> list[dict[str, Any]]:
    """All arguments of each combination."""
    return [fixed | dict(zip(values, chosen, strict=True)) for chosen in itertools.product(*values.values())]


def distinct(dictionaries: Iterable[dict]) -> list[dict]:
    """Distinct dicts among several."""
    return list({as_json(each): each for each in dictionaries}.values())


def describe(combination: dict[str, Any], values: dict[str, list]) -> str:
    """Name a combination by those arguments that vary."""
    return ", ".join(f"{name}={combination[name]!r}" for name in values)


def check_combinations(
    cells: Cells, combinations: list[dict[str, Any]], values: dict[str, list], defaults: dict[str, Any]
) -> None:
    """Build every model, without data and without training it; the errors are those of `SCVAE`."""
    registries: dict[str, dict] = {}
    for combination in combinations:
        keys = obs_keys_of(combination, inputs_only=True)
        if as_json(keys) not in registries:
            cells.check_categories(keys)
            smallest = {"mixture": False, "n_latent": 1, "n_hidden": 1}
            registries[as_json(keys)] = cells.build(cells.seen, keys, smallest).registry
        try:
            _check_types(combination, defaults)
            _check_training(combination)
            _check_model(registries[as_json(keys)], combination, len(cells.train))
        except Exception as error:  # of SCVAE, and of Lightning, which has classes of its own
            raise ValueError(
                "Every combination of `grid` must be a model that can be trained; this one is not: "
                f"{describe(combination, values)}. {error}"
            ) from error


def _check_types(combination: dict[str, Any], defaults: dict[str, Any]) -> None:
    """Refuse what is no number, or neither True nor False, where the default is."""
    for name, value in combination.items():
        is_bool = isinstance(value, bool | np.bool_)
        if isinstance(defaults[name], bool) and name != "mixture" and not is_bool:
            raise ValueError(f"`{name}` must be True or False; found {value!r}.")
        if name in ONE_OR_SEVERAL and isinstance(value, Sequence | Mapping) and not isinstance(value, str):
            continue
        if isinstance(defaults[name], int | float) and not isinstance(defaults[name], bool) and not is_number(value):
            raise ValueError(f"`{name}` must be a number; found {value!r}.")


def _check_training(combination: dict[str, Any]) -> None:
    check_arguments(TrainingMixin.train, combination)
    check_choice("matmul_precision", combination["matmul_precision"], (None, "highest", "high", "medium"))
    check_choice("hold_on_device", combination["hold_on_device"], (None, True, False))
    with quiet():
        device_of(combination["accelerator"], combination["devices"])


def _check_model(registry: dict, combination: dict[str, Any], n_train: int) -> None:
    model = SCVAE(registry=registry, **options_of(SCVAE.__init__, combination))
    if (model.n_components or 1) > n_train:
        raise ValueError(
            f"`n_components` must be at most the number of training cells; found {model.n_components} components for "
            f"{n_train} cells. Pass fewer, or a larger `train_size`."
        )


def options_of(function: Callable, combination: dict[str, Any]) -> dict[str, Any]:
    """Arguments of a combination that a function has."""
    parameters = inspect.signature(function).parameters
    return {name: value for name, value in combination.items() if name in parameters}


def as_json(value: object) -> str:
    """Text that equal values have in common."""

    def plain(other: object) -> object:
        return other.tolist() if isinstance(other, np.generic | np.ndarray) else repr(other)

    return json.dumps(value, sort_keys=True, default=plain)


def as_text(value: object) -> str:
    """A value as a table shows it."""
    return value if isinstance(value, str) else repr(value)
