"""Sparse counts of a batch, by cell and by gene, and their product with a dense matrix."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple, Self

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from scvae_tools._module.dense_counts import DenseCounts
    from scvae_tools._module.memory import Buffers


class Compressed(NamedTuple):
    """Non-zeros of a matrix, row after row: those of row i are at ``start[i]:start[i + 1]``."""

    start: Tensor  # (n_rows + 1,)
    column: Tensor  # (nnz,)
    value: Tensor  # (nnz,)

    def row(self) -> Tensor:
        """Row of each non-zero, (nnz,)."""
        rows = torch.arange(len(self.start) - 1, device=self.start.device)
        return torch.repeat_interleave(rows, self.start.diff(), output_size=len(self.column))

    def blocks(self, n_rows: int) -> Iterator[tuple[slice, Compressed]]:
        """Parts of ``n_rows`` rows each: the slice of the rows, and their non-zeros."""
        n = len(self.start) - 1
        if n_rows >= n:
            yield slice(0, n), self
            return
        bounds = [*self.start[:-1:n_rows].tolist(), len(self.column)]
        for low, begin, end in zip(range(0, n, n_rows), bounds[:-1], bounds[1:], strict=True):
            rows, at = slice(low, min(low + n_rows, n)), slice(begin, end)
            start = self.start[rows.start : rows.stop + 1] - begin
            yield rows, Compressed(start, self.column[at], self.value[at])


class Counts:
    """Counts of a batch of cells, (n, g); only the non-zeros are held, by cell and by gene.

    Parameters
    ----------
    by_cell
        Rows are the cells, columns the genes.
    by_gene
        Rows are the genes, columns the cells.
    log_base_measure
        Σ log b(x) of each cell, (n,), of the likelihood in use (see `Likelihood.log_base_measure`); None where it is
        not known beforehand.
    """

    # Not a dataclass: Lightning would convert its fields one by one and build it anew.
    def __init__(self, by_cell: Compressed, by_gene: Compressed, log_base_measure: Tensor | None = None) -> None:
        self.by_cell, self.by_gene, self.log_base_measure = by_cell, by_gene, log_base_measure

    @classmethod
    def of(cls, x: Counts | DenseCounts | Tensor) -> Counts | DenseCounts:
        """Counts of a dense or sparse tensor (n, g); counts stay as they are."""
        if not isinstance(x, Tensor):
            return x
        if x.layout is not torch.strided:
            return cls.of_coordinates(*_coordinates(x), x.shape)
        cell, gene = torch.nonzero(x, as_tuple=True)
        return cls.of_coordinates(cell, gene, x[cell, gene], x.shape)

    @classmethod
    def of_coordinates(cls, cell: Tensor, gene: Tensor, value: Tensor, shape: tuple[int, int]) -> Counts:
        """Counts of the non-zeros in order of the cells, (nnz,) each."""
        by_gene = torch.argsort(gene, stable=True)
        return cls(
            Compressed(_starts(cell, shape[0]), gene, value),
            Compressed(_starts(gene, shape[1]), cell[by_gene], value[by_gene]),
        )

    @property
    def shape(self) -> tuple[int, int]:
        """(n, g)."""
        return len(self.by_cell.start) - 1, len(self.by_gene.start) - 1

    def __len__(self) -> int:
        return self.shape[0]

    @property
    def density(self) -> float:
        """Share of the counts that are not zero."""
        n, g = self.shape
        return len(self.by_cell.value) / max(1, n * g)

    @property
    def device(self) -> torch.device:
        """Device of the counts."""
        return self.by_cell.value.device

    def total(self) -> Tensor:
        """Sum of the counts of each cell, (n, 1)."""
        zero = self.by_cell.value.new_zeros(len(self))
        return zero.index_add_(0, self.by_cell.row(), self.by_cell.value)[:, None]

    def dense(self) -> Tensor:
        """All counts, (n, g)."""
        zero = self.by_cell.value.new_zeros(self.shape)
        return zero.index_put_((self.by_cell.row(), self.by_cell.column), self.by_cell.value)

    def map(self, function: Callable[[Tensor, Tensor], Tensor]) -> Counts:
        """Counts with each non-zero x of cell i replaced by function(x, i)."""
        by_cell = self.by_cell._replace(value=function(self.by_cell.value, self.by_cell.row()))
        by_gene = self.by_gene._replace(value=function(self.by_gene.value, self.by_gene.column))
        return Counts(by_cell, by_gene)

    def thinned(self, dropout: Callable[[Tensor], Tensor]) -> Counts:
        """Counts of which ``dropout`` sets some non-zeros to zero."""
        factor = dropout(torch.ones_like(self.by_cell.value))
        # Within a gene both orders have the cells in the same order.
        by_gene = factor[torch.argsort(self.by_cell.column, stable=True)]
        return Counts(
            self.by_cell._replace(value=self.by_cell.value * factor),
            self.by_gene._replace(value=self.by_gene.value * by_gene),
        )

    def sum_over_counts(self, function: Callable[[Tensor], Tensor]) -> Tensor:
        """Σ f(x) over the non-zeros of each cell, (n,)."""
        each = function(self.by_gene.value)
        return each.new_zeros(len(self)).index_add_(0, self.by_gene.column, each)

    def to(self, device: torch.device | str, **kwargs: Any) -> Self:
        """Counts on another device; called by Lightning and scvi-tools.

        The call does not wait for a copy to a GPU: pinned memory is copied while the GPU computes, other memory is
        copied at once.
        """
        options = {"non_blocking": torch.device(device).type == "cuda"} | kwargs
        return self._each(lambda tensor: tensor.to(device, **options))

    def pin_memory(self, *args: Any) -> Self:
        """Counts in pinned memory, from which a GPU copies while it computes; called by a ``DataLoader``."""
        return self._each(lambda tensor: tensor.pin_memory(*args))

    def _each(self, function: Callable[[Tensor], Tensor]) -> Self:
        base = self.log_base_measure
        return Counts(
            Compressed(*map(function, self.by_cell)),
            Compressed(*map(function, self.by_gene)),
            None if base is None else function(base),
        )


def rows_of_cells(by_gene: Compressed, cell: Tensor, n_cells: int) -> tuple[Compressed, Tensor]:
    """Counts by gene of rows that each repeat one cell, for example one row per component of a mixture.

    Parameters
    ----------
    by_gene
        Counts of the cells; its columns are cells.
    cell
        Cell of each row, (p,), in any order.
    n_cells
        Number of cells, n.

    Returns
    -------
    Counts by gene with the rows as columns, (g, p); and for each of their non-zeros, the position in ``by_gene`` of the
    non-zero that it repeats.
    """
    n_rows = torch.bincount(cell, minlength=n_cells)  # rows of each cell
    first = torch.cumsum(n_rows, 0) - n_rows
    rows = torch.argsort(cell, stable=True)  # rows of the first cell, of the second, ...
    repeats = n_rows[by_gene.column]  # (nnz,)
    ends = torch.cumsum(repeats, 0)
    total = int(ends[-1]) if len(ends) else 0
    source = torch.repeat_interleave(repeats, output_size=total)  # non-zero that each new one repeats
    # The nth repeat of a non-zero is in the nth row of its cell.
    shift = first[by_gene.column] - (ends - repeats)
    row = rows.index_select(0, shift.index_select(0, source).add_(torch.arange(total, device=cell.device)))
    start = torch.nn.functional.pad(ends, (1, 0))[by_gene.start]
    return Compressed(start, row, by_gene.value.index_select(0, source)), source


def _coordinates(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Cell, gene and value of the non-zeros of a sparse tensor, duplicates added up."""
    listed = x.to_sparse_coo()  # torch assumes that a compressed tensor has no duplicates
    listed = torch.sparse_coo_tensor(listed._indices(), listed._values(), x.shape, is_coalesced=False).coalesce()
    (cell, gene), value = listed.indices(), listed.values()
    kept = value != 0
    return cell[kept], gene[kept], value[kept]


def _starts(row: Tensor, n_rows: int) -> Tensor:
    return torch.nn.functional.pad(torch.cumsum(torch.bincount(row, minlength=n_rows), 0), (1, 0))


#: Entries of the gradient of `SparseProduct` that are computed at a time, before they are copied to their place.
GATHERED_ENTRIES = 2**19


class SparseProduct(torch.autograd.Function):
    """Product x W of sparse x (n, g) and W (g, h), (n, h): sums of the rows of W at the non-zeros of each cell.

    The gradient by W sums the rows of the incoming gradient at the non-zeros of each gene, which is the same operation
    in the other order. x is data and has no gradient.
    """

    @staticmethod
    def forward(ctx: Any, weight: Tensor, by_cell: Compressed, by_gene: Compressed, buffers: Buffers) -> Tensor:
        ctx.by_gene, ctx.buffers = by_gene, buffers
        ctx.save_for_backward(weight)
        return _sums_of_rows(by_cell, weight)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple:
        (weight,) = ctx.saved_tensors
        by_weight = ctx.buffers.empty_like(weight)
        is_host = weight.device.type == "cpu"  # on other devices, reading the bounds of blocks would wait
        n_rows = max(1, GATHERED_ENTRIES // weight.shape[1]) if is_host else len(weight)
        for rows, part in ctx.by_gene.blocks(n_rows):
            by_weight[rows] = _sums_of_rows(part, gradient.contiguous())
        return by_weight, None, None, None


def _sums_of_rows(factor: Compressed, table: Tensor) -> Tensor:
    """Product of a compressed matrix with a dense one."""
    value = factor.value.to(table.dtype)
    return embedding_bag(
        factor.column, table, factor.start, mode="sum", per_sample_weights=value, include_last_offset=True
    )
