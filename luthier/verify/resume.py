"""`verify resume`: a run that is killed and goes on is the run that was never killed.

The user's config, cut to a few steps, runs in processes of its own: once undisturbed; once killed (SIGKILL)
at a random moment and again while it saves, each time going on by itself; and once going on in another number of
processes. Weights and losses are compared, bit for bit in the same layout. All of it happens in a folder that
is removed afterwards. What the runs do is the command line's.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from luthier.config import RunConfig
from luthier.configfile import Resolved, to_yaml
from luthier.errors import Failed, Refused
from luthier.files import PARTIAL, check_writable
from luthier.models.load import resolve_device
from luthier.parallel.degrees import check_processes, fewer
from luthier.train.checkpoint import FOLDER, steps_in
from luthier.train.metrics import FILE, cut_back, read_metrics

STEPS, EVERY = 8, 2  # of the shortened run, and of its checkpoints
POLL = 0.003  # seconds between two looks at a run
TRIES = 5  # to meet a run before its last step, on a machine that has much else to do
# Largest relative difference of a loss in another layout: sums in another order, a few steps of training long
ROUNDING = {"float64": 1e-9, "float32": 1e-5, "float16": 1e-2, "bfloat16": 3e-2}


@dataclass
class Course:
    """What a run came to: its losses and gradient norms by step, and its final weights."""

    steps: dict[int, tuple[float | None, float | None]]
    weights: dict[str, torch.Tensor]

    def apart(self, other: Course) -> tuple[int, int, float]:
        """Differing weights, differing steps, and the largest relative difference of a loss."""
        if self.weights.keys() != other.weights.keys() or self.steps.keys() != other.steps.keys():
            return len(self.weights), len(self.steps), float("inf")
        weights = sum(not torch.equal(t, other.weights[n]) for n, t in self.weights.items())
        steps = sum(values != other.steps[n] for n, values in self.steps.items())
        return weights, steps, self.losses_apart(other)

    def losses_apart(self, other: Course) -> float:
        """The largest relative difference of a loss, over the steps that both have."""
        pairs = [(v[0], other.steps[n][0]) for n, v in self.steps.items() if n in other.steps]
        found = [abs(a - b) / max(abs(b), 1e-30) for a, b in pairs if a is not None and b]
        return max(found, default=float("inf"))


@dataclass
class Run:
    """One run in `output`, started as often as needed. `words` are what is typed after `luthier finetune`."""

    file: Path
    output: Path
    log: Path
    process: subprocess.Popen[bytes] | None = field(default=None, init=False)

    def start(self, processes: int, *words: str) -> None:
        more = ["--nproc", str(processes)] if processes > 1 else []
        line = [sys.executable, "-m", "luthier", "finetune", str(self.file)]
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                [*line, f"output={self.output}", *words, *more], stdout=log, stderr=log
            )

    @property
    def running(self) -> bool:
        return self.process is not None and self.process.poll() is None

    def finish(self) -> None:
        """Wait for the end; Failed unless it is a good one."""
        assert self.process is not None
        if (code := self.process.wait()) != 0:
            lines = self.log.read_text("utf-8", "replace").strip().splitlines()
            told = [line for line in lines if line.startswith("luthier: ")] or lines or ["nothing"]
            raise Failed(
                "verify resume: a run of this config",
                f"it ended with exit code {code}: {told[-1].removeprefix('luthier: ')}",
                "luthier finetune FILE shows it all",
            )

    def steps(self) -> int:
        """The last finished step that metrics.jsonl tells."""
        return max(self._steps("train"), default=0)

    def began(self) -> int:
        """The step that the latest start went on from."""
        return (self._steps("start") or [0])[-1]

    def _steps(self, kind: str) -> list[int]:
        path = self.output / FILE
        with contextlib.suppress(OSError):
            return [r["step"] for r in read_metrics(path) if r["kind"] == kind]
        return []

    def saving(self) -> bool:
        return any((self.output / FOLDER).glob(f"{PARTIAL}step-*"))

    def kill(self, which: random.Random) -> str:
        """SIGKILL a process of the run, a random rank where there are several, and wait for the end."""
        assert self.process is not None
        ranks = _children(self.process.pid) if self.process.poll() is None else []
        at = which.randrange(len(ranks)) if ranks else 0
        with contextlib.suppress(ProcessLookupError):
            os.kill(ranks[at] if ranks else self.process.pid, signal.SIGKILL)
        self.process.wait()
        return f"rank {at}" if ranks else "the process"

    def take_back(self, step: int) -> None:
        """Let the next start go on from `step` at the latest: remove the checkpoints behind it, and what is told of
        steps behind it, or else they would seem to be made at once."""
        for number, path in steps_in(self.output):
            if number > step:
                shutil.rmtree(path)
        cut_back(self.output / FILE, step)

    def end(self) -> None:
        """Leave no process behind."""
        if self.process is not None and self.process.poll() is None:
            for pid in [*_children(self.process.pid), self.process.pid]:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            self.process.wait()

    def course(self) -> Course:
        records = [r for r in read_metrics(self.output / FILE) if r["kind"] == "train"]
        weights: dict[str, torch.Tensor] = {}
        for path in sorted(self.output.glob("*.safetensors")):
            with safe_open(path, "pt") as file:
                weights |= {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        return Course({r["step"]: (r["loss"], r["grad_norm"]) for r in records}, weights)


def verify_resume(
    resolved: Resolved,
    say: Callable[[str], object] = print,
    *,
    processes: int = 1,
    seed: int | None = None,
) -> dict[str, Any]:
    """Kill runs of the config at random moments and compare them with one that was not; gives the figures.

    `seed` fixes the moments as far as a clock can. Raises Failed when a resumed run is another one or cannot go
    on, Refused for bad input.
    """
    for remark in resolved.remarks:
        say(f"note: {remark}")
    config = shortened(resolved.config)
    check_processes(config, processes)
    parent = Path(resolved.config.output).absolute().parent
    check_writable(f"output={resolved.config.output}", parent)
    while not parent.is_dir():
        parent = parent.parent
    seed = random.SystemRandom().randrange(10**6) if seed is None else seed
    with room(parent) as folder:
        return compare_runs(config, folder, processes, random.Random(seed), say)


def shortened(config: RunConfig) -> RunConfig:
    """The config as a run of a few steps that saves often and measures nothing else."""
    changes: dict[str, dict[str, Any]] = {
        "train": {"steps": STEPS, "tokens": None},
        "evaluate": {"every": "never", "before": False, "generate": False},
        "checkpoint": {"every": EVERY, "keep": STEPS, "best": "none", "resume": "never"}
        | {"on_failure": "stop"},
        "log": {"every": 1, "sinks": (), "progress": "none"},
    }
    parts = {name: getattr(config, name).model_copy(update=new) for name, new in changes.items()}
    return config.model_copy(update=parts)


def compare_runs(
    config: RunConfig,
    folder: Path,
    processes: int,
    chance: random.Random,
    say: Callable[[str], Any],
) -> dict[str, Any]:
    """`verify_resume` in `folder`."""
    file, runs = folder / "run.yaml", []
    file.write_text(to_yaml(config), "utf-8")

    def new(name: str) -> Run:
        runs.append(Run(file, folder / name, folder / f"{name}.txt"))
        return runs[-1]

    layout = f"{processes} processes" if processes > 1 else "one process"
    say(f"{STEPS} steps in {layout}, a checkpoint every {EVERY}; started several times")
    try:
        begin = time.monotonic()
        whole = new("whole")
        whole.start(processes)
        whole.finish()
        expected = whole.course()
        say(f"  not disturbed: {STEPS} steps in {time.monotonic() - begin:.0f} s")
        killed = new("killed")
        kills = [
            _disturb(killed, processes, chance, say, saving=False),
            _disturb(killed, processes, chance, say, saving=True),
        ]
        killed.start(processes, "checkpoint.resume=auto")
        killed.finish()
        say(f"  went on from step {killed.began()} to the end")
        found: dict[str, Any] = {"kills": kills}
        found["same"] = _same_layout(expected, killed.course(), new, processes, say)
        other = other_number(config, processes)
        if other is None:
            say("  another number of processes: this config, batch or machine allows none")
        else:
            from_step = EVERY * chance.randrange(1, STEPS // EVERY)
            moved = new("moved")
            checkpoint = whole.output / FOLDER / f"step-{from_step}"
            moved.start(other, f"checkpoint.resume={checkpoint}")
            moved.finish()
            found["other"] = _other_layout(expected, moved, other, from_step, whole.output, say)
    finally:
        for run in runs:
            run.end()
    say("verify resume: ok")
    return found


def _disturb(
    run: Run, processes: int, chance: random.Random, say: Callable[[str], Any], *, saving: bool
) -> dict[str, Any]:
    """Start or go on, kill at a random moment before the last step, and tell where that was."""
    before = run.steps()
    for _ in range(TRIES):
        found = _kill(run, processes, chance, saving=saving)
        if found["step"] < STEPS:
            where = "while it saved" if found["saving"] else "between two saves"
            went = f", after it had gone on from step {found['began']}" if before else ""
            say(f"  killed {found.pop('who')} {where}, after step {found['step']}{went}")
            return found
        run.take_back(before)
    raise Failed(
        "verify resume: killing the run",
        f"{TRIES} times it was over before it could be killed",
        "its steps are too short on this machine; a larger train.batch makes them longer",
    )


def _kill(run: Run, processes: int, chance: random.Random, *, saving: bool) -> dict[str, Any]:
    """Start or go on and kill at a random moment, if the run is not over then."""
    begin = time.monotonic()
    run.start(processes, "checkpoint.resume=auto")
    started, wanted = None, 1 + chance.randrange(STEPS // 2 - 1) if not saving else STEPS // 2
    while run.running and run.steps() < wanted:
        time.sleep(POLL)
    if saving:
        while run.running and not run.saving():
            time.sleep(POLL / 3)
        time.sleep(chance.random() * 3 * POLL)
    else:
        started = time.monotonic() - begin
        time.sleep(chance.random() * started / 20)  # somewhere in a step, mostly
    if not run.running:
        run.finish()
        return {"step": STEPS}
    caught = run.saving()
    who, reached = run.kill(chance), run.steps()
    return {"step": reached, "saving": caught, "began": run.began(), "who": who}


def _same_layout(
    expected: Course,
    found: Course,
    new: Callable[[str], Run],
    processes: int,
    say: Callable[[str], Any],
) -> dict[str, Any]:
    weights, steps, loss = found.apart(expected)
    what = f"{len(expected.weights)} tensors and the losses of {len(expected.steps)} steps"
    if not weights and not steps:
        say(f"  same layout: {what} are the same, bit for bit")
        return {"bits": True, "loss": loss}
    again = new("again")  # is it the resume, or is the run another one each time?
    again.start(processes)
    again.finish()
    own_weights, own_steps, own = again.course().apart(expected)
    if not own_weights and not own_steps:
        raise Failed(
            "verify resume in the same layout",
            f"{weights} of {len(expected.weights)} tensors and {steps} of {len(expected.steps)} steps differ from "
            f"the run that was not killed (losses by {loss:.2g}), while two undisturbed runs are the same",
            "do not rely on resuming; report this with the config",
        )
    if loss > max(3 * own, 1e-12):
        raise Failed(
            "verify resume in the same layout",
            f"losses differ by {loss:.2g}, and those of two undisturbed runs by {own:.2g}",
            "do not rely on resuming; report this with the config",
        )
    say(
        f"  same layout: losses differ by {loss:.2g}; two undisturbed runs differ by {own:.2g} themselves "
        "(kernels of this device are not deterministic)"
    )
    return {"bits": False, "loss": loss, "own": own}


def _other_layout(
    expected: Course, moved: Run, processes: int, step: int, output: Path, say: Callable[[str], Any]
) -> dict[str, Any]:
    course = moved.course()
    later = {n for n in expected.steps if n > step}
    if not later <= course.steps.keys():
        raise Failed("verify resume in another layout", "steps are missing", "report this")
    apart = Course({n: course.steps[n] for n in later}, {}).losses_apart(expected)
    dtype = json.loads((output / "report.json").read_text("utf-8")).get("dtype", "float32")
    limit = ROUNDING.get(dtype, ROUNDING["bfloat16"])
    layout = f"{processes} processes" if processes > 1 else "one process"
    if not apart <= limit:
        raise Failed(
            f"verify resume in {layout}",
            f"the {len(later)} losses after step {step} differ by {apart:.2g} from the run that was not killed "
            f"(rounding in {dtype}: {limit:g})",
            "do not change the number of processes of such a run; report this with the config",
        )
    say(
        f"  other layout, {layout} from step {step}: {len(later)} losses differ by {apart:.2g} at most "
        f"({dtype}, allowed {limit:g})"
    )
    return {"processes": processes, "loss": apart}


def other_number(config: RunConfig, processes: int) -> int | None:
    """Another number of processes that config and machine allow: fewer, or two in place of one."""
    if processes > 1:
        return fewer(config, processes)
    if resolve_device(config.model.device).type == "cuda" and torch.cuda.device_count() < 2:
        return None
    with contextlib.suppress(Refused):
        check_processes(config, 2)
        return 2
    return None


@contextmanager
def room(parent: Path) -> Iterator[Path]:
    """A folder in `parent` that is gone afterwards, also after SIGTERM."""

    def leave(number: int, frame: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, leave)
    folder = Path(tempfile.mkdtemp(prefix=".luthier-verify-", dir=parent))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        signal.signal(signal.SIGTERM, before)


def _children(pid: int) -> Sequence[int]:
    """The processes that a process has started."""
    table = subprocess.run(
        ["ps", "-A", "-o", "pid=,ppid=,args="], capture_output=True, text=True, check=True
    )
    rows = [line.split(None, 2) for line in table.stdout.splitlines()]
    return sorted(int(r[0]) for r in rows if len(r) > 2 and r[1] == str(pid) and "luthier" in r[2])
