"""What counts say of groups: scores against SciPy, and simulated groups that a decoder knows nothing of."""

from __future__ import annotations

import random

import numpy as np
import pandas as pd
import pytest
import torch
from anndata import AnnData
from independent import N_ERRORS
from likelihood_cases import CASES, PIECEWISE
from scipy import sparse

import scvae_tools as svt
from scvae_tools._module import memory
from scvae_tools.likelihoods import LIKELIHOODS, get_likelihood
from scvae_tools.model._count_evidence import count_evidence, quasi_score
from scvae_tools.model._fold_changes import fold_changes

N_CELLS, N_GENES, N_CHANGED = 300, 60, 10
VALUES = {"log_rate": np.log([0.02, 0.5, 4.0, 30.0]), "log_r": 0.7, "gate": -1.0, "log_sigma": 0.3, "log_tail": 1.2}
STEP = 1e-5
DIFFERENCE = np.array([[1.0, -1.0]])


def of_case(name):
    law = get_likelihood(*PIECEWISE[name]) if name in PIECEWISE else get_likelihood(name)
    return law, {head: np.broadcast_to(VALUES.get(head, 0.4), 4).astype(float) for head in law.head_names}


def as_tensors(params):
    return {name: torch.tensor(value) for name, value in params.items()}


@pytest.mark.parametrize("name", sorted(CASES))
def test_the_information_is_the_squared_slope_of_the_mean_over_the_variance(name):
    law, params = of_case(name)
    mean, variance = CASES[name].moments(params)
    up, down = (CASES[name].moments(params | {"log_rate": params["log_rate"] + h})[0] for h in (STEP, -STEP))
    slope = (up - down) / (2 * STEP) if name not in PIECEWISE else mean  # there λ is not e^θ, and the mean is shifted
    x = np.array([0.0, 1.0, 1.0, 1.0]) if name == "bernoulli" else np.array([0.0, 1.0, 3.0, 50.0])
    found = quasi_score(law, torch.tensor(x), as_tensors(params))
    np.testing.assert_allclose(found.information, slope**2 / variance, rtol=1e-6, atol=1e-9)
    np.testing.assert_allclose(found.score, (x - mean) * slope / variance, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("name", ["poisson", "nb", "bernoulli"])
def test_where_mean_and_variance_say_all_the_score_is_the_derivative_of_log_p(name):
    law, params = of_case(name)
    x = np.array([0.0, 1.0, 1.0, 1.0]) if name == "bernoulli" else np.array([0.0, 1.0, 3.0, 50.0])
    up, down = (CASES[name].log_pmf(x, params | {"log_rate": params["log_rate"] + h}) for h in (STEP, -STEP))
    found = quasi_score(law, torch.tensor(x), as_tensors(params))
    np.testing.assert_allclose(found.score, (up - down) / (2 * STEP), rtol=1e-5, atol=1e-9)


def test_a_variance_that_is_infinite_counts_as_that_of_an_exponential_distribution():
    params = {"log_rate": torch.tensor([0.3]), "log_tail": torch.tensor([-1.0])}  # tail index below 2
    found = quasi_score(LIKELIHOODS["lomax"], torch.tensor([2.0]), params)
    np.testing.assert_allclose(found.information, 1.0)
    np.testing.assert_allclose(found.score, 2 * np.exp(-0.3) - 1, rtol=1e-6)


def simulated(*, r=None, fold=2.0, batch_fold=1.0, seed=0):
    """Cells of groups 0 and 1, the first genes changed by a fold, and of batches, which hold the groups unequally."""
    rng = np.random.default_rng(seed)
    group = np.arange(N_CELLS) % 2
    batch = (rng.random(N_CELLS) < np.where(group == 1, 0.8, 0.2)).astype(int)
    rate = np.tile(np.exp(rng.normal(0.5, 0.8, N_GENES)), (N_CELLS, 1))
    change = np.zeros(N_GENES)
    change[:N_CHANGED] = np.log(fold) * np.resize([1, -1], N_CHANGED)
    rate *= np.exp(group[:, None] * change)
    rate[:, -N_CHANGED:] *= np.where(batch == 1, batch_fold, 1.0)[:, None]
    noise = 1.0 if r is None else rng.gamma(r, 1 / r, rate.shape)
    counts = rng.poisson(rate * noise).astype(np.float32)
    counts[:, 20] += 1  # so that no cell is empty
    adata = AnnData(sparse.csr_matrix(counts))
    adata.obs["size"] = counts.sum(1).mean()  # the same for all
    adata.obs["batch"] = pd.Categorical(batch.astype(str))
    return adata, group, change


def untrained(adata, *, batch_key=None, **options):
    """Model whose decoder knows the mean of each gene and nothing of the cells."""
    svt.SCVAE.setup_anndata(adata, size_factor_key="size", batch_key=batch_key)
    model = svt.SCVAE(adata, mixture=False, n_latent=2, n_hidden=8, **options)
    model.is_trained_ = True
    return model


def changes(model, adata, group, *, adjusts=True, **options):
    evidence = count_evidence(model, adata, group, 2, adjusts=adjusts, **options)
    return evidence, fold_changes(evidence, -DIFFERENCE)


@pytest.mark.parametrize("name", [*LIKELIHOODS, "k_max"])
def test_a_decoder_that_knows_nothing_is_corrected_by_the_counts(name):
    is_linear = name not in ("bernoulli", "log_normal")
    adata, group, change = simulated()
    model = untrained(adata, **({"k_max": 2} if name == "k_max" else {"likelihood": name}))
    _, found = changes(model, adata, group)
    z = (found.mean[0] - change) / found.standard_error[0]
    # Where the mean is no multiple of λ, the correction of a large error is not exact, but it is that of both groups.
    z = z if is_linear else z[N_CHANGED:]
    assert np.abs(z).max() < N_ERRORS
    assert np.abs(z).mean() < 1.1  # 0.8 of a standard normal
    is_called = found.p_values()[0] < 0.001
    assert is_called[:N_CHANGED].mean() > (0.5 if name != "bernoulli" else 0.1)  # many are in every cell
    assert is_called[N_CHANGED:].mean() < 0.1
    assert (np.sign(found.mean[0]) == np.sign(change))[is_called & (change != 0)].all()


@pytest.mark.parametrize(("likelihood", "r"), [("poisson", None), ("poisson", 0.5), ("nb", 0.5)])
def test_the_errors_are_as_large_as_they_are_said_to_be(likelihood, r):
    """A Poisson likelihood is wrong about counts of a negative binomial, whose dispersion makes up for it."""
    z = []
    for seed in range(6):
        adata, group, _ = simulated(r=r, fold=1.0, seed=seed)
        _, found = changes(untrained(adata, likelihood=likelihood), adata, group)
        z.append(found.mean[0] / found.standard_error[0])
    n = np.size(z)
    assert abs(np.std(z) - 1) < N_ERRORS * np.sqrt(1 / (2 * n)) + (0.15 if likelihood == "nb" else 0.05)


def test_groups_are_compared_within_batches_if_asked_for():
    adata, group, change = simulated(batch_fold=3.0)
    model = untrained(adata, batch_key="batch", likelihood="poisson")
    _, within = changes(model, adata, group)
    assert np.abs((within.mean[0] - change) / within.standard_error[0]).max() < N_ERRORS
    _, without = changes(model, adata, group, adjusts=False)
    # 80 and 20 % of the cells are of the batch where these genes have three times the counts.
    expected = np.log((0.8 * 3 + 0.2) / (0.2 * 3 + 0.8))
    np.testing.assert_allclose(without.mean[0, -N_CHANGED:].mean(), expected, atol=0.1)
    assert (within.standard_error > without.standard_error).mean() > 0.9


def test_cells_of_no_group_do_not_matter():
    adata, group, _ = simulated()
    model = untrained(adata)
    some = np.where(np.arange(N_CELLS) < 200, group, -1)
    found, _ = changes(model, adata, some)
    other = AnnData(sparse.vstack([adata.X[:200], adata.X[:100] * 7]).tocsr(), obs=adata.obs.copy())
    again, _ = changes(model, other, some)
    for name in vars(found):
        np.testing.assert_array_equal(getattr(found, name), getattr(again, name))


def test_sums_do_not_depend_on_the_parts_and_global_random_states_stay(monkeypatch):
    adata, group, _ = simulated(batch_fold=3.0)
    model = untrained(adata, batch_key="batch")
    whole, _ = changes(model, adata, group)
    random.seed(9), np.random.seed(9), torch.manual_seed(9)  # noqa: NPY002
    states = random.getstate(), np.random.get_state()[1].tobytes(), torch.get_rng_state()  # noqa: NPY002
    monkeypatch.setattr(memory, "CHUNK_BYTES", 20_000)
    parts, _ = changes(model, adata, group)
    assert random.getstate() == states[0]
    assert np.random.get_state()[1].tobytes() == states[1]  # noqa: NPY002
    assert torch.equal(torch.get_rng_state(), states[2])
    for name in vars(whole):
        np.testing.assert_allclose(getattr(parts, name), getattr(whole, name), rtol=1e-4, atol=1e-6)
