"""Plot of the component probabilities of every cell."""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING, Literal, NamedTuple

import numpy as np
import pandas as pd

from scvae_tools._checks import checked
from scvae_tools._other_names import answers_other_names
from scvae_tools._results.probabilities import component_probabilities
from scvae_tools.pl._figures import (
    FONT,
    categories_of,
    column_of_obs,
    component_colours,
    finish,
    new_axes,
    safe_palette,
    size_in_points,
    write_names,
)

if TYPE_CHECKING:
    from pathlib import Path

    from anndata import AnnData
    from matplotlib.axes import Axes

_MOST_COLUMNS = 1_000  # about the pixels of a figure's width
_MOST_BARS = 20  # components; beyond, colours are too alike
_LEGEND_ROWS, _MOST_IN_LEGEND = 14, 42
_LARGEST_SHARE_OF_LINES = 0.05  # of the width, for boundaries


@answers_other_names
@checked()
def probs(
    adata: AnnData,
    *,
    key: str = "scvae",
    kind: Literal["auto", "bars", "heatmap"] = "auto",
    groupby: str | None = None,
    ax: Axes | None = None,
    show: bool = False,
    save: str | Path | bool | None = None,
) -> Axes:
    """Plot q(y|x), the probability of every component, of all cells side by side.

    The cells are sorted by their most probable component, and within it from the highest probability to the lowest. A
    stretch of one colour is thus a component whose cells have a high probability; where another colour comes in, the
    cells may belong to that component as well. Of more than 1,000 cells, neighbours of one component share a column,
    which is their mean, so that a million cells are drawn as fast as a thousand.

    Parameters
    ----------
    adata
        AnnData with a result of :func:`scvae_tools.tl.scvae`, with a mixture.
    key
        Key of the result, the ``key_added`` of :func:`scvae_tools.tl.scvae`.
    kind
        ``"bars"`` stacks the probabilities of a cell in the colours of :func:`scvae_tools.pl.clusters`, its most
        probable component at the bottom. ``"heatmap"`` has a row per component. ``"auto"`` is bars where up to 20
        components have cells, and a heat map where more have.
    groupby
        Column of ``adata.obs`` with categories, such as batches or cell types, to sort the cells by first. Cells
        without one are left out.
    ax
        Axes to draw on. By default of a new figure.
    show
        Whether to show the figure.
    save
        Path of a file to write; its suffix is the format. True for one in ``scanpy.settings.figdir``, with the name of
        the plot.

    Returns
    -------
    Axes with the cells from left to right. The name of a component, or of a category of ``groupby``, is under its
    stretch, where there is room.

    Raises
    ------
    ValueError
        If there are no probabilities, if ``kind`` is not one of the three, if ``groupby`` is not a column with
        categories, or if there are bars to draw of more components than there are colours, 102.
    """
    if not isinstance(kind, str) or kind not in ("auto", "bars", "heatmap"):
        raise ValueError(f"`kind` must be 'auto', 'bars' or 'heatmap'; found {kind!r}. Pass one of these.")
    values, names = component_probabilities(adata, key)
    group, groups = _groups(adata, groupby)
    columns = _columns(values, group)
    if kind == "auto":
        kind = "bars" if len(set(columns.component)) <= _MOST_BARS else "heatmap"
    colours = _distinct_colours(adata, key, names, columns) if kind == "bars" else []
    is_new = ax is None
    if ax is None:
        ax = new_axes(8, 3) if kind == "bars" else new_axes(8, min(1.4 + 0.2 * len(names), 8))
    ax.set_xlabel(_what_cells(groupby, n_left_out=int((group < 0).sum()), n_cells=len(group)))
    by_component = groupby is None
    stretches = _stretches(columns.edges, *((columns.component, names) if by_component else (columns.group, groups)))
    if kind == "bars":
        _draw_bars(ax, columns, names, colours)
    else:
        _draw_heatmap(ax, columns, names)
    size = size_in_points(ax)
    needs_legend = kind == "bars" and not (by_component and _name_stretches(ax, stretches))
    if needs_legend:
        _add_legend(ax, [(names[i], colours[i]) for i in np.unique(columns.component)])
    if is_new:
        _resize_figure(ax, size)  # around a panel that keeps its size, however long the names are
    # Names that are in a legend or beside the rows too are written below only where they need not be turned.
    _name_stretches(ax, stretches, turn=not (by_component and (needs_legend or kind == "heatmap")))
    if is_new:
        _resize_figure(ax, size)
    n_unnamed = len(stretches.names) - len(ax.get_xticks())
    if n_unnamed and not by_component:
        ax.set_xlabel(f"{ax.get_xlabel()} (no room for {n_unnamed} of the {len(stretches.names)} names)")
    if kind == "heatmap":
        write_names(ax.yaxis, np.arange(len(names)), names)  # again, in the height that is left
    _mark_boundaries(ax, columns, "white" if kind == "bars" else "0.75")
    finish(ax.figure, "probs", show=show, save=save)
    return ax


# -- cells -> columns --------------------------------------------------------------------------------------------------


class _Columns(NamedTuple):
    edges: np.ndarray  # (n_columns + 1,), in cells
    probs: np.ndarray  # (n_columns, n_components), mean over the cells of a column
    component: np.ndarray  # (n_columns,), the most probable one of its cells
    group: np.ndarray  # (n_columns,)


def _columns(probs: np.ndarray, group: np.ndarray) -> _Columns:
    """Sort cells by group, component and probability; average neighbours of the same group and component.

    Cells of a negative group are left out.
    """
    component, top = probs.argmax(1), probs.max(1)
    order = np.lexsort((-top, component, group))
    order = order[np.searchsorted(group[order], 0) :]
    stretch = group[order] * probs.shape[1] + component[order]
    starts = np.flatnonzero(np.r_[True, stretch[1:] != stretch[:-1]])
    edges = _edges(np.r_[starts, len(order)], most_cells=-(-len(order) // _MOST_COLUMNS))
    n_cells = np.diff(edges)
    column = np.repeat(np.arange(len(n_cells)), n_cells)
    # Component by component: sorting the whole matrix would need a second one.
    sums = [np.bincount(column, weights=of_component[order]) for of_component in probs.T]
    first = order[edges[:-1]]
    return _Columns(edges, np.stack(sums, axis=1) / n_cells[:, None], component[first], group[first])


def _edges(bounds: np.ndarray, most_cells: int) -> np.ndarray:
    """Divide each stretch into columns of at most that many cells, as equal as can be."""
    edges = [
        start + np.arange(n_columns) * (end - start) // n_columns
        for start, end in pairwise(bounds)
        for n_columns in [-(-(end - start) // most_cells)]
    ]
    return np.r_[np.concatenate(edges), bounds[-1]]


def _groups(adata: AnnData, groupby: str | None) -> tuple[np.ndarray, list[str]]:
    """Return the code of each cell's category, (n_cells,), −1 where it has none, and the names of the categories."""
    if groupby is None:
        return np.zeros(adata.n_obs, dtype=np.intp), []
    column = column_of_obs(adata, groupby, "groupby")
    if not categories_of(column):
        finding = "holds no value" if column.isna().all() else f"holds numbers ({column.dtype})"
        raise ValueError(
            f"groupby must be a column of adata.obs with categories; {groupby!r} {finding}. Pass another, or make it "
            f"one: adata.obs[{groupby!r}] = adata.obs[{groupby!r}].astype(str).astype('category')."
        )
    found = pd.Categorical(column)
    if (found.codes < 0).all():
        raise ValueError(f"groupby must be a column with a category for some cell; {groupby!r} has none. Pass another.")
    return found.codes.astype(np.intp), [str(name) for name in found.categories]


def _what_cells(groupby: str | None, *, n_left_out: int, n_cells: int) -> str:
    shown = f"{n_cells - n_left_out:,} cell{'s' * (n_cells - n_left_out != 1)}"
    if groupby is None:
        return f"{shown} by most probable component"
    return f"{shown} by {groupby}" + f" ({n_left_out:,} without one left out)" * bool(n_left_out)


# -- drawing -----------------------------------------------------------------------------------------------------------


def _distinct_colours(adata: AnnData, key: str, names: list[str], columns: _Columns) -> list[str]:
    """Return the colours of `clusters`, or others where they tell nothing apart."""
    colours = component_colours(adata, key, names)
    if len(set(colours)) > 1 or len(names) == 1:
        return colours
    used = np.unique(columns.component)
    palette = safe_palette(len(used))  # users may have given several components one name
    if palette is None:
        raise ValueError(
            f"kind='bars' needs colours that tell components apart; there are 102, and {len(used)} have cells. "
            "Pass kind='heatmap'."
        )
    for component, colour in zip(used, palette, strict=True):
        colours[component] = colour
    return colours


def _draw_bars(ax: Axes, columns: _Columns, names: list[str], colours: list[str]) -> None:
    """Stack the probabilities of each column, its own component at the bottom, then the others in order."""
    is_own = columns.component[:, None] == np.arange(len(names))
    own = np.where(is_own, columns.probs, np.nan)
    top = np.nansum(own, axis=1, keepdims=True) + np.where(is_own, 0, columns.probs).cumsum(1)
    # From the top down, each from 0 and over the one above it, so that no gap is seen between neighbours.
    for component in reversed(range(len(names))):
        others = np.where(is_own[:, component], np.nan, top[:, component])
        ax.stairs(others, columns.edges, fill=True, color=colours[component])
    for component, name in enumerate(names):
        ax.stairs(own[:, component], columns.edges, fill=True, color=colours[component], label=name)
    ax.set(ylabel="probability", ylim=(0, 1), xlim=(0, columns.edges[-1]))
    ax.spines[["top", "right"]].set_visible(False)


def _draw_heatmap(ax: Axes, columns: _Columns, names: list[str]) -> None:
    """Draw a row per component, the first one on top, and a colour bar."""
    rows = np.arange(len(names) + 1) - 0.5
    image = ax.pcolormesh(columns.edges, rows, columns.probs.T, cmap="Blues", vmin=0, vmax=1, rasterized=True)
    ax.set(ylabel="component", xlim=(0, columns.edges[-1]), ylim=(len(names) - 0.5, -0.5))
    ax.figure.colorbar(image, ax=ax, label="probability", pad=0.02, aspect=30).outline.set_visible(False)
    write_names(ax.yaxis, np.arange(len(names)), names)  # their width changes the room for the names below


def _mark_boundaries(ax: Axes, columns: _Columns, colour: str) -> None:
    """Draw a line where another component begins, and a black one where another category begins."""
    is_category = np.diff(columns.group) != 0
    is_component = (np.diff(columns.component) != 0) & ~is_category
    room = _LARGEST_SHARE_OF_LINES * size_in_points(ax)[0]  # many lines must not hide the cells
    for is_boundary, name, color, width in (
        (is_component, "components", colour, 0.8),
        (is_category, "categories", "black", 1.2),
    ):
        places = columns.edges[1:-1][is_boundary]
        width = min(width, room / max(len(places), 1))
        ax.vlines(places, 0, 1, transform=ax.get_xaxis_transform(), color=color, lw=width, label=name)


class _Stretches(NamedTuple):
    middle: np.ndarray  # (n_stretches,), in cells
    n_cells: np.ndarray  # (n_stretches,)
    names: list[str]


def _stretches(edges: np.ndarray, code: np.ndarray, names: list[str]) -> _Stretches:
    """Find the runs of columns of one component, or of one category."""
    first = np.flatnonzero(np.r_[True, np.diff(code) != 0])
    bounds = edges[np.r_[first, len(code)]]
    return _Stretches((bounds[:-1] + bounds[1:]) / 2, np.diff(bounds), [names[code[i]] for i in first])


def _name_stretches(ax: Axes, stretches: _Stretches, *, turn: bool = True) -> bool:
    """Write the name of each stretch under its middle, if there is room; say whether there is for all."""
    is_complete = write_names(ax.xaxis, stretches.middle, stretches.names, lengths=stretches.n_cells, turn=turn)
    ax.tick_params(axis="x", length=0)
    return is_complete


def _resize_figure(ax: Axes, size: tuple[float, float]) -> None:
    """Resize the figure so that its panel has that size, in points."""
    change = (np.array(size) - size_in_points(ax)) / 72
    ax.figure.set_size_inches(ax.figure.get_size_inches() + change)


def _add_legend(ax: Axes, components: list[tuple[str, str]]) -> None:
    """Add the colours of the components to the right of the panel, unless they would take more room than it."""
    from matplotlib.patches import Patch

    if len(components) > _MOST_IN_LEGEND:
        return
    ax.legend(
        handles=[Patch(color=colour, label=name) for name, colour in components],
        title="component",
        alignment="left",
        loc="upper left",
        bbox_to_anchor=(1, 1.04),
        ncols=-(-len(components) // _LEGEND_ROWS),
        frameon=False,
        fontsize=FONT,
        title_fontsize=FONT + 1,
        labelspacing=0.25,
        handlelength=1,
        handleheight=1,
    )
