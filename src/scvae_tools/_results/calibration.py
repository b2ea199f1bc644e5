"""Calibration: whether the probabilities of the components are right as often as they say."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import pandas as pd

from scvae_tools._checks import checked
from scvae_tools._results.probabilities import check_probabilities, count_pairs

if TYPE_CHECKING:
    from numpy.typing import ArrayLike


class Calibration(NamedTuple):
    """A reliability table, and its summary."""

    table: pd.DataFrame  # a row per bin: lower, upper, n_cells, confidence, accuracy
    expected_error: float  # mean over cells of |accuracy − confidence| of their bin


@checked()
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
        Whether components that stand for one label count as one, with the sum of their probabilities. Without
        pooling, a cell between two parts of one type has low probabilities and is yet always right, so that the
        probabilities of a mixture that cuts types into parts look too low.

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
    probs = check_probabilities(probs, "`probs`")
    codes = _label_codes(labels, len(probs))
    is_known = codes >= 0
    if not is_known.all():
        probs, codes = probs[is_known], codes[is_known]
    first = probs.argmax(1)
    of_component = count_pairs(first, codes, shape=(probs.shape[1], codes.max() + 1))
    label = of_component.argmax(1)
    if pool:
        # A component without cells stands for no label: its probability, never the largest of a cell, is left out.
        stands_for = (of_component > 0) & (np.arange(of_component.shape[1]) == label[:, None])
        probs, label = probs @ stands_for.astype(probs.dtype), np.arange(of_component.shape[1])
        first = probs.argmax(1)
    confidence = np.minimum(probs.max(1), 1)  # rounded sums may be above 1
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
