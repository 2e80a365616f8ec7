"""Rows -> examples: reads, renders and books every row, in several processes where that pays.

`prepare` gives the examples of one split with their ledger: all of them in memory (`Dataset`), or, with
`data.lazy`, a description of how to read them while training (`LazyDataset`). Refuses what cannot be
trained before any work is done on a model. Rows of the training batch are made in `loader.py`.
"""

from __future__ import annotations

import time
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from luthier.config import DataConfig, RunConfig
from luthier.data.checks import check_labels, check_supervision
from luthier.data.encode import Dropped, Example, Renderer
from luthier.data.formats import (
    FORMATS,
    BadRow,
    EmptyRow,
    Message,
    check_columns,
    check_sources,
    detect,
    rename,
)
from luthier.data.ledger import Ledger, Record
from luthier.data.pose import Pose, pose_of
from luthier.data.rowfiles import Unreadable
from luthier.data.sources import Order, Source, Split, open_evaluation, open_source
from luthier.data.workers import CHUNK_ROWS, Workers
from luthier.errors import Refused
from luthier.seeding import derive

SAMPLE_ROWS = 256  # rows of lazy data that are tried before the run starts
LOOKED_ROWS = 16  # of each part, for the fields that `data.columns` names
WORTH_SECONDS = 8.0  # tokenising that lasts longer in this process alone is spread over workers

PROVEN_ROWS = 8  # rows whose supervision is compared with the prompts of prediction

Progress = Callable[[int, int], object]  # rows done, rows in all


class Outcome(NamedTuple):
    """What one row became; `examples` is empty unless the record says used or cut."""

    record: Record
    examples: tuple[Example, ...] = ()


@dataclass(frozen=True)
class Encoded:
    """What some rows became, as a few arrays: so they go quickly from process to process."""

    ledger: Ledger
    ids: np.ndarray  # int32 [T]
    labels: np.ndarray  # int32 [T]
    lengths: np.ndarray  # int64 [N], tokens of each example
    rows: np.ndarray  # int64 [N], ascending
    positions: np.ndarray | None  # int32 [T] where they are not 0, 1, ...


class Encoder:
    """Row index -> `Outcome`. Picklable, and without state: the order of calls does not matter."""

    def __init__(
        self, source: Source, data: DataConfig, renderer: Renderer, pose: Pose | None = None
    ) -> None:
        self.source, self.renderer, self.columns = source, renderer, dict(data.columns)
        self.pose = pose
        self.notes: list[str] = []
        self.formats = [self._format(p) for p in range(len(source.parts))]
        if self.columns:
            self.notes += check_sources(self.columns, list(self._first_rows()))
        if renderer.blanks is not None and "text" not in self.formats:
            self.notes.append("data.blanks does nothing here: blanks are made in rows of text only")
        if pose is not None and pose.form == "paddlenlp" and set(self.formats) != {"text"}:
            raise Refused(
                f"data.pose=paddlenlp with rows of the format {self.formats[0]}",
                "its form takes two chunks of a long text and leaves everything else as it is",
                "use data.pose=paper, or give texts (data.format=text)",
            )

    def __call__(self, indices: Iterable[int]) -> list[Outcome]:
        return [self.outcome(int(i)) for i in indices]

    def together(self, indices: Iterable[int]) -> Encoded:
        """The rows of `indices`, booked in a ledger of their own."""
        outcomes = self(indices)
        ledger = Ledger("train", "")  # its name is that of the ledger it is merged into
        for outcome in outcomes:
            ledger.add(outcome.record)
        found = [(e, o.record.row) for o in outcomes for e in o.examples]
        lengths = np.array([len(e.input_ids) for e, _ in found], dtype=np.int64)
        ids, labels = (
            np.concatenate([np.zeros(0, np.int32), *arrays], dtype=np.int32, casting="same_kind")
            for arrays in ([e.input_ids for e, _ in found], [e.labels for e, _ in found])
        )
        skipping = [e.positions for e, _ in found if e.positions is not None]
        positions = np.concatenate(skipping) if skipping else None
        rows = np.array([row for _, row in found], dtype=np.int64)
        return Encoded(ledger, ids, labels, lengths, rows, positions)

    def outcome(self, index: int) -> Outcome:
        place = self.source.name
        try:
            row, place = self.source.row(index)
            messages = self._messages(row, index)
            if self.pose is None:
                examples = self.renderer.encode(messages)
            else:
                examples = self.pose.examples(self.renderer, messages, index)
        except Unreadable as bad:
            return Outcome(Record(index, bad.place, "invalid", bad.reason))
        except BadRow as bad:
            status = "dropped" if isinstance(bad, (Dropped, EmptyRow)) else "invalid"
            return Outcome(Record(index, place, status, bad.reason))
        cut = sum([example.cut for example in examples])
        trained = [example.trained for example in examples]
        record = Record(
            index,
            place,
            "cut" if cut else "used",
            cut=cut,
            num_examples=len(examples),
            num_tokens=sum([len(example.input_ids) for example in examples]),
            num_supervised=sum(map(len, trained)),
            ended=self.renderer.stops(trained[-1]),
            note="; ".join(dict.fromkeys([example.note for example in examples if example.note])),
        )
        return Outcome(record, tuple(examples))

    def prove(self) -> None:
        """Raise Failed unless the labels of the first rows are their next tokens and train exactly their
        answers, after the very prompts that prediction gives."""
        for index in range(min(PROVEN_ROWS, len(self.source))):
            outcome = self.outcome(index)
            for example in outcome.examples:
                check_labels(example.input_ids, example.labels)
            if len(outcome.examples) == 1:
                check_supervision(self.renderer, self.messages(index), outcome.examples[0])

    def messages(self, index: int) -> list[Message]:
        """The messages of row `index`. Raises Unreadable or BadRow."""
        return self._messages(self.source.row(index)[0], index)

    def _messages(self, row: dict[str, Any], index: int) -> list[Message]:
        return FORMATS[self.formats[self.source.part_of(index)]](rename(row, self.columns))

    def _format(self, p: int) -> str:
        """The format of part `p`: the one asked for, or that of its first row."""
        part = self.source.parts[p]
        name = part.format
        if name == "auto":
            try:
                row, place = part.files[0].row(0)
            except Unreadable as bad:
                raise Refused(
                    f"reading {part.name}", f"{bad.place}: {bad.reason}", "correct the file"
                ) from bad
            try:
                name = detect(rename(row, self.columns))
            except BadRow as bad:
                raise Refused(
                    f"the format of {part.name} was to be recognised (data.format=auto)",
                    f"{place}: {bad.reason}",
                ) from bad
            self.notes.append(f"{part.name}: format {name}, recognised by its field names")
        check_columns(self.columns, name)
        return name

    def _first_rows(self) -> Iterator[dict[str, Any]]:
        """A few rows of each part; those that cannot be read are told with all others."""
        for part in self.source.parts:
            for index in range(min(LOOKED_ROWS, len(part.files[0]))):
                with suppress(Unreadable):
                    yield part.files[0].row(index)[0]


@dataclass(frozen=True)
class Dataset:
    """Examples of one split in memory, in data order, and the ledger of their rows.

    Example i is tokens offsets[i] to offsets[i + 1] of the concatenated `ids` and `labels`; it comes from
    row `rows[i]` of the source.
    """

    split: Split
    encoder: Encoder
    ledger: Ledger
    ids: np.ndarray  # int32 [T]
    labels: np.ndarray  # int32 [T]
    offsets: np.ndarray  # int64 [N + 1]
    rows: np.ndarray  # int64 [N], ascending
    positions: np.ndarray | None = None  # int32 [T] where they are not 0, 1, ...

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def source(self) -> Source:
        return self.encoder.source

    @property
    def fingerprint(self) -> str:
        """What must be equal for these to be the same examples in the same order."""
        checksum = 0
        for array in (self.ids, self.labels, self.offsets, self.positions):
            if array is None:
                continue
            checksum = zlib.crc32(array.data, checksum)
        return f"{len(self)} examples, checksum {checksum:08x}"

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each example, int64 [N]."""
        return np.diff(self.offsets)

    def example(self, index: int) -> tuple[np.ndarray, ...]:
        """Ids and labels [n] of one example, and its positions where they skip; views."""
        span = slice(self.offsets[index], self.offsets[index + 1])
        arrays = (self.ids, self.labels, self.positions)
        return tuple(array[span] for array in arrays if array is not None)

    def examples_of(self, rows: Order) -> Order:
        """The examples that the given rows of the source became, in that order."""
        first = np.searchsorted(self.rows, rows, side="left")
        counts = np.searchsorted(self.rows, rows, side="right") - first
        # within[i]: the how-manieth example of its row stands at place i
        within = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
        return np.repeat(first, counts) + within

    def conversations(self) -> Iterator[list[Message]]:
        """The messages of every row that became an example, in data order."""
        return (self.encoder.messages(int(row)) for row in np.unique(self.rows))


@dataclass(frozen=True)
class LazyDataset:
    """Rows that are read and encoded while training. `ledger` grows with the first pass over them; `sample`
    is that of the rows looked at beforehand, with the lengths and a checksum of their examples."""

    split: Split
    encoder: Encoder
    ledger: Ledger
    workers: Workers
    sample: Ledger
    sample_lengths: np.ndarray  # int64 [N], tokens of each example
    sample_checksum: int  # of ids and labels

    @property
    def source(self) -> Source:
        return self.encoder.source


def prepare(
    config: RunConfig, renderer: Renderer, split: Split, progress: Progress | None = None
) -> Dataset | LazyDataset | None:
    """The examples of `split`; None where the data has no such part (training data must exist).

    `dev` and `test` stand in for each other, rows held out by `data.validation_share` for a missing dev
    part, and both are always in memory; `evaluate.rows` limits `dev`. With `data.lazy` training rows are
    only sampled here: call this before a large model is built, because the processes that tokenise are
    forked now. Raises Refused for data that cannot be read or trained.
    """
    source, notes = open_rows(config, split)
    if source is None:
        return None
    if split == "dev" and config.evaluate.rows is not None and config.evaluate.rows < len(source):
        notes.append(f"evaluate.rows: the first {config.evaluate.rows} of {len(source)} rows")
        source = source.take(np.arange(config.evaluate.rows))
    pose = pose_of(config.data, config.train.seed) if split == "train" else None
    encoder = Encoder(source, config.data, renderer, pose)
    encoder.prove()
    ledger = Ledger(split, source.name)
    for note in [*notes, *encoder.notes, *renderer.notes, *_mixture(source, split)]:
        ledger.note(note)
    if config.data.lazy and split == "train":
        return _lazy(split, encoder, ledger, config)
    return _read(split, encoder, ledger, config.data.workers, progress)


def _lazy(split: Split, encoder: Encoder, ledger: Ledger, config: RunConfig) -> LazyDataset:
    """Encode a sample of the rows: as they lie in the data, or of a mixture as they are drawn."""
    source = encoder.source
    rows = np.unique(np.linspace(0, len(source) - 1, SAMPLE_ROWS, dtype=int))
    if len(source.parts) > 1:
        rows = source.order(config.train.seed, 0, shuffle=True)[:SAMPLE_ROWS]
    sample = Ledger(split, f"{len(rows)} sampled rows of {source.name}")
    lengths, checksum = [], 0
    for outcome in encoder(rows):
        sample.add(outcome.record)
        for example in outcome.examples:
            lengths.append(len(example.input_ids))
            for array in (example.input_ids, example.labels, example.positions):
                checksum = checksum if array is None else zlib.crc32(array.tobytes(), checksum)
    sample.check(training=True)
    workers = Workers(encoder, config.data.workers)
    return LazyDataset(split, encoder, ledger, workers, sample, np.array(lengths), checksum)


def _read(
    split: Split, encoder: Encoder, ledger: Ledger, workers: int, progress: Progress | None
) -> Dataset:
    """Encode all rows into memory."""
    total = len(encoder.source)
    parts: list[Encoded] = []
    for part in _encoded(encoder, total, workers):
        ledger.merge(part.ledger)
        parts.append(part)
        if ledger.rows["invalid"]:
            break  # it is going to be refused: do not let the user wait for the rest
        if progress:
            progress(ledger.num_rows, total)
    ledger.check(training=split == "train")
    ledger.reconcile(total)
    ids, labels, lengths, rows = (
        np.concatenate([getattr(part, name) for part in parts])
        for name in ("ids", "labels", "lengths", "rows")
    )
    offsets = np.append(0, np.cumsum(lengths))
    positions = [part.positions for part in parts if part.positions is not None]
    skipping = np.concatenate(positions) if positions else None
    return Dataset(split, encoder, ledger, ids, labels, offsets, rows, skipping)


def _encoded(encoder: Encoder, total: int, workers: int) -> Iterator[Encoded]:
    """All rows in order: in this process while that is quick, the rest in `workers` processes."""
    size = 4 * CHUNK_ROWS  # nobody waits for the first of them
    chunks = [range(i, min(i + size, total)) for i in range(0, total, size)]
    begin = time.perf_counter()
    for done, chunk in enumerate(chunks):
        rest = (time.perf_counter() - begin) / max(done, 1) * (len(chunks) - done)
        if workers and rest > WORTH_SECONDS:
            with Workers(encoder.together, workers) as pool:
                yield from pool.encode(chunks[done:])
            return
        yield encoder.together(chunk)


def open_rows(config: RunConfig, split: Split) -> tuple[Source | None, list[str]]:
    """The rows of a split, after `data.validation_share` had its part, and what to remark on them."""
    data = config.data
    if not data.validation_share:
        return _part(data, split), []
    has_dev = data.validation_path is not None or open_source(data.path, data, "dev") is not None
    if has_dev or (split == "test" and open_source(data.path, data, "test") is not None):
        note = "data.validation_share is not used: there is a dev part"
        return _part(data, split), [note] if split == "train" else []
    source = open_source(data.path, data, "train")
    if source is None:
        return None, []
    bound = data.validation_share * 2.0**63
    seed = config.train.seed
    held = np.array([derive(seed, "validation", i) < bound for i in range(len(source))])
    if not held.any() or held.all():
        raise Refused(
            f"data.validation_share={data.validation_share} of {len(source)} rows",
            "that leaves no row to evaluate or none to train",
            "give another share, or data.validation_path",
        )
    note = f"data.validation_share: {int(held.sum())} of {len(source)} rows are held out"
    return source.take(np.flatnonzero(~held if split == "train" else held)), [note]


def _part(data: DataConfig, split: Split) -> Source | None:
    return (
        open_source(data.path, data, "train") if split == "train" else open_evaluation(data, split)
    )


def _mixture(source: Source, split: Split) -> list[str]:
    """What a mixture draws per epoch, in words."""
    if len(source.parts) == 1 or split != "train":
        return []
    return [
        f"mixture: {share} rows per epoch from the {size} of {part.name} (weight {part.weight:g})"
        for part, size, share in zip(source.parts, source.sizes(), source.shares(), strict=True)
    ]
