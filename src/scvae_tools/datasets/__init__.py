"""Data sets: real counts that scanpy ships, simulated cells with known truth, and published data to download."""

from scvae_tools.datasets._pbmc import pbmc68k_reduced
from scvae_tools.datasets._published import mouse_brain_20k
from scvae_tools.datasets._simulated import mouse_brain_20k_like, poisson_mixture_toy, poisson_toy, simulate

__all__ = [
    "mouse_brain_20k",
    "mouse_brain_20k_like",
    "pbmc68k_reduced",
    "poisson_mixture_toy",
    "poisson_toy",
    "simulate",
]
