"""The latent dimensions that are used."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
from matplotlib import pyplot as plt
from matplotlib.colors import to_hex
from pictures import make_adata, round_trip, titles

from scvae_tools import SCVAE, datasets, pl

KL = [0.5, 0.009, 2.0, 0.0, 0.01]


def with_kl(values=KL):
    adata = make_adata(n_latent=len(values))
    adata.uns["scvae"]["kl_by_dimension"] = np.array(values)
    return adata


def heights(ax):
    return [bar.get_height() for bar in ax.patches]


def names(ax):
    return [tick.get_text() for tick in ax.get_xticklabels()]


def ticks_that_overlap(ax):
    ax.figure.canvas.draw()
    boxes = [tick.get_window_extent() for tick in ax.get_xticklabels()]
    return [(a, b) for i, a in enumerate(boxes) for b in boxes[:i] if a.overlaps(b)]


def test_bars_are_sorted_and_named_by_dimension_from_one():
    ax = pl.kl(with_kl())
    assert heights(ax) == [2.0, 0.5, 0.01, 0.009, 0.0]
    assert names(ax) == ["3", "1", "5", "2", "4"]
    assert ax.get_ylabel() == "KL (nats per cell)"


def test_dimensions_below_a_hundredth_of_a_nat_are_grey_and_unused():
    ax = pl.kl(with_kl())
    colours = [to_hex(bar.get_facecolor()) for bar in ax.patches]
    assert colours == ["#0072b2"] * 3 + ["#999999"] * 2
    assert [to_hex(tick.get_color()) for tick in ax.get_xticklabels()] == ["#000000"] * 3 + ["#999999"] * 2
    assert titles([ax]) == ["3 of 5 dimensions in use"]


@pytest.mark.parametrize(
    ("values", "title"), [([1.0], "1 of 1 dimension in use"), ([0, 0], "0 of 2 dimensions in use")]
)
def test_one_dimension_and_none_that_is_used_are_drawn(values, title):
    ax = pl.kl(with_kl(values))
    assert titles([ax]) == [title]
    bottom, top = ax.get_ylim()
    assert bottom == 0 < top


def test_a_model_is_asked_itself():
    adata = datasets.simulate(n_cells=60, n_genes=20, n_components=2)
    SCVAE.setup_anndata(adata)
    model = SCVAE(adata, n_latent=3, mixture=False)
    with pytest.raises(ValueError, match=r"this SCVAE is not\. Call model\.train\(\)"):
        pl.kl(model)
    model.train(2, progress=False, accelerator="cpu")
    # A plain VAE's KL by dimension adds up to the KL of z.
    assert sum(heights(pl.kl(model))) == pytest.approx(model.get_elbo_terms()["kl_z"].mean(), rel=1e-4)


@pytest.mark.parametrize("n_latent", [2, 10, 32, 100])
def test_numbers_of_dimensions_do_not_overlap(n_latent):
    ax = pl.kl(with_kl(np.linspace(0, 3, n_latent)))
    assert ticks_that_overlap(ax) == []
    assert len(names(ax)) == n_latent


def test_on_a_small_panel_only_the_numbers_that_have_room_are_written():
    _, axes = plt.subplots(1, 3, figsize=(6, 2))
    ax = pl.kl(with_kl(np.linspace(0, 3, 60)), ax=axes[0])
    assert 5 < len(names(ax)) < 60
    assert ticks_that_overlap(ax) == []


def test_kl_after_h5ad_is_the_same(tmp_path):
    adata = with_kl()
    assert heights(pl.kl(adata)) == heights(pl.kl(round_trip(adata, tmp_path)))


def test_a_result_without_it_is_an_error_with_two_remedies():
    adata = make_adata()
    del adata.uns["scvae"]["kl_by_dimension"]
    with pytest.raises(
        ValueError,
        match=r"no uns\['scvae'\]\['kl_by_dimension'\].*key_added='scvae'\) again, or pass the trained model",
    ):
        pl.kl(adata)


def test_a_missing_result_is_an_error_that_names_those_there_are():
    with pytest.raises(ValueError, match=r"no uns\['foo'\]\['kl_by_dimension'\] in adata.*under \['scvae'\]"):
        pl.kl(make_adata(), key="foo")


def test_something_else_is_an_error():
    with pytest.raises(ValueError, match=r"needs an AnnData or a trained SCVAE; found SimpleNamespace"):
        pl.kl(SimpleNamespace())


@pytest.mark.parametrize("values", [[1.0, np.nan], [[1.0, 2.0]], []])
def test_values_that_are_not_a_number_per_dimension_are_an_error(values):
    adata = make_adata()
    adata.uns["scvae"]["kl_by_dimension"] = np.array(values)
    with pytest.raises(ValueError, match="finite number for each latent dimension"):
        pl.kl(adata)
