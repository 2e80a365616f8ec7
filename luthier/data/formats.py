"""A raw row -> messages with role, text, supervised or not. One registered function per format.

`FORMATS[name](row)` reads a row for training, `FORMATS[name](row, predict=True)` for prediction: then
the last answer may be missing or empty. Every answer is supervised unless the row says otherwise. A row
that does not fit raises `BadRow` with a reason that names the field. No text is added here, except the
newline that joins Alpaca's `instruction` and `input`. How messages become tokens is `encode.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, Literal, NamedTuple

from luthier.errors import Refused, suggest
from luthier.registry import Registry

Role = Literal["system", "user", "assistant", "tool", "text"]
Row = Mapping[str, Any]


class BadRow(Exception):
    """A row that cannot be used. `reason` is one clause without file and line; the reader adds those."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


class EmptyRow(BadRow):
    """A well-formed row without content: an empty question, answer or text."""


class Message(NamedTuple):
    """One turn. A list of messages is [system,] (user, assistant)..., with `tool` (what a tool said) in the
    place of later users, or one `text` (a document that is trained as a whole). `context` holds the row's
    own names for a chat template (first message only), `metadata` the tool that an answer calls."""

    role: Role
    text: str
    supervised: bool
    context: Mapping[str, Any] = MappingProxyType({})
    metadata: str = ""


FORMATS: Registry[Callable[..., list[Message]]] = Registry("data format")

# the fields a format reads, required ones first; what `data.columns` may name
FIELDS: dict[str, tuple[str, ...]] = {
    "src_tgt": ("src", "tgt", "system", "context"),
    "alpaca": ("instruction", "input", "output", "system", "history"),
    "messages": ("messages",),
    "sharegpt": ("conversations", "system"),
    "text": ("text",),
}

# first match wins: a row of `tatsu-lab/alpaca` holds `text` beside `instruction`
SIGNS = {
    "messages": "messages",
    "conversations": "sharegpt",
    "src": "src_tgt",
    "instruction": "alpaca",
    "text": "text",
}
ROLES: dict[str, Role] = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "human": "user",
    "prompter": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bing": "assistant",
    "bard": "assistant",
    "bot": "assistant",
    "model": "assistant",
    "tool": "tool",
    "observation": "tool",
}


PAIR: tuple[Role, Role] = ("user", "assistant")


def detect(row: Row) -> str:
    """The format of a row by its field names. Raises BadRow when none fits."""
    for sign, name in SIGNS.items():
        if sign in row:
            return name
    raise BadRow(
        f"no known format: the row has {_names(row)}, expected one of {', '.join(SIGNS)} "
        "(data.columns gives fields the expected names)"
    )


def rename(row: Row, columns: Mapping[str, str]) -> Row:
    """The row with the format's field names. `columns`: the format's name -> the name in the file."""
    if not columns:
        return row
    out = {name: value for name, value in row.items() if name not in columns.values()}
    return out | {name: row[source] for name, source in columns.items() if source in row}


def check_columns(columns: Mapping[str, str], name: str) -> None:
    """Refuse a `data.columns` that gives a name which the format (or, for `auto`, any format) lacks."""
    known = (
        {f for fields in FIELDS.values() for f in fields} if name == "auto" else set(FIELDS[name])
    )
    for column in columns:
        if column not in known:
            raise Refused(
                f"data.columns gives a field the name '{column}'",
                f"the format '{name}' reads: {', '.join(sorted(known))}",
                suggest(column, known),
            )


def check_sources(columns: Mapping[str, str], rows: Sequence[Row]) -> list[str]:
    """What to remark on fields of `data.columns` that none of the first rows has. Refused where they have one of the
    format's own name: it would be read in the place of the one that was asked for."""
    fields = dict.fromkeys(name for row in rows for name in row)
    missing = {name: source for name, source in columns.items() if rows and source not in fields}
    for name, source in missing.items():
        if name in fields:
            raise Refused(
                f"data.columns takes '{name}' from the field '{source}'",
                f"the first rows have no such field, but {_names(fields)}",
                suggest(source, fields) or f"to read '{name}' itself, leave it out of data.columns",
            )
    return [
        f"data.columns: the first rows have no field '{source}', from which '{name}' is taken"
        for name, source in missing.items()
    ]


@FORMATS.register("src_tgt")
def src_tgt(row: Row, *, predict: bool = False) -> list[Message]:
    """PaddleNLP's rows: `src` and `tgt`, strings or lists of equal length (one item per turn); optional
    `system` (string) and `context` (names for a chat template; its `system` is a system message too)."""
    context = row.get("context") or {}
    if not isinstance(context, Mapping):
        raise BadRow(f"field 'context' is {_kind(context)}, not an object")
    src, tgt = _strings(row, "src"), _strings(row, "tgt", optional=predict)
    if predict and len(tgt) == len(src) - 1:
        tgt.append("")
    if len(src) != len(tgt):
        raise BadRow(f"'src' has {len(src)} turns, 'tgt' has {len(tgt)}")
    _full(src, "src")
    _full(tgt[:-1] if predict else tgt, "tgt")
    turns = _pairs(zip(src, tgt, strict=True))
    system = _string(row, "system") or _string(context, "system")
    return _messages(turns, system, predict=predict, context=context)


@FORMATS.register("alpaca")
def alpaca(row: Row, *, predict: bool = False) -> list[Message]:
    """`instruction`, `output`, optional `input`, `system`, `history` (earlier [question, answer] pairs).

    The user's text is `instruction`, followed by a newline and `input` where there is one; the well-known
    English Alpaca prompt is a template and is not added.
    """
    parts = [_string(row, "instruction", needed=True), _string(row, "input")]
    question = "\n".join(part for part in parts if part)
    if not question.strip():
        raise EmptyRow("fields 'instruction' and 'input' are empty")
    history = _items(row, "history") if row.get("history") else []
    for i, pair in enumerate(history):
        pair_of_strings = isinstance(pair, (list, tuple)) and [type(t) for t in pair] == [str, str]
        if not pair_of_strings:
            raise BadRow(f"history[{i}] is not a pair of strings (question, answer)")
        _full(list(pair), f"history[{i}]")
    answer = _string(row, "output", needed=not predict)
    if not predict:
        _full([answer], "output")
    turns = _pairs([*history, (question, answer)])
    return _messages(turns, _string(row, "system"), predict=predict)


@FORMATS.register("messages")
def messages(row: Row, *, predict: bool = False) -> list[Message]:
    """OpenAI's `messages`: objects with `role` and `content` (a string, or a list of text parts).
    An assistant message with `"weight": 0` is shown to the model but not trained. With ChatGLM3, `tool` (or
    `observation`) is what a tool said, and an assistant's `metadata` the tool that it calls."""
    return _conversation(row, "messages", "role", "content", "", predict)


@FORMATS.register("sharegpt")
def sharegpt(row: Row, *, predict: bool = False) -> list[Message]:
    """`conversations`: objects with `from` (human, gpt, system and their usual aliases) and `value`;
    `role`/`content` are read too. Optional `system` beside them."""
    items = _items(row, "conversations")
    keys = (
        ("role", "content")
        if isinstance(items[0], Mapping) and "role" in items[0]
        else ("from", "value")
    )
    return _conversation(row, "conversations", *keys, _string(row, "system"), predict)


@FORMATS.register("text")
def text(row: Row, *, predict: bool = False) -> list[Message]:
    """`text`: one document; all of it is trained. In prediction it is continued."""
    value = _string(row, "text", needed=True)
    _full([value], "text")
    return [Message("text", value, True)]


def _conversation(
    row: Row, name: str, role_key: str, text_key: str, system: str, predict: bool
) -> list[Message]:
    turns: list[tuple[Role, str]] = []
    muted: set[int] = set()
    metadata: dict[int, str] = {}
    items = _items(row, name)
    for i, item in enumerate(items):
        where = f"{name}[{i}]"
        if not isinstance(item, Mapping):
            raise BadRow(f"{where} is {_kind(item)}, not an object")
        role = ROLES.get(str(item.get(role_key)).lower())
        if role is None:
            raise BadRow(_strange_role(where, role_key, item))
        if item.get("tool_calls") or item.get("function_call"):
            raise BadRow(f"{where} calls a tool: tool calls are not supported")
        content = _content(item, text_key, where)
        answer_to_come = predict and i == len(items) - 1 and role == "assistant"
        if not answer_to_come:
            _full([content], f"{where}.{text_key}")
        if role == "system" and i == 0:
            if system:
                raise BadRow(f"{where} is a system message, and the field 'system' holds another")
            system = content
            continue
        if item.get("weight", 1) == 0:
            muted.add(len(turns))
        if role == "assistant" and _string(item, "metadata"):
            metadata[len(turns)] = _string(item, "metadata")
        turns.append((role, content))
    _check_order(turns, name)
    return _messages(turns, system, predict=predict, muted=muted, metadata=metadata)


def _pairs(pairs: Iterable[Sequence[str]]) -> list[tuple[Role, str]]:
    return [(role, text) for pair in pairs for role, text in zip(PAIR, pair, strict=True)]


def _check_order(turns: list[tuple[Role, str]], name: str) -> None:
    """(user, assistant)...; a last question without an answer is left to the renderer."""
    for i, (role, _) in enumerate(turns):
        if role != PAIR[i % 2] and not (role == "tool" and i and i % 2 == 0):
            place = f"after '{turns[i - 1][0]}'" if i else "first"
            raise BadRow(f"'{name}': '{role}' comes {place}, but turns alternate user, assistant")


def _messages(
    turns: list[tuple[Role, str]],
    system: str,
    *,
    predict: bool,
    context: Mapping[str, Any] | None = None,
    muted: Iterable[int] = (),
    metadata: Mapping[int, str] | None = None,
) -> list[Message]:
    roles = [role for role, _ in turns]
    if "user" not in roles:
        raise BadRow("there is no user turn")
    if not predict and "assistant" not in roles:
        raise BadRow("there is no assistant turn, nothing to train")
    if turns[-1][0] == "assistant" and not turns[-1][1].strip():
        turns = turns[:-1]
    silent, kinds = set(muted), metadata or {}
    out = [
        Message(role, text, role == "assistant" and i not in silent, metadata=kinds.get(i, ""))
        for i, (role, text) in enumerate(turns)
    ]
    if system:
        out.insert(0, Message("system", system, False))
    if context:
        out[0] = out[0]._replace(context=dict(context))
    return out


def _strange_role(where: str, key: str, item: Mapping[str, Any]) -> str:
    if key not in item:
        return f"{where} lacks '{key}'; it has {_names(item)}"
    if str(item[key]).lower() in {"function", "function_call", "ipython"}:
        return f"{where} has the role '{item[key]}': tool turns are not supported"
    return f"{where} has the unknown role '{item[key]}'"


def _content(item: Mapping[str, Any], key: str, where: str) -> str:
    if key not in item:
        raise BadRow(f"{where} lacks '{key}'; it has {_names(item)}")
    value = item[key]
    if isinstance(value, list):
        for part in value:
            if not isinstance(part, Mapping) or not isinstance(part.get("text"), str):
                kind = part.get("type") if isinstance(part, Mapping) else _kind(part)
                raise BadRow(f"{where}.{key} holds a part of type '{kind}': only text is supported")
        return "".join(part["text"] for part in value)
    if value is None:
        return ""
    if not isinstance(value, str):
        raise BadRow(f"{where}.{key} is {_kind(value)}, not a string or a list of text parts")
    return value


def _items(row: Row, name: str) -> list[Any]:
    if name not in row:
        raise BadRow(f"field '{name}' is missing; the row has {_names(row)}")
    value = row[name]
    if not isinstance(value, (list, tuple)):
        raise BadRow(f"field '{name}' is {_kind(value)}, not a list")
    if not value:
        raise EmptyRow(f"field '{name}' is an empty list")
    return list(value)


def _strings(row: Row, name: str, *, optional: bool = False) -> list[str]:
    if optional and row.get(name) is None:
        return []
    if name not in row:
        raise BadRow(f"field '{name}' is missing; the row has {_names(row)}")
    value = row[name]
    values = list(value) if isinstance(value, (list, tuple)) else [value]
    for item in values:
        if not isinstance(item, str):
            raise BadRow(
                f"field '{name}' is or holds {_kind(item)}, not a string or a list of strings"
            )
    if not values:
        raise EmptyRow(f"field '{name}' is an empty list")
    return values


def _string(row: Row, name: str, *, needed: bool = False) -> str:
    if needed and name not in row:
        raise BadRow(f"field '{name}' is missing; the row has {_names(row)}")
    value = row.get(name)
    if value is None and not needed:
        return ""
    if not isinstance(value, str):
        raise BadRow(f"field '{name}' is {_kind(value)}, not a string")
    return value


def _full(values: list[str], name: str) -> None:
    for i, value in enumerate(values):
        if not value.strip():
            where = name if len(values) == 1 else f"{name}[{i}]"
            raise EmptyRow(f"field '{where}' is empty")


def _names(row: Mapping[str, Any]) -> str:
    return f"the fields {', '.join(map(repr, row))}" if row else "no fields"


def _kind(value: object) -> str:
    kinds = {
        type(None): "null",
        dict: "an object",
        list: "a list",
        str: "a string",
        bool: "a boolean",
    }
    return kinds.get(
        type(value), "a number" if isinstance(value, (int, float)) else type(value).__name__
    )
