"""Threads of the processor: no more than are of use, asleep while they wait, and safe to fork.

torch computes with a team of OpenMP threads, which wait for each other many times in a step of a training. With
libgomp, the runtime of torch on Linux, a waiting thread keeps its core busy for about 3 ms before it sleeps. Beside
other work the thread that it waits for then has no core to run on (docs/performance.md has figures). The number of
threads is not changed with the load: sums in another order are rounded otherwise, and the same seed would give another
result.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import threading
from typing import TYPE_CHECKING

import joblib
import psutil
import torch
from threadpoolctl import threadpool_info

if TYPE_CHECKING:
    from collections.abc import Iterator

#: Variables by which users say how many threads there are, and how these wait.
NUMBERS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")
WAITING = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")
#: Numbers in a matrix up to which there is one thread: 128 cells and 1,024 genes. 765 genes were measured
#: (docs/performance.md); the limit is chosen.
SMALL = 2**17
#: A function that does nothing and needs nothing of Python.
_NOTHING = ctypes.cast(ctypes.pythonapi.Py_IsInitialized, ctypes.c_void_p)
#: ``omp_pause_soft`` of the OpenMP standard.
_SOFTLY = 1


@contextlib.contextmanager
def considerate_threads(n_values: int | None = None) -> Iterator[None]:
    """Context for a long computation: threads sleep while they wait, and there are no more of them than are of use.

    Parameters
    ----------
    n_values
        Size of the matrices that are computed with, such as cells times genes; None if they are large.
    """
    with useful_threads(n_values), sleeping_threads():
        yield


@contextlib.contextmanager
def useful_threads(n_values: int | None = None) -> Iterator[None]:
    """Context in which torch has one thread for small matrices, and at most as many as there are processors to use.

    torch takes as many as the machine has, though a container may grant fewer. A number that the user chose, by a
    variable or in torch, is kept.
    """
    n_threads = torch.get_num_threads()
    n_useful = 1 if n_values is not None and n_values <= SMALL else joblib.cpu_count()
    is_of_torch = n_threads in (os.cpu_count(), psutil.cpu_count(logical=False))
    if n_threads <= n_useful or not is_of_torch or any(name in os.environ for name in NUMBERS):
        yield
        return
    torch.set_num_threads(n_useful)
    try:
        yield
    finally:
        torch.set_num_threads(n_threads)


@contextlib.contextmanager
def sleeping_threads() -> Iterator[None]:
    """Context in which threads that wait for each other sleep almost at once, unless the user set how they wait."""
    if any(name in os.environ for name in WAITING):
        yield
        return
    with _crowd:
        yield


class _Crowd:
    """More threads than there are processors, all asleep, for as long as anyone needs them.

    libgomp reads how long threads wait when it is loaded, which has often happened before this package. But while it
    has more threads than there are processors, it lets each wait for some microseconds only. So a thread of Python
    starts a team that is larger, and keeps it until the last of the contexts has ended.
    """

    def __init__(self) -> None:
        self.renew_lock()
        self.n_contexts = 0

    def renew_lock(self) -> None:
        """Make a lock that nobody holds, as a forked process needs it."""
        self.lock = threading.RLock()  # a generator may end, and its context with it, while another context starts

    def __enter__(self) -> None:
        with self.lock:
            self.n_contexts += 1
            if self.n_contexts == 1:
                self.ended, started = threading.Event(), threading.Event()
                runtimes = [each for each in _libgomps() if each.omp_get_max_threads() > 1]  # of the present thread
                threading.Thread(target=_keep_teams, args=(runtimes, started, self.ended), daemon=True).start()
                started.wait()

    def __exit__(self, *error: object) -> None:
        with self.lock:
            self.n_contexts -= 1
            if self.n_contexts == 0:
                self.ended.set()


def _keep_teams(runtimes: list[ctypes.CDLL], started: threading.Event, ended: threading.Event) -> None:
    """Start a team of OpenMP threads that has nothing to do, in each libgomp, and keep it."""
    try:
        for runtime in runtimes:
            runtime.GOMP_parallel(_NOTHING, None, runtime.omp_get_num_procs() + 1, 0)
    finally:
        started.set()
    ended.wait()


def _libgomps() -> list[ctypes.CDLL]:
    """Loaded copies of libgomp; torch and scikit-learn each bring their own."""
    return [ctypes.CDLL(each["filepath"]) for each in threadpool_info() if each["prefix"] == "libgomp"]


def _end_team() -> None:
    """End the OpenMP threads of the present one, which a forked process would wait for without having them."""
    for runtime in _libgomps():
        if hasattr(runtime, "omp_pause_resource_all"):
            runtime.omp_pause_resource_all(_SOFTLY)


_crowd = _Crowd()
if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_end_team, after_in_child=_crowd.renew_lock)
