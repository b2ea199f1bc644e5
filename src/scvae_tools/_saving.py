"""Saved models: tensors and plain values in one file that cannot execute code when it is read."""

from __future__ import annotations

import json
from importlib import metadata
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import torch

if TYPE_CHECKING:
    from pathlib import Path

MODEL_FILE = "model.pt"
ADATA_FILE = "adata.h5ad"


def write_saved(path: Path, state: dict[str, torch.Tensor], attributes: dict[str, Any], var_names: list[str]) -> None:
    """Write a model under a temporary name and rename it, so that no half-written file is left."""
    saved = {
        "format": 1,
        "scvae_tools_version": metadata.version("scvae-tools"),
        "state": {name: value.detach().cpu() for name, value in state.items()},
        "attributes": json.dumps(_to_plain(attributes, "attributes")),
        "var_names": list(map(str, var_names)),
    }
    temporary = path.with_name(path.name + ".tmp")
    torch.save(saved, temporary)
    temporary.replace(path)


def read_saved(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any], list[str]]:
    """State, attributes and gene names of a saved model, with ``torch.load(weights_only=True)``.

    Raises
    ------
    FileNotFoundError
        If there is no model there.
    """
    if not path.exists():
        raise FileNotFoundError(f"No saved model at {str(path)!r}. Save one with `model.save(directory)` first.")
    saved = torch.load(path, map_location="cpu", weights_only=True)
    return saved["state"], _from_plain(json.loads(saved["attributes"])), saved["var_names"]


def _to_plain(value: Any, name: str) -> Any:
    """Turn nested containers, arrays and tables into what JSON holds."""
    if value is None or isinstance(value, str | bool | int | float):
        return value
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, np.ndarray | pd.Index):
        values = np.asarray(value)
        return {"__array__": [_to_plain(v, name) for v in values.tolist()], "dtype": _dtype_name(values)}
    if isinstance(value, pd.DataFrame):
        return {"__table__": {column: value[column].tolist() for column in value}}
    if isinstance(value, tuple):
        return {"__tuple__": [_to_plain(v, name) for v in value]}
    if isinstance(value, list):
        return [_to_plain(v, name) for v in value]
    if isinstance(value, dict):
        return {key: _to_plain(v, f"{name}[{key!r}]") for key, v in value.items()}
    raise TypeError(f"A saved model holds numbers, strings, arrays and tables; {name} is a {type(value).__name__}.")


def _dtype_name(values: np.ndarray) -> str:
    return "object" if values.dtype.kind in "OUST" else str(values.dtype)


def _from_plain(value: Any) -> Any:
    if isinstance(value, list):
        return [_from_plain(v) for v in value]
    if not isinstance(value, dict):
        return value
    if "__array__" in value:
        return np.array(value["__array__"], dtype=value["dtype"])
    if "__table__" in value:
        return pd.DataFrame(value["__table__"])
    if "__tuple__" in value:
        return tuple(_from_plain(v) for v in value["__tuple__"])
    return {key: _from_plain(v) for key, v in value.items()}
