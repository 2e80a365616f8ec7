"""Text tokenised once: folders of token files in `data.cache`, named by what they were made from.

A key is the hash of the data's bytes, of which rows are meant, and of the tokenizer; shard n holds the
documents of a fixed run of rows. A shard is written by one process (a lock keeps others waiting), published
whole, and believed only when it is whole and says what it was made from. `Shards` makes them now, or in a
thread while training reads the first ones. How they become rows is `corpus.py`.
"""

from __future__ import annotations

import hashlib
import os
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from luthier.data.dataset import Encoder
from luthier.data.indexed import TokenFile, Writer, read_facts
from luthier.data.ledger import Ledger
from luthier.data.rowfiles import JsonRows, Rows, TableRows
from luthier.data.sources import Part
from luthier.data.tokens import Tokens
from luthier.data.workers import CHUNK_ROWS, Workers
from luthier.errors import Failed, Refused
from luthier.files import damage, publish, sha256

FORMAT = 1  # raised when the same text would give other tokens
SHARD_ROWS = 8192  # rows of data per shard
TOKENS = "tokens"  # NAME of the token files in a shard's folder

Progress = Callable[[int, int], object]


@dataclass(frozen=True)
class Plan:
    """The shards of one source of text: shard n holds rows begin + n * SHARD_ROWS and on, before `end`, of
    the encoder's rows; its folder is `folder/n`."""

    name: str
    begin: int
    end: int
    folder: Path
    facts: dict[str, Any]  # what its token files record

    def __len__(self) -> int:
        return -(-(self.end - self.begin) // SHARD_ROWS)

    def rows(self, number: int) -> range:
        first = self.begin + number * SHARD_ROWS
        return range(first, min(first + SHARD_ROWS, self.end))

    def place(self, number: int) -> Path:
        return self.folder / f"{number:05d}"


def default_cache() -> Path:
    """Where shards are kept unless `data.cache` says otherwise."""
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "luthier" / "tokens"


def plan_shards(
    cache: Path,
    part: Part,
    begin: int,
    chosen: np.ndarray,
    columns: Mapping[str, str],
    tokens: Tokens,
) -> Plan:
    """The shards of the rows `chosen` (indices into the part) that are rows `begin` and on of the encoder.

    `columns` are those of the text format.
    """
    about = f"{FORMAT} {SHARD_ROWS} {len(chosen)} {sorted(columns.items())}"
    data = hashlib.sha256(about.encode())
    for file in part.files:
        data.update(_content(file).encode())
    if len(chosen) != part.num_rows:
        data.update(chosen.astype("<i8").tobytes())
    facts = {"format": FORMAT, "data": data.hexdigest(), "tokenizer": tokens.fingerprint}
    facts["vocab_size"] = len(tokens.tokenizer)
    key = hashlib.sha256(repr(sorted(facts.items())).encode()).hexdigest()
    return Plan(part.name, begin, begin + len(chosen), cache / key[:32], facts)


def _content(file: Rows) -> str:
    if isinstance(file, JsonRows):
        return sha256(file.path)
    assert isinstance(file, TableRows)
    return f"{file.table._fingerprint} {len(file)}"


class Shards:
    """Shards of several sources, made where they are missing by `encoder`, in `workers` processes.

    `make_all` makes them at once; `start` has a thread make them, and whoever opens one waits for it. Close
    it at the end.
    """

    def __init__(
        self,
        plans: Sequence[Plan],
        encoder: Encoder,
        split: str,
        workers: int,
    ) -> None:
        self.plans, self.encoder, self.split = plans, encoder, split
        self._workers = workers
        self._pool: Workers | None = None
        self._files: dict[tuple[int, int], TokenFile | None] = {}
        self._ready = threading.Condition()
        self._wanted: list[tuple[int, int]] = []
        self._error: BaseException | None = None
        self._stop = False
        self._thread: threading.Thread | None = None

    def open(self, source: int, number: int) -> TokenFile | None:
        """A shard, waited for while it is being made; None where no row of it became a document. Raises
        what went wrong in making it."""
        at = (source, number)
        if at not in self._files:
            if self._thread is not None:
                self._wait(at)
            prefix = self.plans[source].place(number) / TOKENS
            empty = not read_facts(prefix)["ledger"]["num_examples"]
            self._files[at] = None if empty else TokenFile(prefix)
        return self._files[at]

    def ledger(self, source: int, number: int) -> Ledger:
        """What became of the rows of a shard."""
        self.open(source, number)
        plan = self.plans[source]
        found = Ledger(self.split, plan.name)
        found.restore(read_facts(plan.place(number) / TOKENS)["ledger"])
        found.split, found.source = self.split, plan.name  # other names may have been given then
        return found

    def opened(self, source: int) -> list[int]:
        """The shards of a source that were opened so far."""
        return sorted(number for s, number in list(self._files) if s == source)

    def start(self, order: Sequence[tuple[int, int]]) -> None:
        """Have the missing ones of `order` (source, number) made; one that is waited for comes next."""
        missing = [at for at in order if not self._is_there(*at)]
        if missing:
            self._pool = Workers(self.encoder, self._workers)  # forked before a model is built
            self._thread = threading.Thread(
                target=self._run, args=(missing,), name="luthier-shards", daemon=True
            )
            self._thread.start()

    def make_all(self, progress: Progress | None = None) -> None:
        """Make what is missing, here and now."""
        total = sum(plan.end - plan.begin for plan in self.plans)
        done = 0
        for source, plan in enumerate(self.plans):
            for number in range(len(plan)):
                if not self._is_there(source, number):
                    self._pool = self._pool or Workers(self.encoder, self._workers)
                    self._make(
                        source, number, lambda n, d=done: progress and progress(d + n, total)
                    )
                done += len(plan.rows(number))
        self.close()

    def close(self) -> None:
        """Stop making shards; what is published stays."""
        self._stop = True
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._pool is not None:
            self._pool.close()
            self._pool = None

    def _is_there(self, source: int, number: int) -> bool:
        plan = self.plans[source]
        place = plan.place(number)
        if not place.is_dir() or damage(place, hashes=False) is not None:
            return False
        found = read_facts(place / TOKENS)
        check_made_by(place, found, plan.facts["tokenizer"])
        return all(found.get(name) == value for name, value in plan.facts.items())

    def _wait(self, at: tuple[int, int]) -> None:
        with self._ready:
            self._wanted.append(at)
            while not self._is_there(*at):
                if self._error is not None:
                    raise self._error
                if self._stop:
                    raise _Stopped
                self._ready.wait(1.0)  # another process may be the one that makes it
            self._wanted.remove(at)

    def _run(self, missing: list[tuple[int, int]]) -> None:
        try:
            while missing and not self._stop:
                wanted = next((at for at in self._wanted if at in missing), missing[0])
                missing.remove(wanted)
                if not self._is_there(*wanted):
                    self._make(*wanted)
                with self._ready:
                    self._ready.notify_all()
        except BaseException as error:  # whatever it is, the reader must see it
            with self._ready:
                self._error = error
                self._ready.notify_all()

    def _make(
        self, source: int, number: int, progress: Callable[[int], object] | None = None
    ) -> None:
        """Tokenise the rows of one shard and publish it, unless another process does so meanwhile."""
        plan = self.plans[source]
        place = plan.place(number)
        with _locked(place):
            if self._is_there(source, number):
                return
            try:
                with publish(place) as folder:
                    self._write(plan, number, folder, progress)
            except Failed as error:
                raise Failed(
                    error.asked,
                    error.found,
                    "free space or give another data.cache; shards that are whole are used again",
                ) from error

    def _write(
        self, plan: Plan, number: int, folder: Path, progress: Callable[[int], object] | None
    ) -> None:
        assert self._pool is not None
        ledger = Ledger(self.split, plan.name)
        rows = plan.rows(number)
        chunks = (rows[i : i + CHUNK_ROWS] for i in range(0, len(rows), CHUNK_ROWS))
        facts = dict(plan.facts)
        with Writer(folder / TOKENS, plan.facts["vocab_size"], facts) as writer:
            for outcomes in self._pool.encode(chunks):
                if self._stop:
                    raise _Stopped
                for outcome in outcomes:
                    # rows count from the source's first: the shard may be read with other sources beside it
                    ledger.add(outcome.record._replace(row=outcome.record.row - plan.begin))
                    for example in outcome.examples:
                        writer.add(example.input_ids)
                if ledger.rows["invalid"]:
                    ledger.check(training=False)  # refuses
                if progress is not None:
                    progress(ledger.num_rows)
            facts["ledger"] = ledger.snapshot()


class _Stopped(Exception):
    """The making of shards was stopped."""


def check_made_by(place: Path, facts: dict[str, Any], tokenizer: str) -> None:
    """Refuse token files that record another tokenizer's hash; those that record none are not told apart."""
    made_by = facts.get("tokenizer")
    if made_by is not None and made_by != tokenizer:
        raise Refused(
            f"the tokens in {place}",
            f"another tokenizer made them (hash {str(made_by)[:12]}, this model's {tokenizer[:12]})",
            "give the text itself, or the model whose tokenizer made them",
        )


@contextmanager
def _locked(place: Path) -> Iterator[None]:
    """Alone with `place` among all processes of this machine, where the system has such locks."""
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        lock = place.with_name(f".{place.name}.lock").open("wb")
    except OSError as error:
        raise Refused(
            f"tokens are to be kept in {place.parent}",
            f"nothing can be written there: {error.strerror or error}",
            "give another data.cache",
        ) from error
    with lock:
        with suppress(ImportError):
            import fcntl

            fcntl.flock(lock, fcntl.LOCK_EX)
        yield
