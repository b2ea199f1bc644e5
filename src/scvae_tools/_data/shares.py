"""Shares of the cells of an epoch: what each of several processes trains on, of one order that all draw."""

from __future__ import annotations

from typing import TypeVar

import numpy as np
import torch

Items = TypeVar("Items", np.ndarray, list)


class Share:
    """Share of the cells of each epoch that one of several processes trains on.

    All processes draw the same orders, from a generator that each seeds alike. So their shares have the same size, no
    cell is in two of them, and the cells that are left over, fewer than there are processes, are others in each epoch.

    Parameters
    ----------
    rank, number
        Which of how many processes this is, from 0 on.
    seed
        Seed of the orders. A single process draws them from torch's own generator.
    """

    def __init__(self, rank: int = 0, number: int = 1, seed: int = 0) -> None:
        self.rank, self.number = rank, number
        self.generator = None if number == 1 else torch.Generator().manual_seed(seed)

    def permutation(self, n: int) -> np.ndarray:
        """Order of n things, the same in all processes."""
        return torch.randperm(n, generator=self.generator).numpy()

    def of(self, items: Items) -> Items:
        """Every so many-th of some things, as many in each process."""
        return items[self.rank :: self.number][: len(items) // self.number]

    def rest(self, items: Items) -> Items:
        """Things that `of` gives to no process."""
        return items[len(items) // self.number * self.number :]


#: Share of a process that trains alone.
WHOLE = Share()
