"""PoSE: documents of `length` tokens whose positions skip, to train for a window that is longer (arXiv:2309.10400).

A document is two chunks, and the positions of the second one are further on. In the paper's form how far is drawn
up to the window, wherever in the text the second chunk was taken from; in PaddleNLP's the positions are those
that the tokens have in the text, so that only a text longer than `length` gets any skip. The draws depend on
(seed, row) alone. What positions a family has is checked by whoever opens the model.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np

from luthier.batch import IGNORE
from luthier.data.encode import Example, Renderer
from luthier.data.formats import Message
from luthier.seeding import derive

Draw = Callable[[int, int], int]  # a whole number between two, both included
READ = 5  # the authors look at the first 5 x length tokens of a text


@dataclass(frozen=True)
class Pose:
    """How training documents get their positions. `window` is the longest context to train for."""

    form: Literal["paper", "paddlenlp"]
    length: int
    window: int
    seed: int

    def examples(self, renderer: Renderer, messages: Sequence[Message], row: int) -> list[Example]:
        """What `Renderer.encode` makes of a row, with positions.

        A text that is too long loses what lies between its chunks instead of its end. Raises as `encode`.
        """
        if messages[0].role == "text" and renderer.overlong == "cut":
            return [self._text(renderer, messages[0].text, self._draw(row, 0))]
        found = renderer.encode(messages)
        return [self._skipping(e, self._draw(row, i)) for i, e in enumerate(found)]

    def _draw(self, row: int, piece: int) -> Draw:
        return random.Random(derive(self.seed, "pose", row, piece)).randint

    def _skipping(self, example: Example, draw: Draw) -> Example:
        places = self._places(len(example.input_ids), draw)
        return replace(example, positions=places.astype(np.int32))

    def places(self, size: int, row: int, piece: int) -> np.ndarray:
        """Positions [size] of the document `piece` of row number `row`, all of whose tokens stay."""
        return self._places(size, self._draw(row, piece))

    def _places(self, size: int, draw: Draw) -> np.ndarray:
        return np.asarray(paper(range(size), size, self.window, draw)[1], dtype=np.int64)

    def _text(self, renderer: Renderer, text: str, draw: Draw) -> Example:
        tokens = renderer.tokens
        whole = [*tokens.opening, *tokens.ended(text)]
        if self.form == "paper":
            ids, positions = paper(whole, self.length, self.window, draw)
        else:
            end = [] if tokens.end is None or whole[-1] != tokens.end else [tokens.end]
            body = whole[: len(whole) - len(end)]
            # the last label becomes the row's last token: it is kept, and there is room for it
            ids, labels, places = paddlenlp(body, self.length - 1, end, draw, self.window - 1)
            if len(labels) < len(ids):  # no end token follows the text
                ids, places = ids[:-1], places[:-1]
            ids, positions = [*ids, labels[-1]], [*places, places[-1] + 1]
        found = renderer.document(ids, max(len(whole) - len(ids), 0))
        places = np.asarray(positions, dtype=np.int32)
        if self.form == "paddlenlp":  # the label of the first chunk's end is no token of the row
            found.labels[:-1][np.diff(places) > 1] = IGNORE
        return replace(found, positions=places)


def paper(ids: Sequence[int], length: int, window: int, draw: Draw) -> tuple[list[int], list[int]]:
    """Ids of two chunks, `length` in all, and their positions below `window`, as the authors' code draws them.

    Labels are the ids themselves, shifted: the second chunk's first token is learnt too.
    """
    ids = list(ids[: READ * length])
    n = min(len(ids), length)
    first = draw(1, (n + 1) // 2)
    end = draw(n, len(ids))
    skip = draw(0, window - n)
    chunks = [*ids[:first], *ids[end - (n - first) : end]]
    return chunks, [*range(first), *range(first + skip, n + skip)]


def paddlenlp(
    ids: Sequence[int], length: int, eos: Sequence[int], draw: Draw, window: int | None = None
) -> tuple[list[int], list[int], list[int]]:
    """Ids of two chunks, the next tokens of the text as labels, and true positions, as PaddleNLP draws them.

    A text that fits gets `eos` and stays whole. `window` bounds the positions; PaddleNLP has no bound and
    reads beyond its tables. The labels of the chunks' last tokens are not among the ids.
    """
    n = min(len(ids), length)
    whole = [*ids, *eos] if len(ids) <= length else list(ids)
    first = draw(1, max(n // 2, 1))
    last = max(len(whole) - 1, n)
    end = draw(n, last if window is None else max(n, min(last, window)))
    start = end - (n - first)
    places = [*range(first), *range(start, end)]
    return [whole[i] for i in places], [whole[i + 1] for i in places if i + 1 < len(whole)], places


def pose_of(data: Any, seed: int) -> Pose | None:
    """`data.pose` of a config; None where it is off."""
    if data.pose == "off":
        return None
    return Pose(data.pose, data.length, data.pose_window, seed)
