"""Differential expression: p-values beside the table of scvi-tools, and calls by them."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

import scvae_tools as svt
from scvae_tools.model._count_evidence import count_evidence
from scvae_tools.model._fold_changes import fold_changes

N_CELLS, N_GENES, N_CHANGED = 240, 40, 8


@pytest.fixture(scope="module")
def model():
    """Cells of groups a, b and c, of which a has four times the counts of the first genes; half a model of them."""
    rng = np.random.default_rng(0)
    adata = svt.datasets.simulate(N_CELLS, N_GENES, 1, gene_sd=0.5, median_counts=300, random_state=0)
    group = np.array(["a", "b", "c"])[rng.permutation(N_CELLS) % 3]
    counts = adata.X.toarray()
    counts[group == "a", :N_CHANGED] = rng.poisson(4 * counts[group == "a", :N_CHANGED])
    adata.X = counts
    adata.obs["group"] = pd.Categorical(group, categories=["a", "b", "c", "empty"])
    svt.SCVAE.setup_anndata(adata)
    model = svt.SCVAE(adata, mixture=False, n_hidden=16, n_latent=3)
    model.train(20, progress=False)
    return model


def compared(model, **options):
    return model.differential_expression(silent=True, n_samples_overall=200, **options)


def test_the_p_values_of_groups_are_those_of_their_cells(model):
    adata = model.adata
    table = compared(model, groupby="group", group1=["a", "b"], group2="c")
    code = adata.obs["group"].cat.codes.to_numpy()
    expected = fold_changes(count_evidence(model, adata, code, 3, adjusts=False), np.array([[1.0, 0, -1], [0, 1, -1]]))
    for row, name in enumerate("ab"):
        own = table[table["group1"] == name].loc[adata.var_names]
        np.testing.assert_allclose(own["lfc_counts"] * np.log(2), expected.mean[row], atol=1e-6)
        np.testing.assert_allclose(own["pval"], expected.p_values()[row], atol=1e-9)
        pair = np.where(code == row, 0, np.where(code == 2, 1, -1))
        of_pair = fold_changes(count_evidence(model, adata, pair, 2, adjusts=False), np.array([[1.0, -1.0]]))
        by_cells = compared(model, idx1=code == row, idx2=code == 2).loc[adata.var_names]
        np.testing.assert_allclose(by_cells["lfc_se"] * np.log(2), of_pair.standard_error[0], rtol=1e-5)


def test_the_rest_is_all_other_cells_each_group_by_its_number(model):
    adata = model.adata
    n_cells = adata.obs["group"].value_counts()
    table = compared(model, groupby="group")
    code = adata.obs["group"].cat.codes.to_numpy()
    share = n_cells["b"] / (n_cells["b"] + n_cells["c"])
    contrast = np.array([[1.0, -share, share - 1]])
    expected = fold_changes(count_evidence(model, adata, code, 3, adjusts=False), contrast)
    own = table[table["group1"] == "a"].loc[adata.var_names]
    np.testing.assert_allclose(own["lfc_counts"] * np.log(2), expected.mean[0], atol=1e-6)
    np.testing.assert_allclose(own["lfc_se"] * np.log(2), expected.standard_error[0], rtol=1e-5)


def test_genes_are_called_by_the_adjusted_p_values_of_a_difference_beyond_delta(model):
    table = compared(model, groupby="group", group1="a", mode="change", delta=0.5, fdr_target=0.1)
    p_values = table["pval"].sort_values()
    adjusted = (p_values * N_GENES / np.arange(1, N_GENES + 1))[::-1].cummin()[::-1]
    np.testing.assert_allclose(table["pval_adj"][adjusted.index], adjusted.clip(upper=1))
    assert (table["is_de_fdr_0.1"] == (table["pval_adj"] <= 0.1)).all()
    changed = model.adata.var_names[:N_CHANGED]
    assert table["is_de_fdr_0.1"][changed].mean() > 0.8
    any_change = compared(model, groupby="group", group1="a", mode="change", delta=0.0)
    assert (any_change["pval"][table.index] <= table["pval"] + 1e-12).all()


def test_a_change_of_ones_own_is_called_by_the_probabilities_of_scvi(model):
    def difference(x, y, pseudocounts):
        return x - y

    table = compared(model, groupby="group", group1="a", mode="change", change_fn=difference, delta=10.0)
    assert not table["is_de_fdr_0.05"].any()  # no share of counts differs by ten
    assert (table["pval"] > 0.99).all()


def test_cells_out_of_a_subset_are_part_of_the_rest_alone(model):
    adata = model.adata
    few = np.flatnonzero(adata.obs["group"] == "a")[:10]
    subset = np.union1d(few, np.flatnonzero(adata.obs["group"] != "a"))
    some = compared(model, groupby="group", group1="a", subset_idx=subset).loc[adata.var_names]
    cells = compared(model, idx1=few).loc[adata.var_names]
    np.testing.assert_allclose(some["pval"], cells["pval"], atol=1e-9)


def test_without_counts_there_are_no_p_values(model):
    adata = model.adata.copy()
    svt.SCVAE.setup_anndata(adata)
    other = svt.SCVAE(adata, mixture=False, n_hidden=4, n_latent=2)
    other.train(1, progress=False)
    other.minify_adata()
    table = compared(other, idx1=np.arange(50), idx2=np.arange(50, 100))
    assert "pval" not in table
