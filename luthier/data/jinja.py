"""Hugging Face chat templates (Jinja): the tokenizer's own or a file.

An answer is found by rendering the conversation up to its prompt and up to its end: no search for text
or marks in the result. Each piece between is tokenised apart, in training and prediction alike.
"""

from __future__ import annotations

import datetime
import re
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import jinja2
from transformers import PreTrainedTokenizerBase

from luthier.data.formats import BadRow
from luthier.data.skeleton import Asked, Looked, cut, fill, marked, watched
from luthier.data.tokens import Tokens
from luthier.data.truncation import cut_answer, cut_source
from luthier.data.turns import Conversation, Rendered, Round, Template, check_lost, system_message
from luthier.errors import Refused

CLOCK = datetime.date(2024, 7, 26)  # what `strftime_now` of a template shows, so that runs repeat
ANSWER = "7Zq3"  # a text that no template prints by itself
LAST_ONLY = "only the last answer is trained: its prompt rewrites earlier turns"


class _Pieces(NamedTuple):
    """Prompt and answer of each turn and what stands behind the last; `stable`: no prompt rewrites earlier turns.
    Texts, or skeletons of them."""

    rounds: list[tuple[Any, Any]]
    tail: Any
    stable: bool


class Jinja(Template):
    """A Hugging Face chat template. An answer is what the template prints after the prompt with its
    generation prompt, up to and including its end-of-turn token; what it prints behind is context."""

    def __init__(self, tokens: Tokens, source: str, length: int, source_length: int | None) -> None:
        self.tokens, self.length, self.source_length = tokens, length, source_length
        notes = []
        if "strftime_now" in source:
            notes.append(
                f"the chat template prints today's date; here it is always {CLOCK}, so that runs repeat"
            )
        self.source = re.sub(
            r"strftime_now\(\s*(['\"])(.*?)\1\s*\)",
            lambda call: repr(CLOCK.strftime(call[2])),
            source,
        )
        known = tokens.tokenizer
        own = type(known).apply_chat_template is not PreTrainedTokenizerBase.apply_chat_template
        self._special = None if own else dict(known.special_tokens_map)
        self._skeletons: dict[tuple[int, str], tuple[_Pieces, tuple[Asked, ...]] | None] = {}
        self._proved: set[tuple[int, str]] = set()
        try:
            question = [{"role": "user", "content": "Q"}]
            prompt = self._text(question, True)
            full = self._text([*question, {"role": "assistant", "content": ANSWER}], False)
        except jinja2.TemplateSyntaxError as error:
            raise Refused("reading the chat template", f"line {error.lineno}: {error}") from error
        except BadRow as error:
            raise Refused("rendering one question and answer", error.reason) from error
        self.tail, self.end_id = "", None
        ending = full.rpartition(ANSWER)[2]
        if match := tokens.first_control(ending):
            self.tail = ending[match.end() :]
            self.end_id = tokens.tokenizer.convert_tokens_to_ids(match[0])
        if tokens.prefix and tokens(prompt)[: len(tokens.prefix)] != tokens.prefix:
            start = tokens.decode(tokens.prefix, special=True)
            notes.append(
                f"the chat template does not begin with {start!r}, as this tokenizer's text does"
            )
        self.notes = tuple(notes)

    def render(self, conversation: Conversation, start: int, stop: int) -> Rendered:
        turns = conversation.turns[start:stop]
        messages = system_message(conversation)
        for turn in turns:
            messages.append({"role": "user", "content": turn.user})
            if turn.answer is not None:
                messages.append({"role": "assistant", "content": turn.answer})
        context = {k: v for k, v in conversation.context.items() if k != "system"}
        found = self._filled(messages) if not context else None
        if found is None:
            found = self._pieces(messages, partial(self._text, context=context))
        note, supervised = "", [turn.supervised for turn in turns]
        if not found.stable:
            note = LAST_ONLY if any(supervised[:-1]) else ""
            supervised = supervised[-1:]
        rounds = tuple(
            Round((self.tokens.after if i else self.tokens)(p), self.tokens.after(a), trained)
            for i, ((p, a), trained) in enumerate(zip(found.rounds, supervised, strict=True))
        )
        return Rendered(rounds, [], self.tokens.after(found.tail), 0, note)

    def _pieces(
        self, messages: list[dict[str, str]], text: Callable[[list[dict[str, str]], bool], str]
    ) -> _Pieces:
        """Prompt and answer of each turn, as `text` renders them; of the last one alone where a prompt rewrites
        earlier turns."""
        done, stable, rounds = "", True, []
        prompt = answer = whole = ""
        for i, message in enumerate(messages):
            if message["role"] != "user":
                continue
            prompt = whole = text(messages[: i + 1], True)
            stable = stable and prompt.startswith(done)
            answer = ""
            if i + 1 < len(messages):
                whole = text(messages[: i + 2], False)
                answer = self._answer(prompt, whole)
            rounds.append((prompt[len(done) :], answer))
            done = prompt + answer
        plain = [{**message, "content": str(message["content"])} for message in messages]
        check_lost(plain, whole, "the chat template")
        return _Pieces(
            rounds if stable else [(prompt, answer)], whole[len(prompt + answer) :], stable
        )

    def _filled(self, messages: list[dict[str, str]]) -> _Pieces | None:
        """`_pieces`, from a skeleton that the first conversation proved; None where the template has none of these."""
        if self._special is None:
            return None
        key = len(messages), messages[0]["role"]  # after the first one they alternate
        if key not in self._skeletons:
            self._skeletons[key] = self._skeleton(messages)
        found = self._skeletons[key]
        contents = [message["content"] for message in messages]
        if found is None or not all(contents):
            return None
        skeleton, asked = found
        if not all(question.denied(contents) for question in asked):
            return None
        rounds = [(fill(p, contents), fill(a, contents)) for p, a in skeleton.rounds]
        filled = _Pieces(rounds, fill(skeleton.tail, contents), True)
        if key not in self._proved:
            if filled != self._pieces(messages, self._text):
                self._skeletons[key] = None
                return None
            self._proved.add(key)
        return filled

    def _skeleton(self, messages: list[dict[str, str]]) -> tuple[_Pieces, tuple[Asked, ...]] | None:
        """That of conversations with these roles, and what must be false of them."""
        asked: list[Asked] = []
        try:
            if (template := watched(self.source)) is None:
                return None
            names = {"tools": None, "documents": None, **(self._special or {})}
            found = self._pieces(
                marked(messages, asked),
                lambda some, to_answer: template.render(
                    messages=some, add_generation_prompt=to_answer, **names
                ),
            )
        except (Looked, Refused, jinja2.TemplateError, TypeError):
            return None  # each row has its own error
        rounds = [(cut(p), cut(a)) for p, a in found.rounds]
        # an answer could end, of itself, in what is taken off behind it
        ends = [a[-1] if isinstance(a[-1], str) else "" for _, a in rounds if a]
        if not found.stable or any(len(end) < len(self.tail) for end in ends):
            return None
        return _Pieces(rounds, cut(found.tail), True), tuple(dict.fromkeys(asked))

    def shorten(self, conversation: Conversation, turn: int, rendered: Rendered) -> Rendered:
        """The oldest tokens of the question are lost; system, headers and generation prompt survive."""
        (only,) = rendered.rounds
        prompt, limit = only.prompt, self.source_length
        if conversation.turns[turn].answer is None:
            limit = min(limit or self.length, self.length)
        if limit is not None and len(prompt) > limit:
            question = conversation.turns[turn].user
            messages = [*system_message(conversation), {"role": "user", "content": question}]
            context = {k: v for k, v in conversation.context.items() if k != "system"}
            before, found, behind = self._text(messages, True, context).rpartition(question.strip())
            prompt = cut_source(
                self.tokens.after(found), limit, self.tokens(before), self.tokens.after(behind)
            )
        answer = cut_answer(only.answer, self.length - len(prompt))
        return rendered._replace(rounds=(only._replace(prompt=prompt, answer=answer),))

    def _answer(self, prompt: str, full: str) -> str:
        if not full.startswith(prompt):
            raise Refused(
                "training on what the chat template prints for an answer",
                f"its generation prompt ends in {prompt[-40:]!r}, with which its answers do not begin",
                "give data.template a file whose generation prompt is the beginning of an assistant turn",
            )
        rest = full[len(prompt) :]
        return rest.removesuffix(self.tail) if self.tail else rest

    def _text(
        self,
        messages: list[dict[str, str]],
        to_answer: bool,
        context: Mapping[str, Any] | None = None,
    ) -> str:
        if taken := RESERVED & set(context or {}):
            raise BadRow(
                f"'context' holds {sorted(taken)}, names that the chat template needs itself"
            )
        try:
            return self.tokens.tokenizer.apply_chat_template(
                messages,
                chat_template=self.source,
                add_generation_prompt=to_answer,
                tokenize=False,
                **(context or {}),
            )
        except jinja2.TemplateSyntaxError:
            raise
        except (jinja2.TemplateError, TypeError) as error:
            raise BadRow(f"the chat template says: {error}") from error


# names of apply_chat_template's own arguments
RESERVED = {"conversation", "messages", "tools", "documents", "chat_template", "tokenize"} | {
    "add_generation_prompt",
    "continue_final_message",
    "sanitize_control_tokens",
    "padding",
    "truncation",
    "max_length",
    "return_tensors",
    "return_dict",
    "return_assistant_tokens_mask",
    "tokenizer_kwargs",
}
