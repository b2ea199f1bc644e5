"""Gaussian mixture p(y) p(z|y), the prior of the models that cluster."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn.functional import log_softmax

from scvae_tools._module.bounds import LOG_2PI

if TYPE_CHECKING:
    from collections.abc import Sequence

COVARIANCES = ("diag", "tied", "full")


WEIGHTS = ("learned", "uniform", "labels")


class GaussianMixture(nn.Module):
    """Gaussian mixture p(y) = Cat(π), p(z|y) = N(μ_y, Σ_y).

    Each Σ is held as the Cholesky factor U of its inverse, Σ⁻¹ = U Uᵀ (lower triangular, positive diagonal), so that
    densities and KL need products alone: no inverse, no solve.

    Parameters
    ----------
    n_components, n_latent
        Numbers k of components and d of latent dimensions.
    covariance
        ``"diag"``, ``"tied"`` (one full Σ for all), or ``"full"``.
    weights
        ``"learned"``, ``"uniform"``, ``"labels"`` (set at the start, and not trained), or k numbers.
    """

    def __init__(self, n_components: int, n_latent: int, *, covariance: str, weights: str | Sequence[float]) -> None:
        super().__init__()
        k, d, distinct = n_components, n_latent, 1 if covariance == "tied" else n_components
        self.n_components, self.covariance, self.weights = k, covariance, weights
        self.means = nn.Parameter(torch.zeros(k, d))
        self.log_diagonal = nn.Parameter(torch.zeros(distinct, d))
        self.logits = nn.Parameter(torch.zeros(k), requires_grad=weights == "learned")
        if covariance != "diag":
            self.off_diagonal = nn.Parameter(torch.zeros(distinct, d, d))

    @torch.no_grad()
    def set(self, weights: Tensor, means: Tensor, covariances: Tensor) -> None:
        """Set π (k,), μ (k, d) and Σ (k, d, d), reduced to what the covariance kind can hold."""
        if self.weights in ("learned", "labels"):
            self.logits.copy_(weights.log())
        elif self.weights != "uniform":
            self.logits.copy_(torch.as_tensor(self.weights).log())
        self.means.copy_(means)
        if self.covariance == "diag":
            self.log_diagonal.copy_(-0.5 * torch.diagonal(covariances, dim1=-2, dim2=-1).log())
            return
        if self.covariance == "tied":
            covariances = torch.einsum("k,kij->ij", weights / weights.sum(), covariances)[None]
        factor = torch.linalg.cholesky(torch.linalg.inv(covariances))
        self.log_diagonal.copy_(torch.diagonal(factor, dim1=-2, dim2=-1).log())
        self.off_diagonal.copy_(factor.tril(-1))

    @torch.no_grad()
    def permute(self, order: Tensor) -> None:
        """Renumber the components: the new component i is the old ``order[i]``."""
        shared = ("log_diagonal", "off_diagonal") if self.covariance == "tied" else ()
        for name, parameter in self.named_parameters():
            if name not in shared:
                parameter.copy_(parameter[order])

    def log_weights(self) -> Tensor:
        """Log p(y), (k,)."""
        return log_softmax(self.logits, dim=0)

    def entropy_of_y(self) -> Tensor:
        """Entropy H[p(y)], in nats, without a gradient."""
        log_weights = self.log_weights().detach()
        return -(log_weights.exp() * log_weights).sum()

    def precision_factor(self) -> Tensor:
        """Cholesky factors U of the inverse covariances, (k or 1, d, d)."""
        diagonal = torch.diag_embed(self.log_diagonal.exp())
        return diagonal if self.covariance == "diag" else diagonal + self.off_diagonal.tril(-1)

    def covariances(self) -> Tensor:
        """Covariances Σ, (k, d, d)."""
        inverse = torch.linalg.inv(self.precision_factor())
        return (inverse.mT @ inverse).expand(self.n_components, -1, -1)

    def marginals(self) -> tuple[Tensor, Tensor]:
        """Mean and variance of each dimension of p(z|y), each (k, d)."""
        return self.means, torch.diagonal(self.covariances(), dim1=-2, dim2=-1)

    def kl(self, mean: Tensor, log_var: Tensor) -> Tensor:
        """KL(N(mean, diag exp(log_var)) ‖ p(z|y)) of (k or 1, n, d) tensors, (k, n).

        ½ [tr(Σ⁻¹ S) + (m − μ)ᵀ Σ⁻¹ (m − μ) − d + log det Σ − log det S].
        """
        factor = self.precision_factor()
        trace = torch.einsum("knd,kd->kn", *_same_components(log_var.exp(), factor.square().sum(-1)))
        distance = self._mahalanobis(mean, factor)
        log_det = -2 * self.log_diagonal.sum(-1)[:, None] - log_var.sum(-1)
        return 0.5 * (trace + distance - mean.shape[-1] + log_det)

    def log_prob_each(self, z: Tensor) -> Tensor:
        """Log p(z|y) of z (s, n, d) for every component, (s, k, n)."""
        distance = self._mahalanobis(z[:, None], self.precision_factor())
        return -0.5 * (distance - 2 * self.log_diagonal.sum(-1)[:, None] + z.shape[-1] * LOG_2PI)

    def log_prob(self, z: Tensor) -> Tensor:
        """Log p(z) of z (s, n, d), (s, n)."""
        return torch.logsumexp(self.log_weights()[:, None] + self.log_prob_each(z), dim=1)

    def sample(self, components: Tensor) -> Tensor:
        """Draw z (n, d) from p(z|y) of the given components (n,)."""
        noise = torch.randn(len(components), self.means.shape[1], 1, device=self.means.device)
        factor = self.precision_factor().expand(self.n_components, -1, -1)[components]
        return self.means[components] + torch.linalg.solve_triangular(factor.mT, noise, upper=True)[..., 0]

    def _mahalanobis(self, z: Tensor, factor: Tensor) -> Tensor:
        """Squared Mahalanobis distance (z − μ)ᵀ Σ⁻¹ (z − μ) of z (..., k or 1, n, d), (..., k, n)."""
        return ((z - self.means[:, None]) @ factor).square().sum(-1)


def _same_components(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    k = max(len(a), len(b))
    return a.expand(k, *a.shape[1:]), b.expand(k, *b.shape[1:])
