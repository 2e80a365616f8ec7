"""SIGTERM and SIGINT during training: the first asks for an orderly end, the second ends at once."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

CAUGHT = (signal.SIGINT, signal.SIGTERM)


class Interrupted(BaseException):
    """Raised inside `Signals.interruptible`; no `except Exception` on the way can swallow it."""


class Signals:
    """Context manager that notes a signal in `received` instead of dying of it.

    Outside the main thread Python delivers no signals: then it does nothing.
    """

    def __init__(self, *, tell: bool = True) -> None:
        """`tell`: say on stderr that a signal was received."""
        self._tell = tell
        self.received: int | None = None
        self._interruptible = False
        self._old: dict[int, Any] = {}

    def __enter__(self) -> Signals:
        if threading.current_thread() is threading.main_thread():
            self._old = {number: signal.signal(number, self._note) for number in CAUGHT}
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._old.items():
            signal.signal(number, handler)

    @contextmanager
    def interruptible(self) -> Iterator[None]:
        """Work that may be abandoned in the middle: a signal raises Interrupted inside of it."""
        self._interruptible = True
        try:
            if self.received is not None:
                raise Interrupted
            yield
        finally:
            self._interruptible = False

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.received is not None:
            # a live display hides the cursor, and nobody will be there to show it again
            if sys.stderr.isatty():
                os.write(2, b"\x1b[?25h")
            os._exit(128 + number)
        self.received = number
        name = signal.Signals(number).name
        if self._tell:
            os.write(2, f"\n{name}: stopping after this step; once more stops at once\n".encode())
        if self._interruptible:
            raise Interrupted
