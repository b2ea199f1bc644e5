"""Files are whole whenever they exist, and digests depend on every byte."""

from __future__ import annotations

import os
import stat
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from scvae_tools._files import ABANDONED, digest, replacing
from scvae_tools.model._saved_file import read_saved, write_saved


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
    assert torch.equal(read_saved(path).state["w"], torch.ones(2))


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


def test_the_former_folder_comes_back_where_the_new_one_cannot_take_its_name(tmp_path, monkeypatch):
    folder, rename = tmp_path / "x.zarr", Path.rename
    folder.mkdir()
    (folder / "old").touch()
    renamed = []

    def fail_at_the_second(old, new):
        renamed.append(old)
        if len(renamed) == 2:
            raise OSError("disk error")
        return rename(old, new)

    monkeypatch.setattr(Path, "rename", fail_at_the_second)

    def write():
        with replacing(folder) as temporary:
            temporary.mkdir()
            (temporary / "new").touch()

    with pytest.raises(OSError, match="disk error"):
        write()
    assert [each.name for each in tmp_path.rglob("*")] == ["x.zarr", "old"]


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
