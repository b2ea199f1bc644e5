"""What is drawn, against the numbers that were stored: no model is trained here."""

from __future__ import annotations

import subprocess
import sys
import time
from itertools import pairwise
from types import SimpleNamespace

import anndata as ad
import matplotlib as mpl
import numpy as np
import pandas as pd
import pytest

mpl.use("Agg")

from matplotlib import pyplot as plt
from matplotlib.colors import to_hex, to_rgb

from scvae_tools import pl

# scanpy 1.11 calls a method that newer matplotlib will deprecate.
pytestmark = pytest.mark.filterwarnings("ignore:The set_bad function:PendingDeprecationWarning")

STAGES = {"warm-up": 5, "vae": 10, "mixture": 25}


@pytest.fixture(autouse=True)
def nothing_is_shown_and_all_is_closed(monkeypatch):
    monkeypatch.setattr(plt, "show", lambda *_, **__: pytest.fail("a figure was shown"))
    plt.close("all")
    yield
    plt.close("all")


def make_history(stages=None, *, validation=True, mixture=True, seed=0):
    stages = STAGES if stages is None else stages
    rng = np.random.default_rng(seed)
    epoch = np.arange(1, sum(stages.values()) + 1)
    stage = np.repeat(list(stages), list(stages.values()))
    history = pd.DataFrame({"epoch": epoch, "stage": stage, "kl_weight": np.minimum(epoch / 5, 1)})
    for split in ["train", "validation"] if validation else ["train"]:
        history[f"log_likelihood_{split}"] = -600 - 2_000 * np.exp(-epoch) + rng.normal(size=len(epoch))
        history[f"kl_z_{split}"] = 20 + rng.normal(size=len(epoch))
        history[f"elbo_{split}"] = history[f"log_likelihood_{split}"] - history[f"kl_z_{split}"]
        if mixture:
            history[f"kl_y_{split}"] = np.where(stage == "mixture", 1 + rng.random(len(epoch)), np.nan)
    return history


def make_adata(n_cells=60, *, n_components=4, n_latent=5, umap=True, key="scvae", history=None, seed=0):
    """Fake what svt.tl.scvae stores; ``n_components=0`` is a plain VAE."""
    rng = np.random.default_rng(seed)
    obs = pd.DataFrame({"total": rng.integers(1_000, 9_000, n_cells)}, index=np.arange(n_cells).astype(str))
    obs["cell_type"] = pd.Categorical(np.array(["B", "NK", "T"])[np.arange(n_cells) % 3])
    adata = ad.AnnData(obs=obs)
    adata.obsm[f"X_{key}"] = rng.normal(size=(n_cells, n_latent)).astype(np.float32)
    if n_components:
        names = np.arange(n_components).astype(str)
        adata.obs[key] = pd.Categorical(names[np.arange(n_cells) % n_components], categories=names)
        adata.obsm[f"{key}_probs"] = rng.dirichlet(np.ones(n_components), n_cells).astype(np.float32)
    if umap:
        adata.obsm["X_umap"] = rng.normal(size=(n_cells, 2)).astype(np.float32)
    history = make_history(mixture=n_components > 0) if history is None else history
    adata.uns[key] = {"params": {"n_latent": n_latent}, "history": history, "version": "0"}
    return adata


def round_trip(adata, tmp_path):
    adata.write_h5ad(tmp_path / "cells.h5ad")
    return ad.read_h5ad(tmp_path / "cells.h5ad")


def titles(axes):
    return [ax.get_title(loc="left") or ax.get_title() for ax in axes]


def curves(ax):
    return {line.get_label(): line for line in ax.lines if line.get_label() in ("train", "validation")}


def boundaries(ax):
    return [line.get_xdata()[0] for line in ax.lines if line.get_label().startswith("_")]


def stage_names(ax):
    return {text.get_text(): text for text in ax.texts}


def points(ax):
    """Coordinates of the cells, (n_cells, 2); the legend's own collections are empty."""
    return np.concatenate([np.asarray(drawn.get_offsets()) for drawn in ax.collections if len(drawn.get_offsets())])


def colours(ax):
    drawn = next(drawn for drawn in ax.collections if len(drawn.get_offsets()) > 1)
    return [to_hex(colour) for colour in drawn.get_facecolors()]


def legend_texts(ax):
    return [text.get_text() for text in ax.get_legend().get_texts()]


def texts_that_overlap(figure):
    figure.canvas.draw()
    boxes = [
        text.get_window_extent()
        for ax in figure.axes
        for text in [*ax.texts, ax.title, ax._left_title, ax.xaxis.label, ax.yaxis.label]
        if text.get_text()
    ]
    return [(a, b) for i, a in enumerate(boxes) for b in boxes[:i] if a.overlaps(b)]


# --- training -----------------------------------------------------------------------------------------------------


def test_training_draws_a_panel_for_each_term():
    assert titles(pl.training(make_adata())) == ["ELBO", "Log-likelihood", "KL of z", "KL of y"]


@pytest.mark.parametrize("term", ["elbo", "log_likelihood", "kl_z", "kl_y"])
@pytest.mark.parametrize("split", ["train", "validation"])
def test_lines_are_the_history(term, split):
    history = make_history()
    axes = pl.training(make_adata(history=history))
    line = curves(axes[["elbo", "log_likelihood", "kl_z", "kl_y"].index(term)])[split]
    known = history[["epoch", f"{term}_{split}"]].dropna()
    np.testing.assert_array_equal(line.get_xdata(), known["epoch"])
    np.testing.assert_array_equal(line.get_ydata(), known[f"{term}_{split}"])


def test_axes_carry_their_units():
    for ax in pl.training(make_adata()):
        assert (ax.get_xlabel(), ax.get_ylabel()) == ("epoch", "nats per cell")


def test_train_and_validation_differ_in_colour_and_lightness():
    lines = curves(pl.training(make_adata())[0])
    train, validation = (np.array(to_rgb(lines[split].get_color())) for split in ("train", "validation"))
    assert np.abs((train - validation) @ [0.299, 0.587, 0.114]) > 0.05


def test_the_legend_is_drawn_once():
    axes = pl.training(make_adata())
    assert [ax.get_legend() is not None for ax in axes] == [True, False, False, False]
    assert legend_texts(axes[0])[:2] == ["train", "validation"]


def test_the_best_validation_elbo_is_marked_and_named():
    history = make_history()
    ax = pl.training(make_adata(history=history))[0]
    best = history.loc[history["elbo_validation"].idxmax()]
    marker = ax.lines[-1]
    assert (marker.get_xdata()[0], marker.get_ydata()[0]) == (best["epoch"], best["elbo_validation"])
    assert legend_texts(ax)[-1] == f"best: −{-best['elbo_validation']:.1f} (epoch {best['epoch']})"


def test_stages_change_between_their_epochs():
    for ax in pl.training(make_adata()):
        assert boundaries(ax) == [5.5, 15.5]
        assert list(stage_names(ax)) == ["warm-up", "vae", "mixture"]


def test_stage_names_are_centred_over_their_epochs():
    axes = pl.training(make_adata(history=make_history({"warm-up": 30, "vae": 30, "mixture": 40})))
    centres = [text.xy[0] for text in stage_names(axes[0]).values()]
    np.testing.assert_allclose(centres, [0.15, 0.45, 0.80])


def test_one_stage_needs_no_marks():
    ax = pl.training(make_adata(history=make_history({"vae": 12})))[0]
    assert boundaries(ax) == []
    assert not ax.texts


@pytest.mark.parametrize(
    "stages",
    [
        STAGES,
        {"warm-up": 1, "vae": 1, "mixture": 200},
        {"warm-up": 200, "vae": 1, "mixture": 1},
        {f"stage {i}": 3 for i in range(12)},
    ],
    ids=["usual", "short at the start", "short at the end", "many"],
)
@pytest.mark.parametrize("mixture", [True, False], ids=["mixture", "vae"])
def test_no_texts_overlap(stages, mixture):
    axes = pl.training(make_adata(history=make_history(stages, mixture=mixture)))
    assert texts_that_overlap(axes[0].figure) == []


def test_a_stage_that_comes_back_is_marked_again():
    history = make_history({"vae": 30})
    history["stage"] = ["vae"] * 10 + ["mixture"] * 10 + ["vae"] * 10
    assert boundaries(pl.training(make_adata(history=history))[0]) == [10.5, 20.5]


def test_a_plain_vae_has_no_panel_for_y():
    assert titles(pl.training(make_adata(n_components=0))) == ["ELBO", "Log-likelihood", "KL of z"]


@pytest.mark.parametrize("empty", [np.nan, 0.0])
def test_a_column_of_nothing_for_y_is_no_panel(empty):
    history = make_history(mixture=False).assign(kl_y_train=empty, kl_y_validation=empty)
    assert len(pl.training(make_adata(history=history))) == 3


def test_without_validation_only_training_is_drawn():
    axes = pl.training(make_adata(history=make_history(validation=False)))
    assert all(list(curves(ax)) == ["train"] for ax in axes)
    assert legend_texts(axes[0]) == ["train"]


def test_validation_of_nan_is_no_validation():
    history = make_history(validation=False).assign(elbo_validation=np.nan)
    assert legend_texts(pl.training(make_adata(history=history))[0]) == ["train"]


def test_a_line_bridges_epochs_without_validation():
    history = make_history()
    history.loc[history["epoch"] % 5 != 0, "elbo_validation"] = np.nan
    line = curves(pl.training(make_adata(history=history))[0])["validation"]
    np.testing.assert_array_equal(line.get_xdata(), np.arange(5, 41, 5))


def test_one_epoch_is_visible():
    axes = pl.training(make_adata(history=make_history({"vae": 1}, mixture=False)))
    for ax in axes:
        assert all(line.get_marker() == "o" for line in curves(ax).values())
        assert ax.get_xlim() == (0.5, 1.5)
        ax.figure.canvas.draw()
        assert [tick for tick in ax.get_xticks() if 0.5 < tick < 1.5] == [1]


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_diverged_history_is_drawn_up_to_there(value):
    history = make_history(mixture=False)
    history.loc[20:, [column for column in history if column.startswith(("elbo", "log", "kl_z"))]] = value
    ax = pl.training(make_adata(history=history))[0]
    np.testing.assert_array_equal(curves(ax)["train"].get_ydata(), history["elbo_train"][:20])
    assert np.isfinite(ax.get_ylim()).all()


@pytest.mark.parametrize("value", [0.0, -600.0])
def test_a_constant_history_has_limits(value):
    history = make_history(mixture=False)
    history[["elbo_train", "elbo_validation"]] = value
    low, high = pl.training(make_adata(history=history))[0].get_ylim()
    assert low < value < high


def test_first_epochs_do_not_stretch_the_limits():
    history = make_history()
    low, high = pl.training(make_adata(history=history))[0].get_ylim()
    assert history["elbo_train"][0] < low  # about -1,350 where the rest is near -620
    assert high - low < 40


@pytest.mark.parametrize("seed", range(5))
def test_limits_contain_the_last_quarter_and_the_best(seed):
    rng = np.random.default_rng(seed)
    history = make_history(seed=seed)
    history["elbo_validation"] -= 3 * np.cumsum(rng.random(len(history)))  # overfits
    low, high = pl.training(make_adata(history=history))[0].get_ylim()
    inside = [*history["elbo_validation"][-10:], *history["elbo_train"][-10:], history["elbo_validation"].max()]
    assert low < min(inside)
    assert max(inside) < high


def test_a_model_plots_as_its_adata():
    history = make_history()
    of_model = pl.training(SimpleNamespace(history=history))
    of_adata = pl.training(make_adata(history=history))
    for a, b in zip(of_model, of_adata, strict=True):
        np.testing.assert_array_equal(curves(a)["train"].get_ydata(), curves(b)["train"].get_ydata())


def test_training_after_h5ad_is_the_same(tmp_path):
    adata = make_adata()
    for before, after in zip(pl.training(adata), pl.training(round_trip(adata, tmp_path)), strict=True):
        assert boundaries(before) == boundaries(after)
        assert list(stage_names(before)) == list(stage_names(after))
        for split, line in curves(before).items():
            np.testing.assert_array_equal(line.get_xydata(), curves(after)[split].get_xydata())


def test_training_draws_on_given_axes():
    figure, given = plt.subplots(2, 2)
    axes = pl.training(make_adata(), axes=given)
    assert list(axes) == list(given.ravel())
    assert plt.get_fignums() == [figure.number]


def test_training_leaves_adata_as_it_was():
    adata, same = make_adata(), make_adata()
    pl.training(adata)
    pd.testing.assert_frame_equal(adata.uns["scvae"]["history"], same.uns["scvae"]["history"])
    assert list(adata.uns) == list(same.uns)


@pytest.mark.parametrize("n_axes", [1, 3])
def test_the_wrong_number_of_axes_is_an_error(n_axes):
    _, given = plt.subplots(1, n_axes)
    with pytest.raises(ValueError, match=rf"there are {n_axes} for 4 panels \(elbo, .*Pass 4"):
        pl.training(make_adata(), axes=given)


def test_a_missing_result_names_the_call_and_the_results_there_are():
    with pytest.raises(ValueError, match=r"no uns\['foo'\].*under \['scvae'\].*svt.tl.scvae\(adata, key_added='foo'\)"):
        pl.training(make_adata(), key="foo")


def test_without_any_result_the_error_says_so():
    with pytest.raises(ValueError, match=r"no results of svt\.tl\.scvae\. Run .*key_added='scvae'\) first\.$"):
        pl.training(ad.AnnData(np.ones((3, 2))))


def test_an_untrained_model_is_an_error():
    with pytest.raises(ValueError, match=r"history of this SimpleNamespace is NoneType\. Call model\.train"):
        pl.training(SimpleNamespace(history=None))


def test_a_history_of_another_kind_is_an_error():
    with pytest.raises(ValueError, match=r"lacks the columns \['stage', 'elbo_train'"):
        pl.training(SimpleNamespace(history=pd.DataFrame({"epoch": [1]})))


def test_a_history_without_epochs_is_an_error():
    with pytest.raises(ValueError, match="has no epochs"):
        pl.training(SimpleNamespace(history=make_history().iloc[:0]))


# --- clusters -----------------------------------------------------------------------------------------------------


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
    assert tuple(adata.uns["scvae_colors"]) == pl.OKABE_ITO


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
    axes = pl.clusters(adata, labels=["cell_type", "total"])
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
    axes = pl.clusters(adata, labels="label")
    expected = {"str": ["b", "other"], "bool": ["False", "True"], "missing": ["b", "NA"]}
    assert legend_texts(axes[1]) == expected[kind]


def test_one_label_may_be_a_string():
    assert titles(pl.clusters(make_adata(), labels="cell_type")) == ["scvae", "cell_type"]


def test_titles_may_be_given_per_panel():
    assert titles(pl.clusters(make_adata(), labels="cell_type", title=["a", "b"])) == ["a", "b"]
    assert titles(pl.clusters(make_adata(), labels="cell_type", title="a")) == ["a", "cell_type"]


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
    axes = pl.clusters(make_adata(), labels=["cell_type", "total"])
    assert texts_that_overlap(axes[0].figure) == []


def test_legends_do_not_touch_the_next_panel():
    adata = make_adata()
    adata.obs["cell_type"] = adata.obs["cell_type"].cat.rename_categories({"NK": "natural killer cells, activated"})
    axes = pl.clusters(adata, labels=["cell_type", "total"])
    axes[0].figure.canvas.draw()
    for ax, following in pairwise(axes):
        assert ax.get_legend().get_window_extent().x1 < following.get_tightbbox().x0


def test_clusters_draws_on_given_axes():
    figure, given = plt.subplots(1, 2)
    assert list(pl.clusters(make_adata(), labels="cell_type", axes=given)) == list(given)
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
    pl.clusters(adata, labels=["cell_type", "total"])
    assert list(round_trip(adata, tmp_path).uns["scvae_colors"]) == list(adata.uns["scvae_colors"])


def test_only_colours_are_written():
    adata, same = make_adata(), make_adata()
    pl.clusters(adata, labels="cell_type")
    assert set(adata.uns) - set(same.uns) == {"scvae_colors", "cell_type_colors"}
    pd.testing.assert_frame_equal(adata.obs, same.obs)
    assert set(adata.obsm) == set(same.obsm)


def test_another_key_is_drawn():
    (ax,) = pl.clusters(make_adata(key="foo", umap=False), key="foo")
    assert (ax.get_title(), ax.get_xlabel()) == ("foo", "latent 1")


def test_without_a_mixture_only_labels_are_drawn():
    assert titles(pl.clusters(make_adata(n_components=0), labels="cell_type")) == ["cell_type"]


def test_without_a_mixture_and_labels_the_error_names_both_remedies():
    with pytest.raises(ValueError, match=r"obs\['scvae'\] is not.*mixture=True, key_added='scvae'\), or pass labels="):
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
        pl.clusters(make_adata(), labels=["cell_type", "nope"])


def test_a_latent_space_of_one_dimension_is_an_error():
    with pytest.raises(ValueError, match=r"obsm\['X_scvae'\] has 1.*use_rep='X_scvae'"):
        pl.clusters(make_adata(n_latent=1, umap=False))


def test_clusters_need_an_axes_per_panel():
    _, given = plt.subplots()
    with pytest.raises(ValueError, match=r"there are 1 for 2 panels \(scvae, cell_type\)"):
        pl.clusters(make_adata(), labels="cell_type", axes=given)


# --- both ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("plot", [pl.training, pl.clusters])
@pytest.mark.parametrize("as_type", [str, lambda path: path], ids=["str", "Path"])
def test_save_writes_a_png(plot, as_type, tmp_path):
    plot(make_adata(), save=as_type(tmp_path / "figure.png"))
    assert (tmp_path / "figure.png").read_bytes().startswith(b"\x89PNG")
    assert plt.imread(tmp_path / "figure.png")[..., :3].std() > 0.01  # something is on it


@pytest.mark.parametrize("plot", [pl.training, pl.clusters])
def test_show_shows_once(plot, monkeypatch):
    shown = []
    monkeypatch.setattr(plt, "show", lambda: shown.append(True))
    plot(make_adata(), show=True)
    assert shown == [True]


@pytest.mark.parametrize("plot", [pl.training, pl.clusters])
def test_one_figure_is_made(plot):
    plot(make_adata())
    assert len(plt.get_fignums()) == 1


def test_importing_pl_loads_no_heavy_package():
    heavy = ["torch", "scvi", "scanpy", "matplotlib"]
    code = f"import sys; import scvae_tools.pl; print([name for name in {heavy} if name in sys.modules])"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"
