"""The negative binomial distribution."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import softplus

from scvae_tools.likelihoods._base import RATE, Head, Likelihood, Params
from scvae_tools.likelihoods._rising import differentiate_log_rising_ratio, log_rising_ratio


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
