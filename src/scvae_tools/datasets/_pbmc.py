"""Raw counts of 700 blood cells, recovered from the file that scanpy ships."""

from __future__ import annotations

import warnings

import anndata as ad
import numpy as np
import pandas as pd
from scipy import sparse

MAX_DISTANCE = 0.2  # counts: rounding to three decimals moves the PBMC counts by less than 0.05


def pbmc68k_reduced() -> ad.AnnData:
    """Raw counts of 700 peripheral blood mononuclear cells × 765 genes, from the file that scanpy ships.

    ``scanpy.datasets.pbmc68k_reduced().raw`` holds log(1 + count × step) rounded to three decimals, where a cell's step
    is 10⁴ over its total count. The integer counts are recovered exactly.

    Returns
    -------
    AnnData
        Of shape (700, 765), with the fields

        - ``X``: counts, CSR float32
        - ``obs["bulk_labels"]``, ``obs["phase"]``, ``obs["louvain"]``: annotations by scanpy, categorical
        - ``obs["n_counts"]``: counts of the cell over these 765 genes
        - ``obsm["X_umap"]``: UMAP by scanpy, (700, 2)
        - ``uns["bulk_labels_colors"]``: colours of the labels

    Raises
    ------
    ValueError
        If a recovered count lies further than 0.2 from an integer: the installed scanpy ships other values.
    """
    import scanpy as sc

    with warnings.catch_warnings():  # scanpy reads an old file format; the caller can do nothing about it
        warnings.simplefilter("ignore")
        shipped = sc.datasets.pbmc68k_reduced()
    counts = _recover_counts(shipped.raw.X)
    obs = shipped.obs[["bulk_labels", "phase", "louvain"]].copy()
    obs["n_counts"] = np.asarray(counts.sum(axis=1)).ravel()
    return ad.AnnData(
        counts,
        obs=obs,
        var=pd.DataFrame(index=shipped.raw.var_names.copy()),
        obsm={"X_umap": np.array(shipped.obsm["X_umap"])},
        uns={key: shipped.uns[key] for key in ["bulk_labels_colors"] if key in shipped.uns},
    )


def _recover_counts(log_values: np.ndarray | sparse.spmatrix | sparse.sparray) -> sparse.csr_matrix:
    """Counts from log1p(count × step of the cell), (n_cells, n_genes), if every cell has a gene with one count."""
    matrix = sparse.csr_matrix(log_values, dtype=np.float64, copy=True)
    matrix.eliminate_zeros()
    n_cells = matrix.shape[0]
    row = np.repeat(np.arange(n_cells), np.diff(matrix.indptr))
    scaled = np.expm1(matrix.data)
    step = np.full(n_cells, np.inf)
    np.minimum.at(step, row, scaled)
    counts = np.rint(scaled / step[row])
    # The rounding of the smallest value moves large counts (by 0.11 at worst here); least squares averages it out.
    squares = np.bincount(row, counts**2, minlength=n_cells)
    step = np.bincount(row, scaled * counts, minlength=n_cells) / np.maximum(squares, 1)
    _check_distances(np.abs(scaled / step[row] - counts), row)
    matrix.data = counts
    return matrix.astype(np.float32)


def _check_distances(distance: np.ndarray, row: np.ndarray) -> None:
    """Refuse values that are no multiples of their cell's step; ``distance``, in counts, and ``row``: (n_values,)."""
    if distance.max(initial=0.0) > MAX_DISTANCE:
        worst = distance.argmax()
        raise ValueError(
            f"Every value must be an integer times the step of its cell, within {MAX_DISTANCE} counts; found a value "
            f"{distance[worst]:.2f} counts away from an integer in row {row[worst]}. The matrix does not hold log1p of "
            "scaled counts: install a scanpy whose pbmc68k_reduced does (1.11 does), or use simulate()."
        )
