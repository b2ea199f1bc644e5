"""Saved files: values come back as they were, and reading them runs no code."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from scvae_tools._saving import read_saved, write_atomically, write_saved

VALUES = {
    "number": 1.5,
    "nothing": None,
    "flag": True,
    "infinite": float("inf"),
    "numpy number": np.float32(0.1),
    "tuple": (1, "a", None),
    "nested": {"list": [1, {"b": (2,)}]},
    "integers": np.arange(5),
    "matrix": np.arange(6.0).reshape(2, 3),
    "names": np.array(["a", "b"], dtype=object),
    "mixed": np.array(["a", 1, True], dtype=object),
    "table": pd.DataFrame({"epoch": [1, 2], "elbo": [-1.5, np.nan], "stage": ["vae", "mixture"]}),
}


@pytest.mark.parametrize("name", VALUES)
def test_values_come_back_as_they_were(name, tmp_path):
    path = tmp_path / "model.pt"
    write_saved(path, {"w": torch.ones(2)}, {"value": VALUES[name]}, ["g1", "g2"])
    state, attributes, var_names, versions = read_saved(path)
    assert versions is None
    found, expected = attributes["value"], VALUES[name]
    assert torch.equal(state["w"], torch.ones(2))
    assert var_names == ["g1", "g2"]
    if isinstance(expected, pd.DataFrame):
        pd.testing.assert_frame_equal(found, expected)
    elif isinstance(expected, np.ndarray):
        assert found.dtype == expected.dtype
        np.testing.assert_array_equal(found, expected)
    else:
        assert found == expected


def test_what_is_not_plain_is_refused_by_name(tmp_path):
    with pytest.raises(TypeError, match=r"attributes\['a'\]\['b'\] is a set"):
        write_saved(tmp_path / "model.pt", {}, {"a": {"b": {1}}}, [])


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
