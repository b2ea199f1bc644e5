"""Probabilities against labels."""

from __future__ import annotations

import numpy as np
import pytest
from pictures import (
    legend_texts,
    line,
    make_adata,
    titles,
    with_probabilities,
)

from scvae_tools import pl
from scvae_tools._results.calibration import calibration
from scvae_tools.pl import _calibration as reliability_panel


def test_points_are_the_bins_that_have_cells():
    adata = make_adata(500)
    table, _ = calibration(adata.obsm["scvae_probs"], adata.obs["cell_type"])
    table = table[table["n_cells"] > 0]
    ax = pl.calibration(adata, "cell_type")
    drawn = next(drawn for drawn in ax.collections if len(drawn.get_offsets()) > 1)
    np.testing.assert_allclose(drawn.get_offsets(), table[["confidence", "accuracy"]])


def test_areas_are_in_proportion_to_the_cells():
    adata = with_probabilities(make_adata(50), np.repeat([[0.55, 0.45], [0.95, 0.05]], [10, 40], axis=0))
    ax = pl.calibration(adata, "cell_type")
    drawn = next(drawn for drawn in ax.collections if len(drawn.get_offsets()) > 1)
    few, many = drawn.get_sizes()
    assert many / few == pytest.approx(4)


def test_areas_are_explained_in_round_numbers():
    ax = pl.calibration(with_probabilities(make_adata(600), np.tile([0.95, 0.05], (600, 1))), "cell_type")
    assert legend_texts(ax) == ["calibrated", "error", "500 cells", "50 cells", "5 cells"]


@pytest.mark.parametrize(("value", "rounded"), [(1, 1), (1.9, 1), (4, 2), (5, 5), (99, 50), (100, 100), (999, 500)])
def test_numbers_are_rounded_down(value, rounded):
    assert reliability_panel._round_down(value) == rounded


def test_the_title_is_the_expected_error():
    adata = with_probabilities(make_adata(60), np.tile([0.95, 0.05], (60, 1)))  # a third has each of three labels
    assert titles([pl.calibration(adata, "cell_type")]) == [f"Expected calibration error {0.95 - 1 / 3:.3f}"]


def test_a_small_error_is_not_called_none():
    adata = with_probabilities(make_adata(60), np.tile([0.3333, 0.3334, 0.3333], (60, 1)))
    assert titles([pl.calibration(adata, "cell_type")]) == ["Expected calibration error < 0.001"]


def test_options_are_passed_on():
    adata = make_adata(500)
    found = calibration(adata.obsm["scvae_probs"], adata.obs["cell_type"], 4, pool=True)
    ax = pl.calibration(adata, "cell_type", n_bins=4, pool=True)
    assert titles([ax]) == [f"Expected calibration error {found.expected_error:.3f}"]


def test_the_diagonal_is_drawn():
    assert line(pl.calibration(make_adata(), "cell_type"), "calibrated").get_xydata().tolist() == [[0, 0], [1, 1]]


def test_calibration_of_labels_that_are_not_there_lists_the_columns():
    with pytest.raises(ValueError, match=r"'nope' is not among \['total', 'cell_type', 'scvae'\]"):
        pl.calibration(make_adata(), "nope")


def test_calibration_needs_probabilities():
    with pytest.raises(ValueError, match=r"'foo_probs'\] is not among"):
        pl.calibration(make_adata(), "cell_type", key="foo")


def test_the_legend_is_beside_the_panel():
    ax = pl.calibration(make_adata(500), "cell_type")
    ax.figure.canvas.draw()
    assert ax.get_legend().get_window_extent().x0 > ax.get_window_extent().x1
