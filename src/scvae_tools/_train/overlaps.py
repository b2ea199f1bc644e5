"""Overlap of the components of mixtures: the entropy that is lost where two become one, per cell of the smaller."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from torch import Tensor


def overlaps(probs: Tensor) -> Tensor:
    """Overlap of each two components, in nats per cell of the smaller, (r, k, k), 0 on the diagonal.

    Parameters
    ----------
    probs
        Probability of each component, (r, k, n), of r mixtures.

    Notes
    -----
    The overlap is the entropy of y that is lost when i and j become one (Baudry et al. 2010), over the cells of the
    smaller component:
    Σ_n [(p_i + p_j) log(p_i + p_j) − p_i log p_i − p_j log p_j] / min(Σ_n p_i, Σ_n p_j), from 0 for two that share no
    cell to 2 log 2 for two halves of one.
    """
    r, k, _ = probs.shape
    entropy, size = terms(probs)
    each = probs.new_zeros(r, k, k)
    for i in range(k - 1):
        others = slice(i + 1, None)
        one = probs[:, i], entropy[:, i, None], size[:, i, None]
        each[:, i, others] = overlap_with(probs[:, others], entropy[:, others], size[:, others], *one)
    return each + each.mT


def terms(probs: Tensor) -> tuple[Tensor, Tensor]:
    """Σ_n p log p and Σ_n p of probabilities (r, k, n), (r, k) each."""
    return torch.xlogy(probs, probs).sum(2), probs.sum(2)


def overlap_with(
    probs: Tensor, entropy: Tensor, size: Tensor, one: Tensor, entropy_of_one: Tensor, size_of_one: Tensor
) -> Tensor:
    """Overlaps of components (r, k, n) with one of each run (r, n), (r, k)."""
    both = probs + one[:, None]
    lost = torch.xlogy(both, both).sum(2) - entropy - entropy_of_one
    return lost / torch.minimum(size, size_of_one).clamp(min=torch.finfo(probs.dtype).tiny)
