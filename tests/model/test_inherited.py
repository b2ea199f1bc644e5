"""Every public method and property of the model works, or says why not: those that scvi-tools brings along too."""

from __future__ import annotations

import inspect

import numpy as np
import pandas as pd
import pytest
import torch
from scipy import stats

import scvae_tools as svt
from scvae_tools import SCVAE


def make_adata():
    adata = svt.datasets.simulate(90, 12, 3, n_batches=2, random_state=0)
    adata.obs["donor"] = pd.Categorical(np.arange(90) % 3)
    return adata


@pytest.fixture(scope="module")
def adata():
    return make_adata()


@pytest.fixture(scope="module")
def model(adata):
    options = {"n_components": 3, "n_latent": 3, "n_hidden": 8, "max_epochs": 4, "linear_decoder": True}
    return svt.tl.scvae(adata, batch_key="batch", progress=False, return_model=True, **options)


@pytest.fixture(scope="module")
def folder(model, tmp_path_factory):
    path = tmp_path_factory.mktemp("saved") / "model"
    model.save(path, save_anndata=True)
    return path


#: A call of each public method as a user would make it: model, its AnnData, a folder in which it is saved.
CALLS = {
    "convert_legacy_save": lambda m, a, f: SCVAE.convert_legacy_save(f, f),
    "counts_of_model": lambda m, a, f: m.counts_of_model(),
    "evaluated_cells": lambda m, a, f: m.evaluated_cells(),
    "data_registry": lambda m, a, f: m.data_registry("X"),
    "deregister_manager": lambda m, a, f: SCVAE.load(f).deregister_manager(),
    "differential_abundance": lambda m, a, f: m.differential_abundance(sample_key="donor"),
    "differential_expression": lambda m, a, f: m.differential_expression(groupby="scvae", silent=True),
    "find_columns_in": lambda m, a, f: m.find_columns_in(a),
    "get_aggregated_posterior": lambda m, a, f: m.get_aggregated_posterior(indices=[0, 1]),
    "get_anndata_manager": lambda m, a, f: m.get_anndata_manager(m.adata, required=True),
    "get_elbo": lambda m, a, f: m.get_elbo(),
    "get_elbo_terms": lambda m, a, f: m.get_elbo_terms(),
    "get_feature_correlation_matrix": lambda m, a, f: m.get_feature_correlation_matrix(n_samples=2),
    "get_fit": lambda m, a, f: m.get_fit(),
    "get_from_registry": lambda m, a, f: m.get_from_registry(m.adata, "X"),
    "get_importance_weights": lambda m, a, f: m.get_importance_weights(a, [0], None, None, None),
    "get_kl_by_dimension": lambda m, a, f: m.get_kl_by_dimension(),
    "get_lambda": lambda m, a, f: m.get_lambda(),
    "get_latent_library_size": lambda m, a, f: m.get_latent_library_size(),
    "get_latent_representation": lambda m, a, f: m.get_latent_representation(),
    "get_likelihood_parameters": lambda m, a, f: m.get_likelihood_parameters(),
    "get_loadings": lambda m, a, f: m.get_loadings(),
    "get_marginal_ll": lambda m, a, f: m.get_marginal_ll(n_mc_samples=3),
    "get_normalized_expression": lambda m, a, f: m.get_normalized_expression(),
    "get_prior": lambda m, a, f: m.get_prior(),
    "get_reconstruction_error": lambda m, a, f: m.get_reconstruction_error(),
    "get_setup_arg": lambda m, a, f: m.get_setup_arg("batch_key"),
    "get_state_registry": lambda m, a, f: m.get_state_registry("batch"),
    "get_var_names": lambda m, a, f: m.get_var_names(),
    "has_cells": lambda m, a, f: m.has_cells(a.obs_names, m.counts_of_model()),
    "iter_component_expression": lambda m, a, f: list(m.iter_component_expression(m.components, 4)),
    "iter_decoded": lambda m, a, f: list(m.iter_decoded()),
    "iter_lambda": lambda m, a, f: list(m.iter_lambda()),
    "iter_samples": lambda m, a, f: list(m.iter_samples()),
    "load": lambda m, a, f: SCVAE.load(f),
    "load_query_data": lambda m, a, f: SCVAE.load_query_data(make_adata(), f),
    "load_registry": lambda m, a, f: SCVAE.load_registry(f),
    "minify_adata": lambda m, a, f: SCVAE.load(f).minify_adata(),
    "n_fit_cells": lambda m, a, f: m.n_fit_cells(),
    "other_cells": lambda m, a, f: m.other_cells(make_adata()),
    "posterior_predictive_sample": lambda m, a, f: m.posterior_predictive_sample(),
    "predict": lambda m, a, f: m.predict(),
    "prepare_query_anndata": lambda m, a, f: SCVAE.prepare_query_anndata(make_adata(), f),
    "prepare_query_mudata": lambda m, a, f: SCVAE.prepare_query_mudata(None, f),
    "register_manager": lambda m, a, f: SCVAE.register_manager(m.adata_manager),
    "sample": lambda m, a, f: m.sample(10),
    "save": lambda m, a, f: m.save(f.with_name("again")),
    "save_for_hub": lambda m, a, f: m.save_for_hub(f.with_name("published"), license_info="mit"),
    "setup_anndata": lambda m, a, f: SCVAE.setup_anndata(make_adata()),
    "shown": lambda m, a, f: m.shown(m.other_cells(make_adata())).__enter__(),
    "to_device": lambda m, a, f: m.to_device("cpu"),
    "train": lambda m, a, f: SCVAE.load(f).train(1, progress=False),
    "transfer_fields": lambda m, a, f: m.transfer_fields(make_adata()),
    "update_setup_method_args": lambda m, a, f: SCVAE.load(f).update_setup_method_args({"layer": None}),
    "use_version": lambda m, a, f: m.use_version("best"),
    "view_anndata_setup": lambda m, a, f: m.view_anndata_setup(),
    "view_registry": lambda m, a, f: m.view_registry(),
    "view_setup_args": lambda m, a, f: SCVAE.view_setup_args(f),
    "view_setup_method_args": lambda m, a, f: m.view_setup_method_args(),
}
REFUSED = {
    "convert_legacy_save": "SCVAE.load reads what SCVAE.save wrote",
    "get_importance_weights": "`get_marginal_ll` has the importance-weighted bound",
    "get_latent_library_size": "its total count over the genes of the model. Read it there",
    "prepare_query_mudata": r"mdata\.mod\['rna'\]",
}
#: Of later versions of scvi-tools.
FUTURE = {"setup_annbatch"}


def public(kind):
    return {name for name, _ in inspect.getmembers(SCVAE, kind) if not name.startswith("_")}


def test_the_table_has_all_public_methods():
    assert set(CALLS) == public(callable) - FUTURE


@pytest.mark.parametrize("name", CALLS)
def test_a_public_method_works_or_says_why_not(name, model, adata, folder, capsys):
    if name in REFUSED:
        with pytest.raises(NotImplementedError, match=REFUSED[name]):
            CALLS[name](model, adata, folder)
    else:
        CALLS[name](model, adata, folder)


@pytest.mark.parametrize("name", sorted(public(lambda value: isinstance(value, property))))
def test_a_public_property_can_be_read(name, model):
    getattr(model, name)


# -- models of a tool, whose cells have no columns of their own ------------------------------------------------------


def test_differential_expression_finds_columns_that_came_after_the_training(model, adata):
    adata.obs["cluster"] = pd.Categorical(np.where(adata.obs["scvae"] == "0", "zero", "other"))
    before = adata.copy()
    table = model.differential_expression(groupby="cluster", group1="zero", silent=True)
    expected = model.differential_expression(idx1=(adata.obs["scvae"] == "0").to_numpy(), silent=True)
    numbers = expected.select_dtypes("number")
    pd.testing.assert_frame_equal(table[numbers.columns], numbers)
    assert list(model.adata.obs) == ["batch", "_scvi_batch", "_scvi_labels"]
    pd.testing.assert_frame_equal(adata.obs, before.obs)


def test_a_query_of_cells_finds_them_too(model, adata):
    table = model.differential_expression(idx1="scvae == '0'", idx2="scvae == '1'", silent=True)
    expected = model.differential_expression(groupby="scvae", group1="0", group2="1", silent=True)
    numbers = expected.select_dtypes("number")
    pd.testing.assert_frame_equal(table[numbers.columns], numbers)


def test_a_column_that_is_nowhere_is_named_with_those_there_are(model):
    with pytest.raises(ValueError, match=r"`groupby` must name a column .* 'scvea', which is not one\. Did you mean"):
        model.differential_expression(groupby="scvea")
    with pytest.raises(ValueError, match=r"`sample_key` must name a column of adata\.obs; found None"):
        model.differential_abundance()


def test_columns_of_other_cells_are_not_taken(model):
    other = make_adata()[::-1].copy()
    other.obs["other"] = "x"
    model.find_columns_in(other)
    with pytest.raises(ValueError, match="'other', which is not one"):
        model.differential_expression(groupby="other")


# -- densities of the posterior --------------------------------------------------------------------------------------


def test_the_aggregated_posterior_is_the_mean_of_the_gaussians_of_the_cells(model):
    mean, variance = model.get_latent_representation(indices=[3, 5], return_dist=True)
    z = np.array([[0.1, -0.3, 0.5]], dtype=np.float32)
    each = stats.norm(mean, np.sqrt(variance)).pdf(z).prod(1)
    found = model.get_aggregated_posterior(indices=[3, 5], dof=None).log_prob(torch.as_tensor(z))
    np.testing.assert_allclose(found.numpy(), np.log(each.mean(keepdims=True)), rtol=1e-4)


def test_abundance_is_the_density_of_a_cell_among_those_of_a_sample(model, adata):
    model.find_columns_in(adata)
    table = model.differential_abundance(sample_key="donor")
    mean, variance = model.get_latent_representation(return_dist=True)
    of_sample = (adata.obs["donor"] == 1).to_numpy()
    densities = stats.norm(mean[of_sample], np.sqrt(variance[of_sample])).pdf(mean[7]).prod(1)
    assert table.loc[adata.obs_names[7], "1"] == pytest.approx(np.log(densities.mean()), rel=1e-4)
    pd.testing.assert_frame_equal(adata.obsm["da_log_probs"], table)
    assert "da_log_probs" not in model.adata.obsm
