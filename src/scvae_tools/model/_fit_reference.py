"""How well held-out cells fit a model, by component and total count, and p-values of other cells against these.

Arrays are of n cells: ``scores`` (n, 2), log p(x|z) and log p(z) in nats; ``total`` (n,), the total count;
``component`` (n,), the position of the most probable component among the k of the model.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Self

import numpy as np

#: Most cells of a reference.
N_REFERENCE = 2000
#: Reference cells of a component from which on its cells are compared with these alone: p-values down to 1 %.
ENOUGH = 100
#: Parts of the reference, each of which is standardised by a fit to the others.
N_PARTS = 10
#: Cells for which counts what is known of a component before: hardly any of its level, more of its slope and spread.
PRIOR_OF_LEVEL, PRIOR_OF_SLOPE, PRIOR_OF_SPREAD = 0.01, 1.0, 20.0
#: Units of spread from which on a residual pulls with a constant force (Huber's estimator), and steps to find it.
LARGE, N_STEPS = 1.5, 6
#: Standard deviation of a Gaussian over its median absolute deviation.
OF_GAUSSIAN = 1.4826


@dataclass(frozen=True)
class Expected:
    """Score that is expected of a cell by its component and total count, and its spread.

    With u = log total − ``center``, the score of a cell of component y is level_y + f + slope_y (f − mean) / sd. f is a
    combination of exp(u / 4), exp(u / 2) and exp(u), with this mean and standard deviation over the cells. The spread
    is spread_y exp(power u).

    Parameters
    ----------
    center, power
        Mean log total count; growth of the spread, of no unit.
    curve
        Coefficients of exp(u / 4), exp(u / 2) and exp(u) in f, in nats, (3,).
    moments
        Mean and standard deviation of f, in nats, (2,).
    level, slope, spread
        Of each component, in nats, (k,).
    """

    center: float
    power: float
    curve: np.ndarray
    moments: np.ndarray
    level: np.ndarray
    slope: np.ndarray
    spread: np.ndarray

    @classmethod
    def of(cls, score: np.ndarray, total: np.ndarray, component: np.ndarray, n_components: int) -> Self:
        """Fit to the scores (n,) of cells, of which few that fit badly change little."""
        center = float(np.log(total).mean())
        u = np.log(total) - center
        is_of = (component[:, None] == np.arange(n_components)).astype(float)  # (n, k)
        basis = _basis(u)
        directions = _directions(basis - basis.mean(0))  # (3, r)
        weight, power, scaled, spread = np.ones(len(u)), 0.0, score, 1.0
        for _ in range(N_STEPS):
            middle = np.average(score, weights=weight)
            curve = directions @ _common(basis @ directions, is_of, score - middle, weight)
            common = basis @ curve
            moments = np.array([common.mean(), common.std() or 1.0])
            level, slope = _by_component(score - common - middle, (common - moments[0]) / moments[1], is_of, weight)
            level = level + middle
            own = level[component] + slope[component] * (common - moments[0]) / moments[1]
            residual = score - common - own
            power = _growth(residual, u)
            scaled = residual * np.exp(-power * u)
            spread = _spread(scaled)
            weight = LARGE * spread / np.maximum(np.abs(scaled), LARGE * spread) * np.exp(-2 * power * u)
            weight = weight / weight.mean()
        return cls(center, power, curve, moments, level, slope, _spread_by_component(scaled, is_of, spread))

    def standardized(self, score: np.ndarray, total: np.ndarray, component: np.ndarray) -> np.ndarray:
        """Scores (n,) less what is expected, in units of the spread."""
        u = np.log(total) - self.center
        common = _basis(u) @ self.curve
        own = self.level[component] + self.slope[component] * (common - self.moments[0]) / self.moments[1]
        return (score - common - own) / (self.spread[component] * np.exp(self.power * u))


@dataclass(frozen=True)
class FitReference:
    """What cells of the training data that were held out score, to compare other cells with.

    A cell's fit has two parts, each standardised by `Expected`: how well its counts fit its latent code, and how well
    the code fits the prior. They are added up after that, since the noise of the first, in nats, hides the second.

    Parameters
    ----------
    expected
        Of log p(x|z) and of log p(z).
    residuals
        Sums of the two standardised scores of the reference cells of each component, in ascending order.
    """

    expected: tuple[Expected, Expected]
    residuals: tuple[np.ndarray, ...]

    @classmethod
    def of(cls, scores: np.ndarray, total: np.ndarray, component: np.ndarray, n_components: int) -> Self:
        """Reference of the cells with finite scores, of which there must be one.

        Each cell is standardised by a fit to others, as a new cell will be; otherwise the few cells of a small
        component would seem to fit better than new ones.
        """
        finite = np.isfinite(scores).all(1)
        scores, total, component = scores[finite], total[finite], component[finite]
        part = np.empty(len(total), dtype=int)
        part[np.lexsort((total, component))] = np.arange(len(total)) % N_PARTS  # alike in components and totals
        residual = np.zeros(len(total))
        for own in (part == each for each in np.unique(part)):
            others = ~own if len(total) > own.sum() else own
            for score in scores.T:
                expected = Expected.of(score[others], total[others], component[others], n_components)
                residual[own] += expected.standardized(score[own], total[own], component[own])
        residual = residual.round(4)  # as it is saved
        return cls(
            tuple(Expected.of(score, total, component, n_components) for score in scores.T),
            tuple(np.sort(residual[component == each]) for each in range(n_components)),
        )

    @property
    def n_cells(self) -> int:
        """Number of reference cells."""
        return sum(map(len, self.residuals))

    def p_values(self, scores: np.ndarray, total: np.ndarray, component: np.ndarray) -> np.ndarray:
        """Share of the reference cells, the cell itself among them, that fit as badly as each cell, (n,)."""
        parts = (each.standardized(scores[:, i], total, component) for i, each in enumerate(self.expected))
        residual = sum(parts)
        residual = np.where(np.isnan(residual), -np.inf, residual)
        everywhere, found = np.sort(np.concatenate(self.residuals)), np.empty(len(total))
        for each, own in enumerate(self.residuals):
            is_own = component == each
            reference = own if len(own) >= ENOUGH else everywhere
            n_below = np.searchsorted(reference, residual[is_own], side="right")
            found[is_own] = (1 + n_below) / (1 + len(reference))
        return found

    def to_plain(self) -> dict[str, Any]:
        """Contents as containers of arrays and numbers."""
        return {"expected": list(map(asdict, self.expected)), "residuals": list(self.residuals)}

    @classmethod
    def from_plain(cls, saved: dict[str, Any], n_components: int) -> Self:
        """Reference that `to_plain` wrote, for a model with so many components.

        Raises
        ------
        ValueError, KeyError, TypeError
            If it is something else.
        """
        of_counts, of_code = Expected(**saved["expected"][0]), Expected(**saved["expected"][1])
        residuals = tuple(np.sort(np.asarray(each, dtype=float)) for each in saved["residuals"])
        for each in (of_counts, of_code):
            shapes = [np.shape(value) for value in asdict(each).values()]
            if shapes != [(), (), (3,), (2,), *[(n_components,)] * 3]:
                raise ValueError(f"Arrays of the shapes {shapes} are of no model with {n_components} components.")
        if len(residuals) != n_components or not sum(map(len, residuals)):
            raise ValueError(f"{len(residuals)} components with reference cells, where the model has {n_components}.")
        return cls((of_counts, of_code), residuals)


def drawn_evenly(component: np.ndarray, n_cells: int, random_state: int) -> np.ndarray:
    """Positions of at most ``n_cells`` cells in ascending order, as equally many of each component as there are."""
    order = np.random.default_rng(random_state).permutation(len(component))
    by_component = np.argsort(component[order], kind="stable")
    sizes = np.unique(component, return_counts=True)[1]
    turn = np.empty(len(component), dtype=int)  # 0 for the first cell of each component, 1 for its second, ...
    turn[order[by_component]] = np.concatenate([np.arange(size) for size in sizes])
    return np.sort(order[np.argsort(turn[order], kind="stable")][:n_cells])


def _basis(u: np.ndarray) -> np.ndarray:
    """Functions of u (n,), powers of the total count, (n, 3): log p(x) falls more slowly than it, and to 0 with it."""
    return np.exp(u[:, None] * np.array([0.25, 0.5, 1.0]))


def _directions(centered: np.ndarray) -> np.ndarray:
    """Combinations of the functions, uncorrelated and of variance 1 over the cells, (3, r); none of few cells."""
    if len(centered) < 2 * N_PARTS:
        return np.zeros((3, 0))
    _, size, rows = np.linalg.svd(centered, full_matrices=False)
    kept = size > 1e-6 * np.sqrt(len(centered))
    return rows[kept].T / size[kept] * np.sqrt(len(centered))


def _common(uncorrelated: np.ndarray, is_of: np.ndarray, score: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """Coefficients of the combinations where components differ in their level alone, (r,)."""
    columns = np.hstack([uncorrelated, is_of])
    prior = np.diag(np.full(columns.shape[1], PRIOR_OF_LEVEL))
    normal = (columns * weight[:, None]).T
    return np.linalg.solve(normal @ columns + prior, normal @ score)[: uncorrelated.shape[1]]


def _by_component(
    score: np.ndarray, common: np.ndarray, is_of: np.ndarray, weight: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Level and slope of each component, (k,) each, of scores less what is common."""
    one = np.ones(len(score))
    products = np.stack([one, common, common**2, score, score * common], axis=1)
    n, x, xx, y, xy = ((is_of * weight[:, None]).T @ products).T  # sums over the cells of each component
    n, xx = n + PRIOR_OF_LEVEL, xx + PRIOR_OF_SLOPE
    determinant = n * xx - x**2
    return (xx * y - x * xy) / determinant, (n * xy - x * y) / determinant


def _spread(residual: np.ndarray) -> float:
    """Robust standard deviation; 1 where there is none."""
    return OF_GAUSSIAN * float(np.median(np.abs(residual - np.median(residual)))) or 1.0


def _growth(residual: np.ndarray, u: np.ndarray) -> float:
    """Exponent by which the spread grows with the total count, from the shallower and the deeper half of the cells."""
    order = np.argsort(u, kind="stable")
    shallow, deep = order[: len(u) // 2], order[len(u) // 2 :]
    if len(u) < 2 * N_PARTS or u[deep].mean() <= u[shallow].mean():
        return 0.0
    return float(np.log(_spread(residual[deep]) / _spread(residual[shallow])) / (u[deep].mean() - u[shallow].mean()))


def _spread_by_component(residual: np.ndarray, is_of: np.ndarray, spread: float) -> np.ndarray:
    """Spread of each component, (k,): near that of all where its cells are few, wider as its level is not known."""
    n = is_of.sum(0)
    own = np.array([_spread(residual[each]) if each.sum() > 3 else spread for each in is_of.T.astype(bool)])
    shared = np.exp((n * np.log(own) + PRIOR_OF_SPREAD * np.log(spread)) / (n + PRIOR_OF_SPREAD))
    return shared * np.sqrt(1 + 1 / (n + PRIOR_OF_LEVEL))
