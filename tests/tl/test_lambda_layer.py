"""Room for the layer of λ: a disk that has none is found before the training."""

from __future__ import annotations

import shutil

import anndata as ad
import h5py
import numpy as np
import pytest

import scvae_tools as svt
from scvae_tools._files import DiskFullError
from scvae_tools.tl import _scvae
from scvae_tools.tl._lambda_layer import size_of_rate

N_CELLS, N_GENES = 60, 500
PLACES = {
    "the file of the AnnData": lambda _: True,
    "a memory map": lambda path: np.lib.format.open_memmap(path / "x.npy", "w+", np.float32, (N_CELLS, N_GENES)),
    "HDF5": lambda path: h5py.File(path / "x.h5", "w").create_dataset("x", (N_CELLS, N_GENES), np.float32),
}


@pytest.mark.parametrize("name", PLACES)
def test_without_room_for_lambda_no_training_begins(name, tmp_path, monkeypatch):
    svt.datasets.simulate(N_CELLS, N_GENES, 2).write_h5ad(tmp_path / "a.h5ad")
    adata = ad.read_h5ad(tmp_path / "a.h5ad", backed="r+")
    place = PLACES[name](tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**9, 10**9 - 100, 100))
    monkeypatch.setattr(_scvae, "build_model", None)  # nothing was computed yet
    with pytest.raises(DiskFullError, match=r"cannot be written, and is as it was: it takes [\d.]+ (kB|bytes) or more"):
        svt.tl.scvae(adata, write_lambda=place)


def test_the_size_of_lambda_is_that_of_float32_where_it_is_written():
    adata = svt.datasets.simulate(N_CELLS, N_GENES, 2)
    assert size_of_rate(adata, None) == size_of_rate(adata, True) == N_CELLS * N_GENES * 4
    assert size_of_rate(adata, False) == 0
