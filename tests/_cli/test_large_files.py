"""Large files on the command line: their counts stay there, and are copied into the results a block at a time."""

from __future__ import annotations

import json
import re

import anndata as ad
import h5py
import numpy as np
import psutil
import pytest
import zarr
from anndata.abc import CSRDataset

import scvae_tools as svt
from scvae_tools import _on_disk
from scvae_tools._cli import _reading, main
from scvae_tools._data import conversion, host_windows, stored

N_CELLS, N_GENES = 300, 30
FIT = ["--components", "3", "--epochs", "2", "--no-lambda"]


def make_adata():
    adata = svt.datasets.simulate(N_CELLS, N_GENES, 3, random_state=0)
    adata.obs["kind"] = ["a", "b", "c"] * (N_CELLS // 3)
    adata.raw = adata.copy()
    adata.layers["dense"] = adata.X.toarray()
    adata.layers["by_gene"] = adata.X.tocsc()
    adata.obsm["X_some"] = np.arange(2.0 * N_CELLS).reshape(N_CELLS, 2)
    return adata


@pytest.fixture(params=["h5ad", "zarr"])
def file(request, tmp_path):
    path = tmp_path / f"cells.{request.param}"
    write = ad.AnnData.write_zarr if request.param == "zarr" else ad.AnnData.write_h5ad
    write(make_adata(), path)
    if request.param == "zarr":
        in_small_chunks(path)
    return path


def in_small_chunks(path):
    """Let the matrices of a zarr file have chunks of 500 values, which are read as a whole, in place of one."""
    options = {} if zarr.__version__.startswith("2.") else {"use_consolidated": False}
    root = zarr.open_group(path, mode="r+", **options)
    parts = [(name, part) for name in ("X", "raw/X", "layers/by_gene") for part in ("data", "indices")]
    for name, part in [*parts, ("layers", "dense")]:
        values, attributes = root[name][part][:], dict(root[name][part].attrs)
        del root[name][part]
        chunks = (500,) if values.ndim == 1 else (16, N_GENES)
        array = _on_disk.new_array(root[name], part, values.shape, values.dtype, chunks=chunks)
        array[:] = values
        array.attrs.update(attributes)
    zarr.consolidate_metadata(str(path))


@pytest.fixture
def _large(monkeypatch):
    """Every file is large, and what is read and written at a time is small."""
    monkeypatch.setattr(stored, "LARGEST_WHOLE", 0)
    monkeypatch.setattr(stored, "LARGEST_GAP", 0)
    monkeypatch.setattr(conversion, "BLOCK", 500)
    monkeypatch.setattr(_on_disk, "BLOCK", 500)
    monkeypatch.setattr(host_windows, "WINDOW_BYTES", 8 * 1000)


@pytest.fixture
def reads(monkeypatch):
    """Number of values that each reading of counts took, of those that were in the file."""
    found = []
    for kind in (h5py.Dataset, zarr.Array):

        def noted(self, index, *rest, _original=kind.__getitem__):
            values = _original(self, index, *rest)
            if self.name.split("/")[-1] in ("data", "dense") or self.name.endswith("/X"):
                found.append((np.size(values), np.prod(self.shape)))
            return values

        monkeypatch.setattr(kind, "__getitem__", noted)
    return found


def read(path):
    return ad.read_zarr(path) if path.suffix == ".zarr" else ad.read_h5ad(path)


def assert_holds_what_was_there(found, expected):
    assert (found.X != expected.X).nnz == (found.raw.X != expected.raw.X).nnz == 0
    assert (found.layers["by_gene"] != expected.layers["by_gene"]).nnz == 0
    assert found.layers["by_gene"].format == "csc"
    np.testing.assert_array_equal(found.layers["dense"], expected.layers["dense"])
    np.testing.assert_array_equal(found.obsm["X_some"], expected.obsm["X_some"])
    assert list(found.obs["kind"]) == list(expected.obs["kind"])
    assert found.raw.var_names.equals(expected.raw.var_names)


@pytest.mark.usefixtures("_large")
@pytest.mark.parametrize("ending", ["h5ad", "zarr"])
def test_fit_and_predict_never_read_all_counts_at_once_and_write_all_that_was_there(
    ending, file, tmp_path, monkeypatch, capsys, reads
):
    monkeypatch.setattr(_reading, "_is_read_whole", lambda _: False)
    monkeypatch.setattr(CSRDataset, "to_memory", lambda _: pytest.fail("all counts are read"))
    output, model = tmp_path / f"fitted.{ending}", tmp_path / "model"
    assert main(["fit", str(file), "-o", str(output), "--model", str(model), "--json", *FIT]) == 0
    said = capsys.readouterr()
    assert f"of {file.name} stay in the file" in said.err.replace("\n", " ")
    assert len(reads) > 20
    assert max(size / of for size, of in reads) < 0.5
    assert json.loads(said.out)["cells"] == N_CELLS
    predicted = tmp_path / f"predicted.{ending}"
    assert main(["predict", str(file), "-o", str(predicted), "--model", str(model), "--quiet"]) == 0
    assert max(size / of for size, of in reads) < 0.5
    monkeypatch.undo()
    for path in (output, predicted):
        found = read(path)
        assert_holds_what_was_there(found, make_adata())
        assert found.obs["scvae"].value_counts().sum() == N_CELLS
    np.testing.assert_allclose(read(predicted).obsm["X_scvae"], read(output).obsm["X_scvae"], rtol=1e-4, atol=1e-5)


def test_in_memory_reads_all_and_small_files_are_read_so(file, tmp_path, monkeypatch, received):
    for whole, options, is_there in [(0, ["--in-memory"], False), (2**28, [], False), (0, [], True)]:
        monkeypatch.setattr(stored, "LARGEST_WHOLE", whole)
        assert main(["fit", str(file), "-o", str(tmp_path / "x.h5ad"), *options]) == 1
        assert _on_disk.is_on_disk(received[-1].X) is is_there


@pytest.fixture
def received(monkeypatch):
    """AnnData that `tl.scvae` is called with; it does nothing but that."""
    calls = []

    def record(adata, **_):
        calls.append(adata)
        raise ValueError("recorded")

    monkeypatch.setattr(svt.tl, "scvae", record)
    return calls


def test_counts_in_raw_and_in_a_layer_stay_in_the_file_too(file, tmp_path, monkeypatch, received):
    monkeypatch.setattr(stored, "LARGEST_WHOLE", 0)
    assert main(["fit", str(file), "-o", str(tmp_path / "x.h5ad"), "--raw"]) == 1
    assert isinstance(received[-1].X, CSRDataset)
    np.testing.assert_array_equal(received[-1].X[5:9].toarray(), make_adata().X[5:9].toarray())
    assert main(["fit", str(file), "-o", str(tmp_path / "x.h5ad"), "--layer", "dense"]) == 1
    assert _on_disk.is_on_disk(received[-1].layers["dense"])
    assert received[-1].layers["by_gene"].format == "csc"  # by gene: it is read, where there is room


def test_a_lambda_larger_than_half_the_memory_is_refused_before_any_training(file, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(stored, "LARGEST_WHOLE", 0)
    free = psutil.virtual_memory()._replace(available=4 * N_CELLS * N_GENES)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: free)
    assert main(["fit", str(file), "-o", str(tmp_path / "x.h5ad"), "--lambda"]) == 1
    assert "--lambda takes 36 kB of memory here; found 36 kB free. Leave it out" in capsys.readouterr().err


def test_a_file_that_is_cut_short_is_refused(file, tmp_path, capsys):
    if file.suffix == ".h5ad":
        file.write_bytes(file.read_bytes()[:-5000])
        message = "cells.h5ad' cannot be opened: .*truncated file.*cut short"
    else:
        next((file / "X" / "indices").rglob("0")).unlink()
        message = "X must be complete; found 1 of the 17 chunks of 'indices' missing in .*cells.zarr', X"
    assert main(["fit", str(file), "-o", str(tmp_path / "x.h5ad")]) == 1
    found = capsys.readouterr().err
    assert len(found.splitlines()) == 1
    assert re.search(message, found)
    assert not (tmp_path / "x.h5ad").exists()
