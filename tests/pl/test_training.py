"""Curves of the training."""

from __future__ import annotations

from types import SimpleNamespace

import anndata as ad
import numpy as np
import pandas as pd
import pytest
from matplotlib import pyplot as plt
from matplotlib.colors import to_rgb
from pictures import (
    STAGES,
    boundaries,
    curves,
    legend_texts,
    make_adata,
    make_history,
    round_trip,
    stage_names,
    texts_that_overlap,
    titles,
)

from scvae_tools import pl


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


def test_the_legend_hides_no_curve():
    history = make_history()
    history["elbo_validation"] -= 3 * np.arange(len(history))  # overfits: curves in all corners
    ax = pl.training(make_adata(history=history))[0]
    ax.figure.canvas.draw()
    assert ax.get_legend().get_window_extent().y1 < ax.xaxis.label.get_window_extent().y0 + 1


@pytest.mark.parametrize(
    ("params", "name"),
    [
        ({"dropout_rate": 0.2, "mixture": True}, "train (with dropout from epoch 16)"),
        ({"dropout_rate": {"latent": 0.1}, "mixture": "vade"}, "train (with dropout from epoch 16)"),
        ({"dropout_rate": 0.2, "mixture": False}, "train (with dropout from epoch 6)"),
        ({"dropout_rate": 0.0, "mixture": True}, "train"),
        ({}, "train"),
    ],
)
def test_the_legend_says_where_dropout_begins(params, name):
    adata = make_adata()
    adata.uns["scvae"]["params"] |= params
    assert legend_texts(pl.training(adata)[0])[:2] == [name, "validation"]
    model = SimpleNamespace(history=make_history(), init_params_={"non_kwargs": params})
    assert legend_texts(pl.training(model)[0])[:2] == [name, "validation"]


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


@pytest.mark.parametrize("wrap", [lambda history: SimpleNamespace(history=history), lambda history: history])
def test_a_model_or_its_history_plots_as_its_adata(wrap):
    history = make_history()
    of_adata = pl.training(make_adata(history=history))
    for a, b in zip(pl.training(wrap(history)), of_adata, strict=True):
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
