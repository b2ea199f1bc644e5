"""Cells by component."""

from __future__ import annotations

from itertools import zip_longest
from typing import TYPE_CHECKING, Any

from scvae_tools._keys import Keys
from scvae_tools.pl._figures import categories_of, finish, given_axes, missing_result, new_row, safe_palette

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    import numpy as np
    from anndata import AnnData
    from matplotlib.axes import Axes
    from pandas import Series

_LARGEST_POINT = 100  # points squared; scanpy's 120,000 / n_cells covers the picture where there are few cells
_LARGEST_LEGEND = 20  # components; beyond, colours are too alike and the numbers are written on the cells


def clusters(
    adata: AnnData,
    *,
    key: str = "scvae",
    labels: str | Sequence[str] | None = None,
    basis: str | None = None,
    axes: Axes | Sequence[Axes] | np.ndarray | None = None,
    show: bool = False,
    save: str | Path | None = None,
    **kwargs: Any,
) -> np.ndarray:
    """Scatter the cells by component of the mixture, and by labels beside it.

    Drawn by :func:`scanpy.pl.embedding`, which takes colours from ``adata.uns[f"{column}_colors"]`` and, where there
    are none, writes there those that it used: colours safe for colour-blind readers for up to 8 categories, scanpy's
    own for more. More than 20 components are numbered on the cells instead of in a legend. Points are drawn as
    pixels in vector formats too, so that figures of a million cells stay small.

    Parameters
    ----------
    adata
        AnnData with a result of :func:`scvae_tools.tl.scvae`.
    key
        Key of the result, the ``key_added`` of :func:`scvae_tools.tl.scvae`.
    labels
        One or more columns of ``adata.obs``, a panel each. Without a mixture only these are drawn.
    basis
        Key of ``adata.obsm`` with at least two columns, with or without its ``X_``. By default ``"X_umap"`` or, if
        there is none, the first two latent dimensions, ``f"X_{key}"``.
    axes
        Axes to draw on, as many as there are panels. By default of a new figure.
    show
        Whether to show the figure.
    save
        Path of a file to write; its suffix is the format.
    **kwargs
        To :func:`scanpy.pl.embedding`, for every panel: for example ``size``, ``palette``, ``groups``, ``frameon``,
        ``legend_loc``, ``dimensions=(2, 3)``; ``title`` may be a list with one title per panel.

    Returns
    -------
    Array of Axes: the components, if there is a mixture, then the labels in the order given.

    Raises
    ------
    ValueError
        If the result, a label or the basis is not in ``adata``, if the basis has one column only, or if the number
        of ``axes`` is not the number of panels.
    """
    columns = _columns(adata, key, labels)
    basis = _find_basis(adata, key, basis)
    options = [
        _embedding_options(adata, column, kwargs, is_component=column == Keys(key).component) for column in columns
    ]
    legends = [_legend_width(adata.obs[column], option) for column, option in zip(columns, options, strict=True)]
    titles = _titles(columns, kwargs.get("title"))
    axes = new_row(legends) if axes is None else given_axes(axes, columns)
    for ax, column, title, option in zip(axes, columns, titles, options, strict=True):
        _draw_cells(ax, adata, basis, column, **option | {"title": title})
        if basis == Keys(key).latent:
            _name_latent_axes(ax, key)
    finish(axes[0].figure, show=show, save=save)
    return axes


def _columns(adata: AnnData, key: str, labels: str | Sequence[str] | None) -> list[str]:
    """List the columns of ``obs`` to colour by: the components first."""
    labels = [labels] if isinstance(labels, str) else list(labels or [])
    absent = [label for label in labels if label not in adata.obs]
    if absent:
        raise ValueError(
            f"labels must be columns of adata.obs; {absent} are not among {list(adata.obs)}. Pass one of those."
        )
    component, latent = Keys(key).component, Keys(key).latent
    if component in adata.obs:
        return [component, *labels]
    if latent not in adata.obsm:
        raise missing_result(adata, key, f"obs[{component!r}] nor obsm[{latent!r}]")
    if not labels:
        raise ValueError(
            f"Components need a mixture; obsm[{latent!r}] is there, but obs[{component!r}] is not. "
            f"Run svt.tl.scvae(adata, mixture=True, key_added={key!r}), or pass labels= to draw only these."
        )
    return labels


def _find_basis(adata: AnnData, key: str, basis: str | None) -> str:
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


def _draw_cells(ax: Axes, adata: AnnData, basis: str, column: str, **options: Any) -> None:
    """Let scanpy draw one panel; its points are pixels in vector formats, since a million shapes open in no viewer."""
    import scanpy as sc

    # scanpy writes "UMAP1" for "umap" but "X_umap1" for "X_umap".
    short = basis.removeprefix("X_")
    basis = basis if short in adata.obsm else short
    sc.pl.embedding(adata, basis, color=column, ax=ax, show=False, **options)
    for points in ax.collections:
        points.set_rasterized(True)


def _embedding_options(adata: AnnData, column: str, given: dict[str, Any], *, is_component: bool) -> dict[str, Any]:
    """Return the options of `scanpy.pl.embedding`: the user's, and our defaults for the others."""
    options: dict[str, Any] = {"size": min(120_000 / max(adata.n_obs, 1), _LARGEST_POINT)}
    n_categories = len(categories_of(adata.obs[column]))
    if len(adata.uns.get(f"{column}_colors", ())) < n_categories:
        options["palette"] = safe_palette(n_categories)
    if is_component and n_categories > _LARGEST_LEGEND:
        options |= {"legend_loc": "on data", "legend_fontsize": 8, "legend_fontoutline": 2}
    if "s" in given:  # scanpy reads `s` only where there is no `size`
        del options["size"]
    return options | given


def _legend_width(column: Series, options: dict[str, Any]) -> float:
    """Estimate the inches that scanpy's legend needs beside the panel; a colour bar needs less than one."""
    names = categories_of(column)
    if not names:
        return 0.8
    if options.get("legend_loc", "right margin") != "right margin":
        return 0.0
    n_legend_columns = 1 if len(names) <= 14 else 2 if len(names) <= 30 else 3  # as scanpy has them
    return n_legend_columns * (0.4 + 0.08 * max(map(len, names)))


def _titles(columns: list[str], given: str | Sequence[str] | None) -> list[str]:
    """Return a title per panel: the user's as far as they go, then the names of the columns."""
    given = [given] if isinstance(given, str) else list(given or [])[: len(columns)]
    return [column if title is None else title for column, title in zip_longest(columns, given)]


def _name_latent_axes(ax: Axes, key: str) -> None:
    """Call the axes "latent 1" where scanpy calls them "scvae1" or "X_scvae1"."""
    for axis in (ax.xaxis, ax.yaxis):
        dimension = axis.get_label_text().removeprefix("X_").removeprefix(key)
        axis.set_label_text(f"latent {dimension}")
