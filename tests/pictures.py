"""What every test of a plot needs: results as `svt.tl.scvae` stores them, all plots, and readers of their artists."""

from __future__ import annotations

import anndata as ad
import numpy as np
import pandas as pd
from matplotlib.colors import to_hex

from scvae_tools import pl
from scvae_tools._results.cluster_stability import Stability, means_of_runs, verdicts
from scvae_tools._results.comparison import RESULTS

STAGES = {"warm-up": 5, "vae": 10, "mixture": 25}


def make_history(stages=None, *, validation=True, mixture=True, seed=0):
    stages = STAGES if stages is None else stages
    rng = np.random.default_rng(seed)
    epoch = np.arange(1, sum(stages.values()) + 1)
    stage = np.repeat(list(stages), list(stages.values()))
    history = pd.DataFrame({"epoch": epoch, "stage": stage, "kl_weight": np.minimum(epoch / 5, 1)})
    history["rate_at_zeros"], history["max_rate"] = 3_000 * np.exp(-epoch / 4) + 200, 2.0 * epoch
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
    adata.uns[key]["kl_by_dimension"] = np.sort(rng.gamma(1, size=n_latent))
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


def with_prior(adata, key="scvae", seed=0):
    """Add the means and covariances of all components, as svt.tl.scvae stores them."""
    rng = np.random.default_rng(seed)
    k, d = adata.obsm[f"{key}_probs"].shape[1], adata.obsm[f"X_{key}"].shape[1]
    factors = rng.normal(size=(k, d, d)).astype(np.float32)
    means = rng.normal(size=(k, d)).astype(np.float32)
    prior = {"weights": np.full(k, 1 / k), "means": means, "covariances": factors @ factors.swapaxes(1, 2) / d}
    adata.uns[key] = adata.uns[key] | {"components": {"n_components": k} | prior}
    return adata


def with_counts(adata, n_genes=6, key="scvae", seed=0):
    """Copy into an AnnData that has genes, their counts and λ."""
    rng = np.random.default_rng(seed)
    rate = rng.gamma(2, size=(adata.n_obs, n_genes)).astype(np.float32)
    return ad.AnnData(
        rng.poisson(rate).astype(np.float32),
        obs=adata.obs.copy(),
        var=pd.DataFrame(index=[f"gene{gene}" for gene in range(n_genes)]),
        obsm=dict(adata.obsm),
        layers={f"{key}_lambda": rate},
        uns=dict(adata.uns),
    )


def with_loadings(adata, n_genes=40, key="scvae", seed=0):
    """Copy into an AnnData that has genes and the loadings of a linear decoder."""
    adata = with_counts(adata, n_genes, key, seed)
    n_latent = adata.obsm[f"X_{key}"].shape[1]
    loadings = np.random.default_rng(seed).normal(size=(n_genes, n_latent))
    adata.varm[f"{key}_loadings"] = loadings.astype(np.float32)
    return adata


def make_comparison(seed=0, **grid):
    """Fake the table of svt.tl.compare, for the given values by argument."""
    grid = grid or {"likelihood": ["nb", "zinb"], "random_state": [0, 1, 2]}
    table = pd.MultiIndex.from_product(grid.values(), names=grid).to_frame(index=False)
    table.index = table.index.astype(str)
    rng = np.random.default_rng(seed)
    for name in [name for name in RESULTS if name not in ("epochs", "components_used", "ari")]:
        table[name] = -600 + 10 * rng.normal(size=len(table))
    return table.assign(state="finished")


def with_comparison(adata, table=None, key="scvae_compare"):
    table = make_comparison() if table is None else table
    adata.uns[key] = {"table": table, "hashes": np.array(["0"] * len(table), dtype=object)}
    return adata


def with_tree(adata, key="scvae", seed=0):
    """Add the tree of four components, the first of which has two parts, as svt.tl.tree and svt.tl.cut store it."""
    names = ["0 and 3 more", "0+1+2", "3", "0+1", "2", "0", "1", "0,0", "0,1"]
    parent, n = np.array([-1, 0, 0, 1, 1, 3, 3, 5, 5]), len(adata)
    first = np.array([1, 3, -1, 5, -1, 7, -1, -1, -1])
    nodes = pd.DataFrame(
        {"name": names, "parent": parent, "first": first, "second": np.where(first > 0, first + 1, -1)}
    )
    nodes["is_component"] = [name in "0123" for name in names]
    nodes["n_cells"] = [n, 3 * n // 4, n // 4, n // 2, n // 4, n // 4, n // 4, n // 8, n // 8]
    nodes["n_clusters"] = [2, 3, 0, 4, 0, 5, 0, 0, 0]
    nodes["overlap"] = [0.0, 0.02, np.nan, 0.1, np.nan, 0.4, np.nan, np.nan, np.nan]
    nodes["p_value"] = np.nan
    rules = {"direction": np.random.default_rng(seed).normal(size=(9, adata.obsm[f"X_{key}"].shape[1]))}
    rules |= {"offset": np.zeros(9), "component_nodes": np.array([5, 6, 4, 2])}
    params = {"key": key, "max_depth": 1, "min_cells": 20, "random_state": 0}
    adata.uns[f"{key}_tree"] = {"nodes": nodes.set_index(nodes.index.astype(str)), "params": params} | rules
    return adata


def with_stability(adata, jaccard=None, kinds=("seed", "seed", "half", "half"), key="scvae"):
    """Add the Jaccard index of each cluster and run, (n_clusters, n_runs), as svt.tl.cluster_stability stores it."""
    names, n_cells = np.unique(adata.obs[key].astype(str), return_counts=True)
    if jaccard is None:
        lowest = np.linspace(0.95, 0.4, len(names))[:, None]
        jaccard = lowest + np.linspace(0, 0.05, len(kinds))
    runs = pd.DataFrame({"kind": kinds}, index=[str(i) for i in range(len(kinds))])
    means = [means_of_runs(jaccard[:, (runs["kind"] == kind).to_numpy()]) for kind in ("seed", "half")]
    columns = {"n_cells": n_cells, "jaccard_seeds": means[0], "jaccard_halves": means[1], "verdict": verdicts(*means)}
    stability = Stability(pd.DataFrame(columns, index=names), jaccard, runs, {"random_state": 0})
    adata.uns[key] = adata.uns[key] | {"stability": stability.stored()}
    return adata


def with_probabilities(adata, probs, names=None):
    """Replace the probabilities, and the components by the most probable ones."""
    probs = np.asarray(probs, dtype=np.float32)
    names = [str(i) for i in range(probs.shape[1])] if names is None else names
    adata.obsm["scvae_probs"] = probs
    adata.obs["scvae"] = pd.Categorical(np.array(names)[probs.argmax(1)], categories=names)
    return adata


def make_ppc(genes=("gene0", "HLA-A/B"), n_genes=30, seed=0):
    """Fake what svt.tl.ppc stores: a model with more zeros and more variance than the data; the last gene has none."""
    rng = np.random.default_rng(seed)
    table = pd.DataFrame({"mean": rng.lognormal(size=n_genes)}, index=[f"gene{i}" for i in range(n_genes)])
    table.loc[table.index[-1], "mean"] = 0.0
    table["variance"] = table["mean"] + table["mean"] ** 2
    table["share_of_zeros"] = 1 / (1 + table["mean"])
    for name, factor in {"mean": 1.1, "variance": 2.0, "share_of_zeros": 0.9}.items():
        table[f"{name}_model"], table[f"{name}_model_sd"] = factor * table[name], 0.05 * table[name]
    result = {"genes": table, "params": {"n_samples": 10, "n_cells": 60, "likelihood": "nb", "random_state": 0}}
    if genes:
        bins = {"first": [0, 1, 2, 3], "last": [0.0, 1.0, 2.0, np.inf], "cells": [40, 15, 5, 0]}
        bins |= {"cells_model": [38.0, 14.5, 6.0, 0.5], "cells_model_sd": [3.0, 2.0, 1.5, 0.7]}
        bins = pd.concat([pd.DataFrame({"gene": gene} | bins) for gene in genes], ignore_index=True)
        result["histograms"] = bins.set_index(bins.index.astype(str))
    return result


def with_ppc(adata, result=None, key="scvae"):
    adata.uns[f"{key}_ppc"] = make_ppc() if result is None else result
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


#: Fake results beside those of `make_adata`, and arguments, that some plots need.
WITH_MORE = {
    "calibration": lambda adata, **options: pl.calibration(adata, "cell_type", **options),
    "cluster_stability": lambda adata, **options: pl.cluster_stability(with_stability(adata), **options),
    "compare": lambda adata, **options: pl.compare(with_comparison(adata), **options),
    "components": lambda adata, **options: pl.components(with_curve(adata), **options),
    "confusion": lambda adata, **options: pl.confusion(adata, "cell_type", **options),
    "genes": lambda adata, **options: pl.genes(with_counts(adata), ["gene0", "gene1"], **options),
    "lambda_bars": lambda adata, **options: pl.lambda_bars(with_counts(adata), **options),
    "latent": lambda adata, **options: pl.latent(with_prior(adata), **options),
    "loadings": lambda adata, **options: pl.loadings(with_loadings(adata), **options),
    "ppc": lambda adata, **options: pl.ppc(with_ppc(adata), **options),
    "tree": lambda adata, **options: pl.tree(with_tree(adata), **options),
}
#: Every public plot, drawn from a fake result.
PLOTS = {name: WITH_MORE.get(name, getattr(pl, name)) for name in pl.__all__}
#: Those that may have several panels, and take ``axes=``.
SEVERAL_PANELS = ("clusters", "compare", "genes", "loadings", "ppc", "stability", "training")
