"""Prompts of families whose special tokens cannot be written as text: ChatGLM, ChatGLM2, ChatGLM3 and GLM.

No chat template can make such prompts. Their tokenizers carry what is needed (`OwnPrompts`), and `Infilling`
is their template for `data.template=auto` and `none`; ChatGLM3's for `auto` is `Roles`. In the former a conversation is one prompt with the earlier rounds
inside, and its last answer, as in the families' own training. Where blanks and contexts stand, and so the
positions, is known to the tokenizer (`document_positions`); `loader.py` puts them into batches.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from luthier.data.jinja import LAST_ONLY
from luthier.data.tokens import Tokens
from luthier.data.truncation import Ids, cut_answer, cut_source
from luthier.data.turns import Conversation, Rendered, Round, Template, Turn

UNUSED = (
    "the tokenizer's chat template is not used: it cannot print this family's special tokens; "
    "prompts are those of its original code"
)


class OwnPrompts(Protocol):
    """A tokenizer with prompts of its own (`tokens.has_own_prompts`).

    `stop_ids`: the first one ends an answer. `trained_before`: how many tokens at the end of a prompt are
    trained with the answer. `blank_ids`: tokens that stand for the answer inside of a text; cutting
    must not lose them. `prompt_notes`: remarks for the user. Families with two position axes also have
    `document_positions`, from ids [n] to positions [2, n].
    """

    stop_ids: Sequence[int]
    trained_before: int
    blank_ids: Sequence[int]
    prompt_notes: Sequence[str]

    def build_prompt(self, query: str, history: Sequence[tuple[str, str]] = ()) -> str:
        """The text of a question after the (question, answer) rounds of `history`."""
        ...

    def special_ids_around(self, ids: Sequence[int]) -> tuple[list[int], list[int]]:
        """Special ids before and behind the ids of a prompt's text; the answer follows them."""
        ...


class Infilling(Template):
    """A prompt of the family, and the last answer. With `rounds` several turns are written as the family's chat
    is, otherwise as lines. A system message stands in front, with a newline between."""

    def __init__(
        self, tokens: Tokens, length: int, source_length: int | None, *, rounds: bool
    ) -> None:
        self.tokens, self.length, self.source_length = tokens, length, source_length
        self.own: OwnPrompts = tokens.tokenizer
        self.rounds = rounds
        self.end_id: int | None = self.own.stop_ids[0]
        self.notes = tuple(self.own.prompt_notes) if rounds else ()
        if rounds and tokens.tokenizer.chat_template:
            self.notes += (UNUSED,)

    def render(self, conversation: Conversation, start: int, stop: int) -> Rendered:
        *earlier, asked = conversation.turns[start:stop]
        ids = self._text(conversation, start, stop)
        prompt = self._prompt(ids, self.source_length)
        answer = [] if asked.answer is None else self.tokens.ended(asked.answer)
        cut = len(self._prompt(ids, None)) - len(prompt)
        note = LAST_ONLY if any(turn.supervised for turn in earlier) else ""
        return Rendered((Round(prompt, answer, asked.supervised),), [], [], cut, note)

    def shorten(self, conversation: Conversation, turn: int, rendered: Rendered) -> Rendered:
        (only,) = rendered.rounds
        prompt = only.prompt
        if conversation.turns[turn].answer is None:
            prompt = self._prompt(self._text(conversation, turn, turn + 1), self.length)
        answer = cut_answer(only.answer, self.length - len(prompt))
        return rendered._replace(rounds=(only._replace(prompt=prompt, answer=answer),))

    def _text(self, conversation: Conversation, start: int, stop: int) -> Ids:
        """Ids of the prompt's text of turns `start` to `stop`, whose last answer is left out."""
        *earlier, asked = conversation.turns[start:stop]
        history = [(turn.user, turn.answer or "") for turn in earlier]
        if self.rounds:
            text = self.own.build_prompt(asked.user, history)
        else:
            text = "\n".join([*(part for pair in history for part in pair), asked.user])
        return self.tokens(f"{conversation.system}\n{text}" if conversation.system else text)

    def _prompt(self, ids: Ids, limit: int | None) -> Ids:
        """With special ids, in at most `limit` tokens: the oldest are lost, but neither these nor a blank."""
        before, behind = self.own.special_ids_around(ids)
        if limit is None:
            return [*before, *ids, *behind]
        blanks = [i for i, token in enumerate(ids) if token in self.own.blank_ids]
        room = max(limit - len(before) - len(behind), 1 if blanks else 0)
        start = min(max(len(ids) - room, 0), *blanks[:1], len(ids))
        return [*before, *ids[start : start + room], *behind]


class Roles(Template):
    """ChatGLM3's conversation: each message behind the token of its role, every answer trained.

    An answer begins with the tool that it calls, mostly none, and a newline. It ends with the token of the next
    role, the last one with the end of the text: what the original code trains, and stops at.
    """

    tools = True

    def __init__(self, tokens: Tokens, length: int, source_length: int | None) -> None:
        self.tokens, self.length, self.source_length = tokens, length, source_length
        self.own: Any = tokens.tokenizer
        self.end_id: int | None = self.own.stop_ids[0]
        self.notes = ()
        if tokens.tokenizer.chat_template:
            self.notes = (UNUSED,)

    def said(self, text: str) -> str:
        tool, newline, rest = text.partition("\n")
        return rest.strip() if newline and not tool.strip() else text

    def render(self, conversation: Conversation, start: int, stop: int) -> Rendered:
        turns = conversation.turns[start:stop]
        rounds = []
        for i, turn in enumerate(turns):
            # behind an answer the role's token is there already
            asked = self._message(_role(turn), turn.user)[1 if i else 0 :]
            prompt = [*self._head(conversation), *asked] if i == 0 else asked
            prompt = [*prompt, self.own.get_command("<|assistant|>")]
            answer: Ids = []
            if turn.answer is not None:
                last = i + 1 == len(turns)
                end = self.own.stop_ids[0] if last else self._opening(_role(turns[i + 1]))
                answer = [*self._message("assistant", turn.answer, turn.metadata)[1:], end]
            rounds.append(Round(prompt, answer, turn.supervised))
        return Rendered(tuple(rounds), [], [])

    def shorten(self, conversation: Conversation, turn: int, rendered: Rendered) -> Rendered:
        """The oldest tokens of the question are lost; system message and special tokens survive."""
        (only,) = rendered.rounds
        asked, limit = conversation.turns[turn], self.source_length
        if asked.answer is None:
            limit = min(limit or self.length, self.length)
        bare = self._message(_role(asked), "")
        before, behind = [*self._head(conversation), *bare], only.prompt[-1:]
        prompt = cut_source(self.tokens(asked.user), limit, before, behind)
        answer = cut_answer(only.answer, self.length - len(prompt))
        return rendered._replace(rounds=(only._replace(prompt=prompt, answer=answer),))

    def _head(self, conversation: Conversation) -> Ids:
        before, _ = self.own.special_ids_around([])
        system = conversation.system
        return [*before, *(self._message("system", system) if system else [])]

    def _opening(self, role: str) -> int:
        return self.own.get_command(f"<|{role}|>")

    def _message(self, role: str, text: str, metadata: str = "") -> Ids:
        return [self._opening(role), *self.tokens(f"{metadata}\n"), *self.tokens(text)]


def _role(turn: Turn) -> str:
    return "observation" if turn.tool else "user"
