"""Malformed sparse matrices: each is refused by name, before compiled code sees it, and nothing else is."""

from __future__ import annotations

import time

import anndata
import h5py
import numpy as np
import pytest
from anndata import AnnData
from scipy import sparse

import scvae_tools as svt
from scvae_tools._cli._reading import ReadingError, read
from scvae_tools._data.counts import CountsError, read_counts
from scvae_tools._data.structure import check_structure

N_CELLS, N_GENES = 6, 4
FORMS = {
    "csr": sparse.csr_matrix,
    "csc": sparse.csc_matrix,
    "csr array": sparse.csr_array,
    "csc array": sparse.csc_array,
}


def well_formed(form="csr"):
    x = np.random.default_rng(0).integers(0, 4, (N_CELLS, N_GENES))
    x[:, 0] += x.sum(1) == 0
    return FORMS[form](x.astype(np.float32))


def change(name, place, value):
    def changed(matrix):
        array = getattr(matrix, name).copy()
        array[place] = value
        setattr(matrix, name, array)

    return changed


def shorten(name, n):
    return lambda matrix: setattr(matrix, name, getattr(matrix, name)[:-n])


#: What is done to the arrays of a well-formed matrix, and how it is named for CSR and for CSC.
FAULTS = {
    "an index far beyond": (
        change("indices", 3, 10**6),
        r"the (gene|cell) index 1,000,000 for (4 genes|6 cells) in (cell 'c\d'|gene 'g\d')",
    ),
    "the first index beyond": (change("indices", 3, N_CELLS), r"the (gene|cell) index 6 for (4 genes|6 cells) in "),
    "a negative index": (change("indices", 3, -5), r"the (gene|cell) index -5 for "),
    "a pointer beyond the end": (change("indptr", 2, 10**6), r"pointers that decrease, from 1,000,000 to \d+, at "),
    "a last pointer beyond the end": (change("indptr", -1, 10**6), r"a last pointer of 1,000,000 for \d+ indices and"),
    "a pointer that decreases": (change("indptr", 2, -1), r"pointers that decrease, from \d+ to -1, at "),
    "a first pointer that is not 0": (change("indptr", 0, -3), "-3 as the first pointer in place of 0"),
    "too few pointers": (shorten("indptr", 1), r"[46] pointers for [46] (cell|gene)s, which need [57]"),
    "fewer values than indices": (shorten("data", 2), r"a last pointer of \d+ for \d+ indices and \d+ values"),
    "fewer indices than values": (shorten("indices", 2), r"a last pointer of \d+ for \d+ indices and \d+ values"),
    "indices that are no integers": (
        lambda matrix: setattr(matrix, "indices", matrix.indices.astype(float)),
        r"indices of the shape \(\d+,\) and the type float64 in place of a list of integers",
    ),
}


def malformed(fault, form="csr"):
    matrix = well_formed(form)
    FAULTS[fault][0](matrix)
    return matrix


def with_matrix(matrix, layer=None):
    """An AnnData that holds a matrix as it is: scipy and anndata check what they are given, not what changes later."""
    adata = AnnData(well_formed())
    adata.obs_names, adata.var_names = [f"c{i}" for i in range(N_CELLS)], [f"g{i}" for i in range(N_GENES)]
    if layer is not None:
        adata.layers[layer] = well_formed()
    held = adata.X if layer is None else adata.layers[layer]
    if matrix.format == "csc":
        held = well_formed("csc")
        if layer is None:
            adata.X = held
        else:
            adata.layers[layer] = held
        held = adata.X if layer is None else adata.layers[layer]
    for name in ("data", "indices", "indptr"):
        setattr(held, name, getattr(matrix, name))
    return adata


@pytest.mark.parametrize("layer", [None, "counts"])
@pytest.mark.parametrize("form", ["csr", "csc"])
@pytest.mark.parametrize("fault", FAULTS)
def test_a_malformed_matrix_is_refused_by_name(fault, form, layer):
    adata = with_matrix(malformed(fault, form), layer)
    where = r"adata\.X" if layer is None else r"adata\.layers\['counts'\]"
    with pytest.raises(CountsError, match=f"^{where} must be a well-formed sparse matrix; found {FAULTS[fault][1]}"):
        read_counts(adata, layer=layer)


@pytest.mark.parametrize("form", FORMS)
def test_a_well_formed_matrix_passes(form):
    for matrix in (
        well_formed(form),
        FORMS[form]((N_CELLS, N_GENES), dtype=np.float32),
        FORMS[form](np.ones((N_CELLS, N_GENES))),
    ):
        check_structure(matrix, "X")
        matrix.indices, matrix.indptr = matrix.indices.astype(np.int64), matrix.indptr.astype(np.int64)
        check_structure(matrix, "X")


def test_memory_behind_the_last_pointer_is_not_looked_at():
    matrix = well_formed()
    matrix.indices = np.append(matrix.indices, 99)
    matrix.data = np.append(matrix.data, np.float32(1))
    check_structure(matrix, "X")


def test_without_names_cells_are_numbered():
    with pytest.raises(ValueError, match=r"X must be .* in cell \d\. Read"):
        check_structure(malformed("a negative index"), "X")


@pytest.mark.parametrize("fault", ["an index far beyond", "a negative index", "a pointer beyond the end"])
def test_a_view_is_refused_before_anndata_takes_its_part(fault):
    view = with_matrix(malformed(fault))[:4]
    assert view.is_view
    with pytest.raises(CountsError, match=FAULTS[fault][1]):
        read_counts(view)


@pytest.mark.parametrize("form", ["csr", "csc"])
@pytest.mark.parametrize("fault", ["an index far beyond", "a negative index", "a pointer beyond the end"])
def test_every_way_in_refuses_it_and_leaves_the_anndata_as_it_was(fault, form):
    adata = with_matrix(malformed(fault, form))
    adata.obs_names = [f"new {name}" for name in adata.obs_names]
    good = with_matrix(well_formed())
    model = svt.tl.scvae(good, mixture=False, max_epochs=1, n_hidden=4, n_latent=2, progress=False, return_model=True)
    ways = {
        "scvae": lambda: svt.tl.scvae(adata, mixture=False, max_epochs=1, progress=False),
        "setup_anndata": lambda: svt.SCVAE.setup_anndata(adata),
        "predict": lambda: svt.tl.predict(adata, model),
        "compare": lambda: svt.tl.compare(adata, {"likelihood": ["nb"]}, max_epochs=1),
        "evaluate": lambda: svt.tl.evaluate(adata, model),
        "query": lambda: svt.SCVAE.load_query_data(adata, model),
    }
    before = [array.copy() for array in (adata.X.data, adata.X.indices, adata.X.indptr)], list(adata.uns)
    for name, way in ways.items():
        with pytest.raises(ValueError, match="must be a well-formed sparse matrix"):
            pytest.fail(f"{name} accepted it: {way()}")
    for array, own in zip(before[0], (adata.X.data, adata.X.indices, adata.X.indptr), strict=True):
        np.testing.assert_array_equal(array, own)
    assert list(adata.uns) == before[1]


@pytest.mark.parametrize("form", ["csr", "csc"])
@pytest.mark.parametrize("fault", ["an index far beyond", "a negative index", "a pointer beyond the end"])
@pytest.mark.parametrize("backed", [None, "r"])
def test_files_are_refused(fault, form, backed, tmp_path):
    path, good = tmp_path / "counts.h5ad", with_matrix(well_formed(form))
    good.write_h5ad(path)
    bad = malformed(fault, form)
    with h5py.File(path, "r+") as file:
        for name in ("data", "indices", "indptr"):
            file["X"][name][:] = getattr(bad, name)
    if backed is None:
        with pytest.raises(ReadingError, match=FAULTS[fault][1]):
            read(path)
    with pytest.raises(CountsError, match=FAULTS[fault][1]):
        read_counts(anndata.read_h5ad(path, backed=backed))


@pytest.mark.parametrize("fault", ["an index far beyond", "a negative index", "a pointer beyond the end"])
def test_a_file_of_10x_genomics_is_refused(fault, tmp_path):
    """Also where some features are left out, which takes a part of the matrix."""
    path, bad = tmp_path / "counts.h5", malformed(fault)
    with h5py.File(path, "w") as file:
        group = file.create_group("matrix")
        for name in ("data", "indices", "indptr"):
            group[name] = getattr(bad, name).astype(np.int64)
        group["shape"], group["barcodes"] = [N_GENES, N_CELLS], np.array([f"c{i}" for i in range(N_CELLS)], dtype="S")
        types = ["Gene Expression"] * 3 + ["Antibody Capture"]
        features = {"name": [f"g{i}" for i in range(N_GENES)], "feature_type": types, "genome": ["hg"] * N_GENES}
        for name, values in (features | {"id": features["name"]}).items():
            group[f"features/{name}"] = np.array(values, dtype="S")
    with pytest.raises(ReadingError):
        read(path)


def test_the_check_takes_a_second_for_a_billion_counts_at_most():
    """A ratio beside one sum over the same memory, which is the least that any look at it takes."""
    index = np.zeros(2 * 10**7, dtype=np.int32)
    matrix = sparse.csr_matrix((100, 10))
    matrix.indptr, matrix.indices = np.linspace(0, len(index), 101).astype(np.int32), index
    matrix.data = np.broadcast_to(np.float32(1), index.shape)
    seconds = {"check": [], "sum": []}
    for _ in range(5):
        for name, function in (("check", lambda: check_structure(matrix, "X")), ("sum", index.max)):
            begin = time.perf_counter()
            function()
            seconds[name].append(time.perf_counter() - begin)
    assert min(seconds["check"]) < 4 * min(seconds["sum"]) + 0.005


def test_dense_and_other_matrices_pass():
    check_structure(np.ones((3, 2)), "X")
    check_structure(sparse.coo_matrix(np.ones((3, 2))), "X")
