"""Checkpoints of a run: `output/checkpoints/step-N/`, each whole or not there at all.

A checkpoint holds the model as others read it, the tensors that continue training (`state.py`) and all the rest
(`training_state.json`). It is written by `saving.py`; a reader believes only a manifest whose sizes and hashes
hold. What the state means is the trainer's affair; where a run may go on, and with which config, is decided here.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import luthier
from luthier.errors import LuthierError, Refused
from luthier.files import MANIFEST, PARTIAL, damage
from luthier.parallel.world import World
from luthier.train.saving import ModelCopy, Saver
from luthier.train.state import PREFIX, Stored

FOLDER = "checkpoints"
STATE = f"{PREFIX}.json"
FORMAT = 2
# any of these means that a folder is somebody's run or model, not a place for a new run
RUN_TRACES = ("config.yaml", "metrics.jsonl", FOLDER)
TRACES = (*RUN_TRACES, "config.json", "adapter_config.json", "model.safetensors")


@dataclass(frozen=True)
class Found:
    """Where a run starts: a whole checkpoint, or None for a fresh start; and what the user should know."""

    path: Path | None = None
    remarks: tuple[str, ...] = ()


@dataclass(frozen=True)
class Saved:
    """A checkpoint that was read: `state` as it was handed to `save`, and the run's `identity`."""

    path: Path
    step: int
    state: dict[str, Any]
    identity: dict[str, Any]

    def tensors(self) -> Stored:
        """The tensors that were handed to `save`, each read when it is asked for."""
        return Stored(self.path)


def step_of(path: Path) -> int | None:
    """N of a folder named `step-N`, else None."""
    match = re.fullmatch(r"step-(\d+)", path.name)
    return int(match[1]) if match else None


def steps_in(output: Path) -> list[tuple[int, Path]]:
    """All checkpoint folders of a run by name, oldest first; whether they are whole is not asked."""
    folder = output / FOLDER
    found = [(step_of(p), p) for p in folder.iterdir() if p.is_dir()] if folder.is_dir() else []
    return sorted((step, path) for step, path in found if step is not None)


def find(output: Path, resume: str) -> Found:
    """Where to start. `resume`: `never`, `auto` (newest whole checkpoint, or fresh), or a checkpoint folder.

    Reads and hashes, writes nothing. Torn checkpoints are passed over by `auto` and named in the remarks.
    Raises Refused: `never` into another run's or a model's folder; a path that is no whole checkpoint; a
    path outside `output` while `output` has checkpoints of its own.
    """
    if output.exists() and not output.is_dir():
        raise Refused(f"output={output}", "it is a file", "name a folder")
    if resume == "never":
        _refuse_traces(output)
        return Found()
    if resume != "auto":
        return _named(output, Path(resume))
    if not any((output / name).exists() for name in RUN_TRACES):
        _refuse_traces(output)  # a model that is not the result of a run
    remarks = []
    for _, path in reversed(steps_in(output)):
        reason = damage(path)
        if reason is None:
            return Found(path, (*remarks, f"going on from {path}"))
        remarks.append(f"{path} is not whole ({reason}): passed over")
    return Found(None, (*remarks, f"no whole checkpoint in {output}: starting from the beginning"))


def _refuse_traces(output: Path) -> None:
    traces = [name for name in TRACES if (output / name).exists()]
    if not traces:
        return
    run = any(name in traces for name in RUN_TRACES)
    raise Refused(
        f"a new run in {output}",
        f"it holds another {'run' if run else 'model'} ({', '.join(traces)})",
        "name another output"
        + (", or give checkpoint.resume=auto to go on with that run" if run else ""),
    )


def _named(output: Path, path: Path) -> Found:
    asked = f"checkpoint.resume={path}"
    if not path.is_dir():
        raise Refused(
            asked, "there is no such folder", "name a folder checkpoints/step-N, or `auto`"
        )
    if not (path / STATE).is_file():
        inside = steps_in(path) or steps_in(path.parent)
        do = f"name {inside[-1][1]}" if inside else "name a folder checkpoints/step-N"
        raise Refused(asked, f"it is no checkpoint: {STATE} is missing", do)
    reason = damage(path)
    if reason is not None:
        raise Refused(
            asked,
            f"the checkpoint is not whole: {reason}",
            "name another one, or give checkpoint.resume=auto for the newest whole one",
        )
    own = steps_in(output)
    if own and path.resolve().parent != (output / FOLDER).resolve():
        raise Refused(
            f"{asked} with output={output}",
            f"that folder has checkpoints of another run ({own[-1][1].name})",
            "name a new output, or one of its own checkpoints",
        )
    return Found(path, (f"going on from {path}",))


def read(path: Path) -> Saved:
    """Read a whole checkpoint, but not its tensors yet. Raises Refused for one of another format."""
    record = json.loads((path / STATE).read_text("utf-8"))
    made = record.get("format")
    if made != FORMAT:
        newer = isinstance(made, int) and made > FORMAT
        raise Refused(
            f"going on from {path}",
            f"its format is {made}, written by Luthier {record.get('luthier')}; "
            f"this is Luthier {luthier.__version__}, which reads format {FORMAT}",
            (
                "use that version of Luthier, or a newer one"
                if newer
                else "use that version of Luthier"
            )
            + f"; its model alone can be taken out: luthier convert {path} FOLDER",
        )
    return Saved(path, record["step"], record["state"], record["identity"])


def check_identity(saved: Mapping[str, Any], current: Mapping[str, Any]) -> None:
    """Refuse to go on with a config that would make another run of it (rule 2 of the contract).

    Both map config keys to JSON values; whatever is in them may not differ. Raises Refused with the keys.
    """
    now = json.loads(json.dumps(dict(current)))  # tuples become lists, as in the file
    missing = object()
    changed = [
        key
        for key in [*saved, *(k for k in now if k not in saved)]
        if saved.get(key, missing) != now.get(key, missing)
    ]
    if changed:
        lines = [f"{k} was {_show(saved, k)}, now {_show(now, k)}" for k in changed]
        raise Refused(
            "going on with a changed config",
            "; ".join(lines),
            "take the old values back, or start a new run in another output",
        )


def _show(values: Mapping[str, Any], key: str) -> str:
    return json.dumps(values[key], ensure_ascii=False) if key in values else "not there"


class Checkpoints:
    """The checkpoints of one run in `output`: writes them and keeps the newest `keep` and the best."""

    def __init__(
        self,
        output: Path,
        *,
        keep: int,
        identity: Mapping[str, Any],
        world: World | None = None,
        background: bool = True,
    ) -> None:
        """`identity`: what may not differ on resume (see `check_identity`). Writes nothing yet."""
        self.output, self.keep, self.identity = output, keep, dict(identity)
        self.saver = Saver(world, background=background)
        self._written: set[int] = set()
        self._told: dict[int, dict[str, Any]] = {}  # of steps that are being saved

    def start(self, path: Path | None) -> Saved | None:
        """Begin at checkpoint `path` (None: afresh): compare identities, remove leftovers of a crash.

        Raises Refused before anything is removed.
        """
        saved = None if path is None else read(path)
        if saved is not None:
            check_identity(saved.identity, self.identity)
        for folder in (self.output, self.output / FOLDER):
            for leftover in folder.glob(f"{PARTIAL}*"):
                if leftover.is_dir():
                    shutil.rmtree(leftover)
                else:
                    leftover.unlink()
        return saved

    def path(self, step: int) -> Path:
        return self.output / FOLDER / f"step-{step}"

    def save(
        self,
        step: int,
        copy_model: Callable[[], ModelCopy],
        tensors: Mapping[str, Tensor],
        state: Mapping[str, Any],
        best: int | None = None,
        told: Mapping[str, Any] | None = None,
    ) -> Path:
        """Begin to write `step-N`; when it is whole, what is no longer kept is removed. `best`: step never removed.

        `told` comes back from `finished`. `state` must be JSON without NaN; the live `tensors` are checked by the caller (`non_finite`). Writing that
        fails (disk full, read-only) is told by `saver`, and the older checkpoints are as they were.
        """
        record = {
            "format": FORMAT,
            "luthier": luthier.__version__,
            "torch": torch.__version__,
            "step": step,
            "identity": self.identity,
            "state": dict(state),
        }
        folder = self.path(step)

        def settle() -> None:
            self._written.add(step)
            try:
                self._retain(step, best)
            except OSError as error:  # the new one is whole: an old one too many is no failure
                self._told[step]["not_removed"] = f"{error.filename}: {error.strerror}"

        self._told[step] = dict(told or {})
        self.saver.begin(folder, step, copy_model, tensors, {STATE: record}, settle)
        return folder

    def finished(self) -> list[tuple[int, dict[str, Any]]]:
        """Steps whose checkpoints became whole since this was asked, with what is recorded of them."""
        return [
            (
                written.step,
                {
                    "path": str(written.path),
                    **self._told.pop(written.step, {}),
                    "blocked_seconds": written.blocked,
                    "seconds": written.seconds,
                    "bytes": written.num_bytes,
                },
            )
            for written in self.saver.finished()
        ]

    def _retain(self, step: int, best: int | None) -> None:
        """Remove all but the newest `keep` and the best.

        Newer steps that another process wrote, before this one went on from an older step, belong to a
        course that was given up: they go too.
        """
        found = steps_in(self.output)
        current = [(n, p) for n, p in found if n <= step]
        stale = [(n, p) for n, p in found if n > step and n not in self._written]
        for number, path in [*current[: -self.keep], *stale]:
            if number != best:
                # first the manifest: from then on a crash leaves what nobody takes for whole
                (path / MANIFEST).unlink(missing_ok=True)
                shutil.rmtree(path)

    def has(self, step: int) -> bool:
        """Whether the checkpoint of `step` is there; it gets its manifest and its name last."""
        return (self.path(step) / MANIFEST).is_file()

    def newest(self) -> str:
        """Where a run can go on, for a message: the newest checkpoint's path, or `the beginning`. A save that was
        begun is finished first."""
        with suppress(LuthierError):
            self.saver.wait()
        found = [path for _, path in steps_in(self.output) if (path / MANIFEST).is_file()]
        return str(found[-1]) if found else "the beginning"


def non_finite(tensors: Mapping[str, Tensor], most: int = 5) -> list[str]:
    """Names of tensors that hold NaN or infinity, at most `most`."""
    bad = []
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
            bad.append(name)
            if len(bad) == most:
                break
    return bad
