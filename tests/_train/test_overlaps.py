"""Overlaps of the components of a mixture."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.special import xlogy

from scvae_tools._train.overlaps import overlaps


def overlaps_of(probs):
    """Overlaps of probabilities (n, k), (k, k)."""
    return overlaps(torch.as_tensor(probs).T[None])[0].numpy()


def test_overlap_is_the_entropy_lost_by_merging_over_the_cells_of_the_smaller():
    rng = np.random.default_rng(0)
    probs = rng.dirichlet(np.ones(4), size=50)

    def entropy(columns):
        return -xlogy(columns, columns).sum()

    for i, j in ((0, 1), (2, 0), (3, 2)):
        merged = np.c_[np.delete(probs, [i, j], axis=1), probs[:, i] + probs[:, j]]
        expected = (entropy(probs) - entropy(merged)) / min(probs[:, i].sum(), probs[:, j].sum())
        assert overlaps_of(probs)[i, j] == pytest.approx(expected)
    assert np.all(np.diag(overlaps_of(probs)) == 0)


def test_two_halves_of_one_component_overlap_by_twice_log_two():
    halves = np.c_[np.full((10, 2), 0.5), np.zeros(10)]
    assert overlaps_of(halves)[0, 1] == pytest.approx(2 * np.log(2))
    assert overlaps_of(halves)[0, 2] == 0


def test_a_cell_can_stand_for_several():
    """Probabilities times 3 are three equal cells."""
    rng = np.random.default_rng(1)
    probs, times = rng.dirichlet(np.ones(3), size=20), rng.integers(1, 4, 20)
    np.testing.assert_allclose(overlaps_of(probs * times[:, None]), overlaps_of(np.repeat(probs, times, axis=0)))
