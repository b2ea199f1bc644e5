"""Posterior, standard prior and bound of a batch of cells, without the networks that emit them.

Symbols and shapes (docs/model.md): n cells, d latent dimensions, k components, s samples; z (s, k, n, d),
log q(y|x) (n, k). Bounds and their terms are in nats per cell.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import softplus

LOG_2PI = math.log(2 * math.pi)

#: Weight of the cross-entropy of a known label, relative to the bound of its cell. Any weight will do that is large
#: compared with the few nats by which components differ, since log q(y|x) has parameters of its own.
LABEL_WEIGHT = 10.0


@dataclass(frozen=True)
class Bound:
    """The evidence lower bound of each cell, in nats, by its terms; each is (n,).

    ``cross_entropy`` is −log q(y|x) of cells whose label is known and 0 of others; None where labels are not used.
    ``importance_weighted`` is the importance-weighted bound of the same draws; None where it was not asked for.
    ``distance`` is the squared distance of the mean of q(z|x) from a code that was given; None where none was.
    """

    log_likelihood: Tensor
    kl_z: Tensor
    kl_y: Tensor
    cross_entropy: Tensor | None = None
    importance_weighted: Tensor | None = None
    distance: Tensor | None = None

    @property
    def elbo(self) -> Tensor:
        """log-likelihood − KL z − KL y."""
        return self.log_likelihood - self.kl_z - self.kl_y

    def loss(
        self,
        kl_weight: float | Tensor = 1.0,
        *,
        y_term: str = "kl",
        free_nats_z: float | Tensor = 0.0,
        free_nats_y: float | Tensor = 0.0,
        pull: float | Tensor = 0.0,
    ) -> Tensor:
        """Mean negative bound with both KL terms weighted, plus the cross-entropy of the labels and the distance.

        Parameters
        ----------
        kl_weight
            Weight of both KL terms. The importance-weighted bound, where there is one, contains its weight already.
        y_term
            ``"none"`` leaves KL(q(y|x) ‖ p(y)) out.
        free_nats_z, free_nats_y
            Nats up to which the mean of either KL costs nothing (after Kingma et al. 2016, arXiv:1606.04934).
        pull
            Weight of the distance, where there is one, in nats.
        """
        pulled = 0.0 if self.distance is None else pull * self.distance.mean()
        if self.importance_weighted is not None:
            return pulled - self.importance_weighted.mean()
        kl = torch.clamp(self.kl_z.mean(), min=free_nats_z)
        if y_term != "none":
            kl = kl + torch.clamp(self.kl_y.mean(), min=free_nats_y)
        loss = kl_weight * kl - self.log_likelihood.mean() + pulled
        return loss if self.cross_entropy is None else loss + LABEL_WEIGHT * self.cross_entropy.mean()


@dataclass(frozen=True)
class Posterior:
    """Posterior q(y|x) and q(z|x,y); one component where the model is no mixture."""

    log_q_y: Tensor  # (n, k)
    mean: Tensor  # (k, n, d)
    log_var: Tensor  # (k, n, d)

    @property
    def q_y(self) -> Tensor:
        """q(y|x), (n, k)."""
        return self.log_q_y.exp()

    def observed(self, label: Tensor) -> Posterior:
        """Posterior with q(y|x) replaced by certainty where the label (n,) is known, that is, not negative."""
        return Posterior(observe(self.log_q_y, label), self.mean, self.log_var)

    def rows(self, cell: Tensor) -> Posterior:
        """Posterior of the cells at some positions."""
        return Posterior(self.log_q_y[cell], self.mean[:, cell], self.log_var[:, cell])

    def moments(self) -> tuple[Tensor, Tensor]:
        """Mean and variance of q(z|x) = Σ_y q(y|x) q(z|x,y), each (n, d)."""
        weight = self.q_y.T[..., None]  # (k, n, 1)
        mean = (weight * self.mean).sum(0)
        return mean, (weight * (self.log_var.exp() + (self.mean - mean).square())).sum(0)

    def sample_each(self, n_samples: int) -> Tensor:
        """Reparametrised draws from every q(z|x,y), (s, k, n, d)."""
        noise = torch.randn(n_samples, *self.mean.shape, device=self.mean.device, dtype=self.mean.dtype)
        return self.mean + (0.5 * self.log_var).exp() * noise

    def sample(self, n_samples: int) -> Tensor:
        """Draws from q(z|x), (s, n, d): first y, then z."""
        n, k = self.log_q_y.shape
        if k == 1:
            return self.sample_each(n_samples)[:, 0]
        y = torch.multinomial(self.q_y, n_samples, replacement=True).T  # (s, n)
        cell = torch.arange(n, device=y.device)
        mean, log_var = self.mean[y, cell], self.log_var[y, cell]  # (s, n, d)
        return mean + (0.5 * log_var).exp() * torch.randn_like(mean)

    def log_prob(self, z: Tensor) -> Tensor:
        """Log q(z|x) of z (s, n, d), (s, n)."""
        each = log_normal(z[:, None], self.mean, self.log_var)  # (s, k, n)
        return torch.logsumexp(self.log_q_y.T + each, dim=1)


@dataclass(frozen=True)
class Decoded:
    """Log p(x|z) of s draws of z for each of p pairs of cell and component; for one component p = n.

    ``weight`` is q(y|x) of the pair, relative to the sum over the pairs of its cell.
    """

    z: Tensor  # (s, p, d)
    log_likelihood: Tensor  # (s, p)
    cell: Tensor  # (p,)
    component: Tensor  # (p,)
    weight: Tensor  # (p,)

    def expected(self, n_cells: int) -> Tensor:
        """Σ_y q(y|x) E log p(x|z), (n,)."""
        each = self.log_likelihood.mean(0)
        return each.new_zeros(n_cells).index_add(0, self.cell, self.weight * each)


class StandardNormal(nn.Module):
    """Standard normal prior p(z) = N(0, I), as a mixture of one component."""

    def __init__(self) -> None:
        super().__init__()
        # A buffer, so that all results of the prior are on the device of the module; not saved.
        self.register_buffer("zero", torch.zeros(1), persistent=False)

    def log_weights(self) -> Tensor:
        """Log p(y), (1,)."""
        return self.zero

    def entropy_of_y(self) -> Tensor:
        """Entropy H[p(y)], which is 0."""
        return self.zero[0]

    def kl(self, mean: Tensor, log_var: Tensor) -> Tensor:
        """KL(q(z|x,y) ‖ p(z|y)) of mean and log variance (k, n, d), (k, n)."""
        return 0.5 * (log_var.exp() + mean.square() - 1 - log_var).sum(-1)

    def marginals(self) -> tuple[Tensor, Tensor]:
        """Mean and variance of each dimension, each (1, 1)."""
        return self.zero[None], self.zero[None] + 1

    def log_prob(self, z: Tensor) -> Tensor:
        """Log p(z) of z (..., d), (...)."""
        return -0.5 * (z.square() + LOG_2PI).sum(-1)


def log_normal(z: Tensor, mean: Tensor, log_var: Tensor) -> Tensor:
    """Log N(z; mean, diag exp(log_var)), summed over the last axis."""
    return -0.5 * ((z - mean).square() * (-log_var).exp() + log_var + LOG_2PI).sum(-1)


def kl_of_marginals(posterior: Posterior, prior_mean: Tensor, prior_variance: Tensor) -> Tensor:
    """KL(q(z_d|x,y) ‖ N(mean, variance)) of each dimension for a prior (k or 1, d or 1), (k, n, d)."""
    mean, variance = prior_mean.to(posterior.mean)[:, None], prior_variance.to(posterior.mean)[:, None]
    ratio = posterior.log_var - variance.log()
    return 0.5 * (ratio.exp() + (posterior.mean - mean).square() / variance - 1 - ratio)


def cross_entropy(log_q_y: Tensor, label: Tensor) -> Tensor:
    """−log q(y|x) of log q(y|x) (..., n, k) at known labels (n,), 0 where the label is negative, (..., n)."""
    at = label.clamp(min=0)[:, None].expand(*log_q_y.shape[:-1], 1)
    return torch.where(label < 0, 0.0, -log_q_y.gather(-1, at)[..., 0])


def observe(log_q_y: Tensor, label: Tensor) -> Tensor:
    """Log q(y|x) (..., n, k) with certainty where the label (n,) is known, that is, not negative."""
    at = label.clamp(min=0)[:, None].expand(*log_q_y.shape[:-1], 1)
    impossible = torch.full_like(log_q_y, torch.finfo(log_q_y.dtype).min)  # its exp is 0, and 0 times it is 0
    return torch.where(label[:, None] < 0, log_q_y, impossible.scatter(-1, at, 0.0))


def log_softplus(a: Tensor) -> Tensor:
    """Log softplus(a), also where softplus underflows: it tends to a."""
    # Clamped below the switch at −15: at the limit of `clamp` itself, the gradient differs between versions of torch.
    return torch.where(a < -15, a, softplus(a.clamp(min=-16)).log())
