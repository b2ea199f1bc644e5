"""Temperature of the probabilities against groups of known distance, labels that were kept aside, and scikit-learn."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats
from scipy.special import log_softmax, softmax
from sklearn.mixture import GaussianMixture

from scvae_tools._results.calibration import calibration
from scvae_tools._train.temperature import temperature_of

#: Error of log T, in which 6,000 cells of groups that overlap by as much leave it; seeds are fixed.
NEAR = 0.15


def groups(k, n_cells=6_000, distance=2.5, seed=0):
    """Group of each cell, (n,), and the true log p(y|x), (n, k), of k normal groups, each as far from any other."""
    rng = np.random.default_rng(seed)
    weights = np.linspace(1, 2, k) / np.linspace(1, 2, k).sum()
    means = distance / np.sqrt(2) * np.eye(k)
    label = rng.choice(k, n_cells, p=weights)
    x = means[label] + rng.normal(size=(n_cells, k))
    each = np.stack([stats.multivariate_normal(mean, np.eye(k)).logpdf(x).reshape(-1) for mean in means], axis=1)
    return label, log_softmax(each + np.log(weights), axis=1)


@pytest.mark.parametrize("k", [2, 3, 5])
@pytest.mark.parametrize("factor", [0.5, 1.0, 2.0, 4.0])
def test_log_probabilities_that_are_too_large_by_a_factor_have_it_as_their_temperature(k, factor):
    _, truth = groups(k)
    assert np.log(temperature_of(factor * truth) / factor) == pytest.approx(0, abs=NEAR)


@pytest.mark.parametrize("factor", [0.4, 3.0])
def test_calibrated_probabilities_are_right_as_often_as_they_say(factor):
    label, truth = groups(4)
    before = calibration(softmax(factor * truth, axis=1), label).expected_error
    after = calibration(softmax(factor * truth / temperature_of(factor * truth), axis=1), label).expected_error
    assert before > 0.08
    assert after < 0.03


def test_the_temperature_is_the_nearest_to_the_mixture_that_scikit_learn_fits():
    _, truth = groups(3, distance=3.0)
    log_probs = log_softmax(1.7 * truth, axis=1)
    points, probs = log_probs[:, :2] - log_probs[:, 2:], np.exp(log_probs)
    size = probs.sum(0)
    means = probs.T @ points / size[:, None]
    within = sum((probs[:, [y]] * (points - means[y])).T @ (points - means[y]) for y in range(3)) / len(points)
    start = {"weights_init": size / len(points), "means_init": means, "precisions_init": np.linalg.inv(within)}
    fitted = GaussianMixture(3, covariance_type="tied", max_iter=500, tol=1e-7, **start).fit(points)
    target = fitted.predict_proba(points)
    candidates = np.exp(np.linspace(-1, 2, 601))
    surprise = [-(target * log_softmax(log_probs / t, axis=1)).sum() for t in candidates]
    # The prior weighs about as much as 20 of the 6,000 cells.
    assert temperature_of(log_probs) == pytest.approx(candidates[np.argmin(surprise)], rel=0.02)


def test_a_direction_that_separates_no_groups_makes_all_cells_unsure():
    noise = 4 * np.random.default_rng(0).normal(size=(2_000, 1))  # one group, which the model takes for two
    log_probs = log_softmax(np.hstack([noise, -noise]), axis=1)
    assert softmax(log_probs, axis=1).max(1).mean() > 0.9
    assert temperature_of(log_probs) > 2


@pytest.mark.parametrize("k", [2, 4])
def test_groups_that_are_clearly_apart_stay_so(k):
    _, truth = groups(k, n_cells=500, distance=12.0)
    calibrated = softmax(truth / temperature_of(truth), axis=1)
    assert (calibrated.max(1) > 0.95).mean() > 0.99


def test_components_may_be_numbered_in_any_way_and_rows_need_not_be_normalised():
    _, truth = groups(4, n_cells=800)
    found = temperature_of(2 * truth)
    assert temperature_of(2 * truth[:, [2, 0, 3, 1]]) == pytest.approx(found, rel=1e-3)
    assert temperature_of(2 * truth[::-1] + 5.0) == pytest.approx(found, rel=1e-3)


@pytest.mark.parametrize("shape", [(0, 3), (0, 1), (5, 1)])
def test_without_cells_or_for_one_component_the_temperature_is_1(shape):
    assert temperature_of(np.zeros(shape)) == 1


def test_cells_that_are_all_alike_leave_the_temperature_at_1():
    assert temperature_of(np.tile(np.log([0.7, 0.2, 0.1], dtype=np.float32), (40, 1))) == 1


@pytest.mark.parametrize("n_cells", [1, 2, 3, 8])
def test_a_few_cells_change_little(n_cells):
    _, truth = groups(5, n_cells=n_cells)
    assert 1 / 3 < temperature_of(truth) < 3


def test_components_without_a_held_out_cell_do_no_harm():
    _, truth = groups(2, n_cells=2_000)
    unused = np.full((2_000, 3), -87.0)
    assert temperature_of(np.hstack([2 * truth, unused])) == pytest.approx(temperature_of(2 * truth), rel=0.25)


def test_cells_without_finite_numbers_are_left_out():
    _, truth = groups(3, n_cells=600)
    broken = np.full((2, 3), np.nan)
    assert temperature_of(np.vstack([broken, truth])) == pytest.approx(temperature_of(truth), rel=1e-9)


def test_of_many_cells_a_sample_tells():
    _, truth = groups(3, n_cells=25_000)
    assert np.log(temperature_of(2 * truth, random_state=1) / 2) == pytest.approx(0, abs=NEAR)
    assert temperature_of(2 * truth, random_state=1) == temperature_of(2 * truth, random_state=1)
