"""Windows of cells read ahead from a file: each cell once an epoch, and batches as of the cells in memory."""

from __future__ import annotations

import threading

import anndata
import numpy as np
import pytest
import torch
from scipy import sparse
from scvi import REGISTRY_KEYS

import scvae_tools as svt
from scvae_tools._data import conversion, host_windows, loader, stored
from scvae_tools._data.host_windows import WindowLoader, WindowTrainingLoader, read_ahead
from scvae_tools._data.loader import CountDataset
from scvae_tools._data.resident import ResidentCells, n_bytes_on_device
from scvae_tools._data.stored import StoredCounts
from scvae_tools._data.windows import CellWindows
from scvae_tools.likelihoods import LIKELIHOODS

N_CELLS, N_GENES = 210, 12


@pytest.fixture(autouse=True)
def _small(monkeypatch):
    monkeypatch.setattr(stored, "LARGEST_WHOLE", 0)
    monkeypatch.setattr(conversion, "BLOCK", 300)
    monkeypatch.setattr(host_windows, "WINDOW_BYTES", 8 * 40 * N_GENES)
    monkeypatch.setattr(host_windows, "FEWEST_RUNS", 8)


def make_adata():
    adata = svt.datasets.simulate(N_CELLS, N_GENES, 2, n_batches=2, random_state=0)
    adata.X = sparse.csr_matrix(adata.X)
    adata.obs["age"] = np.linspace(20, 80, N_CELLS)
    return adata


def dataset_of(adata) -> CountDataset:
    svt.SCVAE.setup_anndata(adata, batch_key="batch", continuous_covariate_keys=["age"])
    return CountDataset(svt.SCVAE(adata, mixture=False, n_hidden=4).adata_manager, LIKELIHOODS["nb"])


@pytest.fixture
def pair(tmp_path):
    """Data sets of the same cells, in a file and in memory."""
    adata = make_adata()
    adata.write_h5ad(tmp_path / "a.h5ad")
    in_file = dataset_of(anndata.read_h5ad(tmp_path / "a.h5ad", backed="r"))
    assert isinstance(in_file.counts, StoredCounts)
    return in_file, dataset_of(adata)


def assert_same(found, expected):
    assert set(found) == set(expected)
    one, other = found[REGISTRY_KEYS.X_KEY], expected[REGISTRY_KEYS.X_KEY]
    torch.testing.assert_close(one.dense(), other.dense(), rtol=0, atol=0)
    torch.testing.assert_close(one.log_base_measure, other.log_base_measure, rtol=1e-5, atol=1e-6)
    for name in set(found) - {REGISTRY_KEYS.X_KEY}:
        assert torch.equal(found[name], expected[name])


@pytest.mark.parametrize(
    "indices", [np.arange(N_CELLS), np.arange(0, N_CELLS, 7), np.random.default_rng(0).permutation(N_CELLS)[:100]]
)
def test_batches_in_order_are_those_of_the_cells_in_memory(indices, pair):
    in_file, in_memory = pair
    loader = WindowLoader(in_file, indices, 16)
    batches = list(loader)
    assert len(batches) == len(loader) == -(-len(indices) // 16)
    assert len(loader.windows) == -(-len(indices) // 32)
    for number, batch in enumerate(batches):
        assert_same(batch, in_memory[indices[16 * number : 16 * number + 16]])


@pytest.mark.parametrize("drop_single", [False, True])
@pytest.mark.parametrize("batch_size", [8, 16, 30])
def test_an_epoch_has_every_cell_once_in_a_new_order(batch_size, drop_single, pair):
    in_file, _ = pair
    indices = np.flatnonzero(np.arange(N_CELLS) % 10 > 0)
    in_file.columns["place"] = np.arange(N_CELLS)[:, None]
    steps = WindowTrainingLoader(in_file, indices, batch_size, drop_single=drop_single)
    orders = []
    for _ in range(2):
        batches = list(steps)
        assert len(batches) == len(steps)
        orders.append(torch.cat([batch["place"] for batch in batches]).ravel().numpy())
        n_left_out = len(indices) - len(orders[-1])
        assert n_left_out <= (len(steps.steps.sizes) if drop_single else 0)
        assert len(np.unique(orders[-1])) == len(orders[-1])
        assert set(orders[-1]) <= set(indices)
    assert not np.array_equal(*orders)


def test_an_epoch_ends_after_so_many_cells_which_are_others_each_time(pair, monkeypatch):
    monkeypatch.setattr(loader, "LARGEST_EPOCH", 64)
    in_file, _ = pair
    in_file.columns["place"] = np.arange(N_CELLS)[:, None]
    steps = WindowTrainingLoader(in_file, np.arange(N_CELLS), 8, drop_single=False)
    seen = [torch.cat([batch["place"] for batch in steps]).ravel().tolist() for _ in range(12)]
    assert {len(set(each)) for each in seen} == {60}  # whole runs
    assert len(steps) == 8
    assert len(set().union(*seen)) > 0.9 * N_CELLS


def test_a_window_holds_cells_from_all_over_the_file(pair):
    in_file, _ = pair
    steps = WindowTrainingLoader(in_file, np.arange(N_CELLS), 8, drop_single=False)
    next(iter(steps))
    for window in steps.steps.windows[:-1]:
        assert (np.diff(window) > 1).sum() >= 4
        assert np.ptp(window) > N_CELLS / 3


def test_the_next_window_is_read_while_one_is_used(pair, monkeypatch):
    in_file, _ = pair
    threads = []
    original = StoredCounts.__getitem__

    def noted(self, index):
        threads.append(threading.current_thread().name)
        return original(self, index)

    monkeypatch.setattr(StoredCounts, "__getitem__", noted)
    windows = [np.arange(10), np.arange(10, 20), np.arange(20, 30)]
    reader = read_ahead(in_file, windows)
    next(reader)
    for _ in range(200):
        if len(threads) == 2:
            break
        threading.Event().wait(0.01)
    assert len(threads) == 2
    assert all(name.startswith("scvae-window") for name in threads)
    reader.close()
    assert not any(thread.name.startswith("scvae-window") for thread in threading.enumerate())


def test_an_error_while_reading_reaches_the_reader(pair, monkeypatch):
    in_file, _ = pair
    monkeypatch.setattr(StoredCounts, "__getitem__", lambda *_: (_ for _ in ()).throw(OSError("no such row")))
    with pytest.raises(OSError, match="no such row"):
        list(WindowLoader(in_file, np.arange(N_CELLS), 8))


def test_counts_in_a_file_are_held_on_a_device_as_those_in_memory(pair):
    in_file, in_memory = pair
    for made in (
        lambda dataset: ResidentCells(dataset, "cpu"),
        lambda dataset: CellWindows(dataset, torch.device("cpu"), 0.5 * n_bytes_on_device(dataset)),
    ):
        one, other = (list(made(dataset).batches(np.arange(0, N_CELLS, 3), 8)) for dataset in pair)
        assert len(one) == len(other)
        for found, expected in zip(one, other, strict=True):
            assert_same(found, expected)
    assert in_file.count_type == in_memory.count_type
