"""Batches of cells whose counts stay in a file: windows of cells are read ahead into the memory of the host."""

from __future__ import annotations

import math
from concurrent.futures import ThreadPoolExecutor
from itertools import chain
from typing import TYPE_CHECKING

import numpy as np

from scvae_tools._data.loader import Batches, HeldCells
from scvae_tools._data.shares import WHOLE, Share
from scvae_tools._data.window_steps import WindowSteps

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from scipy.sparse import csr_matrix
    from torch import Tensor

    from scvae_tools._data.loader import CountDataset
    from scvae_tools._data.stored import StoredCounts
    from scvae_tools._module.sparse import Counts

#: Bytes of the counts of a window. Two are in memory, one that is used and one that is read.
WINDOW_BYTES = 2**26
#: Runs of neighbours that a window of a training consists of at least, so that it holds cells from all over the file.
FEWEST_RUNS = 64
#: Bytes of the counts of held-out cells that stay in memory during a training.
HELD_OUT_BYTES = 2**26


def n_cells_in(counts: csr_matrix | StoredCounts, n_bytes: int) -> int:
    """Number of cells whose counts take so many bytes, at least 1."""
    return max(1, int(n_bytes // (8 * max(1.0, counts.nnz / counts.shape[0]))))


class WindowLoader:
    """Loader of batches of cells in the order of their positions.

    Parameters
    ----------
    dataset
        All cells.
    indices
        Positions of the cells.
    batch_size
        Cells of a batch.
    """

    def __init__(self, dataset: CountDataset, indices: np.ndarray, batch_size: int) -> None:
        self.dataset, self.indices, self.batch_size = dataset, np.asarray(indices), batch_size
        n_of_window = max(1, n_cells_in(dataset.counts, WINDOW_BYTES) // batch_size) * batch_size
        self.windows = [self.indices[low : low + n_of_window] for low in range(0, len(self.indices), n_of_window)]

    def __len__(self) -> int:
        return math.ceil(len(self.indices) / self.batch_size)

    def __iter__(self) -> Iterator[dict[str, Counts | Tensor]]:
        for window in read_ahead(self.dataset, self.windows):
            for places in Batches(np.arange(len(window)), self.batch_size, shuffle=False, drop_last=False):
                yield window[places]


class WindowTrainingLoader:
    """Loader of the training steps: windows of short runs of cells, both in a new order in each epoch.

    A run is about as long as two pieces of the file, which are read as a whole: longer ones save little time, and a
    window then holds cells from fewer places.

    Parameters
    ----------
    dataset
        All cells.
    indices
        Positions of the cells to train on.
    batch_size
        Cells of a step.
    drop_single
        Whether a last step of one cell is left out.
    share
        Share of the runs of each epoch; all of them by default.
    """

    def __init__(
        self,
        dataset: CountDataset,
        indices: np.ndarray,
        batch_size: int,
        *,
        drop_single: bool,
        share: Share = WHOLE,
    ) -> None:
        self.dataset, self.indices = dataset, np.sort(indices)
        counts = dataset.counts
        n_cells = max(batch_size, n_cells_in(counts, WINDOW_BYTES))
        in_one_piece = counts.values_at_once * counts.shape[0] / counts.nnz
        run_length = int(np.clip(2 * in_one_piece, 1, max(1, n_cells // FEWEST_RUNS)))
        options = {"drop_single": drop_single, "run_length": run_length, "share": share}
        self.steps = WindowSteps(self.indices, batch_size, n_cells, **options)
        self.n_steps = sum(map(len, self.steps.sizes))

    def __len__(self) -> int:
        return self.n_steps

    def __iter__(self) -> Iterator[dict[str, Counts | Tensor]]:
        drawn = self.steps.draw()
        first = next(drawn)  # with which the windows of the epoch are known
        windows = read_ahead(self.dataset, self.steps.windows)
        for window, (_, batches) in zip(windows, chain([first], drawn), strict=True):
            for places in batches:
                yield window[places]


def read_ahead(dataset: CountDataset, windows: Sequence[np.ndarray]) -> Iterator[HeldCells]:
    """Cells of each window, of which the next is read while one is used."""
    reader = ThreadPoolExecutor(1, thread_name_prefix="scvae-window")
    try:
        coming = [reader.submit(HeldCells, dataset, window) for window in windows[:1]]
        for window in [*windows[1:], None]:
            if not coming:
                return
            present = coming.pop().result()
            if window is not None:
                coming.append(reader.submit(HeldCells, dataset, window))
            yield present
            del present
    finally:
        reader.shutdown(wait=True, cancel_futures=True)
