"""Mixtures with one covariance, fitted many at once, beside those of scikit-learn."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch
from scipy.stats import multivariate_normal
from sklearn.cluster import KMeans
from sklearn.exceptions import ConvergenceWarning
from sklearn.mixture import GaussianMixture

from scvae_tools._train import tied_mixtures
from scvae_tools._train.tied_mixtures import TiedMixtures, fit_tied_mixtures, k_means

SEEDS = [3, 0, 2**31 - 1, 77]


def points_of(n_points, n_clusters, *, distance=4.0, n_dimensions=6, seed=0):
    rng = np.random.default_rng(seed)
    centres = distance * rng.normal(size=(n_clusters, n_dimensions)) / np.sqrt(2 * n_dimensions)
    return 3.0 + centres[rng.integers(n_clusters, size=n_points)] + rng.normal(size=(n_points, n_dimensions))


def probabilities_of_scikit_learn(points, n_components, seed):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        mixture = GaussianMixture(n_components, covariance_type="tied", random_state=seed).fit(points)
        return mixture.predict_proba(points).T


@pytest.mark.parametrize(
    ("n_points", "n_clusters", "n_components"),
    [(400, 4, 1), (400, 4, 2), (400, 4, 4), (900, 6, 20), (300, 1, 12), (2500, 8, 40), (30, 2, 29)],
)
def test_fits_are_those_of_scikit_learn(n_points, n_clusters, n_components):
    points = points_of(n_points, n_clusters)
    probs = fit_tied_mixtures(torch.as_tensor(points), n_components, SEEDS).numpy()
    for found, seed in zip(probs, SEEDS, strict=True):
        np.testing.assert_allclose(found, probabilities_of_scikit_learn(points, n_components, seed), atol=1e-8)


@pytest.mark.parametrize("n_components", [1, 5, 25])
def test_partitions_of_k_means_are_those_of_scikit_learn(n_components):
    points = points_of(1200, 5)
    labels = k_means(torch.as_tensor(points - points.mean(0)), n_components, SEEDS).numpy()
    for label, seed in zip(labels, SEEDS, strict=True):
        expected = KMeans(n_components, n_init=1, random_state=np.random.RandomState(seed)).fit(points).labels_
        np.testing.assert_array_equal(label, expected)


def test_as_many_components_as_points_are_the_points():
    probs = fit_tied_mixtures(torch.as_tensor(points_of(30, 3)), 30, SEEDS)
    torch.testing.assert_close(probs.amax(2), torch.ones_like(probs[:, :, 0]))
    torch.testing.assert_close(probs.sum(2), torch.ones_like(probs[:, :, 0]))


def test_points_far_from_the_origin_have_the_same_fits():
    """The products of EM would lose the digits by which the points differ."""
    points = torch.as_tensor(points_of(500, 4))
    near, far = (fit_tied_mixtures(points + shift, 6, SEEDS[:2]) for shift in (0.0, 1e6))
    torch.testing.assert_close(far, near, atol=1e-6, rtol=0)


def test_an_empty_part_begins_anew_at_the_point_farthest_away():
    points = torch.tensor([[0.0], [0.1], [5.0], [9.0]], dtype=torch.float64)
    former = torch.tensor([[[0.0], [100.0]], [[0.0], [5.0]]], dtype=torch.float64)
    label = torch.tensor([[0, 0, 0, 0], [0, 0, 1, 1]])
    expected = torch.tensor([[[5.1 / 3], [9.0]], [[0.05], [7.0]]], dtype=torch.float64)
    torch.testing.assert_close(tied_mixtures._centres(points, label, former), expected)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("n_distinct", [1, 3])
def test_points_that_are_equal_have_finite_fits(n_distinct):
    points = torch.as_tensor(np.repeat(np.arange(float(n_distinct)), 10))[:, None].expand(-1, 2)
    probs = fit_tied_mixtures(points, 5, SEEDS)
    torch.testing.assert_close(probs.sum(1), torch.ones(len(SEEDS), len(points), dtype=torch.float64))


def test_the_joint_density_is_that_of_scipy():
    rng = np.random.default_rng(0)
    points, means, factor = rng.normal(size=(7, 3)), rng.normal(size=(2, 4, 3)), rng.normal(size=(2, 3, 3))
    weights, covariance = rng.dirichlet(np.ones(4), size=2), factor @ factor.transpose(0, 2, 1)
    mixtures = TiedMixtures(*map(torch.as_tensor, (weights, means, covariance)))
    expected = [
        [np.log(w) + multivariate_normal(m, c).logpdf(points) for w, m in zip(ws, ms, strict=True)]
        for ws, ms, c in zip(weights, means, covariance, strict=True)
    ]
    np.testing.assert_allclose(mixtures.log_joint(torch.as_tensor(points)).numpy(), expected, rtol=1e-10)


def test_more_components_than_points_are_refused():
    with pytest.raises(ValueError, match="a point for each component; found 3 for 4"):
        fit_tied_mixtures(torch.zeros(3, 2, dtype=torch.float64), 4, SEEDS)
