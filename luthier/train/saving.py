"""Saving behind the training's back, over all ranks: the step waits only for the copy to the host.

Each rank copies the pieces that it writes; a thread then writes them, then this rank's share of the model's own files
(made of the pieces of all ranks, read back one tensor at a time, so that nobody holds a model whole), and at
last rank 0 the manifest with every file's hash, and the folder gets its name. An error on one rank is every rank's, and
leaves what was there before. What is in a checkpoint, and which are kept, is `checkpoint.py`'s.
"""

from __future__ import annotations

import contextlib
import shutil
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from luthier.errors import Failed, LostPeer, LuthierError
from luthier.files import Entry, begin, failed, finish, flushed, partial_of, write_json
from luthier.parallel.pieces import Piece, Pieces, Shares, pieces_of
from luthier.parallel.world import World, lost_peer
from luthier.train.state import PREFIX, Stored, write_index, write_pieces


class ModelCopy(Protocol):
    """A model on its way to disk, as others read it; nothing in it changes with the training."""

    def write(self, folder: Path, weights: Stored, rank: int, ranks: int) -> dict[str, Any]:
        """Write this rank's share of the files; `weights` has the trained tensors under `weights/`. What
        `complete` needs to know of it, as JSON: `files`, the manifest's entries of what was written."""
        ...

    def complete(self, folder: Path, parts: list[dict[str, Any]]) -> None:
        """On rank 0, when all have written: the rest of the files. `parts`: what `write` gave, by rank."""
        ...


@dataclass
class Written:
    """A folder that was saved; seconds the training waited, and until the folder had its name; its bytes."""

    path: Path
    step: int
    blocked: float
    seconds: float = 0.0
    num_bytes: int = 0


@dataclass
class _Save:
    folder: Path
    copy: ModelCopy
    pieces: dict[str, Pieces]
    records: Mapping[str, Any] | None
    after: Callable[[], None]
    written: Written
    start: float
    error: Exception | None = None
    thread: threading.Thread | None = field(default=None, repr=False)

    @property
    def ended(self) -> bool:
        return self.thread is not None and not self.thread.is_alive()


class Saver:
    """Saves folders, one after the other; all ranks begin and wait together."""

    def __init__(
        self, world: World | None = None, *, background: bool = True, by: str = ""
    ) -> None:
        """`background`: write a copy while the training goes on; else `begin` returns when all is on disk. `by`: a word in
        temporary names, for a process that may save what another one is still saving."""
        self.world = world or World()
        self.background, self.by = background, by
        self._aside = self.world.aside()
        self._shares = Shares(self.world)
        self._now: _Save | None = None
        self._done: list[Written] = []
        self.copied = 0  # bytes of this rank's largest copy so far

    def begin(
        self,
        folder: Path,
        step: int,
        copy: Callable[[], ModelCopy],
        tensors: Mapping[str, Tensor],
        records: Mapping[str, Any] | None,
        after: Callable[[], None] = lambda: None,
    ) -> None:
        """Save `folder`: the model, the live `tensors` and `records` (file name -> JSON).

        Without records only the model is kept. `after` is done on rank 0 when the folder is there. Waits for the
        save before this one, and raises its error.
        """
        start = time.perf_counter()
        self.wait()
        made = copy()
        pieces = self.copy(tensors)
        written = Written(folder, step, time.perf_counter() - start)
        save = self._now = _Save(folder, made, pieces, records, after, written, start)
        if self.background:
            save.thread = threading.Thread(target=self._run, args=(save,), daemon=True)
            save.thread.start()
            return
        self._run(save)
        written.blocked = time.perf_counter() - start
        self.wait()

    def copy(self, tensors: Mapping[str, Tensor]) -> dict[str, Pieces]:
        """What this rank writes of live tensors: a copy, unless nothing changes before all is written. All must ask."""
        pieces = self._shares.of({name: pieces_of(t) for name, t in tensors.items()})
        if self.background:
            pieces = _copied(pieces)
            self.copied = max(self.copied, num_bytes(pieces))
        return pieces

    @property
    def failed(self) -> bool:
        """Whether the save under way has failed on this rank."""
        return self._now is not None and self._now.error is not None

    def finished(self) -> list[Written]:
        """What was saved since this was asked for; never waits."""
        save = self._now
        if save is not None and save.ended and save.error is None:
            self._now = None
            self._done.append(save.written)
        done, self._done = self._done, []
        return done

    def wait(self) -> None:
        """Wait for the save under way. Raises Failed if it failed, on every rank."""
        save = self._now
        if save is None:
            return
        if save.thread is not None:
            save.thread.join()
        self._now = None
        if save.error is not None:
            raise save.error
        self._done.append(save.written)

    def _run(self, save: _Save) -> None:
        try:
            self._write(save)
            save.written.seconds = time.perf_counter() - save.start
        except Exception as error:
            with contextlib.suppress(OSError):
                if self.world.is_main:
                    shutil.rmtree(partial_of(save.folder, self.by))
            save.error = _told(save.folder, error)
        finally:
            save.pieces = {}

    def _write(self, save: _Save) -> None:
        world = self._aside
        folder, partial = save.folder, partial_of(save.folder, self.by)
        world.lead(lambda: _told_of(folder, lambda: str(begin(folder, self.by))))

        def state() -> tuple[dict[str, Entry], dict[str, Any]]:
            return _told_of(folder, lambda: write_pieces(partial, world.rank, save.pieces))

        parts = world.together(state)
        save.pieces = {}  # the copy on the host is not needed any more
        entries = {name: entry for files, _ in parts for name, entry in files.items()}
        entries |= world.lead(
            lambda: _told_of(folder, lambda: write_index(partial, [index for _, index in parts]))
        )

        def model() -> dict[str, Any]:
            stored = Stored(partial)
            return _told_of(
                folder, lambda: save.copy.write(partial, stored, world.rank, world.size)
            )

        made = world.together(model)
        entries |= {name: entry for part in made for name, entry in part["files"].items()}

        def publish() -> int:
            save.copy.complete(partial, made)
            for name, record in (save.records or {}).items():
                write_json(partial / name, record)
            if save.records is None:
                for path in partial.glob(f"{PREFIX}*"):
                    path.unlink()
                    entries.pop(path.name, None)
            for path in sorted(p for p in partial.rglob("*") if p.is_file()):
                name = str(path.relative_to(partial))
                if name not in entries:
                    entries[name] = flushed(path)
            finish(folder, None if save.records is None else entries, self.by)
            save.after()
            return sum(entry["size"] for entry in entries.values())

        save.written.num_bytes = world.lead(lambda: _told_of(folder, publish))


def num_bytes(state: Mapping[str, Pieces]) -> int:
    return sum(part.values.nbytes for pieces in state.values() for part in pieces.parts)


def _copied(state: Mapping[str, Pieces]) -> dict[str, Pieces]:
    """Copies of a rank's pieces on the host; on a GPU all at once into pinned memory."""
    cuda = False
    out = {}
    for name, pieces in state.items():
        parts = []
        for part in pieces.parts:
            on_cuda = part.values.is_cuda
            host = torch.empty(part.values.shape, dtype=pieces.dtype, pin_memory=on_cuda)
            host.copy_(part.values, non_blocking=on_cuda)
            cuda |= on_cuda
            parts.append(Piece(part.offsets, host))
        out[name] = Pieces(pieces.shape, pieces.dtype, tuple(parts))
    if cuda:
        torch.cuda.synchronize()
    return out


def _told_of(folder: Path, work: Callable[[], Any]) -> Any:
    """What `work` gives; a refusal of the system as the error that a user reads."""
    try:
        return work()
    except OSError as error:
        raise failed(folder, error) from error


def _told(folder: Path, error: Exception) -> Exception:
    if isinstance(error, LuthierError):
        return error
    text, kind = f"{type(error).__name__}: {error}", Failed
    if lost_peer(error):
        text = f"another process of the run is gone ({str(error).splitlines()[0][:160]})"
        kind = LostPeer
    made = kind(f"saving {folder}", text, "what was saved before is untouched")
    made.__cause__ = error
    return made
