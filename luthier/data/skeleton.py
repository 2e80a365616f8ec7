"""What a chat template prints around messages, where it can be told once for all rows.

Most templates copy each message into the text as it is, or without the blanks around it. Rendered with marks in the
place of the messages, such a template gives the text of every conversation with as many turns: constants, and
which message stands where. A template that looks at a message (`'</think>' in content`) has none: marks refuse every look.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache, wraps
from typing import Any, ClassVar

import jinja2
import jinja2.ext
from jinja2 import nodes
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment

# constants, and (number of a message, whether it is stripped)
Text = tuple[str | tuple[int, bool], ...]
Texts = Mapping[str, Any]  # a message, as templates see it: role and content

# a mark is the number of a message between the first two, with the third behind it where blanks are taken off
OPEN, CLOSE, BARE = "\ue0c5", "\ue0c6", "\ue0c7"
MARK = re.compile(f"{OPEN}(\\d+){CLOSE}({BARE}?)")
# what a mark may meet: nothing of it depends on the text, or the mark sees it
FILTERS = {"trim", "default", "d"}
TESTS = {"defined", "undefined", "none", "string", "mapping", "number", "boolean", "true", "false"}
WHOLE = {"length", "count", "first", "last", "list"}  # of a list of messages
# what makes plain texts of marks, so that the template could look at them unseen
UNSEEN = (nodes.AssignBlock, nodes.FilterBlock, nodes.Macro, nodes.CallBlock, nodes.Concat)
PLAIN = (int, float, type(None), jinja2.Undefined, jinja2.Environment, Context, nodes.EvalContext)


class Looked(Exception):
    """The template did with a message what may depend on its text, or what nobody could see."""


class Mark(str):
    """Stands for a message: may be joined to other texts, printed, and, alone, stripped. It is not empty."""

    __slots__ = ()

    def __add__(self, other: str) -> Mark:
        return Mark("".join((self, other)))

    def __radd__(self, other: str) -> Mark:
        return Mark("".join((other, self)))

    def __bool__(self) -> bool:
        found = MARK.fullmatch(self)
        if found is None or found[2]:  # of blanks alone nothing may be left
            raise Looked
        return True

    def strip(self, chars: str | None = None, /) -> Mark:
        found = MARK.fullmatch(self)
        if found is None or chars is not None:
            raise Looked
        return Mark(f"{OPEN}{found[1]}{CLOSE}{BARE}")


def _look(*_: Any, **__: Any) -> Any:
    raise Looked


_OF_ANY_OBJECT = {"__new__", "__init__", "__init_subclass__", "__subclasshook__", "__class__"} | {
    *("__getattribute__", "__setattr__", "__delattr__", "__doc__", "__str__")
}
for _name in set(dir(str)) - _OF_ANY_OBJECT - set(vars(Mark)):
    setattr(Mark, _name, _look)


def marked(messages: Sequence[Texts]) -> list[dict[str, Any]]:
    """The messages with marks for their texts."""
    return [{**m, "content": Mark(f"{OPEN}{i}{CLOSE}")} for i, m in enumerate(messages)]


def cut(text: str) -> Text:
    """Rendered marks -> constants and messages."""
    pieces = MARK.split(text)  # constant, number, `BARE` or nothing, constant, ...
    found: list[str | tuple[int, bool]] = [pieces[0]]
    for number, bare, constant in zip(pieces[1::3], pieces[2::3], pieces[3::3], strict=True):
        found += [(int(number), bool(bare)), constant]
    return tuple(part for part in found if part)


def fill(text: Text, contents: Sequence[str]) -> str:
    """The text of messages with these contents."""
    return "".join(
        [
            part
            if isinstance(part, str)
            else (contents[part[0]].strip() if part[1] else contents[part[0]])
            for part in text
        ]
    )


class _Generation(Extension):
    """{% generation %} ... {% endgeneration %}, which marks answers for others, prints what stands between."""

    tags: ClassVar = {"generation"}

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class _Watching(ImmutableSandboxedEnvironment):
    """As transformers renders chat templates, but that it raises `Looked` where a template looks at a `Mark`."""

    def __init__(self) -> None:
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            extensions=[_Generation, jinja2.ext.loopcontrols],
        )
        self.globals["raise_exception"] = _refuse
        for known, blind in ((self.filters, FILTERS), (self.tests, TESTS)):
            for name, run in list(known.items()):
                if name not in blind:
                    known[name] = _guarded(name, run)
        self.filters["tojson"] = _look  # of transformers it is another one

    def call(self, context: Any, function: Any, /, *args: Any, **kwargs: Any) -> Any:
        if any(map(_holds, (*args, *kwargs.values()))):
            raise Looked
        return super().call(context, function, *args, **kwargs)


@lru_cache(maxsize=8)
def watched(source: str) -> jinja2.Template | None:
    """A template that raises `Looked` where it looks at a `Mark`; None where that could not be seen."""
    environment = _Watching()
    if any(map(_hides, environment.parse(source).find_all(nodes.Node))):
        return None
    return environment.from_string(source)


def _refuse(reason: str) -> None:
    raise jinja2.TemplateError(reason)


def _hides(node: nodes.Node) -> bool:
    """Whether the template could look at a mark here unseen: made plain, or on the right side of a plain text."""
    if isinstance(
        node, nodes.CallBlock
    ):  # those of extensions, as {% generation %}, print what they hold
        return not isinstance(node.call.node, nodes.ExtensionAttribute)
    if isinstance(node, nodes.Mod):
        return isinstance(node.right, nodes.Tuple) or (
            isinstance(node.left, nodes.Const) and isinstance(node.left.value, str)
        )
    if not isinstance(node, nodes.Compare):
        return isinstance(node, UNSEEN)
    seen = (nodes.List, nodes.Tuple)  # their items are compared one by one
    left = [node.expr, *(operand.expr for operand in node.ops)]
    return any(
        o.op in ("in", "notin")
        and not isinstance(asked, nodes.Const)
        and not isinstance(o.expr, seen)
        for asked, o in zip(left, node.ops, strict=False)
    )


def _guarded(name: str, run: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(run)
    def guarded(*args: Any, **kwargs: Any) -> Any:
        given = [*args, *kwargs.values()]
        if name in WHOLE and not any(isinstance(value, Mark) for value in given):
            given = [value for value in given if not isinstance(value, (list, tuple))]
        if any(map(_holds, given)):
            raise Looked
        return run(*args, **kwargs)

    return guarded


def _holds(value: Any) -> bool:
    """Whether a mark is in it, or may be."""
    if isinstance(value, (list, tuple)):
        return any(map(_holds, value))
    if isinstance(value, dict):
        return any(map(_holds, (*value, *value.values())))
    if isinstance(value, str):
        return isinstance(value, Mark)
    return not isinstance(value, PLAIN)
