"""Parts of plots of cells in two dimensions: coordinates, scanpy's options, names of axes and on the cells."""

from __future__ import annotations

from itertools import product
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from scvae_tools._keys import Keys
from scvae_tools.pl._figures import TEXT, categories_of, missing_result, safe_palette, width_of

if TYPE_CHECKING:
    from collections.abc import Sequence

    from anndata import AnnData
    from matplotlib.axes import Axes
    from pandas import Series

LARGEST_POINT = 100  # points squared; scanpy's 120,000 / n_cells covers the picture where there are few cells
LARGEST_LEGEND = 20  # components; beyond, colours are too alike, and only the numbers on the cells tell them apart
_FONT_SIZE = 9  # points, of names on the cells
#: Distances of a name from what it names, in points: beside it, or further away with a line to it.
_DISTANCES = (9, 15, 22, 30, 40, 52, 66, 82, 100)
_DIRECTIONS = np.deg2rad([45, 135, -45, -135, 0, 180, 90, -90])


def find_basis(adata: AnnData, key: str, basis: str | None) -> str:
    """Return the key of ``obsm`` that holds the coordinates."""
    latent = Keys(key).latent
    if basis is None:
        basis = "X_umap" if "X_umap" in adata.obsm else latent
        if basis not in adata.obsm:
            raise missing_result(adata, key, f"obsm['X_umap'] nor obsm[{basis!r}]")
    found = next((name for name in (basis, f"X_{basis}") if name in adata.obsm), None)
    if found is None:
        raise ValueError(
            f"basis must be a key of adata.obsm; {basis!r} is not among {list(adata.obsm)}. Pass one of those, "
            f"or make a UMAP: sc.pp.neighbors(adata, use_rep={latent!r}); sc.tl.umap(adata)."
        )
    if adata.obsm[found].shape[1] < 2:
        raise ValueError(
            f"basis must have at least two columns; obsm[{found!r}] has {adata.obsm[found].shape[1]}. Make a UMAP: "
            f"sc.pp.neighbors(adata, use_rep={latent!r}); sc.tl.umap(adata), or pass another basis=."
        )
    return found


def draw_cells(ax: Axes, adata: AnnData, basis: str, column: str | None, **options: Any) -> None:
    """Let scanpy draw one panel; its points are pixels in vector formats, since a million shapes open in no viewer."""
    import scanpy as sc

    # scanpy writes "UMAP1" for "umap" but "X_umap1" for "X_umap".
    short = basis.removeprefix("X_")
    basis = basis if short in adata.obsm else short
    sc.pl.embedding(adata, basis, color=column, ax=ax, show=False, **options)
    for points in ax.collections:
        points.set_rasterized(True)


def embedding_options(
    adata: AnnData, column: str | None, given: dict[str, Any], *, is_component: bool
) -> dict[str, Any]:
    """Return the options of `scanpy.pl.embedding`: the user's, and our defaults for the others."""
    options: dict[str, Any] = {"size": min(120_000 / max(adata.n_obs, 1), LARGEST_POINT)}
    n_categories = 0 if column is None else len(categories_of(adata.obs[column]))
    if len(adata.uns.get(f"{column}_colors", ())) < n_categories:
        options["palette"] = safe_palette(n_categories)
    if is_component and n_categories > LARGEST_LEGEND:
        options["legend_loc"] = None
    if "s" in given:  # scanpy reads `s` only where there is no `size`
        del options["size"]
    return options | given


def legend_width(column: Series, options: dict[str, Any]) -> float:
    """Estimate the inches that scanpy's legend needs beside the panel; a colour bar needs less than one."""
    names = categories_of(column)
    if not names:
        return 0.8
    if options.get("legend_loc", "right margin") != "right margin":
        return 0.0
    n_legend_columns = 1 if len(names) <= 14 else 2 if len(names) <= 30 else 3  # as scanpy has them
    return n_legend_columns * (0.4 + 0.08 * max(map(len, names)))


def name_latent_axes(ax: Axes, key: str) -> None:
    """Call the axes "latent 1" where scanpy calls them "scvae1" or "X_scvae1"."""
    for axis in (ax.xaxis, ax.yaxis):
        dimension = axis.get_label_text().removeprefix("X_").removeprefix(key)
        axis.set_label_text(f"latent {dimension}")


# -- names on the cells ------------------------------------------------------------------------------------------------


def name_components(ax: Axes, places: np.ndarray, column: Series, groups: Sequence[str] | None = None) -> None:
    """Write the name of each component, of ``groups`` if any, on a cell in its middle; places are (n_cells, 2)."""
    names, middles, extents = [], [], []
    found = pd.Categorical(column)
    for code, name in enumerate(map(str, found.categories)):
        of_component = places[found.codes == code]
        if len(of_component) and (groups is None or name in groups):
            # Where a component is in several parts, the median may be in none of them.
            distances = np.linalg.norm(of_component - np.median(of_component, axis=0), axis=1)
            middle = of_component[np.argmin(distances)]
            names.append(name)
            middles.append(middle)
            extents.append(np.quantile(np.abs(of_component - middle), 0.75, axis=0))
    if names:
        name_groups(ax, names, np.array(middles), np.array(extents))


def name_groups(ax: Axes, names: list[str], places: np.ndarray, extents: np.ndarray) -> None:
    """Write names on groups of cells or, where they would hide them or other names, further away, with a line.

    Parameters
    ----------
    ax
        Axes on which the groups are drawn.
    names
        What to write, (n_names,).
    places
        Where, in data coordinates, (n_names, 2).
    extents
        How far a group reaches from its place, in data coordinates, (n_names, 2): one that is smaller than its name has
        it beside, not on it.
    """
    from matplotlib.patheffects import withStroke

    ax.figure.canvas.figure.draw_without_rendering()  # the layout decides how far apart the places are
    points, ends = (ax.transData.transform(at) * 72 / ax.figure.dpi for at in (places, places + extents))
    frame = ax.get_window_extent().extents * 72 / ax.figure.dpi
    # Bold letters are wider, and all have an edge.
    sizes = np.array([[1.2 * width_of(name, _FONT_SIZE) + 3, 1.3 * _FONT_SIZE] for name in names])
    is_hidden = (np.abs(ends - points) < sizes / 2).all(axis=1)
    for name, place, hidden, size, offset in zip(
        names, places, is_hidden, sizes, _offsets(points, sizes, frame, is_hidden), strict=True
    ):
        is_far = np.hypot(*offset) > (1.5 * _DISTANCES[0] + size[0] / 2 if hidden else size[1] / 2)
        line = {"arrowstyle": "-", "color": TEXT, "lw": 0.7, "shrinkA": 0, "shrinkB": 3 if hidden else 0}
        ax.annotate(
            name,
            xy=place,
            xytext=offset,
            textcoords="offset points",
            ha="center",
            va="center",
            fontsize=_FONT_SIZE,
            fontweight="bold",
            zorder=5,
            path_effects=[withStroke(linewidth=2.5, foreground="white")],
            arrowprops=line if is_far else None,
        )


def _offsets(points: np.ndarray, sizes: np.ndarray, frame: np.ndarray, is_hidden: np.ndarray) -> np.ndarray:
    """Choose for each name the first place that is free of others and of what they would hide; in points, (n, 2)."""
    taken = [np.concatenate([point - 4, point + 4]) for point in points[is_hidden]]  # left, bottom, right, top
    offsets = []
    for point, size, hidden in zip(points, sizes, is_hidden, strict=True):
        candidates = [
            (distance + np.abs(np.cos(direction)) * (size[0] - size[1]) / 2) * np.cos(direction) * np.array([1, 0])
            + distance * np.sin(direction) * np.array([0, 1])
            for distance, direction in product(_DISTANCES, _DIRECTIONS)
        ]
        candidates = candidates if hidden else [np.zeros(2), *candidates]
        boxes = [np.concatenate([point + at - size / 2, point + at + size / 2]) for at in candidates]
        best = int(np.argmin([_overlap(box, taken) + _outside(box, frame) for box in boxes]))
        taken.append(boxes[best])
        offsets.append(candidates[best])
    return np.array(offsets)


def _overlap(box: np.ndarray, others: list[np.ndarray]) -> float:
    """Area that a box (left, bottom, right, top) shares with others."""
    others = np.reshape(others, (-1, 4))
    sides = np.minimum(box[2:], others[:, 2:]) - np.maximum(box[:2], others[:, :2])
    return float(np.prod(np.maximum(sides, 0), axis=1).sum())


def _outside(box: np.ndarray, frame: np.ndarray) -> float:
    """Length by which a box leaves the frame."""
    return float(np.maximum(frame[:2] - box[:2], 0).sum() + np.maximum(box[2:] - frame[2:], 0).sum())
