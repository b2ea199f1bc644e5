"""Plot of true and reconstructed λ of genes."""

from __future__ import annotations

from difflib import get_close_matches
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pandas as pd

from scvae_tools._checks import checked
from scvae_tools._messages import listed
from scvae_tools._other_names import answers_other_names
from scvae_tools.pl._figures import LINE, TEXT, component_colours, finish, new_axes, size_in_points, width_of
from scvae_tools.pl._genes import ROWS, gene_positions, layer_of_counts, rate_layer, refuse_genes_left_out

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from anndata import AnnData
    from matplotlib.axes import Axes
    from matplotlib.ticker import LogFormatter
    from numpy.typing import ArrayLike

_MOST_BARS = 40  # genes; beyond, points of one against the other
_MOST_GROUPS = 20  # in a legend
_TRUE_COLOUR = "0.72"
_LARGEST_POINT = 28  # points squared
_BLOCK = 2**22  # values of a layer on disk in memory at once


class _Truth(NamedTuple):
    """Rates that λ is compared with, and their name."""

    name: str
    values: list[np.ndarray]  # of each group, (n_genes,)


@answers_other_names
@checked()
def lambda_bars(
    adata: AnnData,
    true: str | ArrayLike | None = None,
    *,
    key: str = "scvae",
    groupby: str | None = None,
    group: str | None = None,
    genes: str | Sequence[str] | None = None,
    layer: str | None = None,
    ax: Axes | None = None,
    show: bool = False,
    save: str | Path | bool | None = None,
) -> Axes:
    """Plot the reconstructed λ of genes beside the true one, or beside the mean count where the truth is not known.

    The reconstructed λ of a gene is the mean over the cells of ``adata.layers[f"{key}_lambda"]``, in counts per cell.
    Up to 40 genes have a pair of bars each. More genes, or those of several groups, are points of reconstructed against
    true λ on logarithmic axes, with the diagonal, on which both are the same; genes for which one of the two is 0 have
    no place there, and their number is written into the panel.

    The mean of λ over all cells is fitted well by any model that is trained at all. Whether the model tells cells apart
    is seen within groups.

    Parameters
    ----------
    adata
        AnnData with a result of :func:`scvae_tools.tl.scvae` and its layer of λ. Layers on disk are read in parts.
    true
        The true rates, in counts per cell: a column of ``adata.var``; a layer, (n_cells, n_genes), of which the mean
        over the cells is taken, as of λ; or an array, (n_genes,). By default those of :mod:`scvae_tools.datasets`,
        ``adata.var["lambda"]``, or ``adata.varm["lambda"]`` with a column for each component in
        ``adata.obs["component"]``; where there are none the mean count.
    key
        Key of the result, the ``key_added`` of :func:`scvae_tools.tl.scvae`.
    groupby
        Column of ``adata.obs``; the means are those over the cells of each group. A column of ``adata.var`` or an array
        is the truth in all of them.
    group
        The one group of ``groupby`` to draw. By default all are drawn, as points of their colours; more than 20, which
        no legend could tell apart, in one colour.
    genes
        Names of the genes to draw, in this order. By default all that the model has.
    layer
        Layer with the counts, for the mean count. By default the one that the model was trained on, ``adata.X`` or a
        layer.
    ax
        Axes to draw on. By default of a new figure, wide enough for all bars.
    show
        Whether to show the figure.
    save
        Path of a file to write; its suffix is the format. True for one in ``scanpy.settings.figdir``, with the name of
        the plot.

    Returns
    -------
    Axes in counts per cell.

    Raises
    ------
    ValueError
        If the layer of λ, a gene, the truth, the column or the group are not in ``adata``, or if ``mask_var`` left a
        gene in ``genes`` out of the model.

    Examples
    --------
    >>> adata = svt.datasets.poisson_toy()
    >>> svt.tl.scvae(adata, likelihood="poisson", mixture=False)
    >>> svt.pl.lambda_bars(adata)
    """
    rate = rate_layer(adata, key)
    groups = _groups(adata, groupby, group)
    positions = np.arange(adata.n_vars) if genes is None else gene_positions(adata, genes)
    reconstructed = _means(adata, rate, groups, positions)
    is_left_out = np.all([np.isnan(values) for values in reconstructed], axis=0)
    if genes is not None or is_left_out.all():
        refuse_genes_left_out(adata, positions, is_left_out, rate)
    positions, reconstructed = positions[~is_left_out], [values[~is_left_out] for values in reconstructed]
    truth = _truth(adata, true, key, layer, groups, positions)
    names = [str(name) for name in adata.var_names[positions]]
    if len(groups) == 1 and len(names) <= _MOST_BARS:
        ax = new_axes(max(4.2, min(1.6 + 0.42 * len(names), 3.4 + 0.25 * len(names))), 3.6) if ax is None else ax
        _draw_bars(ax, names, truth.name, truth.values[0], reconstructed[0])
    else:
        is_named = 1 < len(groups) <= _MOST_GROUPS
        ax = new_axes(4.6 + is_named * (0.6 + 0.08 * max(map(len, groups))), 4.4) if ax is None else ax
        colours = component_colours(adata, groupby, list(groups)) if is_named else [LINE] * len(groups)
        _draw_points(ax, dict(zip(groups, colours, strict=True)), truth.name, truth.values, reconstructed)
        if is_named:
            _name_groups(ax, groupby)
        elif len(groups) > 1:
            ax.set_title(f"{len(groups):,} groups of {groupby}", loc="left", fontsize=11)
    if group is not None:
        above_legend = 6 if ax.get_legend() is None else 26  # points
        ax.set_title(f"{groupby}: {group}", loc="left", fontsize=11, pad=above_legend)
    finish(ax.figure, "lambda_bars", show=show, save=save)
    return ax


# -- what there is to draw ---------------------------------------------------------------------------------------------


def _groups(adata: AnnData, groupby: str | None, group: str | None) -> dict[str, np.ndarray]:
    """Return which cells each group has, (n_cells,) bool; one group without a name for all cells."""
    if groupby is None:
        if group is not None:
            raise ValueError(
                f"`group` must be one of the groups of `groupby`; found {group!r} alone. Pass groupby= too."
            )
        return {"": np.ones(adata.n_obs, dtype=bool)}
    if groupby not in adata.obs:
        close = get_close_matches(str(groupby), [str(name) for name in adata.obs], n=1)
        remedy = f"Did you mean {close[0]!r}?" if close else f"Pass one of {listed(adata.obs)}."
        raise ValueError(f"`groupby` must be a column of adata.obs; found {groupby!r}, which is not one. {remedy}")
    column = adata.obs[groupby].astype("category")
    names = [str(name) for name in column.cat.categories]
    cells = {name: column.cat.codes.to_numpy() == code for code, name in enumerate(names)}
    cells = {name: is_in for name, is_in in cells.items() if is_in.any()}
    if group is None:
        return cells
    if str(group) not in cells:
        raise ValueError(
            f"`group` must be a group of adata.obs[{groupby!r}] that has cells; found {group!r}. "
            f"Pass one of {listed(cells)}."
        )
    return {str(group): cells[str(group)]}


def _truth(
    adata: AnnData,
    true: str | ArrayLike | None,
    key: str,
    layer: str | None,
    groups: dict[str, np.ndarray],
    positions: np.ndarray,
) -> _Truth:
    """Return the true rates of each group, and their name."""
    if true is None:
        return _known_truth(adata, groups, positions) or _mean_counts(adata, key, layer, groups, positions)
    if isinstance(true, str) and true not in adata.var and true in adata.layers:
        return _Truth("true λ", _means(adata, true, groups, positions))
    rates = _rates_of_genes(adata, true)[positions]
    return _Truth("true λ", [rates] * len(groups))


def _rates_of_genes(adata: AnnData, true: str | ArrayLike) -> np.ndarray:
    """Return the rates of all genes, (n_genes,), from a column of ``var`` or an array."""
    if isinstance(true, str) and true not in adata.var:
        layers = [name for name in adata.layers if name is not None]
        raise ValueError(
            f"`true` must be a column of adata.var or a layer; found {true!r}, and the columns {listed(adata.var)} and "
            f"layers {listed(layers)}. Pass one of those, an array (n_genes,), or None for the mean count."
        )
    name = f"adata.var[{true!r}]" if isinstance(true, str) else "`true`"
    values = adata.var[true] if isinstance(true, str) else true
    values = values.to_numpy() if isinstance(values, pd.Series) else np.asarray(values)
    if values.shape != (adata.n_vars,) or values.dtype.kind not in "iuf":
        raise ValueError(
            f"{name} must hold a number for each of the {adata.n_vars:,} genes; found {values.dtype} of shape "
            f"{values.shape}. Pass the rates in counts per cell, in the order of adata.var_names."
        )
    return values.astype(np.float64)


def _known_truth(adata: AnnData, groups: dict[str, np.ndarray], positions: np.ndarray) -> _Truth | None:
    """Return the rates that `scvae_tools.datasets` stores with its toys, if they are there."""
    if "lambda" in adata.var:
        return _Truth("true λ", [_rates_of_genes(adata, "lambda")[positions]] * len(groups))
    if "lambda" not in adata.varm or "component" not in adata.obs:
        return None
    rates = np.asarray(adata.varm["lambda"])[positions]  # (n_genes, n_components)
    # By name: AnnData drops the categories that a subset does not use.
    names = [str(component) for component in range(rates.shape[1])]
    component = pd.Categorical(adata.obs["component"].astype(str), categories=names).codes
    if (component < 0).any():
        return None
    shares = [np.bincount(component[cells], minlength=len(names)) / cells.sum() for cells in groups.values()]
    return _Truth("true λ", [rates @ share for share in shares])


def _mean_counts(
    adata: AnnData, key: str, layer: str | None, groups: dict[str, np.ndarray], positions: np.ndarray
) -> _Truth:
    layer = layer_of_counts(adata, key, layer)
    if layer is None and adata.X is None:
        raise ValueError("adata.X must hold counts; found None. Pass the layer= that holds them, or true=.")
    return _Truth("mean count", _means(adata, layer, groups, positions))


def _means(adata: AnnData, layer: str | None, groups: dict[str, np.ndarray], positions: np.ndarray) -> list[np.ndarray]:
    """Return the means over the cells of each group of some genes, (n_genes,) float64; NaN where a value is NaN."""
    matrix = adata.X if layer is None else adata.layers[layer]
    totals = [np.zeros(len(positions)) for _ in groups]
    step = _rows_at_once(matrix)
    for start in range(0, adata.n_obs, step):
        block = _genes_of(matrix[start : start + step], positions)
        for total, cells in zip(totals, groups.values(), strict=True):
            chosen = np.flatnonzero(cells[start : start + step])
            of_group = block if len(chosen) == block.shape[0] else block[chosen]
            total += np.asarray(of_group.sum(axis=0, dtype=np.float64)).ravel()
    return [total / cells.sum() for total, cells in zip(totals, groups.values(), strict=True)]


def _genes_of(block: Any, positions: np.ndarray) -> Any:
    """Return some columns of a block of rows, sparse or a NumPy array."""
    block = block if hasattr(block, "tocsr") else np.asarray(block)
    return block if len(positions) == block.shape[1] and (np.diff(positions) == 1).all() else block[:, positions]


def _rows_at_once(matrix: Any) -> int:
    """Choose how many rows to read at a time: few of a dense matrix, all of one that is sorted by columns."""
    from anndata.abc import CSRDataset

    n_cells, n_genes = matrix.shape
    if isinstance(matrix, CSRDataset):
        return ROWS
    if hasattr(matrix, "format"):  # sparse
        return max(1, n_cells)
    chunks = getattr(matrix, "chunks", None)  # of zarr and h5py: read each once; of dask: a tuple of tuples
    chunk = chunks[0] if chunks and np.isscalar(chunks[0]) else 1
    return chunk * max(1, -(-_BLOCK // (n_genes * chunk)))


# -- drawing -----------------------------------------------------------------------------------------------------------


def _draw_bars(ax: Axes, names: list[str], of_true: str, true: np.ndarray, reconstructed: np.ndarray) -> None:
    """Draw two bars for each gene, with the legend above, where it covers none."""
    from matplotlib import rcParams
    from matplotlib.font_manager import FontProperties

    place = np.arange(len(names))
    ax.bar(place - 0.2, true, 0.4, color=_TRUE_COLOUR, label=of_true)
    ax.bar(place + 0.2, reconstructed, 0.4, color=LINE, label="reconstructed λ")
    ax.set(ylabel="counts per cell", xlim=(-0.7, len(names) - 0.3))
    room = size_in_points(ax)[0] / (len(names) + 0.4)
    font = FontProperties(size=rcParams["xtick.labelsize"]).get_size_in_points()
    is_long = max(width_of(name, font) for name in names) + font / 4 > room
    ax.set_xticks(place, names, rotation=90 if is_long else 0)
    ax.tick_params(axis="x", length=0)
    ax.spines[["top", "right"]].set_visible(False)
    ax.grid(axis="y", color="0.92", linewidth=0.8)
    ax.set_axisbelow(True)
    legend = {"frameon": False, "borderaxespad": 0.2, "handlelength": 1.2, "columnspacing": 1.2}
    ax.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=2, **legend)


def _draw_points(
    ax: Axes, colours: dict[str, str], of_true: str, true: list[np.ndarray], reconstructed: list[np.ndarray]
) -> None:
    """Draw a point for each gene of each group, and the diagonal."""
    from matplotlib.ticker import FuncFormatter

    positive = [(x > 0) & (y > 0) for x, y in zip(true, reconstructed, strict=True)]
    n_points = int(sum(map(np.sum, positive)))
    size = _LARGEST_POINT if n_points < 200 else 14 if n_points < 2_000 else 5  # points squared
    for (name, colour), x, y, drawn in zip(colours.items(), true, reconstructed, positive, strict=True):
        points = ax.scatter(x[drawn], y[drawn], s=size, color=colour, alpha=0.6, lw=0)
        points.set(label=name or "genes", rasterized=True, zorder=2)
    drawn = np.concatenate(
        [values[at] for pair in (true, reconstructed) for values, at in zip(pair, positive, strict=True)]
    )
    limits = (drawn.min() / 1.5, drawn.max() * 1.5) if len(drawn) else (0.1, 10)
    ax.plot(limits, limits, color=TEXT, lw=1, ls=(0, (4, 3)), zorder=1, label="diagonal")
    ax.set(xscale="log", yscale="log", xlim=limits, ylim=limits, aspect="equal")
    for axis in (ax.xaxis, ax.yaxis):
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axis.set_minor_formatter(_minor_formatter())
    ax.set(xlabel=f"{of_true} (counts per cell)", ylabel="reconstructed λ (counts per cell)")
    ax.spines[["top", "right"]].set_visible(False)
    n_absent = sum(map(len, positive)) - n_points
    if n_absent:
        what = "gene" if len(colours) == 1 else "point"
        text = f"{n_absent:,} {what}{'s' * (n_absent > 1)} at 0 not shown"
        ax.text(0.98, 0.02, text, transform=ax.transAxes, ha="right", va="bottom", fontsize=8, color=TEXT)


def _minor_formatter() -> LogFormatter:
    """Return a formatter that names minor ticks where they are few, as the major ones: 0.6, not 6e-01."""
    from matplotlib.ticker import LogFormatter

    class Plain(LogFormatter):
        def __call__(self, value: float, position: int | None = None) -> str:
            return f"{value:g}" if super().__call__(value, position) else ""

    return Plain(minor_thresholds=(1, 0.4))


def _name_groups(ax: Axes, groupby: str) -> None:
    """Draw the legend of the groups beside the panel."""
    handles, names = ax.get_legend_handles_labels()
    groups = [(handle, name) for handle, name in zip(handles, names, strict=True) if name != "diagonal"]
    options = {"frameon": False, "loc": "center left", "bbox_to_anchor": (1.01, 0.5), "handletextpad": 0.2}
    legend = ax.legend(*zip(*groups, strict=True), title=groupby, alignment="left", **options)
    for handle in legend.legend_handles:  # the colours of very small points cannot be told apart
        handle.set(sizes=[_LARGEST_POINT], alpha=1)
