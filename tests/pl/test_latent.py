"""Cells and the components of the prior in the latent space."""

from __future__ import annotations

import time

import anndata as ad
import numpy as np
import pandas as pd
import pytest
from matplotlib import pyplot as plt
from matplotlib.colors import to_hex
from matplotlib.text import Text
from pictures import colours, legend_texts, make_adata, points, round_trip, texts, with_prior

from scvae_tools import pl


def ellipses(ax, deviations=1):
    return [patch for patch in ax.patches if patch.get_label().endswith(f"at {deviations} SD")]


def outline(patch):
    return patch.get_patch_transform().transform(patch.get_path().vertices)


def means(ax):
    return np.array([line.get_xydata()[0] for line in ax.lines if line.get_label().startswith("mean")])


def test_every_cell_is_a_point_of_two_dimensions():
    adata = with_prior(make_adata())
    ax = pl.latent(adata)
    np.testing.assert_array_equal(points(ax), adata.obsm["X_scvae"][:, :2])
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("latent 1", "latent 2")


@pytest.mark.parametrize("dimensions", [(3, 5), (5, 3), [1, 4], (np.int64(2), 1)])
def test_dimensions_count_from_one(dimensions):
    adata = with_prior(make_adata())
    ax = pl.latent(adata, dimensions=dimensions)
    first, second = (int(dimension) - 1 for dimension in dimensions)
    np.testing.assert_array_equal(points(ax), adata.obsm["X_scvae"][:, [first, second]])
    np.testing.assert_allclose(means(ax), adata.uns["scvae"]["components"]["means"][:, [first, second]])
    assert (ax.get_xlabel(), ax.get_ylabel()) == (f"latent {first + 1}", f"latent {second + 1}")


@pytest.mark.parametrize("deviations", [1, 2])
@pytest.mark.parametrize("dimensions", [(1, 2), (4, 2)])
def test_points_of_an_ellipse_have_the_mahalanobis_distance_of_its_standard_deviations(deviations, dimensions):
    adata = with_prior(make_adata())
    prior = adata.uns["scvae"]["components"]
    two = np.array(dimensions) - 1
    for c, patch in enumerate(ellipses(pl.latent(adata, dimensions=dimensions), deviations)):
        apart = outline(patch)[::3] - prior["means"][c, two]  # the others are control points of its Bézier curves
        inverse = np.linalg.inv(prior["covariances"][c][np.ix_(two, two)])
        np.testing.assert_allclose(np.sqrt(np.einsum("ni,ij,nj->n", apart, inverse, apart)), deviations, rtol=1e-3)


def test_ellipses_are_closed_curves_all_around_their_mean():
    for patch in ellipses(pl.latent(with_prior(make_adata()))):
        turned = np.unwrap(np.arctan2(*(outline(patch)[:-1] - patch.get_center()).T))
        assert abs(turned[-1] - turned[0]) == pytest.approx(2 * np.pi)


def test_all_ellipses_are_in_the_picture():
    ax = pl.latent(with_prior(make_adata()))
    inside = ax.transData.inverted().transform(ax.bbox.get_points())
    corners = np.concatenate([outline(patch) for patch in ellipses(ax, 2)])
    assert (corners.min(0) >= inside[0]).all()
    assert (corners.max(0) <= inside[1]).all()


def test_ellipses_have_the_colours_of_their_cells():
    adata = with_prior(make_adata())
    adata.uns["scvae_colors"] = ["#ff0000", "#00ff00", "#0000ff", "#123456"]
    ax = pl.latent(adata)
    assert [to_hex(patch.get_edgecolor()) for patch in ellipses(ax)] == adata.uns["scvae_colors"]
    assert colours(ax) == list(np.array(adata.uns["scvae_colors"])[adata.obs["scvae"].cat.codes])


@pytest.mark.parametrize("n_components", [3, 12, 30, 110])
def test_ellipses_have_the_colours_of_their_cells_where_scanpy_chooses_them(n_components):
    rng = np.random.default_rng(0)
    adata = make_adata(300, n_components=n_components)
    codes = adata.obs["scvae"].cat.codes.to_numpy()
    adata.obsm["scvae_probs"] = np.eye(n_components, dtype=np.float32)[codes]
    adata = with_prior(adata, seed=rng)
    ax = pl.latent(adata)
    assert [to_hex(patch.get_edgecolor()) for patch in ellipses(ax)] == [colours(ax)[c] for c in range(n_components)]


def test_a_palette_is_that_of_the_ellipses_too():
    ax = pl.latent(with_prior(make_adata()), palette=["#111111", "#222222", "#333333", "#444444"])
    assert [to_hex(patch.get_edgecolor()) for patch in ellipses(ax)] == ["#111111", "#222222", "#333333", "#444444"]


def test_the_name_of_a_component_is_the_annotation_of_its_mean():
    adata = with_prior(make_adata())
    ax = pl.latent(adata)
    assert texts(ax) == ["0", "1", "2", "3"]
    np.testing.assert_allclose([text.xy for text in ax.texts], adata.uns["scvae"]["components"]["means"][:, :2])
    assert ax.get_legend() is None


def test_components_that_no_cell_has_are_left_out_and_the_others_keep_their_rows():
    adata = make_adata(6, n_components=4)
    adata.obsm["scvae_probs"] = np.eye(4, dtype=np.float32)[[0, 0, 2, 2, 3, 3]]
    adata.obs["scvae"] = pd.Categorical(["B", "B", "NK", "NK", "T", "T"])
    ax = pl.latent(with_prior(adata))
    assert texts(ax) == ["B", "NK", "T"]
    np.testing.assert_allclose(means(ax), adata.uns["scvae"]["components"]["means"][[0, 2, 3], :2])


def test_a_subset_has_the_components_of_its_cells():
    adata = with_prior(make_adata())
    codes = adata.obs["scvae"].cat.codes.to_numpy()
    adata.obsm["scvae_probs"] = np.eye(4, dtype=np.float32)[codes]
    subset = adata[codes % 2 == 1]
    ax = pl.latent(subset)
    assert texts(ax) == ["1", "3"]
    np.testing.assert_allclose(means(ax), adata.uns["scvae"]["components"]["means"][[1, 3], :2])
    assert subset.is_view  # not copied by drawing


def test_cells_are_coloured_by_a_column_and_ellipses_are_then_grey():
    adata = with_prior(make_adata())
    ax = pl.latent(adata, color="cell_type")
    assert legend_texts(ax) == ["B", "NK", "T"]
    grey = {patch.get_edgecolor() for patch in ellipses(ax)}
    assert len(grey) == 1
    assert len(set(grey.pop()[:3])) == 1
    assert texts(ax) == ["0", "1", "2", "3"]


def test_numbers_have_a_colour_bar():
    ax = pl.latent(with_prior(make_adata()), color="total")
    assert len(ax.figure.axes) == 2


def test_without_ellipses_only_cells_are_drawn_with_a_legend_and_names():
    ax = pl.latent(make_adata(), ellipses=False)
    assert not ax.patches
    assert texts(ax) == ["0", "1", "2", "3"]
    assert legend_texts(ax) == ["0", "1", "2", "3"]


def test_a_plain_vae_has_the_circles_of_its_prior():
    adata = make_adata(n_components=0)
    ax = pl.latent(adata)
    for deviations in (1, 2):
        (circle,) = ellipses(ax, deviations)
        np.testing.assert_allclose(np.hypot(*outline(circle)[::3].T), deviations, rtol=1e-3)
    np.testing.assert_array_equal(means(ax), [[0, 0]])
    np.testing.assert_array_equal(points(ax), adata.obsm["X_scvae"][:, :2])
    assert texts(ax) in ([], [""])


def test_axes_have_ticks_in_the_units_of_the_prior():
    ax = pl.latent(with_prior(make_adata()))
    ax.figure.canvas.draw()
    assert len(ax.get_xticks()) > 2
    assert len(ax.get_yticks()) > 2


@pytest.mark.parametrize("names", ["numbers", "long"])
@pytest.mark.parametrize("n_components", [4, 20])
def test_names_of_near_means_do_not_overlap(names, n_components):
    adata = make_adata(400, n_components=n_components)
    codes = adata.obs["scvae"].cat.codes.to_numpy()
    adata.obsm["scvae_probs"] = np.eye(n_components, dtype=np.float32)[codes]
    if names == "long":
        adata.obs["scvae"] = adata.obs["scvae"].cat.rename_categories(lambda name: f"T cell {name}")
    with_prior(adata).uns["scvae"]["components"]["means"] *= 0.3
    ax = pl.latent(adata)
    ax.figure.canvas.draw()
    boxes = [Text.get_window_extent(text) for text in ax.texts]  # without the line to the mean
    assert len(boxes) == n_components
    assert not any(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[:i])
    assert all(ax.bbox.fully_containsx(x) for box in boxes for x in (box.x0, box.x1))


def test_cells_are_pixels_and_ellipses_lines_in_vector_formats():
    ax = pl.latent(with_prior(make_adata()))
    assert ax.collections[0].get_rasterized()
    assert not ellipses(ax)[0].get_rasterized()


@pytest.mark.parametrize("n_cells", [1, 10])
def test_few_cells_are_drawn(n_cells):
    assert len(points(pl.latent(with_prior(make_adata(n_cells))))) == n_cells


def test_three_hundred_thousand_cells_take_seconds(tmp_path):
    adata = with_prior(make_adata(300_000))
    start = time.perf_counter()
    pl.latent(adata, save=tmp_path / "many.pdf")
    assert time.perf_counter() - start < 60
    assert (tmp_path / "many.pdf").stat().st_size < 2e6


def test_nothing_is_written(tmp_path):
    adata = with_prior(make_adata())
    adata.obs["text"] = "a"
    before = ad.AnnData(obs=adata.obs.copy(), uns=dict(adata.uns))
    pl.latent(adata, color="text")
    assert set(adata.uns) == set(before.uns)
    pd.testing.assert_frame_equal(adata.obs, before.obs)
    assert set(adata.obsm) == {"X_scvae", "scvae_probs", "X_umap"}
    round_trip(adata, tmp_path)


def test_latent_after_h5ad_is_the_same(tmp_path):
    adata = with_prior(make_adata())
    before, after = pl.latent(adata), pl.latent(round_trip(adata, tmp_path))
    for a, b in zip(ellipses(before), ellipses(after), strict=True):
        np.testing.assert_array_equal(outline(a), outline(b))
    assert texts(before) == texts(after)


def test_options_go_to_scanpy():
    ax = pl.latent(with_prior(make_adata()), size=7, title="latent space", legend_loc="right margin")
    assert ax.collections[0].get_sizes() == [7]
    assert ax.get_title() == "latent space"
    assert legend_texts(ax) == ["0", "1", "2", "3"]


def test_another_key_is_drawn_as_latent():
    adata = with_prior(make_adata(key="foo"), "foo")
    ax = pl.latent(adata, key="foo")
    assert (ax.get_title(), ax.get_xlabel()) == ("foo", "latent 1")
    assert texts(ax) == ["0", "1", "2", "3"]


@pytest.mark.parametrize("dimensions", [(0, 1), (1, 6), (1, 1), (1,), (1, 2, 3), ("a", "b"), (1.5, 2), 1])
def test_dimensions_that_are_not_there_are_an_error(dimensions):
    with pytest.raises(ValueError, match=r"two different latent dimensions, counted from 1 to 5.*Pass dimensions=\(1"):
        pl.latent(with_prior(make_adata()), dimensions=dimensions)
    assert not plt.get_fignums()


def test_one_latent_dimension_is_an_error_with_its_remedy():
    with pytest.raises(ValueError, match=r"counted from 1 to 1.*Train with n_latent=2 or more"):
        pl.latent(make_adata(n_latent=1))


def test_an_unknown_colour_column_names_one_that_is_alike():
    with pytest.raises(ValueError, match=r"found 'celltype'.*Did you mean 'cell_type'"):
        pl.latent(with_prior(make_adata()), color="celltype")


def test_a_missing_latent_space_names_the_call():
    with pytest.raises(ValueError, match=r"no obsm\['X_foo'\].*\['scvae'\].*key_added='foo'\) first"):
        pl.latent(make_adata(), key="foo")


def test_ellipses_of_a_result_without_prior_name_both_remedies():
    with pytest.raises(
        ValueError, match=r"uns\['scvae'\]\['components'\] lacks \['means', 'covariances'\].*ellipses=F"
    ):
        pl.latent(make_adata())


def test_a_prior_of_other_components_is_an_error():
    adata = with_prior(make_adata())
    adata.uns["scvae"]["components"]["means"] = np.zeros((3, 5))
    with pytest.raises(ValueError, match=r"each of the 4 components in 5 dimensions.*means of shape \(3, 5\)"):
        pl.latent(adata)


@pytest.mark.parametrize(("n_components", "n_ellipses"), [(3, 2), (6, 2), (7, 1), (25, 1)])
def test_many_components_have_one_ellipse_each_and_the_picture_says_which(n_components, n_ellipses):
    adata = make_adata(300, n_components=n_components)
    codes = adata.obs["scvae"].cat.codes.to_numpy()
    adata.obsm["scvae_probs"] = np.eye(n_components, dtype=np.float32)[codes]
    ax = pl.latent(with_prior(adata))
    assert len(ax.patches) == n_components * n_ellipses
    assert ax.get_title(loc="right") == ("ellipses: 1 SD" if n_ellipses == 1 else "ellipses: 1 and 2 SD")


def test_of_many_components_those_with_few_cells_have_thin_lines():
    adata = make_adata(803, n_components=8)
    codes = np.repeat(np.arange(8), [100] * 7 + [103])
    codes[:99] = 7  # one cell is left of component 0
    adata.obsm["scvae_probs"] = np.eye(8, dtype=np.float32)[codes]
    lines = [patch.get_linewidth() for patch in ellipses(pl.latent(with_prior(adata)))]
    assert lines[0] < lines[1] < lines[7]


def test_a_long_title_is_not_written_over():
    ax = pl.latent(with_prior(make_adata()), title="The latent space of 60 cells that were made up")
    assert ax.get_title(loc="right") == ""
