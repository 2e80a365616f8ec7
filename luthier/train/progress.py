"""What a user sees while training: a live display on a terminal, a few plain lines elsewhere.

It is told every record that goes to metrics.jsonl and shows what fits. All of it goes to stderr: stdout
belongs to results.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from typing import Any, Protocol

WIDE = 110  # columns of a terminal that has room for a bar
PLAIN_SECONDS = 10.0  # at least this long between two plain lines of training


class Progress(Protocol):
    def show(self, kind: str, step: int, values: Mapping[str, Any]) -> None:
        """A record of metrics.jsonl."""
        ...

    def activity(self, text: str, done: int | None, total: int | None) -> None: ...

    def close(self) -> None: ...


def open_progress(kind: str) -> Progress:
    """`rich`, `plain`, `none`, or `auto`: rich when stderr is a terminal, else plain."""
    if kind == "auto":
        kind = "rich" if sys.stderr.isatty() else "plain"
    return {"rich": Rich, "plain": Plain, "none": Nothing}[kind]()


class Nothing:
    def show(self, kind: str, step: int, values: Mapping[str, Any]) -> None:
        pass

    def activity(self, text: str, done: int | None, total: int | None) -> None:
        pass

    def close(self) -> None:
        pass


class Plain:
    """One line at the first and last step and every few seconds between; evaluations and remarks always."""

    def __init__(self) -> None:
        self._last = float("-inf")

    def show(self, kind: str, step: int, values: Mapping[str, Any]) -> None:
        if kind == "train":
            now = time.monotonic()
            if now - self._last < PLAIN_SECONDS and values.get("progress") != 1.0:
                return
            self._last = now
        text = line(kind, step, values)
        if text:
            print(text, file=sys.stderr, flush=True)

    def activity(self, text: str, done: int | None, total: int | None) -> None:
        pass  # would be a line each time

    def close(self) -> None:
        pass


class Rich:
    """A bar with step, loss, learning rate, tokens/s, memory and time left; other records above it."""

    def __init__(self) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, TextColumn
        from rich.progress import Progress as Bar

        console = Console(stderr=True)
        # the numbers matter more than the bar: it is drawn where there is room for both
        bar = [BarColumn(bar_width=24)] if console.width >= WIDE else []
        self._bar = Bar(
            TextColumn("{task.description}"),
            *bar,
            TextColumn("{task.percentage:>3.0f}%"),
            TextColumn("{task.fields[text]}"),
            console=console,
        )
        self._train = self._bar.add_task("train", total=1.0, text="", visible=False)
        self._other = self._bar.add_task("", total=None, text="", visible=False)
        self._bar.start()

    def show(self, kind: str, step: int, values: Mapping[str, Any]) -> None:
        text = line(kind, step, values)
        if kind == "train":
            done = values.get("progress") or 0.0
            self._bar.update(self._train, completed=done, text=text, visible=True)
        elif text:
            self._bar.console.print(text, markup=False, highlight=False)

    def activity(self, text: str, done: int | None, total: int | None) -> None:
        self._bar.update(self._other, description=text, completed=done or 0, visible=bool(text))
        # None keeps a total in rich's update, and means "not known" when set
        self._bar.tasks[1].total = total

    def close(self) -> None:
        self._bar.stop()


def line(kind: str, step: int, values: Mapping[str, Any]) -> str:
    """One record in words; empty for records that are not shown."""
    match kind:
        case "remark" | "plan":
            return str(values["text"])
        case "evaluate":
            numbers = [f"{k} {v:.4f}" for k, v in values.items() if isinstance(v, float)]
            return f"evaluated at step {step}: {', '.join(numbers)}"
        case "checkpoint":
            left = values.get("not_removed")
            return (
                f"saved {values['path']}{' (best so far)' if values.get('best') else ''}"
                f"{f'; an older one could not be removed ({left})' if left else ''}"
            )
        case "restart":
            again, seconds = values["repeated_steps"], values["recovery_seconds"]
            after = "" if seconds is None else f" {seconds:.0f} s after the failure"
            return f"went on{after}{f'; {again} steps are done again' if again else ''}"
        case "train":
            return _train_line(step, values)
    return ""


def _train_line(step: int, values: Mapping[str, Any]) -> str:
    total = values.get("total_steps")
    loss, speed = values.get("loss"), values.get("tokens_per_second")
    parts = [
        f"step {step}/{total}" if total else f"step {step}",
        "loss -" if loss is None else f"loss {loss:.4f}",
        f"lr {values['lr']:.3g}",
        "" if speed is None else f"{speed:,.0f} tok/s",
        _bytes(values.get("memory")),
        _left(values.get("eta_seconds")),
    ]
    return "  ".join(part for part in parts if part)


def _bytes(number: int | None) -> str:
    return "" if number is None else f"{number / 2**30:.2f} GiB"


def _left(seconds: float | None) -> str:
    if seconds is None:
        return ""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d} left" if hours else f"{minutes}:{rest:02d} left"
