"""What plots share: colours, new and given Axes, and errors for results that are not there."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np

from scvae_tools._keys import Keys

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from anndata import AnnData
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from pandas import Series

#: Eight colours that all common kinds of colour blindness tell apart (Okabe and Ito 2008).
OKABE_ITO = ("#0072b2", "#e69f00", "#009e73", "#d55e00", "#cc79a7", "#56b4e9", "#f0e442", "#000000")
LINE, ACCENT, PALE, TEXT = OKABE_ITO[0], OKABE_ITO[3], "0.86", "0.35"
ABOUT_ONE = (-0.03, 1.08)  # limits of an axis from 0 to 1 that do not cut its points, as multiples of its highest


def missing_result(adata: AnnData, key: str, looked_for: str) -> ValueError:
    """Return the error for a result that is not there; it names those that are."""
    stored = stored_results(adata)
    found = f"adata holds results under {stored}" if stored else "adata holds no results of svt.tl.scvae"
    other = f", or pass key={stored[0]!r}" if stored else ""
    return ValueError(
        f"There is no {looked_for} in adata; {found}. Run svt.tl.scvae(adata, key_added={key!r}) first{other}."
    )


def stored_results(adata: AnnData) -> list[str]:
    """List the keys of results, by the history in ``uns`` or, where ``uns`` was lost, the probabilities in ``obsm``."""
    in_uns = [key for key, value in adata.uns.items() if isinstance(value, Mapping) and "history" in value]
    in_obsm = [key for key in adata.obs if {Keys(key).latent, Keys(key).probabilities} <= set(adata.obsm)]
    return sorted({*in_uns, *in_obsm})


def component_colours(adata: AnnData, key: str, names: list[str]) -> list[str]:
    """Return the colours that `clusters` used or would use, by component; it alone writes them to ``uns``."""
    column = adata.obs.get(Keys(key).component)
    categories = names if column is None else categories_of(column)
    stored = list(adata.uns.get(f"{key}_colors", ()))
    colours = stored if len(stored) >= len(categories) else safe_palette(len(categories)) or []
    by_name = dict(zip(categories, colours, strict=False))
    return [by_name.get(name, "0.6") for name in names]


def safe_palette(n_categories: int) -> list[str] | None:
    """Return colours that colour-blind readers tell apart, as far as there are enough; else None, scanpy's own."""
    from scanpy.plotting.palettes import default_20  # adjusted for colour blindness, unlike matplotlib's ten

    return next((list(palette) for palette in (OKABE_ITO, default_20) if n_categories <= len(palette)), None)


def categories_of(column: Series) -> list[str]:
    """List the categories that scanpy will colour by; none for numbers, which get a colour bar."""
    if hasattr(column, "cat"):
        return [str(category) for category in column.cat.categories]
    is_number = column.dtype.kind in "iufc"
    return [] if is_number else [str(value) for value in column.dropna().unique()]


def given_axes(axes: Axes | Sequence[Axes] | np.ndarray, panels: list[str]) -> np.ndarray:
    """Return the user's Axes as a flat array, one per panel."""
    axes = np.asarray(axes, dtype=object).ravel()
    if len(axes) != len(panels):
        raise ValueError(
            f"axes must hold one Axes per panel; there are {len(axes)} for {len(panels)} panels ({', '.join(panels)}). "
            f"Pass {len(panels)}, or axes=None for a new figure."
        )
    return axes


def new_axes(width: float, height: float) -> Axes:
    """Return the Axes of a new figure of the given inches."""
    from matplotlib import pyplot as plt

    return plt.subplots(figsize=(width, height), layout="constrained")[1]


def new_grid(n_panels: int) -> np.ndarray:
    """Return the Axes of a new figure: a row of up to three, or two by two."""
    from matplotlib import pyplot as plt

    n_rows, n_columns = (2, 2) if n_panels == 4 else (1, n_panels)
    figsize = (4.6 * n_columns, 3.4 * n_rows)
    figure, axes = plt.subplots(n_rows, n_columns, figsize=figsize, layout="constrained", squeeze=False)
    figure.get_layout_engine().set(w_pad=0.1, h_pad=0.1)  # inches
    figure.align_ylabels(axes)
    return axes.ravel()


def new_row(legends: list[float]) -> np.ndarray:
    """Return the Axes of a new figure, wide enough for a legend of the given inches beside each."""
    from matplotlib import pyplot as plt

    figsize = (4.2 * len(legends) + sum(legends), 4.2)
    figure, axes = plt.subplots(1, len(legends), figsize=figsize, layout="constrained", squeeze=False)
    figure.get_layout_engine().set(w_pad=0.1)  # inches
    return axes.ravel()


def finish(figure: Figure, *, show: bool, save: str | Path | None) -> None:
    """Save and show, where asked."""
    from matplotlib import pyplot as plt

    if save is not None:
        figure.savefig(save, dpi=150, bbox_inches="tight")
    if show:
        plt.show()


def tidy(ax: Axes) -> None:
    from matplotlib.ticker import MaxNLocator

    ax.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True, min_n_ticks=1))
    ax.ticklabel_format(axis="y", useOffset=False, style="plain")
    ax.spines[["top", "right"]].set_visible(False)
    ax.grid(axis="y", color="0.92", linewidth=0.8)
    ax.set_axisbelow(True)


def percent(share: float) -> str:
    """Write a share without decimals, unless it would be 0% or 100% and is not."""
    is_near_end = 0 < share < 0.01 or 0.99 < share < 1
    if not is_near_end:
        return f"{share:.0%}"
    return "< 0.1%" if share < 0.001 else "> 99.9%" if share > 0.999 else f"{share:.1%}"
