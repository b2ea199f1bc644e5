"""Reading of the counts of an AnnData: any form, checked, to CSR float32.

Every check runs before any training, and every message names the cell, gene or layer at fault and a remedy. Nothing
here changes the AnnData.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from typing import TYPE_CHECKING

import h5py
import numpy as np
import pandas as pd
import zarr
from anndata import AnnData
from anndata.abc import CSCDataset, CSRDataset
from scipy import sparse

from scvae_tools._data.structure import check_structure, whole_of_view
from scvae_tools._messages import inform, listed, warn

if TYPE_CHECKING:
    from collections.abc import Callable

    from scipy.sparse import csr_matrix

LARGEST_COUNT = 2**24  #: float32 holds every integer up to here and only some above


LOG_MAXIMUM = 15  #: log1p of three million; a non-integer matrix below it looks log-transformed


DIGESTED_VALUES = 10**7  #: values that are looked at to notice a change

_BLOCK = 2**22  # values handled at once, so that checks and conversions need little memory beside the matrix


class CountsError(ValueError):
    """Error for counts of an AnnData, or genes chosen from it, that cannot be modelled."""


def read_counts(
    adata: AnnData,
    *,
    layer: str | None = None,
    mask_var: str | np.ndarray | None = None,
    allow_non_integer: bool = False,
) -> csr_matrix:
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

    Returns
    -------
    Counts, (n_cells, n_genes kept), float32, with sorted indices and neither duplicates nor explicit zeros. Where the
    AnnData already holds them so, the arrays are its own: do not write into them.

    Raises
    ------
    TypeError
        If ``adata`` is not an AnnData, or holds the counts in an unknown form.
    CountsError
        If the layer or gene mask does not exist, or the values are not counts with at least one in every cell.
    """
    require_anndata(adata)
    where = _name(layer)
    if (whole := whole_of_view(adata)) is not None:  # of which the view's matrix is taken by compiled code
        _check_structure(_get_matrix(whole, layer), where, whole)
    matrix = _get_matrix(adata, layer)
    _check_not_empty(adata, where)
    mask = resolve_mask_var(adata, mask_var)
    matrix = _in_memory(matrix)
    _check_structure(matrix, where, adata)
    found = _Found(_canonical(_to_csr(matrix, mask, where)), where, adata, mask)
    _check_values(found, layer)
    _check_integers(found, layer, allow=allow_non_integer)
    counts = _to_float32(found.counts)
    _check_every_cell_has_counts(counts, adata, where, mask_var)
    _log_genes_without_counts(counts, where)
    return counts


def digest_of_counts(matrix: object) -> int | None:
    """Number by which it is noticed that counts in memory were changed; None for counts in a file.

    Of more than `DIGESTED_VALUES` values, about so many are looked at, at equal distances: a transformation of all
    counts, or other cells, are noticed, a change of a single value may not be.
    """
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


def load_counts(matrix: object) -> csr_matrix:
    """Counts that `read_counts` has accepted, as CSR float32; without a copy where they are held so already."""
    return _to_float32(_canonical(_to_csr(_in_memory(matrix), None, "The matrix")))


def require_anndata(adata: object) -> None:
    """Refuse what is not an AnnData, such as a MuData, and one whose tables are still to be read from a file."""
    if isinstance(adata, AnnData):
        for name in ("obs", "var"):
            if not isinstance(table := getattr(adata, name), pd.DataFrame):
                raise TypeError(
                    f"`adata` must have {name} in memory; found a {type(table).__name__}, as lazily read data have. "
                    "Read them: adata = adata.to_memory()."
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
    n_cells, n_genes = counts.shape
    weight = 1 / np.asarray(size, dtype=np.float64).ravel()
    total = np.zeros(n_genes)
    for rows in _blocks_of_rows(n_cells, max(1, counts.nnz // n_cells)):
        total += counts[rows].T @ weight[rows]  # float64, a block at a time: scipy copies the block to float64
    return total / n_cells


def _name(layer: str | None) -> str:
    return "adata.X" if layer is None else f"adata.layers[{layer!r}]"


def _layer_names(adata: AnnData) -> list[str]:
    return [name for name in adata.layers if name is not None]  # None is X itself since anndata 0.13


def _get_matrix(adata: AnnData, layer: str | None) -> object:
    if layer is None:
        if adata.X is None:
            raise CountsError(
                "adata.X must hold counts; found None. Set adata.X to the counts, or name the layer that holds them "
                f"with `layer`. Layers: {listed(_layer_names(adata))}."
            )
        return adata.X
    if layer not in _layer_names(adata):
        raise CountsError(
            f"`layer` must name a layer of adata; found {layer!r}, and the layers {listed(_layer_names(adata))}. "
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
    return matrix.to_memory() if isinstance(matrix, CSRDataset | CSCDataset) else matrix


def _check_structure(matrix: object, where: str, adata: AnnData) -> None:
    check_structure(matrix, where, (adata.obs_names, adata.var_names), CountsError)


def _to_csr(matrix: object, mask: np.ndarray | None, where: str) -> csr_matrix:
    """Convert any supported form to CSR of a plain number type, sharing memory where it is one already."""
    _check_form(matrix, where)
    if sparse.issparse(matrix):
        return _compressed_to_csr(matrix, mask)
    return _dense_to_csr(matrix, mask)


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
        sparse.csr_matrix(_plain(np.asarray(matrix[rows])[:, genes])) for rows in _blocks_of_rows(n_cells, n_genes)
    ]
    return sparse.vstack(blocks, format="csr") if len(blocks) > 1 else blocks[0]


def _blocks_of_rows(n_rows: int, row_length: int) -> list[slice]:
    """Slices of about `_BLOCK` values each that cover the rows."""
    step = max(1, _BLOCK // row_length)
    return [slice(start, start + step) for start in range(0, n_rows, step)]


def _plain(values: np.ndarray) -> np.ndarray:
    """Make a plain type of booleans, float16 and foreign byte orders: scipy.sparse does not compute with them."""
    if values.dtype.kind == "b" or (values.dtype.kind == "f" and values.dtype.itemsize < 4):
        return values.astype(np.float32)
    return values.astype(values.dtype.newbyteorder("="), copy=False)


def _canonical(counts: csr_matrix) -> csr_matrix:
    """Sort indices, add duplicates up and drop explicit zeros, in a copy if anything is to be done."""
    if counts.has_canonical_format and np.count_nonzero(counts.data) == counts.nnz:
        return counts
    wide = np.float64 if counts.dtype.kind == "f" else np.int64  # duplicates in uint8 could wrap around
    counts = counts.astype(np.promote_types(counts.dtype, wide), copy=True)
    counts.sum_duplicates()
    counts.eliminate_zeros()
    return counts


def _to_float32(counts: csr_matrix) -> csr_matrix:
    counts = counts.astype(np.float32, copy=False)
    if np.count_nonzero(counts.data) < counts.nnz:  # an estimated count below 1e-45 has become 0
        counts = counts.copy()
        counts.eliminate_zeros()
    return counts


@dataclass(frozen=True)
class _Found:
    """Counts before the checks, with the names that the user knows them by."""

    counts: csr_matrix
    where: str
    adata: AnnData
    mask: np.ndarray | None

    def describe(self, is_bad: Callable[[np.ndarray], np.ndarray], kind: str) -> str | None:
        """Say how many stored values are bad, and where the first is; ``None`` if there are none."""
        number, first = 0, -1
        for start in range(0, self.counts.nnz, _BLOCK):
            bad = np.flatnonzero(is_bad(self.counts.data[start : start + _BLOCK]))
            if len(bad) and not number:
                first = start + bad[0]
            number += len(bad)
        if not number:
            return None
        values = "value" if number == 1 else "values, the first"
        return f"{number:,} {kind} {values} {self.counts.data[first]:.8g} in {self._place(first)}"

    def _place(self, position: int) -> str:
        row = np.searchsorted(self.counts.indptr, position, side="right") - 1
        column = self.counts.indices[position]
        genes = self.adata.var_names if self.mask is None else self.adata.var_names[self.mask]
        return f"cell {self.adata.obs_names[row]!r}, gene {genes[column]!r}"


def _check_values(found: _Found, layer: str | None) -> None:
    """Refuse NaN, infinite, negative and too large values, in this order, as the first may explain the others."""
    _refuse(found, np.isnan, "NaN", "Remove those cells or genes, or read the counts from their source again.")
    _refuse(found, np.isinf, "infinite", "Look for a division by 0, or read the counts from their source again.")
    if (message := found.describe(lambda values: values < 0, "negative")) is not None:
        raise CountsError(
            f"{found.where} must hold counts; found {message}. Has it been scaled (sc.pp.scale) or batch-corrected? "
            f"{_where_counts_are(found.adata, layer)}"
        )
    _refuse(
        found,
        lambda values: values > LARGEST_COUNT,
        "too large",
        f"float32 holds integers exactly up to 2**24 = {LARGEST_COUNT:,}: remove those genes or cells.",
    )


def _refuse(found: _Found, is_bad: Callable[[np.ndarray], np.ndarray], kind: str, remedy: str) -> None:
    if (message := found.describe(is_bad, kind)) is not None:
        raise CountsError(f"{found.where} must hold counts; found {message}. {remedy}")


def _check_integers(found: _Found, layer: str | None, *, allow: bool) -> None:
    """Refuse non-integer values, or warn of them if they are allowed."""
    if found.counts.dtype.kind != "f":
        return
    message = found.describe(lambda values: values != np.rint(values), "non-integer")
    if message is None:
        return
    looks = (
        f"; it looks log-transformed, with a maximum of {found.counts.data.max():.3g}"
        if _looks_log_transformed(found, layer)
        else ""
    )
    if allow:
        text = f"{found.where} holds {message}{looks}. They are modelled as estimated counts (allow_non_integer=True)."
        warn(text)
        return
    raise CountsError(
        f"{found.where} must hold integer counts; found {message}{looks}. {_where_counts_are(found.adata, layer)} "
        "If these are estimated counts (salmon, RSEM, ambient RNA removed), pass allow_non_integer=True."
    )


def _looks_log_transformed(found: _Found, layer: str | None) -> bool:
    noted = layer is None and "log1p" in found.adata.uns  # what sc.pp.log1p leaves, for X
    return noted or found.counts.data.max() < LOG_MAXIMUM


def _where_counts_are(adata: AnnData, layer: str | None) -> str:
    """Say in which other place of the AnnData there are integer counts, as far as its first values tell."""
    for name in _layer_names(adata):
        if name != layer and _seem_counts(adata.layers[name]):
            return f"adata.layers[{name!r}] holds integer counts: pass layer={name!r}."
    if layer is not None and _seem_counts(adata.X):
        return "adata.X holds integer counts: pass layer=None."
    if adata.raw is not None and _seem_counts(adata.raw.X):
        return "adata.raw holds integer counts: pass adata.raw.to_adata()."
    return "Pass the raw counts, or name the layer that holds them with `layer`."


def _seem_counts(matrix: object) -> bool:
    """Whether the first values are non-negative integers, not all 0."""
    if sparse.issparse(matrix):
        values = matrix.data[:100_000]
    elif isinstance(matrix, np.ndarray | h5py.Dataset | zarr.Array | CSRDataset):
        values = matrix[:50]
    elif isinstance(matrix, CSCDataset):
        values = matrix[:, :50]
    else:
        return False
    values = values.data if sparse.issparse(values) else np.asarray(values)
    if values.dtype.kind not in "buif":
        return False
    return bool(np.any(values > 0) and np.all(values >= 0) and np.all(values == np.rint(values)))


def _check_every_cell_has_counts(
    counts: csr_matrix, adata: AnnData, where: str, mask_var: str | np.ndarray | None
) -> None:
    empty = np.flatnonzero(np.diff(counts.indptr) == 0)
    if len(empty) == 0:
        return
    kept = "" if mask_var is None else f" of the {counts.shape[1]:,} kept"
    raise CountsError(
        f"{where} must have at least one count in every cell; found {len(empty):,} of {adata.n_obs:,} cells without a "
        f"count in any gene{kept}: {first_cells(adata, empty)}. {_remedy_for_empty_cells(where, mask_var)}"
    )


def _remedy_for_empty_cells(where: str, mask_var: str | np.ndarray | None) -> str:
    if where == "adata.X" and mask_var is None:
        return "Remove them with sc.pp.filter_cells(adata, min_counts=1)."
    genes = "" if mask_var is None else f"[:, {_mask_code(mask_var)}]"
    return (
        "sc.pp.filter_cells(adata, min_counts=1) looks at all genes of adata.X; remove them with "
        f"adata = adata[np.asarray({where}{genes}.sum(axis=1)).ravel() > 0].copy()"
        + ", or keep more genes."
        * bool(genes)
    )


def _mask_code(mask_var: str | np.ndarray) -> str:
    return f"adata.var[{mask_var!r}].to_numpy()" if isinstance(mask_var, str) else "mask_var"


def _log_genes_without_counts(counts: csr_matrix, where: str) -> None:
    seen = np.zeros(counts.shape[1], dtype=bool)
    seen[counts.indices] = True
    number = int((~seen).sum())
    if number:
        inform("%s: %d of %d genes have no count in any cell.", where, number, counts.shape[1])


def first_cells(adata: AnnData, positions: np.ndarray) -> str:
    shown = ", ".join(repr(adata.obs_names[position]) for position in positions[:3])
    return shown + (", ..." if len(positions) > 3 else "")
