"""Plot of the cells between components."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from scvae_tools._checks import checked
from scvae_tools._other_names import answers_other_names
from scvae_tools._results.probabilities import ambiguity_of_components
from scvae_tools.pl._figures import TEXT, component_colours, finish, new_axes, percent

if TYPE_CHECKING:
    from pathlib import Path

    from anndata import AnnData
    from matplotlib.axes import Axes
    from pandas import DataFrame


@answers_other_names
@checked()
def ambiguous(
    adata: AnnData,
    *,
    key: str = "scvae",
    threshold: float = 0.9,
    ax: Axes | None = None,
    show: bool = False,
    save: str | Path | bool | None = None,
) -> Axes:
    """Plot how many cells of each component might as well be of another, and of which.

    A bar is the share of the component's cells whose top probability is below the threshold. Beside it is the component
    that is most often the second most probable one of these. The cells themselves are listed by
    :func:`scvae_tools.tl.ambiguous_cells`.

    Parameters
    ----------
    adata
        AnnData with a result of :func:`scvae_tools.tl.scvae`, with a mixture.
    key
        Key of the result, the ``key_added`` of :func:`scvae_tools.tl.scvae`.
    threshold
        A cell is ambiguous if the probability of its most probable component is below; above 0 and up to 1.
    ax
        Axes to draw on. By default of a new figure, high enough for all components.
    show
        Whether to show the figure.
    save
        Path of a file to write; its suffix is the format. True for one in ``scanpy.settings.figdir``, with the name of
        the plot.

    Returns
    -------
    Axes with a bar per component, the first one on top, in the colours of :func:`scvae_tools.pl.clusters`.

    Raises
    ------
    ValueError
        If there are no probabilities, or if ``threshold`` is not above 0 and up to 1.
    """
    table = ambiguity_of_components(adata, key=key, threshold=threshold)
    if ax is None:
        longest = max(
            len(name) + len(_confusion(row)) for name, row in zip(table.index, table.itertuples(), strict=True)
        )
        ax = new_axes(3.6 + 0.075 * longest, 1.1 + 0.3 * len(table))  # 0.075 inches for a letter
    _draw_ambiguity(ax, table, component_colours(adata, key, list(table.index)))
    share = table["n_ambiguous"].sum() / table["n_cells"].sum()
    ax.set_title(f"{percent(share)} of cells: top probability below {threshold:g}", loc="left", fontsize=11)
    finish(ax.figure, "ambiguous", show=show, save=save)
    return ax


def _draw_ambiguity(ax: Axes, table: DataFrame, colours: list[str]) -> None:
    """Draw a bar per component, with the component that its cells might be of beside it."""
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    share = (table["n_ambiguous"] / table["n_cells"]).to_numpy()
    place = np.arange(len(table))
    ax.barh(place, share, height=0.72, color=colours, edgecolor="0.3", linewidth=0.5)
    # In a column beside the panel, where long names cover nothing and have the room they need.
    for at, row in zip(place, table.itertuples(), strict=True):
        ax.annotate(
            _confusion(row),
            xy=(1, at),
            xycoords=("axes fraction", "data"),
            xytext=(6, 0),
            textcoords="offset points",
            va="center",
            fontsize=9,
            color=TEXT,
            annotation_clip=False,
        )
    ax.set_yticks(place, table.index)
    ax.set(xlabel="ambiguous cells", ylabel="component", ylim=(len(table) - 0.5, -0.5))
    ax.set_xlim(0, max(1.05 * share.max(), 0.01))
    ax.xaxis.set_major_locator(MaxNLocator(nbins=6, steps=[1, 2, 5, 10]))
    ax.xaxis.set_major_formatter(FuncFormatter(lambda share, _: f"{100 * share:g}%"))
    ax.spines[["top", "right"]].set_visible(False)
    ax.grid(axis="x", color="0.92", linewidth=0.8)
    ax.set_axisbelow(True)


def _confusion(row: Any) -> str:
    """Say how many cells of a component are ambiguous, and what else they might be."""
    count = f"{row.n_ambiguous:,} of {row.n_cells:,}"
    if row.n_ambiguous == 0:
        return count
    if row.n_confused == row.n_ambiguous:
        return f"{count}, {'all ' * (row.n_ambiguous > 1)}with {row.confused_with}"
    return f"{count}, {percent(row.n_confused / row.n_ambiguous)} of them with {row.confused_with}"
