"""Scores of a clustering against known labels, and of its clusters in the latent space: arrays to numbers.

Cells whose label is missing (NaN or None) or one of ``excluded`` are left out by every function that takes labels.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from scvae_tools._checks import check_random_source, checked
from scvae_tools._lazy import loaded

if TYPE_CHECKING:
    from collections.abc import Collection, Hashable, Sequence

__all__ = ["accuracy", "ami", "ari", "is_scored", "majority_labels", "silhouette"]

#: Most cells whose distances to each other `silhouette` computes.
LARGEST_SILHOUETTE = 20_000
#: Memory for the distances that are held at a time, in MiB. More of it, such as scikit-learn's 1,024, takes longer.
SILHOUETTE_MIB = 32


@checked()
def is_scored(labels: Sequence[Any], excluded: Collection[Hashable] = ()) -> np.ndarray:
    """Whether a cell has a label that is not one of the excluded ones.

    Parameters
    ----------
    labels
        Labels of the cells, (n_cells,); NaN or None for cells without a label.
    excluded
        Labels that are not used for scores.

    Returns
    -------
    Booleans, (n_cells,).
    """
    column = pd.Series(_plain(labels, "labels"))
    return (column.notna() & ~column.isin(list(excluded))).to_numpy()


@checked()
def majority_labels(
    clusters: Sequence[Any], labels: Sequence[Any], excluded: Collection[Hashable] = ()
) -> dict[Any, Any]:
    """Most frequent label of each cluster; of equally frequent ones, the first by name.

    Parameters
    ----------
    clusters, labels
        Cluster and label of each cell, (n_cells,) each.
    excluded
        Labels that are not counted.

    Returns
    -------
    Label by cluster. Clusters without a cell that has a label are left out.
    """
    clusters, labels = _scored(clusters, labels, excluded)
    if len(labels) == 0:
        return {}
    n_cells = pd.crosstab(pd.Series(clusters, name="cluster"), pd.Series(labels, name="label"))
    n_cells = n_cells.reindex(columns=sorted(n_cells.columns, key=str))  # the first of the largest is taken
    return n_cells.idxmax(axis=1).to_dict()


@checked()
def accuracy(
    clusters: Sequence[Any],
    labels: Sequence[Any],
    mapping: Mapping[Any, Any] | None = None,
    excluded: Collection[Hashable] = (),
) -> float:
    """Share of the cells whose label is that of their cluster.

    Parameters
    ----------
    clusters, labels
        Cluster and label of each cell, (n_cells,) each.
    mapping
        Label of each cluster, as `majority_labels` finds it on other cells; the cells of clusters that it lacks count
        as wrong. None for the majority among these cells themselves: this is the purity of the clusters, which rises
        with their number, up to 1 for a cluster per cell.
    excluded
        Labels whose cells are left out.

    Returns
    -------
    Between 0 and 1; NaN without a cell to score.
    """
    clusters, labels = _scored(clusters, labels, excluded)
    if len(labels) == 0:
        return float("nan")
    mapping = majority_labels(clusters, labels) if mapping is None else mapping
    if not isinstance(mapping, Mapping):
        raise TypeError(f"`mapping` must give the label of each cluster; found a {type(mapping).__name__}.")
    return float(
        np.mean(
            [cluster in mapping and mapping[cluster] == label for cluster, label in zip(clusters, labels, strict=True)]
        )
    )


@checked()
def ari(clusters: Sequence[Any], labels: Sequence[Any], excluded: Collection[Hashable] = ()) -> float:
    """Adjusted Rand index of clusters and labels [HubertArabie85]_.

    Parameters
    ----------
    clusters, labels
        Cluster and label of each cell, (n_cells,) each.
    excluded
        Labels whose cells are left out.

    Returns
    -------
    1 for the same partition, 0 for what chance gives; NaN without a cell to score.

    References
    ----------
    .. [HubertArabie85] Hubert, Arabie (1985) Comparing partitions. Journal of Classification 2:193.
    """
    return _agreement("adjusted_rand_score", clusters, labels, excluded)


@checked()
def ami(clusters: Sequence[Any], labels: Sequence[Any], excluded: Collection[Hashable] = ()) -> float:
    """Adjusted mutual information of clusters and labels, relative to the mean of their entropies [Vinh10]_.

    Parameters
    ----------
    clusters, labels
        Cluster and label of each cell, (n_cells,) each.
    excluded
        Labels whose cells are left out.

    Returns
    -------
    1 for the same partition, 0 for what chance gives; NaN without a cell to score.

    References
    ----------
    .. [Vinh10] Vinh, Epps, Bailey (2010) Information theoretic measures for clusterings comparison: variants,
       properties, normalization and correction for chance. JMLR 11:2837.
    """
    return _agreement("adjusted_mutual_info_score", clusters, labels, excluded)


@checked(random_state=check_random_source)
def silhouette(
    latent: np.ndarray, clusters: Sequence[Any], *, random_state: int | np.random.Generator | None = 0
) -> float:
    """Mean silhouette of the cells: how much nearer their own cluster is than the next one [Rousseeuw87]_.

    Parameters
    ----------
    latent
        Positions of the cells, such as the means of q(z|x), (n_cells, n_latent); distances are Euclidean.
    clusters
        Cluster of each cell, or its label, (n_cells,); cells without (NaN or None) are left out.
    random_state
        Seed or generator, by which 20,000 cells are drawn if there are more.

    Returns
    -------
    Between −1 and 1; NaN where it is not defined: for fewer than two clusters, or none with two cells.

    Notes
    -----
    The distances are computed for some cells at a time, in 32 MiB of memory whatever the number of cells.

    References
    ----------
    .. [Rousseeuw87] Rousseeuw (1987) Silhouettes: a graphical aid to the interpretation and validation of cluster
       analysis. Journal of Computational and Applied Mathematics 20:53.
    """
    clusters, latent = _plain(clusters, "clusters"), np.asarray(latent)
    if latent.ndim != 2 or len(latent) != len(clusters):
        raise ValueError(
            f"`latent` must have a row for each of the {len(clusters)} cells in `clusters`; found the shape "
            f"{latent.shape}."
        )
    cells = np.flatnonzero(is_scored(clusters))
    if len(cells) > LARGEST_SILHOUETTE:
        drawn = np.random.default_rng(random_state).choice(cells, LARGEST_SILHOUETTE, replace=False)
        cells = np.sort(drawn)
    codes, found = pd.factorize(clusters[cells])
    if not 2 <= len(found) < len(cells):
        return float("nan")
    with loaded("sklearn").config_context(working_memory=SILHOUETTE_MIB):
        return float(loaded("sklearn.metrics").silhouette_score(latent[cells], codes))


def _agreement(
    name: str,
    clusters: Sequence[Any],
    labels: Sequence[Any],
    excluded: Collection[Hashable],
) -> float:
    """Score by the function of scikit-learn with this name."""
    clusters, labels = _scored(clusters, labels, excluded)
    if len(labels) == 0:
        return float("nan")
    score = getattr(loaded("sklearn.metrics"), name)
    return float(score(pd.factorize(labels)[0], pd.factorize(clusters)[0]))


def _scored(
    clusters: Sequence[Any], labels: Sequence[Any], excluded: Collection[Hashable]
) -> tuple[np.ndarray, np.ndarray]:
    """Clusters and labels of the cells to score."""
    clusters, labels = _plain(clusters, "clusters"), _plain(labels, "labels")
    if len(clusters) != len(labels):
        raise ValueError(
            f"`clusters` and `labels` must be of the same cells; found {len(clusters)} and {len(labels)} of them."
        )
    scored = is_scored(labels, excluded)
    return clusters[scored], labels[scored]


def _plain(values: Sequence[Any], name: str) -> np.ndarray:
    """One value for each cell, (n_cells,), whatever they come as."""
    plain = np.asarray(values, dtype=object)
    if plain.ndim != 1:
        raise ValueError(f"`{name}` must have one value for each cell; found the shape {plain.shape}.")
    return plain
