"""Plot of the cells by component."""

from __future__ import annotations

from itertools import zip_longest
from typing import TYPE_CHECKING, Any

import numpy as np

from scvae_tools._checks import checked
from scvae_tools._keys import Keys
from scvae_tools._other_names import answers_other_names
from scvae_tools.pl._embedding import (
    draw_cells,
    embedding_options,
    find_basis,
    legend_width,
    name_components,
    name_latent_axes,
)
from scvae_tools.pl._figures import categories_of, finish, given_axes, missing_result, new_row, safe_palette
from scvae_tools.pl._matching import colours_beside

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from anndata import AnnData
    from matplotlib.axes import Axes
    from pandas import Series


@answers_other_names
@checked()
def clusters(
    adata: AnnData,
    *,
    key: str = "scvae",
    labels_key: str | Sequence[str] | None = None,
    basis: str | None = None,
    axes: Axes | Sequence[Axes] | np.ndarray | None = None,
    show: bool = False,
    save: str | Path | bool | None = None,
    **kwargs: Any,
) -> np.ndarray:
    """Scatter the cells by component of the mixture, and by labels beside it.

    The name of each component is written on its cells; more than 20 have no legend.

    Colours are taken from ``adata.uns[f"{column}_colors"]`` and, where there are none, chosen and written there: for
    up to 8 components those that are safe for colour-blind readers, scanpy's own for more. A label and a component have
    the same colour only if they share more than half the cells of each. Where the labels have colours and the
    components have none, the components take those of the labels that they match, and others. A component that was
    trained on a label always has its colour.

    Drawn by :func:`scanpy.pl.embedding`. Points are drawn as pixels in vector formats too, so that figures of a million
    cells stay small.

    Parameters
    ----------
    adata
        AnnData with a result of :func:`scvae_tools.tl.scvae`.
    key
        Key of the result, the ``key_added`` of :func:`scvae_tools.tl.scvae`.
    labels_key
        One or more columns of ``adata.obs``, a panel each. Without a mixture only these are drawn.
    basis
        Key of ``adata.obsm`` with at least two columns, with or without its ``X_``. By default ``"X_umap"`` or, if
        there is none, the first two latent dimensions, ``f"X_{key}"``.
    axes
        Axes to draw on, as many as there are panels. By default of a new figure.
    show
        Whether to show the figure.
    save
        Path of a file to write; its suffix is the format. True for one in ``scanpy.settings.figdir``, with the name of
        the plot.
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
    columns = _columns(adata, key, labels_key)
    basis = find_basis(adata, key, basis)
    component = Keys(key).component
    palettes = _palettes(adata, key, columns)
    options = [
        embedding_options(adata, column, palettes.get(column, {}) | kwargs, is_component=column == component)
        for column in columns
    ]
    legends = [legend_width(adata.obs[column], option) for column, option in zip(columns, options, strict=True)]
    titles = _titles(columns, kwargs.get("title"))
    axes = new_row(legends) if axes is None else given_axes(axes, columns)
    for ax, column, title, option in zip(axes, columns, titles, options, strict=True):
        draw_cells(ax, adata, basis, column, **option | {"title": title})
        if basis == Keys(key).latent:
            name_latent_axes(ax, key)
    # When the legends have taken their room.
    if columns[0] == component and not {"legend_loc", "components", "projection"} & set(kwargs):
        places = np.asarray(adata.obsm[basis])[:, np.ravel(kwargs.get("dimensions", (0, 1)))[:2]]
        name_components(axes[0], places, adata.obs[component], kwargs.get("groups"))
    finish(axes[0].figure, "clusters", show=show, save=save)
    return axes


def _columns(adata: AnnData, key: str, labels: str | Sequence[str] | None) -> list[str]:
    """List the columns of ``obs`` to colour by: the components first."""
    labels = [labels] if isinstance(labels, str) else list(labels or [])
    absent = [label for label in labels if label not in adata.obs]
    if absent:
        raise ValueError(
            f"labels_key must be columns of adata.obs; {absent} are not among {list(adata.obs)}. Pass one of those."
        )
    component, latent = Keys(key).component, Keys(key).latent
    if component in adata.obs:
        return [component, *labels]
    if latent not in adata.obsm:
        raise missing_result(adata, key, f"obs[{component!r}] nor obsm[{latent!r}]")
    if not labels:
        raise ValueError(
            f"Components need a mixture; obsm[{latent!r}] is there, but obs[{component!r}] is not. "
            f"Run svt.tl.scvae(adata, mixture=True, key_added={key!r}), or pass labels_key= to draw only these."
        )
    return labels


def _palettes(adata: AnnData, key: str, columns: list[str]) -> dict[str, dict[str, Any]]:
    """Return scanpy's ``palette`` for the columns without colours, if the components are drawn: matched ones agree."""
    drawn = {column: adata.obs[column] for column in columns if safe_palette(len(categories_of(adata.obs[column])))}
    component = Keys(key).component
    if component not in drawn:
        return {}
    trained_on = (adata.uns.get(Keys(key).uns) or {}).get("params", {}).get("labels_key")
    stored = {column: list(adata.uns.get(f"{column}_colors", ())) for column in drawn}
    colours = {column: of for column, of in stored.items() if len(of) >= len(categories_of(drawn[column]))}
    has_colours = set(colours)

    def beside(column: str, other: str) -> list[str]:
        return colours_beside(drawn[column], drawn[other], colours[other], by_name=trained_on in (column, other))

    if component not in colours:
        first = next(iter(colours), None)
        colours[component] = beside(component, first) if first else safe_palette(len(categories_of(drawn[component])))
    for column in drawn.keys() - colours.keys():
        colours[column] = beside(column, component)
    return {column: {"palette": _palette(drawn[column], colours[column])} for column in drawn.keys() - has_colours}


def _palette(column: Series, colours: list[str]) -> list[str] | dict[str, str]:
    """Return colours as scanpy looks them up; text becomes categories in an order of its own."""
    return colours if hasattr(column, "cat") else dict(zip(categories_of(column), colours, strict=True))


def _titles(columns: list[str], given: str | Sequence[str] | None) -> list[str]:
    """Return a title per panel: the user's as far as they go, then the names of the columns."""
    given = [given] if isinstance(given, str) else list(given or [])[: len(columns)]
    return [column if title is None else title for column, title in zip_longest(columns, given)]
