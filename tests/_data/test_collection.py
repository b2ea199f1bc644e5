"""Collections of annbatch: several data sets in a zarr group are one AnnData whose counts stay in the files."""

from __future__ import annotations

import anndata as ad
import h5py
import numpy as np
import pandas as pd
import pytest
import torch
import zarr
from anndata import AnnData
from scipy import sparse

import scvae_tools as svt
from scvae_tools._adata_files import n_bytes_of, write_adata
from scvae_tools._data import conversion, host_windows, joined, stored
from scvae_tools._data.counts import CountsError, read_counts
from scvae_tools._data.joined import JoinedCounts
from scvae_tools._data.stored import StoredCounts

SIZES, N_GENES = (41, 1, 55, 30), 23
N_CELLS = sum(SIZES)
FIRST = np.cumsum([0, *SIZES])


@pytest.fixture(autouse=True)
def _small_pieces(monkeypatch):
    monkeypatch.setattr(stored, "LARGEST_WHOLE", 0)
    monkeypatch.setattr(stored, "LARGEST_GAP", 20)
    monkeypatch.setattr(conversion, "BLOCK", 100)
    monkeypatch.setattr(joined, "BLOCK", 64)
    monkeypatch.setattr(host_windows, "WINDOW_BYTES", 8 * 40 * N_GENES)
    monkeypatch.setattr(host_windows, "FEWEST_RUNS", 8)


def make_counts(seed: int = 0) -> np.ndarray:
    x = np.random.default_rng(seed).poisson(0.4, (N_CELLS, N_GENES)).astype(np.float32)
    x[:, 0] = 1 + np.arange(N_CELLS) % 3  # so that no cell is empty
    return x


def make_obs() -> pd.DataFrame:
    kinds = pd.Categorical(np.random.default_rng(1).choice(["a", "b", "c"], N_CELLS))
    return pd.DataFrame({"kind": kinds, "number": np.arange(N_CELLS)}, index=[f"cell{i}" for i in range(N_CELLS)])


def write_matrix(group: zarr.Group, name: str, x: np.ndarray, chunk: int = 50, index_type=np.uint16) -> None:
    """Write CSR as annbatch does: chunks in shards, and places of the genes in as few bytes as they need."""
    ad.io.write_elem(group, name, sparse.csr_matrix(x))
    for key, dtype in (("data", np.float32), ("indices", index_type)):
        values = group[name][key][:].astype(dtype)
        del group[name][key]
        shards = (min(2, -(-len(values) // chunk)) * chunk,)
        made = group[name].create_array(key, shape=values.shape, chunks=(chunk,), shards=shards, dtype=dtype)
        made[:] = values


def write_collection(path, x: np.ndarray, sizes=SIZES, **options) -> zarr.Group:
    """Write the cells as a collection of data sets of these sizes."""
    group = zarr.open_group(path, mode="w", zarr_format=3)
    var, obs, first = pd.DataFrame(index=[f"gene{i}" for i in range(N_GENES)]), make_obs(), 0
    for number, size in enumerate(sizes):
        own, rows = group.create_group(f"dataset_{number}"), slice(first, first + size)
        ad.io.write_elem(own, "obs", obs[rows].copy())
        ad.io.write_elem(own, "var", var)
        ad.io.write_elem(own, "obsm", {"place": np.arange(first, first + size)[:, None] + np.zeros(2)})
        write_matrix(own, "X", x[rows], **options)
        write_matrix(own.create_group("layers"), "doubled", 2 * x[rows], **options)
        first += size
    return group


@pytest.fixture
def x():
    return make_counts()


@pytest.fixture
def adata(x, tmp_path):
    write_collection(tmp_path / "c.zarr", x)
    return svt.read_collection(tmp_path / "c.zarr")


def test_all_cells_are_one_anndata_in_the_order_of_the_data_sets(adata, x):
    assert isinstance(adata.X, JoinedCounts)
    assert isinstance(adata.layers["doubled"], JoinedCounts)
    pd.testing.assert_frame_equal(adata.obs, make_obs())
    np.testing.assert_array_equal(adata.obsm["place"][:, 1], np.arange(N_CELLS))
    np.testing.assert_array_equal(adata.X.to_memory().toarray(), x)
    np.testing.assert_array_equal(adata.layers["doubled"].to_memory().toarray(), 2 * x)


def test_data_sets_are_ordered_by_number_not_by_name(tmp_path):
    x = make_counts()
    sizes = (12, 10, 10, 10, 10, 10, 10, 10, 10, 10, 10, 15)  # dataset_10 comes before dataset_2 in the alphabet
    write_collection(tmp_path / "c.zarr", x, sizes)
    adata = svt.read_collection(zarr.open_group(tmp_path / "c.zarr", mode="r"))
    np.testing.assert_array_equal(adata.X.to_memory().toarray(), x)
    assert list(adata.obs["number"]) == list(range(N_CELLS))


PLACES = {
    "all": np.arange(N_CELLS),
    "over two data sets": np.arange(38, 60),
    "every tenth": np.arange(0, N_CELLS, 10),
    "any order": np.random.default_rng(1).permutation(N_CELLS)[:40],
    "again": np.array([3, 3, 90, 3]),
    "one": np.array([41]),
    "none": np.array([], dtype=int),
}


@pytest.mark.parametrize("places", PLACES)
def test_rows_are_those_of_the_matrix(places, adata, x):
    places = PLACES[places]
    counts = read_counts(adata, may_stay=True)
    assert isinstance(counts, StoredCounts)
    np.testing.assert_array_equal(counts[places].toarray(), x[places])
    np.testing.assert_array_equal(adata.X[places].toarray(), x[places])
    if len(places):
        np.testing.assert_array_equal(adata[places, 3:9].X.toarray(), x[places, 3:9])


def test_what_is_known_of_the_cells_is_what_it_is_of_one_matrix(adata, x, tmp_path):
    group = zarr.open_group(tmp_path / "one.zarr", mode="w", zarr_format=3)
    write_matrix(group, "X", x)
    one = read_counts(AnnData(ad.io.sparse_dataset(group["X"]), obs=adata.obs, var=adata.var), may_stay=True)
    counts = read_counts(adata, may_stay=True)
    assert counts.digest == one.digest
    assert counts.values_at_once == one.values_at_once
    assert list(counts.blocks()) == list(one.blocks())
    for name in ("indptr", "total", "gene_total", "gene_fraction", "mark"):
        np.testing.assert_array_equal(getattr(counts, name), getattr(one, name))
    np.testing.assert_array_equal(counts.total, x.sum(1))
    np.testing.assert_array_equal(np.diff(counts.indptr), (x > 0).sum(1))


def test_a_training_is_to_the_bit_that_on_one_matrix(adata, x, tmp_path):
    group = zarr.open_group(tmp_path / "one.zarr", mode="w", zarr_format=3)
    write_matrix(group, "X", x)
    one = AnnData(ad.io.sparse_dataset(group["X"]), obs=adata.obs.copy(), var=adata.var.copy())
    for each in (one, adata):
        svt.tl.scvae(each, n_components=2, max_epochs=3, n_hidden=4, progress=False, random_state=0)
    for found, expected in ((adata.obsm[key], one.obsm[key]) for key in ("X_scvae", "scvae_probs")):
        np.testing.assert_array_equal(np.asarray(found), np.asarray(expected))
    assert isinstance(adata.X, JoinedCounts)


def test_a_model_predicts_cells_of_a_collection_as_those_in_memory(adata, x):
    torch.manual_seed(0)
    read = AnnData(sparse.csr_matrix(x), obs=adata.obs[[]].copy(), var=adata.var.copy())
    svt.SCVAE.setup_anndata(read)
    model = svt.SCVAE(read, n_components=2, n_hidden=4)
    model.train(2, progress=False, accelerator="cpu")
    for each in (adata, read):
        svt.tl.predict(each, model)
    np.testing.assert_allclose(adata.obsm["X_scvae"], read.obsm["X_scvae"], rtol=1e-4, atol=1e-5)


def _set(name, place, value):
    def change(group):
        group[name][place] = value

    return change


FAULTS = {
    "an index beyond the genes": (_set("indices", 40, 1000), r"dataset_2/X\) must be .* gene index 1,000 for 23 genes"),
    "pointers that decrease": (_set("indptr", 30, 0), r"dataset_2/X\) must be .* pointers that decrease"),
    "a pointer beyond the end": (_set("indptr", 55, 10**6), r"dataset_2/X\) must be .* a last pointer of 1,000,000"),
    "NaN": (_set("data", 0, np.nan), "NaN value nan in cell 'cell42'"),
    "an empty cell": (
        _set("data", slice(0, int((make_counts()[42] > 0).sum())), 0),
        "found 1 of 127 cells without a count in any gene: 'cell42'",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_faults_of_a_data_set_are_named_with_it_or_the_cell(fault, x, tmp_path):
    change, message = FAULTS[fault]
    group = write_collection(tmp_path / "c.zarr", x)
    change(group["dataset_2/X"])
    with pytest.raises(CountsError, match=message):
        read_counts(svt.read_collection(tmp_path / "c.zarr"), may_stay=True)


def test_pieces_of_a_data_set_that_are_missing_or_cannot_be_read_are_named_with_it(x, tmp_path):
    write_collection(tmp_path / "c.zarr", x)
    shard = tmp_path / "c.zarr/dataset_2/X/data/c/1"
    content = shard.read_bytes()
    shard.write_bytes(content[:20])
    with pytest.raises(OSError, match=r"c\.zarr', dataset_2/X\) cannot be read from cell \d+ \('cell\d+'\)"):
        read_counts(svt.read_collection(tmp_path / "c.zarr"), may_stay=True)
    shard.unlink()
    with pytest.raises(CountsError, match=r"1 of the \d+ shards of 'data' missing in .*c\.zarr', dataset_2/X"):
        read_counts(svt.read_collection(tmp_path / "c.zarr"), may_stay=True)


def test_a_data_set_that_was_changed_after_the_check_is_noticed(x, tmp_path):
    group = write_collection(tmp_path / "c.zarr", x)
    counts = read_counts(svt.read_collection(tmp_path / "c.zarr"), may_stay=True)
    group["dataset_3/X/data"][0] = 9
    with pytest.raises(CountsError, match=r"dataset_3/X\) must hold the counts that were checked; cell 'cell97'"):
        counts[90:100]
    np.testing.assert_array_equal(counts[:97].toarray(), x[:97])


@pytest.mark.parametrize("ending", ["h5ad", "zarr"])
def test_a_collection_is_written_to_one_file_a_block_at_a_time(ending, adata, x, tmp_path):
    assert n_bytes_of(adata) == 2 * (6 * (x > 0).sum() + 8 * (N_CELLS + 1)) + adata.obsm["place"].nbytes
    write_adata(adata, tmp_path / f"b.{ending}")
    found = (ad.read_zarr if ending == "zarr" else ad.read_h5ad)(tmp_path / f"b.{ending}")
    np.testing.assert_array_equal(found.X.toarray(), x)
    np.testing.assert_array_equal(found.layers["doubled"].toarray(), 2 * x)


def test_small_collections_are_read_whole(adata, x, monkeypatch):
    monkeypatch.setattr(stored, "LARGEST_WHOLE", 2**20)
    counts = read_counts(adata, may_stay=True)
    assert isinstance(counts, sparse.csr_matrix)
    np.testing.assert_array_equal(counts.toarray(), x)


def test_categories_of_the_data_sets_are_united(x, tmp_path):
    group = write_collection(tmp_path / "c.zarr", x)
    kinds = pd.Categorical(["z"] * SIZES[1])
    ad.io.write_elem(group["dataset_1"], "obs", make_obs()[41:42].assign(kind=kinds))
    found = svt.read_collection(tmp_path / "c.zarr").obs["kind"]
    assert set(found.cat.categories) == {"a", "b", "c", "z"}
    assert found["cell41"] == "z"


def test_what_is_no_collection_is_refused_with_what_was_found(x, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"found none at '.*missing\.zarr'"):
        svt.read_collection(tmp_path / "missing.zarr")
    with pytest.raises(TypeError, match=r"`path` must be the folder of a collection of annbatch, .*; found a int"):
        svt.read_collection(3)
    (tmp_path / "files").mkdir()
    h5py.File(tmp_path / "files" / "dataset_0.h5ad", "w").close()
    with pytest.raises(FileNotFoundError, match=r"found no zarr group in .*files"):
        svt.read_collection(tmp_path / "files")
    zarr.open_group(tmp_path / "other.zarr", mode="w").create_group("X")
    with pytest.raises(ValueError, match=r"data sets 'dataset_0', 'dataset_1', .*; found 'X'"):
        svt.read_collection(tmp_path / "other.zarr")


def test_other_genes_and_matrices_that_are_not_by_cell_are_refused(x, tmp_path):
    group = write_collection(tmp_path / "c.zarr", x)
    names = [f"gene{i}" for i in range(N_GENES)]
    ad.io.write_elem(group["dataset_2"], "var", pd.DataFrame(index=names[::-1]))
    with pytest.raises(ValueError, match="found another order, of 'dataset_0' and 'dataset_2'"):
        svt.read_collection(tmp_path / "c.zarr")
    ad.io.write_elem(group["dataset_2"], "var", pd.DataFrame(index=[*names[:-1], "odd"]))
    with pytest.raises(ValueError, match="found 2 genes in one alone, such as 'gene22', of 'dataset_0'"):
        svt.read_collection(tmp_path / "c.zarr")
    ad.io.write_elem(group["dataset_2"], "var", pd.DataFrame(index=names))
    ad.io.write_elem(group["dataset_3/layers"], "doubled", x[97:])
    assert list(svt.read_collection(tmp_path / "c.zarr").layers) in ([], [None])
    ad.io.write_elem(group["dataset_3"], "X", x[97:])
    with pytest.raises(ValueError, match=r"X stored by cell \(csr_matrix\) .*; found 'array' in 'dataset_3'"):
        svt.read_collection(tmp_path / "c.zarr")


def test_a_collection_that_annbatch_has_written_is_read(x, tmp_path):
    annbatch = pytest.importorskip("annbatch")
    AnnData(sparse.csr_matrix(x), obs=make_obs(), var=pd.DataFrame(index=[f"g{i}" for i in range(N_GENES)])).write_h5ad(
        tmp_path / "a.h5ad"
    )
    options = {"dataset_size": 40, "shuffle_chunk_size": 5, "n_obs_per_chunk": 7, "rng": np.random.default_rng(0)}
    annbatch.DatasetCollection(tmp_path / "c.zarr").add_adatas([tmp_path / "a.h5ad"], **options)
    adata = svt.read_collection(tmp_path / "c.zarr")
    assert len(adata.X.parts) > 1
    counts = read_counts(adata, may_stay=True)
    order = adata.obs["number"].to_numpy()
    assert sorted(order) == list(range(N_CELLS))
    np.testing.assert_array_equal(counts[:].toarray(), x[order])
