"""Texts with blanks to fill: GLM's pre-training task, for rows of plain text (`data.blanks`).

Some pieces of a text are replaced by a mask token each and written behind the text, in the text's order: each
after <|startofpiece|>, with <|endofpiece|> at its end. [MASK] stands for spans of a few tokens, [sMASK] for sentences,
[gMASK] for the rest of the text. Shares and lengths are those of GLM's training code (Du et al. 2022,
arXiv:2103.10360). What is chosen is a function of the text alone. The positions follow from the ids
(`document_positions` of the tokenizer).
"""

from __future__ import annotations

import itertools
import math
import random
from typing import Any

from luthier.data.formats import BadRow
from luthier.data.truncation import Ids
from luthier.data.turns import Round
from luthier.errors import Refused
from luthier.seeding import derive

SHARE = 0.15  # of the tokens that are in blanks, for spans and sentences
SPAN, LONGEST = 3, 40  # mean (Poisson) and most tokens of a span
REST = 0.25  # the least share of a text that is its rest
KINDS = ("spans", "sentences", "rest")
MIXED = (0.4, 0.3, 0.3)  # of KINDS
ENDS = ".?!;:。？！；…\n"  # a token with one of these ends a sentence
Span = tuple[int, int]  # first token, and the one behind the last


class Blanks:
    """Blanks of one kind, or of all ("mixed"), in the ids of texts. Refused: a tokenizer of another family, or
    one whose only mask token is [MASK], which has nothing but spans."""

    def __init__(self, kind: str, tokens: Any) -> None:
        own = tokens.tokenizer
        masks = list(getattr(own, "blank_ids", ()))
        if not masks or (len(masks) < len(KINDS) and kind != "spans"):
            raise Refused(
                f"data.blanks={kind} with a {type(own).__name__}",
                "its model has no mask token for them" if masks else "its model fills no blanks",
                "use data.blanks=spans" if masks else "use data.blanks=none; blanks are GLM's",
            )
        self.kind, self.tokens = kind, tokens
        self.masks = {str(k): m for k, m in zip(KINDS, masks, strict=False)}
        before, behind = own.special_ids_around(masks[:1])
        self.before, self.behind, self.sop = before, behind[:-1], behind[-1]
        self.end = own.stop_ids[0]

    def size(self, count: int) -> int:
        """The most tokens of a row made of a text of `count` tokens: each blank adds three."""
        most = math.ceil(SHARE * count) + 1
        return len(self.before) + count + 3 * most + len(self.behind)

    def room(self, length: int) -> int:
        """The most tokens of a text whose row has `length`."""
        count = max(length - len(self.before) - len(self.behind), 1)
        while count > 1 and self.size(count) > length:
            count -= 1
        return count

    def rounds(self, ids: Ids) -> tuple[Round, ...]:
        """The text with its blanks and the token that opens the first, what fills it, and so on. Raises BadRow for
        a text that holds a mask token itself."""
        if set(ids) & {*self.masks.values(), self.sop}:
            raise BadRow("the text holds a mask token or <|startofpiece|> itself")
        draw = random.Random(derive(0, "blanks", self.kind, *ids))
        kind = draw.choices(KINDS, MIXED)[0] if self.kind == "mixed" else self.kind
        spans = sorted(self._choose(kind, ids, draw))
        context: Ids = []
        last = 0
        for start, stop in spans:
            context += [*ids[last:start], self.masks[kind]]
            last = stop
        prompts = [[*self.before, *context, *ids[last:], *self.behind, self.sop]]
        prompts += [[self.sop] for _ in spans[1:]]
        answers = [[*ids[start:stop], self.end] for start, stop in spans]
        return tuple(Round(p, a) for p, a in zip(prompts, answers, strict=True))

    def filled(self, ids: Ids) -> Ids:
        """The text that a whole row was made of."""
        border = ids.index(self.sop)
        pieces: list[Ids] = []
        for token in ids[border:]:
            if token == self.sop:
                pieces.append([])
            else:
                pieces[-1].append(token)
        answers = (piece[:-1] for piece in pieces)
        text: Ids = []
        for token in ids[len(self.before) : border - len(self.behind)]:
            text += next(answers) if token in self.masks.values() else [token]
        return text

    def _choose(self, kind: str, ids: Ids, draw: random.Random) -> list[Span]:
        match kind:
            case "spans":
                return _spans(len(ids), draw)
            case "sentences":
                return _sentences([self.tokens.decode([i], special=True) for i in ids], draw)
            case _:
                least = math.ceil(REST * len(ids))
                return [(len(ids) - draw.randint(least, max(len(ids) - 1, least)), len(ids))]


def _spans(count: int, draw: random.Random) -> list[Span]:
    """Spans that lie at least a token apart, with about SHARE of `count` tokens in all."""
    lengths: list[int] = []
    weights = [math.exp(-SPAN) * SPAN**n / math.factorial(n) for n in range(1, LONGEST)]
    while sum(lengths) < max(int(SHARE * count), 1):
        lengths += draw.choices(range(1, LONGEST), weights)
    while sum(lengths) + len(lengths) - 1 > count:  # a short text
        lengths = lengths[:-1] or [count]
        if lengths == [count]:
            break
    free = count - sum(lengths) - len(lengths) + 1
    places = sorted(draw.randrange(free + 1) for _ in lengths)
    found, taken = [], 0
    for place, length in zip(places, lengths, strict=True):
        found.append((place + taken, place + taken + length))
        taken += length + 1
    return found


def _sentences(words: list[str], draw: random.Random) -> list[Span]:
    """Whole sentences in any order until SHARE of the tokens are among them."""
    ends = [i + 1 for i, word in enumerate(words) if any(mark in word for mark in ENDS)]
    borders = sorted({0, *ends, len(words)})
    sentences = list(itertools.pairwise(borders))
    draw.shuffle(sentences)
    found, size = [], 0
    for start, stop in sentences:
        found.append((start, stop))
        size += stop - start
        if size >= int(SHARE * len(words)):
            break
    return found
