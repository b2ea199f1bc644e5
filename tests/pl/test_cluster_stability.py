"""The stability of clusters."""

from __future__ import annotations

import numpy as np
import pytest
from matplotlib import pyplot as plt
from matplotlib.colors import to_hex
from pictures import legend_texts, make_adata, round_trip, texts, texts_that_overlap, with_stability

from scvae_tools import pl

JACCARD = np.array([[1.0, 0.9, 0.8, 0.9], [0.7, 0.7, 0.6, 0.8], [0.6, 0.6, 0.3, 0.5], [0.9, 0.9, 0.5, np.nan]])


@pytest.fixture
def adata():
    return with_stability(make_adata(), JACCARD)


def points(ax):
    """Places of the runs, by the kind, each (n_points, 2), with their colours."""
    found = [drawn for drawn in ax.collections if hasattr(drawn, "get_sizes") and len(drawn.get_offsets())]
    return [(np.asarray(drawn.get_offsets()), [to_hex(c) for c in drawn.get_facecolors()]) for drawn in found]


def means(ax):
    """Jaccard index at each upright line of a mean, in the order in which they are drawn."""
    lines = [drawn for drawn in ax.collections if hasattr(drawn, "get_segments") and drawn.get_linewidth()[0] > 2]
    return [[segment[0, 0] for segment in drawn.get_segments()] for drawn in lines]


def limits(ax):
    return [line.get_xdata()[0] for line in ax.lines if line.get_linestyle() == "--"]


def test_a_row_has_a_point_for_each_run_and_lines_at_the_means(adata):
    (seeds, _), (halves, _) = points(pl.cluster_stability(adata))
    for cluster in range(4):
        for places, values in ((seeds, JACCARD[:, :2]), (halves, JACCARD[:, 2:])):
            drawn = places[np.rint(places[:, 1]) == cluster, 0]
            np.testing.assert_allclose(sorted(drawn), sorted(values[cluster][np.isfinite(values[cluster])]))
    assert (seeds[:, 1] < np.rint(seeds[:, 1])).all()  # above the middle of the row, as the axis points down
    assert (halves[:, 1] > np.rint(halves[:, 1])).all()
    of_seeds, of_halves = means(plt.gca())
    np.testing.assert_allclose(of_seeds, [0.95, 0.7, 0.6, 0.9])
    np.testing.assert_allclose(of_halves, [0.85, 0.7, 0.4, 0.5])


def test_limits_are_at_a_half_and_three_quarters(adata):
    ax = pl.cluster_stability(adata)
    assert limits(ax) == [0.5, 0.75]
    assert {"dissolved", "stable"} <= set(texts(ax))
    assert ax.get_xlim()[0] <= 0 < 1 <= ax.get_xlim()[1]


def test_names_have_numbers_of_cells_and_dissolved_clusters_are_marked(adata):
    ax = pl.cluster_stability(adata)
    assert [label.get_text() for label in ax.get_yticklabels()] == [f"{name}  (15)" for name in "0123"]
    colours = [to_hex(label.get_color()) for label in ax.get_yticklabels()]
    assert colours[0] == colours[1] != colours[2] == colours[3]
    assert texts(ax).count("dissolved") == 3  # that of the region, and those of two rows
    assert ax.get_title(loc="left") == "1 of 4 clusters stable"


def test_colours_are_those_of_the_clusters(adata):
    pl.clusters(adata)
    stored = [to_hex(colour) for colour in adata.uns["scvae_colors"]]
    (places, colours), _ = points(pl.cluster_stability(adata))
    assert colours == [stored[round(y)] for y in places[:, 1]]


@pytest.mark.parametrize(("kinds", "named"), [(["seed"] * 4, "other seeds"), (["half"] * 4, "halves of the cells")])
def test_a_kind_without_runs_is_not_drawn(kinds, named):
    ax = pl.cluster_stability(with_stability(make_adata(), JACCARD, kinds))
    assert legend_texts(ax) == [named, "mean"]
    assert len(points(ax)) == len(means(ax)) == 1


@pytest.mark.parametrize("n_components", [1, 5, 25])
def test_texts_do_not_overlap(n_components):
    adata = with_stability(make_adata(100, n_components=n_components))
    ax = pl.cluster_stability(adata)
    assert len(ax.get_yticklabels()) == n_components
    assert texts_that_overlap(ax.figure) == []


def test_a_small_panel_names_what_has_room():
    ax = plt.subplots(figsize=(4, 2), layout="constrained")[1]
    pl.cluster_stability(with_stability(make_adata(100, n_components=25)), ax=ax)
    assert 1 < len(ax.get_yticklabels()) < 25
    assert texts_that_overlap(ax.figure) == []


def test_a_result_from_a_file_is_drawn(adata, tmp_path):
    assert points(pl.cluster_stability(round_trip(adata, tmp_path)))[0][1] == points(pl.cluster_stability(adata))[0][1]


def test_without_a_result_it_is_said_what_to_run(adata):
    with pytest.raises(
        ValueError, match=r"Run svt.tl.cluster_stability\(adata, key='mine'\) first, or pass key='scvae'"
    ):
        pl.cluster_stability(adata, key="mine")
    with pytest.raises(ValueError, match="adata holds none"):
        pl.cluster_stability(make_adata())
