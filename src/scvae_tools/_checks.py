"""Checks of arguments: whole numbers, numbers, choices, positions of cells.

NumPy numbers count as numbers; True and False do not. The error of each check names the rule and the value found.
Numbers are returned as Python's own types, so that they can be saved. `NUMBERS` has the check of each numeric argument
of the public functions by its name, and the decorator `checked` applies them.
"""

from __future__ import annotations

import functools
import inspect
import math
import re
from collections.abc import Callable, Hashable, Mapping
from numbers import Integral, Real
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

if TYPE_CHECKING:
    from collections.abc import Sequence

#: Annotations of arguments that tables and arrays may be given for, and of the AnnData, of which `require_anndata` says
#: more.
_TAKES_ARRAYS = re.compile(
    r"^Any|^object|_empty|AnnData|Array|array|Axes|Collection|Iterable|Sequence|Series|DataFrame|list"
)
#: Check of an argument: takes its name and value, and whether None passes; returns the value to go on with.
Check = Callable[..., Any]

#: Names with a meaning of their own in h5ad and zarr files.
RESERVED_KEYS = ("_index", ".", "..")


def is_whole(value: object) -> bool:
    """Whether a value is a whole number."""
    return isinstance(value, Integral) and not isinstance(value, bool | np.bool_)


def is_number(value: object) -> bool:
    """Whether a value is a number; NaN and infinity are."""
    return isinstance(value, Real) and not isinstance(value, bool | np.bool_)


def check_whole(
    name: str, value: object, *, least: int = 1, most: int | None = None, or_none: bool = False, remedy: str = ""
) -> int | None:
    """Check a whole number from ``least`` to ``most``, or None where None is allowed, and return it.

    The error ends with the ``remedy``, if there is one.

    Raises
    ------
    ValueError
        If the value is no such number.
    """
    if value is None and or_none:
        return None
    alternative, remedy = ", or None" if or_none else "", f" {remedy}" if remedy else ""
    if not is_whole(value) or value < least:
        rule = f"a whole number of at least {least}{alternative}"
        raise ValueError(f"`{name}` must be {rule}; found {value!r}.{remedy}")
    if most is not None and value > most:
        raise ValueError(f"`{name}` must be at most {most:,}{alternative}; found {value!r}.{remedy}")
    return int(value)


def check_key(name: str, value: object, *, or_none: bool = False) -> str | None:
    """Check a key under which results are stored, or None where None is allowed, and return it.

    AnnData takes any key, but cannot write each to a file, or read it again.

    Raises
    ------
    ValueError
        If the value is no text, is empty, holds a slash or the character 0, or is a name that files use themselves.
    """
    if value is None and or_none:
        return None
    is_text = isinstance(value, str)
    if not is_text or not value.strip() or "/" in value or "\0" in value or value in RESERVED_KEYS:
        raise ValueError(
            f"`{name}` must be a text without a slash, which h5ad and zarr files can hold as a name; found {value!r}. "
            f"Pass another, such as {name}='results'."
        )
    return str(value)


def check_number(
    name: str,
    value: object,
    *,
    least: float = -math.inf,
    above: float = -math.inf,
    most: float = math.inf,
    below: float = math.inf,
    or_none: bool = False,
) -> float | None:
    """Check a finite number, at least ``least``, above ``above``, at most ``most`` and below ``below``, and return it.

    Raises
    ------
    ValueError
        If the value is no such number, nor None where None is allowed.
    """
    if value is None and or_none:
        return None
    is_within = is_number(value) and math.isfinite(value) and least <= value <= most and above < value < below
    if not is_within:
        limits = {"of at least": least, "above": above, "at most": most, "below": below}
        rule = " and ".join(f"{word} {limit:g}" for word, limit in limits.items() if math.isfinite(limit))
        rule = f"a finite number{f' {rule}' if rule else ''}{', or None' if or_none else ''}"
        raise ValueError(f"`{name}` must be {rule}; found {value!r}.")
    return float(value)


def check_share(name: str, value: object, *, or_none: bool = False) -> float | None:
    """Check a share, above 0 and up to 1, or None where None is allowed, and return it.

    Raises
    ------
    ValueError
        If the value is no such share.
    """
    if value is None and or_none:
        return None
    if not is_number(value) or not 0 < value <= 1:
        raise ValueError(f"`{name}` must be in (0, 1]{', or None' if or_none else ''}; found {value!r}.")
    return float(value)


def check_seed(name: str, value: object, *, or_none: bool = False) -> int | None:
    """Check a seed, a whole number that torch and files can hold, and return it.

    Raises
    ------
    ValueError
        If the value is no such number.
    """
    return check_whole(name, value, least=0, most=2**63 - 1, or_none=or_none)


def check_random_source(name: str, value: object, *, or_none: bool = True) -> Any:
    """Check a seed, a generator of NumPy, or None, as scanpy takes them, and return it.

    Raises
    ------
    ValueError
        If the value is none of these.
    """
    if isinstance(value, np.random.Generator | np.random.RandomState):
        return value
    if is_whole(value) or (value is None and or_none):
        return check_seed(name, value, or_none=True)
    raise ValueError(f"`{name}` must be a whole number of at least 0, a NumPy generator or None; found {value!r}.")


def as_plain(value: Any) -> Any:
    """Numbers, truth values and texts of NumPy, and arrays of them, as Python's own; also within containers."""
    if isinstance(value, np.bool_ | np.number | np.str_):
        return value.item()
    if isinstance(value, pd.Series | pd.Index):
        return list(value)
    if isinstance(value, np.ndarray):
        return value.tolist()
    if isinstance(value, list | tuple):
        return (tuple if isinstance(value, tuple) else list)(map(as_plain, value))
    if isinstance(value, Mapping):
        return {key: as_plain(each) for key, each in value.items()}
    return value


def check_numbers(name: str, values: Sequence[float]) -> np.ndarray:
    """Check that all values are numbers, and return them as an array of float64, of any shape.

    Raises
    ------
    TypeError
        If one is not.
    """
    try:
        return np.asarray(values, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise TypeError(f"`{name}` must be numbers; found {values!r}.") from error


def check_choice(name: str, value: object, known: tuple[object, ...]) -> None:
    """Check that a value is one of several.

    Raises
    ------
    ValueError
        If the value is not one of ``known``; the message lists these.
    """
    if not any(value is each or (type(value) is type(each) and value == each) for each in known):
        raise ValueError(f"`{name}` must be one of {', '.join(map(repr, known))}; found {value!r}.")


def cell_positions(
    indices: Sequence[int] | Sequence[bool] | None, n_cells: int, name: str = "indices", *, may_be_none: bool = False
) -> np.ndarray:
    """Positions of chosen cells, from positions or from one boolean per cell; all cells for ``None``.

    Raises
    ------
    ValueError
        If the number of booleans is not the number of cells, a position is outside the cells, or no cell is chosen
        although there ``may_be_none`` not.
    """
    if indices is None:
        return np.arange(n_cells)
    positions = _positions(np.asarray(indices), n_cells, name)
    if len(positions) == 0 and not may_be_none:
        raise ValueError(f"`{name}` must choose at least one cell; found none. Pass None for all cells.")
    return positions


def _positions(chosen: np.ndarray, n_cells: int, name: str) -> np.ndarray:
    if chosen.dtype == bool:
        if chosen.shape != (n_cells,):
            raise ValueError(
                f"`{name}` must have one boolean per cell, shape ({n_cells},); found shape {chosen.shape}. Make it "
                "from this AnnData, or pass positions."
            )
        return np.flatnonzero(chosen)
    if chosen.size == 0:
        return chosen.astype(int)
    if chosen.ndim != 1 or chosen.dtype.kind not in "iu":
        raise ValueError(
            f"`{name}` must list positions of cells or booleans; found {chosen.dtype} of shape {chosen.shape}. For "
            "names of cells, pass adata.obs_names.get_indexer(names)."
        )
    outside = (chosen < -n_cells) | (chosen >= n_cells)
    if outside.any():
        raise ValueError(
            f"`{name}` must be positions among {n_cells} cells; found {chosen[outside][0]}. Positions count from 0."
        )
    return np.where(chosen < 0, chosen + n_cells, chosen)


def check_is_one(value: object, argument: str) -> None:
    """Refuse several columns of ``obs`` where one is taken, with what to do in their place.

    Raises
    ------
    TypeError
        If there are several.
    """
    if isinstance(value, Hashable) and not isinstance(value, tuple):
        return
    names = list(map(str, np.ravel(list(value) if isinstance(value, set | Mapping) else value)))
    if len(names) == 1:
        raise TypeError(
            f"`{argument}` must be the name of one column of adata.obs; found it within a {type(value).__name__}. Pass "
            f"{names[0]!r}."
        )
    joined = " + '_' + ".join(f"adata.obs[{name!r}].astype(str)" for name in names)
    also = ", or pass the others as categorical_covariate_keys" if argument == "batch_key" else ""
    remedy = f"Join them, adata.obs['joined'] = {joined}, and pass 'joined'{also}." if names else "Pass None for none."
    raise TypeError(f"`{argument}` must be the name of one column of adata.obs; found {len(names)}: {names}. {remedy}")


# -- the numeric arguments of the public functions ---------------------------------------------------------------------


def whole(least: int = 1, most: int | None = None, remedy: str = "") -> Check:
    """Check of a whole number; see `check_whole`."""
    return functools.partial(check_whole, least=least, most=most, remedy=remedy)


def number(**limits: float) -> Check:
    """Check of a number; see `check_number`."""
    return functools.partial(check_number, **limits)


def made_plain(name: str, value: Any, *, or_none: bool = False) -> Any:
    """Argument of several kinds, which is checked where its kinds are told apart; see `as_plain`."""
    del or_none
    if value is pd.NA or value is pd.NaT:
        _refuse_missing(name, value)
    return as_plain(value)


def positive_or_latent(name: str, value: object, *, or_none: bool = False) -> float | str | None:
    """Number above 0, or ``"latent"``."""
    return value if isinstance(value, str) and value == "latent" else number(above=0)(name, value, or_none=or_none)


def whole_or_auto(name: str, value: object, *, or_none: bool = False) -> int | str | None:
    """Whole number of at least 1, or ``"auto"``."""
    if isinstance(value, str) and value == "auto":
        return "auto"
    return check_whole(name, value, or_none=or_none, remedy='Or pass "auto".')


#: Check of each numeric argument of the public functions by its name. None passes where the annotation has it. Sizes of
#: a model have a limit: far above what is of use, and below what would take hours, or more memory than there is.
NUMBERS: dict[str, Check] = {
    # sizes of a model and of simulated data
    "k_max": whole(least=0, most=256, remedy="Pass 0 for no categories."),
    "n_latent": whole(most=512),
    "n_layers": whole(most=100),
    **dict.fromkeys(("n_hidden", "n_components", "dropout_rate", "weights"), made_plain),
    **dict.fromkeys(("n_cells", "n_genes", "n_batches"), whole()),
    "proportions": made_plain,
    **dict.fromkeys(("separation", "gene_sd", "size_factor_sd", "batch_effect", "dispersion_sd"), number(least=0)),
    **dict.fromkeys(("median_counts", "dispersion"), number(above=0)),
    "share_changed": number(least=0, most=1),
    "zero_inflation": number(least=0, below=1),
    # training
    **dict.fromkeys(("max_epochs", "batch_size"), whole()),
    **dict.fromkeys(("n_warm_up_epochs", "patience"), whole(least=0)),
    **dict.fromkeys(("lr", "gradient_clip"), number(above=0)),  # a clip below 0 would turn the gradient round
    **dict.fromkeys(("weight_decay", "kl_weight", "kl_weight_start", "free_nats_y", "free_nats_z"), number(least=0)),
    **dict.fromkeys(("train_size", "test_size"), check_share),
    # draws and results
    **dict.fromkeys(("n_samples", "n_importance_samples", "n_samples_overall"), whole()),
    **dict.fromkeys(("n_mc_samples", "n_mc_samples_per_pass", "mc_samples", "num_cells_posterior"), whole()),
    "bytes_beside": whole(least=0),
    **dict.fromkeys(("overhead", "rna_size_factor", "dof"), number(above=0)),
    "library_size": positive_or_latent,
    "delta": number(least=0),
    "fdr_target": number(above=0, below=1),
    **dict.fromkeys(("threshold", "none_below"), check_share),
    **dict.fromkeys(("random_state", "gene_random_state"), check_seed),
    # runs of a stability of clusters
    **dict.fromkeys(("n_seeds", "n_halves"), whole(least=0, most=1000, remedy="Pass 0 for none.")),
    # trees of clusters
    "n_clusters": whole(),
    "max_overlap": number(above=0),
    "alpha": check_share,
    "max_depth": whole(least=0, most=20),
    "min_cells": whole(),
    # pictures
    "n_markers": whole(least=0),
    "n_bins": whole(remedy="Pass, for example, 10."),
    "vmax": number(above=0),
    "dimensions": made_plain,
}


def _check_text(name: str, value: object, **_: object) -> object:
    """Check that a text, or the name of a column, is no table, array or the like, with which comparisons fail."""
    if name.endswith("_key"):
        check_is_one(value, name)
    elif not isinstance(value, Hashable):
        raise TypeError(f"`{name}` must be text; found an object of the type {type(value).__name__}.")
    _refuse_missing(name, value)
    return as_plain(value)


def _check_texts(name: str, value: Any, **_: object) -> Any:
    """Check a text or several, none of which is missing; columns and arrays become lists."""
    value = as_plain(value)
    for each in value if isinstance(value, list | tuple | set | frozenset) else [value]:
        _refuse_missing(name, each)
    return value


def _refuse_missing(name: str, value: object) -> None:
    """Refuse pandas' missing values, with which comparisons fail, and NaN."""
    if value is not None and pd.api.types.is_scalar(value) and pd.isna(value):
        raise ValueError(f"`{name}` must be a value that is not missing; found {value!r}.")


def check_is_usable(name: str, value: object, kinds: str) -> None:
    """Refuse what no argument of these ``kinds``, the annotation, can be, and whose truth value is an error.

    Raises
    ------
    ValueError
        If the value is a missing one of pandas.
    TypeError
        If it is a table or array, and none is taken.
    """
    if value is pd.NA or value is pd.NaT:
        _refuse_missing(name, value)
    is_table = isinstance(value, pd.DataFrame | pd.Series | pd.Index | np.ndarray)
    if is_table and not _TAKES_ARRAYS.search(kinds):
        kinds = re.sub(r"Literal\[(.*?)\]", r"\1", kinds).replace(" | ", " or ")
        raise TypeError(f"`{name}` must be {kinds}; found a {type(value).__name__}.")


def _check_truth(name: str, value: object, *, or_none: bool) -> bool | None:
    """Check True or False, or 1 or 0."""
    if (value is None and or_none) or isinstance(value, bool):
        return value
    if isinstance(value, np.bool_) or (is_whole(value) and value in (0, 1)):
        return bool(value)
    raise ValueError(f"`{name}` must be True or False{', or None' if or_none else ''}; found {value!r}.")


#: Checks of other arguments by their annotation. Those of the rest have `check_is_usable`.
BY_KIND: dict[str, Check] = {
    **dict.fromkeys(("str", "str | None"), _check_text),
    **dict.fromkeys(("Sequence[str]", "Sequence[str] | None", "list[str] | None"), _check_texts),
    **dict.fromkeys(("str | Sequence[str]", "str | Sequence[str] | None"), _check_texts),
    **dict.fromkeys(("bool", "bool | None"), _check_truth),
}


def checked(**own: Check) -> Callable[[Callable], Callable]:
    """Decorator that checks numbers, texts and truth values given to a public function, before anything else is done.

    Numbers are checked as ``own`` says, or else `NUMBERS`; other arguments as `BY_KIND`. All are handed on as Python's
    own.
    """

    def decorate(function: Callable) -> Callable:
        signature, checks, others = inspect.signature(function), {}, {}
        for name, parameter in signature.parameters.items():
            kinds = str(parameter.annotation)
            if name in own or (name in NUMBERS and re.search(r"\b(int|float)\b", kinds)):
                checks[name] = functools.partial(own.get(name, NUMBERS.get(name)), or_none="None" in kinds)
            elif kinds in BY_KIND:
                others[name] = functools.partial(BY_KIND[kinds], or_none="None" in kinds)

        @functools.wraps(function)
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            try:
                given = signature.bind(*args, **kwargs)
            except TypeError:
                return function(*args, **kwargs)  # the message of which names the function
            for name, value in given.arguments.items():
                check = checks.get(name) or others.get(name)
                if check is not None:
                    given.arguments[name] = check(name, value)
                elif isinstance(value, np.bool_ | np.number):
                    given.arguments[name] = value.item()
                else:
                    check_is_usable(name, value, str(signature.parameters[name].annotation))
            return function(*given.args, **given.kwargs)

        wrapped.checks = checks
        return wrapped

    return decorate


def check_arguments(function: Callable, arguments: Mapping[str, Any]) -> None:
    """Check numeric arguments that a function with the decorator `checked` will be given."""
    for name, check in function.checks.items():
        if name in arguments:
            check(name, arguments[name])
