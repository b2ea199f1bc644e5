"""What is decoded: rows, each a cell or one component of a cell, and the heads that turn features into parameters.

Symbols: n cells, p rows (cells, or pairs of cell and component, or samples of them), g genes, h features of a row.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

    from scvae_tools._module.sparse import Compressed


@dataclass(frozen=True)
class DecodedRows:
    """Data of the p rows that are decoded, without their features.

    Parameters
    ----------
    counts
        Counts of the n cells: the non-zeros by gene, or all as a matrix (n, g). See `_module/dense_counts.py` for the
        latter.
    log_size
        Offset of the log rates of each row, (p,): the log of its size factor. Where the rates add up to the size
        factor, the log of their sum is subtracted.
    batch, n_batch
        Code of the batch of each cell, (n,), and the number of batches.
    cell
        Cell of each row, (p,); None where the rows are the cells.
    """

    counts: Compressed | Tensor
    log_size: Tensor
    batch: Tensor
    n_batch: int
    cell: Tensor | None = None


@dataclass(frozen=True)
class Heads:
    """Weights and values that turn features into parameters, by the name of the head.

    Parameters
    ----------
    decoded
        Weight (g, n_hidden) and bias (g,) of each head that differs between rows.
    shared
        Value of each head that all rows share, (g,), or all rows of a batch, (g, n_batch).
    """

    decoded: dict[str, tuple[Tensor, Tensor]]
    shared: dict[str, Tensor]

    def tensors(self) -> list[Tensor]:
        """All tensors of the heads, in the order that `like` expects."""
        return [tensor for pair in self.decoded.values() for tensor in pair] + list(self.shared.values())

    def like(self, tensors: tuple[Tensor, ...]) -> Heads:
        """Heads of the same names with other tensors, in the order of `tensors`."""
        each = iter(tensors)
        return Heads(
            {name: (next(each), next(each)) for name in self.decoded}, {name: next(each) for name in self.shared}
        )
