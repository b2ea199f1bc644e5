"""Plot of the stability of clusters."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from scvae_tools._checks import checked
from scvae_tools._other_names import answers_other_names
from scvae_tools._results.cluster_stability import (
    DISSOLVED,
    DISSOLVED_UP_TO,
    HALF,
    SEED,
    STABLE,
    STABLE_FROM,
    Stability,
)
from scvae_tools.pl._figures import (
    ABOUT_ONE,
    ACCENT,
    TEXT,
    component_colours,
    finish,
    new_axes,
    width_of,
    write_names,
)

if TYPE_CHECKING:
    from pathlib import Path

    from anndata import AnnData
    from matplotlib.axes import Axes

SIZE = 10  # points, of names where the figure is made for them
#: Of each kind of runs: marker, place within the row of a cluster, column of the table with its means, name.
KINDS = {SEED: ("o", -0.17, "jaccard_seeds", "other seeds"), HALF: ("D", 0.17, "jaccard_halves", "halves of the cells")}
HALF_OF_MEAN = 0.16  # height of the line at a mean, as a share of the row


@answers_other_names
@checked()
def cluster_stability(
    adata: AnnData,
    *,
    key: str = "scvae",
    ax: Axes | None = None,
    show: bool = False,
    save: str | Path | bool | None = None,
) -> Axes:
    """Plot how well each cluster comes back when the model is trained again.

    A cluster has a row: above, a circle for each run with another seed; below, a diamond for each half of the cells. A
    point is the Jaccard index of the cluster with the most similar one of the run, the upright line the mean of such
    points. Left of the line at 0.5 clusters are dissolved, right of that at 0.75 they are stable. Clusters that are
    dissolved by one of their means have names in red, and say so at the right.

    Parameters
    ----------
    adata
        AnnData with a result of :func:`scvae_tools.tl.cluster_stability`.
    key
        Key of the result that has the clusters, the ``key_added`` of :func:`scvae_tools.tl.scvae`.
    ax
        Axes to draw on. By default of a new figure, high enough for all clusters.
    show
        Whether to show the figure.
    save
        Path of a file to write; its suffix is the format. True for one in ``scanpy.settings.figdir``, with the name of
        the plot.

    Returns
    -------
    Axes with a row per cluster, the first one on top, in the colours of :func:`scvae_tools.pl.clusters`, with their
    numbers of cells.

    Raises
    ------
    ValueError
        If the stability of the clusters was not measured.
    """
    stability = Stability.read(adata, key)
    table = stability.table
    names = [f"{name}  ({n_cells:,})" for name, n_cells in zip(table.index, table["n_cells"], strict=True)]
    is_own = ax is None
    if ax is None:
        longest = max(width_of(name, SIZE) for name in names) / 72  # inches
        ax = new_axes(5.6 + longest, 1.9 + 0.36 * len(names))
    _draw_runs(ax, stability, component_colours(adata, key, list(map(str, table.index))))
    _finish_axes(ax, stability, names, size=SIZE if is_own else None)
    n_stable = int((table["verdict"] == STABLE).sum())
    title = f"{n_stable} of {len(table)} cluster{'s' * (len(table) != 1)} stable"
    ax.set_title(title, loc="left", fontsize=12, pad=20)
    finish(ax.figure, "cluster_stability", show=show, save=save)
    return ax


def _draw_runs(ax: Axes, stability: Stability, colours: list[str]) -> None:
    """Draw a point for each cluster and run, and a line at each mean."""
    places = np.arange(len(stability.table))
    for kind, (marker, offset, column, label) in KINDS.items():
        values, means = stability.values(kind), stability.table[column].to_numpy(dtype=float)
        if values.shape[1] == 0:
            continue
        at = np.broadcast_to((places + offset)[:, None], values.shape)
        face = np.repeat(np.array(colours, dtype=object), values.shape[1])
        is_there = np.isfinite(values).ravel()  # a half may have no cell of a cluster
        style = {"marker": marker, "s": 34, "alpha": 0.8, "edgecolors": "0.25", "linewidths": 0.5, "zorder": 3}
        ax.scatter(values.ravel()[is_there], at.ravel()[is_there], c=list(face[is_there]), clip_on=False, **style)
        ends = places + offset - HALF_OF_MEAN, places + offset + HALF_OF_MEAN
        ax.vlines(means, *ends, color="0.15", lw=2.2, zorder=4)
        ax.scatter([], [], c="0.75", label=label, **style)
    ax.plot([], [], color="0.15", lw=2.2, marker="", label="mean")


def _finish_axes(ax: Axes, stability: Stability, names: list[str], size: float | None) -> None:
    """Draw limits, names and legend; names have a size, or as many as have room are written."""
    table, places = stability.table, np.arange(len(names))
    ax.axvspan(0, DISSOLVED_UP_TO, color="0.95", lw=0, zorder=0)
    for limit in (DISSOLVED_UP_TO, STABLE_FROM):
        ax.axvline(limit, color=TEXT, lw=1, ls="--", zorder=1)
    ax.hlines(places[1:] - 0.5, 0, 1, color="0.9", lw=0.6, zorder=1)
    ax.set(xlim=ABOUT_ONE, ylim=(len(names) - 0.5, -0.5))
    ax.set_xticks([0, 0.25, DISSOLVED_UP_TO, STABLE_FROM, 1], ["0", "0.25", f"{DISSOLVED_UP_TO:g}", "0.75", "1"])
    ax.set_xlabel("Jaccard index with the most similar cluster of a run", fontsize=SIZE)
    for middle, text in ((DISSOLVED_UP_TO / 2, "dissolved"), ((STABLE_FROM + 1) / 2, "stable")):
        style = {"xycoords": ("data", "axes fraction"), "textcoords": "offset points", "ha": "center"}
        ax.annotate(text, (middle, 1), (0, 4), fontsize=SIZE - 1, color=TEXT, **style)
    # Under the panel, where no row is: before the names, which have the room that is left.
    ax.legend(loc="upper center", bbox_to_anchor=(0.5, -0.55 / _height(ax)), ncols=3, frameon=False, fontsize=SIZE - 1)
    if size is None:
        write_names(ax.yaxis, places, names)
    else:
        ax.set_yticks(places, names, fontsize=size)
    is_dissolved = (table["verdict"] == DISSOLVED).to_numpy()
    for place, label in zip(map(round, ax.get_yticks()), ax.get_yticklabels(), strict=True):
        if is_dissolved[place]:
            label.set(color=ACCENT, fontweight="bold")
            style = {"xycoords": ("axes fraction", "data"), "textcoords": "offset points", "va": "center"}
            ax.annotate(
                "dissolved", (1, place), (4, 0), fontsize=SIZE - 1, color=ACCENT, annotation_clip=False, **style
            )
    ax.tick_params(axis="y", length=0)
    ax.spines[["top", "right", "left"]].set_visible(False)


def _height(ax: Axes) -> float:
    """Height of the panel in inches, about."""
    return ax.get_window_extent().height / ax.figure.dpi
