"""Checks of arguments that several functions of `scvae_tools.tl` have in common."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from anndata import AnnData


def require_model(model: object) -> None:
    """Raise a TypeError if ``model`` is not an `SCVAE`."""
    from scvae_tools.model import SCVAE

    if not isinstance(model, SCVAE):
        raise TypeError(
            f"`model` must be an SCVAE; found a {type(model).__name__}. svt.tl.scvae(adata, return_model=True) returns "
            "the model; SCVAE.load reads a saved one."
        )


def require_encoder_of_counts(model: object, caller: str) -> None:
    """Raise a ValueError if ``model`` is not trained, or has no counts to encode, for the function named ``caller``."""
    require_model(model)
    if not model.is_trained_:
        raise ValueError(f"`model` must be trained for {caller}; found one that is not. Call train().")
    if model.minified_data_type is not None:
        raise ValueError(
            f"`model` must encode the counts that it is compared with; found one of minified data. Call {caller} "
            "before `minify_adata`, or with the model as it was saved before."
        )


def require_writable(adata: AnnData, *, copy: bool = False) -> None:
    """Raise a ValueError if ``adata`` cannot hold results."""
    if adata.isbacked and adata.is_view and not copy:
        raise ValueError(
            "`adata` must be able to hold the results; found a view of a backed AnnData. Pass copy=True, or "
            "adata.to_memory()."
        )


def check_at_least(name: str, value: object, least: int) -> None:
    """Raise a ValueError if the argument is not a whole number of at least ``least``."""
    if not isinstance(value, int | np.integer) or isinstance(value, bool) or value < least:
        raise ValueError(f"`{name}` must be a whole number of at least {least}; found {value!r}.")
