"""Every likelihood against SciPy and mpmath, in the precision in which it runs.

A new likelihood is one row in `CASES`: all tests are generic over that table.

Tolerance. ``Case.size`` adds up the terms of log p(x) and, times the error of its argument, whatever amplifies one
(m = ℓ − log r is rounded to ε |m|, and r softplus(m) has the slope min(λ, r)). Every operation rounds once, so the
error is a few ε times that size: at most 2.2 ε over six million random points in float32. `ROUNDINGS` = 4 leaves a
factor of two. ``Case.approximation`` adds what no precision removes, seen in float64 only: the Stirling series leaves
out `STIRLING` nats, and torch's softplus is linear above 20, where it is off by up to `LINEAR`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING

import mpmath
import numpy as np
import pytest
import torch
from scipy import special, stats

from scvae_tools.likelihoods import (
    LIKELIHOODS,
    CountDistribution,
    Likelihood,
    NegativeBinomial,
    ZeroInflated,
    differentiate,
    differentiate_log_rising_ratio,
    get_likelihood,
    log_rising_ratio,
)

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

mpmath.mp.dps = 50
ROUNDINGS = 4
STIRLING = 1 / (1680 * 6**7) * 1.05  #: 2.2e-9; the first term left out, and a little for those after it
LINEAR = np.exp(-20)  #: 2.1e-9
Arrays = dict[str, np.ndarray]

EXTREMES = {
    "log_rate": np.log([1e-8, 1e-4, 1e-2, 0.3, 1.0, 7.0, 1e3, 1e6]),
    "log_r": np.array([-10.0, -5.0, -1.0, 0.0, 2.0, 5.0, 10.0, 14.0, 18.0]),
    "gate": np.array([-30.0, -2.0, 0.0, 3.0, 30.0]),
}
COUNTS = np.array([0.0, 1, 2, 3, 10, 100, 1234, 1e5])
MODERATE = {
    "log_rate": np.log([1e-3, 0.5, 5.0, 50.0]),
    "log_r": np.log([0.3, 2.0, 50.0]),
    "gate": np.array([-3.0, 0.0, 2.0]),
}


# -- the table ---------------------------------------------------------------------------------------------------------


def _log_one_over_factorial(x: np.ndarray) -> np.ndarray:
    return -special.gammaln(x + 1)


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


def _poisson(params: Arrays) -> object:
    return stats.poisson(np.exp(params["log_rate"]))


def _nb(params: Arrays) -> object:
    r = np.exp(params["log_r"])
    return stats.nbinom(r, r / (r + np.exp(params["log_rate"])))


@cache
def _exact_poisson(x: float, log_rate: float) -> mpmath.mpf:
    return x * mpmath.mpf(log_rate) - mpmath.exp(log_rate) - mpmath.loggamma(x + 1)


@cache
def _exact_rising(x: float, r: mpmath.mpf) -> mpmath.mpf:
    return mpmath.loggamma(x + r) - mpmath.loggamma(r) - x * mpmath.log(r)


@cache
def _exact_nb(x: float, log_rate: float, log_r: float) -> mpmath.mpf:
    rate, r = mpmath.exp(log_rate), mpmath.exp(log_r)
    powers = x * mpmath.log(rate) - (x + r) * mpmath.log1p(rate / r)
    return _exact_rising(x, r) + powers - mpmath.loggamma(x + 1)


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


def _from_scipy(build: Callable[[Arrays], object], heads: tuple[str, ...], **rest: object) -> Case:
    return Case(
        heads,
        log_pmf=lambda x, params: build(params).logpmf(x),
        moments=lambda params: build(params).stats("mv"),
        **rest,
    )


POISSON = _from_scipy(
    _poisson,
    ("log_rate",),
    exact=_exact_poisson,
    size=_size_of_poisson,
    approximation=lambda x, params: np.zeros_like(x),
    without={},
)
NB = _from_scipy(
    _nb,
    ("log_rate", "log_r"),
    exact=_exact_nb,
    size=_size_of_nb,
    approximation=_approximation_of_nb,
    without={"log_r": "poisson"},
)
CASES = {
    "poisson": POISSON,
    "nb": NB,
    "zip": _zero_inflated(POISSON, without={"gate": "poisson"}),
    "zinb": _zero_inflated(NB, without={"gate": "nb", "log_r": "zip"}),
}

every_likelihood = pytest.mark.parametrize("name", LIKELIHOODS)


def with_limit(head: str) -> pytest.MarkDecorator:
    """Run for the likelihoods with this head."""
    return pytest.mark.parametrize("name", [name for name in LIKELIHOODS if head in LIKELIHOODS[name].head_names])


# -- inputs ------------------------------------------------------------------------------------------------------------


def make_grid(name: str, values: Arrays, counts: np.ndarray | None = None) -> tuple[np.ndarray | None, Arrays]:
    """All combinations of the values of the heads (and counts), each a flat array."""
    heads = CASES[name].heads
    axes = [values[head] for head in heads] + ([] if counts is None else [counts])
    columns = [axis.ravel() for axis in np.meshgrid(*axes, indexing="ij")]
    return (None if counts is None else columns.pop()), dict(zip(heads, columns, strict=True))


def as_tensors(params: Arrays, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    return {head: torch.tensor(value, dtype=dtype) for head, value in params.items()}


def log_prob(name: str, x: np.ndarray, params: Arrays, dtype: torch.dtype = torch.float64) -> np.ndarray:
    result = LIKELIHOODS[name].log_prob(torch.tensor(x, dtype=dtype), as_tensors(params, dtype))
    assert result.dtype == dtype
    return result.double().numpy()


def bound(name: str, x: np.ndarray, params: Arrays, dtype: torch.dtype) -> np.ndarray:
    """Largest error of log p(x) that is accepted, in nats."""
    case = CASES[name]
    return ROUNDINGS * torch.finfo(dtype).eps * case.size(x, params) + case.approximation(x, params)


def assert_within(found: np.ndarray, expected: np.ndarray, tolerance: np.ndarray) -> None:
    excess = np.abs(found - expected) / tolerance
    assert np.all(np.isfinite(found))
    assert np.max(excess) <= 1, f"error {np.max(excess):.3g} times the tolerance at index {np.argmax(excess)}"


# -- completeness ------------------------------------------------------------------------------------------------------


def test_every_likelihood_has_a_row_in_the_table():
    assert set(CASES) == set(LIKELIHOODS)
    for name, case in CASES.items():
        assert case.heads == LIKELIHOODS[name].head_names


def test_every_likelihood_has_a_line_in_the_documentation():
    page = (Path(__file__).parents[1] / "docs" / "likelihoods.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `(\w+)` \|(.*)\|$", page, flags=re.MULTILINE)
    rows = [(name, row.split("|")) for name, row in rows if name != "likelihood"]  # the header
    assert [name for name, _ in rows] == list(LIKELIHOODS)
    for name, cells in rows:
        assert re.findall(r"`(\w+)`", cells[0]) == list(LIKELIHOODS[name].head_names)
        assert len(cells) == 6
        assert all(cell.strip() for cell in cells)


def test_an_unknown_name_is_refused_with_the_known_ones():
    with pytest.raises(ValueError, match=r"must be one of 'poisson', 'nb', .*; found 'gaussian'.*docs/likelihoods\.md"):
        get_likelihood("gaussian")


@every_likelihood
def test_a_known_name_gives_its_declaration(name):
    assert get_likelihood(name) is LIKELIHOODS[name]


# -- log p(x) ----------------------------------------------------------------------------------------------------------


@every_likelihood
def test_log_prob_equals_scipy(name):
    wide = {**EXTREMES, "log_rate": np.log([1e-3, 0.1, 1, 30, 1e4]), "log_r": np.array([-4.0, -1, 0, 2, 5])}
    x, params = make_grid(name, wide, COUNTS)
    expected = CASES[name].log_pmf(x, params)
    assert_within(log_prob(name, x, params), expected, 1e-9 * CASES[name].size(x, params) + STIRLING)


@every_likelihood
def test_log_prob_equals_mpmath_at_the_extremes(name):
    # SciPy is no reference here: nbinom is given p = r / (r + λ), which rounds to 1 for small λ / r.
    x, params = make_grid(name, EXTREMES, COUNTS)
    rows = zip(x.tolist(), *(params[head].tolist() for head in CASES[name].heads), strict=True)
    expected = np.array([float(CASES[name].exact(*row)) for row in rows])
    assert_within(log_prob(name, x, params), expected, bound(name, x, params, torch.float64))


def _random_params(name: str, n: int, dtype: torch.dtype) -> Arrays:
    """Parameters between the extremes that ``dtype`` holds exactly, in float64."""
    rng = np.random.default_rng(1)
    params = {head: rng.uniform(EXTREMES[head].min(), EXTREMES[head].max(), n) for head in CASES[name].heads}
    return {head: torch.tensor(value, dtype=dtype).double().numpy() for head, value in params.items()}


@every_likelihood
def test_float32_is_as_close_to_float64_as_its_rounding_allows(name):
    n = 200_000
    x = np.floor(np.exp(np.random.default_rng(0).uniform(-2, np.log(1e5), n)))
    params = _random_params(name, n, torch.float32)
    found, expected = (log_prob(name, x, params, dtype) for dtype in (torch.float32, torch.float64))
    assert_within(found, expected, bound(name, x, params, torch.float32))


@every_likelihood
def test_log_prob_and_gradients_are_finite_for_every_count_that_is_accepted(name):
    counts = np.array([1e6, 5e6, 2.0**24])  # read_counts refuses larger ones
    x, params = make_grid(name, EXTREMES, counts)
    tensors = {head: value.requires_grad_() for head, value in as_tensors(params, torch.float32).items()}
    value = LIKELIHOODS[name].log_prob(torch.tensor(x, dtype=torch.float32), tensors)
    value.sum().backward()
    assert torch.isfinite(value).all()
    assert all(torch.isfinite(tensor.grad).all() for tensor in tensors.values())


@every_likelihood
def test_log_prob_never_exceeds_zero_by_more_than_rounding(name):
    x, params = make_grid(name, EXTREMES, COUNTS)
    assert np.all(log_prob(name, x, params, torch.float32) <= bound(name, x, params, torch.float32))


@every_likelihood
def test_log_prob_broadcasts_over_leading_axes(name):
    _, params = make_grid(name, MODERATE)
    x = np.array([[0.0], [4.0]])
    found = log_prob(name, x, params)
    assert found.shape == (2, len(params["log_rate"]))
    np.testing.assert_array_equal(found[1], log_prob(name, np.full(found.shape[1], 4.0), params))


def _pmf(name: str) -> tuple[np.ndarray, np.ndarray, Arrays]:
    """Counts (n, 1), p(x) (n, p) and moderate parameters (p,); p(20,000) is below e^-100."""
    _, params = make_grid(name, MODERATE)
    x = np.arange(20_000.0)[:, None]
    return x, np.exp(log_prob(name, x, params)), params


@every_likelihood
def test_probabilities_sum_to_one(name):
    _, pmf, _ = _pmf(name)
    np.testing.assert_allclose(pmf.sum(axis=0), 1, rtol=0, atol=1e-8)  # the series, 2.2e-9, and rounding


@every_likelihood
def test_the_sum_over_genes_is_that_over_zeros_plus_corrections_at_the_nonzeros(name):
    rng = np.random.default_rng(0)
    shape, likelihood = (30, 200), LIKELIHOODS[name]
    ranges = {"log_rate": (-5, 3), "log_r": (-2, 4), "gate": (-4, 4)}
    params = {head: rng.uniform(*ranges[head], shape) for head in CASES[name].heads}
    x = rng.poisson(2.0, shape) * (rng.random(shape) < 0.1)
    cell, gene = np.nonzero(x)
    total = likelihood.log_prob_zero(as_tensors(params)).sum(dim=1).numpy()
    at = as_tensors({head: value[cell, gene] for head, value in params.items()})
    correction = likelihood.log_prob_positive(torch.tensor(x[cell, gene].astype(float)), at)
    total += np.bincount(cell, (correction - likelihood.log_prob_zero(at)).numpy(), minlength=shape[0])
    np.testing.assert_allclose(total, CASES[name].log_pmf(x, params).sum(axis=1), rtol=1e-9)


# -- gradients ---------------------------------------------------------------------------------------------------------


@every_likelihood
def test_gradients_are_finite_in_float32_at_the_extremes(name):
    x, params = make_grid(name, EXTREMES, COUNTS)
    tensors = {head: value.requires_grad_() for head, value in as_tensors(params, torch.float32).items()}
    LIKELIHOODS[name].log_prob(torch.tensor(x, dtype=torch.float32), tensors).sum().backward()
    for head, value in tensors.items():
        assert torch.isfinite(value.grad).all(), head


@every_likelihood
def test_the_positive_branch_is_finite_at_zero_with_its_gradients(name):
    # torch.where evaluates it at x = 0 too, and a NaN there would pass into the gradient.
    _, params = make_grid(name, EXTREMES)
    tensors = {head: value.requires_grad_() for head, value in as_tensors(params, torch.float32).items()}
    value = LIKELIHOODS[name].log_prob_positive(torch.tensor(0.0), tensors)
    value.sum().backward()
    assert torch.isfinite(value).all()
    assert all(torch.isfinite(tensor.grad).all() for tensor in tensors.values())


@every_likelihood
def test_gradients_are_the_slopes_of_log_prob(name):
    x, params = make_grid(name, MODERATE, np.array([0.0, 1.0, 7.0, 60.0]))
    tensors = [value.requires_grad_() for value in as_tensors(params).values()]

    def function(*values: Tensor) -> Tensor:
        return LIKELIHOODS[name].log_prob(torch.tensor(x), dict(zip(CASES[name].heads, values, strict=True)))

    assert torch.autograd.gradcheck(function, tensors, fast_mode=True)


# -- kernel and base measure -------------------------------------------------------------------------------------------


@every_likelihood
def test_the_base_measure_is_the_declared_one(name):
    x = np.r_[COUNTS, 2.0**24, 0.5]  # what is accepted, and an estimated count
    found = LIKELIHOODS[name].log_base_measure(torch.tensor(x))
    np.testing.assert_allclose(found, CASES[name].log_base_measure(x), rtol=1e-12, atol=1e-12)
    assert LIKELIHOODS[name].log_base_measure(torch.tensor(0.0)) == 0  # the zeros are left out of its sum


@every_likelihood
def test_the_kernel_is_what_scipy_has_beside_the_base_measure(name):
    wide = {"log_rate": np.log([1e-3, 0.1, 1, 30, 1e4]), "log_r": np.array([-4.0, -1, 0, 2, 5])}
    x, params = make_grid(name, {**EXTREMES, **wide}, COUNTS[COUNTS > 0])
    found = LIKELIHOODS[name].log_kernel(torch.tensor(x), as_tensors(params)).numpy()
    expected = CASES[name].log_pmf(x, params) - CASES[name].log_base_measure(x)
    assert_within(found, expected, 1e-9 * CASES[name].size(x, params) + STIRLING)


@every_likelihood
def test_log_prob_is_that_of_zero_or_kernel_and_base_measure(name):
    x, params = make_grid(name, MODERATE, COUNTS)
    likelihood, tensors = LIKELIHOODS[name], as_tensors(params)
    zero = likelihood.log_prob_zero(tensors).numpy()
    positive = (likelihood.log_kernel(torch.tensor(x), tensors) + likelihood.log_base_measure(torch.tensor(x))).numpy()
    np.testing.assert_array_equal(log_prob(name, x, params), np.where(x > 0, positive, zero))


class Shifted(NegativeBinomial):
    """A likelihood with a base measure of its own."""

    def log_base_measure(self, x: Tensor) -> Tensor:
        return -x


def test_zero_inflation_keeps_the_base_measure():
    inflated, x = ZeroInflated(Shifted()), torch.tensor([1.0, 5.0])
    params = {head: torch.tensor(0.3) for head in inflated.head_names}
    np.testing.assert_array_equal(inflated.log_base_measure(x), -x)
    difference = inflated.log_prob_positive(x, params) - inflated.log_kernel(x, params)
    np.testing.assert_allclose(difference, -x, rtol=1e-6)  # of numbers of order 1 in float32


# -- derivatives, as the blocked sum takes them ------------------------------------------------------------------------
#
# Tolerance. The terms of the derivatives are x, (x + r) sigmoid(m) and r softplus(m), probabilities in front of these,
# and what amplifies the error of m. Every operation rounds once, as in log p(x).

SLOPE_ROUNDINGS = 3  #: at most 1.1 are measured
SLOPES = {
    "log_rate": np.log([1e-8, 1e-2, 1.0, 7.0, 1e3, 1e6]),
    "log_r": np.array([-10.0, -1.0, 0.0, 2.0, 10.0, 18.0]),
    "gate": np.array([-30.0, -2.0, 3.0, 30.0]),
}
SLOPE_COUNTS = np.array([0.0, 1, 2, 10, 1234, 1e5])
every_precision = pytest.mark.parametrize("dtype", [torch.float32, torch.float64])


def held_by(dtype: torch.dtype, params: Arrays) -> Arrays:
    """The nearest numbers that ``dtype`` holds, in float64."""
    return {head: torch.tensor(value, dtype=dtype).double().numpy() for head, value in params.items()}


def differentiated(
    name: str, x: np.ndarray, params: Arrays, dtype: torch.dtype = torch.float64, by: type | None = None
) -> dict[str, np.ndarray]:
    """Log p(0) or the kernel, and the derivatives by the heads, with the declaration's methods or those of ``by``."""
    likelihood, tensors, counts = LIKELIHOODS[name], as_tensors(params, dtype), torch.tensor(x, dtype=dtype)
    by = by or type(likelihood)
    zero, by_head_of_zero = by.differentiate_zero(likelihood, tensors)
    kernel, by_head_of_kernel = by.differentiate_kernel(likelihood, counts, tensors)
    assert set(by_head_of_zero) == set(by_head_of_kernel) == set(likelihood.head_names)
    pairs = {"value": (zero, kernel)} | {head: (by_head_of_zero[head], by_head_of_kernel[head]) for head in tensors}
    assert all(part.dtype == dtype for pair in pairs.values() for part in pair)
    return {key: torch.where(counts > 0, at, at_zero).double().numpy() for key, (at_zero, at) in pairs.items()}


def slope_bound(name: str, x: np.ndarray, params: Arrays, dtype: torch.dtype) -> np.ndarray:
    """Largest error of a derivative that is accepted, in nats."""
    log_rate = params["log_rate"]
    log_r = params.get("log_r", log_rate)  # without r, λ itself
    size = 1 + x + np.exp(np.minimum(log_rate, log_r)) * (1 + np.abs(log_rate - log_r))
    return SLOPE_ROUNDINGS * torch.finfo(dtype).eps * size + CASES[name].approximation(x, params)


@every_precision
@every_likelihood
def test_derivatives_equal_central_differences_in_mpmath(name, dtype):
    """Of 50 digits and a step of 1e-12: exact to 1e-24 of the third derivative."""
    x, params = make_grid(name, SLOPES, SLOPE_COUNTS)
    params = held_by(dtype, params)
    found = differentiated(name, x, params, dtype)
    tolerance = slope_bound(name, x, params, dtype)
    step = mpmath.mpf(10) ** -12
    for position, head in enumerate(CASES[name].heads):
        expected = []
        for count, *numbers in zip(x.tolist(), *(params[head].tolist() for head in CASES[name].heads), strict=True):
            above, below = (
                [*numbers[:position], numbers[position] + s, *numbers[position + 1 :]] for s in (step, -step)
            )
            expected.append(float((CASES[name].exact(count, *above) - CASES[name].exact(count, *below)) / (2 * step)))
        assert_within(found[head], np.array(expected), tolerance)


@every_likelihood
def test_declared_derivatives_are_those_of_autograd(name):
    """In float64: in float32 autograd is the less exact of the two."""
    x, params = make_grid(name, EXTREMES, COUNTS)
    found, expected = (differentiated(name, x, params, by=by) for by in (None, Likelihood))
    tolerance = 2 * slope_bound(name, x, params, torch.float64)  # both are rounded
    for head in CASES[name].heads:
        assert_within(found[head], expected[head], tolerance)


@every_likelihood
def test_the_value_beside_the_derivatives_is_the_formula(name):
    x, params = make_grid(name, EXTREMES, COUNTS)
    likelihood, tensors = LIKELIHOODS[name], as_tensors(params)
    positive = likelihood.log_kernel(torch.tensor(x), tensors).numpy()
    expected = np.where(x > 0, positive, likelihood.log_prob_zero(tensors).numpy())
    assert_within(differentiated(name, x, params)["value"], expected, bound(name, x, params, torch.float64))


@every_likelihood
def test_derivatives_are_finite_for_every_count_that_is_accepted(name):
    x, params = make_grid(name, EXTREMES, np.r_[COUNTS, 1e6, 2.0**24])
    for value in differentiated(name, x, params, torch.float32).values():
        assert np.isfinite(value).all()


@pytest.mark.parametrize("by", ["declaration", "autograd"])
@pytest.mark.parametrize("shared", [(), ("log_r",), ("gate",), ("log_r", "gate"), ("log_rate",)], ids=" and ".join)
@every_likelihood
def test_derivatives_have_the_broadcast_shape_and_can_be_written_into(name, shared, by):
    """In a block (genes, rows), a head that all rows share has one column; at the non-zeros each has its own entry."""
    likelihood, generator = LIKELIHOODS[name], torch.Generator().manual_seed(0)
    methods = type(likelihood) if by == "declaration" else Likelihood
    shapes = {head: (3, 1) if head in shared else (3, 4) for head in CASES[name].heads}
    params = {head: torch.randn(shape, generator=generator).double() for head, shape in shapes.items()}
    full = dict(zip(params, torch.broadcast_tensors(*params.values()), strict=True))
    at = {head: value.flatten() for head, value in full.items()}
    x = torch.arange(1.0, at["log_rate"].numel() + 1, dtype=torch.float64)
    before = [value.clone() for value in (x, *params.values(), *at.values())]
    pairs = (
        (methods.differentiate_zero(likelihood, params), Likelihood.differentiate_zero(likelihood, full)),
        (methods.differentiate_kernel(likelihood, x, at), Likelihood.differentiate_kernel(likelihood, x, at)),
    )
    for (value, by_head), (expected, expected_by_head) in pairs:
        assert value.shape == expected.shape
        np.testing.assert_allclose(value, expected, rtol=1e-12, atol=STIRLING)
        for head, derivative in expected_by_head.items():
            assert by_head[head].shape == value.shape
            np.testing.assert_allclose(by_head[head], derivative, rtol=1e-12, atol=STIRLING)
        for tensor in (value, *by_head.values()):
            tensor.view(-1).zero_()
    for value, copy in zip((x, *params.values(), *at.values()), before, strict=True):
        assert torch.equal(value, copy)


@pytest.mark.parametrize("shared", [(), ("log_r",), ("gate",), ("log_r", "gate")], ids=" and ".join)
@every_likelihood
def test_what_the_kernel_needs_of_shared_heads_can_be_computed_before(name, shared):
    """Once for each count of a batch, and passed with the parameters of whatever repeats it."""
    x, params = make_grid(name, EXTREMES, COUNTS[COUNTS > 0])
    likelihood, tensors, counts = LIKELIHOODS[name], as_tensors(params), torch.tensor(x)
    constants = likelihood.kernel_constants(counts, {head: tensors[head] for head in tensors if head in shared})
    assert not set(constants) & set(likelihood.head_names)
    assert all(value.shape == counts.shape for value in constants.values())
    tolerance = bound(name, x, params, torch.float64)
    found = likelihood.log_kernel(counts, tensors | constants).numpy()
    assert_within(found, likelihood.log_kernel(counts, tensors).numpy(), tolerance)
    value, by_head = likelihood.differentiate_kernel(counts, tensors | constants)
    expected, expected_by_head = likelihood.differentiate_kernel(counts, tensors)
    assert_within(value.numpy(), expected.numpy(), tolerance)
    for head in CASES[name].heads:
        assert_within(by_head[head].numpy(), expected_by_head[head].numpy(), tolerance)


def test_a_head_that_a_function_ignores_has_the_derivative_zero():
    params = {"a": torch.tensor([[1.0], [2.0]]), "b": torch.tensor([3.0, 4.0, 5.0])}
    with torch.no_grad():
        value, by_head = differentiate(lambda heads: heads["a"] ** 2, params)
    np.testing.assert_array_equal(value, [[1, 1, 1], [4, 4, 4]])
    np.testing.assert_array_equal(by_head["a"], [[2, 2, 2], [4, 4, 4]])
    np.testing.assert_array_equal(by_head["b"], np.zeros((2, 3)))
    assert not any(tensor.requires_grad for tensor in (value, *by_head.values(), *params.values()))


# -- mean, variance, samples -------------------------------------------------------------------------------------------


@every_likelihood
def test_mean_and_variance_equal_scipy(name):
    _, params = make_grid(name, MODERATE)
    mean, variance = CASES[name].moments(params)
    np.testing.assert_allclose(LIKELIHOODS[name].mean(as_tensors(params)), mean, rtol=1e-12)
    np.testing.assert_allclose(LIKELIHOODS[name].variance(as_tensors(params)), variance, rtol=1e-12)


@every_likelihood
def test_mean_and_variance_are_those_of_the_probabilities(name):
    x, pmf, params = _pmf(name)
    mean = (x * pmf).sum(axis=0)
    variance = ((x - mean) ** 2 * pmf).sum(axis=0)
    np.testing.assert_allclose(LIKELIHOODS[name].mean(as_tensors(params)), mean, rtol=1e-8)
    np.testing.assert_allclose(LIKELIHOODS[name].variance(as_tensors(params)), variance, rtol=1e-8)


def _sample(name: str, n: int, generator: torch.Generator | None) -> Tensor:
    _, params = make_grid(name, SAMPLED)
    return CountDistribution(LIKELIHOODS[name], as_tensors(params, torch.float32)).sample((n,), generator)


SAMPLED = {"log_rate": np.log([0.5, 20.0]), "log_r": np.log([0.3, 5.0]), "gate": np.array([-1.0, 1.0])}


@every_likelihood
def test_samples_have_the_mean_and_variance_within_five_standard_errors(name):
    n = 200_000
    draws = _sample(name, n, torch.Generator().manual_seed(0)).double().numpy()
    _, params = make_grid(name, SAMPLED)
    mean, variance = CASES[name].moments(params)
    x = np.arange(5_000.0)[:, None]
    fourth = ((x - mean) ** 4 * np.exp(CASES[name].log_pmf(x, params))).sum(axis=0)  # of the central moments
    assert np.all(draws == np.floor(draws))
    assert np.all(draws >= 0)
    assert np.all(np.abs(draws.mean(axis=0) - mean) < 5 * np.sqrt(variance / n))
    assert np.all(np.abs(draws.var(axis=0) - variance) < 5 * np.sqrt((fourth - variance**2) / n))


@every_likelihood
def test_a_generator_repeats_samples_and_spares_the_global_state(name):
    before = torch.get_rng_state()
    first, again = (_sample(name, 100, torch.Generator().manual_seed(3)) for _ in range(2))
    other = _sample(name, 100, torch.Generator().manual_seed(4))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert torch.equal(torch.get_rng_state(), before)


# -- limits ------------------------------------------------------------------------------------------------------------


def _at_limit(name: str, head: str, value: float) -> tuple[np.ndarray, Arrays, np.ndarray, np.ndarray]:
    """Counts, the other parameters, log p with ``head`` at ``value``, and log p of the likelihood without it."""
    rest = CASES[name].without[head]
    x, params = make_grid(rest, MODERATE, np.array([0.0, 1.0, 5.0, 100.0]))
    found = log_prob(name, x, {**params, head: np.full_like(x, value)})
    return x, params, found, log_prob(rest, x, params)


@with_limit("gate")
@pytest.mark.parametrize("gate", [-200.0, -np.inf])
def test_without_excess_zeros_the_base_is_left(name, gate):
    _, _, found, base = _at_limit(name, "gate", gate)
    np.testing.assert_allclose(found, base, rtol=1e-14)


@with_limit("gate")
def test_with_excess_zeros_alone_all_mass_is_at_zero(name):
    x, _, found, base = _at_limit(name, "gate", 60.0)
    np.testing.assert_allclose(found[x == 0], 0, atol=1e-15)
    np.testing.assert_allclose(found[x > 0], base[x > 0] - 60, rtol=1e-14)


@with_limit("log_r")
def test_a_large_inverse_dispersion_gives_the_poisson(name):
    _, _, found, poisson = _at_limit(name, "log_r", 30.0)
    np.testing.assert_allclose(found, poisson, atol=1e-8)  # (x − λ)² / 2r is below 1e-9


# -- log Γ(x + r) − log Γ(r) − x log r ---------------------------------------------------------------------------------

RISING_ROUNDINGS = 8  #: at most 2.3 are measured of the value, 3.3 of the slope


def _rising_grid(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    x, log_r = (torch.tensor(axis.ravel()) for axis in np.meshgrid(COUNTS, np.linspace(-10, 18, 29), indexing="ij"))
    return x.to(dtype), log_r.to(dtype).exp()


def _exactly(function: Callable[[float, float], mpmath.mpf], x: Tensor, r: Tensor) -> np.ndarray:
    return np.array([float(function(*pair)) for pair in zip(x.tolist(), map(mpmath.mpf, r.tolist()), strict=True)])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_rising_ratio_equals_mpmath(dtype):
    x, r = _rising_grid(dtype)
    size = x * (1 + torch.log1p(x) + torch.log1p(1 / r))  # of its terms, in nats
    tolerance = RISING_ROUNDINGS * torch.finfo(dtype).eps * size.double().numpy() + STIRLING
    assert_within(log_rising_ratio(x, r).double().numpy(), _exactly(_exact_rising, x, r), tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_slope_of_the_rising_ratio_is_a_difference_of_digammas(dtype):
    def slope(x: float, r: mpmath.mpf) -> mpmath.mpf:
        return mpmath.digamma(x + r) - mpmath.digamma(r) - x / r

    x, r = _rising_grid(dtype)
    r.requires_grad_()
    (found,) = torch.autograd.grad(log_rising_ratio(x, r).sum(), r)
    r = r.detach()
    series = 1 / (240 * 6**8)  # the slope of the term left out
    tolerance = RISING_ROUNDINGS * torch.finfo(dtype).eps * (x / r).double().numpy() + series
    assert_within(found.double().numpy(), _exactly(slope, x, r), tolerance)


@pytest.mark.parametrize("shape", [(-1,), (8, -1)], ids=["one axis", "two axes"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_rising_ratio_and_its_slope_by_log_r_equal_mpmath(dtype, shape):
    def slope(x: float, r: mpmath.mpf) -> mpmath.mpf:
        return r * (mpmath.digamma(x + r) - mpmath.digamma(r)) - x

    x, r = _rising_grid(dtype)
    value, by_log_r = differentiate_log_rising_ratio(x.reshape(shape), r.reshape(shape))
    assert value.dtype == by_log_r.dtype == dtype
    assert value.shape == by_log_r.shape == x.reshape(shape).shape
    rounding = RISING_ROUNDINGS * torch.finfo(dtype).eps
    size = (x * (1 + torch.log1p(x) + torch.log1p(1 / r))).double().numpy()
    assert_within(value.flatten().double().numpy(), _exactly(_exact_rising, x, r), rounding * size + STIRLING)
    tolerance = rounding * x.double().numpy() + STIRLING
    assert_within(by_log_r.flatten().double().numpy(), _exactly(slope, x, r), tolerance)


@pytest.mark.parametrize("n_ones", [0, 1, 30, 59, 60])
@pytest.mark.parametrize("n_dispersions", [1, 60])
def test_the_rising_ratio_is_the_same_whatever_counts_it_is_asked_for_with(n_ones, n_dispersions):
    """Both are exactly 0 at a count of 1, which most counts are. Tolerance: the series and its slope, each to 2e-9."""
    rng = np.random.default_rng(0)
    x = torch.tensor(np.r_[np.ones(n_ones), rng.integers(2, 50, 60 - n_ones)])[torch.tensor(rng.permutation(60))]
    r = torch.tensor(np.exp(rng.normal(size=n_dispersions)))
    before = x.clone(), r.clone()
    value, by_log_r = differentiate_log_rising_ratio(x, r)
    counts, size = x.numpy(), r.numpy()
    expected = special.gammaln(counts + size) - special.gammaln(size) - counts * np.log(size)
    np.testing.assert_allclose(value, expected, rtol=1e-12, atol=STIRLING)
    expected = size * (special.digamma(counts + size) - special.digamma(size)) - counts
    np.testing.assert_allclose(by_log_r, expected, rtol=1e-12, atol=STIRLING)
    assert torch.equal(x, before[0])
    assert torch.equal(r, before[1])


def test_the_rising_ratio_of_no_count_is_empty():
    value, by_log_r = differentiate_log_rising_ratio(torch.zeros(0), torch.zeros(0))
    assert value.shape == by_log_r.shape == (0,)


def test_the_rising_ratio_of_zero_is_zero():
    _, r = _rising_grid(torch.float32)
    assert torch.all(log_rising_ratio(torch.tensor(0.0), r) == 0)


# -- as a torch distribution -------------------------------------------------------------------------------------------


def make_distribution(name: str, **options: object) -> CountDistribution:
    """Three cells and four genes; r per gene, the rest per cell and gene."""
    generator = torch.Generator().manual_seed(0)
    shapes = {"log_rate": (3, 4), "log_r": (4,), "gate": (3, 4)}
    params = {head: torch.randn(shapes[head], generator=generator) for head in CASES[name].heads}
    return CountDistribution(LIKELIHOODS[name], params, **options)


@every_likelihood
def test_the_distribution_has_the_moments_and_log_prob_of_its_likelihood(name):
    distribution = make_distribution(name)
    params = {head: value.double().numpy() for head, value in distribution.params.items()}
    mean, variance = CASES[name].moments(params)
    assert distribution.batch_shape == (3, 4)
    assert distribution.mean.shape == distribution.variance.shape == (3, 4)
    np.testing.assert_allclose(distribution.mean, mean, rtol=1e-5)
    np.testing.assert_allclose(distribution.variance, variance, rtol=1e-5)
    x = torch.tensor([0.0, 1.0, 2.0, 30.0])
    expected = CASES[name].log_pmf(x.double().numpy(), params)
    np.testing.assert_allclose(distribution.log_prob(x), expected, rtol=1e-5, atol=1e-5)
    wrapped = torch.distributions.Independent(distribution, 1, validate_args=False)
    np.testing.assert_allclose(wrapped.log_prob(x), expected.sum(axis=1), rtol=1e-5)


@every_likelihood
def test_the_distribution_has_the_attributes_that_scvi_tools_reads(name):
    distribution = make_distribution(name)
    params, rate = distribution.params, distribution.params["log_rate"].exp()
    r = params["log_r"].exp().expand(3, 4) if "log_r" in params else torch.full((3, 4), torch.inf)
    excess = torch.sigmoid(params["gate"]) if "gate" in params else torch.zeros(3, 4)
    assert torch.equal(distribution.mu, rate)
    assert torch.equal(distribution.theta, r)
    assert torch.equal(distribution.zi_probs, excess)
    assert torch.equal(distribution.get_normalized("mu"), rate)
    assert torch.equal(distribution.get_normalized("scale"), rate)


def test_the_scale_is_the_mean_without_the_size_factor_if_given():
    scale = torch.rand(3, 4)
    distribution = make_distribution("nb", scale=scale)
    assert distribution.scale is scale
    assert distribution.get_normalized("scale") is scale


@every_likelihood
@pytest.mark.parametrize("shape", [(), (5,), (2, 5), torch.Size([5])])
def test_samples_have_the_shape_asked_for_and_no_gradient(name, shape):
    distribution = make_distribution(name)
    for value in distribution.params.values():
        value.requires_grad_()
    draw = partial(distribution.sample, shape)
    draws = draw(generator=torch.Generator().manual_seed(0))
    assert draws.shape == (*shape, 3, 4)
    assert not draws.requires_grad
    assert torch.equal(draws, draw(generator=torch.Generator().manual_seed(0)))
