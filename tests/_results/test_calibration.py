"""Calibration of the probabilities of components."""

from __future__ import annotations

import time

import numpy as np
import pandas as pd
import pytest
from soft_components import PROBS, draw, make_adata, soft_assignments

from scvae_tools._results.calibration import calibration
from scvae_tools._results.probabilities import ambiguity_of_components
from scvae_tools.tl._ambiguous_cells import ambiguous_cells


def test_the_table_is_as_counted_by_hand():
    # Component 0 stands for "a" (2 of 3 cells), component 1 for "b" (2 of 2).
    probs = [[0.55, 0.45], [0.95, 0.05], [0.57, 0.43], [0.04, 0.96], [0.2, 0.8]]
    table, error = calibration(probs, ["a", "a", "b", "b", "b"], n_bins=5)
    np.testing.assert_allclose(table["lower"], [0, 0.2, 0.4, 0.6, 0.8])
    np.testing.assert_allclose(table["upper"], [0.2, 0.4, 0.6, 0.8, 1])
    assert table["n_cells"].tolist() == [0, 0, 2, 1, 2]
    np.testing.assert_allclose(table["confidence"], [np.nan, np.nan, 0.56, 0.8, 0.955])
    np.testing.assert_allclose(table["accuracy"], [np.nan, np.nan, 0.5, 1, 1])
    assert error == pytest.approx((2 * 0.06 + 1 * 0.2 + 2 * 0.045) / 5)


@pytest.mark.parametrize("seed", range(3))
def test_labels_drawn_from_the_probabilities_are_calibrated(seed):
    probs = soft_assignments(seed=seed)
    table, error = calibration(probs, draw(probs, seed))
    table = table[table["n_cells"] > 0]
    standard_error = np.sqrt(table["confidence"] * (1 - table["confidence"]) / table["n_cells"])
    assert ((table["accuracy"] - table["confidence"]).abs() < 4 * standard_error).all()
    by_chance = np.average(np.sqrt(2 / np.pi) * standard_error, weights=table["n_cells"])  # about 0.006
    assert error < 2 * by_chance


@pytest.mark.parametrize(("confidence", "accuracy"), [(0.95, 0.7), (0.65, 0.9)], ids=["too sure", "too unsure"])
def test_the_error_is_the_gap_that_was_made(confidence, accuracy):
    component = np.repeat([0, 1], 100)
    probs = np.where(component[:, None] == [0, 1], confidence, 1 - confidence)
    is_right = np.tile(np.arange(100) < round(100 * accuracy), 2)
    assert calibration(probs, np.where(is_right, component, 1 - component)).expected_error == pytest.approx(
        abs(confidence - accuracy)
    )


def test_sharpened_probabilities_have_the_gap_of_their_sharpening():
    probs = soft_assignments(100_000)
    sharp = probs**3 / (probs**3).sum(1, keepdims=True)
    expected = (sharp.max(1) - probs.max(1)).mean()  # every cell is too sure, so that no bin hides another's gap
    assert expected > 0.05
    assert calibration(sharp, draw(probs)).expected_error == pytest.approx(expected, abs=0.006)


def test_gaps_of_two_bins_do_not_cancel():
    probs = np.repeat([[0.55, 0.45], [0.85, 0.15]], 100, axis=0)
    labels = np.r_[np.arange(100) >= 75, np.arange(100) >= 65].astype(int)  # 0.2 too unsure, 0.2 too sure
    assert calibration(probs, labels).expected_error == pytest.approx(0.2)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_a_bin_contains_its_upper_edge(dtype):
    tops = np.array([0.6, 0.7, 0.8, 0.9, 1.0], dtype=dtype)
    table = calibration(np.stack([tops, 1 - tops], axis=1), np.zeros(5)).table
    assert table["n_cells"].tolist() == [0, 0, 0, 0, 0, 1, 1, 1, 1, 1]


def test_one_bin_compares_the_means():
    probs = soft_assignments(500)
    labels = draw(probs)
    table, error = calibration(probs, labels, n_bins=1)
    assert table["confidence"][0] == pytest.approx(probs.max(1).mean())
    assert error == pytest.approx(abs(table["accuracy"][0] - table["confidence"][0]))


def test_the_order_of_the_components_does_not_matter():
    probs = soft_assignments(1_000)
    labels = draw(probs)
    pd.testing.assert_frame_equal(calibration(probs[:, ::-1], labels).table, calibration(probs, labels).table)


@pytest.mark.parametrize("kind", ["codes", "names", "categories", "floats", "series"])
def test_labels_may_be_of_any_kind(kind):
    probs = soft_assignments(1_000)
    codes = draw(probs)
    names = np.array(list("zyxwvu"))[codes]
    labels = {"codes": codes, "names": names.tolist(), "floats": codes / 2, "series": pd.Series(names, dtype=object)}
    labels["categories"] = pd.Categorical(names, categories=list("uvwxyz") + ["unused"])
    pd.testing.assert_frame_equal(calibration(probs, labels[kind]).table, calibration(probs, codes).table)


def test_cells_without_a_label_are_left_out():
    probs = soft_assignments(1_000)
    labels = draw(probs).astype(float)
    labels[::3] = np.nan
    known = np.isfinite(labels)
    some, only = calibration(probs, labels), calibration(probs[known], labels[known])
    pd.testing.assert_frame_equal(some.table, only.table)
    assert some.expected_error == only.expected_error


def test_parts_of_one_type_are_right_but_unsure_unless_pooled():
    # Components 0 and 1 are halves of type "a": each cell is of either, with the same probability.
    probs = np.array([[0.5, 0.4, 0.1], [0.4, 0.5, 0.1]] * 45 + [[0.05, 0.05, 0.9]] * 10)
    labels = ["a"] * 81 + ["b"] * 9 + ["b"] * 9 + ["a"]
    apart, pooled = calibration(probs, labels), calibration(probs, labels, pool=True)
    assert apart.expected_error == pytest.approx(0.9 * 0.4)
    assert pooled.expected_error == pytest.approx(0)
    assert pooled.table["n_cells"].tolist() == [0] * 8 + [100, 0]


def test_pooling_changes_nothing_where_components_stand_for_different_labels():
    probs = soft_assignments(1_000)
    labels = draw(probs)
    pd.testing.assert_frame_equal(calibration(probs, labels, pool=True).table, calibration(probs, labels).table)


def test_a_component_of_no_cell_stands_for_nothing():
    probs = np.array([[0.6, 0.0, 0.4], [0.1, 0.0, 0.9]])
    for pool in (False, True):
        table = calibration(probs, ["a", "b"], pool=pool).table
        assert table["n_cells"].tolist() == [0, 0, 0, 0, 0, 1, 0, 0, 1, 0]


def test_pooled_sums_that_round_above_one_are_in_the_last_bin():
    probs = np.full((7, 7), 1.00001 / 7) + 0.001 * np.eye(7)  # each component is some cell's most probable one
    table = calibration(probs, ["a"] * 7, pool=True).table
    assert table["n_cells"].tolist() == [0] * 9 + [7]
    assert table["confidence"][9] == 1


def test_half_precision_is_enough():
    probs = soft_assignments(1_000).astype(np.float16)
    assert calibration(probs, draw(probs.astype(float))).expected_error < 0.05


def test_ten_cells_are_enough():
    assert calibration(np.eye(2)[np.arange(10) % 2], np.arange(10) % 2).expected_error == 0


def test_a_million_cells_take_seconds():
    probs = soft_assignments(1_000_000, k=20).astype(np.float32)
    labels = draw(probs)
    adata = make_adata(probs)
    start = time.perf_counter()
    assert calibration(probs, labels).expected_error < 0.005
    assert len(ambiguous_cells(adata)) > 100_000
    ambiguity_of_components(adata)
    assert time.perf_counter() - start < 20


@pytest.mark.parametrize(
    ("probs", "message"),
    [
        ([[0.5, 0.5], [0.5, 0.7]], r"found 1 of 2 rows that are not, first row 1: \[0.5, 0.7\] with the sum 1.2"),
        ([[0.5, 0.5], [np.nan, 1]], r"first row 1: \[nan, 1\]"),
        ([[1.2, -0.2]], r"first row 0: \[1.2, -0.2\]"),
        ([0.5, 0.5], r"found the shape \(2,\)"),
        (np.empty((0, 3)), r"found the shape \(0, 3\)"),
        ([["a", "b"]], "found the type <U1"),
    ],
    ids=["sum", "NaN", "negative", "flat", "empty", "text"],
)
def test_what_is_no_probability_is_an_error(probs, message):
    with pytest.raises(ValueError, match=r"`probs` must hold the probability of each component.*" + message):
        calibration(probs, np.zeros(len(probs)))


@pytest.mark.parametrize("n_labels", [0, 3, 6])
def test_a_label_per_cell_is_needed(n_labels):
    with pytest.raises(ValueError, match=rf"one label for each of the 5 cells.*found the shape \({n_labels},\)"):
        calibration(PROBS, ["a"] * n_labels)


def test_labels_that_are_all_missing_are_an_error():
    with pytest.raises(ValueError, match="all 5 are missing"):
        calibration(PROBS, [None] * 5)


@pytest.mark.parametrize("n_bins", [0, -1, 2.5, True, "10"])
def test_a_number_of_bins_that_is_none_is_an_error(n_bins):
    with pytest.raises(ValueError, match="`n_bins` must be a whole number of at least 1; found"):
        calibration(PROBS, np.zeros(5), n_bins=n_bins)
