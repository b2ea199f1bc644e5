"""Matrices that stay in a file: opened, measured, and copied to another file as they are."""

from __future__ import annotations

import errno
import os

import anndata as ad
import h5py
import numpy as np
import pytest
import zarr
from anndata.abc import CSRDataset
from scipy import sparse

from scvae_tools import _on_disk
from scvae_tools._adata_files import n_bytes_of, write_adata
from scvae_tools._files import DiskFullError
from scvae_tools._on_disk import (
    copy_on_disk,
    is_on_disk,
    is_present_format,
    matrices_in,
    missing_chunks,
    n_bytes_on_disk,
    open_adata,
    open_file,
    place_of,
)

X = np.random.default_rng(0).poisson(0.5, (60, 20)).astype(np.float32)


def make_file(path, **options):
    adata = ad.AnnData(sparse.csr_matrix(X), layers={"dense": X, "by_gene": sparse.csc_matrix(X)})
    adata.raw = adata.copy()
    adata.uns["note"] = "some"
    (adata.write_zarr if path.suffix == ".zarr" else adata.write_h5ad)(path, **options)
    return path


@pytest.fixture(params=["a.h5ad", "a.zarr"])
def path(request, tmp_path):
    return make_file(tmp_path / request.param)


def test_matrices_are_found_and_are_not_read(path):
    file = open_file(path)
    assert is_present_format(file)
    found = matrices_in(file)
    assert set(found) == {"X", "layers/dense", "layers/by_gene", "raw/X"}
    assert all(map(is_on_disk, found.values()))
    np.testing.assert_array_equal(found["X"][3:7].toarray(), X[3:7])
    assert n_bytes_on_disk(found["X"]) == 8 * (X > 0).sum() + 4 * 61
    assert n_bytes_on_disk(found["layers/dense"]) == 4 * 60 * 20
    assert place_of(found["X"]).startswith(f"'{path}', ")


def test_an_anndata_is_opened_with_its_matrices_on_disk_and_all_else_in_memory(path):
    file = open_file(path)
    adata = open_adata(file, matrices_in(file))
    assert isinstance(adata.X, CSRDataset)
    assert isinstance(adata.raw.X, CSRDataset)
    assert adata.uns["note"] == "some"
    assert adata.shape == (60, 20)
    sizes = 3 * (8 * (X > 0).sum()) + 4 * (61 + 61 + 21) + 4 * 60 * 20
    assert n_bytes_of(adata) == sizes


@pytest.mark.parametrize("name", ["X", "layers/dense", "layers/by_gene"])
@pytest.mark.parametrize("ending", ["h5ad", "zarr"])
def test_a_copy_in_another_file_is_the_same_in_blocks_of_any_size(ending, name, path, tmp_path, monkeypatch):
    monkeypatch.setattr(_on_disk, "BLOCK", 70)
    target = h5py.File(tmp_path / "b.h5ad", "w") if ending == "h5ad" else zarr.open_group(tmp_path / "b.zarr", mode="w")
    copy_on_disk(matrices_in(open_file(path))[name], target, "copy")
    found = ad.io.read_elem(target["copy"])
    assert type(found) is {"X": sparse.csr_matrix, "layers/by_gene": sparse.csc_matrix}.get(name, np.ndarray)
    np.testing.assert_array_equal(found.toarray() if sparse.issparse(found) else found, X)


def test_a_copy_within_hdf5_stays_compressed_as_it_was(tmp_path):
    file = open_file(make_file(tmp_path / "a.h5ad", compression="gzip"))
    write_adata(open_adata(file, matrices_in(file)), tmp_path / "b.h5ad")
    with h5py.File(tmp_path / "b.h5ad") as found:
        assert found["X/data"].compression == found["raw/X/data"].compression == "gzip"
    np.testing.assert_array_equal(ad.read_h5ad(tmp_path / "b.h5ad").raw.X.toarray(), X)


def test_chunks_that_are_missing_are_counted_but_those_of_zeros_are_not(tmp_path):
    make_file(tmp_path / "a.zarr")
    group = zarr.open_group(tmp_path / "a.zarr", mode="r+")
    dense = group["layers/dense"]
    dense[:] = 0
    matrix = ad.io.sparse_dataset(group["X"])
    assert missing_chunks(dense) is missing_chunks(matrix) is None
    next((tmp_path / "a.zarr/X/data").rglob("0")).unlink()
    assert missing_chunks(matrix) == f"1 of the 1 chunks of 'data' missing in '{tmp_path / 'a.zarr'}', X"


def test_shards_that_are_missing_are_counted_and_a_last_one_that_is_not_full_is_none(tmp_path):
    group = zarr.open_group(tmp_path / "a.zarr", mode="w", zarr_format=3)
    ad.io.write_elem(group, "X", sparse.csr_matrix(X))
    for name in ("data", "indices"):
        values = group["X"][name][:]
        assert len(values) % 60 != 0
        del group["X"][name]
        made = group["X"].create_array(name, shape=values.shape, chunks=(20,), shards=(60,), dtype=values.dtype)
        made[:] = values
    matrix = ad.io.sparse_dataset(group["X"])
    assert missing_chunks(matrix) is None
    n_shards = -(-int((X > 0).sum()) // 60)
    (tmp_path / "a.zarr/X/indices/c" / str(n_shards - 1)).unlink()
    assert missing_chunks(matrix).startswith(f"1 of the {n_shards} shards of 'indices' missing in ")


@pytest.mark.parametrize("room", [0, 3_000, 20_000])
def test_a_full_disk_leaves_the_former_file(room, tmp_path, monkeypatch):
    file = open_file(make_file(tmp_path / "a.h5ad"))
    adata = open_adata(file, matrices_in(file))
    (tmp_path / "b.h5ad").write_text("former")
    write, written = os.write, []

    def write_some(descriptor, data):
        if sum(written) + len(data) > room:
            raise OSError(errno.ENOSPC, "No space left on device")
        written.append(write(descriptor, data))
        return written[-1]

    monkeypatch.setattr(os, "write", write_some)
    with pytest.raises(DiskFullError, match=r"b\.h5ad' cannot be written, and is as it was"):
        write_adata(adata, tmp_path / "b.h5ad")
    assert (tmp_path / "b.h5ad").read_text() == "former"


def test_a_file_takes_the_place_of_the_one_that_its_counts_are_read_from(path):
    file = open_file(path)
    adata = open_adata(file, matrices_in(file))
    adata.uns["note"] = "new"
    write_adata(adata, path)
    found = ad.read_zarr(path) if path.suffix == ".zarr" else ad.read_h5ad(path)
    assert found.uns["note"] == "new"
    np.testing.assert_array_equal(found.X.toarray(), X)
