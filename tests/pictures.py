"""What every test of a plot needs: results as `svt.tl.scvae` stores them, all plots, and readers of their artists."""

from __future__ import annotations

import anndata as ad
import numpy as np
import pandas as pd
from matplotlib.colors import to_hex

from scvae_tools import pl

STAGES = {"warm-up": 5, "vae": 10, "mixture": 25}


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


#: Every public plot, drawn from a fake result; a plot that is not here fails `test_every_plot_is_enrolled`.
PLOTS = {
    "ambiguous": pl.ambiguous,
    "calibration": lambda adata, **options: pl.calibration(adata, "cell_type", **options),
    "clusters": pl.clusters,
    "components": lambda adata, **options: pl.components(with_curve(adata), **options),
    "training": pl.training,
}
#: Those that may have several panels, and take ``axes=``.
SEVERAL_PANELS = ("clusters", "training")
