"""`SCVAE`, the model class: arguments and data in, training, and methods of a trained model. One file for each part."""

from __future__ import annotations

from typing import TYPE_CHECKING

from scvae_tools._lazy import loaded

if TYPE_CHECKING:
    from scvae_tools.model._scvae import SCVAE

__all__ = ["SCVAE"]


def __getattr__(name: str) -> object:
    """Load the class when it is first used, after the files of this folder that it is made of (PEP 562)."""
    if name in __all__:
        return getattr(loaded("scvae_tools.model._scvae"), name)
    raise AttributeError(f"module 'scvae_tools.model' has no attribute {name!r}")
