"""Which row of pretraining data comes when: parts, blocks of rows in mapped files, and their order.

A part is text (tokenised by `shards.py`) or token files (`indexed.py`), made of blocks: runs of rows in one
file. Row n of a run is a function of (seed, n): its part by weight (`Mixture`); in the part a permutation of
blocks, and of the rows of a few blocks together (`Drawn`). So any row is found without reading those
before it, and the first ones before the last shard is made. A row is `length` tokens and begins with the
last one of the row before it: every token but the first of a block's file is predicted once.
"""

from __future__ import annotations

import hashlib
from bisect import bisect_right
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from luthier.data.indexed import TokenFile
from luthier.data.shards import Shards
from luthier.data.sources import Order, permutation
from luthier.errors import Refused
from luthier.files import sha256

BLOCK_ROWS = 16384  # rows of a token file that was not made here, per block
WINDOW = 8  # blocks whose rows are shuffled together
CYCLE = 4096  # rows over which the weights of the parts hold exactly
KEPT = 2  # windows and cycles kept in memory


class Span(NamedTuple):
    """Tokens `start` to `stop` of a file."""

    file: TokenFile
    start: int
    stop: int

    def num_rows(self, length: int) -> int:
        return max(0, -(-(self.stop - self.start - 1) // (length - 1)))

    def row(self, number: int, length: int) -> tuple[int, int]:
        """The first token of a row, and the one behind its last."""
        start = self.start + number * (length - 1)
        return start, min(start + length, self.stop)


class Block(NamedTuple):
    """Rows first, first + 1, ... of a span."""

    span: Span
    first: int
    num_rows: int


class FilePart:
    """Token files of one origin. All blocks are there from the beginning."""

    def __init__(self, name: str, weight: float, spans: Sequence[Span], length: int) -> None:
        self.name, self.weight, self.spans = name, weight, tuple(spans)
        self._blocks = [
            Block(span, first, min(BLOCK_ROWS, span.num_rows(length) - first))
            for span in spans
            for first in range(0, span.num_rows(length), BLOCK_ROWS)
        ]
        about = hashlib.sha256()
        for span in spans:
            where = f"{sha256(span.file.index)} {len(span.file.tokens)} {span.start} {span.stop}"
            about.update(where.encode())
        self.key = about.hexdigest()  # equal for the same documents of the same files

    @property
    def num_blocks(self) -> int:
        return len(self._blocks)

    def block(self, number: int) -> Block | None:
        return self._blocks[number]


class TextPart:
    """The shards of one source of text, one block each."""

    def __init__(self, weight: float, shards: Shards, source: int, length: int) -> None:
        self.weight, self.shards, self.source = weight, shards, source
        self.name = shards.plans[source].name
        self.key = shards.plans[source].folder.name
        self._length = length

    @property
    def num_blocks(self) -> int:
        return len(self.shards.plans[self.source])

    def block(self, number: int) -> Block | None:
        """Shard `number`, waited for; None where no row of it became a document."""
        file = self.shards.open(self.source, number)
        if file is None:
            return None
        span = Span(file, 0, len(file.tokens))
        return Block(span, 0, span.num_rows(self._length))


class Drawn:
    """The rows of one part in the order in which they are drawn: turn after turn through all of them."""

    def __init__(self, part: FilePart | TextPart, number: int, seed: int, shuffle: bool) -> None:
        self.part, self.number, self.seed, self.shuffle = part, number, seed, shuffle
        self.total: int | None = None  # rows of a turn, once the first one is gone through
        self._ends: dict[int, list[int]] = {}  # turn -> rows up to the end of each window
        self._windows: dict[tuple[int, int], tuple[list[Block], Order, Order]] = {}

    def place(self, n: int) -> tuple[Span, int]:
        """The n-th row drawn: its span, and which row of it. Raises Refused where there are none at all."""
        turn, rest = divmod(n, self.total) if self.total else (0, n)
        if turn not in self._ends:
            self._ends = {t: ends for t, ends in self._ends.items() if t >= turn - 1}
        ends = self._ends.setdefault(turn, [])
        while not ends or ends[-1] <= rest:
            if len(ends) == self._num_windows:  # a whole turn was gone through
                self._set_total(ends[-1] if ends else 0)
                return self.place(n)
            sizes = (block.num_rows for block in self._blocks(turn, len(ends)))
            ends.append((ends[-1] if ends else 0) + sum(sizes))
        window = bisect_right(ends, rest)
        blocks, bounds, order = self._window(turn, window)
        at = int(order[rest - (ends[window - 1] if window else 0)])
        b = int(np.searchsorted(bounds, at, side="right"))
        return blocks[b].span, blocks[b].first + at - (int(bounds[b - 1]) if b else 0)

    def count(self) -> int:
        """Rows of one turn; every block is waited for."""
        if self.total is None:
            blocks = [self.part.block(number) for number in range(self.part.num_blocks)]
            self._set_total(sum(block.num_rows for block in blocks if block))
        assert self.total is not None
        return self.total

    @property
    def _num_windows(self) -> int:
        return -(-self.part.num_blocks // WINDOW)

    def _set_total(self, total: int) -> None:
        if not total:
            raise Refused(
                f"the text or tokens of {self.part.name}",
                "it has not two tokens in one piece: there is nothing to predict",
                "leave it out, or give more",
            )
        self.total = total

    def _blocks(self, turn: int, window: int) -> list[Block]:
        names = (self.seed, "blocks", self.number, turn)
        order = permutation(self.part.num_blocks, *names, shuffle=self.shuffle)
        chosen = order[window * WINDOW : (window + 1) * WINDOW]
        return [block for b in chosen if (block := self.part.block(int(b)))]

    def _window(self, turn: int, window: int) -> tuple[list[Block], Order, Order]:
        """Blocks, the ends of their rows, and the order of the rows of a window."""
        key = (turn, window)
        if key not in self._windows:
            blocks = self._blocks(turn, window)
            bounds = np.cumsum([block.num_rows for block in blocks])
            names = (self.seed, "block rows", self.number, turn, window)
            order = permutation(int(bounds[-1]), *names, shuffle=self.shuffle)
            _keep(self._windows, key, (blocks, bounds, order))
        return self._windows[key]


class Mixture:
    """Which part each row of the run comes from: in every `CYCLE` rows each part has its weight's share."""

    def __init__(self, names: Sequence[str], weights: Sequence[float], seed: int) -> None:
        self.seed = seed
        exact = np.array(weights) / sum(weights) * CYCLE
        counts = np.floor(exact).astype(np.int64)
        counts[np.argsort(counts - exact, kind="stable")[: CYCLE - int(counts.sum())]] += 1
        for name, weight, count in zip(names, weights, counts, strict=True):
            if not count:
                raise Refused(
                    f"weight={weight:g} of {name}",
                    f"that is less than one of {CYCLE} rows, which would never be drawn",
                    "give it more weight, or leave it out",
                )
        self.counts = counts
        self._cycles: dict[int, tuple[Order, Order]] = {}

    def place(self, n: int) -> tuple[int, int]:
        """Row n of the run: its part, and how many rows of that part came before it."""
        cycle, at = divmod(n, CYCLE)
        parts, before = self._cycle(cycle)
        part = int(parts[at])
        return part, cycle * int(self.counts[part]) + int(before[at])

    def drawn(self, n: int) -> Order:
        """Rows of each part among the first n rows of the run, [parts]."""
        cycle, at = divmod(n, CYCLE)
        return cycle * self.counts + np.bincount(
            self._cycle(cycle)[0][:at], minlength=len(self.counts)
        )

    def _cycle(self, cycle: int) -> tuple[Order, Order]:
        """The part of each row of a cycle, and how many of that part stand before it in the cycle."""
        if cycle not in self._cycles:
            parts = np.repeat(np.arange(len(self.counts)), self.counts)
            parts = parts[permutation(CYCLE, self.seed, "mixture", cycle, shuffle=True)]
            before = np.empty(CYCLE, dtype=np.int64)
            for part in range(len(self.counts)):
                places = np.flatnonzero(parts == part)
                before[places] = np.arange(len(places))
            _keep(self._cycles, cycle, (parts, before))
        return self._cycles[cycle]


def first_blocks(sizes: Sequence[tuple[int, int]], seed: int) -> list[tuple[int, int]]:
    """In which order the blocks of parts (number of the part, its blocks) are first needed: (place in
    `sizes`, block), a window of each part in turn."""
    orders = [
        permutation(num_blocks, seed, "blocks", number, 0, shuffle=True)
        for number, num_blocks in sizes
    ]
    longest = max(map(len, orders), default=0)
    return [
        (p, int(block))
        for first in range(0, longest, WINDOW)
        for p, order in enumerate(orders)
        for block in order[first : first + WINDOW]
    ]


def _keep(kept: dict[Any, Any], key: Any, value: Any) -> None:
    """Remember a value in place of the oldest one."""
    while len(kept) >= KEPT:
        del kept[next(iter(kept))]
    kept[key] = value
