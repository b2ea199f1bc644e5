"""Posterior predictive checks: all draws at once by NumPy, closed forms for a decoder that is set by hand, memory."""

from __future__ import annotations

import random
import tracemalloc

import anndata
import numpy as np
import pandas as pd
import pytest
import torch
from independent import N_ERRORS
from scipy import sparse

import scvae_tools as svt
from scvae_tools._module import memory
from scvae_tools._results.predictive_check import STATISTICS, find_ppc
from scvae_tools.model._scvae import SCVAE
from scvae_tools.tl._ppc import Totals, first_counts, ppc

N_CELLS, N_GENES = 200, 20
GENES = ["gene3", "gene11"]
#: All cells of a batch at once, some, one cell, some draws of one cell.
SIZES = [2**28, 60_000, 3_000, 800]


def make_adata(n_cells=N_CELLS, n_genes=N_GENES) -> anndata.AnnData:
    adata = svt.datasets.simulate(n_cells, n_genes, 3, n_batches=2, median_counts=60, random_state=0)
    adata.var["kept"] = np.arange(n_genes) % 5 != 0
    adata.obs["size"] = np.asarray(adata.X.sum(1)).ravel() * np.random.default_rng(0).uniform(0.5, 2, n_cells)
    return adata


def make_model(adata, *, likelihood="nb", mixture=False, epochs=2, **keys) -> SCVAE:
    SCVAE.setup_anndata(adata, **keys)
    options = {"n_components": 3} if mixture else {}
    model = SCVAE(adata, likelihood=likelihood, mixture=mixture, n_latent=3, n_hidden=8, **options)
    model.train(epochs, progress=False)
    return model


@pytest.fixture
def adata():
    return make_adata()


@pytest.fixture(scope="module")
def model():
    return make_model(make_adata(), likelihood="zinb", mixture="vade", batch_key="batch", size_factor_key="size")


@pytest.fixture(scope="module")
def checked(model):
    adata = make_adata()
    ppc(adata, model, genes=GENES, n_samples=5, random_state=3)
    return adata


def dense(counts) -> np.ndarray:
    return counts.toarray() if sparse.issparse(counts) else np.asarray(counts)


def moments(counts: np.ndarray) -> dict[str, np.ndarray]:
    """`STATISTICS` over the first axis."""
    return dict(zip(STATISTICS, (counts.mean(0), counts.var(0), (counts == 0).mean(0)), strict=True))


def drawn_at_once(model, adata, **options) -> np.ndarray:
    """Counts (n, g, s) float64."""
    return model.posterior_predictive_sample(adata.copy(), **options).todense().astype(np.float64)


def assert_is_of_draws(table: pd.DataFrame, draws: np.ndarray) -> None:
    for name, value in moments(draws).items():
        np.testing.assert_allclose(table[f"{name}_model"], value.mean(1), rtol=1e-9, atol=1e-12)
        np.testing.assert_allclose(table[f"{name}_model_sd"], value.std(1, ddof=1), rtol=1e-6, atol=1e-9)


# -- numbers of genes --------------------------------------------------------------------------------------------------


def test_the_data_have_the_moments_of_their_counts(checked):
    table = checked.uns["scvae_ppc"]["genes"]
    assert table.index.tolist() == checked.var_names.tolist()
    for name, value in moments(dense(checked.X).astype(np.float64)).items():
        np.testing.assert_allclose(table[name], value, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("chunk_bytes", SIZES)
def test_the_model_has_the_moments_of_all_draws_at_once(adata, model, chunk_bytes, monkeypatch):
    monkeypatch.setattr(memory, "CHUNK_BYTES", chunk_bytes)
    options = {"n_samples": 5, "random_state": 3, "indices": np.arange(150 if chunk_bytes > 10_000 else 12)}
    ppc(adata, model, **options)
    assert_is_of_draws(adata.uns["scvae_ppc"]["genes"], drawn_at_once(model, adata, **options))


def test_poisson_draws_have_the_moments_of_poisson_counts(adata):
    model = make_model(adata.copy(), likelihood="poisson", epochs=1)
    head = model.module.decoder.heads["log_rate"]
    with torch.no_grad():
        head.weight.zero_()  # λ is the size factor times a number for each gene, whatever z
    n_samples = 400
    ppc(adata, model, n_samples=n_samples)
    table = adata.uns["scvae_ppc"]["genes"]
    rate = dense(adata.X).sum(1, dtype=np.float64)[:, None] * np.exp(head.bias.detach().double().numpy())
    mean = rate.mean(0)
    deviation = np.sqrt(rate.sum(0)) / N_CELLS
    zeros = np.exp(-rate)
    expected = {
        "mean": (mean, deviation),
        "share_of_zeros": (zeros.mean(0), np.sqrt((zeros * (1 - zeros)).sum(0)) / N_CELLS),
    }
    for name, (value, spread) in expected.items():
        error = spread / np.sqrt(n_samples)
        assert (np.abs(table[f"{name}_model"] - value) < N_ERRORS * error).all()
        # The standard deviation of n draws has a relative error of 1 / √(2 n).
        np.testing.assert_allclose(table[f"{name}_model_sd"], spread, rtol=N_ERRORS / np.sqrt(2 * n_samples))
    # Of a sum over cells: E Σ x² / n − E (Σ x / n)².
    variance = (rate + rate**2).mean(0) - (deviation**2 + mean**2)
    error = table["variance_model_sd"] / np.sqrt(n_samples)
    assert (np.abs(table["variance_model"] - variance) < N_ERRORS * error).all()


def test_poisson_has_too_little_variance_for_counts_that_are_overdispersed():
    rng = np.random.default_rng(0)
    counts = rng.poisson(2 * rng.gamma(0.5, 2, (400, 12)))  # with a variance of 2 + 4 / 0.5
    counts[:, 0] += 1
    adata = anndata.AnnData(counts.astype(np.float32))
    adata.var_names = [f"gene{i}" for i in range(12)]
    at = np.arange(0, 400, 4)
    for likelihood in ("poisson", "nb"):
        model = make_model(adata.copy(), likelihood=likelihood, epochs=60)
        ppc(adata, model, key_added=likelihood, indices=at)
    tables = {likelihood: adata.uns[likelihood]["genes"].iloc[1:] for likelihood in ("poisson", "nb")}
    excess = {name: (table["variance_model"] / table["variance"]).median() for name, table in tables.items()}
    zeros = {name: (table["share_of_zeros_model"] - table["share_of_zeros"]).median() for name, table in tables.items()}
    assert excess["poisson"] < 0.8
    assert zeros["poisson"] < -0.1
    assert abs(zeros["nb"]) < 0.08


def test_sums_are_the_same_however_many_cells_and_draws_come_at_a_time():
    counts = np.random.default_rng(0).poisson(3_000, (4, 30, 5)).astype(np.float32)
    exact = counts.astype(np.float64)
    expected = exact.sum(1), np.square(exact).sum(1), (exact > 0).sum(1)
    for n_cells, n_samples in [(30, 4), (7, 4), (1, 3), (1, 1)]:
        totals = Totals(4, 5)
        for cell in range(0, 30, n_cells):
            for first in range(0, 4, n_samples):
                totals.add(first, counts[first : first + n_samples, cell : cell + n_cells])
        for found, value in zip((totals.sum, totals.squares, totals.positive), expected, strict=True):
            np.testing.assert_array_equal(found, value)


def test_counts_of_the_data_are_summed_in_blocks(monkeypatch):
    counts = np.random.default_rng(0).poisson(0.4, (50, 7)).astype(np.float32)
    monkeypatch.setattr("scvae_tools.tl._ppc._BLOCK", 9)
    totals = Totals(1, 7)
    totals.add_sparse(sparse.csr_matrix(counts))
    for name, value in moments(counts.astype(np.float64)).items():
        np.testing.assert_allclose(totals.statistics(50)[name][0], value, rtol=1e-12, atol=1e-15)


# -- histograms --------------------------------------------------------------------------------------------------------


def test_histograms_count_the_cells_of_each_bin(checked, model):
    draws = drawn_at_once(model, checked, n_samples=5, random_state=3)
    table = checked.uns["scvae_ppc"]["histograms"]
    assert table["gene"].unique().tolist() == GENES
    for gene, bins in table.groupby("gene"):
        at = checked.var_names.get_loc(gene)
        values = dense(checked.X[:, [at]]).ravel()
        inside = [(first, last) for first, last in zip(bins["first"], bins["last"], strict=True)]
        assert bins["cells"].tolist() == [((values >= a) & (values <= b)).sum() for a, b in inside]
        each = np.array([((draws[:, at] >= a) & (draws[:, at] <= b)).sum(0) for a, b in inside])  # (n_bins, s)
        np.testing.assert_allclose(bins["cells_model"], each.mean(1))
        np.testing.assert_allclose(bins["cells_model_sd"], each.std(1, ddof=1), atol=1e-12)


def test_every_cell_is_in_one_bin(checked):
    sums = checked.uns["scvae_ppc"]["histograms"].groupby("gene")[["cells", "cells_model"]].sum()
    np.testing.assert_allclose(sums, N_CELLS)


@pytest.mark.parametrize("likelihood", ["gaussian", "log_normal"])
def test_draws_of_a_density_are_in_the_bin_of_the_count_below_and_none_is_lost(likelihood, adata):
    model = make_model(adata.copy(), likelihood=likelihood)
    ppc(adata, model, genes=GENES, n_samples=5, random_state=3)
    draws = drawn_at_once(model, adata, n_samples=5, random_state=3)
    assert (draws < 0).any()
    counts = np.maximum(np.floor(draws), 0)
    for gene, bins in adata.uns["scvae_ppc"]["histograms"].groupby("gene"):
        of_gene = counts[:, adata.var_names.get_loc(gene)]
        inside = zip(bins["first"], bins["last"], strict=True)
        each = np.array([((of_gene >= a) & (of_gene <= b)).sum(0) for a, b in inside])
        assert (each.sum(0) == N_CELLS).all()
        np.testing.assert_allclose(bins["cells_model"], each.mean(1))
    assert len(svt.pl.ppc(adata)) == 2 + len(GENES)


def test_few_counts_have_a_bin_each_and_one_for_all_above():
    np.testing.assert_array_equal(first_counts(np.array([0, 3, 1])), [0, 1, 2, 3, 4])
    np.testing.assert_array_equal(first_counts(np.zeros(3)), [0, 1])


def test_a_few_large_counts_share_the_last_bin():
    values = np.r_[np.zeros(10_000), 1_000.0]
    np.testing.assert_array_equal(first_counts(values), np.arange(42))  # 0 to 40, and 41 or more


def test_many_counts_have_bins_of_equal_width_beside_the_zeros():
    first = first_counts(np.arange(1_000))
    assert first[:2].tolist() == [0, 1]
    assert set(np.diff(first[1:])) == {25}  # 995 counts in 40 bins
    assert first[-1] > 994
    assert len(first) <= 42


# -- data --------------------------------------------------------------------------------------------------------------


def test_cells_are_those_of_indices(adata, model):
    chosen = np.array([150, 3, 77])
    ppc(adata, model, indices=chosen, n_samples=4)
    mask = np.isin(np.arange(N_CELLS), chosen)
    ppc(adata, model, indices=mask, n_samples=4, key_added="by_mask")
    result = adata.uns["scvae_ppc"]
    assert result["params"]["n_cells"] == 3
    pd.testing.assert_frame_equal(result["genes"], adata.uns["by_mask"]["genes"])
    np.testing.assert_allclose(result["genes"]["mean"], dense(adata.X)[chosen].mean(0), rtol=1e-6)
    draws = drawn_at_once(model, adata, indices=np.sort(chosen), n_samples=4)
    assert_is_of_draws(result["genes"], draws)


def test_genes_that_a_mask_left_out_are_not_drawn(adata):
    options = {"mixture": False, "max_epochs": 1, "n_hidden": 8, "n_latent": 3, "progress": False}
    adata.layers["counts"] = adata.X.copy()
    adata.X = np.log1p(dense(adata.X))
    keys = {"layer": "counts", "mask_var": "kept", "return_model": True}
    model = svt.tl.scvae(adata, **options, **keys, write_lambda=False)
    adata = adata[:, ::-1].copy()  # in another order too
    ppc(adata, model, layer="counts", n_samples=3, genes="gene4")
    result = adata.uns["scvae_ppc"]
    assert result["genes"].index.tolist() == model.var_names.tolist()
    assert result["params"]["layer"] == "counts"
    expected = dense(adata[:, model.var_names].layers["counts"])
    np.testing.assert_allclose(result["genes"]["mean"], expected.mean(0), rtol=1e-6)
    assert_is_of_draws(result["genes"], drawn_at_once(model, model.adata, n_samples=3))
    assert result["histograms"]["cells"].iloc[0] == (dense(adata[:, "gene4"].layers["counts"]) == 0).sum()


def test_the_layer_of_the_set_up_needs_not_be_named(adata):
    adata.layers["counts"] = adata.X.copy()
    adata.X = np.log1p(dense(adata.X))
    model = make_model(adata.copy(), layer="counts")
    ppc(adata, model, n_samples=2)
    result = adata.uns["scvae_ppc"]
    assert result["params"]["layer"] == "counts"
    np.testing.assert_allclose(result["genes"]["mean"], dense(adata.layers["counts"]).mean(0), rtol=1e-6)


def test_batches_and_covariates_are_those_of_each_cell(adata):
    rng = np.random.default_rng(0)
    adata.obs["sex"] = pd.Categorical(rng.choice(["f", "m"], N_CELLS))
    adata.obs["age"] = rng.normal(size=N_CELLS)
    keys = {"batch_key": "batch", "categorical_covariate_keys": ["sex"], "continuous_covariate_keys": ["age"]}
    model = make_model(adata.copy(), **keys)
    ppc(adata, model, n_samples=3, indices=np.arange(40, 80))
    draws = drawn_at_once(model, adata, indices=np.arange(40, 80), n_samples=3)
    assert_is_of_draws(adata.uns["scvae_ppc"]["genes"], draws)


def test_a_model_that_was_loaded_without_data_stays_without(adata, model, checked, tmp_path):
    model.save(tmp_path / "model")
    loaded = SCVAE.load(tmp_path / "model")
    ppc(adata, loaded, genes=GENES, n_samples=5, random_state=3)
    assert loaded.adata is None
    pd.testing.assert_frame_equal(adata.uns["scvae_ppc"]["genes"], checked.uns["scvae_ppc"]["genes"], rtol=1e-4)


def test_a_model_keeps_nothing_of_the_data(adata, model):
    def kept():
        return model.adata, set(SCVAE._setup_adata_manager_store), set(SCVAE._per_instance_manager_store[model.id])

    before = kept()
    ppc(adata, model, n_samples=2)
    assert kept()[0] is before[0]
    assert kept()[1:] == before[1:]


def test_the_memory_does_not_grow_with_cells_and_draws(monkeypatch):
    n_cells, n_genes, n_samples = 600, 1_000, 20
    rng = np.random.default_rng(0)
    adata = anndata.AnnData(sparse.csr_matrix(rng.poisson(0.1, (n_cells, n_genes)).astype(np.float32)))
    model = make_model(adata.copy(), epochs=1)
    monkeypatch.setattr(memory, "CHUNK_BYTES", 2**22)
    sizes, add = [], Totals.add
    monkeypatch.setattr(Totals, "add", lambda self, first, draws: (sizes.append(draws.nbytes), add(self, first, draws)))
    ppc(adata, model, n_samples=2, indices=[0])  # imports
    tracemalloc.start()  # sees NumPy's memory, and not torch's
    try:
        ppc(adata, model, n_samples=n_samples)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert max(sizes) < 2**22
    assert sum(sizes) > 4 * n_cells * n_genes * n_samples  # 48 MB
    assert peak < 8 * 2**20


# -- result ------------------------------------------------------------------------------------------------------------


def test_results_survive_a_file(checked, tmp_path):
    checked.write_h5ad(tmp_path / "a.h5ad")
    read, written = (each.uns["scvae_ppc"] for each in (anndata.read_h5ad(tmp_path / "a.h5ad"), checked))
    assert set(read) == set(written) == {"genes", "histograms", "params"}
    for name in ("genes", "histograms"):
        pd.testing.assert_frame_equal(read[name], written[name])
    assert read["params"] == {"likelihood": "zinb", "n_samples": 5, "n_cells": N_CELLS, "random_state": 3}


def test_names_of_results_are_free_and_without_genes_there_is_no_histogram(adata, model):
    ppc(adata, model, n_samples=2, key="mine")
    ppc(adata, model, n_samples=2, key_added="check")
    assert set(adata.uns) & {"mine_ppc", "check", "scvae_ppc"} == {"mine_ppc", "check"}
    assert "histograms" not in adata.uns["check"]
    assert find_ppc(adata, "mine") is adata.uns["mine_ppc"]
    assert find_ppc(adata, "check") is adata.uns["check"]
    with pytest.raises(ValueError, match=r"'scvae_ppc'\]; adata.uns holds those under 'check', 'mine_ppc'. Run svt.tl"):
        find_ppc(adata, "scvae")


def test_a_seed_repeats_the_result_and_global_states_stay(adata, model):
    random.seed(9), np.random.seed(9), torch.manual_seed(9)  # noqa: NPY002
    states = random.getstate(), np.random.get_state()[1].tobytes(), torch.get_rng_state()  # noqa: NPY002
    for name, seed in (("a", 4), ("b", 4), ("c", 5)):
        ppc(adata, model, n_samples=2, key_added=name, random_state=seed)
    assert random.getstate() == states[0]
    assert np.random.get_state()[1].tobytes() == states[1]  # noqa: NPY002
    assert torch.equal(torch.get_rng_state(), states[2])
    pd.testing.assert_frame_equal(adata.uns["a"]["genes"], adata.uns["b"]["genes"])
    assert (adata.uns["a"]["genes"]["mean_model"] != adata.uns["c"]["genes"]["mean_model"]).any()


@pytest.mark.filterwarnings("error", "ignore::DeprecationWarning")
def test_a_view_becomes_a_copy_and_its_parent_stays(adata, model):
    view = adata[:50]
    ppc(view, model, n_samples=2)
    assert not view.is_view
    assert view.uns["scvae_ppc"]["params"]["n_cells"] == 50
    assert "scvae_ppc" not in adata.uns


# -- errors ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"n_samples": 1}, "`n_samples` must be a whole number of at least 2; found 1"),
        ({"genes": ["gene1", "CD3D"]}, r"`genes` must name genes of the model; 1 of 2 are not, the first 'CD3D'"),
        ({"genes": "CD3D"}, r"1 of 1 are not, the first 'CD3D'"),
        ({"indices": []}, "`indices` must choose at least one cell; found none"),
        ({"indices": [N_CELLS]}, f"`indices` must be positions among {N_CELLS} cells; found {N_CELLS}"),
        ({"random_state": -1}, "`random_state` must be a whole number of at least 0"),
        ({"layer": "raw"}, "`layer` must name a layer of adata; found 'raw'"),
    ],
)
def test_arguments_out_of_range_are_refused(adata, model, options, message):
    with pytest.raises(ValueError, match=message):
        ppc(adata, model, **options)
    assert "scvae_ppc" not in adata.uns


def test_data_that_do_not_fit_the_model_are_refused(adata, model):
    with pytest.raises(ValueError, match=r"18 of 20 are missing, the first 'gene2'. Pass the AnnData"):
        ppc(adata[:, ["gene0", "gene1"]].copy(), model)
    log = adata.copy()
    log.X = np.log1p(dense(adata.X))
    with pytest.raises(ValueError, match=r"adata.X must hold integer counts"):
        ppc(log, model)
    del adata.obs["batch"]
    with pytest.raises(ValueError, match=r"must have the column 'batch' in adata.obs, which was its `batch_key`"):
        ppc(adata, model)


@pytest.mark.filterwarnings("ignore:Variable names are not unique")
def test_a_gene_that_is_there_twice_is_refused(adata, model):
    twice = anndata.concat([adata, adata[:, ["gene0"]]], axis=1, merge="first")
    with pytest.raises(ValueError, match=r"each gene of the model once; found 'gene0' more than once"):
        ppc(twice, model)


def test_a_model_that_cannot_draw_is_refused(adata):
    with pytest.raises(TypeError, match=r"must be an SCVAE, or .*; found a int.*return_model=True"):
        ppc(adata, 3)
    with pytest.raises(TypeError, match="`adata` must be an AnnData; found a ndarray"):
        ppc(np.ones((3, 2)), None)
    own = adata.copy()
    SCVAE.setup_anndata(own)
    model = SCVAE(own, mixture=False, n_hidden=4, n_latent=2)
    with pytest.raises(ValueError, match=r"`model` must be trained.*found one that is not. Call train\(\)"):
        ppc(adata, model)
    model.train(1, progress=False)
    model.minify_adata()
    with pytest.raises(ValueError, match=r"found one of minified data. Call svt.tl.ppc before `minify_adata`"):
        ppc(adata, model)
    assert "scvae_ppc" not in adata.uns
