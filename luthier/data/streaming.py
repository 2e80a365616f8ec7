"""Rows of lazy data, in the order of the run, from any position on, holding a few buffers of examples.

Source rows are drawn by a permutation of their indices (each is read from the disk by its offset), encoded
by the data set's workers and packed in buffers that do not mix; inside a buffer packed rows are permuted
again. A position names the first document of the current buffer, so going on reads that buffer again.
Where batches are cut, and what is remembered, is `loader.py`.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Generator, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from luthier.data.ahead import ahead
from luthier.data.dataset import LazyDataset
from luthier.data.encode import Example
from luthier.data.ledger import Ledger, Record
from luthier.data.packing import STREAM_BUFFER, Method, pack, stream
from luthier.data.sources import permutation
from luthier.data.workers import CHUNK_ROWS
from luthier.errors import Failed

Document = tuple[np.ndarray, ...]  # ids and labels, [n] each; and positions [n] where they skip
Row = list[Document]  # documents that share a row
Place = tuple[int, int]  # a draw of the epoch, a document of the row drawn
Buffer = tuple[list[list[Example]], Place | None, Ledger | None]

BUFFERS_AHEAD = 1  # waiting, beside the one in use and the one being read


@dataclass(frozen=True)
class Step:
    """The rows of one optimiser step, and the position behind them. `ledgers` are those of the buffers
    that begin in it."""

    rows: list[Row]
    first: int  # serial number of the first row in the whole run
    after: dict[str, Any]
    ledgers: list[Ledger] = field(default_factory=list)


class Stream:
    """Steps of a `LazyDataset`. A position is `epoch`, `serial` (rows before it in the whole run), `draw` and
    `document` (where its buffer begins: which draw of the epoch, which document of that row), `buffer` (its
    number) and `emitted` (rows of it that came before)."""

    def __init__(
        self,
        dataset: LazyDataset,
        *,
        batch: int,
        length: int,
        packing: Method,
        seed: int,
        shuffle: bool,
    ) -> None:
        self.dataset, self.batch, self.length = dataset, batch, length
        self.packing: Method = packing
        self.seed, self.shuffle = seed, shuffle
        self.start = _position(0, 0)

    @property
    def fingerprint(self) -> str:
        """What must be equal for a position to mean the same rows."""
        checksum = self.dataset.sample_checksum
        return f"{len(self.dataset.source)} rows, of which a sample has checksum {checksum:08x}"

    @property
    def tokens_per_step(self) -> float:
        """Real tokens of an average step of the first epoch, as if all rows were like the sampled ones."""
        lengths = self.dataset.sample_lengths
        share = len(self.dataset.source) / self.dataset.sample.num_rows
        # as many as are packed together: a few would leave a last row that is emptier than most
        typical = np.resize(lengths, min(round(share * len(lengths)), STREAM_BUFFER))
        packed = len(pack(typical, self.length, self.packing))
        tokens = share * int(lengths.sum())
        num_rows = max(1, round(tokens * packed / int(typical.sum())))
        return tokens / math.ceil(num_rows / self.batch)

    def steps(self, position: dict[str, Any]) -> Iterator[Step]:
        """Endless steps from `position` on. The last step of an epoch may be smaller."""
        rows: list[Row] = []
        ledgers: list[Ledger] = []
        epoch = position["epoch"]
        while True:
            num_before = position["serial"] + len(rows)
            for row, after, ledger in self._rows(position):
                rows.append(row)
                ledgers += [ledger] if ledger else []
                if len(rows) == self.batch or after["epoch"] != epoch:
                    yield Step(rows, after["serial"] - len(rows), after, ledgers)
                    rows, ledgers = [], []
                position = after
            if position["serial"] == num_before:
                raise Failed(
                    f"reading epoch {epoch} of {self.dataset.source.name}",
                    "not one of its rows is usable",
                    "see the reasons in ledger.json",
                )
            epoch = position["epoch"]

    def _rows(
        self, position: dict[str, Any]
    ) -> Iterator[tuple[Row, dict[str, Any], Ledger | None]]:
        """The rows of one epoch from `position` on, each with the position behind it and, with the first
        row of a buffer in the first epoch, the ledger of the source rows that made the buffer."""
        epoch, serial = position["epoch"], position["serial"]
        begin, number, emitted = _begin(position), position["buffer"], position["emitted"]
        # the next buffer is read while the rows of this one are used
        for buffer, follows, ledger in ahead(self._buffers(epoch, begin), BUFFERS_AHEAD):
            names = (self.seed, "buffer", epoch, number)
            order = permutation(len(buffer), *names, shuffle=self.shuffle)
            for r in range(emitted, len(buffer)):
                serial += 1
                if r + 1 < len(buffer):
                    after = _position(epoch, serial, begin, number, r + 1)
                elif follows:
                    after = _position(epoch, serial, follows, number + 1)
                else:
                    after = _position(epoch + 1, serial)
                row = [
                    (e.input_ids, e.labels, *(() if e.positions is None else (e.positions,)))
                    for e in buffer[order[r]]
                ]
                yield row, after, ledger if r == emitted else None
            if follows:
                begin, number, emitted = follows, number + 1, 0

    def _buffers(self, epoch: int, begin: Place) -> Generator[Buffer]:
        """Packed buffers of the epoch from `begin` on; with each the place where the next one begins (None
        at the end of the epoch) and, in the first epoch, the ledger of the rows read until there."""
        records: deque[tuple[int, Record]] = deque()
        begins: deque[Place] = deque()  # of the examples that are in no buffer yet
        examples = self._examples(epoch, begin, records, begins)
        for rows in stream(examples, self.length, self.packing, lambda e: len(e.input_ids)):
            for _ in range(sum(map(len, rows))):
                begins.popleft()
            follows = begins[0] if begins else None
            yield rows, follows, self._booked(records, follows) if epoch == 0 else None

    def _examples(
        self,
        epoch: int,
        begin: Place,
        records: deque[tuple[int, Record]],
        begins: deque[Place],
    ) -> Iterator[Example]:
        """Examples of the epoch from (draw, document) `begin` on; notes what it reads in the two queues."""
        order = self.dataset.source.order(self.seed, epoch, self.shuffle)
        draw, first = begin
        chunks = (order[i : i + CHUNK_ROWS] for i in range(draw, len(order), CHUNK_ROWS))
        for outcomes in self.dataset.workers.encode(chunks):
            for outcome in outcomes:
                if outcome.record.status == "invalid":
                    raise Failed(
                        f"reading {outcome.record.place}",
                        outcome.record.reason,
                        "correct that row, leaving the number of rows, and go on with checkpoint.resume=auto",
                    )
                if not first:
                    records.append((draw, outcome.record))
                for document, example in enumerate(outcome.examples[first:], start=first):
                    begins.append((draw, document))
                    yield example
                draw, first = draw + 1, 0

    def _booked(self, records: deque[tuple[int, Record]], follows: Place | None) -> Ledger:
        """The ledger of the rows read before the place where the next buffer begins."""
        ledger = Ledger(self.dataset.split, self.dataset.source.name)
        while records and (follows is None or (records[0][0], 0) < follows):
            ledger.add(records.popleft()[1])
        return ledger


def _position(
    epoch: int, serial: int, begin: Place = (0, 0), buffer: int = 0, emitted: int = 0
) -> dict[str, Any]:
    return {
        "epoch": epoch,
        "serial": serial,
        "draw": begin[0],
        "document": begin[1],
        "buffer": buffer,
        "emitted": emitted,
    }


def _begin(position: dict[str, Any]) -> Place:
    return position["draw"], position["document"]
