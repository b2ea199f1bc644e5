"""Gaussian mixtures with one covariance for all components, fitted many at once to the same points, on any device.

k-means from a k-means++ start, then expectation maximisation (EM). The steps, the stopping rules and the random numbers
are those of scikit-learn's ``GaussianMixture(covariance_type="tied")``, and so are the results. But all fits are one
batch of matrix products, which a GPU finishes in the time of one. Everything is in float64.

Symbols: r fits, k components, n points, d dimensions.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch import Tensor

from scvae_tools._module.bounds import LOG_2PI

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

#: Stopping rules of scikit-learn: of k-means, its steps and the shift of the centres as a share of the variance; of EM,
#: its steps, the gain of log-likelihood in nats per point, and the number that is added to each variance.
K_MEANS_STEPS, K_MEANS_TOLERANCE = 300, 1e-4
EM_STEPS, EM_TOLERANCE, ADDED_VARIANCE = 100, 1e-3, 1e-6
#: Entries of a matrix, fits x components x points, by kind of device. On the CPU a few such matrices fit into the
#: cache. On other devices the limit is memory.
ENTRIES = {"cpu": 2**19}
ENTRIES_ELSEWHERE = 2**25
#: Points whose probabilities are in memory at a time where there may be a million.
POINTS_AT_ONCE = 2**15


class TiedMixtures(NamedTuple):
    """Gaussian mixtures, each with one covariance."""

    weights: Tensor  # (r, k)
    means: Tensor  # (r, k, d)
    covariance: Tensor  # (r, d, d)

    def log_joint(self, points: Tensor) -> Tensor:
        """Log π_k N(z; μ_k, Σ) of points (n, d), (r, k, n)."""
        factor = torch.linalg.cholesky(self.covariance)
        whitened = torch.linalg.solve_triangular(factor, points.T, upper=False)  # (r, d, n)
        centres = torch.linalg.solve_triangular(factor, self.means.mT, upper=False)  # (r, d, k)
        # −½‖a − b‖² as a·b − ½‖a‖² − ½‖b‖²
        own = -0.5 * (whitened.square().sum(1, keepdim=True) + len(factor[0]) * LOG_2PI)
        own = own - torch.diagonal(factor, dim1=1, dim2=2).log().sum(1)[:, None, None]
        each = self.weights.log() - 0.5 * centres.square().sum(1)
        return torch.baddbmm(own + each[..., None], centres.mT, whitened)


def fit_tied_mixtures(points: Tensor, n_components: int, seeds: Sequence[int]) -> Tensor:
    """Fit one mixture for each seed, and return the probabilities of its components, (r, k, n).

    Parameters
    ----------
    points
        (n, d), float64. At least as many as components.
    n_components
        k.
    seeds
        Seed of each fit, as ``random_state`` of ``sklearn.mixture.GaussianMixture``.

    Raises
    ------
    ValueError
        If there are more components than points.
    """
    if len(points) < n_components:
        raise ValueError(f"A mixture needs a point for each component; found {len(points)} for {n_components}.")
    points = points - points.mean(0)  # no result depends on the origin, but rounding errors do
    return _maximize(points, k_means(points, n_components, seeds), n_components)


def n_fits_at_once(points: Tensor, n_components: int) -> int:
    """Number of fits to points (n, d) that are best computed together on their device."""
    entries = ENTRIES.get(points.device.type, ENTRIES_ELSEWHERE)
    return max(1, entries // (n_components * len(points)))


def _maximize(points: Tensor, label: Tensor, n_components: int) -> Tensor:
    """Probabilities of the components after EM from partitions (r, n), (r, k, n)."""
    mixtures = _of_probabilities(points, one_hot(label, n_components))
    goes_on, former = torch.arange(len(label), device=label.device), points.new_full((len(label),), -torch.inf)
    for _ in range(EM_STEPS):
        probs, log_density = _expect(points, TiedMixtures(*(each[goes_on] for each in mixtures)))
        for each, new in zip(mixtures, _of_probabilities(points, probs), strict=True):
            each[goes_on] = new
        is_done = (log_density - former).abs() < EM_TOLERANCE
        goes_on, former = goes_on[~is_done], log_density[~is_done]
        if len(goes_on) == 0:
            break
    return _expect(points, mixtures)[0]


def _expect(points: Tensor, mixtures: TiedMixtures) -> tuple[Tensor, Tensor]:
    """Probabilities of the components, (r, k, n), and mean log density of the points, (r,)."""
    log_joint = mixtures.log_joint(points)
    log_density = log_joint.logsumexp(1, keepdim=True)
    return log_joint.sub_(log_density).exp_(), log_density.mean((1, 2))


def _of_probabilities(points: Tensor, probs: Tensor) -> TiedMixtures:
    """Mixtures of the largest likelihood for given probabilities of the components (r, k, n)."""
    size = probs.sum(2) + 10 * torch.finfo(probs.dtype).eps
    means = (probs @ points) / size[..., None]
    covariance = points.T @ points - (size[..., None] * means).mT @ means
    total = size.sum(1, keepdim=True)
    added = ADDED_VARIANCE * torch.eye(points.shape[1], dtype=points.dtype, device=points.device)
    return TiedMixtures(size / total, means, covariance / total[..., None] + added)


def k_means(points: Tensor, n_components: int, seeds: Sequence[int]) -> Tensor:
    """Partition the points by k-means, once for each seed, (r, n)."""
    centres = _spread_centres(points, n_components, seeds)
    tolerance = K_MEANS_TOLERANCE * points.var(0, correction=0).mean()
    label = torch.full((len(centres), len(points)), -1, device=points.device)
    goes_on = torch.arange(len(centres), device=points.device)
    is_final = torch.zeros(len(centres), dtype=torch.bool, device=points.device)
    for _ in range(K_MEANS_STEPS):
        nearest, former = _nearest(points, centres[goes_on]), centres[goes_on]
        new = _centres(points, nearest, former)
        is_same = (nearest == label[goes_on]).all(1)
        centres[goes_on], label[goes_on], is_final[goes_on] = new, nearest, is_same
        is_done = is_same | ((new - former).square().sum((1, 2)) <= tolerance)
        goes_on = goes_on[~is_done]
        if len(goes_on) == 0:
            break
    # Where the centres still moved in the last step, the partition is of the centres before it.
    return torch.where(is_final[:, None], label, _nearest(points, centres))


def _spread_centres(points: Tensor, n_components: int, seeds: Sequence[int]) -> Tensor:
    """Centres from which k-means starts, (r, k, d): k-means++ with several trials (Arthur & Vassilvitskii 2007)."""
    n, n_trials = len(points), 2 + int(np.log(n_components))
    streams = [np.random.RandomState(seed) for seed in seeds]
    chosen = torch.tensor([[stream.choice(n, p=np.full(n, 1 / n))] for stream in streams], device=points.device)
    draws = np.stack([stream.uniform(size=(n_components - 1, n_trials)) for stream in streams], axis=1)
    draws = torch.as_tensor(draws, device=points.device)
    square, fit = points.square().sum(1), torch.arange(len(streams), device=points.device)
    distance = _squared_distances(points, square, chosen)[:, 0]  # to the nearest centre so far, (r, n)
    for draw in draws:
        share = distance.cumsum(1)
        trial = torch.searchsorted(share, draw * distance.sum(1, keepdim=True)).clamp_(max=n - 1)
        with_trial = torch.minimum(distance[:, None], _squared_distances(points, square, trial))  # (r, trials, n)
        best = with_trial.sum(2).argmin(1)
        distance = with_trial[fit, best]
        chosen = torch.cat([chosen, trial[fit, best, None]], dim=1)
    return points[chosen]


def _squared_distances(points: Tensor, square: Tensor, positions: Tensor) -> Tensor:
    """Squared distances between points at some positions (r, m) and all points, (r, m, n)."""
    products = points[positions] @ points.T
    return (square[positions][..., None] + square - 2 * products).clamp_(min=0)


def _nearest(points: Tensor, centres: Tensor) -> Tensor:
    """Nearest of the centres (r, k, d) of each point, (r, n)."""
    half_square = 0.5 * centres.square().sum(2, keepdim=True)
    return (centres @ points.T).sub_(half_square).max(1).indices  # on the CPU faster than argmax


def _centres(points: Tensor, label: Tensor, former: Tensor) -> Tensor:
    """Means of the parts of each partition (r, n), (r, k, d); an empty part begins anew at the point farthest away."""
    parts = one_hot(label, former.shape[1])
    size, total = parts.sum(2), parts @ points
    for fit in (size == 0).any(1).nonzero()[:, 0].tolist():
        empty = (size[fit] == 0).nonzero()[:, 0]
        distance = (points - former[fit, label[fit]]).square().sum(1)
        farthest = distance.topk(len(empty)).indices
        if distance.max() > 0:
            total[fit].index_add_(0, label[fit, farthest], points[farthest], alpha=-1)
            size[fit].index_add_(0, label[fit, farthest], torch.ones_like(farthest, dtype=size.dtype), alpha=-1)
            total[fit, empty], size[fit, empty] = points[farthest], 1.0
    return torch.where(size[..., None] > 0, total / size[..., None].clamp(min=1), former)


def one_hot(label: Tensor, n_components: int) -> Tensor:
    """Indicator of the part of each point for partitions (r, n), (r, k, n), in float64."""
    parts = torch.zeros(len(label), n_components, label.shape[1], dtype=torch.float64, device=label.device)
    return parts.scatter_(1, label[:, None], 1.0)


def of_partition(points: Tensor, label: Tensor, n_components: int) -> TiedMixtures:
    """Weights, means and covariance of a partition (n,), whose labels are 0, 1, ..., k − 1."""
    size, total = points.new_zeros(n_components), points.new_zeros(n_components, points.shape[1])
    for part in parts(len(points)):
        members = one_hot(label[None, part].long(), n_components)[0]  # (k, n)
        size += members.sum(1)
        total += members @ points[part]
    # A component without cells starts as a rare one in the middle of all.
    means = torch.where(size[:, None] > 0, total / size[:, None].clamp(min=1), points.mean(0))
    covariance = points.new_zeros(points.shape[1], points.shape[1])
    for part in parts(len(points)):
        residual = points[part] - means[label[part].long()]
        covariance += residual.T @ residual
    covariance /= len(points)
    # A direction in which no cell differs must not make the matrix singular.
    identity = torch.eye(len(covariance), dtype=covariance.dtype, device=covariance.device)
    covariance += identity * 1e-6 * covariance.trace().clamp(min=1e-6) / len(covariance)
    weights = size.clamp(min=0.5)
    return TiedMixtures((weights / weights.sum())[None], means[None], covariance[None])


def most_probable(points: Tensor, mixture: TiedMixtures) -> Tensor:
    """Most probable component of each point, (n,)."""
    return torch.cat([mixture.log_joint(points[part])[0].max(0).indices for part in parts(len(points))])


def parts(n_points: int) -> Iterator[slice]:
    """Slices of at most `POINTS_AT_ONCE` points."""
    for start in range(0, max(n_points, 1), POINTS_AT_ONCE):
        yield slice(start, start + POINTS_AT_ONCE)
