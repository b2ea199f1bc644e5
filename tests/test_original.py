"""Agreement with the original scVAE: its stored numbers, its formulas where they are written otherwise than ours.

Tolerance. `EXACT` in float64. Monte Carlo estimates lie within `N_ERRORS` standard errors; seeds are fixed.
"""

from __future__ import annotations

import json
import sys
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
import torch
from independent import N_ERRORS, array, assert_within_errors, estimate, normal, seeded
from scipy import special, stats
from sklearn.utils import shuffle

import scvae_tools as svt
from scvae_tools._module.covariates import Covariates, Sizes
from scvae_tools._module.mixture_vaes import GMVAE
from scvae_tools.likelihoods import get_likelihood

ROOT = Path(__file__).parents[1]
REFERENCES = ROOT / "tests" / "references"
EXACT = {"rtol": 1e-9, "atol": 1e-10}


@pytest.fixture(scope="module")
def original():
    sys.path.insert(0, str(ROOT / "benchmarks"))
    try:
        yield import_module("original")
    finally:
        sys.path.remove(str(ROOT / "benchmarks"))


@pytest.fixture(scope="module")
def reference():
    return json.loads((REFERENCES / "original_gmvae_pbmc.json").read_text(encoding="utf-8"))


# -- the stored numbers ------------------------------------------------------------------------------------------------


def printed_over_true(n_cells: int, minibatch_size: int) -> float:
    """What a bound of 1 nat for each cell is printed as: the minibatches' means, added up, over n / m."""
    ends = range(0, n_cells, minibatch_size)
    means = [np.ones(min(minibatch_size, n_cells - start)).mean() for start in ends]
    return sum(means) / (n_cells / minibatch_size)


def test_the_stored_bounds_are_the_printed_ones_without_the_remainder_of_the_minibatches(reference):
    for subset in ("training", "validation"):
        factor = printed_over_true(reference["n_cells"][subset], reference["minibatch_size"])
        for row in reference["curve"]:
            assert row[f"{subset}_elbo"] == pytest.approx(row[f"{subset}_elbo_printed"] / factor, abs=0.0051)
    factor = printed_over_true(reference["n_cells"]["test"], reference["minibatch_size"])
    test = reference["test"]
    assert test["elbo_corrected"] == pytest.approx(test["elbo_printed"] / factor, abs=0.051)


def test_the_stored_curve_has_every_tenth_epoch_and_rises(reference):
    assert [row["epoch"] for row in reference["curve"]] == list(range(10, 201, 10))
    rise = np.diff([row["validation_elbo"] for row in reference["curve"]])
    assert (rise > -0.15).all()  # two steps down, of 0.09 and 0.12 nats


def test_the_references_say_what_they_are_of(reference):
    text = " ".join((REFERENCES / "README.md").read_text(encoding="utf-8").split())
    assert reference["command"] in text
    n_cells, size = reference["n_cells"], reference["minibatch_size"]
    assert "{training:,} cells to train on, {validation:,} to validate, {test:,} to test".format(**n_cells) in text
    factors = {subset: f"{printed_over_true(n, size):.3f}" for subset, n in n_cells.items()}
    assert "{training} for training, {validation} for validation, {test} for the test cells".format(**factors) in text
    seconds = reference["speed"]["train_seconds_per_100_cells"] * n_cells["training"] / 100 * 200
    assert f"take {seconds:.0f} s" in text


# -- formulas ----------------------------------------------------------------------------------------------------------


def original_nb(x, p, log_r):
    """As the original evaluates it: r log σ(−l) + x log σ(l) + lnΓ(r + x) − lnΓ(1 + x) − lnΓ(r), l the logit of p."""
    r, logit = np.exp(log_r), np.log(p) - np.log1p(-p)
    kernel = r * special.log_expit(-logit) + x * special.log_expit(logit)
    return kernel + special.gammaln(r + x) - special.gammaln(1 + x) - special.gammaln(r)


def rates_of(p, log_r):
    """Our heads for the original's p and log r of each cell and gene: λ = r p / (1 − p)."""
    heads = {"log_rate": log_r + special.logit(p), "log_r": log_r}
    return {name: torch.as_tensor(value) for name, value in heads.items()}


@pytest.fixture
def negative_binomials():
    """Success probabilities and log r of 5 cells and 7 genes."""
    rng = np.random.default_rng(0)
    return rng.uniform(0.02, 0.98, (5, 7)), rng.normal(0, 1.5, (5, 7))


@pytest.mark.parametrize("x", [0.0, 1.0, 6.0, 150.0])
def test_a_negative_binomial_of_p_and_r_is_ours_of_its_mean(x, negative_binomials):
    p, log_r = negative_binomials
    heads, likelihood = rates_of(p, log_r), get_likelihood("nb")
    found = array(likelihood.log_prob(torch.full(p.shape, x, dtype=torch.float64), heads))
    np.testing.assert_allclose(found, original_nb(x, p, log_r), rtol=1e-8, atol=1e-9)
    np.testing.assert_allclose(found, stats.nbinom(np.exp(log_r), 1 - p).logpmf(x), rtol=1e-8, atol=1e-9)
    mean = np.exp(log_r) * p / (1 - p)
    np.testing.assert_allclose(array(likelihood.mean(heads)), mean, **EXACT)
    np.testing.assert_allclose(array(likelihood.variance(heads)), mean / (1 - p), **EXACT)


@pytest.mark.parametrize("excess", [0.03, 0.7])
def test_zeros_inflated_in_probability_are_ours_inflated_in_logits(excess, negative_binomials):
    p, log_r = negative_binomials
    heads = rates_of(p, log_r) | {"gate": torch.full(p.shape, special.logit(excess), dtype=torch.float64)}
    for x in (0.0, 3.0):
        pmf = (1 - excess) * np.exp(original_nb(x, p, log_r)) + excess * (x == 0)
        found = get_likelihood("zinb").log_prob(torch.full(p.shape, x, dtype=torch.float64), heads)
        np.testing.assert_allclose(array(found), np.log(pmf), rtol=1e-8, atol=1e-9)


def test_four_logits_of_the_original_are_three_of_ours(negative_binomials):
    """log π_c + 1[x ≥ K] log f(x − K), K + 1 logits; ours has K, the last one 0. Mean Σ k π_k + π_K (E_f + K)."""
    p, log_r = negative_binomials
    k_max = 3
    logits = np.random.default_rng(1).normal(size=(k_max + 1, *p.shape))
    share = np.exp(logits) / np.exp(logits).sum(0)
    heads = rates_of(p, log_r) | {f"category_{c}": torch.as_tensor(logits[c] - logits[-1]) for c in range(k_max)}
    likelihood = get_likelihood("nb", k_max=k_max)
    for x in (0, 1, 2, 3, 4, 20):
        expected = np.log(share[min(x, k_max)])
        if x >= k_max:
            expected = expected + original_nb(x - k_max, p, log_r)
        found = likelihood.log_prob(torch.full(p.shape, float(x), dtype=torch.float64), heads)
        np.testing.assert_allclose(array(found), expected, rtol=1e-8, atol=1e-9)
    mean = share[1] + 2 * share[2] + share[3] * (np.exp(log_r) * p / (1 - p) + k_max)
    np.testing.assert_allclose(array(likelihood.mean(heads)), mean, **EXACT)


# -- the bound of the mixture ------------------------------------------------------------------------------------------

N_CELLS, N_GENES, N_COMPONENTS, N_LATENT = 4, 5, 3, 2


@pytest.fixture
def module() -> GMVAE:
    """GMVAE with the distributions of the original, every parameter away from its start."""
    with seeded(0):
        options = {"likelihood": "nb", "dispersion": "gene-cell", "use_size_factor": False, "encoder_input": "counts"}
        mixture = {"n_components": N_COMPONENTS, "covariance": "diag", "weights": "uniform"}
        gmvae = GMVAE(Sizes(N_GENES), n_latent=N_LATENT, n_hidden=[6, 5], n_layers=2, **options, **mixture).double()
    one = torch.ones((), dtype=torch.float64)
    means = normal(N_COMPONENTS, N_LATENT, seed=1)
    gmvae.set_mixture(one.expand(N_COMPONENTS) / N_COMPONENTS, means, torch.eye(N_LATENT).double(), 0.3 * one.expand(2))
    with torch.no_grad():
        for seed, parameter in enumerate(p for p in gmvae.parameters() if p.requires_grad and p.numel()):
            parameter.add_(0.3 * normal(*parameter.shape, seed=80 + seed))
    return gmvae.eval()


@pytest.fixture
def cells():
    x = np.random.default_rng(2).poisson(2.0, (N_CELLS, N_GENES)).astype(float)
    covariates = Covariates(torch.zeros(N_CELLS, 1, dtype=torch.long))
    return torch.tensor(x), torch.tensor(x.sum(1, keepdims=True)), covariates


def original_draws(module: GMVAE, cells: tuple, n_draws: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Bound and KL of z of each draw and cell, and the KL of y of each cell, as the original has them.

    Bound Σ_y q(y|x) [log p(x|z) − (log q(z|x,y) − log p(z|y))] − (log K − H[q(y|x)]), z drawn also in the KL of z;
    densities are SciPy's.
    """
    x, size, covariates = cells
    posterior = module.posterior(module.encode(x, size, covariates))
    q_y, mean, sd = (array(value) for value in (posterior.q_y, posterior.mean, (0.5 * posterior.log_var).exp()))
    prior_mean, prior_variance = (array(value) for value in module.mixture.marginals())
    rng = np.random.default_rng(3)
    log_likelihood, kl_z = np.zeros((2, n_draws, N_CELLS))
    for y in range(N_COMPONENTS):
        z = mean[y] + sd[y] * rng.normal(size=(n_draws, N_CELLS, N_LATENT))
        heads = module.decoder(torch.tensor(z), torch.zeros_like(size), covariates)
        rate, log_r = np.exp(array(heads["log_rate"])), array(heads["log_r"])
        own = original_nb(x.numpy(), rate / (np.exp(log_r) + rate), log_r).sum(-1)
        log_q = stats.norm.logpdf(z, mean[y], sd[y]).sum(-1)
        log_p = stats.norm.logpdf(z, prior_mean[y], np.sqrt(prior_variance[y])).sum(-1)
        log_likelihood += q_y[:, y] * own
        kl_z += q_y[:, y] * (log_q - log_p)
    kl_y = np.log(N_COMPONENTS) - stats.entropy(q_y, axis=1)
    return log_likelihood - kl_z - kl_y, kl_z, kl_y


def standard_error(draws: np.ndarray) -> np.ndarray:
    return draws.std(0) / np.sqrt(len(draws))


@torch.no_grad()
def test_the_bound_of_the_mixture_is_that_of_the_original(module, cells):
    draws, kl_z, kl_y = original_draws(module, cells, 20_000)
    found, error = estimate(lambda: module.bound(*cells, n_samples=200).elbo)
    assert (np.abs(found - draws.mean(0)) < N_ERRORS * np.hypot(error, standard_error(draws))).all()
    bound = module.bound(*cells)
    np.testing.assert_allclose(array(bound.kl_y), kl_y, **EXACT)
    assert_within_errors(kl_z.mean(0), standard_error(kl_z), array(bound.kl_z))  # closed form here, drawn there
    q_y = array(module.posterior(module.encode(*cells)).q_y)
    assert (np.sort(q_y)[:, -2] > 0.01).any()  # the sum has several terms


def test_constrained_rates_of_a_model_add_up_to_the_counts_of_the_cell():
    """Poisson(λ N): λ a softmax over the genes, N the sum of the cell's counts."""
    adata = svt.datasets.simulate(60, 20, 2)
    svt.SCVAE.setup_anndata(adata)
    model = svt.SCVAE(adata, likelihood="constrained_poisson", mixture=False, n_hidden=4, n_latent=2)
    model.train(1, batch_size=60, progress=False)
    rates = np.asarray(model.get_lambda())
    np.testing.assert_allclose(rates.sum(1), np.asarray(adata.X.sum(1)).ravel(), rtol=1e-5)


# -- the benchmark -----------------------------------------------------------------------------------------------------


def test_the_split_is_that_of_the_original(original, reference):
    split = original.original_split(4_271)
    assert [len(part) for part in split] == list(reference["n_cells"].values())
    np.testing.assert_array_equal(np.concatenate(split), shuffle(np.arange(4_271), random_state=42))


def test_a_cluster_gets_the_label_of_most_of_its_cells(original):
    label, cluster = np.array(list("aabbbc")), np.array(list("112222"))
    assert "".join(original.majority_labels(label, cluster)) == "aabbbb"
    assert "".join(original.majority_labels(label, np.array(list("111112")))) == "bbbbbc"


def test_the_settings_of_the_original_are_those_of_its_command(original, reference):
    words = reference["command"].split()
    of_model, of_training = original.SETTINGS["original"]
    assert list(of_model["n_hidden"]) == [int(words[words.index("-H") + i]) for i in (1, 2)]
    assert of_training["n_warm_up_epochs"] == int(words[words.index("-w") + 1])
    assert int(words[words.index("-e") + 1]) == original.EPOCHS
    assert int(words[words.index("-K") + 1]) == original.N_COMPONENTS
    assert of_training["batch_size"] == reference["minibatch_size"]


def test_a_curve_is_as_high_only_where_no_epoch_is_lower(original, reference):
    epochs = [row["epoch"] for row in reference["curve"]]
    theirs = np.array([row["validation_elbo"] for row in reference["curve"]])
    history = original.pd.DataFrame({"epoch": epochs, "stage": "vae", "elbo_validation": theirs + 1})
    history.loc[3, "elbo_validation"] -= 2
    table = original.curves(reference, {("original", 0): original.Run(history, {})}, 200)
    assert table["its settings: as high"].tolist() == ["yes"] * 3 + ["no"] + ["yes"] * 16
    assert len(original.curves(reference, {}, 50)) == 5


def test_the_benchmark_prints_its_tables(original, tmp_path, capsys):
    adata = svt.datasets.simulate(200, 30, 8)
    adata.obs["cell_type"] = adata.obs["component"].astype(str)
    adata.write_h5ad(tmp_path / "cells.h5ad")
    original.main([str(tmp_path / "cells.h5ad"), "--quick", "--seeds", "0"])
    printed = capsys.readouterr().out
    assert "[162, 18, 20] to train, validate and test" in printed
    assert "its numbers are of other data" in printed
    rows = [line.split(" | ") for line in printed.splitlines() if line.startswith("| ")]
    assert [row[0] for row in rows] == [
        *("| epoch", "| ---", "| 10"),
        *("| run", "| ---", "| original scVAE", "| its settings", "| our defaults"),
    ]
    assert rows[5][1:3] == ["-621.4", "0.443"]
