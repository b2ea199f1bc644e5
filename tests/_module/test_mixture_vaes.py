"""The mixture prior, GMVAE and VaDE against SciPy, scikit-learn, quadrature and loops over the components.

Tolerance. Modules run in float64 here unless a test says otherwise, so formulas agree to `EXACT`. Monte Carlo
estimates must lie within `N_ERRORS` standard errors, taken from `REPEATS` independent calls; seeds are fixed.
"""

from __future__ import annotations

from itertools import product
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch
from independent import N_ERRORS, array, assert_within_errors, estimate, log_likelihood_at, normal, seeded
from mixtures import (
    KINDS,
    N_CELLS,
    N_GENES,
    covariance_of,
    make_cells,
    make_mixture_vae,
    make_untrained,
    randomise,
    set_apart,
)
from scipy import special, stats
from sklearn.mixture import GaussianMixture as FittedMixture
from torch.distributions import MultivariateNormal, kl_divergence

from scvae_tools._module.bounds import Posterior
from scvae_tools._module.covariates import Covariates, Sizes
from scvae_tools._module.gaussian_mixture import COVARIANCES, WEIGHTS, GaussianMixture
from scvae_tools._module.mixture_vaes import GMVAE, N_PREDICTION_DRAWS, MixtureVAE
from scvae_tools._module.vae import VAE
from scvae_tools.likelihoods import LIKELIHOODS

if TYPE_CHECKING:
    from collections.abc import Callable

EXACT = {"rtol": 1e-9, "atol": 1e-10}  #: at most a few thousand operations in float64
COVARIATE_SIZES = Sizes(N_GENES, n_batch=3, n_categories=(2,), n_continuous=1)


# -- factories ---------------------------------------------------------------------------------------------------------


def make_prior(covariance: str, k: int = 3, d: int = 2, weights: str = "learned") -> GaussianMixture:
    prior = GaussianMixture(k, d, covariance=covariance, weights=weights).double()
    randomise(prior)
    return prior


def make_covariances(k: int = 3, d: int = 2) -> torch.Tensor:
    root = normal(k, d, d, seed=4)
    return root @ root.mT + 0.3 * torch.eye(d, dtype=torch.float64)


# -- independent numbers -----------------------------------------------------------------------------------------------


def described(prior: GaussianMixture) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """π, μ and Σ from the parameters: softmax of the logits, and Σ⁻¹ = U Uᵀ entry by entry."""
    k, d = prior.means.shape
    logits, log_diagonal = array(prior.logits), array(prior.log_diagonal)
    covariances = np.empty((k, d, d))
    for y in range(k):
        row = 0 if prior.covariance == "tied" else y
        factor = np.zeros((d, d))
        for i, j in np.ndindex(d, d):
            if i == j:
                factor[i, j] = np.exp(log_diagonal[row, i])
            elif i > j and prior.covariance != "diag":
                factor[i, j] = prior.off_diagonal[row, i, j].item()
        covariances[y] = np.linalg.inv(factor @ factor.T)
    return np.exp(logits) / np.exp(logits).sum(), array(prior.means).copy(), covariances


def log_prior_each(prior: GaussianMixture, z: np.ndarray) -> np.ndarray:
    """Log p(z|y) of z (..., d) by SciPy, (k, ...)."""
    _, means, covariances = described(prior)
    return np.stack(
        [
            stats.multivariate_normal(mean, covariance).logpdf(z).reshape(z.shape[:-1])
            for mean, covariance in zip(means, covariances, strict=True)
        ]
    )


def nodes(d: int) -> tuple[np.ndarray, np.ndarray]:
    """Points (t, d) and weights (t,) of the trapezoidal rule for expectations under N(0, I)."""
    line = np.linspace(-8, 8, {1: 2001, 2: 121}[d])
    points = np.array(list(product(line, repeat=d)))
    weights = np.exp(-0.5 * (points**2).sum(1)) / (2 * np.pi) ** (d / 2) * (line[1] - line[0]) ** d
    return points, weights


def terms_by_quadrature(module: MixtureVAE, cells: tuple) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """E_q log p(x|z), KL z and KL y, each (n,), with nothing but the parameters of q(y|x) and q(z|x,y) taken over."""
    posterior = module.posterior(module.encode(*cells))
    points, t = nodes(module.n_latent)
    mean, sd = array(posterior.mean), np.exp(0.5 * array(posterior.log_var))
    z = mean + sd * points[:, None, None]  # (t, k or 1, n, d)
    log_likelihood = np.tensordot(t, log_likelihood_at(module, z, cells), 1)  # (k or 1, n)
    log_q = stats.norm.logpdf(z, mean, sd).sum(-1)
    log_p = log_prior_each(module.mixture, z)  # (k, t, k or 1, n)
    weights, *_ = described(module.mixture)
    if isinstance(module, GMVAE):
        q_y = array(posterior.q_y).T
        kl_z = np.stack([t @ (log_q[:, y] - log_p[y, :, y]) for y in range(len(weights))])
        kl_y = sum(q * np.log(q / weight) for q, weight in zip(q_y, weights, strict=True))
        return (q_y * log_likelihood).sum(0), (q_y * kl_z).sum(0), kl_y
    log_p, log_q, log_weights = log_p[:, :, 0], log_q[:, 0], np.log(weights)[:, None, None]  # (k, t, n), (t, n)
    log_gamma = log_p + log_weights - special.logsumexp(log_p + log_weights, axis=0)
    gamma = np.exp(log_gamma)
    kl_z = t @ (log_q - (gamma * log_p).sum(0))
    kl_y = t @ (gamma * (log_gamma - log_weights)).sum(0)
    total = t @ (log_q - special.logsumexp(log_p + log_weights, axis=0))
    np.testing.assert_allclose(kl_z + kl_y, total, rtol=1e-9)  # the split is one of KL(q(z|x) ‖ p(z))
    return log_likelihood[0], kl_z, kl_y


def log_marginal_by_quadrature(module: MixtureVAE, cells: tuple) -> np.ndarray:
    """Log Σ_y π_y ∫ p(z|y) p(x|z) dz, (n,)."""
    points, t = nodes(module.n_latent)
    each = []
    for weight, mean, covariance in zip(*described(module.mixture), strict=True):
        z = mean + points @ np.linalg.cholesky(covariance).T
        log_p_x = log_likelihood_at(module, np.repeat(z[:, None], len(cells[0]), axis=1), cells)
        each.append(special.logsumexp(log_p_x, axis=0, b=weight * t[:, None]))
    return special.logsumexp(each, axis=0)


def share_noise(monkeypatch: pytest.MonkeyPatch, noise: torch.Tensor) -> None:
    """Draws with this noise (s, k or 1, n, d), the same in every call."""

    def sample_each(posterior: Posterior, n_samples: int) -> torch.Tensor:
        return posterior.mean + (0.5 * posterior.log_var).exp() * noise[:n_samples]

    monkeypatch.setattr(Posterior, "sample_each", sample_each)


# -- the prior ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("d", [1, 3])
@pytest.mark.parametrize("covariance", COVARIANCES)
def test_kl_to_each_component_is_that_of_torch(covariance: str, d: int) -> None:
    prior = make_prior(covariance, d=d)
    mean, log_var = normal(3, 4, d, seed=1), normal(3, 4, d, seed=2)
    _, means, covariances = map(torch.tensor, described(prior))
    expected = [
        kl_divergence(
            MultivariateNormal(mean[y], torch.diag_embed(log_var[y].exp())),
            MultivariateNormal(means[y], covariances[y]),
        )
        for y in range(3)
    ]
    np.testing.assert_allclose(array(prior.kl(mean, log_var)), torch.stack(expected), **EXACT)


@pytest.mark.parametrize("covariance", COVARIANCES)
def test_kl_of_one_posterior_is_taken_to_every_component(covariance: str) -> None:
    prior, mean, log_var = make_prior(covariance), normal(1, 4, 2, seed=1), normal(1, 4, 2, seed=2)
    repeated = prior.kl(mean.expand(3, -1, -1), log_var.expand(3, -1, -1))
    np.testing.assert_allclose(array(prior.kl(mean, log_var)), array(repeated), **EXACT)


@pytest.mark.parametrize("d", [1, 3])
@pytest.mark.parametrize("covariance", COVARIANCES)
def test_prior_density_is_that_of_scipy(covariance: str, d: int) -> None:
    prior, z = make_prior(covariance, d=d), normal(5, 4, d, seed=1)
    each = log_prior_each(prior, z.numpy())
    np.testing.assert_allclose(array(prior.log_prob_each(z)), each.swapaxes(0, 1), **EXACT)
    weights = described(prior)[0][:, None, None]
    np.testing.assert_allclose(array(prior.log_prob(z)), special.logsumexp(each, axis=0, b=weights), **EXACT)


@pytest.mark.parametrize("covariance", COVARIANCES)
def test_covariances_are_the_inverse_of_the_precisions(covariance: str) -> None:
    prior = make_prior(covariance)
    np.testing.assert_allclose(array(prior.covariances()), described(prior)[2], **EXACT)


@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("covariance", COVARIANCES)
def test_set_keeps_what_the_covariance_can_hold(covariance: str, weights: str) -> None:
    prior = make_prior(covariance, weights=weights)
    means, covariances, probabilities = normal(3, 2, seed=8), make_covariances(), np.array([0.5, 0.3, 0.2])
    prior.set(torch.tensor(probabilities), means, covariances)
    full = covariances.numpy()
    expected = {
        "full": full,
        "diag": full * np.eye(2),
        "tied": np.repeat(sum(p * c for p, c in zip(probabilities, full, strict=True))[None], 3, axis=0),
    }[covariance]
    np.testing.assert_allclose(array(prior.covariances()), expected, **EXACT)
    np.testing.assert_allclose(array(prior.means), means, **EXACT)
    held = np.full(3, 1 / 3) if weights == "uniform" else probabilities
    np.testing.assert_allclose(array(prior.log_weights().exp()), held, **EXACT)


def test_weights_that_are_given_stay() -> None:
    prior = make_prior("full", weights=[0.6, 0.3, 0.1])
    prior.set(torch.full((3,), 1 / 3), normal(3, 2), make_covariances())
    np.testing.assert_allclose(array(prior.log_weights().exp()), [0.6, 0.3, 0.1], rtol=1e-6)
    assert not prior.logits.requires_grad


@pytest.mark.parametrize("covariance", COVARIANCES)
def test_draws_from_the_prior_have_its_moments(covariance: str) -> None:
    """In float32, in which models run. The variance of a covariance Σ_ij is (Σ_ii Σ_jj + Σ_ij²) / n."""
    n, prior = 20_000, make_prior(covariance)
    _, means, covariances = described(prior)
    prior.float()
    y = torch.arange(3).repeat_interleave(n)
    with seeded(0), torch.no_grad():
        z = prior.sample(y).double().numpy().reshape(3, n, 2)
    for draws, mean, covariance_matrix in zip(z, means, covariances, strict=True):
        variances = np.diag(covariance_matrix)
        assert_within_errors(draws.mean(0), np.sqrt(variances / n), mean)
        error = np.sqrt((np.outer(variances, variances) + covariance_matrix**2) / n)
        assert_within_errors(np.cov(draws.T), error, covariance_matrix)


@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("covariance", COVARIANCES)
def test_prior_gradients_are_finite_differences_and_reach_every_parameter(covariance: str, weights: str) -> None:
    """Tolerance: those of `torch.autograd.gradcheck` in float64, central differences of step 1e-6."""
    prior, z = make_prior(covariance, weights=weights), normal(2, 4, 2, seed=1)
    names = [name for name, parameter in prior.named_parameters() if parameter.requires_grad]
    assert ("logits" in names) == (weights == "learned")

    def value(*parameters: torch.Tensor) -> torch.Tensor:
        held = dict(zip(names, parameters, strict=True))
        terms = torch.func.functional_call(prior, held, (z,))
        return terms.sum()

    prior.forward = lambda z: torch.cat([prior.log_prob(z).flatten(), prior.kl(z[:1], 0.5 * z[1:]).flatten()])
    parameters = [prior.get_parameter(name) for name in names]
    assert torch.autograd.gradcheck(value, parameters)
    gradients = torch.autograd.grad(value(*parameters), parameters)
    lower = torch.ones(2, 2).tril(-1).bool()
    for name, gradient in zip(names, gradients, strict=True):
        assert (gradient[:, lower] if name == "off_diagonal" else gradient).ne(0).all(), name


@pytest.mark.parametrize("covariance", COVARIANCES)
def test_permuted_components_are_those_of_the_order(covariance: str) -> None:
    prior, order = make_prior(covariance), [2, 0, 1]
    before = described(prior)
    prior.permute(torch.tensor(order))
    for found, expected in zip(described(prior), before, strict=True):
        np.testing.assert_allclose(found, expected[order], **EXACT)


# -- bounds by quadrature ----------------------------------------------------------------------------------------------

GEOMETRIES = {
    "one dimension": {"n_latent": 1, "k": 3},
    "two dimensions, diag": {"n_latent": 2, "k": 2, "covariance": "diag"},
    "two dimensions, tied": {"n_latent": 2, "k": 2, "covariance": "tied"},
    "two dimensions, full": {"n_latent": 2, "k": 2, "covariance": "full"},
    "one dimension, uniform": {"n_latent": 1, "k": 3, "weights": "uniform"},
}
CASES = [(name, "one dimension") for name in LIKELIHOODS] + [("nb", geometry) for geometry in list(GEOMETRIES)[1:]]


@pytest.mark.parametrize(("likelihood", "geometry"), CASES)
@pytest.mark.parametrize("kind", KINDS)
def test_bound_equals_quadrature(kind: str, likelihood: str, geometry: str) -> None:
    """Equality: that the bound is below log p(x) would hold with a KL missing as well.

    Tolerance: `EXACT` for what is in closed form, the rest within Monte Carlo errors, which must be small.
    """
    module, cells = make_mixture_vae(kind, likelihood=likelihood, **GEOMETRIES[geometry]), make_cells()
    posterior = module.posterior(module.encode(*cells))
    expected = dict(zip(("log_likelihood", "kl_z", "kl_y"), terms_by_quadrature(module, cells), strict=True))
    expected["elbo"] = expected["log_likelihood"] - expected["kl_z"] - expected["kl_y"]
    if kind == "gmvae":
        assert (np.ptp(array(posterior.mean), axis=0).max(1) > 0.02).all()  # q(z|x,y) depends on y
        assert array(posterior.q_y).min() > 1e-4
        bound = module.bound(*cells)
        np.testing.assert_allclose(array(bound.kl_z), expected["kl_z"], **EXACT)
        np.testing.assert_allclose(array(bound.kl_y), expected["kl_y"], **EXACT)
    for name, value in expected.items():
        found, error = estimate(lambda name=name: getattr(module.bound(*cells, n_samples=1000), name))
        assert_within_errors(found, error, value)
        assert (N_ERRORS * error < 0.1).all()


def evaluated(module: MixtureVAE, cells: tuple, n_samples: int) -> torch.Tensor:
    return module.importance_weighted_bound(*cells, n_samples=n_samples, chunk=1000)


def trained(module: MixtureVAE, cells: tuple, n_samples: int) -> torch.Tensor:
    return module.bound(*cells, n_samples=n_samples, importance_kl_weight=1.0).importance_weighted


def make_wide(kind: str, **options: object) -> MixtureVAE:
    """A mixture whose q(z|x) has the tails of the posterior within reach."""
    module = make_mixture_vae(kind, **options)
    with torch.no_grad():
        module.z_variance.weight.mul_(0.1)
        module.z_variance.bias.fill_(1.7)  # q(z|x) wide enough for light tails of p(z)/q(z|x)
        if kind == "gmvae":  # and no component out of its reach
            module.y_logits.weight.mul_(0.1)
            module.y_logits.bias.mul_(0.1)
            module.y_variance.weight.mul_(0.1)
    return module


@pytest.mark.parametrize("importance_weighted", [evaluated, trained])
@pytest.mark.parametrize(("likelihood", "geometry"), CASES)
@pytest.mark.parametrize("kind", KINDS)
def test_importance_weighted_bound_tends_to_the_marginal_likelihood(
    kind: str, likelihood: str, geometry: str, importance_weighted: Callable
) -> None:
    """Tolerance: the bias, half the variance of one call, is below a fifth of the standard error."""
    module, cells = make_wide(kind, likelihood=likelihood, **GEOMETRIES[geometry]), make_cells()
    expected = log_marginal_by_quadrature(module, cells)
    found, error = estimate(lambda: importance_weighted(module, cells, 4000))
    assert_within_errors(found, error, expected)
    assert (N_ERRORS * error < 0.1).all()
    log_likelihood, kl_z, kl_y = terms_by_quadrature(module, cells)
    assert (log_likelihood - kl_z - kl_y < expected).all()


@pytest.mark.parametrize("kind", KINDS)
def test_the_trained_importance_weighted_bound_rises_with_the_draws_and_stays_below_the_marginal_likelihood(
    kind: str,
) -> None:
    module, cells = make_wide(kind, **GEOMETRIES["one dimension"]), make_cells()

    def mean_of_calls(n: int) -> torch.Tensor:
        return torch.stack([trained(module, cells, n).mean() for _ in range(100)]).mean()

    means, errors = zip(*(estimate(lambda n=n: mean_of_calls(n)) for n in (1, 4, 16)), strict=True)
    assert means[0] + N_ERRORS * errors[0] < means[1] - N_ERRORS * errors[1]
    assert means[1] < means[2] < log_marginal_by_quadrature(module, cells).mean()


@pytest.mark.parametrize("kind", KINDS)
def test_the_gradient_of_the_importance_weighted_bound_is_that_of_its_finite_differences(kind: str) -> None:
    module, cells = make_wide(kind, **GEOMETRIES["two dimensions, full"]), make_cells()

    def loss() -> torch.Tensor:
        with seeded(3):
            return module.bound(*cells, n_samples=5, is_averaged=True, importance_kl_weight=0.7).loss()

    loss().backward()
    step, names = 1e-6, dict(module.named_parameters())
    for name in (
        "mixture.logits",
        "mixture.means",
        "z_mean.weight",
        "decoder.heads.log_rate.bias",
        "encoder.gene_weight",
    ):
        parameter = names[name].view(-1)
        analytic = names[name].grad.view(-1)[0]
        with torch.no_grad():
            ends = []
            for shift in (step, -2 * step):
                parameter[0] += shift
                ends.append(loss())
            parameter[0] += step
        np.testing.assert_allclose(analytic, (ends[0] - ends[1]) / (2 * step), rtol=1e-5, atol=1e-8)


# -- the sum over y ----------------------------------------------------------------------------------------------------


def bound_by_loop(module: GMVAE, cells: tuple, noise: torch.Tensor) -> torch.Tensor:
    """The bound of each cell, one component at a time, with torch's KL and the dense log-likelihood."""
    x, size, covariates = cells
    features = module.encode(x, size, covariates)
    q_y = torch.softmax(module.y_logits(features), dim=1)
    p_y = torch.softmax(module.mixture.logits, dim=0)
    covariances = module.mixture.covariances()
    bound = 0.0
    for y in range(module.n_components):
        hidden = torch.relu(module.y_features(features) + module.y_embedding[y])
        mean = module.z_mean(features) + module.y_mean(hidden)
        variance = (module.z_variance(features) + module.y_variance(hidden)).exp()
        params = module.decoder(mean + variance.sqrt() * noise[:, y], size.log(), covariates)
        log_likelihood = module.likelihood.log_prob(x, params).sum(-1).mean(0)
        kl_z = kl_divergence(
            MultivariateNormal(mean, torch.diag_embed(variance)),
            MultivariateNormal(module.mixture.means[y], covariances[y]),
        )
        bound = bound + q_y[:, y] * (log_likelihood - kl_z - q_y[:, y].log() + p_y[y].log())
    return bound


@pytest.mark.parametrize("likelihood", LIKELIHOODS)
@pytest.mark.parametrize("dispersion", ["gene", "gene-batch", "gene-cell"])
def test_bound_and_gradient_equal_a_loop_over_components(
    likelihood: str, dispersion: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = make_mixture_vae("gmvae", sizes=COVARIATE_SIZES, likelihood=likelihood, dispersion=dispersion)
    cells, noise = make_cells(COVARIATE_SIZES, 6), normal(2, 3, 6, 2, seed=7)
    share_noise(monkeypatch, noise)
    found, expected = module.bound(*cells, n_samples=2).elbo, bound_by_loop(module, cells, noise)
    np.testing.assert_allclose(array(found), array(expected), **EXACT)
    parameters = dict(module.named_parameters())
    gradients = zip(
        parameters,
        torch.autograd.grad(found.sum(), parameters.values()),
        torch.autograd.grad(expected.sum(), parameters.values()),
        strict=True,
    )
    for name, gradient, by_loop in gradients:
        np.testing.assert_allclose(gradient, by_loop, **EXACT, err_msg=name)
        assert gradient.ne(0).any() or not gradient.numel(), name


@pytest.mark.parametrize("q", [1e-30, 1e-12, 1e-7])
def test_unlikely_components_are_left_out_without_effect(q: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two of three components have q(y|x) = q, below what float32 sees beside 1, and are not decoded.

    Tolerance: leaving out a q(y|x) changes the bound, and the gradients of the logits, by q(y|x) times differences in
    log p(x|z), less than 10 nats here, for each of two components. At 1e-7 that is 2e-6 nats, 5e-7 of the bound.
    """
    module, cells, noise = make_mixture_vae("gmvae"), make_cells(), normal(1, 3, N_CELLS, 2, seed=7)
    with torch.no_grad():
        module.y_logits.weight.zero_()
        module.y_logits.bias.copy_(torch.tensor([q, 1 - 2 * q, q]).log())
    decoded = []
    features = module.decoder.features
    monkeypatch.setattr(module.decoder, "features", lambda z, *rest: decoded.append(z.shape[-2]) or features(z, *rest))
    share_noise(monkeypatch, noise)
    found = module.bound(*cells).elbo
    assert decoded == [N_CELLS]  # not 3 N_CELLS
    expected = bound_by_loop(module, cells, noise)
    tolerance = {"rtol": 1e-12, "atol": 2 * 10 * q}
    np.testing.assert_allclose(array(found), array(expected), **tolerance)
    gradient, by_loop = (torch.autograd.grad(b.sum(), module.y_logits.bias)[0] for b in (found, expected))
    np.testing.assert_allclose(gradient, by_loop, **tolerance)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("covariance", COVARIANCES)
def test_numbering_the_components_anew_changes_nothing_else(
    kind: str, covariance: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    module, cells, order = make_mixture_vae(kind, covariance=covariance), make_cells(), [2, 0, 1]
    share_noise(monkeypatch, normal(4, 1, N_CELLS, 2, seed=7))

    def results() -> tuple[np.ndarray, ...]:
        bound = module.bound(*cells, n_samples=4)
        probabilities = module.probabilities(module.posterior(module.encode(*cells)))
        return tuple(map(array, (bound.log_likelihood, bound.kl_z, bound.kl_y, module.rate(*cells), probabilities)))

    before = results()
    module.permute_components(torch.tensor(order))
    after = results()
    for found, expected in zip(after[:-1], before[:-1], strict=True):
        np.testing.assert_allclose(found, expected, **EXACT)
    np.testing.assert_allclose(after[-1], before[-1][:, order], **EXACT)
    assert np.abs(after[-1] - before[-1]).max() > 0.01


# -- q(y|x) and q(z|x,y) -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("posterior_variance", ["per-dimension", "shared"])
def test_gmvae_posterior_equals_its_formula(posterior_variance: str) -> None:
    module, cells = make_mixture_vae("gmvae", posterior_variance=posterior_variance), make_cells()
    features = module.encode(*cells)
    posterior, h = module.posterior(features), array(features)
    weights = {name: array(value) for name, value in module.named_parameters()}

    def linear(name: str, inputs: np.ndarray) -> np.ndarray:
        return inputs @ weights[f"{name}.weight"].T + weights.get(f"{name}.bias", 0)

    q_y = np.exp(linear("y_logits", h))
    np.testing.assert_allclose(array(posterior.q_y), q_y / q_y.sum(1, keepdims=True), **EXACT)
    np.testing.assert_array_equal(array(module.probabilities(posterior)), array(posterior.q_y))
    for y in range(3):
        hidden = np.maximum(linear("y_features", h) + weights["y_embedding"][y], 0)
        np.testing.assert_allclose(array(posterior.mean)[y], linear("z_mean", h) + linear("y_mean", hidden), **EXACT)
        raw = linear("z_variance", h)
        log_var = np.log(np.log1p(np.exp(raw))) if posterior_variance == "shared" else raw
        expected = np.broadcast_to(log_var + linear("y_variance", hidden), (N_CELLS, 2))
        np.testing.assert_allclose(array(posterior.log_var)[y], expected, **EXACT)


def responsibilities_at(mixture: GaussianMixture, z: np.ndarray) -> np.ndarray:
    """p(y|z) of z (s, n, d), (k, s, n)."""
    log_joint = log_prior_each(mixture, z) + np.log(described(mixture)[0])[:, None, None]
    return special.softmax(log_joint, axis=0)


@pytest.mark.parametrize("covariance", COVARIANCES)
def test_vade_probabilities_are_mean_responsibilities(covariance: str) -> None:
    """Against the kept draws exactly; against the integral within the standard error of that many draws."""
    module, cells = make_mixture_vae("vade", covariance=covariance), make_cells()
    posterior = module.posterior(module.encode(*cells))
    mean, sd = array(posterior.mean)[0], np.exp(0.5 * array(posterior.log_var)[0])
    found = array(module.probabilities(posterior))
    by_draws = responsibilities_at(module.mixture, mean + sd * module.prediction_noise.numpy()).mean(1)
    np.testing.assert_allclose(found, by_draws.T, **EXACT)
    points, t = nodes(2)
    gamma = responsibilities_at(module.mixture, mean + sd * points[:, None])
    first, second = np.einsum("t,ktn->nk", t, gamma), np.einsum("t,ktn->nk", t, gamma**2)
    assert_within_errors(found, np.sqrt((second - first**2) / N_PREDICTION_DRAWS), first)
    np.testing.assert_allclose(found.sum(1), 1, **EXACT)


@pytest.mark.parametrize("kind", KINDS)
def test_probabilities_of_a_cell_depend_on_that_cell_alone(kind: str) -> None:
    module, (x, size, covariates) = make_mixture_vae(kind), make_cells()
    together = array(module.probabilities(module.posterior(module.encode(x, size, covariates))))
    one = x[1:2], size[1:2], covariates.rows(torch.tensor([1]))
    alone = array(module.probabilities(module.posterior(module.encode(*one))))
    np.testing.assert_allclose(alone[0], together[1], **EXACT)


@pytest.mark.parametrize("kind", KINDS)
def test_rate_is_weighted_by_the_probabilities(kind: str) -> None:
    module, cells = make_mixture_vae(kind), make_cells()
    posterior = module.posterior(module.encode(*cells))
    q_y, mean = array(posterior.q_y), posterior.mean
    expected = sum(
        q_y[:, [y]] * np.exp(array(module.decoder(mean[y], cells[1].log(), cells[2])["log_rate"]))
        for y in range(len(mean))
    )
    np.testing.assert_allclose(array(module.rate(*cells)), expected, **EXACT)
    genes = [2, 0]
    np.testing.assert_allclose(array(module.rate(*cells, genes=torch.tensor(genes))), expected[:, genes], **EXACT)


# -- from the VAE to the mixture ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("likelihood", LIKELIHOODS)
def test_before_its_mixture_is_set_the_model_is_a_vae(kind: str, likelihood: str) -> None:
    module, cells = make_untrained(kind, likelihood=likelihood), make_cells()
    randomise(module)
    vae = VAE(Sizes(N_GENES), n_latent=2, n_hidden=5, likelihood=likelihood).double().eval()
    vae.load_state_dict({name: value for name, value in module.state_dict().items() if name in vae.state_dict()})
    assert not module.is_mixture
    results = []
    for each in (module, vae):
        with seeded(1):
            bound = each.bound(*cells, n_samples=3)
            importance = each.importance_weighted_bound(*cells, n_samples=3)
            z, y = each.sample_latent(4)
        probabilities = each.probabilities(each.posterior(each.encode(*cells)))
        terms = (bound.log_likelihood, bound.kl_z, bound.kl_y, importance, probabilities, each.rate(*cells), z, y)
        results.append(tuple(map(array, terms)))
    for found, expected in zip(*results, strict=True):
        np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("covariance", COVARIANCES)
@pytest.mark.parametrize("kind", KINDS)
def test_a_single_standard_normal_component_makes_a_vae(kind: str, covariance: str) -> None:
    """In float32. Tolerance: 1e-5 for the same sums in another order; the KL of VaDE within Monte Carlo errors."""
    module = make_untrained(kind, 1, covariance=covariance).float()
    randomise(module)
    half = torch.full((2,), 0.5)
    module.set_mixture(torch.ones(1), torch.zeros(1, 2), torch.diag(half), half)
    vae = VAE(Sizes(N_GENES), n_latent=2, n_hidden=5).eval()
    vae.load_state_dict({name: value for name, value in module.state_dict().items() if name in vae.state_dict()})
    if kind == "gmvae":
        with torch.no_grad():  # without what depends on y
            module.y_mean.weight.zero_()
            module.y_variance.weight.zero_()
    x, size, covariates = make_cells()
    cells = x.float(), size.float(), covariates
    bounds = []
    for each in (module, vae):
        with seeded(1):
            bounds.append(each.bound(*cells, n_samples=3))
    found, expected = bounds
    np.testing.assert_allclose(array(found.log_likelihood), array(expected.log_likelihood), rtol=1e-5)
    np.testing.assert_allclose(array(found.kl_y), 0, atol=1e-6)
    if kind == "gmvae":
        np.testing.assert_allclose(array(found.kl_z), array(expected.kl_z), rtol=1e-5)
    else:
        kl, error = estimate(lambda: module.bound(*cells, n_samples=300).kl_z)
        assert_within_errors(kl, error, array(expected.kl_z))


def clustered_cells() -> tuple[torch.Tensor, torch.Tensor, Covariates]:
    """150 cells of three overlapping types, in float32."""
    rng = np.random.default_rng(0)
    profiles = np.array([[7.0, 4, 4], [4, 7, 4], [4, 4, 7]])
    x = torch.tensor(rng.poisson(np.repeat(profiles, 50, axis=0)), dtype=torch.float32)
    return x, x.sum(1, keepdim=True), Covariates(torch.zeros(150, 1, dtype=torch.long))


@pytest.mark.parametrize("weights", WEIGHTS)
def test_gmvae_starts_at_the_responsibilities_of_the_fitted_mixture(weights: str) -> None:
    """In float32. Tolerance 1e-4: logits of some tens, rounded to 6e-8 of themselves a few times, and a solve."""
    module, cells = make_untrained("gmvae", weights=weights).float(), clustered_cells()
    randomise(module)
    with torch.no_grad():
        for layer in (module.y_mean, module.y_variance):  # as they start
            layer.weight.zero_()
        before = module.posterior(module.encode(*cells))
        means = array(before.mean[0])
        variance = before.log_var.exp()[0].mean(0)
    fitted = FittedMixture(3, covariance_type="tied", random_state=0).fit(means.astype(float))
    tensors = (
        torch.tensor(value, dtype=torch.float32) for value in (fitted.weights_, fitted.means_, fitted.covariances_)
    )
    module.set_mixture(*tensors, variance)
    after = module.posterior(module.encode(*cells))
    expected = fitted.predict_proba(means.astype(float))
    assert (expected.max(axis=1) < 0.95).mean() > 0.05  # not all cells are certain
    np.testing.assert_allclose(array(after.q_y), expected, atol=1e-4)
    for y in range(3):
        np.testing.assert_array_equal(array(after.mean)[y], means)


@pytest.mark.parametrize("covariance", COVARIANCES)
@pytest.mark.parametrize("kind", KINDS)
def test_the_prior_starts_with_the_spread_of_means_and_posteriors(kind: str, covariance: str) -> None:
    module = make_untrained(kind, covariance=covariance)
    set_apart(module)
    expected = covariance_of(2).numpy() + 0.2 * np.eye(2)
    if covariance == "diag":
        expected = np.diag(np.diag(expected))
    np.testing.assert_allclose(array(module.mixture.covariances()), np.stack([expected] * 3), **EXACT)
    np.testing.assert_allclose(described(module.mixture)[0], np.array([1, 2, 3]) / 6, **EXACT)


# -- sampling ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("kind", KINDS)
def test_components_are_drawn_by_their_weights_and_codes_from_them(kind: str, weights: str) -> None:
    n, module = 20_000, make_mixture_vae(kind, weights=weights)
    probabilities, means, covariances = described(module.mixture)
    module.float()
    with seeded(0), torch.no_grad():
        z, y = (value.numpy() for value in module.sample_latent(n))
    frequency = np.bincount(y, minlength=3) / n
    assert_within_errors(frequency, np.sqrt(probabilities * (1 - probabilities) / n), probabilities)
    for component in range(3):
        draws = z[y == component].astype(float)
        variances = np.diag(covariances[component])
        assert_within_errors(draws.mean(0), np.sqrt(variances / len(draws)), means[component])
        error = np.sqrt((np.outer(variances, variances) + covariances[component] ** 2) / len(draws))
        assert_within_errors(np.cov(draws.T), error, covariances[component])


@pytest.mark.parametrize("kind", KINDS)
def test_codes_of_given_components_come_from_these(kind: str) -> None:
    module, n = make_mixture_vae(kind), 10_000
    _, means, covariances = described(module.mixture)
    module.float()
    asked = torch.tensor([2, 0]).repeat(n)
    with seeded(0), torch.no_grad():
        z, y = module.sample_latent(2 * n, asked)
    np.testing.assert_array_equal(y, asked)
    for first, component in enumerate([2, 0]):
        error = np.sqrt(np.diag(covariances[component]) / n)
        assert_within_errors(z[first::2].double().mean(0).numpy(), error, means[component])


# -- saving and options ------------------------------------------------------------------------------------------------


def bound_of(module: MixtureVAE, cells: tuple) -> np.ndarray:
    with seeded(1):
        return array(module.bound(*cells, n_samples=2).elbo)


@pytest.mark.parametrize("covariance", COVARIANCES)
@pytest.mark.parametrize("later", [False, True], ids=["with components", "components later"])
@pytest.mark.parametrize("kind", KINDS)
def test_saved_weights_restore_the_mixture(kind: str, later: bool, covariance: str) -> None:
    module, cells = make_mixture_vae(kind, covariance=covariance), make_cells()
    other = make_untrained(kind, None if later else 3, covariance=covariance)
    if later:
        assert other.n_components is None
        other.build_mixture(3)
    other.load_state_dict(module.state_dict())
    assert other.is_mixture
    assert other.prior is other.mixture
    np.testing.assert_array_equal(bound_of(other, cells), bound_of(module, cells))


@pytest.mark.parametrize("kind", KINDS)
def test_weights_saved_before_the_mixture_restore_the_vae(kind: str) -> None:
    module, cells = make_untrained(kind), make_cells()
    other = make_mixture_vae(kind)
    other.load_state_dict(module.state_dict())
    assert not other.is_mixture
    assert other.prior is other.standard_normal
    np.testing.assert_array_equal(bound_of(other, cells), bound_of(module, cells))


@pytest.mark.parametrize("kind", KINDS)
def test_a_mixture_built_later_takes_the_precision_of_the_model(kind: str) -> None:
    module, cells = make_untrained(kind, None), make_cells()
    before = bound_of(module, cells)
    module.build_mixture(2)
    assert {parameter.dtype for parameter in module.parameters()} == {torch.float64}
    np.testing.assert_array_equal(bound_of(module, cells), before)
    set_apart(module)
    assert module.probabilities(module.posterior(module.encode(*cells))).shape == (N_CELLS, 2)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"covariance": "spherical"}, "`covariance` must be one of 'diag', 'tied', 'full'; found 'spherical'"),
        ({"weights": "fixed"}, "`weights` must be one of 'learned', 'uniform', 'labels'; found 'fixed'"),
        ({"k": 0}, "`n_components` must be a whole number of at least 1; found 0"),
        ({"k": 2.5}, "`n_components` must be a whole number of at least 1; found 2.5"),
        ({"likelihood": "normal"}, "`likelihood` must be one of .*; found 'normal'"),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
@pytest.mark.parametrize("kind", KINDS)
def test_an_unknown_option_is_named_with_the_choices(kind: str, options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_untrained(kind, **options)


# -- training ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("covariance", COVARIANCES)
@pytest.mark.parametrize("kind", KINDS)
def test_a_batch_of_one_cell_has_the_gradient_of_finite_differences(kind: str, covariance: str, weights: str) -> None:
    """Tolerance: a central difference of step 1e-6 in float64 leaves about 1e-9 of the bound, some 20 nats."""
    module, cells = make_mixture_vae(kind, covariance=covariance, weights=weights).train(), make_cells(n_cells=1)

    def loss() -> torch.Tensor:
        with seeded(2):
            return module.bound(*cells).loss()

    loss().backward()
    for name, parameter in module.named_parameters():
        if not parameter.requires_grad:
            assert name == "mixture.logits"
            assert weights != "learned"
            continue
        direction, expected = normal(*parameter.shape, seed=7), 0.0
        for sign in (1, -1):
            with torch.no_grad():
                parameter.add_(sign * 1e-6 * direction)
                expected += sign * float(loss()) / 2e-6
                parameter.sub_(sign * 1e-6 * direction)
        assert parameter.grad.ne(0).any() or not parameter.numel(), name
        found = float((parameter.grad * direction).sum())
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6, err_msg=name)


@pytest.mark.parametrize("kind", KINDS)
def test_the_decoder_is_never_batch_normalised(kind: str) -> None:
    module = make_untrained(kind, normalization="batch", n_layers=2)

    def count(part: torch.nn.Module) -> int:
        return sum(isinstance(layer, torch.nn.BatchNorm1d) for layer in part.modules())

    assert count(module.encoder) == count(module) == 2
    assert count(module.decoder) == 0
