"""Counts that stay in a file: rows, sums and checks are those of the same counts in memory."""

from __future__ import annotations

import re

import anndata
import h5py
import numpy as np
import pandas as pd
import pytest
import zarr
from anndata import AnnData
from scipy import sparse

from scvae_tools._adata_files import n_bytes_of, write_adata
from scvae_tools._data import conversion, stored
from scvae_tools._data.counts import CountsError, digest_of_counts, gene_mean_fraction, read_counts
from scvae_tools._data.stored import StoredCounts

N_CELLS, N_GENES = 97, 23


@pytest.fixture(autouse=True)
def _small_pieces(monkeypatch):
    monkeypatch.setattr(stored, "LARGEST_WHOLE", 0)
    monkeypatch.setattr(stored, "LARGEST_GAP", 20)
    monkeypatch.setattr(conversion, "BLOCK", 100)


def make_counts(seed: int = 0) -> np.ndarray:
    x = np.random.default_rng(seed).poisson(0.4, (N_CELLS, N_GENES)).astype(np.float32)
    x[:, 0] = 1 + np.arange(N_CELLS) % 3  # so that no cell is empty
    x[:, 5] = 0
    return x


def as_adata(matrix, where: str = "X") -> AnnData:
    obs = pd.DataFrame(index=[f"cell{i}" for i in range(N_CELLS)])
    var = pd.DataFrame(index=[f"gene{i}" for i in range(N_GENES)])
    layers = {"counts": matrix} if where == "layer" else None
    return AnnData(matrix if where == "X" else None, obs=obs, var=var, layers=layers)


def _h5ad(matrix, path):
    as_adata(matrix).write_h5ad(path / "a.h5ad")
    return anndata.read_h5ad(path / "a.h5ad", backed="r")


def _zarr_sparse(matrix, path):
    as_adata(matrix).write_zarr(path / "a.zarr")
    return as_adata(anndata.io.sparse_dataset(zarr.open_group(path / "a.zarr", mode="r")["X"]))


def _zarr_layer(matrix, path):
    as_adata(matrix).write_zarr(path / "a.zarr")
    return as_adata(anndata.io.sparse_dataset(zarr.open_group(path / "a.zarr", mode="r")["X"]), "layer")


def _zarr_dense(matrix, path):
    array = zarr.create_array(path / "a.zarr", shape=matrix.shape, chunks=(10, N_GENES), dtype="f4")
    array[:] = matrix.toarray()
    return as_adata(array)


def _h5_dense(matrix, path):
    file = h5py.File(path / "a.h5", "w")
    return as_adata(file.create_dataset("x", data=matrix.toarray(), chunks=(10, N_GENES)))


def _dask_sparse(matrix, path):
    array = pytest.importorskip("dask.array")
    return as_adata(array.from_array(matrix, chunks=(10, N_GENES), asarray=False))


def _dask_dense(matrix, path):
    array = pytest.importorskip("dask.array")
    return as_adata(array.from_array(matrix.toarray(), chunks=(10, 7)))


FORMS = {
    "h5ad": _h5ad,
    "zarr": _zarr_sparse,
    "layer in zarr": _zarr_layer,
    "dense zarr": _zarr_dense,
    "dense hdf5": _h5_dense,
    "sparse dask": _dask_sparse,
    "dense dask": _dask_dense,
}


@pytest.fixture(params=FORMS)
def form(request):
    return request.param


def stored_of(form: str, path, x: np.ndarray | sparse.csr_matrix, **options) -> StoredCounts:
    adata = FORMS[form](sparse.csr_matrix(x), path)
    layer = "counts" if form.startswith("layer") else None
    return read_counts(adata, layer=layer, may_stay=True, **options)


PLACES = {
    "all": np.arange(N_CELLS),
    "every tenth": np.arange(0, N_CELLS, 10),
    "two ends": np.array([0, 1, 2, N_CELLS - 1]),
    "any order": np.random.default_rng(1).permutation(N_CELLS)[:40],
    "again": np.array([3, 3, 90, 3]),
    "one": np.array([7]),
    "none": np.array([], dtype=int),
}


@pytest.mark.parametrize("places", PLACES)
def test_rows_are_those_of_the_matrix(form, places, tmp_path):
    x, places = make_counts(), PLACES[places]
    counts = stored_of(form, tmp_path, x)
    assert isinstance(counts, StoredCounts)
    found = counts[places]
    assert found.has_canonical_format
    assert found.dtype == np.float32
    np.testing.assert_array_equal(found.toarray(), x[places])


def test_slices_masks_and_blocks_of_cells_and_genes_are_read(form, tmp_path):
    x, mask = make_counts(), np.arange(N_CELLS) % 4 == 1
    counts = stored_of(form, tmp_path, x)
    np.testing.assert_array_equal(counts[5:31].toarray(), x[5:31])
    np.testing.assert_array_equal(counts[mask].toarray(), x[mask])
    np.testing.assert_array_equal(counts[4].toarray(), x[4:5])
    np.testing.assert_array_equal(counts[2:9, 3:7].toarray(), x[2:9, 3:7])
    np.testing.assert_array_equal(counts[np.ix_([4, 2], [1, 0])].toarray(), x[np.ix_([4, 2], [1, 0])])
    np.testing.assert_array_equal(counts.to_memory().toarray(), x)
    bounds = list(counts.blocks())
    assert [first for first, _ in bounds] == [0, *(last for _, last in bounds[:-1])]
    assert bounds[-1][1] == N_CELLS


def test_what_is_known_of_all_cells_is_what_numpy_computes(form, tmp_path):
    x = make_counts()
    counts = stored_of(form, tmp_path, x)
    np.testing.assert_array_equal(np.diff(counts.indptr), (x > 0).sum(1))
    assert counts.nnz == (x > 0).sum()
    np.testing.assert_array_equal(counts.sum(1).ravel(), x.sum(1))
    np.testing.assert_allclose(counts.sum(0).ravel(), x.sum(0))
    np.testing.assert_allclose(counts.mean(0).ravel(), x.mean(0))
    np.testing.assert_allclose(gene_mean_fraction(counts, x.sum(1)), (x / x.sum(1, keepdims=True)).mean(0), rtol=1e-6)
    size = 1.0 + np.arange(N_CELLS)
    np.testing.assert_allclose(gene_mean_fraction(counts, size), (x / size[:, None]).mean(0), rtol=1e-6)
    assert counts.largest == x.max()
    assert counts.is_whole


def test_chosen_genes_are_read_alone(form, tmp_path):
    x, mask = make_counts(), np.arange(N_GENES) % 3 == 0
    counts = stored_of(form, tmp_path, x, mask_var=mask)
    assert counts.shape == (N_CELLS, mask.sum())
    np.testing.assert_array_equal(counts[10:50].toarray(), x[10:50][:, mask])
    np.testing.assert_array_equal(counts.total, x[:, mask].sum(1))
    np.testing.assert_array_equal(np.diff(counts.indptr), (x[:, mask] > 0).sum(1))


def test_duplicates_and_explicit_zeros_are_as_in_memory(tmp_path):
    x = sparse.csr_matrix(make_counts())
    row, column = x.nonzero()
    values = np.r_[x.data - 0.0, np.zeros(5), np.ones(3)].astype(np.int16)
    coo = np.r_[row, np.arange(5), [8, 8, 9]], np.r_[column, np.full(5, 5), [0, 0, 0]]
    order = np.lexsort(coo[::-1])
    indptr = np.r_[0, np.cumsum(np.bincount(coo[0], minlength=N_CELLS))]
    matrix = sparse.csr_matrix((values[order], coo[1][order], indptr), shape=x.shape)
    adata = _h5ad(matrix, tmp_path)
    assert len(adata.X.group["data"]) == x.nnz + 8
    expected = make_counts()
    expected[8, 0] += 2
    expected[9, 0] += 1
    counts = read_counts(adata, may_stay=True)
    np.testing.assert_array_equal(counts[:].toarray(), expected)
    np.testing.assert_array_equal(np.diff(counts.indptr), (expected > 0).sum(1))


def test_the_digest_tells_other_counts_from_the_same_in_another_file(tmp_path):
    x = make_counts()
    for name in ("one", "two", "three"):
        (tmp_path / name).mkdir()
    other = x.copy()
    other[50, 3] += 1
    one, two = stored_of("h5ad", tmp_path / "one", x), stored_of("zarr", tmp_path / "two", x)
    three = stored_of("h5ad", tmp_path / "three", other)
    assert one.digest == two.digest != three.digest
    assert digest_of_counts(one) == digest_of_counts(two) != digest_of_counts(three)


BAD = {
    "NaN": (np.nan, "at least 1 NaN value nan in cell 'cell60', gene 'gene4'"),
    "negative": (-2, "at least 1 negative value -2 in cell 'cell60', gene 'gene4'"),
    "infinite": (np.inf, "at least 1 infinite value inf in cell 'cell60', gene 'gene4'"),
    "non-integer": (0.5, "at least 1 non-integer value 0.5 in cell 'cell60', gene 'gene4'"),
    "too large": (2.0**25, "at least 1 too large value 33554432 in cell 'cell60', gene 'gene4'"),
}


@pytest.mark.parametrize("kind", BAD)
def test_values_that_are_no_counts_are_refused_with_cell_and_gene(kind, form, tmp_path):
    x = make_counts()
    x[60, 4], message = BAD[kind]
    with pytest.raises(CountsError, match=message):
        stored_of(form, tmp_path, x)


def test_a_cell_without_counts_is_refused_with_its_name(form, tmp_path):
    x = make_counts()
    x[33] = 0
    with pytest.raises(CountsError, match=r"found 1 of 97 cells without a count in any gene: 'cell33'"):
        stored_of(form, tmp_path, x)


def test_estimated_counts_are_accepted_with_a_warning(form, tmp_path):
    x = make_counts()
    x[60, 4] = 0.5
    with pytest.warns(UserWarning, match=r"holds at least 1 non-integer value 0.5 in cell 'cell60'"):
        counts = stored_of(form, tmp_path, x, allow_non_integer=True)
    assert not counts.is_whole
    np.testing.assert_array_equal(counts[:].toarray(), x)


@pytest.mark.parametrize("opened", [_h5ad, _zarr_sparse])
def test_counts_stored_by_gene_are_refused_with_the_remedy(opened, tmp_path):
    adata = opened(sparse.csc_matrix(make_counts()), tmp_path)
    with pytest.raises(CountsError, match=r"stored by cell \(CSR\).*stored by gene \(CSC\).*tocsr"):
        read_counts(adata, may_stay=True)


def test_small_files_and_tools_that_need_all_counts_read_them_whole(tmp_path, monkeypatch):
    adata = _h5ad(sparse.csr_matrix(make_counts()), tmp_path)
    assert isinstance(read_counts(adata), sparse.csr_matrix)
    monkeypatch.setattr(stored, "LARGEST_WHOLE", 2**20)
    assert isinstance(read_counts(adata, may_stay=True), sparse.csr_matrix)


def _set(name, place, value):
    def change(group):
        group[name][place] = value

    return change


MALFORMED = {
    "an index beyond the genes": (_set("indices", 40, 1000), "gene index 1,000 for 23 genes"),
    "a negative index": (_set("indices", 40, -5), "gene index -5"),
    "pointers that decrease": (_set("indptr", 30, 0), "pointers that decrease"),
    "a pointer beyond the end": (_set("indptr", N_CELLS, 10**6), "a last pointer of 1,000,000"),
    "a first pointer": (_set("indptr", 0, 3), "3 as the first pointer"),
}


@pytest.mark.parametrize("fault", MALFORMED)
@pytest.mark.parametrize("kind", ["h5ad", "zarr"])
def test_malformed_files_are_refused(fault, kind, tmp_path):
    change, message = MALFORMED[fault]
    (_h5ad if kind == "h5ad" else _zarr_sparse)(sparse.csr_matrix(make_counts()), tmp_path)
    if kind == "h5ad":
        with h5py.File(tmp_path / "a.h5ad", "r+") as file:
            change(file["X"])
        adata = anndata.read_h5ad(tmp_path / "a.h5ad", backed="r")
    else:
        group = zarr.open_group(tmp_path / "a.zarr", mode="r+")["X"]
        change(group)
        adata = as_adata(anndata.io.sparse_dataset(group))
    with pytest.raises((CountsError, OSError), match=message):
        read_counts(adata, may_stay=True)


def test_a_file_that_was_changed_after_the_check_is_noticed(tmp_path):
    _zarr_sparse(sparse.csr_matrix(make_counts()), tmp_path)
    group = zarr.open_group(tmp_path / "a.zarr", mode="r+")["X"]
    counts = read_counts(as_adata(anndata.io.sparse_dataset(group)), may_stay=True)
    place = int(counts.indptr[20])
    group["data"][place] = 0
    with pytest.raises(CountsError, match=r"the counts that were checked; cell 'cell20' has other ones now"):
        counts[18:25]


@pytest.mark.parametrize(("name", "change"), [("data", 1), ("indices", -1)])
def test_another_value_and_another_gene_are_noticed_where_the_rows_are_as_long(name, change, tmp_path):
    x = make_counts()
    x[20, 7:10] = 0, 0, 2
    _zarr_sparse(sparse.csr_matrix(x), tmp_path)
    group = zarr.open_group(tmp_path / "a.zarr", mode="r+")["X"]
    counts = read_counts(as_adata(anndata.io.sparse_dataset(group)), may_stay=True)
    place = int(counts.indptr[20] + (x[20, :9] > 0).sum())
    assert (group["indices"][place], group["data"][place]) == (9, 2)
    group[name][place] += change
    with pytest.raises(CountsError, match=r"the counts that were checked; cell 'cell20' has other ones now"):
        counts[18:25]
    np.testing.assert_array_equal(counts[21:25].toarray(), x[21:25])


def _store_with_chunks(path, name):
    """Store of counts in compressed chunks of 50 values, and the file of the third chunk of an array."""
    adata = as_adata(sparse.csr_matrix(make_counts()))
    anndata.io.write_elem(zarr.open_group(path / "a.zarr", mode="w", zarr_format=2), "/", adata)
    group = zarr.open_group(path / "a.zarr", mode="r+")["X"]
    values = group[name][:]
    del group[name]
    group.create_array(name, shape=values.shape, chunks=(50,), dtype=values.dtype)[:] = values
    return anndata.io.sparse_dataset(group), path / "a.zarr" / "X" / name / "2"


@pytest.mark.parametrize("name", ["data", "indices"])
def test_a_chunk_that_is_missing_is_noticed_where_zarr_reads_zeros(name, tmp_path):
    matrix, chunk = _store_with_chunks(tmp_path, name)
    assert read_counts(as_adata(matrix), may_stay=True).shape == (N_CELLS, N_GENES)
    chunk.unlink()
    match = rf"adata.X must be complete; found 1 of the \d+ chunks of '{name}' missing in .*a\.zarr', X\..*its source"
    with pytest.raises(CountsError, match=match):
        read_counts(as_adata(matrix), may_stay=True)


@pytest.mark.parametrize("name", ["data", "indices"])
@pytest.mark.parametrize("fault", ["cut short", "other bytes"])
def test_a_chunk_of_zarr_that_cannot_be_read_is_named_with_file_and_cells(fault, name, tmp_path):
    matrix, chunk = _store_with_chunks(tmp_path, name)
    content = chunk.read_bytes()
    chunk.write_bytes(content[:20] if fault == "cut short" else b"\xff" * len(content))
    first = int(np.searchsorted(matrix.group["indptr"][:], 100, side="right")) - 1
    match = r"adata.X \('.*a\.zarr', X\) cannot be read from cell \d+ \('cell\d+'\) to"
    with pytest.raises(OSError, match=match) as found:
        read_counts(as_adata(matrix), may_stay=True)
    low, high = (int(part) for part in re.search(r"from cell (\d+) .* to (\d+)", str(found.value)).groups())
    assert low <= first < high < N_CELLS


def test_a_chunk_of_hdf5_that_cannot_be_read_is_named_with_file_and_cells(tmp_path):
    as_adata(sparse.csr_matrix(make_counts())).write_h5ad(tmp_path / "a.h5ad", compression="gzip")
    with h5py.File(tmp_path / "a.h5ad") as file:
        chunk = file["X/data"].id.get_chunk_info(0)
    content = bytearray((tmp_path / "a.h5ad").read_bytes())
    content[chunk.byte_offset + 10 : chunk.byte_offset + chunk.size] = bytes(chunk.size - 10)
    (tmp_path / "a.h5ad").write_bytes(content)
    adata = anndata.read_h5ad(tmp_path / "a.h5ad", backed="r")
    with pytest.raises(OSError, match=r"adata.X \('.*a\.h5ad', /X\) cannot be read from cell 0 \('cell0'\) to"):
        read_counts(adata, may_stay=True)


def test_a_missing_layer_is_refused_with_those_there(tmp_path):
    adata = _zarr_layer(sparse.csr_matrix(make_counts()), tmp_path)
    with pytest.raises(CountsError, match=r"`layer` must name a layer of adata; found 'raw', and the layers 'counts'"):
        read_counts(adata, layer="raw", may_stay=True)


def test_genes_in_another_order_are_read_and_summed_in_it(form, tmp_path):
    x, order = make_counts(), np.random.default_rng(2).permutation(N_GENES)
    counts = stored_of(form, tmp_path, x).in_order(order)
    np.testing.assert_array_equal(counts[10:30].toarray(), x[10:30][:, order])
    np.testing.assert_allclose(counts.sum(0).ravel(), x.sum(0)[order])
    share = (x / x.sum(1, keepdims=True)).mean(0)
    np.testing.assert_allclose(gene_mean_fraction(counts, x.sum(1)), share[order], rtol=1e-6)


def test_blocks_of_an_array_end_where_its_chunks_do(tmp_path):
    counts = stored_of("dense zarr", tmp_path, make_counts())
    assert list(counts.blocks()) == [(low, min(low + 10, N_CELLS)) for low in range(0, N_CELLS, 10)]


def test_rows_that_cannot_be_read_are_named(tmp_path):
    adata = _h5ad(sparse.csr_matrix(make_counts()), tmp_path)
    counts = read_counts(adata, may_stay=True)
    adata.file.close()
    (tmp_path / "a.h5ad").unlink()
    with pytest.raises(OSError, match=r"adata.X \('.*a\.h5ad', /X\) cannot be read from cell 10 \('cell10'\) to 12"):
        counts[10:12]


@pytest.mark.parametrize("form", ["h5ad", "dense hdf5"])
def test_a_file_that_was_closed_is_opened_again(form, tmp_path):
    adata = FORMS[form](sparse.csr_matrix(make_counts()), tmp_path)
    counts = read_counts(adata, may_stay=True)
    (adata.file if adata.isbacked else adata.X.file).close()
    for _ in range(2):
        np.testing.assert_array_equal(counts[10:30].toarray(), make_counts()[10:30])


@pytest.mark.parametrize("ending", ["h5ad", "zarr"])
def test_counts_in_a_file_are_written_to_another_with_the_genes_that_are_chosen(ending, tmp_path):
    x, mask = make_counts(), np.arange(N_GENES) % 2 == 0
    counts = stored_of("h5ad", tmp_path, x, mask_var=mask)
    adata = AnnData(counts, layers={"counts": counts})
    n_bytes = 2 * (8 * (x[:, mask] > 0).sum() + 8 * (N_CELLS + 1))
    assert n_bytes_of(adata) == n_bytes
    write_adata(adata, tmp_path / f"b.{ending}")
    found = (anndata.read_zarr if ending == "zarr" else anndata.read_h5ad)(tmp_path / f"b.{ending}")
    for matrix in (found.X, found.layers["counts"]):
        assert isinstance(matrix, sparse.csr_matrix)
        np.testing.assert_array_equal(matrix.toarray(), x[:, mask])
