"""Counts of a batch as one dense matrix, so that no shape depends on how many of them are zero.

A whole training step can then be recorded once and repeated, and the host neither waits for results of the device nor
lets it wait. On the CPU, `sparse.Counts` and the sums over the non-zeros are faster.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Self

import torch
from torch import Tensor

if TYPE_CHECKING:
    from collections.abc import Callable


class DenseCounts:
    """Counts of a batch of cells, (n, g), as a dense matrix.

    It has the methods of `sparse.Counts` that the networks and the bound use.

    Parameters
    ----------
    value
        All counts, (n, g).
    log_base_measure
        Σ log b(x) of each cell, (n,); None where it is not known beforehand.
    """

    density = 1.0  #: share of the counts that are held

    def __init__(self, value: Tensor, log_base_measure: Tensor | None = None) -> None:
        self.value, self.log_base_measure = value, log_base_measure

    @property
    def shape(self) -> torch.Size:
        """(n, g)."""
        return self.value.shape

    def __len__(self) -> int:
        return len(self.value)

    @property
    def device(self) -> torch.device:
        """Device of the counts."""
        return self.value.device

    def total(self) -> Tensor:
        """Sum of the counts of each cell, (n, 1)."""
        return self.value.sum(1, keepdim=True)

    def dense(self) -> Tensor:
        """All counts, (n, g)."""
        return self.value

    def map(self, function: Callable[[Tensor, Tensor], Tensor]) -> DenseCounts:
        """Counts with each x of cell i replaced by function(x, i), of which function(0, i) must be 0."""
        return DenseCounts(function(self.value, torch.arange(len(self), device=self.device)[:, None]))

    def thinned(self, dropout: Callable[[Tensor], Tensor]) -> DenseCounts:
        """Counts of which ``dropout`` sets some to zero."""
        return DenseCounts(dropout(self.value))

    def sum_over_counts(self, function: Callable[[Tensor], Tensor]) -> Tensor:
        """Σ f(x) over the counts above 0 of each cell, (n,)."""
        return torch.where(self.value > 0, function(self.value), 0.0).sum(1)

    def to(self, device: torch.device | str, **kwargs: Any) -> Self:
        """Counts on another device; called by Lightning and scvi-tools."""
        base = self.log_base_measure
        return DenseCounts(self.value.to(device, **kwargs), None if base is None else base.to(device, **kwargs))
