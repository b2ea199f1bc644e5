"""File of a saved model: what it holds, and how it is written and read without running code that is in it."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any, NamedTuple

from scvae_tools._files import from_plain, to_plain
from scvae_tools._train.torch_file import (
    FoundError,
    damaged_otherwise,
    read_torch,
    require_format,
    require_state,
    require_types,
    require_versions,
    write_torch,
)
from scvae_tools._version import __version__

if TYPE_CHECKING:
    from pathlib import Path

    import torch

MODEL_FILE = "model.pt"


FORMAT = 1


#: What the file must be, and the remedy if it is not.
RULE = "must be a model that `SCVAE.save` wrote. Take another copy of the file, or train and save the model again."


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
        "format": FORMAT,
        "scvae_tools_version": __version__,
        "state": {name: value.detach().cpu() for name, value in state.items()},
        "attributes": json.dumps(to_plain(attributes, "attributes")),
        "var_names": list(map(str, var_names)),
    }
    write_torch(saved if versions is None else saved | {"versions": versions}, path)


def read_saved(path: Path) -> Saved:
    """Read a saved model, without running code that is in it; its sizes are checked first.

    Raises
    ------
    FileNotFoundError
        If there is no model there.
    ValueError
        If the file is anything else, or of a later format; it says what was found.
    """
    if not path.exists():
        raise FileNotFoundError(f"No saved model at {str(path)!r}. Save one with `model.save(directory)` first.")
    saved = read_torch(path, RULE)
    with damaged_otherwise(path, RULE):
        require_format(saved, FORMAT)
        require_types(saved, {"state": dict, "attributes": str, "var_names": list})
        require_state(saved["state"], "weights")
        if saved.get("versions") is not None:
            require_versions(saved["versions"])
        attributes = _attributes(saved["attributes"])
        _check_widths(attributes["init_params_"]["non_kwargs"], saved["state"])
    return Saved(saved["state"], attributes, list(map(str, saved["var_names"])), saved.get("versions"))


def _attributes(text: str) -> dict[str, Any]:
    try:
        attributes = from_plain(json.loads(text))
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise FoundError("attributes that are no JSON of ours") from error
    require_types(attributes, {"registry_": dict, "init_params_": dict}, "attributes")
    for name in attributes:
        if name.startswith("_") or not name.endswith("_"):
            raise FoundError(f"an attribute of the name {name!r}")
    registry = {"model_name": str, "setup_args": dict, "field_registries": dict}
    require_types(attributes["registry_"], registry, "registry")
    require_types(attributes["init_params_"], {"kwargs": dict, "non_kwargs": dict}, "arguments of the model")
    return attributes


def _check_widths(arguments: dict[str, Any], state: dict[str, torch.Tensor]) -> None:
    """Refuse numbers of units beyond that of all weights, before a network of that width is built."""
    n_weights = sum(value.numel() for value in state.values())
    for name in ("n_hidden", "n_latent", "n_layers", "n_components"):
        value = arguments.get(name)
        if any(isinstance(each, int) and each > n_weights for each in (value if isinstance(value, list) else [value])):
            raise FoundError(f"{name}={value} with {n_weights:,} weights in all")
