"""Genes with the largest loadings on the dimensions of a linear decoder."""

from __future__ import annotations

import numpy as np
import pytest
from matplotlib import pyplot as plt
from matplotlib.colors import to_hex
from pictures import make_adata, round_trip, titles, with_counts, with_loadings

from scvae_tools import pl

RISES, FALLS = "#0072b2", "#d55e00"


def with_these(loadings, key="scvae"):
    """Loadings (n_genes, n_latent) of genes gene0, gene1, ..."""
    loadings = np.array(loadings, dtype=np.float32)
    adata = with_counts(make_adata(n_latent=loadings.shape[1]), len(loadings))
    adata.varm[f"{key}_loadings"] = loadings
    return adata


def bars(ax):
    """Length and colour of the bar of each gene, by the name beside it, from the top."""
    by_place = {bar.get_y() + bar.get_height() / 2: bar for bar in ax.patches}
    low, high = ax.get_ylim()
    assert low > high  # the first is on top
    names = {round(place): name.get_text() for place, name in zip(ax.get_yticks(), ax.get_yticklabels(), strict=True)}
    return {
        names[round(place)]: (pytest.approx(by_place[place].get_width()), to_hex(by_place[place].get_facecolor()))
        for place in sorted(by_place)
    }


def test_bars_are_the_largest_of_either_sign_from_the_highest_to_the_lowest():
    column = [0.1, -3.0, 2.0, -0.5, 1.0, 0.0]
    (ax,) = pl.loadings(with_these([[value] for value in column]), n_genes=2)
    found = bars(ax)
    assert list(found) == ["gene2", "gene4", "gene3", "gene1"]
    assert list(found.values()) == [(2.0, RISES), (1.0, RISES), (-0.5, FALLS), (-3.0, FALLS)]
    assert ax.get_xlabel() == "loading (nats per unit of z)"


def test_a_dimension_whose_loadings_have_one_sign_has_those_genes_alone():
    (ax,) = pl.loadings(with_these([[3.0], [1.0], [2.0]]), n_genes=2)
    assert list(bars(ax)) == ["gene0", "gene2"]


def test_loadings_of_zero_and_of_genes_left_out_have_no_bar():
    (ax,) = pl.loadings(with_these([[np.nan], [0.0], [-1.0], [2.0]]))
    assert list(bars(ax)) == ["gene3", "gene2"]


def test_all_loadings_zero_are_drawn():
    (ax,) = pl.loadings(with_these(np.zeros((4, 1))))
    assert bars(ax) == {}


def test_dimensions_are_drawn_in_the_order_asked_for_on_one_scale():
    adata = with_these([[1.0, 0.1, 3.0], [-1.0, -0.2, -4.0]])
    axes = pl.loadings(adata, dimensions=[3, 2])
    assert titles(axes) == ["dimension 3", "dimension 2"]
    assert [bars(ax)["gene0"][0] for ax in axes] == [3.0, 0.1]
    for ax in axes:
        assert ax.get_xlim() == pytest.approx((-4.2, 4.2))
    (only,) = pl.loadings(adata, dimensions=2)
    assert titles([only]) == ["dimension 2"]
    assert only.get_xlim() == pytest.approx((-0.21, 0.21))


def test_by_default_every_dimension_has_a_panel_and_every_gene_its_name():
    axes = pl.loadings(with_loadings(make_adata(n_latent=7), n_genes=100))
    assert titles(axes) == [f"dimension {number}" for number in range(1, 8)]
    axes[0].figure.canvas.draw()
    for ax in axes:
        assert len(bars(ax)) == 20
        boxes = [name.get_window_extent() for name in ax.get_yticklabels()]
        assert not any(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[:i])


def test_on_a_small_panel_names_do_not_overlap():
    figure, given = plt.subplots(figsize=(3, 1.5))
    pl.loadings(with_loadings(make_adata(n_latent=1), n_genes=100), axes=given)
    figure.canvas.draw()
    boxes = [name.get_window_extent() for name in given.get_yticklabels()]
    assert 2 < len(boxes) < 20
    assert not any(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[:i])


def test_panels_are_drawn_on_given_axes():
    adata = with_loadings(make_adata(n_latent=3))
    figure, given = plt.subplots(1, 2)
    axes = pl.loadings(adata, dimensions=[1, 2], axes=given)
    assert list(axes) == list(given)
    assert plt.get_fignums() == [figure.number]
    with pytest.raises(ValueError, match=r"2 for 3 panels \(dimension 1, dimension 2, dimension 3\)"):
        pl.loadings(adata, axes=given)


def test_loadings_after_h5ad_are_the_same(tmp_path):
    adata = with_loadings(make_adata(n_latent=2))
    before = [bars(ax) for ax in pl.loadings(adata)]
    after = [bars(ax) for ax in pl.loadings(round_trip(adata, tmp_path))]
    assert [list(each) for each in before] == [list(each) for each in after]


def test_a_result_without_loadings_is_an_error_that_names_the_call():
    adata = with_counts(make_adata())
    with pytest.raises(
        ValueError, match=r"no varm\['scvae_loadings'\].*svt\.tl\.scvae\(adata, linear_decoder=True\) f"
    ):
        pl.loadings(adata)
    with pytest.raises(ValueError, match=r"no varm\['fa_loadings'\].*linear_decoder=True, key_added='fa'\) first"):
        pl.loadings(adata, key="fa")
    with pytest.raises(ValueError, match=r"first, or pass key='scvae'\.$"):
        pl.loadings(with_loadings(make_adata()), key="fa")


def test_loadings_that_an_earlier_linear_decoder_left_behind_are_not_drawn():
    adata = with_loadings(make_adata())
    adata.uns["scvae"]["params"]["linear_decoder"] = False
    with pytest.raises(ValueError, match="only a decoder that is linear has loadings"):
        pl.loadings(adata)


@pytest.mark.parametrize("dimensions", [0, [1, 4], [1.5], [], "1"])
def test_dimensions_that_are_none_are_refused(dimensions):
    with pytest.raises(ValueError, match=r"counted from 1 to 3, .*obsm\['X_scvae'\]; found .*dimensions=\[1\]"):
        pl.loadings(with_loadings(make_adata(n_latent=3)), dimensions=dimensions)


@pytest.mark.parametrize("n_genes", [0, 2.5, None])
def test_a_number_of_genes_that_is_none_is_refused(n_genes):
    with pytest.raises(ValueError, match="`n_genes` must be a whole number of at least 1; found"):
        pl.loadings(with_loadings(make_adata()), n_genes=n_genes)
