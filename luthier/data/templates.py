"""No template, PaddleNLP's chat_template.json, and the choice among all templates.

Prompts are tokenised apart from answers and in the same pieces for training and prediction: equal
prompts have equal ids. The contract is in `turns.py`, Hugging Face's templates are in `jinja.py`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

import jinja2
from jinja2.sandbox import ImmutableSandboxedEnvironment

from luthier.data.formats import BadRow
from luthier.data.infilling import Infilling, Roles
from luthier.data.jinja import Jinja
from luthier.data.tokens import Tokens, has_own_prompts
from luthier.data.truncation import cut_answer, cut_source, fit_rounds
from luthier.data.turns import (
    Conversation,
    Rendered,
    Round,
    Template,
    check_lost,
    system_message,
)
from luthier.errors import Refused


class Plain(Template):
    """No template: prompt with the tokenizer's special tokens, answer without, EOS.

    Several turns follow each other in the same way, special tokens before the first only, all answers
    supervised. A system message stands in front of the first prompt, with a newline between.
    """

    notes: tuple[str, ...] = ()
    end_id: int | None = None

    def __init__(self, tokens: Tokens, length: int, source_length: int | None) -> None:
        self.tokens, self.length, self.source_length = tokens, length, source_length
        if tokens.eos is None:
            raise Refused(
                "data.template is none: answers end in the tokenizer's EOS token",
                "this tokenizer has none",
                "set eos_token in the model's tokenizer_config.json, or give a data.template",
            )

    def render(self, conversation: Conversation, start: int, stop: int) -> Rendered:
        rounds, cut = [], 0
        for i, turn in enumerate(conversation.turns[start:stop]):
            text = turn.user
            if i == 0 and conversation.system:
                text = f"{conversation.system}\n{text}"
            ids, prefix = self.tokens(text), [] if i else self.tokens.prefix
            prompt = cut_source(ids, self.source_length, prefix, self.tokens.suffix)
            cut += len(ids) + len(prefix) + len(self.tokens.suffix) - len(prompt)
            answer = [] if turn.answer is None else self.tokens.ended(turn.answer)
            rounds.append(Round(prompt, answer, turn.supervised))
        return Rendered(tuple(rounds), [], [], cut)

    def shorten(self, conversation: Conversation, turn: int, rendered: Rendered) -> Rendered:
        (only,) = rendered.rounds
        prompt = only.prompt
        if conversation.turns[turn].answer is None:
            bare = prompt[len(self.tokens.prefix) : len(prompt) - len(self.tokens.suffix)]
            prompt = cut_source(bare, self.length, self.tokens.prefix, self.tokens.suffix)
        answer = cut_answer(only.answer, self.length - len(prompt))
        return rendered._replace(rounds=(only._replace(prompt=prompt, answer=answer),))


class PaddleNLP(Template):
    """`chat_template.json`: {"system": ..., "conversation": [user, bot], "query": ...}.

    `query` is the prompt in training too: it must be the beginning of the two conversation templates
    together. No special token is added; an end-of-turn token has to stand in the bot's template.
    """

    notes: tuple[str, ...] = ()
    end_id: int | None = None

    def __init__(
        self, tokens: Tokens, parts: Mapping[str, Any], length: int, source_length: int | None
    ) -> None:
        self.tokens, self.length, self.source_length = tokens, length, source_length
        self.system: str = parts.get("system") or ""
        self.user, self.bot = parts["conversation"]
        self.query: str = parts.get("query") or ""
        for source in (self.system, self.user, self.bot, self.query):
            try:
                _compiled(source)
            except jinja2.TemplateSyntaxError as error:
                raise Refused("reading chat_template.json", f"in {source!r}: {error}") from error
        if match := tokens.first_control(self.bot.rpartition("}}")[2]):
            self.end_id = tokens.tokenizer.convert_tokens_to_ids(match[0])

    def render(self, conversation: Conversation, start: int, stop: int) -> Rendered:
        names: dict[str, Any] = {**conversation.context, "is_training": True}
        if conversation.system:
            names["system"] = conversation.system
        whole = head = _fill(self.system, names)
        messages, rounds = system_message(conversation), []
        for i in range(start, stop):
            turn = conversation.turns[i]
            answer = turn.answer or ""
            names |= {"index": i, "is_first": i == 0, "is_last": i == len(conversation.turns) - 1}
            names |= {"user": turn.user, "query": turn.user, "bot": answer}
            asked, said = _fill(self.user, names), _fill(self.bot, names)
            prompt = _fill(self.query, names) if self.query else asked
            messages.append({"role": "user", "content": turn.user})
            whole += prompt
            if turn.answer is None:
                rounds.append(Round(self.tokens(prompt), []))
                continue
            if not (asked + said).startswith(prompt):
                raise Refused(
                    "asking in prediction what was trained",
                    f"chat_template.json prints {prompt!r} for its query, but {asked + said!r} in training",
                    "make `query` the beginning of the two `conversation` templates together",
                )
            rest = (asked + said)[len(prompt) :]
            messages.append({"role": "assistant", "content": answer})
            whole += rest
            rounds.append(Round(self.tokens(prompt), self.tokens(rest), turn.supervised))
        check_lost(messages, whole, "chat_template.json")
        return Rendered(tuple(rounds), self.tokens(head) if head else [], [])

    def shorten(self, conversation: Conversation, turn: int, rendered: Rendered) -> Rendered:
        """The suite's rule: the question's *first* tokens are kept."""
        (only,) = rendered.rounds
        limit = self.source_length
        if conversation.turns[turn].answer is None:
            limit = min(limit or self.length, self.length)
        ((prompt, answer),) = fit_rounds(
            len(rendered.head), [(only.prompt, only.answer)], limit, self.length
        )
        return rendered._replace(rounds=(only._replace(prompt=prompt, answer=answer),))


def choose(template: str, tokens: Tokens, length: int, source_length: int | None) -> Template:
    """The template that `data.template` names: auto, none, or a file. Raises Refused."""
    if has_own_prompts(tokens.tokenizer):
        if template not in ("auto", "none"):
            raise Refused(
                f"data.template={template} with a {type(tokens.tokenizer).__name__}",
                "no chat template can print the special tokens of this family",
                "use data.template=auto (the family's own prompts) or none",
            )
        if template == "auto" and getattr(tokens.tokenizer, "roles", False):
            return Roles(tokens, length, source_length)
        return Infilling(tokens, length, source_length, rounds=template == "auto")
    if template == "none":
        return Plain(tokens, length, source_length)
    if template == "auto":
        if not tokens.tokenizer.chat_template:
            return Plain(tokens, length, source_length)
        return Jinja(tokens, tokens.tokenizer.get_chat_template(), length, source_length)
    source = _read(Path(template))
    if not isinstance(source, str):
        return PaddleNLP(tokens, source, length, source_length)
    return Jinja(tokens, source, length, source_length)


def _read(path: Path) -> str | dict[str, Any]:
    """A Jinja source, or the parts of a PaddleNLP template."""
    asked = f"data.template={path}"
    try:
        text = path.read_text("utf-8")
        if path.suffix != ".json":
            return text
        parts = json.loads(text)
    except OSError as error:
        raise Refused(asked, f"{error.strerror}", "auto, none, or a file") from error
    except ValueError as error:
        raise Refused(asked, f"the file cannot be read: {error}") from error
    if isinstance(parts, dict) and isinstance(parts.get("chat_template"), str):
        return parts["chat_template"]  # transformers' own file of that name
    pair = parts.get("conversation") if isinstance(parts, dict) else None
    texts = (
        [*pair, parts.get("system") or "", parts.get("query") or ""]
        if isinstance(pair, list)
        else [0]
    )
    if len(texts) != 4 or not all(isinstance(text, str) for text in texts):
        raise Refused(
            asked,
            "the file is no chat template",
            'PaddleNLP\'s has the form {"system": text, "conversation": [user text, bot text], "query": text}',
        )
    return parts


class _Missing(jinja2.Undefined):
    """A name that the row does not give: false in a condition, an error when printed."""

    __str__ = jinja2.Undefined._fail_with_undefined_error


@lru_cache(maxsize=64)
def _compiled(source: str) -> jinja2.Template:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True, undefined=_Missing
    )
    return environment.from_string(source)


def _fill(source: str, names: Mapping[str, Any]) -> str:
    try:
        return _compiled(source).render(names)
    except (jinja2.TemplateError, TypeError) as error:
        raise BadRow(
            f"chat_template.json: {error} (names come from the row's 'context')"
        ) from error
