"""Cells by component."""

from __future__ import annotations

import time
from itertools import pairwise

import numpy as np
import pandas as pd
import pytest
import scanpy
from matplotlib import pyplot as plt
from matplotlib.colors import to_hex
from matplotlib.text import Text
from pictures import (
    colours,
    legend_texts,
    make_adata,
    points,
    round_trip,
    texts_that_overlap,
    titles,
)

from scvae_tools import pl
from scvae_tools.pl import _figures


@pytest.mark.parametrize("n_cells", [10, 60])
def test_every_cell_is_a_point_of_the_umap(n_cells):
    adata = make_adata(n_cells)
    (ax,) = pl.clusters(adata)
    np.testing.assert_array_equal(points(ax), adata.obsm["X_umap"])
    assert (ax.get_title(), ax.get_xlabel(), ax.get_ylabel()) == ("scvae", "UMAP1", "UMAP2")


def test_without_umap_the_latent_space_is_drawn():
    adata = make_adata(umap=False)
    (ax,) = pl.clusters(adata)
    np.testing.assert_array_equal(points(ax), adata.obsm["X_scvae"][:, :2])
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("latent 1", "latent 2")


@pytest.mark.parametrize("basis", ["X_scvae", "scvae"])
def test_a_basis_is_named_with_or_without_x(basis):
    adata = make_adata()
    (ax,) = pl.clusters(adata, basis=basis)
    np.testing.assert_array_equal(points(ax), adata.obsm["X_scvae"][:, :2])


def test_other_latent_dimensions_keep_their_numbers():
    adata = make_adata(umap=False, n_latent=12)
    (ax,) = pl.clusters(adata, dimensions=(2, 10))
    np.testing.assert_array_equal(points(ax), adata.obsm["X_scvae"][:, [2, 10]])
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("latent 3", "latent 11")


def test_a_key_that_ends_in_digits_is_no_dimension():
    (ax,) = pl.clusters(make_adata(umap=False, key="run2"), key="run2")
    assert ax.get_xlabel() == "latent 1"


@pytest.mark.parametrize("n_components", [1, 8, 9, 20])
def test_the_legend_lists_every_component(n_components):
    (ax,) = pl.clusters(make_adata(n_components=n_components))
    assert legend_texts(ax) == [str(i) for i in range(n_components)]


def test_many_components_are_numbered_on_the_cells():
    (ax,) = pl.clusters(make_adata(n_components=30))
    assert ax.get_legend() is None
    assert sorted(int(text.get_text()) for text in ax.texts) == list(range(30))


@pytest.mark.parametrize("n_components", [2, 8, 10, 20, 30])
def test_components_have_different_colours(n_components):
    adata = make_adata(n_components=n_components)
    pl.clusters(adata)
    assert len(set(adata.uns["scvae_colors"])) == n_components


def test_few_components_have_colours_safe_for_colour_blind_readers():
    adata = make_adata(n_components=8)
    pl.clusters(adata)
    assert tuple(adata.uns["scvae_colors"]) == _figures.SAFE_COLOURS


@pytest.mark.parametrize("n_components", [20, 21, 28, 29, 102])
def test_more_components_have_the_colours_of_scanpy(n_components):
    adata = make_adata(204, n_components=n_components)
    pl.clusters(adata)
    ours = [to_hex(colour) for colour in adata.uns["scvae_colors"]]
    del adata.uns["scvae_colors"]
    scanpy.pl.embedding(adata, "umap", color="scvae", show=False)
    assert ours == [to_hex(colour) for colour in adata.uns["scvae_colors"]]


def test_cells_have_the_colour_of_their_component():
    adata = make_adata()
    adata.uns["scvae_colors"] = ["#ff0000", "#00ff00", "#0000ff", "#123456"]
    (ax,) = pl.clusters(adata)
    expected = np.array(adata.uns["scvae_colors"])[adata.obs["scvae"].cat.codes]
    assert colours(ax) == list(expected)


def test_a_palette_is_passed_to_scanpy():
    adata = make_adata(n_components=2)
    pl.clusters(adata, palette=["#111111", "#222222"])
    assert list(adata.uns["scvae_colors"]) == ["#111111", "#222222"]


def test_labels_are_drawn_beside_the_components():
    adata = make_adata()
    axes = pl.clusters(adata, labels_key=["cell_type", "total"])
    assert titles(axes) == ["scvae", "cell_type", "total"]
    assert legend_texts(axes[1]) == ["B", "NK", "T"]
    np.testing.assert_array_equal(points(axes[1]), adata.obsm["X_umap"])
    assert sorted(map(tuple, points(axes[2]))) == sorted(map(tuple, adata.obsm["X_umap"]))  # high counts on top


@pytest.mark.parametrize("kind", ["str", "bool", "missing"])
def test_labels_of_other_kinds_have_a_legend(kind):
    adata = make_adata()
    is_b = adata.obs["cell_type"] == "B"
    adata.obs["label"] = {"str": is_b.map({True: "b", False: "other"}), "bool": is_b}.get(
        kind, pd.Categorical(np.where(is_b, "b", None))
    )
    axes = pl.clusters(adata, labels_key="label")
    expected = {"str": ["b", "other"], "bool": ["False", "True"], "missing": ["b", "NA"]}
    assert legend_texts(axes[1]) == expected[kind]


def test_one_label_may_be_a_string():
    assert titles(pl.clusters(make_adata(), labels_key="cell_type")) == ["scvae", "cell_type"]


def test_titles_may_be_given_per_panel():
    assert titles(pl.clusters(make_adata(), labels_key="cell_type", title=["a", "b"])) == ["a", "b"]
    assert titles(pl.clusters(make_adata(), labels_key="cell_type", title="a")) == ["a", "cell_type"]


@pytest.mark.parametrize("name", ["s", "size"])
def test_the_size_of_points_may_be_given(name):
    (ax,) = pl.clusters(make_adata(), **{name: 7})
    assert ax.collections[0].get_sizes() == [7]


def test_ten_cells_do_not_cover_the_picture():
    (ax,) = pl.clusters(make_adata(10))
    assert ax.collections[0].get_sizes() <= 100


def test_cells_are_pixels_in_vector_formats():
    (ax,) = pl.clusters(make_adata())
    assert ax.collections[0].get_rasterized()


def test_two_hundred_thousand_cells_take_seconds(tmp_path):
    adata = make_adata(200_000)
    start = time.perf_counter()
    (ax,) = pl.clusters(adata, save=tmp_path / "many.png")
    assert time.perf_counter() - start < 60
    assert len(points(ax)) == 200_000


def test_clusters_texts_do_not_overlap():
    axes = pl.clusters(make_adata(), labels_key=["cell_type", "total"])
    assert texts_that_overlap(axes[0].figure) == []


def test_legends_do_not_touch_the_next_panel():
    adata = make_adata()
    adata.obs["cell_type"] = adata.obs["cell_type"].cat.rename_categories({"NK": "natural killer cells, activated"})
    axes = pl.clusters(adata, labels_key=["cell_type", "total"])
    axes[0].figure.canvas.draw()
    for ax, following in pairwise(axes):
        assert ax.get_legend().get_window_extent().x1 < following.get_tightbbox().x0


def test_clusters_draws_on_given_axes():
    figure, given = plt.subplots(1, 2)
    assert list(pl.clusters(make_adata(), labels_key="cell_type", axes=given)) == list(given)
    assert plt.get_fignums() == [figure.number]


def test_clusters_draws_on_one_axes():
    _, given = plt.subplots()
    assert list(pl.clusters(make_adata(), axes=given)) == [given]


def test_clusters_after_h5ad_are_the_same(tmp_path):
    adata = make_adata()
    read = round_trip(adata, tmp_path)
    (before,), (after,) = pl.clusters(adata), pl.clusters(read)
    np.testing.assert_array_equal(points(before), points(after))
    assert colours(before) == colours(after)


def test_clusters_can_be_written_after_drawing(tmp_path):
    adata = make_adata()
    pl.clusters(adata, labels_key=["cell_type", "total"])
    assert list(round_trip(adata, tmp_path).uns["scvae_colors"]) == list(adata.uns["scvae_colors"])


def test_only_colours_are_written():
    adata, same = make_adata(), make_adata()
    pl.clusters(adata, labels_key="cell_type")
    assert set(adata.uns) - set(same.uns) == {"scvae_colors", "cell_type_colors"}
    pd.testing.assert_frame_equal(adata.obs, same.obs)
    assert set(adata.obsm) == set(same.obsm)


def test_another_key_is_drawn():
    (ax,) = pl.clusters(make_adata(key="foo", umap=False), key="foo")
    assert (ax.get_title(), ax.get_xlabel()) == ("foo", "latent 1")


def test_without_a_mixture_only_labels_are_drawn():
    assert titles(pl.clusters(make_adata(n_components=0), labels_key="cell_type")) == ["cell_type"]


def test_without_a_mixture_and_labels_the_error_names_both_remedies():
    with pytest.raises(
        ValueError, match=r"obs\['scvae'\] is not.*mixture=True, key_added='scvae'\), or pass labels_key="
    ):
        pl.clusters(make_adata(n_components=0))


def test_clusters_of_a_missing_result_names_the_call():
    with pytest.raises(ValueError, match=r"obs\['foo'\] nor obsm\['X_foo'\].*\['scvae'\].*key_added='foo'\) first"):
        pl.clusters(make_adata(), key="foo")


def test_results_are_found_where_uns_was_lost():
    adata = make_adata()
    adata.uns.clear()
    with pytest.raises(ValueError, match=r"holds results under \['scvae'\]"):
        pl.clusters(adata, key="foo")


def test_a_result_without_coordinates_is_an_error():
    adata = make_adata(umap=False)
    del adata.obsm["X_scvae"]
    with pytest.raises(ValueError, match=r"no obsm\['X_umap'\] nor obsm\['X_scvae'\]"):
        pl.clusters(adata)


def test_an_unknown_basis_lists_those_there_are():
    with pytest.raises(ValueError, match=r"'tsne' is not among \['X_scvae', 'scvae_probs', 'X_umap'\]"):
        pl.clusters(make_adata(), basis="tsne")


def test_an_unknown_label_lists_the_columns():
    with pytest.raises(ValueError, match=r"\['nope'\] are not among \['total', 'cell_type', 'scvae'\]"):
        pl.clusters(make_adata(), labels_key=["cell_type", "nope"])


def test_a_latent_space_of_one_dimension_is_an_error():
    with pytest.raises(ValueError, match=r"obsm\['X_scvae'\] has 1.*use_rep='X_scvae'"):
        pl.clusters(make_adata(n_latent=1, umap=False))


def test_clusters_need_an_axes_per_panel():
    _, given = plt.subplots()
    with pytest.raises(ValueError, match=r"there are 1 for 2 panels \(scvae, cell_type\)"):
        pl.clusters(make_adata(), labels_key="cell_type", axes=given)


# -- colours of two groupings ------------------------------------------------------------------------------------------


def with_types(adata):
    """Add types of which the first is the first component, and of which others are two components or half of one."""
    code = adata.obs["scvae"].cat.codes.to_numpy()
    half = np.arange(adata.n_obs) % 8 < 4
    adata.obs["type"] = pd.Categorical(np.select([code == 0, code == 1, (code == 2) & half], ["A", "B", "C"], "D"))
    return adata


def test_labels_have_the_colours_of_the_components_that_they_match_and_others_else():
    adata = with_types(make_adata(80))
    pl.clusters(adata, labels_key="type")
    components, types = list(adata.uns["scvae_colors"]), list(adata.uns["type_colors"])
    assert types[:2] == components[:2]
    assert types[3] == components[3]  # two thirds of D are component 3
    assert types[2] not in components  # C is only half of component 2
    assert len(set(types)) == 4


def test_components_without_colours_take_those_of_labels_that_have_some():
    adata = with_types(make_adata(80))
    adata.uns["type_colors"] = ["#111111", "#222222", "#333333", "#444444"]
    pl.clusters(adata, labels_key="type")
    components = list(adata.uns["scvae_colors"])
    assert [components[0], components[1], components[3]] == ["#111111", "#222222", "#444444"]
    assert components[2] not in adata.uns["type_colors"]
    assert list(adata.uns["type_colors"]) == ["#111111", "#222222", "#333333", "#444444"]


def test_components_that_were_trained_on_labels_have_their_colours():
    adata = make_adata(n_components=3)
    adata.obs["scvae"] = adata.obs["scvae"].cat.rename_categories(["T", "B", "new 0"])
    adata.uns["scvae"]["params"]["labels_key"] = "cell_type"
    pl.clusters(adata, labels_key="cell_type")
    components = dict(zip(["T", "B", "new 0"], adata.uns["scvae_colors"], strict=True))
    types = dict(zip(["B", "NK", "T"], adata.uns["cell_type_colors"], strict=True))
    assert (types["T"], types["B"]) == (components["T"], components["B"])
    assert types["NK"] not in components.values()


def test_labels_of_text_have_the_colours_of_their_components():
    adata = make_adata(40, n_components=2)
    adata.obs["text"] = np.where(adata.obs["scvae"] == "0", "type 10", "type 9")
    axes = pl.clusters(adata, labels_key="text")
    assert colours(axes[0]) == colours(axes[1])


# -- names on the cells ------------------------------------------------------------------------------------------------


def test_names_of_components_are_on_the_cells():
    (ax,) = pl.clusters(make_adata())
    assert [text.get_text() for text in ax.texts] == ["0", "1", "2", "3"]
    adata = make_adata()
    for text, name in zip(ax.texts, "0123", strict=True):
        of_component = adata.obsm["X_umap"][adata.obs["scvae"] == name]
        assert np.isclose(of_component, text.xy).all(1).any()


def test_names_of_small_groups_do_not_overlap_or_hide_their_cells():
    adata = make_adata(500, n_components=25)
    middles = np.random.default_rng(0).normal(size=(25, 2))
    adata.obsm["X_umap"] = middles[adata.obs["scvae"].cat.codes] + 0.01 * adata.obsm["X_umap"]
    (ax,) = pl.clusters(adata)
    ax.figure.canvas.draw()
    boxes = [Text.get_window_extent(text) for text in ax.texts]
    assert not any(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[:i])
    assert not any(box.contains(*ax.transData.transform(text.xy)) for box, text in zip(boxes, ax.texts, strict=True))


def test_users_may_choose_names_or_a_legend_alone():
    (ax,) = pl.clusters(make_adata(), legend_loc="right margin")
    assert not ax.texts
    (ax,) = pl.clusters(make_adata(), groups=["1"])
    assert [text.get_text() for text in ax.texts] == ["1"]
