"""Checks of the model that a tool is given, and of the components in an AnnData."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pandas as pd

from scvae_tools._data.counts import require_anndata
from scvae_tools._module.mixture_vaes import MixtureVAE
from scvae_tools._results.writing import require_writable
from scvae_tools.model._scvae import SCVAE

if TYPE_CHECKING:
    from anndata import AnnData


def require_model(model: object) -> None:
    """Raise a TypeError if ``model`` is not an `SCVAE`."""
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


def components_of(adata: AnnData, model: SCVAE, key: str) -> list[str]:
    """Categories of the clustering, all of them components of the model."""
    require_anndata(adata)
    require_model(model)
    if not model.is_mixture:
        found, remedy = (
            ("one that is not trained", "Call model.train().")
            if isinstance(model.module, MixtureVAE)
            else ("a model without", "Train one with mixture=True.")
        )
        raise ValueError(f"`model` must have a trained mixture, whose components are compared; found {found}. {remedy}")
    require_writable(adata)
    rule = f"`adata.obs[{key!r}]` must be categorical, with the components of the model ({_listed(model.components)})"
    if key not in adata.obs:
        raise ValueError(f"{rule}; found no such column. Pass the `key_added` of svt.tl.scvae as `key`.")
    column = adata.obs[key]
    if not isinstance(column.dtype, pd.CategoricalDtype):
        raise ValueError(
            f"{rule}; found the type {column.dtype}. Convert it: "
            f"adata.obs[{key!r}] = adata.obs[{key!r}].astype(str).astype('category')."
        )
    names = column.cat.categories.tolist()
    unknown = [name for name in names if name not in model.components]
    if unknown:
        raise ValueError(
            f"{rule}; {len(unknown)} of its {len(names)} categories are none, the first {unknown[0]!r}. Keep other "
            "names in another column, and pass the model that wrote this one."
        )
    return names


def require_two(components: list[str], rule: str) -> None:
    """Raise a ValueError if there are fewer than two components."""
    if len(components) < 2:
        raise ValueError(
            f"{rule}; found {len(components)} ({_listed(components) or 'none'}). Train with more, for example "
            "n_components=10, or pass all cells."
        )


def positions_of(model: SCVAE, components: list[str]) -> list[int]:
    """Places of components in the mixture."""
    return [model.components.index(name) for name in components]


def _listed(names: list[str]) -> str:
    return ", ".join(names) if len(names) <= 4 else f"{', '.join(names[:2])}, ..., {names[-1]}"
