"""Test for a valley between two sets of points, beside a linear program and simulations."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import optimize

from scvae_tools._train import modes
from scvae_tools._train.modes import (
    dip,
    merge_without_valley,
    p_value_of_one_mode,
    p_value_of_rare,
    p_value_of_split,
    p_values_of_parts,
)


def dip_by_linear_programs(points):
    """Least D for which a distribution function that is convex before a point and concave after it is within D.

    At the points, where such a function is at most D from both sides of each step of the sample's.
    """
    x = np.sort(points)
    n = len(x)
    above, below = np.arange(1, n + 1) / n, np.arange(n) / n
    least = np.inf
    for mode in range(n):
        rows, limits = [], []
        for i in range(n):  # F_i + D >= i / n and F_i - D <= (i - 1) / n, where the mode may hold a step of F
            row = np.zeros(n + 1)
            row[i], row[n] = -1, -1
            rows.append(row)
            limits.append(-above[i])
            row = np.zeros(n + 1)
            row[i], row[n] = 1, -1
            rows.append(row)
            limits.append(below[i])
        for i in range(1, n - 1):
            slope = np.zeros(n + 1)
            slope[i + 1] += 1 / (x[i + 1] - x[i])
            slope[i] -= 1 / (x[i + 1] - x[i]) + 1 / (x[i] - x[i - 1])
            slope[i - 1] += 1 / (x[i] - x[i - 1])
            if i != mode:
                rows.append(-slope if i < mode else slope)
                limits.append(0.0)
        for i in range(n - 1):
            row = np.zeros(n + 1)
            row[i], row[i + 1] = 1, -1
            rows.append(row)
            limits.append(0.0)
        cost = np.r_[np.zeros(n), 1.0]
        found = optimize.linprog(cost, A_ub=np.array(rows), b_ub=limits, bounds=[(0, 1)] * n + [(0, 1)])
        least = min(least, found.fun)
    return least


@pytest.mark.parametrize("n_modes", [1, 2, 3])
@pytest.mark.parametrize("seed", range(3))
def test_the_dip_is_the_least_distance_from_all_distributions_with_one_mode(n_modes, seed):
    rng = np.random.default_rng(seed)
    points = rng.normal(size=24) + 6 * rng.integers(n_modes, size=24)
    assert dip(points) == pytest.approx(dip_by_linear_programs(points), rel=0.08)


def test_the_dip_does_not_depend_on_place_and_scale_and_is_zero_for_equal_points():
    points = np.random.default_rng(0).normal(size=50)
    assert dip(1e4 * points - 3) == pytest.approx(dip(points))
    assert dip(np.ones(9)) == 0.0


@pytest.mark.parametrize("n", [50, 100, 300])
def test_the_p_value_of_uniform_samples_is_uniform_and_smaller_for_two_modes(n):
    rng = np.random.default_rng(0)
    uniform = [p_value_of_one_mode(rng.uniform(size=n)) for _ in range(400)]
    assert np.mean(np.array(uniform) <= 0.05) == pytest.approx(0.05, abs=0.03)
    normal = [p_value_of_one_mode(rng.normal(size=n)) for _ in range(100)]
    assert np.mean(np.array(normal) <= 0.05) <= 0.02  # the uniform distribution is the least favourable
    assert p_value_of_one_mode(np.r_[rng.normal(size=n // 2), 6 + rng.normal(size=n // 2)]) < 0.01


@pytest.mark.parametrize("share", [0.5, 0.1])
def test_halves_of_one_population_have_no_valley_and_two_populations_have_one(share):
    rng = np.random.default_rng(0)
    n_rejected = 0
    for _ in range(40):
        points = rng.normal(size=(400, 5))
        order = np.argsort(points[:, 0] + 0.2 * points[:, 1])
        n_second = round(share * 400)
        n_rejected += p_value_of_split(points[order[n_second:]], points[order[:n_second]], rng) <= 0.05
    assert n_rejected <= 3
    first, second = rng.normal(size=(400, 5)), rng.normal(size=(round(400 * share), 5)) + np.r_[6.0, 0, 0, 0, 0]
    assert p_value_of_split(first, second, rng) < 0.005
    assert p_value_of_split(first, second[:2], rng) == 1.0


@pytest.mark.parametrize("n_rare", [30, 300, 5000])
def test_a_rare_population_beside_many_cells_has_a_valley_and_a_tail_has_none(n_rare):
    """Where all points take part in the fit, and where but a part of them does."""
    rng = np.random.default_rng(n_rare)
    others = rng.normal(size=(50_000, 4))
    rare = rng.normal(size=(n_rare, 4)) + np.r_[0, 0, 7.0, 0]
    assert p_value_of_rare(rare, others, rng) < 0.001
    is_tail = others[:, 0] >= np.sort(others[:, 0])[-n_rare]
    assert p_value_of_rare(others[is_tail], others[~is_tail], rng) > 0.05
    assert p_value_of_rare(rare, others[:3], rng) == 1.0


@pytest.mark.parametrize("largest_fit", [1_000, 20_000])
def test_a_part_of_the_cells_is_enough_for_the_direction_of_a_rare_population(largest_fit, monkeypatch):
    """At a distance of 7; at 5.5, 14 of 20 rare populations of 100 cells are told apart with all cells."""
    monkeypatch.setattr(modes, "LARGEST_FIT", largest_fit)
    rng = np.random.default_rng(0)
    for _ in range(10):
        rare = rng.normal(size=(100, 4)) + np.r_[7.0, 0, 0, 0]
        assert p_value_of_rare(rare, rng.normal(size=(20_000, 4)), rng) < 0.01


def test_pieces_of_a_gradient_are_merged_and_populations_are_kept():
    rng = np.random.default_rng(0)
    gradient = np.c_[rng.uniform(0, 20, 600), rng.normal(size=(600, 2))]
    apart = rng.normal(size=(60, 3)) + np.r_[0, 9, 0]
    points = np.concatenate([gradient, apart])
    cut = np.r_[np.minimum(gradient[:, 0] // 5, 3), np.full(60, 4)].astype(int)
    merged, p_values = merge_without_valley(points, cut, fewest=1, alpha=0.05, rng=rng)
    assert p_values.shape == (2, 2)
    assert p_values[0, 1] == p_values[1, 0] <= 0.05
    assert sorted(np.bincount(merged)) == [60, 600]
    assert len(np.unique(merged[cut == 4])) == 1
    kept, p_values = merge_without_valley(points, cut, fewest=4, alpha=0.05, rng=rng)
    assert kept.max() + 1 == 4
    is_apart = np.arange(4) == kept[-1]
    assert (p_values[is_apart][:, ~is_apart] <= 0.05).all()
    assert np.sum(p_values[~is_apart][:, ~is_apart] <= 0.05) == 2  # first and last third, which do not touch


@pytest.mark.parametrize("most_rare", [2_000, 200])
def test_pieces_of_one_population_have_large_p_values_and_populations_have_small_ones(most_rare, monkeypatch):
    monkeypatch.setattr(modes, "MOST_RARE", most_rare)
    rng = np.random.default_rng(1)
    one, other = rng.normal(size=(1_500, 3)), rng.normal(size=(500, 3)) + np.r_[0, 0, 6]
    few = rng.normal(size=(3, 3)) + np.r_[0, 30, 0]
    points = np.concatenate([one, other, few])
    label = np.r_[one[:, 0] > 0.5, np.full(500, 2), np.full(3, 3)].astype(int)
    p_values = p_values_of_parts(points, label, 5, rng)
    np.testing.assert_array_equal(p_values, p_values.T)
    assert p_values[0, 1] > 0.05
    assert p_values[0, 2] < 1e-4
    assert p_values[1, 2] < 1e-4
    assert (p_values[3:] == 1).all()  # three cells, and none
    assert (np.diag(p_values) == 1).all()


def test_p_values_below_those_of_the_samples_are_those_of_many_more_samples(monkeypatch):
    rng, n = np.random.default_rng(5), 64
    dips = np.sort([dip(rng.uniform(size=n)) for _ in range(20_000)])[::-1]
    p_value_of_one_mode(rng.uniform(size=n))  # draws the samples to compare with
    for n_larger in (20, 10):  # p values of 0.001 and 0.0005, where the 2,000 samples have two and one
        monkeypatch.setattr(modes, "dip", lambda points, n_larger=n_larger: dips[n_larger])
        assert 0.5 < p_value_of_one_mode(np.zeros(n)) / (n_larger / len(dips)) < 2
