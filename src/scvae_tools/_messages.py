"""What is said to the user: once, and about the user's own line."""

from __future__ import annotations

import inspect
import logging
import warnings
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

logger = logging.getLogger("scvae_tools")

_said_before: ContextVar[bool] = ContextVar("said_before", default=False)
_PACKAGE = str(Path(__file__).parent)


@contextmanager
def said_before() -> Iterator[None]:
    """Say nothing inside: data are read a second time."""
    token = _said_before.set(True)
    try:
        yield
    finally:
        _said_before.reset(token)


def warn(message: str) -> None:
    """Warn, at the first line outside the package."""
    if _said_before.get():
        return
    frame, level = inspect.currentframe(), 1
    while frame is not None and frame.f_code.co_filename.startswith(_PACKAGE):
        frame, level = frame.f_back, level + 1
    warnings.warn(message, UserWarning, stacklevel=level)


def inform(message: str, *values: object) -> None:
    """Log at the level INFO."""
    if not _said_before.get():
        logger.info(message, *values)
