"""Messages to the user: warnings that point at the user's own line of code, log messages, and a silent tqdm."""

from __future__ import annotations

import inspect
import logging
import sys
import warnings
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from types import FrameType

logger = logging.getLogger("scvae_tools")
SCANPY_INFO = 2  # of scanpy.settings.verbosity


class InterruptedTraining(UserWarning):
    """Warning that Ctrl-C ended a training; its result so far is kept."""


_said_before: ContextVar[bool] = ContextVar("said_before", default=False)
_PACKAGE = str(Path(__file__).parent)


@contextmanager
def said_before() -> Iterator[None]:
    """Context without warnings and log messages, for data that are read a second time."""
    token = _said_before.set(True)
    try:
        yield
    finally:
        _said_before.reset(token)


def warn(message: str, category: type[UserWarning] = UserWarning) -> None:
    """Warn the user, at the first line outside the package and Lightning."""
    if _said_before.get():
        return
    frame, level = inspect.currentframe(), 1
    while frame is not None and _is_inside(frame):
        frame, level = frame.f_back, level + 1
    warnings.warn(message, category, stacklevel=level)


def _is_inside(frame: FrameType) -> bool:
    """Whether a line is of the package, or of Lightning, which calls the package."""
    return frame.f_code.co_filename.startswith(_PACKAGE) or frame.f_globals.get("__name__", "").startswith("lightning.")


def inform(message: str, *values: object) -> None:
    """Log a message at the level INFO; by scanpy where its verbosity asks for such messages and nothing else does."""
    if _said_before.get():
        return
    logger.info(message, *values)
    scanpy = sys.modules.get("scanpy")
    if scanpy is not None and int(scanpy.settings.verbosity) >= SCANPY_INFO and not logger.isEnabledFor(logging.INFO):
        scanpy.logging.info(message % values)


def quiet_tqdm() -> None:
    """Load tqdm, which in a notebook without ipywidgets falls back to text, without its saying so."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import tqdm.auto  # noqa: F401


def listed(names: Iterable[object]) -> str:
    names = list(names)
    shown = ", ".join(repr(str(name)) for name in names[:20])
    return (shown + (", ..." if len(names) > 20 else "")) or "(none)"
