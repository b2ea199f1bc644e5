"""Numbers that tests hold the package against, and the error that a Monte Carlo estimate of them may have."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING

import numpy as np
import torch
from likelihood_cases import CASES
from scipy import special

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from scvae_tools._module.vae import VAE

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


def log_pmf(x: np.ndarray, params: dict[str, torch.Tensor], likelihood: str = "") -> np.ndarray:
    """Log p(x_g) by SciPy, by the row of the likelihood in `CASES`; without a name, the first with these heads."""
    params = {name: array(value) for name, value in params.items()}
    categories = [params.pop(name) for name in sorted(params) if name.startswith("category_")]
    likelihood = likelihood or next(name for name, case in CASES.items() if set(case.heads) == set(params))
    if categories:
        return log_pmf_above(x, params, categories, likelihood)
    assert set(params) == set(CASES[likelihood].heads)
    return CASES[likelihood].log_pmf(x, params)


def log_base_measure(x: np.ndarray, likelihood: str, k_max: int = 0) -> np.ndarray:
    """The part of `log_pmf` that no parameter enters and that is left out of the sum over genes, at first."""
    return CASES[likelihood].log_base_measure(np.maximum(x - k_max, 0) if k_max else x)


def log_pmf_above(
    x: np.ndarray, params: dict[str, np.ndarray], logits: list[np.ndarray], likelihood: str
) -> np.ndarray:
    """Log p(x_g) with categories below the counts of another likelihood."""
    k_max = len(logits)
    logits = np.broadcast_arrays(*logits, np.zeros(()), x)[:-1]
    log_weight = special.log_softmax(logits, axis=0)
    log_weight = np.choose(np.minimum(x, k_max).astype(int), log_weight)
    return log_weight + np.where(x >= k_max, CASES[likelihood].log_pmf(np.maximum(x - k_max, 0), params), 0)


def log_likelihood_at(module: VAE, z: np.ndarray, cells: tuple) -> np.ndarray:
    """Σ_g log p(x_g|z) of z (..., n, d), (..., n)."""
    x, size, covariates = cells
    params = module.decoder(torch.tensor(z), module.log_size(size), covariates)
    return log_pmf(x.numpy(), params, module.gene_likelihood).sum(-1)


@torch.no_grad()
def widen(module: VAE) -> None:
    """Make a Gaussian p(x|z) so wide that not a few draws of z have all the weight."""
    if module.gene_likelihood == "gaussian":
        decoder = module.decoder
        log_sigma = decoder.shared["log_sigma"] if "log_sigma" in decoder.shared else decoder.heads["log_sigma"].bias
        log_sigma.add_(1.7)


def estimate(draw: Callable[[], torch.Tensor]) -> tuple[np.ndarray, np.ndarray]:
    """Mean of `REPEATS` calls, and its standard error."""
    with seeded(0), torch.no_grad():
        values = np.stack([array(draw()) for _ in range(REPEATS)])
    return values.mean(0), values.std(0, ddof=1) / np.sqrt(REPEATS)


def assert_within_errors(found: np.ndarray, error: np.ndarray, expected: np.ndarray) -> None:
    np.testing.assert_array_less(np.abs(found - expected), N_ERRORS * error + 1e-9)
