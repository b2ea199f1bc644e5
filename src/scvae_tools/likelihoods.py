"""Every p(x | z): one declaration per likelihood, and the table that names them.

A likelihood declares the heads that the decoder must emit and, in terms of them, log p(0), log p(x) for x > 0, mean,
variance and a sampler. Everything else (decoder, bound, model, plots, tests, documentation) reads the declaration, so
a new likelihood is a class here, a row in `LIKELIHOODS`, a row in its test's table and a line in
``docs/likelihoods.md``. Derivatives come from autograd; a likelihood may declare them beside its formula, which saves
a third of the time that the sum over genes takes, and is then tested against autograd.

All parameters live in log space: ``log_rate`` is log λ with the size factor included, ``log_r`` the log of the inverse
dispersion r, ``gate`` the logit of the probability of an excess zero. No formula contains an ``eps``.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
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
    "CountDistribution",
    "Head",
    "Likelihood",
    "NegativeBinomial",
    "Poisson",
    "ZeroInflated",
    "get_likelihood",
    "log_rising_ratio",
]

Params = dict[str, Tensor]


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


#: Every likelihood by the name that ``likelihood=`` takes.
LIKELIHOODS: dict[str, Likelihood] = {
    "poisson": Poisson(),
    "nb": NegativeBinomial(),
    "zip": ZeroInflated(Poisson()),
    "zinb": ZeroInflated(NegativeBinomial()),
}


def get_likelihood(name: str) -> Likelihood:
    """Look a likelihood up by its name: the only place where the string is read.

    Raises
    ------
    ValueError
        If there is none of that name.
    """
    if name not in LIKELIHOODS:
        known = ", ".join(map(repr, LIKELIHOODS))
        raise ValueError(f"`likelihood` must be one of {known}; found {name!r}. See docs/likelihoods.md for a choice.")
    return LIKELIHOODS[name]


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

    support = constraints.nonnegative_integer
    arg_constraints: ClassVar[dict] = {}

    def __init__(self, likelihood: Likelihood, params: Params, scale: Tensor | None = None) -> None:
        self.likelihood, self.params = likelihood, params
        self.mu = params["log_rate"].exp()
        self.scale = self.mu if scale is None else scale
        shape = torch.broadcast_shapes(*(value.shape for value in params.values()))
        super().__init__(batch_shape=shape, validate_args=False)

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
