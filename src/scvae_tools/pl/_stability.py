"""Plot of λ by epoch, beside the λ at which a product of probabilities underflows."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np

from scvae_tools._checks import checked
from scvae_tools._other_names import answers_other_names
from scvae_tools.pl._figures import ACCENT, LINE, TEXT, finish, given_axes, new_grid
from scvae_tools.pl._training import FEW_EPOCHS, history_of, stage_frame

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from anndata import AnnData
    from matplotlib.axes import Axes
    from pandas import DataFrame

#: Column of the history: title, unit and symbol.
_PANELS = {
    "rate_at_zeros": ("B, the sum of λ over a cell's zeros", "counts per cell", "B"),
    "max_rate": ("Largest λ", "counts", "λ"),
}
#: e^-x in float32: the smallest normal number is 2^-126, the smallest of all 2^-149, and half of that rounds to 0.
_INEXACT_ABOVE, _ZERO_ABOVE = 126 * math.log(2), 150 * math.log(2)
_MARGIN = 0.05  # decades between curve and limits


@answers_other_names
@checked()
def stability(
    data: AnnData | DataFrame | Any,
    *,
    key: str = "scvae",
    axes: Axes | Sequence[Axes] | np.ndarray | None = None,
    show: bool = False,
    save: str | Path | bool | None = None,
) -> np.ndarray:
    """Plot how large λ became: its sum over the zeros of a cell, and its maximum, by epoch.

    A cell's zeros contribute the product of e^−λ to its Poisson likelihood, which is e^−B with B = Σ λ over the genes
    with x = 0. Above the horizontal line, at 150 log 2 = 103.97, e^−x is 0 in float32 (from 87.34 on, the pale band, it
    has fewer digits), so that a likelihood that is multiplied up would be 0 and its logarithm −∞. The bound of this
    package adds up log-probabilities, −λ, and is finite on either side.

    Parameters
    ----------
    data
        AnnData with a result of :func:`scvae_tools.tl.scvae`, a model, or its ``history``; trained with
        ``record_rates=True``.
    key
        Key of the result, the ``key_added`` of :func:`scvae_tools.tl.scvae`. Not used for a model or a history.
    axes
        Two Axes to draw on. By default of a new figure.
    show
        Whether to show the figure.
    save
        Path of a file to write; its suffix is the format. True for one in ``scanpy.settings.figdir``, with the name of
        the plot.

    Returns
    -------
    Array of two Axes: B, the mean over at most 512 training cells, in counts per cell; and the largest λ of these cells
    and all genes, in counts. λ is that before zero inflation; both y-axes are logarithmic.

    Raises
    ------
    ValueError
        If there is no history, if it was not recorded how large λ became, or if there are not two ``axes``.
    """
    history = history_of(data, key, "stability")
    _check_recorded(history, data, key)
    axes = new_grid(len(_PANELS)) if axes is None else given_axes(axes, list(_PANELS))
    for ax, name in zip(axes, _PANELS, strict=True):
        _draw(ax, history, name)
    finish(axes[0].figure, "stability", show=show, save=save)
    return axes


def _check_recorded(history: DataFrame, data: AnnData | Any, key: str) -> None:
    missing = [name for name in _PANELS if name not in history or not np.isfinite(history[name]).any()]
    if missing:
        call = f"svt.tl.scvae(adata, key_added={key!r}, " if hasattr(data, "uns") else "model.train("
        raise ValueError(
            f"svt.pl.stability needs λ by epoch; the history of this {type(data).__name__} has {len(history)} epochs, "
            f"and none of them has {' and '.join(missing)}. Train with {call}record_rates=True)."
        )


def _draw(ax: Axes, history: DataFrame, name: str) -> None:
    """Draw one column by epoch, with a gap where it was not recorded, and where e^-x is 0."""
    title, unit, symbol = _PANELS[name]
    values = history[name].to_numpy(dtype=float)
    values = np.where(values > 0, values, np.nan)  # no place for 0 on a logarithmic axis
    marker = "o" if np.isfinite(values).sum() <= FEW_EPOCHS else None
    ax.plot(history["epoch"], values, color=LINE, label=name, lw=1.6, marker=marker, ms=3.5)
    stage_frame(ax, history, title=title, ylabel=unit)
    ax.set_yscale("log")
    decades = np.log10([_INEXACT_ABOVE, _ZERO_ABOVE, *values[np.isfinite(values)]])
    # Whole decades: their ticks have short names.
    ax.set_ylim(10 ** np.floor(decades.min() - _MARGIN), 10 ** np.ceil(decades.max() + _MARGIN))
    _mark_underflow(ax, symbol, is_named_below=_ends_above(values))


def _ends_above(values: np.ndarray) -> bool:
    """Whether the right half of the curve, over which the name of the line is, is mostly above the line."""
    right = values[len(values) // 2 :]
    right = right[np.isfinite(right)]
    return len(right) > 0 and np.median(right) > _ZERO_ABOVE


def _mark_underflow(ax: Axes, symbol: str, *, is_named_below: bool) -> None:
    """Draw the line and the band, and name the line on the side where the curve is not."""
    from matplotlib.transforms import blended_transform_factory

    ax.axhspan(_INEXACT_ABOVE, _ZERO_ABOVE, color=ACCENT, alpha=0.15, lw=0, zorder=0.5)
    ax.axhline(_ZERO_ABOVE, color=ACCENT, lw=1.2, zorder=1)
    ax.text(
        0.99,
        _INEXACT_ABOVE / 1.1 if is_named_below else _ZERO_ABOVE * 1.1,
        f"above: exp(−{symbol}) = 0 in float32",
        transform=blended_transform_factory(ax.transAxes, ax.transData),
        ha="right",
        va="top" if is_named_below else "bottom",
        fontsize=8,
        color=TEXT,
        bbox={"facecolor": "white", "edgecolor": "none", "pad": 1},
        zorder=1.5,  # above the lines of the stages, below the curve
    )
