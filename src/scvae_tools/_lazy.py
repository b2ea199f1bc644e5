"""Modules that are imported when they are first used, without a trace in the caller's random numbers."""

from __future__ import annotations

import random
import sys
from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from types import ModuleType


def loaded(name: str) -> ModuleType:
    """Import a module, if that has not been done; the random states of Python and NumPy come out as they went in.

    scikit-learn and scvi-tools draw random numbers when they are imported, by way of rich and JAX.
    """
    if name in sys.modules:
        return sys.modules[name]
    import numpy as np

    state, numpy_state = random.getstate(), np.random.get_state()  # noqa: NPY002
    try:
        return import_module(name)
    finally:
        random.setstate(state)
        np.random.set_state(numpy_state)  # noqa: NPY002
