"""λ by epoch, beside the λ at which a product of probabilities underflows."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
from matplotlib import pyplot as plt
from pictures import (
    STAGES,
    line,
    make_adata,
    make_history,
    round_trip,
    texts,
    texts_that_overlap,
    titles,
)

from scvae_tools import pl

COLUMNS = ("rate_at_zeros", "max_rate")


def underflow(ax):
    """Height of the horizontal line."""
    (height,) = {drawn.get_ydata()[0] for drawn in ax.lines if list(drawn.get_xdata()) == [0, 1]}
    return height


def changes_of_stage(ax):
    return [drawn.get_xdata()[0] for drawn in ax.lines if list(drawn.get_ydata()) == [0, 1]]


def without_rates(history):
    return history.drop(columns=list(COLUMNS))


@pytest.mark.parametrize(("panel", "column"), list(enumerate(COLUMNS)))
def test_each_panel_is_a_column_of_the_history(panel, column):
    history = make_history()
    drawn = line(pl.stability(make_adata(history=history))[panel], column)
    np.testing.assert_array_equal(drawn.get_xdata(), history["epoch"])
    np.testing.assert_array_equal(drawn.get_ydata(), history[column])


def test_panels_say_what_they_show_and_in_which_unit():
    axes = pl.stability(make_adata())
    assert titles(axes) == ["B, the sum of λ over a cell's zeros", "Largest λ"]
    assert [(ax.get_xlabel(), ax.get_ylabel()) for ax in axes] == [("epoch", "counts per cell"), ("epoch", "counts")]
    assert [ax.get_yscale() for ax in axes] == ["log", "log"]


def test_above_the_line_a_float32_probability_is_zero_and_below_it_is_not():
    for ax in pl.stability(make_adata()):
        assert np.exp(np.float32(-underflow(ax) * 1.0001)) == 0
        assert np.exp(np.float32(-underflow(ax) / 1.0001)) > 0


def test_the_band_begins_where_float32_loses_digits():
    smallest_normal = np.finfo(np.float32).tiny
    for ax in pl.stability(make_adata()):
        (band,) = ax.patches
        assert np.exp(-band.get_y()) == pytest.approx(smallest_normal, rel=1e-6)
        assert band.get_y() + band.get_height() == pytest.approx(underflow(ax))


@pytest.mark.parametrize("value", [1e-6, 50.0, 103.97, 1e7])
def test_curve_and_line_are_inside_the_limits(value):
    history = make_history()
    history[list(COLUMNS)] = value
    for ax in pl.stability(make_adata(history=history)):
        low, high = ax.get_ylim()
        assert low < min(value, underflow(ax)) < max(value, underflow(ax)) < high


def test_stages_are_marked_as_in_the_curves_of_the_training():
    adata = make_adata()
    for ax, other in zip(pl.stability(adata), pl.training(adata)[:2], strict=True):
        assert set(STAGES) < set(texts(ax))
        assert ax.get_xlim() == other.get_xlim()
        assert changes_of_stage(ax) == changes_of_stage(other) == [5.5, 15.5]


def test_epochs_that_were_not_recorded_are_a_gap():
    history = make_history()
    history.loc[5:9, list(COLUMNS)] = np.nan
    for ax, column in zip(pl.stability(make_adata(history=history)), COLUMNS, strict=True):
        drawn = line(ax, column).get_ydata()
        assert np.isnan(drawn[5:10]).all()
        assert np.isfinite(np.delete(drawn, np.r_[5:10])).all()


def test_a_rate_of_zero_leaves_the_limits_finite():
    history = make_history()
    history.loc[3, "rate_at_zeros"] = 0.0
    assert np.isfinite(pl.stability(make_adata(history=history))[0].get_ylim()).all()


@pytest.mark.parametrize("stages", [{"vae": 1}, STAGES, {"warm-up": 100, "vae": 300}])
def test_no_text_lies_on_another(stages):
    axes = pl.stability(make_adata(history=make_history(stages)))
    assert texts_that_overlap(axes[0].figure) == []


@pytest.mark.parametrize(("value", "is_below"), [(130.0, True), (1e5, True), (80.0, False), (0.1, False)])
def test_the_line_is_named_on_the_side_where_the_curve_is_not(value, is_below):
    history = make_history()
    history[list(COLUMNS)] = value
    for ax in pl.stability(make_adata(history=history)):
        (name,) = (text for text in ax.texts if text.get_text().startswith("above"))
        box = name.get_window_extent().transformed(ax.transData.inverted())
        assert box.y1 < underflow(ax) if is_below else box.y0 > underflow(ax)


def test_a_single_epoch_is_visible():
    assert line(pl.stability(make_adata(history=make_history({"vae": 1})))[0], "rate_at_zeros").get_marker() == "o"


def test_a_model_plots_as_its_adata_and_as_after_h5ad(tmp_path):
    adata = make_adata()
    history = adata.uns["scvae"]["history"]
    for source in (SimpleNamespace(history=history), history, round_trip(adata, tmp_path)):
        for ax, other, column in zip(pl.stability(source), pl.stability(adata), COLUMNS, strict=True):
            np.testing.assert_array_equal(line(ax, column).get_xydata(), line(other, column).get_xydata())


def test_stability_draws_on_given_axes():
    figure, given = plt.subplots(2)
    assert list(pl.stability(make_adata(), axes=given)) == list(given)
    assert plt.get_fignums() == [figure.number]


def test_stability_leaves_adata_as_it_was():
    adata, same = make_adata(), make_adata()
    pl.stability(adata)
    pd.testing.assert_frame_equal(adata.uns["scvae"]["history"], same.uns["scvae"]["history"])


def test_the_wrong_number_of_axes_is_an_error():
    with pytest.raises(ValueError, match=r"there are 3 for 2 panels \(rate_at_zeros, max_rate\)\. Pass 2"):
        pl.stability(make_adata(), axes=plt.subplots(3)[1])


def test_an_adata_without_rates_names_the_call_that_records_them():
    adata = make_adata(history=without_rates(make_history()), key="foo")
    message = r"AnnData has 40 epochs, and none .*max_rate\. Train with .*key_added='foo', record_rates=True\)\.$"
    with pytest.raises(ValueError, match=message):
        pl.stability(adata, key="foo")


def test_a_model_without_rates_names_the_call_that_records_them():
    history = make_history()
    history[list(COLUMNS)] = np.nan
    with pytest.raises(ValueError, match=r"Train with model\.train\(record_rates=True\)\.$"):
        pl.stability(SimpleNamespace(history=history))


def test_errors_of_the_history_name_this_plot():
    with pytest.raises(ValueError, match=r"^svt\.pl\.stability needs an AnnData.*Call model\.train"):
        pl.stability(SimpleNamespace(history=None))
    with pytest.raises(ValueError, match=r"^svt\.pl\.stability needs one row per epoch"):
        pl.stability(SimpleNamespace(history=pd.DataFrame({"epoch": [1]})))
    with pytest.raises(ValueError, match=r"no uns\['foo'\].*under \['scvae'\]"):
        pl.stability(make_adata(), key="foo")
