"""One pass over counts that stay in a file: all checks, and all that is to be known of the cells before a training."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from scvae_tools._data.conversion import canonical, to_float32
from scvae_tools._data.count_checks import Found, check_integers, check_values
from scvae_tools._data.stored import marks_of
from scvae_tools._messages import quiet_tqdm

if TYPE_CHECKING:
    from anndata import AnnData
    from scipy.sparse import csr_matrix

    from scvae_tools._data.stored import StoredCounts


def survey(
    counts: StoredCounts,
    adata: AnnData,
    mask: np.ndarray | None,
    layer: str | None,
    *,
    allow_non_integer: bool,
    progress: bool,
) -> None:
    """Check all values of counts, and note what is known of all cells.

    Parameters
    ----------
    counts
        Counts, which take the notes.
    adata
        AnnData that holds them, for messages.
    mask
        Whether each gene of ``adata`` is used; None for all.
    layer
        Its layer, for messages.
    allow_non_integer
        Accept estimated counts, with a warning.
    progress
        Whether to show a bar.

    Raises
    ------
    CountsError
        If the values are not counts; it names cell and gene.
    OSError
        If rows cannot be read.
    """
    quiet_tqdm()
    from tqdm.auto import tqdm

    sums, first_estimated = _Sums(counts.shape[1]), None
    with tqdm(total=counts.shape[0], desc="check of the counts", unit="cell", disable=not progress) as bar:
        for first, last in counts.blocks():
            part = canonical(counts.read(first, last))
            found = Found(part, counts.where, adata, mask, first_cell=first)
            check_values(found, layer)
            if not allow_non_integer:
                check_integers(found, layer, allow=False)
            elif first_estimated is None and (part.data != np.rint(part.data)).any():
                first_estimated = found
            sums.add(to_float32(part))
            bar.update(last - first)
    if first_estimated is not None:
        check_integers(first_estimated, layer, allow=True)
    counts.note(**sums.result()._asdict(), is_whole=first_estimated is None)


class _Known(NamedTuple):
    indptr: np.ndarray
    total: np.ndarray
    gene_total: np.ndarray
    gene_fraction: np.ndarray
    largest: float
    digest: str
    mark: np.ndarray


class _Sums:
    """Sums over cells that come in blocks."""

    def __init__(self, n_genes: int) -> None:
        self.n_of_cell, self.total, self.mark = [np.zeros(1, dtype=np.int64)], [], []
        self.gene_total, self.gene_fraction = np.zeros(n_genes), np.zeros(n_genes)
        self.largest = 0.0
        self.hashers = [hashlib.blake2b(digest_size=8) for _ in range(2)]

    def add(self, part: csr_matrix) -> None:
        total = np.asarray(part.sum(1)).ravel()
        self.n_of_cell.append(np.diff(part.indptr))
        self.total.append(total)
        self.mark.append(marks_of(part))
        self.gene_total += np.bincount(part.indices, part.data, minlength=len(self.gene_total))
        share = part.data / np.repeat(np.maximum(total, np.finfo(np.float32).tiny), np.diff(part.indptr))
        self.gene_fraction += np.bincount(part.indices, share, minlength=len(self.gene_fraction))
        self.largest = max(self.largest, float(part.data.max(initial=0)))
        for hasher, values in zip(self.hashers, (part.indices.astype(np.int32, copy=False), part.data), strict=True):
            hasher.update(np.ascontiguousarray(values))

    def result(self) -> _Known:
        indptr, total = np.cumsum(np.concatenate(self.n_of_cell)), np.concatenate(self.total)
        values = b"".join(hasher.digest() for hasher in self.hashers)
        digest = hashlib.blake2b(values + indptr.tobytes(), digest_size=8).hexdigest()
        fraction = self.gene_fraction / len(total)
        return _Known(indptr, total, self.gene_total, fraction, self.largest, f"#{digest}", np.concatenate(self.mark))
