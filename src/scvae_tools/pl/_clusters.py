"""Plot of the cells by component."""

from __future__ import annotations

from itertools import zip_longest
from typing import TYPE_CHECKING, Any

from scvae_tools._keys import Keys
from scvae_tools._other_names import answers_other_names
from scvae_tools.pl._embedding import draw_cells, embedding_options, find_basis, legend_width, name_latent_axes
from scvae_tools.pl._figures import finish, given_axes, missing_result, new_row

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    import numpy as np
    from anndata import AnnData
    from matplotlib.axes import Axes


@answers_other_names
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
    options = [
        embedding_options(adata, column, kwargs, is_component=column == Keys(key).component) for column in columns
    ]
    legends = [legend_width(adata.obs[column], option) for column, option in zip(columns, options, strict=True)]
    titles = _titles(columns, kwargs.get("title"))
    axes = new_row(legends) if axes is None else given_axes(axes, columns)
    for ax, column, title, option in zip(axes, columns, titles, options, strict=True):
        draw_cells(ax, adata, basis, column, **option | {"title": title})
        if basis == Keys(key).latent:
            name_latent_axes(ax, key)
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


def _titles(columns: list[str], given: str | Sequence[str] | None) -> list[str]:
    """Return a title per panel: the user's as far as they go, then the names of the columns."""
    given = [given] if isinstance(given, str) else list(given or [])[: len(columns)]
    return [column if title is None else title for column, title in zip_longest(columns, given)]
