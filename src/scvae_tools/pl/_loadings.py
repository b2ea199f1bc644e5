"""Plot of the genes that the latent dimensions of a linear decoder raise and lower."""

from __future__ import annotations

from collections.abc import Mapping
from numbers import Integral
from typing import TYPE_CHECKING

import numpy as np

from scvae_tools._keys import Keys
from scvae_tools.pl._figures import ACCENT, FONT, LINE, TEXT, finish, given_axes, new_grid, stored_results, write_names

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from anndata import AnnData
    from matplotlib.axes import Axes

_ROW = 1.4 * FONT / 72  # inches for a gene
_AROUND = 0.95  # inches above and below the genes of a panel


def loadings(
    adata: AnnData,
    *,
    key: str = "scvae",
    dimensions: int | Sequence[int] | None = None,
    n_genes: int = 10,
    axes: Axes | Sequence[Axes] | np.ndarray | None = None,
    show: bool = False,
    save: str | Path | None = None,
) -> np.ndarray:
    """Plot the genes with the largest loadings on each latent dimension, of a model with a linear decoder.

    A bar is the derivative of log λ of a gene by one dimension of z, in nats per unit of z: a unit more of z multiplies
    λ by its exp (:meth:`scvae_tools.SCVAE.get_loadings`). The genes that rise with the dimension are above, and those
    that fall with it below. All panels have one scale, so that the bars of a dimension that does little are short.

    p(x) stays the same when a dimension changes its sign and, except for a mixture with ``covariance="diag"``, when the
    latent space is rotated. So the space that several dimensions span is a result; a single dimension is only one way
    to look at it.

    Parameters
    ----------
    adata
        AnnData with a result of ``svt.tl.scvae(adata, linear_decoder=True)``.
    key
        Key of the result, the ``key_added`` of :func:`scvae_tools.tl.scvae`.
    dimensions
        The latent dimensions to draw, counted from 1, in this order. By default all.
    n_genes
        Largest number of genes of either sign.
    axes
        Axes to draw on, one for each dimension. By default of a new figure.
    show
        Whether to show the figure.
    save
        Path of a file to write; its suffix is the format.

    Returns
    -------
    Array of Axes, one for each dimension.

    Raises
    ------
    ValueError
        If there are no loadings, a dimension is not one of the latent space, ``n_genes`` is not a whole number of at
        least 1, or the number of ``axes`` is not that of the dimensions.

    Examples
    --------
    >>> svt.tl.scvae(adata, linear_decoder=True)
    >>> svt.pl.loadings(adata, dimensions=[1, 2])
    """
    values = _stored(adata, key)
    numbers = _numbers(dimensions, values.shape[1], key)
    if not isinstance(n_genes, Integral) or n_genes < 1:
        raise ValueError(f"`n_genes` must be a whole number of at least 1; found {n_genes!r}.")
    chosen = [_largest(values[:, number - 1], n_genes) for number in numbers]
    panels = [f"dimension {number}" for number in numbers]
    n_rows = max(len(rising) + len(falling) for rising, falling in chosen) + 1
    is_new = axes is None
    axes = new_grid(len(panels), 3.4, _AROUND + _ROW * n_rows) if is_new else given_axes(axes, panels)
    limit = np.nanmax(np.abs(values[:, np.array(numbers) - 1]), initial=0)
    for ax, genes, number, title in zip(axes, chosen, numbers, panels, strict=True):
        _draw(ax, genes, values[:, number - 1], limit=1.05 * limit or 1.0, n_rows=n_rows)
        ax.set_title(title, loc="left", fontsize=11)
    for ax, genes in zip(axes, chosen, strict=True):
        names = [str(name) for name in adata.var_names[np.concatenate(genes)]]
        if is_new:  # high enough for all names: to measure that would take a second for ten panels
            ax.set_yticks(_places(genes), names, fontsize=FONT)
        else:
            write_names(ax.yaxis, _places(genes), names)
        ax.tick_params(axis="y", length=0)
    finish(axes[0].figure, show=show, save=save)
    return axes


def _stored(adata: AnnData, key: str) -> np.ndarray:
    """Return the loadings, (n_genes, n_latent), or say how to get them."""
    name, result = Keys(key).loadings, adata.uns.get(Keys(key).uns)
    params = result.get("params", {}) if isinstance(result, Mapping) else {}
    # An earlier result under the same key leaves its loadings behind.
    if name in adata.varm and params.get("linear_decoder", True):
        return np.asarray(adata.varm[name], dtype=np.float64)
    others = [other for other in stored_results(adata) if other != key and Keys(other).loadings in adata.varm]
    named = "" if key == Keys().key_added else f", key_added={key!r}"
    raise ValueError(
        f"There is no varm[{name!r}] in adata of the result under {key!r}: only a decoder that is linear has loadings. "
        f"Run svt.tl.scvae(adata, linear_decoder=True{named}) first"
        + (f", or pass key={others[0]!r}." if others else ".")
    )


def _numbers(dimensions: int | Sequence[int] | None, n_latent: int, key: str) -> list[int]:
    """Return the numbers of the dimensions from 1 on."""
    given = range(1, n_latent + 1) if dimensions is None else np.ravel(np.asarray(dimensions, dtype=object))
    numbers = list(given)
    if not numbers or not all(isinstance(number, Integral) and 1 <= number <= n_latent for number in numbers):
        raise ValueError(
            f"`dimensions` must be latent dimensions, counted from 1 to {n_latent}, the columns of "
            f"obsm[{Keys(key).latent!r}]; found {dimensions!r}. Pass dimensions=[1]."
        )
    return [int(number) for number in numbers]


def _largest(values: np.ndarray, n_genes: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the positions of the genes with the largest positive and the largest negative loadings, both falling."""
    order = np.argsort(-values, kind="stable")  # NaN, of genes that the model does not have, comes last
    rising, falling = order[values[order] > 0], order[values[order] < 0]
    return rising[:n_genes], falling[max(0, len(falling) - n_genes) :]


def _places(genes: tuple[np.ndarray, np.ndarray]) -> np.ndarray:
    """Return the rows of the genes, from the top; one is left free between the signs."""
    n_rising, n_falling = map(len, genes)
    return np.r_[:n_rising, n_rising + 1 : n_rising + 1 + n_falling]


def _draw(ax: Axes, genes: tuple[np.ndarray, np.ndarray], values: np.ndarray, *, limit: float, n_rows: int) -> None:
    colours = np.repeat([LINE, ACCENT], list(map(len, genes)))
    ax.barh(_places(genes), values[np.concatenate(genes)], height=0.72, color=colours)
    ax.axvline(0, color=TEXT, linewidth=0.8)
    ax.set(xlim=(-limit, limit), ylim=(n_rows - 0.4, -0.6), xlabel="loading (nats per unit of z)")
    ax.spines[["top", "right", "left"]].set_visible(False)
    ax.grid(axis="x", color="0.92", linewidth=0.8)
    ax.set_axisbelow(True)
