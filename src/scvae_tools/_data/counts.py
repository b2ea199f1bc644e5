"""Reading of the counts of an AnnData: any form, checked, to CSR float32.

Every check runs before any training, and every message names the cell, gene or layer at fault and a remedy. Nothing
here changes the AnnData.
"""

from __future__ import annotations

import zlib
from typing import TYPE_CHECKING, Any

import h5py
import numpy as np
import pandas as pd
import zarr
from anndata import AnnData
from anndata.abc import CSCDataset, CSRDataset
from scipy import sparse

from scvae_tools._data import stored
from scvae_tools._data.conversion import blocks_of_rows, canonical, to_csr, to_float32
from scvae_tools._data.count_checks import (
    CountsError,
    Found,
    check_every_cell_has_counts,
    check_integers,
    check_values,
    layer_names,
    log_genes_without_counts,
    name_of,
)
from scvae_tools._data.stored import StoredCounts, is_lazy, n_bytes_as_csr
from scvae_tools._data.structure import check_structure, whole_of_view
from scvae_tools._data.survey import survey
from scvae_tools._messages import listed

if TYPE_CHECKING:
    from scipy.sparse import csr_matrix

DIGESTED_VALUES = 10**7  #: values that are looked at to notice a change


def read_counts(
    adata: AnnData,
    *,
    layer: str | None = None,
    mask_var: str | np.ndarray | None = None,
    allow_non_integer: bool = False,
    may_stay: bool = False,
    progress: bool = False,
) -> csr_matrix | StoredCounts:
    """Read and check the counts of an AnnData, whatever the form in which it holds them.

    Parameters
    ----------
    adata
        In memory, a view, backed, or with arrays of h5py and zarr; sparse (CSR, CSC) or dense, of any numeric type. It
        is not changed.
    layer
        Name of the layer with the counts; ``None`` for ``adata.X``. ``adata.raw`` is never read.
    mask_var
        Genes to keep: the name of a boolean column of ``adata.var`` or a boolean array, (n_genes,).
    allow_non_integer
        Accept estimated counts, with a warning, where there would be an error.
    may_stay
        Whether counts in a file or a lazy array that would take more than `LARGEST_WHOLE` bytes stay there. They are
        then checked in one pass.
    progress
        Whether to show a bar during that pass.

    Returns
    -------
    Counts, (n_cells, n_genes kept), float32, with sorted indices and neither duplicates nor explicit zeros. Where the
    AnnData already holds them so, the arrays are its own: do not write into them. Of counts that stay where they are, a
    `StoredCounts`, whose rows are such.

    Raises
    ------
    TypeError
        If ``adata`` is not an AnnData, or holds the counts in an unknown form.
    CountsError
        If the layer or gene mask does not exist, or the values are not counts with at least one in every cell.
    OSError
        If rows of a file cannot be read.
    """
    require_anndata(adata)
    where = name_of(layer)
    if (whole := whole_of_view(adata)) is not None:  # of which the view's matrix is taken by compiled code
        _check_structure(_get_matrix(whole, layer), where, whole)
    matrix = _get_matrix(adata, layer)
    _check_not_empty(adata, where)
    mask = resolve_mask_var(adata, mask_var)
    if may_stay and _is_large_in_file(matrix):
        counts = _stored(matrix, mask, where, adata)
        if counts.indptr is None:
            survey(counts, adata, mask, layer, allow_non_integer=allow_non_integer, progress=progress)
    else:
        matrix = _in_memory(matrix)
        _check_structure(matrix, where, adata)
        _check_form(matrix, where)
        found = Found(canonical(to_csr(matrix, mask)), where, adata, mask)
        check_values(found, layer)
        check_integers(found, layer, allow=allow_non_integer)
        counts = to_float32(found.counts)
    check_every_cell_has_counts(counts, adata, where, mask_var)
    log_genes_without_counts(counts, where)
    return counts


def _is_large_in_file(matrix: object) -> bool:
    if isinstance(matrix, StoredCounts):
        return True
    is_in_file = isinstance(matrix, CSRDataset | CSCDataset | h5py.Dataset | zarr.Array) or is_lazy(matrix)
    return is_in_file and n_bytes_as_csr(matrix) > stored.LARGEST_WHOLE


def _stored(matrix: object, mask: np.ndarray | None, where: str, adata: AnnData) -> StoredCounts:
    """Counts that stay in a file, unless they are by gene."""
    if isinstance(matrix, StoredCounts):
        return matrix if mask is None else matrix.of_genes(np.flatnonzero(mask), adata.obs_names)
    if isinstance(matrix, CSCDataset):
        raise CountsError(
            f"{where} must be stored by cell (CSR) to be read in parts; found {n_bytes_as_csr(matrix) / 1e9:.3g} GB "
            f"stored by gene (CSC). Read it once and write it as CSR: adata = adata.to_memory(); {where} = "
            f"{where}.tocsr(); adata.write_h5ad(...). Or pass adata.to_memory(), if there is room."
        )
    if matrix.dtype.kind not in "buif":
        _check_form(matrix, where)
    return StoredCounts(matrix, None if mask is None else np.flatnonzero(mask), where, adata.obs_names)


def digest_of_counts(matrix: object) -> int | None:
    """Number by which it is noticed that counts in memory were changed; None for counts in a file.

    Of more than `DIGESTED_VALUES` values, about so many are looked at, at equal distances: a transformation of all
    counts, or other cells, are noticed, a change of a single value may not be.
    """
    if isinstance(matrix, StoredCounts):
        return int(matrix.digest[1:], 16)
    if sparse.issparse(matrix):
        parts = [matrix.data, matrix.indices]
    elif isinstance(matrix, np.ndarray):
        parts = [matrix]
    else:
        return None
    found = zlib.crc32(repr((matrix.shape, matrix.dtype.str, len(parts[0]))).encode())
    for part in parts:
        step = max(1, part.size // DIGESTED_VALUES)
        found = zlib.crc32(np.ascontiguousarray(part[::step]).view(np.uint8), found)
    return found


def load_counts(matrix: object) -> csr_matrix | StoredCounts:
    """Counts that `read_counts` has accepted, as CSR float32; without a copy where they are held so already."""
    if isinstance(matrix, StoredCounts):
        return matrix
    matrix = _in_memory(matrix)
    _check_form(matrix, "The matrix")
    return to_float32(canonical(to_csr(matrix, None)))


def read_tables(adata: AnnData) -> None:
    """Read obs and var of lazily read data into memory, where results can be written to them; all else stays lazy."""
    if isinstance(adata, AnnData):
        for name, table in _lazy_tables(adata).items():
            setattr(adata, name, table.to_memory())


def _lazy_tables(adata: AnnData) -> dict[str, Any]:
    tables = {name: getattr(adata, name) for name in ("obs", "var")}
    return {name: table for name, table in tables.items() if not isinstance(table, pd.DataFrame)}


def require_anndata(adata: object) -> None:
    """Refuse what is not an AnnData, such as a MuData, and one whose tables are still to be read from a file."""
    if isinstance(adata, AnnData):
        for name, table in _lazy_tables(adata).items():
            raise TypeError(
                f"`adata` must have {name} in memory; found a {type(table).__name__}, as lazily read data have. "
                "Read the tables, the counts stay as they are: adata.obs = adata.obs.to_memory(); adata.var = "
                "adata.var.to_memory()."
            )
        return
    modalities = getattr(adata, "mod", None)
    if hasattr(modalities, "keys"):  # a MuData, told without importing mudata
        names = list(modalities)
        choice = "rna" if "rna" in names or not names else names[0]
        raise TypeError(
            f"`adata` must be an AnnData; found a {type(adata).__name__} with the modalities {listed(names)}. "
            f"Pass the one with the counts, such as mdata.mod[{choice!r}]."
        )
    raise TypeError(f"`adata` must be an AnnData; found a {type(adata).__name__}. Wrap it: anndata.AnnData(counts).")


def resolve_mask_var(adata: AnnData, mask_var: str | np.ndarray | None) -> np.ndarray | None:
    """Turn the name of a boolean column of ``adata.var``, or a boolean array, into a checked array.

    Returns
    -------
    Whether each gene is kept, (n_genes,) bool; ``None`` for ``None``.

    Raises
    ------
    CountsError
        If there is no such column, or the mask is not boolean, has the wrong length or keeps no gene.
    """
    if mask_var is None:
        return None
    name = f"adata.var[{mask_var!r}]" if isinstance(mask_var, str) else "`mask_var`"
    values = _column_of_var(adata, mask_var) if isinstance(mask_var, str) else mask_var
    if isinstance(values, pd.Series) and not values.index.equals(adata.var_names):
        raise CountsError(
            f"{name} must list the genes in the order of adata.var_names; found a Series with another index. "
            "Reorder it with .loc[adata.var_names], or pass .to_numpy() if the order is right."
        )
    _check_boolean(values, name)
    mask = np.asarray(values, dtype=bool)
    if mask.shape != (adata.n_vars,):
        raise CountsError(
            f"{name} must have one value per gene, shape ({adata.n_vars},); found shape {mask.shape}. "
            "Make it from this AnnData, after any filtering of genes."
        )
    if not mask.any():
        raise CountsError(f"{name} must keep at least one gene; found none of {adata.n_vars} True. Choose another.")
    return mask


def gene_mean_fraction(counts: csr_matrix, size: np.ndarray) -> np.ndarray:
    """Mean over cells of x / size.

    Parameters
    ----------
    counts
        (n_cells, n_genes).
    size
        Size factor of each cell in counts, (n_cells,), positive.

    Returns
    -------
    (n_genes,) float64.
    """
    if isinstance(counts, StoredCounts) and np.array_equal(np.ravel(size), counts.total):
        return counts.gene_fraction
    n_cells, n_genes = counts.shape
    weight = 1 / np.asarray(size, dtype=np.float64).ravel()
    total = np.zeros(n_genes)
    for rows in blocks_of_rows(n_cells, max(1, counts.nnz // n_cells)):
        total += counts[rows].T @ weight[rows]  # float64, a block at a time: scipy copies the block to float64
    return total / n_cells


def _get_matrix(adata: AnnData, layer: str | None) -> object:
    if layer is None:
        if adata.X is None:
            raise CountsError(
                "adata.X must hold counts; found None. Set adata.X to the counts, or name the layer that holds them "
                f"with `layer`. Layers: {listed(layer_names(adata))}."
            )
        return adata.X
    if layer not in layer_names(adata):
        raise CountsError(
            f"`layer` must name a layer of adata; found {layer!r}, and the layers {listed(layer_names(adata))}. "
            "Pass one of them, or None for adata.X. adata.raw is not read: for that, pass adata.raw.to_adata()."
        )
    return adata.layers[layer]


def _check_not_empty(adata: AnnData, where: str) -> None:
    for number, things, names in ((adata.n_obs, "cells", "obs"), (adata.n_vars, "genes", "var")):
        if number == 0:
            raise CountsError(
                f"{where} must have at least one cell and one gene; found 0 {things}. "
                f"Check the last filter or subset of adata.{names}."
            )


def _column_of_var(adata: AnnData, key: str) -> pd.Series:
    if key not in adata.var.columns:
        boolean = [name for name in adata.var.columns if pd.api.types.is_bool_dtype(adata.var[name])]
        raise CountsError(
            f"`mask_var` must name a boolean column of adata.var; found {key!r}, and the boolean columns "
            f"{listed(boolean)}. Pass one of them; sc.pp.highly_variable_genes makes 'highly_variable'."
        )
    return adata.var[key]


def _check_boolean(values: object, name: str) -> None:
    dtype = getattr(values, "dtype", None)
    dtype = np.asarray(values).dtype if dtype is None else dtype
    if not pd.api.types.is_bool_dtype(dtype):
        raise CountsError(f"{name} must be boolean; found {dtype}. Convert it with .astype(bool) or a comparison.")
    if np.any(pd.isna(values)):
        raise CountsError(f"{name} must be True or False; found missing values. Fill them with .fillna(False).")


def _in_memory(matrix: object) -> object:
    if is_lazy(matrix):
        return matrix.compute()
    return matrix.to_memory() if isinstance(matrix, CSRDataset | CSCDataset) else matrix


def _check_structure(matrix: object, where: str, adata: AnnData) -> None:
    check_structure(matrix, where, (adata.obs_names, adata.var_names), CountsError)


def _check_form(matrix: object, where: str) -> None:
    known = isinstance(matrix, np.ndarray | h5py.Dataset | zarr.Array) and not isinstance(matrix, np.ma.MaskedArray)
    known = known or (sparse.issparse(matrix) and matrix.format in ("csr", "csc"))
    if not known:
        kind = f"{type(matrix).__module__}.{type(matrix).__qualname__}"
        raise TypeError(
            f"{where} must be a scipy.sparse CSR or CSC matrix or a NumPy array; found {kind}. "
            f"Convert it first: {where} = scipy.sparse.csr_matrix(...), for dask after .compute()."
        )
    if matrix.dtype.kind not in "buif":
        raise TypeError(
            f"{where} must hold numbers; found the dtype {matrix.dtype}. Convert it with .astype('float32')."
        )
