"""Cells between components."""

from __future__ import annotations

import numpy as np
import pytest
from matplotlib.colors import to_hex
from pictures import (
    make_adata,
    texts,
    texts_that_overlap,
    titles,
    with_probabilities,
)

from scvae_tools import pl
from scvae_tools.pl import _figures

# Of 4 cells of component 0, two are ambiguous, both with 2; of 2 cells of component 1 none; of 1 of component 2 one.
FEW = [[0.6, 0.1, 0.3], [0.5, 0.2, 0.3], [1, 0, 0], [0.95, 0.05, 0], [0, 1, 0], [0, 0.9, 0.1], [0.1, 0.3, 0.6]]


def bars(ax):
    return [bar.get_width() for bar in ax.patches]


def component_names(ax):
    return [tick.get_text() for tick in ax.get_yticklabels()]


def test_bars_are_the_shares_of_ambiguous_cells():
    ax = pl.ambiguous(with_probabilities(make_adata(7), FEW))
    assert component_names(ax) == ["0", "1", "2"]
    assert bars(ax) == [0.5, 0, 1]


def test_beside_a_bar_is_the_component_most_often_confused():
    ax = pl.ambiguous(with_probabilities(make_adata(7), FEW))
    assert texts(ax) == ["2 of 4, all with 2", "0 of 2", "1 of 1, with 1"]


def test_of_cells_confused_with_several_the_share_of_the_most_frequent_is_named():
    ax = pl.ambiguous(with_probabilities(make_adata(3), [[0.6, 0.1, 0.3], [0.5, 0.2, 0.3], [0.7, 0.2, 0.1]]))
    assert texts(ax) == ["3 of 3, 67% of them with 2"]


def test_the_title_is_the_share_of_all_cells():
    ax = pl.ambiguous(with_probabilities(make_adata(7), FEW))
    assert titles([ax]) == ["43% of cells: top probability below 0.9"]


def test_the_threshold_moves_cells():
    ax = pl.ambiguous(with_probabilities(make_adata(7), FEW), threshold=0.55)
    assert bars(ax) == [0.25, 0, 0]
    assert titles([ax]) == ["14% of cells: top probability below 0.55"]


def test_the_first_component_is_on_top():
    ax = pl.ambiguous(make_adata())
    bottom, top = ax.get_ylim()
    assert top < 0 < 3 < bottom


def test_components_of_no_cell_have_no_bar():
    assert component_names(pl.ambiguous(with_probabilities(make_adata(2), [[0.9, 0, 0.1], [0.2, 0, 0.8]]))) == [
        "0",
        "2",
    ]


def test_bars_have_the_colours_of_the_clusters():
    adata = make_adata()
    pl.clusters(adata)
    before = [to_hex(bar.get_facecolor()) for bar in pl.ambiguous(adata).patches]
    assert before == list(adata.uns["scvae_colors"])
    del adata.uns["scvae_colors"]  # the same, whichever is drawn first
    assert [to_hex(bar.get_facecolor()) for bar in pl.ambiguous(adata).patches] == before
    assert "scvae_colors" not in adata.uns


def test_bars_of_a_subset_have_the_colours_of_their_names():
    adata = with_probabilities(make_adata(7), FEW)
    adata.uns["scvae_colors"] = ["#ff0000", "#00ff00", "#0000ff"]
    subset = adata[adata.obs["scvae"] != "1"].copy()
    assert [to_hex(bar.get_facecolor()) for bar in pl.ambiguous(subset).patches] == ["#ff0000", "#0000ff"]


def test_more_components_than_colours_are_grey():
    ax = pl.ambiguous(make_adata(5_000, n_components=120))
    assert len({bar.get_facecolor() for bar in ax.patches}) == 1


@pytest.mark.parametrize("names", [None, ["natural killer cells, activated", "B", "dendritic"]], ids=["short", "long"])
def test_ambiguous_texts_do_not_overlap_and_leave_room_for_the_bars(names):
    ax = pl.ambiguous(with_probabilities(make_adata(7), FEW, names))
    assert texts_that_overlap(ax.figure) == []
    assert ax.get_window_extent().width > 0.25 * ax.figure.bbox.width
    assert all(text.get_window_extent().x1 <= ax.figure.bbox.x1 for text in ax.texts)


def test_sure_cells_have_an_empty_picture():
    ax = pl.ambiguous(with_probabilities(make_adata(3), np.eye(3)))
    assert bars(ax) == [0, 0, 0]
    assert titles([ax]) == ["0% of cells: top probability below 0.9"]


@pytest.mark.parametrize(
    ("share", "text"),
    [(0, "0%"), (1e-5, "< 0.1%"), (0.004, "0.4%"), (0.25, "25%"), (0.996, "99.6%"), (0.9999, "> 99.9%"), (1, "100%")],
)
def test_shares_near_none_and_all_are_not_rounded_to_them(share, text):
    assert _figures.percent(share) == text


def test_ambiguous_needs_probabilities():
    with pytest.raises(ValueError, match=r"'scvae_probs'\] is not among.*mixture=True, key_added='scvae'"):
        pl.ambiguous(make_adata(n_components=0))
