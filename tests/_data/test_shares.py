"""Shares of the cells of an epoch: all processes draw one order, and each takes its part of it."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from independent import seeded

from scvae_tools._data.loader import Batches
from scvae_tools._data.shares import Share
from scvae_tools._data.window_steps import WindowSteps


def batches_of(share, n_cells=103, batch_size=8, *, drop_last=False):
    return Batches(np.arange(n_cells) * 3, batch_size, shuffle=True, drop_last=drop_last, share=share)


def windows_of(share, n_cells, run_length=5, n_of_window=20):
    cells = np.arange(n_cells)
    return WindowSteps(cells, 4, n_of_window, drop_single=False, run_length=run_length, share=share)


def cells_of_windows(steps):
    return [steps.windows[number][places] for number, batches in steps.draw() for places in batches]


@pytest.mark.parametrize("number", [2, 3, 8])
def test_no_cell_is_in_two_shares_and_fewer_than_the_processes_are_left_over(number):
    epochs = [[np.concatenate(list(loader)) for loader in loaders] for loaders in _epochs(number, 40)]
    for shares in epochs:
        assert {len(share) for share in shares} == {103 // number}
        cells = np.concatenate(shares)
        assert len(np.unique(cells)) == len(cells)
        assert set(cells) <= set(np.arange(103) * 3)
    seen = np.unique(np.concatenate([np.concatenate(shares) for shares in epochs]))
    assert len(seen) == 103  # those that are left over are others in each epoch


def _epochs(number, n_epochs):
    loaders = [batches_of(Share(rank, number, seed=1)) for rank in range(number)]
    return [loaders] * n_epochs


@pytest.mark.parametrize("number", [2, 3, 5])
def test_all_shares_have_the_same_steps(number):
    loaders = [batches_of(Share(rank, number)) for rank in range(number)]
    sizes = [list(map(len, loader)) for loader in loaders]
    assert all(each == sizes[0] for each in sizes)
    assert len(sizes[0]) == len(loaders[0]) == -(-(103 // number) // 8)


def test_the_shares_are_every_so_many_th_cell_of_the_order_that_torch_draws():
    order = torch.randperm(103, generator=torch.Generator().manual_seed(4)).numpy() * 3
    for rank in (0, 1):
        with seeded(rank):  # what each draws beside has no effect
            found = np.concatenate(list(batches_of(Share(rank, 2, seed=4))))
        np.testing.assert_array_equal(found, order[rank:102:2])


def test_a_single_process_draws_as_before():
    with seeded(3):
        found = np.concatenate(list(batches_of(Share())))
    with seeded(3):
        expected = torch.randperm(103).numpy() * 3
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize(("number", "n_cells"), [(2, 103), (3, 100), (4, 17), (2, 9)])
def test_windows_of_processes_share_the_cells_of_an_epoch(number, n_cells):
    steps = [windows_of(Share(rank, number, seed=2), n_cells) for rank in range(number)]
    assert len({str(each.sizes) for each in steps}) == 1
    missed = []
    for _ in range(60):
        parts = [cells_of_windows(each) for each in steps]
        assert [list(map(len, part)) for part in parts] == [
            [n for sizes in each.sizes for n in sizes] for each in steps
        ]
        cells = np.concatenate([np.concatenate(part) for part in parts])
        assert len(np.unique(cells)) == len(cells) == n_cells // number * number
        missed.append(set(range(n_cells)) - set(cells))
    assert set.intersection(*missed) == set()


def test_windows_of_processes_hold_runs_of_neighbours():
    steps = windows_of(Share(1, 2, seed=0), 100)
    list(steps.draw())
    cells = np.sort(np.concatenate(steps.windows))
    assert len(cells) == 50
    assert (np.diff(cells) == 1).sum() >= 40  # ten runs of five


@pytest.mark.parametrize("number", [1, 2, 3])
def test_an_epoch_of_very_many_cells_is_as_long_for_all_processes_together(number, monkeypatch):
    from scvae_tools._data import loader

    monkeypatch.setattr(loader, "LARGEST_EPOCH", 60)
    found = [np.concatenate(list(batches_of(Share(rank, number)))) for rank in range(number)]
    assert len(np.unique(np.concatenate(found))) == 60
    parts = [np.concatenate(cells_of_windows(windows_of(Share(rank, number), 103))) for rank in range(number)]
    assert len(np.unique(np.concatenate(parts))) == 60 // (5 * number) * 5 * number
