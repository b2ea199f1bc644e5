"""Conversion of counts, in any form that an AnnData holds in memory, to CSR float32."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from scipy import sparse

if TYPE_CHECKING:
    import h5py
    import zarr
    from scipy.sparse import csr_matrix

#: Values that are handled at a time, so that checks and conversions need little memory beside the matrix.
BLOCK = 2**22


def to_csr(matrix: sparse.spmatrix | np.ndarray | h5py.Dataset | zarr.Array, mask: np.ndarray | None) -> csr_matrix:
    """Convert a matrix (n, g) to CSR of a plain number type, sharing memory where it is one already.

    Parameters
    ----------
    matrix
        CSR or CSC, or dense.
    mask
        Whether each gene is kept, (g,) bool; None for all.
    """
    return _compressed_to_csr(matrix, mask) if sparse.issparse(matrix) else _dense_to_csr(matrix, mask)


def _compressed_to_csr(matrix: sparse.spmatrix, mask: np.ndarray | None) -> csr_matrix:
    # A new object around the same arrays: scipy caches flags on objects, and the AnnData's own stays untouched.
    form = sparse.csr_matrix if matrix.format == "csr" else sparse.csc_matrix
    matrix = form((_plain(matrix.data), matrix.indices, matrix.indptr), shape=matrix.shape, copy=False)
    if mask is not None:
        matrix = matrix[:, mask]
    return matrix.tocsr()


def _dense_to_csr(matrix: np.ndarray | h5py.Dataset | zarr.Array, mask: np.ndarray | None) -> csr_matrix:
    n_cells, n_genes = matrix.shape
    genes = slice(None) if mask is None else mask
    blocks = [
        sparse.csr_matrix(_plain(np.asarray(matrix[rows])[:, genes])) for rows in blocks_of_rows(n_cells, n_genes)
    ]
    return sparse.vstack(blocks, format="csr") if len(blocks) > 1 else blocks[0]


def blocks_of_rows(n_rows: int, row_length: int) -> list[slice]:
    """Slices of about `BLOCK` values each that cover the rows."""
    step = max(1, BLOCK // row_length)
    return [slice(start, start + step) for start in range(0, n_rows, step)]


def _plain(values: np.ndarray) -> np.ndarray:
    """Make a plain type of booleans, float16 and foreign byte orders: scipy.sparse does not compute with them."""
    if values.dtype.kind == "b" or (values.dtype.kind == "f" and values.dtype.itemsize < 4):
        return values.astype(np.float32)
    return values.astype(values.dtype.newbyteorder("="), copy=False)


def canonical(counts: csr_matrix) -> csr_matrix:
    """Sort indices, add duplicates up and drop explicit zeros, in a copy if anything is to be done."""
    if counts.has_canonical_format and np.count_nonzero(counts.data) == counts.nnz:
        return counts
    wide = np.float64 if counts.dtype.kind == "f" else np.int64  # duplicates in uint8 could wrap around
    counts = counts.astype(np.promote_types(counts.dtype, wide), copy=True)
    counts.sum_duplicates()
    counts.eliminate_zeros()
    return counts


def to_float32(counts: csr_matrix) -> csr_matrix:
    counts = counts.astype(np.float32, copy=False)
    if np.count_nonzero(counts.data) < counts.nnz:  # an estimated count below 1e-45 has become 0
        counts = counts.copy()
        counts.eliminate_zeros()
    return counts
