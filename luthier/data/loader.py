"""Rows -> `Batch`: orders rows, cuts optimiser steps into micro-batches, reads ahead, remembers where it is.

The order of rows is a function of (seed, epoch, index); micro-batches, workers, read-ahead and a stop in
between do not change it. Each epoch has ceil(rows / batch) steps, the last one maybe smaller. Examples
come from `dataset.py`, which of them share a row from `packing.py`, lazy data from `streaming.py`; rows of
pretraining from `corpus.py`, whose steps are all of `batch` rows, from epoch to epoch.
"""

from __future__ import annotations

import math
from collections.abc import Generator, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from luthier.batch import Batch
from luthier.data.ahead import ahead
from luthier.data.collate import collate as collate
from luthier.data.collate import filler, num_slots
from luthier.data.corpus import Corpus, Steps
from luthier.data.dataset import Dataset, LazyDataset
from luthier.data.encode import Positions
from luthier.data.packing import Method, pack
from luthier.data.sources import Order, permutation
from luthier.data.streaming import Row, Step, Stream
from luthier.errors import Refused

STEPS_AHEAD = 2  # made ready in the background


class Loader:
    """Endless optimiser steps over a data set, from any position.

    `batch` rows per step, `micro_batch` rows per `Batch`, `length` tokens per packed row. Examples of one
    origin are packed once, in data order, and the rows shuffled anew in each epoch; a mixture is drawn and
    packed anew in each epoch; lazy data is drawn in a new order and packed buffer by buffer.

    Of the micro-batches of a step, `rank` of `ranks` gets every `ranks`-th one, and all ranks equally many: a
    rank for which there are no rows gets a filler (`Batch.is_filler`). The step itself is the same for any `ranks`.
    """

    def __init__(
        self,
        dataset: Dataset | LazyDataset | Corpus,
        *,
        batch: int,
        micro_batch: int,
        pad_id: int,
        seed: int,
        length: int,
        packing: Method,
        shuffle: bool = True,
        rank: int = 0,
        ranks: int = 1,
    ) -> None:
        self.dataset, self.batch = dataset, batch
        self.micro_batch, self.pad_id = micro_batch, pad_id
        self.rank, self.ranks = rank, ranks
        self._positions: Positions | None = None
        if isinstance(dataset, Corpus):
            self._positions = dataset.positions
            self._feed: Stream | _Memory | Steps = Steps(dataset, batch=batch)
        else:
            self._positions = dataset.encoder.renderer.positions
            feed: Any = Stream if isinstance(dataset, LazyDataset) else _Memory
            self._feed = feed(
                dataset, batch=batch, length=length, packing=packing, seed=seed, shuffle=shuffle
            )
        self._position = self._feed.start
        self._ready: Generator[tuple[Step, list[Batch]]] | None = None
        self._next: list[tuple[Step, list[Batch]]] = []  # a step that was looked at
        self._padding = {"rows": 0, "tokens": 0, "slots": 0}  # of the first epoch
        self._ledger_before = dataset.ledger.snapshot()  # as it was before the current buffer
        self._ledger_now: dict[str, Any] | None = None  # as it is, once it was asked for
        method = "end to end" if isinstance(dataset, Corpus) else packing
        self._about = {"method": method, "length": length}
        if isinstance(self._feed, _Memory):
            self._padding = self._feed.padding(micro_batch)
            self._book_padding()
        elif isinstance(self._feed, Steps) and self._feed.num_rows is not None:
            self._padding = self._feed.padding()
            self._book_padding()

    @property
    def num_rows(self) -> int | None:
        """Packed rows of the first epoch (all epochs alike but for mixtures); None for lazy data."""
        return None if isinstance(self._feed, Stream) else self._feed.num_rows

    @property
    def steps_per_epoch(self) -> int | None:
        """Optimiser steps of the first epoch; None for lazy data."""
        return None if self.num_rows is None else math.ceil(self.num_rows / self.batch)

    @property
    def tokens_per_step(self) -> float:
        """Real tokens of an average step of the first epoch; of lazy data, an estimate from its sample."""
        if not isinstance(self._feed, _Memory):
            return self._feed.tokens_per_step
        return self._padding["tokens"] / math.ceil(self._feed.num_rows / self.batch)

    @property
    def epoch(self) -> int:
        """Epochs that were handed out completely."""
        return self._position["epoch"]

    def steps_in(self, epochs: float) -> int | None:
        """Steps of the first `epochs` passes, a last part of one rounded up; None for lazy data."""
        if isinstance(self._feed, Stream):
            return None
        if isinstance(self._feed, Steps):
            return self._feed.steps_in(epochs)
        part, whole = math.modf(epochs)
        steps = [math.ceil(len(self._feed.rows(e)) / self.batch) for e in range(math.ceil(epochs))]
        # 1.1 epochs of 10 steps are 11.000000000000002 in floating point, and yet 11
        return max(1, sum(steps[: int(whole)]) + math.ceil(round(part * steps[-1], 6)))

    def step_batches(self) -> Generator[list[Batch]]:
        """Steps from the current position on, each a list of micro-batches padded to their longest row."""
        try:
            while True:
                self.peek()
                step, batches = self._next.pop()
                self._book(step)
                yield batches
        finally:
            self._stop()

    def peek(self) -> list[Batch]:
        """The step that comes next, without moving."""
        if self._ready is None:
            if self._inside_buffer:  # which is read, and booked, from its beginning again
                self.dataset.ledger.restore(self._ledger_before)
            steps = self._feed.steps(self._position)
            self._ready = ahead(((step, self._batches(step)) for step in steps), STEPS_AHEAD)
        if not self._next:
            self._next.append(next(self._ready))
        return self._next[0][1]

    def sample(self) -> Batch:
        """The first micro-batch of the step that comes next, the same one on every rank."""
        self.peek()
        step = self._next[0][0]
        return collate(step.rows[: self.micro_batch], self.pad_id, step.first, self._positions)

    def largest(self) -> Batch:
        """A micro-batch as large as any that can come, without moving: the longest rows (a mixture's, of the first
        epoch). Of lazy data, the largest of the step that comes next: what comes later is not known."""
        if not isinstance(self._feed, _Memory):
            return max(self.peek(), key=lambda batch: batch.input_ids.numel())
        return collate(self._feed.longest(self.micro_batch), self.pad_id, 0, self._positions)

    def state(self) -> dict[str, Any]:
        """The position behind the last step handed out, as plain values for JSON."""
        state = {"data": self._feed.fingerprint, "position": dict(self._position)}
        if isinstance(self.dataset, LazyDataset):
            # long, and asked for after every step: copied where it changed
            if self._ledger_now is None and not self._inside_buffer:
                self._ledger_now = self.dataset.ledger.snapshot()
            ledger = self._ledger_before if self._inside_buffer else self._ledger_now
            state |= {"padding": dict(self._padding), "ledger": ledger}
        return state

    def load_state(self, state: dict[str, Any]) -> None:
        """Go on from `state`; iterators made before are stale. Raises Refused when it is of other data."""
        if state["data"] != self._feed.fingerprint:
            raise Refused(
                "going on from a checkpoint's place in the data",
                f"the data has changed since: {state['data']} then, {self._feed.fingerprint} now",
                "give the same data and tokenizer, or start a new run in another output",
            )
        self._stop()
        self._position = dict(state["position"])
        if isinstance(self.dataset, LazyDataset):
            self._padding = dict(state["padding"])
            self._ledger_before, self._ledger_now = state["ledger"], None
            self.dataset.ledger.restore(state["ledger"])

    def origin(self, serial: int) -> list[str]:
        """Where the documents of the row of this serial number come from; empty where it is not known."""
        if not isinstance(self._feed, _Memory) or isinstance(self.dataset, Corpus):
            return []
        rows, source = self._feed.dataset.rows, self.dataset.source
        return [source.row(int(rows[i]))[1] for i in self._feed.examples_at(serial)]

    def close(self) -> None:
        """End the reading ahead, and the processes that tokenise lazy data."""
        self._stop()
        if isinstance(self.dataset, Corpus):
            self.dataset.close()
        if isinstance(self.dataset, LazyDataset):
            self.dataset.workers.close()

    @property
    def _inside_buffer(self) -> bool:
        """Whether the ledger holds rows of a buffer that is not handed out yet."""
        at = self._position
        return isinstance(self._feed, Stream) and at["epoch"] == 0 and at["emitted"] > 0

    def _stop(self) -> None:
        """Forget what was read ahead."""
        if self._ready is not None:
            self._ready.close()
        self._ready = None
        self._next.clear()

    def _batches(self, step: Step) -> list[Batch]:
        size = self.micro_batch
        return [
            collate(step.rows[i : i + size], self.pad_id, step.first + i, self._positions)
            if i < len(step.rows)
            else filler(step, self.pad_id, self._positions)
            for first in range(0, len(step.rows), size * self.ranks)
            for i in [first + self.rank * size]
        ]

    def _book(self, step: Step) -> None:
        """Note that `step` is handed out now."""
        ledger = self.dataset.ledger
        for later in step.ledgers:
            self._ledger_before = ledger.snapshot()
            ledger.merge(later)
        if isinstance(self.dataset, LazyDataset) and self._position["epoch"] == 0:
            self._ledger_now = None
            sizes = [sum(len(ids) for ids, *_ in row) for row in step.rows]
            self._padding["rows"] += len(sizes)
            self._padding["tokens"] += sum(sizes)
            self._padding["slots"] += num_slots(sizes, self.micro_batch)
            self._book_padding()
            if step.after["epoch"] == 1:
                ledger.reconcile(len(self.dataset.source))
        if isinstance(self.dataset, Corpus):
            self.dataset.book()
        self._position = step.after

    def _book_padding(self) -> None:
        rows, tokens, slots = self._padding.values()
        share = round(1 - tokens / slots, 6)
        self.dataset.ledger.packing = {**self._about, "rows": rows, "padding_share": share}


@dataclass(frozen=True)
class CorpusBatches:
    """The rows of a corpus in their order, `micro_batch` per batch, made when they are asked for; with
    `most`, so many of them, spread evenly."""

    corpus: Corpus
    micro_batch: int
    pad_id: int
    most: int | None = None

    def __len__(self) -> int:
        return math.ceil(len(self._rows) / self.micro_batch)

    def __iter__(self) -> Iterator[Batch]:
        for i in range(0, len(self._rows), self.micro_batch):
            rows = [self.corpus.row_in_order(int(n)) for n in self._rows[i : i + self.micro_batch]]
            yield collate(rows, self.pad_id, i, self.corpus.positions)

    @cached_property
    def _rows(self) -> Order:
        total = self.corpus.num_rows or 0
        return np.linspace(0, total - 1, min(self.most or total, total)).astype(np.int64)


def evaluation_batches(
    dataset: Dataset, *, micro_batch: int, pad_id: int, length: int, packing: Method
) -> Iterator[Batch]:
    """All rows once, in data order, `micro_batch` per batch."""
    feed = _Memory(
        dataset, batch=micro_batch, length=length, packing=packing, seed=0, shuffle=False, once=True
    )
    for step in feed.steps(feed.start):
        yield collate(step.rows, pad_id, step.first, dataset.encoder.renderer.positions)
        if step.after["epoch"]:
            return


class _Memory:
    """Steps of a `Dataset` in memory. A position is `epoch`, `step` and `serial` (rows before it)."""

    def __init__(
        self,
        dataset: Dataset,
        *,
        batch: int,
        length: int,
        packing: Method,
        seed: int,
        shuffle: bool,
        once: bool = False,
    ) -> None:
        self.dataset, self.batch, self.length = dataset, batch, length
        self.packing: Method = packing
        self.seed, self.shuffle = seed, shuffle
        self.start = {"epoch": 0, "step": 0, "serial": 0}
        self._mixture = len(dataset.source.parts) > 1 and not once
        self._drawn: tuple[int, list[list[int]]] = (-1, [])  # a mixture's rows of one epoch
        self._packed = [] if self._mixture else self._pack(np.arange(len(dataset)))
        self.num_rows = len(self.rows(0))

    @cached_property
    def fingerprint(self) -> str:
        """What must be equal for a position to mean the same rows."""
        return self.dataset.fingerprint

    def rows(self, epoch: int) -> list[list[int]]:
        """The rows of an epoch, as examples, before they are shuffled."""
        if not self._mixture:
            return self._packed
        drawn = self._drawn  # another thread may replace it
        if drawn[0] != epoch:
            order = self.dataset.source.order(self.seed, epoch, self.shuffle)
            drawn = self._drawn = (epoch, self._pack(self.dataset.examples_of(order)))
        return drawn[1]

    def steps(self, position: dict[str, Any]) -> Iterator[Step]:
        """Endless steps from `position` on."""
        epoch, step, serial = (position[name] for name in ("epoch", "step", "serial"))
        while True:
            rows = self.rows(epoch)
            order = self._order(epoch, len(rows))
            for begin in range(step * self.batch, len(rows), self.batch):
                chosen = [rows[i] for i in order[begin : begin + self.batch]]
                step, first, serial = step + 1, serial, serial + len(chosen)
                last = begin + self.batch >= len(rows)
                after = {
                    "epoch": epoch + last,
                    "step": 0 if last else step,
                    "serial": serial,
                }
                yield Step([[self.dataset.example(i) for i in row] for row in chosen], first, after)
            epoch, step = epoch + 1, 0

    def examples_at(self, serial: int) -> list[int]:
        """The examples of the row that is handed out as number `serial`."""
        epoch = 0
        while serial >= len(self.rows(epoch)):
            serial, epoch = serial - len(self.rows(epoch)), epoch + 1
        rows = self.rows(epoch)
        return rows[self._order(epoch, len(rows))[serial]]

    def longest(self, number: int) -> list[Row]:
        """The longest rows of the first epoch."""
        rows = self.rows(0)
        order = np.argsort([-self.dataset.lengths[row].sum() for row in rows], kind="stable")
        return [[self.dataset.example(i) for i in rows[n]] for n in order[:number]]

    def padding(self, micro_batch: int) -> dict[str, int]:
        """Rows, tokens and slots (with padding) of the first epoch's batches."""
        rows = self.rows(0)
        lengths = self.dataset.lengths
        sizes = np.array([lengths[row].sum() for row in rows])[self._order(0, len(rows))]
        steps = [sizes[i : i + self.batch] for i in range(0, len(sizes), self.batch)]
        slots = sum(num_slots(step.tolist(), micro_batch) for step in steps)
        return {"rows": len(rows), "tokens": int(sizes.sum()), "slots": slots}

    def _order(self, epoch: int, num_rows: int) -> Order:
        return permutation(num_rows, self.seed, "packed", epoch, shuffle=self.shuffle)

    def _pack(self, examples: Order) -> list[list[int]]:
        rows = pack(self.dataset.lengths[examples], self.length, self.packing)
        return [examples[row].tolist() for row in rows]
