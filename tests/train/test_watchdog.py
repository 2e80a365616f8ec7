"""Runs that hang end with their stacks; long work that is right does not."""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import luthier.train.watchdog as module
from luthier.train.watchdog import LONG, Watchdog

SECONDS = 0.4


def sleeping_step() -> None:
    time.sleep(60)


def watched(folder: Path, work: Callable[[Watchdog], Any], seconds: float | None, log: str) -> None:
    """A process with a watchdog of its own."""
    with open(log, "ab") as file:  # noqa: PTH123
        os.dup2(file.fileno(), 2)
    module.OTHERS_SECONDS, module.NATIVE_SECONDS = 0.1, 0.5
    module.STOP_SECONDS = 0.5

    def tell(error: Exception) -> None:
        os.write(2, f"told: {error}\n".encode())

    with Watchdog(folder / "stacks", seconds, rank=3, tell=tell) as watchdog:
        work(watchdog)


def hang(watchdog: Watchdog) -> None:
    watchdog.stepped(7)
    sleeping_step()


def hang_in_native_code(watchdog: Watchdog) -> None:
    watchdog.stepped(7)
    ctypes.PyDLL(None).usleep(60_000_000)  # PyDLL keeps the lock of the interpreter


def hang_after_a_signal(watchdog: Watchdog) -> None:
    watchdog.stepped(7)
    hang_in_the_first_step_after_a_signal(watchdog)


def hang_in_the_first_step_after_a_signal(watchdog: Watchdog) -> None:
    signal.signal(signal.SIGTERM, lambda number, frame: None)
    os.kill(os.getpid(), signal.SIGTERM)
    while True:
        time.sleep(0.05)


def evaluate_for_long(watchdog: Watchdog) -> None:
    with watchdog.phase("evaluating"):
        time.sleep(SECONDS * 2)
    with watchdog.phase("evaluating"):
        for _ in range(20):
            time.sleep(SECONDS * LONG / 20)
            watchdog.beat()
        time.sleep(SECONDS * 2)
    time.sleep(SECONDS / 3)


def end_after_a_signal_in_long_work(watchdog: Watchdog) -> None:
    """The signal came so long ago that a step would not have got the time; the evaluation had it."""
    signal.signal(signal.SIGTERM, lambda number, frame: None)
    watchdog.stepped(7)
    with watchdog.phase("evaluating"):
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(1.5)  # three times STOP_SECONDS
    time.sleep(0.3)  # and what follows it, here on the way to saving


def slow_steps(watchdog: Watchdog) -> None:
    for step in range(1, 4):
        time.sleep(SECONDS / 2)
        watchdog.stepped(step)
    time.sleep(SECONDS * 3)  # a step ten times as long as the slowest so far may be right


def save_for_ever(watchdog: Watchdog) -> None:
    with watchdog.phase("saving"):
        time.sleep(60)


@pytest.fixture
def run(tmp_path: Path) -> Callable[..., tuple[int | None, str, list[Path]]]:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["test_watchdog"])

    def go(work: Callable[[Watchdog], Any], seconds: float | None = SECONDS) -> Any:
        log = tmp_path / "log.txt"
        with pytest.MonkeyPatch.context() as environment:
            environment.setenv("PYTHONPATH", os.pathsep.join(filter(None, sys.path)))
            process = context.Process(target=watched, args=(tmp_path, work, seconds, str(log)))
            process.start()
        process.join(30)
        code = process.exitcode
        process.kill()
        return code, log.read_text("utf-8", "replace"), sorted(tmp_path.glob("stacks/*"))

    return go


def test_a_hanging_step_ends_the_process_with_its_stack(run: Any) -> None:
    code, said, (stack,) = run(hang)
    assert code == 1
    assert "told: training, after step 7. nothing moved for" in said
    assert stack.name == "step-7-rank-3.txt"
    assert "sleeping_step" in stack.read_text() and "hang_timeout" in said


def test_saving_may_not_take_for_ever(run: Any) -> None:
    code, said, (stack,) = run(save_for_ever)
    assert code == 1 and "while saving" in said and "save_for_ever" in stack.read_text()


def test_native_code_that_never_returns_is_ended_too(run: Any) -> None:
    code, said, _ = run(hang_in_native_code)
    assert code == 1 and "hang_in_native_code" in said


@pytest.mark.parametrize("work", [hang_after_a_signal, hang_in_the_first_step_after_a_signal])
def test_a_step_that_does_not_end_after_a_signal_has_a_bound(
    run: Any, work: Callable[[Watchdog], Any]
) -> None:
    code, said, (stack,) = run(work, 100.0)
    assert code == 143 and "the step did not end after SIGTERM" in said
    assert "first_step_after_a_signal" in stack.read_text()


@pytest.mark.parametrize("work", [evaluate_for_long, slow_steps])
def test_long_work_that_is_right_is_left_alone(run: Any, work: Callable[[Watchdog], Any]) -> None:
    assert run(work)[0] == 0


def test_a_signal_in_long_work_leaves_time_to_save_after_it(run: Any) -> None:
    code, said, _ = run(end_after_a_signal_in_long_work, 100.0)
    assert code == 0, said


def test_never_is_never(run: Any) -> None:
    code, said, stacks = run(evaluate_for_long, None)
    assert (code, said, stacks) == (0, "", [])


def test_the_handler_of_signals_is_as_it_was(tmp_path: Path) -> None:
    before = signal.set_wakeup_fd(-1)
    signal.set_wakeup_fd(before)
    with Watchdog(tmp_path, 100.0):
        pass
    assert signal.set_wakeup_fd(before) == before
