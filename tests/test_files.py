"""Files are whole whenever they exist, and digests depend on every byte."""

from __future__ import annotations

import errno
import os
import shutil
import signal
import stat
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from scvae_tools import _files
from scvae_tools._files import (
    ABANDONED,
    NEW,
    DiskFullError,
    Sink,
    digest,
    is_temporary,
    lock_folder,
    put_back,
    remove,
    replacing,
    require_room,
    unlock_folder,
)
from scvae_tools.model._saved_file import write_saved


def write_atomically(saved, path):
    with replacing(path) as temporary:
        torch.save(saved, temporary)


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "model.pt"
    write_saved(path, {"w": torch.ones(2)}, {}, [])

    def fail(*_args, **_kwargs):
        raise OSError("disk full")

    monkeypatch.setattr(torch, "save", fail)
    with pytest.raises(OSError, match="disk full"):
        write_saved(path, {"w": torch.zeros(2)}, {}, [])
    assert torch.equal(torch.load(path, weights_only=True)["state"]["w"], torch.ones(2))


def test_nothing_but_the_whole_file_is_left_of_a_write_that_died_midway(tmp_path, monkeypatch):
    path, save = tmp_path / "model.pt", torch.save
    write_atomically({"w": torch.ones(2)}, path)

    def die_midway(saved, temporary):
        save(saved, temporary)
        os.truncate(temporary, temporary.stat().st_size // 2)
        raise KeyboardInterrupt

    monkeypatch.setattr(torch, "save", die_midway)
    with pytest.raises(KeyboardInterrupt):
        write_atomically({"w": torch.zeros(2)}, path)
    assert torch.equal(torch.load(path, weights_only=True)["w"], torch.ones(2))
    assert [each.name for each in tmp_path.iterdir()] == ["model.pt"]


def test_a_file_is_on_the_disk_before_it_gets_its_name(tmp_path, monkeypatch):
    done, flush, replace = [], os.fsync, Path.replace
    monkeypatch.setattr(os, "fsync", lambda descriptor: (done.append("flushed"), flush(descriptor)))
    monkeypatch.setattr(Path, "replace", lambda old, new: (done.append(new.name), replace(old, new)))
    write_atomically({"w": torch.ones(2)}, tmp_path / "model.pt")
    assert done[:2] == ["flushed", "model.pt"]


def test_writers_of_the_same_file_do_not_meet(tmp_path, monkeypatch):
    path, save, together = tmp_path / "model.pt", torch.save, threading.Barrier(2, timeout=30)

    def save_together(saved, temporary):
        save(saved, temporary)
        together.wait()

    monkeypatch.setattr(torch, "save", save_together)
    failed = []

    def write(value):
        try:
            write_atomically({"w": torch.full((2,), value)}, path)
        except OSError as error:
            failed.append(error)

    writers = [threading.Thread(target=write, args=(value,)) for value in (1.0, 2.0)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    assert failed == []
    assert [each.name for each in tmp_path.iterdir()] == ["model.pt"]


def test_a_saved_file_can_be_read_by_whoever_may_read_new_files(tmp_path):
    (tmp_path / "new").touch()
    write_atomically({"w": torch.ones(2)}, tmp_path / "model.pt")
    modes = [stat.S_IMODE((tmp_path / name).stat().st_mode) for name in ("new", "model.pt")]
    assert modes[0] == modes[1]


def test_abandoned_files_are_removed_and_those_in_use_are_not(tmp_path):
    old, new = ABANDONED + 60, ABANDONED - 60
    left = {f"model.pt.{'0a' * 6}.tmp.pt": old, f"model.pt.{'0b' * 16}.tmp": old}
    kept = {f"model.pt.{'0c' * 6}.tmp.pt": new, f"other.pt.{'0d' * 6}.tmp.pt": old, "model.pt.mine.tmp": old}
    ages = left | kept
    for name, age in ages.items():
        (tmp_path / name).touch()
        os.utime(tmp_path / name, (time.time() - age,) * 2)
    write_atomically({"w": torch.ones(2)}, tmp_path / "model.pt")
    assert {each.name for each in tmp_path.iterdir()} == {"model.pt", *kept}


def test_a_digest_depends_on_every_byte():
    values = np.arange(12.0)
    digests = {digest(values.reshape(3, 4)[:, ::-1]), digest(values), digest(values + 1e-12), digest(values, b"a")}
    assert len(digests) == 4
    assert digest(values.reshape(3, 4)) == digest(values) == digest(values[:5], values[5:])
    assert digest(values[:0]) == digest()


def write_folder(path, name):
    with replacing(path) as temporary:
        temporary.mkdir()
        (temporary / name).touch()


def test_the_former_folder_comes_back_where_the_new_one_cannot_take_its_name(tmp_path, monkeypatch):
    folder, rename = tmp_path / "x.zarr", Path.rename
    write_folder(folder, "old")
    renamed = []

    def fail_at_the_second(old, new):
        renamed.append(old)
        if len(renamed) == 2:
            raise OSError("disk error")
        return rename(old, new)

    monkeypatch.setattr(_files, "_exchange", lambda *_: False)
    monkeypatch.setattr(Path, "rename", fail_at_the_second)
    with pytest.raises(OSError, match="disk error"):
        write_folder(folder, "new")
    assert [each.name for each in tmp_path.rglob("*")] == ["x.zarr", "old"]


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere there is no such call")
def test_folders_change_places_in_one_step(tmp_path, monkeypatch):
    write_folder(tmp_path / "x.zarr", "old")
    monkeypatch.setattr(Path, "rename", None)  # nothing is moved away first
    write_folder(tmp_path / "x.zarr", "new")
    assert [each.name for each in tmp_path.rglob("*")] == ["x.zarr", "new"]


def killed(code):
    """Run code in a process that it kills."""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=100)
    assert done.returncode == -signal.SIGKILL, done.stderr


KILL = """
import os, signal
from pathlib import Path
from scvae_tools import _files

def die(*_):
    os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="needs SIGKILL")
@pytest.mark.parametrize("then", ["it is looked for", "it is looked for later", "it is written"])
def test_a_folder_whose_replacement_was_killed_between_two_renames_is_put_back(then, tmp_path):
    path = tmp_path / "x.zarr"
    write_folder(path, "old")
    killed(f"""{KILL}
rename = Path.rename
_files._exchange = lambda *_: False
Path.rename = lambda old, new: rename(old, new) if new.name == _files.FORMER else die()
with _files.replacing(Path({str(path)!r})) as temporary:
    temporary.mkdir()
""")
    assert not path.exists()
    if then == "it is looked for later":
        make_old(tmp_path)
    put_back(path)
    assert [each.name for each in path.iterdir()] == ["old"]
    if then == "it is looked for later":
        assert [each.name for each in tmp_path.iterdir()] == ["x.zarr"]
    if then == "it is written":
        make_old(tmp_path)
        write_folder(path, "new")
        assert [each.name for each in tmp_path.rglob("*")] == ["x.zarr", "new"]


@pytest.mark.skipif(sys.platform == "win32", reason="needs SIGKILL")
def test_the_next_writer_removes_what_a_killed_one_left(tmp_path):
    path = tmp_path / "model.pt"
    killed(f"""{KILL}
with _files.replacing(Path({str(path)!r})) as temporary:
    temporary.write_text("half")
    die()
""")
    assert [is_temporary(each) for each in tmp_path.iterdir()] == [True]
    make_old(tmp_path)
    write_atomically({"w": torch.ones(2)}, path)
    assert [each.name for each in tmp_path.iterdir()] == ["model.pt"]


def make_old(folder):
    for each in folder.rglob("*"):
        os.utime(each, (time.time() - NEW - 1,) * 2)


def test_what_a_process_writes_is_not_abandoned_however_long_it_takes(tmp_path):
    with replacing(tmp_path / "x.txt") as slow:
        slow.write_text("slow")
        for each in (slow, slow.parent):
            os.utime(each, (0, 0))
        with replacing(tmp_path / "x.txt") as quick:
            quick.write_text("quick")
        assert (tmp_path / "x.txt").read_text() == "quick"
    assert (tmp_path / "x.txt").read_text() == "slow"


def test_of_two_that_lock_a_folder_the_second_is_told(tmp_path):
    lock = lock_folder(tmp_path)
    with pytest.raises(BlockingIOError):
        lock_folder(tmp_path)
    unlock_folder(lock)
    unlock_folder(lock_folder(tmp_path))


@pytest.mark.skipif(os.name != "posix", reason="of POSIX")
def test_nobody_else_can_plant_a_link_where_a_file_is_written(tmp_path):
    with replacing(tmp_path / "x.txt") as temporary:
        assert temporary.name == "x.txt"
        assert stat.S_IMODE(temporary.parent.stat().st_mode) == 0o700
        assert list(temporary.parent.iterdir()) == []
        temporary.touch()


def test_a_link_is_replaced_and_what_it_points_to_is_left(tmp_path):
    for name in ("file", "x.zarr"):
        (tmp_path / "mine").mkdir(exist_ok=True)
        (tmp_path / "mine" / "kept").touch()
        (tmp_path / name).symlink_to(tmp_path / "mine", target_is_directory=True)
    with replacing(tmp_path / "file") as temporary:
        temporary.touch()
    write_folder(tmp_path / "x.zarr", "new")
    assert [each.name for each in (tmp_path / "mine").iterdir()] == ["kept"]
    assert (tmp_path / "x.zarr" / "new").exists()
    assert not (tmp_path / "file").is_symlink()


def test_a_file_is_removed_with_what_was_left_of_it(tmp_path):
    (tmp_path / "x").touch()
    left = tmp_path / f"x.{'0a' * 6}.tmp"
    left.touch()
    os.utime(left, (0, 0))
    remove(tmp_path / "x")
    assert list(tmp_path.iterdir()) == []


# -- full disks --------------------------------------------------------------------------------------------------------


@pytest.fixture
def full_disk(monkeypatch):
    """Disk that is full after 1,000 bytes of a file."""
    write = os.write

    def write_some(descriptor, data):
        room = 1000 - os.lseek(descriptor, 0, os.SEEK_CUR)
        if room <= 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(descriptor, data[:room])

    monkeypatch.setattr(os, "write", write_some)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**6, 10**6 - 1500, 1500))


def test_where_a_disk_is_full_the_error_says_how_much_is_missing(tmp_path, full_disk):
    path = tmp_path / "model.pt"
    path.write_text("former")
    with pytest.raises(
        DiskFullError, match=r"model.pt' cannot be written.* takes 8\d.\d kB or more; found 1.5 kB"
    ) as caught:
        write_saved(path, {"w": torch.ones(20_000)}, {}, [])
    assert caught.value.errno == errno.ENOSPC
    assert path.read_text() == "former"
    assert [each.name for each in tmp_path.iterdir()] == ["model.pt"]


def test_what_was_written_is_what_was_to_be_written_unless_the_disk_is_full(tmp_path):
    with Sink(tmp_path / "x") as sink:
        sink.write(b"0123")
        sink.write(memoryview(np.arange(3, dtype=np.int32)))
        sink.seek(1)
        sink.write(b"abc")
    assert (tmp_path / "x").read_bytes() == b"0abc" + np.arange(3, dtype=np.int32).tobytes()


def test_a_file_for_which_there_is_no_room_is_refused_before_any_work(tmp_path, full_disk):
    require_room(tmp_path / "not yet" / "x", 1500)
    with pytest.raises(DiskFullError, match=r"it takes 1\.5 GB or more; found 1\.5 kB free"):
        require_room(tmp_path / "not yet" / "x", 1_500_000_000)


def test_a_folder_in_which_files_are_still_written_is_not_abandoned(tmp_path):
    long_ago = (time.time() - ABANDONED - 60,) * 2
    with replacing(tmp_path / "x.zarr") as slow:
        (slow / "chunks").mkdir(parents=True)
        (slow / "chunks" / "0").touch()
        os.utime(slow / "chunks", long_ago)
        os.utime(slow, long_ago)
        with replacing(tmp_path / "x.zarr") as quick:
            quick.mkdir()
        assert slow.exists()
    assert (tmp_path / "x.zarr" / "chunks" / "0").exists()
