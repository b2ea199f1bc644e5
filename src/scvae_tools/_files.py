"""Atomic writing of files, full disks, digests of files and values, and plain values as JSON."""

from __future__ import annotations

import ctypes
import errno
import glob
import hashlib
import io
import os
import platform
import re
import secrets
import shutil
import sys
import time
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

#: Seconds without a change after which a temporary file counts as abandoned, where no lock tells.
ABANDONED = 3600
#: Seconds in which a new temporary folder gets its lock.
NEW = 1
#: Part of a temporary name, ``NAME.<12 hexadecimal digits>.tmp``: 4 of the host, 8 at random. Until version 0.1.0 a
#: suffix followed, and there could be 32 digits.
TEMPORARY = re.compile(r"\.(?:[0-9a-f]{12}|[0-9a-f]{32})\.tmp")
#: Name within a temporary folder of the folder that is being replaced.
FORMER = "former"


# -- the one atomic writer ---------------------------------------------------------------------------------------------


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Context that writes a file or folder atomically: to a temporary path, which replaces ``path`` at the end.

    What is at ``path`` is always whole, also when the process is killed. If the writing fails, the former file stays.
    Several processes may write the same file: each has a temporary folder of its own beside it, which no other user can
    plant a link in. What a killed process left there is removed by the next that writes the file.

    Raises
    ------
    DiskFullError
        If there is no room for the file.
    """
    path = Path(path)
    put_back(path)
    _remove_abandoned(path)
    with _temporary_folder(path) as folder:
        temporary = folder / path.name
        try:
            yield temporary
            flush(temporary)
        except OSError as error:
            if error.errno not in FULL or isinstance(error, DiskFullError):
                raise
            size = _size_of(folder)
            _remove(temporary)
            raise DiskFullError(path, size) from error
        _rename(temporary, path, former=folder / FORMER)
    if os.name == "posix":  # elsewhere a folder cannot be opened
        _flush_one(path.parent, os.O_RDONLY)


def put_back(path: Path) -> None:
    """Put back the folder ``path`` if a process was killed after it had moved it away, to replace it.

    So is done where two folders cannot change places in one step.
    """
    if os.path.lexists(path):
        return
    for folder in temporary_paths(path):
        if (folder / FORMER).exists():
            take_out(folder / FORMER, path)
            return


def take_out(found: Path, path: Path) -> None:
    """Move what a temporary folder holds to ``path``; the folder goes with it if the process that made it is gone."""
    is_left = is_abandoned(found.parent)  # before the move, after which the folder is as new
    found.replace(path)
    if is_left:
        shutil.rmtree(found.parent, ignore_errors=True)


def remove(path: Path) -> None:
    """Remove a file, if it is there, and what killed processes left of it."""
    path.unlink(missing_ok=True)
    _remove_abandoned(path)


def is_temporary(path: Path) -> bool:
    """Whether the file or folder is an unfinished one of :func:`replacing`."""
    return TEMPORARY.search(path.name) is not None


@contextmanager
def _temporary_folder(path: Path) -> Iterator[Path]:
    """Context of a new folder beside ``path``, to which nobody else can write; a lock tells that it is in use."""
    # Not `tempfile`: only the owner may read its files. What is made in this folder is open to those who may.
    folder = path.with_name(f"{path.name}.{_digits_of_host()}{secrets.token_hex(4)}.tmp")
    folder.mkdir(mode=0o700)
    lock = None
    with suppress(OSError):  # a file system without locks
        lock = lock_folder(folder)
    try:
        yield folder
    finally:
        if os.path.lexists(path) or not (folder / FORMER).exists():  # else `put_back` needs it
            shutil.rmtree(folder, ignore_errors=True)
        unlock_folder(lock)


def lock_folder(folder: Path) -> int | None:
    """Lock a folder for this process, and return what `unlock_folder` needs; the lock ends with the process.

    Raises
    ------
    BlockingIOError
        If it is locked already.
    OSError
        If the file system has no locks.
    """
    if fcntl is None:
        return None
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def unlock_folder(lock: int | None) -> None:
    """Remove a lock of `lock_folder`."""
    if lock is not None:
        os.close(lock)


def _digits_of_host() -> str:
    """Digits of the name of this computer: locks of folders are not seen by others."""
    return digest(platform.node().encode())[:4]


def _rename(new: Path, path: Path, former: Path) -> None:
    if not (new.is_dir() and os.path.lexists(path)):
        new.replace(path)
    elif not _exchange(new, path):
        # A folder with files in it cannot be replaced in one step. `put_back` restores it after a kill in between.
        path.rename(former)
        try:
            new.rename(path)
        except BaseException:
            former.rename(path)
            raise


def _exchange(a: Path, b: Path) -> bool:
    """Let two paths change places in one step; return whether operating system and file system can do so."""
    if sys.platform != "linux":
        return False
    rename = getattr(ctypes.CDLL(None), "renameat2", None)
    if rename is None:
        return False
    here, exchange = -100, ctypes.c_uint(2)  # AT_FDCWD, RENAME_EXCHANGE
    return rename(here, os.fsencode(a), here, os.fsencode(b), exchange) == 0


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def temporary_paths(path: Path) -> list[Path]:
    """Temporary folders of :func:`replacing` beside a path, of processes that run or were killed."""
    return [each for each in path.parent.glob(f"{glob.escape(path.name)}.*") if is_temporary(each)]


def _remove_abandoned(path: Path) -> None:
    """Remove the temporary files of ``path`` that killed processes left behind."""
    for temporary in temporary_paths(path):
        with suppress(OSError):  # another process has renamed or removed it, or it is not ours
            if is_abandoned(temporary):
                _remove(temporary)


def is_abandoned(temporary: Path) -> bool:
    """Whether the process that made a temporary folder is gone, as far as locks, or the time of changes, tell."""
    age = time.time() - _last_change(temporary)
    is_of_this_host = temporary.is_dir() and temporary.name[-16:-12] == _digits_of_host()
    if is_of_this_host and fcntl is not None:
        try:
            unlock_folder(lock_folder(temporary))
        except BlockingIOError:
            return False
        except OSError:  # a file system without locks
            return age > ABANDONED
        return age > NEW
    return age > ABANDONED


def _last_change(path: Path) -> float:
    """Time of the last change of a file, or of anything within a folder, in seconds."""
    return max(each.stat().st_mtime for each in (path, *path.rglob("*")))


def flush(path: Path) -> None:
    """Have a file, or all files of a folder, written to the disk."""
    for each in (path, *path.rglob("*")):
        if each.is_file():
            _flush_one(each, os.O_RDWR)


def _flush_one(path: Path, flags: int) -> None:
    descriptor = os.open(path, flags)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


# -- full disks --------------------------------------------------------------------------------------------------------

#: What the operating system says where a disk, a quota or a limit on the size of files leaves no room.
FULL = {errno.ENOSPC, errno.EFBIG, getattr(errno, "EDQUOT", errno.ENOSPC)}


class DiskFullError(OSError):
    """Error for a file that has no room; it says how large the file is, and how much is free."""

    def __init__(self, path: Path, n_bytes: int) -> None:
        free = shutil.disk_usage(_existing_parent(path)).free
        super().__init__(
            f"{str(path)!r} cannot be written, and is as it was: it takes {in_words(n_bytes)} or more; found "
            f"{in_words(free)} free on its disk, or less where there is a quota. Make room there, or pass another path."
        )
        self.errno = errno.ENOSPC


def require_room(path: Path, n_bytes: int) -> None:
    """Refuse, before any work, a file of at least so many bytes for which there is no room.

    Raises
    ------
    DiskFullError
        If less is free.
    """
    if n_bytes > shutil.disk_usage(_existing_parent(path)).free:
        raise DiskFullError(path, n_bytes)


class Sink(io.FileIO):
    """File to be written by HDF5 or torch, which raises the first error of a write when it is closed, and not before.

    HDF5 may crash the process where it is told that a disk is full, and torch hides the reason. So what cannot be
    written is taken for written; small pieces of it are kept, since HDF5 reads its directories again.
    """

    LARGEST_KEPT = 2**20  # bytes

    def __init__(self, path: Path) -> None:
        super().__init__(path, "w+")
        self.error: OSError | None = None
        self.size = 0  #: that the file has, or would have
        self._unwritten: list[tuple[int, bytes]] = []

    def write(self, data: Any) -> int:
        data, start, done = memoryview(data).cast("B"), self.tell(), 0
        self.size = max(self.size, start + len(data))
        try:
            while self.error is None and done < len(data):
                done += os.write(self.fileno(), data[done:])
        except OSError as error:
            self.error = error
        if done < len(data):
            self.seek(start + len(data))
            if len(data) <= self.LARGEST_KEPT:
                self._unwritten.append((start, bytes(data)))
        return len(data)

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        from_end = whence == os.SEEK_END
        return super().seek(self.size + offset) if from_end else super().seek(offset, whence)

    def readinto(self, buffer: Any) -> int:
        wanted, start = memoryview(buffer).cast("B"), self.tell()
        n_read = super().readinto(wanted)
        if self.error is None:
            return n_read
        wanted[n_read:] = bytes(len(wanted) - n_read)
        for place, data in self._unwritten:
            low, high = max(place, start), min(place + len(data), start + len(wanted))
            if low < high:
                wanted[low - start : high - start] = data[low - place : high - place]
        self.seek(start + len(wanted))
        return len(wanted)

    def truncate(self, size: int | None = None) -> int:
        self.size = self.tell() if size is None else size
        return super().truncate(size)

    def __exit__(self, *_: object) -> None:
        if self.error is not None:
            with suppress(OSError):
                self.truncate(self.size)  # takes no room, and tells `replacing` the size
        self.close()
        if self.error is not None:
            raise self.error


def in_words(n_bytes: float) -> str:
    """Number of bytes for a message."""
    units = {"GB": 1e9, "MB": 1e6, "kB": 1e3}
    name = next((name for name, unit in units.items() if n_bytes >= unit), None)
    return f"{n_bytes} bytes" if name is None else f"{n_bytes / units[name]:.3g} {name}"


def _existing_parent(path: Path) -> Path:
    return next(each for each in path.absolute().parents if each.is_dir())


def _size_of(folder: Path) -> int:
    return sum(each.stat().st_size for each in folder.rglob("*") if each.is_file())


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
    """Restore the value that `to_plain` was given.

    Raises
    ------
    TypeError, ValueError
        If it is none that `to_plain` makes.
    """
    if isinstance(value, list):
        return [from_plain(v) for v in value]
    if not isinstance(value, dict):
        return value
    if "__array__" in value:
        dtype = np.dtype(value["dtype"])
        if dtype.kind not in "biufcO":  # the width of others is the file's to choose
            raise ValueError(f"No array of type {dtype} was written.")
        return np.array(value["__array__"], dtype=dtype)
    if "__table__" in value:
        return pd.DataFrame(value["__table__"])
    if "__tuple__" in value:
        return tuple(from_plain(v) for v in value["__tuple__"])
    return {key: from_plain(v) for key, v in value.items()}
