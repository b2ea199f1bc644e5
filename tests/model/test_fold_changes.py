"""Fold changes, their standard errors and tests: against Poisson regression, optimisation and other distributions."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import optimize, stats

from scvae_tools.model._count_evidence import CountEvidence
from scvae_tools.model._fold_changes import (
    OF_BATCH,
    OF_GROUP,
    FoldChanges,
    adjusted_p_values,
    fold_changes,
    log_ratios,
    variances,
)

K, B, G = 3, 4, 5
RNG = np.random.default_rng(0)
INFORMATION = RNG.gamma(1.0, 20.0, (K, B, G))
CONTRASTS = np.array([[1.0, -1.0, 0.0], [-0.7, 1.0, -0.3]])


def test_variances_are_those_of_a_poisson_regression_with_terms_of_groups_and_batches():
    found = variances(INFORMATION, CONTRASTS)
    group, batch = (each.ravel() for each in np.mgrid[:K, :B])
    design = np.hstack([np.eye(K)[group], np.eye(B)[batch]])
    prior = np.diag([0.0] * K + [OF_BATCH] * B)
    for g in range(G):
        fisher = design.T @ np.diag(INFORMATION[:, :, g].ravel()) @ design + prior
        covariance = np.linalg.inv(fisher)[:K, :K]
        np.testing.assert_allclose(found[:, g], np.diag(CONTRASTS @ covariance @ CONTRASTS.T), rtol=1e-5)


def test_without_batches_the_variance_is_the_sum_of_the_reciprocals():
    information = INFORMATION[:, :1]
    expected = 1 / information[0, 0] + 1 / information[1, 0]
    np.testing.assert_allclose(variances(information, CONTRASTS)[0], expected)


def test_groups_that_share_no_batch_are_compared_by_what_is_known_of_batches_alone():
    information = np.zeros((2, 2, 1))
    information[0, 0] = information[1, 1] = 1e6
    np.testing.assert_allclose(variances(information, np.array([[1.0, -1.0]])), 2 / OF_BATCH, rtol=1e-3)


def test_nothing_is_known_of_a_group_without_information():
    information = np.stack([np.full((B, 1), 50.0), np.zeros((B, 1))])
    changes = FoldChanges(np.array([[3.0]]), np.sqrt(variances(information, np.array([[1.0, -1.0]]))))
    assert changes.p_values() > 0.9


def test_log_ratios_maximise_the_poisson_likelihood_with_its_prior():
    expected = RNG.gamma(2.0, 5.0, (K, B, 1))
    observed = RNG.poisson(expected * np.exp(RNG.normal(size=(K, 1, 1)) + RNG.normal(size=(1, B, 1)))).astype(float)

    def negative(terms):
        group, batch = terms[:K, None], terms[None, K:]
        each = observed[..., 0] * (group + batch) - expected[..., 0] * np.exp(group + batch)
        prior = OF_GROUP * (group - np.exp(group)).sum() + OF_BATCH * (batch - np.exp(batch)).sum()
        return -each.sum() - prior

    best = optimize.minimize(negative, np.zeros(K + B), tol=1e-10).x[:K]
    found = log_ratios(observed, expected)[:, 0]
    # Where the priors pull at the common level, either end may give way; comparisons are what is used.
    np.testing.assert_allclose(CONTRASTS @ found, CONTRASTS @ best, atol=0.05)


@pytest.mark.parametrize("delta", [0.0, 0.2, 1.0])
def test_p_values_are_tails_of_the_noncentral_chi_squared_distribution(delta):
    mean, error = RNG.normal(size=(2, 6)), RNG.gamma(2.0, 0.3, (2, 6))
    expected = stats.ncx2.sf((mean / error) ** 2, 1, (delta / error) ** 2)
    if delta == 0:
        expected = stats.chi2.sf((mean / error) ** 2, 1)
    np.testing.assert_allclose(FoldChanges(mean, error).p_values(delta), expected, rtol=1e-6)


def test_a_difference_without_error_is_certain_beyond_delta_alone():
    changes = FoldChanges(np.array([[0.5, 0.1, 0.0]]), np.zeros((1, 3)))
    np.testing.assert_array_equal(changes.p_values(0.2), [[0.0, 1.0, 1.0]])


def test_adjusted_p_values_are_the_smallest_rate_at_which_a_gene_is_called():
    p_values = RNG.random((2, 30)) ** 3
    for row, found in zip(p_values, adjusted_p_values(p_values), strict=True):
        at_least = [min(30 * q / (row <= q).sum() for q in row if q >= p) for p in row]
        np.testing.assert_allclose(found, np.minimum(at_least, 1))


def test_more_variable_counts_than_the_likelihood_says_widen_the_error():
    shape = (2, 3)
    arrays = [np.zeros(shape), np.full(shape, 0.01), *(np.full((2, 1, 3), 50.0) for _ in range(3))]
    changes = fold_changes(CountEvidence(*arrays, np.array([1.0, 2.0, 4.0])), np.array([[1.0, -1.0]]))
    np.testing.assert_allclose(changes.standard_error[0] ** 2, np.array([1, 2, 4]) * 2 / 50 + 0.02)
    np.testing.assert_allclose(changes.mean, 0)
