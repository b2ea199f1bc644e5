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
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import mpmath
import numpy as np
import pytest
import torch
from likelihood_cases import CASES, PIECEWISE, STIRLING, Arrays, exact_bernoulli, exact_rising
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

EXTREMES = {
    "log_rate": np.log([1e-8, 1e-4, 1e-2, 0.3, 1.0, 7.0, 1e3, 1e6]),
    "log_r": np.array([-10.0, -5.0, -1.0, 0.0, 2.0, 5.0, 10.0, 14.0, 18.0]),
    "gate": np.array([-30.0, -2.0, 0.0, 3.0, 30.0]),
    "log_sigma": np.array([-10.0, -3.0, 0.0, 3.0, 10.0]),
    "log_tail": np.array([-10.0, -1.0, 0.0, 2.0, 5.0, 10.0, 18.0]),
} | {f"category_{c}": np.array([-30.0, 4.0]) for c in range(3)}
COUNTS = np.array([0.0, 1, 2, 3, 10, 100, 1234, 1e5])
MODERATE = {
    "log_rate": np.log([1e-3, 0.5, 5.0, 50.0]),
    "log_r": np.log([0.3, 2.0, 50.0]),
    "gate": np.array([-3.0, 0.0, 2.0]),
    "log_sigma": np.log([0.1, 0.5, 1.2]),
    "log_tail": np.log([1.5, 4.0, 20.0]),
} | {f"category_{c}": np.array([-2.0, 1.0 + c]) for c in range(3)}


# -- the table ---------------------------------------------------------------------------------------------------------


# -- whether a count is above 0 ----------------------------------------------------------------------------------------


# -- densities ---------------------------------------------------------------------------------------------------------


# -- piecewise ---------------------------------------------------------------------------------------------------------


NAMES = tuple(CASES)  #: the table is compared with what is declared below
every_likelihood = pytest.mark.parametrize("name", NAMES)
declared_names = pytest.mark.parametrize("name", LIKELIHOODS)


def declaration(name: str) -> Likelihood:
    """The likelihood of a row of the table."""
    return get_likelihood(*PIECEWISE[name]) if name in PIECEWISE else LIKELIHOODS[name]


def with_limit(head: str) -> pytest.MarkDecorator:
    """Run for the likelihoods with this head."""
    return pytest.mark.parametrize("name", [name for name in NAMES if head in CASES[name].without])


def seeded_generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


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
    result = declaration(name).log_prob(torch.tensor(x, dtype=dtype), as_tensors(params, dtype))
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
    assert set(CASES) == {*LIKELIHOODS, *PIECEWISE}
    for name, case in CASES.items():
        assert case.heads == declaration(name).head_names


def test_every_likelihood_has_a_line_in_the_documentation():
    page = (Path(__file__).parents[2] / "docs" / "likelihoods.md").read_text(encoding="utf-8")
    table = next(part for part in page.split("\n\n") if part.startswith("| `likelihood`"))
    rows = re.findall(r"^\| `(\w+)` \|(.*)\|$", table, flags=re.MULTILINE)
    rows = [(name, row.split("|")) for name, row in rows if name != "likelihood"]  # the header
    assert [name for name, _ in rows] == list(LIKELIHOODS)
    for name, cells in rows:
        assert re.findall(r"`(\w+)`", cells[0]) == list(declaration(name).head_names)
        assert len(cells) == 6
        assert all(cell.strip() for cell in cells)


def test_an_unknown_name_is_refused_with_the_known_ones():
    with pytest.raises(ValueError, match=r"must be one of 'poisson', 'nb', .*; found 'normal'.*docs/likelihoods\.md"):
        get_likelihood("normal")


@declared_names
def test_a_known_name_gives_its_declaration(name):
    assert get_likelihood(name) is declaration(name)


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
    value = declaration(name).log_prob(torch.tensor(x, dtype=torch.float32), tensors)
    value.sum().backward()
    assert torch.isfinite(value).all()
    assert all(torch.isfinite(tensor.grad).all() for tensor in tensors.values())


@every_likelihood
def test_log_prob_never_exceeds_its_largest_value_by_more_than_rounding(name):
    """Which is 0 for a probability."""
    x, params = make_grid(name, EXTREMES, COUNTS)
    found, tolerance = log_prob(name, x, params, torch.float32), bound(name, x, params, torch.float32)
    assert np.all(found <= CASES[name].largest(params) + tolerance)


@every_likelihood
def test_log_prob_broadcasts_over_leading_axes(name):
    _, params = make_grid(name, MODERATE)
    x = np.array([[0.0], [4.0]])
    found = log_prob(name, x, params)
    assert found.shape == (2, len(params["log_rate"]))
    np.testing.assert_allclose(found[1], log_prob(name, np.full(found.shape[1], 4.0), params), rtol=1e-15)


def _mass(name: str) -> tuple[np.ndarray, np.ndarray, Arrays]:
    """Points (n, p or 1), the share of the mass that each stands for (n, p), and moderate parameters (p,)."""
    _, params = make_grid(name, MODERATE)
    x, weight = CASES[name].nodes(params)
    # At the points above 0 of a density, and by the formula for them at those below.
    likelihood, tensors = declaration(name), as_tensors(params)
    log_density = likelihood.log_prob if not likelihood.is_density else likelihood.log_prob_positive
    return x, weight * np.exp(log_density(torch.tensor(x), tensors).numpy()), params


@every_likelihood
def test_probabilities_sum_to_one_and_densities_integrate_to_one(name):
    _, mass, _ = _mass(name)
    np.testing.assert_allclose(mass.sum(axis=0), 1, rtol=0, atol=1e-8)  # the series, 2.2e-9, and rounding


@every_likelihood
def test_the_sum_over_genes_is_that_over_zeros_plus_corrections_at_the_nonzeros(name):
    rng = np.random.default_rng(0)
    shape, likelihood = (30, 200), declaration(name)
    ranges = {"log_rate": (-5, 3), "log_r": (-2, 4)}
    params = {head: rng.uniform(*ranges.get(head, (-4, 4)), shape) for head in CASES[name].heads}
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
    declaration(name).log_prob(torch.tensor(x, dtype=torch.float32), tensors).sum().backward()
    for head, value in tensors.items():
        assert torch.isfinite(value.grad).all(), head


@every_likelihood
def test_the_positive_branch_is_finite_at_zero_with_its_gradients(name):
    # torch.where evaluates it at x = 0 too, and a NaN there would pass into the gradient.
    _, params = make_grid(name, EXTREMES)
    tensors = {head: value.requires_grad_() for head, value in as_tensors(params, torch.float32).items()}
    value = declaration(name).log_prob_positive(torch.tensor(0.0), tensors)
    value.sum().backward()
    assert torch.isfinite(value).all()
    assert all(torch.isfinite(tensor.grad).all() for tensor in tensors.values())


@every_likelihood
def test_gradients_are_the_slopes_of_log_prob(name):
    x, params = make_grid(name, MODERATE, np.array([0.0, 1.0, 7.0, 60.0]))
    tensors = [value.requires_grad_() for value in as_tensors(params).values()]

    def function(*values: Tensor) -> Tensor:
        return declaration(name).log_prob(torch.tensor(x), dict(zip(CASES[name].heads, values, strict=True)))

    assert torch.autograd.gradcheck(function, tensors, fast_mode=True)


# -- kernel and base measure -------------------------------------------------------------------------------------------


@every_likelihood
def test_the_base_measure_is_the_declared_one(name):
    x = np.r_[COUNTS, 2.0**24, 0.5]  # what is accepted, and an estimated count
    found = declaration(name).log_base_measure(torch.tensor(x))
    np.testing.assert_allclose(found, CASES[name].log_base_measure(x), rtol=1e-12, atol=1e-12)
    assert declaration(name).log_base_measure(torch.tensor(0.0)) == 0  # the zeros are left out of its sum


@every_likelihood
def test_the_kernel_is_what_scipy_has_beside_the_base_measure(name):
    wide = {"log_rate": np.log([1e-3, 0.1, 1, 30, 1e4]), "log_r": np.array([-4.0, -1, 0, 2, 5])}
    x, params = make_grid(name, {**EXTREMES, **wide}, COUNTS[COUNTS > 0])
    found = declaration(name).log_kernel(torch.tensor(x), as_tensors(params)).numpy()
    expected = CASES[name].log_pmf(x, params) - CASES[name].log_base_measure(x)
    assert_within(found, expected, 1e-9 * CASES[name].size(x, params) + STIRLING)


@every_likelihood
def test_log_prob_is_that_of_zero_or_kernel_and_base_measure(name):
    x, params = make_grid(name, MODERATE, COUNTS)
    likelihood, tensors = declaration(name), as_tensors(params)
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
    "log_sigma": np.array([-10.0, -1.0, 0.0, 10.0]),
    "log_tail": np.array([-10.0, -1.0, 0.0, 2.0, 10.0, 18.0]),
} | {f"category_{c}": np.array([-20.0, 3.0]) for c in range(3)}
SLOPE_COUNTS = np.array([0.0, 1, 2, 10, 1234, 1e5])
every_precision = pytest.mark.parametrize("dtype", [torch.float32, torch.float64])


def held_by(dtype: torch.dtype, params: Arrays) -> Arrays:
    """The nearest numbers that ``dtype`` holds, in float64."""
    return {head: torch.tensor(value, dtype=dtype).double().numpy() for head, value in params.items()}


def differentiated(
    name: str, x: np.ndarray, params: Arrays, dtype: torch.dtype = torch.float64, by: type | None = None
) -> dict[str, np.ndarray]:
    """Log p(0) or the kernel, and the derivatives by the heads, with the declaration's methods or those of ``by``."""
    likelihood, tensors, counts = declaration(name), as_tensors(params, dtype), torch.tensor(x, dtype=dtype)
    by = by or type(likelihood)
    zero, by_head_of_zero = by.differentiate_zero(likelihood, tensors)
    kernel, by_head_of_kernel = by.differentiate_kernel(likelihood, counts, tensors)
    assert set(by_head_of_zero) == set(by_head_of_kernel) == set(likelihood.head_names)
    pairs = {"value": (zero, kernel)} | {head: (by_head_of_zero[head], by_head_of_kernel[head]) for head in tensors}
    assert all(part.dtype == dtype for pair in pairs.values() for part in pair)
    return {key: torch.where(counts > 0, at, at_zero).double().numpy() for key, (at_zero, at) in pairs.items()}


def slope_bound(name: str, x: np.ndarray, params: Arrays, dtype: torch.dtype) -> np.ndarray:
    """Largest error of a derivative that is accepted, in nats."""
    case = CASES[name]
    return SLOPE_ROUNDINGS * torch.finfo(dtype).eps * case.size_of_slopes(x, params) + case.approximation(x, params)


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
    likelihood, tensors = declaration(name), as_tensors(params)
    positive = likelihood.log_kernel(torch.tensor(x), tensors).numpy()
    expected = np.where(x > 0, positive, likelihood.log_prob_zero(tensors).numpy())
    assert_within(differentiated(name, x, params)["value"], expected, bound(name, x, params, torch.float64))


@every_likelihood
def test_derivatives_are_finite_for_every_count_that_is_accepted(name):
    x, params = make_grid(name, EXTREMES, np.r_[COUNTS, 1e6, 2.0**24])
    for value in differentiated(name, x, params, torch.float32).values():
        assert np.isfinite(value).all()


@pytest.mark.parametrize("by", ["declaration", "autograd"])
@pytest.mark.parametrize(
    "shared", [(), ("log_r", "log_sigma", "log_tail"), ("gate",), ("log_r", "gate"), ("log_rate",)], ids=" and ".join
)
@every_likelihood
def test_derivatives_have_the_broadcast_shape_and_can_be_written_into(name, shared, by):
    """In a block (genes, rows), a head that all rows share has one column; at the non-zeros each has its own entry."""
    likelihood, generator = declaration(name), torch.Generator().manual_seed(0)
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


@pytest.mark.parametrize(
    "shared", [(), ("log_r", "log_sigma", "log_tail"), ("gate",), ("log_r", "gate")], ids=" and ".join
)
@every_likelihood
def test_what_the_kernel_needs_of_shared_heads_can_be_computed_before(name, shared):
    """Once for each count of a batch, and passed with the parameters of whatever repeats it."""
    x, params = make_grid(name, EXTREMES, COUNTS[COUNTS > 0])
    likelihood, tensors, counts = declaration(name), as_tensors(params), torch.tensor(x)
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
    np.testing.assert_allclose(declaration(name).mean(as_tensors(params)), mean, rtol=1e-12)
    np.testing.assert_allclose(declaration(name).variance(as_tensors(params)), variance, rtol=1e-12)


@every_likelihood
def test_mean_and_variance_are_those_of_the_probabilities(name):
    x, mass, params = _mass(name)
    mean = (x * mass).sum(axis=0)
    variance = ((x - mean) ** 2 * mass).sum(axis=0)
    np.testing.assert_allclose(declaration(name).mean(as_tensors(params)), mean, rtol=1e-8)
    np.testing.assert_allclose(declaration(name).variance(as_tensors(params)), variance, rtol=1e-8)


def _sample(name: str, n: int, generator: torch.Generator | None) -> Tensor:
    _, params = make_grid(name, SAMPLED)
    return CountDistribution(declaration(name), as_tensors(params, torch.float32)).sample((n,), generator)


SAMPLED = {
    "log_rate": np.log([0.5, 20.0]),
    "log_r": np.log([0.3, 5.0]),
    "gate": np.array([-1.0, 1.0]),
    "log_sigma": np.log([0.1, 0.5]),
    "log_tail": np.log([9.0, 30.0]),  # the fourth moment is finite for α > 4 only
} | {f"category_{c}": np.array([-1.0, 1.0]) for c in range(3)}


@every_likelihood
def test_samples_have_the_mean_and_variance_within_five_standard_errors(name):
    n = 200_000
    draws = _sample(name, n, torch.Generator().manual_seed(0)).double().numpy()
    _, params = make_grid(name, SAMPLED)
    mean, variance = CASES[name].moments(params)
    x, weight = CASES[name].nodes(params)
    fourth = (weight * (x - mean) ** 4 * np.exp(CASES[name].log_pmf(x, params))).sum(axis=0)  # of the central moments
    assert declaration(name).support.check(torch.tensor(draws)).all()
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


def test_the_log_normal_has_the_median_of_its_rate_and_mass_below_zero():
    params = as_tensors({"log_rate": np.log([0.3, 4.0]), "log_sigma": np.log([1.5, 0.5])}, torch.float32)
    draws = declaration("log_normal").sample({k: v.expand(200_000, 2) for k, v in params.items()}, seeded_generator())
    share = (draws < params["log_rate"].exp()).double().mean(0)
    assert np.all(np.abs(share.numpy() - 0.5) < 5 * 0.5 / np.sqrt(200_000))
    assert -1 < draws.min() < 0


@pytest.mark.parametrize("log_rate", [-3.0, 0.0, 4.0])
def test_a_lomax_with_a_light_tail_is_exponential(log_rate):
    x = np.array([0.0, 0.1, 1.0, 20.0])
    found = log_prob("lomax", x, {"log_rate": np.full(4, log_rate), "log_tail": np.full(4, 25.0)})
    np.testing.assert_allclose(found, stats.expon(scale=np.exp(log_rate)).logpdf(x), rtol=1e-6, atol=1e-9)


def test_a_lomax_has_a_mean_where_it_has_no_variance():
    params = as_tensors({"log_rate": np.zeros(4), "log_tail": np.array([-5.0, 0.0, 1e-3, 3.0])})
    np.testing.assert_array_equal(declaration("lomax").mean(params), np.ones(4))
    tail = np.exp(params["log_tail"].numpy()[2:])
    expected = [np.inf, np.inf, *stats.lomax(1 + tail, scale=tail).var()]
    np.testing.assert_allclose(declaration("lomax").variance(params), expected, rtol=1e-9)


# -- whether a count is above 0 ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_detection_is_exact_where_the_rate_is_lost_beside_one_and_where_it_is_huge(dtype):
    log_rate = torch.tensor([-110.0, -60.0, -40.0, -16.0, -0.3, 3.0, 5.0, 60.0, 90.0], dtype=dtype)
    log_rate.requires_grad_()
    value = declaration("bernoulli").log_prob_positive(torch.tensor(1.0, dtype=dtype), {"log_rate": log_rate})
    (slope,) = torch.autograd.grad(value.sum(), log_rate)
    _, declared = declaration("bernoulli").differentiate_kernel(torch.tensor(1.0), {"log_rate": log_rate.detach()})
    exact = [mpmath.mpf(float(each)) for each in log_rate.detach()]
    expected = [float(exact_bernoulli(1, each)) for each in exact]
    slopes = [float(mpmath.exp(each) / mpmath.expm1(mpmath.exp(each))) for each in exact]
    rounding = 8 * torch.finfo(dtype).eps
    np.testing.assert_allclose(value.detach(), expected, rtol=rounding, atol=1e-60)
    np.testing.assert_allclose(slope, slopes, rtol=rounding, atol=1e-12)  # e^-148 at most
    np.testing.assert_allclose(declared["log_rate"], slopes, rtol=rounding, atol=1e-12)


def test_every_count_above_zero_is_detected():
    x = np.array([0.5, 1.0, 7.0, 1e5])
    np.testing.assert_allclose(log_prob("bernoulli", x, {"log_rate": np.zeros(4)}), np.log(1 - np.exp(-1)), rtol=1e-14)


# -- piecewise ---------------------------------------------------------------------------------------------------------

BASES = ("poisson", "nb", "zip", "zinb", "constrained_poisson")


@pytest.mark.parametrize("k_max", [1, 3])
@pytest.mark.parametrize("base", BASES)
def test_below_k_max_counts_have_probabilities_of_their_own_and_above_those_of_the_base(base, k_max):
    rng = np.random.default_rng(0)
    likelihood = get_likelihood(base, k_max)
    params = {head: rng.normal(size=40) for head in likelihood.head_names}
    odds = np.exp([*(params[f"category_{c}"] for c in range(k_max)), np.zeros(40)])  # (k_max + 1, 40)
    x = np.arange(3_000.0)
    above = np.exp(CASES[base].log_pmf(x[:, None], params))
    pmf = np.concatenate([odds[:-1], odds[-1] * above]) / odds.sum(0)  # (k_max + n, 40)
    counts = np.arange(float(len(pmf)))[:, None]
    tensors = as_tensors(params)
    found = likelihood.log_prob(torch.tensor(counts), tensors).exp()
    np.testing.assert_allclose(found, pmf, rtol=1e-7, atol=1e-14)
    mean = (counts * pmf).sum(0)
    np.testing.assert_allclose(likelihood.mean(tensors), mean, rtol=1e-9)
    np.testing.assert_allclose(likelihood.variance(tensors), ((counts - mean) ** 2 * pmf).sum(0), rtol=1e-9)
    draws = likelihood.sample({k: v.expand(20_000, 40) for k, v in tensors.items()}, seeded_generator())
    for count in range(k_max + 2):
        error = np.sqrt(pmf[count] * (1 - pmf[count]) / 20_000)
        assert np.all(np.abs((draws == count).double().mean(0).numpy() - pmf[count]) < 5 * error + 1e-9)


@pytest.mark.parametrize("base", BASES)
def test_a_piecewise_likelihood_keeps_what_its_base_declares(base):
    likelihood = get_likelihood(base, np.int64(2))
    assert likelihood.head_names == (*LIKELIHOODS[base].head_names, "category_0", "category_1")
    assert likelihood.normalizes_rates == LIKELIHOODS[base].normalizes_rates == (base == "constrained_poisson")
    assert likelihood.measures == "counts"
    params = {head: torch.randn(3, 4) for head in likelihood.head_names}
    distribution, of_base = (CountDistribution(each, params) for each in (likelihood, LIKELIHOODS[base]))
    for attribute in ("theta", "zi_probs"):
        assert torch.equal(getattr(distribution, attribute), getattr(of_base, attribute))


def test_estimated_counts_below_k_max_are_rounded_down():
    params = {"log_rate": np.zeros(4), **{f"category_{c}": np.full(4, c + 0.5) for c in range(3)}}
    found = log_prob("poisson above 3", np.array([0.7, 1.0, 1.9, 2.2]), params)
    np.testing.assert_array_equal(found, log_prob("poisson above 3", np.array([0.0, 1.0, 1.0, 2.0]), params))


@pytest.mark.parametrize("k_max", [-1, 1.5, 2.0, "2", None, True])
def test_k_max_must_be_a_whole_number(k_max):
    with pytest.raises(ValueError, match=r"`k_max` must be a whole number of at least 0; found .*Pass 0"):
        get_likelihood("nb", k_max)


@pytest.mark.parametrize("name", ["bernoulli", "gaussian", "log_normal", "lomax"])
def test_k_max_is_refused_where_there_are_no_counts_to_go_on_with(name):
    reason = "of x > 0 alone" if name == "bernoulli" else "a density on the real line"
    with pytest.raises(ValueError, match=rf"needs a likelihood of counts.*found '{name}', which is {reason}.*'zinb'"):
        get_likelihood(name, 2)


# -- starts ------------------------------------------------------------------------------------------------------------

MEANS = np.array([1e-4, 0.1, 1.0, 30.0])


@pytest.mark.parametrize("k_max", [1, 3])
def test_categories_start_at_the_geometric_distribution_of_the_mean(k_max):
    start = get_likelihood("nb", k_max).start(torch.tensor(MEANS))
    geometric = stats.geom(1 / (1 + MEANS), loc=-1)
    for c in range(k_max):
        expected = geometric.logpmf(c) - geometric.logsf(k_max - 1)
        np.testing.assert_allclose(start[f"category_{c}"], expected, rtol=1e-9, atol=1e-9)
    assert set(start) == {f"category_{c}" for c in range(k_max)}


def test_standard_deviations_start_at_those_of_the_geometric_distribution():
    start = declaration("gaussian").start(torch.tensor(MEANS))
    np.testing.assert_allclose(start["log_sigma"].exp(), stats.geom(1 / (1 + MEANS), loc=-1).std(), rtol=1e-9)
    x = np.arange(5_000.0)[:, None]
    pmf = stats.geom(1 / (1 + MEANS), loc=-1).pmf(x)
    mean = (np.log1p(x) * pmf).sum(0)
    expected = np.sqrt(((np.log1p(x) - mean) ** 2 * pmf).sum(0))
    found = declaration("log_normal").start(torch.tensor(MEANS))["log_sigma"].exp()
    np.testing.assert_allclose(found, expected, rtol=0.5)  # a start


@declared_names
def test_a_start_is_finite_for_every_other_head_it_names(name):
    likelihood = LIKELIHOODS[name]
    start = likelihood.start(torch.tensor(MEANS, dtype=torch.float32))
    assert set(start) <= set(likelihood.head_names) - {"log_rate"}
    assert all(torch.isfinite(value).all() and value.shape == (4,) for value in start.values())


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
    assert_within(log_rising_ratio(x, r).double().numpy(), _exactly(exact_rising, x, r), tolerance)


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
    assert_within(value.flatten().double().numpy(), _exactly(exact_rising, x, r), rounding * size + STIRLING)
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
    shared = {head.name for head in declaration(name).heads if head.is_dispersion}
    params = {head: torch.randn(4 if head in shared else (3, 4), generator=generator) for head in CASES[name].heads}
    return CountDistribution(declaration(name), params, **options)


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
    params, rate = distribution.params, distribution.likelihood.rate(distribution.params)
    if distribution.likelihood.rate_is_head:
        assert torch.equal(rate, params["log_rate"].exp())
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


@pytest.mark.parametrize("k_max", [1, 3])
@pytest.mark.parametrize("base", ["poisson", "nb", "zip"])
def test_the_rate_of_a_piecewise_categorical_is_its_mean_but_for_excess_zeros_of_the_base(base, k_max):
    params = {"log_rate": torch.tensor(np.log([0.2, 4.0])), "log_r": torch.tensor(0.7), "gate": torch.tensor(-1000.0)}
    params |= {f"category_{c}": torch.tensor([1.5 - c, 0.3 * c]) for c in range(k_max)}
    likelihood = get_likelihood(base, k_max)
    params = {name: params[name] for name in likelihood.head_names}
    x = torch.arange(400.0, dtype=torch.double)[:, None]
    brute_force = (x * likelihood.log_prob(x, params).exp()).sum(0)
    np.testing.assert_allclose(likelihood.rate(params), brute_force, rtol=1e-6)
    if "gate" in params:
        inflated = likelihood.rate(params | {"gate": torch.tensor(1.0)})
        np.testing.assert_allclose(inflated, brute_force, rtol=1e-6)
