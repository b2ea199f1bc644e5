"""Cells of a hierarchy that is known, with the results that a trained mixture would have, and tests of their splits."""

from __future__ import annotations

import numpy as np
import pandas as pd
from anndata import AnnData
from scipy import stats

#: Centres of three groups far apart, of which the first two are closer; and of two halves around each.
GROUPS = np.array([[0.0, 0.0, 0.0], [9.0, 0.0, 0.0], [0.0, 40.0, 0.0]])
HALVES = np.array([[0.0, 0.0, -4.0], [0.0, 0.0, 4.0]])


def make_nested(n_cells=600, *, seed=0, key="scvae", groups=GROUPS, names=None):
    """Cells of groups, of two halves each; the components of the mixture are the groups, with exact probabilities.

    ``obs`` has the true ``group`` and ``half``. Groups get smaller, as the components of a model do.
    """
    rng = np.random.default_rng(seed)
    k = len(groups)
    shares = np.arange(2 * k, k, -1) / np.arange(2 * k, k, -1).sum()
    group = np.sort(rng.choice(k, n_cells, p=shares))
    half = rng.integers(2, size=n_cells)
    latent = groups[group] + HALVES[half] + rng.normal(size=(n_cells, groups.shape[1]))
    return with_components(latent, log_densities(latent, groups, shares), key, names, group=group, half=half)


def log_densities(latent, groups, shares):
    """Log of share times density of each group, of two halves, (n_cells, k), by SciPy."""
    halves = [[stats.multivariate_normal(centre + half).logpdf(latent) for half in HALVES] for centre in groups]
    return np.logaddexp.reduce(halves, axis=1).T - np.log(2) + np.log(shares)


def with_components(latent, log_joint, key="scvae", names=None, **obs):
    """AnnData with the results of a mixture; a column of ``obs`` for each of ``obs``."""
    probs = np.exp(log_joint - np.logaddexp.reduce(log_joint, axis=1, keepdims=True)).astype(np.float32)
    names = [str(i) for i in range(probs.shape[1])] if names is None else names
    rng = np.random.default_rng(0)
    adata = AnnData(rng.poisson(2.0, (len(latent), 4)).astype(np.float32))
    for name, values in obs.items():
        adata.obs[name] = pd.Categorical(values.astype(str))
    adata.obs[key] = pd.Categorical.from_codes(probs.argmax(1), names)
    adata.obsm[f"X_{key}"] = latent.astype(np.float32)
    adata.obsm[f"{key}_probs"] = probs
    return adata


def by_size(first, second):
    """Stand-in for a test of a split, whose p value says which cells it was given."""
    return 1 / (2 + abs(len(first) - len(second)))


def are_nested(one, other):
    """Whether of any two clusters of two columns one is within the other, or they share no cell."""
    (one, names), (other, names_of_other) = pd.factorize(one), pd.factorize(other)
    shape = len(names), len(names_of_other)
    table = np.bincount(one * shape[1] + other, minlength=shape[0] * shape[1]).reshape(shape)
    is_within = (table == table.sum(1, keepdims=True)) | (table == table.sum(0))
    return bool((is_within | (table == 0)).all())


def snapshot(adata):
    """What an AnnData holds, to be compared."""
    return (
        adata.obs.to_csv(),
        {key: value.tobytes() for key, value in adata.obsm.items()},
        repr(dict(adata.uns)),
        adata.X.tobytes(),
    )
