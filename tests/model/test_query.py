"""New cells mapped onto a trained model: genes in other orders, batches of other types, few cells."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

import scvae_tools as svt

N_COMPONENTS = 4


def cells(batch, n_cells=40):
    adata = svt.datasets.simulate(n_cells, 20, 3, random_state=0)
    adata.obs["batch"] = batch
    return adata


@pytest.fixture(scope="module")
def reference():
    adata = cells(["x", "y"] * 40, 80)
    svt.SCVAE.setup_anndata(adata, batch_key="batch")
    model = svt.SCVAE(adata, n_components=N_COMPONENTS, n_hidden=4, n_latent=2)
    model.train(3, progress=False)
    return model


@pytest.fixture(scope="module", params=["model", "folder"])
def given(request, reference, tmp_path_factory):
    """The reference itself, or the folder where it is saved."""
    if request.param == "model":
        return reference
    folder = tmp_path_factory.mktemp("reference") / "model"
    reference.save(folder)
    return folder


ORDERS = {
    "reversed": lambda a: a[:, ::-1].copy(),
    "a view": lambda a: a[:, ::-1],
    "in order": lambda a: a,
}


@pytest.mark.parametrize("order", ORDERS)
def test_genes_in_any_order_give_the_same_model(order, given):
    ours = svt.SCVAE.load_query_data(cells("new"), given)
    query = svt.SCVAE.load_query_data(ORDERS[order](cells("new")), given, inplace_subset_query_vars=True)
    assert query.adata.var_names.tolist() == query.var_names.tolist()
    for model in (ours, query):
        model.train(1, progress=False)
    np.testing.assert_array_equal(query.get_latent_representation(), ours.get_latent_representation())


def test_genes_that_the_model_lacks_are_left_out(reference):
    adata = svt.datasets.simulate(40, 25, 3, random_state=0)
    adata.obs["batch"] = "new"
    with pytest.raises(ValueError, match="in another order or among others"):
        svt.SCVAE.load_query_data(adata, reference)
    assert adata.n_vars == 25
    query = svt.SCVAE.load_query_data(adata, reference, inplace_subset_query_vars=True)
    assert query.adata is adata
    assert adata.var_names.tolist() == reference.var_names.tolist()


@pytest.mark.parametrize("inplace", [False, True])
def test_a_gene_that_is_missing_is_named_and_the_data_stay_as_they_were(inplace, reference):
    adata = cells("new")
    adata.var_names = ["other", *adata.var_names[1:]]
    before = adata.copy()
    with pytest.raises(ValueError, match=r"1 of the model's 20 genes are missing, the first 'gene0'"):
        svt.SCVAE.load_query_data(adata, reference, inplace_subset_query_vars=inplace)
    assert adata.var_names.tolist() == before.var_names.tolist()
    assert list(adata.obs) == list(before.obs)


UNFIT = {
    "none": ([None] + ["x"] * 39, "must have a category for every cell; found none for 1 of 40"),
    "nan": ([np.nan] + ["x"] * 39, "must have a category for every cell"),
    "numbers": (
        [1] * 40,
        r"of the type .* str, such as 'x'; found int, such as 1\. .*astype\(str\)",
    ),
    "categories that are numbers": (pd.Categorical([1, 2] * 20), "found int, such as"),
    "mixed": ([1, "x"] * 20, "must hold categories of one kind, .*; found the types int, str"),
    "booleans": ([True, False] * 20, "found bool, such as"),
}


@pytest.mark.parametrize("case", UNFIT)
def test_batches_that_do_not_fit_are_refused_in_our_words(case, reference):
    batch, message = UNFIT[case]
    adata = cells(batch)
    with pytest.raises(ValueError, match=rf"adata\.obs\['batch'\].*({message})"):
        svt.SCVAE.load_query_data(adata, reference)
    assert "_scvi_batch" not in adata.obs


def test_fewer_cells_than_components_can_be_mapped_and_trained_on(given):
    query = svt.SCVAE.load_query_data(cells("new")[:2].copy(), given)
    query.train(1, progress=False)
    assert len(query.components) == N_COMPONENTS
    assert np.isfinite(query.get_latent_representation()).all()


@pytest.mark.parametrize("take", [lambda a: a[:2], lambda a: a[:2].copy()], ids=["a view", "a copy"])
def test_a_model_is_loaded_with_fewer_cells_than_components(take, reference, tmp_path):
    reference.save(tmp_path / "model")
    loaded = svt.SCVAE.load(tmp_path / "model", take(cells(["x", "y"] * 20)))
    assert loaded.predict(soft=True).shape == (2, N_COMPONENTS)


def test_a_new_model_needs_a_cell_for_each_component():
    adata = cells("x", 5)
    svt.SCVAE.setup_anndata(adata)
    with pytest.raises(ValueError, match="at most the number of cells; found 6 components for 5 cells"):
        svt.SCVAE(adata, n_components=6)
