"""scVAE for the scverse: variational auto-encoders with count likelihoods, and Gaussian mixtures that cluster."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from scvae_tools._lazy import loaded
from scvae_tools._messages import quiet_tqdm
from scvae_tools._version import __version__ as __version__

if TYPE_CHECKING:
    from scvae_tools import datasets, likelihoods, metrics, pl, tl
    from scvae_tools._data.collection import read_collection
    from scvae_tools._data.counts import CountsError
    from scvae_tools._train.plan import NonFiniteError
    from scvae_tools.model._scvae import SCVAE

__all__ = [
    "SCVAE",
    "CountsError",
    "NonFiniteError",
    "datasets",
    "likelihoods",
    "metrics",
    "pl",
    "read_collection",
    "tl",
]
_HOMES = {
    "SCVAE": "model",
    "CountsError": "_data.counts",
    "NonFiniteError": "_train.plan",
    "read_collection": "_data.collection",
}

if "IPython" in sys.modules:  # before torch and scvi-tools load it
    quiet_tqdm()


def __getattr__(name: str) -> object:
    """Load a public name when it is first used, since torch and scvi-tools take seconds to import (PEP 562)."""
    if name in _HOMES:
        return getattr(loaded(f"scvae_tools.{_HOMES[name]}"), name)
    if name in __all__:
        return loaded(f"scvae_tools.{name}")
    raise AttributeError(f"module 'scvae_tools' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])
