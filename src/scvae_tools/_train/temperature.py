"""Temperature of the probabilities of the components, found without labels from cells that were held out.

q(y|x) of a trained model may be too sure, or not sure enough. What tells is how clearly the held-out cells fall into
groups: a mixture is fitted to their log q(y|x) alone, and the temperature T is taken with which softmax(log q(y|x) / T)
is nearest to the probabilities of that mixture. Training cells cannot tell: they seem as clearly apart as the model
believes. Figures in docs/clustering.md.

Symbols: n cells, k components, d = k − 1 contrasts between log q(y|x) of the components, or fewer.
"""

from __future__ import annotations

import numpy as np
import torch
from scipy.optimize import minimize_scalar
from scipy.special import log_softmax
from torch import Tensor

from scvae_tools._train.tied_mixtures import TiedMixtures

#: Largest number of cells that the mixture is fitted to.
LARGEST_SAMPLE = 10_000
#: Stopping rules of the fit: its steps, and the gain of log-likelihood in nats per cell.
EM_STEPS, EM_TOLERANCE = 500, 1e-6
#: Cells that the prior of the means counts for (Fraley & Raftery 2007, doi:10.1007/s00357-007-0004-5).
PRIOR_CELLS = 0.01
#: Standard deviation of log T beforehand, by which T stays near 1 where few cells tell, or none is between components.
SD_OF_LOG_TEMPERATURE = 1.0
#: log T that is looked for is at most this far from 0, ten standard deviations: more is never likely.
LARGEST_LOG_TEMPERATURE = 10 * SD_OF_LOG_TEMPERATURE


def temperature_of(log_probs: np.ndarray, *, random_state: int = 0) -> float:
    """Temperature at which the probabilities of the components are right as often as they say, without a unit.

    Parameters
    ----------
    log_probs
        log q(y|x) of cells that the model was not trained on, (n_cells, n_components). Cells of which one is not finite
        are left out.
    random_state
        Seed, by which 10,000 cells are drawn if there are more.

    Returns
    -------
    Above 1 where q(y|x) is too sure, below 1 where it is not sure enough; 1 without cells, or for one component.
    """
    log_probs = log_probs[np.isfinite(log_probs).all(1)]
    n = len(log_probs)
    if n > LARGEST_SAMPLE:
        log_probs = log_probs[np.random.default_rng(random_state).choice(n, LARGEST_SAMPLE, replace=False)]
    log_probs = log_softmax(log_probs.astype(np.float64), axis=1)
    # A component with less than one cell says nothing, and could take over the cells between two others.
    has_cells = np.exp(log_probs).sum(0) >= 1
    log_probs = log_softmax(log_probs[:, has_cells], axis=1) if has_cells.any() else log_probs[:, :0]
    points = _whitened_contrasts(log_probs)
    if points.shape[1] == 0:  # the same for all cells
        return 1.0
    return _nearest_temperature(log_probs, _regrouped(points, np.exp(log_probs)))


def _whitened_contrasts(log_probs: np.ndarray) -> np.ndarray:
    """Contrasts of log q(y|x), (n, d), with mean 0 and the unit matrix as covariance; without what is constant."""
    if 0 in log_probs.shape:
        return np.empty((len(log_probs), 0))
    contrasts = log_probs - log_probs.mean(1, keepdims=True)
    scale = max(1.0, np.abs(contrasts).max())
    left, singular, _ = np.linalg.svd(contrasts - contrasts.mean(0), full_matrices=False)
    # Rounding of float32, in which the model gives the probabilities, is no difference between cells.
    differs = singular > np.sqrt(contrasts.size) * scale * np.finfo(np.float32).eps
    return left[:, differs] * np.sqrt(len(contrasts))


def _regrouped(points: np.ndarray, probs: np.ndarray) -> np.ndarray:
    """Probabilities of a mixture with one covariance that is fitted to the points from the given ones, (n, k).

    EM with the weak prior of Fraley & Raftery (2007), without which a component of a few cells could become a point:
    means with the weight of `PRIOR_CELLS` at that of all points; a covariance that divides their volume among the
    components, with d + 2 degrees of freedom; and one cell more for each component, so that none of few cells is lost.
    """
    points, probs = torch.as_tensor(points.copy()), torch.as_tensor(probs)
    former = -torch.inf
    for _ in range(EM_STEPS):
        log_joint = _most_probable_mixture(points, probs).log_joint(points)[0]  # (k, n)
        log_density = log_joint.logsumexp(0)
        probs, value = (log_joint - log_density).exp().T, log_density.mean().item()
        if abs(value - former) < EM_TOLERANCE:
            break
        former = value
    return probs.numpy()


def _most_probable_mixture(points: Tensor, probs: Tensor) -> TiedMixtures:
    """Most probable mixture for whitened points (n, d) and probabilities of the components (n, k)."""
    (n, d), k = points.shape, probs.shape[1]
    size = probs.sum(0)
    means = probs.T @ points / (size + PRIOR_CELLS)[:, None]  # that of all points is 0
    scatter = points.T @ points - (means.T * (size + PRIOR_CELLS)) @ means  # with the part of the prior of the means
    own = torch.eye(d, dtype=points.dtype) * k ** (-2 / d)
    covariance = (own + scatter) / (n + (d + 2) + d + 1 + k)
    weights = (size + 1) / (n + k)
    return TiedMixtures(weights[None], means[None], covariance[None])


def _nearest_temperature(log_probs: np.ndarray, target: np.ndarray) -> float:
    """T with which softmax(log_probs / T) is nearest to the target in cross-entropy, given a log-normal prior of T."""

    def surprise(log_temperature: float) -> float:
        each = log_softmax(log_probs * np.exp(-log_temperature), axis=1)
        return -(target * each).sum() + 0.5 * (log_temperature / SD_OF_LOG_TEMPERATURE) ** 2

    bounds = (-LARGEST_LOG_TEMPERATURE, LARGEST_LOG_TEMPERATURE)
    return float(np.exp(minimize_scalar(surprise, bounds=bounds, method="bounded", options={"xatol": 1e-6}).x))
