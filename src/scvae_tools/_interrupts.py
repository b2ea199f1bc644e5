"""Ctrl-C: held back where work would be lost, so that it ends the work at the next place where a result exists."""

from __future__ import annotations

import contextlib
import signal
import threading
from typing import TYPE_CHECKING

from scvae_tools._messages import logger

if TYPE_CHECKING:
    from collections.abc import Iterator
    from types import FrameType


class HeldInterrupts:
    """Ctrl-C of the user since it has been held back."""

    def __init__(self) -> None:
        self.was_pressed = False  #: ever
        self._is_waiting = False
        self._is_let_through = False

    def take(self) -> bool:
        """Whether Ctrl-C waits to be acted on; from now on it does not."""
        is_waiting, self._is_waiting = self._is_waiting, False
        return is_waiting

    @contextlib.contextmanager
    def let_through(self) -> Iterator[None]:
        """Context in which Ctrl-C is raised as ever, one that waits included."""
        if self.take():
            raise KeyboardInterrupt
        self._is_let_through = True
        try:
            yield
        finally:
            self._is_let_through = False

    def handle(self, number: int, frame: FrameType | None) -> None:
        """Handle the signal: note it, or raise KeyboardInterrupt where another one waits already."""
        if self._is_let_through or self._is_waiting:
            self._is_waiting = False
            signal.default_int_handler(number, frame)
        self.was_pressed = self._is_waiting = True
        with contextlib.suppress(RuntimeError):  # the signal may have come while something was printed
            logger.warning("Ctrl-C: ending where a result is whole. Press it again to stop at once and lose the work.")


_outermost: HeldInterrupts | None = None


@contextlib.contextmanager
def interrupts_held() -> Iterator[HeldInterrupts]:
    """Context in which the first Ctrl-C is noted, for the code inside to act on; a second one raises as ever.

    Where the code inside did not act on it, KeyboardInterrupt is raised at the end. A context within another one holds
    back the same signals. Nothing is held back outside the main thread, which gets no signals, and where the program
    has a handler of its own.
    """
    global _outermost  # one for the process, like the handler
    is_main = threading.current_thread() is threading.main_thread()
    if is_main and _outermost is not None:
        yield _outermost
        return
    if not is_main or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield HeldInterrupts()
        return
    _outermost = held = HeldInterrupts()
    signal.signal(signal.SIGINT, held.handle)
    try:
        yield held
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        _outermost = None
    if held.take():
        raise KeyboardInterrupt
