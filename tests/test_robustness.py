"""Odd arguments, kills and Ctrl-C, a few of each: `benchmarks/robustness.py` has as many as there is time for."""

from __future__ import annotations

import multiprocessing
import random
import sys
from importlib import import_module
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(
    "fork" not in multiprocessing.get_all_start_methods(), reason="each trial is a forked process"
)


@pytest.fixture(scope="module")
def robustness():
    folder = str(Path(__file__).parents[1] / "benchmarks")
    sys.path.insert(0, folder)
    try:
        yield import_module("robustness")
    finally:
        sys.path.remove(folder)


@pytest.mark.parametrize(("part", "most"), [("fuzz", 30), ("kill", 6), ("interrupt", 3)])
def test_nothing_is_lost_or_broken(part, most, robustness):
    n, failures = getattr(robustness, part)(300, random.Random(3), most)
    assert failures == []
    assert n == most


@pytest.mark.parametrize(
    ("outcome", "expected"),
    [(lambda: 1, 1), (lambda: None, None), ("segfault", "crashed with exit code -11"), ("hang", "did not end")],
)
def test_what_becomes_of_a_process_is_told(outcome, expected, robustness):
    import os
    import signal
    import time

    function = {
        "segfault": lambda: os.kill(os.getpid(), signal.SIGSEGV),
        "hang": lambda: time.sleep(60),
    }.get(outcome, outcome)
    assert robustness.in_a_fork(function, seconds=1 if outcome == "hang" else 20) == expected
