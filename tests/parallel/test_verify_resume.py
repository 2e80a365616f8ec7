"""`verify resume` finds nothing in a resume that is right, and the faults that are put into one."""

from __future__ import annotations

import os
import random
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from killed_ranks import _context, rank_child
from tiny_runs import resolved, tiny_config, write_data

from luthier.errors import Failed
from luthier.recipes import finetune
from luthier.verify import CHECKS
from luthier.verify.resume import Run, _disturb, compare_runs, shortened

SECONDS = 0.05  # of a step: long enough to be met in the middle by a machine that is busy


def forget_moments(patch: pytest.MonkeyPatch) -> None:
    import luthier.train.step as step

    load = step.load_optimizer_tensors

    def zeros(optimizer: Any, named: Any, moments: dict[str, Any]) -> None:
        load(optimizer, named, {n: t.zero_() if t.ndim else t for n, t in moments.items()})

    patch.setattr(step, "load_optimizer_tensors", zeros)


def skip_a_batch(patch: pytest.MonkeyPatch) -> None:
    from luthier.data.loader import Loader

    load = Loader.load_state

    def further(self: Loader, state: dict[str, Any]) -> None:
        load(self, state)
        steps = self.step_batches()
        next(steps)
        steps.close()  # pyright: ignore[reportAttributeAccessIssue]

    patch.setattr(Loader, "load_state", further)


FAULTS: dict[str, Callable[[pytest.MonkeyPatch], None]] = {
    "none": lambda patch: None,
    "moments": forget_moments,
    "data": skip_a_batch,
}


def faulty_child(fault: str, words: list[str], log: str) -> None:
    """The command line with a fault in it, and with steps of some length."""
    from luthier.train.step import Updater

    patch, update = pytest.MonkeyPatch(), Updater.update

    def slow(*args: Any, **options: Any) -> Any:
        time.sleep(SECONDS)
        return update(*args, **options)

    patch.setattr(Updater, "update", slow)
    FAULTS[fault](patch)
    rank_child(words, {}, log)


class Forked:
    """A process of multiprocessing with what `Run` asks of one."""

    def __init__(self, *args: Any) -> None:
        self.process = _context.Process(target=faulty_child, args=args)
        self.process.start()
        self.pid = self.process.pid

    def poll(self) -> int | None:
        return self.process.exitcode

    def wait(self) -> int | None:
        self.process.join()
        return self.process.exitcode


@pytest.mark.parametrize("fault", ["none", "moments", pytest.param("data", marks=pytest.mark.long)])
def test_a_resume_is_the_run_that_was_never_killed(
    fault: str,
    tmp_path: Path,
    model_folder: Callable[[str], Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def start(self: Run, processes: int, *words: str) -> None:
        line = ["finetune", str(self.file), f"output={self.output}", *words]
        self.process = Forked(fault, line, str(self.log))  # pyright: ignore[reportAttributeAccessIssue]

    monkeypatch.setattr(Run, "start", start)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, sys.path)))
    data = write_data(tmp_path / "data", train=20, dev=4)
    # a batch of three goes into no other number of processes
    tree = tiny_config(model_folder("llama"), data, tmp_path / "out", train__batch=3)
    config, told = shortened(resolved(tree).config), list[str]()
    if fault == "none":
        found = compare_runs(config, tmp_path, 1, random.Random(5), told.append)
        assert found["same"]["bits"] and told[-1] == "verify resume: ok"
        assert [k["step"] >= 1 for k in found["kills"]] == [True, True]
        return
    with pytest.raises(Failed, match=r"of 8 steps differ from the run that was not killed"):
        compare_runs(config, tmp_path, 1, random.Random(5), told.append)


class Quick:
    """A run of which the first `over` starts are over at once."""

    def __init__(self, over: int) -> None:
        self.over, self.starts, self.taken_back = over, 0, []

    def start(self, *_: Any) -> None:
        self.starts += 1

    @property
    def running(self) -> bool:
        return self.starts > self.over

    def steps(self) -> int:
        return 3 if self.starts else 2

    def began(self) -> int:
        return 2

    def saving(self) -> bool:
        return False

    def finish(self) -> None:
        pass

    def kill(self, chance: random.Random) -> str:
        return "the process"

    def take_back(self, step: int) -> None:
        self.taken_back.append(step)


def test_a_run_that_was_over_too_soon_is_taken_back_and_killed_again() -> None:
    run, told = Quick(2), list[str]()
    found = _disturb(run, 1, random.Random(1), told.append, saving=False)  # pyright: ignore[reportArgumentType]
    assert found == {"step": 3, "saving": False, "began": 2}
    assert run.starts == 3 and run.taken_back == [2, 2]
    assert told == [
        "  killed the process between two saves, after step 3, after it had gone on from step 2"
    ]
    with pytest.raises(Failed, match=r"5 times it was over .* a larger train.batch"):
        _disturb(Quick(9), 1, random.Random(1), told.append, saving=False)  # pyright: ignore[reportArgumentType]


def test_a_finished_run_that_is_taken_back_goes_on_from_there(
    tmp_path: Path, model_folder: Callable[[str], Path]
) -> None:
    data = write_data(tmp_path / "data", train=20, dev=4)
    keys = {"train__steps": 4, "checkpoint__every": 2, "evaluate__every": "never"}
    tree = tiny_config(model_folder("llama"), data, tmp_path / "out", **keys)
    finetune(tree)
    run = Run(tmp_path / "run.yaml", tmp_path / "out", tmp_path / "log.txt")
    whole = run.course()
    for last, begins in ((3, 2), (0, 0)):
        run.take_back(last)
        assert run.steps() == last  # what is waited for is a step of the next start
        finetune(tree, ["checkpoint.resume=auto"])
        assert run.began() == begins and run.course().apart(whole)[:2] == (0, 0)


@pytest.mark.long
@pytest.mark.parametrize("processes", [1, 2])
def test_as_a_user_does_it(
    processes: int, tmp_path: Path, model_folder: Callable[[str], Path]
) -> None:
    # steps long enough to be met in the middle by a machine that is busy
    data = write_data(tmp_path / "data", train=120, dev=4)
    batch = {"train__batch": 24, "train__micro_batch": 1}
    folder = model_folder("llama")
    tree = tiny_config(folder, data, tmp_path / "out", adapter__method="none", **batch)
    del tree["adapter"]["rank"]
    before = sorted(tmp_path.rglob("*"))
    found = CHECKS["resume"](resolved(tree), processes=processes)
    assert found["same"]["bits"] and found["other"]["processes"] == 3 - processes
    assert found["other"]["loss"] < 1e-5
    assert sorted(tmp_path.rglob("*")) == before
