"""Mixture from which its training starts: the number of components, and the components.

A mixture fitted with the wanted number of components is a poor clustering. Its likelihood gains more by cutting a large
type, whose cells vary, than by telling two small types apart, and the result depends on the seed. So more components
than wanted are fitted, with one covariance, and those that overlap most are merged (Baudry et al. 2010,
doi:10.1198/jcgs.2010.08111; Hennig 2010, doi:10.1007/s11634-010-0058-3). Pieces of one type overlap; types do not,
whatever their size. Where the number is to be found, components between which the density has no valley are merged too
(`modes`). Of many cells a sample is compared; the types that are too rare for it are found among all cells
(`rare_components`). Figures in docs/clustering.md.
"""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from scvae_tools._results.probabilities import LARGEST_OVERLAP
from scvae_tools._threads import considerate_threads
from scvae_tools._train.modes import FEWEST_POINTS, merge_without_valley, p_values_of_parts
from scvae_tools._train.overlaps import overlap_with, overlaps, terms
from scvae_tools._train.rare_components import with_rare_components
from scvae_tools._train.tied_mixtures import (
    TiedMixtures,
    fit_tied_mixtures,
    most_probable,
    n_fits_at_once,
    of_partition,
    one_hot,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

#: Number of runs, each from another start; the result of one is taken.
N_RUNS = 16
#: Components at the start of merging, as multiples of the number that is given; the runs use these in turn.
SURPLUS = (1.5, 2.0, 2.5, 3.0)
#: Components at the start of merging where the number is to be found, the factor by which they are increased, and their
#: limit. They are increased as long as at least the share `MOST` of them stay apart when all that overlap by
#: `CLEARLY_APART` nats or more are merged: then there may be more components.
N_FINE, N_FINE_GROWTH, LARGEST_N_FINE = 20, 1.5, 60
MOST, CLEARLY_APART = 0.7, 0.05
#: Partitions of different runs are compared by the log-likelihood per cell of a mixture with one covariance, less
#: `OVERLAP_WEIGHT` times the mean of their `N_LARGEST_OVERLAPS` largest overlaps.
OVERLAP_WEIGHT, N_LARGEST_OVERLAPS = 2.0, 3
#: Probability that one population stays cut in several, by the test of valleys.
ALPHA = 0.05
#: Cells that a fine component needs on average.
CELLS_PER_COMPONENT = 15
#: Largest number of cells on which runs are compared; of two parts, which fewer cells tell apart. Types of which a
#: sample has too few cells are then found by `rare_components`.
LARGEST_SAMPLE, LARGEST_SAMPLE_TO_SPLIT = 10_000, 4_000
#: Cells whose probabilities are in float64 at a time where the overlaps of all cells are computed.
CELLS_AT_ONCE = 2**16


class MixtureStart(NamedTuple):
    """A Gaussian mixture with one covariance, fitted to latent means."""

    weights: np.ndarray  # (k,)
    means: np.ndarray  # (k, d)
    covariance: np.ndarray  # (d, d)


class FoundStart(NamedTuple):
    """A mixture, and what is known of how it was found."""

    mixture: MixtureStart
    #: A row for each number of components: ``n_components``; ``overlap``, the median over runs of the largest overlap
    #: between two of so many components, in nats per cell of the smaller; ``share_of_runs`` that would stop there, by
    #: their overlap; ``chosen``, which may be fewer, by the test of valleys, or more, by rare components.
    curve: pd.DataFrame
    #: Probability of each two components that they are one population, by the test of valleys, (k, k).
    valley_p_values: np.ndarray


class _Level(NamedTuple):
    """A partition on the way from fine components to one."""

    label: Tensor  # (n,)
    overlap: float  # of the two components that are merged next
    n_components: int


@considerate_threads()
def start_mixture(
    latent: np.ndarray,
    n_components: int | tuple[int, int] | None,
    *,
    random_state: int,
    device: torch.device | str = "cpu",
) -> FoundStart:
    """Find the components of a latent space.

    Parameters
    ----------
    latent
        Latent means, (n_cells, n_latent).
    n_components
        k; or the smallest and largest that may be found; or None for any.
    random_state
        Seed.
    device
        Device that computes, in float64; the CPU in place of a device that has no such numbers.
    """
    latent = _on_device(latent, device)
    rng = np.random.default_rng(random_state)
    sample = latent
    if len(latent) > LARGEST_SAMPLE:
        chosen = rng.choice(len(latent), LARGEST_SAMPLE, replace=False)
        sample = latent[torch.as_tensor(chosen, device=latent.device)]
    runs = _runs(sample, n_components, rng)
    found = np.array([_count(levels) for levels in runs])
    low, high = (1, len(sample)) if n_components is None else np.broadcast_to(n_components, 2)
    k = int(np.clip(np.median(found), low, high))  # the median of an even number is rounded down
    partitions = [level.label for levels in runs for level in levels if level.n_components == k]
    # It can be that no run has k components: where k is nearly the number of cells, or where cells are equal.
    partitions = partitions or [_k_means(sample, k, random_state)]
    if low < k:  # a part of too few cells to be tested would be merged, and the others with it be lost
        partitions = [each for each in partitions if _is_testable(each, k)] or partitions
    label = max(partitions, key=lambda each: _quality(sample, each, k))
    p_values = None
    if low < k:
        merged, p_values = merge_without_valley(
            sample.cpu().numpy(), label.cpu().numpy(), fewest=low, alpha=ALPHA, rng=rng
        )
        label, k = torch.as_tensor(merged, device=latent.device), len(p_values)
    if len(sample) < len(latent):
        found_in_sample = of_partition(sample, label, k)
        label, k = with_rare_components(latent, found_in_sample, fewest=low, most=high, alpha=ALPHA, rng=rng)
        p_values = None  # there are more cells, and perhaps more components
    if p_values is None:
        p_values = p_values_of_parts(latent.cpu().numpy(), label.cpu().numpy(), k, rng)
    return FoundStart(_as_start(of_partition(latent, label, k)), _table(runs, found, k), p_values)


@considerate_threads()
def start_from_labels(
    latent: np.ndarray,
    label: np.ndarray,
    n_labels: int,
    n_components: int,
    *,
    random_state: int,
    device: torch.device | str = "cpu",
) -> MixtureStart:
    """Mixture with one component for each label, and further components for cells unlike all labels.

    Parameters
    ----------
    latent
        Latent means, (n_cells, n_latent).
    label
        0, 1, ..., n_labels − 1, or −1 where it is not known, (n_cells,).
    n_labels, n_components
        Number of labels and of components. The components beyond the labels are found among the cells without a label:
        those farthest from every label.
    random_state, device
        As in `start_mixture`.
    """
    latent = _on_device(latent, device)
    label = torch.as_tensor(np.asarray(label, dtype=np.int64), device=latent.device)
    is_known = label >= 0
    labelled = of_partition(latent[is_known], label[is_known], n_labels)
    whole = torch.where(is_known, label, most_probable(latent, labelled))
    n_new, unknown = n_components - n_labels, latent[~is_known]
    if n_new > 0 and len(unknown) >= n_components:
        found = start_mixture(unknown.cpu().numpy(), n_components, random_state=random_state, device=device)
        parts = TiedMixtures(*(torch.as_tensor(each, device=latent.device)[None] for each in found.mixture))
        factor = torch.linalg.cholesky(torch.linalg.inv(labelled.covariance[0]))
        distance = (
            torch.linalg.vector_norm((parts.means[0][:, None] - labelled.means[0]) @ factor, dim=-1).min(1).values
        )
        part, position = most_probable(unknown, parts), (~is_known).nonzero()[:, 0]
        for new, each in enumerate(distance.argsort(descending=True, stable=True)[:n_new]):
            whole[position[part == each]] = n_labels + new
    return _as_start(of_partition(latent, whole, n_components))


def _on_device(latent: np.ndarray, device: torch.device | str) -> Tensor:
    has_double = torch.device(device).type != "mps"
    return torch.as_tensor(np.asarray(latent, dtype=np.float64), device=device if has_double else "cpu")


def _as_start(mixture: TiedMixtures) -> MixtureStart:
    return MixtureStart(*(each[0].cpu().numpy() for each in mixture))


def _runs(latent: Tensor, n_components: int | tuple[int, int] | None, rng: np.random.Generator) -> list[list[_Level]]:
    """Levels of each run, from fine components to a single one."""
    most = max(1, len(latent) // CELLS_PER_COMPONENT)
    if isinstance(n_components, int | np.integer):
        fine = [max(n_components, min(most, round(n_components * SURPLUS[i % 4]))) for i in range(N_RUNS)]
        return merged_fits(latent, fine, rng)
    n_fine = N_FINE if n_components is None else max(N_FINE, round(1.5 * n_components[1]))
    lowest = 1 if n_components is None else n_components[0]
    while True:
        n_fine = max(lowest, min(n_fine, most))
        runs = merged_fits(latent, [n_fine] * N_RUNS, rng)
        n_clear = np.median([_count(levels, CLEARLY_APART) for levels in runs])
        has_room = n_clear < MOST * n_fine
        if has_room or n_components is not None or n_fine >= min(most, LARGEST_N_FINE):
            return runs
        n_fine = round(n_fine * N_FINE_GROWTH)


def merged_fits(latent: Tensor, n_fine: list[int], rng: np.random.Generator) -> list[list[_Level]]:
    """Levels of a run for each number of fine components; runs with the same number are computed together."""
    seeds = rng.integers(2**31, size=len(n_fine)).tolist()
    levels: dict[int, list[_Level]] = {}
    for n in sorted(set(n_fine)):
        runs = [run for run, own in enumerate(n_fine) if own == n]
        n_at_once = n_fits_at_once(latent, n)
        for start in range(0, len(runs), n_at_once):
            part = runs[start : start + n_at_once]
            probs = fit_tied_mixtures(latent, n, [seeds[run] for run in part])
            levels |= dict(zip(part, _levels(probs), strict=True))
    return [levels[run] for run in range(len(n_fine))]


def _k_means(latent: Tensor, n_components: int, random_state: int) -> Tensor:
    """Partition by k-means, the best of ten, (n,)."""
    from sklearn.cluster import KMeans
    from sklearn.exceptions import ConvergenceWarning

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        label = KMeans(n_components, n_init=10, random_state=random_state % 2**32).fit_predict(latent.cpu().numpy())
    return torch.as_tensor(label, device=latent.device)


def _levels(probs: Tensor) -> list[list[_Level]]:
    """Merge the two components that overlap most until one is left, for each run of probabilities (r, k, n)."""
    levels: list[list[_Level]] = [[] for _ in probs]
    run = torch.arange(len(probs), device=probs.device)
    entropy, size = terms(probs)
    overlap = overlaps(probs)
    for k in range(probs.shape[1], 0, -1):
        label = probs.max(1).indices
        largest, at = _with_empty_first(overlap, size).flatten(1).max(1)
        # Not where a component is no cell's most probable one.
        is_whole = one_hot(label, k).amax(2).all(1)
        for levels_of_run, own, value, whole in zip(levels, label, largest.tolist(), is_whole.tolist(), strict=True):
            if whole:
                levels_of_run.append(_Level(own.to(torch.int32), value, k))
        if k == 1:
            return levels
        first, second = torch.minimum(at // k, at % k), torch.maximum(at // k, at % k)
        probs[run, first] += probs[run, second]
        # All but the second, in their order.
        kept = torch.arange(k - 1, device=probs.device).expand(len(probs), -1)
        kept = kept + (kept >= second[:, None])
        probs, overlap = probs[run[:, None], kept], overlap[run[:, None, None], kept[:, :, None], kept[:, None]]
        entropy, size = entropy[run[:, None], kept], size[run[:, None], kept]
        merged = probs[run, first]
        new = overlap_with(probs, entropy, size, merged, *terms(merged[:, None]))
        new[run, first] = 0.0
        overlap[run, first], overlap[run, :, first] = new, new
        entropy[run, first], size[run, first] = (each[:, 0] for each in terms(merged[:, None]))
    return levels


def merges(probs: np.ndarray) -> list[tuple[int, int, float]]:
    """Merge the two groups of components that overlap most until one is left.

    Parameters
    ----------
    probs
        Probability of each component, (n_cells, k). Computed in parts of `CELLS_AT_ONCE` cells, in float64.

    Returns
    -------
    Each merge, k − 1 in all, in order: the two groups, each named by the first component in it, the smaller number
    first; and their overlap in nats per cell of the smaller, as in `overlaps`.
    """
    k = probs.shape[1]
    groups = {i: [i] for i in range(k)}
    alone = torch.zeros(2, k, dtype=torch.float64)  # Σ p log p and Σ p
    both = torch.zeros(k, k, dtype=torch.float64)  # Σ p log p of each two together
    for part in _parts(probs):
        alone += torch.stack(terms(part[None]))[:, 0]
        for i in range(k - 1):
            pairs = part[i + 1 :] + part[i]
            both[i, i + 1 :] += torch.xlogy(pairs, pairs).sum(1)
    both += both.T.clone()
    found = []
    while len(groups) > 1:
        entropy, size = alone
        smaller = torch.minimum(size[:, None], size).clamp(min=torch.finfo(size.dtype).tiny)
        overlap = ((both - entropy[:, None] - entropy) / smaller).clamp(min=0)  # rounding may put it below
        overlap = _with_empty_first(overlap[None], size[None])[0]
        is_group = torch.tensor([i in groups for i in range(k)])
        is_pair = is_group[:, None] & is_group & ~torch.eye(k, dtype=torch.bool)
        at = int(overlap.masked_fill(~is_pair, -torch.inf).flatten().max(0).indices)
        first, second = sorted((at // k, at % k))
        found.append((first, second, float(overlap[first, second])))
        groups[first] += groups.pop(second)
        if len(groups) > 1:
            alone[:, first], both[first] = _terms_of_group(probs, groups, first)
            both[:, first] = both[first]
    return found


def _terms_of_group(probs: np.ndarray, groups: dict[int, list[int]], group: int) -> tuple[Tensor, Tensor]:
    """Σ p log p and Σ p of a group, (2,), and Σ p log p of it with each other group, (k,); 0 for what is no group."""
    alone, both = torch.zeros(2, dtype=torch.float64), torch.zeros(probs.shape[1], dtype=torch.float64)
    for part in _parts(probs):
        each = torch.stack([part[members].sum(0) for members in groups.values()])
        one = each[list(groups).index(group)].clone()
        alone += torch.stack((torch.xlogy(one, one).sum(), one.sum()))
        each += one
        both[list(groups)] += torch.xlogy(each, each).sum(1)
    return alone, both


def _parts(probs: np.ndarray) -> Iterator[Tensor]:
    """Probabilities (n, k) in parts of `CELLS_AT_ONCE` cells, (k, m) float64 each."""
    for start in range(0, len(probs), CELLS_AT_ONCE):
        yield torch.as_tensor(probs[start : start + CELLS_AT_ONCE].T.astype(np.float64))


class Split(NamedTuple):
    """Rule that splits cells in two: the log odds of the second part are direction · z + offset, in nats."""

    direction: np.ndarray  # (d,)
    offset: float


def split_in_two(latent: np.ndarray, min_cells: int, *, random_state: int) -> Split | None:
    """Find the best split of cells in two, as the components of a mixture are found.

    Finer mixtures are fitted and merged to two components, in `N_RUNS` runs; of the runs whose parts are large enough
    the one is taken that is the best by the rule for components (see `start_mixture`).

    Parameters
    ----------
    latent
        Latent means, (n_cells, n_latent). More than `LARGEST_SAMPLE_TO_SPLIT` cells are sampled.
    min_cells
        Smallest number of cells of a part.
    random_state
        Seed.

    Returns
    -------
    The rule, whose first part is the larger one; None if no run finds two parts of that size.
    """
    if len(latent) < 2 * min_cells or (latent == latent[0]).all():
        return None
    rng = np.random.default_rng(random_state)
    sample = latent
    if len(latent) > LARGEST_SAMPLE_TO_SPLIT:
        sample = latent[np.sort(rng.choice(len(latent), LARGEST_SAMPLE_TO_SPLIT, replace=False))]
    sample = _on_device(sample, "cpu")
    best, best_quality = None, -np.inf
    for label in [level.label for levels in _runs(sample, 2, rng) for level in levels if level.n_components == 2]:
        rule = _rule(of_partition(sample, label, 2))
        n_second = int((latent @ rule.direction + rule.offset > 0).sum())
        quality = _quality(sample, label, 2)
        if min(n_second, len(latent) - n_second) >= min_cells and quality > best_quality:
            is_larger = 2 * n_second > len(latent)
            best, best_quality = Split(-rule.direction, -rule.offset) if is_larger else rule, quality
    return best


def _rule(mixture: TiedMixtures) -> Split:
    """Rule by which two components with one covariance share the cells."""
    weights, means, covariance = (each[0] for each in mixture)
    direction = torch.linalg.solve(covariance, means[1] - means[0])
    offset = weights[1].log() - weights[0].log() - direction @ (means[0] + means[1]) / 2
    return Split(direction.numpy(), float(offset))


def _with_empty_first(overlap: Tensor, size: Tensor) -> Tensor:
    """Overlaps (r, k, k), infinite for each two of which one holds no cell, (r, k), so that it is merged at once."""
    is_empty = size == 0
    is_other = ~torch.eye(size.shape[1], dtype=torch.bool, device=size.device)
    return overlap.masked_fill((is_empty[:, :, None] | is_empty[:, None]) & is_other, torch.inf)


def _count(levels: list[_Level], largest_overlap: float = LARGEST_OVERLAP) -> int:
    """Largest number of components of which no two overlap by ``largest_overlap`` or more."""
    return next(level.n_components for level in levels if level.overlap < largest_overlap)


def _is_testable(label: Tensor, n_components: int) -> bool:
    """Whether all parts have the cells that the test of valleys needs."""
    return int(torch.bincount(label.long(), minlength=n_components).min()) >= FEWEST_POINTS


def _quality(latent: Tensor, label: Tensor, n_components: int) -> float:
    """Quality of a partition, in nats per cell; see `OVERLAP_WEIGHT`."""
    log_joint = of_partition(latent, label, n_components).log_joint(latent)
    log_density = log_joint.logsumexp(1, keepdim=True)
    each = overlaps(log_joint.sub_(log_density).exp_())[0]
    pairs = each[torch.triu(torch.ones_like(each, dtype=torch.bool), diagonal=1)]
    largest = pairs.sort().values[-N_LARGEST_OVERLAPS:]
    return float(log_density.mean() - OVERLAP_WEIGHT * (largest.mean() if len(largest) else 0.0))


def _table(runs: list[list[_Level]], found: np.ndarray, chosen: int) -> pd.DataFrame:
    by_count: dict[int, list[float]] = {}
    for levels in runs:
        for level in levels:
            by_count.setdefault(level.n_components, []).append(level.overlap)
    counts = sorted(by_count)
    return pd.DataFrame(
        {
            "n_components": counts,
            "overlap": [float(np.median(by_count[count])) for count in counts],
            "share_of_runs": [float((found == count).mean()) for count in counts],
            "chosen": [count == chosen for count in counts],
        }
    )
