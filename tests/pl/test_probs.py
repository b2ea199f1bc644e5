"""The probabilities of every cell."""

from __future__ import annotations

import warnings
from itertools import pairwise

import numpy as np
import pandas as pd
import pytest
from matplotlib import pyplot as plt
from matplotlib.colors import to_hex
from matplotlib.patches import StepPatch
from pictures import legend_texts, make_adata, round_trip, with_probabilities

from scvae_tools import pl

# Of component 0 with 0.9 and 0.6, of 1 with 0.7 and 0.5, of 2 with 0.8.
FEW = [[0.6, 0.1, 0.3], [0.2, 0.7, 0.1], [0.1, 0.1, 0.8], [0.9, 0.1, 0.0], [0.1, 0.5, 0.4]]
SORTED = [3, 0, 1, 4, 2]
LONG = ["natural killer cells, activated", "dendritic cells", "regulatory T", "CD14+ monocytes", "megakaryocytes"]


def few(names=None):
    return with_probabilities(make_adata(5), FEW, names)


def many(n_cells, n_components, names=None, seed=0):
    """Cells that are mostly sure, of components of ever fewer cells."""
    rng = np.random.default_rng(seed)
    share = 0.8 ** np.arange(n_components)
    component = rng.choice(n_components, n_cells, p=share / share.sum())
    alpha = np.full((n_cells, n_components), 0.05) + 6.0 * (component[:, None] == np.arange(n_components))
    values = rng.gamma(alpha) + 1e-9
    return with_probabilities(make_adata(n_cells), values / values.sum(1, keepdims=True), names)


def edges(ax):
    return next(patch.get_data().edges for patch in ax.patches if isinstance(patch, StepPatch))


def own(ax, name):
    """Height of a component's bars where it is the most probable one; NaN elsewhere."""
    return next(patch for patch in ax.patches if patch.get_label() == name).get_data().values


def colours_along(ax, x):
    """Lengths of the colours that one sees from the bottom to the top of a column, by rendering it."""
    figure = ax.figure
    figure.set_dpi(200)
    figure.canvas.draw()
    pixels = np.asarray(figure.canvas.buffer_rgba())
    left, bottom = ax.transData.transform((x, 0)).round().astype(int)
    top = round(ax.transData.transform((x, 1))[1])
    column = pixels[::-1][bottom:top, left, :3] / 255
    names, counts = np.unique([to_hex(colour) for colour in column], return_counts=True)
    return dict(zip(names, counts / len(column), strict=True))


def image(ax):
    return ax.collections[0].get_array().reshape(len(ax.collections[0].get_coordinates()) - 1, -1)


def under(ax):
    return [tick.get_text() for tick in ax.get_xticklabels()]


def lines(ax, name):
    drawn = next(drawn for drawn in ax.collections if drawn.get_label() == name)
    return [segment[0][0] for segment in drawn.get_segments()]


def ticks_that_overlap(ax):
    ax.figure.canvas.draw()
    boxes = [tick.get_window_extent() for tick in ax.get_xticklabels() if tick.get_text()]
    heights = [tick.get_window_extent() for tick in ax.get_yticklabels() if tick.get_text()]
    return [(a, b) for some in (boxes, heights) for i, a in enumerate(some) for b in some[:i] if a.overlaps(b)]


def test_cells_are_sorted_by_component_and_by_its_probability():
    ax = pl.probs(few())
    np.testing.assert_allclose(own(ax, "0")[:2], [0.9, 0.6])
    np.testing.assert_allclose(own(ax, "1")[2:4], [0.7, 0.5])
    np.testing.assert_allclose(own(ax, "2")[4:], [0.8])
    np.testing.assert_array_equal(edges(ax), np.arange(6))


def test_a_column_shows_each_colour_as_long_as_its_probability():
    adata = few()
    ax = pl.probs(adata)
    for place, cell in enumerate(SORTED):
        seen = colours_along(ax, place + 0.5)
        for colour, probability in zip(("#0072b2", "#e69f00", "#009e73"), FEW[cell], strict=True):
            assert seen.get(colour, 0) == pytest.approx(probability, abs=0.015)


def test_the_heat_map_has_the_probabilities_of_the_sorted_cells():
    ax = pl.probs(few(), kind="heatmap")
    np.testing.assert_allclose(image(ax), np.array(FEW)[SORTED].T, rtol=1e-6)
    bottom, top = ax.get_ylim()
    assert top < 0 < 2 < bottom  # the first component is on top
    assert ax.figure.axes[1].get_ylabel() == "probability"
    assert ax.collections[0].get_clim() == (0, 1)


def test_many_cells_share_columns_that_are_their_means():
    adata = many(4_321, 5)
    ax = pl.probs(adata, kind="heatmap")
    found, bounds = image(ax), ax.collections[0].get_coordinates()[0, :, 0].astype(int)
    values = pd.DataFrame(adata.obsm["scvae_probs"].astype(float))
    values["component"], values["top"] = values.to_numpy().argmax(1), values.max(axis=1)
    values = values.sort_values(["component", "top"], ascending=[True, False], kind="stable")
    assert bounds[0] == 0
    assert bounds[-1] == 4_321
    for column, (start, end) in enumerate(pairwise(bounds)):
        cells = values.iloc[start:end]
        assert cells["component"].nunique() == 1
        np.testing.assert_allclose(found[:, column], cells[list(range(5))].mean(), rtol=1e-5)


@pytest.mark.parametrize("n_cells", [10, 999, 1_001, 50_000])
def test_there_are_at_most_a_thousand_columns_and_one_for_each_component(n_cells):
    n_columns = len(edges(pl.probs(many(n_cells, 8)))) - 1
    assert n_columns <= min(n_cells, 1_000 + 8)
    assert n_columns >= min(n_cells, 500)


def test_bars_are_as_wide_as_their_cells():
    widths = np.diff(edges(pl.probs(many(12_345, 8))))
    assert widths.sum() == 12_345
    assert widths.max() == 13  # 12,345 / 1,000


def test_up_to_twenty_components_with_cells_are_bars_and_more_are_a_heat_map():
    assert len(pl.probs(with_probabilities(make_adata(40), np.tile(np.eye(20), (2, 1)))).patches) == 40
    assert len(pl.probs(with_probabilities(make_adata(42), np.tile(np.eye(21), (2, 1)))).patches) == 0
    mostly_unused = np.tile(np.eye(30)[:4], (2, 1))
    assert len(pl.probs(with_probabilities(make_adata(8), mostly_unused)).patches) == 60


def test_bars_have_the_colours_of_the_clusters():
    adata = make_adata()
    pl.clusters(adata)
    ax = pl.probs(adata)
    drawn = {patch.get_label(): to_hex(patch.get_facecolor()) for patch in ax.patches}
    assert [drawn[str(i)] for i in range(4)] == list(adata.uns["scvae_colors"])


def test_components_that_were_given_one_name_have_different_colours_all_the_same():
    adata = few()
    adata.obs["scvae"] = adata.obs["scvae"].map({"0": "T", "1": "B", "2": "T"}).astype("category")
    assert len({patch.get_facecolor() for patch in pl.probs(adata).patches}) == 3


@pytest.mark.parametrize("n_components", [2, 8, 9, 20, 21, 28, 29, 102])
def test_bars_have_the_colours_that_the_clusters_will_have(n_components):
    adata = with_probabilities(make_adata(2 * n_components), np.tile(np.eye(n_components), (2, 1)))
    ax = pl.probs(adata, kind="bars")
    drawn = {patch.get_label(): to_hex(patch.get_facecolor()) for patch in ax.patches}
    assert "scvae_colors" not in adata.uns
    pl.clusters(adata)
    stored = dict(zip(adata.obs["scvae"].cat.categories, map(to_hex, adata.uns["scvae_colors"]), strict=True))
    assert {name: drawn[name] for name in stored} == stored
    assert len(set(stored.values())) == n_components


def test_bars_of_more_components_than_colours_are_an_error_with_a_remedy_that_works():
    adata = with_probabilities(make_adata(206), np.tile(np.eye(103), (2, 1)))
    with pytest.raises(ValueError, match=r"there are 102, and 103 have cells. Pass kind='heatmap'"):
        pl.probs(adata, kind="bars")
    assert image(pl.probs(adata, kind="heatmap")).shape[0] == 103


def test_names_are_under_the_middle_of_their_stretches():
    ax = pl.probs(few(["T", "B", "NK"]))
    assert under(ax) == ["T", "B", "NK"]
    assert ax.get_xticks().tolist() == [1, 3, 4.5]
    assert ax.get_legend() is None


def test_boundaries_of_components_are_marked():
    ax = pl.probs(few())
    assert lines(ax, "components") == [2, 4]
    assert lines(ax, "categories") == []


def test_a_legend_has_the_components_that_have_no_room_below():
    adata = many(20_000, 20)
    ax = pl.probs(adata)
    assert len(under(ax)) < 20
    assert legend_texts(ax) == [str(i) for i in range(20)]


def test_rows_of_the_heat_map_are_named():
    ax = pl.probs(few(["T", "B", "NK"]), kind="heatmap")
    assert [tick.get_text() for tick in ax.get_yticklabels()] == ["T", "B", "NK"]


def test_cells_are_grouped_by_a_category_first():
    adata = few()
    adata.obs["batch"] = pd.Categorical(["b", "a", "b", "b", "a"], categories=["b", "empty", "a"])
    ax = pl.probs(adata, groupby="batch", kind="heatmap")
    np.testing.assert_allclose(image(ax), np.array(FEW)[[3, 0, 2, 1, 4]].T, rtol=1e-6)
    assert under(ax) == ["b", "a"]
    assert ax.get_xticks().tolist() == [1.5, 4]
    assert lines(ax, "categories") == [3]
    assert lines(ax, "components") == [2]
    assert ax.get_xlabel() == "5 cells by batch"


def test_the_colours_of_grouped_bars_are_in_a_legend():
    assert legend_texts(pl.probs(few(["T", "B", "NK"]), groupby="cell_type")) == ["T", "B", "NK"]


def test_a_component_that_ends_one_category_and_begins_the_next_is_two_stretches():
    adata = with_probabilities(make_adata(4), np.tile([0.9, 0.1], (4, 1)))
    adata.obs["batch"] = ["a", "a", "b", "b"]
    assert lines(pl.probs(adata, groupby="batch"), "categories") == [2]


def test_cells_without_a_category_are_left_out_and_counted():
    adata = few()
    adata.obs["batch"] = pd.Categorical(["b", None, "b", "b", "a"])
    ax = pl.probs(adata, groupby="batch", kind="heatmap")
    np.testing.assert_allclose(image(ax), np.array(FEW)[[4, 3, 0, 2]].T, rtol=1e-6)
    assert ax.get_xlabel() == "4 cells by batch (1 without one left out)"


@pytest.mark.parametrize("kind", ["bars", "heatmap"])
@pytest.mark.parametrize("groupby", [None, "cell_type"])
@pytest.mark.parametrize(
    ("n_cells", "n_components", "names"),
    [(10, 4, None), (3_000, 12, None), (3_000, 5, LONG), (3_000, 20, [f"{LONG[i % 5]} {i}" for i in range(20)])],
    ids=["few cells", "numbers", "long", "many and long"],
)
def test_names_do_not_overlap_and_leave_room_for_the_cells(n_cells, n_components, names, groupby, kind):
    adata = many(n_cells, n_components, names)
    adata.obs["cell_type"] = adata.obs["cell_type"].cat.rename_categories(LONG[:3])
    ax = pl.probs(adata, kind=kind, groupby=groupby)
    assert ticks_that_overlap(ax) == []
    assert ax.get_window_extent().width > 0.5 * ax.figure.bbox.width
    assert ax.get_window_extent().height > 0.55 * ax.figure.bbox.height


def test_names_do_not_overlap_on_small_given_axes():
    _, axes = plt.subplots(1, 3, figsize=(6, 2))
    assert ticks_that_overlap(pl.probs(many(3_000, 5, LONG), ax=axes[1], kind="heatmap")) == []


def test_a_given_figure_keeps_its_size():
    figure, ax = plt.subplots(figsize=(3, 3))
    pl.probs(many(3_000, 5, LONG), ax=ax, groupby="cell_type")
    assert figure.get_size_inches().tolist() == [3, 3]


def test_axes_of_a_subfigure_are_drawn_on():
    ax = plt.figure(layout="constrained").subfigures(1, 2)[0].subplots()
    assert pl.probs(few(), ax=ax) is ax


def test_one_component_is_drawn_without_a_warning():
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        warnings.simplefilter("error", RuntimeWarning)
        ax = pl.probs(with_probabilities(make_adata(3), np.ones((3, 1))))
    np.testing.assert_array_equal(own(ax, "0"), [1, 1, 1])


def test_probs_after_h5ad_are_the_same(tmp_path):
    adata = few()
    after = pl.probs(round_trip(adata, tmp_path), kind="heatmap")
    np.testing.assert_array_equal(image(pl.probs(adata, kind="heatmap")), image(after))


def test_an_unknown_kind_is_an_error():
    with pytest.raises(ValueError, match=r"must be 'auto', 'bars' or 'heatmap'; found 'bar'"):
        pl.probs(few(), kind="bar")


@pytest.mark.parametrize(
    ("column", "finding"),
    [("nope", r"'nope' is not among \['total'"), ("total", r"'total' holds numbers \(int64\).*astype\('category'\)")],
)
def test_groupby_must_be_a_column_with_categories(column, finding):
    with pytest.raises(ValueError, match=finding):
        pl.probs(few(), groupby=column)


def test_a_groupby_without_any_category_is_an_error():
    adata = few()
    adata.obs["batch"] = pd.Categorical([None] * 5, categories=["a"])
    with pytest.raises(ValueError, match="'batch' has none"):
        pl.probs(adata, groupby="batch")


def test_probs_need_a_mixture():
    with pytest.raises(ValueError, match=r"'scvae_probs'\] is not among.*mixture=True, key_added='scvae'"):
        pl.probs(make_adata(n_components=0))


def test_names_without_room_are_counted():
    adata = with_probabilities(make_adata(1_000), np.tile([0.9, 0.1], (1_000, 1)))
    adata.obs["type"] = pd.Categorical(["A"] * 500 + ["tiny 1", "tiny 2"] + ["B"] * 498)
    assert pl.probs(adata, groupby="type").get_xlabel() == "1,000 cells by type (no room for 1 of the 4 names)"
    assert pl.probs(adata).get_xlabel() == "1,000 cells by most probable component"
