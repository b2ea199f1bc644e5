"""Files of an AnnData: what anndata writes, in types that older packages read too, and whole on a full disk."""

from __future__ import annotations

import errno
import os

import anndata as ad
import h5py
import numpy as np
import pandas as pd
import pytest
from scipy import sparse

import scvae_tools as svt
from scvae_tools._adata_files import mark_of, n_bytes_of, write_adata, write_h5ad
from scvae_tools._files import DiskFullError


def make_adata():
    adata = svt.datasets.simulate(60, 12, 3, random_state=0)
    adata.raw = adata
    adata.obs["note"] = [f"note {i % 3}" for i in range(60)]
    adata.obs["own"] = [f"cell {i}" for i in range(60)]
    adata.layers["dense"] = adata.X.toarray()
    adata.obsm["X_some"] = np.arange(120.0).reshape(60, 2)
    adata.obsp["near"] = sparse.eye(60, format="csr")
    adata.varm["loadings"] = np.ones((12, 2))
    adata.uns["names"] = np.rec.fromarrays([["gene1", "gene2"], ["gene3", "gene4"]], names=["0", "1"])
    adata.uns["deep"] = {"table": pd.DataFrame({"stage": ["vae", "mixture"]}, index=["0", "1"]), "nothing": None}
    return adata


def read(path):
    return ad.read_zarr(path) if path.suffix == ".zarr" else ad.read_h5ad(path)


def plain(frame):
    """The table with plain strings, as which those of pandas 3 are written."""
    return frame.astype({name: object for name, kind in frame.dtypes.items() if isinstance(kind, pd.StringDtype)})


def assert_same(found, expected):
    pd.testing.assert_frame_equal(plain(found.obs), plain(expected.obs))
    pd.testing.assert_frame_equal(found.var, expected.var)
    assert (found.X != expected.X).nnz == (found.raw.X != expected.raw.X).nnz == 0
    pd.testing.assert_frame_equal(found.raw.var, expected.raw.var)
    np.testing.assert_array_equal(found.layers["dense"], expected.layers["dense"])
    np.testing.assert_array_equal(found.obsm["X_some"], expected.obsm["X_some"])
    np.testing.assert_array_equal(found.varm["loadings"], expected.varm["loadings"])
    assert (found.obsp["near"] != expected.obsp["near"]).nnz == 0
    assert [tuple(row) for row in found.uns["names"]] == [tuple(row) for row in expected.uns["names"]]
    pd.testing.assert_frame_equal(plain(found.uns["deep"]["table"]), plain(expected.uns["deep"]["table"]))


@pytest.mark.filterwarnings("ignore:.*zarr v2")
@pytest.mark.parametrize("name", ["x.h5ad", "x.zarr"])
def test_a_file_holds_what_anndata_would_write_and_the_anndata_stays_as_it_was(name, tmp_path):
    adata, expected = make_adata(), make_adata()
    columns = dict(adata.obs.dtypes)
    write_adata(adata, tmp_path / name)
    assert dict(adata.obs.dtypes) == columns
    write = expected.write_zarr if name.endswith("zarr") else expected.write_h5ad
    write(tmp_path / f"theirs.{name}")
    assert_same(read(tmp_path / name), read(tmp_path / f"theirs.{name}"))
    assert read(tmp_path / name).obs["note"].dtype == "category"


def with_strings_of_pandas():
    """Strings as pandas 3 has them, of which some are missing."""
    adata = make_adata()
    adata.obs["maybe"] = pd.array(["a", None, "b"] * 20, dtype="string")
    adata.obs["own"] = adata.obs["own"].astype("string")
    adata.obs["kind"] = pd.Categorical(pd.array(["x", "y", "z"] * 20, dtype="string"))
    table = pd.DataFrame({"stage": ["vae", "mixture"]}, index=pd.Index(["0", "1"], dtype="string"), dtype="string")
    adata.uns["deep"]["table"] = table
    return adata


def encodings(path):
    found = set()
    with h5py.File(path) as file:
        file.visititems(lambda _, each: found.add(each.attrs.get("encoding-type")))
    return found


@pytest.mark.parametrize("name", ["x.h5ad", "x.zarr"])
def test_strings_of_newer_packages_are_written_as_plain_ones_that_all_can_write_again(name, tmp_path):
    write_adata(with_strings_of_pandas(), tmp_path / name)
    found = read(tmp_path / name)
    assert list(found.obs["maybe"].astype(object).where(found.obs["maybe"].notna(), None)) == ["a", None, "b"] * 20
    assert list(found.obs["own"]) == [f"cell {i}" for i in range(60)]
    assert list(found.obs["kind"]) == ["x", "y", "z"] * 20
    assert list(found.uns["deep"]["table"]["stage"]) == ["vae", "mixture"]
    assert list(found.uns["deep"]["table"].index) == ["0", "1"]
    if name.endswith("h5ad"):
        assert "nullable-string-array" not in encodings(tmp_path / name)
    found.write_h5ad(tmp_path / "again.h5ad")


def test_zarr_is_written_in_the_format_whose_tables_all_versions_read(tmp_path):
    write_adata(make_adata(), tmp_path / "x.zarr")
    assert (tmp_path / "x.zarr" / ".zgroup").exists()
    assert list((tmp_path / "x.zarr").rglob("zarr.json")) == []


def test_a_backed_anndata_is_written_and_keeps_its_own_file(tmp_path):
    make_adata().write_h5ad(tmp_path / "own.h5ad")
    adata = ad.read_h5ad(tmp_path / "own.h5ad", backed="r")
    write_adata(adata, tmp_path / "copy.h5ad")
    assert adata.filename == tmp_path / "own.h5ad"
    assert_same(ad.read_h5ad(tmp_path / "copy.h5ad"), ad.read_h5ad(tmp_path / "own.h5ad"))


def test_options_of_anndata_are_kept(tmp_path):
    write_h5ad(make_adata(), tmp_path / "x.h5ad", as_dense=["X"], compression="gzip")
    with h5py.File(tmp_path / "x.h5ad") as file:
        assert (file["X"].shape, file["X"].compression) == ((60, 12), "gzip")
    write_h5ad(make_adata(), tmp_path / "y.h5ad", convert_strings_to_categoricals=False)
    assert ad.read_h5ad(tmp_path / "y.h5ad").obs["note"].dtype != "category"
    with pytest.raises(ValueError, match=r"`as_dense` must be empty or \['X'\]; found \['raw/X'\]"):
        write_h5ad(make_adata(), tmp_path / "x.h5ad", as_dense=["raw/X"])


def test_a_mark_is_read_and_anndata_does_not_see_it(tmp_path):
    write_h5ad(make_adata(), tmp_path / "x.h5ad", mark="some")
    assert mark_of(tmp_path / "x.h5ad") == "some"
    assert set(ad.read_h5ad(tmp_path / "x.h5ad").uns) == set(make_adata().uns)
    make_adata().write_h5ad(tmp_path / "y.h5ad")
    assert mark_of(tmp_path / "y.h5ad") is None


def test_the_size_is_that_of_the_matrices_and_below_that_of_the_file(tmp_path):
    adata = make_adata()
    write_h5ad(adata, tmp_path / "x.h5ad")
    assert n_bytes_of(adata) <= (tmp_path / "x.h5ad").stat().st_size
    dense = ad.AnnData(np.ones((10, 4), np.float32), obsm={"a": np.ones((10, 2))}, layers={"b": np.ones((10, 4))})
    assert n_bytes_of(dense) == 10 * 4 * 4 + 10 * 2 * 8 + 10 * 4 * 8


@pytest.mark.parametrize("room", [0, 2_000, 20_000, 40_000, 60_000])
def test_a_full_disk_is_an_error_wherever_it_becomes_full(room, tmp_path, monkeypatch):
    """HDF5 ends the process where a write fails; here it is not told."""
    write, written = os.write, []

    def write_some(descriptor, data):
        if sum(written) + len(data) > room:
            raise OSError(errno.ENOSPC, "No space left on device")
        written.append(write(descriptor, data))
        return written[-1]

    (tmp_path / "x.h5ad").write_text("former")
    monkeypatch.setattr(os, "write", write_some)
    with pytest.raises(DiskFullError, match=r"x\.h5ad' cannot be written, and is as it was: it takes \d+(\.\d)? kB"):
        write_adata(make_adata(), tmp_path / "x.h5ad")
    assert (tmp_path / "x.h5ad").read_text() == "former"
    assert [each.name for each in tmp_path.iterdir()] == ["x.h5ad"]
