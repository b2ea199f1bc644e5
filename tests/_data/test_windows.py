"""Windows of cells on a device: every cell once an epoch, and the batches of the cells that are all there."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import sparse
from scvi import REGISTRY_KEYS

import scvae_tools as svt
from scvae_tools._data import window_steps, windows
from scvae_tools._data.loader import CountDataset
from scvae_tools._data.resident import ResidentCells, n_bytes_on_device
from scvae_tools._data.windows import CellWindows, held_on_device
from scvae_tools.likelihoods import LIKELIHOODS

N_CELLS, N_GENES = 210, 12
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def dataset():
    adata = svt.datasets.simulate(N_CELLS, N_GENES, 2, n_batches=2, random_state=0)
    adata.obs["age"] = np.linspace(20, 80, N_CELLS)
    svt.SCVAE.setup_anndata(adata, batch_key="batch", continuous_covariate_keys=["age"])
    made = CountDataset(svt.SCVAE(adata, mixture=False, n_hidden=4).adata_manager, LIKELIHOODS["nb"])
    x = made.counts.toarray() * (np.random.default_rng(0).random((N_CELLS, 1)) < 0.9)  # and cells without counts
    made.counts = sparse.csr_matrix(x.astype(np.float32))
    return made


def windows_of(dataset, share):
    """Both windows together take so large a share of all cells."""
    return CellWindows(dataset, CPU, share * n_bytes_on_device(dataset))


def assert_same_batches(found, expected):
    assert set(found) == set(expected)
    counts, expected_counts = found.pop(REGISTRY_KEYS.X_KEY), expected.pop(REGISTRY_KEYS.X_KEY)
    torch.testing.assert_close(counts.dense(), expected_counts.dense(), rtol=0, atol=0)
    torch.testing.assert_close(counts.log_base_measure, expected_counts.log_base_measure, rtol=1e-5, atol=1e-6)
    for name, value in found.items():
        assert torch.equal(value, expected[name])


INDICES = {
    "all": np.arange(N_CELLS),
    "most": np.flatnonzero(np.arange(N_CELLS) % 7 > 0),
    "in any order": np.random.default_rng(0).permutation(N_CELLS)[:100],
    "again and again": np.random.default_rng(0).integers(N_CELLS, size=90),
    "one": np.array([7]),
}


@pytest.mark.parametrize("share", [2.5, 0.5, 0.1, 0.03])
@pytest.mark.parametrize("indices", INDICES)
def test_batches_of_windows_are_those_of_all_cells(indices, share, dataset):
    resident, held = ResidentCells(dataset, CPU), windows_of(dataset, share)
    batches = held.batches(INDICES[indices], 8)
    low, found = 0, list(batches)
    assert len(found) == len(batches)
    for batch in found:
        n = len(batch[REGISTRY_KEYS.X_KEY])
        assert_same_batches(batch, resident[INDICES[indices][low : low + n]])
        low += n
    assert low == len(INDICES[indices])


def test_two_readers_of_the_same_places_do_not_disturb_each_other(dataset):
    resident, held = ResidentCells(dataset, CPU), windows_of(dataset, 0.2)
    order = np.arange(100)
    for i, (a, b) in enumerate(zip(held.batches(order, 5), held.batches(order[::-1], 5), strict=True)):
        assert_same_batches(a, resident[order[5 * i : 5 * i + 5]])
        assert_same_batches(b, resident[order[::-1][5 * i : 5 * i + 5].copy()])


@pytest.mark.parametrize("share", [0.5, 0.1])
def test_windows_take_no_more_than_they_may(share, dataset):
    """Whichever cells they hold, the fullest ones included."""
    held = windows_of(dataset, share)
    room = share * n_bytes_on_device(dataset)
    assert 0.8 * room < held.n_bytes <= room + 100
    fullest = np.argsort(-np.diff(dataset.counts.indptr))
    for batch in held.batches(fullest, 1000):
        assert len(batch[REGISTRY_KEYS.X_KEY]) <= held.n_cells


@pytest.mark.parametrize("drop_single", [False, True])
@pytest.mark.parametrize("batch_size", [8, 32, 100])
@pytest.mark.parametrize("run_length", [1, 4, 64])
def test_an_epoch_has_every_cell_once(run_length, batch_size, drop_single, dataset, monkeypatch):
    monkeypatch.setattr(window_steps, "RUN_LENGTH", run_length)
    held, indices = windows_of(dataset, 0.7), INDICES["most"][:173]
    loader = held.steps(indices, batch_size, drop_single=drop_single)
    resident, orders = ResidentCells(dataset, CPU), []
    for epoch in range(3):
        torch.manual_seed(epoch)
        seen, sizes, n_groups = [], [[] for _ in loader.steps.sizes], 0
        for number, positions in loader:
            cells = held.of_window(loader.windows, number)
            n_groups += 1
            for own in positions:
                cell = loader.windows[number][own]
                assert_same_batches(cells[own], resident[cell])
                seen += cell.tolist()
                sizes[number].append(len(own))
        assert sizes == loader.steps.sizes
        assert n_groups == len(loader)
        assert loader.n_steps == sum(map(len, sizes))
        n_dropped = sum(len(window) % batch_size == 1 for window in loader.windows) if drop_single else 0
        assert len(seen) == len(set(seen)) == len(indices) - n_dropped
        assert set(seen) <= set(indices.tolist())
        orders.append(seen)
    assert orders[0] != orders[1] != orders[2]


def test_windows_consist_of_runs_from_all_over_the_data(dataset, monkeypatch):
    monkeypatch.setattr(window_steps, "RUN_LENGTH", 4)
    held = windows_of(dataset, 0.5)
    loader, indices = held.steps(np.arange(N_CELLS), 8, drop_single=False), np.arange(N_CELLS)
    list(loader)
    assert len(loader.windows) > 2
    for window in loader.windows[:-1]:
        assert len(window) % 8 == 0  # no step is smaller but in the last window
        runs = window.reshape(-1, 4)
        assert (np.diff(runs, axis=1) == 1).all()
        assert np.ptp(window) > N_CELLS / 2
    assert sorted(np.concatenate(loader.windows)) == indices.tolist()


def test_a_window_is_gathered_while_the_one_before_is_used(dataset):
    """Each of them once, and the next as soon as the present one is there."""
    held, filled = windows_of(dataset, 0.2), []
    for place in held.places:
        original = place.fill
        place.fill = lambda window, original=original: (filled.append(window.tolist()), original(window))
    parts = [np.arange(low, low + 10) for low in range(0, 50, 10)]
    for number in range(len(parts)):
        held.of_window(parts, number)
        if held._coming is not None:
            held._coming[1].result()
        assert filled == [part.tolist() for part in parts[: number + 2]]


@pytest.mark.parametrize(("made", "read"), [(True, True), (True, False), (False, True)])
def test_windows_may_be_made_and_read_in_inference_mode(made, read, dataset):
    """As by evaluations. The thread that copies is not in that mode."""
    with torch.inference_mode(mode=made):
        held = windows_of(dataset, 0.2)
    with torch.inference_mode(mode=read):
        batches = list(held.batches(np.arange(60), 8))
    for batch, low in zip(batches, range(0, 60, 8), strict=True):
        assert_same_batches(batch, ResidentCells(dataset, CPU)[np.arange(low, min(low + 8, 60))])


def test_a_window_is_not_larger_than_is_of_use(dataset, monkeypatch):
    monkeypatch.setattr(windows, "LARGEST_WINDOW", n_bytes_on_device(dataset) / 10)
    assert windows_of(dataset, 0.9).n_bytes <= n_bytes_on_device(dataset) / 5 + 100


def test_memory_that_torch_keeps_for_later_is_free(monkeypatch):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (100, 1000))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 70)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 30)
    assert windows.free_memory(torch.device("cuda")) == 140


def test_an_error_in_the_gathering_is_an_error_of_the_reader(dataset):
    held = windows_of(dataset, 0.2)
    with pytest.raises(IndexError):
        list(held.batches(np.array([0, N_CELLS + 5]), 1))


def test_a_window_without_room_for_a_cell_is_refused(dataset):
    with pytest.raises(ValueError, match="needs room for two cells at least; found 2e-08 GB for them on cpu"):
        CellWindows(dataset, CPU, 20)


def test_the_host_keeps_the_cells_unless_it_is_told_otherwise(dataset):
    assert held_on_device(dataset, CPU, hold=None) is None
    assert held_on_device(dataset, CPU, hold=False) is None
    assert isinstance(held_on_device(dataset, CPU, hold=True), ResidentCells)


@pytest.mark.parametrize(("share", "expected"), [(0.4, "all"), (0.6, "windows")])
def test_a_gpu_holds_the_cells_that_take_half_of_its_free_memory_and_else_windows(
    share, expected, dataset, monkeypatch
):
    """Without a GPU: what it would say, and what would be made."""
    free, device = n_bytes_on_device(dataset) / share, torch.device("cuda")
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free, 2 * free))
    monkeypatch.setattr(windows, "ResidentCells", lambda dataset, device: "all")
    monkeypatch.setattr(windows, "CellWindows", lambda dataset, device, n_bytes: "windows")
    monkeypatch.setattr(windows, "SMALLEST_WINDOW", 20)
    for hold in (None, True):
        assert held_on_device(dataset, device, hold=hold) == expected
    assert held_on_device(dataset, device, hold=False) is None
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (1000, 2000))  # as good as full
    assert held_on_device(dataset, device, hold=None) is None
    assert held_on_device(dataset, device, hold=True) == "windows"
