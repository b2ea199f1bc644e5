"""Random states: seeds from the arguments of users, and contexts that restore the global generators."""

from __future__ import annotations

import functools
import inspect
import os
import random
import threading
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from scvae_tools._checks import check_random_source, check_seed
from scvae_tools._messages import inform

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

_is_seeded: ContextVar[bool] = ContextVar("is_seeded", default=False)


def as_seed(random_state: object, rng: object) -> int:
    """Seed, a whole number, from any value that scanpy accepts as ``random_state`` or ``rng``."""
    if rng is not None:
        if random_state not in (0, None):
            raise ValueError("`random_state` and `rng` say the same; found both. Pass one of them.")
        random_state = rng
    random_state = check_random_source("random_state", random_state)
    if isinstance(random_state, np.random.Generator):
        return int(random_state.integers(2**31))
    if isinstance(random_state, np.random.RandomState):
        return int(random_state.randint(2**31 - 1))
    return int(np.random.default_rng().integers(2**31)) if random_state is None else random_state


class _Turn:
    """Turn of one thread at a time to seed the global generators, which all threads of a process share."""

    def __init__(self) -> None:
        self.renew()

    def renew(self) -> None:
        """Give the turn to nobody: a forked process has not the thread that may have had it."""
        self._lock = threading.RLock()

    @contextmanager
    def taken(self) -> Iterator[None]:
        """Context that waits until no other thread is in it."""
        lock = self._lock
        if not lock.acquire(blocking=False):
            inform("Waiting for another thread: the seeded random generators are those of the whole process.")
            lock.acquire()
        try:
            yield
        finally:
            lock.release()


_turn = _Turn()
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_turn.renew)


@contextmanager
def isolated_random_state(seed: int) -> Iterator[None]:
    """Seed Python, NumPy and torch inside; leave their global states as they were. One thread at a time is inside.

    Inside, torch's default type is float32, of which all networks and their random numbers are.

    Raises
    ------
    ValueError
        If the seed is not a whole number from 0 to 2^63 − 1.
    """
    seed = check_seed("random_state", seed)
    devices = range(torch.cuda.device_count()) if torch.cuda.is_available() else []
    with _turn.taken(), torch.random.fork_rng(devices):
        state, numpy_state = random.getstate(), np.random.get_state()  # noqa: NPY002
        dtype = torch.get_default_dtype()
        torch.set_default_dtype(torch.float32)
        random.seed(seed)
        np.random.seed(seed % 2**32)  # noqa: NPY002
        torch.manual_seed(seed)
        try:
            yield
        finally:
            torch.set_default_dtype(dtype)
            random.setstate(state)
            np.random.set_state(numpy_state)  # noqa: NPY002


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Context that seeds the outermost call; calls inside it continue its random numbers."""
    if _is_seeded.get():
        yield
        return
    token = _is_seeded.set(True)
    try:
        with isolated_random_state(seed):
            yield
    finally:
        _is_seeded.reset(token)


class RandomStream:
    """Random numbers of one seed for a generator function, continued each time that it is resumed.

    Between the entries the global generators are as they were. A generator function that stayed within `seeded` while
    it yields would leave them seeded for its caller.

    Parameters
    ----------
    seed
        Seed of the first entry.
    """

    def __init__(self, seed: int) -> None:
        self._seed, self._states = seed, None

    @contextmanager
    def on(self) -> Iterator[None]:
        """Context in which the global generators continue this stream; within `seeded` they are left as they are."""
        if _is_seeded.get():
            yield
            return
        with seeded(self._seed):
            if self._states is not None:
                set_random_states(self._states)
            yield
            self._states = random_states()


def with_random_state(method: Callable) -> Callable:
    """Add the argument ``random_state``, a seed, to a method of scvi-tools that uses the global generators."""

    @functools.wraps(method)
    def wrapped(self: Any, *args: Any, random_state: int = 0, **kwargs: Any) -> Any:
        with seeded(random_state):
            return method(self, *args, **kwargs)

    signature = inspect.signature(method)
    extra = inspect.Parameter("random_state", inspect.Parameter.KEYWORD_ONLY, default=0, annotation="int")
    parameters = list(signature.parameters.values())
    at = len(parameters) - (parameters[-1].kind is inspect.Parameter.VAR_KEYWORD)
    wrapped.__signature__ = signature.replace(parameters=[*parameters[:at], extra, *parameters[at:]])
    return wrapped


def random_states() -> dict[str, Any]:
    """States of Python's, NumPy's and torch's global generators, in types that a file can hold."""
    name, keys, *rest = np.random.get_state()  # noqa: NPY002
    return {
        "python": random.getstate(),
        "numpy": (name, torch.from_numpy(keys.astype(np.int64)), *rest),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def set_random_states(states: Mapping[str, Any]) -> None:
    """Set the global generators to states that `random_states` returned."""
    name, keys, *rest = states["numpy"]
    random.setstate(states["python"])
    np.random.set_state((name, keys.numpy().astype(np.uint32), *rest))  # noqa: NPY002
    torch.set_rng_state(states["torch"])
    for device, state in enumerate(states["cuda"][: torch.cuda.device_count()]):
        torch.cuda.set_rng_state(state, device)
