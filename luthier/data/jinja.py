"""Hugging Face chat templates (Jinja): the tokenizer's own or a file.

An answer is found by rendering the conversation up to its prompt and up to its end: no search for text
or marks in the result. Each piece between is tokenised apart, in training and prediction alike.
"""

from __future__ import annotations

import datetime
import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import jinja2
from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import _compile_jinja_template

from luthier.data.formats import BadRow
from luthier.data.tokens import Tokens
from luthier.data.truncation import cut_answer, cut_source
from luthier.data.turns import Conversation, Rendered, Round, Template, check_lost, system_message
from luthier.errors import Refused

CLOCK = datetime.date(2024, 7, 26)  # what `strftime_now` of a template shows, so that runs repeat
ANSWER = "7Zq3"  # a text that no template prints by itself
LAST_ONLY = "only the last answer is trained: its prompt rewrites earlier turns"


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
        messages = system_message(conversation)
        context = {k: v for k, v in conversation.context.items() if k != "system"}
        done, stable, pieces = "", True, []
        prompt = answer = whole = ""
        turns = conversation.turns[start:stop]
        for turn in turns:
            messages.append({"role": "user", "content": turn.user})
            prompt = whole = self._text(messages, True, context)
            stable = stable and prompt.startswith(done)
            answer = ""
            if turn.answer is not None:
                messages.append({"role": "assistant", "content": turn.answer})
                whole = self._text(messages, False, context)
                answer = self._answer(prompt, whole)
            pieces.append((prompt[len(done) :], answer, turn.supervised))
            done = prompt + answer
        check_lost(messages, whole, "the chat template")
        note = ""
        if not stable:
            note = LAST_ONLY if any(turn.supervised for turn in turns[:-1]) else ""
            pieces = [(prompt, answer, turns[-1].supervised)]
        rounds = tuple(
            Round((self.tokens.after if i else self.tokens)(p), self.tokens.after(a), supervised)
            for i, (p, a, supervised) in enumerate(pieces)
        )
        return Rendered(rounds, [], self.tokens.after(whole[len(prompt + answer) :]), 0, note)

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
        return replace(rendered, rounds=(replace(only, prompt=prompt, answer=answer),))

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
            if self._special is not None and not context:
                # what apply_chat_template does with plain strings, without the copies that it makes first
                return _compile_jinja_template(self.source).render(
                    messages=messages,
                    tools=None,
                    documents=None,
                    add_generation_prompt=to_answer,
                    **self._special,
                )
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
