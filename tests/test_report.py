"""The experiments of docs/report.md say what the page says, in their smallest size."""

from __future__ import annotations

import math
import sys
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import stats

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def report():
    sys.path.insert(0, str(ROOT / "benchmarks"))
    try:
        yield import_module("report")
    finally:
        sys.path.remove(str(ROOT / "benchmarks"))


@pytest.fixture(scope="module")
def rows_of_mixtures(report):
    """Rows of the GMVAE without labels and of the VAE, by the cells and the model."""
    is_test = np.random.default_rng(1).permutation(1_000) < 200
    training = {"max_epochs": 30, "lr": 3e-3}
    return {
        (name, y_term): report.measure_mixture(adata, is_test, y_term, training)
        for name, adata in report.toy_sets(1_000).items()
        for y_term in (None, "kl")
    }


def test_labels_of_one_population_are_not_found_and_components_bring_nothing(rows_of_mixtures):
    plain, mixture = (rows_of_mixtures["one population, k-means", y_term] for y_term in (None, "kl"))
    assert abs(mixture["ARI"]) < 0.1
    assert mixture["ELBO"] < plain["ELBO"] + 0.05


def test_components_that_are_there_are_found_and_raise_the_bound(rows_of_mixtures):
    plain, mixture = (rows_of_mixtures["five components", y_term] for y_term in (None, "kl"))
    assert mixture["ARI"] > 0.9
    assert mixture["accuracy"] > 0.95
    assert mixture["in use"] == pytest.approx(5, abs=0.2)
    assert mixture["ELBO"] > plain["ELBO"] + 0.3


def test_accuracy_is_after_the_best_matching(report):
    label, component = np.array(list("aaabbbcc")), np.array(list("cccaaabb"))
    assert report.matched_accuracy(label, component) == 1.0
    assert report.matched_accuracy(label, np.array(list("ccaaaabb"))) == 7 / 8


def test_the_best_log_likelihood_of_the_toy_is_the_entropy_of_its_distribution(report):
    adata = report.svt.datasets.poisson_toy(2_000)
    true, fitted, _ = report.best_of_toy(adata)
    entropy = sum(stats.poisson(rate).entropy() for rate in range(1, 11))
    assert true["log-likelihood"] == pytest.approx(-entropy, abs=0.2)  # 2,000 cells: a standard error of 0.05
    assert fitted["log-likelihood"] >= true["log-likelihood"]
    assert true["error of λ, % (of each cell)"] == 0


def test_no_training_of_the_toy_without_totals_beats_the_true_rates(report):
    adata = report.svt.datasets.poisson_toy(1_000)
    true = next(iter(report.best_of_toy(adata)))
    slow = report.measure_toy(adata, "lr 0.001", 0, 150)
    fast = report.measure_toy(adata, "the report's: lr 0.1, weight decay 0.05", 0, 150)
    assert fast["ELBO"] < slow["ELBO"] < true["ELBO"] + 0.1
    assert fast["error of λ, % (mean over cells)"] > slow["error of λ, % (mean over cells)"]


def test_the_bound_is_finite_where_products_of_probabilities_are_0(report):
    adata = report.svt.datasets.simulate(250, 1_000, 5, gene_sd=3.0, median_counts=20_000.0)
    for likelihood in ("poisson", "zip"):
        row = report.measure_deep(adata, likelihood, "our defaults", 4)
        assert row["epochs with e^−B = 0, %"] == 100
        assert row["epochs with finite log-likelihood, %"] == 100
        assert np.isfinite(row["held-out ELBO"])


@pytest.mark.parametrize(("x", "rate"), [(0, 400.0), (1, 400.0)])
def test_the_sum_of_logarithms_is_that_of_scipy_with_and_without_excess_zeros(report, x, rate):
    row = report.formulas_at(x, math.log(rate))
    exact = stats.poisson.logpmf(x, rate)
    excess = 0.93
    inflated = np.log(excess * (x == 0) + (1 - excess) * np.exp(exact)) if x == 0 else np.log(1 - excess) + exact
    assert row["ours"] == pytest.approx(exact, rel=1e-6)
    assert row["exact"] == pytest.approx(exact, rel=1e-12)
    assert row["ours, ZIP"] == pytest.approx(inflated, rel=1e-5)
    assert row["Poisson, product"] == -np.inf


def test_zero_inflation_leaves_the_product_0_where_there_are_counts(report):
    assert report.formulas_at(1, math.log(400.0))["ZIP, product"] == -np.inf
    assert np.isfinite(report.formulas_at(0, math.log(400.0))["ZIP, product"])


def test_every_experiment_is_described_and_takes_quick(report):
    names = {"toy", "stability", "mixture-toy", "backward"}
    assert names < set(report.EXPERIMENTS)
    assert all(name in report.__doc__ for name in names)


def test_one_backward_pass_has_the_gradient_of_one_for_each_component(report):
    adata = report.svt.datasets.poisson_mixture_toy(300)
    vae = report.trained(adata, report.TOY | {"n_components": 5, "n_hidden": 16}, {"max_epochs": 2})
    cells = vae.module.data(next(iter(vae._make_data_loader(adata, batch_size=50))))
    gradients = []
    for step in report.BACKWARDS.values():
        vae.module.zero_grad()
        torch.manual_seed(0)
        step(vae.module, cells)
        gradients.append([each.grad.clone() for each in vae.module.parameters() if each.grad is not None])
    torch.manual_seed(0)
    expected = vae.module.bound(*cells).loss()
    torch.manual_seed(0)
    assert sum(report.terms_of_components(vae.module, cells)).item() == pytest.approx(expected.item(), rel=1e-4)
    for one, each in zip(*gradients, strict=True):
        torch.testing.assert_close(one, each, rtol=1e-3, atol=1e-5)


def test_tables_are_markdown(report):
    table = report.pd.DataFrame({"a": ["x"], "b": [0.5], "c": [np.nan], "d": [-12_345.67], "e": [100.0]})
    assert report.as_markdown(table).splitlines() == [
        "| a | b | c | d | e |",
        "| --- | --- | --- | --- | --- |",
        "| x | 0.5 |  | -12,345.7 | 100.0 |",
    ]
