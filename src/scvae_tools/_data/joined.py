"""Sparse matrices of several zarr groups, as of a collection of annbatch, as one matrix that stays in the files."""

from __future__ import annotations

from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from anndata.abc import CSRDataset
from scipy import sparse

from scvae_tools._data.structure import REMEDY, fault_of_pointers
from scvae_tools._on_disk import missing_chunks, new_array, place_of

if TYPE_CHECKING:
    from collections.abc import Sequence

    import h5py
    import zarr
    from scipy.sparse import csr_matrix

#: Values that are written at a time.
BLOCK = 2**22


class JoinedArray:
    """Arrays of one axis, one after another, of which slices are read.

    Parameters
    ----------
    arrays
        Arrays of zarr.
    lengths
        Number of values of each that count; what is behind them is left out.
    """

    def __init__(self, arrays: Sequence[zarr.Array], lengths: Sequence[int]) -> None:
        self.arrays, self.ends = list(arrays), np.cumsum(lengths)
        self.shape = (int(self.ends[-1]),)
        self.dtype = np.result_type(*(array.dtype for array in arrays))
        #: The largest: how far a run of cells must go to be worth a chunk.
        self.chunks = (max(array.chunks[0] for array in arrays),)

    def __getitem__(self, index: slice) -> np.ndarray:
        low, high, _ = index.indices(self.shape[0])
        first, last = np.searchsorted(self.ends, [low, high - 1], side="right")
        begins = np.append(0, self.ends)
        found = [
            np.asarray(self.arrays[i][max(0, low - int(begins[i])) : min(high, int(begins[i + 1])) - int(begins[i])])
            for i in range(first, last + 1)
        ]
        return np.concatenate(found) if found else np.empty(0, dtype=self.dtype)


class JoinedCounts(CSRDataset):
    """Matrices stored by cell in zarr as one, (n_cells, n_genes): the cells of each follow those of the one before.

    It can be the X or a layer of an AnnData.

    Parameters
    ----------
    parts
        Matrices with the same number of genes, each with one cell at least.
    """

    def __init__(self, parts: Sequence[CSRDataset]) -> None:
        self.parts = list(parts)
        self.first_cell = np.cumsum([0, *(part.shape[0] for part in parts)])
        self.shape = (int(self.first_cell[-1]), parts[0].shape[1])
        self.dtype = np.result_type(*(part.group["data"].dtype for part in parts))

    def __repr__(self) -> str:
        return f"JoinedCounts: {self.shape[0]:,} cells x {self.shape[1]:,} genes in {len(self.parts):,} matrices"

    @property
    def backend(self) -> Literal["zarr"]:
        """Kind of file, as anndata names it."""
        return "zarr"

    @cached_property
    def group(self) -> dict[str, JoinedArray]:
        """Arrays of all cells, by the names that they have in the files, but for the pointers."""
        lengths = [int(part.group["indptr"][-1]) for part in self.parts]
        names = ("data", "indices")
        return {name: JoinedArray([part.group[name] for part in self.parts], lengths) for name in names}

    def place_of(self, first: int = 0, last: int | None = None) -> str:
        """Files, and paths in them, of a range of cells; of all by default."""
        last = self.shape[0] if last is None else last
        low, high = np.searchsorted(self.first_cell, [first, max(first, last - 1)], side="right") - 1
        found = place_of(self.parts[low])
        return found if low == high else f"{found} to {place_of(self.parts[high])}"

    def pointers(self, where: str, error: type[Exception] = ValueError) -> np.ndarray:
        """Number of values before each cell, (n_cells + 1,) int64, of parts that are complete and well-formed.

        Raises
        ------
        Exception
            Of the class ``error`` if a part is not, or OSError if its pointers cannot be read.
        """
        found, before = [np.zeros(1, dtype=np.int64)], 0
        for part in self.parts:
            own = pointers_of(part, part.group, where, error)
            found.append(own[1:] + before)
            before += own[-1]
        return np.concatenate(found)

    # -- reading -------------------------------------------------------------------------------------------------------

    def __getitem__(self, index: Any) -> csr_matrix:
        cells, genes = index if isinstance(index, tuple) else (index, slice(None))
        cells, genes = (each.ravel() if isinstance(each, np.ndarray) else each for each in (cells, genes))
        wanted, place = np.unique(np.atleast_1d(np.arange(self.shape[0])[cells]), return_inverse=True)
        of_part = np.searchsorted(self.first_cell, wanted, side="right") - 1
        parts = [self.parts[i][wanted[of_part == i] - self.first_cell[i]] for i in np.unique(of_part)]
        if not parts:
            return sparse.csr_matrix((0, self.shape[1]), dtype=self.dtype)[:, genes]
        return sparse.vstack(parts, format="csr")[place][:, genes]

    def to_memory(self) -> csr_matrix:
        """All counts, in memory."""
        indptr = self.pointers("The matrix")
        values, indices = (self.group[name][:] for name in ("data", "indices"))
        return sparse.csr_matrix((values, indices, indptr), shape=self.shape)

    def copy(self) -> JoinedCounts:
        """These counts themselves, since nothing changes them but their files."""
        return self

    def __deepcopy__(self, memo: object) -> JoinedCounts:
        return self

    # -- writing -------------------------------------------------------------------------------------------------------

    @property
    def n_bytes(self) -> int:
        """Bytes that `write_to` writes."""
        arrays = self.group.values()
        return sum(array.shape[0] * array.dtype.itemsize for array in arrays) + 8 * (self.shape[0] + 1)

    def write_to(self, group: h5py.Group | zarr.Group, name: str) -> None:
        """Write all as one CSR matrix into a group of a file, in the format of anndata, a block at a time."""
        indptr = self.pointers(name)
        made = group.create_group(name)
        made.attrs.update({"encoding-type": "csr_matrix", "encoding-version": "0.1.0", "shape": list(self.shape)})
        new_array(made, "indptr", indptr.shape, np.int64)[:] = indptr
        for key, array in self.group.items():
            target = new_array(made, key, array.shape, array.dtype)
            for low in range(0, array.shape[0], BLOCK):
                target[low : low + BLOCK] = array[low : low + BLOCK]


def pointers_of(
    matrix: CSRDataset, group: h5py.Group | zarr.Group, where: str, error: type[Exception] = ValueError
) -> np.ndarray:
    """Number of values before each cell of a matrix in a file, (n_cells + 1,) int64, checked.

    Parameters
    ----------
    matrix
        Matrix, (n_cells, n_genes).
    group
        Its group, as it is open.
    where
        Name of the matrix in messages.
    error
        Class of the error for a matrix that is not complete or not well-formed.

    Raises
    ------
    OSError
        If the pointers cannot be read.
    """
    if (lacking := missing_chunks(matrix)) is not None:
        raise error(f"{where} must be complete; found {lacking}. Copy the file from its source again.")
    name = f"{where} ({place_of(matrix)})"
    try:
        start = np.asarray(group["indptr"][:]).astype(np.int64)
    except Exception as fault:
        raise OSError(f"indptr of {name} cannot be read: {fault}. Copy the file from its source again.") from fault
    stored = (group[each].shape[0] for each in ("indices", "data"))
    found = fault_of_pointers(start, matrix.shape[0], "cell", *stored)
    if found is not None:
        raise error(f"{name} must be a well-formed sparse matrix; found {found}. {REMEDY}")
    return start
