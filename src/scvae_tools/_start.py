"""The mixture that training starts from: how many components, and which."""

from __future__ import annotations

import warnings
from typing import NamedTuple

import numpy as np

#: Starts of the Gaussian mixture; the likeliest is kept.
N_STARTS = 20
#: Leiden communities with a smaller share of the cells are not counted.
SMALLEST_SHARE = 0.01


class MixtureStart(NamedTuple):
    """A Gaussian mixture with one covariance, fitted to latent means."""

    weights: np.ndarray  # (k,)
    means: np.ndarray  # (k, d)
    covariance: np.ndarray  # (d, d)


def count_communities(latent: np.ndarray, *, random_state: int) -> int:
    """Number of Leiden communities (resolution 1, 15 neighbours) that hold at least one in a hundred cells.

    Parameters
    ----------
    latent
        Latent means, (n_cells, n_latent).
    random_state
        Seed of neighbours and Leiden.
    """
    import scanpy as sc
    from anndata import AnnData

    cells = AnnData(obsm={"latent": latent}, shape=(len(latent), 0))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        n_neighbors = min(15, max(2, len(latent) - 1))
        sc.pp.neighbors(cells, n_neighbors=n_neighbors, use_rep="latent", random_state=random_state)
        sc.tl.leiden(cells, flavor="igraph", directed=False, n_iterations=-1, random_state=random_state)
    shares = cells.obs["leiden"].value_counts(normalize=True)
    return max(1, int((shares >= SMALLEST_SHARE).sum()))


def fit_mixture(latent: np.ndarray, n_components: int, *, random_state: int, n_starts: int = N_STARTS) -> MixtureStart:
    """Gaussian mixture with one full covariance shared by all components, the likeliest of several k-means starts.

    Of the starts compared on ten data sets this gave the best partition: mean ARI at the true k 0.691, against 0.630
    for k-means and 0.503 for Leiden (docs/model.md).

    Parameters
    ----------
    latent
        Latent means, (n_cells, n_latent).
    n_components
        k.
    random_state
        Seed of the starts.
    n_starts
        Their number.
    """
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.mixture import GaussianMixture

    mixture = GaussianMixture(n_components, covariance_type="tied", n_init=n_starts, random_state=random_state)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        mixture.fit(np.asarray(latent, dtype=np.float64))
    return MixtureStart(mixture.weights_, mixture.means_, mixture.covariances_)
