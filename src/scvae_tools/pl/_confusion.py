"""Plot of components against labels."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, NamedTuple

import numpy as np
import pandas as pd

from scvae_tools._checks import checked
from scvae_tools._keys import Keys
from scvae_tools._lazy import loaded
from scvae_tools._other_names import answers_other_names
from scvae_tools.pl._figures import (
    column_of_obs,
    finish,
    missing_result,
    new_axes,
    size_in_points,
    width_of,
    write_names,
)

if TYPE_CHECKING:
    from pathlib import Path

    from anndata import AnnData
    from matplotlib.axes import Axes
    from matplotlib.collections import QuadMesh

_UNITS = {"labels": "share of the label's cells", "components": "share of the component's cells", None: "cells"}
_FONTS = (9, 8, 7, 6)  # points of the counts: the first that has room
_DARK, _LIGHT = "0.1", "white"


@answers_other_names
@checked()
def confusion(
    adata: AnnData,
    labels_key: str,
    *,
    key: str = "scvae",
    normalize: Literal["labels", "components"] | None = "labels",
    ax: Axes | None = None,
    show: bool = False,
    save: str | Path | bool | None = None,
) -> Axes:
    """Plot how many cells each component shares with each known label.

    Components and labels are matched one to one so that as many cells as possible are on the diagonal [Kuhn55]_; the
    matched ones come first, in the order of the components. Components and labels without a match follow, in the order
    of the label or component with which they share most cells. The title has the adjusted Rand index, 1 for identical
    partitions and 0 on average for random ones [Hubert85]_.

    Parameters
    ----------
    adata
        AnnData with a result of :func:`scvae_tools.tl.scvae`, with a mixture.
    labels_key
        Column of ``adata.obs`` with known labels. Cells without one are left out, and a note says how many.
    key
        Key of the result, the ``key_added`` of :func:`scvae_tools.tl.scvae`.
    normalize
        What the colours are: ``"labels"`` for the share of each label's cells, so that columns have the sum 1;
        ``"components"`` for the share of each component's cells, so that rows have the sum 1; None for numbers of
        cells. The number of cells is written on each field, but for 0, where there is room for all.
    ax
        Axes to draw on; a colour bar is added beside. By default of a new figure, large enough for all names.
    show
        Whether to show the figure.
    save
        Path of a file to write; its suffix is the format. True for one in ``scanpy.settings.figdir``, with the name of
        the plot.

    Returns
    -------
    Axes with a row per component and a column per label, of those that have a labelled cell.

    Raises
    ------
    ValueError
        If the labels or the components are not there, if all labels are missing or are not categories, or if
        ``normalize`` is not one of the three.

    References
    ----------
    .. [Kuhn55] Kuhn (1955) The Hungarian method for the assignment problem. Naval Research Logistics Quarterly 2:83.
    .. [Hubert85] Hubert, Arabie (1985) Comparing partitions. Journal of Classification 2:193.
    """
    if normalize not in _UNITS:
        raise ValueError(f"`normalize` must be 'labels', 'components' or None; found {normalize!r}. Pass one of these.")
    table = _count(_component_of_cells(adata, key), _label_of_cells(adata, labels_key))
    ax = _new_axes_for(table.counts) if ax is None else ax
    mesh = _draw_counts(ax, table.counts, normalize)
    ax.set(xlabel=labels_key, ylabel="component")
    ax.set_title(_title(table, adata.n_obs), loc="left", fontsize=11)
    for _ in range(2):  # the names of one axis take room of the other's
        write_names(ax.xaxis, np.arange(table.counts.shape[1]), list(table.counts.columns))
        write_names(ax.yaxis, np.arange(table.counts.shape[0]), list(table.counts.index))
    _write_counts(ax, table.counts.to_numpy(), mesh)
    finish(ax.figure, "confusion", show=show, save=save)
    return ax


# -- counts ------------------------------------------------------------------------------------------------------------


class _Table(NamedTuple):
    counts: pd.DataFrame  # cells, components x labels
    rand_index: float
    left_out: int  # cells
    lacking: str  # what the cells left out lack


def _component_of_cells(adata: AnnData, key: str) -> pd.Categorical:
    component, latent = Keys(key).component, Keys(key).latent
    if component in adata.obs:
        return pd.Categorical(adata.obs[component])
    if latent in adata.obsm:
        raise ValueError(
            f"Components need a mixture; obsm[{latent!r}] is there, but obs[{component!r}] is not. "
            f"Run svt.tl.scvae(adata, mixture=True, key_added={key!r})."
        )
    raise missing_result(adata, key, f"obs[{component!r}]")


def _label_of_cells(adata: AnnData, labels_key: str) -> pd.Categorical:
    column = column_of_obs(adata, labels_key, "labels_key")
    if column.isna().all():
        raise ValueError(
            f"labels_key must name a column with a label of at least one cell; all {len(column):,} of {labels_key!r} "
            "are missing. Pass another."
        )
    if column.dtype.kind == "f" and (column.dropna() % 1 != 0).any():
        raise ValueError(
            f"labels_key must name a column with categories; {labels_key!r} holds numbers such as "
            f"{column.dropna().iloc[0]:.4g}. Pass another, or cut them into classes with pandas.cut."
        )
    return pd.Categorical(column)


def _count(component: pd.Categorical, label: pd.Categorical) -> _Table:
    """Count the labelled cells of each component, in matched order, and compare the two partitions."""
    is_known = (component.codes >= 0) & (label.codes >= 0)
    if not is_known.any():
        raise ValueError("No cell has both a component and a label. Pass another labels_key=.")
    rows, columns = component.codes[is_known].astype(np.intp), label.codes[is_known].astype(np.intp)
    shape = (len(component.categories), len(label.categories))
    counts = pd.DataFrame(
        np.bincount(rows * shape[1] + columns, minlength=shape[0] * shape[1]).reshape(shape),
        index=[str(name) for name in component.categories],
        columns=[str(name) for name in label.categories],
    )
    row_order, column_order = _matched_order(counts.to_numpy())
    return _Table(
        counts.iloc[row_order, column_order],
        loaded("sklearn.metrics").adjusted_rand_score(columns, rows),
        left_out=int((~is_known).sum()),
        lacking="label" if (component.codes >= 0).all() else "label or component",
    )


def _matched_order(counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the order of rows and of columns, without empty ones, with as many cells as possible on the diagonal."""
    from scipy.optimize import linear_sum_assignment

    rows, columns = linear_sum_assignment(counts, maximize=True)
    has_cells = counts[rows, columns] > 0
    rows, columns = rows[has_cells], columns[has_cells]
    return _with_others(rows, columns, counts), _with_others(columns, rows, counts.T)


def _with_others(matched: np.ndarray, partners: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Append the rows with cells but no partner, sorted by the place of the partner that they share most cells with."""
    others = np.setdiff1d(np.flatnonzero(counts.any(1)), matched)
    nearest = counts[np.ix_(others, partners)].argmax(1)
    return np.r_[matched, others[np.argsort(nearest, kind="stable")]]


def _title(table: _Table, n_cells: int) -> str:
    title = f"Adjusted Rand index {table.rand_index:.3f}".replace("-", "\N{MINUS SIGN}")
    if table.left_out == 0:
        return title
    return f"{title}\n{table.left_out:,} of {n_cells:,} cells left out: no {table.lacking}"


# -- drawing -----------------------------------------------------------------------------------------------------------


def _new_axes_for(counts: pd.DataFrame) -> Axes:
    """Return new Axes in which the counts have room, up to about 25 components or labels."""
    n_rows, n_columns = counts.shape
    field = max(0.08 * len(f"{counts.to_numpy().max():,}") + 0.1, 0.36)  # inches
    longest = [max(map(len, names)) for names in (counts.index, counts.columns)]
    is_turned = 0.07 * longest[1] > field
    width = 1.7 + 0.06 * longest[0] + min(field * n_columns, 11)
    panel = max(min(0.3 * n_rows, 9), 2.2)  # the colour bar has its name beside it
    height = 1.1 + (0.065 * longest[1] if is_turned else 0) + panel
    return new_axes(max(width, 4.2), height)


def _draw_counts(ax: Axes, counts: pd.DataFrame, normalize: str | None) -> QuadMesh:
    """Draw a field for each pair, the first component on top, and a colour bar."""
    values = counts.to_numpy()
    if normalize is not None:
        values = values / values.sum(0 if normalize == "labels" else 1, keepdims=True)
    n_rows, n_columns = values.shape
    mesh = ax.pcolormesh(
        np.arange(n_columns + 1) - 0.5,
        np.arange(n_rows + 1) - 0.5,
        values,
        cmap="Blues",
        vmin=0,
        vmax=values.max() if normalize is None else 1,
        edgecolors="white",
        linewidth=0.6 if max(values.shape) <= 40 else 0,
    )
    ax.set(xlim=(-0.5, n_columns - 0.5), ylim=(n_rows - 0.5, -0.5))
    ax.tick_params(length=0)
    ax.figure.colorbar(mesh, ax=ax, label=_UNITS[normalize], pad=0.02, aspect=30).outline.set_visible(False)
    return mesh


def _write_counts(ax: Axes, counts: np.ndarray, mesh: QuadMesh) -> None:
    """Write the number of cells on each field that has any, if there is room for the widest number."""
    width, height = np.array(size_in_points(ax)) / counts.shape[::-1]
    widest = f"{counts.max():,}"
    font = next((size for size in _FONTS if width_of(widest, size) <= 0.9 * width and 1.2 * size <= height), None)
    if font is None:
        return
    fields = mesh.to_rgba(mesh.get_array())
    for row, column in np.argwhere(counts > 0):
        ax.text(
            column,
            row,
            f"{counts[row, column]:,}",
            ha="center",
            va="center",
            fontsize=font,
            color=_readable_on(fields[row, column]),
        )


def _readable_on(colour: np.ndarray) -> str:
    """Return a dark or a light colour, whichever has the larger contrast.

    By the relative luminance of WCAG 2.2; contrasts with black and white are equal at 0.179.
    """
    red, green, blue = (c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in colour[:3])
    return _DARK if 0.2126 * red + 0.7152 * green + 0.0722 * blue > 0.179 else _LIGHT
