"""Plot of a posterior predictive check: counts against counts that the model draws."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from scvae_tools._checks import checked
from scvae_tools._other_names import answers_other_names
from scvae_tools._results.predictive_check import find_ppc
from scvae_tools.pl._figures import LINE, TEXT, finish, given_axes, new_grid, percent

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from anndata import AnnData
    from matplotlib.axes import Axes
    from pandas import DataFrame

_DATA, _MODEL = "0.62", LINE  # of another lightness, so that they differ in print too
_MANY_GENES = 5_000  # beyond, points are smaller and lighter, so that their density is seen
_N_TICKS = 6  # of an axis of a histogram


@answers_other_names
@checked()
def ppc(
    adata: AnnData,
    *,
    key: str = "scvae",
    genes: str | Sequence[str] | None = None,
    axes: Axes | Sequence[Axes] | np.ndarray | None = None,
    show: bool = False,
    save: str | Path | bool | None = None,
) -> np.ndarray:
    """Plot the counts against counts that the model draws for the same cells.

    The first panel has the share of zeros of each gene: above the diagonal the model has too many. The second has the
    variance of each gene by its mean, in the data and in the draws, and the line on which both are the same, as in a
    Poisson distribution. Then, for each of ``genes``, how many cells have each count, on a square-root scale, on which
    bars of few cells are seen beside that of the zeros.

    Parameters
    ----------
    adata
        AnnData with a result of :func:`scvae_tools.tl.ppc`.
    key
        The ``key`` of :func:`scvae_tools.tl.ppc` or, if it was given one, its ``key_added``.
    genes
        Genes to draw, of those that :func:`scvae_tools.tl.ppc` was given; None for all of them, an empty list for none.
    axes
        Axes to draw on, as many as there are panels: 2, and 1 for each of the genes. By default of a new figure.
    show
        Whether to show the figure.
    save
        Path of a file to write; its suffix is the format. True for one in ``scanpy.settings.figdir``, with the name of
        the plot.

    Returns
    -------
    Array of Axes: share of zeros, variance by mean, and the histogram of each gene, with the standard deviation over
    the draws as bars. Where counts are binned, a tick names the first count of its bin; the last bin has all above.

    Raises
    ------
    ValueError
        If there is no result, it has no histogram of a gene, or the number of ``axes`` is not the number of panels.
    """
    result = find_ppc(adata, key)
    genes = _genes(result, genes, key)
    panels = ["zeros", "variance", *genes]
    axes = new_grid(len(panels), 4.2, 3.7) if axes is None else given_axes(axes, panels)
    table = result["genes"]
    _draw_zeros(axes[0], table)
    model = f"model ({result['params']['likelihood']})"
    _draw_variance(axes[1], table, model)
    for ax, gene in zip(axes[2:], genes, strict=True):
        bins = result["histograms"]
        _draw_histogram(ax, bins[bins["gene"] == gene], gene, model)
    if genes:
        axes[2].legend(loc="upper right", fontsize=9, framealpha=0.9, edgecolor="none")
    finish(axes[0].figure, "ppc", show=show, save=save)
    return axes


def _genes(result: Any, genes: str | Sequence[str] | None, key: str) -> list[str]:
    """List the genes to draw, all of which have a histogram."""
    stored = list(result["histograms"]["gene"].unique()) if "histograms" in result else []
    if genes is None:
        return stored
    genes = [genes] if isinstance(genes, str) else list(genes)
    missing = [gene for gene in genes if gene not in stored]
    if missing:
        raise ValueError(
            f"genes must be among those whose counts were stored, {stored}; {missing} are not. Run "
            f"svt.tl.ppc(adata, model, genes={[*stored, *missing]}, key={key!r}) first."
        )
    return genes


def _points(n_genes: int) -> dict[str, Any]:
    """Return how points of so many genes look; they are pixels in vector formats."""
    look = {"s": 4, "alpha": 0.25} if n_genes > _MANY_GENES else {"s": 12, "alpha": 0.55}
    return look | {"linewidth": 0, "rasterized": True}


def _draw_zeros(ax: Axes, table: DataFrame) -> None:
    """Draw a point per gene: its share of zeros in the data, and in the draws."""
    data, model = (table[name].to_numpy() for name in ("share_of_zeros", "share_of_zeros_model"))
    ax.plot([0, 1], [0, 1], color=TEXT, lw=1, ls=(0, (4, 3)), zorder=1)
    ax.scatter(data, model, color=_MODEL, zorder=2, **_points(len(table)))
    ax.set(xlim=(-0.03, 1.03), ylim=(-0.03, 1.03), aspect="equal")
    ax.set(xlabel="share of zeros, data", ylabel="share of zeros, model")
    text = f"zeros of all counts\ndata {percent(data.mean())}\nmodel {percent(model.mean())}"
    ax.text(0.04, 0.96, text, transform=ax.transAxes, va="top", fontsize=9, color=TEXT)
    _frame(ax, "Zeros of each gene", grid="both")


def _draw_variance(ax: Axes, table: DataFrame, model: str) -> None:
    """Draw two points per gene, variance by mean in the data and in the draws; points at 0 have no logarithm."""
    mean, variance = (table[[name, f"{name}_model"]].to_numpy().ravel() for name in ("mean", "variance"))
    # Gene by gene, so that neither the data nor the draws are hidden behind the others.
    colour = np.tile([_DATA, _MODEL], len(table))
    seen = (mean > 0) & (variance > 0)
    ax.scatter(mean[seen], variance[seen], c=colour[seen], zorder=2, **_points(len(table)))
    ax.set(xscale="log", yscale="log", xlabel="mean count", ylabel="variance")
    for name, colour in (("data", _DATA), (model, _MODEL)):
        ax.scatter([], [], s=20, color=colour, label=name)
    limits = ax.get_xlim()
    ax.plot(limits, limits, color=TEXT, lw=1, ls=(0, (4, 3)), zorder=3, label="variance = mean")
    ax.set_xlim(limits)
    ax.legend(loc="upper left", fontsize=9, framealpha=0.9, edgecolor="none")
    _frame(ax, "Variance of each gene", grid="both")


def _draw_histogram(ax: Axes, bins: DataFrame, gene: str, name: str) -> None:
    """Draw the cells of each bin: data as bars, draws as points with their standard deviation."""
    place = np.arange(len(bins))
    cells, model, deviation = (bins[name].to_numpy() for name in ("cells", "cells_model", "cells_model_sd"))
    ax.bar(place, cells, width=0.9, color="0.78", label="data", zorder=1)
    below = np.minimum(deviation, model)  # no number of cells is below 0
    ax.errorbar(
        place, model, [below, deviation], fmt="o", ms=3.5, lw=1.1, color=_MODEL, label=name, zorder=3, clip_on=False
    )
    ax.set_yscale("function", functions=(lambda y: np.sqrt(np.maximum(y, 0)), np.square))
    ax.set(xlim=(-0.7, len(bins) - 0.3), ylim=(0, 1.08 * max(cells.max(), (model + deviation).max())))
    ax.set_yticks(_root_ticks(ax.get_ylim()[1]))
    ax.set_xticks(*_bin_ticks(bins["first"].to_numpy()))
    ax.set(xlabel="count", ylabel="cells")
    _frame(ax, gene, grid="y")


def _root_ticks(highest: float) -> list[int]:
    """Return 0 and round numbers that are about evenly apart in their square roots, from the largest one down."""
    round_numbers = [digit * 10**power for power in range(9, -1, -1) for digit in (5, 4, 3, 2, 1)]
    ticks, below, gap = [0], highest, np.sqrt(highest) / _N_TICKS
    for number in round_numbers:
        if (gap / 2) ** 2 < number <= below:
            ticks.append(number)
            below = max(np.sqrt(number) - gap, 0) ** 2
    return sorted(ticks)


def _bin_ticks(first: np.ndarray) -> tuple[list[int], list[str]]:
    """Return places and names of some bins: 0, the last one, and some between."""
    last = len(first) - 1
    step = max(1, -(-last // _N_TICKS))
    places = [*range(0, last - step // 2, step), last]
    return places, [f"\N{GREATER-THAN OR EQUAL TO}{first[at]}" if at == last else str(first[at]) for at in places]


def _frame(ax: Axes, title: str, *, grid: str) -> None:
    ax.set_title(title, loc="left", fontsize=11, fontweight="bold")
    ax.spines[["top", "right"]].set_visible(False)
    ax.grid(axis=grid, which="major", color="0.92", linewidth=0.8)
    ax.set_axisbelow(True)
