"""Every format: what it reads, and the reason it gives for a row that it cannot read."""

from __future__ import annotations

from typing import Any

import pytest

from luthier.data.formats import (
    FIELDS,
    FORMATS,
    SIGNS,
    BadRow,
    EmptyRow,
    check_columns,
    detect,
    rename,
)
from luthier.errors import Refused

U, A, S = "user", "assistant", "system"

GOOD: list[tuple[str, dict[str, Any], list[tuple[str, str]]]] = [
    ("src_tgt", {"src": "q", "tgt": "a"}, [(U, "q"), (A, "a")]),
    (
        "src_tgt",
        {"src": ["q", "r"], "tgt": ["a", "b"], "system": "s", "id": 7},
        [(S, "s"), (U, "q"), (A, "a"), (U, "r"), (A, "b")],
    ),
    (
        "src_tgt",
        {"src": "q", "tgt": "a", "context": {"system": "s", "x": 1}},
        [(S, "s"), (U, "q"), (A, "a")],
    ),
    ("alpaca", {"instruction": "i", "input": "", "output": "o"}, [(U, "i"), (A, "o")]),
    ("alpaca", {"instruction": "i", "input": None, "output": "o"}, [(U, "i"), (A, "o")]),
    (
        "alpaca",
        {
            "instruction": "i",
            "input": "n",
            "output": "o",
            "system": "s",
            "history": [["q", "a"]],
            "text": "all of it",
        },
        [(S, "s"), (U, "q"), (A, "a"), (U, "i\nn"), (A, "o")],
    ),
    (
        "messages",
        {
            "messages": [
                {"role": "developer", "content": "s"},
                {
                    "role": "user",
                    "content": [{"type": "text", "text": "q"}, {"type": "text", "text": "r"}],
                },
                {"role": "assistant", "content": "a", "tool_calls": None},
            ]
        },
        [(S, "s"), (U, "qr"), (A, "a")],
    ),
    (
        "sharegpt",
        {
            "conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}],
            "system": "s",
        },
        [(S, "s"), (U, "q"), (A, "a")],
    ),
    (
        "sharegpt",
        {
            "conversations": [
                {"role": "System", "content": "s"},
                {"role": "user", "content": "q"},
                {"role": "bot", "content": "a"},
                {"role": "user", "content": "unanswered"},
            ]
        },
        [(S, "s"), (U, "q"), (A, "a"), (U, "unanswered")],
    ),
    ("text", {"text": "t"}, [("text", "t")]),
]


@pytest.mark.parametrize(("name", "row", "expected"), GOOD)
def test_rows(name: str, row: dict[str, Any], expected: list[tuple[str, str]]) -> None:
    assert detect(row) == name
    messages = FORMATS[name](row)
    assert [(m.role, m.text) for m in messages] == expected
    assert [m.supervised for m in messages] == [m.role in (A, "text") for m in messages]


def test_weight_zero_is_not_trained() -> None:
    turns = [(U, "q", 1), (A, "a", 0), (U, "r", 1), (A, "b", 1)]
    row = {"messages": [{"role": r, "content": c, "weight": w} for r, c, w in turns]}
    assert [m.supervised for m in FORMATS["messages"](row)] == [False, False, False, True]


def test_context_travels_with_the_first_message() -> None:
    messages = FORMATS["src_tgt"]({"src": "q", "tgt": "a", "context": {"system": "s", "x": 1}})
    assert [m.context for m in messages] == [{"system": "s", "x": 1}, {}, {}]


def chat(*turns: tuple[str, Any], key: str = "role") -> dict[str, Any]:
    return {"messages": [{key: role, "content": content} for role, content in turns]}


BAD: list[tuple[str, dict[str, Any], str]] = [
    ("src_tgt", {"src": "q"}, r"field 'tgt' is missing; the row has the fields 'src'"),
    ("src_tgt", {}, r"field 'src' is missing; the row has no fields"),
    ("src_tgt", {"src": ["q", "r"], "tgt": ["a"]}, r"'src' has 2 turns, 'tgt' has 1"),
    ("src_tgt", {"src": ["q", "r"], "tgt": "a"}, r"'src' has 2 turns, 'tgt' has 1"),
    ("src_tgt", {"src": 3, "tgt": "a"}, r"field 'src' is or holds a number"),
    ("src_tgt", {"src": ["q", None], "tgt": ["a", "b"]}, r"field 'src' is or holds null"),
    ("src_tgt", {"src": "q", "tgt": " \n"}, r"field 'tgt' is empty"),
    ("src_tgt", {"src": ["q", ""], "tgt": ["a", "b"]}, r"field 'src\[1\]' is empty"),
    ("src_tgt", {"src": [], "tgt": []}, r"field 'src' is an empty list"),
    ("src_tgt", {"src": "q", "tgt": "a", "context": "c"}, r"'context' is a string, not an object"),
    ("alpaca", {"instruction": "i"}, r"field 'output' is missing"),
    ("alpaca", {"output": "o"}, r"field 'instruction' is missing"),
    ("alpaca", {"instruction": "", "output": "o"}, r"'instruction' and 'input' are empty"),
    ("alpaca", {"instruction": "i", "output": ""}, r"field 'output' is empty"),
    ("alpaca", {"instruction": "i", "output": ["o"]}, r"'output' is a list, not a string"),
    (
        "alpaca",
        {"instruction": "i", "output": "o", "history": ["q"]},
        r"history\[0\] is not a pair",
    ),
    ("messages", {"messages": "hello"}, r"'messages' is a string, not a list"),
    ("messages", {"messages": []}, r"'messages' is an empty list"),
    ("messages", {"messages": ["hello"]}, r"messages\[0\] is a string, not an object"),
    ("messages", chat((U, "q"), ("tool", "t")), "'tool' comes after 'user'"),
    (
        "messages",
        chat((U, "q"), ("ipython", "t")),
        r"messages\[1\] has the role 'ipython': tool turns",
    ),
    ("messages", chat((U, "q"), ("critic", "t")), r"messages\[1\] has the unknown role 'critic'"),
    ("messages", chat((U, "q"), key="who"), r"messages\[0\] lacks 'role'; it has .*'who'"),
    ("messages", {"messages": [{"role": U}]}, r"messages\[0\] lacks 'content'"),
    ("messages", chat((U, 5)), r"messages\[0\].content is a number"),
    ("messages", chat((U, [{"type": "image_url"}])), r"a part of type 'image_url': only text"),
    ("messages", chat((U, "q"), (A, "")), r"field 'messages\[1\].content' is empty"),
    ("messages", chat((U, "q")), r"no assistant turn"),
    ("messages", chat((A, "a"), (U, "q")), r"'assistant' comes first, but turns alternate"),
    ("messages", chat((U, "q"), (U, "r"), (A, "a")), r"'user' comes after 'user'"),
    ("messages", chat((U, "q"), (S, "s"), (A, "a")), r"'system' comes after 'user'"),
    ("messages", chat((S, "s")), r"no user turn"),
    (
        "messages",
        {"messages": [{"role": A, "content": None, "tool_calls": [{"id": 1}]}]},
        r"messages\[0\] calls a tool",
    ),
    (
        "sharegpt",
        {"conversations": [{"from": "observation", "value": "x"}]},
        "'tool' comes first, but turns alternate",
    ),
    (
        "sharegpt",
        {"conversations": [{"from": "system", "value": "x"}], "system": "y"},
        r"the field 'system' holds another",
    ),
    ("text", {"text": None}, r"field 'text' is null, not a string"),
    ("text", {"text": ""}, r"field 'text' is empty"),
    ("text", {"body": "t"}, r"field 'text' is missing; the row has the fields 'body'"),
]


@pytest.mark.parametrize(("name", "row", "reason"), BAD)
def test_bad_rows(name: str, row: dict[str, Any], reason: str) -> None:
    with pytest.raises(BadRow, match=reason) as caught:
        FORMATS[name](row)
    assert isinstance(caught.value, EmptyRow) == ("empty" in reason)


@pytest.mark.parametrize(
    ("name", "row"),
    [
        ("src_tgt", {"src": "q"}),
        ("src_tgt", {"src": "q", "tgt": ""}),
        ("src_tgt", {"src": "q", "tgt": None}),
        ("alpaca", {"instruction": "q"}),
        ("alpaca", {"instruction": "q", "output": None}),
        ("messages", chat((U, "q"))),
        ("messages", chat((U, "q"), (A, ""))),
        ("messages", chat((U, "q"), (A, None))),
        ("sharegpt", {"conversations": [{"from": "human", "value": "q"}]}),
    ],
)
def test_prediction_needs_no_answer(name: str, row: dict[str, Any]) -> None:
    assert [(m.role, m.text) for m in FORMATS[name](row, predict=True)] == [(U, "q")]
    if name != "messages" and name != "sharegpt":
        with pytest.raises(BadRow):
            FORMATS[name](row)


def test_prediction_after_earlier_turns() -> None:
    messages = FORMATS["src_tgt"]({"src": ["q", "r"], "tgt": ["a"]}, predict=True)
    assert [(m.role, m.text) for m in messages] == [(U, "q"), (A, "a"), (U, "r")]
    with pytest.raises(BadRow, match="'src' has 3 turns, 'tgt' has 1"):
        FORMATS["src_tgt"]({"src": ["q", "r", "s"], "tgt": ["a"]}, predict=True)


def test_unknown_fields_are_named() -> None:
    with pytest.raises(BadRow, match=r"'content', 'summary'.*data\.columns"):
        detect({"content": "q", "summary": "a"})


def test_columns() -> None:
    columns = {"src": "content", "tgt": "summary"}
    assert rename({"content": "q", "summary": "a", "id": 1}, columns) == {
        "src": "q",
        "tgt": "a",
        "id": 1,
    }
    assert rename({"src": "a", "tgt": "q"}, {"src": "tgt", "tgt": "src"}) == {
        "src": "q",
        "tgt": "a",
    }
    assert rename({"content": "q"}, columns) == {"src": "q"}
    check_columns(columns, "src_tgt")
    check_columns(columns, "auto")
    with pytest.raises(Refused, match=r"'source'.*did you mean 'src'"):
        check_columns({"source": "content"}, "src_tgt")
    with pytest.raises(Refused, match="reads: conversations, system"):
        check_columns({"src": "content"}, "sharegpt")


def test_every_format_can_be_detected_and_renamed() -> None:
    assert set(SIGNS.values()) == set(FIELDS) == set(FORMATS)
