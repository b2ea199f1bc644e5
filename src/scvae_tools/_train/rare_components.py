"""Rare components: those of types of which a uniform sample of the cells holds too few.

Of a type of 0.1 % a sample of 10,000 cells holds ten. So once the components of such a sample are known, a second
sample is drawn that favours cells far from the centre of their component: the chance of a cell is inversely
proportional to its rank by that distance, so that each doubling of the rank has the same share of the sample, and a
small group has many cells in it wherever it lies. There the components stay as they are, and further ones are sought
beside them. A further component is kept if it is as apart as any component must be: by its overlap, for which each cell
counts as often as the cells that it stands for, and by a valley of the density, among all cells. And it must be
compact, as scattered outliers are not.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch import Tensor

from scvae_tools._results.probabilities import LARGEST_OVERLAP
from scvae_tools._train.modes import p_value_of_rare
from scvae_tools._train.overlaps import overlap_with, overlaps, terms
from scvae_tools._train.tied_mixtures import TiedMixtures, fit_tied_mixtures, most_probable, parts

if TYPE_CHECKING:
    from collections.abc import Iterator

#: Cells of the sample, on average.
SAMPLE_SIZE = 10_000
#: Mixtures that are fitted to it, and their components beyond the number that is known. One mixture finds a rare type
#: in most cases; more components than this are pieces of tails, between which rare types get lost.
N_FITS, N_FURTHER = 4, 20
#: Steps in which the further components are fitted beside the known ones.
EM_STEPS = 15
#: Neighbours, closer than two cells of one type are on average, that a cell of the sample needs to have a part in the
#: fits. Scattered outliers, which have fewer, would take all further components.
FEWEST_NEIGHBOURS = 5
#: Distances between cells of the sample that are in memory at a time.
DISTANCES_AT_ONCE = 2**20
#: Cells of a rare component. Fewer say little in the test of valleys, and in ten dimensions a few cells always seem to
#: be a group.
FEWEST_CELLS = 50
#: Median squared distance of the cells of a rare component from its centre, by the covariance of all components, as a
#: multiple of what this covariance explains. Scattered outliers have ten times that or more.
LARGEST_SPREAD = 4.0


class Sample(NamedTuple):
    """Cells drawn with unequal chances, in coordinates in which the covariance of the components is 1."""

    points: Tensor  # (n, d)
    weight: Tensor  # (n,), number of cells that each stands for


class Partition(NamedTuple):
    """Components that are known so far, and the cells of each."""

    mixture: TiedMixtures
    label: Tensor  # (n_cells,)
    log_joint: Tensor  # (n_cells,), log π_k N(z; μ_k, Σ) of the component of each cell


def with_rare_components(
    latent: Tensor, mixture: TiedMixtures, *, fewest: int, most: int, alpha: float, rng: np.random.Generator
) -> tuple[Tensor, int]:
    """Partition of cells by a mixture that was found in a sample of them, and by the rare components beside it.

    Parameters
    ----------
    latent
        Latent means, (n_cells, n_latent).
    mixture
        Components of the sample, k in all.
    fewest, most
        Limits of the number of components. Where rare ones are found, others become one in their place if there are
        too many; and if they overlap and were there only because there must be ``fewest``.
    alpha
        As in `modes.merge_without_valley`.
    rng
        Draws the samples.

    Returns
    -------
    Component of each cell, (n_cells,), and their number. Without rare components, the most probable of ``mixture``.
    """
    n_known = mixture.weights.shape[1]
    first = partition_of(latent, mixture)
    drawn, weight = draw(latent, first, rng)
    points = _whitened(drawn, mixture)
    is_used = have_neighbours(points)
    # The covariance without outliers, which would let rare types overlap with others.
    mixture = mixture._replace(covariance=_covariance(drawn[is_used], weight[is_used], mixture))
    known = partition_of(latent, mixture)
    sample = Sample(_whitened(drawn, mixture), weight)
    points, n_fine = sample.points[is_used], n_known + N_FURTHER
    for seed in rng.integers(2**31, size=N_FITS).tolist() if len(points) > n_fine else ():
        probs = fit_tied_mixtures(points, n_fine, [seed])[0]
        centres = (probs @ points) / probs.sum(1, keepdim=True).clamp(min=1e-9)
        found = list(_compact_groups(sample, _standard(known.mixture), centres))
        for size, centre in found:
            mean = torch.linalg.cholesky(mixture.covariance[0]) @ centre
            limit = alpha / (known.mixture.weights.shape[1] + len(found) - 1)
            known = _with_component(latent, known, size / len(latent), mean, limit, rng)
    k = known.mixture.weights.shape[1]
    if k == n_known:
        return first.label, k
    label = torch.where(known.label < n_known, first.label, known.label)
    probs = _weighted_probs(sample, _standard(known.mixture))
    group = merged_groups(probs, fewest=fewest if n_known == fewest else min(k, most), most=most)
    names, group = torch.unique(group, return_inverse=True)
    return group[label], len(names)


def merged_groups(probs: Tensor, *, n_fixed: int = 0, fewest: int = 1, most: int | None = None) -> Tensor:
    """Merge the two components that overlap most, as long as they overlap by `LARGEST_OVERLAP` or are too many.

    Parameters
    ----------
    probs
        Probability of each component, times the number of cells that a cell stands for, (k, n).
    n_fixed
        Number of first components that are not merged with each other.
    fewest, most
        Number of groups at which merging ends in any case, and down to which it goes on in any case.

    Returns
    -------
    Group of each component, named by the first in it, (k,).
    """
    k, most = len(probs), len(probs) if most is None else most
    probs, table = probs.clone(), overlaps(probs[None])[0]
    number = torch.arange(k, device=probs.device)
    group, is_fixed = number.clone(), number < n_fixed
    while True:
        is_first = group == number
        is_pair = is_first[:, None] & is_first & ~(is_fixed[:, None] & is_fixed) & (number[:, None] != number)
        n_left = int(is_first.sum())
        if n_left <= fewest or not is_pair.any():
            return group
        value, at = table.masked_fill(~is_pair, -torch.inf).flatten().max(0)
        if value < LARGEST_OVERLAP and n_left <= most:
            return group
        first, second = sorted(divmod(int(at), k))
        group[group == second] = first
        probs[first] += probs[second]
        one = probs[None, first]
        table[first] = overlap_with(probs[None], *terms(probs[None]), one, *terms(one[:, None]))[0]
        table[:, first] = table[first]


def partition_of(latent: Tensor, mixture: TiedMixtures) -> Partition:
    found = [mixture.log_joint(latent[part])[0].max(0) for part in parts(len(latent))]
    return Partition(mixture, torch.cat([each.indices for each in found]), torch.cat([each.values for each in found]))


def _whitened(points: Tensor, mixture: TiedMixtures) -> Tensor:
    """Points (n, d) in coordinates in which the covariance of the components is 1."""
    factor = torch.linalg.cholesky(mixture.covariance[0])
    return torch.linalg.solve_triangular(factor, points.T, upper=False).T.contiguous()


def _standard(mixture: TiedMixtures) -> TiedMixtures:
    """Mixture in coordinates in which its covariance is 1."""
    identity = torch.eye(mixture.means.shape[2], dtype=mixture.means.dtype, device=mixture.means.device)
    return TiedMixtures(mixture.weights, _whitened(mixture.means[0], mixture)[None], identity[None])


def _covariance(points: Tensor, weight: Tensor, mixture: TiedMixtures) -> Tensor:
    """Covariance within the components of points (n, d) that stand for several cells each, (1, d, d)."""
    if len(points) == 0:
        return mixture.covariance
    residual = points - mixture.means[0, most_probable(points, mixture)]
    covariance = (weight * residual.T) @ residual / weight.sum()
    identity = torch.eye(len(covariance), dtype=covariance.dtype, device=covariance.device)
    return (covariance + identity * 1e-6 * covariance.trace().clamp(min=1e-6) / len(covariance))[None]


def draw(latent: Tensor, known: Partition, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
    """Sample that favours cells far from the centre of their component, equally from all components.

    Returns the latent means of the cells, (n, d), and the number of cells that each stands for, (n,).
    """
    label = known.label.cpu().numpy()
    distance = -(known.log_joint - known.mixture.weights[0].log()[known.label]).cpu().numpy()  # of the same order
    positions, weights = [], []
    n_left, sizes = float(SAMPLE_SIZE), np.bincount(label, minlength=known.mixture.weights.shape[1])
    for i, component in enumerate(np.argsort(sizes, kind="stable")):  # what small ones do not need is for others
        own = np.flatnonzero(label == component)
        own = own[np.argsort(-distance[own], kind="stable")]
        wanted = min(len(own), n_left / (len(sizes) - i))
        chance = inclusion_chances(len(own), wanted)
        is_drawn = rng.random(len(own)) < chance
        positions.append(own[is_drawn])
        weights.append(1 / chance[is_drawn])
        n_left -= wanted
    at = torch.as_tensor(np.concatenate(positions), device=latent.device)
    return latent[at], torch.as_tensor(np.concatenate(weights), device=latent.device)


def inclusion_chances(n: int, wanted: float) -> np.ndarray:
    """Chances min(1, c / rank) of n cells, (n,), whose sum is the number of cells that are wanted, at most n."""
    rank = np.arange(1, n + 1)
    low, high = 0.0, float(n)
    for _ in range(50):  # the sum grows with c
        c = (low + high) / 2
        low, high = (c, high) if np.minimum(1, c / rank).sum() < wanted else (low, c)
    return np.minimum(1, high / rank)


def have_neighbours(points: Tensor) -> Tensor:
    """Whether `FEWEST_NEIGHBOURS` others are closer than two points of one type, by their mean square, (n,)."""
    square, limit, n = points.square().sum(1), 2.0 * points.shape[1], len(points)
    n_at_once = max(1, min(n, DISTANCES_AT_ONCE // max(1, n)))
    # Written to the same memory each time: what is freed block by block, the allocator may keep.
    distance, product = (points.new_empty(n_at_once, n) for _ in range(2))
    n_near = torch.empty(n, dtype=torch.long, device=points.device)
    for start in range(0, n, n_at_once):
        some = slice(start, start + n_at_once)
        own = distance[: len(square[some])]
        torch.add(square[some, None], square, out=own)
        own -= torch.mm(2 * points[some], points.T, out=product[: len(own)])
        torch.sum(own < limit, 1, out=n_near[some])
    return n_near > FEWEST_NEIGHBOURS  # a point is its own neighbour


def _weighted_probs(sample: Sample, mixture: TiedMixtures) -> Tensor:
    """Probability of each component, times the number of cells that a cell stands for, (k, n)."""
    return torch.softmax(mixture.log_joint(sample.points)[0], dim=0) * sample.weight


def _compact_groups(sample: Sample, known: TiedMixtures, centres: Tensor) -> Iterator[tuple[float, Tensor]]:
    """Number of cells and centre of further components that are compact and overlap with none, the largest first."""
    n_known, d = known.means.shape[1:]
    means = torch.cat([known.means[0], centres])
    weights = torch.cat([known.weights[0], known.weights.new_full((len(centres),), 1e-4)])  # of a rare type
    for _ in range(EM_STEPS):
        probs = _weighted_probs(sample, TiedMixtures(weights[None], means[None], known.covariance))
        size = probs.sum(1).clamp(min=1e-9)
        weights = size / size.sum()
        means[n_known:] = (probs @ sample.points / size[:, None])[n_known:]
    group = merged_groups(probs, n_fixed=n_known)
    found = []
    for first in range(n_known, len(group)):
        members = probs[group == first].sum(0)
        if group[first] == first and members.sum() >= FEWEST_CELLS:
            found.append((float(members.sum()), members @ sample.points / members.sum()))
    explained = d * (1 - 2 / (9 * d)) ** 3  # median of χ² with d degrees of freedom (Wilson and Hilferty 1931)
    best = known.log_joint(sample.points)[0].max(0).values
    for size, centre in sorted(found, key=lambda each: -each[0]):
        share = known.weights.new_tensor([[size / float(sample.weight.sum())]])
        is_own = TiedMixtures(share, centre[None, None], known.covariance).log_joint(sample.points)[0, 0] > best
        distance = (sample.points[is_own] - centre).square().sum(1)
        if is_own.any() and _weighted_median(distance, sample.weight[is_own]) <= LARGEST_SPREAD * explained:
            yield size, centre


def _weighted_median(values: Tensor, weight: Tensor) -> float:
    values, order = values.sort()
    total = weight[order].cumsum(0)
    return float(values[torch.searchsorted(total, total[-1] / 2)])


def _with_component(
    latent: Tensor, known: Partition, share: float, mean: Tensor, limit: float, rng: np.random.Generator
) -> Partition:
    """Partition with a further component, if its p value beside each known one is at most the limit."""
    mixture, k = known.mixture, known.mixture.weights.shape[1]
    one = TiedMixtures(mixture.weights.new_tensor([[share]]), mean[None, None], mixture.covariance)
    log_joint = torch.cat([one.log_joint(latent[part])[0, 0] for part in parts(len(latent))])
    is_own = log_joint > known.log_joint
    rare = latent[is_own].cpu().numpy()
    if len(rare) < FEWEST_CELLS:
        return known
    distance = torch.linalg.vector_norm(mixture.means[0] - mean, dim=1)
    for other in distance.argsort().tolist():  # the nearest decides in most cases
        if p_value_of_rare(rare, latent[(known.label == other) & ~is_own].cpu().numpy(), rng) > limit:
            return known
    means, weights = torch.cat([mixture.means, mean[None, None]], 1), torch.cat([mixture.weights, one.weights], 1)
    return Partition(
        TiedMixtures(weights / weights.sum(), means, mixture.covariance),
        torch.where(is_own, k, known.label),
        torch.maximum(log_joint, known.log_joint),
    )
