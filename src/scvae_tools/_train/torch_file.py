"""Files of torch: written whole or not at all, and read without running code, once their sizes have been checked."""

from __future__ import annotations

import zipfile
from contextlib import contextmanager
from types import NoneType
from typing import TYPE_CHECKING, Any

import torch

from scvae_tools._files import Sink, in_words, replacing
from scvae_tools._version import __version__

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path


class FoundError(ValueError):
    """Error for the content of a file, within `damaged_otherwise`; the message says what was found."""


def write_torch(saved: dict[str, Any], path: Path) -> None:
    """Write tensors and plain values, whole or not at all.

    Raises
    ------
    DiskFullError
        If there is no room.
    """
    with replacing(path) as temporary, Sink(temporary) as sink:
        torch.save(saved, sink)


def read_torch(path: Path, rule: str) -> dict[str, Any]:
    """Read what `write_torch` wrote.

    Parameters
    ----------
    path
        File.
    rule
        What the file must be, and what to do if it is not, for the error: ``"must be a model. Take another"``.

    Raises
    ------
    ValueError
        If it is anything else, or takes more memory than the file is large.
    """
    with damaged_otherwise(path, rule):
        _check_sizes(path)
        saved = torch.load(path, map_location="cpu", weights_only=True)
        require_types(saved, {})
        _check_tensors(saved)
    return saved


@contextmanager
def damaged_otherwise(path: Path, rule: str) -> Iterator[None]:
    """Context in which any error is due to the content of a file: one ValueError says so. Arguments as in `read_torch`.

    A file can be wrong in so many ways that torch, JSON and our own code fail with any kind of error.
    """
    try:
        yield
    except Exception as error:
        must, _, remedy = rule.partition(". ")
        found = error if isinstance(error, FoundError) else "content that cannot be read"
        raise ValueError(f"{str(path)!r} {must}; found {found}. {remedy}") from error


def require_types(saved: object, kinds: Mapping[str, type | tuple[type, ...]], name: str = "content") -> None:
    """Refuse what is no dict, lacks one of these keys, or has a value of another type at one."""
    if not isinstance(saved, dict):
        raise FoundError(f"a {type(saved).__name__} as the {name}")
    for key, kind in kinds.items():
        if key not in saved:
            raise FoundError(f"no {key!r} in the {name}")
        if not isinstance(saved[key], kind) or (isinstance(saved[key], bool) and kind is int):
            raise FoundError(f"a {type(saved[key]).__name__} as {key!r} in the {name}")


def require_state(state: object, name: str) -> None:
    """Refuse what are no weights: tensors by their names."""
    require_types(state, {}, name)
    if not all(isinstance(key, str) and isinstance(value, torch.Tensor) for key, value in state.items()):
        raise FoundError(f"something else than tensors in the {name}")


def require_versions(versions: object) -> None:
    """Refuse what are no versions of the weights, as `scvae_tools._train.versions.packed` makes them."""
    require_types(versions, {"in_use": (str, NoneType), "versions": dict}, "versions")
    for name, version in versions["versions"].items():
        require_types(version, {"epoch": int, "elbo": (int, float), "state": dict}, f"version {name!r}")
        require_state(version["state"], f"version {name!r}")


def require_format(saved: dict[str, Any], newest: int) -> None:
    """Refuse the format of a later version of this package."""
    require_types(saved, {"format": int})
    version = saved.get("scvae_tools_version")
    if saved["format"] > newest:
        by = f"version {version} of scvae-tools" if isinstance(version, str) else "a later version of scvae-tools"
        raise FoundError(
            f"the format {saved['format']} of {by}, where this one, {__version__}, reads formats up to {newest} "
            "(`pip install -U scvae-tools` may help)"
        )


def _check_sizes(path: Path) -> None:
    """Refuse a file that unpacks to more than its size; torch packs nothing."""
    size = path.stat().st_size
    if not zipfile.is_zipfile(path):
        raise FoundError(f"{in_words(size)} of something else, or a part of such a file")
    with zipfile.ZipFile(path) as archive:
        entries = archive.infolist()
    unpacked = sum(entry.file_size for entry in entries)
    if unpacked > size or any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
        raise FoundError(f"{in_words(size)} that unpack to {in_words(unpacked)}")


def _check_tensors(saved: object) -> None:
    """Refuse tensors that show the same memory several times, and so grow when they are copied."""
    waiting, seen = [saved], set()
    while waiting:
        value = waiting.pop()
        if id(value) in seen:
            continue
        seen.add(id(value))
        if isinstance(value, torch.Tensor):
            n_bytes = value.numel() * value.element_size()
            if value.layout != torch.strided or n_bytes > value.untyped_storage().nbytes():
                raise FoundError(f"a tensor of {in_words(n_bytes)} that is not stored as such")
        elif isinstance(value, dict):
            waiting += value.values()
        elif isinstance(value, list | tuple | set):
            waiting += value
