"""What templates make of a conversation: rounds of ids, each known to be prompt or answer when it is made.

The contract that all templates fulfil, and the check that none loses a message. The templates are in
`templates.py` and `jinja.py`; which rounds are kept is decided by `encode.py`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Protocol

from luthier.data.truncation import Ids
from luthier.errors import Refused


class Turn(NamedTuple):
    """A question and its answer; None is the answer that is to be generated. `tool`: the question is what a
    tool said; `metadata`: the tool that the answer calls."""

    user: str
    answer: str | None
    supervised: bool = True
    tool: bool = False
    metadata: str = ""


class Conversation(NamedTuple):
    system: str
    turns: tuple[Turn, ...]
    context: Mapping[str, Any]


class Round(NamedTuple):
    """Ids of one prompt and its answer with the end-of-turn token; `supervised`: the answer is trained."""

    prompt: Ids
    answer: Ids
    supervised: bool = True


class Rendered(NamedTuple):
    """`head` + rounds + `tail`. `tail` is what a template prints behind the last end-of-turn token; it
    is dropped where it does not fit. `cut` counts tokens lost already, `note` is for the ledger."""

    rounds: tuple[Round, ...]
    head: Ids
    tail: Ids
    cut: int = 0
    note: str = ""

    @property
    def size(self) -> int:
        return len(self.head) + sum(len(r.prompt) + len(r.answer) for r in self.rounds)


class Template(Protocol):
    notes: tuple[str, ...]
    end_id: int | None  # the token that ends an answer, where the template has its own
    source_length: int | None
    tools: bool = False  # whether it has a place for what tools are asked and say

    def said(self, text: str) -> str:
        """The answer in a generated text."""
        return text

    def render(self, conversation: Conversation, start: int, stop: int) -> Rendered:
        """Turns `start` to `stop` with the system message; raises BadRow, or Refused for lost text."""
        ...

    def shorten(self, conversation: Conversation, turn: int, rendered: Rendered) -> Rendered:
        """One turn, already rendered and longer than `length`, cut to fit; its answer may come out empty."""
        ...


def system_message(conversation: Conversation) -> list[dict[str, str]]:
    text = conversation.system
    return [{"role": "system", "content": text}] if text else []


def check_lost(messages: Sequence[Mapping[str, str]], whole: str, what: str) -> None:
    """Refuse a template that leaves a message out. Of earlier answers it may drop the thinking."""
    squeezed = ""
    for i, message in enumerate(messages):
        text = message["content"]
        if message["role"] == "assistant" and i < len(messages) - 1:
            text = text.rpartition("</think>")[2]
        if text.strip() in whole:
            continue
        squeezed = squeezed or "".join(whole.split())
        if "".join(text.split()) not in squeezed:
            raise Refused(
                f"rendering a conversation with {what}",
                f"it drops the {message['role']} message {text.strip()[:60]!r}",
                "give data.template a template that prints it, or leave the message out of the data",
            )
