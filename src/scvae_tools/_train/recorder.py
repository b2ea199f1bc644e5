"""Lightning callback that records λ in the history, at the end of each epoch."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING

import numpy as np
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor

from scvae_tools._data.loader import some_cells
from scvae_tools._module import memory
from scvae_tools._module.mixture_vaes import GMVAE

if TYPE_CHECKING:
    from collections.abc import Iterator

    import lightning.pytorch as lightning

    from scvae_tools._data.loader import CountDataset
    from scvae_tools._module.vae import VAE
    from scvae_tools._train.plan import TrainingPlan

#: Largest number of cells whose λ is recorded.
N_CELLS = 512
#: Working memory in bytes: as many cells are decoded at a time as fit into it.
CHUNK_BYTES = 2**26


class RateRecorder(Callback):
    """Lightning callback that records λ at the zeros and the largest λ at the end of each epoch, of the same few cells.

    The callback changes nothing but the history: it draws no random number, keeps no gradient, and leaves the mode of
    the module as it was.

    Parameters
    ----------
    dataset
        Counts and covariates of all cells.
    indices
        Positions of the training cells, of which `N_CELLS` are drawn, or all if there are no more.
    seed
        Seed for the draw of the cells.
    """

    def __init__(self, dataset: CountDataset, indices: np.ndarray, seed: int) -> None:
        # A copy, since a data set keeps base measures by cell, and their last bits depend on the batch in which a cell
        # is first read. The recorder must not change those of the training.
        self.dataset = copy.copy(dataset)
        self.dataset.log_base_measure = np.full_like(dataset.log_base_measure, np.nan)
        n_drawn = min(N_CELLS, len(indices))
        self.indices = np.sort(np.random.default_rng(seed).choice(indices, n_drawn, replace=False))
        self.cells = some_cells(self.dataset, self.indices)

    def on_train_epoch_end(self, trainer: lightning.Trainer, pl_module: TrainingPlan) -> None:
        pl_module.close_training()  # so that the columns always have the same order
        pl_module.exchange(average=True)  # the weights that are kept
        pl_module.row.update(self.record(pl_module.module))
        pl_module.exchange(average=False)

    def record(self, module: VAE) -> dict[str, float]:
        """New columns of the history, for the present weights.

        Returns
        -------
        ``"rate_at_zeros"``, the mean over cells of Σ_{g: x_g = 0} λ_g, and ``"max_rate"``, the largest λ of these cells
        and all genes, both in counts, of λ at the posterior means before zero inflation.
        """
        # One tensor for all cells: small tensors between the large ones would keep the heap from shrinking.
        rates = torch.empty(len(self.indices), 2, device=module.device)
        was_training = module.training
        module.eval()
        try:
            with torch.no_grad():
                for rows, batch in self.batches(module):
                    rates[rows] = _rates(module, batch)
        finally:
            module.train(was_training)
        at_zeros, largest = rates.unbind(1)
        return {"rate_at_zeros": float(at_zeros.mean()), "max_rate": float(largest.max())}

    def batches(self, module: VAE) -> Iterator[tuple[slice, dict[str, Tensor]]]:
        """Batches of the cells on the device of the module, with their places among these cells."""
        n_at_once = self._cells_at_once(module)
        for start in range(0, len(self.indices), n_at_once):
            rows = slice(start, min(start + n_at_once, len(self.indices)))
            batch = self.cells[np.arange(rows.start, rows.stop)]
            yield rows, {name: value.to(module.device) for name, value in batch.items()}

    def _cells_at_once(self, module: VAE) -> int:
        """Number of cells that are encoded and decoded in `CHUNK_BYTES`."""
        counts = self.dataset.counts
        n_decoded = module.n_components if isinstance(module, GMVAE) and module.is_mixture else 1
        bytes_per_cell = 4 * n_decoded * counts.shape[1] * (len(module.likelihood.heads) + memory.DECODED_NUMBERS)
        bytes_per_cell += memory.ENCODED_BYTES * counts.nnz / counts.shape[0]
        return max(1, int(CHUNK_BYTES // bytes_per_cell))


def _rates(module: VAE, batch: dict[str, Tensor]) -> Tensor:
    """Σ λ over the zeros of each cell, and its largest λ, (n, 2)."""
    counts, size, covariates = module.data(batch)
    rate = module.rate(counts, size, covariates)  # (n, g)
    largest = rate.amax(1)
    # Not the sum over all genes less the sum over the non-zeros: beside large λ, rounding would remove the zeros' part.
    rate[counts.by_cell.row(), counts.by_cell.column] = 0.0
    return torch.stack([rate.sum(1), largest], dim=1)
