"""Steps of a training on windows of cells: which cells are in a window, and in which order they are trained on."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np

from scvae_tools._data.loader import Batches, n_of_epoch
from scvae_tools._data.shares import WHOLE, Share

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

#: Cells that stay together in the windows of a training, where the counts are in memory.
RUN_LENGTH = 64


class WindowSteps:
    """Steps on windows that consist of short runs of cells, both in a new order in each epoch.

    Parameters
    ----------
    indices
        Positions of the cells, ascending.
    batch_size
        Cells of a step.
    n_cells
        Cells of a window at most.
    drop_single
        Whether a last step of one cell is left out.
    run_length
        Cells that stay together; None for `RUN_LENGTH`.
    share
        Share of the runs of each epoch; all of them by default.
    """

    def __init__(
        self,
        indices: np.ndarray,
        batch_size: int,
        n_cells: int,
        *,
        drop_single: bool,
        run_length: int | None = None,
        share: Share = WHOLE,
    ) -> None:
        self.indices, self.batch_size, self.drop_single, self.share = indices, batch_size, drop_single, share
        n = n_of_epoch(len(indices)) // share.number
        self.run_length = max(1, min(run_length or RUN_LENGTH, n_cells, n))
        n_runs = n_cells // self.run_length
        even = batch_size // math.gcd(batch_size, self.run_length)  # runs that are whole steps together
        self.n_of_window = (n_runs - n_runs % even if n_runs >= even else n_runs) * self.run_length
        self.windows: Sequence[np.ndarray] = ()
        is_part = n_of_epoch(len(indices)) < len(indices)
        self.n_used = n - n % self.run_length if is_part else n  # whole runs, so that no epoch is shorter
        n_windows = math.ceil(self.n_used / self.n_of_window)
        each = [min(self.n_of_window, self.n_used - i * self.n_of_window) for i in range(n_windows)]
        self.sizes = [[len(step) for step in self._batches(n)] for n in each]

    def _batches(self, n: int, *, shuffle: bool = False) -> Iterator[np.ndarray]:
        drops = self.drop_single and n % self.batch_size == 1
        return iter(Batches(np.arange(n), self.batch_size, shuffle=shuffle, drop_last=drops))

    def draw(self) -> Iterator[tuple[int, Iterator[np.ndarray]]]:
        n_whole = len(self.indices) // self.run_length
        indices, share = self.indices, self.share
        if share.number > 1:  # so that the cells that are left over are others in each epoch
            indices = np.roll(indices, share.permutation(len(indices))[0])
        runs = indices[: n_whole * self.run_length].reshape(n_whole, self.run_length)[share.permutation(n_whole)]
        # The short run last, so that all epochs have one length.
        last = np.append(share.rest(runs).ravel(), indices[runs.size :])
        if share.number > 1:  # else all are used
            last = last[share.permutation(len(last))]
        order = np.append(share.of(runs).ravel(), share.of(last))[: self.n_used]
        # Within a window the cells are in their order, so that neighbours are copied together.
        lows = range(0, len(order), self.n_of_window)
        self.windows = [np.sort(order[low : low + self.n_of_window]) for low in lows]
        for number, window in enumerate(self.windows):
            yield number, self._batches(len(window), shuffle=True)
