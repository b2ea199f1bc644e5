"""The VAE against SciPy, quadrature and formulas written out in NumPy.

Tolerance. Modules run in float64 here unless a test says otherwise, so formulas agree to `EXACT`. Monte Carlo
estimates must lie within `N_ERRORS` standard errors, taken from `REPEATS` independent calls; seeds are fixed.
"""

from __future__ import annotations

from functools import partial
from itertools import product

import mixtures
import mpmath
import numpy as np
import pytest
import torch
from independent import (
    N_ERRORS,
    array,
    assert_within_errors,
    estimate,
    log_likelihood_at,
    log_pmf,
    normal,
    seeded,
    widen,
)
from scipy import special, stats
from torch.distributions import Normal, kl_divergence

from scvae_tools._module.bounds import Bound, Posterior, StandardNormal, log_softplus
from scvae_tools._module.covariates import Covariates, Sizes
from scvae_tools._module.gene_sum import sum_over_genes
from scvae_tools._module.vae import ENCODER_INPUTS, N_REFERENCE_CELLS, VAE
from scvae_tools.likelihoods import LIKELIHOODS, get_likelihood

EXACT = {"rtol": 1e-9, "atol": 1e-10}  #: at most a few thousand operations in float64
N_CELLS, N_GENES = 4, 3
make_cells = partial(mixtures.make_cells, n_cells=N_CELLS)


# -- factories ---------------------------------------------------------------------------------------------------------


def make_vae(sizes: Sizes | None = None, **options: object) -> VAE:
    """Small, in float64, every parameter away from where it starts."""
    options = {"n_latent": 2, "n_hidden": 5} | options
    with seeded(0):
        module = VAE(sizes or Sizes(N_GENES), **options).double()
    with torch.no_grad():
        for seed, parameter in enumerate(filter(torch.Tensor.numel, module.parameters())):
            parameter.add_(0.3 * normal(*parameter.shape, seed=50 + seed))
    widen(module)
    return module.eval()


def make_posterior(k: int = 3, n: int = 2, d: int = 2) -> Posterior:
    return Posterior(
        torch.log_softmax(normal(n, k, seed=1), dim=1), 2 * normal(k, n, d, seed=2), normal(k, n, d, seed=3)
    )


# -- independent numbers -----------------------------------------------------------------------------------------------


def nodes(d: int = 1, n: int = 2001, span: float = 9.0) -> tuple[np.ndarray, np.ndarray]:
    """Points (t, d) and weights (t,) of the trapezoidal rule for expectations under N(0, I)."""
    line = np.linspace(-span, span, n)
    points = np.array(list(product(line, repeat=d)))
    weights = np.exp(-0.5 * (points**2).sum(1)) / (2 * np.pi) ** (d / 2) * (line[1] - line[0]) ** d
    return points, weights


# -- q(y|x) and q(z|x,y) -----------------------------------------------------------------------------------------------


def mixture_density(posterior: Posterior, cell: int, z: np.ndarray) -> np.ndarray:
    parts = zip(array(posterior.q_y)[cell], array(posterior.mean), array(posterior.log_var), strict=True)
    return sum(q * stats.multivariate_normal.pdf(z, m[cell], np.diag(np.exp(v[cell]))) for q, m, v in parts)


def test_posterior_moments_are_those_of_its_density() -> None:
    """Tolerance: the trapezoidal rule is exact to rounding for a smooth density; tails beyond 9 are below 1e-12."""
    posterior = make_posterior()
    points, _ = nodes(2, n=401, span=14.0)
    cell_area = (points[1, 1] - points[0, 1]) ** 2
    mean, variance = posterior.moments()
    for cell in range(2):
        density = mixture_density(posterior, cell, points) * cell_area
        by_quadrature = (density[:, None] * points).sum(0)
        np.testing.assert_allclose(array(mean)[cell], by_quadrature, atol=1e-7)
        spread = (density[:, None] * (points - by_quadrature) ** 2).sum(0)
        np.testing.assert_allclose(array(variance)[cell], spread, rtol=1e-6)


def test_posterior_density_is_that_of_the_mixture() -> None:
    posterior, z = make_posterior(), normal(5, 2, 2, seed=4)
    found = array(posterior.log_prob(z))
    for cell in range(2):
        expected = np.log(mixture_density(posterior, cell, z[:, cell].numpy()))
        np.testing.assert_allclose(found[:, cell], expected, **EXACT)


def test_draws_from_each_component_have_its_mean_and_variance() -> None:
    n, posterior = 20_000, make_posterior()
    with seeded(0):
        z = array(posterior.sample_each(n))
    variance = np.exp(array(posterior.log_var))
    assert_within_errors(z.mean(0), np.sqrt(variance / n), array(posterior.mean))
    assert_within_errors(z.var(0), variance * np.sqrt(2 / n), variance)


@pytest.mark.parametrize("k", [1, 3])
def test_draws_have_the_moments_of_the_mixture(k: int) -> None:
    n, posterior = 20_000, make_posterior(k)
    with seeded(0):
        z = array(posterior.sample(n))
    assert z.shape == (n, 2, 2)
    mean, variance = map(array, posterior.moments())
    assert_within_errors(z.mean(0), np.sqrt(variance / n), mean)
    squares = (z - mean) ** 2
    assert_within_errors(squares.mean(0), squares.std(0) / np.sqrt(n), variance)


def test_gradients_pass_through_draws() -> None:
    """Of mean and log variance: 1 and ½ σ ε."""
    posterior = make_posterior()
    mean, log_var = posterior.mean.requires_grad_(), posterior.log_var.requires_grad_()
    with seeded(0):
        z = posterior.sample_each(1)
    z.sum().backward()
    np.testing.assert_allclose(mean.grad, 1, **EXACT)
    np.testing.assert_allclose(log_var.grad, 0.5 * array(z[0] - mean), **EXACT)


# -- N(0, I) -----------------------------------------------------------------------------------------------------------


def test_kl_to_the_standard_normal_is_that_of_torch() -> None:
    mean, log_var = normal(2, 4, 3), normal(2, 4, 3, seed=1)
    expected = kl_divergence(Normal(mean, (0.5 * log_var).exp()), Normal(0.0, 1.0)).sum(-1)
    np.testing.assert_allclose(StandardNormal().kl(mean, log_var), expected, **EXACT)


def test_standard_normal_density_is_that_of_scipy() -> None:
    z = normal(5, 4, 3)
    expected = stats.multivariate_normal(np.zeros(3)).logpdf(z.numpy())
    np.testing.assert_allclose(StandardNormal().log_prob(z), expected, **EXACT)


def test_the_single_component_has_all_the_weight() -> None:
    np.testing.assert_array_equal(StandardNormal().log_weights().exp(), [1.0])


# -- the sum over genes ------------------------------------------------------------------------------------------------

PATTERNS = {
    "mixed": [[0, 3, 0, 1], [2, 0, 0, 0], [0, 0, 0, 0]],
    "no zero": [[1, 3, 9, 1], [2, 1, 1, 7], [1, 1, 4, 1]],
    "no count": [[0, 0, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0]],
    "one cell": [[0, 2, 5, 0]],
    "one empty cell": [[0, 0, 0, 0]],
}


@pytest.mark.parametrize("name", LIKELIHOODS)
@pytest.mark.parametrize("leading", [(), (2,), (2, 3)], ids=["", "samples", "samples and components"])
@pytest.mark.parametrize("dispersion", ["gene", "gene-batch", "gene-cell"])
@pytest.mark.parametrize("pattern", PATTERNS)
def test_sum_over_genes_equals_the_dense_sum(
    name: str, leading: tuple[int, ...], dispersion: str, pattern: str
) -> None:
    x = torch.tensor(PATTERNS[pattern], dtype=torch.float64)
    shapes = {"gene": x.shape[1:], "gene-batch": x.shape, "gene-cell": (*leading, *x.shape)}
    likelihood = get_likelihood(name)
    params = {
        head.name: normal(
            *(shapes[dispersion] if head.is_dispersion else shapes["gene-cell"]), seed=seed
        ).requires_grad_()
        for seed, head in enumerate(likelihood.heads)
    }
    weights = normal(*leading, len(x), seed=9)
    found, dense = sum_over_genes(likelihood, x, params), likelihood.log_prob(x, params).sum(-1)
    np.testing.assert_allclose(array(found), array(dense), **EXACT)
    gradients = zip(
        params,
        torch.autograd.grad((weights * found).sum(), params.values()),
        torch.autograd.grad((weights * dense).sum(), params.values()),
        strict=True,
    )
    for head, sparse_gradient, dense_gradient in gradients:
        np.testing.assert_allclose(sparse_gradient, dense_gradient, **EXACT, err_msg=head)


@pytest.mark.parametrize("name", LIKELIHOODS)
def test_sum_over_genes_in_float32_is_that_of_scipy(name: str) -> None:
    """Tolerance: 200 genes of a few nats each, every one rounded a few times to 6e-8 of itself."""
    rng = np.random.default_rng(0)
    x = rng.poisson(0.2, (5, 200))
    params = {head.name: normal(5, 200, seed=seed).float() for seed, head in enumerate(get_likelihood(name).heads)}
    found = sum_over_genes(get_likelihood(name), torch.tensor(x, dtype=torch.float32), params)
    expected = log_pmf(x, {head: value.double() for head, value in params.items()}, name).sum(-1)
    np.testing.assert_allclose(found, expected, rtol=2e-6)


# -- softplus ----------------------------------------------------------------------------------------------------------

POINTS = [-200.0, -88.0, -40.0, -15.1, -15.0, -14.9, -3.0, 0.0, 0.5, 15.0, 30.0, 200.0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_log_softplus_is_that_of_mpmath(dtype: torch.dtype) -> None:
    """Tolerance: log softplus(a) − a is −e^a/2, 1.6e-7 at −15; float32 adds its rounding of values up to 200."""
    a = torch.tensor(POINTS, dtype=dtype)
    with mpmath.workdps(120):
        expected = [float(mpmath.log(mpmath.log1p(mpmath.exp(mpmath.mpf(float(point)))))) for point in a]
    rounding = 8 * torch.finfo(dtype).eps
    np.testing.assert_allclose(log_softplus(a), expected, rtol=rounding, atol=1.6e-7 + rounding)


def test_log_softplus_has_the_right_gradient_everywhere() -> None:
    """Tolerance: in the linear tail the slope 1 is off by e^a/2, at most 1.6e-7; the rest is float32 rounding."""
    a = torch.tensor(POINTS, dtype=torch.float32, requires_grad=True)
    log_softplus(a).sum().backward()
    with mpmath.workdps(120):
        exact = [mpmath.mpf(float(point)) for point in a.detach()]
        expected = [float(1 / (1 + mpmath.exp(-t)) / mpmath.log1p(mpmath.exp(t))) for t in exact]
    np.testing.assert_allclose(a.grad, expected, rtol=2e-6)


# -- encoding ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", [1.0, 4.0])
@pytest.mark.parametrize("encoder_input", ENCODER_INPUTS)
def test_posterior_equals_its_formula(encoder_input: str, scale: float) -> None:
    module, (x, size, covariates) = make_vae(encoder_input=encoder_input), make_cells()
    module.input_scale.fill_(scale)
    counts, total = x.numpy(), size.numpy() * scale
    seen = {
        "log1p-normalized": np.log1p(counts / total * 1000),
        "log1p": np.log1p(counts),
        "counts": counts,
    }[encoder_input]
    first = module.encoder.layers.fc_layers[0][0]
    h = seen @ array(module.encoder.gene_weight) + array(first.bias)
    h = np.maximum((h - h.mean(1, keepdims=True)) / np.sqrt(h.var(1, keepdims=True) + 1e-5), 0)
    posterior = module.posterior(module.encode(x, size, covariates))
    np.testing.assert_allclose(
        array(posterior.mean)[0], h @ array(module.z_mean.weight).T + array(module.z_mean.bias), **EXACT
    )
    np.testing.assert_allclose(
        array(posterior.log_var)[0], h @ array(module.z_variance.weight).T + array(module.z_variance.bias), **EXACT
    )
    np.testing.assert_array_equal(array(module.probabilities(posterior)), np.ones((N_CELLS, 1)))


def test_shared_variance_is_the_softplus_of_one_number_per_cell() -> None:
    module, cells = make_vae(posterior_variance="shared", n_latent=3), make_cells()
    features = module.encode(*cells)
    raw = array(features) @ array(module.z_variance.weight).T + array(module.z_variance.bias)
    assert raw.shape == (N_CELLS, 1)
    variance = np.exp(array(module.posterior(features).log_var)[0])
    np.testing.assert_allclose(variance, np.repeat(np.logaddexp(0, raw), 3, axis=1), **EXACT)


# -- bounds ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("likelihood", "use_size_factor"), [*((name, True) for name in LIKELIHOODS), ("nb", False), ("zip", False)]
)
def test_bound_equals_quadrature(likelihood: str, use_size_factor: bool) -> None:
    """Equality: that the bound is below log p(x) would hold with a KL missing as well.

    Tolerance: KL 1e-7, which 2,001 points reach; E log p(x|z) within Monte Carlo errors, which must be small.
    """
    module, cells = make_vae(likelihood=likelihood, n_latent=1, use_size_factor=use_size_factor), make_cells()
    posterior = module.posterior(module.encode(*cells))
    mean, sd = array(posterior.mean)[0], np.exp(0.5 * array(posterior.log_var)[0])  # (n, 1)
    points, weights = nodes()
    z = mean + sd * points[:, None]  # (t, n, 1)
    expected = weights @ log_likelihood_at(module, z, cells)
    kl = weights @ (stats.norm.logpdf(z, mean, sd) - stats.norm.logpdf(z))[..., 0]

    exact = module.bound(*cells)
    np.testing.assert_allclose(array(exact.kl_z), kl, rtol=1e-7)
    np.testing.assert_array_equal(array(exact.kl_y), 0)
    found, error = estimate(lambda: module.bound(*cells, n_samples=400).log_likelihood)
    assert_within_errors(found, error, expected)
    assert (N_ERRORS * error < 0.1).all()
    found, error = estimate(lambda: module.bound(*cells, n_samples=400).elbo)
    assert_within_errors(found, error, expected - kl)


@pytest.mark.parametrize("d", [1, 2])
@pytest.mark.parametrize("likelihood", LIKELIHOODS)
def test_importance_weighted_bound_tends_to_the_marginal_likelihood(likelihood: str, d: int) -> None:
    """Tolerance: the bias, half the variance of one call, is below a fifth of the standard error."""
    module, cells = make_vae(likelihood=likelihood, n_latent=d), make_cells()
    with torch.no_grad():
        module.z_variance.bias.fill_(0.3)  # wide enough for light tails of p(z)/q(z|x)
    points, weights = nodes(d, n=2001 if d == 1 else 101, span=8.0)
    each = log_likelihood_at(module, np.repeat(points[:, None], N_CELLS, axis=1), cells)
    expected = special.logsumexp(each, axis=0, b=weights[:, None])
    found, error = estimate(lambda: module.importance_weighted_bound(*cells, n_samples=1500, chunk=500))
    assert_within_errors(found, error, expected)
    assert (N_ERRORS * error < 0.1).all()
    elbo, error = estimate(lambda: module.bound(*cells, n_samples=400).elbo)
    assert (elbo < expected - N_ERRORS * error).all()


def test_importance_weighted_bound_of_one_sample_is_the_elbo_on_average() -> None:
    module, cells = make_vae(), make_cells()
    many = [value.repeat(4000, *[1] * (value.ndim - 1)) for value in (cells[0], cells[1], cells[2].batch)]
    with seeded(0), torch.no_grad():
        single = module.importance_weighted_bound(many[0], many[1], Covariates(many[2]), n_samples=1)
        elbo = module.bound(many[0], many[1], Covariates(many[2])).elbo
    difference = array(single - elbo).reshape(4000, N_CELLS)
    assert_within_errors(difference.mean(0), difference.std(0) / np.sqrt(4000), 0)


@pytest.mark.parametrize(("n_samples", "chunk"), [(1, 32), (7, 3), (6, 3)])
def test_importance_weighted_bound_is_exact_where_the_posterior_is(n_samples: int, chunk: int) -> None:
    """z without effect and q(z|x) = p(z): every weight is p(x), and so is their mean however they are chunked."""
    module, cells = make_vae(), make_cells()
    with torch.no_grad():
        for parameter in (*module.z_mean.parameters(), *module.z_variance.parameters()):
            parameter.zero_()
        module.decoder.px_decoder.fc_layers[0][0].weight.zero_()
    expected = log_likelihood_at(module, np.zeros((1, N_CELLS, 2)), cells)[0]
    found = module.importance_weighted_bound(*cells, n_samples=n_samples, chunk=chunk)
    np.testing.assert_allclose(array(found), expected, **EXACT)


def test_loss_weights_both_kl_terms() -> None:
    bound = Bound(torch.tensor([-10.0, -20.0]), torch.tensor([1.0, 2.0]), torch.tensor([0.5, 0.0]))
    np.testing.assert_allclose(bound.elbo, [-11.5, -22.0])
    assert float(bound.loss()) == pytest.approx((11.5 + 22.0) / 2)
    assert float(bound.loss(0.1)) == pytest.approx((10.15 + 20.2) / 2)


def test_more_samples_are_their_mean() -> None:
    """The draws of one call, evaluated one at a time."""
    module, cells = make_vae(likelihood="zinb"), make_cells()
    with seeded(1):
        z = array(module.posterior(module.encode(*cells)).sample_each(6))[:, 0]
    with seeded(1):
        found = array(module.bound(*cells, n_samples=6).log_likelihood)
    expected = np.mean([log_likelihood_at(module, draw[None], cells)[0] for draw in z], axis=0)
    np.testing.assert_allclose(found, expected, **EXACT)


def test_float32_bound_is_that_of_float64() -> None:
    """Tolerance: 300 genes of about 2 nats, each to a few 6e-8 of its terms, and two layers: 1e-5 relative."""
    sizes = Sizes(300)
    module, cells = make_vae(sizes, likelihood="zinb", n_hidden=32), make_cells(sizes)
    noise = normal(1, N_CELLS, 2, seed=5)

    def bound_in(dtype: torch.dtype) -> np.ndarray:
        x, size = (value.to(dtype) for value in cells[:2])
        module.to(dtype)
        posterior = module.posterior(module.encode(x, size, cells[2]))
        z = posterior.mean + (0.5 * posterior.log_var).exp() * noise.to(dtype)
        return array(module.log_likelihood(x, z[0], size.log(), cells[2]))

    np.testing.assert_allclose(bound_in(torch.float32), bound_in(torch.float64), rtol=1e-5)


# -- covariates --------------------------------------------------------------------------------------------------------

COVARIATE_SIZES = Sizes(N_GENES, n_batch=3, n_categories=(2, 3), n_continuous=2)


def changed(covariates: Covariates, what: str) -> Covariates:
    if what == "batch":
        return covariates._replace(batch=(covariates.batch + 1) % 3)
    if what == "categorical":
        return covariates._replace(categorical=1 - covariates.categorical.clamp(max=1))
    return covariates._replace(continuous=covariates.continuous + 1)


@pytest.mark.parametrize("encode_covariates", [False, True])
@pytest.mark.parametrize("what", ["batch", "categorical", "continuous"])
def test_covariates_reach_the_decoder_and_the_encoder_on_request(what: str, encode_covariates: bool) -> None:
    """A change moves the first layer by its columns of the weight."""
    module = make_vae(COVARIATE_SIZES, encode_covariates=encode_covariates)
    x, size, covariates = make_cells(COVARIATE_SIZES)
    other = changed(covariates, what)
    features = module.encode(x, size, covariates), module.encode(x, size, other)
    same = np.isclose(*map(array, features)).all(axis=1)
    assert (~same if encode_covariates else same).all()

    z = normal(N_CELLS, 2)
    first = module.decoder.px_decoder.fc_layers[0][0]

    def shift(columns: np.ndarray) -> np.ndarray:
        inputs = np.hstack([z.numpy(), columns])
        h = inputs @ array(first.weight).T + array(first.bias)
        return np.maximum((h - h.mean(1, keepdims=True)) / np.sqrt(h.var(1, keepdims=True) + 1e-5), 0)

    def columns(c: Covariates) -> np.ndarray:
        codes = zip((2, 3, 3), (*c.categorical.T.numpy(), c.batch[:, 0].numpy()), strict=True)
        return np.hstack([c.continuous.numpy(), *(np.eye(n)[code] for n, code in codes)])

    head = module.decoder.heads["log_rate"]
    for value in (covariates, other):
        expected = shift(columns(value)) @ array(head.weight).T + array(head.bias) + np.log(size.numpy())
        np.testing.assert_allclose(np.log(array(module.decode(z, size, value).mu)), expected, **EXACT)
    moved = array(module.decode(z, size, other).mu / module.decode(z, size, covariates).mu)
    assert (np.abs(np.log(moved)).max(axis=1) > 1e-3).all()


def test_dispersion_by_batch_enters_the_bound_of_each_cell() -> None:
    module, cells = make_vae(COVARIATE_SIZES, dispersion="gene-batch"), make_cells(COVARIATE_SIZES)
    z = normal(N_CELLS, 2)
    rate = array(module.decode(z, cells[1], cells[2]).mu)
    r = np.exp(array(module.decoder.shared["log_r"])).T[cells[2].batch[:, 0].numpy()]
    expected = stats.nbinom.logpmf(cells[0].numpy(), r, r / (r + rate)).sum(1)
    found = module.log_likelihood(cells[0], z, module.log_size(cells[1]), cells[2])
    np.testing.assert_allclose(array(found), expected, **EXACT)


# -- decoding ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("use_size_factor", [True, False])
def test_decode_scales_with_the_size_factor_where_there_is_one(use_size_factor: bool) -> None:
    module, (_, size, covariates) = make_vae(use_size_factor=use_size_factor), make_cells()
    z = normal(N_CELLS, 2)
    once, thrice = module.decode(z, size, covariates), module.decode(z, 3 * size, covariates)
    np.testing.assert_allclose(thrice.mu, (3 if use_size_factor else 1) * once.mu, **EXACT)
    np.testing.assert_allclose(once.scale, once.mu / size if use_size_factor else once.mu, **EXACT)
    np.testing.assert_allclose(thrice.scale, once.scale, **EXACT)


@pytest.mark.parametrize("likelihood", LIKELIHOODS)
def test_decoded_distribution_gives_the_log_likelihood(likelihood: str) -> None:
    module, (x, size, covariates) = make_vae(likelihood=likelihood), make_cells()
    z = normal(3, N_CELLS, 2)
    expected = log_likelihood_at(module, z.numpy(), (x, size, covariates))
    np.testing.assert_allclose(array(module.decode(z, size, covariates).log_prob(x).sum(-1)), expected, **EXACT)
    found = module.log_likelihood(x, z, module.log_size(size), covariates)
    np.testing.assert_allclose(array(found), expected, **EXACT)


@pytest.mark.parametrize("likelihood", LIKELIHOODS)
def test_rate_is_decoded_from_the_posterior_mean(likelihood: str) -> None:
    module, cells = make_vae(likelihood=likelihood), make_cells()
    mean = module.posterior(module.encode(*cells)).mean[0]
    params = module.decoder(mean, cells[1].log(), cells[2])
    np.testing.assert_allclose(array(module.rate(*cells)), np.exp(array(params["log_rate"])), **EXACT)


def test_a_subset_of_genes_equals_the_columns_of_all() -> None:
    module, cells, genes = make_vae(likelihood="zinb"), make_cells(), [2, 0]
    at, z = torch.tensor(genes), normal(N_CELLS, 2)
    np.testing.assert_allclose(array(module.rate(*cells, genes=at)), array(module.rate(*cells))[:, genes], **EXACT)
    part, everything = (module.decode(z, *cells[1:], genes=g) for g in (at, None))
    np.testing.assert_allclose(part.mean, everything.mean[:, genes], **EXACT)
    np.testing.assert_allclose(array(part.theta), array(everything.theta)[:, genes], **EXACT)


@pytest.mark.parametrize("engine", ["blocked", "dense"])
def test_constrained_rates_are_shares_of_the_size_factor(engine: str) -> None:
    """Whatever it is, in all that is decoded; the bound of a multinomial with a Poisson total says the same."""
    module = make_vae(likelihood="constrained_poisson", engine=engine)
    x, size, covariates = make_cells()
    z = normal(2, N_CELLS, 2)
    f = array(module.decoder.features(z, covariates)) @ array(module.decoder.heads["log_rate"].weight).T
    share = special.softmax(f + array(module.decoder.heads["log_rate"].bias), axis=-1)
    px = module.decode(z, size, covariates)
    np.testing.assert_allclose(px.scale, share, **EXACT)
    np.testing.assert_allclose(px.mu, share * size.numpy(), **EXACT)
    np.testing.assert_allclose(array(module.rate(x, size, covariates)).sum(1), size.numpy()[:, 0], **EXACT)
    counts = x.numpy()
    total = counts.sum(1)
    multinomial = special.gammaln(total + 1) + (counts * np.log(share) - special.gammaln(counts + 1)).sum(-1)
    expected = stats.poisson(size.numpy()[:, 0]).logpmf(total) + multinomial
    found = module.log_likelihood(x, z, module.log_size(size), covariates)
    np.testing.assert_allclose(array(found), expected, **EXACT)


@pytest.mark.parametrize("k_max", [1, 2])
def test_the_bound_with_categories_is_that_of_scipy(k_max: int) -> None:
    module, (x, size, covariates) = make_vae(likelihood="nb", k_max=k_max), make_cells()
    z = normal(N_CELLS, 2)
    expected = log_likelihood_at(module, z.numpy(), (x, size, covariates))
    np.testing.assert_allclose(array(module.log_likelihood(x, z, module.log_size(size), covariates)), expected, **EXACT)
    found = module.decode(z, size, covariates).log_prob(x).sum(-1)
    np.testing.assert_allclose(array(found), expected, **EXACT)


def test_latent_codes_are_drawn_from_the_standard_normal() -> None:
    n = 20_000
    with seeded(0):
        z, y = make_vae().sample_latent(n)
    z = z.numpy()
    assert_within_errors(z.mean(0), np.full(2, n**-0.5), 0)
    assert_within_errors(np.cov(z.T), np.sqrt((1 + np.eye(2)) / n), np.eye(2))
    np.testing.assert_array_equal(y, np.zeros(n))


def test_posterior_predictive_counts_have_the_decoded_mean() -> None:
    """With a posterior of no width: the mean of draws is the mean of p(x|z), within its standard error."""
    module, (x, size, covariates) = make_vae(), make_cells()
    with torch.no_grad():
        module.z_variance.weight.zero_()
        module.z_variance.bias.fill_(-60.0)
    mean = module.posterior(module.encode(x, size, covariates)).mean[0]
    distribution = module.decode(mean, size, covariates)
    n = 4000
    with seeded(0):
        counts = module.sample({"X": x, "batch": covariates.batch, "size_factor": size}, n_samples=n)
    assert counts.shape == (N_CELLS, N_GENES, n)
    error = np.sqrt(array(distribution.variance) / n)
    assert_within_errors(counts.mean(-1).numpy(), error, array(distribution.mean))


# -- the data's scale --------------------------------------------------------------------------------------------------


def test_the_decoder_starts_at_the_means_of_the_data() -> None:
    """With heads of zero weight λ is the mean fraction times the size factor."""
    module, (_, size, covariates) = make_vae(), make_cells()
    fraction = torch.tensor([0.1, 0.2, 0.7], dtype=torch.float64)
    reference = Covariates(torch.zeros(N_REFERENCE_CELLS, 1, dtype=torch.long))
    module.set_reference(fraction, 2.5, torch.ones(N_REFERENCE_CELLS), reference)
    with torch.no_grad():
        module.decoder.heads["log_rate"].weight.zero_()
    rate = module.decode(normal(N_CELLS, 2), size, covariates).mu
    np.testing.assert_allclose(rate, size.numpy() * fraction.numpy(), **EXACT)
    assert float(module.input_scale) == 2.5


@pytest.mark.parametrize("dispersion", ["gene", "gene-batch", "gene-cell"])
@pytest.mark.parametrize(("use_size_factor", "expected"), [(True, [2.0, 4.0, 14.0]), (False, [0.1, 0.2, 0.7])])
def test_heads_start_at_what_the_likelihood_makes_of_the_mean_counts(
    use_size_factor: bool, expected: list[float], dispersion: str
) -> None:
    options = {"likelihood": "gaussian", "use_size_factor": use_size_factor, "dispersion": dispersion}
    module = make_vae(Sizes(N_GENES, n_batch=2), **options)
    fraction, mean = torch.tensor([0.1, 0.2, 0.7], dtype=torch.float64), np.array(expected)
    reference = Covariates(torch.zeros(N_REFERENCE_CELLS, 1, dtype=torch.long))
    module.set_reference(fraction, 1.0, torch.full((N_REFERENCE_CELLS,), 20.0), reference)
    head = module.decoder.heads["log_sigma"].bias if dispersion == "gene-cell" else module.decoder.shared["log_sigma"]
    for column in array(head).reshape(N_GENES, -1).T:
        np.testing.assert_allclose(np.exp(column), np.sqrt(mean * (1 + mean)), **EXACT)


def test_reference_cells_come_back_as_they_were_kept() -> None:
    _, size, covariates = make_cells(COVARIATE_SIZES, n_cells=N_REFERENCE_CELLS)
    module = make_vae(COVARIATE_SIZES)
    module.set_reference(torch.ones(N_GENES), 1.0, size[:, 0], covariates)
    rows = [5, 0, 1023]
    found_size, found = module.reference(torch.tensor(rows))
    np.testing.assert_array_equal(found_size, size.numpy()[rows])
    for value, kept in zip(found[:3], covariates[:3], strict=True):
        np.testing.assert_array_equal(value, kept.numpy()[rows])


def test_reference_has_no_covariates_where_the_model_has_none() -> None:
    _, covariates = make_vae().reference(torch.tensor([0, 1]))
    assert set(covariates[1:]) == {None}


def test_saved_weights_give_the_same_bound() -> None:
    module, cells = make_vae(COVARIATE_SIZES), make_cells(COVARIATE_SIZES)
    with seeded(9):
        other = VAE(COVARIATE_SIZES, n_latent=2, n_hidden=5).double().eval()
    other.load_state_dict(module.state_dict())
    bounds = []
    for each in (module, other):
        with seeded(1):
            bounds.append(array(each.bound(*cells).elbo))
    np.testing.assert_array_equal(*bounds)


# -- options -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"likelihood": "normal"}, "`likelihood` must be one of .*'zinb', .*; found 'normal'"),
        (
            {"likelihood": "constrained_poisson", "use_size_factor": False},
            "needs one; found use_size_factor=False.*'poi",
        ),
        ({"k_max": -1}, "`k_max` must be a whole number of at least 0; found -1"),
        ({"likelihood": "lomax", "k_max": 2}, "`k_max` needs a likelihood of counts.*found 'lomax'"),
        ({"dispersion": "cell"}, "`dispersion` must be one of 'gene', 'gene-batch', 'gene-cell'; found 'cell'"),
        ({"normalization": "group"}, "`normalization` must be one of 'layer', 'batch', 'none'; found 'group'"),
        ({"posterior_variance": "full"}, "`posterior_variance` must be one of 'per-dimension', 'shared'; found 'full'"),
        ({"encoder_input": "log"}, "`encoder_input` must be one of 'log1p-normalized', 'log1p', 'counts'; found 'log'"),
        ({"n_latent": 0}, "`n_latent` must be a whole number of at least 1; found 0"),
        ({"n_hidden": 2.5}, "`n_hidden` must be a whole number of at least 1; found 2.5"),
        ({"n_layers": -1}, "`n_layers` must be a whole number of at least 1, or None; found -1"),
        ({"dropout_rate": 1.0}, r"`dropout_rate` must be in \[0, 1\); found 1.0"),
        ({"dropout_rate": -0.1}, r"`dropout_rate` must be in \[0, 1\); found -0.1"),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
def test_an_unknown_option_is_named_with_the_choices(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        VAE(Sizes(N_GENES), **options)


NORMS = {"layer": torch.nn.LayerNorm, "batch": torch.nn.BatchNorm1d}


@pytest.mark.parametrize(
    ("normalization", "in_encoder", "in_decoder"),
    [("layer", {"layer"}, {"layer"}), ("batch", {"batch"}, {"layer"}), ("none", set(), set())],
)
def test_the_decoder_is_never_batch_normalised(normalization: str, in_encoder: set, in_decoder: set) -> None:
    module = make_vae(normalization=normalization, n_layers=2)

    def norms(part: torch.nn.Module) -> list[str]:
        return [name for layer in part.modules() for name, kind in NORMS.items() if isinstance(layer, kind)]

    assert norms(module.encoder) == 2 * list(in_encoder)
    assert norms(module.decoder) == 2 * list(in_decoder)


@pytest.mark.parametrize("likelihood", LIKELIHOODS)
@pytest.mark.parametrize("normalization", ["layer", "none"])
def test_a_batch_of_one_cell_has_the_gradient_of_finite_differences(likelihood: str, normalization: str) -> None:
    """Tolerance: a central difference of step 1e-6 in float64 leaves about 1e-9 of the bound, some 20 nats."""
    module, cells = make_vae(likelihood=likelihood, normalization=normalization).train(), make_cells(n_cells=1)

    def loss() -> torch.Tensor:
        with seeded(2):
            return module.bound(*cells).loss()

    loss().backward()
    for name, parameter in module.named_parameters():
        direction = normal(*parameter.shape, seed=7)
        expected = 0.0
        for sign in (1, -1):
            with torch.no_grad():
                parameter.add_(sign * 1e-6 * direction)
                expected += sign * float(loss()) / 2e-6
                parameter.sub_(sign * 1e-6 * direction)
        np.testing.assert_allclose(
            float((parameter.grad * direction).sum()), expected, rtol=1e-5, atol=1e-6, err_msg=name
        )
