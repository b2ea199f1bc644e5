"""Scores against contingency tables counted by hand, pairs of cells, and distances one by one."""

from __future__ import annotations

import itertools
import tracemalloc

import numpy as np
import pandas as pd
import pytest

import scvae_tools as svt
from scvae_tools import metrics

CLUSTERS = ["0", "0", "0", "1", "1", "1", "1", "2", "2"]
LABELS = ["B", "B", "T", "T", "T", "T", "B", None, "NK"]


def pairs_score(clusters, labels):
    """Adjusted Rand index from all pairs of cells."""
    pairs = list(itertools.combinations(range(len(labels)), 2))
    same_cluster = np.array([clusters[i] == clusters[j] for i, j in pairs])
    same_label = np.array([labels[i] == labels[j] for i, j in pairs])
    both, expected = (same_cluster & same_label).sum(), same_cluster.sum() * same_label.sum() / len(pairs)
    return (both - expected) / ((same_cluster.sum() + same_label.sum()) / 2 - expected)


def silhouette_by_distances(latent, clusters):
    values = []
    for i, own in enumerate(clusters):
        distance = np.linalg.norm(latent - latent[i], axis=1)
        others = [distance[clusters == other].mean() for other in set(clusters) - {own}]
        n_own = (clusters == own).sum()
        a, b = distance[clusters == own].sum() / max(1, n_own - 1), min(others)
        values.append((b - a) / max(a, b) if n_own > 1 else 0)
    return np.mean(values)


# -- which cells -------------------------------------------------------------------------------------------------------


def test_cells_without_a_label_and_with_an_excluded_one_are_not_scored():
    assert metrics.is_scored(["B", None, "T", np.nan, "NK"], ["T"]).tolist() == [True, False, False, False, True]


def test_labels_may_be_a_categorical_column():
    labels = pd.Series(pd.Categorical(["B", "T", None]), index=["x", "y", "z"])
    assert metrics.is_scored(labels, ["B"]).tolist() == [False, True, False]
    assert metrics.majority_labels(pd.Categorical([0, 1, 1]), labels) == {0: "B", 1: "T"}


# -- majority ----------------------------------------------------------------------------------------------------------


def test_a_cluster_has_the_label_of_most_of_its_cells():
    assert metrics.majority_labels(CLUSTERS, LABELS) == {"0": "B", "1": "T", "2": "NK"}


def test_of_equally_frequent_labels_the_first_by_name_is_taken():
    assert metrics.majority_labels([0, 0, 0, 0], ["T", "B", "T", "B"]) == {0: "B"}


def test_labels_may_be_truth_values():
    assert metrics.majority_labels([0, 0, 0, 1, 1], [True, True, False, False, False]) == {0: True, 1: False}
    assert metrics.accuracy([0, 0, 0, 1, 1], [True, True, False, False, False]) == pytest.approx(0.8)


def test_excluded_labels_have_no_majority():
    assert metrics.majority_labels(CLUSTERS, LABELS, ["T", "NK"]) == {"0": "B", "1": "B"}


def test_a_cluster_without_labelled_cells_has_no_label():
    assert metrics.majority_labels([0, 1], [None, "B"]) == {1: "B"}
    assert metrics.majority_labels([0], [None]) == {}


# -- accuracy ----------------------------------------------------------------------------------------------------------


def test_accuracy_is_the_share_of_cells_with_the_label_of_their_cluster():
    assert metrics.accuracy(CLUSTERS, LABELS) == pytest.approx(6 / 8)
    assert metrics.accuracy(CLUSTERS, LABELS, excluded=["NK"]) == pytest.approx(5 / 7)


def test_a_mapping_of_other_cells_is_kept_and_what_it_lacks_counts_as_wrong():
    assert metrics.accuracy(CLUSTERS, LABELS, {"0": "T", "1": "T"}) == pytest.approx(4 / 8)
    assert metrics.accuracy(CLUSTERS, LABELS, {}) == 0


def test_purity_rises_to_one_with_a_cluster_per_cell():
    assert metrics.accuracy(range(4), ["B", "B", "T", "T"]) == 1


# -- agreement ---------------------------------------------------------------------------------------------------------


def test_ari_is_that_of_all_pairs_of_scored_cells():
    scored = [i for i, label in enumerate(LABELS) if label is not None]
    expected = pairs_score([CLUSTERS[i] for i in scored], [LABELS[i] for i in scored])
    assert metrics.ari(CLUSTERS, LABELS) == pytest.approx(expected)
    expected = pairs_score(CLUSTERS[:7], LABELS[:7])
    assert metrics.ari(CLUSTERS, LABELS, ["NK"]) == pytest.approx(expected)


def test_ami_of_two_by_two_cells_is_that_of_all_permutations():
    clusters, labels = np.array([0, 0, 1, 1, 1]), np.array(["B", "B", "B", "T", "T"])

    def entropy(*values):
        _, n = np.unique(np.stack([pd.factorize(value)[0] for value in values]), axis=1, return_counts=True)
        return -(n / n.sum() * np.log(n / n.sum())).sum()

    def information(a, b):
        return entropy(a) + entropy(b) - entropy(a, b)

    by_chance = np.mean([information(clusters, labels[list(order)]) for order in itertools.permutations(range(5))])
    expected = (information(clusters, labels) - by_chance) / ((entropy(clusters) + entropy(labels)) / 2 - by_chance)
    assert metrics.ami([*clusters, 7], [*labels, "NK"], ["NK"]) == pytest.approx(expected)


@pytest.mark.parametrize("score", [metrics.accuracy, metrics.ari, metrics.ami])
def test_without_a_cell_to_score_a_score_is_missing(score):
    assert np.isnan(score([0, 1], [None, "B"], excluded=["B"]))


@pytest.mark.parametrize("score", [metrics.accuracy, metrics.ari, metrics.ami, metrics.majority_labels])
def test_clusters_and_labels_must_be_of_the_same_cells(score):
    with pytest.raises(ValueError, match="found 9 and 2"):
        score(CLUSTERS, ["B", "T"])
    with pytest.raises(ValueError, match="`labels` must have one value for each cell"):
        score([0, 1], [["B", "T"], ["B", "T"]])


# -- silhouette --------------------------------------------------------------------------------------------------------


def test_silhouette_is_that_of_the_distances_one_by_one():
    rng = np.random.default_rng(0)
    latent, clusters = rng.normal(size=(30, 3)), rng.integers(3, size=30)
    clusters[clusters == 2] = np.r_[2, np.zeros((clusters == 2).sum() - 1)]  # one alone
    assert metrics.silhouette(latent, clusters) == pytest.approx(silhouette_by_distances(latent, clusters))


def test_cells_without_a_cluster_are_left_out_of_the_silhouette():
    latent, clusters = np.arange(6.0)[:, None] ** 2, np.array(["a", "a", None, "b", "b", None], dtype=object)
    known = [0, 1, 3, 4]
    expected = silhouette_by_distances(latent[known], clusters[known])
    assert metrics.silhouette(latent, clusters) == pytest.approx(expected)


@pytest.mark.parametrize("clusters", [[0, 0, 0], [0, 1, 2], [None, None, None], [0, None, 1]])
def test_where_the_silhouette_is_not_defined_it_is_missing(clusters):
    assert np.isnan(metrics.silhouette(np.arange(3.0)[:, None], clusters))


def test_of_many_cells_some_are_drawn_by_the_seed(monkeypatch):
    monkeypatch.setattr(metrics, "LARGEST_SILHOUETTE", 50)
    rng = np.random.default_rng(0)
    latent, clusters = rng.normal(size=(500, 2)), rng.integers(2, size=500)
    found = [metrics.silhouette(latent, clusters, random_state=seed) for seed in (0, 0, 1)]
    assert found[0] == found[1] != found[2]
    drawn = np.sort(np.random.default_rng(0).choice(500, 50, replace=False))
    assert found[0] == pytest.approx(silhouette_by_distances(latent[drawn], clusters[drawn]))


def test_latent_codes_and_clusters_must_be_of_the_same_cells():
    with pytest.raises(ValueError, match=r"each of the 2 cells in `clusters`; found the shape \(3, 1\)"):
        metrics.silhouette(np.zeros((3, 1)), [0, 1])


def test_metrics_are_public():
    assert svt.metrics is metrics


@pytest.mark.parametrize("n_cells", [3_000, 4_500])
def test_the_silhouette_takes_32_mib_for_distances_and_little_for_each_cell(n_cells):
    # All distances are 72 and 162 MB.
    clusters = np.arange(n_cells) % 8
    latent = np.random.default_rng(0).normal(size=(n_cells, 10)) + clusters[:, None]
    metrics.silhouette(latent[:20], clusters[:20])  # imports what it needs
    tracemalloc.start()
    metrics.silhouette(latent, clusters)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1.1 * 32 * 2**20 + 300 * n_cells
