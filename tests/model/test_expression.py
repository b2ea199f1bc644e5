"""λ, expression and draws in parts: the same numbers as at once, in a stated memory.

The independent numbers are those of scvi-tools, whose methods these replace, with the same seed; and a single batch
through the module, with nothing in between.
"""

from __future__ import annotations

import inspect
import itertools
import tracemalloc

import h5py
import numpy as np
import pandas as pd
import pytest
import torch
from scipy import sparse
from scvi.model.base import RNASeqMixin

import scvae_tools as svt
from scvae_tools._module import memory
from scvae_tools._module.vae import VAE
from scvae_tools._random import seeded
from scvae_tools.model._scvae import SCVAE

N_CELLS, N_GENES, N_COMPONENTS = 200, 30, 3
MODELS = [("zinb", "gmvae"), ("nb", "vade"), ("poisson", False)]
SAME = {"rtol": 2e-5}  #: products of other shapes round differently in float32
#: All that a chunk can be: everything at once, some cells, one cell, some genes of one cell.
SIZES = [2**28, 20_000, 1_000, 300]


def make_model(likelihood="nb", mixture=False, n_cells=N_CELLS, n_genes=N_GENES):
    adata = svt.datasets.simulate(n_cells, n_genes, N_COMPONENTS, n_batches=2, random_state=0)
    SCVAE.setup_anndata(adata, batch_key="batch")
    options = {"n_components": N_COMPONENTS} if mixture else {}
    model = SCVAE(adata, likelihood=likelihood, mixture=mixture, n_latent=4, n_hidden=16, **options)
    model.train(3, batch_size=64, progress=False)
    return model


@pytest.fixture(scope="module")
def models():
    return {options: make_model(*options) for options in MODELS}


@pytest.fixture(params=MODELS, ids=lambda options: f"{options[0]}-{options[1]}")
def model(request, models):
    return models[request.param]


@pytest.fixture
def nb(models):
    return models["nb", "vade"]


@pytest.fixture(params=SIZES)
def chunk_bytes(request, monkeypatch):
    monkeypatch.setattr(memory, "CHUNK_BYTES", request.param)
    return request.param


@pytest.fixture
def small_chunks(monkeypatch):
    monkeypatch.setattr(memory, "CHUNK_BYTES", 20_000)


@pytest.fixture
def decoded(monkeypatch):
    """Shapes of all that the modules decode."""
    shapes, decode, rate = [], VAE.decode, VAE.rate

    def noted_decode(self, *args, **kwargs):
        px = decode(self, *args, **kwargs)
        shapes.append(tuple(px.batch_shape))
        return px

    def noted_rate(self, *args, **kwargs):
        value = rate(self, *args, **kwargs)
        shapes.append(tuple(value.shape))
        return value

    monkeypatch.setattr(VAE, "decode", noted_decode)
    monkeypatch.setattr(VAE, "rate", noted_rate)
    return shapes


def by_scvi(model, method, **options):
    """What the method of scvi-tools returns, without ours in between."""
    with seeded(3), torch.inference_mode():
        return getattr(RNASeqMixin, method)(model, **options)


def numbers(result):
    return result.to_numpy() if isinstance(result, pd.DataFrame) else result


def array_on_disk(kind, path, shape):
    if kind == "h5py":
        return h5py.File(path / "array.h5", "w").create_dataset("array", shape, "float32")
    if kind == "zarr":
        zarr = pytest.importorskip("zarr")
        return zarr.create_array(str(path / "array.zarr"), shape=shape, chunks=(7,) * len(shape), dtype="float32")
    return np.lib.format.open_memmap(path / "array.npy", "w+", "float32", shape)


each_kind_of_array = pytest.mark.parametrize("kind", ["h5py", "zarr", "memory map"])


def test_the_memory_is_the_stated_one():
    assert memory.CHUNK_BYTES == 2**28  # "256 MB" in the documentation of five methods
    for method in ("get_lambda", "get_normalized_expression", "posterior_predictive_sample", "sample"):
        assert "``CHUNK_BYTES``" in getattr(SCVAE, method).__doc__.replace("\n", " ")


# -- λ ---------------------------------------------------------------------------------------------------------------


def rate_at_once(model, cells=slice(None)):
    """λ of a single batch, (n_cells, n_genes)."""
    (tensors,) = model._batches(None, np.arange(N_CELLS)[cells], N_CELLS)
    with torch.inference_mode():
        return model.module.rate(*model.module.data(tensors)).numpy()


def test_lambda_is_the_same_in_chunks(model, chunk_bytes):
    expected = rate_at_once(model)
    np.testing.assert_allclose(model.get_lambda(), expected, **SAME)
    chunks = list(model.iter_lambda(indices=[7, 3, 199], gene_list=["gene9", "gene4"]))
    np.testing.assert_allclose(np.concatenate(chunks), expected[[7, 3, 199]][:, [9, 4]], **SAME)


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("gene_list", [None, ["gene3"]])
def test_lambda_is_decoded_within_the_memory(model, gene_list, decoded):
    model.get_lambda(gene_list=gene_list)
    n_decoded = N_COMPONENTS if type(model.module).__name__ == "GMVAE" else 1
    n_genes = 1 if gene_list else N_GENES
    assert {shape[1] for shape in decoded} == {n_genes}
    assert sum(shape[0] for shape in decoded) == N_CELLS
    largest = max(shape[0] for shape in decoded)
    assert largest > 1
    assert 4 * largest * n_genes * n_decoded * (len(model.module.likelihood.heads) + 2) <= 20_000


@pytest.mark.usefixtures("small_chunks")
@each_kind_of_array
def test_lambda_is_written_to_disk_by_rows(model, kind, tmp_path):
    out = array_on_disk(kind, tmp_path, (N_CELLS, 2))
    assert model.get_lambda(gene_list=["gene3", "gene1"], out=out) is out
    np.testing.assert_allclose(out[:], rate_at_once(model)[:, [3, 1]], **SAME)


def test_a_chunk_has_as_many_cells_as_were_asked_for(nb):
    assert [len(chunk) for chunk in nb.iter_lambda(batch_size=90)] == [90, 90, 20]


def test_between_chunks_gradients_work_as_ever(nb):
    for _ in nb.iter_lambda(batch_size=90):
        assert not torch.is_inference_mode_enabled()
        assert torch.is_grad_enabled()
    assert not torch.is_inference_mode_enabled()


def test_many_counts_make_chunks_small(monkeypatch):
    model, sizes = make_model(n_cells=60), []
    monkeypatch.setattr(memory, "CHUNK_BYTES", 40_000)
    for thinned in (False, True):
        adata = model.adata.copy()
        if thinned:
            first = adata.X.toarray()
            first[:, 1:] = 0
            first[:, 0] += 1
            adata.X = sparse.csr_matrix(first)
        sizes.append(len(next(model.iter_lambda(adata, gene_list=["gene3"]))))
    per_cell = model.adata.X.nnz / 60
    assert sizes[0] == pytest.approx(40_000 / (memory.ENCODED_BYTES * per_cell), rel=0.1)
    assert sizes[1] == 60


@pytest.mark.parametrize(
    ("out", "match"),
    [
        (np.empty((3, N_GENES)), r"`out` must have the shape of the result, \(200, 30\); found \(3, 30\)"),
        ([[0.0]], r"found list\. Make it so, for example with np\.lib\.format\.open_memmap"),
    ],
)
def test_a_place_of_another_shape_is_refused(nb, out, match):
    with pytest.raises(ValueError, match=match):
        nb.get_lambda(out=out)
    with pytest.raises(ValueError, match=match):
        nb.get_normalized_expression(out=out)


# -- normalized expression ---------------------------------------------------------------------------------------------

REQUESTS = {
    "nothing": {},
    "cells by position": {"indices": [5, 2, 150]},
    "batches of 50": {"batch_size": 50},
    "genes, in another order": {"gene_list": ["gene7", "gene2"]},
    "another size": {"library_size": 1e4},
    "own sizes": {"library_size": "latent"},
    "another batch": {"transform_batch": "1"},
    "the mean over batches": {"transform_batch": ["0", "1"], "n_samples": 2},
    "own batch and another": {"transform_batch": [None, "1"]},
    "the mean over draws": {"n_samples": 3},
    "draws": {"n_samples": 3, "return_mean": False},
    "draws of some genes": {"n_samples": 3, "return_mean": False, "gene_list": ["gene7"]},
    "an array": {"return_numpy": True},
    "fewer draws than cells": {"n_samples_overall": 50, "return_numpy": True},
    "more draws than cells": {"n_samples_overall": 230, "return_numpy": True, "transform_batch": ["0", "1"]},
    "draws of some cells": {"n_samples_overall": 450, "return_numpy": True, "indices": np.arange(3, 60, 2)},
}


@pytest.mark.parametrize("request_", REQUESTS.values(), ids=REQUESTS)
def test_normalized_expression_is_that_of_scvi_tools(model, chunk_bytes, request_):
    found = model.get_normalized_expression(random_state=3, **request_)
    expected = by_scvi(model, "get_normalized_expression", **request_)
    assert type(found) is type(expected)
    if isinstance(found, pd.DataFrame):
        assert found.index.equals(expected.index)
        assert found.columns.equals(expected.columns)
    found, expected = numbers(found), numbers(expected)
    assert found.dtype == expected.dtype
    np.testing.assert_allclose(found, expected, **SAME)


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("n_samples", [1, 7])
@pytest.mark.parametrize("gene_list", [None, ["gene3"]])
def test_expression_is_decoded_within_the_memory(model, n_samples, gene_list, decoded):
    model.get_normalized_expression(n_samples=n_samples, gene_list=gene_list)
    assert {shape[-1] for shape in decoded} == {1 if gene_list else N_GENES}
    assert sum(shape[-2] for shape in decoded) == N_CELLS
    largest = max(np.prod(shape) for shape in decoded)
    assert largest >= n_samples
    assert 4 * largest * (len(model.module.likelihood.heads) + 2) <= 20_000


def test_where_one_cell_is_too_large_its_genes_are_decoded_a_few_at_a_time(nb, monkeypatch, decoded):
    monkeypatch.setattr(memory, "CHUNK_BYTES", 4 * 100 * 7 * 6)
    found = nb.get_normalized_expression(n_samples=100, indices=[4, 8], random_state=3)
    assert {shape[:2] for shape in decoded} == {(100, 1)}
    assert [shape[2] for shape in decoded] == 2 * [7, 7, 7, 7, 2]
    expected = by_scvi(nb, "get_normalized_expression", n_samples=100, indices=[4, 8])
    np.testing.assert_allclose(found, expected, **SAME)


def test_of_draws_overall_only_the_chosen_are_decoded(nb, decoded):
    nb.get_normalized_expression(n_samples_overall=40)
    assert sum(shape[0] for shape in decoded) == 40


def test_a_gene_has_the_same_numbers_alone(model):
    whole = model.get_normalized_expression(random_state=1)
    alone = model.get_normalized_expression(gene_list=["gene5"], random_state=1)
    np.testing.assert_allclose(alone["gene5"], whole["gene5"], **SAME)


@pytest.mark.usefixtures("small_chunks")
@each_kind_of_array
@pytest.mark.parametrize("draws", [(), (3,)])
def test_expression_is_written_to_disk_by_rows(nb, kind, draws, tmp_path):
    options = {"n_samples": 3, "return_mean": False} if draws else {}
    out = array_on_disk(kind, tmp_path, (*draws, N_CELLS, N_GENES))
    assert nb.get_normalized_expression(out=out, random_state=3, **options) is out
    expected = numbers(by_scvi(nb, "get_normalized_expression", **options))
    np.testing.assert_allclose(out[:], expected, **SAME)


class OnlyRows:
    """An array that takes whole rows alone."""

    def __init__(self, shape):
        self.shape, self.values = shape, np.full(shape, np.nan, dtype=np.float32)

    def __setitem__(self, rows, values):
        rows = rows[0] if isinstance(rows, tuple) and len(rows) == 1 else rows
        assert isinstance(rows, slice)
        self.values[rows] = values


@pytest.mark.usefixtures("small_chunks")
def test_what_takes_rows_by_slices_is_enough(nb):
    out = OnlyRows((N_CELLS, N_GENES))
    nb.get_normalized_expression(out=out, random_state=3)
    np.testing.assert_allclose(out.values, by_scvi(nb, "get_normalized_expression"), **SAME)
    nb.get_lambda(out=out)
    np.testing.assert_allclose(out.values, rate_at_once(nb), **SAME)


def make_loader(model, kind):
    loader = model._make_data_loader(model.adata, np.arange(N_CELLS), batch_size=64, drop_last=kind == "drops the last")
    return iter(list(loader)) if kind == "of unknown length" else loader


@pytest.mark.parametrize("kind", ["of known length", "of unknown length", "drops the last"])
@pytest.mark.parametrize("options", [{}, {"n_samples": 2, "return_mean": False}], ids=["one draw", "two draws"])
def test_batches_can_come_from_a_loader(nb, kind, options):
    found = nb.get_normalized_expression(dataloader=make_loader(nb, kind), random_state=3, **options)
    expected = by_scvi(nb, "get_normalized_expression", dataloader=list(make_loader(nb, kind)), **options)
    assert isinstance(found, np.ndarray)
    assert found.shape[-2] == (192 if kind == "drops the last" else N_CELLS)
    assert found.shape == expected.shape
    if kind == "of unknown length":  # an iterator draws no seed for its workers
        np.testing.assert_allclose(found, expected, **SAME)
    parameters = nb.get_likelihood_parameters(dataloader=make_loader(nb, kind))
    assert parameters["mean"].shape == (found.shape[-2], N_GENES)
    counts = nb.posterior_predictive_sample(dataloader=make_loader(nb, kind))
    assert counts.shape == (found.shape[-2], N_GENES)


def test_genes_that_the_model_does_not_know_are_left_out_with_a_warning(nb):
    with pytest.warns(UserWarning, match="`gene_list`: 2 of 3 names are left out, the first 'GENE1'"):
        found = nb.get_normalized_expression(gene_list=["GENE1", "gene1", "x"])
    assert list(found.columns) == ["gene1"]
    for method in (nb.get_normalized_expression, nb.posterior_predictive_sample):
        with pytest.raises(ValueError, match="must name genes of the model; found none among its 2 names"):
            method(gene_list=["GENE1", "x"])


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"transform_batch": "7"}, "`transform_batch` must be one of '0', '1'; found '7'"),
        ({"weights": "importance"}, "`weights` must be 'uniform' or None; found 'importance'"),
        ({"n_samples_overall": 5, "n_samples": 2}, "takes the place of `n_samples`; found 5 and 2. Pass one"),
        ({"n_samples_overall": 5, "indices": []}, "`indices` must choose at least one cell; found none"),
        ({"n_samples_overall": 5, "dataloader": []}, "found a dataloader without `indices`"),
        ({"n_samples_overall": 5, "out": np.zeros((5, N_GENES))}, "`out` cannot take draws in random order"),
    ],
    ids=str,
)
def test_unfit_requests_are_refused(nb, options, match):
    with pytest.raises(ValueError, match=match):
        nb.get_normalized_expression(**options)


def test_a_table_of_three_axes_is_an_array_with_a_warning(nb):
    with pytest.warns(UserWarning, match="A table has two axes"):
        assert nb.get_normalized_expression(n_samples=2, return_mean=False, return_numpy=False).shape == (2, 200, 30)


@pytest.mark.parametrize("mode", ["vanilla", "change"])
def test_differential_expression_is_the_same_in_parts(nb, mode, monkeypatch):
    def table():
        options = {"groupby": "component", "group1": "0", "mode": mode, "n_samples_overall": 300, "silent": True}
        return nb.differential_expression(batch_correction=True, **options).sort_index()

    at_once = table()
    monkeypatch.setattr(memory, "CHUNK_BYTES", 5_000)
    in_parts = table()
    monkeypatch.setattr(
        SCVAE, "get_normalized_expression", lambda self, *a, **k: RNASeqMixin.get_normalized_expression(self, *a, **k)
    )
    for name in ("scale1", "scale2", "proba_de" if mode == "change" else "proba_m1"):
        np.testing.assert_allclose(in_parts[name], at_once[name], rtol=1e-4, atol=1e-4)
        np.testing.assert_allclose(in_parts[name], table()[name], rtol=1e-4, atol=1e-4)


def test_differential_expression_shows_the_arguments_of_scvi_and_the_seed(nb):
    theirs = set(inspect.signature(RNASeqMixin.differential_expression).parameters) - {"self"}
    assert set(inspect.signature(nb.differential_expression).parameters) == theirs | {"random_state"}


# -- correlations ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n_samples", [1, 4])
def test_correlations_without_r_are_those_of_normalized_expression(models, n_samples):
    model = models["poisson", False]
    options = {"n_samples": n_samples, "batch_size": 64, "indices": np.arange(150), "transform_batch": "1"}
    expression = model.get_normalized_expression(return_mean=False, return_numpy=True, **options)
    expected = np.corrcoef(expression.reshape(-1, N_GENES), rowvar=False)
    found = model.get_feature_correlation_matrix(correlation_type="pearson", **options)
    assert list(found.index) == list(found.columns) == list(model.var_names)
    np.testing.assert_allclose(found, expected, atol=1e-4)


def test_expression_to_correlate_has_the_gamma_noise_of_r_around_it(nb):
    options = {"n_samples": 20, "batch_size": N_CELLS}  # one batch: noise is drawn after all z, which are then the same
    mean = 1000 * nb.get_normalized_expression(return_mean=False, return_numpy=True, random_state=0, **options)
    r = nb.get_likelihood_parameters()["dispersions"]
    with seeded(0):
        found = nb._get_denoised_samples(**options)
    assert found.shape == (N_CELLS, N_GENES, 20)
    noise = found.transpose(2, 0, 1) / mean
    np.testing.assert_allclose(noise.mean((0, 1)), 1, atol=0.1)
    np.testing.assert_allclose((noise.var((0, 1)) * r.mean(0)).mean(), 1, atol=0.05)  # over 4,000 draws of 30 genes


def test_correlations_are_those_of_their_seed(nb):
    first, second, other = (nb.get_feature_correlation_matrix(random_state=seed).to_numpy() for seed in (0, 0, 1))
    np.testing.assert_array_equal(first, second)
    assert (first != other).any()


# -- parameters --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"n_samples": 3}, {"n_samples": 3, "give_mean": True}], ids=str)
def test_likelihood_parameters_are_the_same_in_parts(model, chunk_bytes, options):
    options = {"indices": np.arange(10, 110), "batch_size": 100} | options
    found = model.get_likelihood_parameters(random_state=3, **options)
    with seeded(3), torch.inference_mode():
        (tensors,) = model._batches(None, options["indices"], 100)
        inference = {"n_samples": options.get("n_samples", 1)}
        px = model.module(tensors, inference_kwargs=inference, compute_loss=False)[1]["px"]
    expected = {"mean": px.mu, "dispersions": px.theta, "dropout": px.zi_probs}
    assert set(found) == {
        key
        for key, head in zip(expected, ("log_rate", "log_r", "gate"), strict=True)
        if head in model.module.likelihood.head_names
    }
    for key, value in found.items():
        whole = expected[key].expand(px.batch_shape).numpy()
        np.testing.assert_allclose(value, whole.mean(0) if "give_mean" in options else whole, **SAME)


# -- draws of counts ---------------------------------------------------------------------------------------------------

PREDICTIVE = {
    "nothing": {},
    "draws": {"n_samples": 4},
    "the mean over batches": {"transform_batch": ["0", "1"]},
    "some genes": {"gene_list": ["gene7", "gene2"], "n_samples": 2},
    "some cells": {"indices": [7, 3], "batch_size": 1},
}


@pytest.mark.parametrize("request_", PREDICTIVE.values(), ids=PREDICTIVE)
def test_predictive_counts_are_those_of_scvi_tools(model, request_):
    found = model.posterior_predictive_sample(random_state=3, **request_)
    expected = by_scvi(model, "posterior_predictive_sample", **request_)
    assert type(found) is type(expected)
    assert found.dtype == expected.dtype
    assert found.compressed_axes == expected.compressed_axes == (0,)
    np.testing.assert_array_equal(found.todense(), expected.todense())


@pytest.mark.parametrize("n_samples", [1, 5])
@pytest.mark.parametrize("gene_list", [None, ["gene2", "gene7"]])
def test_counts_drawn_in_parts_are_put_where_they_belong(nb, chunk_bytes, n_samples, gene_list, monkeypatch):
    """Counts that tell cell, gene and draw stand in for those of the model; one in three is 0."""
    expected = np.random.default_rng(0).poisson(3, (N_CELLS, N_GENES, n_samples)).astype(np.float32)
    expected[np.random.default_rng(1).random(expected.shape) < 1 / 3] = 0
    taken, cell_of = {}, {float(total): cell for cell, total in enumerate(nb.adata.X.toarray() @ np.arange(N_GENES))}
    assert len(cell_of) == N_CELLS

    def sample(tensors, n_samples, generative_kwargs):
        cells = [cell_of[float(total)] for total in nb.module.data(tensors)[0].dense() @ torch.arange(30.0)]
        first = taken.get(cells[0], 0)
        taken.update(dict.fromkeys(cells, first + n_samples))
        counts = torch.from_numpy(expected[cells][:, :, first : first + n_samples])
        return counts if n_samples > 1 else counts[:, :, 0]

    monkeypatch.setattr(nb.module, "sample", sample)
    found = nb.posterior_predictive_sample(n_samples=n_samples, gene_list=gene_list)
    expected = expected if gene_list is None else expected[:, [2, 7]]
    np.testing.assert_array_equal(found.todense(), expected if n_samples > 1 else expected[:, :, 0])
    starts = found.indptr
    assert all((np.diff(found.indices[a:b]) > 0).all() for a, b in itertools.pairwise(starts))
    assert set(taken.values()) == {n_samples}


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("n_samples", [1, 3, 40])
def test_counts_are_drawn_within_the_memory(model, n_samples, decoded):
    counts = model.posterior_predictive_sample(n_samples=n_samples, indices=np.arange(50))
    assert counts.shape == ((50, N_GENES, n_samples) if n_samples > 1 else (50, N_GENES))
    largest = max(np.prod(shape) for shape in decoded)
    assert N_GENES <= largest <= 20_000 / (4 * (len(model.module.likelihood.heads) + 6))
    assert sum(np.prod(shape) for shape in decoded) == 50 * N_GENES * n_samples


@pytest.mark.parametrize("chunk_bytes", [2**28, 3_000, 300], indirect=True)
def test_predictive_counts_in_parts_have_the_means_of_the_model(nb, chunk_bytes):
    """Within five standard errors, of 60 cells x 50 draws; the mean over z comes from 2,000 other draws."""
    cells = np.arange(60)
    counts = nb.posterior_predictive_sample(n_samples=50, indices=cells, random_state=5).todense()
    expected = nb.get_normalized_expression(indices=cells, n_samples=2000, library_size="latent").to_numpy()
    error = counts.std(axis=2, ddof=1) / np.sqrt(50)
    total_error = np.sqrt((error**2).sum(0))
    assert (np.abs(counts.mean(2).sum(0) - expected.sum(0)) < 5 * total_error).all()


@pytest.mark.usefixtures("small_chunks")
def test_new_cells_are_drawn_within_the_memory(model, decoded):
    new = model.sample(100, random_state=2)
    assert sum(shape[0] for shape in decoded) == 100
    assert max(np.prod(shape) for shape in decoded) <= 20_000 / (4 * (len(model.module.likelihood.heads) + 6))
    assert new.X.has_canonical_format
    assert new.X.indices.dtype == np.int32
    assert (new.X.data > 0).all()


def test_new_cells_in_parts_have_the_means_of_those_at_once(nb, monkeypatch):
    at_once = nb.sample(3000, random_state=2)
    monkeypatch.setattr(memory, "CHUNK_BYTES", 20_000)
    in_parts = nb.sample(3000, random_state=2)
    np.testing.assert_array_equal(in_parts.obsm["X_latent"], at_once.obsm["X_latent"])
    means = [np.asarray(a.X.mean(0)).ravel() for a in (at_once, in_parts)]
    error = np.sqrt(2 * at_once.X.toarray().var(0) / 3000)
    assert (np.abs(means[0] - means[1]) < 5 * error).all()


def test_new_cells_come_at_most_as_many_at_a_time_as_asked_for(nb, decoded):
    nb.sample(100, batch_size=30)
    assert [shape[0] for shape in decoded] == [30, 30, 30, 10]
    decoded.clear()
    nb.sample(1000)
    assert [shape[0] for shape in decoded] == [512, 488]


# -- memory ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def wide():
    return make_model(n_cells=6000, n_genes=400)


def bytes_of(result):
    if isinstance(result, dict):
        return sum(map(bytes_of, result.values()))
    if hasattr(result, "indptr"):
        return result.data.nbytes + result.indices.nbytes + result.indptr.nbytes
    return bytes_of(result.X) if hasattr(result, "X") else numbers(result).nbytes


METHODS = {
    "get_lambda": {},
    "get_normalized_expression": {},
    "get_normalized_expression of draws": {"n_samples": 2, "return_mean": False},
    "get_likelihood_parameters": {},
    "posterior_predictive_sample": {},
    "sample": {"n_cells": 12_000},
}


@pytest.mark.parametrize("case", METHODS)
def test_no_second_copy_of_the_result_is_made(wide, case, monkeypatch):
    """NumPy's memory above the result, which tracemalloc sees (and torch's not), is far below the result."""
    monkeypatch.setattr(memory, "CHUNK_BYTES", 2**20)
    method, options = getattr(wide, case.split()[0]), METHODS[case]
    method(**(options | ({"n_cells": 10} if case == "sample" else {"indices": [0]})))  # imports
    tracemalloc.start()
    try:
        result = method(**options)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    size = bytes_of(result)
    assert size > 9 * 2**20
    assert peak < 1.3 * size  # of this, batches of 128 cells are 2 MB
