"""Tree of clusters: what is built, from cells whose hierarchy is known."""

from __future__ import annotations

import random

import anndata as ad
import numpy as np
import pandas as pd
import pytest
from scipy.cluster import hierarchy
from scipy.spatial.distance import squareform
from scipy.special import xlogy
from sklearn.metrics import adjusted_rand_score
from trees import GROUPS, by_size, make_nested, snapshot, with_components

import scvae_tools as svt
from scvae_tools._results.tree import Tree

FIT = {"n_components": 3, "n_latent": 3, "n_hidden": 8, "max_epochs": 4, "progress": False}


@pytest.fixture(scope="module")
def built():
    adata = make_nested()
    svt.tl.tree(adata, test=by_size)
    return adata


def nodes_of(adata, key="scvae_tree"):
    return adata.uns[key]["nodes"]


def row(adata, name):
    nodes = nodes_of(adata)
    return nodes[nodes["name"] == name].iloc[0]


def overlap_of(one, other):
    """Entropy that is lost by merging, in nats per cell of the smaller, by the definition."""
    lost = xlogy(one + other, one + other) - xlogy(one, one) - xlogy(other, other)
    return lost.sum() / min(one.sum(), other.sum())


# -- above the components ----------------------------------------------------------------------------------------------


def test_the_closest_groups_are_merged_first(built):
    nodes = nodes_of(built)
    assert nodes["name"][:5].tolist() == ["0+1+2", "0+1", "2", "0", "1"]
    assert nodes["is_component"][:5].tolist() == [False, False, True, True, True]
    assert nodes["n_clusters"][:2].tolist() == [2, 3]


def test_overlaps_of_components_are_those_by_the_definition():
    adata = make_nested(groups=GROUPS / 4)
    svt.tl.tree(adata, max_depth=0)
    probs = adata.obsm["scvae_probs"].astype(float)
    assert row(adata, "0+1")["overlap"] == pytest.approx(overlap_of(probs[:, 0], probs[:, 1]))
    assert row(adata, "0+1+2")["overlap"] == pytest.approx(overlap_of(probs[:, 0] + probs[:, 1], probs[:, 2]))


def test_groups_of_groups_are_merged_as_scipy_links_them():
    """Eight groups, two by two at three distances, which the overlaps tell apart: any linkage gives that tree."""
    places = np.array([[a, b, c] for a in (0, 30) for b in (0, 10) for c in (0, 3.0)])
    rng = np.random.default_rng(0)
    group = np.arange(1600) % 8
    latent = places[group] + rng.normal(size=(1600, 3))
    log_joint = -((latent[:, None] - places) ** 2).sum(2) / 2 / 4  # wide enough for the overlaps to differ from 0
    adata = with_components(latent, log_joint)
    svt.tl.tree(adata, max_depth=0)
    linkage = hierarchy.linkage(squareform(np.linalg.norm(places[:, None] - places, axis=2)), "average")
    tree = Tree.read(adata, "scvae_tree")
    for n in (2, 4, 8):  # numbers at which no two pairs are equally far apart
        expected = hierarchy.fcluster(linkage, n, "maxclust")
        clusters = tree.clusters(tree.split_to_number(n))
        found = np.empty(8, dtype=int)
        for place, cluster in enumerate(clusters):
            found[[int(tree.names[each]) for each in tree.components_of(cluster)]] = place
        assert adjusted_rand_score(expected, found) == 1


def test_components_that_are_no_cells_most_probable_one_are_no_nodes():
    adata = make_nested()
    probs = adata.obsm["scvae_probs"]
    extra = 0.2 * probs[:, [1]]
    adata.obsm["scvae_probs"] = np.hstack([probs - extra * np.eye(3)[1], extra]).astype(np.float32)
    svt.tl.tree(adata, max_depth=0)
    assert set(nodes_of(adata)["name"]) == {"0+1+2", "0+1", "0", "1", "2"}
    nodes = adata.uns["scvae_tree"]["component_nodes"]
    assert nodes[3] == nodes[1]
    svt.tl.cut(adata, n_clusters=3)
    np.testing.assert_allclose(adata.obsm["scvae_cut_probs"], probs, atol=1e-6)


def test_one_component_is_the_root():
    adata = make_nested(200, groups=GROUPS[:1])
    svt.tl.tree(adata, max_depth=1)
    assert nodes_of(adata)["name"].tolist() == ["0", "0,0", "0,1"]
    assert adjusted_rand_score(adata.obs["half"], adata.obs["scvae_tree"]) > 0.95
    svt.tl.tree(adata, max_depth=0)
    assert nodes_of(adata)["name"].tolist() == ["0"]


# -- below the components ----------------------------------------------------------------------------------------------


def test_the_halves_of_components_are_found(built):
    svt.tl.cut(built, n_clusters=6, key_added="six")
    truth = built.obs["group"].astype(str) + built.obs["half"].astype(str)
    assert adjusted_rand_score(truth, built.obs["six"]) > 0.99
    assert set(built.obs["six"].cat.categories) == {"0,0", "0,1", "1,0", "1,1", "2,0", "2,1"}
    # True halves overlap less than what is no more than cut in two.
    nodes = nodes_of(built)
    is_split = nodes["overlap"].notna()
    of_halves = nodes[is_split & nodes["is_component"]]["overlap"]
    of_parts = nodes[is_split & nodes["name"].str.contains(",")]["overlap"]
    assert of_halves.max() < 0.01 < 0.1 < of_parts.min()


def test_overlaps_of_parts_are_those_by_the_definition():
    groups = np.array([[0.0, 0.0, 0.0], [2.0, 0.0, 0.0]])
    adata = make_nested(groups=groups)
    svt.tl.tree(adata)
    tree = Tree.read(adata, "scvae_tree")
    probs, latent = (adata.obsm[name].astype(float) for name in ("scvae_probs", "X_scvae"))
    for node in [node for node in tree.splits if tree.is_below[node] or node in tree.components]:
        component = tree.component_nodes.tolist().index(tree.components_of(node)[0])
        parts = [probs[:, component] * tree.share(child, latent) for child in tree.children[node]]
        assert tree.nodes["overlap"].iloc[node] == pytest.approx(overlap_of(*parts), rel=1e-6)


def test_the_first_part_is_the_larger_one_and_none_is_too_small(built):
    nodes = nodes_of(built)
    parts = nodes[nodes["name"].str.contains(",")]
    assert parts["n_cells"].min() >= 20
    for parent in nodes[nodes["is_component"] & (nodes["first"] >= 0)].itertuples():
        assert nodes["n_cells"].iloc[parent.first] >= nodes["n_cells"].iloc[parent.second]


@pytest.mark.parametrize(
    ("options", "n_leaves"), [({"max_depth": 0}, 3), ({"max_depth": 1}, 6), ({"min_cells": 301}, 3)]
)
def test_depth_and_size_are_limited(options, n_leaves):
    adata = make_nested()
    svt.tl.tree(adata, **options)
    assert adata.obs["scvae_tree"].nunique() == n_leaves == Tree.read(adata, "scvae_tree").nodes["first"].eq(-1).sum()


def test_the_table_is_a_tree_whose_numbers_add_up(built):
    nodes = nodes_of(built)
    assert nodes.index.tolist() == [str(i) for i in range(len(nodes))]
    is_split = nodes["first"] >= 0
    assert (is_split == nodes["overlap"].notna()).all()
    assert sorted(nodes["n_clusters"][is_split]) == list(range(2, is_split.sum() + 2))
    assert nodes["n_cells"].iloc[0] == built.n_obs
    for number, node in enumerate(nodes.itertuples()):
        for child in (node.first, node.second) if node.first >= 0 else ():
            assert nodes["parent"].iloc[child] == number
        if node.first >= 0:
            assert node.n_cells == nodes["n_cells"].iloc[[node.first, node.second]].sum()
            assert node.parent < 0 or node.n_clusters > nodes["n_clusters"].iloc[node.parent]
    leaves = nodes[~is_split].set_index("name")["n_cells"]
    assert leaves.to_dict() == built.obs["scvae_tree"].value_counts().to_dict()


# -- tests of splits ---------------------------------------------------------------------------------------------------


def test_a_test_is_given_the_cells_of_both_children():
    adata, given = make_nested(), []

    def test(first, second):
        given.append((first, second))
        return by_size(first, second)

    svt.tl.tree(adata, test=test)
    tree = Tree.read(adata, "scvae_tree")
    assert len(given) == len(tree.splits)
    leaf = adata.obs["scvae_tree"].astype(str).to_numpy()
    for node, cells in zip(tree.splits, given, strict=True):
        for child, positions in zip(tree.children[node], cells, strict=True):
            names = [tree.names[each] for each in tree.leaves_of(child)]
            np.testing.assert_array_equal(positions, np.flatnonzero(np.isin(leaf, names)))
        assert tree.nodes["p_value"].iloc[node] == by_size(*cells)


def test_without_a_test_p_values_are_the_largest_of_components_on_both_sides():
    adata = make_nested()
    p_values = np.array([[1, 0.2, 0.004], [0.2, 1, 0.03], [0.004, 0.03, 1]])
    adata.uns["scvae"] = {"components": {"valley_p_values": p_values}}
    svt.tl.tree(adata)
    assert row(adata, "0+1")["p_value"] == 0.2
    assert nodes_of(adata)["p_value"].iloc[0] == 0.03  # of 1 and 2; 0 and 2 have a smaller one
    assert nodes_of(adata)["p_value"].notna().sum() == 2  # parts of components were not found so
    svt.tl.cut(adata, alpha=0.05)
    assert adata.obs["scvae_cut"].cat.categories.tolist() == ["0+1", "2"]
    svt.tl.tree(adata, test=by_size)
    assert row(adata, "0+1")["p_value"] != 0.2


@pytest.mark.parametrize("stored", [None, {"components": None}, {"components": {"valley_p_values": np.ones((2, 2))}}])
def test_results_without_p_values_of_their_components_have_a_tree_without(stored):
    adata = make_nested()
    adata.uns["scvae"] = stored
    svt.tl.tree(adata)
    assert nodes_of(adata)["p_value"].isna().all()


def test_halves_of_a_type_have_no_valley_and_types_do(tmp_path):
    adata = svt.datasets.simulate(900, 60, 3, separation=2.0, random_state=1)
    options = {"n_latent": 3, "n_hidden": 32, "max_epochs": 30, "progress": False}
    model = svt.tl.scvae(adata, n_components=4, **options, return_model=True)
    p_values = adata.uns["scvae"]["components"]["valley_p_values"]
    types = pd.crosstab(adata.obs["scvae"], adata.obs["component"]).to_numpy().argmax(1)
    assert sorted(np.bincount(types)) == [1, 1, 2]
    is_one_type = types[:, None] == types
    assert (p_values[is_one_type] > 0.05).all()
    assert (p_values[~is_one_type] < 0.001).all()
    svt.tl.tree(adata)
    svt.tl.cut(adata, alpha=0.05)
    assert adjusted_rand_score(adata.obs["component"], adata.obs["scvae_cut"]) > 0.95
    model.save(tmp_path / "model")
    np.testing.assert_array_equal(svt.SCVAE.load(tmp_path / "model", adata).valley_p_values_, p_values)
    other = svt.datasets.simulate(100, 60, 3, separation=2.0, random_state=2, gene_random_state=1)
    svt.tl.predict(other, tmp_path / "model")
    np.testing.assert_array_equal(other.uns["scvae"]["components"]["valley_p_values"], p_values)


def test_a_split_without_a_p_value_has_nan():
    adata = make_nested()
    svt.tl.tree(adata, max_depth=0, test=lambda first, second: np.nan)
    assert nodes_of(adata)["p_value"].isna().all()


@pytest.mark.parametrize("value", [-0.1, 1.5, None, "0.5", np.array([0.5])], ids=repr)
def test_a_test_that_returns_no_p_value_is_refused_and_nothing_is_changed(value):
    adata = make_nested(200)
    before = snapshot(adata)
    with pytest.raises(ValueError, match=r"`test` must return a p value, .*found .* for the split of '0\+1\+2'"):
        svt.tl.tree(adata, max_depth=0, test=lambda first, second: value)
    assert snapshot(adata) == before


# -- where it is taken from, and what is left as it was ----------------------------------------------------------------


def test_a_tree_after_h5ad_is_the_same(built, tmp_path):
    built.write_h5ad(tmp_path / "cells.h5ad")
    read = ad.read_h5ad(tmp_path / "cells.h5ad")
    pd.testing.assert_frame_equal(Tree.read(read, "scvae_tree").nodes, Tree.read(built, "scvae_tree").nodes)
    svt.tl.tree(read, test=by_size, key_added="again")
    pd.testing.assert_frame_equal(nodes_of(read, "again"), nodes_of(built))


def test_the_same_seed_gives_the_same_tree_and_leaves_the_global_ones_alone():
    first, second = make_nested(), make_nested()
    states = random.getstate(), np.random.get_state()[1].copy()  # noqa: NPY002
    svt.tl.tree(first, random_state=3)
    svt.tl.tree(second, random_state=np.int64(3))
    assert states[0] == random.getstate()
    np.testing.assert_array_equal(states[1], np.random.get_state()[1])  # noqa: NPY002
    pd.testing.assert_frame_equal(nodes_of(first), nodes_of(second))
    assert first.uns["scvae_tree"]["params"]["random_state"] == 3


def test_names_are_those_that_the_components_have():
    adata = make_nested(names=["B", "T, CD4", "NK"])
    svt.tl.tree(adata, max_depth=1)
    assert {"B+T, CD4", "B+T, CD4+NK", "T, CD4,0"} <= set(nodes_of(adata)["name"])


def test_many_components_are_named_by_their_number():
    places = np.column_stack([np.arange(6) ** 2 * 4.0, np.zeros(6), np.zeros(6)])
    adata = make_nested(groups=places)
    svt.tl.tree(adata, max_depth=0)
    assert nodes_of(adata)["name"].iloc[0] == "0 and 5 more"
    assert nodes_of(adata)["name"].is_unique


def test_names_that_would_be_there_twice_are_refused():
    adata = make_nested(names=["a", "b", "a,0"])
    before = snapshot(adata)
    with pytest.raises(ValueError, match=r"found .a,0. twice\. Rename that category"):
        svt.tl.tree(adata, max_depth=1)
    assert snapshot(adata) == before


def test_a_trained_model_names_the_components_of_its_results(tmp_path):
    adata = svt.datasets.simulate(90, 12, 3, random_state=0)
    model = svt.tl.scvae(adata, **FIT, return_model=True)
    model.save(tmp_path / "model")
    for number, given in enumerate((None, model, tmp_path / "model")):
        svt.tl.tree(adata, given, key_added=f"tree{number}", min_cells=5)
    pd.testing.assert_frame_equal(nodes_of(adata, "tree0"), nodes_of(adata, "tree1"))
    pd.testing.assert_frame_equal(nodes_of(adata, "tree0"), nodes_of(adata, "tree2"))
    other = svt.tl.scvae(adata.copy(), **FIT | {"n_components": 4}, return_model=True)
    with pytest.raises(
        ValueError, match="`model` must be that of the results in adata, with 3 components; found one with 4"
    ):
        svt.tl.tree(adata, other)


@pytest.mark.parametrize(
    ("change", "options", "message"),
    [
        (lambda a: a.obsm.pop("scvae_probs"), {}, r"obsm\['scvae_probs'\] is not among"),
        (lambda a: a.obsm.pop("X_scvae"), {}, r"adata.obsm\['X_scvae'\] is not among .*svt.tl.predict"),
        (lambda a: None, {"key": "other"}, r"obsm\['other_probs'\] is not among"),
        (lambda a: None, {"key_added": "scvae"}, "`key_added` must not be the key of the results"),
        (lambda a: None, {"max_depth": -1}, "`max_depth` must be a whole number of at least 0"),
        (lambda a: None, {"min_cells": 0}, "`min_cells` must be a whole number of at least 1"),
    ],
)
def test_what_cannot_be_is_an_error_that_changes_nothing(change, options, message):
    adata = make_nested(200)
    change(adata)
    before = snapshot(adata)
    with pytest.raises(ValueError, match=message):
        svt.tl.tree(adata, **options)
    assert snapshot(adata) == before


def test_what_is_no_function_is_no_test():
    with pytest.raises(
        TypeError, match="`test` must be a function of the cells of both children, or None; found a str"
    ):
        svt.tl.tree(make_nested(200), test="t")


def test_a_subset_of_the_cells_has_a_tree_of_its_own():
    view = make_nested()[:300]
    svt.tl.tree(view, max_depth=1)
    assert nodes_of(view)["n_cells"].iloc[0] == 300
