"""Components of types of which a sample of the cells holds too few."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.optimize import brentq
from scipy.special import xlogy
from scipy.stats import chi2
from sklearn.metrics import adjusted_rand_score

from scvae_tools._train import rare_components as _rare
from scvae_tools._train.mixture_start import start_mixture
from scvae_tools._train.tied_mixtures import TiedMixtures, most_probable, of_partition

COMMON = 7.0 * np.eye(4, 5)  # centres, 9.9 standard deviations apart
SHARES = [0.5, 0.3, 0.15, 0.05]


def make_cells(n_cells=200_000, n_rare=200, *, distance=7.0, n_outliers=0, seed=0):
    """Four common types, a rare one beside the first of them, and cells scattered far around."""
    rng = np.random.default_rng(seed)
    truth = rng.choice(4, n_cells, p=SHARES)
    latent = COMMON[truth] + rng.normal(size=(n_cells, 5))
    drawn = rng.choice(n_cells, n_rare + n_outliers, replace=False)
    rare, outliers = drawn[:n_rare], drawn[n_rare:]
    latent[rare] = COMMON[0] + distance * np.eye(5)[4] + rng.normal(size=(n_rare, 5))
    latent[outliers] = rng.uniform(-25, 25, size=(n_outliers, 5))
    truth[rare], truth[outliers] = 4, -1
    return latent.astype(np.float32), truth


def with_rare(latent, label, *, fewest=1, most=100, seed=0):
    """Partition of all cells, from the components of a partition in which the rare type is not told apart."""
    points, label = torch.as_tensor(latent, dtype=torch.float64), torch.as_tensor(label)
    mixture, rng = of_partition(points, label, int(label.max()) + 1), np.random.default_rng(seed)
    found, k = _rare.with_rare_components(points, mixture, fewest=fewest, most=most, alpha=0.05, rng=rng)
    assert len(np.unique(found)) == k
    return found.numpy(), k


def recall_and_precision(truth, label):
    """Share of the rare cells in the component that holds most of them, and their share in it."""
    component = np.bincount(label[truth == 4]).argmax()
    return np.mean(label[truth == 4] == component), np.mean(truth[label == component] == 4)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_a_type_of_one_in_a_thousand_has_its_component(seed):
    latent, truth = make_cells(seed=seed)
    label, k = with_rare(latent, truth % 4, seed=seed)
    assert k == 5
    assert min(recall_and_precision(truth, label)) > 0.95
    assert adjusted_rand_score(truth, label) > 0.999


def test_outliers_get_no_component_and_hide_no_rare_type():
    """Of the cells far from all types five in six are scattered."""
    latent, truth = make_cells(n_outliers=1000, seed=3)
    label, k = with_rare(latent, np.where(truth < 0, 0, truth % 4))
    assert k == 5
    assert recall_and_precision(truth, label)[0] > 0.95


@pytest.mark.parametrize("kind", ["normal", "heavy tail", "curved"])
def test_one_population_stays_one(kind):
    rng = np.random.default_rng(4)
    latent = rng.normal(size=(100_000, 5))
    if kind == "heavy tail":
        latent /= np.sqrt(rng.chisquare(4, size=(len(latent), 1)) / 4)
    if kind == "curved":
        latent[:, 0] *= 4
        latent[:, 1] += 0.15 * (latent[:, 0] ** 2 - 16)
    assert with_rare(latent, np.zeros(len(latent), dtype=int))[1] == 1


@pytest.mark.parametrize("most", [5, 9])
def test_a_rare_type_takes_the_place_of_the_half_of_another(most):
    """Where there must be more components than the sample shows, one type is cut in two as long as none is found."""
    latent, truth = make_cells()
    cut = np.where((truth == 1) & (latent[:, 0] > 0), 4, truth % 4)
    label, k = with_rare(latent, cut, fewest=5, most=most)
    assert k == 5
    assert adjusted_rand_score(truth, label) > 0.999


def test_a_rare_type_does_not_exceed_the_limit():
    latent, truth = make_cells()
    assert with_rare(latent, truth % 4, fewest=2, most=4)[1] == 4


def test_the_start_has_the_rare_type_and_the_moments_of_all_cells_not_of_the_sample():
    latent, truth = make_cells()
    start, curve, _ = start_mixture(latent, None, random_state=0)
    assert curve.n_components[curve.chosen].tolist() == [5]
    order = np.argsort(-start.weights)
    np.testing.assert_allclose(start.weights[order], np.bincount(truth) / len(truth), atol=3e-5)
    means = [latent[truth == each].mean(0) for each in range(5)]
    np.testing.assert_allclose(start.means[order][:4], means[:4], atol=0.001)
    np.testing.assert_allclose(start.means[order][4], means[4], atol=0.1)
    np.testing.assert_allclose(start.covariance, np.eye(5), atol=0.02)


@pytest.mark.parametrize(("n", "wanted"), [(1000, 100.0), (50, 50), (1, 1), (10, 9.5), (0, 0)])
def test_chances_of_cells_are_inverse_to_their_ranks_and_sum_up(n, wanted):
    chance = _rare.inclusion_chances(n, wanted)
    assert chance.sum() == pytest.approx(wanted)
    below = np.flatnonzero(chance < 1)
    np.testing.assert_allclose(chance[below] * (below + 1), (chance[below] * (below + 1))[:1].repeat(len(below)))
    if n == 1000:  # but for the integral in place of the sum
        c = brentq(lambda c: c + c * np.log(1000 / c) - 100, 1, 100)
        assert (chance * np.arange(1, n + 1))[-1] == pytest.approx(c, rel=0.02)


def test_the_sample_stands_for_all_cells_and_favours_the_far_ones():
    latent = torch.as_tensor(np.random.default_rng(0).normal(size=(100_000, 3)))
    mixture = of_partition(latent, torch.zeros(len(latent), dtype=torch.int64), 1)
    points, weight = _rare.draw(latent, _rare.partition_of(latent, mixture), np.random.default_rng(1))
    assert len(points) == pytest.approx(10_000, rel=0.03)
    assert float(weight.sum()) == pytest.approx(100_000, rel=0.05)
    square = points.square().sum(1)
    weighted = float((square * weight).sum() / weight.sum())
    assert weighted == pytest.approx(chi2(3).mean(), rel=0.05)
    assert int((square > chi2(3).isf(1e-2)).sum()) > 900  # nearly all of the 1,000 farthest


def slow_groups(probs, n_fixed, fewest, most):
    """Groups by the definition, each overlap anew."""
    groups = {i: probs[i] for i in range(len(probs))}
    members = {i: [i] for i in groups}
    while len(groups) > fewest:
        lost = {
            (i, j): (xlogy(groups[i] + groups[j], groups[i] + groups[j]) - xlogy(groups[i], groups[i])).sum()
            - xlogy(groups[j], groups[j]).sum()
            for i in groups
            for j in groups
            if i < j and j >= n_fixed
        }
        overlap = {pair: lost[pair] / min(groups[pair[0]].sum(), groups[pair[1]].sum()) for pair in lost}
        if not overlap:
            break
        i, j = max(overlap, key=overlap.get)
        if overlap[i, j] < 0.1 and len(groups) <= most:
            break
        groups[i], members[i] = groups[i] + groups.pop(j), members[i] + members.pop(j)
    return [next(i for i in members if each in members[i]) for each in range(len(probs))]


@pytest.mark.parametrize(("n_fixed", "fewest", "most"), [(0, 1, 9), (3, 1, 9), (0, 4, 9), (0, 1, 3), (4, 2, 5)])
def test_groups_are_those_of_a_slow_loop(n_fixed, fewest, most):
    rng = np.random.default_rng(n_fixed + most)
    probs = (rng.dirichlet(np.full(9, 0.02), 200) * rng.integers(1, 9, (200, 1))).T
    found = _rare.merged_groups(torch.as_tensor(probs), n_fixed=n_fixed, fewest=fewest, most=most)
    assert found.tolist() == slow_groups(probs, n_fixed, fewest, most)


def test_cells_with_few_neighbours_are_those_of_a_slow_loop():
    rng = np.random.default_rng(5)
    points = np.concatenate([rng.normal(size=(300, 4)), rng.uniform(-9, 9, size=(100, 4))])
    squared = ((points[:, None] - points) ** 2).sum(2)
    expected = (squared < 8).sum(1) - 1 >= 5
    assert 50 < (~expected).sum() < 150
    np.testing.assert_array_equal(_rare.have_neighbours(torch.as_tensor(points)).numpy(), expected)


@pytest.mark.slow
@pytest.mark.parametrize("n_components", [None, 9, (2, 20)])
def test_a_type_of_one_in_a_thousand_of_a_million_cells_has_its_component(n_components):
    rng = np.random.default_rng(6)
    shares = np.geomspace(1, 1 / 20, 8)
    truth = rng.choice(8, 1_000_000, p=shares / shares.sum())
    latent = (6.0 * np.eye(8, 10))[truth] + rng.normal(size=(1_000_000, 10))
    rare = rng.choice(len(latent), 1000, replace=False)
    latent[rare] = 6.0 * np.eye(10)[9] + rng.normal(size=(1000, 10))
    truth[rare] = 8
    start, _, _ = start_mixture(latent.astype(np.float32), n_components, random_state=0)
    mixture = TiedMixtures(*(torch.as_tensor(each)[None] for each in start))
    label = most_probable(torch.as_tensor(latent), mixture).numpy()
    assert len(start.weights) == 9
    assert np.mean(label[rare] == np.bincount(label[rare]).argmax()) > 0.9
    assert adjusted_rand_score(truth, label) > 0.99
