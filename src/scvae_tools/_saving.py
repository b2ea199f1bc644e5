"""Saved models: tensors and plain values in one file that cannot execute code when it is read."""

from __future__ import annotations

import glob
import hashlib
import json
import os
import time
import uuid
from importlib import metadata
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pandas as pd
import torch

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

MODEL_FILE = "model.pt"
ADATA_FILE = "adata.h5ad"
#: Seconds after which nobody writes to a temporary file any more.
ABANDONED = 3600


class Saved(NamedTuple):
    """What a saved model holds."""

    state: dict[str, torch.Tensor]
    attributes: dict[str, Any]
    var_names: list[str]
    versions: dict[str, Any] | None  #: None in files that were written without


def write_saved(
    path: Path,
    state: dict[str, torch.Tensor],
    attributes: dict[str, Any],
    var_names: list[str],
    versions: dict[str, Any] | None = None,
) -> None:
    """Write a model so that no half-written file is left.

    Parameters
    ----------
    path
        File.
    state
        Weights, on the CPU where ``versions`` share them.
    attributes, var_names
        Numbers, strings, arrays and tables by name; names of the genes.
    versions
        Other weights, as `scvae_tools._checkpoint.packed` makes them; None for none.
    """
    saved = {
        "format": 1,
        "scvae_tools_version": metadata.version("scvae-tools"),
        "state": {name: value.detach().cpu() for name, value in state.items()},
        "attributes": json.dumps(to_plain(attributes, "attributes")),
        "var_names": list(map(str, var_names)),
    }
    write_atomically(saved if versions is None else saved | {"versions": versions}, path)


def write_atomically(saved: dict[str, Any], path: Path) -> None:
    """Write under a temporary name, wait until it is on the disk, and rename it: a file of that name is always whole.

    It stays whole when the process is killed, and what was there before stays when the writing fails. Processes that
    write the same file do not meet, as each has a temporary name of its own.
    """
    # Not by `tempfile`, whose files nobody else may read.
    temporary = path.with_name(f"{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        torch.save(saved, temporary)
        _flush(temporary, os.O_RDWR)
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    if os.name == "posix":  # elsewhere a directory cannot be opened
        _flush(path.parent, os.O_RDONLY)
    _remove_abandoned(path)


def _remove_abandoned(path: Path) -> None:
    """Remove what processes that were killed have left of writing a file."""
    for temporary in path.parent.glob(f"{glob.escape(path.name)}.*.tmp"):
        try:
            if time.time() - temporary.stat().st_mtime > ABANDONED:
                temporary.unlink()
        except OSError:  # another process has renamed or removed it, or it is not ours
            continue


def _flush(path: Path, flags: int) -> None:
    descriptor = os.open(path, flags)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def digest(*parts: bytes | np.ndarray) -> str:
    """Short string that differs where any byte of arrays (of any shape) or strings does."""
    hasher = hashlib.blake2b(digest_size=8)
    for part in parts:
        hasher.update(part if isinstance(part, bytes) else np.ascontiguousarray(part))
    return "#" + hasher.hexdigest()


def digest_of_names(names: Iterable) -> str:
    """`digest` of names, in their order."""
    return digest("\n".join(map(str, names)).encode())


def read_saved(path: Path) -> Saved:
    """Parts of a saved model, with ``torch.load(weights_only=True)``.

    Raises
    ------
    FileNotFoundError
        If there is no model there.
    """
    if not path.exists():
        raise FileNotFoundError(f"No saved model at {str(path)!r}. Save one with `model.save(directory)` first.")
    saved = torch.load(path, map_location="cpu", weights_only=True)
    attributes = from_plain(json.loads(saved["attributes"]))
    return Saved(saved["state"], attributes, saved["var_names"], saved.get("versions"))


def to_plain(value: Any, name: str) -> Any:
    """Turn nested containers, arrays and tables into what JSON holds."""
    if value is None or isinstance(value, str | bool | int | float):
        return value
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, np.ndarray | pd.Index):
        values = np.asarray(value)
        return {"__array__": [to_plain(v, name) for v in values.tolist()], "dtype": _dtype_name(values)}
    if isinstance(value, pd.DataFrame):
        return {"__table__": {column: value[column].tolist() for column in value}}
    if isinstance(value, tuple):
        return {"__tuple__": [to_plain(v, name) for v in value]}
    if isinstance(value, list):
        return [to_plain(v, name) for v in value]
    if isinstance(value, dict):
        return {key: to_plain(v, f"{name}[{key!r}]") for key, v in value.items()}
    raise TypeError(f"A saved model holds numbers, strings, arrays and tables; {name} is a {type(value).__name__}.")


def _dtype_name(values: np.ndarray) -> str:
    return "object" if values.dtype.kind in "OUST" else str(values.dtype)


def from_plain(value: Any) -> Any:
    """Value that `to_plain` was given."""
    if isinstance(value, list):
        return [from_plain(v) for v in value]
    if not isinstance(value, dict):
        return value
    if "__array__" in value:
        return np.array(value["__array__"], dtype=value["dtype"])
    if "__table__" in value:
        return pd.DataFrame(value["__table__"])
    if "__tuple__" in value:
        return tuple(from_plain(v) for v in value["__tuple__"])
    return {key: from_plain(v) for key, v in value.items()}
