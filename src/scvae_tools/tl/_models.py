"""The model that a tool works with: given, saved, or kept beside its results; checks of it, and of its components."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import pandas as pd

from scvae_tools._data.counts import require_anndata
from scvae_tools._keys import Keys
from scvae_tools._module.mixture_vaes import MixtureVAE
from scvae_tools._results.writing import require_writable
from scvae_tools.model._build import without_data
from scvae_tools.model._scvae import SCVAE

if TYPE_CHECKING:
    from anndata import AnnData

#: Name among the attributes of a history, which pandas hands on to copies and no file holds.
KEPT = "scvae_model"


class KeptModel(dict):
    """Holder of a model in memory, which lives as long as the results that it is part of.

    Copies and views of an AnnData share the model; copies for another process have none. To pandas the holder is an
    empty dict, so that a table with it among its attributes can be written to any file.
    """

    def __init__(self, model: SCVAE | None = None) -> None:
        super().__init__()
        self.model = model

    def __deepcopy__(self, memo: dict) -> Self:
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), ()


def keep_model(history: pd.DataFrame, model: SCVAE) -> None:
    """Let the history that is written with the results of a model hold it too, without its cells.

    There the model lives exactly as long as its results: it goes when they are replaced or deleted, or the last AnnData
    that has them is gone.
    """
    history.attrs[KEPT] = KeptModel(without_data(model))


def kept_model(adata: AnnData, key: str) -> SCVAE | None:
    """Model of the results under a key, as long as they are in memory; None if there is none."""
    result = adata.uns.get(Keys(key).uns)
    history = result.get("history") if isinstance(result, Mapping) else None
    return getattr(getattr(history, "attrs", {}).get(KEPT), "model", None)


def find_model(adata: AnnData, model: SCVAE | str | Path | None, key: str) -> SCVAE:
    """Model that a tool is to work with: one that is given, or saved in a folder, or that of the results under a key.

    Raises
    ------
    FileNotFoundError
        If there is no model in the folder.
    TypeError
        If ``model`` is none of these.
    ValueError
        If it is None, and the results have no model in memory.
    """
    require_anndata(adata)
    if isinstance(model, str | Path):
        return SCVAE.load(model)
    if model is not None:
        require_model(model)
        return model
    kept = kept_model(adata, key)
    if kept is not None:
        return kept
    others = [name for name in adata.uns if kept_model(adata, name) is not None]
    remedy = f"Pass key={others[0]!r}, whose model is in memory, or" if others else "Pass"
    is_there = isinstance(adata.uns.get(Keys(key).uns), Mapping)
    found = "results whose model is not in memory, as after reading a file" if is_there else "no results"
    raise ValueError(
        f"`model` can be left out where adata.uns[{Keys(key).uns!r}] has results of a model of this session; found "
        f"{found}. {remedy} the `model`: that of svt.tl.scvae(adata, return_model=True), or the folder where "
        "model.save(folder) put it."
    )


def require_model(model: object) -> None:
    """Raise a TypeError if ``model`` is not an `SCVAE`."""
    if not isinstance(model, SCVAE):
        raise TypeError(
            f"`model` must be an SCVAE, or the folder where one is saved; found a {type(model).__name__}. "
            "svt.tl.scvae(adata, return_model=True) returns the model; model.save(folder) saves it."
        )


def require_encoder_of_counts(model: SCVAE, caller: str) -> None:
    """Raise a ValueError if ``model`` is not trained, or has no counts to encode, for the function named ``caller``."""
    if not model.is_trained_:
        raise ValueError(f"`model` must be trained for {caller}; found one that is not. Call train().")
    if model.minified_data_type is not None:
        raise ValueError(
            f"`model` must encode the counts that it is compared with; found one of minified data. Call {caller} "
            "before `minify_adata`, or with the model as it was saved before."
        )


def components_of(adata: AnnData, model: SCVAE, key: str) -> list[str]:
    """Categories of the clustering, all of them components of the model."""
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
