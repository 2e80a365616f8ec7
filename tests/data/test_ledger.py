"""Every input row has one end, the numbers add up, and data that teaches nothing is refused by row."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from small_data import config, random_rows, renderer, write_lines

from luthier.data.dataset import Dataset, prepare
from luthier.data.encode import Renderer
from luthier.data.ledger import MAX_ENTRIES, Ledger, Record
from luthier.errors import Failed, Refused

Read = Callable[..., Dataset]


@pytest.fixture
def read(tiny_tokenizer: Callable[[], Any], tmp_path: Path) -> Read:
    """`read(rows, split="train", **data)`: the data set of rows written to a file."""

    def run(rows: list[Any], **data: Any) -> Dataset:
        settings = config(write_lines(tmp_path / "rows.jsonl", rows), template="none", **data)
        found = prepare(settings, renderer(tiny_tokenizer(), settings), "train")
        assert isinstance(found, Dataset)
        return found

    return run


GOOD = {"src": "what", "tgt": "the ring"}
EMPTY = {"src": "what", "tgt": "  "}
LONG = {"src": "what", "tgt": "x" * 100}


def test_each_end_is_booked_with_its_row(read: Read) -> None:
    data = read(
        [GOOD, EMPTY, LONG, GOOD, {"src": "y" * 100, "tgt": "a"}], source_length=70, length=64
    )
    ledger = data.ledger
    assert ledger.rows == {"used": 2, "cut": 1, "dropped": 2, "invalid": 0}
    told = ledger.to_dict()
    assert told["rows"] == {"read": 5, **ledger.rows}
    assert [(e["row"], e["status"]) for e in told["entries"]] == [
        (1, "dropped"),
        (2, "cut"),
        (4, "dropped"),
    ]
    empty, cut, _ = told["entries"]
    assert empty["place"].endswith("rows.jsonl:2") and empty["reason"] == "field 'tgt' is empty"
    assert cut["tokens_cut"] == ledger.num_cut > 0 and cut["examples"] == [1, 1]
    assert told["entries_left_out"] == 0
    assert json.loads(json.dumps(told)) == told
    ledger.reconcile(5)


def test_the_counts_are_those_of_the_arrays(read: Read) -> None:
    data = read([*random_rows(50), LONG, EMPTY])
    assert data.ledger.num_examples == len(data) == 51
    assert data.ledger.num_tokens == len(data.ids) == int(data.lengths.sum())
    assert data.ledger.num_supervised == int((data.labels != -100).sum())
    assert data.ledger.num_ended == 50
    assert data.ledger.unended == [f"{data.source.name}:51"]


def test_rows_that_become_several_examples_are_listed(read: Read) -> None:
    text = {"text": " ".join(["the"] * 100)}
    data = read([text, {"text": "ring"}], overlong="split")
    (entry,) = data.ledger.to_dict()["entries"]
    assert entry["status"] == "used" and entry["examples"] == [0, len(data) - 1]
    assert data.ledger.rows["used"] == 2
    assert data.rows.tolist() == [0] * (len(data) - 1) + [1]


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ([GOOD, {"src": ["a", "b"], "tgt": ["c"]}], "rows.jsonl:2: 'src' has 2 turns, 'tgt' has 1"),
        ([GOOD, {"question": "a"}], "rows.jsonl:2: field 'src' is missing"),
        ([GOOD, [1]], "rows.jsonl:2: the row is list"),
        ([{"question": "a"}], "rows.jsonl:1: no known format"),
        ([EMPTY, EMPTY], "no row of 2 is usable: 2 x field 'tgt' is empty (first "),
        ([LONG, LONG], "no answer ends in a trained end token (first: "),
    ],
    ids=["turns", "fields", "list", "format", "empty", "unended"],
)
def test_data_that_cannot_be_trained_is_refused(read: Read, rows: list[Any], said: str) -> None:
    with pytest.raises(Refused) as caught:
        read(rows)
    assert said in str(caught.value)
    assert "rows.jsonl:" in str(caught.value)


def test_several_invalid_rows_are_named_and_counted(read: Read) -> None:
    with pytest.raises(
        Refused, match=r"5 rows of 6 .*jsonl:2: .*jsonl:3: .*jsonl:4: .*; and 2 more"
    ):
        read([GOOD, *[{"src": "a"}] * 5])


def test_malformed_json_is_refused_with_line_and_column(
    tmp_path: Path, tiny_tokenizer: Callable[[], Any]
) -> None:
    path = write_lines(tmp_path / "rows.jsonl", [GOOD, GOOD])
    path.write_text(path.read_text("utf-8") + '{"src": "a" "tgt": "b"}\n', "utf-8")
    settings = config(path)
    with pytest.raises(Refused, match=r"rows\.jsonl:3:13: malformed JSON"):
        prepare(settings, renderer(tiny_tokenizer(), settings), "train")


@pytest.mark.parametrize(
    ("overlong", "ends"),
    [("cut", "cut"), ("drop", "dropped"), ("split", "used"), ("refuse", None)],
)
def test_overlong_rows_under_each_policy(read: Read, overlong: str, ends: str | None) -> None:
    rows = [{"text": "ring"}, {"text": "x" * 100}]
    if ends is None:
        with pytest.raises(Refused, match=r"rows\.jsonl:2: .* more than data\.length=64"):
            read(rows, overlong=overlong)
        return
    data = read(rows, overlong=overlong)
    assert data.ledger.rows[ends] == (2 if ends == "used" else 1)
    assert max(data.lengths) <= 64


def test_an_untrained_end_token_is_refused(
    tmp_path: Path, tiny_tokenizer: Callable[[], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A renderer that never trains EOS must not get through."""
    original = Renderer.encode

    def untrained(self: Renderer, messages: Any) -> Any:
        out = []
        for example in original(self, messages):
            labels = example.labels.copy()
            labels[labels == self.tokens.eos] = -100
            out.append(replace(example, labels=labels))
        return out

    monkeypatch.setattr(Renderer, "encode", untrained)
    settings = config(write_lines(tmp_path / "rows.jsonl", [GOOD]), template="none")
    with pytest.raises(Refused, match=r"no answer ends in a trained end token .*jsonl:1"):
        prepare(settings, renderer(tiny_tokenizer(), settings), "train")


@pytest.mark.parametrize("wrong", ["shifted", "prompt"])
def test_wrong_supervision_is_caught_before_training(
    wrong: str, tmp_path: Path, tiny_tokenizer: Callable[[], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    original = Renderer.encode

    def broken(self: Renderer, messages: Any) -> Any:
        out = []
        for example in original(self, messages):
            ids, labels = example.input_ids, example.labels.copy()
            if wrong == "prompt":
                labels[:-1] = ids[1:]
            else:
                labels[:-1] = labels[1:]
            out.append(replace(example, labels=labels))
        return out

    monkeypatch.setattr(Renderer, "encode", broken)
    settings = config(write_lines(tmp_path / "rows.jsonl", [GOOD]), template="none")
    with pytest.raises(
        Failed, match="trained spans begin at" if wrong == "prompt" else "not the next token"
    ):
        prepare(settings, renderer(tiny_tokenizer(), settings), "train")


def random_record(draw: random.Random, row: int) -> Record:
    match draw.choice(["used", "cut", "dropped"]):
        case "dropped":
            return Record(row, f"f:{row}", "dropped", f"reason {draw.randint(0, 9)} of n")
        case "cut":
            return Record(
                row, f"f:{row}", "cut", cut=3, num_examples=1, num_tokens=9, num_supervised=4
            )
        case _:
            count = draw.randint(1, 2)
            return Record(
                row,
                f"f:{row}",
                "used",
                num_examples=count,
                num_tokens=8,
                num_supervised=5,
                ended=True,
            )


def test_merging_ledgers_equals_booking_all_rows_in_one() -> None:
    draw = random.Random(0)
    records = [random_record(draw, i) for i in range(7000)]
    whole, merged = Ledger("train", "f"), Ledger("train", "f")
    for record in records:
        whole.add(record)
    for i in range(0, 7000, 700):
        piece = Ledger("train", "f")
        for record in records[i : i + 700]:
            piece.add(record)
        merged.merge(piece)
    assert merged == whole
    whole.reconcile(7000)
    assert whole.left_out > 0 and len(whole.entries) == 3 * MAX_ENTRIES
    restored = Ledger("train", "f")
    restored.restore(json.loads(json.dumps(whole.snapshot())))
    assert restored == whole


def test_reasons_that_differ_in_a_number_are_one() -> None:
    ledger = Ledger("train", "f")
    for i in range(3):
        ledger.add(Record(i, f"f:{i + 1}", "dropped", f"{i + 70} tokens are too many"))
    assert ledger.reasons == {"dropped": {"n tokens are too many": 3}}
    assert "3 x n tokens are too many (first f:1)" in ledger.summary()
    assert ledger.entries[2]["reason"] == "72 tokens are too many"


@pytest.mark.parametrize("lost", ["row", "reason", "entry", "example"])
def test_a_ledger_that_does_not_add_up_is_an_error(lost: str) -> None:
    ledger = Ledger("train", "f")
    draw = random.Random(1)
    for i in range(30):
        ledger.add(random_record(draw, i))
    ledger.reconcile(30)
    match lost:
        case "row":
            ledger.rows["used"] -= 1
        case "reason":
            ledger.reasons["dropped"].popitem()
        case "entry":
            ledger.entries.pop()
        case "example":
            ledger.num_examples = 1
    with pytest.raises(Failed, match="the ledger of the train rows"):
        ledger.reconcile(30)


def test_the_summary_says_what_happened(read: Read) -> None:
    text = read([GOOD, EMPTY, LONG]).ledger.summary()
    assert "3 rows of" in text and "1 used, 1 cut (" in text and "1 dropped, 0 invalid" in text
    assert "1 of 2 answers end in a trained end token" in text
    assert "note: " in text and "format src_tgt, recognised by its field names" in text
