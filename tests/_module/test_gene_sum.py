"""The blocked sum over genes against SciPy, autograd through all parameters at once, and finite differences.

Tolerance. In float64 two ways differ by the rounding of sums of a few dozen terms, and by what the series in the
negative binomial leaves out at each count, `STIRLING` nats, or nothing: `EXACT` allows for all genes. In float32 a
tensor may be off by `SINGLE` of its largest entry, the requirement of the engine; smaller entries of a gradient are
differences of larger terms, and no way of summing them is exact to more than that.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch
from independent import array, log_base_measure, log_pmf, normal, seeded
from scipy import special, stats
from scvi import REGISTRY_KEYS
from torch.nn.functional import logsigmoid, softplus

import scvae_tools as svt
from scvae_tools._module import gene_sum as _blocked
from scvae_tools._module.bounds import Posterior
from scvae_tools._module.covariates import Covariates, Sizes
from scvae_tools._module.decoded import DecodedRows, Heads
from scvae_tools._module.dense_counts import DenseCounts
from scvae_tools._module.memory import Buffers
from scvae_tools._module.mixture_vaes import GMVAE, VaDE
from scvae_tools._module.networks import DISPERSIONS
from scvae_tools._module.sparse import Counts
from scvae_tools._module.vae import VAE
from scvae_tools.likelihoods import LIKELIHOODS, RATE, Head, Likelihood, ZeroInflated, get_likelihood

if TYPE_CHECKING:
    from collections.abc import Callable

N_GENES, N_HIDDEN, N_BATCH = 7, 3, 3
STIRLING = 2.3e-9  #: of the value and its slopes; see test_likelihoods.py
EXACT = {"rtol": 1e-10, "atol": N_GENES * STIRLING}
SINGLE = 1e-5


# -- factories ---------------------------------------------------------------------------------------------------------


def make_counts(n_rows: int = 5, n_genes: int = N_GENES, share: float = 0.5, seed: int = 0) -> torch.Tensor:
    """Counts (n_rows, n_genes) up to about ten, of which so large a share is not zero."""
    rng = np.random.default_rng(seed)
    x = (1 + rng.poisson(2, (n_rows, n_genes))) * (rng.random((n_rows, n_genes)) < share)
    return torch.tensor(x, dtype=torch.float64)


def with_an_empty_cell() -> torch.Tensor:
    x = make_counts()
    x[2], x[:, 4] = 0, 0
    return x


PATTERNS = {
    "mixed": make_counts(),
    "no zero": make_counts(share=1),
    "no count": make_counts(share=0),
    "one row": make_counts(1),
    "an empty cell and an empty gene": with_an_empty_cell(),
}


@dataclass(frozen=True)
class Dense:
    """Blocks of so many genes of counts that are held as a dense matrix."""

    n_genes: int | None


#: Genes in a block. Two and three do not divide the seven.
BLOCKS = {
    "one block": None,
    "one gene a block": 1,
    "two genes a block": 2,
    "three genes a block": 3,
    "dense counts, one block": Dense(None),
    "dense counts, three genes a block": Dense(3),
}
#: Name and k_max of likelihoods with categories.
PIECEWISE = {"poisson above 2": ("poisson", 2), "zinb above 1": ("zinb", 1)}
#: Dispersions of the likelihoods that have one: all of the first, one of the others, to save time.
WITH_DISPERSION = {"nb": DISPERSIONS, "zinb": DISPERSIONS, "log_normal": ("gene-batch",), "lomax": ("gene-cell",)}
CASES = [(name, dispersion) for name in LIKELIHOODS for dispersion in WITH_DISPERSION.get(name, ("gene",))]
CASES += [("poisson above 2", "gene"), ("zinb above 1", "gene-cell")]
every_case = pytest.mark.parametrize(("name", "dispersion"), CASES)
every_likelihood = pytest.mark.parametrize("name", LIKELIHOODS)
every_pattern = pytest.mark.parametrize("pattern", PATTERNS)
every_block = pytest.mark.parametrize("block", BLOCKS)


@dataclass(frozen=True)
class Problem:
    """A sum over genes; the features and the tensors of the heads are leaves that require gradients."""

    likelihood: Likelihood
    x: torch.Tensor  # (p, g)
    log_size: torch.Tensor  # (p,)
    batch: torch.Tensor  # (p,)
    features: torch.Tensor  # (p, h)
    heads: Heads

    def leaves(self) -> list[torch.Tensor]:
        return [self.features, *self.heads.tensors()]

    def names(self) -> list[str]:
        decoded = [f"{kind} of {name}" for name in self.heads.decoded for kind in ("weight", "bias")]
        return ["features", *decoded, *self.heads.shared]

    def of(self, leaves: list[torch.Tensor]) -> Problem:
        """With other leaves."""
        return replace(self, features=leaves[0], heads=self.heads.like(tuple(leaves[1:])))

    def to(self, dtype: torch.dtype) -> Problem:
        cast = self.of([leaf.detach().to(dtype).requires_grad_() for leaf in self.leaves()])
        return replace(cast, x=self.x.to(dtype), log_size=self.log_size.to(dtype))

    def at(self, rows: torch.Tensor) -> Problem:
        """Some of the rows."""
        features = self.features.detach()[rows].requires_grad_()
        return replace(self, x=self.x[rows], log_size=self.log_size[rows], batch=self.batch[rows], features=features)

    def params(self) -> dict[str, torch.Tensor]:
        """All parameters, (p, g)."""
        params = {name: self.features @ weight.T + bias for name, (weight, bias) in self.heads.decoded.items()}
        params["log_rate"] = params["log_rate"] + self.log_size[:, None]
        for name, value in self.heads.shared.items():
            params[name] = value.T[self.batch] if value.ndim == 2 else value.expand(self.x.shape)
        return params

    def dense(self) -> torch.Tensor:
        """Σ_g log p(x_g) − log b(x_g), (p,), with all parameters in memory."""
        log_prob = self.likelihood.log_prob(self.x, self.params())
        return (log_prob - self.likelihood.log_base_measure(self.x)).sum(1)

    def rows(self) -> DecodedRows:
        """Each row a cell of its own."""
        return DecodedRows(Counts.of(self.x).by_gene, self.log_size, self.batch, N_BATCH)

    def dense_rows(self, rows: DecodedRows | None = None) -> DecodedRows:
        """The same with the counts of all cells as a matrix; of other cells than the rows if these are given."""
        rows = self.rows() if rows is None else rows
        by_gene = rows.counts
        x = torch.zeros(len(rows.batch), len(by_gene.start) - 1, dtype=by_gene.value.dtype)
        x[by_gene.column, by_gene.row()] = by_gene.value
        return replace(rows, counts=x)

    def blocked(
        self,
        expected_gradient: torch.Tensor | None = None,
        n_genes: int | Dense | None = None,
        rows: DecodedRows | None = None,
        buffers: Buffers | None = None,
    ) -> torch.Tensor:
        """The same by the engine, with so many genes in a block."""
        if isinstance(n_genes, Dense):
            return self.blocked(expected_gradient, n_genes.n_genes, self.dense_rows(rows), buffers)
        return _blocked.log_likelihood(
            self.likelihood,
            self.rows() if rows is None else rows,
            self.heads,
            self.features,
            expected_gradient,
            block_entries=None if n_genes is None else n_genes * len(self.features),
            buffers=buffers,
        )


def make_problem(
    likelihood: str | Likelihood, dispersion: str = "gene", x: torch.Tensor | None = None, n_hidden: int = N_HIDDEN
) -> Problem:
    """Parameters of about ±1 around those of moderate counts. The last of the batches has no row."""
    if isinstance(likelihood, str):
        likelihood = get_likelihood(*PIECEWISE.get(likelihood, (likelihood,)))
    x = PATTERNS["mixed"] if x is None else x
    n_rows, n_genes = x.shape
    decoded, shared = {}, {}
    for seed, head in enumerate(likelihood.heads, start=10):
        if head.is_dispersion and dispersion != "gene-cell":
            shape = (n_genes, N_BATCH) if dispersion == "gene-batch" else (n_genes,)
            shared[head.name] = normal(*shape, seed=seed).requires_grad_()
            continue
        weight, bias = normal(n_genes, n_hidden, seed=seed), normal(n_genes, seed=seed + 10)
        decoded[head.name] = (weight / n_hidden**0.5).requires_grad_(), bias.requires_grad_()
    return Problem(
        likelihood,
        x,
        0.5 * normal(n_rows, seed=1),
        torch.arange(n_rows) // 2 % (N_BATCH - 1),
        normal(n_rows, n_hidden, seed=2).requires_grad_(),
        Heads(decoded, shared),
    )


def make_expected_gradients(n_rows: int) -> dict[str, torch.Tensor]:
    """Gradients of a loss by the log-likelihoods of its rows."""
    uniform = torch.full((n_rows,), -1 / n_rows, dtype=torch.float64)
    return {"uniform": uniform, "weighted": uniform * torch.softmax(3 * normal(n_rows, seed=4), dim=0)}


# -- comparisons -------------------------------------------------------------------------------------------------------


def gradients(problem: Problem, value: torch.Tensor, by_value: torch.Tensor) -> list[np.ndarray]:
    """By the leaves."""
    return [array(each) for each in torch.autograd.grad(value, problem.leaves(), by_value)]


def assert_same(problem: Problem, found: list[np.ndarray], expected: list[np.ndarray], **tolerance: float) -> None:
    for name, ours, theirs in zip(problem.names(), found, expected, strict=True):
        np.testing.assert_allclose(ours, theirs, **(tolerance or EXACT), err_msg=name)


def assert_close(found: torch.Tensor, expected: torch.Tensor, name: str = "") -> None:
    """To `SINGLE` of the largest entry; the error counts if it is not one of rounding."""
    found, expected = array(found).astype(np.float64), array(expected).astype(np.float64)
    assert np.isfinite(found).all(), name
    np.testing.assert_allclose(found, expected, rtol=0, atol=SINGLE * np.abs(expected).max(), err_msg=name)


# -- values ------------------------------------------------------------------------------------------------------------


@every_block
@every_pattern
@every_case
def test_value_is_that_of_scipy_without_the_base_measure(name: str, dispersion: str, pattern: str, block: str) -> None:
    problem = make_problem(name, dispersion, PATTERNS[pattern])
    x, (base, *k_max) = problem.x.numpy(), PIECEWISE.get(name, (name,))
    expected = (log_pmf(x, problem.params(), base) - log_base_measure(x, base, *k_max)).sum(1)
    found = array(problem.blocked(n_genes=BLOCKS[block]))
    np.testing.assert_allclose(found, expected, **EXACT)


@pytest.mark.parametrize("is_expected", [False, True])
@every_block
@every_case
def test_no_gradient_needed_gives_the_same_values(name: str, dispersion: str, block: str, is_expected: bool) -> None:
    problem = make_problem(name, dispersion)
    expected_gradient = make_expected_gradients(len(problem.x))["uniform"] if is_expected else None
    expected = problem.blocked(expected_gradient, BLOCKS[block])
    assert expected.requires_grad
    with torch.no_grad():
        without = problem.blocked(expected_gradient, BLOCKS[block])
    with torch.inference_mode():
        inferred = problem.blocked(expected_gradient, BLOCKS[block])
    fixed = problem.of([leaf.detach() for leaf in problem.leaves()]).blocked(expected_gradient, BLOCKS[block])
    for found in (without, inferred, fixed):
        assert not found.requires_grad
        np.testing.assert_allclose(array(found), array(expected), **EXACT)


# -- gradients ---------------------------------------------------------------------------------------------------------


@every_block
@every_pattern
@every_case
def test_gradients_are_those_of_the_dense_formula(name: str, dispersion: str, pattern: str, block: str) -> None:
    """Of any weights, of either sign, which are not known beforehand."""
    problem = make_problem(name, dispersion, PATTERNS[pattern])
    by_value = normal(len(problem.x), seed=5)
    found = gradients(problem, problem.blocked(n_genes=BLOCKS[block]), by_value)
    assert_same(problem, found, gradients(problem, problem.dense(), by_value))


@every_block
@every_pattern
@every_case
def test_gradients_of_the_forward_pass_are_those_of_the_dense_formula(
    name: str, dispersion: str, pattern: str, block: str
) -> None:
    problem = make_problem(name, dispersion, PATTERNS[pattern])
    expected_gradient = make_expected_gradients(len(problem.x))["weighted"]
    value = problem.blocked(expected_gradient, BLOCKS[block])
    np.testing.assert_allclose(array(value), array(problem.dense()), **EXACT)
    assert_same(
        problem, gradients(problem, value, expected_gradient), gradients(problem, problem.dense(), expected_gradient)
    )


@pytest.mark.parametrize("is_expected", [False, True])
@every_pattern
@every_case
def test_gradients_are_finite_differences(name: str, dispersion: str, pattern: str, is_expected: bool) -> None:
    """Tolerance: those of `torch.autograd.gradcheck` in float64, central differences of step 1e-6."""
    problem = make_problem(name, dispersion, PATTERNS[pattern])
    weights = make_expected_gradients(len(problem.x))["weighted"]

    def value(*leaves: torch.Tensor) -> torch.Tensor:
        if is_expected:
            return (weights * problem.of(list(leaves)).blocked(weights, n_genes=3)).sum()
        return problem.of(list(leaves)).blocked(n_genes=3)

    assert torch.autograd.gradcheck(value, problem.leaves(), fast_mode=True)


@pytest.mark.parametrize("is_expected", [False, True])
def test_every_single_gradient_is_a_finite_difference(is_expected: bool) -> None:
    """Entry by entry, for the likelihood with most heads; the others are compared in a random direction."""
    problem = make_problem("zinb", "gene-batch")
    weights = make_expected_gradients(len(problem.x))["weighted"]

    def value(*leaves: torch.Tensor) -> torch.Tensor:
        each = problem.of(list(leaves)).blocked(weights if is_expected else None, n_genes=3)
        return (weights * each).sum()

    assert torch.autograd.gradcheck(value, problem.leaves())


@pytest.mark.parametrize("is_expected", [False, True])
@pytest.mark.parametrize("fixed", ["features", "heads", "shared heads"])
@every_case
def test_leaves_that_need_no_gradient_get_none(name: str, dispersion: str, fixed: str, is_expected: bool) -> None:
    problem = make_problem(name, dispersion)
    groups = {
        "features": [problem.features],
        "heads": problem.heads.tensors(),
        "shared heads": list(problem.heads.shared.values()),
    }
    expected = gradients(problem, problem.dense(), make_expected_gradients(len(problem.x))["weighted"])
    for leaf in groups[fixed]:
        leaf.requires_grad_(False)
    expected_gradient = make_expected_gradients(len(problem.x))["weighted"]
    problem.blocked(expected_gradient if is_expected else None, n_genes=3).backward(expected_gradient)
    for leaf_name, leaf, gradient in zip(problem.names(), problem.leaves(), expected, strict=True):
        if leaf.requires_grad:
            np.testing.assert_allclose(array(leaf.grad), gradient, **EXACT, err_msg=leaf_name)
        else:
            assert leaf.grad is None


@pytest.mark.parametrize("is_expected", [False, True])
@every_case
def test_gradients_are_added_up_over_passes(name: str, dispersion: str, is_expected: bool) -> None:
    """What a pass hands out stays what it was when the next one, or the same one again, adds to it."""
    problem = make_problem(name, dispersion)
    expected_gradient = make_expected_gradients(len(problem.x))["weighted"]
    once = gradients(problem, problem.dense(), expected_gradient)
    value = problem.blocked(expected_gradient if is_expected else None, n_genes=3)
    for _ in range(3):
        value.backward(expected_gradient, retain_graph=True)
    problem.blocked(expected_gradient if is_expected else None, n_genes=3).backward(expected_gradient)
    assert_same(problem, [array(leaf.grad) for leaf in problem.leaves()], [4 * gradient for gradient in once])


@pytest.mark.parametrize("is_sparse", [True, False])
@pytest.mark.parametrize("is_expected", [False, True])
@every_case
def test_data_and_parameters_are_left_as_they_were(
    name: str, dispersion: str, is_expected: bool, is_sparse: bool
) -> None:
    problem = make_problem(name, dispersion)
    expected_gradient = make_expected_gradients(len(problem.x))["weighted"]
    rows = problem.rows() if is_sparse else problem.dense_rows()
    held = [
        *problem.leaves(),
        rows.log_size,
        rows.batch,
        expected_gradient,
        *(rows.counts if is_sparse else [rows.counts]),
    ]
    before = [array(value).copy() for value in held]
    problem.blocked(expected_gradient if is_expected else None, n_genes=3, rows=rows).backward(expected_gradient)
    for value, copy in zip(held, before, strict=True):
        np.testing.assert_array_equal(array(value), copy)


def test_a_block_is_never_smaller_than_a_gene() -> None:
    problem = make_problem("zinb")
    found = _blocked.log_likelihood(
        problem.likelihood, problem.rows(), problem.heads, problem.features, block_entries=1
    )
    np.testing.assert_allclose(array(found), array(problem.dense()), **EXACT)


def test_the_engine_chooses_a_block_by_itself() -> None:
    """With several blocks of its own choice."""
    problem = make_problem("zinb", x=make_counts(150, 4_000, share=0.01))
    by_value = normal(150, seed=5)
    found, dense = problem.blocked(), problem.dense()
    np.testing.assert_allclose(array(found), array(dense), rtol=1e-10)
    expected = gradients(problem, dense, by_value)
    assert_same(problem, gradients(problem, found, by_value), expected, rtol=1e-10, atol=150 * STIRLING)  # one a row


# -- expected gradients ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("factor", [-3.0, 1e-3, 0.0])
@pytest.mark.parametrize("weights", make_expected_gradients(1))
@every_case
def test_an_expected_gradient_may_be_off_by_a_common_factor(
    name: str, dispersion: str, weights: str, factor: float
) -> None:
    problem = make_problem(name, dispersion)
    expected_gradient = make_expected_gradients(len(problem.x))[weights]
    found = gradients(problem, problem.blocked(expected_gradient, n_genes=3), factor * expected_gradient)
    assert_same(problem, found, gradients(problem, problem.dense(), factor * expected_gradient))


def test_an_expected_gradient_may_be_off_by_rounding() -> None:
    """A loss in float32 has its own way to the same weights: a few times 6e-8 of them."""
    problem = make_problem("nb")
    expected_gradient = make_expected_gradients(len(problem.x))["weighted"]
    rounded = expected_gradient * (1 + 1e-6 * normal(len(expected_gradient), seed=6))
    found = gradients(problem, problem.blocked(expected_gradient, n_genes=3), rounded)
    assert_same(problem, found, gradients(problem, problem.dense(), expected_gradient), rtol=1e-5, atol=1e-6)


def _one_row_is(change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[torch.Tensor], torch.Tensor]:
    def changed(expected_gradient: torch.Tensor) -> torch.Tensor:
        found = expected_gradient.clone()
        found[1] = change(found[1])
        return found

    return changed


@pytest.mark.parametrize(
    "cotangent",
    [
        _one_row_is(lambda weight: 1.01 * weight),
        _one_row_is(lambda weight: -weight),
        _one_row_is(torch.zeros_like),
        lambda expected_gradient: expected_gradient.flip(0),
        torch.ones_like,
    ],
    ids=["one row one per cent larger", "one row of the other sign", "one row left out", "another order", "a sum"],
)
def test_another_gradient_than_expected_is_an_error(cotangent: Callable[[torch.Tensor], torch.Tensor]) -> None:
    problem = make_problem("nb")
    expected_gradient = make_expected_gradients(len(problem.x))["weighted"]
    value = problem.blocked(expected_gradient, n_genes=3)
    with pytest.raises(RuntimeError, match="must be the expected gradient"):
        value.backward(cotangent(expected_gradient))


def test_a_row_expected_to_have_no_weight_must_get_none() -> None:
    problem = make_problem("nb")
    expected_gradient = make_expected_gradients(len(problem.x))["weighted"]
    expected_gradient[1] = 0
    broken = expected_gradient.clone()
    broken[1] = 1e-3
    with pytest.raises(RuntimeError, match="must be the expected gradient"):
        problem.blocked(expected_gradient, n_genes=3).backward(broken)


@every_case
def test_rows_without_weight_leave_no_trace(name: str, dispersion: str) -> None:
    problem = make_problem(name, dispersion)
    kept = torch.tensor([0, 2, 3])
    expected_gradient = torch.zeros(len(problem.x), dtype=torch.float64)
    expected_gradient[kept] = make_expected_gradients(3)["weighted"]
    rest = problem.at(kept)
    of_rest = gradients(rest, rest.dense(), expected_gradient[kept])
    for value in (problem.blocked(expected, n) for n in (3, Dense(3)) for expected in (expected_gradient, None)):
        by_features, *others = gradients(problem, value, expected_gradient)
        np.testing.assert_array_equal(by_features[[1, 4]], 0)
        assert_same(problem, [by_features[kept.numpy()], *others], of_rest)


def test_an_expected_gradient_may_add_up_to_nothing() -> None:
    problem = make_problem("nb")
    expected_gradient = torch.tensor([1.0, -1.0, 2.0, -2.0, 0.0], dtype=torch.float64)
    found = gradients(problem, problem.blocked(expected_gradient, n_genes=3), 2 * expected_gradient)
    assert_same(problem, found, gradients(problem, problem.dense(), 2 * expected_gradient))


def test_an_expected_gradient_of_0_allows_no_other() -> None:
    problem = make_problem("nb")
    value = problem.blocked(torch.zeros(len(problem.x), dtype=torch.float64), n_genes=3)
    with pytest.raises(RuntimeError, match="must be the expected gradient"):
        value.sum().backward()


def test_a_loss_that_is_not_a_number_passes_on_that_it_is_none() -> None:
    """The training looks for it, and says where it was first."""
    problem = make_problem("nb")
    expected_gradient = make_expected_gradients(len(problem.x))["uniform"]
    for gradient in gradients(problem, problem.blocked(expected_gradient, n_genes=3), torch.nan * expected_gradient):
        assert np.isnan(gradient).all()


class Counting(Likelihood):
    """Another likelihood that counts how often its derivatives are asked for."""

    def __init__(self, base: Likelihood) -> None:
        self.base, self.heads, self.n_calls = base, base.heads, 0

    def log_prob_zero(self, params: dict) -> torch.Tensor:
        return self.base.log_prob_zero(params)

    def log_kernel(self, x: torch.Tensor, params: dict) -> torch.Tensor:
        return self.base.log_kernel(x, params)

    def differentiate_zero(self, params: dict) -> tuple:
        self.n_calls += 1
        return self.base.differentiate_zero(params)

    mean = variance = sample = None  # not needed here


def test_with_an_expected_gradient_the_backward_pass_evaluates_nothing() -> None:
    problem = make_problem(Counting(LIKELIHOODS["nb"]))
    expected_gradient = make_expected_gradients(len(problem.x))["uniform"]
    value = problem.blocked(expected_gradient, n_genes=1)
    n_calls = problem.likelihood.n_calls
    assert n_calls > 0
    value.backward(expected_gradient)
    assert problem.likelihood.n_calls == n_calls


def test_without_an_expected_gradient_the_forward_pass_takes_no_derivative() -> None:
    problem = make_problem(Counting(LIKELIHOODS["nb"]))
    value = problem.blocked(n_genes=1)
    assert problem.likelihood.n_calls == 0
    value.backward(normal(len(problem.x)))
    assert problem.likelihood.n_calls > 0


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_a_need_of_gradients_an_expected_gradient_costs_nothing(mode: Callable) -> None:
    problem = make_problem(Counting(LIKELIHOODS["nb"]))
    with mode():
        problem.blocked(make_expected_gradients(len(problem.x))["uniform"], n_genes=1)
    assert problem.likelihood.n_calls == 0


# -- rows that repeat cells --------------------------------------------------------------------------------------------


REPEATS = {
    "k each": [0, 0, 1, 1, 2, 2, 3, 3, 4, 4],
    "any": [3, 0, 0, 4, 3, 3, 0],
    "one": [2],
    "as they are": [0, 1, 2, 3, 4],
}


@pytest.mark.parametrize("is_expected", [False, True])
@pytest.mark.parametrize("repeats", REPEATS)
@every_block
@every_case
def test_rows_that_repeat_cells_equal_a_dense_index(
    name: str, dispersion: str, block: str, repeats: str, is_expected: bool
) -> None:
    """Each row with features of its own."""
    cells, cell = make_problem(name, dispersion, with_an_empty_cell()), torch.tensor(REPEATS[repeats])
    problem = replace(cells.at(cell), features=normal(len(cell), N_HIDDEN, seed=8).requires_grad_())
    rows = replace(cells.rows(), cell=cell, log_size=problem.log_size)
    expected_gradient = make_expected_gradients(len(cell))["weighted"]
    value = problem.blocked(expected_gradient if is_expected else None, BLOCKS[block], rows=rows)
    np.testing.assert_allclose(array(value), array(problem.dense()), **EXACT)
    with torch.no_grad():
        np.testing.assert_allclose(array(problem.blocked(None, BLOCKS[block], rows=rows)), array(value), **EXACT)
    assert_same(
        problem, gradients(problem, value, expected_gradient), gradients(problem, problem.dense(), expected_gradient)
    )


# -- the log of the size factors ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("is_expected", [False, True])
@pytest.mark.parametrize("repeats", REPEATS)
@pytest.mark.parametrize("n_genes", [3, Dense(3)], ids=["sparse", "dense"])
@every_case
def test_the_gradient_by_the_log_of_the_size_factors_is_that_of_the_dense_formula(
    name: str, dispersion: str, n_genes: int | Dense, repeats: str, is_expected: bool
) -> None:
    cells, cell = make_problem(name, dispersion, with_an_empty_cell()), torch.tensor(REPEATS[repeats])
    problem = replace(cells.at(cell), features=normal(len(cell), N_HIDDEN, seed=8).requires_grad_())
    problem.log_size.requires_grad_()
    rows = replace(cells.rows(), cell=cell, log_size=problem.log_size)
    expected_gradient = make_expected_gradients(len(cell))["weighted"]
    value = problem.blocked(expected_gradient if is_expected else None, n_genes, rows=rows)
    leaves = [problem.log_size, *problem.leaves()]
    found = torch.autograd.grad(value, leaves, -2 * expected_gradient)  # off by a common factor
    expected = torch.autograd.grad(problem.dense(), leaves, -2 * expected_gradient)
    for name_of_leaf, ours, theirs in zip(["log_size", *problem.names()], found, expected, strict=True):
        np.testing.assert_allclose(array(ours), array(theirs), **EXACT, err_msg=name_of_leaf)


# -- the sum of the rates ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n_genes", [None, 1, 2, 3, 7, 100])
@pytest.mark.parametrize("shape", [(5,), (2, 5), (2, 3, 5), (1,), (0,)], ids=str)
def test_the_log_of_the_sum_of_the_rates_is_that_of_torch(shape: tuple[int, ...], n_genes: int | None) -> None:
    leaves = [normal(*shape, N_HIDDEN), 3 * normal(N_GENES, N_HIDDEN, seed=1), 3 * normal(N_GENES, seed=2)]
    features, weight, bias = (leaf.requires_grad_() for leaf in leaves)
    entries = None if n_genes is None else n_genes * max(1, int(np.prod(shape)))
    found = _blocked.log_sum_exp(features, weight, bias, block_entries=entries)
    expected = torch.logsumexp(features @ weight.T + bias, dim=-1)
    np.testing.assert_allclose(array(found), array(expected), rtol=1e-12)
    by_value = normal(*shape, seed=3)
    pairs = zip(*(torch.autograd.grad(value, leaves, by_value) for value in (found, expected)), strict=True)
    for ours, theirs in pairs:
        np.testing.assert_allclose(array(ours), array(theirs), rtol=1e-10, atol=1e-12)


def test_the_log_of_the_sum_of_the_rates_is_exact_in_float32_where_the_sum_overflows() -> None:
    features, weight = torch.ones(2, 1), torch.zeros(1000, 1)
    bias = torch.linspace(-200, 200, 1000)
    found = _blocked.log_sum_exp(features, weight, bias, block_entries=30)
    np.testing.assert_allclose(found, special.logsumexp(bias.double().numpy()), rtol=1e-6)


# -- float32 -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("is_expected", [False, True])
@pytest.mark.parametrize("share", [0.07, 0.6])
@pytest.mark.parametrize("n_genes", [37, Dense(37)], ids=["sparse", "dense"])
@every_case
def test_float32_is_as_close_to_float64_as_required(
    name: str, dispersion: str, n_genes: int | Dense, share: float, is_expected: bool
) -> None:
    exact = make_problem(name, dispersion, make_counts(40, 501, share), n_hidden=16)
    problem = exact.to(torch.float32)
    expected_gradient = make_expected_gradients(40)["weighted"].float()
    value = problem.blocked(expected_gradient if is_expected else None, n_genes=n_genes)
    assert value.dtype == torch.float32
    np.testing.assert_allclose(array(value), array(exact.dense()), rtol=SINGLE)
    found = torch.autograd.grad(value, problem.leaves(), expected_gradient)
    expected = torch.autograd.grad(exact.dense(), exact.leaves(), expected_gradient.double())
    for leaf, ours, theirs in zip(problem.names(), found, expected, strict=True):
        assert ours.dtype == torch.float32
        assert_close(ours, theirs, leaf)


# -- buffers -----------------------------------------------------------------------------------------------------------


def test_gradients_in_memory_that_is_used_again_are_right_step_after_step() -> None:
    """Each weight is above the size from which memory is kept. Gradients that are held stay what they are."""
    problem = make_problem("nb", "gene-cell", make_counts(6, 3_000, share=0.1), n_hidden=100).to(torch.float32)
    buffers, held = Buffers(), []
    expected_gradient = torch.full((6,), -1 / 6)
    with buffers.kept():
        for step in range(4):
            with torch.no_grad():
                problem.features.add_(0.1 * normal(6, 100, seed=30 + step).float())
            found = torch.autograd.grad(
                problem.blocked(expected_gradient, buffers=buffers), problem.leaves(), expected_gradient
            )
            expected = torch.autograd.grad(problem.dense(), problem.leaves(), expected_gradient)
            for leaf, ours, theirs in zip(problem.names(), found, expected, strict=True):
                assert_close(ours, theirs, leaf)
            if step % 2:
                held.append((found, [each.clone() for each in found]))
    for found, copies in held:
        assert all(torch.equal(ours, copy) for ours, copy in zip(found, copies, strict=True))


# -- likelihoods that declare no derivative ----------------------------------------------------------------------------


class Geometric(Likelihood):
    """Number of failures before a success, of mean λ; its base measure is 1."""

    heads = (RATE,)

    def log_prob_zero(self, params: dict) -> torch.Tensor:
        return -softplus(params["log_rate"])

    def log_kernel(self, x: torch.Tensor, params: dict) -> torch.Tensor:
        return x * params["log_rate"] - (x + 1) * softplus(params["log_rate"])

    def log_base_measure(self, x: torch.Tensor) -> torch.Tensor:
        return torch.zeros_like(x)

    mean = variance = sample = None  # not needed here

    @staticmethod
    def log_pmf(x: np.ndarray, params: dict[str, np.ndarray]) -> np.ndarray:
        return stats.geom.logpmf(x, 1 / (1 + np.exp(params["log_rate"])), loc=-1)


class Hurdle(Geometric):
    """0 with the probability sigmoid(hurdle), which alone decides p(0); else 1 and a geometric number."""

    heads = (RATE, Head("hurdle", "logit of p(0)", is_dispersion=True))

    def log_prob_zero(self, params: dict) -> torch.Tensor:
        return logsigmoid(params["hurdle"])

    def log_kernel(self, x: torch.Tensor, params: dict) -> torch.Tensor:
        return logsigmoid(-params["hurdle"]) + super().log_kernel(x - 1, params)

    @staticmethod
    def log_pmf(x: np.ndarray, params: dict[str, np.ndarray]) -> np.ndarray:
        positive = special.log_expit(-params["hurdle"]) + Geometric.log_pmf(np.maximum(x - 1, 0), params)
        return np.where(x == 0, special.log_expit(params["hurdle"]), positive)


class ZeroInflatedGeometric(ZeroInflated):
    def __init__(self) -> None:
        self.base = Geometric()
        self.heads = (RATE, Head("gate", "logit of the probability of an excess zero"))

    @staticmethod
    def log_pmf(x: np.ndarray, params: dict[str, np.ndarray]) -> np.ndarray:
        kept = special.log_expit(-params["gate"]) + Geometric.log_pmf(x, params)
        return np.where(x == 0, np.logaddexp(special.log_expit(params["gate"]), kept), kept)


OWN = [Geometric(), Hurdle(), ZeroInflatedGeometric()]


@pytest.mark.parametrize("is_expected", [False, True])
@pytest.mark.parametrize("dispersion", DISPERSIONS)
@pytest.mark.parametrize("likelihood", OWN, ids=lambda likelihood: type(likelihood).__name__)
@every_pattern
def test_a_likelihood_without_declared_derivatives_is_summed_with_those_of_autograd(
    likelihood: Likelihood, dispersion: str, pattern: str, is_expected: bool
) -> None:
    problem = make_problem(likelihood, dispersion, PATTERNS[pattern])
    expected_gradient = make_expected_gradients(len(problem.x))["weighted"]
    value = problem.blocked(expected_gradient if is_expected else None, n_genes=3)
    params = {name: array(each) for name, each in problem.params().items()}
    np.testing.assert_allclose(array(value), likelihood.log_pmf(problem.x.numpy(), params).sum(1), **EXACT)
    with torch.no_grad():
        np.testing.assert_allclose(array(problem.blocked(n_genes=3)), array(value), **EXACT)
    assert_same(
        problem, gradients(problem, value, expected_gradient), gradients(problem, problem.dense(), expected_gradient)
    )


# -- whole modules -----------------------------------------------------------------------------------------------------

SIZES = Sizes(60, n_batch=3, n_categories=(2,), n_continuous=1)
#: What is declared in a way of its own; what all share is compared above, for every case.
OF_MODULES = [
    ("poisson", "gene"),
    ("nb", "gene"),
    ("nb", "gene-batch"),
    ("zinb", "gene-cell"),
    ("constrained_poisson", "gene"),
    ("bernoulli", "gene"),
    ("log_normal", "gene"),
    ("lomax", "gene-cell"),
    ("poisson above 2", "gene"),
]
KINDS = {"vae": VAE, "gmvae": GMVAE, "vade": VaDE}
#: Forms in which the counts of a batch are held.
FORMS = {"sparse": Counts.of, "dense": DenseCounts}
every_form = pytest.mark.parametrize("form", FORMS)
N_CELLS, N_SAMPLES, N_COMPONENTS, N_LATENT = 12, 2, 4, 3
TERMS = ("log_likelihood", "kl_z", "kl_y")
every_kind = pytest.mark.parametrize("kind", KINDS)


def make_module(kind: str, engine: str, dtype: torch.dtype = torch.float32, **options: object) -> VAE:
    """Every parameter moved and, if there is a mixture, components apart; the same numbers in any precision."""
    mixture = {} if kind == "vae" else {"n_components": N_COMPONENTS}
    with seeded(0):
        module = KINDS[kind](SIZES, n_latent=N_LATENT, n_hidden=16, engine=engine, **mixture, **options)
    module.block_entries = 500  # a few genes a block
    if mixture:
        weights, means = torch.tensor([0.4, 0.3, 0.2, 0.1]), normal(N_COMPONENTS, N_LATENT).float()
        module.set_mixture(weights, means, torch.eye(N_LATENT), torch.full((N_LATENT,), 0.2))
    with torch.no_grad():
        for seed, parameter in enumerate(p for p in module.parameters() if p.requires_grad and p.numel()):
            parameter.add_(0.2 * normal(*parameter.shape, seed=50 + seed).float())
    return module.to(dtype).train()


def named(likelihood: str) -> dict[str, object]:
    """Arguments of a module for a likelihood of the cases."""
    return dict(zip(("likelihood", "k_max"), PIECEWISE.get(likelihood, (likelihood,)), strict=False))


def make_cells(dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor, Covariates]:
    """Counts, size factors and covariates."""
    rng = np.random.default_rng(0)
    x = make_counts(N_CELLS, SIZES.n_genes, share=0.3).to(dtype)
    covariates = Covariates(
        torch.tensor(rng.integers(SIZES.n_batch, size=(N_CELLS, 1))),
        torch.tensor(rng.integers(SIZES.n_categories[0], size=(N_CELLS, 1))),
        torch.tensor(rng.normal(size=(N_CELLS, 1)), dtype=torch.float32).to(dtype),
    )
    return x, x.sum(1, keepdim=True), covariates


@pytest.fixture
def _shared_noise(monkeypatch: pytest.MonkeyPatch) -> None:
    """Draws of z with the same noise in every call and precision."""
    noise = normal(N_SAMPLES, N_COMPONENTS, N_CELLS, N_LATENT, seed=3).float()

    def sample_each(posterior: Posterior, n_samples: int) -> torch.Tensor:
        ours = noise[:n_samples, : len(posterior.mean)].to(posterior.mean)
        return posterior.mean + (0.5 * posterior.log_var).exp() * ours

    monkeypatch.setattr(Posterior, "sample_each", sample_each)


def bound_and_gradients(module: VAE, *, is_averaged: bool = False, form: str = "sparse") -> dict[str, torch.Tensor]:
    """Terms of the bound, and the gradients of its loss, by name."""
    x, *others = make_cells(module.z_mean.weight.dtype)
    bound = module.bound(FORMS[form](x), *others, n_samples=N_SAMPLES, is_averaged=is_averaged)
    bound.loss(kl_weight=0.7).backward()
    trained = {name: p.grad for name, p in module.named_parameters() if p.grad is not None and p.numel()}
    assert set(trained) >= {"encoder.gene_weight", "decoder.heads.log_rate.weight", "z_mean.weight"}
    return {term: getattr(bound, term) for term in TERMS} | trained


def assert_same_bounds(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert list(found) == list(expected)
    for name, value in found.items():
        assert_close(value, expected[name], name)


@pytest.mark.usefixtures("_shared_noise")
@pytest.mark.parametrize("is_averaged", [False, True])
@pytest.mark.parametrize(("name", "dispersion"), OF_MODULES)
@every_form
@every_kind
def test_the_engines_give_the_same_bound_and_gradients(
    kind: str, form: str, name: str, dispersion: str, is_averaged: bool
) -> None:
    """In float32, against the dense engine in float64: in float32 that one is as far off, by the same rounding."""
    options = {**named(name), "dispersion": dispersion, "encode_covariates": True}
    blocked, dense = make_module(kind, "blocked", **options), make_module(kind, "dense", torch.float64, **options)
    assert_same_bounds(bound_and_gradients(blocked, is_averaged=is_averaged, form=form), bound_and_gradients(dense))


@pytest.mark.usefixtures("_shared_noise")
@pytest.mark.parametrize(("name", "dispersion"), OF_MODULES)
@every_form
@every_kind
def test_the_engines_differ_by_nothing_but_rounding(kind: str, form: str, name: str, dispersion: str) -> None:
    """In float64. Tolerance: the series of the negative binomial, `STIRLING` of gradients of order 1."""
    modules = (
        make_module(kind, engine, torch.float64, dispersion=dispersion, **named(name))
        for engine in ("blocked", "dense")
    )
    blocked, dense = map(functools.partial(bound_and_gradients, form=form), modules)
    for term, value in blocked.items():
        np.testing.assert_allclose(array(value), array(dense[term]), rtol=1e-9, atol=SIZES.n_genes * STIRLING)


@pytest.mark.usefixtures("_shared_noise")
@pytest.mark.parametrize("scale", [30.0, 100.0, 1000.0])
@every_form
@every_likelihood
def test_probabilities_that_float32_can_hardly_hold_or_not_at_all_do_no_harm(
    name: str, form: str, scale: float
) -> None:
    """Of components far apart: down to numbers of few digits, and to 0."""
    exact, single = (
        make_module("gmvae", "blocked", dtype, likelihood=name) for dtype in (torch.float64, torch.float32)
    )
    for module in (exact, single):
        with torch.no_grad():
            module.y_logits.weight.mul_(scale)
    expected, found = (bound_and_gradients(module, is_averaged=True, form=form) for module in (exact, single))
    x, *others = make_cells()
    smallest = single.posterior(single.encode(FORMS[form](x), *others)).q_y.min()
    assert smallest < (1e-30 if scale > 30 else 1e-6)
    np.testing.assert_allclose(array(found["log_likelihood"]), array(expected["log_likelihood"]), rtol=1e-3)
    for key in ("decoder.heads.log_rate.weight", "z_mean.weight"):
        assert torch.isfinite(found[key]).all()


@pytest.mark.usefixtures("_shared_noise")
@every_likelihood
@every_kind
def test_an_expected_gradient_does_not_change_the_gradients_of_the_loss(kind: str, name: str) -> None:
    expected, unknown = (
        bound_and_gradients(make_module(kind, "blocked", likelihood=name), is_averaged=is_averaged)
        for is_averaged in (True, False)
    )
    assert_same_bounds(expected, unknown)


@pytest.mark.usefixtures("_shared_noise")
@every_kind
def test_the_loss_of_scvi_tools_may_be_scaled(kind: str) -> None:
    """As a scaler of gradients, or an average over steps, does."""
    module, scaled = (make_module(kind, "blocked") for _ in range(2))
    x, size, covariates = make_cells()
    tensors = {
        REGISTRY_KEYS.X_KEY: x,
        REGISTRY_KEYS.SIZE_FACTOR_KEY: size,
        REGISTRY_KEYS.BATCH_KEY: covariates.batch,
        REGISTRY_KEYS.CAT_COVS_KEY: covariates.categorical,
        REGISTRY_KEYS.CONT_COVS_KEY: covariates.continuous,
    }
    module.loss(tensors).loss.backward()
    (64 * scaled.loss(tensors).loss).backward()
    for parameter, ours in zip(module.parameters(), scaled.parameters(), strict=True):
        if parameter.grad is not None and parameter.numel():
            assert_close(ours.grad, 64 * parameter.grad)


def test_a_loss_that_is_no_average_is_refused_where_an_average_was_expected() -> None:
    bound = make_module("gmvae", "blocked").bound(*make_cells(), is_averaged=True)
    with pytest.raises(RuntimeError, match="must be the expected gradient"):
        (bound.log_likelihood * torch.arange(N_CELLS)).sum().backward()


@every_likelihood
@every_kind
def test_the_engines_give_the_same_importance_weighted_bound(kind: str, name: str) -> None:
    found, (x, *others) = [], make_cells()
    for engine, form in (("blocked", "sparse"), ("blocked", "dense"), ("dense", "sparse")):
        module = make_module(kind, engine, likelihood=name).eval()
        with seeded(3), torch.inference_mode():
            found.append(array(module.importance_weighted_bound(FORMS[form](x), *others, n_samples=7, chunk=3)))
    np.testing.assert_allclose(found[0], found[2], rtol=SINGLE)
    np.testing.assert_allclose(found[1], found[2], rtol=SINGLE)


@pytest.mark.usefixtures("_shared_noise")
@every_likelihood
@every_kind
def test_the_importance_weighted_objective_is_the_same_in_both_forms(kind: str, name: str) -> None:
    found, (x, *others) = [], make_cells(torch.float64)
    for form in FORMS:
        module = make_module(kind, "blocked", torch.float64, likelihood=name)
        bound = module.bound(FORMS[form](x), *others, n_samples=N_SAMPLES, importance_kl_weight=0.6)
        bound.loss().backward()
        found.append({"bound": bound.importance_weighted, "weight": module.decoder.heads.log_rate.weight.grad})
    for key, value in found[0].items():
        np.testing.assert_allclose(array(found[1][key]), array(value), rtol=1e-6, err_msg=key)  # of pairs left out


@every_kind
def test_rates_and_probabilities_are_the_same_in_both_forms(kind: str) -> None:
    module, (x, size, covariates) = make_module(kind, "blocked").eval(), make_cells()
    with torch.inference_mode():
        rates = [array(module.rate(form(x), size, covariates)) for form in FORMS.values()]
        posteriors = [module.posterior(module.encode(form(x), size, covariates)) for form in FORMS.values()]
        probabilities = [array(module.probabilities(posterior)) for posterior in posteriors]
    np.testing.assert_allclose(*rates, rtol=SINGLE)
    np.testing.assert_allclose(*probabilities, rtol=1e-4)


@pytest.mark.parametrize("engine", ["blocked", "dense"])
@every_likelihood
def test_counts_may_be_integers(name: str, engine: str) -> None:
    module, (x, size, covariates) = make_module("vae", engine, likelihood=name), make_cells()
    elbo = []
    for counts in (x, x.long()):
        with seeded(3):
            bound = module.bound(counts, size, covariates, is_averaged=True)
        bound.loss().backward()
        elbo.append(array(bound.elbo))
    np.testing.assert_allclose(*elbo, rtol=1e-6)  # a few times the rounding of float32


@pytest.mark.parametrize("mixture", [False, "gmvae", "vade"])
def test_the_engines_train_the_same_model(mixture: bool | str) -> None:
    """Tolerance: Adam divides by the size of gradients, also of those near 0, where rounding shows."""
    adata = svt.datasets.simulate(100, 40, 3, n_batches=2, random_state=0)
    svt.SCVAE.setup_anndata(adata, batch_key="batch")
    options = {} if mixture is False else {"n_components": 3}
    histories = []
    for engine in ("blocked", "dense"):
        model = svt.SCVAE(adata, mixture=mixture, engine=engine, n_latent=3, n_hidden=16, **options)
        model.module.block_entries = 200
        model.train(4, batch_size=32, progress=False)
        histories.append(model.history_[["elbo_train", "elbo_validation"]].to_numpy())
    np.testing.assert_allclose(*histories, rtol=1e-3)
