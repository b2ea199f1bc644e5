"""Distribution of torch made of a likelihood and its parameters, as scvi-tools uses distributions."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

import torch
from torch.distributions import Distribution, constraints

if TYPE_CHECKING:
    from torch import Tensor

    from scvae_tools.likelihoods._base import Likelihood, Params


class CountDistribution(Distribution):
    """A likelihood with its parameters, as a ``torch`` distribution with the attributes that scvi-tools reads.

    Parameters
    ----------
    likelihood
        Declaration of the likelihood.
    params
        Head name to tensor; broadcastable, (..., n_cells, n_genes).
    scale
        λ divided by the size factor, of the shape of λ.
    """

    arg_constraints: ClassVar[dict] = {}

    def __init__(self, likelihood: Likelihood, params: Params, scale: Tensor | None = None) -> None:
        self.likelihood, self.params = likelihood, params
        self.mu = likelihood.rate(params)
        self.scale = self.mu if scale is None else scale
        shape = torch.broadcast_shapes(*(value.shape for value in params.values()))
        super().__init__(batch_shape=shape, validate_args=False)

    @property
    def support(self) -> constraints.Constraint:
        """Values that may be drawn."""
        return self.likelihood.support

    @property
    def mean(self) -> Tensor:
        """E[x], in counts."""
        return self.likelihood.mean(self.params)

    @property
    def variance(self) -> Tensor:
        """Var[x], in counts squared."""
        return self.likelihood.variance(self.params)

    @property
    def theta(self) -> Tensor:
        """Inverse dispersion r, infinite for a likelihood without one."""
        if "log_r" in self.params:
            return self.params["log_r"].exp().expand(self.batch_shape)
        return torch.full_like(self.mu, torch.inf)

    @property
    def zi_probs(self) -> Tensor:
        """Probability of an excess zero, 0 for a likelihood without inflation."""
        return torch.sigmoid(self.params["gate"]) if "gate" in self.params else torch.zeros_like(self.mu)

    def log_prob(self, value: Tensor) -> Tensor:
        """Log p(value), in nats."""
        return self.likelihood.log_prob(value, self.params)

    def sample(self, sample_shape: tuple[int, ...] = (), generator: torch.Generator | None = None) -> Tensor:
        """Draw counts of shape ``sample_shape + batch_shape``."""
        shape = torch.Size(sample_shape) + self.batch_shape
        with torch.no_grad():
            return self.likelihood.sample({k: v.expand(shape) for k, v in self.params.items()}, generator)

    def get_normalized(self, key: str) -> Tensor:
        """λ over the size factor for ``"scale"``, λ for ``"mu"``: scvi-tools asks by these names."""
        return {"scale": self.scale, "mu": self.mu}[key]
