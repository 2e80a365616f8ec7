"""What the launcher of `--nproc` and its processes tell each other, and what it does when one of them ends.

The launcher hands down `Restart` in one environment variable; a process that ends with an error leaves a `Note`
in a folder that both know. `after` decides from exit codes and notes whether the run is started again, and in
how many processes. Pure but for the notes; starting is `launch.py`'s.
"""

from __future__ import annotations

import contextlib
import json
import signal
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

VARIABLE = "LUTHIER_RESTART"
PAUSES = (
    0.0,
    2.0,
    5.0,
    15.0,
    30.0,
    60.0,
)  # seconds before the n-th restart without a new checkpoint
STOPS = (128 + signal.SIGINT, 128 + signal.SIGTERM)
REFUSED = 2


@dataclass(frozen=True)
class Restart:
    """The how-manieth start of the run this is (0: the first), why and since when; `notes`: where to leave one."""

    attempt: int = 0
    reason: str = ""
    at: float | None = None  # when the failure was seen, in seconds since the epoch; None: not told
    before: int = 0  # processes then
    notes: str = ""

    @classmethod
    def from_text(cls, text: str | None) -> Restart | None:
        return cls(**json.loads(text)) if text else None

    @property
    def text(self) -> str:
        return json.dumps(asdict(self))


@dataclass(frozen=True)
class Note:
    """What a process ended with. `lost`: only because another one is gone; `final`: a restart would not help."""

    text: str
    lost: bool = False
    final: bool = False


def leave_note(restart: Restart, rank: int, note: Note) -> None:
    """Leave the first word of `rank`, if it can be written."""
    if not restart.notes:
        return
    with contextlib.suppress(OSError):
        path = Path(restart.notes) / f"rank-{rank}.json"
        if not path.exists():
            path.write_text(json.dumps(asdict(note)), "utf-8")


def leave_record(path: str, text: str) -> None:
    """Leave for torchrun what a process ends with, in the form of its `record`: it shows that last of all."""
    more = {"py_callstack": text, "timestamp": str(int(time.time()))}
    with contextlib.suppress(OSError):
        Path(path).write_text(
            json.dumps({"message": {"message": text, "extraInfo": more}}), "utf-8"
        )


def read_notes(folder: Path) -> dict[int, Note]:
    """The notes of all ranks; half-written ones are passed over."""
    found = {}
    for path in folder.glob("rank-*.json"):
        with contextlib.suppress(ValueError, OSError, TypeError):
            found[int(path.stem[5:])] = Note(**json.loads(path.read_text("utf-8")))
    return found


@dataclass(frozen=True)
class Ended:
    """How an attempt of `processes` ended: exit codes by rank (negative: by that signal) and their notes."""

    processes: int
    codes: Mapping[int, int]
    notes: Mapping[int, Note]
    at: float
    newest: object = None  # the newest checkpoint then

    @property
    def killed(self) -> list[int]:
        """Ranks that were ended from outside; SIGTERM is how the launcher ends the others."""
        return sorted(r for r, code in self.codes.items() if code < 0 and code != -signal.SIGTERM)

    @property
    def culprits(self) -> list[int]:
        """Ranks that failed by themselves; the others only followed."""
        if self.killed:
            told = [r for r, note in self.notes.items() if not note.lost]
            return self.killed if not told else sorted(set(told))
        failed = [r for r, code in self.codes.items() if code > 0 and code not in STOPS]
        own = [r for r in failed if r in self.notes and not self.notes[r].lost]
        return sorted(own or failed)

    @property
    def stopped(self) -> bool:
        """Whether all ended by a signal that asked for it."""
        return all(c in (0, *STOPS) or c == -signal.SIGTERM for c in self.codes.values())

    @property
    def reason(self) -> str:
        """Why, in words."""
        rank = self.culprits[0] if self.culprits else 0
        if rank in self.notes:
            return f"rank {rank}: {self.notes[rank].text}"
        code = self.codes.get(rank, 1)
        if code < 0:
            name = signal.Signals(-code).name
            return f"rank {rank} was ended by {name}" + (
                " (often: out of memory)" if name == "SIGKILL" else ""
            )
        return f"rank {rank} ended with exit code {code}"


@dataclass(frozen=True)
class Again:
    """The next start: in how many processes, and after which pause in seconds."""

    processes: int
    pause: float = 0.0
    why: str = ""  # in another number of processes


def after(history: list[Ended], fewer: Callable[[int], int | None]) -> Again | None:
    """What to do after the last attempt of `history`; None: leave it at that.

    As many processes start again, on what is left or has returned. A rank that fails twice with no checkpoint
    made in between does not return: the run goes on in `fewer(processes)` where the config allows that.
    """
    last = history[-1]
    if last.stopped or REFUSED in last.codes.values() or any(n.final for n in last.notes.values()):
        return None
    stuck = 0  # attempts before the last one that left no newer checkpoint
    for earlier, later in zip(history[-2::-1], history[:0:-1], strict=True):
        if earlier.newest != later.newest:
            break
        stuck += 1
    pause = PAUSES[min(stuck, len(PAUSES) - 1)]
    twice = stuck and set(history[-2].culprits) & set(last.culprits)
    number = fewer(last.processes) if twice and history[-2].processes == last.processes else None
    if number is None:
        return Again(last.processes, pause)
    rank = min(set(history[-2].culprits) & set(last.culprits))
    return Again(number, pause, f"rank {rank} failed twice with no new checkpoint in between")
