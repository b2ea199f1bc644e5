"""Groups that are compared: what there is not is said with what there is."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

import scvae_tools as svt


@pytest.fixture(scope="module")
def model():
    adata = svt.datasets.simulate(60, 10, 2, random_state=0)
    svt.SCVAE.setup_anndata(adata)
    model = svt.SCVAE(adata, mixture=False, n_hidden=4, n_latent=2)
    model.train(2, progress=False)
    groups = np.array(["a", "b", "c"])[np.arange(60) % 3]
    adata.obs["group"] = pd.Categorical(groups, categories=["a", "b", "c", "empty"])
    adata.obs["all"] = "same"
    return model


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({}, r"found neither `groupby` nor `idx1`\. .*'component', .*'group'"),
        ({"groupby": "gruop"}, r"`groupby` must name a column of adata\.obs; found 'gruop'.* Did you mean 'group'\?"),
        (
            {"groupby": "group", "group1": "A"},
            r"`group1` must name groups .*\['group'\]; found 'A'\. There are 'a', 'b', 'c'\.",
        ),
        ({"groupby": "group", "group1": ["a", "empty"]}, r"`group1` .*; found 'empty'\. There are 'a', 'b', 'c'\."),
        ({"groupby": "group", "group1": "a", "group2": "empty"}, r"`group2` .*; found 'empty'\. There are"),
        ({"groupby": "group", "group1": 0}, r"`group1` .*; found 0\. There are"),
        ({"groupby": "all"}, r"must have cells of two groups to compare; found 'same' alone"),
        ({"idx1": []}, r"`idx1` must choose at least one cell"),
        ({"idx1": np.zeros(60, dtype=bool)}, r"`idx1` must choose at least one cell"),
        ({"idx1": [0], "idx2": []}, r"`idx2` must choose at least one cell"),
        ({"idx1": [60]}, r"`idx1` must be positions among 60 cells; found 60"),
        ({"idx1": "gruop == 'a'"}, r"`idx1` must be .* a query of adata\.obs with .*'group'.*gruop"),
        ({"idx1": "group == 'empty'"}, r"`idx1` must choose at least one cell"),
        ({"idx1": np.arange(60)}, r"`idx1` must leave cells to compare with; found all cells in it"),
        ({"groupby": "group", "mode": "changed"}, r"`mode` must be one of 'vanilla', 'change'; found 'changed'"),
    ],
    ids=str,
)
def test_what_cannot_be_compared_is_said_with_what_there_is(model, options, match):
    columns = list(model.adata.obs)
    with pytest.raises(ValueError, match=match):
        model.differential_expression(silent=True, **options)
    assert list(model.adata.obs) == columns


def test_groups_without_cells_are_not_compared(model):
    table = model.differential_expression(groupby="group", silent=True)
    assert sorted(set(table["comparison"])) == ["a vs Rest", "b vs Rest", "c vs Rest"]
    for first in ("a", ["a"]):
        table = model.differential_expression(groupby="group", group1=first, group2="b", silent=True)
        assert set(table["comparison"]) == {"a vs b"}


def test_cells_may_be_given_in_any_way(model):
    places = np.flatnonzero(model.adata.obs["group"] == "a")
    expected = model.differential_expression(idx1=places, silent=True)
    for cells in (places.tolist(), (model.adata.obs["group"] == "a").to_numpy(), "group == 'a'"):
        pd.testing.assert_frame_equal(model.differential_expression(idx1=cells, silent=True), expected)


#: Methods that take ``indices``, called as a user would.
READS = sorted(
    name
    for name in dir(svt.SCVAE)
    if name.startswith(("get_", "iter_", "predict", "posterior_"))
    and name not in ("get_importance_weights", "get_latent_library_size")
    and "indices" in getattr(getattr(svt.SCVAE, name), "__annotations__", {})
)


@pytest.mark.parametrize("indices", [[], np.array([]), np.zeros(60, dtype=bool)], ids=["list", "array", "mask"])
@pytest.mark.parametrize("name", READS)
def test_no_cells_are_refused_by_every_method(model, name, indices):
    assert len(READS) >= 13
    method = getattr(model, name)
    if name == "predict":
        svt.SCVAE.setup_anndata(model.adata)
        mixture = svt.SCVAE(model.adata, n_components=1, n_hidden=4, n_latent=2)
        mixture.module.is_mixture = mixture.is_trained_ = True
        method = mixture.predict
    with pytest.raises(ValueError, match="`indices` must choose at least one cell; found none"):
        list(method(indices=indices))


def test_a_sample_that_there_is_not_is_said(model):
    with pytest.raises(
        ValueError, match=r"`sample_key` must name a column of adata\.obs; found 'gruop'.*Did you mean 'group'"
    ):
        model.differential_abundance(sample_key="gruop")


def test_a_gene_whose_name_others_have_is_said():
    adata = svt.datasets.simulate(60, 10, 2, random_state=0)
    adata.var_names = ["twice", "twice", *adata.var_names[2:]]
    model = svt.tl.scvae(adata, mixture=False, n_hidden=4, max_epochs=2, progress=False, return_model=True)
    expected = model.get_lambda()
    np.testing.assert_allclose(
        model.get_lambda(gene_list=["gene4", "gene2", "gene4"]), expected[:, [4, 2, 4]], rtol=1e-5
    )
    for argument, call in {
        "gene_list": lambda: model.get_lambda(gene_list=["gene4", "twice"]),
        "genes": lambda: svt.tl.ppc(adata, model, genes=["twice"]),
    }.items():
        with pytest.raises(ValueError, match=f"`{argument}` must name one gene each; found 'twice', .* of 2 genes"):
            call()
