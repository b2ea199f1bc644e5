"""Checks of arguments: whole numbers, numbers, choices, positions of cells.

NumPy numbers count as numbers; True and False do not. The error of each check names the rule and the value found.
Numbers are returned as Python's own types, so that they can be saved.
"""

from __future__ import annotations

import math
from numbers import Integral, Real
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Sequence


#: Names with a meaning of their own in h5ad and zarr files.
RESERVED_KEYS = ("_index", ".", "..")


def is_whole(value: object) -> bool:
    """Whether a value is a whole number."""
    return isinstance(value, Integral) and not isinstance(value, bool | np.bool_)


def is_number(value: object) -> bool:
    """Whether a value is a number; NaN and infinity are."""
    return isinstance(value, Real) and not isinstance(value, bool | np.bool_)


def check_whole(name: str, value: object, *, least: int = 1, or_none: bool = False, remedy: str = "") -> int | None:
    """Check a whole number of at least ``least``, or None where None is allowed, and return it.

    The error ends with the ``remedy``, if there is one.

    Raises
    ------
    ValueError
        If the value is no such number.
    """
    if value is None and or_none:
        return None
    if not is_whole(value) or value < least:
        alternative = ", or None" if or_none else ""
        rule = f"a whole number of at least {least}{alternative}"
        raise ValueError(f"`{name}` must be {rule}; found {value!r}.{f' {remedy}' if remedy else ''}")
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
) -> float:
    """Check a finite number, at least ``least``, above ``above``, at most ``most`` and below ``below``, and return it.

    Raises
    ------
    ValueError
        If the value is no such number.
    """
    is_within = is_number(value) and math.isfinite(value) and least <= value <= most and above < value < below
    if not is_within:
        limits = {"of at least": least, "above": above, "at most": most, "below": below}
        rule = " and ".join(f"{word} {limit:g}" for word, limit in limits.items() if math.isfinite(limit))
        raise ValueError(f"`{name}` must be a finite number{f' {rule}' if rule else ''}; found {value!r}.")
    return float(value)


def check_share(name: str, value: object) -> float:
    """Check a share, above 0 and up to 1, and return it.

    Raises
    ------
    ValueError
        If the value is no such share.
    """
    if not is_number(value) or not 0 < value <= 1:
        raise ValueError(f"`{name}` must be in (0, 1]; found {value!r}.")
    return float(value)


def check_choice(name: str, value: object, known: tuple[object, ...]) -> None:
    """Check that a value is one of several.

    Raises
    ------
    ValueError
        If the value is not one of ``known``; the message lists these.
    """
    if not any(value is each or (type(value) is type(each) and value == each) for each in known):
        raise ValueError(f"`{name}` must be one of {', '.join(map(repr, known))}; found {value!r}.")


def cell_positions(indices: Sequence[int] | Sequence[bool] | None, n_cells: int, name: str = "indices") -> np.ndarray:
    """Positions of chosen cells, from positions or from one boolean per cell; all cells for ``None``.

    Raises
    ------
    ValueError
        If the number of booleans is not the number of cells, or a position is outside the cells.
    """
    if indices is None:
        return np.arange(n_cells)
    chosen = np.asarray(indices)
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
