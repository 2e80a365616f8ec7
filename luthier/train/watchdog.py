"""A run that makes no step any more: the stack of every process is written, and the process ends.

A thread watches the time since the last sign of life. Long work that is right (the first step, compiling,
an evaluation, saving) announces itself by `phase` and has more time. A signal that asks for an end has a
bound as well. A main thread that never lets another one run (native code) is ended by faulthandler's own timer.
"""

from __future__ import annotations

import faulthandler
import os
import select
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from luthier.errors import Failed

FOLDER = "stacks"  # in the run's output
FIRST, TRAINING = "in the first step", "training"  # what is going on but for announced phases
LONG = 6  # times as long may a phase take that announced itself
SLOW = 10  # times as long as the slowest step so far may a step always take
STOP_SECONDS = 300.0  # from a signal to the end of the step
OTHERS_SECONDS = 3.0  # for the other processes to write their stacks, before this one ends
NATIVE_SECONDS = 15.0  # after which a process is ended whose threads do not run


class Watchdog:
    """Context manager around a run. `seconds` without a sign of life end the process; None: never.

    Stacks go to `folder`/step-N-rank-R.txt. `tell(text)` is called with what happened before the end. `slack`
    multiplies the time of every step (compiled models may be compiled again at any of them).
    """

    def __init__(
        self,
        folder: Path | None = None,
        seconds: float | None = None,
        *,
        rank: int = 0,
        slack: float = 1.0,
        tell: Callable[[Exception], object] = lambda error: None,
    ) -> None:
        self.folder, self.seconds, self.rank, self.slack = folder, seconds, rank, slack
        self._tell = tell
        self._lock = threading.Lock()
        self._doing, self._limit = "", 0.0
        self._last = self._step_began = time.monotonic()
        self._slowest = 0.0
        self._done = 0
        self._stop_by: float | None = None
        self._signal = 0
        self._thread: threading.Thread | None = None
        self._woken: list[socket.socket] = []
        self._old_fd = -1

    def __enter__(self) -> Watchdog:
        if self.seconds is None:
            return self
        self._woken = list(socket.socketpair())
        for end in self._woken:
            end.setblocking(False)
        if threading.current_thread() is threading.main_thread():
            # tells the thread of a signal also while the main thread is stuck in native code
            self._old_fd = signal.set_wakeup_fd(self._woken[1].fileno(), warn_on_full_buffer=False)
        self._begin(FIRST, self.seconds * LONG * self.slack)  # it may compile
        self._thread = threading.Thread(target=self._watch, daemon=True, name="watchdog")
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        if self._thread is None:
            return
        faulthandler.cancel_dump_traceback_later()
        if threading.current_thread() is threading.main_thread():
            signal.set_wakeup_fd(self._old_fd)
        self.seconds = None
        self._woken[1].send(b"\0")
        self._thread.join()
        for end in self._woken:
            end.close()

    def beat(self) -> None:
        """A sign of life."""
        if self.seconds is not None:
            with self._lock:
                self._last = time.monotonic()
            self._arm()

    def stepped(self, done: int) -> None:
        """Step number `done` is finished."""
        now = time.monotonic()
        self._slowest = max(self._slowest, now - self._step_began) if self._done else 0.0
        self._step_began, self._done = now, done
        if self.seconds is not None:
            self._begin(TRAINING, max(self.seconds, SLOW * self._slowest) * self.slack)

    @contextmanager
    def phase(self, doing: str) -> Iterator[None]:
        """Long work that is right: `evaluating`, `saving`, the first step."""
        if self.seconds is None:
            yield
            return
        before = self._doing, self._limit
        self._begin(doing, self.seconds * LONG * self.slack)
        try:
            yield
        finally:
            self._begin(*before)
            self._step_began = time.monotonic()
            if (
                self._stop_by is not None
            ):  # a signal came in long work: what follows it gets its time
                self._stop_by = time.monotonic() + STOP_SECONDS

    def _begin(self, doing: str, limit: float) -> None:
        with self._lock:
            self._doing, self._limit, self._last = doing, limit, time.monotonic()
        self._arm()

    def _arm(self) -> None:
        """Set the timer that needs no thread of Python."""
        faulthandler.dump_traceback_later(
            self._limit + NATIVE_SECONDS, exit=True, file=sys.__stderr__ or 2
        )

    def _watch(self) -> None:
        while (seconds := self.seconds) is not None:
            pause = min(1.0, seconds / 10)
            if select.select([self._woken[0]], [], [], pause)[0]:
                self._note(self._woken[0].recv(16))
            now = time.monotonic()
            with self._lock:
                idle, limit, doing = now - self._last, self._limit, self._doing
            if self.seconds is None:
                return
            if idle > limit:
                self._end(f"nothing moved for {idle:.0f} seconds while {doing}", 1)
            late = self._stop_by is not None and now > self._stop_by
            if late and doing in (FIRST, TRAINING):
                name = signal.Signals(self._signal).name
                self._end(f"the step did not end after {name}", 128 + self._signal)

    def _note(self, numbers: bytes) -> None:
        for number in numbers:
            if number in (signal.SIGTERM, signal.SIGINT) and self._stop_by is None:
                self._signal = number
                self._stop_by = time.monotonic() + STOP_SECONDS

    def _end(self, what: str, code: int) -> None:
        where = self.write_stacks()
        error = Failed(
            f"training, after step {self._done}",
            f"{what}; the stack of each process is in {where}",
            "what was saved is whole: go on with checkpoint.resume=auto; "
            "train.hang_timeout says how long a step may take",
        )
        with suppress(Exception):
            self._tell(error)
        time.sleep(OTHERS_SECONDS)
        os._exit(code)

    def write_stacks(self) -> str:
        """Write the stack of every thread of this process; where they went."""
        if self.folder is not None:
            with suppress(OSError):
                self.folder.mkdir(parents=True, exist_ok=True)
                path = self.folder / f"step-{self._done}-rank-{self.rank}.txt"
                with path.open("w", encoding="utf-8") as file:
                    file.write(f"after step {self._done}, while {self._doing}\n")
                    file.flush()
                    faulthandler.dump_traceback(file, all_threads=True)
                return str(self.folder)
        faulthandler.dump_traceback(sys.__stderr__ or 2, all_threads=True)
        return "the output above"
