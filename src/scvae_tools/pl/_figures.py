"""Parts of all plots: colours, new and given Axes, names on an axis, and errors for missing results."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from scvae_tools._files import replacing
from scvae_tools._keys import Keys
from scvae_tools._results.colours import SAFE_COLOURS, safe_palette

if TYPE_CHECKING:
    from collections.abc import Sequence

    from anndata import AnnData
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure
    from numpy.typing import ArrayLike
    from pandas import Series

LINE, ACCENT, PALE, TEXT = SAFE_COLOURS[0], SAFE_COLOURS[3], "0.86", "0.35"
ABOUT_ONE = (-0.03, 1.08)  # limits of an axis from 0 to 1 that do not cut its points, as multiples of its highest
FONT = 8  # points, of names on an axis
_LINE_HEIGHT = 1.35  # of the font
_LONGEST_NAME = 1.25  # times its stretch: a longer one seems to name the neighbours, too
_WORTH_TURNING = 1.2  # times as many names, at least


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
    """Return the colours that `clusters` used or would use, by component; only `clusters` writes them to ``uns``."""
    column = adata.obs.get(Keys(key).component)
    categories = names if column is None else categories_of(column)
    stored = list(adata.uns.get(f"{key}_colors", ()))
    colours = stored if len(stored) >= len(categories) else safe_palette(len(categories)) or []
    by_name = dict(zip(categories, colours, strict=False))
    return [by_name.get(name, "0.6") for name in names]


def column_of_obs(adata: AnnData, name: str, argument: str) -> Series:
    """Return a column of ``obs``, or say which there are."""
    if name not in adata.obs:
        raise ValueError(
            f"{argument} must be a column of adata.obs; {name!r} is not among {list(adata.obs)}. Pass one of those."
        )
    return adata.obs[name]


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


def new_grid(n_panels: int, width: float = 4.6, height: float = 3.4) -> np.ndarray:
    """Return the Axes of a new figure, rows of up to three or two by two, each of the given inches."""
    from matplotlib import pyplot as plt

    n_columns = 2 if n_panels == 4 else min(n_panels, 3)
    n_rows = -(-n_panels // n_columns)
    figsize = (width * n_columns, height * n_rows)
    figure, axes = plt.subplots(n_rows, n_columns, figsize=figsize, layout="constrained", squeeze=False)
    figure.get_layout_engine().set(w_pad=0.1, h_pad=0.1)  # inches
    axes, others = np.split(axes.ravel(), [n_panels])
    for ax in others:
        ax.remove()
    figure.align_ylabels(axes)
    return axes


def new_row(legends: list[float]) -> np.ndarray:
    """Return the Axes of a new figure, wide enough for a legend of the given inches beside each."""
    from matplotlib import pyplot as plt

    figsize = (4.2 * len(legends) + sum(legends), 4.2)
    figure, axes = plt.subplots(1, len(legends), figsize=figsize, layout="constrained", squeeze=False)
    figure.get_layout_engine().set(w_pad=0.1)  # inches
    return axes.ravel()


def finish(figure: Figure, name: str, *, show: bool, save: str | Path | bool | None) -> None:
    """Save and show, where asked; ``name`` is that of the plot, for a file whose name is not given."""
    from matplotlib import pyplot as plt

    if save is True:
        import scanpy as sc

        folder = Path(sc.settings.figdir)
        folder.mkdir(parents=True, exist_ok=True)
        save = folder / f"{name}.{sc.settings.file_format_figs}"
    if save is not None and save is not False:
        with nullcontext(save) if hasattr(save, "write") else replacing(_with_suffix(save, figure)) as target:
            figure.savefig(target, dpi=150, bbox_inches="tight")
    if show:
        plt.show()


def _with_suffix(save: str | Path, figure: Figure) -> Path:
    """Return the path to which matplotlib saves: it adds a suffix where there is none."""
    path = Path(save)
    return path if path.suffix else path.with_name(f"{path.name}.{figure.canvas.get_default_filetype()}")


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


# -- names on an axis, where there is room -----------------------------------------------------------------------------


def write_names(
    axis: Axis,
    places: ArrayLike,
    names: list[str],
    *,
    lengths: ArrayLike | None = None,
    turn: bool = True,
) -> bool:
    """Write names as the ticks of an axis, without overlap; say whether all have room.

    Parameters
    ----------
    axis
        ``ax.xaxis`` or ``ax.yaxis``.
    places
        Where the names belong, in data coordinates, (n_names,).
    names
        What to write, (n_names,).
    lengths
        Lengths of the stretches that the names stand for, in data coordinates, (n_names,): the longest is named first,
        and a name that is much longer than its stretch is left out, unless it is turned. By default the first is named
        first.
    turn
        Whether names under an x-axis may be turned, which they are if many more find room then.
    """
    is_x = axis.axis_name == "x"
    length = size_in_points(axis.axes)[0 if is_x else 1]  # points
    low, high = axis.get_view_interval()
    centres = (np.asarray(places, dtype=float) - low) / (high - low) * length
    room = np.full(len(names), np.inf) if lengths is None else np.asarray(lengths) / abs(high - low) * length
    order = np.argsort(-room, kind="stable")
    by_height = _that_fit(centres, np.full(len(names), _LINE_HEIGHT * FONT), order)
    widths = np.array([width_of(name) if is_x else 0 for name in names])
    by_width = _that_fit(centres, widths + FONT / 2, order[widths[order] <= _LONGEST_NAME * room[order]])
    is_turned = is_x and turn and len(by_height) > _WORTH_TURNING * len(by_width)
    kept = by_width if is_x and not is_turned else by_height
    axis.set_ticks(np.asarray(places)[kept], [names[i] for i in kept])
    axis.set_tick_params(labelsize=FONT, labelrotation=90 if is_turned else 0)
    return len(kept) == len(names)


def size_in_points(ax: Axes) -> tuple[float, float]:
    """Return width and height of the panel within all that has been drawn around it so far."""
    figure = ax.figure.canvas.figure  # not the SubFigure that Axes may be in
    layout = figure.get_layout_engine()
    if layout is not None:
        layout.execute(figure)
    box = ax.get_window_extent()
    points = 72 / figure.dpi
    return box.width * points, box.height * points


def _that_fit(centres: np.ndarray, widths: np.ndarray, order: np.ndarray) -> list[int]:
    """Return which names overlap none that comes before in the order; all in points."""
    kept: dict[int, tuple[float, float]] = {}
    for i in order:
        start, end = centres[i] - widths[i] / 2, centres[i] + widths[i] / 2
        if all(end <= other_start or other_end <= start for other_start, other_end in kept.values()):
            kept[int(i)] = (start, end)
    return sorted(kept)


def width_of(text: str, size: float = FONT) -> float:
    """Return the width of a text in points."""
    from matplotlib.font_manager import FontProperties
    from matplotlib.textpath import text_to_path

    return text_to_path.get_text_width_height_descent(text, FontProperties(size=size), ismath=False)[0]
