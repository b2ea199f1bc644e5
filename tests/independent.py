"""Numbers that tests hold the package against, and the error that a Monte Carlo estimate of them may have."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING

import numpy as np
import torch
from scipy import special, stats

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from scvae_tools._vae import VAE

N_ERRORS = 5  #: standard errors within which an estimate must lie
REPEATS = 20  #: independent calls that give the standard error


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        yield


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def array(value: torch.Tensor) -> np.ndarray:
    return value.detach().numpy()


def log_pmf(x: np.ndarray, params: dict[str, torch.Tensor]) -> np.ndarray:
    """Log p(x_g) by SciPy; heads that it does not know fail, so that a new likelihood is written down here."""
    params = {name: array(value) for name, value in params.items()}
    assert set(params) <= {"log_rate", "log_r", "gate"}
    rate = np.exp(params["log_rate"])
    if "log_r" in params:
        r = np.exp(params["log_r"])
        base = stats.nbinom.logpmf(x, r, r / (r + rate))
    else:
        base = stats.poisson.logpmf(x, rate)
    if "gate" not in params:
        return base
    kept = base + special.log_expit(-params["gate"])
    return np.where(x == 0, np.logaddexp(special.log_expit(params["gate"]), kept), kept)


def log_likelihood_at(module: VAE, z: np.ndarray, cells: tuple) -> np.ndarray:
    """Σ_g log p(x_g|z) of z (..., n, d), (..., n)."""
    x, size, covariates = cells
    return log_pmf(x.numpy(), module.decoder(torch.tensor(z), module.log_size(size), covariates)).sum(-1)


def estimate(draw: Callable[[], torch.Tensor]) -> tuple[np.ndarray, np.ndarray]:
    """Mean of `REPEATS` calls, and its standard error."""
    with seeded(0), torch.no_grad():
        values = np.stack([array(draw()) for _ in range(REPEATS)])
    return values.mean(0), values.std(0, ddof=1) / np.sqrt(REPEATS)


def assert_within_errors(found: np.ndarray, error: np.ndarray, expected: np.ndarray) -> None:
    np.testing.assert_array_less(np.abs(found - expected), N_ERRORS * error + 1e-9)
