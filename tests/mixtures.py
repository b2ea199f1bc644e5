"""Small models with a mixture, and cells for them, that several tests share."""

from __future__ import annotations

import numpy as np
import torch
from independent import normal, seeded, widen

from scvae_tools._module.covariates import Covariates, Sizes
from scvae_tools._module.mixture_vaes import GMVAE, MixtureVAE, VaDE

N_CELLS, N_GENES = 3, 3


KINDS = {"gmvae": GMVAE, "vade": VaDE}


def randomise(module: torch.nn.Module) -> None:
    """Move every parameter that training would move."""
    with torch.no_grad():
        for seed, parameter in enumerate(p for p in module.parameters() if p.requires_grad and p.numel()):
            parameter.add_(0.3 * normal(*parameter.shape, seed=80 + seed).to(parameter))


def covariance_of(d: int) -> torch.Tensor:
    return 0.5 * torch.eye(d, dtype=torch.float64) + 0.3


def set_apart(module: MixtureVAE) -> None:
    """Set a mixture of clearly different components."""
    k, d = module.n_components, module.n_latent
    weights = torch.arange(1, k + 1, dtype=torch.float64)
    means = 2 * torch.linspace(-1, 1, k, dtype=torch.float64)[:, None] * torch.ones(d, dtype=torch.float64)
    means[:, 1:] += normal(k, d - 1, seed=5)
    module.set_mixture(weights / weights.sum(), means, covariance_of(d), torch.full((d,), 0.2, dtype=torch.float64))


def make_untrained(kind: str, k: int | None = 3, sizes: Sizes | None = None, **options: object) -> MixtureVAE:
    """Small, in float64, its mixture not set."""
    options = {"n_latent": 2, "n_hidden": 5} | options
    with seeded(0):
        return KINDS[kind](sizes or Sizes(N_GENES), n_components=k, **options).double().eval()


def make_mixture_vae(kind: str, k: int = 3, sizes: Sizes | None = None, **options: object) -> MixtureVAE:
    """With a mixture, then every parameter moved, so that q(z|x,y) depends on y and nothing is at its start."""
    module = make_untrained(kind, k, sizes, **options)
    set_apart(module)
    randomise(module)
    widen(module)
    return module


def make_cells(sizes: Sizes | None = None, n_cells: int = N_CELLS) -> tuple[torch.Tensor, torch.Tensor, Covariates]:
    """Counts, a third of them zero, size factors that are not their sums, and covariates."""
    sizes = sizes or Sizes(N_GENES)
    rng = np.random.default_rng(3)
    x = rng.poisson(3, (n_cells, sizes.n_genes)) * (rng.random((n_cells, sizes.n_genes)) < 0.7)
    columns = [rng.integers(n, size=(n_cells, 1)) for n in sizes.n_categories]
    covariates = Covariates(
        torch.tensor(rng.integers(sizes.n_batch, size=(n_cells, 1))),
        torch.tensor(np.hstack(columns)) if columns else None,
        torch.tensor(rng.normal(size=(n_cells, sizes.n_continuous))) if sizes.n_continuous else None,
    )
    return torch.tensor(x, dtype=torch.float64), torch.tensor(rng.uniform(0.5, 3, (n_cells, 1))), covariates
