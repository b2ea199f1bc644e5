"""The null model: the same likelihood and covariates, without latent variables.

What a latent space explains is the difference between the ELBO and the log-likelihood of this model, on the same
held-out cells. Where it is not positive, the latent codes hold nothing but noise.
"""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING

import numpy as np
import torch
from scvi import REGISTRY_KEYS

from scvae_tools._data.loader import EVALUATION_BATCH_SIZE, Batches, some_cells
from scvae_tools._data.stored import StoredCounts
from scvae_tools._messages import inform, warn

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from torch import Tensor

    from scvae_tools._data.loader import CountDataset, HeldCells, SomeCells
    from scvae_tools._module.sparse import Counts
    from scvae_tools._module.vae import VAE

NAME = "model without latent variables"
#: Steps in which the null model is fitted, and the cells of each. The problem is nearly convex and starts close to its
#: optimum.
N_STEPS, N_CELLS = 120, 512
#: Learning rates at its start: of biases; of dispersions, whose log may have far to go, since a Poisson distribution is
#: a negative binomial of infinite r; and of the weights of covariates.
LR, LR_OF_DISPERSIONS, LR_OF_WEIGHTS = 0.1, 1.0, 0.02


def null_log_likelihoods(
    module: VAE, dataset: CountDataset, subsets: Mapping[str, np.ndarray], random_state: int
) -> dict[str, float]:
    """Mean log-likelihood of the null model, in nats per cell, on each subset of the cells that has any.

    The null model has the decoder's inputs but for z: the size factor, covariates, and parameters of each gene. It is
    fitted to the subset ``"train"``.

    Parameters
    ----------
    module
        Model whose likelihood, covariates and device it shares; it stays as it is.
    dataset
        Counts and covariates of all cells.
    subsets
        Positions of cells by the name of the subset.
    random_state
        Seed of the order of the cells. The global random state is not used.
    """
    null = _start(module, dataset, subsets["train"])
    train = some_cells(dataset, subsets["train"])
    order = _batches_of(len(train), np.random.default_rng(random_state))
    optimizer = torch.optim.Adam(_groups(null), fused=True)
    falling = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, N_STEPS)
    for _ in range(N_STEPS):
        with torch.enable_grad():
            log_likelihood = _log_likelihood(null, train[next(order)], is_averaged=True)
            optimizer.zero_grad()
            (-log_likelihood.mean()).backward()
        optimizer.step()
        falling.step()
    known = {"train": _mean(null, train)}
    del train  # before other cells are read
    others = {name: cells for name, cells in subsets.items() if name not in known and len(cells) > 0}
    return known | {name: _mean(null, some_cells(dataset, cells)) for name, cells in others.items()}


def report(elbo: float, null: float) -> None:
    """Say how far the ELBO of held-out cells lies above their log-likelihood under the null model; warn if it does not.

    Both are in nats per cell.
    """
    gain = elbo - null
    if gain > 0:
        inform("Held-out cells: ELBO %.1f nats per cell above a model without latent variables.", gain)
        return
    warn(
        f"The latent space explains nothing: the ELBO of held-out cells, {elbo:.1f} nats per cell, is not above their "
        f"log-likelihood under the same model without latent variables, {null:.1f}. Either the cells differ in their "
        "counts alone, or there are too few of them: do not read clusters or distances from this latent space. A "
        "smaller `n_latent` or fewer genes (`mask_var`) may help."
    )


def _start(module: VAE, dataset: CountDataset, train: np.ndarray) -> VAE:
    """Copy of a module whose decoder depends on no weight, and starts at the shares of the genes."""
    null = copy.deepcopy(module).eval().requires_grad_(False)  # noqa: FBT003
    null.decoder.requires_grad_(True)  # noqa: FBT003
    if isinstance(dataset.counts, StoredCounts):  # of all cells, since it is no more than a start
        total = dataset.counts.gene_total * (len(train) / len(dataset))
    else:
        total = sum(np.asarray(dataset.counts[part].sum(0)).ravel() for part in _in_parts(train))
    keys = (REGISTRY_KEYS.SIZE_FACTOR_KEY, REGISTRY_KEYS.OBSERVED_LIB_SIZE)
    size = next(dataset.columns[key] for key in keys if key in dataset.columns)
    mean_size = size[train].mean(dtype=np.float64) if module.use_size_factor else 1.0
    mean = torch.as_tensor((total + 0.5) / len(train), dtype=torch.float32, device=module.device)  # positive, (g,)
    share = mean / mean_size
    with torch.no_grad():
        for head in null.decoder.heads.values():
            head.weight.zero_()
        initial = {head.name: torch.full_like(share, head.initial) for head in module.likelihood.heads}
        null.decoder.start(initial | module.likelihood.start(mean) | {"log_rate": share.log()})
    return null


def _groups(null: VAE) -> list[dict]:
    """Parameters of the decoder by their learning rates."""
    shared = list(null.decoder.shared.parameters())
    others = [value for value in null.decoder.parameters() if all(value is not each for each in shared)]
    groups = [
        {"params": [value for value in others if value.ndim == 1], "lr": LR},
        {"params": shared, "lr": LR_OF_DISPERSIONS},
        {"params": [value for value in others if value.ndim > 1], "lr": LR_OF_WEIGHTS},
    ]
    return [group for group in groups if group["params"]]


def _in_parts(cells: np.ndarray) -> Batches:
    return Batches(cells, EVALUATION_BATCH_SIZE, shuffle=False, drop_last=False)


def _batches_of(n_cells: int, rng: np.random.Generator) -> Iterator[np.ndarray]:
    """Places of the cells of batches without end, in a new order each time that all have been seen."""
    while True:
        order = rng.permutation(n_cells)
        for start in range(0, max(1, len(order) - N_CELLS + 1), N_CELLS):
            yield order[start : start + N_CELLS]


def _log_likelihood(null: VAE, batch: dict[str, Counts | Tensor], *, is_averaged: bool = False) -> Tensor:
    """Log p(x) of the cells of a batch at z = 0, (n,)."""
    x, size, covariates = null.data(batch)
    z = size.new_zeros(len(size), null.n_latent)
    expected = z.new_full((len(z),), -1 / len(z)) if is_averaged else None
    covariates = null.with_size(covariates, size)
    return null.log_likelihood(x, z, null.log_size(size), covariates, expected_gradient=expected)


@torch.no_grad()
def _mean(null: VAE, cells: HeldCells | SomeCells) -> float:
    parts = _in_parts(np.arange(len(cells)))
    total = sum(_log_likelihood(null, cells[part]).double().sum() for part in parts)
    return float(total) / len(cells)
