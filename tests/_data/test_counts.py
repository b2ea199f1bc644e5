"""Counts of an AnnData in any form: what is read, what is refused and in which words."""

from __future__ import annotations

import logging
import warnings

import anndata
import h5py
import numpy as np
import pandas as pd
import pytest
import zarr
from adata_forms import N_CELLS, N_GENES, fingerprint, make_adata, make_dense
from anndata import AnnData
from anndata.io import sparse_dataset
from scipy import sparse

import scvae_tools as svt
from scvae_tools._data.counts import CountsError, gene_mean_fraction, read_counts, resolve_mask_var
from scvae_tools._data.roles import check_obs

pytestmark = [
    pytest.mark.filterwarnings("ignore:the matrix subclass:PendingDeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*should not be a np.matrix"),
]


def with_value(value: float, row: int = 2, column: int = 3) -> AnnData:
    """An AnnData with float64 counts and one other value, in cell2 and gene3."""
    counts = make_dense().astype(np.float64)
    counts[row, column] = value
    return make_adata(sparse.csr_matrix(counts))


# -- forms of matrix ---------------------------------------------------------------------------------------------------


def _messy(form: type) -> object:
    """The same counts with unsorted indices, duplicates and explicit zeros."""
    coo = sparse.coo_matrix(make_dense())
    row, col, data = (np.concatenate([a, a[:4]]) for a in (coo.row, coo.col, coo.data))
    data = data.astype(np.float32) * np.r_[np.ones(coo.nnz), np.zeros(4)].astype(np.float32)
    data[-1], data[3] = 1, data[3] - 1  # one count split over two entries
    order = np.lexsort((-row, col)) if form is sparse.csc_matrix else np.lexsort((-col, row))
    major, size = (col, N_GENES) if form is sparse.csc_matrix else (row, N_CELLS)
    indptr = np.r_[0, np.cumsum(np.bincount(major, minlength=size))]
    indices = (row if form is sparse.csc_matrix else col)[order]
    matrix = form((data[order], indices, indptr), shape=(N_CELLS, N_GENES))
    assert not matrix.has_canonical_format
    return matrix


NUMBERS = ["bool", "uint8", "int16", "uint16", "int32", "int64", "float32", "float64", ">f4"]
FORMS = {
    "csr_matrix": sparse.csr_matrix,
    "csc_matrix": sparse.csc_matrix,
    "csr_array": sparse.csr_array,
    "csc_array": sparse.csc_array,
    "C-ordered array": np.ascontiguousarray,
    "Fortran-ordered array": np.asfortranarray,
    "np.matrix": np.matrix,
    "messy csr_matrix": lambda _: _messy(sparse.csr_matrix),
    "messy csc_matrix": lambda _: _messy(sparse.csc_matrix),
    **{f"{dtype} csr_matrix": lambda d, t=dtype: sparse.csr_matrix(d.astype(t)) for dtype in NUMBERS[1:-1]},
    **{f"{dtype} array": lambda d, t=dtype: d.astype(t) for dtype in [*NUMBERS[1:], "float16", "longdouble"]},
}


def assert_canonical(counts: sparse.csr_matrix) -> None:
    assert type(counts) is sparse.csr_matrix
    assert counts.dtype == np.float32
    assert sparse.csr_matrix((counts.data, counts.indices, counts.indptr), counts.shape).has_canonical_format
    assert np.all(counts.data != 0)


@pytest.fixture(params=FORMS)
def matrix(request: pytest.FixtureRequest) -> object:
    return FORMS[request.param](make_dense())


@pytest.mark.parametrize("in_layer", [False, True])
@pytest.mark.parametrize("masked", [False, True])
def test_every_form_gives_the_same_counts_and_is_left_as_it_was(matrix, in_layer, masked):
    adata = make_adata(None if not in_layer else np.zeros((N_CELLS, N_GENES)))
    if in_layer:
        adata.layers["counts"] = matrix
    else:
        adata.X = matrix
    before = fingerprint(adata)
    counts = read_counts(adata, layer="counts" if in_layer else None, mask_var="kept" if masked else None)
    assert_canonical(counts)
    expected = make_dense()[:, adata.var["kept"]] if masked else make_dense()
    np.testing.assert_array_equal(counts.toarray(), expected)
    assert fingerprint(adata) == before


def test_views_of_every_form_give_the_counts_of_their_cells_and_genes(matrix):
    view = make_adata(matrix)[[5, 1, 3], ["gene2", "gene0"]]
    assert view.is_view
    np.testing.assert_array_equal(read_counts(view).toarray(), make_dense()[[5, 1, 3]][:, [2, 0]])
    assert view.is_view


@pytest.mark.parametrize("form", ["csr_matrix", "csc_matrix", "csr_array", "csc_array", "C-ordered array"])
@pytest.mark.parametrize("layer", [None, "counts"])
@pytest.mark.parametrize("mask_var", [None, "kept"])
def test_backed_anndata_of_every_form_gives_the_same_counts(tmp_path, form, layer, mask_var):
    matrix = FORMS[form](make_dense())
    make_adata(matrix, counts=matrix).write_h5ad(tmp_path / "counts.h5ad")
    adata = anndata.read_h5ad(tmp_path / "counts.h5ad", backed="r")
    keep = slice(None) if mask_var is None else adata.var["kept"].to_numpy()
    counts = read_counts(adata, layer=layer, mask_var=mask_var)
    part = read_counts(adata[[4, 0]], layer=layer, mask_var=mask_var)
    adata.file.close()
    assert_canonical(counts)
    np.testing.assert_array_equal(counts.toarray(), make_dense()[:, keep])
    np.testing.assert_array_equal(part.toarray(), make_dense()[[4, 0]][:, keep])


def test_a_boolean_matrix_is_read_as_ones():
    dense = make_dense() > 0
    for matrix in (dense, sparse.csr_matrix(dense)):
        np.testing.assert_array_equal(read_counts(make_adata(matrix)).toarray(), dense)


@pytest.mark.parametrize("block", [1, 8, 12])
def test_blocks_of_any_size_give_the_same_counts(monkeypatch, block):
    monkeypatch.setattr("scvae_tools._data.conversion.BLOCK", block)
    for matrix in (make_dense(), sparse.csr_matrix(make_dense())):
        np.testing.assert_array_equal(read_counts(make_adata(matrix)).toarray(), make_dense())
    with pytest.raises(CountsError, match="found 1 negative value -3 in cell 'cell2', gene 'gene3'"):
        read_counts(with_value(-3))


@pytest.mark.parametrize("form", [sparse.csr_matrix, sparse.csr_array])
def test_canonical_csr_float32_shares_its_memory(form):
    adata = make_adata(form(make_dense(), dtype=np.float32), counts=form(make_dense(), dtype=np.float32))
    for layer, stored in ((None, adata.X), ("counts", adata.layers["counts"])):
        counts = read_counts(adata, layer=layer)
        for part in ("data", "indices", "indptr"):
            assert np.shares_memory(getattr(counts, part), getattr(stored, part))


def test_duplicates_of_a_narrow_integer_type_do_not_wrap_around():
    twice = sparse.csr_matrix((np.array([200, 100], np.uint8), [0, 0], [0, 2]), shape=(1, 1))
    assert read_counts(AnnData(twice)).toarray().item() == 300


@pytest.mark.parametrize(
    ("matrix", "message"),
    [
        (np.full((N_CELLS, N_GENES), "1", dtype=object), r"adata\.X must hold numbers; found the dtype object.*astype"),
        (np.full((N_CELLS, N_GENES), 1j), r"must hold numbers; found the dtype complex128"),
        (np.ma.masked_array(make_dense()), r"adata\.X must be a .*; found numpy\.ma.*MaskedArray.*Convert it first"),
    ],
)
def test_matrices_of_other_kinds_are_refused(matrix, message):
    with pytest.raises(TypeError, match=message):
        read_counts(make_adata(matrix))


def test_a_dask_like_array_is_refused_by_its_type(monkeypatch):
    class Array:  # stands for dask.array.Array, which the tests do not install
        shape = (N_CELLS, N_GENES)

    adata = make_adata()
    monkeypatch.setattr(AnnData, "X", property(lambda _: Array()))
    with pytest.raises(TypeError, match=r"adata\.X must be .*; found .*Array.*\.compute\(\)"):
        read_counts(adata)


# -- not an AnnData ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("names", "choice"), [(("prot", "rna"), "rna"), (("gex", "prot"), "gex")])
def test_a_mudata_is_refused_with_its_modalities(names, choice):
    mudata = pytest.importorskip("mudata")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        mdata = mudata.MuData({name: make_adata() for name in names})
    message = rf"found a MuData with the modalities '{names[0]}', '{names[1]}'.*mdata\.mod\['{choice}'\]"
    with pytest.raises(TypeError, match=message):
        read_counts(mdata)
    with pytest.raises(TypeError, match=message):
        check_obs(mdata)


@pytest.mark.parametrize(
    "thing", [make_dense(), sparse.csr_matrix(make_dense()), pd.DataFrame(make_dense()), None, "a"]
)
def test_other_objects_are_refused_by_type(thing):
    with pytest.raises(TypeError, match=f"`adata` must be an AnnData; found a {type(thing).__name__}. Wrap it"):
        read_counts(thing)


# -- values ------------------------------------------------------------------------------------------------------------

FOUND = "in cell 'cell2', gene 'gene3'"
BAD_VALUES = {
    "NaN": (np.nan, f"found 1 NaN value nan {FOUND}.*Remove those cells or genes"),
    "infinite": (np.inf, f"found 1 infinite value inf {FOUND}.*division by 0"),
    "minus infinity": (-np.inf, f"found 1 infinite value -inf {FOUND}"),
    "negative": (-1.5, rf"found 1 negative value -1\.5 {FOUND}.*scaled.*Pass the raw counts"),
    "too large": (2.0**24 + 1, rf"found 1 too large value 16777217 {FOUND}.*2\*\*24 = 16,777,216"),
    "non-integer": (200.25, rf"integer counts; found 1 non-integer value 200\.25 {FOUND}\. .*raw counts"),
}


@pytest.mark.parametrize("kind", BAD_VALUES)
@pytest.mark.parametrize("form", [sparse.csr_matrix, sparse.csc_matrix, sparse.csr_array, sparse.csc_array, np.asarray])
@pytest.mark.parametrize("layer", [None, "foo"])
def test_bad_values_are_named_with_their_place_and_nothing_changes(kind, form, layer):
    value, message = BAD_VALUES[kind]
    matrix = form(with_value(value).X.toarray())
    adata = make_adata(matrix) if layer is None else make_adata(np.zeros((N_CELLS, N_GENES)), foo=matrix)
    before = fingerprint(adata)
    where = r"adata\.X" if layer is None else r"adata\.layers\['foo'\]"
    with pytest.raises(CountsError, match=f"^{where} must hold .*?{message}"):
        read_counts(adata, layer=layer)
    assert fingerprint(adata) == before


def test_the_number_of_bad_values_and_the_first_are_named():
    counts = make_dense().astype(float)
    counts[1, 2], counts[4, 0], counts[1, 4] = -1, -2, -3
    with pytest.raises(CountsError, match="found 3 negative values, the first -1 in cell 'cell1', gene 'gene2'"):
        read_counts(make_adata(counts))


@pytest.mark.parametrize("column", [0, 4])
@pytest.mark.parametrize("row", [0, 1, 6])
def test_the_first_and_last_entries_of_a_row_are_named_with_their_cell(row, column):
    with pytest.raises(CountsError, match=f"value -1 in cell 'cell{row}', gene 'gene{column}'"):
        read_counts(with_value(-1, row, column))


def test_the_gene_is_named_after_the_mask():
    with pytest.raises(CountsError, match="value -1 in cell 'cell2', gene 'gene3'"):
        read_counts(with_value(-1), mask_var="kept")


def test_values_outside_the_mask_are_not_looked_at():
    assert read_counts(with_value(np.nan, column=1), mask_var="kept").shape == (N_CELLS, 3)


@pytest.mark.parametrize("dtype", [np.int32, np.int64, np.float32, np.float64])
def test_counts_up_to_two_to_the_24_are_kept_exactly(dtype):
    counts = make_dense().astype(dtype)
    counts[0, 0] = 2**24
    assert read_counts(make_adata(counts))[0, 0] == 2**24


def test_an_integer_matrix_is_checked_before_it_is_rounded_to_float32():
    counts = make_dense()
    counts[2, 3] = 2**24 + 1  # float32 would round it to 2**24
    with pytest.raises(CountsError, match=f"too large value 16777217 {FOUND}"):
        read_counts(make_adata(counts))


# -- non-integer values ------------------------------------------------------------------------------------------------


def _logged(**layers: object) -> AnnData:
    return make_adata(sparse.csr_matrix(np.log1p(make_dense() * 1.5)), **layers)


def _with_raw() -> AnnData:
    adata = make_adata()
    adata.raw = adata.copy()
    adata.X = np.log1p(make_dense() * 1.5)
    return adata


LOG_CASES = {
    "nothing else": (_logged, None, "Pass the raw counts, or name the layer that holds them with `layer`"),
    "a layer": (
        lambda: _logged(norm=make_dense() / 3, counts=sparse.csc_matrix(make_dense())),
        None,
        r"adata\.layers\['counts'\] holds integer counts: pass layer='counts'",
    ),
    "a dense layer": (lambda: _logged(raw_counts=make_dense()), None, "pass layer='raw_counts'"),
    "X instead of the layer": (
        lambda: make_adata(log=np.log1p(make_dense() * 1.5)),
        "log",
        r"adata\.X holds integer counts: pass layer=None",
    ),
    "raw": (_with_raw, None, r"adata\.raw holds integer counts: pass adata\.raw\.to_adata\(\)"),
}


@pytest.mark.parametrize("case", LOG_CASES)
def test_log_transformed_values_are_recognised_and_the_counts_pointed_to(case):
    make, layer, remedy = LOG_CASES[case]
    with pytest.raises(
        CountsError, match=f"non-integer value.*looks log-transformed.*{remedy}.*allow_non_integer=True"
    ):
        read_counts(make(), layer=layer)


@pytest.mark.parametrize("form", [sparse.csr_matrix, sparse.csc_matrix, np.asarray])
def test_counts_in_a_layer_of_a_backed_anndata_are_pointed_to(tmp_path, form):
    _logged(counts=form(make_dense())).write_h5ad(tmp_path / "log.h5ad")
    adata = anndata.read_h5ad(tmp_path / "log.h5ad", backed="r")
    with pytest.raises(CountsError, match="pass layer='counts'"):
        read_counts(adata)
    adata.file.close()


def test_the_note_of_scanpy_log1p_is_read():
    adata = with_value(200.25)
    adata.uns["log1p"] = {"base": None}
    with pytest.raises(CountsError, match="looks log-transformed, with a maximum of 200"):
        read_counts(adata)


def test_larger_non_integers_are_not_called_log_transformed():
    with pytest.raises(CountsError) as error:
        read_counts(with_value(200.25))
    assert "log-transformed" not in str(error.value)


def test_negative_values_point_to_the_layer_with_counts():
    adata = with_value(-0.5)
    adata.layers["counts"] = make_dense()
    with pytest.raises(CountsError, match=r"scaled.*pass layer='counts'"):
        read_counts(adata)


@pytest.mark.parametrize(("value", "looks"), [(200.25, False), (0.5, True)])
def test_non_integers_are_allowed_with_a_warning(value, looks):
    adata = with_value(value)
    with pytest.warns(UserWarning, match=rf"1 non-integer value {value} {FOUND}.*estimated counts") as caught:
        counts = read_counts(adata, allow_non_integer=True)
    assert ("log-transformed" in str(caught[0].message)) is looks
    assert counts[2, 3] == np.float32(value)
    assert caught[0].filename == __file__


def test_estimates_too_small_for_float32_become_no_entry():
    adata = with_value(1e-60)
    before = fingerprint(adata)
    with pytest.warns(UserWarning, match="non-integer"):
        counts = read_counts(adata, allow_non_integer=True)
    assert_canonical(counts)
    assert counts[2, 3] == 0
    assert fingerprint(adata) == before


def test_integers_give_no_warning():
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        read_counts(make_adata(), allow_non_integer=True)


# -- layers, shapes, empty cells and genes -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("layers", "listed"), [({}, r"\(none\)"), ({"a": make_dense(), "b": make_dense()}, "'a', 'b'")]
)
def test_a_missing_layer_is_refused_with_those_there_are(layers, listed):
    message = rf"found 'foo', and the layers {listed}\. .*adata\.raw is not read.*to_adata"
    with pytest.raises(CountsError, match=message):
        read_counts(make_adata(**layers), layer="foo")


def test_an_anndata_without_x_is_refused_with_its_layers():
    adata = make_adata(counts=make_dense())
    adata.X = None
    with pytest.raises(CountsError, match=r"adata\.X must hold counts; found None.*Layers: 'counts'"):
        read_counts(adata)
    np.testing.assert_array_equal(read_counts(adata, layer="counts").toarray(), make_dense())


@pytest.mark.parametrize(("shape", "things"), [((0, 5), "0 cells"), ((7, 0), "0 genes"), ((0, 0), "0 cells")])
@pytest.mark.parametrize("form", [np.zeros, sparse.csr_matrix])
def test_an_empty_matrix_is_refused(shape, things, form):
    with pytest.raises(CountsError, match=f"at least one cell and one gene; found {things}.*Check the last filter"):
        read_counts(AnnData(form(shape)))


def _without_counts_in(cells: list[int]) -> np.ndarray:
    counts = make_dense()
    counts[cells] = 0
    return counts


@pytest.mark.parametrize(
    ("cells", "named"),
    [([3], "1 of 7 cells .*: 'cell3'"), ([0, 2, 4, 6], r"4 of 7 cells .*: 'cell0', 'cell2', 'cell4', \.\.\.")],
)
def test_cells_without_a_count_are_refused(cells, named):
    message = rf"{named}\. Remove them with sc\.pp\.filter_cells\(adata, min_counts=1\)"
    with pytest.raises(CountsError, match=message):
        read_counts(make_adata(_without_counts_in(cells)))


def test_the_remedy_for_cells_without_a_count_works_in_a_layer_and_a_mask():
    counts = make_dense()
    counts[1, [0, 2, 3]] = 0
    counts[1, 1] = 9
    adata = make_adata(np.ones((N_CELLS, N_GENES)), foo=counts)
    assert read_counts(adata, layer="foo").shape == (N_CELLS, N_GENES)
    with pytest.raises(CountsError, match="1 of 7 cells without a count in any gene of the 3 kept: 'cell1'") as error:
        read_counts(adata, layer="foo", mask_var="kept")
    remedy = str(error.value).split("adata = ")[1].split(", or keep more")[0]
    fixed = eval(remedy, {"adata": adata, "np": np})
    assert read_counts(fixed, layer="foo", mask_var="kept").shape == (N_CELLS - 1, 3)


def test_genes_without_a_count_are_logged_and_kept(caplog):
    with caplog.at_level(logging.INFO, logger="scvae_tools"), warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        assert read_counts(make_adata()).shape == (N_CELLS, N_GENES)
    assert [r.getMessage() for r in caplog.records] == ["adata.X: 1 of 5 genes have no count in any cell."]
    assert caplog.records[0].levelno == logging.INFO


def test_duplicated_names_are_no_concern_here():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # AnnData itself warns of them
        adata = AnnData(make_dense(), obs=pd.DataFrame(index=["c"] * N_CELLS), var=pd.DataFrame(index=["g"] * N_GENES))
        assert read_counts(adata).shape == (N_CELLS, N_GENES)


# -- masks -------------------------------------------------------------------------------------------------------------


def test_no_mask_is_none():
    assert resolve_mask_var(make_adata(), None) is None


@pytest.mark.parametrize(
    "mask",
    [
        "kept",
        [True, False, True, True, False],
        np.array([1, 0, 1, 1, 0], dtype=bool),
        make_adata().var["kept"],
        make_adata().var["kept"].astype("boolean"),
    ],
    ids=["column", "list", "array", "series", "nullable"],
)
def test_a_mask_may_be_a_column_or_an_array(mask):
    found = resolve_mask_var(make_adata(), mask)
    assert found.dtype == bool
    np.testing.assert_array_equal(found, [True, False, True, True, False])


MASK_ERRORS = {
    "missing": ("foo", "must name a boolean column of adata.var; found 'foo', and the boolean columns 'kept'"),
    "not boolean": ("score", r"adata\.var\['score'\] must be boolean; found float64.*astype\(bool\)"),
    "positions": (np.array([0, 2]), "`mask_var` must be boolean; found int64"),
    "missing values": ("partly", r"adata\.var\['partly'\] must be True or False; found missing values.*fillna"),
    "too long": (np.ones(6, dtype=bool), r"one value per gene, shape \(5,\); found shape \(6,\)"),
    "two axes": (np.ones((5, 1), dtype=bool), r"found shape \(5, 1\)"),
    "empty": ("none", r"adata\.var\['none'\] must keep at least one gene; found none of 5 True"),
    "other order": (make_adata().var["kept"].iloc[::-1], r"a Series with another index.*\.loc\[adata\.var_names\]"),
}


@pytest.mark.parametrize("case", MASK_ERRORS)
def test_a_mask_that_cannot_be_used_is_refused(case):
    mask, message = MASK_ERRORS[case]
    adata = make_adata()
    adata.var["score"] = np.arange(5.0)
    adata.var["partly"] = pd.array([True, None, False, True, True], dtype="boolean")
    adata.var["none"] = False
    before = fingerprint(adata)
    with pytest.raises(CountsError, match=message):
        read_counts(adata, mask_var=mask)
    assert fingerprint(adata) == before


# -- columns of obs ----------------------------------------------------------------------------------------------------


# -- means -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("block", [1, 8, 2**24])
def test_the_mean_fraction_of_every_gene_is_that_of_the_dense_formula(monkeypatch, block):
    monkeypatch.setattr("scvae_tools._data.conversion.BLOCK", block)
    counts = read_counts(make_adata())
    size = np.asarray(counts.sum(axis=1)).ravel()
    found = gene_mean_fraction(counts, size)
    assert found.shape == (N_GENES,)
    assert found.dtype == np.float64
    np.testing.assert_allclose(found, (make_dense() / make_dense().sum(axis=1, keepdims=True)).mean(axis=0), rtol=1e-13)


# -- on disk -----------------------------------------------------------------------------------------------------------


def on_disk(adata, form, path):
    """The same cells, with the counts in a file."""
    store, is_sparse = form.split()[0], "sparse" in form
    if not is_sparse:
        adata = AnnData(adata.X.toarray(), obs=adata.obs, var=adata.var)
    if store == "zarr":
        adata.write_zarr(path)
        file = zarr.open(path, mode="r")
    else:
        adata.write_h5ad(path)
        file = h5py.File(path)
    counts = sparse_dataset(file["X"]) if is_sparse else file["X"]
    return AnnData(counts, obs=adata.obs.copy(), var=adata.var)


ON_DISK = ["zarr sparse", "zarr dense", "h5py sparse", "h5py dense"]


@pytest.mark.parametrize("copy", [False, True])
@pytest.mark.parametrize("form", ON_DISK)
def test_counts_on_disk_are_trained_on_as_those_in_memory(form, copy, tmp_path):
    adata = svt.datasets.simulate(60, 20, 2, random_state=0)
    disk = on_disk(adata, form, tmp_path / "cells")
    options = {"mixture": False, "n_hidden": 4, "n_latent": 2, "max_epochs": 2, "progress": False, "return_model": True}
    written, model = svt.tl.scvae(disk, copy=True, **options) if copy else (disk, svt.tl.scvae(disk, **options))
    svt.tl.scvae(adata, **options)
    np.testing.assert_array_equal(written.obsm["X_scvae"], adata.obsm["X_scvae"])
    assert ("X_scvae" in disk.obsm) is not copy
    predicted = svt.tl.predict(disk, model, copy=True)
    np.testing.assert_allclose(predicted.obsm["X_scvae"], adata.obsm["X_scvae"], rtol=1e-5, atol=1e-6)
    svt.SCVAE.setup_anndata(disk)
    other = svt.SCVAE(disk, mixture=False, n_hidden=4, n_latent=2)
    other.train(1, progress=False)
    assert np.isfinite(other.get_elbo())


def test_tables_that_are_read_lazily_are_read_by_the_calls_that_train_and_refused_by_others():
    adata = make_adata()
    xarray, backed = pytest.importorskip("xarray"), pytest.importorskip("anndata.experimental.backed")
    lazy = AnnData(adata.X, obs=backed.Dataset2D(xarray.Dataset.from_dataframe(adata.obs)), var=adata.var)
    match = r"`adata` must have obs in memory; found a Dataset2D, .*adata\.obs = adata\.obs\.to_memory\(\)"
    with pytest.raises(TypeError, match=match):
        read_counts(lazy)
    svt.SCVAE.setup_anndata(lazy)
    assert isinstance(lazy.obs, pd.DataFrame)
    assert lazy.obs_names.equals(adata.obs_names)
    read_counts(lazy)
