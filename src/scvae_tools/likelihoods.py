"""Every p(x | z): one declaration per likelihood, and the table that names them.

A likelihood declares the heads that the decoder must emit and, in terms of them, log p(0), log p(x) for x > 0, mean,
variance and a sampler. Everything else (decoder, bound, model, plots, tests, documentation) reads the declaration, so
a new likelihood is a class here, a row in `LIKELIHOODS`, a row in its test's table and a line in
``docs/likelihoods.md``. Derivatives come from autograd; a likelihood may declare them beside its formula, which saves
a third of the time that the sum over genes takes, and is then tested against autograd.

All parameters live in log space: ``log_rate`` is log λ with the size factor included, ``log_r`` the log of the inverse
dispersion r, ``gate`` the logit of the probability of an excess zero. No formula contains an ``eps``.

Most are probabilities of counts. What else a likelihood is of, it declares as ``measures``: whether a count is above 0,
or, as a density, a number on the real line. Bounds of different kinds cannot be compared.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import reduce
from numbers import Integral
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor
from torch.distributions import Distribution, constraints
from torch.nn.functional import softplus

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = [
    "LIKELIHOODS",
    "RATE",
    "Bernoulli",
    "ConstrainedPoisson",
    "CountDistribution",
    "Gaussian",
    "Head",
    "Likelihood",
    "LogNormal",
    "Lomax",
    "NegativeBinomial",
    "PiecewiseCategorical",
    "Poisson",
    "ZeroInflated",
    "get_likelihood",
    "log_rising_ratio",
]

Params = dict[str, Tensor]

HALF_LOG_2PI = 0.5 * math.log(2 * math.pi)


@dataclass(frozen=True)
class Head:
    """One number that a likelihood needs for every cell and gene.

    Parameters
    ----------
    name
        Key under which the formulas find it.
    meaning
        What it is, for documentation and error messages.
    is_dispersion
        Whether it may be shared by all cells (``dispersion="gene"`` or ``"gene-batch"``) instead of decoded.
    initial
        Value at which its bias starts. The rate's bias starts at the log mean of each gene instead.
    """

    name: str
    meaning: str
    is_dispersion: bool = False
    initial: float = 0.0


#: The head that every count likelihood has.
RATE = Head("log_rate", "log of the mean count λ before zero inflation")


class Likelihood(ABC):
    """A count distribution, evaluated on tensors of any broadcastable shape.

    Subclasses declare ``heads`` and the formulas below; ``params`` maps head names to tensors.
    """

    heads: ClassVar[tuple[Head, ...]] | tuple[Head, ...]
    formula: str  #: log p(x) in the symbols of the documentation
    #: What p(x) is of: ``"counts"``, or ``"detection"`` (whether x > 0), each a probability, or a ``"density"`` of x.
    measures: str = "counts"
    #: Whether the rates of a cell add up to its size factor: λ = size · softmax(f) over all genes, not size · exp(f).
    normalizes_rates: bool = False
    support = constraints.nonnegative_integer  #: values of x that may be drawn

    @property
    def is_density(self) -> bool:
        """Whether p(x) is a density, which has no upper bound."""
        return self.measures == "density"

    def start(self, mean: Tensor) -> Params:
        """Values at which heads start, (g,) each, where the mean count of each gene is ``mean``, (g,) and positive.

        The rate starts at that mean, and a head that is left out at its ``initial``.
        """
        return {}

    @abstractmethod
    def log_prob_zero(self, params: Params) -> Tensor:
        """Log p(0), in nats."""

    @abstractmethod
    def log_kernel(self, x: Tensor, params: Params) -> Tensor:
        """Log p(x) − log b(x) in nats where x > 0, with b the base measure; finite, but not meaningful, at x = 0."""

    def log_base_measure(self, x: Tensor) -> Tensor:
        """Log b(x), in nats: the factor of p(x) that no parameter enters, 1/x! unless declared otherwise."""
        return -torch.lgamma(x + 1)

    @abstractmethod
    def mean(self, params: Params) -> Tensor:
        """E[x], in counts, zero inflation included."""

    @abstractmethod
    def variance(self, params: Params) -> Tensor:
        """Var[x], in counts squared."""

    @abstractmethod
    def sample(self, params: Params, generator: torch.Generator | None = None) -> Tensor:
        """Draw counts, of the broadcast shape of the parameters."""

    def log_prob_positive(self, x: Tensor, params: Params) -> Tensor:
        """Log p(x) in nats where x > 0; finite, but not meaningful, at x = 0."""
        return self.log_kernel(x, params) + self.log_base_measure(x)

    def log_prob(self, x: Tensor, params: Params) -> Tensor:
        """Log p(x) in nats for any count x."""
        return torch.where(x > 0, self.log_prob_positive(x, params), self.log_prob_zero(params))

    def differentiate_zero(self, params: Params) -> tuple[Tensor, Params]:
        """Log p(0), and its derivative by each head, element by element; all of the broadcast shape."""
        return differentiate(self.log_prob_zero, params)

    def differentiate_kernel(self, x: Tensor, params: Params) -> tuple[Tensor, Params]:
        """Log p(x) − log b(x) where x > 0, and its derivative by each head; all of the broadcast shape."""
        return differentiate(lambda heads: self.log_kernel(x, heads), params)

    def kernel_constants(self, x: Tensor, shared: Params) -> Params:
        """What the kernel needs of x and the heads that all rows share, under names of its own.

        A batch holds each x once, but the components of a mixture and the samples of a cell repeat it: this part is
        computed once, and passed with the parameters to the two methods above. To be declared together with
        `differentiate_kernel`, which then has to know the derivatives of this part.
        """
        return {}

    @property
    def head_names(self) -> tuple[str, ...]:
        """Names of the declared heads."""
        return tuple(head.name for head in self.heads)


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


class PiecewiseCategorical(Likelihood):
    """Counts below ``k_max`` each with a probability of its own, and from there on ``k_max`` plus a count of a base.

    With c = min(x, k_max): log p(x) = log π_c + [x ≥ k_max] log f(x − k_max), as in the original scVAE. λ is that of
    the base: of x − k_max where x ≥ k_max. Estimated counts below ``k_max`` are rounded down.

    Parameters
    ----------
    base
        f, a likelihood of counts.
    k_max
        Number of counts, from 0 on, that have a probability of their own, and a head each; at least 1.
    """

    def __init__(self, base: Likelihood, k_max: int) -> None:
        self.base, self.k_max = base, k_max
        self.normalizes_rates = base.normalizes_rates
        meaning = f"log of the probability of a count of {{}} over that of {k_max} or more"
        self.categories = tuple(Head(f"category_{c}", meaning.format(c)) for c in range(k_max))
        self.heads = (*base.heads, *self.categories)
        self.formula = f"log π_min(x, {k_max}) + [x ≥ {k_max}] · [{base.formula}] at x − {k_max}"

    def start(self, mean: Tensor) -> Params:
        """At the geometric distribution of this mean: what it has above ``k_max`` is again one of this mean."""
        log_more = -torch.log1p(1 / mean)  # of another one above each, (g,)
        log_end = -torch.log1p(mean)
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
        """Log of the sum over the categories of e^logit; that of the last one is 1."""
        logits = [params[head.name] for head in self.categories]
        return reduce(torch.logaddexp, logits, torch.zeros_like(logits[0]))

    def _log_weight(self, x: Tensor, base: Tensor, params: Params) -> Tensor:
        """Logit of the category of x or, of the last one, what the base has."""
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


class Gaussian(Likelihood):
    """Density of the normal distribution with mean λ and standard deviation σ, in counts."""

    heads = (RATE, Head("log_sigma", "log of the standard deviation σ", is_dispersion=True))
    formula = "−½ ((x − λ)/σ)² − log σ − ½ log 2π"
    measures = "density"
    support = constraints.real

    def start(self, mean: Tensor) -> Params:
        """At the standard deviation of a geometric distribution of this mean."""
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
        """What is normally distributed."""
        return x

    def _center(self, log_rate: Tensor) -> Tensor:
        """Its mean."""
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

    The median of x is λ. Unlike that of the original scVAE, which is of log x, it is finite at x = 0.
    """

    heads = (RATE, Head("log_sigma", "log of the standard deviation σ of log(x + 1)", is_dispersion=True))
    formula = "−½ ((log(x + 1) − log(λ + 1))/σ)² − log σ − ½ log 2π − log(x + 1)"
    support = constraints.greater_than(-1)

    def start(self, mean: Tensor) -> Params:
        """At about the standard deviation of log(x + 1) of a geometric distribution of this mean."""
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


#: Every likelihood by the name that ``likelihood=`` takes.
LIKELIHOODS: dict[str, Likelihood] = {
    "poisson": Poisson(),
    "nb": NegativeBinomial(),
    "zip": ZeroInflated(Poisson()),
    "zinb": ZeroInflated(NegativeBinomial()),
    "constrained_poisson": ConstrainedPoisson(),
    "bernoulli": Bernoulli(),
    "gaussian": Gaussian(),
    "log_normal": LogNormal(),
    "lomax": Lomax(),
}


def get_likelihood(name: str, k_max: int = 0) -> Likelihood:
    """Look a likelihood up by its name: the only place where the string is read.

    Parameters
    ----------
    name
        Key of `LIKELIHOODS`.
    k_max
        Number of counts, from 0 on, that get a probability of their own (`PiecewiseCategorical`); 0 for none.

    Raises
    ------
    ValueError
        If there is none of that name, ``k_max`` is not a whole number of at least 0, or the likelihood is not one of
        counts.
    """
    if name not in LIKELIHOODS:
        known = ", ".join(map(repr, LIKELIHOODS))
        raise ValueError(f"`likelihood` must be one of {known}; found {name!r}. See docs/likelihoods.md for a choice.")
    if not isinstance(k_max, Integral) or isinstance(k_max, bool) or k_max < 0:
        raise ValueError(f"`k_max` must be a whole number of at least 0; found {k_max!r}. Pass 0 for no categories.")
    likelihood = LIKELIHOODS[name]
    if k_max == 0:
        return likelihood
    if likelihood.measures != "counts":
        reason = "a density on the real line" if likelihood.is_density else "of x > 0 alone, whatever the count"
        known = ", ".join(repr(each) for each, other in LIKELIHOODS.items() if other.measures == "counts")
        raise ValueError(
            f"`k_max` needs a likelihood of counts, to go on above {int(k_max)}; found {name!r}, which is {reason}. "
            f"Pass one of {known}, or k_max=0."
        )
    return PiecewiseCategorical(likelihood, int(k_max))


def differentiate(function: Callable[[Params], Tensor], params: Params) -> tuple[Tensor, Params]:
    """Value of an elementwise function of parameters and its derivative by each, all of the broadcast shape."""
    shape = torch.broadcast_shapes(*(value.shape for value in params.values()))
    with torch.enable_grad():
        leaves = {name: value.detach().expand(shape).requires_grad_() for name, value in params.items()}
        result = function(leaves)
        gradients = torch.autograd.grad(result.sum(), leaves.values(), materialize_grads=True)
    return result.detach(), {name: value.contiguous() for name, value in zip(params, gradients, strict=True)}


def log_rising_ratio(x: Tensor, r: Tensor) -> Tensor:
    """Γ(x + r) / (Γ(r) r^x), in logs, accurate in float32 for every r > 0 and x ≥ 0.

    The difference of two ``lgamma`` cancels for large r: in float32 it is wrong by 0.015 nats at r = e^10 and by 72 at
    e^18. Here both are first shifted up by six, Γ(t) = Γ(t + 6) / (t (t + 1) ⋯ (t + 5)), and the difference of the two
    Stirling series is then taken term by term, so that no large numbers are subtracted:
    with s = r + 6 and c(t) = 1/(12t) − 1/(360t³) + 1/(1260t⁵),

        log Γ(x + s) − log Γ(s) − x log s = (s + x − ½) log1p(x/s) − x + c(s + x) − c(s).

    The first term of the series left out is below 2·10⁻⁹ at s = 6. The gradient comes from the same elementary
    functions, so neither ``lgamma`` nor ``digamma`` is evaluated.
    """
    shifted = r + 6
    series = (shifted + x - 0.5) * torch.log1p(x / shifted) - x
    series = series + _stirling_correction(shifted + x) - _stirling_correction(shifted)
    # The first factor can be as large as x/r, and all six together would overflow float32 for counts above 10^5.
    steps = 1 + x / (r + 1)
    for step in range(2, 6):
        steps = steps * (1 + x / (r + step))
    ratio = series + x * torch.log1p(6 / r) - torch.log1p(x / r) - torch.log(steps)
    return torch.where(x == 1, 0.0, ratio)  # exactly, as more than half of the counts are


def differentiate_log_rising_ratio(x: Tensor, r: Tensor) -> tuple[Tensor, Tensor]:
    """`log_rising_ratio`, and its derivative by log r: r [ψ(x + r) − ψ(r)] − x with ψ the digamma function.

    Both are exactly 0 at x = 1, as more than half of the counts are; there nothing is computed.
    """
    is_one = x == 1
    if x.ndim != 1 or x.device.type != "cpu":  # another device would have to be waited for
        parts = _differentiate_log_rising_ratio(x, r.expand_as(x))
        value, by_log_r = (torch.where(is_one, 0.0, part) for part in parts)
        return value, by_log_r
    others = torch.nonzero(~is_one)[:, 0]
    parts = _differentiate_log_rising_ratio(x.index_select(0, others), r.expand_as(x).index_select(0, others))
    value, by_log_r = (torch.zeros_like(x).index_copy_(0, others, part) for part in parts)
    return value, by_log_r


def _differentiate_log_rising_ratio(x: Tensor, r: Tensor) -> tuple[Tensor, Tensor]:
    """The same for any x.

    ψ is shifted up by six too, ψ(t) = ψ(t + 6) − Σ_j 1/(t + j), and the two series, of ψ(t) = log t − 1/(2t) + c'(t),
    are subtracted term by term:

        ψ(x + r) − ψ(r) = log1p(x/s) + h(s) − h(s + x) + Σ_j x / ((r + j)(x + r + j)),    h(t) = 1/(2t) − c'(t).

    What is needed at both ends, s and s + x, or for every step j, is computed for all of them in one operation.
    """
    ends = torch.stack([r, r + x]).add_(6)  # s and s + x
    inverse = ends.reciprocal()
    square = inverse * inverse
    correction = inverse * (1 / 12 - square * (1 / 360 - square / 1260))
    slope_correction = inverse * (0.5 + inverse * (1 / 12 - square * (1 / 120 - square / 252)))
    log_ratio = torch.log1p(x * inverse[0])
    steps = torch.arange(1, 6, dtype=r.dtype, device=r.device).reshape(5, *[1] * r.ndim) + r
    quotients = x / steps
    value = (ends[1] - 0.5) * log_ratio - x
    value += correction[1] - correction[0]
    value += x * torch.log1p(6 / r)
    value -= torch.log1p(x / r)
    slope = log_ratio + (quotients / steps.add_(x)).sum(0)
    slope += slope_correction[0] - slope_correction[1]
    value -= quotients.add_(1).prod(0).log_()
    return value, slope.mul_(r).add_(x / (r + x)).sub_(x)


def _stirling_correction(t: Tensor) -> Tensor:
    inverse = 1 / t
    square = inverse * inverse
    return inverse * (1 / 12 - square * (1 / 360 - square / 1260))


class CountDistribution(Distribution):
    """A likelihood with its parameters, as a ``torch`` distribution with the attributes that scvi-tools reads.

    Parameters
    ----------
    likelihood
        The declaration.
    params
        Head name to tensor; broadcastable, (..., n_cells, n_genes).
    scale
        λ divided by the size factor, of the shape of λ.
    """

    arg_constraints: ClassVar[dict] = {}

    def __init__(self, likelihood: Likelihood, params: Params, scale: Tensor | None = None) -> None:
        self.likelihood, self.params = likelihood, params
        self.mu = params["log_rate"].exp()
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
