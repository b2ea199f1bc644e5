"""Data set and loader of batches of cells, made from a CSR matrix and columns of obs for the module."""

from __future__ import annotations

import math
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from scipy import sparse
from scvi import REGISTRY_KEYS
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from scvae_tools._data.counts import load_counts
from scvae_tools._data.roles import ROLES
from scvae_tools._data.shares import WHOLE, Share
from scvae_tools._data.stored import StoredCounts
from scvae_tools._module.sparse import Compressed, Counts

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from scvi.data import AnnDataManager

    from scvae_tools.likelihoods import Likelihood

#: Cells in a batch where no gradient is needed.
EVALUATION_BATCH_SIZE = 512
#: Cells after which an epoch ends where there are more to train on. So what is looked at once an epoch, such as the
#: held-out cells, is looked at as often in large data as in small.
LARGEST_EPOCH = 400_000
#: Types in which counts are held on a device: the first that holds all of them exactly.
COUNT_TYPES = (torch.uint8, torch.int16, torch.int32, torch.float32)
#: Registry keys of data that are codes of categories; all other data are numbers.
CODES = {role.registry_key for role in ROLES.values() if role.is_categorical}


def smallest_type(counts: np.ndarray) -> torch.dtype:
    """First of `COUNT_TYPES` that holds all counts exactly."""
    # A float, as Python compares it: NumPy would round the limits to float32.
    return _type_for(float(counts.max(initial=0)), is_whole=not (counts != np.floor(counts)).any())


def _type_for(largest: float, *, is_whole: bool) -> torch.dtype:
    if not is_whole:
        return torch.float32
    return next(kind for kind in COUNT_TYPES if kind == torch.float32 or largest <= torch.iinfo(kind).max)


def counts_of_matrix(matrix: sparse.csr_matrix, log_base_measure: np.ndarray | None = None) -> Counts:
    """Counts of a CSR matrix (n, g) without duplicates and explicit zeros, with the base measure of each cell, (n,)."""
    base = None if log_base_measure is None else torch.from_numpy(log_base_measure)
    return Counts(_compressed(matrix), _compressed(matrix.tocsc()), base)


def _compressed(matrix: sparse.csr_matrix | sparse.csc_matrix) -> Compressed:
    positions = (torch.from_numpy(part.astype(np.int64)) for part in (matrix.indptr, matrix.indices))
    return Compressed(*positions, torch.from_numpy(matrix.data))


def registered_columns(manager: AnnDataManager) -> dict[str, np.ndarray]:
    """Columns that a manager registered, by key, as they were when they were first read.

    scvi-tools keeps codes of categories in the AnnData, where the next set-up, of any model, replaces them, and reads
    numbers from the user's own columns, which may have changed since.
    """
    kept = manager.__dict__.setdefault("kept_columns", {})
    for key in manager.data_registry:
        if key not in (REGISTRY_KEYS.X_KEY, REGISTRY_KEYS.MINIFY_TYPE_KEY) and key not in kept:
            kept[key] = np.array(manager.get_from_registry(key))
    return kept


def registered_counts(manager: AnnDataManager) -> sparse.csr_matrix | StoredCounts:
    """Counts that a manager registered: as they were checked, where they stay in a file, or else in memory."""
    kept = kept_counts(manager)
    return load_counts(manager.get_from_registry(REGISTRY_KEYS.X_KEY)) if kept is None else kept


def kept_counts(manager: AnnDataManager) -> StoredCounts | None:
    """Counts of a manager that stay in a file; None for others."""
    return manager.__dict__.get("kept_counts")


def keep_counts(manager: AnnDataManager, counts: sparse.csr_matrix | StoredCounts | None) -> None:
    """Let a manager know counts that were checked, if they stay in a file."""
    if isinstance(counts, StoredCounts):
        manager.kept_counts = counts


class CountDataset(Dataset):
    """Registered data of an AnnData; ``dataset[positions]`` is a batch.

    Parameters
    ----------
    manager
        Manager of the AnnData.
    likelihood
        Likelihood whose base measure is kept with the counts.
    """

    def __init__(self, manager: AnnDataManager, likelihood: Likelihood) -> None:
        self.likelihood = likelihood
        self.columns = {
            key: values.astype(np.int64 if key in CODES else np.float32)
            for key, values in registered_columns(manager).items()
        }
        self.counts = registered_counts(manager)
        if REGISTRY_KEYS.OBSERVED_LIB_SIZE not in self.columns:
            total = np.asarray(self.counts.sum(1))  # in float32: in float64 scipy would copy the matrix
            self.columns[REGISTRY_KEYS.OBSERVED_LIB_SIZE] = total
        # Filled when a cell is first read, and used again in every epoch.
        self.log_base_measure = np.full(self.counts.shape[0], np.nan, dtype=np.float32)

    def __len__(self) -> int:
        return self.counts.shape[0]

    @cached_property
    def count_type(self) -> torch.dtype:
        """First of `COUNT_TYPES` that holds all counts exactly."""
        if isinstance(self.counts, StoredCounts):
            return _type_for(self.counts.largest, is_whole=self.counts.is_whole)
        return smallest_type(self.counts.data)

    def __getitem__(self, positions: Sequence[int]) -> dict[str, Counts | Tensor]:
        positions = np.asarray(positions)
        return self.batch_of(self.counts[positions], positions)

    def batch_of(self, counts: sparse.csr_matrix, positions: np.ndarray) -> dict[str, Counts | Tensor]:
        """Batch of cells whose counts, (n, g), have been taken already."""
        batch = {key: torch.from_numpy(values[positions]) for key, values in self.columns.items()}
        return batch | {REGISTRY_KEYS.X_KEY: counts_of_matrix(counts, self._base_measure(counts, positions))}

    def _base_measure(self, counts: sparse.csr_matrix, positions: np.ndarray) -> np.ndarray:
        if np.isnan(self.log_base_measure[positions]).any():
            each = self.likelihood.log_base_measure(torch.from_numpy(counts.data)).numpy()
            parts = sparse.csr_matrix((each, counts.indices, counts.indptr), shape=counts.shape)
            self.log_base_measure[positions] = np.asarray(parts.sum(1)).ravel()
        return self.log_base_measure[positions]


class HeldCells(Dataset):
    """Some cells of a `CountDataset`, with their counts in memory; ``cells[places]`` is a batch, by the place in them.

    Parameters
    ----------
    dataset
        All cells.
    positions
        Positions of the cells among all.
    """

    def __init__(self, dataset: CountDataset, positions: np.ndarray) -> None:
        self.dataset, self.positions = dataset, np.asarray(positions)
        self.counts = dataset.counts[self.positions]

    def __len__(self) -> int:
        return len(self.positions)

    def __getitem__(self, places: Sequence[int]) -> dict[str, Counts | Tensor]:
        return self.dataset.batch_of(self.counts[places], self.positions[places])


def loader_of(cells: Dataset, indices: np.ndarray, batch_size: int) -> DataLoader:
    """Loader of batches of cells in the order of their positions."""
    return DataLoader(cells, batch_size=None, sampler=Batches(indices, batch_size, shuffle=False, drop_last=False))


class SomeCells:
    """Some cells of a `CountDataset`, by their place among them; their counts stay where they are."""

    def __init__(self, dataset: CountDataset, positions: np.ndarray) -> None:
        self.dataset, self.positions = dataset, positions

    def __len__(self) -> int:
        return len(self.positions)

    def __getitem__(self, places: np.ndarray) -> dict[str, Counts | Tensor]:
        return self.dataset[self.positions[places]]


def some_cells(dataset: CountDataset, positions: np.ndarray) -> HeldCells | SomeCells:
    """Some cells that are read more than once: in memory, if their counts are in a file."""
    kind = HeldCells if isinstance(dataset.counts, StoredCounts) else SomeCells
    return kind(dataset, positions)


class CountLoader(DataLoader):
    """Loader of batches of cells, which `SCVAE` uses in place of the loader of scvi-tools.

    Parameters
    ----------
    manager
        Manager of the AnnData.
    likelihood
        Likelihood of the model.
    indices
        Positions of the cells.
    batch_size, shuffle, drop_last
        Cells at a time, whether in a new order each time (drawn from torch's generator), and whether to leave out a
        smaller last batch.
    dataset
        Data set of another loader of the same cells, so that a matrix which is not CSR is converted once; None to make
        it.
    share
        Share of the cells of each new order; all of them by default.
    **options
        Options of ``torch.utils.data.DataLoader``, such as ``num_workers`` and ``pin_memory``.
    """

    def __init__(
        self,
        manager: AnnDataManager,
        *,
        likelihood: Likelihood,
        indices: np.ndarray,
        batch_size: int,
        shuffle: bool = False,
        drop_last: bool = False,
        dataset: CountDataset | None = None,
        share: Share = WHOLE,
        **options: Any,
    ) -> None:
        self.indices = indices
        # A sampler of whole batches, and no collation: one row access of the CSR matrix makes the batch.
        batches = Batches(indices, batch_size, shuffle=shuffle, drop_last=drop_last, share=share)
        dataset = CountDataset(manager, likelihood) if dataset is None else dataset
        super().__init__(dataset, batch_size=None, sampler=batches, **options)


def n_of_epoch(n_cells: int) -> int:
    """Cells that are trained on in an epoch: all, or `LARGEST_EPOCH` of them, drawn anew each time."""
    return min(n_cells, LARGEST_EPOCH)


class Batches:
    """Positions of the cells of each batch; parameters as in `CountLoader`."""

    def __init__(
        self, indices: np.ndarray, batch_size: int, *, shuffle: bool, drop_last: bool, share: Share = WHOLE
    ) -> None:
        self.indices, self.batch_size, self.shuffle, self.share = indices, batch_size, shuffle, share
        n = n_of_epoch(len(indices)) // share.number if shuffle else len(indices)
        self.n_used = n - n % batch_size if drop_last else n

    def __len__(self) -> int:
        return math.ceil(self.n_used / self.batch_size)

    def __iter__(self) -> Iterator[np.ndarray]:
        share, order = self.share, self.indices
        if self.shuffle:
            order = share.of(order[share.permutation(len(order))])[: self.n_used]
        for start in range(0, self.n_used, self.batch_size):
            yield order[start : start + self.batch_size]
