"""Stored probabilities of the components: reading, checks, and cells whose component is ambiguous."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from scvae_tools._checks import checked
from scvae_tools._keys import Keys

if TYPE_CHECKING:
    from anndata import AnnData
    from numpy.typing import ArrayLike

#: Overlap of two components, in nats per cell of the smaller one, that is too large: the number of components is found
#: so that no two overlap by as much (see ``_train/mixture_start.py``). Plots of the search show it.
LARGEST_OVERLAP = 0.1
#: Largest error of the sum over the components. Probabilities in float16 or rounded for a file still pass;
#: log-probabilities and counts do not.
LARGEST_ERROR_OF_SUM = 0.01


def component_probabilities(adata: AnnData, key: str) -> tuple[np.ndarray, list[str]]:
    """Return the probabilities of a result, (n_cells, n_components), and the components' names."""
    slot = Keys(key).probabilities
    if slot not in adata.obsm:
        raise ValueError(
            f"Probabilities of components need the result of a mixture; obsm[{slot!r}] is not among "
            f"{list(adata.obsm)}. Run svt.tl.scvae(adata, mixture=True, key_added={key!r}) first, or pass another key=."
        )
    probs = check_probabilities(adata.obsm[slot], f"adata.obsm[{slot!r}]")
    return probs, _component_names(adata, key, probs)


def _component_names(adata: AnnData, key: str, probs: np.ndarray) -> list[str]:
    """Return the category of each component, or its number where the categories do not tell.

    AnnData drops the categories that a subset does not use, and users rename them, so that their order proves nothing.
    A cut of a tree says which clusters it has.
    """
    numbers = [str(component) for component in range(probs.shape[1])]
    column = adata.obs.get(Keys(key).component)
    if not hasattr(column, "cat"):
        return numbers
    codes = column.cat.codes.to_numpy()
    is_known = codes >= 0
    categories = [str(category) for category in column.cat.categories]
    if not categories:
        return numbers
    stored = adata.uns.get(Keys(key).uns)
    clusters = list(map(str, stored.get("clusters", ()))) if isinstance(stored, Mapping) else []
    if len(clusters) == len(numbers) and set(categories) <= set(clusters):
        return clusters
    found = count_pairs(probs.argmax(1)[is_known], codes[is_known], shape=(len(numbers), len(categories)))
    names = [
        categories[counts.argmax()] if counts.any() else number for counts, number in zip(found, numbers, strict=True)
    ]
    is_one_to_one = (np.count_nonzero(found, axis=1) <= 1).all() and len(set(names)) == len(names)
    return names if is_one_to_one else numbers


def check_probabilities(probs: ArrayLike, name: str) -> np.ndarray:
    """Return probabilities as an array of floats, (n_cells, n_components)."""
    rule = f"{name} must hold the probability of each component, (n_cells, n_components), rows with the sum 1"
    remedy = "Pass, for example, adata.obsm['scvae_probs'] of svt.tl.scvae, or model.predict(soft=True)."
    probs = np.asarray(probs)
    if probs.ndim != 2 or 0 in probs.shape:
        raise ValueError(f"{rule}; found the shape {probs.shape}. {remedy}")
    if probs.dtype.kind not in "fiub":
        raise ValueError(f"{rule}; found the type {probs.dtype}. {remedy}")
    if probs.dtype.kind != "f" or probs.dtype.itemsize < 4:
        probs = probs.astype(np.float32)
    # Not `any(... > ...)`, which NaN would pass.
    is_wrong = ~((np.abs(probs.sum(1) - 1) <= LARGEST_ERROR_OF_SUM) & (probs.min(1) >= 0))
    if is_wrong.any():
        row = int(is_wrong.argmax())
        some = ", ".join(f"{value:.4g}" for value in probs[row, :6]) + (", ..." if probs.shape[1] > 6 else "")
        raise ValueError(
            f"{rule}; found {is_wrong.sum():,} of {len(probs):,} rows that are not, first row {row}: [{some}] with the "
            f"sum {probs[row].sum():.4g}. {remedy}"
        )
    return probs


def ambiguity_of_components(adata: AnnData, *, key: str = "scvae", threshold: float = 0.9) -> pd.DataFrame:
    """Count the ambiguous cells of each component, and say which other they might be.

    Parameters
    ----------
    adata, key, threshold
        As in `ambiguous_cells`.

    Returns
    -------
    One row per component that is the most probable one of any cell, indexed by its name, with columns ``n_cells``;
    ``n_ambiguous``; ``confused_with``, the component that is most often the second of its ambiguous cells (None where
    it has none); and ``n_confused``, the number of these.

    Raises
    ------
    ValueError
        As in `ambiguous_cells`.
    """
    probs, names = component_probabilities(adata, key)
    cells = ambiguous_positions(probs, threshold)
    confused = count_pairs(*two_most_probable(probs[cells]), shape=(len(names), len(names)))
    n_ambiguous = confused.sum(1)
    table = pd.DataFrame(
        {
            "n_cells": np.bincount(probs.argmax(1), minlength=len(names)),
            "n_ambiguous": n_ambiguous,
            "confused_with": np.where(n_ambiguous > 0, np.array(names, dtype=object)[confused.argmax(1)], None),
            "n_confused": confused.max(1),
        },
        index=pd.Index(names, name="component"),
    )
    return table[table["n_cells"] > 0]


@checked()
def ambiguous_positions(probs: np.ndarray, threshold: float) -> np.ndarray:
    """Return the positions of the cells whose top probability is below the threshold."""
    if probs.shape[1] == 1:  # no other component is possible
        return np.array([], dtype=int)
    return np.flatnonzero(probs.max(1) < threshold)


def two_most_probable(probs: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the most and the second most probable component of each cell, (n_cells,) each."""
    first = probs.argmax(1)
    others = probs.copy()
    others[np.arange(len(probs)), first] = -1
    return first, others.argmax(1)


def count_pairs(first: np.ndarray, second: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    """Count the cells of each pair of codes, a table of the given shape."""
    return np.bincount(np.asarray(first, dtype=np.intp) * shape[1] + second, minlength=shape[0] * shape[1]).reshape(
        shape
    )
