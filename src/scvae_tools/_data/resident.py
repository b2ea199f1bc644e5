"""Cells that are held on a device, counts and columns of obs, where batches of the same shapes are formed."""

from __future__ import annotations

from itertools import groupby, islice
from typing import TYPE_CHECKING, Protocol

import numpy as np
import torch
from scvi import REGISTRY_KEYS
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from scvae_tools._data.loader import Batches, loader_of
from scvae_tools._data.stored import StoredCounts
from scvae_tools._module.dense_counts import DenseCounts

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from scipy.sparse import csr_matrix

    from scvae_tools._data.loader import CountDataset
    from scvae_tools.likelihoods import Likelihood

#: Training steps whose positions are handed over at a time. Lightning takes a fraction of a millisecond for each
#: "batch", as long as a device takes for a step.
STEPS_AT_ONCE = 64
#: Entries that are gathered at a time where all cells are read once.
GATHERED_ENTRIES = 2**24


class DeviceCells(Dataset):
    """Cells on a device; ``cells[positions]`` is a batch with `DenseCounts`.

    The counts are held as CSR. To form a batch, as many entries are read from each cell as the fullest one has: those
    after the last non-zero of a cell repeat it. So no shape depends on the counts, and the host waits for nothing.

    Attributes
    ----------
    start
        Place of the first entry of each cell, and of the end of the last one, (n + 1,).
    gene, value
        Genes and counts, one entry more than there are, so that there is one to read where no cell has any.
    columns
        Columns of obs by registry key, (n, n_columns) each.
    log_base_measure
        Σ log b(x) of each cell, (n,).
    n_genes, width
        Number of genes, and of entries that are read from each cell.
    """

    start: Tensor
    gene: Tensor
    value: Tensor
    columns: dict[str, Tensor]
    log_base_measure: Tensor
    n_genes: int
    width: int

    @property
    def device(self) -> torch.device:
        """Device of the cells."""
        return self.start.device

    @property
    def n_bytes(self) -> int:
        """Bytes on the device."""
        held = (self.start, self.gene, self.value, self.log_base_measure, *self.columns.values())
        return sum(each.nbytes for each in held)

    def __len__(self) -> int:
        return len(self.start) - 1

    def __getitem__(self, positions: Sequence[int] | Tensor) -> dict[str, DenseCounts | Tensor]:
        positions = torch.as_tensor(positions, device=self.device)
        at, value = self._entries(positions)
        counts = value.new_zeros(len(positions), self.n_genes).scatter_(1, self.gene[at].long(), value)
        batch = {key: column[positions] for key, column in self.columns.items()}
        return batch | {REGISTRY_KEYS.X_KEY: DenseCounts(counts, self.log_base_measure[positions])}

    def _entries(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Place and count of the entries of some cells, (n, width) each, the last entry of a cell repeated."""
        start, end = self.start[positions, None], self.start[positions + 1, None]
        at = torch.minimum(start + torch.arange(self.width, device=self.device), (end - 1).clamp(min=0))
        return at, torch.where(end > start, self.value[at].float(), 0.0)

    def base_measures(self, likelihood: Likelihood) -> Tensor:
        """Σ log b(x) of each cell, (n,)."""
        n_at_once = max(1, GATHERED_ENTRIES // self.width)
        parts = torch.arange(len(self), device=self.device).split(n_at_once)
        return torch.cat([self._base_measures_of(part, likelihood) for part in parts])

    def _base_measures_of(self, positions: Tensor, likelihood: Likelihood) -> Tensor:
        n_entries = (self.start[positions + 1] - self.start[positions])[:, None]
        is_entry = torch.arange(self.width, device=self.device) < n_entries
        each = likelihood.log_base_measure(self._entries(positions)[1])
        return torch.where(is_entry, each, 0.0).sum(1)


class ResidentCells(DeviceCells):
    """All cells of a `CountDataset`, copied to a device.

    Parameters
    ----------
    dataset
        Cells in the memory of the host.
    device
        Device that holds them.
    """

    def __init__(self, dataset: CountDataset, device: torch.device | str) -> None:
        counts = dataset.counts
        self.n_genes, self.width = counts.shape[1], width_of(counts)
        self.start = torch.as_tensor(counts.indptr.astype(np.int64), device=device)
        self.gene, self.value = _entries_on_device(counts, dataset.count_type, device)
        self.columns = {key: torch.as_tensor(column, device=device) for key, column in dataset.columns.items()}
        self.log_base_measure = self.base_measures(dataset.likelihood)

    def of_window(self, windows: Sequence[np.ndarray], number: int) -> ResidentCells:
        """Cells from which the batches of a window are formed: all."""
        return self

    def settle(self) -> None:
        """Nothing is on its way."""

    def batches(self, indices: np.ndarray, batch_size: int) -> Iterable[dict[str, DenseCounts | Tensor]]:
        """Batches of cells in the order of their positions."""
        return loader_of(self, indices, batch_size)

    def steps(self, indices: np.ndarray, batch_size: int, *, drop_single: bool) -> StepLoader:
        """Loader of the positions of the training steps, in a new order in each epoch."""
        drops = drop_single and len(indices) % batch_size == 1
        return StepLoader(_Resident(Batches(indices, batch_size, shuffle=True, drop_last=drops)), batch_size)


def _entries_on_device(
    counts: csr_matrix | StoredCounts, count_type: torch.dtype, device: torch.device | str
) -> tuple[Tensor, Tensor]:
    """Genes and counts of all entries on a device; of counts in a file a block after the other."""
    if not isinstance(counts, StoredCounts):
        return _held(counts.indices, torch.int32, device), _held(counts.data, count_type, device)
    gene, value = (torch.zeros(counts.nnz + 1, dtype=kind, device=device) for kind in (torch.int32, count_type))
    for first, last in counts.blocks():
        rows, into = counts.rows(first, last), slice(counts.indptr[first], counts.indptr[last])
        gene[into], value[into] = torch.from_numpy(rows.indices), torch.from_numpy(rows.data).to(count_type)
    return gene, value


def _held(values: np.ndarray, kind: torch.dtype, device: torch.device | str) -> Tensor:
    held = torch.zeros(len(values) + 1, dtype=kind, device=device)
    held[:-1] = torch.from_numpy(np.require(values, requirements="W")).to(kind)
    return held


def width_of(counts: csr_matrix) -> int:
    """Number of entries of the fullest cell, at least 1."""
    return max(1, int(np.diff(counts.indptr).max(initial=0)))


def n_bytes_on_device(dataset: CountDataset) -> int:
    """Bytes that `ResidentCells` of a data set take."""
    counts = dataset.counts
    columns = sum(column.nbytes for column in dataset.columns.values())
    return counts.nnz * (4 + dataset.count_type.itemsize) + 12 * (counts.shape[0] + 1) + columns


class Steps(Protocol):
    """Windows of cells and the batches of their training steps, drawn anew in each epoch."""

    sizes: list[list[int]]  #: numbers of cells of the steps of each window, the same in each epoch
    windows: Sequence[np.ndarray]  #: positions of the cells of each window of this epoch

    def draw(self) -> Iterator[tuple[int, Iterator[np.ndarray]]]:
        """Draw an epoch: the number of each window, and the batches of its steps, by the place in the window."""


class StepLoader(DataLoader):
    """Loader of groups of training steps: the number of a window, and the places of the cells (n_steps, batch_size).

    A group has at most `STEPS_AT_ONCE` steps, all of one window and of one size.

    Parameters
    ----------
    steps
        Windows and batches.
    batch_size
        Cells of a step, but for the last ones of the windows.
    """

    def __init__(self, steps: Steps, batch_size: int) -> None:
        self.steps, self.n_cells_of_step = steps, batch_size
        self.n_steps = sum(map(len, steps.sizes))
        super().__init__(_Given(), batch_size=None, sampler=_Groups(steps))

    @property
    def windows(self) -> Sequence[np.ndarray]:
        """Positions of the cells of each window of this epoch."""
        return self.steps.windows


class _Given(Dataset):
    """Data set whose items are their own positions."""

    def __getitem__(self, group: tuple[int, Tensor]) -> tuple[int, Tensor]:
        return group


class _Groups:
    def __init__(self, steps: Steps) -> None:
        self.steps = steps

    def __len__(self) -> int:
        return sum(-(-len(list(same)) // STEPS_AT_ONCE) for sizes in self.steps.sizes for _, same in groupby(sizes))

    def __iter__(self) -> Iterator[tuple[int, Tensor]]:
        for number, batches in self.steps.draw():
            for _, same in groupby(batches, key=len):
                while group := list(islice(same, STEPS_AT_ONCE)):
                    yield number, torch.as_tensor(np.stack(group))


class _Resident:
    """Steps on cells that are all there: one window."""

    windows = ()

    def __init__(self, batches: Batches) -> None:
        self.batches = batches
        n_whole, rest = divmod(batches.n_used, batches.batch_size)
        self.sizes = [[batches.batch_size] * n_whole + [rest] * (rest > 0)]

    def draw(self) -> Iterator[tuple[int, Iterator[np.ndarray]]]:
        yield 0, iter(self.batches)
