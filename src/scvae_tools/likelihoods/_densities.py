"""Densities of x as a number on the real line instead of a count: Gaussian, log-normal and Lomax."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch.distributions import constraints
from torch.nn.functional import softplus

from scvae_tools.likelihoods._base import RATE, Head, Likelihood, Params

if TYPE_CHECKING:
    from torch import Tensor

HALF_LOG_2PI = 0.5 * math.log(2 * math.pi)


class Gaussian(Likelihood):
    """Density of the normal distribution with mean λ and standard deviation σ, in counts."""

    heads = (RATE, Head("log_sigma", "log of the standard deviation σ", is_dispersion=True))
    formula = "−½ ((x − λ)/σ)² − log σ − ½ log 2π"
    measures = "density"
    support = constraints.real

    def start(self, mean: Tensor) -> Params:
        """Start at the standard deviation of a geometric distribution of this mean."""
        return {"log_sigma": 0.5 * (mean.log() + torch.log1p(mean))}

    def log_prob_zero(self, params: Params) -> Tensor:
        return self._log_density(0.0, params)

    def log_kernel(self, x: Tensor, params: Params) -> Tensor:
        return self._log_density(self._scaled(x), params)

    def log_base_measure(self, x: Tensor) -> Tensor:
        return torch.zeros_like(x)

    def differentiate_zero(self, params: Params) -> tuple[Tensor, Params]:
        return self._differentiate(0.0, params)

    def differentiate_kernel(self, x: Tensor, params: Params) -> tuple[Tensor, Params]:
        return self._differentiate(self._scaled(x), params)

    def mean(self, params: Params) -> Tensor:
        return torch.broadcast_tensors(params["log_rate"].exp(), params["log_sigma"])[0]

    def variance(self, params: Params) -> Tensor:
        return torch.broadcast_tensors(params["log_rate"], (2 * params["log_sigma"]).exp())[1]

    def sample(self, params: Params, generator: torch.Generator | None = None) -> Tensor:
        center, log_sigma = torch.broadcast_tensors(self._center(params["log_rate"]), params["log_sigma"])
        noise = torch.randn(center.shape, generator=generator, device=center.device, dtype=center.dtype)
        return center + log_sigma.exp() * noise

    def _scaled(self, x: Tensor) -> Tensor:
        """Value that is normally distributed, of x."""
        return x

    def _center(self, log_rate: Tensor) -> Tensor:
        """Mean of the value that is normally distributed."""
        return log_rate.exp()

    def _slope(self, log_rate: Tensor) -> Tensor:
        """Derivative of `_center`."""
        return log_rate.exp()

    def _log_density(self, y: Tensor | float, params: Params) -> Tensor:
        log_sigma = params["log_sigma"]
        deviation = (y - self._center(params["log_rate"])) * (-log_sigma).exp()
        return -0.5 * deviation.square() - log_sigma - HALF_LOG_2PI

    def _differentiate(self, y: Tensor | float, params: Params) -> tuple[Tensor, Params]:
        log_rate, log_sigma = params["log_rate"], params["log_sigma"]
        precision = (-log_sigma).exp()
        deviation = (y - self._center(log_rate)) * precision
        square = deviation.square()
        value = -0.5 * square - log_sigma - HALF_LOG_2PI
        return value, {"log_rate": deviation * precision * self._slope(log_rate), "log_sigma": square - 1}


class LogNormal(Gaussian):
    """Density of x where log(x + 1) is normal with mean log(λ + 1) = softplus(ℓ) and standard deviation σ.

    The median of x is λ. The density is finite at x = 0, unlike the one of log x in the original scVAE.
    """

    heads = (RATE, Head("log_sigma", "log of the standard deviation σ of log(x + 1)", is_dispersion=True))
    formula = "−½ ((log(x + 1) − log(λ + 1))/σ)² − log σ − ½ log 2π − log(x + 1)"
    support = constraints.greater_than(-1)

    def start(self, mean: Tensor) -> Params:
        """Start at about the standard deviation of log(x + 1) of a geometric distribution of this mean."""
        return {"log_sigma": -0.5 * torch.log1p(1 / mean)}

    def log_base_measure(self, x: Tensor) -> Tensor:
        return -torch.log1p(x)

    def mean(self, params: Params) -> Tensor:
        half_variance = 0.5 * (2 * params["log_sigma"]).exp()
        return params["log_rate"].exp() * half_variance.exp() + torch.expm1(half_variance)

    def variance(self, params: Params) -> Tensor:
        variance = (2 * params["log_sigma"]).exp()
        return (2 * softplus(params["log_rate"]) + variance).exp() * torch.expm1(variance)

    def sample(self, params: Params, generator: torch.Generator | None = None) -> Tensor:
        return torch.expm1(super().sample(params, generator))

    def _scaled(self, x: Tensor) -> Tensor:
        return torch.log1p(x)

    def _center(self, log_rate: Tensor) -> Tensor:
        return softplus(log_rate)

    def _slope(self, log_rate: Tensor) -> Tensor:
        return torch.sigmoid(log_rate)


class Lomax(Likelihood):
    """Density α/s (1 + x/s)^−(α + 1) on x ≥ 0 with the tail index α = 1 + e^a > 1 and the scale s = λ e^a.

    The mean is λ, and always finite; the variance is infinite for α ≤ 2, that is a ≤ 0.
    """

    heads = (RATE, Head("log_tail", "log of the tail index less 1, α − 1", is_dispersion=True))
    formula = "softplus(−a) − ℓ − (2 + e^a) softplus(log x − ℓ − a)"
    measures = "density"
    support = constraints.nonnegative

    def log_prob_zero(self, params: Params) -> Tensor:
        return softplus(-params["log_tail"]) - params["log_rate"]

    def log_kernel(self, x: Tensor, params: Params) -> Tensor:
        log_rate, log_tail = params["log_rate"], params["log_tail"]
        return self.log_prob_zero(params) - (2 + log_tail.exp()) * softplus(x.log() - log_rate - log_tail)

    def log_base_measure(self, x: Tensor) -> Tensor:
        return torch.zeros_like(x)

    def differentiate_zero(self, params: Params) -> tuple[Tensor, Params]:
        log_zero = self.log_prob_zero(params)
        by_tail = -torch.sigmoid(-params["log_tail"])
        return log_zero, {
            "log_rate": torch.full_like(log_zero, -1.0),
            "log_tail": by_tail.expand_as(log_zero).contiguous(),
        }

    def differentiate_kernel(self, x: Tensor, params: Params) -> tuple[Tensor, Params]:
        log_zero, by_head = self.differentiate_zero(params)
        log_tail = params["log_tail"]
        tail, u = log_tail.exp(), x.log() - params["log_rate"] - log_tail
        log_sum, pull = softplus(u), (2 + tail) * torch.sigmoid(u)
        value = log_zero - (2 + tail) * log_sum
        return value, {"log_rate": by_head["log_rate"] + pull, "log_tail": by_head["log_tail"] + pull - tail * log_sum}

    def mean(self, params: Params) -> Tensor:
        return torch.broadcast_tensors(params["log_rate"].exp(), params["log_tail"])[0]

    def variance(self, params: Params) -> Tensor:
        log_tail = params["log_tail"]
        finite = (2 * params["log_rate"]).exp() * (1 + log_tail.exp()) / torch.expm1(log_tail)
        return torch.where(log_tail > 0, finite, torch.inf)

    def sample(self, params: Params, generator: torch.Generator | None = None) -> Tensor:
        log_rate, log_tail = torch.broadcast_tensors(params["log_rate"], params["log_tail"])
        waiting = torch.empty_like(log_rate).exponential_(generator=generator)
        return (log_rate + log_tail).exp() * torch.expm1(waiting / (1 + log_tail.exp()))
