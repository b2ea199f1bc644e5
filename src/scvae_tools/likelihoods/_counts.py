"""Probabilities of counts, and of whether a count is above 0; and excess zeros around any of them."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch.distributions import constraints
from torch.nn.functional import softplus

from scvae_tools.likelihoods._base import RATE, Head, Likelihood, Params
from scvae_tools.likelihoods._rising import differentiate_log_rising_ratio, log_rising_ratio

if TYPE_CHECKING:
    from torch import Tensor


class Poisson(Likelihood):
    """Poisson(λ)."""

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


#: Below this λ, e^−λ is more exact as 1 − (1 − e^−λ); from e^`LOG_RATE_DETECTED` on, 1 − e^−λ is 1 to 60 digits.
LOG_LOG_2, LOG_RATE_DETECTED = math.log(math.log(2)), 5.0
#: Below e^this, λ is lost beside 1 in float64.
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


class NegativeBinomial(Likelihood):
    """Negative binomial with mean λ and inverse dispersion r; variance λ + λ²/r."""

    heads = (RATE, Head("log_r", "log of the inverse dispersion r", is_dispersion=True))
    formula = "x ℓ + [lgamma(x + r) − lgamma(r) − x log r] − (x + r) softplus(ℓ − log r) − lgamma(x + 1)"

    def log_prob_zero(self, params: Params) -> Tensor:
        log_r = params["log_r"]
        return -log_r.exp() * softplus(params["log_rate"] - log_r)

    def log_kernel(self, x: Tensor, params: Params) -> Tensor:
        log_rate, log_r = params["log_rate"], params["log_r"]
        r = log_r.exp()
        rising = params["rising"] if "rising" in params else log_rising_ratio(x, r)
        return x * log_rate + rising - (x + r) * softplus(log_rate - log_r)

    def kernel_constants(self, x: Tensor, shared: Params) -> Params:
        if "log_r" not in shared:
            return {}
        rising, by_log_r = differentiate_log_rising_ratio(x, shared["log_r"].exp())
        return {"rising": rising, "rising_by_log_r": by_log_r}

    def differentiate_zero(self, params: Params) -> tuple[Tensor, Params]:
        log_r = params["log_r"]
        minus_r, m = -log_r.exp(), params["log_rate"] - log_r
        log_zero = softplus(m).mul_(minus_r)
        by_rate = torch.sigmoid_(m).mul_(minus_r)
        return log_zero, {"log_rate": by_rate, "log_r": log_zero - by_rate}

    def differentiate_kernel(self, x: Tensor, params: Params) -> tuple[Tensor, Params]:
        log_rate, log_r = params["log_rate"], params["log_r"]
        r, m = log_r.exp(), log_rate - log_r
        constants = params if "rising" in params else self.kernel_constants(x, params)
        rising, by_log_r = constants["rising"], constants["rising_by_log_r"]
        total, log_sum = x + r, softplus(m)
        expected = total * torch.sigmoid_(m)
        log_kernel = x * log_rate + rising - total * log_sum
        return log_kernel, {"log_rate": x - expected, "log_r": by_log_r - r * log_sum + expected}

    def mean(self, params: Params) -> Tensor:
        return torch.broadcast_tensors(params["log_rate"].exp(), params["log_r"])[0]

    def variance(self, params: Params) -> Tensor:
        log_rate = params["log_rate"]
        return log_rate.exp() + (2 * log_rate - params["log_r"]).exp()

    def sample(self, params: Params, generator: torch.Generator | None = None) -> Tensor:
        log_rate, log_r = torch.broadcast_tensors(params["log_rate"], params["log_r"])
        gamma = torch._standard_gamma(log_r.exp(), generator=generator)  # the only gamma sampler with a generator
        return torch.poisson(gamma * (log_rate - log_r).exp(), generator=generator)


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
