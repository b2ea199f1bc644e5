"""Counts and λ of genes on the cells."""

from __future__ import annotations

import anndata as ad
import h5py
import numpy as np
import pandas as pd
import pytest
import zarr
from matplotlib import pyplot as plt
from pictures import make_adata, points, texts_that_overlap, titles, with_counts
from scipy import sparse

from scvae_tools import pl
from scvae_tools.pl import _genes


def cells(ax):
    """Values of the cells in the order in which they are drawn, (n_cells,), on the scale of log(1 + x)."""
    return np.asarray(ax.collections[0].get_array())


def as_drawn(adata, values):
    """Coordinates and values of the cells, sorted, since the plot sorts them by value."""
    return sorted(zip(*adata.obsm["X_umap"].T, np.log1p(values), strict=True))


def colour_bars(figure):
    return [ax for ax in figure.axes if ax.get_label() == "<colorbar>"]


@pytest.mark.parametrize("n_cells", [10, 60])
def test_the_panels_of_a_gene_are_its_counts_and_its_rate(n_cells):
    adata = with_counts(make_adata(n_cells))
    axes = pl.genes(adata, ["gene3", "gene1"])
    assert axes.shape == (2, 2)
    assert titles(axes.ravel()) == ["gene3: counts", "gene3: λ", "gene1: counts", "gene1: λ"]
    for row, gene in zip(axes, [3, 1], strict=True):
        for ax, matrix in zip(row, [adata.X, adata.layers["scvae_lambda"]], strict=True):
            drawn = sorted(zip(*points(ax)[:n_cells].T, cells(ax), strict=True))
            np.testing.assert_allclose(drawn, as_drawn(adata, matrix[:, gene]), rtol=1e-6)


def test_cells_with_more_are_drawn_over_cells_with_less():
    for ax in pl.genes(with_counts(make_adata()), "gene0").ravel():
        assert (np.diff(cells(ax)) >= 0).all()


def test_both_panels_have_the_scale_of_the_larger_values():
    adata = with_counts(make_adata())
    adata.layers["scvae_lambda"][:, 0] = 30
    left, right = pl.genes(adata, "gene0")[0]
    for ax in (left, right):
        np.testing.assert_allclose(ax.collections[0].get_clim(), (0, np.log(31)))


def test_a_limit_is_given_in_counts():
    axes = pl.genes(with_counts(make_adata()), "gene0", vmax=2)
    np.testing.assert_allclose(axes[0, 0].collections[0].get_clim(), (0, np.log(3)))


def test_a_colour_bar_for_both_panels_is_marked_in_counts():
    adata = with_counts(make_adata())
    adata.layers["scvae_lambda"][0, 0] = 63
    axes = pl.genes(adata, "gene0")
    (bar,) = colour_bars(axes[0, 0].figure)
    assert [label.get_text() for label in bar.get_yticklabels()] == ["0", "1", "2", "5", "10", "20", "50"]
    np.testing.assert_allclose(np.expm1(bar.get_yticks()), [0, 1, 2, 5, 10, 20, 50], atol=1e-9)
    assert bar.get_ylabel() == "counts, up to 63"


@pytest.mark.parametrize("limit", [1e-3, 0.04, 1, 1.4, 3, 17, 480, 1e4, 3e6])
def test_marks_of_the_colour_bar_are_round_numbers_apart_from_each_other(limit):
    ticks = _genes._ticks(limit)
    assert ticks[0] == 0
    assert 3 <= len(ticks) <= 12
    assert ticks.max() <= limit * 1.001
    assert {f"{tick:.0e}"[0] for tick in ticks} <= set("0125")
    assert np.diff(np.log1p(ticks)).min() >= 0.08 * np.log1p(limit)


def test_every_gene_has_a_colour_bar():
    axes = pl.genes(with_counts(make_adata()), ["gene0", "gene1", "gene2"])
    assert len(colour_bars(axes[0, 0].figure)) == 3


def test_a_gene_without_any_count_is_drawn():
    adata = with_counts(make_adata())
    adata.X[:, 0] = adata.layers["scvae_lambda"][:, 0] = 0
    pl.genes(adata, "gene0")[0, 0].figure.canvas.draw()


def test_without_umap_the_latent_space_is_drawn():
    adata = with_counts(make_adata(umap=False))
    ax = pl.genes(adata, "gene0")[0, 0]
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("latent 1", "latent 2")
    assert sorted(map(tuple, points(ax))) == sorted(map(tuple, adata.obsm["X_scvae"][:, :2]))


def test_another_basis_and_another_key_are_drawn():
    adata = with_counts(make_adata(key="foo"), key="foo")
    ax = pl.genes(adata, "gene0", key="foo", basis="foo", dimensions=(1, 3))[0, 1]
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("latent 2", "latent 4")


def test_options_go_to_scanpy():
    ax = pl.genes(with_counts(make_adata()), "gene0", size=7, cmap="magma")[0, 0]
    assert ax.collections[0].get_sizes() == [7]
    assert ax.collections[0].get_cmap().name == "magma"


def test_cells_are_pixels_in_vector_formats():
    assert pl.genes(with_counts(make_adata()), "gene0")[0, 0].collections[0].get_rasterized()


def test_texts_do_not_overlap():
    axes = pl.genes(with_counts(make_adata()), ["gene0", "gene1", "gene2"])
    assert texts_that_overlap(axes[0, 0].figure) == []


def test_genes_are_drawn_on_given_axes():
    figure, given = plt.subplots(2, 2)
    axes = pl.genes(with_counts(make_adata()), ["gene0", "gene1"], axes=given)
    assert axes.tolist() == given.tolist()
    assert plt.get_fignums() == [figure.number]


def test_genes_need_two_axes_each():
    _, given = plt.subplots(1, 2)
    with pytest.raises(ValueError, match=r"there are 2 for 4 panels \(gene0 counts, gene0 λ, gene1 counts"):
        pl.genes(with_counts(make_adata()), ["gene0", "gene1"], axes=given)


def test_nothing_is_written():
    adata = with_counts(make_adata())
    before = adata.copy()
    pl.genes(adata, "gene0")
    pd.testing.assert_frame_equal(adata.obs, before.obs)
    assert set(adata.uns) == set(before.uns)
    assert set(adata.layers) == set(before.layers)


# -- where the counts and λ are ----------------------------------------------------------------------------------------


def in_form(values, form, tmp_path):
    if form in ("csr_matrix", "csc_matrix", "csr_array"):
        return getattr(sparse, form)(values)
    if form == "zarr":
        return zarr.array(values, chunks=(7, 2), store=str(tmp_path / "values.zarr"))
    if form == "h5py":
        return h5py.File(tmp_path / "values.h5", "w").create_dataset("values", data=values)
    return {"float64": values.astype(np.float64), "integer": values.astype(np.int64)}[form]


@pytest.mark.parametrize("part", ["counts", "rate"])
@pytest.mark.parametrize("form", ["csr_matrix", "csc_matrix", "csr_array", "zarr", "h5py", "float64", "integer"])
@pytest.mark.parametrize("is_view", [False, True], ids=["whole", "view"])
def test_every_form_of_layer_is_read(part, form, is_view, tmp_path):
    adata = with_counts(make_adata(30))
    values = np.arange(30 * 6, dtype=np.float32).reshape(30, 6) % 7
    adata.layers["raw" if part == "counts" else "scvae_lambda"] = in_form(values, form, tmp_path)
    chosen = np.arange(3, 25) if is_view else np.arange(30)
    drawn = adata[3:25, 1:] if is_view else adata
    axes = pl.genes(drawn, "gene4", layer="raw" if part == "counts" else None)
    expected = np.sort(values[chosen, 4])
    np.testing.assert_allclose(np.expm1(cells(axes[0, 0 if part == "counts" else 1])), expected, atol=1e-5)
    assert drawn.is_view == is_view


@pytest.mark.parametrize("form", ["csr", "csc", "dense"])
@pytest.mark.parametrize("is_view", [False, True], ids=["whole", "view"])
def test_a_backed_file_is_read(form, is_view, tmp_path, monkeypatch):
    monkeypatch.setattr(_genes, "ROWS", 7)
    adata = with_counts(make_adata(30))
    dense = adata.X.copy()
    adata.X = {"csr": sparse.csr_matrix, "csc": sparse.csc_matrix, "dense": np.asarray}[form](dense)
    adata.write_h5ad(tmp_path / "cells.h5ad")
    backed = ad.read_h5ad(tmp_path / "cells.h5ad", backed="r")
    axes = pl.genes(backed[5:25] if is_view else backed, "gene2")
    expected = np.sort(dense[5:25, 2] if is_view else dense[:, 2])
    np.testing.assert_allclose(np.expm1(cells(axes[0, 0])), expected, atol=1e-5)


def test_of_layers_on_disk_and_of_views_one_column_is_read(tmp_path, monkeypatch):
    adata = with_counts(make_adata(30))
    adata.layers["scvae_lambda"] = in_form(adata.layers["scvae_lambda"], "h5py", tmp_path)
    read, original = [], h5py.Dataset.__getitem__

    def spy(dataset, index, **options):
        values = original(dataset, index, **options)
        read.append(np.size(values))
        return values

    monkeypatch.setattr(h5py.Dataset, "__getitem__", spy)
    pl.genes(adata, "gene0")
    pl.genes(adata[:20], "gene0")
    assert read
    assert max(read) <= 30


def test_counts_are_those_of_the_training():
    adata = with_counts(make_adata())
    adata.layers["counts"] = np.full(adata.shape, 3.0)
    adata.uns["scvae"]["params"]["layer"] = "counts"
    np.testing.assert_allclose(cells(pl.genes(adata, "gene0")[0, 0]), np.log(4))


# -- errors ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "alike"), [("GENE3", "Did you mean 'gene3'"), ("gene33", "Did you mean 'gene3'"), ("Xyz", "There are 'ge")]
)
def test_an_unknown_gene_names_those_that_are_alike(name, alike):
    with pytest.raises(ValueError, match=rf"'{name}' is not among the 6\. {alike}"):
        pl.genes(with_counts(make_adata()), ["gene0", name])
    assert not plt.get_fignums()


def test_genes_that_are_in_a_column_of_var_are_found_there():
    adata = with_counts(make_adata())
    adata.var["symbol"] = ["A", "B", "C", "D", "E", "F"]
    with pytest.raises(ValueError, match=r"'C', 'D' are not among the 6.*They are in adata\.var\['symbol'\]"):
        pl.genes(adata, ["C", "D"])


def test_a_name_of_two_genes_is_an_error():
    adata = with_counts(make_adata())
    adata.var_names = ["a", "b", "a", "c", "d", "e"]
    with pytest.raises(ValueError, match=r"'a' is the name of several.*var_names_make_unique"):
        pl.genes(adata, ["b", "a"])


def test_no_genes_are_an_error():
    with pytest.raises(ValueError, match="at least one gene; found none"):
        pl.genes(with_counts(make_adata()), [])


def test_a_result_without_rates_names_both_remedies():
    adata = with_counts(make_adata())
    del adata.layers["scvae_lambda"]
    with pytest.raises(
        ValueError, match=r"no layers\['scvae_lambda'\].*adata, write_lambda=True, key_added='scvae'.*get_lambda\(\)"
    ):
        pl.genes(adata, "gene0")


def test_rates_of_a_missing_result_name_the_call():
    with pytest.raises(ValueError, match=r"no layers\['foo_lambda'\].*under \['scvae'\].*key_added='foo'\) first"):
        pl.genes(with_counts(make_adata()), "gene0", key="foo")


def test_a_gene_that_mask_var_left_out_is_an_error():
    adata = with_counts(make_adata())
    adata.layers["scvae_lambda"][:, 2] = np.nan
    with pytest.raises(ValueError, match=r"λ is NaN in layers\['scvae_lambda'\] for 'gene2': mask_var left"):
        pl.genes(adata, ["gene0", "gene2"])


def test_counts_that_are_not_there_are_an_error():
    adata = with_counts(make_adata())
    with pytest.raises(ValueError, match=r"`layer` must be a layer of adata; 'raw' is not among 'scvae_lambda'"):
        pl.genes(adata, "gene0", layer="raw")
    adata.uns["scvae"]["params"]["layer"] = "counts"
    with pytest.raises(ValueError, match=r"'scvae' was trained on the counts of layers\['counts'\].*Pass the layer="):
        pl.genes(adata, "gene0")
    del adata.uns["scvae"]["params"]["layer"], adata.X
    with pytest.raises(ValueError, match=r"adata\.X must hold counts; found None"):
        pl.genes(adata, "gene0")


def test_scaled_counts_are_an_error():
    adata = with_counts(make_adata())
    adata.X -= 1
    with pytest.raises(ValueError, match=r"adata\.X must hold counts; found -1 of gene 'gene0'.*scaled"):
        pl.genes(adata, "gene0")


@pytest.mark.parametrize("vmax", [0, -1, np.nan, np.inf])
def test_a_limit_must_be_above_zero(vmax):
    with pytest.raises(ValueError, match="`vmax` must be a finite number above 0, or None; found"):
        pl.genes(with_counts(make_adata()), "gene0", vmax=vmax)
