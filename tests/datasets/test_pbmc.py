"""Counts of 700 blood cells, recovered from what scanpy ships."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
from scipy import sparse

from scvae_tools import datasets
from scvae_tools.datasets import _pbmc


@pytest.fixture(scope="module")
def shipped():
    import scanpy as sc

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return sc.datasets.pbmc68k_reduced()


@pytest.fixture(scope="module")
def pbmc():
    return datasets.pbmc68k_reduced()


def counts_of(adata):
    return adata.X.toarray().astype(np.float64)


def feasible_steps(counts, log_values):
    """Smallest and largest step of each cell for which log1p(count * step) rounds to the shipped three decimals."""
    present = counts > 0
    thousandths = np.round(log_values.astype(np.float64), 3)
    divisor = np.where(present, counts, 1)
    lowest = np.where(present, np.expm1(thousandths - 0.0005) / divisor, -np.inf).max(axis=1)
    highest = np.where(present, np.expm1(thousandths + 0.0005) / divisor, np.inf).min(axis=1)
    return lowest, highest


def test_recovered_pbmc_counts_are_integers_of_at_most_259(pbmc):
    counts = counts_of(pbmc)
    assert counts.shape == (700, 765)
    assert np.array_equal(counts, np.rint(counts))
    assert counts.min() == 0
    assert counts.max() == 259


def test_recovered_pbmc_counts_reproduce_all_three_shipped_decimals(pbmc, shipped):
    counts, log_values = counts_of(pbmc), shipped.raw.X.toarray()
    assert np.array_equal(counts > 0, log_values > 0)
    lowest, highest = feasible_steps(counts, log_values)
    assert (lowest <= highest).all()


def test_recovered_pbmc_steps_scale_cells_to_ten_thousand_counts(pbmc, shipped):
    # The totals over all genes were stored before scaling, so they tell counts from, say, half of the counts.
    step = np.mean(feasible_steps(counts_of(pbmc), shipped.raw.X.toarray()), axis=0)
    np.testing.assert_allclose(step * shipped.obs["n_counts"], 1e4, rtol=1e-3)  # the decimals leave 3e-4


def test_pbmc_fields_are_the_documented_ones(pbmc, shipped):
    assert isinstance(pbmc.X, sparse.csr_matrix)
    assert pbmc.X.dtype == np.float32
    assert list(pbmc.obs) == ["bulk_labels", "phase", "louvain", "n_counts"]
    assert (list(pbmc.obsm), list(pbmc.uns)) == (["X_umap"], ["bulk_labels_colors"])
    assert [*pbmc.var, *pbmc.varm, *pbmc.obsp, *filter(None, pbmc.layers)] == []  # None is X in anndata 0.13
    assert pbmc.raw is None
    assert pbmc.var_names.equals(shipped.raw.var_names)
    assert pbmc.obs_names.equals(shipped.obs_names)
    np.testing.assert_array_equal(pbmc.obs["n_counts"], counts_of(pbmc).sum(axis=1))


def test_pbmc_lets_no_warning_out():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.simplefilter("ignore", DeprecationWarning)  # Python shows none from inside other packages
        datasets.pbmc68k_reduced()


@pytest.mark.parametrize("container", [np.asarray, sparse.csr_matrix, sparse.csc_matrix, sparse.csr_array])
def test_recovery_inverts_scaling_and_rounding(container):
    rng = np.random.default_rng(1)
    counts = rng.poisson(rng.gamma(0.3, 20, size=(50, 200)))
    counts[:, 0] = 1
    counts[7] = 0
    log_values = np.log1p(counts * rng.uniform(1, 5, size=(50, 1))).round(3)
    given = container(log_values)
    assert np.array_equal(_pbmc._recover_counts(given).toarray(), counts)
    assert np.array_equal(given if container is np.asarray else given.toarray(), log_values)


def test_recovery_refines_the_step_beyond_the_rounding_of_the_smallest_value():
    counts = np.arange(1, 251)[None]
    log_values = np.log1p(1.22 * counts).round(3)  # the smallest value alone puts 250 a third of a count off
    first_step = np.expm1(log_values.min())
    assert np.abs(np.expm1(log_values) / first_step - counts).max() > _pbmc.MAX_DISTANCE
    assert np.array_equal(_pbmc._recover_counts(log_values).toarray(), counts)


def test_recovery_refuses_values_that_are_no_multiples():
    log_values = np.log1p([[2.0, 4.0, 6.0], [2.0, 4.0, 2.8]])
    with pytest.raises(
        ValueError, match=r"integer times the step .* within 0\.2 .* 0\.\d\d counts .* row 1\. .* install"
    ):
        _pbmc._recover_counts(log_values)


def test_recovery_refuses_noise():
    with pytest.raises(ValueError, match="does not hold log1p of scaled counts"):
        _pbmc._recover_counts(np.random.default_rng(0).uniform(0.5, 5, size=(20, 30)))
