"""Parts of plots of cells in two dimensions: coordinates, scanpy's options, and the names of latent axes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from scvae_tools._keys import Keys
from scvae_tools.pl._figures import categories_of, missing_result, safe_palette

if TYPE_CHECKING:
    from anndata import AnnData
    from matplotlib.axes import Axes
    from pandas import Series

LARGEST_POINT = 100  # points squared; scanpy's 120,000 / n_cells covers the picture where there are few cells
LARGEST_LEGEND = 20  # components; beyond, colours are too alike and the numbers are written on the cells


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
        options |= {"legend_loc": "on data", "legend_fontsize": 8, "legend_fontoutline": 2}
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
