"""How sure the clustering is of each cell, and whether it is right as often as it says."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import pandas as pd
from scipy.special import entr

from scvae_tools._keys import Keys

if TYPE_CHECKING:
    from anndata import AnnData
    from numpy.typing import ArrayLike

#: Probabilities in float16 or rounded for a file still pass; log-probabilities and counts do not.
LARGEST_ERROR_OF_SUM = 0.01


class Calibration(NamedTuple):
    """A reliability table, and its summary."""

    table: pd.DataFrame  # a row per bin: lower, upper, n_cells, confidence, accuracy
    expected_error: float  # mean over cells of |accuracy − confidence| of their bin


def ambiguous_cells(adata: AnnData, *, key: str = "scvae", threshold: float = 0.9) -> pd.DataFrame:
    """List the cells whose most probable component is not clearly theirs.

    Parameters
    ----------
    adata
        AnnData with a result of :func:`scvae_tools.tl.scvae`, with a mixture.
    key
        Key of the result, the ``key_added`` of :func:`scvae_tools.tl.scvae`.
    threshold
        A cell is ambiguous if the probability of its most probable component is below; above 0 and up to 1.

    Returns
    -------
    One row per ambiguous cell, the least sure first, indexed by ``adata.obs_names``, with columns

    ``first``, ``second`` : categorical
        The two most probable components, by their names in ``adata.obs[key]``.
    ``probability``, ``second_probability`` : float
        Their probabilities.
    ``entropy`` : float
        −Σ p log p over all components, in nats: 0 for a sure cell, log k for one that may be in any of k.

    Raises
    ------
    ValueError
        If the result is not there or holds no probabilities, or if ``threshold`` is not above 0 and up to 1.

    Examples
    --------
    >>> svt.tl.scvae(adata)
    >>> svt.tl.ambiguous_cells(adata).head()
    >>> adata.obs["is_ambiguous"] = adata.obs_names.isin(svt.tl.ambiguous_cells(adata).index)
    """
    probs, names = component_probabilities(adata, key)
    cells = _ambiguous_positions(probs, threshold)
    cells = cells[np.argsort(probs[cells].max(1), kind="stable")]
    first, second = _two_most_probable(probs[cells])
    each = np.arange(len(cells))
    few = probs[cells].astype(np.float64)  # only of these cells, of which there are few among a million
    return pd.DataFrame(
        {
            "first": pd.Categorical.from_codes(first, names),
            "probability": few[each, first],
            "second": pd.Categorical.from_codes(second, names),
            "second_probability": few[each, second],
            "entropy": entr(few).sum(1),
        },
        index=adata.obs_names[cells],
    )


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
    cells = _ambiguous_positions(probs, threshold)
    confused = _count_pairs(*_two_most_probable(probs[cells]), shape=(len(names), len(names)))
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


def calibration(probs: ArrayLike, labels: ArrayLike, n_bins: int = 10, *, pool: bool = False) -> Calibration:
    """Compare the probabilities of the components with how often they are right about known labels.

    Each component stands for the label that most of its cells have (those for which it is the most probable one). A
    cell is right if its most probable component stands for its own label.

    Parameters
    ----------
    probs
        Probability of each component, (n_cells, n_components).
    labels
        True labels, (n_cells,): names or codes. Cells whose label is missing (NaN, None) are left out.
    n_bins
        Number of bins of equal width of the probability from 0 to 1; each contains its upper edge.
    pool
        Whether components that stand for one label count as one, with the sum of their probabilities. Without, a cell
        between two parts of one type is unsure and yet always right, so that a mixture which cuts types into parts
        looks less confident than it could be.

    Returns
    -------
    ``table``
        One row per bin, with columns ``lower`` and ``upper``, its edges; ``n_cells``; ``confidence``, the mean top
        probability of its cells; ``accuracy``, the share of its cells that are right. NaN where it has no cells.
    ``expected_error``
        Expected calibration error [Guo17]_, Σ_b n_b / n · |accuracy_b − confidence_b|, from 0 to 1.

    Raises
    ------
    ValueError
        If ``probs`` are not probabilities, if there is not one label for each cell or none is known, or if ``n_bins``
        is not a whole number of at least 1.

    Notes
    -----
    The labels that judge the components also name them, so that with few cells per component the accuracy is somewhat
    too high. The components must be of a model that has not seen the labels.

    References
    ----------
    .. [Guo17] Guo, Pleiss, Sun, Weinberger (2017) On calibration of modern neural networks. ICML, arXiv:1706.04599.

    Examples
    --------
    >>> calibration(adata.obsm["scvae_probs"], adata.obs["cell_type"]).expected_error
    """
    if not isinstance(n_bins, int | np.integer) or isinstance(n_bins, bool) or n_bins < 1:
        raise ValueError(f"`n_bins` must be a whole number of at least 1; found {n_bins!r}. Pass, for example, 10.")
    probs = _check_probabilities(probs, "`probs`")
    codes = _label_codes(labels, len(probs))
    is_known = codes >= 0
    if not is_known.all():
        probs, codes = probs[is_known], codes[is_known]
    first = probs.argmax(1)
    of_component = _count_pairs(first, codes, shape=(probs.shape[1], codes.max() + 1))
    label = of_component.argmax(1)
    if pool:
        # A component of no cell stands for no label, and is never the largest part of a sum.
        stands_for = (of_component > 0) & (np.arange(of_component.shape[1]) == label[:, None])
        probs, label = probs @ stands_for.astype(probs.dtype), np.arange(of_component.shape[1])
        first = probs.argmax(1)
    confidence = np.minimum(probs.max(1), 1)  # rounded sums may be above
    return _reliability(confidence, label[first] == codes, n_bins)


def _reliability(confidence: np.ndarray, is_right: np.ndarray, n_bins: int) -> Calibration:
    edges = np.arange(n_bins + 1) / n_bins
    # In the type of the probabilities: 0.9 in float32 is on the edge 0.9, not below it.
    bin_of_cell = np.maximum(np.searchsorted(edges.astype(confidence.dtype), confidence, side="left") - 1, 0)
    n_cells = np.bincount(bin_of_cell, minlength=n_bins)
    with np.errstate(invalid="ignore"):  # 0 / 0 where a bin is empty
        mean_confidence = np.bincount(bin_of_cell, weights=confidence, minlength=n_bins) / n_cells
        accuracy = np.bincount(bin_of_cell, weights=is_right, minlength=n_bins) / n_cells
    gap = np.abs(accuracy - mean_confidence)
    columns = {"lower": edges[:-1], "upper": edges[1:], "n_cells": n_cells}
    table = pd.DataFrame(columns | {"confidence": mean_confidence, "accuracy": accuracy})
    return Calibration(table, float(np.nansum(n_cells * gap) / len(confidence)))


def component_probabilities(adata: AnnData, key: str) -> tuple[np.ndarray, list[str]]:
    """Return the probabilities of a result, (n_cells, n_components), and the components' names."""
    slot = Keys(key).probabilities
    if slot not in adata.obsm:
        raise ValueError(
            f"Probabilities of components need the result of a mixture; obsm[{slot!r}] is not among "
            f"{list(adata.obsm)}. Run svt.tl.scvae(adata, mixture=True, key_added={key!r}) first, or pass another key=."
        )
    probs = _check_probabilities(adata.obsm[slot], f"adata.obsm[{slot!r}]")
    return probs, _component_names(adata, key, probs)


def _component_names(adata: AnnData, key: str, probs: np.ndarray) -> list[str]:
    """Return the category of each component, or its number where the categories do not tell.

    AnnData drops the categories that a subset does not use, and users rename them, so that their order is no proof.
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
    found = _count_pairs(probs.argmax(1)[is_known], codes[is_known], shape=(len(numbers), len(categories)))
    names = [
        categories[counts.argmax()] if counts.any() else number for counts, number in zip(found, numbers, strict=True)
    ]
    is_one_to_one = (np.count_nonzero(found, axis=1) <= 1).all() and len(set(names)) == len(names)
    return names if is_one_to_one else numbers


def _ambiguous_positions(probs: np.ndarray, threshold: float) -> np.ndarray:
    """Return the positions of the cells whose top probability is below the threshold."""
    if not 0 < threshold <= 1:
        raise ValueError(f"`threshold` must be a probability above 0 and up to 1; found {threshold!r}. Pass 0.9.")
    if probs.shape[1] == 1:  # there is nothing else that a cell could be
        return np.array([], dtype=int)
    return np.flatnonzero(probs.max(1) < float(threshold))


def _two_most_probable(probs: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the most and the second most probable component of each cell, (n_cells,) each."""
    first = probs.argmax(1)
    others = probs.copy()
    others[np.arange(len(probs)), first] = -1
    return first, others.argmax(1)


def _count_pairs(first: np.ndarray, second: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    """Count the cells of each pair of codes, a table of the given shape."""
    return np.bincount(np.asarray(first, dtype=np.intp) * shape[1] + second, minlength=shape[0] * shape[1]).reshape(
        shape
    )


def _check_probabilities(probs: ArrayLike, name: str) -> np.ndarray:
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


def _label_codes(labels: ArrayLike, n_cells: int) -> np.ndarray:
    """Return labels as codes 0, 1, ..., (n_cells,); −1 where they are missing."""
    if np.shape(labels) != (n_cells,):
        raise ValueError(
            f"`labels` must hold one label for each of the {n_cells} cells of `probs`; found the shape "
            f"{np.shape(labels)}. Pass, for example, adata.obs['cell_type'] of the same cells."
        )
    codes = np.asarray(pd.Categorical(labels).codes, dtype=np.intp)
    if (codes < 0).all():
        raise ValueError(
            f"`labels` must hold a known label of at least one cell; all {n_cells} are missing. Pass another column."
        )
    return codes
