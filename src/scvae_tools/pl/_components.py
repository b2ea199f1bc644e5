"""Plot of the search for the number of components."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np

from scvae_tools._checks import checked
from scvae_tools._keys import Keys
from scvae_tools._other_names import answers_other_names
from scvae_tools._results.probabilities import LARGEST_OVERLAP
from scvae_tools.pl._figures import ABOUT_ONE, ACCENT, LINE, PALE, TEXT, finish, missing_result, new_axes, tidy

if TYPE_CHECKING:
    from pathlib import Path

    from anndata import AnnData
    from matplotlib.axes import Axes
    from matplotlib.container import BarContainer
    from pandas import DataFrame


@answers_other_names
@checked()
def components(
    adata: AnnData,
    *,
    key: str = "scvae",
    ax: Axes | None = None,
    show: bool = False,
    save: str | Path | bool | None = None,
) -> Axes:
    """Plot why the mixture has as many components as it has.

    The line is the largest overlap of two components, by the number of components: parts of one type overlap, types do
    not. Each run takes the largest number whose overlap is below the threshold, the dashed line; the grey bars, on the
    right axis, are the shares of runs that took each number. Their median is chosen, within ``n_components`` if that is
    a range, and marked by the vertical line.

    Parameters
    ----------
    adata
        AnnData with a result of :func:`scvae_tools.tl.scvae` that found the number of components itself.
    key
        Key of the result, the ``key_added`` of :func:`scvae_tools.tl.scvae`.
    ax
        Axes to draw on; the axis of the shares is added to its figure. By default of a new figure.
    show
        Whether to show the figure.
    save
        Path of a file to write; its suffix is the format. True for one in ``scanpy.settings.figdir``, with the name of
        the plot.

    Returns
    -------
    Axes of the overlap, in nats per cell of the smaller component of the two.

    Raises
    ------
    ValueError
        If there is no result, or if the number of components was given rather than found.
    """
    curve = _component_curve(adata, key)
    ax = new_axes(5.6, 3.9) if ax is None else ax
    _draw_overlap(ax, curve)
    bars = _draw_shares(ax, curve)
    _mark_chosen(ax, curve)
    _add_legend(ax, bars)
    finish(ax.figure, "components", show=show, save=save)
    return ax


def _component_curve(adata: AnnData, key: str) -> DataFrame:
    """Return the overlap by number of components, or say why there is none."""
    result = adata.uns.get(Keys(key).uns)
    name = f"uns[{Keys(key).uns!r}]['components']['curve']"
    if not isinstance(result, Mapping):
        raise missing_result(adata, key, name)
    found = result.get("components")
    curve = None if found is None else found.get("curve")
    remedy = f"Run svt.tl.scvae(adata, n_components=None, key_added={key!r})"
    if not result.get("params", {}).get("mixture", True):
        raise ValueError(
            f"Components need a mixture; {key!r} is the result of a plain VAE, without {name}. "
            f"Run svt.tl.scvae(adata, mixture=True, key_added={key!r})."
        )
    if found is None:
        raise missing_result(adata, key, name)
    if curve is None:
        raise ValueError(
            f"svt.pl.components shows how the number of components was found; there is no {name}, since the number was "
            f"given ({found.get('n_components', 'unknown')}, by n_components= or by the labels of labels_key=). "
            f"{remedy} to have it found."
        )
    needed = ["n_components", "overlap", "share_of_runs", "chosen"]
    missing = [column for column in needed if column not in getattr(curve, "columns", ())]
    if missing or len(curve) == 0:
        finding = f"lacks the columns {missing}" if missing else "has no rows"
        raise ValueError(f"svt.pl.components needs one row per number of components; {name} {finding}. {remedy} again.")
    return curve.sort_values("n_components")


def _draw_overlap(ax: Axes, curve: DataFrame) -> None:
    """Draw the overlap by number of components, and the threshold below which a number is taken."""
    number, overlap = curve["n_components"].to_numpy(), curve["overlap"].to_numpy(dtype=float)
    ax.plot(number, overlap, color=LINE, lw=1.6, marker="o", ms=4, label="overlap")
    ax.axhline(LARGEST_OVERLAP, color=TEXT, lw=1, ls=(0, (4, 3)), label="threshold")
    # The line crosses the threshold near the number chosen: the name is put at the end where it does not.
    is_free_left = np.nanmax(overlap[: -(-len(overlap) // 3)], initial=0) < LARGEST_OVERLAP
    ax.annotate(
        f"threshold {LARGEST_OVERLAP:g}",
        xy=(0 if is_free_left else 1, LARGEST_OVERLAP),
        xycoords=("axes fraction", "data"),
        xytext=(4 if is_free_left else -4, 2),
        textcoords="offset points",
        ha="left" if is_free_left else "right",
        va="bottom",
        fontsize=8,
        color=TEXT,
    )
    ax.set_xlabel("number of components")
    ax.set_ylabel("largest overlap of two components\n(nats per cell of the smaller)")
    tidy(ax)
    highest = max(np.nanmax(overlap, initial=0), 2 * LARGEST_OVERLAP)
    ax.set(xlim=(number[0] - 0.7, number[-1] + 0.7), ylim=(ABOUT_ONE[0] * highest, ABOUT_ONE[1] * highest))
    ax.yaxis.label.set_color(LINE)


def _draw_shares(ax: Axes, curve: DataFrame) -> BarContainer:
    """Draw the shares of runs as bars behind the line, on an axis of their own; return the bars."""
    from matplotlib.ticker import PercentFormatter

    right = ax.twinx()
    bars = right.bar(curve["n_components"], curve["share_of_runs"], width=0.8, color=PALE, label="share of runs")
    right.set_ylim(*ABOUT_ONE)
    right.set_yticks([0, 0.25, 0.5, 0.75, 1])
    right.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    right.set_ylabel("share of runs", color=TEXT)
    right.tick_params(axis="y", colors=TEXT)
    right.spines[["top", "left", "right"]].set_visible(False)
    # The axis made last is drawn on top by default. With `ax` on top, its opaque patch would hide the bars.
    ax.set_zorder(right.get_zorder() + 1)
    ax.patch.set_visible(False)
    return bars


def _mark_chosen(ax: Axes, curve: DataFrame) -> None:
    """Mark the number that was chosen by a line, and name it above, where nothing else is."""
    for number in curve["n_components"][curve["chosen"].astype(bool)]:
        ax.axvline(number, color=ACCENT, lw=1.4, label="chosen", zorder=1.5)
        ax.annotate(
            f"{number} component{'s' * (number != 1)}",
            xy=(number, 1),
            xycoords=("data", "axes fraction"),
            xytext=(0, 3),
            textcoords="offset points",
            ha="center",
            va="bottom",
            fontsize=10,
            color=ACCENT,
        )


def _add_legend(ax: Axes, bars: BarContainer) -> None:
    """Add a legend below the panel, where it hides nothing."""
    handles, names = ax.get_legend_handles_labels()
    handles, names = [*handles, bars], [*names, bars.get_label()]
    place = {"loc": "upper center", "bbox_to_anchor": (0.5, -0.2), "borderaxespad": 0}
    ax.legend(handles, names, ncols=4, frameon=False, fontsize=9, columnspacing=1.4, handlelength=1.6, **place)
