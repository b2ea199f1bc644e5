"""Piecewise categorical likelihood: small counts have a probability each, larger ones follow another likelihood."""

from __future__ import annotations

from functools import reduce
from typing import TYPE_CHECKING

import torch

from scvae_tools.likelihoods._base import Head, Likelihood, Params

if TYPE_CHECKING:
    from torch import Tensor


class PiecewiseCategorical(Likelihood):
    """Counts below ``k_max`` each with a probability of its own, and from there on ``k_max`` plus a count of a base.

    With c = min(x, k_max): log p(x) = log π_c + [x ≥ k_max] log f(x − k_max), as in the original scVAE. ``log_rate`` is
    the one of the base, for x − k_max where x ≥ k_max; λ is the mean of x, but for excess zeros of the base. Estimated
    counts below ``k_max`` are rounded down.

    Parameters
    ----------
    base
        f, a likelihood of counts.
    k_max
        Number of counts, from 0 on, that have a probability of their own, and a head each; at least 1.
    """

    rate_is_head = False

    def __init__(self, base: Likelihood, k_max: int) -> None:
        self.base, self.k_max = base, k_max
        self.normalizes_rates = base.normalizes_rates
        meaning = f"log of the probability of a count of {{}} over that of {k_max} or more"
        self.categories = tuple(Head(f"category_{c}", meaning.format(c)) for c in range(k_max))
        self.heads = (*base.heads, *self.categories)
        self.formula = f"log π_min(x, {k_max}) + [x ≥ {k_max}] · [{base.formula}] at x − {k_max}"

    def start(self, mean: Tensor) -> Params:
        """Start at the geometric distribution of this mean.

        Its counts from ``k_max`` on, less ``k_max``, have the same distribution, at which the base starts.
        """
        log_more = -torch.log1p(1 / mean)  # log p(x > c | x ≥ c), the same for every c, (g,)
        log_end = -torch.log1p(mean)  # log p(x = c | x ≥ c)
        logits = {head.name: log_end + (c - self.k_max) * log_more for c, head in enumerate(self.categories)}
        return self.base.start(mean) | logits

    def log_prob_zero(self, params: Params) -> Tensor:
        return params["category_0"] - self._log_sum(params)

    def log_kernel(self, x: Tensor, params: Params) -> Tensor:
        excess = self._excess(x)
        base = torch.where(excess > 0, self.base.log_kernel(excess, params), self.base.log_prob_zero(params))
        return self._log_weight(x, base, params) - self._log_sum(params)

    def log_base_measure(self, x: Tensor) -> Tensor:
        return self.base.log_base_measure(self._excess(x))

    def kernel_constants(self, x: Tensor, shared: Params) -> Params:
        return self.base.kernel_constants(self._excess(x), shared)

    def differentiate_zero(self, params: Params) -> tuple[Tensor, Params]:
        probabilities = self._probabilities(params)
        log_zero = self.log_prob_zero(params)
        shape = torch.broadcast_shapes(*(params[name].shape for name in self.head_names))
        by_head = {name: log_zero.new_zeros(shape) for name in self.base.head_names}
        by_head |= {
            head.name: (float(c == 0) - probabilities[c]).expand(shape).contiguous()
            for c, head in enumerate(self.categories)
        }
        return log_zero.expand(shape).contiguous(), by_head

    def differentiate_kernel(self, x: Tensor, params: Params) -> tuple[Tensor, Params]:
        excess, probabilities = self._excess(x), self._probabilities(params)
        is_above, has_excess = x >= self.k_max, excess > 0
        zero, by_head_of_zero = self.base.differentiate_zero(params)
        kernel, by_head_of_kernel = self.base.differentiate_kernel(excess, params)
        value = self._log_weight(x, torch.where(has_excess, kernel, zero), params) - self._log_sum(params)
        by_head = {
            name: torch.where(has_excess, by_head_of_kernel[name], by_head_of_zero[name]) * is_above
            for name in self.base.head_names
        }
        count = x.floor()
        by_head |= {head.name: (count == c).to(value) - probabilities[c] for c, head in enumerate(self.categories)}
        return value, by_head

    def mean(self, params: Params) -> Tensor:
        return sum(p * value for p, value in zip(self._probabilities(params), self._means(params), strict=True))

    def rate(self, params: Params) -> Tensor:
        """Σ_c c π_c + π_K (K + λ of the base), in counts."""
        *below, rest = self._probabilities(params)
        return sum(c * p for c, p in enumerate(below)) + rest * (self.k_max + self.base.rate(params))

    def variance(self, params: Params) -> Tensor:
        probabilities, mean = self._probabilities(params), self.mean(params)
        apart = [(value - mean).square() for value in self._means(params)]
        between = sum(p * square for p, square in zip(probabilities, apart, strict=True))
        return between + probabilities[-1] * self.base.variance(params)

    def sample(self, params: Params, generator: torch.Generator | None = None) -> Tensor:
        *below, _ = self._probabilities(params)
        base, *below = torch.broadcast_tensors(self.base.sample(params, generator), *below)
        uniform = torch.rand(base.shape, generator=generator, device=base.device, dtype=base.dtype)
        count, reached = torch.zeros_like(base), torch.zeros_like(base)
        for probability in below:
            reached = reached + probability
            count = count + (uniform >= reached)
        return torch.where(count < self.k_max, count, count + base)

    def _excess(self, x: Tensor) -> Tensor:
        return (x - self.k_max).clamp(min=0)

    def _log_sum(self, params: Params) -> Tensor:
        """Log of the sum of e^logit over the categories; the last one has e^logit = 1."""
        logits = [params[head.name] for head in self.categories]
        return reduce(torch.logaddexp, logits, torch.zeros_like(logits[0]))

    def _log_weight(self, x: Tensor, base: Tensor, params: Params) -> Tensor:
        """Logit of the category of x; for the last category, the value of the base."""
        count, result = x.floor(), base
        for c, head in enumerate(self.categories):
            result = torch.where(count == c, params[head.name], result)
        return result

    def _probabilities(self, params: Params) -> list[Tensor]:
        """π of each count below ``k_max``, and of all others together."""
        log_sum = self._log_sum(params)
        return [*((params[head.name] - log_sum).exp() for head in self.categories), (-log_sum).exp()]

    def _means(self, params: Params) -> list[Tensor | int]:
        """Mean count of each category."""
        return [*range(self.k_max), self.k_max + self.base.mean(params)]
