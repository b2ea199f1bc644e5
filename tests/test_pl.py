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
from scvae_tools._calibration import calibration
from scvae_tools.pl import _calibration as reliability_panel
from scvae_tools.pl import _figures

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


def make_curve(chosen=9, largest=20):
    """Fake the table of start_mixture: little overlap up to the number chosen, much beyond."""
    number = np.arange(1, largest + 1)
    return pd.DataFrame(
        {
            "n_components": number,
            "overlap": np.where(number <= chosen, 0.01 * (number - 1), 0.9 + 0.02 * number),
            "share_of_runs": np.select([number == chosen, number == chosen - 1], [0.75, 0.25], 0.0),
            "chosen": number == chosen,
        },
        index=number.astype(str),
    )


def with_curve(adata, curve=None, key="scvae"):
    curve = make_curve() if curve is None else curve
    adata.uns[key] |= {"components": {"n_components": int(curve["chosen"].argmax()) + 1, "curve": curve}}
    return adata


def with_probabilities(adata, probs, names=None):
    """Replace the probabilities, and the components by the most probable ones."""
    probs = np.asarray(probs, dtype=np.float32)
    names = [str(i) for i in range(probs.shape[1])] if names is None else names
    adata.obsm["scvae_probs"] = probs
    adata.obs["scvae"] = pd.Categorical(np.array(names)[probs.argmax(1)], categories=names)
    return adata


def line(ax, label):
    return next(drawn for drawn in ax.lines if drawn.get_label() == label)


def texts(ax):
    return [text.get_text() for text in ax.texts]


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
    assert tuple(adata.uns["scvae_colors"]) == _figures.OKABE_ITO


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


# --- components ---------------------------------------------------------------------------------------------------


def right_axis(ax):
    return next(other for other in ax.figure.axes if other is not ax)


def test_the_overlap_is_drawn_by_number_of_components():
    curve = make_curve()
    drawn = line(pl.components(with_curve(make_adata(), curve)), "overlap")
    np.testing.assert_array_equal(drawn.get_xdata(), curve["n_components"])
    np.testing.assert_array_equal(drawn.get_ydata(), curve["overlap"])
    assert drawn.get_marker() == "o"


def test_rows_may_be_in_any_order():
    curve = make_curve()
    drawn = line(pl.components(with_curve(make_adata(), curve.iloc[::-1])), "overlap")
    np.testing.assert_array_equal(drawn.get_ydata(), curve["overlap"])


@pytest.mark.parametrize(("chosen", "name"), [(1, "1 component"), (9, "9 components"), (20, "20 components")])
def test_the_number_that_was_chosen_is_marked_and_named(chosen, name):
    ax = pl.components(with_curve(make_adata(), make_curve(chosen)))
    np.testing.assert_array_equal(line(ax, "chosen").get_xdata(), [chosen, chosen])
    assert name in texts(ax)


def test_the_threshold_is_dashed_and_named():
    ax = pl.components(with_curve(make_adata()))
    np.testing.assert_array_equal(line(ax, "threshold").get_ydata(), [0.15, 0.15])
    assert line(ax, "threshold").is_dashed()
    assert "threshold 0.15" in texts(ax)


@pytest.mark.parametrize(("chosen", "side"), [(2, "right"), (13, "left")])
def test_the_name_of_the_threshold_is_where_the_line_is_not(chosen, side):
    ax = pl.components(with_curve(make_adata(), make_curve(chosen)))
    name = next(text for text in ax.texts if text.get_text() == "threshold 0.15")
    assert name.get_horizontalalignment() == side


def test_shares_of_runs_are_bars_on_the_right_axis():
    curve = make_curve()
    right = right_axis(pl.components(with_curve(make_adata(), curve)))
    np.testing.assert_allclose([bar.get_height() for bar in right.patches], curve["share_of_runs"])
    np.testing.assert_allclose([bar.get_x() + bar.get_width() / 2 for bar in right.patches], curve["n_components"])
    assert right.yaxis.get_label_position() == "right"


def test_bars_are_behind_the_line():
    ax = pl.components(with_curve(make_adata()))
    assert ax.get_zorder() > right_axis(ax).get_zorder()
    assert not ax.patch.get_visible()


def test_both_axes_have_zero_at_the_same_height():
    ax = pl.components(with_curve(make_adata()))
    heights = [axis.transAxes.inverted().transform(axis.transData.transform((1, 0)))[1] for axis in ax.figure.axes]
    assert heights[0] == pytest.approx(heights[1])


def test_axes_of_components_are_named_with_units():
    ax = pl.components(with_curve(make_adata()))
    assert ax.get_xlabel() == "number of components"
    assert ax.get_ylabel().endswith("(nats per cell of the smaller)")
    assert right_axis(ax).get_ylabel() == "share of runs"


def test_the_threshold_is_inside_where_no_overlap_comes_near():
    curve = make_curve().assign(overlap=0.001)
    low, high = pl.components(with_curve(make_adata(), curve)).get_ylim()
    assert low < 0.001 < 0.15 < high


def test_one_number_of_components_is_drawn():
    ax = pl.components(with_curve(make_adata(), make_curve(1, largest=1)))
    assert line(ax, "overlap").get_xydata().tolist() == [[1, 0]]


@pytest.mark.parametrize("chosen", [1, 9, 20])
def test_components_texts_do_not_overlap(chosen):
    ax = pl.components(with_curve(make_adata(), make_curve(chosen)))
    assert texts_that_overlap(ax.figure) == []


def test_components_after_h5ad_are_the_same(tmp_path):
    adata = with_curve(make_adata())
    before, after = pl.components(adata), pl.components(round_trip(adata, tmp_path))
    assert texts(before) == texts(after)
    for label in ("overlap", "chosen", "threshold"):
        np.testing.assert_array_equal(line(before, label).get_xydata(), line(after, label).get_xydata())


def test_components_of_another_key_are_drawn():
    assert "4 components" in texts(pl.components(with_curve(make_adata(key="foo"), make_curve(4), "foo"), key="foo"))


def test_a_number_that_was_given_has_no_curve_and_the_error_says_so():
    adata = make_adata()
    adata.uns["scvae"] |= {"components": {"n_components": 12}}
    with pytest.raises(
        ValueError, match=r"no uns\['scvae'\].*number was given \(12, .*n_components=None, key_added='scvae'"
    ):
        pl.components(adata)


@pytest.mark.parametrize("through_file", [False, True], ids=["in memory", "after h5ad"])
def test_a_plain_vae_has_no_components_and_the_error_says_so(through_file, tmp_path):
    adata = make_adata(n_components=0)
    adata.uns["scvae"]["params"]["mixture"] = False
    adata = round_trip(adata, tmp_path) if through_file else adata
    with pytest.raises(ValueError, match=r"'scvae' is the result of a plain VAE.*mixture=True, key_added='scvae'"):
        pl.components(adata)


def test_components_of_a_missing_result_name_the_call():
    with pytest.raises(
        ValueError, match=r"no results of svt\.tl\.scvae\. Run svt\.tl\.scvae\(adata, key_added='scvae'\)"
    ):
        pl.components(ad.AnnData(np.ones((3, 2))))
    with pytest.raises(ValueError, match=r"no uns\['foo'\]\['components'\]\['curve'\].*under \['scvae'\]"):
        pl.components(with_curve(make_adata()), key="foo")


@pytest.mark.parametrize(
    ("curve", "finding"),
    [(make_curve().drop(columns="overlap"), r"lacks the columns \['overlap'\]"), (make_curve()[:0], "has no rows")],
    ids=["column", "rows"],
)
def test_a_curve_that_lacks_something_is_an_error(curve, finding):
    adata = make_adata()
    adata.uns["scvae"]["components"] = {"curve": curve}
    with pytest.raises(ValueError, match=finding):
        pl.components(adata)


# --- ambiguous ----------------------------------------------------------------------------------------------------

# Of 4 cells of component 0, two are ambiguous, both with 2; of 2 cells of component 1 none; of 1 of component 2 one.
FEW = [[0.6, 0.1, 0.3], [0.5, 0.2, 0.3], [1, 0, 0], [0.95, 0.05, 0], [0, 1, 0], [0, 0.9, 0.1], [0.1, 0.3, 0.6]]


def bars(ax):
    return [bar.get_width() for bar in ax.patches]


def component_names(ax):
    return [tick.get_text() for tick in ax.get_yticklabels()]


def test_bars_are_the_shares_of_ambiguous_cells():
    ax = pl.ambiguous(with_probabilities(make_adata(7), FEW))
    assert component_names(ax) == ["0", "1", "2"]
    assert bars(ax) == [0.5, 0, 1]


def test_beside_a_bar_is_the_component_most_often_confused():
    ax = pl.ambiguous(with_probabilities(make_adata(7), FEW))
    assert texts(ax) == ["2 of 4, all with 2", "0 of 2", "1 of 1, with 1"]


def test_of_cells_confused_with_several_the_share_of_the_most_frequent_is_named():
    ax = pl.ambiguous(with_probabilities(make_adata(3), [[0.6, 0.1, 0.3], [0.5, 0.2, 0.3], [0.7, 0.2, 0.1]]))
    assert texts(ax) == ["3 of 3, 67% of them with 2"]


def test_the_title_is_the_share_of_all_cells():
    ax = pl.ambiguous(with_probabilities(make_adata(7), FEW))
    assert titles([ax]) == ["43% of cells: top probability below 0.9"]


def test_the_threshold_moves_cells():
    ax = pl.ambiguous(with_probabilities(make_adata(7), FEW), threshold=0.55)
    assert bars(ax) == [0.25, 0, 0]
    assert titles([ax]) == ["14% of cells: top probability below 0.55"]


def test_the_first_component_is_on_top():
    ax = pl.ambiguous(make_adata())
    bottom, top = ax.get_ylim()
    assert top < 0 < 3 < bottom


def test_components_of_no_cell_have_no_bar():
    assert component_names(pl.ambiguous(with_probabilities(make_adata(2), [[0.9, 0, 0.1], [0.2, 0, 0.8]]))) == [
        "0",
        "2",
    ]


def test_bars_have_the_colours_of_the_clusters():
    adata = make_adata()
    pl.clusters(adata)
    before = [to_hex(bar.get_facecolor()) for bar in pl.ambiguous(adata).patches]
    assert before == list(adata.uns["scvae_colors"])
    del adata.uns["scvae_colors"]  # the same, whichever is drawn first
    assert [to_hex(bar.get_facecolor()) for bar in pl.ambiguous(adata).patches] == before
    assert "scvae_colors" not in adata.uns


def test_bars_of_a_subset_have_the_colours_of_their_names():
    adata = with_probabilities(make_adata(7), FEW)
    adata.uns["scvae_colors"] = ["#ff0000", "#00ff00", "#0000ff"]
    subset = adata[adata.obs["scvae"] != "1"].copy()
    assert [to_hex(bar.get_facecolor()) for bar in pl.ambiguous(subset).patches] == ["#ff0000", "#0000ff"]


def test_more_components_than_colours_are_grey():
    ax = pl.ambiguous(make_adata(5_000, n_components=120))
    assert len({bar.get_facecolor() for bar in ax.patches}) == 1


@pytest.mark.parametrize("names", [None, ["natural killer cells, activated", "B", "dendritic"]], ids=["short", "long"])
def test_ambiguous_texts_do_not_overlap_and_leave_room_for_the_bars(names):
    ax = pl.ambiguous(with_probabilities(make_adata(7), FEW, names))
    assert texts_that_overlap(ax.figure) == []
    assert ax.get_window_extent().width > 0.25 * ax.figure.bbox.width
    assert all(text.get_window_extent().x1 <= ax.figure.bbox.x1 for text in ax.texts)


def test_sure_cells_have_an_empty_picture():
    ax = pl.ambiguous(with_probabilities(make_adata(3), np.eye(3)))
    assert bars(ax) == [0, 0, 0]
    assert titles([ax]) == ["0% of cells: top probability below 0.9"]


@pytest.mark.parametrize(
    ("share", "text"),
    [(0, "0%"), (1e-5, "< 0.1%"), (0.004, "0.4%"), (0.25, "25%"), (0.996, "99.6%"), (0.9999, "> 99.9%"), (1, "100%")],
)
def test_shares_near_none_and_all_are_not_rounded_to_them(share, text):
    assert _figures.percent(share) == text


def test_ambiguous_needs_probabilities():
    with pytest.raises(ValueError, match=r"'scvae_probs'\] is not among.*mixture=True, key_added='scvae'"):
        pl.ambiguous(make_adata(n_components=0))


# --- calibration --------------------------------------------------------------------------------------------------


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


# --- one panel ----------------------------------------------------------------------------------------------------


def draw_components(adata, **options):
    return pl.components(with_curve(adata), **options)


def draw_calibration(adata, **options):
    return pl.calibration(adata, "cell_type", **options)


ONE_PANEL = [draw_components, pl.ambiguous, draw_calibration]


@pytest.mark.parametrize("plot", ONE_PANEL)
def test_one_panel_is_drawn_on_given_axes(plot):
    figure, given = plt.subplots(1, 2)
    assert plot(make_adata(), ax=given[1]) is given[1]
    assert plt.get_fignums() == [figure.number]
    assert not given[0].has_data()


@pytest.mark.parametrize("plot", ONE_PANEL)
@pytest.mark.parametrize("n_cells", [10, 100_000])
def test_one_panel_is_drawn_in_seconds(plot, n_cells, tmp_path):
    adata = make_adata(n_cells)
    start = time.perf_counter()
    plot(adata, save=tmp_path / "figure.png")
    assert time.perf_counter() - start < 20


@pytest.mark.parametrize("plot", ONE_PANEL)
def test_one_panel_leaves_adata_as_it_was(plot):
    adata, same = with_curve(make_adata()), with_curve(make_adata())
    plot(adata)
    pd.testing.assert_frame_equal(adata.obs, same.obs)
    np.testing.assert_array_equal(adata.obsm["scvae_probs"], same.obsm["scvae_probs"])
    assert set(adata.uns) == set(same.uns)


# --- all ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("plot", [pl.training, pl.clusters, *ONE_PANEL])
@pytest.mark.parametrize("as_type", [str, lambda path: path], ids=["str", "Path"])
def test_save_writes_a_png(plot, as_type, tmp_path):
    plot(make_adata(), save=as_type(tmp_path / "figure.png"))
    assert (tmp_path / "figure.png").read_bytes().startswith(b"\x89PNG")
    assert plt.imread(tmp_path / "figure.png")[..., :3].std() > 0.01  # something is on it


@pytest.mark.parametrize("plot", [pl.training, pl.clusters, *ONE_PANEL])
def test_show_shows_once(plot, monkeypatch):
    shown = []
    monkeypatch.setattr(plt, "show", lambda: shown.append(True))
    plot(make_adata(), show=True)
    assert shown == [True]


@pytest.mark.parametrize("plot", [pl.training, pl.clusters, *ONE_PANEL])
def test_one_figure_is_made(plot):
    plot(make_adata())
    assert len(plt.get_fignums()) == 1


def test_importing_pl_loads_no_heavy_package():
    heavy = ["torch", "scvi", "scanpy", "matplotlib"]
    code = f"import sys; import scvae_tools.pl; print([name for name in {heavy} if name in sys.modules])"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"
