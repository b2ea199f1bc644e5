"""Probabilities of components, and an AnnData that holds them."""

from __future__ import annotations

import anndata as ad
import numpy as np
import pandas as pd

PROBS = [[0.5, 0.3, 0.2], [0.95, 0.05, 0.0], [0.1, 0.3, 0.6], [0.0, 0.0, 1.0], [0.4, 0.2, 0.4]]


def make_adata(probs, *, key="scvae", names=None, dtype=np.float32):
    probs = np.asarray(probs, dtype=dtype)
    adata = ad.AnnData(obs=pd.DataFrame(index=[f"cell{i}" for i in range(len(probs))]))
    adata.obsm[f"{key}_probs"] = probs
    names = [str(i) for i in range(probs.shape[1])] if names is None else names
    adata.obs[key] = pd.Categorical(np.array(names)[probs.argmax(1)], categories=names)
    adata.obs[key] = adata.obs[key].cat.remove_unused_categories()  # as svt.tl.scvae does
    return adata


def draw(probs, seed=0):
    """Draw a label per cell from its own probabilities."""
    u = np.random.default_rng(seed).random((len(probs), 1))
    return (np.cumsum(probs, axis=1) < u).sum(1).clip(max=probs.shape[1] - 1)


def soft_assignments(n_cells=20_000, k=6, seed=0):
    """Probabilities from sure to unsure; each component is the most probable one of a part of the cells."""
    rng = np.random.default_rng(seed)
    logit = rng.normal(size=(n_cells, k))
    logit[np.arange(n_cells), np.arange(n_cells) % k] += rng.uniform(0, 6, n_cells)
    return np.exp(logit) / np.exp(logit).sum(1, keepdims=True)
