"""The mixture that training starts from."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.special import xlogy
from scipy.stats import multivariate_normal
from sklearn.metrics import adjusted_rand_score

from scvae_tools._train import mixture_start as _start
from scvae_tools._train.mixture_start import LARGEST_OVERLAP, start_mixture
from scvae_tools._train.overlaps import overlaps


def make_clusters(n_clusters, *, n_cells=600, distance=8.0, shares=None, seed=0):
    rng = np.random.default_rng(seed)
    centres = distance * rng.normal(size=(n_clusters, 10)) / np.sqrt(2 * 10)  # `distance` apart on average
    truth = np.arange(n_cells) % n_clusters if shares is None else rng.choice(n_clusters, n_cells, p=shares)
    return (centres[truth] + rng.normal(size=(n_cells, 10))).astype(np.float32), truth, centres


def partition(latent, start):
    log_joint = [multivariate_normal(mean, start.covariance).logpdf(latent) for mean in start.means]
    return np.argmax(np.log(start.weights)[:, None] + log_joint, axis=0)


@pytest.mark.parametrize("n_clusters", [1, 2, 5, 12, 20])
def test_separate_clusters_are_counted(n_clusters):
    latent, truth, _ = make_clusters(n_clusters, n_cells=2000, distance=14.0)
    start, curve, _ = start_mixture(latent, None, random_state=0)
    assert len(start.weights) == n_clusters
    assert adjusted_rand_score(truth, partition(latent, start)) > 0.99
    assert curve.n_components[curve.chosen].tolist() == [n_clusters]


def test_clusters_of_very_unequal_size_are_found():
    """Sizes from 1 to 50: a mixture of six components cuts the largest in its place."""
    shares = np.geomspace(1, 1 / 50, 6)
    latent, truth, _ = make_clusters(6, n_cells=3000, distance=14.0, shares=shares / shares.sum())
    for n_components in (None, 6):
        start, _, _ = start_mixture(latent, n_components, random_state=0)
        assert len(start.weights) == 6
        assert adjusted_rand_score(truth, partition(latent, start)) > 0.99


def test_the_number_stays_in_the_range_that_is_given():
    latent, _, _ = make_clusters(5, distance=14.0)
    for given, expected in (((2, 4), 4), ((2, 9), 5), ((7, 9), 7)):
        start, curve, _ = start_mixture(latent, given, random_state=0)
        assert len(start.weights) == expected
        assert curve.n_components[curve.chosen].tolist() == [expected]


def test_the_curve_tells_how_many_runs_stop_where():
    latent, _, _ = make_clusters(5, distance=14.0)
    _, curve, _ = start_mixture(latent, None, random_state=0)
    assert curve.share_of_runs.sum() == pytest.approx(1)
    assert curve.set_index("n_components").share_of_runs[5] > 0.9
    assert curve.overlap[curve.n_components <= 5].max() < LARGEST_OVERLAP
    assert curve.overlap[curve.n_components > 5].min() > LARGEST_OVERLAP


def test_the_mixture_has_the_moments_of_the_clusters():
    latent, truth, centres = make_clusters(4, n_cells=4000, distance=12.0)
    start, _, _ = start_mixture(latent, 4, random_state=0)
    nearest = ((start.means[:, None] - centres) ** 2).sum(-1).argmin(1)
    assert sorted(nearest) == [0, 1, 2, 3]
    np.testing.assert_allclose(start.weights, 0.25, atol=0.01)
    np.testing.assert_allclose(start.means, centres[nearest], atol=0.15)
    np.testing.assert_allclose(start.covariance, np.eye(10), atol=0.1)
    assert adjusted_rand_score(truth, partition(latent, start)) == 1


def merged_one_by_one(probs):
    """Partition and largest overlap for each number of components, from the definition, for probabilities (n, k)."""
    probs = probs[:, probs.sum(0) > 0]
    found = {}
    while True:
        k, table = probs.shape[1], overlaps(torch.as_tensor(probs).T[None])[0].numpy()
        if len(np.unique(probs.argmax(1))) == k:
            found[k] = probs.argmax(1), table.max()
        if k == 1:
            return found
        i, j = sorted(np.unravel_index(table.argmax(), table.shape))
        probs[:, i] += probs[:, j]
        probs = np.delete(probs, j, axis=1)


@pytest.mark.parametrize("n_empty", [0, 1, 3])
def test_runs_that_are_merged_at_once_are_those_merged_one_by_one(n_empty):
    """Also where some components hold no cell, in the first run, in the last, or in all."""
    rng = np.random.default_rng(n_empty)
    probs = rng.dirichlet(np.full(9, 0.1), size=(4, 60))
    probs[:2, :, [0, 4, 8][:n_empty]] = 0.0
    probs /= probs.sum(2, keepdims=True)
    levels = _start._levels(torch.as_tensor(probs).mT.contiguous())
    for own, each in zip(levels, probs, strict=True):
        expected = merged_one_by_one(each.copy())
        assert [level.n_components for level in own] == sorted(expected, reverse=True)
        for level in own:
            label, overlap = expected[level.n_components]
            np.testing.assert_array_equal(level.label.numpy(), label)
            assert level.overlap == pytest.approx(overlap, abs=1e-9)


@pytest.mark.parametrize("n_components", [5, None])
def test_the_same_seed_gives_the_same_mixture_and_leaves_random_states_alone(n_components):
    latent, _, _ = make_clusters(5, distance=4.0)
    before = np.random.get_state()[1].copy(), torch.get_rng_state(), torch.get_num_threads()  # noqa: NPY002
    first, second = (start_mixture(latent, n_components, random_state=3) for _ in range(2))
    np.testing.assert_array_equal(first.valley_p_values, second.valley_p_values)
    for a, b in zip(first.mixture, second.mixture, strict=True):
        np.testing.assert_array_equal(a, b)
    assert np.array_equal(np.random.get_state()[1], before[0])  # noqa: NPY002
    assert torch.equal(torch.get_rng_state(), before[1])
    assert torch.get_num_threads() == before[2]


@pytest.mark.parametrize("n_cells", [3, 8, 40])
@pytest.mark.parametrize("n_components", [None, 3, (2, 3)])
def test_a_handful_of_cells_has_a_start(n_cells, n_components):
    latent, _, _ = make_clusters(2, n_cells=n_cells)
    start, _, _ = start_mixture(latent, n_components, random_state=0)
    assert 1 <= len(start.weights) <= n_cells
    if n_components == 3:
        assert len(start.weights) == 3


def test_nearly_as_many_components_as_cells_are_groups_of_neighbours():
    """No mixture may hold them all; then they are those of k-means, not arbitrary."""
    latent, truth, _ = make_clusters(20, n_cells=22, distance=40.0)
    start, _, _ = start_mixture(latent, 20, random_state=0)
    assert len(start.weights) == 20
    assert adjusted_rand_score(truth, partition(latent, start)) > 0.9


def test_equal_cells_have_a_start():
    latent = np.ones((30, 4), dtype=np.float32)
    for n_components in (None, 2):
        start, _, _ = start_mixture(latent, n_components, random_state=0)
        assert np.isfinite(start.means).all()
        np.linalg.cholesky(start.covariance)


def test_more_cells_than_are_compared_all_count():
    latent, _, _ = make_clusters(3, n_cells=12_000, distance=14.0)
    start, _, _ = start_mixture(latent, 3, random_state=0)
    np.testing.assert_allclose(start.weights, 1 / 3, atol=1e-3)


# -- merges and splits of a trained mixture ----------------------------------------------------------------------------


def slow_merges(probs):
    """Merges by the definition, each overlap anew from the cells."""
    groups, found = {i: probs[:, i] for i in range(probs.shape[1])}, []
    while len(groups) > 1:
        lost = {
            (i, j): (
                xlogy(groups[i] + groups[j], groups[i] + groups[j])
                - xlogy(groups[i], groups[i])
                - xlogy(groups[j], groups[j])
            ).sum()
            / min(groups[i].sum(), groups[j].sum())
            for i in groups
            for j in groups
            if i < j
        }
        first, second = max(lost, key=lost.get)
        found.append((first, second, lost[first, second]))
        groups[first] = groups[first] + groups.pop(second)
    return found


def test_merges_of_three_components_are_those_on_paper():
    """Components 0 and 1 share one cell of 1.5 each, which loses log 2; the third shares none."""
    probs = np.array([[1, 0, 0], [0.5, 0.5, 0], [0, 1, 0], [0, 0, 1]], dtype=np.float32)
    assert _start.merges(probs) == [(0, 1, pytest.approx(np.log(2) / 1.5)), (0, 2, 0.0)]


@pytest.mark.parametrize("cells_at_once", [7, 2**16])
def test_merges_are_those_of_a_slow_loop(cells_at_once, monkeypatch):
    monkeypatch.setattr(_start, "CELLS_AT_ONCE", cells_at_once)
    probs = np.random.default_rng(0).dirichlet(np.array([3, 0.5, 0.2, 1, 0.1, 0.4]) / 5, 60)
    found, expected = _start.merges(probs), slow_merges(probs)
    assert [pair[:2] for pair in found] == [pair[:2] for pair in expected]
    np.testing.assert_allclose([pair[2] for pair in found], [pair[2] for pair in expected])


def test_merges_are_those_by_which_components_are_found():
    probs = np.random.default_rng(1).dirichlet(np.full(7, 0.2), 80)
    levels = _start._levels(torch.tensor(probs.T)[None])[0]
    found = _start.merges(probs)
    np.testing.assert_allclose([level.overlap for level in levels[:-1]], [pair[2] for pair in found])
    groups = list(range(7))
    for level, (first, second, _) in zip(levels[1:], found, strict=True):
        groups = [first if group == second else group for group in groups]
        summed = np.column_stack([probs[:, np.array(groups) == group].sum(1) for group in np.unique(groups)])
        np.testing.assert_array_equal(level.label, summed.argmax(1))


def test_one_component_has_nothing_to_merge():
    assert _start.merges(np.ones((5, 1), dtype=np.float32)) == []


def two_gaussians(n_cells=2000, share=0.3, seed=0):
    rng = np.random.default_rng(seed)
    factor = np.array([[1.0, 0.0, 0.0], [0.6, 0.8, 0.0], [0.0, 0.3, 0.5]])
    second = rng.random(n_cells) < share
    latent = rng.normal(size=(n_cells, 3)) @ factor.T + np.where(second[:, None], [2.0, -2.0, 1.0], 0.0)
    return latent.astype(np.float32), second, factor @ factor.T


def test_the_rule_of_a_split_is_that_of_the_two_gaussians():
    latent, second, covariance = two_gaussians()
    rule = _start.split_in_two(latent, 20, random_state=0)
    densities = [multivariate_normal(mean, covariance).logpdf(latent) for mean in ([0, 0, 0], [2.0, -2.0, 1.0])]
    expected = np.log(0.3 / 0.7) + densities[1] - densities[0]
    found = latent @ rule.direction + rule.offset
    assert np.corrcoef(found, expected)[0, 1] > 0.999
    assert ((found > 0) == (expected > 0)).mean() > 0.995
    assert ((found > 0) == second).mean() > 0.99


def test_the_first_part_of_a_split_is_the_larger_one():
    for share in (0.2, 0.8):
        latent, *_ = two_gaussians(share=share)
        rule = _start.split_in_two(latent, 20, random_state=0)
        assert 0.15 < (latent @ rule.direction + rule.offset > 0).mean() < 0.25


def test_the_parts_of_a_split_are_as_large_as_asked_for():
    latent, *_ = two_gaussians(400, share=0.05)
    for least in (5, 30, 150):
        rule = _start.split_in_two(latent, least, random_state=0)
        assert rule is None or (latent @ rule.direction + rule.offset > 0).sum() >= least
    assert _start.split_in_two(latent, 201, random_state=0) is None


@pytest.mark.parametrize("latent", [np.ones((50, 3), np.float32), np.empty((0, 3), np.float32)], ids=["equal", "none"])
def test_cells_that_are_equal_or_none_are_not_split(latent):
    assert _start.split_in_two(latent, 1, random_state=0) is None


def test_many_cells_are_split_by_a_sample(monkeypatch):
    latent, second, _ = two_gaussians(5000)
    monkeypatch.setattr(_start, "LARGEST_SAMPLE_TO_SPLIT", 500)
    rule = _start.split_in_two(latent, 20, random_state=0)
    assert ((latent @ rule.direction + rule.offset > 0) == second).mean() > 0.98
