"""Where one way of computing becomes faster than another: the measurements behind two choices by size.

    python benchmarks/choices.py

First layer of the encoder, forward and gradient: gathering the weights of the non-zeros against a dense batch, by the
share of non-zeros (`LARGEST_SPARSE_DENSITY`). Bound and gradient of a VAE: ``engine="blocked"`` against ``"dense"``, by
cells and genes of a batch. Medians of 15; ratios above 1 say how many times the first way is faster.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import numpy as np
import torch
from scipy import sparse

from scvae_tools._data.loader import counts_of_matrix
from scvae_tools._module import networks as _networks
from scvae_tools._module.covariates import Covariates, Sizes
from scvae_tools._module.networks import Encoder
from scvae_tools._module.vae import VAE

if TYPE_CHECKING:
    from collections.abc import Callable

    from scvae_tools._module.sparse import Counts

DENSITIES = (0.05, 0.1, 0.2, 0.4, 0.6, 0.8)
LAYER_SHAPES = ((128, 2_000), (128, 15_000), (512, 15_000))
ENGINE_SHAPES = (
    (128, 10, 0.8),
    (64, 100, 0.5),
    (128, 200, 0.3),
    (128, 765, 0.2),
    (128, 2_000, 0.1),
    (128, 2_000, 0.8),
    (128, 15_000, 0.5),
)


def median_time(step: Callable[[], None]) -> float:
    """Milliseconds."""
    times = []
    for _ in range(18):
        start = time.perf_counter()
        step()
        times.append(time.perf_counter() - start)
    return 1e3 * float(np.median(times[3:]))


def batch(n: int, g: int, density: float) -> tuple[Counts, torch.Tensor, Covariates]:
    """Counts, size factors and covariates of random cells."""
    rng = np.random.default_rng(0)
    x = (1 + rng.poisson(1.0, (n, g))) * (rng.random((n, g)) < density)
    counts = counts_of_matrix(sparse.csr_matrix(x, dtype=np.float32))
    return counts, counts.total() + 1, Covariates(torch.zeros(n, 1, dtype=torch.long))


def first_layer(n: int, g: int, density: float, *, is_sparse: bool) -> float:
    """Time of the first layer and its gradient."""
    counts, _, covariates = batch(n, g, density)
    options = {"n_hidden": 128, "n_layers": 1, "dropout_rate": 0.0, "normalization": "layer"}
    encoder = Encoder(Sizes(g), encode_covariates=False, **options)
    _networks.LARGEST_SPARSE_DENSITY = 2.0 if is_sparse else 0.0

    def step() -> None:
        encoder.zero_grad()
        encoder(counts, covariates).sum().backward()

    return median_time(step)


def bound(n: int, g: int, density: float, likelihood: str, engine: str) -> float:
    """Time of the bound and its gradient."""
    cells, module = batch(n, g, density), VAE(Sizes(g), likelihood=likelihood, engine=engine)

    def step() -> None:
        module.zero_grad()
        module.bound(*cells, is_averaged=True).loss().backward()

    return median_time(step)


def main() -> None:
    """Run and print both tables."""
    chosen = _networks.LARGEST_SPARSE_DENSITY
    print(f"{torch.get_num_threads()} threads\n\nfirst layer, dense over sparse, by density\n{DENSITIES}")
    for n, g in LAYER_SHAPES:
        pairs = [[first_layer(n, g, d, is_sparse=way) for way in (False, True)] for d in DENSITIES]
        print(n, "x", g, [round(dense / gathered, 2) for dense, gathered in pairs], flush=True)
    _networks.LARGEST_SPARSE_DENSITY = chosen
    print("\nbound, dense over blocked: nb, zinb, poisson")
    for n, g, d in ENGINE_SHAPES:
        ways = [[bound(n, g, d, name, e) for e in ("dense", "blocked")] for name in ("nb", "zinb", "poisson")]
        print(n, "x", g, f"density {d}:", [round(dense / blocked, 2) for dense, blocked in ways], flush=True)


if __name__ == "__main__":
    main()
