"""The likelihoods by SciPy and mpmath: a row each in `CASES`, which every test of likelihoods runs on."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING

import mpmath
import numpy as np
from scipy import special, stats

if TYPE_CHECKING:
    from collections.abc import Callable


mpmath.mp.dps = 50
STIRLING = 1 / (1680 * 6**7) * 1.05  #: 2.2e-9; the first term left out, and a little for those after it


LINEAR = np.exp(-20)  #: 2.1e-9


Arrays = dict[str, np.ndarray]


def _log_one_over_factorial(x: np.ndarray) -> np.ndarray:
    return -special.gammaln(x + 1)


def _all_counts(params: Arrays) -> tuple[np.ndarray, np.ndarray]:
    return np.arange(20_000.0)[:, None], np.ones((20_000, 1))  # p(20,000) is below e^-100


def _size_of_slopes(x: np.ndarray, params: Arrays) -> np.ndarray:
    log_rate = params["log_rate"]
    log_r = params.get("log_r", log_rate)  # without r, λ itself
    return 1 + x + np.exp(np.minimum(log_rate, log_r)) * (1 + np.abs(log_rate - log_r))


@dataclass(frozen=True)
class Case:
    """An independent account of one likelihood; ``params`` maps head names to arrays."""

    heads: tuple[str, ...]
    log_pmf: Callable[[np.ndarray, Arrays], np.ndarray]  #: by scipy.stats
    moments: Callable[[Arrays], tuple[np.ndarray, np.ndarray]]  #: mean and variance by scipy.stats
    exact: Callable[..., mpmath.mpf]  #: log p(x) of numbers, in mpmath
    size: Callable[[np.ndarray, Arrays], np.ndarray]  #: of the terms of log p(x), in nats
    approximation: Callable[[np.ndarray, Arrays], np.ndarray]  #: error that remains in any precision, in nats
    without: dict[str, str]  #: head at its limit -> the likelihood that is left
    log_base_measure: Callable[[np.ndarray], np.ndarray] = _log_one_over_factorial
    size_of_slopes: Callable[[np.ndarray, Arrays], np.ndarray] = _size_of_slopes  #: of the terms of the derivatives
    #: Points (n, p or 1) and weights of these by which sums or integrals over all x are taken.
    nodes: Callable[[Arrays], tuple[np.ndarray, np.ndarray]] = _all_counts
    largest: Callable[[Arrays], np.ndarray | float] = lambda params: 0.0  #: log p(x) where it is largest


def _poisson(params: Arrays) -> object:
    return stats.poisson(np.exp(params["log_rate"]))


def _nb(params: Arrays) -> object:
    r = np.exp(params["log_r"])
    return stats.nbinom(r, r / (r + np.exp(params["log_rate"])))


@cache
def _exact_poisson(x: float, log_rate: float) -> mpmath.mpf:
    return x * mpmath.mpf(log_rate) - mpmath.exp(log_rate) - mpmath.loggamma(x + 1)


@cache
def exact_rising(x: float, r: mpmath.mpf) -> mpmath.mpf:
    return mpmath.loggamma(x + r) - mpmath.loggamma(r) - x * mpmath.log(r)


@cache
def _exact_nb(x: float, log_rate: float, log_r: float) -> mpmath.mpf:
    rate, r = mpmath.exp(log_rate), mpmath.exp(log_r)
    powers = x * mpmath.log(rate) - (x + r) * mpmath.log1p(rate / r)
    return exact_rising(x, r) + powers - mpmath.loggamma(x + 1)


def _size_of_poisson(x: np.ndarray, params: Arrays) -> np.ndarray:
    log_rate = params["log_rate"]
    return 1 + np.exp(log_rate) + x * (np.abs(log_rate) + np.log1p(x))


def _size_of_nb(x: np.ndarray, params: Arrays) -> np.ndarray:
    log_rate, log_r = params["log_rate"], params["log_r"]
    slope = np.exp(np.minimum(log_rate, log_r))
    return _size_of_poisson(x, params) + x * np.maximum(-log_r, 0) + slope * np.abs(log_rate - log_r)


def _approximation_of_nb(x: np.ndarray, params: Arrays) -> np.ndarray:
    return STIRLING + LINEAR * x * (params["log_rate"] - params["log_r"] > 20)


def _zero_inflated(base: Case, without: dict[str, str]) -> Case:
    def log_pmf(x: np.ndarray, params: Arrays) -> np.ndarray:
        kept = base.log_pmf(x, params) + special.log_expit(-params["gate"])
        return np.where(x == 0, np.logaddexp(special.log_expit(params["gate"]), kept), kept)

    def moments(params: Arrays) -> tuple[np.ndarray, np.ndarray]:
        mean, variance = base.moments(params)
        kept = special.expit(-params["gate"])
        return kept * mean, kept * (variance + mean**2) - (kept * mean) ** 2  # E[x²] − E[x]²

    def exact(x: float, *numbers: float) -> mpmath.mpf:
        *numbers, gate = numbers
        excess = 1 / (1 + mpmath.exp(-gate))
        return mpmath.log(excess * (x == 0) + (1 - excess) * mpmath.exp(base.exact(x, *numbers)))

    def size(x: np.ndarray, params: Arrays) -> np.ndarray:
        return base.size(x, params) + np.abs(params["gate"])

    def approximation(x: np.ndarray, params: Arrays) -> np.ndarray:
        return base.approximation(x, params) + LINEAR * (params["gate"] > 20)

    heads = (*base.heads, "gate")
    return Case(heads, log_pmf, moments, exact, size, approximation, without, base.log_base_measure)


def from_scipy(build: Callable[[Arrays], object], heads: tuple[str, ...], **rest: object) -> Case:
    def log_pmf(x: np.ndarray, params: Arrays) -> np.ndarray:
        distribution = build(params)
        return distribution.logpmf(x) if hasattr(distribution, "logpmf") else distribution.logpdf(x)

    return Case(
        heads,
        log_pmf=log_pmf,
        moments=lambda params: build(params).stats("mv"),
        **rest,
    )


POISSON = from_scipy(
    _poisson,
    ("log_rate",),
    exact=_exact_poisson,
    size=_size_of_poisson,
    approximation=lambda x, params: np.zeros_like(x),
    without={},
)


NB = from_scipy(
    _nb,
    ("log_rate", "log_r"),
    exact=_exact_nb,
    size=_size_of_nb,
    approximation=_approximation_of_nb,
    without={"log_r": "poisson"},
)


def exact_bernoulli(x: float, log_rate: float) -> mpmath.mpf:
    rate = mpmath.exp(log_rate)
    return -rate if x == 0 else mpmath.log(-mpmath.expm1(-rate))


BERNOULLI = Case(
    ("log_rate",),
    log_pmf=lambda x, params: np.where(x > 0, _poisson(params).logsf(0), _poisson(params).logpmf(0)),
    moments=lambda params: (_poisson(params).sf(0), _poisson(params).sf(0) * _poisson(params).pmf(0)),
    exact=exact_bernoulli,
    size=lambda x, params: 1 + np.abs(params["log_rate"]) + np.exp(params["log_rate"]),
    approximation=lambda x, params: np.zeros_like(x),
    without={},
    log_base_measure=np.zeros_like,
    size_of_slopes=lambda x, params: 1 + np.exp(params["log_rate"]),
    nodes=lambda params: (np.array([[0.0], [1.0]]), np.ones((2, 1))),
)


def _simpson(low: float, high: float, n: int) -> tuple[np.ndarray, np.ndarray]:
    """Points and weights (n, 1) of Simpson's rule; n is odd."""
    weight = np.where(np.arange(n) % 2, 4.0, 2.0)
    weight[[0, -1]] = 1
    return np.linspace(low, high, n)[:, None], weight[:, None] * (high - low) / (n - 1) / 3


def _gaussian(params: Arrays) -> object:
    return stats.norm(np.exp(params["log_rate"]), np.exp(params["log_sigma"]))


def _nodes_of_gaussian(params: Arrays) -> tuple[np.ndarray, np.ndarray]:
    t, weight = _simpson(-14, 14, 1_001)
    sigma = np.exp(params["log_sigma"])
    return np.exp(params["log_rate"]) + sigma * t, sigma * weight


def _exact_gaussian(x: float, log_rate: float, log_sigma: float) -> mpmath.mpf:
    deviation = (x - mpmath.exp(log_rate)) / mpmath.exp(log_sigma)
    return -(deviation**2) / 2 - mpmath.mpf(log_sigma) - mpmath.log(2 * mpmath.pi) / 2


def _size_of_gaussian(y: np.ndarray, center: np.ndarray, log_sigma: np.ndarray) -> np.ndarray:
    """Of the terms; y − center is rounded to what the larger of them is."""
    sigma = np.exp(log_sigma)
    deviation = np.abs(y - center) / sigma
    return 1 + np.abs(log_sigma) + deviation**2 + deviation * (np.abs(y) + center) / sigma


def _size_of_slopes_of_gaussian(
    y: np.ndarray, center: np.ndarray, slope: np.ndarray, log_sigma: np.ndarray
) -> np.ndarray:
    return _size_of_gaussian(y, center, log_sigma) + slope * (np.abs(y) + center) / np.exp(2 * log_sigma)


def _rate_and_sigma(params: Arrays) -> tuple[np.ndarray, np.ndarray]:
    return np.exp(params["log_rate"]), params["log_sigma"]


def _of_logarithms(params: Arrays) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """log(λ + 1), its derivative by log λ, and log σ."""
    return np.logaddexp(0, params["log_rate"]), special.expit(params["log_rate"]), params["log_sigma"]


def _lognormal(params: Arrays) -> object:
    return stats.lognorm(np.exp(params["log_sigma"]), loc=-1, scale=1 + np.exp(params["log_rate"]))


def _nodes_of_lognormal(params: Arrays) -> tuple[np.ndarray, np.ndarray]:
    t, weight = _simpson(-14, 18, 1_001)
    sigma = np.exp(params["log_sigma"])
    log_x1 = np.log1p(np.exp(params["log_rate"])) + sigma * t
    return np.expm1(log_x1), sigma * weight * np.exp(log_x1)


def _exact_lognormal(x: float, log_rate: float, log_sigma: float) -> mpmath.mpf:
    deviation = (mpmath.log1p(x) - mpmath.log1p(mpmath.exp(log_rate))) / mpmath.exp(log_sigma)
    return -(deviation**2) / 2 - mpmath.mpf(log_sigma) - mpmath.log(2 * mpmath.pi) / 2 - mpmath.log1p(x)


def _lomax(params: Arrays) -> object:
    tail = np.exp(params["log_tail"])
    return stats.lomax(1 + tail, scale=tail * np.exp(params["log_rate"]))


def _nodes_of_lomax(params: Arrays) -> tuple[np.ndarray, np.ndarray]:
    """log(1 + x/s) is exponentially distributed with the rate α; the fourth moment needs α > 4."""
    t, weight = _simpson(0, 120, 20_001)
    tail = np.exp(params["log_tail"])
    scale = tail * np.exp(params["log_rate"])
    return scale * np.expm1(t / tail), scale * np.exp(t / tail) * weight / tail


def _exact_lomax(x: float, log_rate: float, log_tail: float) -> mpmath.mpf:
    alpha, scale = 1 + mpmath.exp(log_tail), mpmath.exp(mpmath.mpf(log_rate) + mpmath.mpf(log_tail))
    return mpmath.log(alpha) - mpmath.log(scale) - (alpha + 1) * mpmath.log1p(x / scale)


def _size_of_lomax(x: np.ndarray, params: Arrays) -> np.ndarray:
    log_rate, log_tail, log_x = params["log_rate"], params["log_tail"], np.log(np.maximum(x, 1))
    u, steepness = log_x - log_rate - log_tail, 2 + np.exp(log_tail)
    terms = 1 + log_x + np.abs(log_rate) + np.abs(log_tail)
    return terms + (x > 0) * steepness * (np.logaddexp(0, u) + special.expit(u) * terms)


def _approximation_of_lomax(x: np.ndarray, params: Arrays) -> np.ndarray:
    u = np.log(np.maximum(x, 1)) - params["log_rate"] - params["log_tail"]
    return LINEAR * (2 + np.exp(params["log_tail"])) * (u > 20)


DENSITY = {"without": {}, "approximation": lambda x, params: np.zeros_like(x), "log_base_measure": np.zeros_like}


GAUSSIAN = from_scipy(
    _gaussian,
    ("log_rate", "log_sigma"),
    exact=_exact_gaussian,
    size=lambda x, params: _size_of_gaussian(x, *_rate_and_sigma(params)),
    size_of_slopes=lambda x, params: _size_of_slopes_of_gaussian(
        x, np.exp(params["log_rate"]), np.exp(params["log_rate"]), params["log_sigma"]
    ),
    nodes=_nodes_of_gaussian,
    largest=lambda params: -params["log_sigma"] - 0.5 * np.log(2 * np.pi),
    **DENSITY,
)


LOG_NORMAL = from_scipy(
    _lognormal,
    ("log_rate", "log_sigma"),
    exact=_exact_lognormal,
    size=lambda x, params: np.log1p(x) + _size_of_gaussian(np.log1p(x), *_of_logarithms(params)[::2]),
    size_of_slopes=lambda x, params: _size_of_slopes_of_gaussian(np.log1p(x), *_of_logarithms(params)),
    nodes=_nodes_of_lognormal,
    largest=lambda params: -params["log_sigma"] - 0.5 * np.log(2 * np.pi),  # where x ≥ 0
    **DENSITY | {"log_base_measure": lambda x: -np.log1p(x)},
)


LOMAX = from_scipy(
    _lomax,
    ("log_rate", "log_tail"),
    exact=_exact_lomax,
    size=_size_of_lomax,
    size_of_slopes=_size_of_lomax,
    nodes=_nodes_of_lomax,
    largest=lambda params: np.logaddexp(0, -params["log_tail"]) - params["log_rate"],  # at 0
    **DENSITY | {"approximation": _approximation_of_lomax},
)


def _piecewise(base: Case, k_max: int) -> Case:
    categories = tuple(f"category_{c}" for c in range(k_max))

    def log_weights(params: Arrays) -> np.ndarray:
        logits = np.array([params[head] for head in categories])
        return special.log_softmax(np.concatenate([logits, np.zeros_like(logits[:1])]), axis=0)  # (k_max + 1, p)

    def excess(x: np.ndarray) -> np.ndarray:
        return np.maximum(x - k_max, 0)

    def log_pmf(x: np.ndarray, params: Arrays) -> np.ndarray:
        category = np.minimum(x, k_max).astype(int)
        weights = log_weights(params)
        weight = sum(np.where(category == c, each, 0) for c, each in enumerate(weights))
        return weight + np.where(x >= k_max, base.log_pmf(excess(x), params), 0)

    def moments(params: Arrays) -> tuple[np.ndarray, np.ndarray]:
        *below, last = np.exp(log_weights(params))
        base_mean, base_variance = base.moments(params)
        mean = sum(c * p for c, p in enumerate(below)) + last * (k_max + base_mean)
        square = sum(c**2 * p for c, p in enumerate(below))
        return mean, square + last * (base_variance + (k_max + base_mean) ** 2) - mean**2

    def exact(x: float, *numbers: float) -> mpmath.mpf:
        numbers, logits = numbers[:-k_max], [*numbers[-k_max:], 0.0]
        weight = logits[min(int(x), k_max)] - mpmath.log(sum(map(mpmath.exp, logits)))
        return weight + (base.exact(x - k_max, *numbers) if x >= k_max else 0)

    def size(x: np.ndarray, params: Arrays) -> np.ndarray:
        return base.size(excess(x), params) + 1 + sum(np.abs(params[head]) for head in categories)

    return Case(
        (*base.heads, *categories),
        log_pmf,
        moments,
        exact,
        size,
        approximation=lambda x, params: base.approximation(excess(x), params),
        without={},
        log_base_measure=lambda x: base.log_base_measure(excess(x)),
        size_of_slopes=lambda x, params: 1 + k_max + base.size_of_slopes(excess(x), params),
    )


CASES = {
    "poisson": POISSON,
    "nb": NB,
    "zip": _zero_inflated(POISSON, without={"gate": "poisson"}),
    "zinb": _zero_inflated(NB, without={"gate": "nb", "log_r": "zip"}),
    "constrained_poisson": POISSON,  # of given rates; that they add up is the matter of the decoder
    "bernoulli": BERNOULLI,
    "gaussian": GAUSSIAN,
    "log_normal": LOG_NORMAL,
    "lomax": LOMAX,
}


#: Those of further rows: name and k_max.
PIECEWISE = {"poisson above 3": ("poisson", 3), "nb above 1": ("nb", 1), "zip above 1": ("zip", 1)}


CASES |= {name: _piecewise(CASES[base], k_max) for name, (base, k_max) in PIECEWISE.items()}
