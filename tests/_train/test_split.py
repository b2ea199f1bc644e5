"""Split of the cells: every cell is in one part, and each label keeps a cell to train on."""

from __future__ import annotations

import numpy as np
import pytest
from independent import seeded

from scvae_tools._train.split import Split, split_cells


def assert_divides(split, n_cells):
    np.testing.assert_array_equal(np.sort(np.concatenate(split)), np.arange(n_cells))
    assert all((np.diff(part) > 0).all() for part in split)


@pytest.mark.parametrize(("train_size", "n_train"), [(0.9, 90), (1.0, 100), (0.005, 1), (0.333, 33)])
def test_a_share_is_drawn_to_train_on(train_size, n_train):
    with seeded(0):
        split = split_cells(100, train_size, None, None)
    assert_divides(split, 100)
    assert len(split.train) == n_train


def test_the_draw_is_that_of_the_seed():
    with seeded(1):
        one = split_cells(50, 0.5, None, None)
    with seeded(1):
        same = split_cells(50, 0.5, None, None)
    with seeded(2):
        other = split_cells(50, 0.5, None, None)
    np.testing.assert_array_equal(one.train, same.train)
    assert not np.array_equal(one.train, other.train)


@pytest.mark.parametrize("given", [[3, 1, 3], np.array([1, 3]), np.arange(6) % 2 * (np.arange(6) < 4) == 1, [-3, -5]])
def test_given_cells_are_held_out(given):
    split = split_cells(6, 0.9, given, None)
    assert split.validation.tolist() == [1, 3]
    assert_divides(split, 6)


def test_cells_must_be_left_to_train_on():
    with pytest.raises(ValueError, match="must leave cells to train on; found all 4 held out"):
        split_cells(4, 0.9, range(4), None)


@pytest.mark.parametrize("seed", range(5))
def test_a_random_draw_keeps_a_cell_of_each_label(seed):
    component = np.r_[np.zeros(40, int), 1, 2, 2, np.full(40, -1)]
    with seeded(seed):
        split = split_cells(len(component), 0.1, None, component)
    assert set(component[split.train]) >= {0, 1, 2}
    assert_divides(split, len(component))


def test_labels_whose_cells_are_all_held_out_are_named_with_their_first_cell():
    component = np.array([0, 1, 1, -1, 2, 2])
    split = Split(np.array([0, 4]), np.array([1, 2, 3, 5]))
    assert split.held_out(component) == {1: 1}
    assert split.held_out(None) == {}
