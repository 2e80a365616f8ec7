"""How a run ends before its time, and what of it is kept.

`try_save` lets a run go on without a checkpoint that could not be written; `keep_last_step` saves the last
finished step of a run that fails, where its state is whole. Which checkpoint an interrupted job would go on
from is asked by the launcher (`newest_in`, `check_restarts`).
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from luthier.errors import Failed, LostPeer, NotFinite, Refused, Unwritten
from luthier.files import MANIFEST
from luthier.parallel.restarts import Restart
from luthier.parallel.world import World, lost_peer
from luthier.train.checkpoint import steps_in
from luthier.train.plan import Every

PAUSES = (5.0, 20.0, 60.0)  # seconds before the last save of a run is tried again


def try_save(
    save: Callable[[], object], tell: Callable[[str], object], *, last: bool, stop: bool
) -> bool:
    """Whether `save` could write. What it could not is told, and the run goes on; with `stop` it fails.

    The `last` save of a run is tried again a few times, then it fails.
    """
    for pause in (*PAUSES, None):
        try:
            save()
            return True
        except Unwritten as error:
            if stop or (last and pause is None):
                raise
            if not last or pause is None:
                tell(
                    f"NOT SAVED: {error.asked}: {error.found}. The run goes on; "
                    "an end before the next checkpoint loses the steps since the last one"
                )
                return False
            tell(f"{error.asked}: {error.found}. The last save is tried again in {pause:g} s")
            time.sleep(pause)
    return False


def standing(
    best: dict[str, Any] | None, metric: str, *, same: bool, damage: Callable[[int], str | None]
) -> tuple[dict[str, Any] | None, list[str]]:
    """What a resumed run takes as the best so far, and what the user should know; None: it is sought from here on.

    `same`: the evaluation data is that of the run so far. `damage(step)` tells what is wrong with a checkpoint.
    """
    if best is None or (same and best["metric"] != metric):
        return None, []  # another metric was asked for
    if not same:
        why = f"the best so far, step-{best['step']}, was measured on other evaluation data"
    elif damage(best["step"]) is not None:
        why = f"the best checkpoint so far, step-{best['step']}, is not there any more"
    else:
        return best, []
    return None, [f"{why}: the best is sought from here on"]


def failure(error: Exception, done: int, newest: str) -> Failed:
    """An unexpected error as a message; `newest` is where the run can go on."""
    text, kind = f"{type(error).__name__}: {error}", Failed
    if lost_peer(error):
        text = f"another process of the run is gone ({str(error).splitlines()[0][:160]})"
        kind = LostPeer
    do = f"what was saved is untouched: go on from {newest}"
    if out_of_memory(error):
        do += ", with a smaller train.micro_batch or train.recompute=layer"
    return kind(f"training, after step {done}", text, do)


def out_of_memory(error: BaseException) -> bool:
    """Whether the memory of the device or of the process did not suffice."""
    known = isinstance(error, (torch.OutOfMemoryError, MemoryError))
    return known or "can't allocate memory" in str(error)


def keep_last_step(
    error: Failed, save: Callable[[World], object], world: World, *, step: int, whole: bool
) -> None:
    """Save the last finished `step`, which no checkpoint holds, where that can be; says in `error` what is kept.

    `whole`: no weight is half updated. `save(world)` saves as one of the processes of that world: the run's
    own, when all of them have this error, else one on its own that has the whole state.
    """
    if isinstance(error, Unwritten):
        return
    what = f"the last finished step, {step},"
    if not whole:
        error.add(f"{what} is not kept: its weights are half updated")
        return
    if world.size > 1 and not isinstance(error, NotFinite):
        if world.data_size < world.size or world.sharded:
            error.add(f"{what} is not kept: each process holds a part of it")
            return
        if not world.first("last words"):
            return  # another copy saves it
        world = World()
    try:
        error.add(f"{what} was saved as {save(world)}: go on with checkpoint.resume=auto")
    except Exception as other:  # what ended the run is what must be heard
        error.add(f"{what} could not be saved ({type(other).__name__}: {other})")


def recovery(restart: Restart, step: int, reached: int, processes: int) -> dict[str, Any]:
    """What a restart came to, at its first finished step; `reached` is how far the run was before."""
    return {
        "attempt": restart.attempt,
        "reason": restart.reason,
        "recovery_seconds": None if restart.at is None else max(0.0, time.time() - restart.at),
        "repeated_steps": max(0, reached - step + 1),
        "processes": processes,
        "processes_before": restart.before,
    }


def newest_in(output: str | Path) -> str | None:
    """The newest checkpoint of a run that has a manifest, without looking into its files."""
    found = [path for _, path in steps_in(Path(output)) if (path / MANIFEST).is_file()]
    return str(found[-1]) if found else None


def check_restarts(every: Every, restarts: int) -> None:
    """Refuse restarts of a run that leaves nothing to go on from."""
    if every in ("never", "end"):
        raise Refused(
            f"--max-restarts {restarts} with checkpoint.every={every}",
            "there would be no checkpoint to go on from: each restart would begin from the beginning",
            "give checkpoint.every=100, say, or leave --max-restarts out",
        )
