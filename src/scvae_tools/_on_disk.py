"""Matrices of an AnnData that stay in their h5ad or zarr file: opened, measured, and copied to another file."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import h5py
import numpy as np
import zarr
from anndata import AnnData
from anndata.abc import CSCDataset, CSRDataset
from anndata.io import read_elem, sparse_dataset

if TYPE_CHECKING:
    from pathlib import Path

#: Values that are copied at a time.
BLOCK = 2**22
SPARSE = {"csr_matrix", "csc_matrix"}
IN_MEMORY = ("obs", "var", "obsm", "varm", "obsp", "varp", "uns")


def open_file(path: Path) -> h5py.File | zarr.Group:
    """Open an h5ad or zarr file to be read."""
    return zarr.open_group(str(path), mode="r") if path.is_dir() else h5py.File(path, "r")


def matrices_in(file: h5py.File | zarr.Group) -> dict[str, Any]:
    """X, layers and X of raw, by their path in the file, as they are on disk; those in other encodings are left out."""
    names = ["X", *(f"layers/{name}" for name in file.get("layers", ())), "raw/X"]
    found = {name: _on_disk(file[name]) for name in names if name in file}
    return {name: matrix for name, matrix in found.items() if matrix is not None}


def _on_disk(element: Any) -> Any:
    kind = element.attrs.get("encoding-type")
    if kind in SPARSE:
        return sparse_dataset(element)
    return element if kind == "array" and len(element.shape) == 2 else None


def open_adata(file: h5py.File | zarr.Group, matrices: dict[str, Any]) -> AnnData:
    """AnnData of an open file with matrices of `matrices_in`; all else is read into memory.

    Parameters
    ----------
    file
        In the present format of anndata, see `is_present_format`.
    matrices
        By their path in the file; those that it has not are read.
    """
    names = [f"layers/{name}" for name in file.get("layers", ())]
    parts = {name: read_elem(file[name]) for name in IN_MEMORY if name in file}
    parts["layers"] = {name.partition("/")[2]: _matrix(file, name, matrices) for name in names}
    if "raw" in file:
        of_raw = {name: read_elem(file[f"raw/{name}"]) for name in ("var", "varm") if name in file["raw"]}
        parts["raw"] = {"X": _matrix(file, "raw/X", matrices), **of_raw}
    return AnnData(_matrix(file, "X", matrices) if "X" in file else None, **parts)


def _matrix(file: h5py.File | zarr.Group, name: str, matrices: dict[str, Any]) -> Any:
    return matrices[name] if name in matrices else read_elem(file[name])


def is_present_format(file: h5py.File | zarr.Group) -> bool:
    """Whether the file is in the format that anndata writes since 0.7, in which each part says what it is."""
    tables = [file[name].attrs.get("encoding-type") for name in ("obs", "var") if name in file]
    return file.attrs.get("encoding-type") == "anndata" and tables == ["dataframe"] * 2


def is_on_disk(value: object) -> bool:
    """Whether a matrix is in an HDF5 or zarr file."""
    return isinstance(value, CSRDataset | CSCDataset | h5py.Dataset | zarr.Array)


def n_bytes_on_disk(matrix: Any) -> int:
    """Bytes of a matrix in an HDF5 or zarr file, before compression."""
    return sum(math.prod(array.shape) * np.dtype(array.dtype).itemsize for array in _arrays(matrix).values())


def _arrays(matrix: Any) -> dict[str, Any]:
    is_sparse = isinstance(matrix, CSRDataset | CSCDataset)
    return {name: matrix.group[name] for name in ("data", "indices", "indptr")} if is_sparse else {"": matrix}


def missing_chunks(matrix: Any) -> str | None:
    """What a sparse matrix in zarr lacks, which would be read as zeros; None if nothing.

    zarr leaves out chunks that are all zeros. Values that are stored, and the places of the genes, are not so.
    """
    if not (isinstance(matrix, CSRDataset | CSCDataset) and isinstance(matrix.group, zarr.Group)):
        return None
    for name, array in _arrays(matrix).items():
        is_zero = name == "indptr" or (name == "indices" and min(matrix.shape) == 1)
        kind, n_pieces, n_there = _pieces_of(array)
        if not is_zero and n_there < n_pieces:
            return f"{n_pieces - n_there:,} of the {n_pieces:,} {kind} of {name!r} missing in {place_of(matrix)}"
    return None


def _pieces_of(array: zarr.Array) -> tuple[str, int, int]:
    """What zarr writes as a file each, chunks or shards of many, their number, and how many are there."""
    shards = getattr(array, "shards", None)
    if not shards:
        return "chunks", array.nchunks, array.nchunks_initialized
    in_shard = math.prod(shard // chunk for shard, chunk in zip(shards, array.chunks, strict=True))
    n_shards = math.prod(math.ceil(size / shard) for size, shard in zip(array.shape, shards, strict=True))
    # zarr counts all chunks that would be in a shard, also those of the last one that are beyond the array.
    return "chunks" if in_shard == 1 else "shards", n_shards, array.nchunks_initialized // in_shard


def place_of(matrix: Any) -> str:
    """File and path in it of a matrix on disk."""
    part = matrix.group if isinstance(matrix, CSRDataset | CSCDataset) else matrix
    if isinstance(part, h5py.Dataset | h5py.Group):
        return f"{part.file.filename!r}, {part.name}" if part else "a file that is closed"
    root = getattr(part.store, "root", None) or getattr(part.store, "path", part.store)
    return f"{str(root)!r}, {part.path}"


def copy_on_disk(matrix: Any, group: h5py.Group | zarr.Group, name: str) -> None:
    """Copy a matrix in a file into a group of another file, a block at a time; within HDF5 as it is, compressed."""
    is_sparse = isinstance(matrix, CSRDataset | CSCDataset)
    source = matrix.group if is_sparse else matrix
    if isinstance(group, h5py.Group) and isinstance(source, h5py.Dataset | h5py.Group):
        group.copy(source, name)
        return
    if not is_sparse:
        _copy_array(source, group, name)
        return
    made = group.create_group(name)
    for part, array in _arrays(matrix).items():
        _copy_array(array, made, part)
    made.attrs.update(_plain(source.attrs))


def _copy_array(source: Any, group: h5py.Group | zarr.Group, name: str) -> None:
    # Those within shards may be too many files.
    chunks = None if getattr(source, "shards", None) else source.chunks
    made = new_array(group, name, source.shape, source.dtype, chunks=chunks)
    n_rows = _rows_at_once(source.shape)
    if source.chunks:  # no chunk is written, or read, twice
        n_rows = math.ceil(n_rows / source.chunks[0]) * source.chunks[0]
    for low in range(0, source.shape[0], n_rows):
        made[low : low + n_rows] = source[low : low + n_rows]
    made.attrs.update(_plain(source.attrs))


def _rows_at_once(shape: tuple[int, ...]) -> int:
    return max(1, BLOCK // max(1, math.prod(shape[1:])))


def new_array(
    group: h5py.Group | zarr.Group,
    name: str,
    shape: tuple[int, ...],
    dtype: np.dtype | type,
    *,
    chunks: tuple[int, ...] | None = None,
) -> h5py.Dataset | zarr.Array:
    """Array to be filled by slices of rows; the chunks are those of zarr, HDF5 has none."""
    if isinstance(group, h5py.Group):
        return group.create_dataset(name, shape=shape, dtype=dtype)
    create = getattr(group, "create_array", None) or group.create_dataset  # the latter before zarr 3
    rows = max(1, min(_rows_at_once(shape) // 16, shape[0]))
    return create(name, shape=shape, dtype=dtype, chunks=chunks or (rows, *shape[1:]))


def _plain(attributes: Any) -> dict[str, Any]:
    return {name: value.tolist() if hasattr(value, "tolist") else value for name, value in dict(attributes).items()}
