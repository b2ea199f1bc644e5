"""Plot of counts and λ of genes on the cells."""

from __future__ import annotations

from difflib import get_close_matches
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from scvae_tools._checks import checked
from scvae_tools._keys import Keys
from scvae_tools._messages import listed
from scvae_tools._other_names import answers_other_names
from scvae_tools.pl._embedding import draw_cells, embedding_options, find_basis, name_latent_axes
from scvae_tools.pl._figures import finish, given_axes, missing_result, stored_results

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from anndata import AnnData
    from matplotlib.axes import Axes

#: From few to many counts, from light to dark, so that cells without counts are seen and do not stand out.
_COLOURS = ("0.87", "#a6d0e4", "#4a9cc8", "#1f5fa0", "#0b2a5b")
ROWS = 10_000  # of a backed sparse matrix in memory at once
_LARGEST_LIST = 3  # unknown genes for which similar names are looked up, which takes a while


@answers_other_names
@checked()
def genes(
    adata: AnnData,
    genes: str | Sequence[str],
    *,
    key: str = "scvae",
    layer: str | None = None,
    basis: str | None = None,
    vmax: float | None = None,
    axes: Axes | Sequence[Axes] | np.ndarray | None = None,
    show: bool = False,
    save: str | Path | bool | None = None,
    **kwargs: Any,
) -> np.ndarray:
    """Scatter the cells by their counts of genes and, beside it, by λ, which the model makes of them.

    λ is the mean of the count distribution of a gene in a cell, before zero inflation, and in counts as well: both
    panels of a gene have one scale, of log(1 + value), whose colour bar is marked in counts. Cells with more are drawn
    over cells with less.

    Parameters
    ----------
    adata
        AnnData with a result of :func:`scvae_tools.tl.scvae` and its layer of λ; nothing is written into it. Of layers
        on disk, only these genes are read.
    genes
        One or more names of ``adata.var_names``.
    key
        Key of the result, the ``key_added`` of :func:`scvae_tools.tl.scvae`.
    layer
        Layer with the counts. By default the one that the model was trained on, ``adata.X`` or a layer.
    basis
        Key of ``adata.obsm`` with at least two columns, with or without its ``X_``. By default ``"X_umap"`` or, if
        there is none, the first two latent dimensions, ``f"X_{key}"``.
    vmax
        Counts from which on all cells have the darkest colour. By default the largest value of the gene in either
        panel.
    axes
        Axes to draw on, two for each gene; the colour bars take their room from these. By default of a new figure.
    show
        Whether to show the figure.
    save
        Path of a file to write; its suffix is the format. True for one in ``scanpy.settings.figdir``, with the name of
        the plot. The cells are pixels in vector formats too.
    **kwargs
        To :func:`scanpy.pl.embedding`, for every panel: for example ``size``, ``cmap``, ``frameon``,
        ``dimensions=(2, 3)``.

    Returns
    -------
    Array of Axes, (n_genes, 2): counts, then λ.

    Raises
    ------
    ValueError
        If a gene, the result, its layer of λ, the counts or the basis are not in ``adata``; if ``mask_var`` left a gene
        out of the model; or if the number of ``axes`` is not two for each gene.

    Examples
    --------
    >>> svt.tl.scvae(adata)
    >>> svt.pl.genes(adata, ["CD79A", "NKG7"])
    """
    rate = rate_layer(adata, key)
    positions = gene_positions(adata, genes)
    counts_layer = layer_of_counts(adata, key, layer)
    basis = find_basis(adata, key, basis)
    values = [(_counts(adata, gene, counts_layer), _rate(adata, gene, rate)) for gene in positions]
    names = [str(name) for name in adata.var_names[positions]]
    if axes is None:
        axes = _new_axes(len(names))
    else:
        axes = given_axes(axes, [f"{name} {what}" for name in names for what in ("counts", "λ")]).reshape(-1, 2)
    for row, name, pair in zip(axes, names, values, strict=True):
        _draw_gene(row, adata, name, pair, basis=basis, key=key, vmax=vmax, given=kwargs)
    finish(axes[0, 0].figure, "genes", show=show, save=save)
    return axes


# -- what there is to draw ---------------------------------------------------------------------------------------------


def rate_layer(adata: AnnData, key: str) -> str:
    """Return the name of the layer of λ, or say why there is none."""
    name = Keys(key).rate
    if name in adata.layers:
        return name
    if key not in stored_results(adata):
        raise missing_result(adata, key, f"layers[{name!r}]")
    raise ValueError(
        f"λ is to be drawn; there is a result under {key!r}, but no layers[{name!r}]: it was left out because of its "
        f"size or by write_lambda=False. Run svt.tl.scvae(adata, write_lambda=True, key_added={key!r}), or, with the "
        f"model, adata.layers[{name!r}] = model.get_lambda()."
    )


def gene_positions(adata: AnnData, genes: str | Sequence[str]) -> np.ndarray:
    """Return the columns of genes, (n_genes,), by their names."""
    names = [genes] if isinstance(genes, str) else list(genes)
    if not names:
        raise ValueError("`genes` must name at least one gene; found none. Pass names of adata.var_names.")
    by_name = pd.Series(np.arange(adata.n_vars), index=adata.var_names)
    unknown = [name for name in names if name not in by_name.index]
    if unknown:
        raise ValueError(
            f"`genes` must be names of adata.var_names; {listed(unknown)} {'is' if len(unknown) == 1 else 'are'} not "
            f"among the {adata.n_vars:,}. {_remedy_for_unknown(adata, unknown)}"
        )
    found = [np.atleast_1d(by_name.loc[name]) for name in names]
    twice = [name for name, columns in zip(names, found, strict=True) if len(columns) > 1]
    if twice:
        raise ValueError(
            f"`genes` must name one gene each; {listed(twice)} is the name of several. "
            "Call adata.var_names_make_unique() first."
        )
    return np.concatenate(found)


def _remedy_for_unknown(adata: AnnData, unknown: list[str]) -> str:
    """Name the genes with the most similar names, in capitals or not: mouse and human genes differ in that."""
    for column in adata.var:
        if set(map(str, unknown)) <= set(adata.var[column].astype(str)):
            return f"They are in adata.var[{column!r}]; pass the names in adata.var_names of those genes."
    by_capitals = {str(name).upper(): str(name) for name in adata.var_names}
    alike = [
        by_capitals[close]
        for name in unknown[:_LARGEST_LIST]
        for close in get_close_matches(str(name).upper(), by_capitals, n=2, cutoff=0.7)
    ]
    return f"Did you mean {' or '.join(map(repr, alike))}?" if alike else f"There are {listed(adata.var_names)}."


def layer_of_counts(adata: AnnData, key: str, layer: str | None) -> str | None:
    """Return the layer with the counts, None for ``X``: the user's, or that of the training."""
    trained_on = (adata.uns.get(Keys(key).uns) or {}).get("params", {}).get("layer")
    chosen = trained_on if layer is None else layer
    if chosen is None or chosen in adata.layers:
        return chosen
    which = "`layer` must be" if layer is not None else f"{key!r} was trained on the counts of layers[{chosen!r}],"
    there_are = listed(name for name in adata.layers if name is not None)  # None is X itself since anndata 0.13
    raise ValueError(
        f"{which} a layer of adata; {chosen!r} is not among {there_are}. Pass the layer= that holds the counts."
    )


def _counts(adata: AnnData, gene: int, layer: str | None) -> np.ndarray:
    """Return the counts of a gene, (n_cells,)."""
    where = "adata.X" if layer is None else f"adata.layers[{layer!r}]"
    column = _column(adata, gene, layer)
    if column is None:
        raise ValueError(f"{where} must hold counts; found None. Pass the layer= that holds them.")
    if np.nanmin(column, initial=0) < 0:
        raise ValueError(
            f"{where} must hold counts; found {np.nanmin(column):.3g} of gene {str(adata.var_names[gene])!r}. Has it "
            "been scaled (sc.pp.scale)? Pass the layer= that holds the counts."
        )
    return column


def _rate(adata: AnnData, gene: int, layer: str) -> np.ndarray:
    """Return λ of a gene, (n_cells,)."""
    column = _column(adata, gene, layer)
    refuse_genes_left_out(adata, np.array([gene]), np.array([np.isnan(column).all()]), layer)
    return column


def refuse_genes_left_out(adata: AnnData, positions: np.ndarray, is_left_out: np.ndarray, layer: str) -> None:
    """Refuse genes of which there is no λ."""
    if not is_left_out.any():
        return
    raise ValueError(
        f"λ is NaN in layers[{layer!r}] for {listed(adata.var_names[positions[is_left_out]])}: mask_var left these "
        "genes out of the model. Leave them out here, or run svt.tl.scvae with a mask_var that keeps them."
    )


def _column(adata: AnnData, position: int, layer: str | None) -> np.ndarray | None:
    """Read the values of a gene, (n_cells,) float64, and of other genes as few as the format allows."""
    if adata.is_view and not adata.isbacked:  # the layers of a view are copies, of all genes
        adata, position = adata[:, position], 0
    matrix = adata.X if layer is None else adata.layers[layer]
    return None if matrix is None else _column_of_matrix(matrix, position)


def _column_of_matrix(matrix: Any, position: int) -> np.ndarray:
    from anndata.abc import CSRDataset

    if isinstance(matrix, CSRDataset):  # taking a column of it would read the whole matrix
        starts = range(0, matrix.shape[0], ROWS)
        return np.concatenate([_column_of_matrix(matrix[start : start + ROWS], position) for start in starts])
    is_sparse = hasattr(matrix, "format")
    column = matrix[:, [position]].toarray() if is_sparse else matrix[:, position]
    return np.asarray(column, dtype=np.float64).ravel()


# -- drawing -----------------------------------------------------------------------------------------------------------


def _new_axes(n_genes: int) -> np.ndarray:
    """Return the Axes of a new figure, (n_genes, 2)."""
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(n_genes, 2, figsize=(8.6, 3.8 * n_genes), layout="constrained", squeeze=False)
    figure.get_layout_engine().set(w_pad=0.08, h_pad=0.08)  # inches
    return axes


def _draw_gene(
    axes: np.ndarray,
    adata: AnnData,
    name: str,
    values: tuple[np.ndarray, np.ndarray],
    *,
    basis: str,
    key: str,
    vmax: float | None,
    given: dict[str, Any],
) -> None:
    """Draw counts and λ of one gene, with a colour bar for both."""
    from anndata import AnnData
    from matplotlib.colors import LinearSegmentedColormap

    highest = np.nanmax(values, initial=0)
    limit = vmax or highest or 1.0
    # An AnnData of its own, since the columns to colour by are none of the user's.
    obs = pd.DataFrame(dict(zip(("counts", "λ"), np.log1p(values), strict=True)), index=adata.obs_names)
    cells = AnnData(obs=obs, obsm={basis: np.asarray(adata.obsm[basis])})
    scale = {"cmap": LinearSegmentedColormap.from_list("counts", _COLOURS), "vmin": 0, "vmax": np.log1p(limit)}
    for ax, column in zip(axes, obs, strict=True):
        options = embedding_options(cells, column, scale | given, is_component=False)
        draw_cells(ax, cells, basis, column, **{"title": f"{name}: {column}"} | options, colorbar_loc=None)
        if basis == Keys(key).latent:
            name_latent_axes(ax, key)
    _draw_colour_bar(axes, limit, is_cut=limit < highest)


def _draw_colour_bar(axes: np.ndarray, limit: float, *, is_cut: bool) -> None:
    """Draw one colour bar for both panels, marked in counts."""
    ticks = _ticks(limit)
    bar = axes[0].figure.colorbar(
        axes[-1].collections[-1],
        ax=list(axes),
        ticks=np.log1p(ticks),
        extend="max" if is_cut else "neither",
        fraction=0.05,
        pad=0.02,
        aspect=24,
        label="counts" if is_cut else f"counts, up to {limit:,.3g}",
    )
    bar.ax.set_yticklabels([f"{tick:,.0f}" if tick >= 1 else f"{tick:g}" for tick in ticks])
    bar.ax.minorticks_off()
    bar.outline.set_visible(False)


def _ticks(limit: float) -> np.ndarray:
    """Return 0 and round numbers up to the limit that are not too close on the scale of log(1 + x)."""
    decade = np.floor(np.log10(limit))
    exponents = 10.0 ** np.arange(min(decade - 1, -1), decade + 1)
    rounded = np.outer(exponents, [1, 2, 5]).ravel()
    gap = np.log1p(limit) / 12
    ticks: list[float] = []
    for tick in reversed(rounded[rounded <= limit * (1 + 1e-9)]):
        above = np.log1p(ticks[-1]) if ticks else np.inf
        if np.log1p(tick) >= gap and above - np.log1p(tick) >= gap:
            ticks.append(float(tick))
    return np.array([0.0, *reversed(ticks)])
