"""Poisson likelihoods: of counts, with rates that add up to the size factor, and of whether a count is above 0."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.distributions import constraints

from scvae_tools.likelihoods._base import RATE, Likelihood, Params


class Poisson(Likelihood):
    """Poisson distribution with mean λ."""

    heads = (RATE,)
    formula = "x ℓ − e^ℓ − lgamma(x + 1)"

    def log_prob_zero(self, params: Params) -> Tensor:
        return -params["log_rate"].exp()

    def log_kernel(self, x: Tensor, params: Params) -> Tensor:
        return x * params["log_rate"] - params["log_rate"].exp()

    def differentiate_zero(self, params: Params) -> tuple[Tensor, Params]:
        log_zero = self.log_prob_zero(params)
        return log_zero, {"log_rate": log_zero}

    def differentiate_kernel(self, x: Tensor, params: Params) -> tuple[Tensor, Params]:
        log_rate = params["log_rate"]
        rate = log_rate.exp()
        return x * log_rate - rate, {"log_rate": x - rate}

    def mean(self, params: Params) -> Tensor:
        return params["log_rate"].exp()

    variance = mean

    def sample(self, params: Params, generator: torch.Generator | None = None) -> Tensor:
        return torch.poisson(params["log_rate"].exp(), generator=generator)


class ConstrainedPoisson(Poisson):
    """Poisson(λ) where the rates of a cell add up to its size factor: λ = size · softmax(f) over the genes."""

    normalizes_rates = True


#: log λ at λ = log 2: below it, log(1 − e^−λ) is more exact by expm1, and above it by log1p. At log λ =
#: `LOG_RATE_DETECTED` and above, 1 − e^−λ is 1 to 60 digits.
LOG_LOG_2, LOG_RATE_DETECTED = math.log(math.log(2)), 5.0


#: log λ below which 1 + λ is 1 in float64.
LOG_RATE_NEGLIGIBLE = -40.0


class Bernoulli(Poisson):
    """Whether a Poisson(λ) count is above 0, with the probability 1 − e^−λ; every x > 0 counts as 1.

    The complementary log-log link: any probability can be reached, and λ means what it does for the Poisson.
    """

    formula = "log(1 − e^(−λ)) for every x > 0"
    measures = "detection"
    support = constraints.boolean

    def log_kernel(self, x: Tensor, params: Params) -> Tensor:
        log_rate = params["log_rate"]
        small = log_rate.clamp(LOG_RATE_NEGLIGIBLE, LOG_LOG_2).exp()
        large = log_rate.clamp(LOG_LOG_2, LOG_RATE_DETECTED).exp()
        # Each branch is finite where the other is taken, so that both have finite derivatives.
        from_small = log_rate + torch.log(-torch.expm1(-small) / small)
        return torch.where(log_rate < LOG_LOG_2, from_small, torch.log1p(-torch.exp(-large)))

    def log_base_measure(self, x: Tensor) -> Tensor:
        return torch.zeros_like(x)

    def differentiate_kernel(self, x: Tensor, params: Params) -> tuple[Tensor, Params]:
        rate = params["log_rate"].clamp(LOG_RATE_NEGLIGIBLE, LOG_RATE_DETECTED).exp()
        return self.log_kernel(x, params), {"log_rate": rate / torch.expm1(rate)}

    def mean(self, params: Params) -> Tensor:
        return -torch.expm1(-params["log_rate"].exp())

    def variance(self, params: Params) -> Tensor:
        return self.mean(params) * torch.exp(-params["log_rate"].exp())

    def sample(self, params: Params, generator: torch.Generator | None = None) -> Tensor:
        probability = self.mean(params)
        uniform = torch.rand(probability.shape, generator=generator, device=probability.device, dtype=probability.dtype)
        return (uniform < probability).to(probability)
