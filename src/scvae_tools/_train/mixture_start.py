"""Mixture from which its training starts: the number of components, and the components.

A mixture fitted with the wanted number of components is a poor clustering. Its likelihood gains more by cutting a large
type, whose cells vary, than by telling two small types apart, and the result depends on the seed. So more components
than wanted are fitted, with one covariance, and those that overlap most are merged (Baudry et al. 2010,
doi:10.1198/jcgs.2010.08111; Hennig 2010, doi:10.1007/s11634-010-0058-3). Pieces of one type overlap; types do not,
whatever their size. Figures in docs/clustering.md.
"""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import pandas as pd
from scipy.special import xlogy

from scvae_tools._results.probabilities import LARGEST_OVERLAP

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
#: Cells that a fine component needs on average.
CELLS_PER_COMPONENT = 15
#: Largest number of cells on which runs are compared.
LARGEST_SAMPLE = 10_000


class MixtureStart(NamedTuple):
    """A Gaussian mixture with one covariance, fitted to latent means."""

    weights: np.ndarray  # (k,)
    means: np.ndarray  # (k, d)
    covariance: np.ndarray  # (d, d)


class _Level(NamedTuple):
    """A partition on the way from fine components to one."""

    label: np.ndarray  # (n,)
    overlap: float  # of the two components that are merged next
    n_components: int


def start_mixture(
    latent: np.ndarray, n_components: int | tuple[int, int] | None, *, random_state: int
) -> tuple[MixtureStart, pd.DataFrame]:
    """Find the components of a latent space.

    Parameters
    ----------
    latent
        Latent means, (n_cells, n_latent).
    n_components
        k; or the smallest and largest that may be found; or None for any.
    random_state
        Seed.

    Returns
    -------
    The mixture, and what is known of each number of components, one row each: ``n_components``; ``overlap``, the median
    over runs of the largest overlap between two of so many components, in nats per cell of the smaller;
    ``share_of_runs`` that would stop there; ``chosen``.
    """
    latent = np.asarray(latent, dtype=np.float64)
    rng = np.random.default_rng(random_state)
    sample = latent if len(latent) <= LARGEST_SAMPLE else rng.choice(latent, LARGEST_SAMPLE, replace=False)
    runs = _runs(sample, n_components, rng)
    found = np.array([_count(levels) for levels in runs])
    low, high = (1, len(sample)) if n_components is None else np.broadcast_to(n_components, 2)
    k = int(np.clip(np.median(found), low, high))  # the median of an even number is rounded down
    partitions = [level.label for levels in runs for level in levels if level.n_components == k]
    # It can be that no run has k components: where k is nearly the number of cells, or where cells are equal.
    partitions = partitions or [_k_means(sample, k, random_state)]
    label = max(partitions, key=lambda each: _quality(sample, each))
    if len(sample) < len(latent):
        label = _log_joint(latent, _mixture(sample, label, k)).argmax(1)
    return _mixture(latent, label, k), _table(runs, found, k)


def start_from_labels(
    latent: np.ndarray, label: np.ndarray, n_labels: int, n_components: int, *, random_state: int
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
    random_state
        Seed.
    """
    latent = np.asarray(latent, dtype=np.float64)
    known = label >= 0
    labelled = _mixture(latent[known], label[known], n_labels)
    whole = np.where(known, label, _log_joint(latent, labelled).argmax(1))
    n_new, unknown = n_components - n_labels, latent[~known]
    if n_new > 0 and len(unknown) >= n_components:
        parts, _ = start_mixture(unknown, n_components, random_state=random_state)
        factor = np.linalg.cholesky(np.linalg.inv(labelled.covariance))
        distance = np.linalg.norm((parts.means[:, None] - labelled.means) @ factor, axis=-1).min(1)
        farthest = np.argsort(-distance)[:n_new]
        part = _log_joint(unknown, parts).argmax(1)
        for new, each in enumerate(farthest):
            whole[np.flatnonzero(~known)[part == each]] = n_labels + new
    return _mixture(latent, whole, n_components)


def _runs(latent: np.ndarray, n_components: int | tuple[int, int] | None, rng: np.random.Generator) -> list[list]:
    """Levels of each run, from fine components to a single one."""
    most = max(1, len(latent) // CELLS_PER_COMPONENT)
    if isinstance(n_components, int | np.integer):
        fine = [max(n_components, min(most, round(n_components * SURPLUS[i % 4]))) for i in range(N_RUNS)]
        return [list(_levels(_memberships(latent, n, rng))) for n in fine]
    n_fine = N_FINE if n_components is None else max(N_FINE, round(1.5 * n_components[1]))
    lowest = 1 if n_components is None else n_components[0]
    while True:
        n_fine = max(lowest, min(n_fine, most))
        runs = [list(_levels(_memberships(latent, n_fine, rng))) for _ in range(N_RUNS)]
        n_clear = np.median([_count(levels, CLEARLY_APART) for levels in runs])
        has_room = n_clear < MOST * n_fine
        if has_room or n_components is not None or n_fine >= min(most, LARGEST_N_FINE):
            return runs
        n_fine = round(n_fine * N_FINE_GROWTH)


def _memberships(latent: np.ndarray, n_components: int, rng: np.random.Generator) -> np.ndarray:
    """Probabilities of the components of a mixture with one covariance, from one k-means start, (n, k)."""
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.mixture import GaussianMixture

    seed = int(rng.integers(2**31))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        mixture = GaussianMixture(n_components, covariance_type="tied", random_state=seed)
        return mixture.fit(latent).predict_proba(latent)


def _k_means(latent: np.ndarray, n_components: int, random_state: int) -> np.ndarray:
    from sklearn.cluster import KMeans
    from sklearn.exceptions import ConvergenceWarning

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        return KMeans(n_components, n_init=10, random_state=random_state % 2**32).fit_predict(latent)


def _levels(probs: np.ndarray) -> Iterator[_Level]:
    """Merge the two components that overlap most, until one is left."""
    probs = probs[:, probs.sum(0) > 0].copy()
    overlap = overlaps(probs)
    while True:
        k = probs.shape[1]
        label = probs.argmax(1)
        if k == 1:
            yield _Level(label, 0.0, 1)
            return
        i, j = sorted(np.unravel_index(overlap.argmax(), overlap.shape))
        if len(np.unique(label)) == k:  # else a component is no cell's most probable one
            yield _Level(label, float(overlap[i, j]), k)
        probs[:, i] += probs[:, j]
        probs = np.delete(probs, j, axis=1)
        overlap = np.delete(np.delete(overlap, j, axis=0), j, axis=1)
        overlap[i] = overlap[:, i] = _overlap_with(probs, i)


def overlaps(probs: np.ndarray) -> np.ndarray:
    """Overlap of each two components, in nats per cell of the smaller, (k, k), 0 on the diagonal.

    Parameters
    ----------
    probs
        Probability of each component, (n, k).

    Notes
    -----
    The overlap is the entropy of y that is lost when i and j become one (Baudry et al. 2010), over the cells of the
    smaller component:
    Σ_n [(p_i + p_j) log(p_i + p_j) − p_i log p_i − p_j log p_j] / min(Σ_n p_i, Σ_n p_j), from 0 for two that share no
    cell to 2 log 2 for two halves of one.
    """
    return np.stack([_overlap_with(probs, i) for i in range(probs.shape[1])])


def _overlap_with(probs: np.ndarray, i: int) -> np.ndarray:
    both = probs + probs[:, [i]]
    own, size = xlogy(probs, probs).sum(0), probs.sum(0)
    lost = (xlogy(both, both).sum(0) - own - own[i]) / np.maximum(np.minimum(size, size[i]), np.finfo(float).tiny)
    lost[i] = 0.0
    return lost


def _count(levels: list[_Level], largest_overlap: float = LARGEST_OVERLAP) -> int:
    """Largest number of components of which no two overlap by ``largest_overlap`` or more."""
    return next(level.n_components for level in levels if level.overlap < largest_overlap)


def _quality(latent: np.ndarray, label: np.ndarray) -> float:
    """Quality of a partition, in nats per cell; see `OVERLAP_WEIGHT`."""
    log_joint = _log_joint(latent, _mixture(latent, label))
    log_density = np.logaddexp.reduce(log_joint, axis=1)
    each = overlaps(np.exp(log_joint - log_density[:, None]))
    largest = np.sort(each[np.triu_indices(len(each), 1)])[-N_LARGEST_OVERLAPS:]
    return log_density.mean() - OVERLAP_WEIGHT * (largest.mean() if len(largest) else 0.0)


def _mixture(latent: np.ndarray, label: np.ndarray, n_components: int | None = None) -> MixtureStart:
    """Weights, means and covariance of a partition, whose labels are 0, 1, ..., k − 1."""
    size = np.bincount(label, minlength=n_components or 0).astype(float)
    one_hot = np.eye(len(size))[label]
    # A component without cells starts as a rare one in the middle of all.
    means = np.where(size[:, None] > 0, one_hot.T @ latent / np.maximum(size, 1)[:, None], latent.mean(0))
    residual = latent - means[label]
    covariance = residual.T @ residual / len(latent)
    # A direction in which no cell differs must not make the matrix singular.
    covariance += np.eye(len(covariance)) * 1e-6 * np.trace(covariance).clip(1e-6) / len(covariance)
    weights = np.maximum(size, 0.5)
    return MixtureStart(weights / weights.sum(), means, covariance)


def _log_joint(latent: np.ndarray, mixture: MixtureStart) -> np.ndarray:
    """Log π_k N(z; μ_k, Σ), (n, k)."""
    from scipy.stats import multivariate_normal

    each = [multivariate_normal(mean, mixture.covariance).logpdf(latent) for mean in mixture.means]
    return np.log(mixture.weights) + np.stack(each, axis=1)


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
