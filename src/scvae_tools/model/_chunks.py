"""Results that are filled chunk by chunk, without a second copy in memory."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from torch import Tensor


class FilledRows:
    """Array that is filled with the rows of one batch of cells after the other.

    Parameters
    ----------
    shape
        (n_cells, n_genes), or (n_samples, n_cells, n_genes); n_cells is None if it is not known beforehand.
    out
        Array-like of that shape; None to make one.
    """

    def __init__(self, shape: tuple[int | None, ...], out: Any = None) -> None:
        self.shape, self.n_filled, self.parts = shape, 0, []
        self.is_known, self.is_own = shape[-2] is not None, out is None
        if not self.is_own:
            _check_out(out, shape)
        self.array = out if not self.is_own else np.empty(shape, dtype=np.float32) if self.is_known else None

    def add(self, n_rows: int) -> tuple[Any, int]:
        """Make room for so many further rows: the array that takes them, and the first of them."""
        self.n_filled += n_rows
        if self.array is not None:
            return self.array, self.n_filled - n_rows
        self.parts.append(np.empty((*self.shape[:-2], n_rows, self.shape[-1]), dtype=np.float32))
        return self.parts[-1], 0

    def result(self) -> Any:
        """All rows; rows that never came, because a loader dropped its last batch, are cut off."""
        if self.array is None:
            return np.concatenate(self.parts, axis=-2)
        is_short = self.is_own and self.n_filled < self.shape[-2]
        return self.array[..., : self.n_filled, :] if is_short else self.array


def _check_out(out: Any, shape: tuple[int | None, ...]) -> None:
    found = tuple(getattr(out, "shape", ()))
    fits = len(found) == len(shape) and all(n in (None, m) for n, m in zip(shape, found, strict=True))
    if not fits:
        raise ValueError(
            f"`out` must have the shape of the result, {shape}; found {found or type(out).__name__}. Make it so, for "
            "example with np.lib.format.open_memmap or zarr.create_array, or pass None."
        )


def check_overall(n_samples_overall: int | None, n_samples: int, out: Any, n_cells: int | None) -> None:
    """Check the arguments that go with a number of draws from all cells together."""
    if n_samples_overall is None:
        return
    if n_samples != 1:
        raise ValueError(
            f"`n_samples_overall` takes the place of `n_samples`; found {n_samples_overall} and {n_samples}. Pass one."
        )
    if out is not None:
        raise ValueError("`out` cannot take draws in random order; found it with `n_samples_overall`. Leave it out.")
    if n_cells is None:
        raise ValueError(
            "`n_samples_overall` needs cells whose number is known beforehand; found a dataloader without `indices`. "
            "Pass `adata` and `indices`."
        )


def put(place: tuple[Any, int], cells: slice, part: slice, value: Tensor) -> None:
    """Write values (..., cells, genes) where they belong; whole rows as such, which every array-like can take."""
    array, start = place
    rows = (*[slice(None)] * (value.ndim - 2), slice(start + cells.start, start + cells.stop))
    is_whole = part == slice(0, array.shape[-1])
    array[rows if is_whole else (*rows, part)] = value.cpu().numpy()


class SparseRows:
    """Sparse matrix that is put together from batches of rows, without a second copy of it at any time.

    Values and columns are kept as bytes: these grow in place, where an array would be copied for every batch.
    """

    def __init__(self, index_type: type) -> None:
        self.index_type, self.n_rows = index_type, 0
        self.value_bytes, self.column_bytes = bytearray(), bytearray()
        self.n_stored = [np.zeros(1, dtype=np.int64)]  # of each row

    def add(self, n_rows: int, *parts: tuple[np.ndarray, np.ndarray, np.ndarray]) -> None:
        """Append rows, given by row, column and value of their non-zeros; of several parts, in any order."""
        row, column, value = parts[0] if len(parts) == 1 else _in_order(*map(np.concatenate, zip(*parts, strict=True)))
        self.n_stored.append(np.bincount(row, minlength=n_rows))
        self.n_rows += n_rows
        self.value_bytes += np.ascontiguousarray(value, dtype=np.float32).data.cast("B")
        self.column_bytes += np.ascontiguousarray(column, dtype=self.index_type).data.cast("B")

    def arrays(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Values, columns and starts of the rows, as of a CSR matrix."""
        value = np.frombuffer(self.value_bytes, dtype=np.float32)
        column = np.frombuffer(self.column_bytes, dtype=self.index_type)
        return value, column, np.cumsum(np.concatenate(self.n_stored))


def _in_order(row: np.ndarray, column: np.ndarray, value: np.ndarray) -> tuple[np.ndarray, ...]:
    order = np.lexsort((column, row))
    return row[order], column[order], value[order]


def nonzero(counts: np.ndarray, first: int = 0, n_samples: int = 1) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Row, column and value of the non-zeros of counts (n, g, s); columns are (gene, sample), of all samples.

    Parameters
    ----------
    counts
        Of some samples.
    first, n_samples
        Number of the first of these among all, and number of all.
    """
    n, _, n_drawn = counts.shape
    flat = counts.reshape(n, -1)
    row, column = np.nonzero(flat)
    value = flat[row, column]
    if n_drawn < n_samples:
        gene, sample = np.divmod(column, n_drawn)
        column = gene * n_samples + sample + first
    return row, column, value
