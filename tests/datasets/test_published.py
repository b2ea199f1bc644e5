"""Published data without a network: a small file of the same layout, served from disk or by a stand-in for a server."""

from __future__ import annotations

import hashlib
import io
import re
import warnings
from dataclasses import replace
from email.message import Message
from http.client import RemoteDisconnected
from urllib.error import HTTPError, URLError

import anndata as ad
import h5py
import numpy as np
import pytest
from scipy import sparse

from scvae_tools import datasets
from scvae_tools.datasets import _published

N_CELLS, N_GENES = 30, 20
GENE_NAMES = [f"Gene{gene}" for gene in range(N_GENES - 2)] + ["Twin", "Twin"]
LIBRARIES = [1, 2, 10]


def random_counts():
    counts = np.random.default_rng(0).poisson(0.8, size=(N_CELLS, N_GENES))
    counts[:, 0] += 1
    counts[3, 4] = 70_000  # more than 16 bits hold
    return counts


def barcodes_of(libraries):
    return [f"AAAC{cell:04d}-{libraries[cell % len(libraries)]}" for cell in range(N_CELLS)]


def write_file(file, counts, *, genome="mm10", barcodes=None, dtype="int32", **changes):
    """Write genes × cells by columns: as Cell Ranger 1 and 2 do, whose row numbers within a cell are in no order."""
    by_cell = [np.flatnonzero(row)[::-1] for row in counts]
    members = {
        "barcodes": np.array(barcodes or barcodes_of(LIBRARIES), dtype="S"),
        "data": np.concatenate([row[genes] for row, genes in zip(counts, by_cell, strict=True)]).astype(dtype),
        "gene_names": np.array(GENE_NAMES, dtype="S"),
        "genes": np.array([f"ENSMUSG{gene:011d}" for gene in range(N_GENES)], dtype="S"),
        "indices": np.concatenate(by_cell).astype("int64"),
        "indptr": np.cumsum([0, *map(len, by_cell)]).astype("int64"),
        "shape": np.array([N_GENES, len(counts)], dtype="int32"),
    } | changes
    with h5py.File(file, "w") as content:
        for name, values in members.items():
            if values is not None:
                content.create_dataset(f"{genome}/{name}", data=values, compression="gzip")
    return file


def md5(file):
    return hashlib.md5(file.read_bytes()).hexdigest()


@pytest.fixture
def served(tmp_path):
    folder = tmp_path / "server"
    folder.mkdir()
    return write_file(folder / "1M_neurons_neuron20k.h5", random_counts())


@pytest.fixture
def cache(tmp_path):
    return tmp_path / "not yet" / "cache"


@pytest.fixture(autouse=True)
def small(served, monkeypatch):
    """The declaration with the small file in the place of the published one."""
    declared = replace(
        _published.MOUSE_BRAIN_20K, url=served.as_uri(), md5=md5(served), shape=(N_CELLS, N_GENES), stand_in="toys"
    )
    monkeypatch.setattr(_published, "MOUSE_BRAIN_20K", declared)
    return declared


def serve(monkeypatch, answer, length=None):
    """Let the server answer with these bytes, announced as of this length, or with this exception."""

    def urlopen(request, timeout):
        assert timeout > 0
        if isinstance(answer, BaseException):
            raise answer
        response = io.BytesIO(answer)
        response.headers = Message()
        if length is not None:
            response.headers["Content-Length"] = str(length)
        return response

    monkeypatch.setattr(_published, "urlopen", urlopen)


def names_in(folder):
    return sorted(file.name for file in folder.iterdir())


def no_network(monkeypatch):
    serve(monkeypatch, AssertionError("nothing may be downloaded"))


# Declared facts


def test_the_declared_file_is_the_sample_of_20000_cells_that_scvae_was_shown_on(monkeypatch):
    monkeypatch.undo()
    declared = _published.MOUSE_BRAIN_20K
    assert declared.url == "https://cf.10xgenomics.com/samples/cell-exp/1.3.0/1M_neurons/1M_neurons_neuron20k.h5"
    assert declared.url.endswith(declared.file_name)
    assert declared.shape == (20_000, 27_998)
    assert re.fullmatch("[0-9a-f]{32}", declared.md5)
    assert hasattr(datasets, declared.loader)
    assert "mouse_brain_20k_like()" in declared.stand_in


# Reading


@pytest.mark.parametrize("dtype", ["int32", "int64", "uint32", "uint16", "float64"])
def test_the_matrix_is_the_written_counts_as_csr_float32_whatever_their_type(dtype, tmp_path):
    counts = random_counts() % 60_000
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # another MD5
        adata = datasets.mouse_brain_20k(write_file(tmp_path / "counts.h5", counts, dtype=dtype))
    assert isinstance(adata.X, sparse.csr_matrix)
    assert adata.X.dtype == np.float32
    assert adata.X.has_canonical_format
    np.testing.assert_array_equal(adata.X.toarray(), counts)


def test_cells_genes_and_libraries_are_named_as_in_the_file(served):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.simplefilter("ignore", DeprecationWarning)
        adata = datasets.mouse_brain_20k(served)
    assert list(adata.obs_names) == barcodes_of(LIBRARIES)
    assert list(adata.var_names) == [*GENE_NAMES[:-1], "Twin-1"]
    assert (list(adata.var), adata.var["gene_ids"].iloc[-1]) == (["gene_ids"], "ENSMUSG00000000019")
    assert list(adata.obs["library"].cat.categories) == ["1", "2", "10"]
    assert list(adata.obs["library"][:4]) == ["1", "2", "10", "1"]
    assert adata.uns["source"] == served.as_uri()


def test_barcodes_without_a_number_give_no_library(tmp_path, small, monkeypatch):
    file = write_file(tmp_path / "counts.h5", random_counts(), barcodes=[f"AAAC{cell}" for cell in range(N_CELLS)])
    monkeypatch.setattr(_published, "MOUSE_BRAIN_20K", replace(small, md5=md5(file)))
    assert list(datasets.mouse_brain_20k(file).obs) == []


def test_read_cells_survive_h5ad(served, tmp_path):
    adata = datasets.mouse_brain_20k(served)
    adata.write_h5ad(tmp_path / "cells.h5ad")
    back = ad.read_h5ad(tmp_path / "cells.h5ad")
    assert (adata.X != back.X).nnz == 0
    assert adata.obs.equals(back.obs)
    assert adata.var.equals(back.var)
    assert adata.uns["source"] == back.uns["source"]


def test_a_given_path_is_read_without_network_and_nothing_is_written(served, cache, monkeypatch):
    no_network(monkeypatch)
    assert datasets.mouse_brain_20k(str(served), cache_dir=cache).shape == (N_CELLS, N_GENES)
    assert names_in(served.parent) == [served.name]
    assert not cache.exists()


def test_a_path_without_a_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"`path` must be the file 1M_.*found none at .*typo\.h5\. Correct"):
        datasets.mouse_brain_20k(tmp_path / "typo.h5")


# Download


def test_a_download_is_kept_with_its_sha256_and_read_from_then_on(served, cache, monkeypatch):
    first = datasets.mouse_brain_20k(cache_dir=cache)
    assert names_in(cache) == [served.name, f"{served.name}.sha256"]
    assert (cache / served.name).read_bytes() == served.read_bytes()
    expected = f"{hashlib.sha256(served.read_bytes()).hexdigest()}  {served.name}\n"
    assert (cache / f"{served.name}.sha256").read_text() == expected
    no_network(monkeypatch)
    again = datasets.mouse_brain_20k(cache_dir=str(cache))
    np.testing.assert_array_equal(first.X.toarray(), again.X.toarray())


def test_the_folder_is_scanpys_unless_given(cache, served, monkeypatch):
    import scanpy as sc

    before = sc.settings.datasetdir
    sc.settings.datasetdir = cache
    try:
        datasets.mouse_brain_20k()
    finally:
        sc.settings.datasetdir = before
    assert served.name in names_in(cache)


def test_what_a_killed_download_left_is_ignored(served, cache):
    cache.mkdir(parents=True)
    left = cache / f"{served.name}.0123.part"
    left.write_bytes(served.read_bytes()[:100])
    assert datasets.mouse_brain_20k(cache_dir=cache).n_obs == N_CELLS
    assert names_in(cache) == [served.name, left.name, f"{served.name}.sha256"]


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        pytest.param(URLError("Name or service not known"), "URLError: .*Name or service not known", id="offline"),
        pytest.param(HTTPError("u", 404, "Not Found", Message(), None), "HTTPError: HTTP Error 404", id="moved"),
        pytest.param(TimeoutError("timed out"), "TimeoutError: timed out", id="silence"),
        pytest.param(RemoteDisconnected("closed"), "RemoteDisconnected: closed", id="closed"),
    ],
)
def test_without_a_connection_the_error_says_what_was_tried_and_what_to_do(answer, reason, cache, small, monkeypatch):
    serve(monkeypatch, answer)
    with pytest.raises(OSError, match=f"found no file at .*{small.file_name}, and could not .*{reason}") as caught:
        datasets.mouse_brain_20k(cache_dir=cache)
    message = str(caught.value)
    assert small.url in message
    assert f"put it at {cache.absolute() / small.file_name}, or pass its place as `path`" in message
    assert message.endswith("As a stand-in there is toys.")
    assert not cache.exists()  # nor is an empty folder left behind


def test_the_announced_length_must_arrive(served, cache, monkeypatch):
    content = served.read_bytes()
    serve(monkeypatch, content[:-7], len(content))
    with pytest.raises(OSError, match=f"connection ended after {len(content) - 7:,} of {len(content):,} bytes"):
        datasets.mouse_brain_20k(cache_dir=cache)
    assert names_in(cache) == []


@pytest.mark.parametrize("content", [b"<html>Please log in</html>", b""], ids=["page", "empty"])
def test_a_download_that_is_no_hdf5_is_refused_and_not_kept(content, cache, monkeypatch):
    serve(monkeypatch, content)
    with pytest.raises(ValueError, match=r"The download from file:.* must be .*found what HDF5 cannot open"):
        datasets.mouse_brain_20k(cache_dir=cache)
    assert names_in(cache) == []


def test_an_interrupt_leaves_nothing_behind(cache, monkeypatch):
    def interrupted(source, target):
        target.write(source.read(100))
        raise KeyboardInterrupt

    monkeypatch.setattr(_published.shutil, "copyfileobj", interrupted)
    with pytest.raises(KeyboardInterrupt):
        datasets.mouse_brain_20k(cache_dir=cache)
    assert names_in(cache) == []


def test_a_download_of_another_md5_is_read_with_a_warning(served, cache, small, monkeypatch):
    monkeypatch.setattr(_published, "MOUSE_BRAIN_20K", replace(small, md5="0" * 32))
    with pytest.warns(UserWarning, match=f"The download from .* should have the MD5 0{{32}}; found {md5(served)}"):
        datasets.mouse_brain_20k(cache_dir=cache)


def test_a_forged_file_with_a_note_of_its_own_is_read_with_a_warning_each_time(served, cache):
    datasets.mouse_brain_20k(cache_dir=cache)
    forged = write_file(cache / served.name, random_counts() + 1)
    (cache / f"{served.name}.sha256").write_text(f"{hashlib.sha256(forged.read_bytes()).hexdigest()}  {served.name}\n")
    for _ in range(2):
        with pytest.warns(UserWarning, match=f"neuron20k\\.h5 should have the MD5 {md5(served)}; found {md5(forged)}"):
            datasets.mouse_brain_20k(cache_dir=cache)


# Damage


@pytest.mark.filterwarnings("ignore:.*should have the MD5")
def test_a_file_that_changed_since_its_download_is_refused(served, cache):
    datasets.mouse_brain_20k(cache_dir=cache)
    file = cache / served.name
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    with pytest.raises(ValueError, match=r"must have the SHA-256 [0-9a-f]{64}, .*; found [0-9a-f]{64}.*Delete both"):
        datasets.mouse_brain_20k(cache_dir=cache)
    with pytest.raises(ValueError, match="must have the SHA-256"):
        datasets.mouse_brain_20k(file)


def test_a_file_put_there_by_hand_is_compared_with_the_md5(served, tmp_path):
    file = write_file(tmp_path / "by_hand.h5", random_counts() + 1)
    with pytest.warns(UserWarning, match=r"by_hand\.h5 should have the MD5") as caught:
        datasets.mouse_brain_20k(file)
    assert caught[0].filename == __file__
    assert names_in(tmp_path) == ["by_hand.h5", "server"]


@pytest.mark.filterwarnings("ignore:.*should have the MD5")
@pytest.mark.parametrize(
    ("changes", "found"),
    [
        pytest.param({"genome": "matrix"}, "the groups 'matrix'", id="version_3"),
        pytest.param({"genome": "hg19"}, "the groups 'hg19'", id="other_genome"),
        pytest.param({"genes": None, "data": None}, "'mm10' without 'data', 'genes'", id="missing"),
        pytest.param({"shape": [27_998, 1_306_127]}, "1,306,127 cells × 27,998 genes", id="all_cells"),
        pytest.param({"indices": np.arange(3)}, r"a matrix that cannot be read \(", id="short_indices"),
        pytest.param({"indptr": np.zeros(4, int)}, r"a matrix that cannot be read \(", id="short_indptr"),
    ],
)
def test_another_file_is_refused_with_what_it_is(changes, found, tmp_path):
    file = write_file(tmp_path / "other.h5", random_counts(), **changes)
    with pytest.raises(
        ValueError,
        match=rf"other\.h5 must be 1M_neurons_neuron20k\.h5: .*'mm10' of 30 cells × 20 genes.*; found {found}",
    ):
        datasets.mouse_brain_20k(file)


@pytest.mark.filterwarnings("ignore:.*should have the MD5")
def test_genes_that_do_not_exist_are_refused(tmp_path):
    counts = random_counts()
    indices = np.concatenate([np.flatnonzero(row) for row in counts])
    indices[5] = N_GENES
    file = write_file(tmp_path / "other.h5", counts, indices=indices)
    with pytest.raises(ValueError, match="a matrix that cannot be read"):
        datasets.mouse_brain_20k(file)


@pytest.mark.filterwarnings("ignore:.*should have the MD5")
@pytest.mark.parametrize(("factor", "dtype"), [(-1, "int32"), (0.5, "float32")], ids=["negative", "halves"])
def test_values_that_are_no_counts_are_refused(factor, dtype, tmp_path):
    file = write_file(tmp_path / "other.h5", random_counts() * factor, dtype=dtype)
    with pytest.raises(ValueError, match="found a matrix with values that are no counts"):
        datasets.mouse_brain_20k(file)


@pytest.mark.filterwarnings("ignore:.*should have the MD5")
def test_every_cut_of_the_file_is_refused(served, tmp_path):
    content = served.read_bytes()
    for share in [0.1, 0.5, 0.9, 0.999]:
        (tmp_path / "cut.h5").write_bytes(content[: int(share * len(content))])
        with pytest.raises(ValueError, match="found what HDF5 cannot open"):
            datasets.mouse_brain_20k(tmp_path / "cut.h5")


# The stand-in


@pytest.mark.parametrize("random_state", [0, 1])
def test_the_stand_in_has_the_published_share_of_zeros_and_says_that_it_is_simulated(random_state):
    adata = datasets.mouse_brain_20k_like(300, random_state=random_state)
    assert adata.shape == (300, 27_998)
    # 92.82 % of the real counts are zeros; 0.2 % is for the genes' means, which differ from seed to seed
    assert 1 - adata.X.nnz / np.prod(adata.shape) == pytest.approx(0.9282, abs=0.003)
    assert 4000 < np.median(np.asarray(adata.X.sum(axis=1))) < 5000
    assert adata.uns["source"] == "simulated"
    assert adata.obs["component"].nunique() == 10
    assert adata.var_names[0] == "gene0"


def test_the_stand_in_refuses_fewer_cells_than_components():
    with pytest.raises(ValueError, match=r"Every component needs a cell; .*`n_cells=9`"):
        datasets.mouse_brain_20k_like(9)
