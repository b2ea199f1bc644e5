"""Test for a valley of the density between two parts of a latent space: without one, they are one part.

Two clusters of a mixture overlap where they are pieces of one population, yet a gradient, or a population with a heavy
tail, can be cut into pieces that overlap little. Such pieces have no valley between them. The test is that of Hartigan
and Hartigan (1985, doi:10.1214/aos/1176346577): the dip, by which a sample deviates from all distributions with one
mode, against that of a uniform sample, for which it is largest.
"""

from __future__ import annotations

import functools
import itertools

import numpy as np

#: Folds over which the discriminant is fitted to other cells than those that it projects.
N_FOLDS = 5
#: Densities, relative to that of a uniform distribution, at which excess mass is compared.
LEVELS = np.geomspace(0.1, 8.0, 96)
#: Sizes and number of the uniform samples with which a dip is compared. √n times the dip hardly depends on n.
NULL_SIZES, N_NULLS = (8, 16, 32, 64, 128), 2_000
#: Share of these, the largest, to which the tail of their distribution is fitted, by which smaller p values are told.
TAIL = 0.05
#: Smallest number of points on each side of a split with which it can be tested.
FEWEST_POINTS = 4
#: Points of a rare set that are tested at most, since the dip takes memory for each at all `LEVELS`; and of the set
#: beside it, those to which a discriminant is fitted at most: mean and covariance need no more.
MOST_RARE, LARGEST_FIT = 2_000, 20_000
#: Points of each two of many parts that are tested at least; the more parts, the fewer, as the pairs are many.
LEAST_OF_MANY = 200


def dip(points: np.ndarray) -> float:
    """Dip of a sample (n,): the least distance between its distribution function and one with a single mode.

    Computed as half of the excess mass of two modes over one (Müller and Sawitzki 1991, doi:10.1080/01621459.1991.
    10475103): the excess mass at a density λ is the largest Σ P(I) − λ |I| over so many intervals I.
    """
    points = np.sort(np.asarray(points, dtype=np.float64))
    width = points[-1] - points[0]
    if width == 0:
        return 0.0
    gaps = np.diff(points) / width  # (n − 1,)
    # Steps of P(I) − λ|I| over the points and the gaps between them in turn, for all λ at once, (levels, 2n − 1).
    steps = np.empty((len(LEVELS), 2 * len(points) - 1))
    steps[:, ::2] = 1 / len(points)
    steps[:, 1::2] = -LEVELS[:, None] * gaps
    before = np.maximum.accumulate(_best_ending(steps), axis=1)  # best interval up to each step
    after = np.maximum.accumulate(_best_ending(steps[:, ::-1]), axis=1)[:, ::-1]
    two = np.maximum(before[:, -1], (before[:, :-1] + after[:, 1:]).max(1))
    return 0.5 * float((two - before[:, -1]).max())


def _best_ending(steps: np.ndarray) -> np.ndarray:
    """Largest sum of steps that end at each position, (levels, m)."""
    total = np.cumsum(steps, axis=1)
    lowest = np.minimum.accumulate(np.concatenate([np.zeros((len(steps), 1)), total[:, :-1]], axis=1), axis=1)
    return total - lowest


@functools.cache
def _null_dips(n_points: int) -> np.ndarray:
    """√n times the dips of uniform samples, ascending, (N_NULLS,)."""
    rng = np.random.default_rng(n_points)
    return np.sort([np.sqrt(n_points) * dip(rng.uniform(size=n_points)) for _ in range(N_NULLS)])


def p_value_of_one_mode(points: np.ndarray) -> float:
    """Probability of at least this dip in a uniform sample of as many points; small where there are several modes.

    Above nearly all dips of uniform samples it is extrapolated: √n times the dip tends to the supremum of a Gaussian
    process (Hartigan and Hartigan 1985), whose square has an exponential tail.
    """
    size = next((size for size in reversed(NULL_SIZES) if size <= len(points)), NULL_SIZES[0])
    null, value = _null_dips(size), np.sqrt(len(points)) * dip(points)
    n_larger = len(null) - int(np.searchsorted(null, value))
    n_of_tail = round(TAIL * len(null))
    if n_larger >= n_of_tail:
        return (1 + n_larger) / (1 + len(null))
    tail, start = null[-n_of_tail:] ** 2, null[-n_of_tail - 1] ** 2
    return (1 + n_of_tail) / (1 + len(null)) * float(np.exp(-(value**2 - start) / (tail - start).mean()))


def p_value_of_split(first: np.ndarray, second: np.ndarray, rng: np.random.Generator) -> float:
    """Probability that two sets of points are one population, by a test for a valley between them.

    Points are projected on the linear discriminant of the points of other folds, so that no point has a part in the
    direction along which it is tested. Of the larger side only as many points are used as the smaller has, those
    nearest to the border: the rest would hide the valley before a small cluster.

    Parameters
    ----------
    first, second
        Points (n, d) and (m, d).
    rng
        Draws the folds.

    Returns
    -------
    The p value; 1 where a side has too few points to be tested.
    """
    points = np.concatenate([first, second])
    is_second = np.arange(len(points)) >= len(first)
    fold = rng.permutation(len(points)) % N_FOLDS
    score = np.empty(len(points))
    for each in range(N_FOLDS):
        others = fold != each
        if min(is_second[others].sum(), (~is_second[others]).sum()) < 2:
            return 1.0
        slope, offset = _discriminant(points[others], is_second[others])
        score[fold == each] = points[fold == each] @ slope + offset
    return _p_value_at_border(score)


def p_value_of_rare(
    rare: np.ndarray, others: np.ndarray, rng: np.random.Generator, *, most: int | None = None
) -> float:
    """Probability that a rare set of points and another are one population, as `p_value_of_split`.

    The other set may be so large that the discriminants are fitted to a part of it. But all its points are projected,
    since those next to the rare set are few.

    Parameters
    ----------
    rare, others
        Points (n, d) and (m, d).
    rng
        Draws the folds and the parts.
    most
        Of more rare points a part is taken, and as large a part of the others; None for `MOST_RARE`.
    """
    most = MOST_RARE if most is None else most
    if len(rare) > most:
        others = others[rng.random(len(others)) < most / len(rare)]
        rare = rare[rng.choice(len(rare), most, replace=False)]
    if min(len(rare), len(others)) < FEWEST_POINTS:
        return 1.0
    fold_of_rare, fold = rng.permutation(len(rare)) % N_FOLDS, rng.permutation(len(others)) % N_FOLDS
    fitted = rng.choice(len(others), min(len(others), LARGEST_FIT), replace=False)
    scores = []
    for each in range(N_FOLDS):
        first, second = others[fitted[fold[fitted] != each]], rare[fold_of_rare != each]
        if min(len(first), len(second)) < 2:
            return 1.0
        is_second = np.arange(len(first) + len(second)) >= len(first)
        slope, offset = _discriminant(np.concatenate([first, second]), is_second)
        offset -= np.log(len(others) / len(fitted))  # the share of the rare set among all
        scores += [points @ slope + offset for points in (others[fold == each], rare[fold_of_rare == each])]
    return _p_value_at_border(np.concatenate(scores), most)


def _p_value_at_border(score: np.ndarray, most: int | None = None) -> float:
    """P value of one mode for the scores (n,) nearest to 0, as many above it as below, ``most`` of them each."""
    below, above = np.sort(-score[score < 0]), np.sort(score[score >= 0])  # both by the distance from the border
    n = min(len(below), len(above), most or len(score))
    if n < FEWEST_POINTS:
        return 1.0
    return p_value_of_one_mode(np.concatenate([-below[:n], above[:n]]))


def _discriminant(points: np.ndarray, is_second: np.ndarray) -> tuple[np.ndarray, float]:
    """Slope (d,) and offset of the log odds of the second set, from normal distributions with one covariance."""
    means = [points[own].mean(0) for own in (~is_second, is_second)]
    residual = points - np.where(is_second[:, None], means[1], means[0])
    covariance = residual.T @ residual / len(points)
    covariance += 1e-6 * max(np.trace(covariance), 1e-6) / len(covariance) * np.eye(len(covariance))
    slope = np.linalg.solve(covariance, means[1] - means[0])
    share = is_second.mean()
    return slope, float(np.log(share / (1 - share)) - slope @ (means[0] + means[1]) / 2)


def merge_without_valley(
    points: np.ndarray, label: np.ndarray, *, fewest: int, alpha: float, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Merge parts of a partition until there is a valley between each two, or ``fewest`` are left.

    The two with the largest p value are merged first.

    Parameters
    ----------
    points, label
        Points (n, d) and their parts, 0, 1, ..., (n,).
    fewest
        Number of parts that must be left.
    alpha
        Probability that a partition of one population stays cut, at most: two of k parts stay apart where their p value
        is at most alpha / (k − 1), for the k − 1 splits of which k parts come.
    rng
        Draws the folds of the tests.

    Returns
    -------
    Parts 0, 1, ... of the points, (n,), and the p values of each two, (k, k), as of `p_values_of_parts`.
    """
    parts = {int(each): points[label == each] for each in np.unique(label)}
    known: dict[tuple[int, int], float] = {}
    label = label.copy()
    while len(parts) > max(1, fewest):
        for pair in ((i, j) for i in parts for j in parts if i < j):
            if pair not in known:
                known[pair] = p_value_of_split(parts[pair[0]], parts[pair[1]], rng)
        first, second = max(known, key=known.get)
        if known[first, second] <= alpha / (len(parts) - 1):
            break
        label[label == second] = first
        parts[first] = np.concatenate([parts[first], parts.pop(second)])
        known = {pair: value for pair, value in known.items() if not {first, second} & set(pair)}
    names, label = np.unique(label, return_inverse=True)
    p_values = np.ones((len(names), len(names)))
    for i, j in itertools.combinations(range(len(names)), 2):
        pair = int(names[i]), int(names[j])
        if pair not in known:  # merging ended at the fewest parts
            known[pair] = p_value_of_split(parts[pair[0]], parts[pair[1]], rng)
        p_values[i, j] = p_values[j, i] = known[pair]
    return label.reshape(-1), p_values


def p_values_of_parts(points: np.ndarray, label: np.ndarray, n_parts: int, rng: np.random.Generator) -> np.ndarray:
    """Probability of each two parts of a partition that they are one population, by the test for a valley between them.

    Parameters
    ----------
    points, label
        Points (n, d) and their parts, 0, 1, ..., (n,).
    n_parts
        Number of parts, k.
    rng
        Draws the folds of the tests.

    Returns
    -------
    p values, (k, k), 1 on the diagonal and where a part has too few points to be tested.
    """
    parts = [points[label == each] for each in range(n_parts)]
    most = min(MOST_RARE, max(LEAST_OF_MANY, LARGEST_FIT // n_parts))
    p_values = np.ones((n_parts, n_parts))
    for i, j in itertools.combinations(range(n_parts), 2):
        rare, other = sorted((parts[i], parts[j]), key=len)
        p_values[i, j] = p_values[j, i] = p_value_of_rare(rare, other, rng, most=most)
    return p_values
