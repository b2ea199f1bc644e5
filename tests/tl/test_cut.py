"""Cuts of a tree: other resolutions of one mixture, which nest."""

from __future__ import annotations

import itertools

import anndata as ad
import numpy as np
import pandas as pd
import pytest
from sklearn.metrics import adjusted_rand_score
from trees import are_nested, by_size, make_nested, snapshot, with_components

import scvae_tools as svt
from scvae_tools._results.tree import Tree


@pytest.fixture(scope="module")
def original():
    adata = make_nested()
    svt.tl.tree(adata, test=by_size)
    return adata


@pytest.fixture
def adata(original):
    return original.copy()


@pytest.fixture(scope="module")
def overlapping():
    """Seven components that share many cells, all of which the tree cuts in parts."""
    rng = np.random.default_rng(4)
    centres = rng.normal(size=(7, 4)) * 1.3
    latent = centres[rng.integers(7, size=900)] + rng.normal(size=(900, 4))
    adata = with_components(latent, -((latent[:, None] - centres) ** 2).sum(2) / 2)
    svt.tl.tree(adata, test=by_size)
    return adata


def cut(adata, **options):
    svt.tl.cut(adata, **options, key_added="cut")
    return adata.obs["cut"], adata.obsm["cut_probs"]


def every_cut(adata):
    """Cuts by each argument, by what they were asked for."""
    tree = Tree.read(adata, "scvae_tree")
    options = [{"n_clusters": n + 1} for n in range(len(tree.splits) + 1)]
    options += [{"max_overlap": value} for value in (1e-6, 0.01, 0.05, 0.15, 0.3, 0.5, 2.0)]
    options += [{"alpha": value} for value in (0.001, 0.01, 0.05, 0.5, 1.0)]
    below = [tree.names[node] for node in tree.splits if tree.is_below[node] or node in tree.components]
    options += [{"below": name} for name in below]
    options += [{"below": name, "max_overlap": 0.2} for name in below] + [
        {"below": name, "alpha": 1.0} for name in below
    ]
    return {str(each): cut(adata, **each) for each in options}


# -- nesting -----------------------------------------------------------------------------------------------------------


def test_clusters_of_any_two_cuts_are_within_each_other_or_apart(overlapping):
    cuts = every_cut(overlapping.copy())
    assert len(cuts) > 60
    assert len({tuple(label) for label, _ in cuts.values()}) > 30
    for (one, (label, _)), (other, (label_too, _)) in itertools.combinations(cuts.items(), 2):
        assert are_nested(label, label_too), (one, other)


def test_that_test_finds_what_is_not_nested():
    assert not are_nested(pd.Series([0, 0, 1, 1]), pd.Series([0, 1, 1, 2]))
    assert are_nested(pd.Series([0, 0, 1, 1]), pd.Series([0, 3, 1, 1]))


def test_each_further_cluster_splits_one_and_probabilities_add_up(overlapping):
    adata = overlapping.copy()
    n_leaves = adata.obs["scvae_tree"].nunique()
    label, probs = cut(adata, n_clusters=1)
    for n in range(2, n_leaves + 1):
        finer, finer_probs = cut(adata, n_clusters=n)
        assert finer.nunique() == n == finer_probs.shape[1]
        table = pd.crosstab(finer, label).to_numpy() > 0
        assert (table.sum(1) == 1).all()
        summed = finer_probs.astype(float) @ table[:, :]
        np.testing.assert_allclose(summed, probs, atol=1e-6)
        label, probs = finer, finer_probs


def test_a_larger_overlap_or_level_never_gives_fewer_clusters(overlapping):
    adata = overlapping.copy()
    for name, values in (("max_overlap", (0.01, 0.1, 0.3, 1.0)), ("alpha", (0.001, 0.05, 0.3, 1.0))):
        numbers = [cut(adata, **{name: value})[0].nunique() for value in values]
        assert numbers == sorted(numbers)
        assert numbers[0] < numbers[-1]


# -- what is written ---------------------------------------------------------------------------------------------------


def test_as_many_clusters_as_components_are_the_components(adata):
    label, probs = cut(adata, n_clusters=3)
    pd.testing.assert_series_equal(label, adata.obs["scvae"], check_names=False)
    np.testing.assert_array_equal(probs, adata.obsm["scvae_probs"])


def test_merged_components_have_the_sum_of_their_probabilities(adata):
    label, probs = cut(adata, n_clusters=2)
    assert label.cat.categories.tolist() == ["0+1", "2"]
    of_components = adata.obsm["scvae_probs"].astype(float)
    np.testing.assert_allclose(probs, np.column_stack([of_components[:, :2].sum(1), of_components[:, 2]]), rtol=1e-6)
    assert ((label == "2") == (adata.obs["scvae"] == "2")).all()


def test_parts_have_the_probability_of_the_component_times_their_own(adata):
    _, probs = cut(adata, below="1")
    stored, latent = adata.uns["scvae_tree"], adata.obsm["X_scvae"].astype(float)
    node = stored["nodes"]["name"].tolist().index("1")
    odds = np.exp(latent @ stored["direction"][node] + stored["offset"][node])
    whole = adata.obsm["scvae_probs"][:, 1]
    expected = np.column_stack([whole / (1 + odds), whole * odds / (1 + odds)])
    np.testing.assert_allclose(probs[:, 1:3], expected, rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(probs.sum(1), 1, atol=1e-5)


def test_one_component_is_split_and_the_others_stay(adata):
    svt.tl.cut(adata, below="1")
    label = adata.obs["scvae_R"]
    assert label.cat.categories.tolist() == ["0", "1,0", "1,1", "2"]
    is_one = adata.obs["scvae"] == "1"
    assert (label[~is_one].astype(str) == adata.obs["scvae"][~is_one].astype(str)).all()
    assert adjusted_rand_score(adata.obs["half"][is_one], label[is_one]) > 0.99
    svt.tl.cut(adata, below="1,0", key_added="finer")
    assert adata.obs["finer"].cat.categories.tolist() == ["0", "1,0,0", "1,0,1", "1,1", "2"]


def test_one_component_is_split_as_scanpy_names_it(adata):
    """The names of scanpy's leiden with ``restrict_to``, for the same parts."""
    from scanpy.tools._utils_clustering import rename_groups

    svt.tl.cut(adata, below="1")
    is_one = (adata.obs["scvae"] == "1").to_numpy()
    parts = adata.obs["scvae_R"][is_one].astype(str).str[-1].to_numpy()
    options = {"restrict_categories": ["1"], "restrict_indices": is_one, "groups": parts}
    expected = rename_groups(adata, "scvae", key_added=None, **options)
    assert (expected.to_numpy() == adata.obs["scvae_R"].astype(str).to_numpy()).all()


def test_one_component_is_split_as_far_as_an_argument_says(adata):
    assert cut(adata, below="1", n_clusters=1)[0].nunique() == 3
    assert cut(adata, below="1", n_clusters=4)[0].nunique() == 6
    assert cut(adata, below="1", max_overlap=0.05)[0].cat.categories.tolist() == ["0", "1,0", "1,1", "2"]


def test_the_overlap_is_that_of_the_clusters_that_are_left(overlapping):
    """Above the components: no two clusters of the cut overlap by as much, and two of the next finer one do."""
    adata = overlapping.copy()
    largest = {}
    for n in range(2, 8):
        _, probs = cut(adata, n_clusters=n)
        each = probs.astype(float)
        pairs = itertools.combinations(range(n), 2)
        largest[n] = max(_overlap(each[:, i], each[:, j]) for i, j in pairs)
    for value in (0.05, 0.1, 0.15, 0.2, 0.25):
        n = cut(adata, max_overlap=value)[0].nunique()
        assert n == 1 or n > 7 or largest[n] < value
        assert all(largest[finer] >= value for finer in range(n + 1, 8))


def _overlap(one, other):
    lost = sum(
        sign * np.where(p > 0, p * np.log(np.maximum(p, 1e-300)), 0)
        for sign, p in ((1, one + other), (-1, one), (-1, other))
    )
    return lost.sum() / min(one.sum(), other.sum())


def test_a_split_needs_a_p_value_by_its_share_of_the_cells():
    """By hand: 600 cells; the split of all has p = 0.01, that of 0+1 p = 0.02, all others 0.04."""
    adata = make_nested()
    sizes = adata.obs["scvae"].value_counts()
    p_values = {600: 0.01, sizes["0"] + sizes["1"]: 0.02}
    svt.tl.tree(adata, max_depth=1, test=lambda first, second: p_values.get(len(first) + len(second), 0.04))
    share = (sizes["0"] + sizes["1"] - 1) / 599
    assert cut(adata, alpha=0.009)[0].nunique() == 1
    assert cut(adata, alpha=0.01)[0].nunique() == 2
    assert cut(adata, alpha=0.02 / share - 1e-9)[0].nunique() == 2
    assert cut(adata, alpha=0.02 / share + 1e-9)[0].nunique() == 3
    assert cut(adata, alpha=1.0)[0].nunique() == 6
    assert cut(adata, alpha=0.04, below="1")[0].cat.categories.tolist() == ["0", "1,0", "1,1", "2"]
    assert cut(adata, alpha=0.039, below="1")[0].cat.categories.tolist() == ["0", "1", "2"]


def test_no_cluster_is_split_below_one_that_is_not():
    adata = make_nested()
    svt.tl.tree(adata, max_depth=1, test=lambda first, second: float(len(first) + len(second) == 600))
    assert cut(adata, alpha=0.5)[0].nunique() == 1


def test_colours_are_those_of_the_components_and_shades_of_them(adata):
    adata.uns["scvae_colors"] = np.array(["#ff0000", "#00ff00", "#0000ff"])
    svt.tl.cut(adata, n_clusters=2)
    assert list(adata.uns["scvae_cut_colors"]) == ["#ff0000", "#0000ff"]  # of the larger of 0 and 1
    svt.tl.cut(adata, below="1")
    colours = list(adata.uns["scvae_R_colors"])
    assert colours[::3] == ["#ff0000", "#0000ff"]
    assert len(set(colours)) == 4
    for shade in colours[1:3]:
        red, green, blue = (int(shade[i : i + 2], 16) for i in (1, 3, 5))
        assert red == blue < green


def test_keys_are_named_after_those_of_the_components():
    adata = make_nested(key="mine")
    svt.tl.tree(adata, key="mine", key_added="a tree", max_depth=1)
    svt.tl.cut(adata, n_clusters=2, tree_key="a tree")
    svt.tl.cut(adata, below="0", tree_key="a tree")
    assert {"mine_cut", "mine_R"} <= set(adata.obs)
    assert {"mine_cut_probs", "mine_R_probs"} <= set(adata.obsm)
    assert {"mine_cut", "mine_R", "mine_cut_colors", "mine_R_colors"} <= set(adata.uns)
    assert adata.uns["a tree"]["cut"] == "mine_R"


def test_other_tools_read_a_cut_by_its_name(overlapping):
    """Also where a few cells are not in the cluster of the largest sum of probabilities."""
    adata = overlapping.copy()
    differ = 0
    for n in range(2, 12):
        label, probs = cut(adata, n_clusters=n)
        differ += (probs.argmax(1) != label.cat.codes).sum()
        found = svt.tl.ambiguous_cells(adata, key="cut", threshold=1.0)
        assert found["first"].cat.categories.tolist() == label.cat.categories.tolist()
        svt.pl.ambiguous(adata, key="cut")
    assert differ > 0


def test_a_cut_of_a_file_is_the_same(original, adata, tmp_path):
    svt.tl.cut(adata, n_clusters=5)
    adata.write_h5ad(tmp_path / "cells.h5ad")
    read = ad.read_h5ad(tmp_path / "cells.h5ad")
    svt.tl.cut(read, n_clusters=5, key_added="again")
    pd.testing.assert_series_equal(read.obs["again"], adata.obs["scvae_cut"], check_names=False)
    np.testing.assert_array_equal(read.obsm["again_probs"], adata.obsm["scvae_cut_probs"])
    assert list(read.uns["again_colors"]) == list(adata.uns["scvae_cut_colors"])
    assert read.uns["scvae_cut"]["clusters"].tolist() == adata.uns["scvae_cut"]["clusters"].tolist()


def test_a_cut_of_some_cells_is_that_of_all(adata):
    whole, probs = cut(adata, n_clusters=5)
    some = adata[::3].copy()
    label, of_some = cut(some, n_clusters=5)
    assert (label.astype(str) == whole[::3].astype(str)).all()
    np.testing.assert_allclose(of_some, probs[::3], rtol=1e-5, atol=1e-7)


def test_parts_of_cells_at_a_time_give_the_same(adata, monkeypatch):
    from scvae_tools._results import tree

    label, probs = cut(adata, n_clusters=7)
    monkeypatch.setattr(tree, "CELLS_AT_ONCE", 37)
    again, of_parts = cut(adata, n_clusters=7)
    pd.testing.assert_series_equal(label, again)
    np.testing.assert_allclose(of_parts, probs, rtol=1e-6, atol=1e-9)


# -- errors ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, r"by one of `n_clusters`, .*; found none of them"),
        ({"n_clusters": 2, "alpha": 0.1}, r"found n_clusters=2, alpha=0\.1"),
        ({"n_clusters": 999}, r"`n_clusters` must be at most \d+, .*, 3 components and their parts; found 999"),
        ({"n_clusters": 99, "below": "1"}, r"at most 4, the number of ends of the tree of '1'; found 99"),
        ({"n_clusters": 0}, "`n_clusters` must be a whole number of at least 1"),
        ({"max_overlap": 0}, "`max_overlap` must be a finite number above 0"),
        ({"alpha": 1.1}, r"`alpha` must be in \(0, 1\]"),
        ({"below": "x"}, "must be a node 'x' in the tree; .* components are"),
        ({"below": "0+1"}, r"must name a component, .*found '0\+1', several components\. Pass one of '0', '1'"),
        ({"below": "1,0,0"}, r"found '1,0,0' with \d+ cells, .*max_depth=2 and min_cells=20"),
        (
            {"n_clusters": 2, "tree_key": "y"},
            r"no tree of clusters in adata\.uns\['y'\]; trees are under \['scvae_tree'\]",
        ),
        ({"n_clusters": 2, "key_added": "scvae"}, "must not be the name of another result"),
        ({"n_clusters": 2, "key_added": "scvae_tree"}, "must not be the name of another result"),
        ({"n_clusters": 2, "key_added": "neighbors"}, "must not be the name of another result"),
        ({"n_clusters": 2, "key_added": "a/b"}, "`key_added` must be a text without a slash"),
    ],
    ids=str,
)
def test_what_cannot_be_is_an_error_that_changes_nothing(adata, options, message):
    adata.uns["neighbors"] = {"params": {}}
    before = snapshot(adata)
    with pytest.raises(ValueError, match=message):
        svt.tl.cut(adata, **options)
    assert snapshot(adata) == before


def test_without_a_tree_the_error_says_how_to_get_one():
    with pytest.raises(
        ValueError, match=r"adata holds no tree. Run svt\.tl\.tree\(adata, key_added='scvae_tree'\) first\."
    ):
        svt.tl.cut(make_nested(50), n_clusters=2)


def test_a_tree_without_p_values_has_no_level():
    adata = make_nested()
    svt.tl.tree(adata, max_depth=0)
    with pytest.raises(ValueError, match=r"`alpha` needs a tree whose splits have p values; found none"):
        svt.tl.cut(adata, alpha=0.05)


@pytest.mark.parametrize(
    "change",
    [
        lambda a: a.obsm.update({"scvae_probs": a.obsm["scvae_probs"][:, ::-1].copy()}),
        lambda a: a.obsm.update({"scvae_probs": np.full((a.n_obs, 2), 0.5, np.float32)}),
        lambda a: a.obsm.update({"X_scvae": a.obsm["X_scvae"][:, :2]}),
        lambda a: a.obs.pop("scvae_tree"),
        lambda a: a.obs.insert(0, "x", 0),
    ],
    ids=["other probabilities", "fewer components", "fewer dimensions", "no column", "other column"],
)
def test_a_tree_of_other_results_is_refused(adata, change):
    change(adata)
    if "x" in adata.obs:
        adata.obs["scvae_tree"] = pd.Categorical(["x"] * adata.n_obs)
    before = snapshot(adata)
    with pytest.raises(ValueError, match=r"Run svt\.tl\.tree\(adata, key='scvae', key_added='scvae_tree'\) again"):
        svt.tl.cut(adata, n_clusters=2)
    assert snapshot(adata) == before
