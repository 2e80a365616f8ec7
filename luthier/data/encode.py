"""Messages -> ids and labels in one pass: the one renderer of training, evaluation and prediction.

`Renderer.encode` makes the examples that are trained, `Renderer.prompt` the ids to generate from; equal
prompts have equal ids in both. This file decides what is kept when a row is too long (`data.overlong`)
and what its labels are; how turns become text is `templates.py`, the cutting rules are `truncation.py`. What is
made here is proved by `checks.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from copy import copy
from dataclasses import dataclass
from typing import Any

import numpy as np

from luthier.batch import IGNORE
from luthier.data.blanks import Blanks
from luthier.data.formats import BadRow, Message
from luthier.data.templates import choose
from luthier.data.tokens import Tokens
from luthier.data.truncation import Ids, cut_answer, cut_source, keep_rounds
from luthier.data.turns import Conversation, Rendered, Round, Turn
from luthier.errors import Failed, Refused

Positions = Callable[[np.ndarray], np.ndarray]

UNANSWERED = "the last question has no answer and was left out"


class Dropped(BadRow):
    """A sound row that gives no example: too long under `overlong=drop`, or no room for its answer."""


class TooLong(BadRow):
    """A row longer than `length` under `overlong=refuse`; the reader refuses the data with its line."""


@dataclass(frozen=True)
class Example:
    """One document: `input_ids` int32 [n], `labels` int64 [n] already shifted (labels[i] is the token
    after input_ids[i], or -100), the last always -100; 2 <= n <= length. `cut` counts the tokens that
    truncation lost; `note` is a remark for the ledger, or empty; `positions` int32 [n] where they are not
    0, 1, ... (see `pose.py`)."""

    input_ids: np.ndarray
    labels: np.ndarray
    cut: int = 0
    note: str = ""
    positions: np.ndarray | None = None

    @property
    def trained(self) -> np.ndarray:
        """The supervised tokens, int64."""
        return self.labels[self.labels != IGNORE]


class Renderer:
    """Turns messages into examples and prompts. Picklable; the same arguments give the same ids.

    `template` is `data.template` (auto, none, file); `length` the most tokens of an example, EOS
    included; `source_length` the most tokens of a prompt (without a template: of each prompt; with one,
    only when the last round alone does not fit, as in PaddleNLP); `overlong` is cut, drop, split or
    refuse; `stop_ids` are the end ids of the model's generation config; `supervise` and `blanks` are the keys
    of `data`.

    `cut` keeps whole rounds from the last backwards, with the system message. A single round that is
    too long loses the oldest tokens of its prompt, down to `source_length`, and the end of its answer;
    with no room for any answer the row is dropped. `split` makes one example per run of rounds that
    fits, or per `length` tokens of a text. Raises Refused for an unusable template or tokenizer.
    """

    notes: tuple[str, ...]  # remarks on the template that hold for all rows, to be shown once
    stop_ids: tuple[int, ...]  # tokens that end an answer

    def __init__(
        self,
        tokenizer: Any,
        template: str = "auto",
        length: int = 2048,
        source_length: int | None = None,
        overlong: str = "cut",
        stop_ids: Iterable[int] = (),
        supervise: str = "answers",
        blanks: str = "none",
    ) -> None:
        self.tokens = Tokens(tokenizer)
        self.length, self.overlong = length, overlong
        if length <= len(self.tokens.prefix) + len(self.tokens.suffix):
            raise Refused(
                f"data.length={length}",
                "the tokenizer's own special tokens take all of it",
                "give a larger length",
            )
        self.template = choose(template, self.tokens, length, source_length)
        self.marks = self.tokens.turn_marks() if supervise == "turns" else None
        self.blanks = Blanks(blanks, self.tokens) if blanks != "none" else None
        self.notes = self.template.notes
        own = {self.tokens.eos, self.template.end_id, *self.tokens.stops, *stop_ids} - {None}
        self.stop_ids = tuple(sorted(i for i in own if i is not None))
        self._stops = frozenset(self.stop_ids)
        if not self.stop_ids:
            raise Refused(
                "answers and texts have to end in a token that says so",
                "neither the tokenizer, nor the chat template, nor generation_config.json has one",
                "set eos_token in the model's tokenizer_config.json",
            )

    def encode(self, messages: Sequence[Message]) -> list[Example]:
        """One example; several under `overlong=split`. Raises BadRow, Dropped, TooLong; Refused when the
        template loses a message."""
        if messages[0].role == "text":
            return self._encode_text(messages[0].text)
        conversation, note = self._conversation(messages), ""
        if conversation.turns[-1].answer is None:
            conversation = conversation._replace(turns=conversation.turns[:-1])
            note = UNANSWERED
        if not conversation.turns:
            raise BadRow("there is no answer to train on")
        num = len(conversation.turns)
        whole = self.template.render(conversation, 0, num)
        note = "; ".join(filter(None, (note, whole.note)))
        if whole.size > self.length:
            self._allow_overlong(whole.size)
        if whole.size <= self.length:
            pieces = [whole]
        elif self.overlong == "split":
            pieces = self._split(conversation, whole)
        else:
            pieces = [self._cut(conversation, num, whole)]
        return [self._example(piece, note) for piece in pieces]

    def prompt(self, messages: Sequence[Message]) -> list[int]:
        """Ids to generate from: all before the last answer (which may be absent), at most `length`."""
        return self.prompt_and_cut(messages)[0]

    def prompt_and_cut(self, messages: Sequence[Message]) -> tuple[list[int], int]:
        """The ids of `prompt`, and how many tokens it lost."""
        if messages[0].role == "text":
            ids = self.tokens(messages[0].text)
            kept = cut_source(ids, self.length, self.tokens.opening)
            return kept, len(ids) + len(self.tokens.opening) - len(kept)
        conversation = self._conversation(messages)
        *earlier, asked = conversation.turns
        conversation = conversation._replace(
            turns=(*earlier, asked._replace(answer=None, metadata=""))
        )
        whole = self.template.render(conversation, 0, len(conversation.turns))
        kept = whole
        if whole.size > self.length:
            kept = self._cut(conversation, len(conversation.turns), whole)
        ids = [*kept.head, *(i for r in kept.rounds for i in (*r.prompt, *r.answer))]
        if len(ids) > self.length:
            raise BadRow(
                f"the chat template alone takes more than data.length={self.length} tokens"
            )
        return ids, kept.cut

    @property
    def positions(self) -> Positions | None:
        """Ids [n] of a document -> its positions [2, n], in families with two axes; None in all others."""
        return getattr(self.tokens.tokenizer, "document_positions", None)

    def decode(self, ids: Sequence[int]) -> str:
        """Text of generated ids, without special tokens and without what follows the first stop token."""
        ends = [i for i, token in enumerate(ids) if int(token) in self.stop_ids]
        return self.template.said(
            self.tokens.decode([int(i) for i in ids[: ends[0] if ends else None]])
        )

    def without_marks(self, messages: Sequence[Message], example: Example) -> Example:
        """An example of whole `messages` as it is with data.supervise=answers: what checks of answers compare.
        Raises Failed when it differs in more than the tokens that open and close messages."""
        if self.marks is None or messages[0].role == "text":
            return example
        plain = copy(self)
        plain.marks = None
        (bare,) = plain.encode(messages)
        marks = np.append(np.asarray(self.marks(example.input_ids.tolist()))[1:], False)
        following = np.append(example.input_ids[1:], IGNORE)
        if not np.array_equal(np.where(marks, following, bare.labels), example.labels):
            raise Failed(
                "checking which tokens are trained",
                "they are not the answers and the tokens that open and close messages",
                "this is a defect of the data pipeline, please report it",
            )
        return bare

    def ends_in_stop(self, example: Example) -> bool:
        """Whether the last supervised token is a stop token."""
        return self.stops(example.trained)

    def stops(self, trained: np.ndarray) -> bool:
        """`ends_in_stop` of an example with these supervised tokens."""
        last = 1 if self.marks is None else 2  # a line end may follow
        return not self._stops.isdisjoint(trained[-last:].tolist())

    def _conversation(self, messages: Sequence[Message]) -> Conversation:
        conversation = _conversation(messages)
        if not self.template.tools and any(t.tool or t.metadata for t in conversation.turns):
            raise BadRow("it has a tool turn, for which only ChatGLM3's prompts have a place")
        return conversation

    def _encode_text(self, text: str) -> list[Example]:
        if self.blanks is not None:
            return self._encode_blanks(self.blanks, self.tokens(text))
        prefix, ids = self.tokens.opening, self.tokens.ended(text)
        room, cut = self.length - len(prefix), 0
        chunks = [ids]
        if len(ids) > room:
            self._allow_overlong(len(ids) + len(prefix))
            if self.overlong == "split":
                chunks = [ids[i : i + room] for i in range(0, len(ids), room)]
            else:
                chunks = [cut_answer(ids, room)]
                cut = len(ids) - len(chunks[0])
        pieces = [Rendered((Round(prefix, chunk),), [], [], cut) for chunk in chunks]
        if len(chunks) > 1 and len(prefix) + len(chunks[-1]) < 2:  # a lone EOS trains nothing
            pieces[-2:] = [pieces[-2]._replace(cut=1)]
        return [self._example(piece, "") for piece in pieces]

    def document(self, ids: Ids, cut: int = 0) -> Example:
        """The example of a text that is learnt as a whole: ids that begin with `tokens.opening`."""
        opening = len(self.tokens.opening)
        return self._example(Rendered((Round(ids[:opening], ids[opening:]),), [], [], cut), "")

    def piece(self, ids: Ids) -> Example:
        """The example of a run of tokens out of a text, in families with two axes: behind their opening, or with
        blanks. What stands for a blank or opens an answer, written in the text itself, is left out."""
        own = {*self.tokens.opening, *self.tokens.tokenizer.blank_ids} - {self.tokens.eos}
        ids = [i for i in ids if i not in own] or self.tokens.ended("")
        rounds = (Round(self.tokens.opening, ids),)
        if self.blanks is not None:
            rounds = self.blanks.rounds(ids)
        return self._example(Rendered(rounds, [], []), "")

    @property
    def piece_size(self) -> int:
        """The most tokens of a run whose `piece` has `length`."""
        if self.blanks is not None:
            return self.blanks.room(self.length)
        return self.length - len(self.tokens.opening)

    def _encode_blanks(self, blanks: Blanks, ids: Ids) -> list[Example]:
        """Pieces of a text, with blanks that are a function of each piece alone."""
        size, cut = blanks.room(self.length), 0
        chunks = [ids[i : i + size] for i in range(0, len(ids), size)]
        if len(chunks) > 1:
            self._allow_overlong(blanks.size(len(ids)))
            if self.overlong == "cut":
                cut, chunks = len(ids) - size, chunks[:1]
        pieces = [Rendered(blanks.rounds(chunk), [], [], cut) for chunk in chunks]
        return [self._example(piece, "") for piece in pieces]

    def _allow_overlong(self, size: int) -> None:
        reason = f"{size} tokens are more than data.length={self.length}"
        if self.overlong == "refuse":
            raise TooLong(f"{reason}, and data.overlong=refuse")
        if self.overlong == "drop":
            raise Dropped(f"longer than data.length={self.length}")

    def _cut(
        self, conversation: Conversation, stop: int, whole: Rendered, start: int = 0
    ) -> Rendered:
        """The last rounds before `stop` that fit, or the last one shortened. Raises Dropped.

        `whole` is turns `start` to `stop`. Each try is rendered again, because a template may fold the
        system message into the first turn or treat the last one differently.
        """
        begin = start + (stop - start > 1)
        if len(whole.rounds) == stop - start:
            sizes = [len(r.prompt) + len(r.answer) for r in whole.rounds]
            begin = stop - max(keep_rounds(sizes, self.length - len(whole.head)), 1)
        kept = self.template.render(conversation, begin, stop)
        while kept.size > self.length and begin < stop - 1:
            begin += 1
            kept = self.template.render(conversation, begin, stop)
        if kept.size > self.length:
            kept = self.template.shorten(conversation, begin, kept)
            if not kept.rounds[0].answer and conversation.turns[stop - 1].answer is not None:
                source = self.template.source_length
                limits = f"data.length={self.length}"
                limits += "" if source is None else f", data.source_length={source}"
                raise Dropped(f"its prompt leaves no room for an answer ({limits})")
        return kept._replace(cut=whole.cut + whole.size - kept.size)

    def _split(self, conversation: Conversation, whole: Rendered) -> list[Rendered]:
        """Runs of rounds that fit, from the first on; a round too long by itself is cut or left out."""
        pieces: list[Rendered] = []
        start, lost, num = 0, 0, len(conversation.turns)
        while start < num:
            stop, piece = num, whole
            if len(whole.rounds) == num:  # sizes are known: begin near the answer
                sizes = [len(r.prompt) + len(r.answer) for r in whole.rounds[start:]]
                room = self.length - len(whole.head)
                stop = start + max(keep_rounds(sizes[::-1], room), 1)
            if stop - start < num:
                piece = self.template.render(conversation, start, stop)
            while piece.size > self.length and stop - start > 1:
                stop -= 1
                piece = self.template.render(conversation, start, stop)
            if piece.size > self.length:
                try:
                    piece = self._cut(conversation, stop, piece, start)
                except Dropped:
                    lost += piece.size
                    start = stop
                    continue
            if any(part.supervised for part in piece.rounds):
                pieces.append(piece)
            start = stop
        if not pieces:
            raise Dropped(f"no trained round of it fits data.length={self.length}")
        return [pieces[0]._replace(cut=pieces[0].cut + lost), *pieces[1:]]

    def _example(self, rendered: Rendered, note: str) -> Example:
        ids: Ids = list(rendered.head)
        spans: list[slice] = []  # of trained tokens
        for part in rendered.rounds:
            begin = len(ids) + max(len(part.prompt) - self.tokens.trained_before, 0)
            ids += part.prompt
            ids += part.answer
            if part.supervised:
                spans.append(slice(begin, len(ids)))
        if rendered.tail and len(ids) + len(rendered.tail) <= self.length:
            ids += rendered.tail
        if ids[:2] == [self.tokens.bos] * 2 and self.tokens.bos is not None:
            raise BadRow(
                f"it begins with two {self.tokens.tokenizer.bos_token}: the text or the template "
                "already holds the one that the tokenizer puts in front"
            )
        tokens = np.array(ids, dtype=np.int32)
        following = np.full(
            len(ids) + 1, IGNORE, dtype=np.int64
        )  # each token as a label of its own
        for span in spans:
            following[span] = tokens[span]
        if self.marks is not None:
            marked = np.flatnonzero(self.marks(ids))
            following[marked] = tokens[marked]
        labels = following[1:]
        if labels.max() == IGNORE:
            raise Dropped("no token of it is supervised")
        return Example(tokens, labels, rendered.cut, note)


def reference(messages: Sequence[Message]) -> str:
    """The last answer, what a generated one is compared to; empty where there is none."""
    return messages[-1].text if messages[-1].role == "assistant" else ""


def _conversation(messages: Sequence[Message]) -> Conversation:
    system = messages[0].text if messages[0].role == "system" else ""
    rest = messages[1:] if system else messages
    turns = [
        Turn(asked.text, said.text, said.supervised, asked.role == "tool", said.metadata)
        for asked, said in zip(rest[::2], rest[1::2], strict=False)
    ]
    if len(rest) % 2:
        turns.append(Turn(rest[-1].text, None, tool=rest[-1].role == "tool"))
    return Conversation(system, tuple(turns), messages[0].context)
