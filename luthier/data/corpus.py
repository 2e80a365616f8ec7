"""Pretraining data of a run: its rows by number, each cut into its documents.

Where row n lies is told by `blocks.py`; opening, splitting and refusing is `corpus_open.py`. Steps of the run
are cut in `Steps`, which `loader.py` takes for its feed.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import numpy as np

from luthier.batch import IGNORE
from luthier.config import RunConfig
from luthier.data.blocks import Drawn, FilePart, Mixture, Span, TextPart
from luthier.data.encode import Positions, Renderer
from luthier.data.indexed import TokenFile
from luthier.data.ledger import Ledger
from luthier.data.pose import pose_of
from luthier.data.shards import Shards
from luthier.data.sources import Split
from luthier.data.streaming import Row, Step
from luthier.errors import Failed

LOOKED = 64  # rows with blanks that are counted to tell how long they are


class Corpus:
    """The rows of one split. `lazy`: shards are still being made, and the number of rows is not known.

    In families with two position axes a row is one text in their form, made of a run of tokens by
    `Renderer.piece`; `positions` are those of such a row. A row takes `length` tokens of the text, and has
    `width` at most.
    """

    def __init__(
        self,
        split: Split,
        parts: list[FilePart | TextPart],
        config: RunConfig,
        vocab_size: int,
        ledger: Ledger,
        shards: Shards | None,
        renderer: Renderer,
    ) -> None:
        self.split, self.parts, self.ledger, self.shards = split, parts, ledger, shards
        self.borders = config.data.borders
        self.positions: Positions | None = renderer.positions
        self._renderer = None if self.positions is None else renderer
        self.length, self.width = run_length(renderer), config.data.length
        self.lazy = config.data.lazy and split == "train"
        self.vocab_size = vocab_size
        seed = config.train.seed
        self.drawn = [Drawn(part, p, seed, shuffle=True) for p, part in enumerate(parts)]
        self._in_order = [Drawn(part, p, seed, shuffle=False) for p, part in enumerate(parts)]
        names, weights = [part.name for part in parts], [part.weight for part in parts]
        self.mixture = Mixture(names, weights, seed)
        # of training rows alone: evaluation has ordinary positions
        self._pose = pose_of(config.data, seed) if split == "train" else None
        self._booked: set[tuple[int, int]] = set()  # shards whose ledger is in ours

    @property
    def fingerprint(self) -> str:
        """What must be equal for row n to be the same."""
        keys = [f"{part.key[:16]} (weight {part.weight:g})" for part in self.parts]
        blanks = self._renderer and self._renderer.blanks
        form = f" with blanks ({blanks.kind})" if blanks else ""
        return f"rows of {self.length} tokens{form} of {', '.join(keys)}"

    @property
    def num_rows(self) -> int | None:
        """Rows of all parts together: an epoch. None while shards are being made."""
        return None if self.lazy else sum(drawn.count() for drawn in self.drawn)

    @property
    def tokens_per_row(self) -> float:
        """Mean tokens of a row; while shards are being made, those of a full one."""
        if self.lazy:
            return float(self.length)
        if self._renderer is not None:  # as long as their blanks make them
            total = self.num_rows or 0
            some = np.linspace(0, total - 1, min(LOOKED, total)).astype(np.int64)
            return float(np.mean([len(self.row_in_order(int(n))[0][0]) for n in some]))
        spans = [s for part in self.parts for s in _spans(part) if s.num_rows(self.length)]
        rows = [span.num_rows(self.length) for span in spans]
        # each row but the last of a span shares a token with the next
        tokens = sum(s.stop - s.start for s in spans) + sum(rows) - len(rows)
        return tokens / sum(rows)

    def row(self, n: int) -> Row:
        """Row n of the run, as its documents."""
        part, before = self.mixture.place(n)
        return self._read(*self.drawn[part].place(before), n)

    def row_in_order(self, n: int) -> Row:
        """Row n of all parts as they lie, one after the other."""
        rest = n
        for drawn in self._in_order:
            if rest < drawn.count():
                return self._read(*drawn.place(rest), n)
            rest -= drawn.count()
        raise IndexError(n)

    def epoch(self, n: int) -> int:
        """Passes over the data before row n: as many rows as all parts have; while shards are being made,
        passes over each single part."""
        if (total := self.num_rows) is not None:
            return n // total
        drawn = self.mixture.drawn(n)
        return min(
            int(m) // d.total if d.total else 0 for m, d in zip(drawn, self.drawn, strict=True)
        )

    def documents(self) -> Iterator[np.ndarray]:
        """The ids [n] of all documents, in order; of token files cut at a split's border as they are."""
        for part in self.parts:
            for span in _spans(part):
                borders = [span.start, *span.file.borders(span.start, span.stop), span.stop]
                for start, stop in pairwise(borders):
                    yield span.file.tokens[start:stop]

    def book(self) -> None:
        """Take the ledgers of shards opened since into ours."""
        for p, part in enumerate(self.parts):
            if isinstance(part, TextPart):
                for number in part.shards.opened(part.source):
                    if (p, number) not in self._booked:
                        self._booked.add((p, number))
                        self.ledger.merge(part.shards.ledger(part.source, number))

    def close(self) -> None:
        """End the making of shards."""
        if self.shards is not None:
            self.shards.close()

    def _read(self, span: Span, number: int, n: int) -> Row:
        """Row `number` of a span, which is row n of the run: what PoSE draws is new in each epoch."""
        start, stop = span.row(number, self.length)
        ids = span.file.tokens[start:stop].astype(np.int64)
        check_ids(span.file, ids, start, self.vocab_size)
        if self._renderer is not None:
            # a row's first token has been in the row before it; here it would be trained again
            made = self._renderer.piece(ids[1 if number else 0 :].tolist())
            return [(made.input_ids.astype(np.int64), made.labels)]
        pieces = [ids]
        if self.borders == "keep":
            cuts = [at - start for at in span.file.borders(start, stop)]
            pieces = np.split(ids, cuts)
        row = [(piece, np.append(piece[1:], IGNORE)) for piece in pieces]
        if self._pose is None:
            return row
        places = [self._pose.places(len(ids), n, i) for i, (ids, _) in enumerate(row)]
        return [(*document, place) for document, place in zip(row, places, strict=True)]


class Steps:
    """Endless optimiser steps of `batch` rows over a corpus. A position is `serial` (rows before it in the
    whole run) and `epoch`."""

    def __init__(self, corpus: Corpus, *, batch: int) -> None:
        self.corpus, self.batch = corpus, batch
        self.start = {"epoch": 0, "serial": 0}
        self.fingerprint = corpus.fingerprint
        self.num_rows = corpus.num_rows
        self.tokens_per_step = batch * corpus.tokens_per_row

    def steps(self, position: dict[str, Any]) -> Iterator[Step]:
        """Steps from `position` on."""
        serial = position["serial"]
        while True:
            rows = [self.corpus.row(n) for n in range(serial, serial + self.batch)]
            first, serial = serial, serial + self.batch
            yield Step(rows, first, {"epoch": self.corpus.epoch(serial), "serial": serial})

    def steps_in(self, epochs: float) -> int | None:
        """Steps of the first `epochs` passes, rounded up; None for lazy data."""
        if self.num_rows is None:
            return None
        return max(1, math.ceil(round(epochs * self.num_rows / self.batch, 6)))

    def padding(self) -> dict[str, int]:
        """Rows, tokens and slots of an epoch."""
        rows = self.num_rows or 0
        tokens = round(rows * self.corpus.tokens_per_row)
        return {"rows": rows, "tokens": tokens, "slots": rows * self.corpus.width}


def run_length(renderer: Renderer) -> int:
    """Tokens of the text in a row, the one that it shares with the row before it among them."""
    return renderer.length if renderer.positions is None else renderer.piece_size


def _spans(part: FilePart | TextPart) -> list[Span]:
    """The runs of tokens of a part, in order."""
    if isinstance(part, FilePart):
        return list(part.spans)
    return [block.span for n in range(part.num_blocks) if (block := part.block(n))]


def check_ids(file: TokenFile, ids: np.ndarray, start: int, vocab_size: int) -> None:
    """Raise Failed for ids that are none of the tokenizer's; `ids` are tokens `start` and on."""
    wrong = np.flatnonzero((ids < 0) | (ids >= vocab_size))
    if len(wrong):
        at = int(wrong[0])
        raise Failed(
            f"the token files {file.prefix}",
            f"token {start + at} is {ids[at]}, the model's tokenizer ends at {vocab_size - 1}: another "
            "tokenizer made them",
            "give the text itself, or the model whose tokenizer made them",
        )
