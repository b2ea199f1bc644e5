"""Tools: AnnData in, keys out. One file for each; what they write goes through `scvae_tools._results`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from scvae_tools._lazy import loaded

if TYPE_CHECKING:
    from scvae_tools.tl._ambiguous_cells import ambiguous_cells
    from scvae_tools.tl._cluster_stability import cluster_stability
    from scvae_tools.tl._compare import compare
    from scvae_tools.tl._cut import cut
    from scvae_tools.tl._dendrogram import dendrogram
    from scvae_tools.tl._evaluate import evaluate
    from scvae_tools.tl._ppc import ppc
    from scvae_tools.tl._predict import predict
    from scvae_tools.tl._rank_components import rank_components
    from scvae_tools.tl._scvae import scvae
    from scvae_tools.tl._summarize_reconstruction import summarize_reconstruction
    from scvae_tools.tl._tree import tree

__all__ = [
    "ambiguous_cells",
    "cluster_stability",
    "compare",
    "cut",
    "dendrogram",
    "evaluate",
    "ppc",
    "predict",
    "rank_components",
    "scvae",
    "summarize_reconstruction",
    "tree",
]


def __getattr__(name: str) -> object:
    """Load a tool, of the file with its name, when it is first used: most need torch (PEP 562)."""
    if name in __all__:
        return getattr(loaded(f"scvae_tools.tl._{name}"), name)
    raise AttributeError(f"module 'scvae_tools.tl' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
