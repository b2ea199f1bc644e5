"""Counts against counts that the model draws: the artists have the stored numbers."""

from __future__ import annotations

import time

import numpy as np
import pytest
from matplotlib import pyplot as plt
from matplotlib.colors import to_hex, to_rgb
from pictures import legend_texts, line, make_adata, make_ppc, round_trip, texts, texts_that_overlap, titles, with_ppc

from scvae_tools import pl
from scvae_tools.pl import _ppc


def gene_points(ax):
    """Points of the genes, (n, 2), and their colours; those of a legend are empty."""
    (drawn,) = [drawn for drawn in ax.collections if len(drawn.get_offsets())]
    return np.asarray(drawn.get_offsets()), [to_hex(colour) for colour in drawn.get_facecolors()]


def tick_labels(axis):
    return [tick.get_text() for tick in axis.get_ticklabels()]


def in_colour(ax, label):
    """Points by mean that have the colour of a name in the legend."""
    places, colours = gene_points(ax)
    handles = dict(zip(legend_texts(ax), ax.get_legend().legend_handles, strict=True))
    colour = to_hex(handles[label].get_facecolor()[0])
    return places[[each == colour for each in colours]]


def test_a_point_is_the_share_of_zeros_of_a_gene_in_data_and_draws():
    adata = with_ppc(make_adata())
    ax = pl.ppc(adata)[0]
    table = adata.uns["scvae_ppc"]["genes"]
    np.testing.assert_allclose(gene_points(ax)[0], table[["share_of_zeros", "share_of_zeros_model"]])
    assert ax.get_xlim() == ax.get_ylim()
    np.testing.assert_array_equal(ax.lines[0].get_xydata(), [[0, 0], [1, 1]])


def test_the_share_of_zeros_of_all_counts_is_written():
    result = make_ppc()
    result["genes"]["share_of_zeros"], result["genes"]["share_of_zeros_model"] = 0.5, 0.9
    assert texts(pl.ppc(with_ppc(make_adata(), result))[0]) == ["zeros of all counts\ndata 50%\nmodel 90%"]


def test_a_gene_has_a_point_by_mean_and_variance_of_the_data_and_one_of_the_draws():
    adata = with_ppc(make_adata())
    ax = pl.ppc(adata)[1]
    table = adata.uns["scvae_ppc"]["genes"].iloc[:-1]  # the last one has no counts, and so no logarithm
    np.testing.assert_allclose(in_colour(ax, "data"), table[["mean", "variance"]])
    np.testing.assert_allclose(in_colour(ax, "model (nb)"), table[["mean_model", "variance_model"]])
    assert (ax.get_xscale(), ax.get_yscale()) == ("log", "log")


def test_the_line_of_poisson_counts_is_variance_equal_to_mean():
    ax = pl.ppc(with_ppc(make_adata()))[1]
    drawn = line(ax, "variance = mean").get_xydata()
    np.testing.assert_array_equal(drawn[:, 0], drawn[:, 1])
    np.testing.assert_allclose(drawn[:, 0], ax.get_xlim())


def test_bars_are_the_cells_of_the_data_and_points_those_of_the_draws():
    adata = with_ppc(make_adata())
    axes = pl.ppc(adata)
    assert titles(axes) == ["Zeros of each gene", "Variance of each gene", "gene0", "HLA-A/B"]
    ax = axes[2]
    bins = adata.uns["scvae_ppc"]["histograms"].query("gene == 'gene0'")
    assert [bar.get_height() for bar in ax.patches] == bins["cells"].tolist()
    (container,) = [drawn for drawn in ax.containers if hasattr(drawn, "has_yerr")]
    np.testing.assert_allclose(container.lines[0].get_ydata(), bins["cells_model"])
    low, high = np.array([segment[:, 1] for segment in container.lines[2][0].get_segments()]).T
    np.testing.assert_allclose(high, bins["cells_model"] + bins["cells_model_sd"])
    np.testing.assert_allclose(low, [35, 12.5, 4.5, 0])  # never below 0 cells
    assert legend_texts(ax) == ["data", "model (nb)"]
    assert ax.get_ylim()[1] > 41  # and its bar is inside


def test_ticks_name_the_first_count_of_a_bin_and_the_last_bin_is_open():
    ax = pl.ppc(with_ppc(make_adata()))[2]
    assert tick_labels(ax.xaxis) == ["0", "1", "2", "≥3"]


def test_heights_are_on_a_square_root_scale():
    ax = pl.ppc(with_ppc(make_adata()))[2]
    np.testing.assert_allclose(ax.yaxis.get_transform().transform([0.0, 4.0, 9.0]), [0, 2, 3])


@pytest.mark.parametrize("highest", [1.08, 3, 10, 63, 475, 1_080, 30_000, 1e6])
def test_ticks_of_a_square_root_scale_are_round_and_apart(highest):
    ticks = _ppc._root_ticks(highest)
    assert ticks[0] == 0
    assert ticks[-1] > 0.5 * highest
    assert all(set(str(tick)[1:]) <= {"0"} for tick in ticks)
    assert (np.diff(np.sqrt(ticks)) > np.sqrt(highest) / 13).all()
    assert 2 <= len(ticks) <= 8


@pytest.mark.parametrize("n_bins", [2, 3, 7, 8, 20, 42])
def test_ticks_of_counts_hold_the_zeros_and_the_last_bin(n_bins):
    places, names = _ppc._bin_ticks(3 * np.arange(n_bins))
    assert (places[0], places[-1]) == (0, n_bins - 1)
    assert names[0] == "0"
    assert names[-1] == f"≥{3 * (n_bins - 1)}"
    assert len(places) <= 8
    assert np.diff(places).min() >= (n_bins - 1) / 14


def test_genes_choose_and_order_the_panels():
    adata = with_ppc(make_adata())
    assert titles(pl.ppc(adata, genes=["HLA-A/B", "gene0"]))[2:] == ["HLA-A/B", "gene0"]
    assert titles(pl.ppc(adata, genes="gene0"))[2:] == ["gene0"]
    assert len(pl.ppc(adata, genes=[])) == 2
    assert len(pl.ppc(with_ppc(adata, make_ppc(genes=())))) == 2


def test_panels_are_drawn_on_given_axes():
    figure, given = plt.subplots(2, 2)
    axes = pl.ppc(with_ppc(make_adata()), axes=given)
    assert axes.tolist() == given.ravel().tolist()
    assert plt.get_fignums() == [figure.number]
    with pytest.raises(ValueError, match=r"there are 1 for 3 panels \(zeros, variance, gene0\)"):
        pl.ppc(with_ppc(make_adata()), genes="gene0", axes=given[0, 0])


@pytest.mark.parametrize("n_genes", [0, 1, 2, 5, 9])
def test_texts_do_not_overlap(n_genes):
    axes = pl.ppc(with_ppc(make_adata(), make_ppc([f"gene{i}" for i in range(n_genes)])))
    assert len(axes[0].figure.axes) == 2 + n_genes  # no empty ones
    assert texts_that_overlap(axes[0].figure) == []


def test_many_genes_are_pixels_and_drawn_in_seconds(tmp_path):
    start = time.perf_counter()
    axes = pl.ppc(with_ppc(make_adata(), make_ppc(n_genes=28_000)), save=tmp_path / "figure.pdf")
    assert time.perf_counter() - start < 20
    for ax in axes[:2]:
        assert all(drawn.get_rasterized() for drawn in ax.collections if len(drawn.get_offsets()))
    assert (tmp_path / "figure.pdf").stat().st_size < 500_000


def test_the_key_is_that_of_the_result_or_the_name_of_the_check():
    adata = with_ppc(with_ppc(make_adata(), key="mine"), make_ppc(genes=["gene7"]), key="scvae")
    adata.uns["check"] = make_ppc(genes=["gene5"])
    assert [titles(pl.ppc(adata, key=key))[2] for key in ("scvae", "mine", "check")] == ["gene7", "gene0", "gene5"]


def test_a_result_from_a_file_is_drawn_the_same(tmp_path):
    adata = with_ppc(make_adata())
    read = pl.ppc(round_trip(adata, tmp_path))
    for ax, other in zip(pl.ppc(adata), read, strict=True):
        assert ax.get_title(loc="left") == other.get_title(loc="left")
        assert ax.dataLim.bounds == other.dataLim.bounds


def test_ppc_needs_its_result():
    with pytest.raises(
        ValueError, match=r"adata.uns\['scvae_ppc'\]; adata.uns holds none. Run svt.tl.ppc\(adata, model"
    ):
        pl.ppc(make_adata())
    with pytest.raises(ValueError, match=r"holds those under 'scvae_ppc'.*or pass key='scvae_ppc'"):
        pl.ppc(with_ppc(make_adata()), key="other")


def test_genes_without_a_histogram_are_refused():
    with pytest.raises(
        ValueError, match=r"\['gene0', 'HLA-A/B'\]; \['CD3D'\] are not. Run svt.tl.ppc\(adata, model, g"
    ):
        pl.ppc(with_ppc(make_adata()), genes=["gene0", "CD3D"])


def test_data_and_draws_differ_in_lightness():
    weights = [0.299, 0.587, 0.114]
    data, model = (np.array(to_rgb(colour)) @ weights for colour in (_ppc._DATA, _ppc._MODEL))
    assert abs(data - model) > 0.2
