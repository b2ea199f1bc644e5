"""True and reconstructed λ of genes."""

from __future__ import annotations

import anndata as ad
import h5py
import numpy as np
import pandas as pd
import pytest
import zarr
from matplotlib import pyplot as plt
from matplotlib.colors import to_hex
from pictures import legend_texts, line, make_adata, texts, texts_that_overlap, titles, with_counts
from scipy import sparse

from scvae_tools import datasets, pl
from scvae_tools.pl import _lambda_bars


def heights(ax):
    """Heights of the bars, by the name of their colour."""
    return {bars.get_label(): [bar.get_height() for bar in bars] for bars in ax.containers}


def gene_names(ax):
    return [tick.get_text() for tick in ax.get_xticklabels()]


def drawn(ax):
    """Points as (true, reconstructed), by group."""
    return {points.get_label(): np.asarray(points.get_offsets()) for points in ax.collections}


def with_result(adata, rate=None):
    """Give a simulation the layer of a result; by default twice its counts."""
    adata.layers["scvae_lambda"] = 2 * adata.X.toarray() if rate is None else np.asarray(rate, dtype=np.float32)
    adata.uns["scvae"] = {"params": {}, "history": pd.DataFrame(), "version": "0"}
    return adata


def test_bars_are_the_ten_rates_of_the_toy_and_the_means_of_the_layer():
    adata = with_result(datasets.poisson_toy(200), np.tile(np.arange(10) + 0.5, (200, 1)))
    ax = pl.lambda_bars(adata)
    assert heights(ax)["true λ"] == [1, 2, 3, 4, 5, 6, 7, 8, 9, 10]
    np.testing.assert_allclose(heights(ax)["reconstructed λ"], np.arange(10) + 0.5)
    assert gene_names(ax) == [f"gene{i}" for i in range(10)]
    assert legend_texts(ax) == ["true λ", "reconstructed λ"]
    assert ax.get_ylabel() == "counts per cell"


def test_the_bars_of_a_gene_are_side_by_side():
    true, reconstructed = pl.lambda_bars(with_result(datasets.poisson_toy(20))).containers
    for i, (left, right) in enumerate(zip(true, reconstructed, strict=True)):
        assert left.get_x() + left.get_width() == pytest.approx(i)
        assert right.get_x() == pytest.approx(i)


def test_without_the_truth_bars_are_the_mean_counts():
    adata = with_counts(make_adata())
    ax = pl.lambda_bars(adata)
    np.testing.assert_allclose(heights(ax)["mean count"], [sum(column) / 60 for column in adata.X.T], rtol=1e-6)
    expected = [sum(column) / 60 for column in adata.layers["scvae_lambda"].T]
    np.testing.assert_allclose(heights(ax)["reconstructed λ"], expected, rtol=1e-5)


@pytest.mark.parametrize("kind", ["column", "layer", "array", "list"])
def test_the_truth_may_be_a_column_a_layer_or_an_array(kind):
    adata = with_counts(make_adata())
    rates = np.array([3.0, 1, 4, 1, 5, 9])
    adata.var["rate"] = rates
    adata.layers["rates"] = np.tile(rates, (60, 1)) * (2 * np.arange(60) / 59)[:, None]  # of mean `rates`
    true = {"column": "rate", "layer": "rates", "array": rates, "list": list(rates)}[kind]
    np.testing.assert_allclose(heights(pl.lambda_bars(adata, true))["true λ"], rates)


def test_genes_are_drawn_in_the_order_given():
    adata = with_result(datasets.poisson_toy(50))
    ax = pl.lambda_bars(adata, genes=["gene7", "gene2"])
    assert gene_names(ax) == ["gene7", "gene2"]
    assert heights(ax)["true λ"] == [8, 3]
    expected = 2 * adata.X.toarray()[:, [7, 2]].mean(0)
    np.testing.assert_allclose(heights(ax)["reconstructed λ"], expected, rtol=1e-6)


def test_a_group_has_the_means_over_its_cells():
    adata = with_counts(make_adata())
    is_nk = (adata.obs["cell_type"] == "NK").to_numpy()
    ax = pl.lambda_bars(adata, groupby="cell_type", group="NK")
    np.testing.assert_allclose(heights(ax)["mean count"], adata.X[is_nk].mean(0), rtol=1e-6)
    np.testing.assert_allclose(heights(ax)["reconstructed λ"], adata.layers["scvae_lambda"][is_nk].mean(0), rtol=1e-6)
    assert titles([ax]) == ["cell_type: NK"]


def test_groups_of_the_mixture_toy_have_their_own_truth():
    adata = with_result(datasets.poisson_mixture_toy(100))
    subset = adata[adata.obs["component"] != "0"].copy()  # forgets the category
    ax = pl.lambda_bars(subset, groupby="component", group="2")
    assert heights(ax)["true λ"] == list(np.roll(np.arange(1, 11), 4))


def test_the_truth_of_cells_of_several_components_is_their_mean():
    adata = with_result(datasets.poisson_mixture_toy(10))
    adata.obs["half"] = adata.obs["component"].isin(["1", "2"]).map({True: "a", False: "b"})
    expected = (np.roll(np.arange(1, 11), 2) + np.roll(np.arange(1, 11), 4)) / 2
    np.testing.assert_allclose(heights(pl.lambda_bars(adata, groupby="half", group="a"))["true λ"], expected)


def test_all_groups_are_points_of_their_colours():
    adata = with_counts(make_adata())
    adata.uns["cell_type_colors"] = ["#ff0000", "#00ff00", "#0000ff"]
    ax = pl.lambda_bars(adata, groupby="cell_type")
    assert legend_texts(ax) == ["B", "NK", "T"]
    assert [to_hex(points.get_facecolor()[0]) for points in ax.collections] == adata.uns["cell_type_colors"]
    for name, points in drawn(ax).items():
        cells = (adata.obs["cell_type"] == name).to_numpy()
        expected = [adata.X[cells].mean(0), adata.layers["scvae_lambda"][cells].mean(0)]
        np.testing.assert_allclose(points, np.transpose(expected), rtol=1e-5)


@pytest.mark.parametrize(("n_genes", "are_bars"), [(40, True), (41, False)])
def test_more_genes_than_forty_are_points(n_genes, are_bars):
    ax = pl.lambda_bars(with_counts(make_adata(), n_genes))
    assert bool(ax.containers) == are_bars
    assert bool(ax.collections) != are_bars


def test_points_are_reconstructed_against_true_on_logarithmic_axes_with_the_diagonal():
    adata = with_counts(make_adata(), 50)
    ax = pl.lambda_bars(adata)
    expected = np.column_stack([adata.X.mean(0), adata.layers["scvae_lambda"].mean(0)])
    np.testing.assert_allclose(drawn(ax)["genes"], expected, rtol=1e-5)
    assert (ax.get_xscale(), ax.get_yscale()) == ("log", "log")
    assert ax.get_xlim() == ax.get_ylim()
    np.testing.assert_array_equal(*line(ax, "diagonal").get_data())
    assert ax.get_xlabel() == "mean count (counts per cell)"
    assert ax.get_ylabel() == "reconstructed λ (counts per cell)"


def test_genes_without_counts_have_no_point_and_their_number_is_said():
    adata = with_counts(make_adata(), 50)
    adata.X[:, 3:5] = 0
    ax = pl.lambda_bars(adata)
    assert len(drawn(ax)["genes"]) == 48
    assert texts(ax) == ["2 genes at 0 not shown"]


def test_points_of_nothing_are_an_empty_picture():
    adata = with_counts(make_adata(), 50)
    adata.X[:] = 0
    ax = pl.lambda_bars(adata)
    assert texts(ax) == ["50 genes at 0 not shown"]
    ax.figure.canvas.draw()


def test_genes_that_mask_var_left_out_are_left_out():
    adata = with_counts(make_adata())
    adata.layers["scvae_lambda"][:, [0, 4]] = np.nan
    assert gene_names(pl.lambda_bars(adata)) == ["gene1", "gene2", "gene3", "gene5"]
    with pytest.raises(ValueError, match=r"λ is NaN in layers\['scvae_lambda'\] for 'gene4': mask_var left"):
        pl.lambda_bars(adata, genes=["gene3", "gene4"])


@pytest.mark.parametrize("groups", [{}, {"groupby": "cell_type"}, {"groupby": "cell_type", "group": "NK"}])
@pytest.mark.parametrize("n_genes", [1, 6, 40, 60])
def test_texts_do_not_overlap(groups, n_genes):
    ax = pl.lambda_bars(with_counts(make_adata(), n_genes), **groups)
    assert texts_that_overlap(ax.figure) == []
    labels = [tick.get_window_extent() for tick in ax.get_xticklabels() if ax.containers]
    assert not any(a.overlaps(b) for i, a in enumerate(labels) for b in labels[:i])
    legend = ax.get_legend()
    if legend is not None and titles([ax]) != [""]:
        assert not legend.get_window_extent().overlaps(ax._left_title.get_window_extent())


@pytest.mark.parametrize(("names", "is_turned"), [("gene", False), ("a-gene-with-a-long-name-", True)])
def test_names_are_turned_where_they_have_no_room(names, is_turned):
    adata = with_counts(make_adata(), 8)
    adata.var_names = [f"{names}{i}" for i in range(8)]
    assert {tick.get_rotation() for tick in pl.lambda_bars(adata).get_xticklabels()} == {90.0 * is_turned}


def test_the_legend_has_large_points_of_full_colour_where_those_drawn_are_small():
    ax = pl.lambda_bars(with_counts(make_adata(), 1000), groupby="cell_type")
    for handle, points in zip(ax.get_legend().legend_handles, ax.collections, strict=True):
        assert handle.get_sizes()[0] > 2 * points.get_sizes()[0]
        assert handle.get_alpha() == 1 > points.get_alpha()


def test_many_groups_have_no_legend():
    adata = with_counts(make_adata())
    adata.obs["donor"] = [f"donor {i % 30}" for i in range(60)]
    ax = pl.lambda_bars(adata, groupby="donor")
    assert len(drawn(ax)) == 30
    assert ax.get_legend() is None


def test_another_key_is_drawn():
    assert len(heights(pl.lambda_bars(with_counts(make_adata(key="foo"), key="foo"), key="foo"))) == 2


def test_nothing_is_written():
    adata = with_counts(make_adata())
    before = adata.copy()
    pl.lambda_bars(adata, groupby="cell_type")
    pd.testing.assert_frame_equal(adata.obs, before.obs)
    pd.testing.assert_frame_equal(adata.var, before.var)
    assert set(adata.uns) == set(before.uns)


@pytest.mark.parametrize("form", ["csr_matrix", "csc_matrix", "csr_array", "zarr", "h5py", "integer"])
@pytest.mark.parametrize("block", [1, 13, 10_000])
def test_means_are_the_same_in_every_form_and_by_any_part(form, block, tmp_path, monkeypatch):
    monkeypatch.setattr(_lambda_bars, "_BLOCK", block)
    adata = with_counts(make_adata(30))
    values = np.arange(30 * 6).reshape(30, 6) % 7
    if form == "zarr":
        adata.layers["scvae_lambda"] = zarr.array(values, chunks=(7, 2), store=str(tmp_path / "values.zarr"))
    elif form == "h5py":
        adata.layers["scvae_lambda"] = h5py.File(tmp_path / "values.h5", "w").create_dataset("values", data=values)
    else:
        adata.layers["scvae_lambda"] = values if form == "integer" else getattr(sparse, form)(values)
    cells = (adata.obs["cell_type"] == "B").to_numpy()
    ax = pl.lambda_bars(adata, groupby="cell_type", group="B", genes=["gene4", "gene1"])
    np.testing.assert_allclose(heights(ax)["reconstructed λ"], values[cells][:, [4, 1]].mean(0))


@pytest.mark.parametrize("form", ["csr", "csc", "dense"])
@pytest.mark.parametrize("is_view", [False, True], ids=["whole", "view"])
def test_a_backed_file_is_read_in_parts(form, is_view, tmp_path, monkeypatch):
    monkeypatch.setattr(_lambda_bars, "ROWS", 7)
    adata = with_counts(make_adata(30))
    dense = adata.X.copy()
    adata.X = {"csr": sparse.csr_matrix, "csc": sparse.csc_matrix, "dense": np.asarray}[form](dense)
    adata.write_h5ad(tmp_path / "cells.h5ad")
    backed = ad.read_h5ad(tmp_path / "cells.h5ad", backed="r")
    ax = pl.lambda_bars(backed[5:25] if is_view else backed)
    expected = (dense[5:25] if is_view else dense).mean(0)
    np.testing.assert_allclose(heights(ax)["mean count"], expected, rtol=1e-6)


def test_counts_are_those_of_the_training():
    adata = with_counts(make_adata())
    adata.layers["counts"] = np.full(adata.shape, 3.0)
    adata.uns["scvae"]["params"]["layer"] = "counts"
    np.testing.assert_allclose(heights(pl.lambda_bars(adata))["mean count"], 3)


# -- errors ------------------------------------------------------------------------------------------------------------


def test_an_unknown_truth_lists_columns_and_layers():
    with pytest.raises(
        ValueError, match=r"`true` must be .* found 'nope', and the columns \(none\) and layers 'scvae_l"
    ):
        pl.lambda_bars(with_counts(make_adata()), "nope")
    assert not plt.get_fignums()


@pytest.mark.parametrize("true", [np.ones(5), np.ones((60, 6)), ["a"] * 6])
def test_an_array_must_have_a_number_for_each_gene(true):
    with pytest.raises(ValueError, match="`true` must hold a number for each of the 6 genes"):
        pl.lambda_bars(with_counts(make_adata()), true)


def test_an_unknown_column_or_group_lists_those_there_are():
    adata = with_counts(make_adata())
    with pytest.raises(ValueError, match=r"`groupby`.*found 'celltype'.*Did you mean 'cell_type'"):
        pl.lambda_bars(adata, groupby="celltype")
    with pytest.raises(ValueError, match=r"`group`.*found 'b'. Pass one of 'B', 'NK', 'T'"):
        pl.lambda_bars(adata, groupby="cell_type", group="b")
    with pytest.raises(ValueError, match=r"found 'B' alone\. Pass groupby= too"):
        pl.lambda_bars(adata, group="B")


def test_an_unknown_gene_names_those_that_are_alike():
    with pytest.raises(ValueError, match="Did you mean 'gene2'"):
        pl.lambda_bars(with_counts(make_adata()), genes="Gene2")


def test_a_result_without_rates_names_the_call():
    adata = with_counts(make_adata())
    del adata.layers["scvae_lambda"]
    with pytest.raises(ValueError, match=r"adata, write_lambda=True, key_added='scvae'"):
        pl.lambda_bars(adata)


def test_counts_that_are_not_there_are_an_error():
    adata = with_counts(make_adata())
    del adata.X
    with pytest.raises(ValueError, match=r"adata\.X must hold counts; found None"):
        pl.lambda_bars(adata)


def test_rows_are_read_in_parts_that_are_chunks_of_the_file():
    array = zarr.zeros((1_000, 100), chunks=(30, 100))
    assert _lambda_bars._rows_at_once(array) % 30 == 0


def test_minor_ticks_are_named_as_major_ones():
    adata = with_counts(make_adata(300), 60)
    ax = pl.lambda_bars(adata)
    ax.figure.canvas.draw()
    names = [tick.get_text() for axis in (ax.xaxis, ax.yaxis) for tick in axis.get_ticklabels(minor=True)]
    assert any(names)
    assert not any("e" in name for name in names)


def test_groups_that_no_legend_can_name_have_one_colour():
    adata = with_counts(make_adata(100, n_components=25), 60)
    ax = pl.lambda_bars(adata, groupby="scvae")
    assert ax.get_legend() is None
    assert len({to_hex(drawn.get_facecolor()[0]) for drawn in ax.collections}) == 1
    assert titles([ax]) == ["25 groups of scvae"]
