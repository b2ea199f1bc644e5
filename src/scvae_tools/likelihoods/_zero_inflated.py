"""Zero-inflated likelihood: excess zeros added to any likelihood of counts."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import softplus

from scvae_tools.likelihoods._base import Head, Likelihood, Params


class ZeroInflated(Likelihood):
    """Any count likelihood with excess zeros, of probability sigmoid(gate)."""

    def __init__(self, base: Likelihood) -> None:
        self.base = base
        self.heads = (*base.heads, Head("gate", "logit of the probability of an excess zero", initial=-2.0))
        self.formula = f"[{base.formula}] − softplus(a); logaddexp(a, base log p(0)) − softplus(a) at x = 0"

    def log_prob_zero(self, params: Params) -> Tensor:
        gate = params["gate"]
        return torch.logaddexp(gate, self.base.log_prob_zero(params)) - softplus(gate)

    def log_kernel(self, x: Tensor, params: Params) -> Tensor:
        return self.base.log_kernel(x, params) - softplus(params["gate"])

    def start(self, mean: Tensor) -> Params:
        return self.base.start(mean)

    def log_base_measure(self, x: Tensor) -> Tensor:
        return self.base.log_base_measure(x)

    def kernel_constants(self, x: Tensor, shared: Params) -> Params:
        return self.base.kernel_constants(x, shared)

    def differentiate_zero(self, params: Params) -> tuple[Tensor, Params]:
        gate = params["gate"]
        base_zero, by_base = self.base.differentiate_zero(params)
        log_zero = torch.logaddexp(gate, base_zero).sub_(softplus(gate))
        from_base = torch.sigmoid(base_zero - gate)  # the probability that a zero is one of the base
        by_gate = (1 - from_base).sub_(torch.sigmoid(gate))
        return log_zero, {name: from_base * value for name, value in by_base.items()} | {"gate": by_gate}

    def differentiate_kernel(self, x: Tensor, params: Params) -> tuple[Tensor, Params]:
        gate = params["gate"]
        base, by_base = self.base.differentiate_kernel(x, params)
        return base - softplus(gate), by_base | {"gate": -torch.sigmoid(gate).expand_as(base)}

    def mean(self, params: Params) -> Tensor:
        return torch.sigmoid(-params["gate"]) * self.base.mean(params)

    def variance(self, params: Params) -> Tensor:
        kept, mean = torch.sigmoid(-params["gate"]), self.base.mean(params)
        return kept * (self.base.variance(params) + torch.sigmoid(params["gate"]) * mean.square())

    def sample(self, params: Params, generator: torch.Generator | None = None) -> Tensor:
        counts, gate = torch.broadcast_tensors(self.base.sample(params, generator), params["gate"])
        uniform = torch.rand(counts.shape, generator=generator, device=counts.device, dtype=counts.dtype)
        return counts * (uniform >= torch.sigmoid(gate))
