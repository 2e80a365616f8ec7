"""What every contestant of the speed benchmark is measured with, in its own process and environment.

Standard library only, and torch where the contestant has loaded it: it must import in a peer's environment. A runner
reads its job, calls `begin` and `end` around every optimiser step and `loaded` after the model is read;
after the last step the result is written and the process ends, before anything is saved.
"""

from __future__ import annotations

import json
import os
import sys
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

PACKAGES = (
    *("luthier", "torch", "transformers", "peft", "trl", "accelerate", "bitsandbytes"),
    *("llamafactory", "torchtune", "torchao", "liger-kernel", "unsloth", "triton"),
)


class Watch:
    """Times, losses and memory of one contestant; `job` is what the harness asked for."""

    def __init__(self, path: str) -> None:
        self.job: dict[str, Any] = json.loads(Path(path).read_text("utf-8"))
        self.steps: list[dict[str, Any]] = []
        self.memory_loaded: int | None = None
        self.first: float | None = None  # seconds from the command to the first step
        self._begin = 0.0
        self._last: float | None = None  # the end of the step before

    def loaded(self) -> None:
        """The model is in memory, nothing was computed yet."""
        self.memory_loaded = memory()[0]

    def begin(self) -> None:
        """A step begins: its rows are there."""
        if self.first is None:
            self.first = time.time() - self.job["started"]
        self._begin = time.perf_counter()

    def end(self, loss: float | None, tokens: int, slots: int, supervised: int) -> None:
        """A step is done, its weights are updated. Counts are those of its batch: real tokens, with padding,
        and supervised ones. The last step writes the result and ends the process."""
        finish()
        now = time.perf_counter()
        self.steps.append({
            "seconds": now - (self._last or self._begin),  # the wait for its data included
            "compute": now - self._begin,
            "loss": loss, "tokens": tokens, "slots": slots, "supervised": supervised,
        })  # fmt: skip
        self._last = now
        if len(self.steps) >= self.job["steps"]:
            self.write()
            sys.stdout.flush()
            os._exit(0)  # saving is no part of the comparison

    def write(self) -> None:
        result = {
            "steps": self.steps,
            "first": self.first,
            "memory_loaded": self.memory_loaded,
            "memory_peak": memory()[1],
            "versions": versions(),
        }
        Path(self.job["result"]).write_text(json.dumps(result), "utf-8")


def versions() -> dict[str, str]:
    """Versions of what this environment has of the packages that decide a number."""
    found = {"python": sys.version.split()[0]}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def memory() -> tuple[int | None, int | None]:
    """Bytes now and at the peak: of the GPU's allocator, or resident memory of the process (Linux)."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        return torch.cuda.memory_allocated(), torch.cuda.max_memory_allocated()
    status = Path("/proc/self/status")
    if not status.is_file():
        return None, None
    lines = (line.split() for line in status.read_text("ascii", "replace").splitlines())
    found = {words[0]: int(words[1]) * 1024 for words in lines if words[0] in ("VmRSS:", "VmHWM:")}
    return found.get("VmRSS:"), found.get("VmHWM:")


def finish() -> None:
    """Wait for the GPU, if there is one."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        torch.cuda.synchronize()


def rows(job: dict[str, Any]) -> list[dict[str, Any]]:
    """The packed rows of the run in order: `ids`, `labels` (not shifted, -100 = ignored), `lengths`."""
    return [json.loads(line) for line in Path(job["rows"]).read_text("utf-8").splitlines()]


def steps(job: dict[str, Any]) -> list[list[dict[str, Any]]]:
    """The rows of each step, as a list of rows."""
    found, size = rows(job), job["batch"]
    return [found[i : i + size] for i in range(0, len(found), size)]


def conversations(job: dict[str, Any]) -> list[list[dict[str, str]]]:
    """The messages of each document, in the order in which the packed rows hold them."""
    lines = Path(job["documents"]).read_text("utf-8").splitlines()
    return [json.loads(line)["messages"] for line in lines]


def counts(step: list[dict[str, Any]]) -> tuple[int, int]:
    """Real tokens and supervised tokens of a step's rows. The first of a row predicts nothing."""
    tokens = sum(len(row["ids"]) for row in step)
    return tokens, sum(label != -100 for row in step for label in row["labels"])


def watch_trainer(watch: Watch) -> Any:
    """A callback for a `transformers.Trainer`, whose class is made to count what it is given."""
    import torch
    import transformers

    seen = {"tokens": 0, "slots": 0, "supervised": 0}
    plain = transformers.Trainer.training_step

    def training_step(self: Any, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        ids, mask = inputs["input_ids"], inputs.get("attention_mask")
        seen["slots"] += ids.numel()
        # a mask of more than two dimensions, or with document numbers, tells only what is not padding
        flat = mask is not None and mask.ndim == 2
        seen["tokens"] += int((mask != 0).sum()) if flat else ids.numel()
        seen["supervised"] += int((inputs["labels"] != -100).sum())
        return plain(self, model, inputs, *args, **kwargs)

    transformers.Trainer.training_step = training_step

    class Callback(transformers.TrainerCallback):
        def __init__(self) -> None:
            self.done: dict[str, int] | None = None

        def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
            watch.loaded()

        def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
            watch.begin()

        def on_log(
            self, args: Any, state: Any, control: Any, logs: Any = None, **rest: Any
        ) -> None:
            if logs and "loss" in logs:  # logged at every step, behind its update
                watch.end(float(logs["loss"]), **seen)
                seen.update(tokens=0, slots=0, supervised=0)

    torch.manual_seed(watch.job["seed"])
    return Callback()
