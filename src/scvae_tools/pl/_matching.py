"""Two groupings of the same cells: which groups match, and colours that are the same for these and for no others."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from scvae_tools.pl._figures import SAFE_COLOURS, categories_of

if TYPE_CHECKING:
    from collections.abc import Sequence

    from pandas import Series

#: Matrices of linear RGB: what normal vision sees, and what protanopes and deuteranopes see (Machado et al. 2009).
_VISIONS = (
    np.eye(3),
    np.array([[0.152, 1.053, -0.205], [0.115, 0.786, 0.099], [-0.004, -0.048, 1.052]]),
    np.array([[0.367, 0.861, -0.228], [0.280, 0.673, 0.047], [-0.012, 0.043, 0.969]]),
)
#: Linear RGB to OKLab, in which distances are about those that are seen (Ottosson 2020).
_TO_CONES = np.array([[0.4122, 0.5363, 0.0514], [0.2119, 0.6807, 0.1074], [0.0883, 0.2817, 0.6300]])
_TO_OKLAB = np.array([[0.2105, 0.7936, -0.0041], [1.9780, -2.4286, 0.4506], [0.0259, 0.7828, -0.8087]])
_WEIGHTS = np.array([0.5, 1, 1])  # two shades of one hue seem more alike than they are light and dark
_DARKEST, _LIGHTEST = 0.42, 0.87  # of OKLab, from 0 to 1: beyond, points are as black as text, or hardly seen on white


def colours_beside(column: Series, other: Series, of_other: Sequence[str], *, by_name: bool = False) -> list[str]:
    """Return a colour for each category of a column that is drawn beside another.

    Categories match if they share more than half the cells of each; so none has two matches. Matched ones have the same
    colour. The rest have colours that the other column has not, as unlike them and each other as can be.

    Parameters
    ----------
    column, other
        The columns of ``obs``, both with categories.
    of_other
        Colours of the categories of ``other``.
    by_name
        Whether those of the same name match, whatever cells they share.
    """
    names, other_names = categories_of(column), categories_of(other)
    if by_name:
        partner = {i: other_names.index(name) for i, name in enumerate(names) if name in other_names}
    else:
        partner = _partners(column, other, names, other_names)
    free = iter(_unlike(list(of_other), len(names) - len(partner)))
    return [of_other[partner[i]] if i in partner else next(free) for i in range(len(names))]


def _partners(column: Series, other: Series, names: list[str], other_names: list[str]) -> dict[int, int]:
    """Return the positions of the categories that match, of those of the other column by those of the one."""
    rows, columns = (
        pd.Categorical(values.astype(str).where(values.notna()), categories=categories).codes
        for values, categories in ((column, names), (other, other_names))
    )
    is_known = (rows >= 0) & (columns >= 0)
    counts = np.zeros((len(names), len(other_names)), dtype=np.int64)
    np.add.at(counts, (rows[is_known], columns[is_known]), 1)
    is_match = 2 * counts > np.maximum(counts.sum(1, keepdims=True), counts.sum(0, keepdims=True))
    return {int(i): int(j) for i, j in np.argwhere(is_match)}


def _unlike(taken: list[str], n_colours: int) -> list[str]:
    """Choose colours one by one, each as far as can be from those taken and chosen, for all kinds of vision."""
    from matplotlib.colors import to_hex, to_rgb
    from scanpy.plotting.palettes import default_20, default_102

    candidates = [*SAFE_COLOURS, *default_20, *default_102]
    lightness = _seen(np.array([to_rgb(colour) for colour in candidates]))[0, :, 0] / _WEIGHTS[0]
    candidates = [colour for colour, light in zip(candidates, lightness, strict=True) if _DARKEST < light < _LIGHTEST]
    seen = _seen(np.array([to_rgb(colour) for colour in candidates]))
    distance = np.full(len(candidates), np.inf)
    for colour in taken:
        distance = np.minimum(distance, _distance(seen, colour))
    chosen = []
    for _ in range(n_colours):
        chosen.append(to_hex(candidates[int(np.argmax(distance))]))
        distance = np.minimum(distance, _distance(seen, chosen[-1]))
    return chosen


def _distance(seen: np.ndarray, colour: str) -> np.ndarray:
    """Return the distance of a colour from others, (n,), in the kind of vision to which they are most alike."""
    from matplotlib.colors import to_rgb

    return np.linalg.norm(seen - _seen(np.array([to_rgb(colour)])), axis=-1).min(0)


def _seen(rgb: np.ndarray) -> np.ndarray:
    """Return colours (n, 3) in OKLab as each kind of vision sees them, (n_visions, n, 3)."""
    linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    seen = np.clip(np.stack([linear @ vision.T for vision in _VISIONS]), 0, 1)
    return np.cbrt(seen @ _TO_CONES.T) @ _TO_OKLAB.T * _WEIGHTS
