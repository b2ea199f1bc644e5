"""Threads of the processor: as many as are granted, asleep while they wait, and safe to fork."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time

import joblib
import pytest
import torch

from scvae_tools import _threads
from scvae_tools._threads import sleeping_threads, useful_threads

#: Seconds of the processor for 20 additions by two threads, each followed by 30 ms in which there is nothing to do.
IDLE = """
import time
import torch
from scvae_tools._threads import sleeping_threads

x = torch.zeros(2**17)

def seconds():
    x.add_(1)
    time.sleep(0.2)  # a thread that waits has gone to sleep
    start = time.process_time()
    for _ in range(20):
        x.add_(1)
        time.sleep(0.03)
    return time.process_time() - start

before = seconds()
with sleeping_threads(), sleeping_threads():
    inside = seconds()
print(before, inside, seconds())
"""

FORKED = """
import multiprocessing
import threading
import numpy as np
import torch
import scvae_tools as svt
from scvae_tools._random import seeded

model = svt.tl.scvae(
    svt.datasets.simulate(300, 400, 2), n_components=2, max_epochs=4, batch_size=128, return_model=True, progress=False
)
x = torch.rand(600, 600)

def result():
    with seeded(0):
        return float((x @ x).exp().sum()), model.get_elbo_terms().to_numpy(), torch.get_num_threads()

def while_another_thread_is_seeded(started, ended):
    with seeded(1):
        started.set()
        ended.wait()

here = result()
started, ended = threading.Event(), threading.Event()
threading.Thread(target=while_another_thread_is_seeded, args=(started, ended)).start()
started.wait()
with multiprocessing.get_context("fork").Pool(2) as pool:
    there = pool.starmap(result, [(), ()])
ended.set()
for found in (*there, result()):
    assert found[0] == here[0] and found[2] == here[2] == 2, (found, here)
    np.testing.assert_array_equal(found[1], here[1])
"""


def run(code: str, **environment: str) -> str:
    kept = {name: value for name, value in os.environ.items() if name not in (*_threads.WAITING, *_threads.NUMBERS)}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code],
        capture_output=True,
        text=True,
        env=kept | {"OMP_NUM_THREADS": "2"} | environment,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


needs_libgomp = pytest.mark.skipif(
    not _threads._libgomps() or (os.cpu_count() or 1) < 2, reason="needs libgomp and two processors"
)


@needs_libgomp
def test_threads_that_wait_sleep_inside_and_as_before_outside():
    before, inside, after = map(float, run(IDLE).split())
    assert inside < 0.5 * before
    assert inside < 0.5 * after


@needs_libgomp
def test_how_threads_wait_is_left_to_the_user_who_set_it():
    before, inside, _ = map(float, run(IDLE, GOMP_SPINCOUNT="300000").split())
    assert inside > 0.5 * before


def test_contexts_within_each_other_keep_one_thread(monkeypatch):
    for name in _threads.WAITING:
        monkeypatch.delenv(name, raising=False)
    n_before = threading.active_count()
    with sleeping_threads():
        with sleeping_threads():
            assert threading.active_count() == n_before + 1
        assert threading.active_count() == n_before + 1
    for _ in range(100):
        if threading.active_count() == n_before:
            return
        time.sleep(0.05)
    pytest.fail("the thread did not end")


@pytest.mark.parametrize(
    ("n_threads", "n_granted", "n_values", "variable", "expected"),
    [
        (4, 2, None, None, 2),  # a container that may use 2 of 4 processors
        (4, 4, None, None, 4),
        (4, 4, 128 * 13_488, None, 4),
        (4, 4, 128 * 765, None, 1),
        (4, 2, 128 * 765, "OMP_NUM_THREADS", 4),
        (3, 2, 128 * 765, None, 3),  # which the user chose: torch takes 4, or the 2 cores behind them
        (1, 2, None, None, 1),
    ],
)
def test_threads_are_no_more_than_are_of_use(n_threads, n_granted, n_values, variable, expected, monkeypatch):
    for name in _threads.NUMBERS:
        monkeypatch.delenv(name, raising=False)
    if variable:
        monkeypatch.setenv(variable, str(n_threads))
    monkeypatch.setattr(os, "cpu_count", lambda: 4)
    monkeypatch.setattr(_threads.psutil, "cpu_count", lambda logical: 4 if logical else 2)
    monkeypatch.setattr(joblib, "cpu_count", lambda: n_granted)
    before = torch.get_num_threads()
    torch.set_num_threads(n_threads)
    try:
        with useful_threads(n_values):
            assert torch.get_num_threads() == expected
        assert torch.get_num_threads() == n_threads
    finally:
        torch.set_num_threads(before)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_process_that_is_forked_after_a_training_computes_the_same():
    run(FORKED)
