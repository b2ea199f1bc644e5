"""The number of components."""

from __future__ import annotations

import anndata as ad
import numpy as np
import pytest
from pictures import (
    legend_texts,
    line,
    make_adata,
    make_curve,
    round_trip,
    texts,
    texts_that_overlap,
    with_curve,
)

from scvae_tools import pl


def right_axis(ax):
    return next(other for other in ax.figure.axes if other is not ax)


def test_the_overlap_is_drawn_by_number_of_components():
    curve = make_curve()
    drawn = line(pl.components(with_curve(make_adata(), curve)), "overlap")
    np.testing.assert_array_equal(drawn.get_xdata(), curve["n_components"])
    np.testing.assert_array_equal(drawn.get_ydata(), curve["overlap"])
    assert drawn.get_marker() == "o"


def test_rows_may_be_in_any_order():
    curve = make_curve()
    drawn = line(pl.components(with_curve(make_adata(), curve.iloc[::-1])), "overlap")
    np.testing.assert_array_equal(drawn.get_ydata(), curve["overlap"])


@pytest.mark.parametrize(("chosen", "name"), [(1, "1 component"), (9, "9 components"), (20, "20 components")])
def test_the_number_that_was_chosen_is_marked_and_named(chosen, name):
    ax = pl.components(with_curve(make_adata(), make_curve(chosen)))
    np.testing.assert_array_equal(line(ax, "chosen").get_xdata(), [chosen, chosen])
    assert name in texts(ax)


def test_the_threshold_is_dashed_and_named():
    ax = pl.components(with_curve(make_adata()))
    np.testing.assert_array_equal(line(ax, "threshold").get_ydata(), [0.1, 0.1])
    assert line(ax, "threshold").is_dashed()
    assert "threshold 0.1" in texts(ax)


@pytest.mark.parametrize(("chosen", "side"), [(2, "right"), (13, "left")])
def test_the_name_of_the_threshold_is_where_the_line_is_not(chosen, side):
    ax = pl.components(with_curve(make_adata(), make_curve(chosen)))
    name = next(text for text in ax.texts if text.get_text() == "threshold 0.1")
    assert name.get_horizontalalignment() == side


def test_shares_of_runs_are_bars_on_the_right_axis():
    curve = make_curve()
    right = right_axis(pl.components(with_curve(make_adata(), curve)))
    np.testing.assert_allclose([bar.get_height() for bar in right.patches], curve["share_of_runs"])
    np.testing.assert_allclose([bar.get_x() + bar.get_width() / 2 for bar in right.patches], curve["n_components"])
    assert right.yaxis.get_label_position() == "right"


def test_a_legend_below_the_panel_names_all_that_is_drawn():
    ax = pl.components(with_curve(make_adata()))
    assert legend_texts(ax) == ["overlap", "threshold", "chosen", "share of runs"]
    ax.figure.canvas.draw()
    assert ax.get_legend().get_window_extent().y1 < ax.xaxis.label.get_window_extent().y0


def test_bars_are_behind_the_line():
    ax = pl.components(with_curve(make_adata()))
    assert ax.get_zorder() > right_axis(ax).get_zorder()
    assert not ax.patch.get_visible()


def test_both_axes_have_zero_at_the_same_height():
    ax = pl.components(with_curve(make_adata()))
    heights = [axis.transAxes.inverted().transform(axis.transData.transform((1, 0)))[1] for axis in ax.figure.axes]
    assert heights[0] == pytest.approx(heights[1])


def test_axes_of_components_are_named_with_units():
    ax = pl.components(with_curve(make_adata()))
    assert ax.get_xlabel() == "number of components"
    assert ax.get_ylabel().endswith("(nats per cell of the smaller)")
    assert right_axis(ax).get_ylabel() == "share of runs"


def test_the_threshold_is_inside_where_no_overlap_comes_near():
    curve = make_curve().assign(overlap=0.001)
    low, high = pl.components(with_curve(make_adata(), curve)).get_ylim()
    assert low < 0.001 < 0.1 < high


def test_one_number_of_components_is_drawn():
    ax = pl.components(with_curve(make_adata(), make_curve(1, largest=1)))
    assert line(ax, "overlap").get_xydata().tolist() == [[1, 0]]


@pytest.mark.parametrize("chosen", [1, 9, 20])
def test_components_texts_do_not_overlap(chosen):
    ax = pl.components(with_curve(make_adata(), make_curve(chosen)))
    assert texts_that_overlap(ax.figure) == []


def test_components_after_h5ad_are_the_same(tmp_path):
    adata = with_curve(make_adata())
    before, after = pl.components(adata), pl.components(round_trip(adata, tmp_path))
    assert texts(before) == texts(after)
    for label in ("overlap", "chosen", "threshold"):
        np.testing.assert_array_equal(line(before, label).get_xydata(), line(after, label).get_xydata())


def test_components_of_another_key_are_drawn():
    assert "4 components" in texts(pl.components(with_curve(make_adata(key="foo"), make_curve(4), "foo"), key="foo"))


def test_a_number_that_was_given_has_no_curve_and_the_error_says_so():
    adata = make_adata()
    adata.uns["scvae"] |= {"components": {"n_components": 12}}
    with pytest.raises(
        ValueError, match=r"no uns\['scvae'\].*number was given \(12, .*n_components=None, key_added='scvae'"
    ):
        pl.components(adata)


@pytest.mark.parametrize("through_file", [False, True], ids=["in memory", "after h5ad"])
def test_a_plain_vae_has_no_components_and_the_error_says_so(through_file, tmp_path):
    adata = make_adata(n_components=0)
    adata.uns["scvae"]["params"]["mixture"] = False
    adata = round_trip(adata, tmp_path) if through_file else adata
    with pytest.raises(ValueError, match=r"'scvae' is the result of a plain VAE.*mixture=True, key_added='scvae'"):
        pl.components(adata)


def test_components_of_a_missing_result_name_the_call():
    with pytest.raises(
        ValueError, match=r"no results of svt\.tl\.scvae\. Run svt\.tl\.scvae\(adata, key_added='scvae'\)"
    ):
        pl.components(ad.AnnData(np.ones((3, 2))))
    with pytest.raises(ValueError, match=r"no uns\['foo'\]\['components'\]\['curve'\].*under \['scvae'\]"):
        pl.components(with_curve(make_adata()), key="foo")


@pytest.mark.parametrize(
    ("curve", "finding"),
    [(make_curve().drop(columns="overlap"), r"lacks the columns \['overlap'\]"), (make_curve()[:0], "has no rows")],
    ids=["column", "rows"],
)
def test_a_curve_that_lacks_something_is_an_error(curve, finding):
    adata = make_adata()
    adata.uns["scvae"]["components"] = {"curve": curve}
    with pytest.raises(ValueError, match=finding):
        pl.components(adata)
