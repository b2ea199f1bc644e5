"""Windows of cells on a device: for counts that take more of its memory than a training leaves.

Two windows have a place on the device. While batches are formed from one, the next is gathered in pinned memory and
copied to the other. A window of a training consists of short runs of cells from all over the data, in a new order in
each epoch, and batches are drawn within it.
"""

from __future__ import annotations

import math
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING

import numpy as np
import torch

from scvae_tools._data.resident import (
    DeviceCells,
    ResidentCells,
    StepLoader,
    n_bytes_on_device,
    width_of,
)
from scvae_tools._data.stored import StoredCounts
from scvae_tools._data.window_steps import WindowSteps

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from torch import Tensor

    from scvae_tools._data.loader import CountDataset
    from scvae_tools._module.dense_counts import DenseCounts

#: Share of the free memory of a device that the counts may take. The rest is for the training.
LARGEST_SHARE = 0.5
#: Bytes of a window at most, so that the pinned memory of the host has a limit.
LARGEST_WINDOW = 2**31
#: Cells of a window below which the host forms the batches; chosen, not measured.
SMALLEST_WINDOW = 1024


def free_memory(device: torch.device) -> float:
    """Bytes that are free on a device, or kept by torch for later; infinite where this is not known."""
    if device.type != "cuda":
        return math.inf
    kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + kept


def held_on_device(
    dataset: CountDataset, device: torch.device, *, hold: bool | None
) -> ResidentCells | CellWindows | None:
    """Cells on a device, all of them or in windows; or None where they stay in the memory of the host.

    Parameters
    ----------
    dataset
        Cells.
    device
        Device that trains.
    hold
        Whether to hold them there; None for CUDA devices with room for a window of `SMALLEST_WINDOW` cells. They are
        held in windows where all would take more than `LARGEST_SHARE` of the free memory.
    """
    if not (device.type == "cuda" if hold is None else hold):
        return None
    room = LARGEST_SHARE * free_memory(device)
    if n_bytes_on_device(dataset) <= room:
        return ResidentCells(dataset, device)
    if hold is None and _capacity(dataset, room / 2)[0] < SMALLEST_WINDOW:
        return None
    return CellWindows(dataset, device, room)


class CellWindows:
    """Cells of a `CountDataset`, of which one window at a time is on a device, and the next on its way.

    Parameters
    ----------
    dataset
        Cells in the memory of the host.
    device
        Device.
    n_bytes
        Bytes of the device that both windows may take together.

    Raises
    ------
    ValueError
        If two cells have no room.
    """

    def __init__(self, dataset: CountDataset, device: torch.device, n_bytes: float) -> None:
        self.dataset, self.device = dataset, device
        self.n_cells, n_entries = _capacity(dataset, min(n_bytes / 2, LARGEST_WINDOW))
        if self.n_cells < 1:
            raise ValueError(
                f"`hold_on_device=True` needs room for two cells at least; found {n_bytes / 1e9:.3g} GB for them on "
                f"{device}. Leave it out: the counts then stay in the memory of the host."
            )
        gathered = _Gathered(dataset, self.n_cells, n_entries, is_pinned=device.type == "cuda")
        self.places = [_Place(gathered, device) for _ in range(2)]
        self.n_bytes = sum(place.n_bytes for place in self.places)
        self._thread = ThreadPoolExecutor(1)
        self._present: np.ndarray | None = None  #: window in the first place
        self._coming: tuple[np.ndarray, Future] | None = None  #: window on its way to the second

    def of_window(self, windows: Sequence[np.ndarray], number: int) -> DeviceCells:
        """Cells of a window, by their place in it; the window after it is copied from now on."""
        window = windows[number]
        if window is not self._present:
            if self._coming is None or self._coming[0] is not window:
                self._begin(window)
            self._coming[1].result()
            self._coming = None
            self.places.reverse()
            self._present = window
            self.places[0].wait()
            if number + 1 < len(windows):
                self._begin(windows[number + 1])
        return self.places[0]

    def _begin(self, window: np.ndarray) -> None:
        """Begin to copy a window to the second place, when all that was begun with that place is done."""
        self.settle()
        place = self.places[1]
        place.release()
        self._coming = window, self._thread.submit(place.fill, window)

    def settle(self) -> None:
        """Wait until no window is on its way."""
        if self._coming is not None:
            self._coming[1].result()

    def batches(self, indices: np.ndarray, batch_size: int) -> Iterable[dict[str, DenseCounts | Tensor]]:
        """Batches of cells in the order of their positions."""
        return _WindowBatches(self, indices, min(batch_size, self.n_cells))

    def steps(self, indices: np.ndarray, batch_size: int, *, drop_single: bool) -> StepLoader:
        """Loader of the positions of the training steps, in a new order in each epoch."""
        return StepLoader(WindowSteps(np.sort(indices), batch_size, self.n_cells, drop_single=drop_single), batch_size)


def _capacity(dataset: CountDataset, n_bytes: float) -> tuple[int, int]:
    """Number of cells of a window, whichever they are, and of their entries."""
    counts = dataset.counts
    largest = np.cumsum(np.sort(np.diff(counts.indptr))[::-1].astype(np.int64))
    bytes_of_cell = 12 + sum(column.nbytes for column in dataset.columns.values()) / counts.shape[0]
    size = largest * (4 + dataset.count_type.itemsize) + bytes_of_cell * np.arange(1, len(largest) + 1)
    n_cells = int(np.searchsorted(size, n_bytes, side="right"))
    return n_cells, int(largest[n_cells - 1]) if n_cells else 0


class _Gathered:
    """Cells of a window in memory of the host from which a GPU copies by itself, for one window at a time.

    Parameters
    ----------
    dataset
        All cells.
    n_cells, n_entries
        Numbers of cells and entries for which there is room.
    is_pinned
        Whether the memory is pinned.
    """

    def __init__(self, dataset: CountDataset, n_cells: int, n_entries: int, *, is_pinned: bool) -> None:
        self.dataset = dataset
        options = {"pin_memory": is_pinned}
        self.start = torch.zeros(n_cells + 1, dtype=torch.int64, **options)
        self.gene = torch.zeros(n_entries + 1, dtype=torch.int32, **options)
        self.value = torch.zeros(n_entries + 1, dtype=dataset.count_type, **options)
        self.columns = {
            key: torch.zeros(n_cells, *column.shape[1:], dtype=torch.from_numpy(column[:0]).dtype, **options)
            for key, column in dataset.columns.items()
        }

    def gather(self, window: np.ndarray) -> int:
        """Put cells one after the other, those that are neighbours together; return the number of entries."""
        counts, (start, gene, value) = self.dataset.counts, (x.numpy() for x in (self.start, self.gene, self.value))
        ends = np.cumsum(counts.indptr[window + 1] - counts.indptr[window], dtype=np.int64)
        start[1 : len(window) + 1], start[len(window) + 1 :] = ends, ends[-1]
        for key, column in self.dataset.columns.items():
            self.columns[key].numpy()[: len(window)] = column[window]
        if isinstance(counts, StoredCounts):
            read = counts[window]
            gene[: ends[-1]], value[: ends[-1]] = read.indices, read.data
            return int(ends[-1])
        firsts = np.flatnonzero(np.diff(window, prepend=window[0] - 2) != 1)
        for first, last in zip(firsts, np.append(firsts[1:], len(window)) - 1, strict=True):
            source = slice(counts.indptr[window[first]], counts.indptr[window[last] + 1])
            into = slice(start[first], start[last + 1])
            gene[into], value[into] = counts.indices[source], counts.data[source]
        return int(ends[-1])


class _Place(DeviceCells):
    """Place on a device for the cells of a window, which come by way of memory that two places share."""

    def __init__(self, gathered: _Gathered, device: torch.device) -> None:
        counts = gathered.dataset.counts
        self.n_genes, self.width, self._gathered = counts.shape[1], width_of(counts), gathered
        self.start, self.gene, self.value = (
            each.to(device, copy=True) for each in (gathered.start, gathered.gene, gathered.value)
        )
        self.columns = {key: each.to(device, copy=True) for key, each in gathered.columns.items()}
        self.log_base_measure = torch.zeros(len(self), dtype=torch.float32, device=device)
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._used: torch.cuda.Event | None = None

    def release(self) -> None:
        """Note that what was begun so far is the last that reads the present cells."""
        if self._stream is not None:
            self._used = torch.cuda.current_stream(self.device).record_event()

    def wait(self) -> None:
        """Let all that is begun from now on wait for the copy."""
        if self._stream is not None:
            torch.cuda.current_stream(self.device).wait_stream(self._stream)

    def fill(self, window: np.ndarray) -> None:
        """Gather the cells at some positions, and copy them; return when they are there."""
        n_entries = self._gathered.gather(window)
        if self._stream is None:
            self._copy(n_entries)
            return
        with torch.cuda.stream(self._stream):
            self._stream.wait_event(self._used)
            self._copy(n_entries)
        self._stream.synchronize()  # then the gathered memory is free, and this place may be

    @torch.inference_mode()  # as the places are where an evaluation has made them; others may be written to as well
    def _copy(self, n_entries: int) -> None:
        self.start.copy_(self._gathered.start, non_blocking=True)
        self.gene[:n_entries].copy_(self._gathered.gene[:n_entries], non_blocking=True)
        self.value[:n_entries].copy_(self._gathered.value[:n_entries], non_blocking=True)
        for key, column in self.columns.items():
            column.copy_(self._gathered.columns[key], non_blocking=True)
        self.log_base_measure.copy_(self.base_measures(self._gathered.dataset.likelihood))


class _WindowBatches:
    """Batches of cells in the order of their positions, window after window."""

    def __init__(self, source: CellWindows, indices: np.ndarray, batch_size: int) -> None:
        self.source, self.batch_size = source, batch_size
        n_cells = source.n_cells // batch_size * batch_size
        self.windows = [indices[low : low + n_cells] for low in range(0, len(indices), n_cells)]
        self.n_batches = math.ceil(len(indices) / batch_size)

    def __len__(self) -> int:
        return self.n_batches

    def __iter__(self) -> Iterator[dict[str, DenseCounts | Tensor]]:
        for number, window in enumerate(self.windows):
            for low in range(0, len(window), self.batch_size):
                # The place is asked for each time: something else may have read other windows in between.
                cells = self.source.of_window(self.windows, number)
                yield cells[np.arange(low, min(low + self.batch_size, len(window)))]
