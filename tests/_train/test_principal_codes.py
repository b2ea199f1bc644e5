"""Principal codes: against dense residuals, the noise edge of Marchenko and Pastur, and planted differences."""

from __future__ import annotations

import numpy as np
import pytest
from anndata import AnnData
from scipy import sparse

import scvae_tools as svt
from scvae_tools._data.loader import CountDataset
from scvae_tools._train import principal_codes as module
from scvae_tools._train.principal_codes import principal_codes
from scvae_tools._train.stages import noise_edge


def dataset_of(counts, likelihood="nb", **columns):
    adata = AnnData(sparse.csr_matrix(np.asarray(counts, dtype=np.float32)))
    for name, values in columns.items():
        adata.obs[name] = values
    keys = {"batch_key": "batch"} if "batch" in columns else {}
    keys |= {"continuous_covariate_keys": ["age"]} if "age" in columns else {}
    svt.SCVAE.setup_anndata(adata, **keys)
    model = svt.SCVAE(adata, likelihood=likelihood, mixture=False, n_hidden=4)
    return CountDataset(model.adata_manager, model.module.likelihood)


def negative_binomial(rng, mean, r=4.0):
    return rng.poisson(mean * rng.gamma(r, 1 / r, np.shape(mean)))


def two_populations(rng, n_cells=600, n_genes=300, n_changed=30, fold=3.0, share=0.5):
    rate = np.exp(rng.normal(0.5, 1.0, n_genes))
    is_second = rng.permutation(np.arange(n_cells) < share * n_cells)
    rates = np.tile(rate, (n_cells, 1))
    rates[np.ix_(is_second, range(n_changed))] *= fold
    return negative_binomial(rng, rates * np.exp(0.4 * rng.standard_normal((n_cells, 1)))), is_second


def dense_residuals(x):
    """Pearson residuals from moments, gene by gene."""
    x = x.astype(float)
    size = x.sum(1)
    result = np.empty_like(x)
    for gene in range(x.shape[1]):
        mean = size * x[:, gene].sum() / size.sum()
        above = ((x[:, gene] - mean) ** 2 - mean).sum() / (mean**2).sum()
        result[:, gene] = (x[:, gene] - mean) / np.sqrt(mean + max(above, 0) * mean**2)
    return np.clip(result, -10, 10)


def test_the_components_are_those_of_dense_residuals():
    x, _ = two_populations(np.random.default_rng(0))
    found = principal_codes(dataset_of(x), np.arange(len(x)), 4, use_size_factor=True, random_state=0)
    residual = dense_residuals(x)
    left, singular, _ = np.linalg.svd(residual - residual.mean(0), full_matrices=False)
    variances = singular[:4] ** 2 / len(x)
    np.testing.assert_allclose(found.variances, variances, rtol=2e-3)
    assert found.n_used == (variances > noise_edge(*x.shape)).sum() >= 1
    expected = left[:, 0] * np.sqrt(len(x) * (1 - 1 / variances[0]))
    assert abs(np.corrcoef(found.codes[:, 0], expected)[0, 1]) > 0.9999
    assert found.codes[:, 0].std() == pytest.approx(expected.std(), rel=1e-3)


def test_one_in_twenty_matrices_of_gaussian_noise_has_a_larger_component():
    rng = np.random.default_rng(11)
    n, g, n_draws = 120, 60, 1_000
    largest = []
    for _ in range(n_draws):
        x = rng.standard_normal((n, g))
        largest.append(np.linalg.norm(x - x.mean(0), 2) ** 2 / n)
    share = np.mean(np.array(largest) > module.largest_of_noise(n, g))
    assert share == pytest.approx(0.05, abs=0.02)  # three standard errors of the share


@pytest.mark.parametrize("depth_sd", [0.0, 1.0])
def test_cells_that_differ_in_size_alone_have_no_component_far_above_the_noise(depth_sd):
    rng = np.random.default_rng(1)
    rate = np.exp(rng.normal(0.5, 0.7, 400))  # no gene is a large part of the size
    x = negative_binomial(rng, rate * np.exp(depth_sd * rng.standard_normal((700, 1))))
    found = principal_codes(dataset_of(x), np.arange(700), 6, use_size_factor=True, random_state=0)
    assert found.variances[0] < 1.1 * noise_edge(700, 400)
    assert found.n_used <= 2
    assert not found.codes[:, found.n_used :].any()


def test_a_difference_of_a_few_cells_in_a_few_genes_is_a_component():
    x, is_second = two_populations(np.random.default_rng(2), 900, 500, 30, share=0.05)
    found = principal_codes(dataset_of(x), np.arange(900), 5, use_size_factor=True, random_state=0)
    assert found.n_used >= 1
    code = found.codes[:, 0]
    apart = abs(code[is_second].mean() - code[~is_second].mean()) / code[~is_second].std()
    assert apart > 3


def test_what_batches_and_covariates_explain_is_no_component():
    rng = np.random.default_rng(3)
    x, is_second = two_populations(rng)
    age = is_second + 0.0
    for columns in ({"batch": np.where(is_second, "a", "b")}, {"age": age}):
        found = principal_codes(dataset_of(x, **columns), np.arange(len(x)), 3, use_size_factor=True, random_state=0)
        assert found.variances[0] < 1.1 * noise_edge(*x.shape)
        scores = found.codes[:, : max(1, found.n_used)]
        assert abs(np.corrcoef(scores[:, 0] + 1e-9 * rng.standard_normal(len(x)), is_second)[0, 1]) < 0.1


def test_codes_are_of_all_training_cells_whatever_the_sample_and_of_no_others(monkeypatch):
    x, _ = two_populations(np.random.default_rng(4))
    dataset, cells = dataset_of(x), np.arange(500)
    whole = principal_codes(dataset, cells, 2, use_size_factor=True, random_state=0)
    monkeypatch.setattr(module, "LARGEST_SAMPLE", 300)
    sampled = principal_codes(dataset, cells, 2, use_size_factor=True, random_state=0)
    assert not whole.codes[500:].any()
    assert not sampled.codes[500:].any()
    assert sampled.codes[:500, 0].all()
    assert abs(np.corrcoef(whole.codes[:500, 0], sampled.codes[:500, 0])[0, 1]) > 0.95


def test_the_same_seed_gives_the_same_codes_and_the_global_state_stays():
    x, _ = two_populations(np.random.default_rng(5))
    dataset = dataset_of(x)
    np.random.seed(7)  # noqa: NPY002
    before = np.random.get_state()[1].copy()  # noqa: NPY002
    first, second = (
        principal_codes(dataset, np.arange(len(x)), 3, use_size_factor=True, random_state=0) for _ in range(2)
    )
    assert np.array_equal(first.codes, second.codes)
    assert np.array_equal(np.random.get_state()[1], before)  # noqa: NPY002


@pytest.mark.parametrize("likelihood", svt.likelihoods.LIKELIHOODS)
def test_all_likelihoods_train_from_them(likelihood):
    x, _ = two_populations(np.random.default_rng(6), 120, 40, 20)
    adata = AnnData(sparse.csr_matrix(x.astype(np.float32)))
    svt.SCVAE.setup_anndata(adata)
    model = svt.SCVAE(adata, likelihood=likelihood, mixture=False, n_hidden=8, n_latent=2)
    model.train(4, progress=False)
    assert np.isfinite(model.history["elbo_train"]).all()


@pytest.mark.parametrize("shape", [(3, 5), (30, 1), (2, 2), (40, 30)])
def test_few_cells_or_genes_have_fewer_components_than_dimensions(shape):
    x = np.random.default_rng(8).poisson(3, shape) + np.eye(*shape, dtype=int)
    found = principal_codes(dataset_of(x), np.arange(shape[0]), 10, use_size_factor=True, random_state=0)
    assert found.codes.shape == (shape[0], 10)
    assert len(found.variances) == min(10, min(shape) - 1)
    assert np.isfinite(found.codes).all()


def test_genes_without_counts_and_equal_cells_do_no_harm():
    x = np.tile(np.arange(6), (20, 1))
    found = principal_codes(dataset_of(x), np.arange(20), 2, use_size_factor=True, random_state=0)
    assert found.n_used == 0


def test_the_latent_means_begin_at_the_codes():
    x, is_second = two_populations(np.random.default_rng(9), 400, 200, 40)
    adata = AnnData(sparse.csr_matrix(x.astype(np.float32)))
    svt.SCVAE.setup_anndata(adata)
    correlation = {}
    for pca_start in (True, False):
        model = svt.SCVAE(adata, mixture=False, n_hidden=16, n_latent=2, random_state=1)
        model.train(8, n_warm_up_epochs=8, pca_start=pca_start, progress=False)
        latent = model.get_latent_representation()
        correlation[pca_start] = max(abs(np.corrcoef(latent.T, is_second)[-1, :-1]))
    assert correlation[True] > 0.8
    assert correlation[True] > correlation[False]


def test_only_a_warm_up_draws_to_them():
    pulls = {stage.name: stage.pull(0.25) for stage in stages_of(pca_start=True)}
    assert pulls == {"warm-up": 7.5, "vae": None, "mixture": None}
    stage = stages_of(pca_start=True)[0]
    assert (stage.pull(0.0), stage.pull(1.0)) == (10.0, 0.0)


@pytest.mark.parametrize(("n_latent", "pca_start"), [(1, True), (8, True), (8, False)])
def test_they_are_used_where_they_are_asked_for(n_latent, pca_start):
    assert stages_of(pca_start=pca_start, n_latent=n_latent)[0].has_codes == pca_start


def stages_of(*, pca_start, n_latent=2, n_warm_up_epochs=None):
    """Stages of a training on two populations, of which the first component tells."""
    x, _ = two_populations(np.random.default_rng(10))
    adata = AnnData(sparse.csr_matrix(x.astype(np.float32)))
    svt.SCVAE.setup_anndata(adata)
    model = svt.SCVAE(adata, n_components=2, n_hidden=8, n_latent=n_latent)
    with model._context_of_training(0, (0.9, None)) as dataset:
        stages = model._stages(20, n_warm_up_epochs)
        dataset = model._with_codes(dataset, stages, pca_start, 0)
        return model._with_defaults(stages, dataset, None, None, n_steps=5)


def test_without_a_warm_up_there_is_nothing_to_draw():
    assert not any(stage.has_codes for stage in stages_of(pca_start=True, n_warm_up_epochs=0))
