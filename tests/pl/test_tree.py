"""The tree of clusters."""

from __future__ import annotations

import numpy as np
import pytest
from matplotlib import pyplot as plt
from matplotlib.colors import to_hex
from pictures import round_trip, texts_that_overlap
from trees import by_size, make_nested

import scvae_tools as svt
from scvae_tools import pl
from scvae_tools._results.tree import Tree


@pytest.fixture(scope="module")
def built():
    adata = make_nested(300)
    svt.tl.tree(adata)
    return adata


@pytest.fixture
def adata(built):
    return built.copy()


def make_many(n_components, *, n_cells=1500, seed=0):
    """Many components in a plane, of which some are close."""
    places = np.random.default_rng(seed).normal(size=(n_components, 3)) * [12.0, 12.0, 0.0]
    adata = make_nested(n_cells, groups=places, seed=seed)
    svt.tl.tree(adata, max_depth=0)
    return adata


def end_texts(ax):
    return [text.get_text() for text in ax.get_yticklabels()]


def branches(ax):
    """Horizontal lines: from, to, height, colour and width of each."""
    lines = [line for line in ax.lines if len(line.get_xdata()) == 2 and np.ptp(line.get_ydata()) == 0]
    return [(*line.get_xdata(), line.get_ydata()[0], to_hex(line.get_color()), line.get_linewidth()) for line in lines]


def points(ax):
    found = [line for line in ax.lines if len(line.get_xdata()) == 1]
    return {(line.get_xdata()[0], line.get_ydata()[0]): to_hex(line.get_color()) for line in found}


def test_ends_are_named_with_their_numbers_of_cells(adata):
    sizes = adata.obs["scvae"].value_counts()
    assert end_texts(pl.tree(adata)) == [f"{name}  ({sizes[name]})" for name in ("0", "1", "2")]


def test_above_a_number_there_are_so_many_branches():
    adata = make_many(8)
    ax = pl.tree(adata)
    assert ax.get_xlabel().startswith("number of clusters\n")
    for n in range(1, 9):
        assert sum(start < n < end for start, end, *_ in branches(ax)) == n


def test_the_width_of_a_branch_stands_for_its_cells(adata):
    nodes = Tree.read(adata, "scvae_tree").nodes
    widths = sorted(width for *_, width in branches(pl.tree(adata)))
    expected = 1 + 5 * np.sqrt(nodes["n_cells"].to_numpy()[:5] / adata.n_obs)
    np.testing.assert_allclose(widths, np.sort(expected))


def test_overlaps_stand_at_the_splits(adata):
    adata.uns["scvae_tree"]["nodes"].loc[["0", "1"], "overlap"] = [0.0001, 0.1234]
    ax = pl.tree(adata)
    assert {text.get_text() for text in ax.texts} == {"<.001", "0.123"}
    assert "overlap of its parts, nats per cell of the smaller" in ax.get_xlabel()


def test_p_values_stand_there_where_splits_were_tested(adata):
    svt.tl.tree(adata, max_depth=0, test=by_size)
    ax = pl.tree(adata)
    nodes = Tree.read(adata, "scvae_tree").nodes
    expected = [f"{value:.3f}".rstrip("0") for value in nodes["p_value"].dropna()]
    assert sorted(text.get_text() for text in ax.texts) == sorted(expected)
    assert "p value" in ax.get_xlabel()
    assert "overlap" in pl.tree(adata, values="overlap").get_xlabel()


def test_the_latest_cut_is_marked_in_its_colours(adata):
    svt.tl.cut(adata, n_clusters=2)
    ax = pl.tree(adata)
    assert ax.get_title(loc="left") == "scvae_cut: 2 clusters (n_clusters=2)"
    colours = list(adata.uns["scvae_cut_colors"])
    assert points(ax) == {(1.5, 0.5): colours[0], (1.5, 2.0): colours[1]}
    grey = [line for line in branches(ax) if line[3] not in colours]
    assert [line[:3] for line in grey] == [(0.5, 1.5, 1.25)]  # all cells, above the cut
    assert len([line for line in branches(ax) if line[3] == colours[0]]) == 3  # 0+1, 0 and 1


def test_any_cut_can_be_marked_and_without_one_the_components_are(adata):
    assert pl.tree(adata).get_title(loc="left") == "3 components"
    assert len(points(pl.tree(adata))) == 3
    svt.tl.cut(adata, n_clusters=2)
    svt.tl.cut(adata, below="1")
    assert pl.tree(adata).get_title(loc="left") == "scvae_R: 4 clusters (below=1)"
    assert pl.tree(adata, cut="scvae_cut").get_title(loc="left").startswith("scvae_cut: 2 clusters")


def test_parts_are_drawn_where_the_cut_splits_or_where_asked_for(adata):
    assert len(end_texts(pl.tree(adata))) == 3
    svt.tl.cut(adata, below="1")
    ax = pl.tree(adata)
    assert [text.split("  ")[0] for text in end_texts(ax)] == ["0", "1,0", "1,1", "2"]
    every = [text.split("  ")[0] for text in end_texts(pl.tree(adata, parts=True))]
    assert every == adata.obs["scvae_tree"].cat.categories.tolist()


def test_splits_that_leave_out_some_are_not_counted(adata):
    tree = Tree.read(adata, "scvae_tree")
    last = [node for node in tree.splits if node in tree.components][-1]
    svt.tl.cut(adata, below=tree.names[last])
    ax = pl.tree(adata)
    assert ax.get_xlabel().startswith("splits, in order")
    assert len(ax.get_xticks()) == 0


def ranking(names=("0", "1")):
    genes = [np.array([f"{name}a", f"{name}b", f"{name}c", f"{name}d"], dtype=object) for name in names]
    return {"names": np.rec.fromarrays(genes, names=list(names))}


def test_markers_stand_beside_their_components(adata):
    adata.uns["rank_components"] = ranking()
    assert [text.partition(")  ")[2] for text in end_texts(pl.tree(adata))] == ["0a 0b 0c", "1a 1b 1c", ""]
    assert [text.partition(")  ")[2] for text in end_texts(pl.tree(adata, n_markers=1))] == ["0a", "1a", ""]
    adata.uns["other"] = ranking(["2"])
    assert end_texts(pl.tree(adata, markers="other"))[2].endswith("2a 2b 2c")


@pytest.mark.parametrize("n_components", [2, 8, 25])
def test_all_names_have_room_and_numbers_do_not_overlap(n_components):
    adata = make_many(n_components)
    ax = pl.tree(adata)
    assert len(end_texts(ax)) == n_components
    assert len(ax.texts) == n_components - 1
    assert texts_that_overlap(ax.figure) == []
    plt.close("all")
    svt.tl.cut(adata, n_clusters=max(2, n_components // 2))
    assert texts_that_overlap(pl.tree(adata).figure) == []


def test_a_tree_of_one_component_is_drawn():
    adata = make_nested(60, groups=np.zeros((1, 3)))
    svt.tl.tree(adata, max_depth=0)
    ax = pl.tree(adata)
    assert ax.get_title(loc="left") == "1 component"
    assert end_texts(ax) == ["0  (60)"]


def test_a_tree_after_h5ad_looks_the_same(adata, tmp_path):
    svt.tl.cut(adata, n_clusters=4)
    before, after = pl.tree(adata), pl.tree(round_trip(adata, tmp_path))
    assert branches(before) == branches(after)
    assert points(before) == points(after)
    assert end_texts(before) == end_texts(after)
    assert before.get_title(loc="left") == after.get_title(loc="left")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"key": "other"}, r"no tree of clusters in adata\.uns\['other'\]; trees are under \['scvae_tree'\]"),
        ({"cut": "other"}, r"must be the key of a cut .*found 'other'\. Run svt\.tl\.cut"),
        ({"values": "size"}, "`values` must be one of None, 'overlap', 'p_value'; found 'size'"),
        ({"values": "p_value"}, r"found no p values\. Run svt\.tl\.tree\(adata, test="),
        ({"markers": "other"}, r"no result|there is none in adata\.uns\['other'\]"),
        ({"n_markers": -1}, "`n_markers` must be a whole number of at least 0"),
    ],
    ids=str,
)
def test_what_cannot_be_drawn_is_an_error(adata, options, message):
    with pytest.raises(ValueError, match=message):
        pl.tree(adata, **options)
    assert plt.get_fignums() == []


def test_a_cut_of_a_former_tree_is_refused(adata):
    svt.tl.cut(adata, below="1", n_clusters=3)
    svt.tl.tree(adata, max_depth=1)
    assert pl.tree(adata).get_title(loc="left") == "3 components"
    with pytest.raises(ValueError, match=r"found 'scvae_R', which is of another\. Run svt\.tl\.cut again"):
        pl.tree(adata, cut="scvae_R")
