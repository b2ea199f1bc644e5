"""Cells that are held on a device, counts and columns of obs, where batches of the same shapes are formed."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from scvi import REGISTRY_KEYS
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from scvae_tools._module.dense_counts import DenseCounts

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from scvae_tools._data.loader import Batches, CountDataset

#: Types in which counts are held: the first that holds all of them exactly.
COUNT_TYPES = (torch.uint8, torch.int16, torch.int32, torch.float32)
#: Share of the free memory of a device that the counts may take. The rest is for the training.
LARGEST_SHARE = 0.5
#: Training steps whose positions are handed over at a time. Lightning takes a fraction of a millisecond for each
#: "batch", as long as a device takes for a step.
STEPS_AT_ONCE = 64
#: Entries that are gathered at a time where all cells are read once.
GATHERED_ENTRIES = 2**24


class ResidentCells(Dataset):
    """Cells of a `CountDataset`, copied to a device; ``resident[positions]`` is a batch with `DenseCounts`.

    The counts are held as CSR. To form a batch, as many entries are read from each cell as the fullest one has: those
    after the last non-zero of a cell repeat it. So no shape depends on the counts, and the host waits for nothing.

    Parameters
    ----------
    dataset
        Cells in the memory of the host.
    device
        Device that holds them.
    """

    def __init__(self, dataset: CountDataset, device: torch.device | str) -> None:
        counts = dataset.counts
        self.n_genes, self.device = counts.shape[1], torch.device(device)
        self.start = torch.as_tensor(counts.indptr.astype(np.int64), device=device)
        self.width = max(1, int(np.diff(counts.indptr).max(initial=0)))
        self.gene = self._held(counts.indices, torch.int32)
        self.value = self._held(counts.data, smallest_type(counts.data))
        self.columns = {key: torch.as_tensor(column, device=device) for key, column in dataset.columns.items()}
        self.log_base_measure = self._log_base_measure(dataset)

    def _held(self, values: np.ndarray, kind: torch.dtype) -> Tensor:
        """Values on the device, and one entry more, so that there is one to read where no cell has any."""
        held = torch.zeros(len(values) + 1, dtype=kind, device=self.device)
        held[:-1] = torch.from_numpy(np.require(values, requirements="W")).to(kind)
        return held

    @property
    def n_bytes(self) -> int:
        """Bytes on the device."""
        held = (self.start, self.gene, self.value, self.log_base_measure, *self.columns.values())
        return sum(each.nbytes for each in held)

    def __len__(self) -> int:
        return len(self.start) - 1

    def __getitem__(self, positions: Sequence[int] | Tensor) -> dict[str, DenseCounts | Tensor]:
        positions = torch.as_tensor(positions, device=self.device)
        gene, value = self._entries(positions)
        counts = value.new_zeros(len(positions), self.n_genes).scatter_(1, gene, value)
        batch = {key: column[positions] for key, column in self.columns.items()}
        return batch | {REGISTRY_KEYS.X_KEY: DenseCounts(counts, self.log_base_measure[positions])}

    def _entries(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Gene and count of the entries of some cells, (n, width) each, the last entry of a cell repeated."""
        start, end = self.start[positions, None], self.start[positions + 1, None]
        at = torch.minimum(start + torch.arange(self.width, device=self.device), (end - 1).clamp(min=0))
        value = torch.where(end > start, self.value[at].float(), 0.0)
        return self.gene[at].long(), value

    def _log_base_measure(self, dataset: CountDataset) -> Tensor:
        """Σ log b(x) of each cell, (n,)."""
        n_at_once = max(1, GATHERED_ENTRIES // self.width)
        parts = torch.arange(len(self), device=self.device).split(n_at_once)
        return torch.cat([self._log_base_measure_of(part, dataset) for part in parts])

    def _log_base_measure_of(self, positions: Tensor, dataset: CountDataset) -> Tensor:
        n_entries = (self.start[positions + 1] - self.start[positions])[:, None]
        is_entry = torch.arange(self.width, device=self.device) < n_entries
        each = dataset.likelihood.log_base_measure(self._entries(positions)[1])
        return torch.where(is_entry, each, 0.0).sum(1)


def smallest_type(counts: np.ndarray) -> torch.dtype:
    """First of `COUNT_TYPES` that holds all counts exactly."""
    largest = float(counts.max(initial=0))  # as Python compares it: NumPy would round the limits to float32
    if (counts != np.floor(counts)).any():
        return torch.float32
    return next(kind for kind in COUNT_TYPES if kind == torch.float32 or largest <= torch.iinfo(kind).max)


def held_on_device(dataset: CountDataset, device: torch.device, *, hold: bool | None) -> ResidentCells | None:
    """Cells on a device, or None where they stay in the memory of the host.

    Parameters
    ----------
    dataset
        Cells.
    device
        Device that trains.
    hold
        Whether to hold them there; None to do so on a CUDA device where they take at most `LARGEST_SHARE` of its free
        memory.

    Raises
    ------
    ValueError
        If the device has no room for cells that are to be held there.
    """
    size = n_bytes_on_device(dataset)
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else np.inf
    if hold is None:
        hold = device.type == "cuda" and size <= LARGEST_SHARE * free
    if not hold:
        return None
    if size > free:
        raise ValueError(
            f"`hold_on_device=True` needs {size / 1e9:.1f} GB on {device}; found {free / 1e9:.1f} GB free. Leave it "
            "out: the counts then stay in the memory of the host."
        )
    return ResidentCells(dataset, device)


def n_bytes_on_device(dataset: CountDataset) -> int:
    """Bytes that `ResidentCells` of a data set take."""
    counts = dataset.counts
    columns = sum(column.nbytes for column in dataset.columns.values())
    return counts.nnz * (4 + smallest_type(counts.data).itemsize) + 12 * (counts.shape[0] + 1) + columns


class StepLoader(DataLoader):
    """Loader of the positions of the cells of many training steps, (n_steps, batch_size).

    The last step of an epoch, where it has fewer cells, comes by itself.

    Parameters
    ----------
    batches
        Positions of the cells of each step, of which ``n_steps`` make an epoch, of ``n_cells_of_step`` each.
    """

    def __init__(self, batches: Batches) -> None:
        self.n_steps, self.n_cells_of_step = len(batches), batches.batch_size
        super().__init__(_Given(), batch_size=None, sampler=_Groups(batches))


class _Given(Dataset):
    """Data set whose items are their own positions."""

    def __getitem__(self, positions: Tensor) -> Tensor:
        return positions


class _Groups:
    """Batches of one size, `STEPS_AT_ONCE` at a time."""

    def __init__(self, batches: Batches) -> None:
        self.batches = batches

    def __len__(self) -> int:
        n_whole, rest = divmod(self.batches.n_used, self.batches.batch_size)
        return -(-n_whole // STEPS_AT_ONCE) + (rest > 0)

    def __iter__(self) -> Iterator[Tensor]:
        group: list[np.ndarray] = []
        for batch in self.batches:
            if group and (len(group) == STEPS_AT_ONCE or len(batch) < len(group[0])):
                yield torch.as_tensor(np.stack(group))
                group = []
            group.append(batch)
        if group:
            yield torch.as_tensor(np.stack(group))
