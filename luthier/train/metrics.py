"""What is measured in each step, and where it goes: metrics.jsonl, the sinks, the terminal.

`metrics.jsonl` is the source of truth: one JSON object a line, `kind` (start, train, evaluate,
checkpoint, remark, restart, plan, end), `step`, and the values; no NaN (null instead). On a resume it is cut back to the
checkpoint's step, so that no step stands in it twice. Sinks live in `sinks.py`, the terminal's side in
`progress.py`; when something is logged is the trainer's affair.
"""

from __future__ import annotations

import contextlib
import errno
import json
import math
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from io import FileIO
from pathlib import Path
from typing import Any

import torch

from luthier.files import write_text
from luthier.train.progress import Nothing, Progress, open_progress
from luthier.train.sinks import Sink, open_sinks

FILE = "metrics.jsonl"


@dataclass(frozen=True)
class StepReport:
    """One optimiser step. `step` counts from 1. Times in seconds; `wait` is the part spent waiting for data."""

    step: int
    lr: float
    num_supervised: int
    num_tokens: int  # real tokens: without padding
    num_slots: int  # with padding
    loss: float | None = None  # mean over the step's supervised tokens; None when it has none
    router_loss: float | None = None  # of a mixture of experts; not part of `loss`
    grad_norm: float | None = None  # before clipping; None when the step was skipped
    seconds: float = 0.0
    wait: float = 0.0
    skipped: str | None = None  # why nothing was updated
    told: str = ""  # what the user should know of it


@dataclass
class Window:
    """The steps since the last logging. Its fields are saved with the run, so that a resume logs the same."""

    steps: int = 0
    loss_sum: float = 0.0
    num_supervised: int = 0
    num_tokens: int = 0
    num_slots: int = 0
    seconds: float = 0.0
    wait: float = 0.0
    skipped: int = 0
    router_sum: float | None = None

    def add(self, report: StepReport) -> None:
        self.steps += 1
        self.loss_sum += (report.loss or 0.0) * report.num_supervised
        self.num_supervised += report.num_supervised if report.loss is not None else 0
        self.num_tokens += report.num_tokens
        self.num_slots += report.num_slots
        self.seconds += report.seconds
        self.wait += report.wait
        self.skipped += report.skipped is not None
        if report.router_loss is not None:
            self.router_sum = (self.router_sum or 0.0) + report.router_loss

    def values(self) -> dict[str, float | int | None]:
        """Means over the window: loss per supervised token, real tokens per second, shares, times per step."""
        return {
            "loss": self.loss_sum / self.num_supervised if self.num_supervised else None,
            "tokens_per_second": self.num_tokens / self.seconds if self.seconds else None,
            "supervised_share": self.num_supervised / max(self.num_tokens, 1),
            "padding_share": 1 - self.num_tokens / max(self.num_slots, 1),
            "step_seconds": self.seconds / max(self.steps, 1),
            "wait_seconds": self.wait / max(self.steps, 1),
            "skipped_steps": self.skipped,
            **({} if self.router_sum is None else {"router_loss": self.router_sum / self.steps}),
        }


@dataclass(frozen=True)
class Memory:
    """Bytes: resident memory of the process, or of the GPU's allocator. None where the system does not tell."""

    now: int | None
    peak: int | None


def memory(device: torch.device | str = "cpu") -> Memory:
    """Memory in use and its peak so far (rule 8 of the contract)."""
    if torch.device(device).type == "cuda":
        return Memory(torch.cuda.memory_allocated(device), torch.cuda.max_memory_allocated(device))
    status = Path(
        "/proc/self/status"
    )  # Linux; VmHWM, unlike ru_maxrss, starts afresh with the program
    if status.is_file():
        lines = (line.split() for line in status.read_text("ascii", "replace").splitlines())
        kilobytes = {words[0]: int(words[1]) for words in lines if words[0] in ("VmRSS:", "VmHWM:")}
        now, peak = kilobytes.get("VmRSS:"), kilobytes.get("VmHWM:")
        return Memory(now and now * 1024, peak and peak * 1024)
    if sys.platform == "darwin":
        import resource

        return Memory(None, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
    return Memory(None, None)


@dataclass
class Metrics:
    """Writes measurements of one run; a context manager that closes what it opened.

    `output`: the run's folder. `sinks`: names of `sinks.SINKS`; a missing package is refused by
    `sinks.check_sinks`. `progress`: `auto`, `rich`, `plain` or `none`. `config`: the resolved config, for
    sinks that show it. Nothing is written or shown before `start`, and with `silent` nothing ever (the
    processes of a run but one).
    """

    output: Path
    sinks: Sequence[str] = ()
    progress: str = "auto"
    config: Mapping[str, Any] = field(default_factory=dict)
    silent: bool = False

    def __post_init__(self) -> None:
        self._file: FileIO | None = None
        self._size = 0  # of the file
        self._sinks: list[Sink] = []
        self._progress: Progress = Nothing()
        self._unwritten: list[str] = []  # lines that metrics.jsonl could not take yet
        self.alive: Callable[[], object] = lambda: None  # called when anything goes on
        self.reached = 0  # the last step of an earlier part of the run

    @property
    def path(self) -> Path:
        return self.output / FILE

    def start(self, step: int = 0, *, evaluated: bool = True) -> None:
        """Open everything for a run that goes on from `step`, 0 when new.

        What metrics.jsonl says about later steps is dropped, and with `evaluated=False` also the evaluation
        of `step` itself, which will be done again.
        """
        if self.silent:
            return
        self.output.mkdir(parents=True, exist_ok=True)
        if self.path.exists():
            found = (r["step"] for r in read_metrics(self.path) if r["kind"] == "train")
            self.reached = max(found, default=0)
            cut_back(self.path, step, evaluated)
        self._file = self.path.open("ab", buffering=0)
        self._size = self._file.seek(0, os.SEEK_END)
        self._sinks = open_sinks(self.sinks, self.output, step, self.config)
        self._progress = open_progress(self.progress)

    def log(self, kind: str, step: int, values: Mapping[str, Any]) -> None:
        """Record `values` (numbers, strings, None, or containers of them) of `step`, everywhere."""
        if self.silent:
            return
        if self._file is None:
            raise ValueError("metrics were logged before start()")
        clean = plain({"kind": kind, "step": step, **values})
        self._write(json.dumps(clean, ensure_ascii=False, allow_nan=False) + "\n", step)
        if kind in ("train", "evaluate"):
            numbers = {f"{kind}/{k}": v for k, v in clean.items() if k != "step" and _is_number(v)}
            for sink in list(self._sinks):
                try:
                    sink.log(step, numbers)
                except Exception as error:  # whatever a service throws, the run is worth more
                    self._sinks.remove(sink)
                    self.remark(
                        f"{type(sink).__name__} gets no more metrics ({type(error).__name__}: {error}); "
                        f"{FILE} has them all",
                        step,
                    )
        self._progress.show(kind, step, clean)

    def _write(self, line: str, step: int) -> None:
        """Append a line; what cannot be written is told once and kept until it can."""
        assert self._file is not None
        again = bool(self._unwritten)
        self._unwritten.append(line)
        data = "".join(self._unwritten).encode()
        try:
            if again:  # the file system may have gone and come back
                self._file.close()
                self._file = self.path.open("ab", buffering=0)
                self._size = min(self._size, self._file.seek(0, os.SEEK_END))  # it may be a new one
            self._file.truncate(self._size)  # what a full disk took of a line
            if (self._file.write(data) or 0) < len(data):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            self._size, self._unwritten = self._size + len(data), []
        except OSError as error:
            if not again:
                text = f"{FILE} gets no more lines ({error.strerror or error}): they are kept until it does"
                self._progress.show("remark", step, {"text": text})

    def remark(self, text: str, step: int) -> None:
        """Something the user should know."""
        self.log("remark", step, {"text": text})

    def activity(self, text: str, done: int | None = None, total: int | None = None) -> None:
        """What is going on besides training steps (`evaluating`), for the live display; empty: nothing."""
        self.alive()
        self._progress.activity(text, done, total)

    def flush(self) -> None:
        """Bring metrics.jsonl to disk; called before each checkpoint, which must not be ahead of it."""
        if self._file is not None:
            with contextlib.suppress(OSError, ValueError):  # told when a line is written
                os.fsync(self._file.fileno())

    def close(self) -> None:
        for sink in self._sinks:
            try:
                sink.close()
            except Exception as error:  # whatever a service throws, the run is worth more
                text = f"closing {type(sink).__name__}: {type(error).__name__}: {error}"
                self._progress.show("remark", 0, {"text": text})
        self._progress.close()
        if self._file is not None:
            self._file.close()

    def __enter__(self) -> Metrics:
        return self

    def __exit__(self, kind: object, *error: object) -> None:
        # what went wrong first is what the user must hear, not that a full disk cannot be flushed either
        with contextlib.suppress(*([Exception] if kind else [])):
            self.close()


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def plain(value: Any) -> Any:
    """`value` as JSON can hold it: NaN and infinities become None, paths text, tuples lists."""
    if isinstance(value, Mapping):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(v) for v in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if value is None or isinstance(value, (bool, int, str)):
        return value
    return str(value)


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The records of a metrics.jsonl; a line torn by a crash is left out."""
    records = []
    for line in path.read_text("utf-8", "replace").splitlines():
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if isinstance(record, dict) and {"kind", "step"} <= record.keys():
            records.append(record)
    return records


def cut_back(path: Path, step: int, evaluated: bool = True) -> None:
    """Drop what a metrics.jsonl says about steps after `step` (0: all of it).

    Without `evaluated`, the evaluation of `step` itself is dropped too.
    """
    kept = [
        r
        for r in read_metrics(path)
        if r["kind"] == "restart"  # of the job, whose count goes on
        or (
            step
            and r["step"] <= step
            and (evaluated or r["step"] < step or r["kind"] != "evaluate")
        )
    ]
    write_text(path, "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in kept))
