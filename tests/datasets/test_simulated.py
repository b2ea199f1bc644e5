"""The data sets against what they claim: shipped values, moments of the stated truth, nothing else touched."""

from __future__ import annotations

import itertools
import random
import re

import anndata as ad
import numpy as np
import pytest
import torch
from scipy import sparse

from scvae_tools import datasets
from scvae_tools.datasets import _simulated
from scvae_tools.likelihoods import LIKELIHOODS

MAKERS = {
    "simulate": lambda random_state: datasets.simulate(60, 40, 3, n_batches=2, random_state=random_state),
    "poisson_toy": lambda random_state: datasets.poisson_toy(60, random_state=random_state),
    "poisson_mixture_toy": lambda random_state: datasets.poisson_mixture_toy(60, random_state=random_state),
}


def counts_of(adata):
    return adata.X.toarray().astype(np.float64)


def same_content(one, other):
    return (
        (one.X != other.X).nnz == 0
        and one.obs.equals(other.obs)
        and one.var.equals(other.var)
        and all(np.array_equal(one.varm[key], other.varm[key]) for key in {*one.varm, *other.varm})
    )


# Recovered counts


# Simulated cells

of_counts = pytest.mark.parametrize(
    "likelihood", [name for name, likelihood in LIKELIHOODS.items() if not likelihood.is_density]
)


@pytest.mark.parametrize("likelihood", ["gaussian", "log_normal", "lomax"])
def test_no_counts_are_simulated_from_a_density(likelihood):
    with pytest.raises(ValueError, match=f"that counts can be drawn from; found '{likelihood}', a density.*'nb'"):
        datasets.simulate(50, 30, 3, likelihood=likelihood)


@of_counts
def test_every_likelihood_gives_named_sparse_counts(likelihood):
    adata = datasets.simulate(50, 30, 3, likelihood=likelihood)
    assert isinstance(adata.X, sparse.csr_matrix)
    assert adata.X.dtype == np.float32
    assert np.array_equal(adata.X.data, np.rint(adata.X.data))
    assert (adata.X.data > 0).all()
    assert (adata.obs_names[49], adata.var_names[29]) == ("cell49", "gene29")
    assert set(adata.var) == set(LIKELIHOODS[likelihood].head_names) - {"log_rate"}
    assert list(adata.obs) == ["component", "batch", "size_factor"]


@of_counts
def test_mean_and_variance_of_every_likelihood_are_those_of_its_formulas(likelihood):
    adata = datasets.simulate(
        6000, 20, 1, likelihood=likelihood, size_factor_sd=0, median_counts=100, gene_sd=0.7, zero_inflation=0.3
    )
    counts = counts_of(adata)
    params = {name: torch.as_tensor(adata.var[name].to_numpy()) for name in adata.var}
    params["log_rate"] = torch.as_tensor(adata.varm["component_log_mean"][:, 0]) + np.log(100)
    mean, variance = (getattr(LIKELIHOODS[likelihood], moment)(params).numpy() for moment in ["mean", "variance"])
    deviations = (counts.mean(axis=0) - mean) / np.sqrt(variance / 6000)
    assert np.abs(deviations).max() < 4
    # Of 0 and 1 the fourth moment is at most the variance, which may be small.
    error = 5 * np.sqrt(variance / 6000) if likelihood == "bernoulli" else 0
    # 5 s.e. at a kurtosis of 18 (r = 0.5)
    assert (np.abs(counts.var(axis=0) - variance) <= 0.25 * variance + error).all()


def test_poisson_means_of_every_component_are_size_factors_times_shares():
    adata = datasets.simulate(4000, 30, 4, likelihood="poisson", median_counts=300)
    for component in range(4):
        cells = adata[adata.obs["component"] == str(component)]
        expected = cells.obs["size_factor"].sum() * np.exp(cells.varm["component_log_mean"][:, component])
        deviations = (counts_of(cells).sum(axis=0) - expected) / np.sqrt(expected)  # a sum of Poissons is Poisson
        assert np.abs(deviations).max() < 4


def test_nb_variance_is_rate_plus_squared_rate_over_r():
    adata = datasets.simulate(
        8000, 20, 1, size_factor_sd=0, median_counts=200, gene_sd=0.5, dispersion=3.0, dispersion_sd=0.3
    )
    rate = 200 * np.exp(adata.varm["component_log_mean"][:, 0])
    variance = rate + rate**2 / np.exp(adata.var["log_r"])
    np.testing.assert_allclose(counts_of(adata).var(axis=0), variance, rtol=0.15)  # 5 s.e. at a kurtosis of 8


def test_zinb_adds_its_share_of_the_nb_positive_counts_to_the_zeros():
    nb, zinb = (
        datasets.simulate(2000, 50, likelihood=likelihood, zero_inflation=0.25) for likelihood in ["nb", "zinb"]
    )
    assert zinb.X.nnz / nb.X.nnz == pytest.approx(0.75, abs=0.02)


def test_zinb_without_inflation_has_the_zeros_of_nb():
    nb, zinb = (datasets.simulate(2000, 50, likelihood=likelihood, zero_inflation=0.0) for likelihood in ["nb", "zinb"])
    assert zinb.X.nnz / nb.X.nnz == pytest.approx(1.0, abs=0.02)


def test_component_numbers_are_within_one_cell_of_the_proportions():
    proportions = np.array([0.61, 0.3, 0.07, 0.02])
    adata = datasets.simulate(333, 10, 4, proportions=proportions)
    sizes = adata.obs["component"].value_counts(sort=False).to_numpy()
    assert np.abs(sizes - 333 * proportions).max() < 1
    np.testing.assert_array_equal(adata.uns["simulate"]["proportions"], proportions)


def test_truth_is_normalised_and_batches_and_size_factors_are_as_asked():
    adata = datasets.simulate(3000, 40, 12, n_batches=3, batch_effect=0.4, median_counts=500, size_factor_sd=0.5)
    np.testing.assert_allclose(np.exp(adata.varm["component_log_mean"]).sum(axis=0), 1)
    assert list(adata.obs["component"].cat.categories) == [str(component) for component in range(12)]
    assert (adata.obs["batch"].value_counts() == 1000).all()
    assert (adata.varm["batch_log_effect"][:, 0] == 0).all()
    assert adata.varm["batch_log_effect"][:, 1:].std() == pytest.approx(0.4, rel=0.4)  # 80 values: s.e. 8 %
    log_size = np.log(adata.obs["size_factor"])
    assert log_size.std() == pytest.approx(0.5, abs=0.04)  # s.e. 0.0065
    assert np.median(log_size) == pytest.approx(np.log(500), abs=0.06)  # s.e. 0.0114


def test_batches_multiply_the_shares_of_every_component_by_their_effects(monkeypatch):
    monkeypatch.setattr(_simulated, "CHUNK_ENTRIES", 140)  # 7 cells of 20 genes: chunks must follow their own cells
    adata = datasets.simulate(
        3000, 20, 3, likelihood="poisson", n_batches=2, batch_effect=0.5, median_counts=200, gene_sd=0.7
    )
    for component, batch in itertools.product(range(3), range(2)):
        cells = adata[(adata.obs["component"] == str(component)) & (adata.obs["batch"] == str(batch))]
        share = np.exp(adata.varm["component_log_mean"][:, component] + adata.varm["batch_log_effect"][:, batch])
        expected = cells.obs["size_factor"].sum() * share / share.sum()
        assert np.abs((counts_of(cells).sum(axis=0) - expected) / np.sqrt(expected)).max() < 4


def test_log_inverse_dispersions_have_the_stated_median_and_spread():
    log_r = datasets.simulate(5, 5000, 1, dispersion=3.0, dispersion_sd=0.3).var["log_r"]
    assert np.exp(np.median(log_r)) == pytest.approx(3.0, rel=0.02)  # s.e. 0.5 %
    assert log_r.std() == pytest.approx(0.3, rel=0.04)  # s.e. 1 %


def test_without_separation_all_components_are_the_same():
    log_mean = datasets.simulate(20, 30, 3, separation=0).varm["component_log_mean"]
    np.testing.assert_allclose(log_mean, log_mean[:, :1] @ np.ones((1, 3)))


def test_separation_is_the_spread_of_the_log_fold_changes():
    log_mean = datasets.simulate(2, 20_000, 2, separation=0.8, share_changed=0.3).varm["component_log_mean"]
    difference = log_mean[:, 0] - log_mean[:, 1]
    # Two independent changes, each of variance 0.8² in a share of 0.3 of the genes.
    assert difference.std() == pytest.approx(0.8 * np.sqrt(2 * 0.3), rel=0.05)


def test_many_genes_can_be_as_sparse_as_droplet_data():
    adata = datasets.simulate(300, 27_998, 9, gene_sd=2.3, median_counts=4400)
    totals = np.asarray(adata.X.sum(axis=1)).ravel()
    assert np.median(totals) == pytest.approx(4400, rel=0.1)
    assert 1 - adata.X.nnz / (300 * 27_998) == pytest.approx(0.93, abs=0.01)


def test_rates_of_every_cell_sum_to_its_size_factor():
    adata = datasets.simulate(500, 10, 2, likelihood="poisson", median_counts=1000, size_factor_sd=1.0, n_batches=2)
    totals, size_factor = counts_of(adata).sum(axis=1), adata.obs["size_factor"]
    assert np.abs((totals - size_factor) / np.sqrt(size_factor)).max() < 5


@of_counts
def test_simulated_cells_survive_h5ad(likelihood, tmp_path):
    adata = datasets.simulate(30, 20, 3, likelihood=likelihood, n_batches=2)
    adata.write_h5ad(tmp_path / "cells.h5ad")
    back = ad.read_h5ad(tmp_path / "cells.h5ad")
    assert same_content(adata, back)
    assert back.uns["simulate"].keys() == adata.uns["simulate"].keys()
    assert back.uns["simulate"]["likelihood"] == likelihood


def test_stored_arguments_make_the_same_cells_again():
    adata = datasets.simulate(40, 20, 3, likelihood="zinb", separation=0.5, n_batches=2, random_state=3)
    assert same_content(adata, datasets.simulate(**adata.uns["simulate"]))


def test_parts_with_one_seed_of_the_genes_are_of_the_same_populations():
    one, other = (
        datasets.simulate(60 + seed, 40, 3, n_batches=2, gene_random_state=5, random_state=seed) for seed in (5, 6)
    )
    assert one.var.equals(other.var)
    assert all(np.array_equal(one.varm[key], other.varm[key]) for key in one.varm)
    assert (one.X[:60] != other.X[:60]).nnz > 0
    assert same_content(one, datasets.simulate(**one.uns["simulate"]))


def test_seed_of_the_genes_changes_them():
    one, other = (datasets.simulate(60, 40, 3, gene_random_state=seed).varm["component_log_mean"] for seed in (0, 1))
    assert np.abs(one - other).max() > 1


@pytest.mark.parametrize("make", [datasets.pbmc68k_reduced, datasets.poisson_toy, datasets.poisson_mixture_toy])
def test_other_data_survive_h5ad(make, tmp_path):
    adata = make()
    adata.write_h5ad(tmp_path / "cells.h5ad")
    assert same_content(adata, ad.read_h5ad(tmp_path / "cells.h5ad"))


@pytest.mark.parametrize("maker", MAKERS)
def test_same_seed_gives_the_same_cells_and_another_gives_others(maker):
    make = MAKERS[maker]
    assert same_content(make(1), make(1))
    assert not same_content(make(1), make(2))


@pytest.mark.parametrize("maker", MAKERS)
def test_global_random_states_are_neither_read_nor_changed(maker):
    before = random.getstate(), np.random.get_state(), torch.get_rng_state()  # noqa: NPY002
    first = MAKERS[maker](0)
    after = random.getstate(), np.random.get_state(), torch.get_rng_state()  # noqa: NPY002
    assert before[0] == after[0]
    assert all(np.array_equal(old, new) for old, new in zip(before[1], after[1], strict=True))
    assert torch.equal(before[2], after[2])
    with torch.random.fork_rng():
        torch.manual_seed(123)
        assert same_content(first, MAKERS[maker](0))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        pytest.param({"likelihood": "nbb"}, "`likelihood` must be one of .*'nb'.* found 'nbb'", id="likelihood"),
        pytest.param({"n_cells": 0}, "`n_cells` must be a whole number of at least 1; found 0", id="no_cells"),
        pytest.param({"n_genes": 2.5}, "`n_genes` must be a whole number of at least 1; found 2.5", id="half_a_gene"),
        pytest.param({"n_components": -1}, "`n_components` must be a whole number", id="negative_components"),
        pytest.param({"n_batches": 0}, "`n_batches` must be a whole number", id="no_batches"),
        pytest.param({"n_cells": 5, "n_batches": 6}, "Every batch needs a cell; .*`n_batches=6`", id="empty_batch"),
        pytest.param({"random_state": None}, "`random_state` must be a whole number of at least 0", id="no_seed"),
        pytest.param({"median_counts": 0}, "`median_counts` must be a finite number above 0; found 0", id="no_counts"),
        pytest.param({"dispersion": -2.0}, "`dispersion` must be a finite number above 0", id="negative_dispersion"),
        pytest.param({"dispersion": np.inf}, "`dispersion` must be a finite number above 0", id="infinite_dispersion"),
        pytest.param({"separation": np.nan}, "`separation` must be a finite number of at least 0; found nan", id="nan"),
        pytest.param({"gene_sd": -1}, "`gene_sd` must be a finite number of at least 0", id="negative_gene_sd"),
        pytest.param({"size_factor_sd": -1}, "`size_factor_sd` must be", id="negative_size_factor_sd"),
        pytest.param({"batch_effect": -1}, "`batch_effect` must be", id="negative_batch_effect"),
        pytest.param({"dispersion_sd": -1}, "`dispersion_sd` must be", id="negative_dispersion_sd"),
        pytest.param({"zero_inflation": 1.0}, "`zero_inflation` must be .* below 1; found 1.0", id="all_zeros"),
        pytest.param({"share_changed": 1.1}, "`share_changed` must be .* at most 1; found 1.1", id="share"),
        pytest.param({"proportions": [0.5, 0.5]}, r"`n_components=5` entries; found .* \(2,\)", id="two_shares"),
        pytest.param({"proportions": [0.3] * 5}, "sum to 1; .* sum 1.5. Divide", id="sum"),
        pytest.param({"proportions": [0, 0.25, 0.25, 0.25, 0.25]}, "must be positive and sum to 1", id="zero_share"),
        pytest.param({"n_cells": 4}, "Every component needs a cell; found component .*`n_cells=4`", id="few_cells"),
    ],
)
def test_simulation_refuses_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=re.compile(message)):
        datasets.simulate(**arguments)


# Poisson toys


def test_poisson_toy_has_the_stated_means():
    adata = datasets.poisson_toy()
    assert adata.shape == (2000, 10)
    np.testing.assert_array_equal(adata.var["lambda"], np.arange(1, 11))
    standard_error = np.sqrt(adata.var["lambda"].to_numpy() / 2000)
    assert (np.abs(counts_of(adata).mean(axis=0) - adata.var["lambda"]) < 4 * standard_error).all()
    assert (list(adata.obs), list(adata.varm)) == ([], [])


def test_poisson_mixture_toy_has_the_stated_means_in_every_component():
    adata = datasets.poisson_mixture_toy()
    assert adata.shape == (10_000, 10)
    for component, rates in enumerate(adata.varm["lambda"].T):
        counts = counts_of(adata[adata.obs["component"] == str(component)])
        assert len(counts) == 2000
        assert (np.abs(counts.mean(axis=0) - rates) < 4 * np.sqrt(rates / 2000)).all()


def test_poisson_mixture_components_differ_but_not_in_their_totals():
    rates = datasets.poisson_mixture_toy(50).varm["lambda"]
    assert rates.shape == (10, 5)
    np.testing.assert_array_equal(rates.sum(axis=0), 55)
    distance = np.abs(rates[:, :, None] - rates[:, None]).sum(axis=0)
    assert distance[~np.eye(5, dtype=bool)].min() >= 32


@pytest.mark.parametrize(
    ("make", "n_cells", "message"),
    [
        (datasets.poisson_toy, 0, "`n_cells` must be a whole number of at least 1; found 0"),
        (datasets.poisson_mixture_toy, -3, "`n_cells` must be a whole number of at least 1; found -3"),
        (datasets.poisson_mixture_toy, 4, "Every component needs a cell"),
    ],
)
def test_toys_refuse_too_few_cells(make, n_cells, message):
    with pytest.raises(ValueError, match=message):
        make(n_cells)
