"""Counts that stay where they are, in a file or a lazy array, of which rows are read when they are asked for."""

from __future__ import annotations

from contextlib import contextmanager
from functools import cache
from typing import TYPE_CHECKING, Any

import h5py
import numpy as np
from anndata.abc import CSCDataset, CSRDataset
from scipy import sparse

from scvae_tools._data import conversion
from scvae_tools._data.conversion import canonical, to_csr, to_float32
from scvae_tools._data.count_checks import CountsError
from scvae_tools._data.joined import JoinedCounts, pointers_of
from scvae_tools._data.structure import check_structure
from scvae_tools._files import short_digest
from scvae_tools._on_disk import new_array, place_of

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from typing import Literal

    import zarr
    from scipy.sparse import csr_matrix

#: Bytes of the counts, as CSR float32, up to which they are read as a whole: what a laptop does not notice.
LARGEST_WHOLE = 2**28
#: Values between two rows that are read as well rather than asked for twice; about what a disk reads while it seeks.
LARGEST_GAP = 2**15
#: Values of a chunk of a dense or lazy array up to which it is read as a whole.
LARGEST_CHUNK = 2**26


def is_lazy(matrix: object) -> bool:
    """Whether a matrix is a dask array; told without importing dask."""
    return type(matrix).__module__.startswith("dask.array")


def n_bytes_as_csr(matrix: object) -> int:
    """Bytes that a matrix takes as CSR float32, or would if no value were 0."""
    n_values = matrix.group["data"].shape[0] if isinstance(matrix, CSRDataset | CSCDataset) else np.prod(matrix.shape)
    return 8 * int(n_values)


def marks_of(counts: csr_matrix) -> np.ndarray:
    """Sum of each cell's counts, (n_cells,) float32, with a weight for each gene, so that other counts have another."""
    return counts @ _weights(counts.shape[1])


@cache
def _weights(n_genes: int) -> np.ndarray:
    return np.random.default_rng(0).uniform(0.5, 1.5, n_genes).astype(np.float32)


def _place_in_hdf5(matrix: Any) -> tuple[str, str] | None:
    """Path of the file and name in it; None for others than HDF5."""
    held = matrix.group if isinstance(matrix, CSRDataset) else matrix
    return (held.file.filename, held.name) if isinstance(held, h5py.Group | h5py.Dataset) else None


class StoredCounts(CSRDataset):
    """Counts, (n_cells, n_genes), of which rows come as CSR float32 without duplicates and explicit zeros.

    It can be the X or a layer of an AnnData. What is known of all cells, such as their totals, is there once `note` was
    called, as `scvae_tools._data.survey.survey` does when it has checked all values.

    Parameters
    ----------
    matrix
        An ``anndata.abc.CSRDataset``, or an array of h5py, zarr or dask, (n_cells, n_genes of the file).
    genes
        Places of the genes to read, in their order; None for all.
    where
        Name of the matrix in messages, such as ``adata.X``.
    cell_names
        Names of the cells.

    Attributes
    ----------
    indptr
        Number of counts that are not 0 before each cell, (n_cells + 1,) int64, as of a CSR matrix.
    total, gene_total
        Sums, (n_cells,) float32 and (n_genes,) float64.
    gene_fraction
        Mean over the cells of the share that a gene has of a cell's counts, (n_genes,) float64.
    largest, is_whole
        The largest count, and whether all are whole numbers.
    digest
        Digest of all counts.
    mark
        Number of each cell by which a change of its counts is noticed, (n_cells,) float32, see `marks_of`; or None.
    """

    def __init__(self, matrix: Any, genes: np.ndarray | None, where: str, cell_names: Sequence[str]) -> None:
        self.matrix, self.genes, self.where, self.cell_names = matrix, genes, where, cell_names
        self.shape = (matrix.shape[0], matrix.shape[1] if genes is None else len(genes))
        self.dtype, self.n_in_file = np.dtype(np.float32), matrix.shape[1]
        self._reopened: h5py.Group | h5py.Dataset | None = None
        self._opened_arrays: tuple[Any, tuple[Any, Any]] = (None, (None, None))
        self._place = _place_in_hdf5(matrix)
        self._place_of_file = None if is_lazy(matrix) or isinstance(matrix, JoinedCounts) else place_of(matrix)
        self._start = self._pointers() if isinstance(matrix, CSRDataset) else None
        self._chunk = self._size_of_chunk()
        self.indptr: np.ndarray | None = None

    def __repr__(self) -> str:
        return f"StoredCounts: {self.where}, {self.shape[0]:,} cells x {self.shape[1]:,} genes, read when needed"

    @property
    def backend(self) -> Literal["zarr", "hdf5"]:
        """Kind of file, as anndata names it."""
        return "hdf5" if getattr(self.matrix, "backend", None) == "hdf5" else "zarr"

    @property
    def nnz(self) -> int:
        """Number of counts that are not 0."""
        return int(self.indptr[-1])

    def note(self, indptr: np.ndarray, **known: Any) -> None:
        """Take what is known of all cells; see the attributes."""
        self.indptr = indptr
        vars(self).update(known)

    def copy(self) -> StoredCounts:
        """These counts themselves, since nothing changes them but their file."""
        return self

    def __deepcopy__(self, memo: object) -> StoredCounts:
        return self

    def of_genes(self, places: np.ndarray, cell_names: Sequence[str]) -> StoredCounts:
        """Counts of the same cells and of genes chosen by their places, not checked yet."""
        genes = places if self.genes is None else self.genes[places]
        return StoredCounts(self.matrix, genes, self.where, cell_names)

    def in_order(self, places: np.ndarray) -> StoredCounts:
        """Counts of the same cells and genes, these in another order, with what is known of them."""
        ordered = self.of_genes(places, self.cell_names)
        known = {name: getattr(self, name) for name in ("total", "largest", "is_whole")}
        known |= {"gene_total": self.gene_total[places], "gene_fraction": self.gene_fraction[places]}
        digest = short_digest(self.digest.encode(), places.astype(np.int64))
        ordered.note(self.indptr, **known, digest=digest, mark=None)
        return ordered

    def _name(self, first: int, last: int) -> str:
        """Name of cells in messages, with their file."""
        if is_lazy(self.matrix):
            return self.where
        is_joined = isinstance(self.matrix, JoinedCounts)
        place = self.matrix.place_of(first, last) if is_joined else self._place_of_file
        return f"{self.where} ({place})"

    # -- reading -------------------------------------------------------------------------------------------------------

    def blocks(self) -> Iterator[tuple[int, int]]:
        """First and last cell of blocks of about `conversion.BLOCK` values that cover all cells."""
        n = self.shape[0]
        if self._start is None:
            width, in_chunk = self.n_in_file, self._chunk
            step = max(1, conversion.BLOCK // width)
            if in_chunk * width <= LARGEST_CHUNK:  # no chunk is read twice
                step = -(-step // in_chunk) * in_chunk
            bounds = np.arange(0, n, step)
        else:
            wanted = np.arange(0, self._start[-1] + 1, conversion.BLOCK)
            bounds = np.unique(np.append(0, np.searchsorted(self._start, wanted, side="right")[1:] - 1))
        for first, last in zip(bounds, [*bounds[1:], n], strict=True):
            if first < last:
                yield int(first), int(last)

    def read(self, first: int, last: int) -> csr_matrix:
        """Rows as they are in the file, of the chosen genes and a plain type of numbers; the structure is checked."""
        if self._start is not None:
            return self._of_file([np.arange(first, last)])
        with self._names_cells(first, last):
            part = self._opened()[first:last]
            part = part.compute() if is_lazy(part) else part
            part = to_csr(part if sparse.issparse(part) else np.asarray(part), None)
        return part if self.genes is None else part[:, self.genes]

    @contextmanager
    def _names_cells(self, first: int, last: int) -> Iterator[None]:
        """Context in which an error names the file and the cells that are read."""
        try:
            yield
        except CountsError:
            raise
        except Exception as error:
            raise OSError(
                f"{self._name(first, last)} cannot be read from cell {first:,} ({self.cell_names[first]!r}) to "
                f"{last:,}: {error}. The file may be cut short, damaged or closed: open it again, or copy it from its "
                "source."
            ) from error

    def _of_file(self, pieces: list[np.ndarray]) -> csr_matrix:
        """Rows of a sparse matrix, as `read` does; the cells of each piece, ascending, are read at once."""
        cells = np.concatenate(pieces)
        indptr = np.append(0, np.cumsum(self._start[cells + 1] - self._start[cells]))
        with self._names_cells(int(cells[0]), int(cells[-1]) + 1):
            data, indices = (np.empty(indptr[-1], dtype=array.dtype) for array in self._arrays())
        ends = indptr[np.cumsum([len(piece) for piece in pieces])]
        for piece, low, high in zip(pieces, [0, *ends], ends, strict=False):
            data[low:high], indices[low:high] = self._values_of(piece)
        part = sparse.csr_matrix((len(cells), self.n_in_file), dtype=data.dtype)
        part.data, part.indices, part.indptr = data, indices, indptr
        check_structure(
            part, self._name(int(cells[0]), int(cells[-1]) + 1), (self.cell_names[cells], ()), error=CountsError
        )
        part = to_csr(part, None)
        return part if self.genes is None else part[:, self.genes]

    def _values_of(self, cells: np.ndarray) -> list[np.ndarray]:
        """Values, and the places of their genes, of cells that are read in one piece."""
        first, last = int(cells[0]), int(cells[-1]) + 1
        low, high = int(self._start[first]), int(self._start[last])
        with self._names_cells(first, last):
            found = [array[low:high] for array in self._arrays()]
            if any(len(each) != high - low for each in found):
                raise ValueError(f"{len(found[0]):,} values and {len(found[1]):,} indices in place of {high - low:,}")
        if last - first == len(cells):
            return found
        length = self._start[cells + 1] - self._start[cells]
        chosen = np.repeat(self._start[cells] - low - np.cumsum(length) + length, length) + np.arange(length.sum())
        return [each[chosen] for each in found]

    def _opened(self) -> Any:
        """Group or array of the file, opened again where it was closed, as by `AnnData.to_memory`."""
        held = self.matrix.group if isinstance(self.matrix, CSRDataset) else self.matrix
        if self._place is None or held:
            return held
        path, name = self._place
        if self._reopened is None or not self._reopened:
            self._reopened = h5py.File(path, "r")[name]
        return self._reopened

    def _arrays(self) -> tuple[Any, Any]:
        """Values and places of the genes in the file; zarr reads what they are from the file whenever one is opened."""
        group = self._opened()
        if self._opened_arrays[0] is not group:
            self._opened_arrays = group, (group["data"], group["indices"])
        return self._opened_arrays[1]

    def _pointers(self) -> np.ndarray:
        if isinstance(self.matrix, JoinedCounts):
            return self.matrix.pointers(self.where, CountsError)
        return pointers_of(self.matrix, self._opened(), self.where, CountsError)

    def rows(self, first: int, last: int) -> csr_matrix:
        """Rows in one piece."""
        return self._as_checked(self.read(first, last), np.arange(first, last))

    def _as_checked(self, part: csr_matrix, cells: np.ndarray) -> csr_matrix:
        """Rows that were read, in the form that is promised, if they are those that were checked."""
        part = to_float32(canonical(part))
        is_other = np.diff(part.indptr) != self.indptr[cells + 1] - self.indptr[cells]
        if self.mark is not None:
            is_other |= marks_of(part) != self.mark[cells]
        if is_other.any():
            cell = int(cells[np.flatnonzero(is_other)[0]])
            raise CountsError(
                f"{self._name(cell, cell + 1)} must hold the counts that were checked; cell {self.cell_names[cell]!r} "
                "has other ones now. Has the file been changed since? Open it again, and begin anew."
            )
        return part

    def __getitem__(self, index: Any) -> csr_matrix:
        if isinstance(index, tuple):
            cells, genes = index
            return self[cells.ravel() if isinstance(cells, np.ndarray) else cells][
                :, genes.ravel() if isinstance(genes, np.ndarray) else genes
            ]
        positions = np.atleast_1d(np.arange(self.shape[0])[index])
        wanted, place = np.unique(positions, return_inverse=True)
        if len(wanted) == 0:
            return sparse.csr_matrix((0, self.shape[1]), dtype=np.float32)
        whole = self._of_pieces(self._pieces(wanted))
        return whole if np.array_equal(place, np.arange(whole.shape[0])) else whole[place]

    def _of_pieces(self, pieces: list[np.ndarray]) -> csr_matrix:
        """Rows of cells, those of each piece, ascending, read at once."""
        if self._start is not None:
            return self._as_checked(self._of_file(pieces), np.concatenate(pieces))
        parts = []
        for cells in pieces:
            rows = self.rows(int(cells[0]), int(cells[-1]) + 1)
            parts.append(rows if rows.shape[0] == len(cells) else rows[cells - cells[0]])
        return parts[0] if len(parts) == 1 else sparse.vstack(parts, format="csr")

    def _pieces(self, cells: np.ndarray) -> list[np.ndarray]:
        """Cells, ascending, in pieces that are read at once: near each other, and not too many."""
        gap = self.indptr[cells[1:]] - self.indptr[cells[:-1] + 1]
        is_first = np.append(True, gap > max(LARGEST_GAP, self.values_at_once))
        begin = self.indptr[cells[is_first]][np.cumsum(is_first) - 1]
        block = (self.indptr[cells] - begin) // conversion.BLOCK
        cuts = np.flatnonzero(is_first[1:] | (np.diff(block) > 0)) + 1
        return np.split(cells, cuts)

    @property
    def values_at_once(self) -> int:
        """Counts that the file holds in one piece, so that fewer take as long to read; 1 where it is in none."""
        return self._chunk if self._start is not None else max(1, self._chunk * self.nnz // self.shape[0])

    def _size_of_chunk(self) -> int:
        """Values of a sparse matrix, or cells of an array, in one piece; 1 where they are in none."""
        matrix = self._opened() if self._start is None else self._opened()["data"]
        chunks = (matrix.chunks or (1,))[0]
        return int(max(chunks) if is_lazy(matrix) else chunks)

    def to_memory(self) -> csr_matrix:
        """All counts, in memory."""
        return self[:]

    # -- writing -------------------------------------------------------------------------------------------------------

    @property
    def n_bytes(self) -> int:
        """Bytes that `write_to` writes."""
        return 8 * self.nnz + self.indptr.nbytes

    def write_to(self, group: h5py.Group | zarr.Group, name: str) -> None:
        """Write all counts as a CSR matrix into a group of a file, in the format of anndata, a block at a time."""
        made = group.create_group(name)
        made.attrs.update({"encoding-type": "csr_matrix", "encoding-version": "0.1.0", "shape": list(self.shape)})
        new_array(made, "indptr", self.indptr.shape, np.int64)[:] = self.indptr
        data, indices = (
            new_array(made, *each) for each in (("data", (self.nnz,), "f4"), ("indices", (self.nnz,), "i4"))
        )
        for first, last in self.blocks():
            rows, place = self.rows(first, last), slice(int(self.indptr[first]), int(self.indptr[last]))
            data[place], indices[place] = rows.data, rows.indices

    # -- sums, as of a CSR matrix --------------------------------------------------------------------------------------

    def sum(self, axis: int) -> np.ndarray:
        """Sums over the cells, (1, n_genes) float64, or over the genes, (n_cells, 1) float32."""
        return self.gene_total[None] if axis == 0 else self.total[:, None]

    def mean(self, axis: int) -> np.ndarray:
        """Means over the cells, (1, n_genes), or over the genes, (n_cells, 1)."""
        return self.sum(axis) / self.shape[axis]
