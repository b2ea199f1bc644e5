"""File of a saved model: what it holds, and how it is written and read without running code that is in it."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from scvae_tools._files import from_plain, to_plain
from scvae_tools._train.torch_file import write_torch
from scvae_tools._version import __version__

if TYPE_CHECKING:
    from pathlib import Path

MODEL_FILE = "model.pt"


ADATA_FILE = "adata.h5ad"


class Saved(NamedTuple):
    """Content of a saved model: weights, attributes (arguments, registry, history, split), gene names, versions."""

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
        Other weights, as `scvae_tools._train.versions.packed` makes them; None for none.
    """
    saved = {
        "format": 1,
        "scvae_tools_version": __version__,
        "state": {name: value.detach().cpu() for name, value in state.items()},
        "attributes": json.dumps(to_plain(attributes, "attributes")),
        "var_names": list(map(str, var_names)),
    }
    write_torch(saved if versions is None else saved | {"versions": versions}, path)


def read_saved(path: Path) -> Saved:
    """Read a saved model, with ``torch.load(weights_only=True)``.

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
