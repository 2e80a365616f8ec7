"""What a chat template prints around messages, where it can be told once for all rows.

Most templates copy each message into the text as it is, or without the blanks around it. Rendered with marks in the
place of the messages, such a template gives the text of every conversation with as many turns: constants, and
which message stands where. Where a template asks whether a message holds something (`'</think>' in content`), the mark says
no, and the skeleton is for the conversations of which that is true. Marks refuse every other look: such a template has none.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache, wraps
from typing import Any, ClassVar, NamedTuple

import jinja2
import jinja2.ext
from jinja2 import nodes
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.visitor import NodeTransformer

Part = tuple[int, bool]  # number of a message, whether it is stripped
Text = tuple[str | Part, ...]  # constants, and messages
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


class Asked(NamedTuple):
    """A question to a message, whose answer is taken to be no; of `strip` and its like: whether it changes the text."""

    message: Part
    question: str  # a method of str
    words: tuple[str, ...]

    def denied(self, contents: Sequence[str]) -> bool:
        """Whether the answer is no for messages with these contents."""
        text = _text(self.message, contents)
        answer = getattr(text, self.question)(*self.words)
        return answer == text if isinstance(answer, str) else not answer


class Mark(str):
    """Stands for a message: may be joined to other texts, printed, and, alone, stripped and asked. It is not empty."""

    asked: list[Asked] | None = (
        None  # where questions are written down; a text that was joined answers none
    )

    def _ask(self, question: str, *words: object) -> None:
        found = MARK.fullmatch(self)
        if self.asked is None or found is None or not all(type(word) is str for word in words):
            raise Looked
        given = tuple(str(word) for word in words)
        self.asked.append(Asked((int(found[1]), bool(found[2])), question, given))

    def __contains__(self, text: object) -> bool:
        self._ask("__contains__", text)
        return False

    def startswith(self, text: object, /, *others: object) -> bool:
        self._ask("startswith", text, *others)
        return False

    def endswith(self, text: object, /, *others: object) -> bool:
        self._ask("endswith", text, *others)
        return False

    def lstrip(self, chars: str | None = None, /) -> Mark:
        self._ask("lstrip", *([] if chars is None else [chars]))
        return self

    def rstrip(self, chars: str | None = None, /) -> Mark:
        self._ask("rstrip", *([] if chars is None else [chars]))
        return self

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
        if chars is not None:
            self._ask("strip", chars)
            return self
        if (found := MARK.fullmatch(self)) is None:
            raise Looked
        return _mark(f"{OPEN}{found[1]}{CLOSE}{BARE}", self.asked)


def _look(*_: Any, **__: Any) -> Any:
    raise Looked


_OF_ANY_OBJECT = {"__new__", "__init__", "__init_subclass__", "__subclasshook__", "__class__"} | {
    *("__getattribute__", "__setattr__", "__delattr__", "__doc__", "__str__")
}
for _name in set(dir(str)) - _OF_ANY_OBJECT - set(vars(Mark)):
    setattr(Mark, _name, _look)


def _mark(text: str, asked: list[Asked] | None) -> Mark:
    mark = Mark(text)
    mark.asked = asked
    return mark


def marked(messages: Sequence[Texts], asked: list[Asked]) -> list[dict[str, Any]]:
    """The messages with marks for their texts, which write into `asked` what they were asked."""
    return [{**m, "content": _mark(f"{OPEN}{i}{CLOSE}", asked)} for i, m in enumerate(messages)]


def cut(text: str) -> Text:
    """Rendered marks -> constants and messages."""
    pieces = MARK.split(text)  # constant, number, `BARE` or nothing, constant, ...
    found: list[str | Part] = [pieces[0]]
    for number, bare, constant in zip(pieces[1::3], pieces[2::3], pieces[3::3], strict=True):
        found += [(int(number), bool(bare)), constant]
    return tuple(part for part in found if part)


def fill(text: Text, contents: Sequence[str]) -> str:
    """The text of messages with these contents."""
    return "".join([part if isinstance(part, str) else _text(part, contents) for part in text])


def _text(part: Part, contents: Sequence[str]) -> str:
    number, bare = part
    return contents[number].strip() if bare else contents[number]


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
        self.tests["in"] = _in

    def call(self, context: Any, function: Any, /, *args: Any, **kwargs: Any) -> Any:
        # names of the template's own, for functions that ask for its context
        given = [
            value for name, value in kwargs.items() if name not in ("_loop_vars", "_block_vars")
        ]
        if any(map(_holds, (*args, *given))):
            raise Looked
        return super().call(context, function, *args, **kwargs)


@lru_cache(maxsize=8)
def watched(source: str) -> jinja2.Template | None:
    """A template that raises `Looked` where it looks at a `Mark` in another way than by asking; None where that could
    not be seen."""
    environment = _Watching()
    tree = _Tests().visit(environment.parse(source))
    return None if any(map(_hides, tree.find_all(nodes.Node))) else environment.from_string(tree)


class _Tests(NodeTransformer):
    """`a in b` -> `a is in(b)`: a test can be watched, of Python's `in` a text on the right side says nothing."""

    def visit_Compare(self, node: nodes.Compare) -> nodes.Expr:
        self.generic_visit(node)
        if [o.op for o in node.ops] not in (["in"], ["notin"]):
            return node
        at: dict[str, Any] = {"lineno": node.lineno, "environment": node.environment}
        found = nodes.Test(node.expr, "in", [node.ops[0].expr], [], None, None, **at)
        return found if node.ops[0].op == "in" else nodes.Not(found, **at)


def _in(value: Any, where: Any) -> bool:
    if isinstance(value, Mark) and not isinstance(where, (list, tuple)):
        raise Looked
    return value in where  # marks say it themselves, as the whole and as an item


def _refuse(reason: str) -> None:
    raise jinja2.TemplateError(reason)


def _hides(node: nodes.Node) -> bool:
    """Whether the template could look at a mark here unseen: made plain, or on the right side of a plain text."""
    if isinstance(node, nodes.Mod):
        return isinstance(node.right, nodes.Tuple) or (
            isinstance(node.left, nodes.Const) and isinstance(node.left.value, str)
        )
    if isinstance(node, nodes.Compare):  # of several: `_Tests` turned the others
        return any(o.op in ("in", "notin") for o in node.ops)
    return isinstance(node, UNSEEN)


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
