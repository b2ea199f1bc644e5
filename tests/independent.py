"""Numbers that tests hold the package against, and the error that a Monte Carlo estimate of them may have."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING

import numpy as np
import torch
from scipy import special, stats

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


#: Those whose heads alone do not tell them from others.
BY_NAME = {
    "bernoulli": lambda x, rate, _: np.where(x > 0, stats.poisson.logsf(0, rate), -rate),
    "gaussian": lambda x, rate, spread: stats.norm.logpdf(x, rate, spread["log_sigma"]),
    "log_normal": lambda x, rate, spread: stats.lognorm.logpdf(x, spread["log_sigma"], -1, 1 + rate),
    "lomax": lambda x, rate, spread: stats.lomax.logpdf(x, 1 + spread["log_tail"], 0, spread["log_tail"] * rate),
}


def log_pmf(x: np.ndarray, params: dict[str, torch.Tensor], likelihood: str = "") -> np.ndarray:
    """Log p(x_g) by SciPy; heads that it does not know fail, so that a new likelihood is written down here."""
    params = {name: array(value) for name, value in params.items()}
    categories = [params.pop(name) for name in sorted(params) if name.startswith("category_")]
    if categories:
        return log_pmf_above(x, params, categories)
    rate = np.exp(params["log_rate"])
    if likelihood in BY_NAME:
        return BY_NAME[likelihood](x, rate, {name: np.exp(value) for name, value in params.items()})
    assert set(params) <= {"log_rate", "log_r", "gate"}
    if "log_r" in params:
        r = np.exp(params["log_r"])
        base = stats.nbinom.logpmf(x, r, r / (r + rate))
    else:
        base = stats.poisson.logpmf(x, rate)
    if "gate" not in params:
        return base
    kept = base + special.log_expit(-params["gate"])
    return np.where(x == 0, np.logaddexp(special.log_expit(params["gate"]), kept), kept)


def log_base_measure(x: np.ndarray, likelihood: str, k_max: int = 0) -> np.ndarray:
    """The part of `log_pmf` that no parameter enters and that is left out of the sum over genes, at first."""
    if likelihood in BY_NAME:
        return -np.log1p(x) if likelihood == "log_normal" else np.zeros_like(x)
    return -special.gammaln(np.maximum(x - k_max, 0) + 1)


def log_pmf_above(x: np.ndarray, params: dict[str, np.ndarray], logits: list[np.ndarray]) -> np.ndarray:
    """Log p(x_g) with categories below the counts of another likelihood."""
    k_max = len(logits)
    logits = np.broadcast_arrays(*logits, np.zeros(()), x)[:-1]
    log_weight = special.log_softmax(logits, axis=0)
    log_weight = np.choose(np.minimum(x, k_max).astype(int), log_weight)
    base = log_pmf(np.maximum(x - k_max, 0), {name: torch.as_tensor(value) for name, value in params.items()})
    return log_weight + np.where(x >= k_max, base, 0)


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
