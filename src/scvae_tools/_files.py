"""Atomic writing of files, digests of files and values, and plain values as JSON."""

from __future__ import annotations

import glob
import hashlib
import os
import re
import secrets
import shutil
import time
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from pathlib import Path

#: Seconds without a change after which a temporary file counts as abandoned.
ABANDONED = 3600
#: Part of a temporary name, ``NAME.<12 hexadecimal digits>.tmp.SUFFIX``. The suffix is kept: some writers go by it.
#: Version 0.1.0 had 32 digits.
TEMPORARY = re.compile(r"\.(?:[0-9a-f]{12}|[0-9a-f]{32})\.tmp")


# -- the one atomic writer ---------------------------------------------------------------------------------------------


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Context that writes a file or folder atomically: to a temporary path, which replaces ``path`` at the end.

    The file at ``path`` is always whole, also when the process is killed. If the writing fails, the former file stays.
    Several processes may write the same file, since each has a temporary path of its own.
    """
    # Not `tempfile`: only the owner may read its files.
    temporary = path.with_name(f"{path.name}.{_unique()}{path.suffix}")
    try:
        yield temporary
        if temporary.is_file():
            _flush(temporary, os.O_RDWR)
        _rename(temporary, path)
    except BaseException:
        _remove(temporary)
        raise
    if os.name == "posix":  # elsewhere a directory cannot be opened
        _flush(path.parent, os.O_RDONLY)
    _remove_abandoned(path)


def is_temporary(path: Path) -> bool:
    """Whether the file or folder is an unfinished one of :func:`replacing`."""
    return TEMPORARY.search(path.name) is not None


def _unique() -> str:
    return f"{secrets.token_hex(6)}.tmp"


def _rename(new: Path, path: Path) -> None:
    if not path.is_dir():
        new.replace(path)
        return
    # A folder with files in it cannot be replaced in one step.
    former = path.rename(path.with_name(f"{path.name}.{_unique()}"))
    try:
        new.rename(path)
    except BaseException:
        former.rename(path)
        raise
    _remove(former)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _remove_abandoned(path: Path) -> None:
    """Remove the temporary files of ``path`` that killed processes left behind."""
    for temporary in path.parent.glob(f"{glob.escape(path.name)}.*"):
        try:
            if is_temporary(temporary) and time.time() - _last_change(temporary) > ABANDONED:
                _remove(temporary)
        except OSError:  # another process has renamed or removed it, or it is not ours
            continue


def _last_change(path: Path) -> float:
    """Time of the last change of a file, or of anything within a folder, in seconds."""
    return max(each.stat().st_mtime for each in (path, *path.rglob("*")))


def _flush(path: Path, flags: int) -> None:
    descriptor = os.open(path, flags)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


# -- digests -----------------------------------------------------------------------------------------------------------


def digest(*parts: bytes | np.ndarray, algorithm: str = "sha256", **options: int) -> str:
    """Hexadecimal digest of the bytes of strings and of arrays of any shape."""
    hasher = hashlib.new(algorithm, usedforsecurity=False, **options)
    for part in parts:
        hasher.update(part if isinstance(part, bytes) else np.ascontiguousarray(part))
    return hasher.hexdigest()


def short_digest(*parts: bytes | np.ndarray) -> str:
    """`digest` of 16 characters after the sign ``#``, which tells it from a plain value."""
    return "#" + digest(*parts, algorithm="blake2b", digest_size=8)


def digest_of_names(names: Iterable) -> str:
    """`short_digest` of names, in their order."""
    return short_digest("\n".join(map(str, names)).encode())


def digest_of_file(path: Path, algorithm: str = "sha256") -> str:
    """`digest` of the bytes of a file."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, lambda: hashlib.new(algorithm, usedforsecurity=False)).hexdigest()


# -- plain values ------------------------------------------------------------------------------------------------------


def to_plain(value: Any, name: str) -> Any:
    """Turn nested containers, arrays and tables into values that JSON can hold."""
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
    """Restore the value that `to_plain` was given."""
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
