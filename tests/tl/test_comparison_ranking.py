"""Ranking of compared models: errors of paired differences over cells and seeds, ties, and the simplest of the tied."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from scvae_tools._module.covariates import Sizes
from scvae_tools._module.networks import Decoder
from scvae_tools._results.comparison import RANKING
from scvae_tools.likelihoods import get_likelihood
from scvae_tools.tl._comparison_grid import combine, defaults_of_models
from scvae_tools.tl._comparison_ranking import Scored, mean_and_error, rank_settings, ranking_columns, verdict

N_CELLS = 50


def scored(effects, *, n_seeds=1, noise=0.0, seed=0, of="likelihood", **fixed):
    """Models whose bounds are those of the cells, which vary much, plus an effect by argument and some noise."""
    rng = np.random.default_rng(seed)
    values = {of: list(effects), "random_state": list(range(n_seeds))}
    of_cells = rng.normal(-600, 60, N_CELLS)
    models = []
    for row, combination in enumerate(combine(values, defaults_of_models() | {"mixture": False} | fixed)):
        bounds = of_cells + effects[combination[of]] + noise * rng.normal(size=N_CELLS)
        models.append(Scored(row, combination, float(bounds.mean()), bounds))
    return models


def ranked(effects, **options):
    """Settings by the value of the argument that they differ by."""
    of = options.get("of", "likelihood")
    return {setting.combination[of]: setting for setting in rank_settings(scored(effects, **options))}


# -- errors ------------------------------------------------------------------------------------------------------------


def test_the_error_of_one_seed_is_that_of_a_paired_test():
    rng = np.random.default_rng(0)
    one, other = rng.normal(-600, 60, N_CELLS), rng.normal(-601, 60, N_CELLS)
    mean, error = mean_and_error((one - other)[None])
    assert mean / error == pytest.approx(stats.ttest_rel(one, other).statistic)


@pytest.mark.parametrize("spread_of_seeds", [0.0, 0.3])
def test_the_error_over_seeds_is_the_spread_of_the_mean_in_repeated_comparisons(spread_of_seeds):
    rng, n_seeds, n_cells, n_repeats = np.random.default_rng(1), 4, 30, 4000
    cells = rng.normal(0, 1.0, (n_repeats, 1, n_cells))
    seeds = rng.normal(0, spread_of_seeds, (n_repeats, n_seeds, 1))
    rest = rng.normal(0, 0.5, (n_repeats, n_seeds, n_cells))
    found = np.array([mean_and_error(differences) for differences in 0.2 + cells + seeds + rest])
    assert found[:, 0].mean() == pytest.approx(0.2, abs=0.02)
    expected = 1 / n_cells + spread_of_seeds**2 / n_seeds + 0.25 / (n_cells * n_seeds)
    assert found[:, 0].var() == pytest.approx(expected, rel=0.1)
    assert np.square(found[:, 1]).mean() == pytest.approx(expected, rel=0.06)


def test_seeds_that_disagree_are_in_the_error_though_all_cells_agree():
    differences = np.repeat([[0.1], [0.5], [0.9]], N_CELLS, axis=1)
    mean, error = mean_and_error(differences)
    assert (mean, error) == pytest.approx((0.5, stats.sem([0.1, 0.5, 0.9])))


def test_a_single_cell_has_no_error():
    assert np.isnan(mean_and_error(np.array([[0.3]]))[1])


# -- places ------------------------------------------------------------------------------------------------------------


def test_cells_that_vary_by_much_do_not_hide_a_small_difference_of_all():
    found = ranked({"poisson": -0.5, "nb": 0.0, "zinb": -0.2})
    assert {name: setting.rank for name, setting in found.items()} == {"nb": 1, "zinb": 2, "poisson": 3}
    assert found["poisson"].difference == pytest.approx(-0.5)
    assert found["poisson"].difference_se == pytest.approx(0, abs=1e-12)
    assert not any(setting.is_tied for setting in found.values())
    assert [name for name, setting in found.items() if setting.is_recommended] == ["nb"]


def test_of_models_that_the_cells_do_not_tell_apart_the_simplest_is_recommended():
    models = scored({"zinb": 0.0, "nb": -0.01, "poisson": -3.0}, noise=0.5)
    found = {setting.combination["likelihood"]: setting for setting in rank_settings(models)}
    other, best = (
        np.asarray(next(m.by_cell for m in models if m.combination["likelihood"] == name)) for name in ("nb", "zinb")
    )
    if other.mean() > best.mean():
        other, best = best, other
    assert abs((other - best).mean()) < 2 * stats.sem(other - best)  # what the draws are chosen for
    assert [name for name, setting in found.items() if setting.is_tied] == ["zinb", "nb"]
    assert [name for name, setting in found.items() if setting.is_recommended] == ["nb"]
    assert not found["poisson"].is_tied


def test_seeds_are_paired_and_their_mean_is_compared():
    models = scored({"nb": 0.0, "zip": -1.0}, n_seeds=3, noise=0.2)
    found = {setting.combination["likelihood"]: setting for setting in rank_settings(models)}
    bounds = {name: [m.by_cell for m in models if m.combination["likelihood"] == name] for name in ("nb", "zip")}
    difference = np.array(bounds["zip"]) - np.array(bounds["nb"])
    assert found["zip"].difference == pytest.approx(difference.mean())
    assert found["zip"].difference_se == pytest.approx(mean_and_error(difference)[1])
    assert len(found["zip"].models) == 3


def test_settings_of_equal_likelihoods_that_are_tied_are_chosen_by_the_bound():
    found = ranked({2: 0.0, 5: 0.03, 10: 0.02}, of="n_latent", noise=1.0, seed=3)
    best = max(found.values(), key=lambda setting: setting.mean)
    assert sum(setting.is_tied for setting in found.values()) > 1
    assert best.is_recommended


def test_bounds_of_different_kinds_are_ranked_apart():
    found = ranked({"nb": -2.0, "poisson": -3.0, "gaussian": 50.0, "bernoulli": 400.0})
    assert [setting.rank for setting in found.values()] == [1, 2, 1, 1]
    assert found["poisson"].difference == pytest.approx(-1.0)
    assert [name for name, setting in found.items() if setting.is_recommended] == ["nb", "gaussian", "bernoulli"]


def test_equal_models_are_tied_and_share_a_place():
    found = ranked({"diag": 0.0, "full": 0.0}, of="covariance")
    assert [(setting.rank, setting.is_tied) for setting in found.values()] == [(1, True), (1, True)]
    assert sum(setting.is_recommended for setting in found.values()) == 1


def test_means_alone_give_a_difference_but_no_tie():
    models = [Scored(m.row, m.combination, m.mean, None) for m in scored({"nb": 0.0, "zinb": -0.5})]
    nb, zinb = rank_settings(models)
    assert (zinb.difference, zinb.rank) == (pytest.approx(-0.5), 2)
    assert np.isnan(zinb.difference_se)
    assert nb.is_tied is zinb.is_tied is None
    assert nb.is_recommended


def test_a_seed_that_failed_for_one_is_left_out_of_the_difference():
    models = scored({"nb": 0.0, "zip": -1.0}, n_seeds=2)
    models[3] = Scored(3, models[3].combination, models[3].mean - 40, models[3].by_cell - 40)
    found = rank_settings([models[0], models[2], models[3]])
    assert found[1].difference == pytest.approx(-1.0)
    apart = rank_settings([models[0], models[3]])
    assert apart[1].difference == pytest.approx(-41.0)
    assert np.isnan(apart[1].difference_se)


def test_rows_of_failed_models_are_missing_in_the_columns():
    models = scored({"nb": 0.0, "zinb": -0.5}, n_seeds=2)
    columns = pd.DataFrame(ranking_columns(rank_settings(models[:2] + models[3:]), 4))
    assert tuple(columns) == RANKING
    assert columns.isna().all(axis=1).tolist() == [False, False, True, False]
    assert columns["rank"].tolist() == [1, 1, pd.NA, 2]


def test_the_verdict_names_the_best_the_tied_and_the_one_to_take():
    values = {"likelihood": ["zinb", "nb", "poisson"], "random_state": [0]}
    clear = rank_settings(scored({"zinb": 0.0, "nb": -1.0, "poisson": -3.0}))
    alone = "Seeds are not in the errors: give `random_state` several values in the grid."
    assert verdict(clear, values, "elbo_test") == f"The best by elbo_test: likelihood='zinb'. {alone}"
    several = rank_settings(scored({"zinb": 0.0, "nb": -1.0}, n_seeds=2))
    assert verdict(several, values, "elbo_test") == "The best by elbo_test: likelihood='zinb'."
    models = scored({"zinb": 0.0, "nb": -0.01, "poisson": -3.0}, noise=0.5)
    said = verdict(rank_settings(models), values, "elbo_test")
    assert "Tied with it, within 2 standard errors: likelihood=" in said
    assert f"Recommended, as the simplest likelihood among these: likelihood='nb'. {alone}" in said
    assert "poisson" not in said


# -- the simplest ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dispersion", ["gene", "gene-batch", "gene-cell"])
def test_the_simpler_likelihood_has_the_decoder_with_fewer_parameters(dispersion):
    kinds = [("poisson", 0), ("nb", 0), ("zip", 0), ("zinb", 0), ("poisson", 2), ("zinb", 2), ("gaussian", 0)]
    sizes = Sizes(30, n_batch=2)
    options = {"dispersion": dispersion, "n_hidden": 8, "n_layers": 1, "dropout_rate": 0.0, "normalization": "layer"}
    n_parameters, complexity = [], []
    for name, k_max in kinds:
        likelihood = get_likelihood(name, k_max)
        decoder = Decoder(2, sizes, likelihood, **options)
        n_parameters.append(sum(parameter.numel() for parameter in decoder.parameters()))
        complexity.append(likelihood.complexity(dispersion))
    assert stats.rankdata(n_parameters).tolist() == stats.rankdata([100 * a + b for a, b in complexity]).tolist()
    assert len(set(n_parameters)) > 3
