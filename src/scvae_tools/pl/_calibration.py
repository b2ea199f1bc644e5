"""Plot of the calibration of component probabilities against known labels."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from scvae_tools._checks import checked
from scvae_tools._other_names import answers_other_names
from scvae_tools._results.calibration import calibration as reliability
from scvae_tools._results.probabilities import component_probabilities
from scvae_tools.pl._figures import ACCENT, LINE, TEXT, column_of_obs, finish, new_axes

if TYPE_CHECKING:
    from pathlib import Path

    from anndata import AnnData
    from matplotlib.axes import Axes
    from pandas import DataFrame

_LARGEST_BIN, _SMALLEST_BIN = 280, 12  # points squared of the bins with the most and the fewest cells


@answers_other_names
@checked()
def calibration(
    adata: AnnData,
    labels_key: str,
    *,
    key: str = "scvae",
    n_bins: int = 10,
    pool: bool = False,
    ax: Axes | None = None,
    show: bool = False,
    save: str | Path | bool | None = None,
) -> Axes:
    """Plot how often the most probable component is right about known labels, by its probability.

    A component stands for the label that most of its cells have. On the diagonal the probabilities are the shares of
    cells that are right; below it they are too high. The area of a point is proportional to the number of its cells.
    The title has the expected calibration error, the mean over cells of the distance from the diagonal [Guo17]_.

    Parameters
    ----------
    adata
        AnnData with a result of :func:`scvae_tools.tl.scvae`, with a mixture.
    labels_key
        Column of ``adata.obs`` with known labels. Cells without one are left out.
    key
        Key of the result, the ``key_added`` of :func:`scvae_tools.tl.scvae`.
    n_bins
        Number of bins of equal width of the probability; those without cells have no point.
    pool
        Whether components that stand for one label count as one, with the sum of their probabilities.
    ax
        Axes to draw on. By default of a new figure.
    show
        Whether to show the figure.
    save
        Path of a file to write; its suffix is the format. True for one in ``scanpy.settings.figdir``, with the name of
        the plot.

    Returns
    -------
    Axes with the mean top probability of each bin and the share of its cells that are right.

    Raises
    ------
    ValueError
        If the labels or the probabilities are not there, if all labels are missing, or if ``n_bins`` is not a whole
        number of at least 1.

    References
    ----------
    .. [Guo17] Guo, Pleiss, Sun, Weinberger (2017) On calibration of modern neural networks. ICML, arXiv:1706.04599.
    """
    labels = column_of_obs(adata, labels_key, "labels_key")
    probs, _ = component_probabilities(adata, key)
    found = reliability(probs, labels, n_bins, pool=pool)
    ax = new_axes(5.6, 4.2) if ax is None else ax
    _draw_reliability(ax, found.table[found.table["n_cells"] > 0])
    error = f"{found.expected_error:.3f}" if found.expected_error >= 0.0005 else "< 0.001"
    ax.set_title(f"Expected calibration error {error}", loc="left", fontsize=11)
    finish(ax.figure, "calibration", show=show, save=save)
    return ax


def _draw_reliability(ax: Axes, table: DataFrame) -> None:
    """Draw the accuracy by confidence of the bins that have cells, and their distance from the diagonal."""
    confidence, accuracy = table["confidence"].to_numpy(), table["accuracy"].to_numpy()
    n_cells = table["n_cells"].to_numpy()
    ax.plot([0, 1], [0, 1], color=TEXT, lw=1, ls=(0, (4, 3)), label="calibrated", zorder=1)
    ax.vlines(
        confidence,
        np.minimum(confidence, accuracy),
        np.maximum(confidence, accuracy),
        color=ACCENT,
        lw=1.2,
        label="error",
    )
    ax.plot(confidence, accuracy, color=LINE, lw=1.4, zorder=2)
    area = np.maximum(_LARGEST_BIN * n_cells / n_cells.max(), _SMALLEST_BIN)
    ax.scatter(confidence, accuracy, s=area, color=LINE, alpha=0.75, edgecolor="white", linewidth=0.6, zorder=3)
    ax.set(xlabel="probability of the most probable component", ylabel="share of cells that are right")
    ax.set(xlim=(-0.06, 1.06), ylim=(-0.06, 1.06), aspect="equal")
    ax.spines[["top", "right"]].set_visible(False)
    ax.grid(color="0.92", linewidth=0.8)
    ax.set_axisbelow(True)
    _explain_areas(ax, n_cells)


def _explain_areas(ax: Axes, n_cells: np.ndarray) -> None:
    """Add a legend with the diagonal and the areas of round numbers of cells, beside the panel."""
    largest = int(n_cells.max())
    numbers = sorted({_round_down(largest / part) for part in (1, 10, 100) if largest >= part}, reverse=True)
    for number in numbers:
        area = max(_LARGEST_BIN * number / largest, _SMALLEST_BIN)
        name = f"{number:,} cell{'s' * (number != 1)}"
        ax.scatter([], [], s=area, color=LINE, alpha=0.75, edgecolor="white", linewidth=0.6, label=name)
    options = {"frameon": False, "fontsize": 9, "labelspacing": 0.9, "handletextpad": 0.8}
    ax.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), **options)


def _round_down(value: float) -> int:
    """Return the largest of 1, 2, 5, 10, 20, 50, ... that is not above the value."""
    power = 10 ** int(np.floor(np.log10(value)))
    return int(power * max(digit for digit in (1, 2, 5) if digit * power <= value))
