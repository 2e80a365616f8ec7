"""Batches, their order, and going on from any step: equal to an uninterrupted run, in memory and lazily."""

from __future__ import annotations

import itertools
import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from small_data import config, random_rows, renderer, write_lines

from luthier.assemble import Data, expected_steps
from luthier.batch import IGNORE, PADDING, TENSORS, Batch
from luthier.data.dataset import SAMPLE_ROWS, Dataset, Encoder, LazyDataset, Outcome, prepare
from luthier.data.ledger import Ledger, Record
from luthier.data.loader import Loader, collate, evaluation_batches
from luthier.data.packing import Method
from luthier.data.workers import Workers
from luthier.errors import Failed, Refused
from luthier.train.plan import Plan

Open = Callable[..., Loader]
METHODS: tuple[Method, ...] = ("none", "sequential", "greedy", "best")
ROWS = random_rows(90)


@pytest.fixture
def prepared(tiny_tokenizer: Callable[[], Any], tmp_path: Path) -> Callable[..., Any]:
    """`prepared(rows or path or parts, split="train", **data)`."""
    numbers = itertools.count()

    def run(rows: Any, split: Any = "train", *, limit: int | None = None, **data: Any) -> Any:
        path = rows
        if isinstance(rows, list) and "path" not in rows[0]:
            path = write_lines(tmp_path / f"rows{next(numbers)}.jsonl", rows)
        settings = config(path, template="none", rows=limit, **data)
        return prepare(settings, renderer(tiny_tokenizer(), settings), split)

    return run


@pytest.fixture
def opened(prepared: Callable[..., Any]) -> Iterator[Open]:
    """`opened(rows, packing=..., batch=..., ...)`: a loader."""
    made: list[Loader] = []

    def run(
        rows: Any = ROWS,
        *,
        packing: Method = "best",
        batch: int = 4,
        micro_batch: int = 2,
        seed: int = 3,
        shuffle: bool = True,
        **data: Any,
    ) -> Loader:
        dataset = rows if isinstance(rows, (Dataset, LazyDataset)) else prepared(rows, **data)
        loader = Loader(
            dataset,
            batch=batch,
            micro_batch=micro_batch,
            pad_id=0,
            seed=seed,
            length=64,
            packing=packing,
            shuffle=shuffle,
        )
        made.append(loader)
        return loader

    yield run
    for loader in made:
        loader.close()


def take(loader: Loader, number: int) -> list[list[Batch]]:
    return list(itertools.islice(loader.step_batches(), number))


def epochs(loader: Loader, number: int = 1) -> list[list[Batch]]:
    """The steps up to the end of `number` more epochs."""
    until, out = loader.epoch + number, []
    for step in loader.step_batches():
        out.append(step)
        if loader.epoch == until:
            break
    return out


def documents(steps: list[list[Batch]]) -> list[tuple[int, ...]]:
    """The tokens of all documents, in order."""
    out = []
    for batch in itertools.chain(*steps):
        for row in range(len(batch.rows)):
            ids = batch.document_ids[row]
            for d in range(int(ids.max()) + 1):
                out.append(tuple(batch.input_ids[row][ids == d].tolist()))
    return out


def rows_in(steps: list[list[Batch]]) -> list[tuple[int, list[int]]]:
    """Serial number and tokens of every row, without padding."""
    return [
        (serial, batch.input_ids[r][batch.document_ids[r] != PADDING].tolist())
        for batch in itertools.chain(*steps)
        for r, serial in enumerate(batch.rows)
    ]


def same(a: list[list[Batch]], b: list[list[Batch]]) -> bool:
    if [len(step) for step in a] != [len(step) for step in b]:
        return False
    pairs = zip(itertools.chain(*a), itertools.chain(*b), strict=True)
    return all(
        x.rows == y.rows and all(torch.equal(getattr(x, n), getattr(y, n)) for n in TENSORS)
        for x, y in pairs
    )


# ---- one batch


def test_collate_makes_the_four_tensors() -> None:
    ids, labels = np.array([5, 6, 7]), np.array([IGNORE, 7, IGNORE])
    batch = collate([[(ids, labels), (ids[:2], labels[2:].repeat(2))], [(ids, labels)]], 9, first=4)
    assert batch.input_ids.tolist() == [[5, 6, 7, 5, 6], [5, 6, 7, 9, 9]]
    assert batch.labels.tolist() == [[-100, 7, -100, -100, -100], [-100, 7, -100, -100, -100]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 0, 1], [0, 1, 2, 0, 0]]
    assert batch.document_ids.tolist() == [[0, 0, 0, 1, 1], [0, 0, 0, -1, -1]]
    assert batch.rows == (4, 5)
    assert {getattr(batch, name).dtype for name in TENSORS} == {torch.int64}


@pytest.mark.parametrize("labels", [[6, IGNORE, IGNORE], [7, IGNORE, IGNORE], [IGNORE, 7, 5]])
def test_a_label_that_is_not_the_next_token_never_reaches_training(labels: list[int]) -> None:
    rows = [[(np.array([5, 6, 7]), np.array(labels))]]
    if labels[0] == 6:
        collate(rows, 0)
        return
    with pytest.raises(Failed, match="not the next token of their document"):
        collate(rows, 0)


@pytest.mark.parametrize("lazy", [False, True])
@pytest.mark.parametrize("packing", METHODS)
def test_every_example_once_per_epoch_in_rows_that_fit(
    opened: Open, prepared: Callable[..., Any], packing: Method, lazy: bool
) -> None:
    loader = opened(packing=packing, lazy=lazy)
    data = prepared(ROWS)
    wanted = Counter(tuple(data.example(i)[0].tolist()) for i in range(len(data)))
    seen = []
    for epoch in range(3):
        steps = epochs(loader)
        assert Counter(documents(steps)) == wanted
        seen.append(documents(steps))
        rows = [row for step in steps for batch in step for row in batch.rows]
        first = 0 if epoch == 0 else last + 1  # noqa: F821
        assert rows == list(range(first, first + len(rows)))
        last = rows[-1]  # noqa: F841
        for step in steps:
            sizes = [len(batch.rows) for batch in step]
            assert sum(sizes) <= 4 and max(sizes) <= 2
            for batch in step:
                fill = (batch.document_ids != PADDING).sum(1)
                assert batch.input_ids.shape[1] == fill.max() <= 64
        assert all(sum(len(b.rows) for b in step) == 4 for step in steps[:-1])
    assert seen[0] != seen[1] != seen[2]


def test_the_rows_of_an_epoch_are_packed_in_data_order_before_the_shuffle(opened: Open) -> None:
    ordered = epochs(opened(packing="sequential", shuffle=False))
    shuffled = epochs(opened(packing="sequential"))
    texts = [tokens for _, tokens in rows_in(ordered)]
    assert sorted(tokens for _, tokens in rows_in(shuffled)) == sorted(texts)
    assert [tokens for _, tokens in rows_in(shuffled)] != texts
    assert documents(ordered) == documents(epochs(opened(packing="none", shuffle=False)))


@pytest.mark.parametrize("lazy", [False, True])
def test_order_depends_on_the_seed_but_not_on_micro_batch_or_workers(
    opened: Open, lazy: bool
) -> None:
    plain = rows_in(epochs(opened(lazy=lazy), 2))
    assert rows_in(epochs(opened(lazy=lazy, micro_batch=1), 2)) == plain
    assert rows_in(epochs(opened(lazy=lazy, micro_batch=4), 2)) == plain
    assert rows_in(epochs(opened(lazy=lazy, workers=2), 2)) == plain
    assert rows_in(epochs(opened(lazy=lazy, seed=4), 2)) != plain


def test_lazy_order_does_not_depend_on_how_rows_are_fetched(
    opened: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = rows_in(epochs(opened(lazy=True), 2))
    monkeypatch.setattr("luthier.data.streaming.CHUNK_ROWS", 7)
    monkeypatch.setattr("luthier.data.loader.STEPS_AHEAD", 1)
    assert rows_in(epochs(opened(lazy=True), 2)) == plain


def test_many_rows_are_encoded_in_processes_with_the_same_result(
    prepared: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    one = prepared(random_rows(300), workers=0)
    monkeypatch.setattr("luthier.data.dataset.WORTH_SECONDS", 0.0)
    started = []
    begin = Workers.__init__
    monkeypatch.setattr(
        Workers, "__init__", lambda self, e, n: (started.append(n), begin(self, e, n))[1]
    )
    two = prepared(random_rows(300), workers=2)
    assert started == [2]
    assert all(np.array_equal(getattr(one, n), getattr(two, n)) for n in ("ids", "labels", "rows"))
    assert one.ledger.rows == two.ledger.rows


def test_progress_is_told(
    prepared: Callable[..., Any], tiny_tokenizer: Any, tmp_path: Path
) -> None:
    settings = config(write_lines(tmp_path / "p.jsonl", random_rows(150)), template="none")
    told: list[tuple[int, int]] = []
    prepare(settings, renderer(tiny_tokenizer(), settings), "train", lambda *n: told.append(n))
    assert told[-1] == (150, 150) and sorted(told) == told


# ---- steps and positions


def test_counts_of_steps(opened: Open) -> None:
    loader = opened(packing="none", batch=8)
    assert (loader.num_rows, loader.steps_per_epoch) == (90, 12)
    assert [loader.steps_in(e) for e in (1, 2, 0.5, 1.01, 3)] == [12, 24, 6, 13, 36]
    steps = take(loader, 12)
    assert [sum(len(b.rows) for b in step) for step in steps] == [8] * 11 + [2]
    assert loader.epoch == 1
    lazy = opened(lazy=True)
    assert (lazy.num_rows, lazy.steps_per_epoch, lazy.steps_in(3)) == (None, None, None)


def test_parts_of_an_epoch_are_counted_as_decimal_numbers(opened: Open) -> None:
    loader = opened(packing="none", batch=9)
    assert loader.steps_per_epoch == 10
    wanted = {1.1: 11, 2.2: 22, 1.3: 13, 3.1: 31, 1.11: 12, 0.3: 3, 0.1 * 3: 3, 2 / 3: 7, 1e-9: 1}
    assert {epochs: loader.steps_in(epochs) for epochs in wanted} == wanted


@pytest.mark.parametrize("packing", METHODS)
@pytest.mark.parametrize("kind", ["memory", "lazy", "mixture", "lazy mixture"])
@pytest.mark.parametrize("number", [5, 200, 900])
def test_the_length_of_a_run_of_tokens_is_foreseen(
    opened: Open, tmp_path: Path, packing: Method, kind: str, number: int
) -> None:
    """Steps that the rate is laid over against those in which the tokens are really read."""
    rows: Any = [*random_rows(number), *[{"src": "x", "tgt": " "}] * (number // 5)]
    if "mixture" in kind:  # few long rows drawn over and over, and many short ones
        long = write_lines(tmp_path / "a.jsonl", [{"src": "b", "tgt": "the ring of " * 5}] * 4)
        short = write_lines(tmp_path / "b.jsonl", rows)
        rows = [{"path": str(long), "weight": 3}, {"path": str(short), "weight": 1}]
    loader = opened(rows, packing=packing, lazy="lazy" in kind)
    steps = epochs(loader)
    tokens = sum(batch.num_real_tokens for batch in itertools.chain(*steps))
    train = config("x", lazy=True).train.model_copy(update={"steps": None, "tokens": tokens})
    settings = config("x").model_copy(update={"train": train})
    data = Data(loader.dataset, loader, None)
    told = expected_steps(settings, data, Plan(tokens=tokens))
    if kind in ("memory", "mixture") or (number < SAMPLE_ROWS / 1.2 and packing == "none"):
        assert told == len(steps)
    else:  # the sample is drawn, and packed in another order
        assert told == pytest.approx(len(steps), rel=0.1, abs=1)


@pytest.mark.parametrize("kind", ["memory", "lazy", "mixture", "lazy mixture", "lazy split"])
@pytest.mark.parametrize("packing", METHODS)
def test_going_on_from_every_step_equals_not_stopping(
    opened: Open,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    packing: Method,
    kind: str,
) -> None:
    monkeypatch.setattr("luthier.data.packing.STREAM_BUFFER", 13)
    monkeypatch.setattr("luthier.data.packing.GREEDY_BUFFER", 11)
    rows: Any = [*random_rows(30), {"src": "x", "tgt": " "}, *random_rows(5, seed=8)]
    extra: dict[str, Any] = {"lazy": "lazy" in kind}
    if "mixture" in kind:
        a = write_lines(tmp_path / "a.jsonl", rows)
        b = write_lines(tmp_path / "b.jsonl", random_rows(9, seed=5))
        rows = [{"path": str(a), "weight": 2}, {"path": str(b), "weight": 1}]
    if "split" in kind:
        rows = [{"text": " ".join(["the", "ring"] * n)} for n in range(1, 60, 3)]
        extra["overlong"] = "split"
    if "mixture" not in kind:
        rows = write_lines(tmp_path / "c.jsonl", rows)
    whole = opened(rows, packing=packing, **extra)
    states, steps = [], []
    for step in whole.step_batches():
        steps.append(step)
        states.append(json.loads(json.dumps(whole.state())))
        if whole.epoch == 2:
            break
    assert whole.dataset.ledger.num_rows == len(whole.dataset.source)
    for i in range(0, len(steps) - 1, 1 if len(steps) < 30 else 5):
        again = opened(rows, packing=packing, **extra)
        again.load_state(states[i])
        assert again.state() == states[i]
        rest = steps[i + 1 :]
        # stopped and continued once more on the way
        assert same([*take(again, 1), *take(again, len(rest) - 1)], rest)
        assert again.state() == states[-1]
        assert again.dataset.ledger.to_dict() == whole.dataset.ledger.to_dict()


def test_a_ledger_is_copied_where_it_changed_not_at_every_step(
    opened: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("luthier.data.packing.STREAM_BUFFER", 12)
    loader = opened(random_rows(36), lazy=True, packing="none")
    copied, copy = [], Ledger.snapshot
    monkeypatch.setattr(Ledger, "snapshot", lambda own: copied.append(own) or copy(own))
    steps = 0
    for _ in loader.step_batches():
        loader.state()
        steps += 1
        if loader.epoch == 3:
            break
    assert len(copied) <= 3 + 3 < steps  # at both ends of a buffer, in the first epoch alone


def test_a_position_in_memory_is_found_without_going_through_the_steps(
    opened: Open, prepared: Callable[..., Any]
) -> None:
    data = prepared(ROWS)
    whole = opened(data, packing="none")
    steps = take(whole, 40)
    far = opened(data, packing="none")
    far.load_state({**far.state(), "position": {"epoch": 1, "step": 15, "serial": 150}})
    reads: list[int] = []
    original = type(data).example
    object.__setattr__(data, "example", lambda i: (reads.append(i), original(data, i))[1])
    assert same(take(far, 1), [steps[38]])
    assert len(reads) <= 4 * 4  # this step and the ones read ahead


def test_the_state_is_that_of_the_step_handed_out_not_of_what_was_read_ahead(opened: Open) -> None:
    for lazy in (False, True):
        loader = opened(lazy=lazy)
        iterator = loader.step_batches()
        before = loader.state()
        first = loader.peek()
        time.sleep(0.3)
        assert loader.state() == before
        assert same([next(iterator)], [first])
        assert loader.state() != before
        assert loader.state()["position"]["serial"] == 4


def test_a_loaded_state_forgets_what_was_read_ahead(opened: Open) -> None:
    for lazy in (False, True):
        whole = take(opened(lazy=lazy), 4)
        loader = opened(lazy=lazy)
        start = loader.state()
        take(loader, 2)
        loader.peek()
        loader.load_state(start)
        assert same(take(loader, 4), whole)


def test_iterating_again_goes_on(opened: Open) -> None:
    for lazy in (False, True):
        whole = take(opened(lazy=lazy), 6)
        loader = opened(lazy=lazy)
        assert same([*take(loader, 2), *take(loader, 1), *take(loader, 3)], whole)


def test_a_state_of_other_data_is_refused(opened: Open) -> None:
    for lazy in (False, True):
        state = opened(lazy=lazy).state()
        with pytest.raises(Refused, match="the data has changed since"):
            opened(random_rows(89), lazy=lazy).load_state(state)


@pytest.mark.parametrize("lazy", [False, True])
def test_a_state_is_refused_when_rows_lie_as_before_but_say_something_else(
    opened: Open, lazy: bool
) -> None:
    def talk(**extra: Any) -> list[Any]:
        turns = [("user", "the"), ("assistant", "ring"), ("user", "of"), ("assistant", "a")]
        messages: list[dict[str, Any]] = [{"role": r, "content": c} for r, c in turns]
        messages[1] |= extra
        return [{"messages": messages}] * 9

    state = opened(talk(), lazy=lazy).state()
    opened(talk(), lazy=lazy).load_state(state)
    with pytest.raises(Refused, match="the data has changed since"):
        opened(talk(content="tone"), lazy=lazy).load_state(state)
    with pytest.raises(Refused, match="the data has changed since"):  # the same ids, other labels
        opened(talk(weight=0), lazy=lazy).load_state(state)


def test_a_state_is_refused_when_the_same_tokens_are_other_examples(opened: Open) -> None:
    state = opened().state()
    data = opened().dataset
    assert isinstance(data, Dataset)
    offsets = data.offsets.copy()
    offsets[1] += 1
    with pytest.raises(Refused, match="the data has changed since"):
        opened(replace(data, offsets=offsets)).load_state(state)


def test_errors_in_the_background_reach_the_caller(
    opened: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    loader = opened()

    def fail(*_: Any) -> None:
        raise Failed("checking", "broken")

    monkeypatch.setattr("luthier.data.collate.check_labels", fail)
    with pytest.raises(Failed, match="broken"):
        take(loader, 1)


# ---- lazy data


def test_a_bad_row_stops_a_lazy_run_with_its_place(opened: Open, tmp_path: Path) -> None:
    rows: list[Any] = random_rows(400)
    path = write_lines(tmp_path / "rows.jsonl", rows)
    lines = path.read_text("utf-8").splitlines(keepends=True)
    tried = np.linspace(0, 399, SAMPLE_ROWS, dtype=int)
    bad = next(i for i in range(50, 400) if i not in tried)
    lines[bad] = lines[bad].replace('"tgt"', '"tat"')
    path.write_text("".join(lines), "utf-8")
    loader = opened(path, lazy=True)
    with pytest.raises(Failed, match=rf"rows\.jsonl:{bad + 1}.* field 'tgt' is missing.*resume"):
        epochs(loader)


def test_lazy_data_is_tried_before_the_run(prepared: Callable[..., Any]) -> None:
    with pytest.raises(Refused, match=r"field 'tgt' is missing"):
        prepared([{"src": "a"}] * 50, lazy=True)


def test_a_lazy_epoch_without_usable_rows_stops(
    opened: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    loader = opened(lazy=True)
    dropped = Outcome(Record(0, "f:1", "dropped", "too long"))
    monkeypatch.setattr(Encoder, "outcome", lambda *_: dropped)
    with pytest.raises(Failed, match="not one of its rows is usable"):
        take(loader, 1)


def test_lazy_reading_holds_little(opened: Open, tmp_path: Path) -> None:
    """Memory while streaming does not grow with the file: 40 MB of text, measured from the first step on."""
    import tracemalloc

    path = tmp_path / "big.jsonl"
    line = json.dumps({"text": "ring " * 8, "pad": "x" * 4000}) + "\n"
    path.write_text(line * 10_000)
    loader = opened(path, lazy=True, packing="greedy", batch=8)
    iterator = loader.step_batches()
    next(iterator)
    tracemalloc.start()
    for _ in range(40):
        next(iterator)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 10e6  # a buffer of 500 examples and a few rows; the file is 40e6


def test_the_ledger_of_lazy_data_equals_that_of_data_in_memory(
    opened: Open, prepared: Callable[..., Any]
) -> None:
    rows = [*random_rows(60), {"src": "x", "tgt": ""}, {"src": "x", "tgt": "y" * 99}]
    loader = opened(rows, lazy=True)
    epochs(loader, 2)
    lazy, memory = loader.dataset.ledger, prepared(rows).ledger
    for name in (
        "rows",
        "reasons",
        "num_examples",
        "num_tokens",
        "num_supervised",
        "num_cut",
        "num_ended",
    ):
        assert getattr(lazy, name) == getattr(memory, name)
    assert {e["row"] for e in lazy.entries} == {e["row"] for e in memory.entries}


# ---- mixtures, held-out rows, evaluation


@pytest.mark.parametrize("lazy", [False, True])
@pytest.mark.parametrize("packing", ["none", "best"])
def test_mixtures_reproduce_their_weights(
    opened: Open, tmp_path: Path, packing: Method, lazy: bool
) -> None:
    parts = []
    for seed, (size, weight) in enumerate([(60, 1), (30, 3), (90, 1)]):
        path = write_lines(tmp_path / f"{seed}.jsonl", random_rows(size, seed=seed))
        parts.append({"path": str(path), "weight": weight})
    loader = opened(parts, packing=packing, lazy=lazy)
    for _ in range(3):
        told = documents(epochs(loader))
        assert len(told) == 180
        first = Counter(tokens[0] for tokens in told)  # the digit that names the part
        assert sorted(first.values()) == [36, 36, 108]
    assert any("108 rows per epoch from the 30" in note for note in loader.dataset.ledger.notes)


def test_held_out_rows_are_a_function_of_seed_and_index(prepared: Callable[..., Any]) -> None:
    rows = random_rows(400)

    def tokens(data: Dataset) -> set[tuple[int, ...]]:
        return {tuple(data.example(i)[0].tolist()) for i in range(len(data))}

    def parts(**data: Any) -> tuple[set[tuple[int, ...]], set[tuple[int, ...]]]:
        return tuple(
            tokens(prepared(rows, s, validation_share=0.2, **data)) for s in ("train", "dev")
        )  # pyright: ignore[reportReturnType]

    train, dev = parts()
    assert not train & dev and train | dev == tokens(prepared(rows))
    assert 50 < len(dev) < 110
    assert parts() == (train, dev)
    assert parts(seed=4)[1] != dev
    assert "held out" in prepared(rows, "train", validation_share=0.2).ledger.notes[0]
    with pytest.raises(Refused, match="leaves no row"):
        prepared(rows[:3], "dev", validation_share=0.001)


def test_a_dev_part_makes_the_share_unneeded(prepared: Callable[..., Any], tmp_path: Path) -> None:
    write_lines(tmp_path / "d" / "train.json", random_rows(20))
    write_lines(tmp_path / "d" / "dev.json", random_rows(5))
    train = prepared(tmp_path / "d", "train", validation_share=0.5)
    assert len(train) == 20 and any("not used" in note for note in train.ledger.notes)
    assert len(prepared(tmp_path / "d", "dev", validation_share=0.5)) == 5


def test_evaluation_keeps_data_order(prepared: Callable[..., Any]) -> None:
    data = prepared(ROWS)
    wanted = [tuple(data.example(i)[0].tolist()) for i in range(len(data))]
    for packing in METHODS:
        batches = list(
            evaluation_batches(data, micro_batch=3, pad_id=0, length=64, packing=packing)
        )
        told = documents([batches])
        if packing in ("none", "sequential"):
            assert told == wanted
        assert Counter(told) == Counter(wanted)
        rows = [row for batch in batches for row in batch.rows]
        assert rows == list(range(len(rows)))
        assert sum(b.num_supervised for b in batches) == data.ledger.num_supervised


def test_evaluation_may_take_the_first_rows_only(
    prepared: Callable[..., Any], tmp_path: Path
) -> None:
    write_lines(tmp_path / "d" / "train.json", ROWS)
    write_lines(tmp_path / "d" / "dev.json", ROWS)
    data = prepared(tmp_path / "d", "dev", limit=7)
    assert len(data) == 7 and data.ledger.num_rows == 7
    assert "evaluate.rows: the first 7 of 90 rows" in data.ledger.notes
    assert len(prepared(tmp_path / "d", "train", limit=7)) == 90
    assert prepared(ROWS, "dev") is None


def test_conversations_are_those_of_the_used_rows(prepared: Callable[..., Any]) -> None:
    data = prepared([ROWS[0], {"src": "x", "tgt": ""}, ROWS[2]])
    assert [messages[-1].text for messages in data.conversations()] == [
        ROWS[0]["tgt"],
        ROWS[2]["tgt"],
    ]


def test_columns_rename_fields(prepared: Callable[..., Any]) -> None:
    rows = [{"content": r["src"], "summary": r["tgt"]} for r in ROWS]
    data = prepared(rows, columns={"src": "content", "tgt": "summary"})
    assert np.array_equal(data.ids, prepared(ROWS).ids)
    with pytest.raises(Refused, match=r"data\.columns"):
        prepared(rows, columns={"source": "content"}, format="src_tgt")


def test_a_field_that_is_nowhere_is_not_another_one(prepared: Callable[..., Any]) -> None:
    rows = [{"text": r["src"], "body": r["tgt"]} for r in ROWS]
    with pytest.raises(Refused, match=r"'text' from the field 'bdy'.*'body'.*did you mean 'body'"):
        prepared(rows, columns={"text": "bdy"})
    data = prepared(ROWS, columns={"system": "sytem"})
    assert any("no field 'sytem'" in note for note in data.ledger.notes)


def test_padding_is_measured_on_the_batches(opened: Open) -> None:
    for packing in METHODS:
        for lazy in (False, True):
            loader = opened(packing=packing, lazy=lazy)
            steps = epochs(loader)
            batches = list(itertools.chain(*steps))
            share = 1 - sum(b.num_real_tokens for b in batches) / sum(
                b.input_ids.numel() for b in batches
            )
            told = loader.dataset.ledger.packing
            assert told["padding_share"] == pytest.approx(share, abs=1e-6)
            assert told["rows"] == sum(len(b.rows) for b in batches)
            assert (told["method"], told["length"]) == (packing, 64)


# ---- processes


def test_workers_end_when_their_parent_is_killed(tmp_path: Path) -> None:
    script = tmp_path / "parent.py"
    script.write_text(
        "import os, time\n"
        "from luthier.data.workers import Workers\n"
        "if __name__ == '__main__':\n"
        "    pool = Workers(lambda chunk: [os.getpid() for _ in chunk], 2)\n"
        "    pids = {p for out in pool.encode([[i] for i in range(50)]) for p in out}\n"
        "    print(*pids, flush=True)\n"
        "    time.sleep(60)\n"
    )
    parent = subprocess.Popen(
        [sys.executable, str(script)],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": os.getcwd()},  # noqa: PTH109
    )
    assert parent.stdout is not None
    pids = [int(pid) for pid in parent.stdout.readline().split()]
    for pid in pids:
        os.kill(pid, signal.SIGINT)  # a Ctrl-C reaches them too; the parent decides what it means
    time.sleep(0.2)
    assert pids and all(alive(pid) for pid in pids)
    parent.kill()
    parent.wait()
    parent.stdout.close()
    deadline = time.monotonic() + 10
    while any(alive(pid) for pid in pids) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not any(alive(pid) for pid in pids)


def alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except OSError:
        return False
    return state != "Z"


def test_a_killed_worker_is_an_error_that_says_what_to_do() -> None:
    with (
        Workers(lambda chunk: os.kill(os.getpid(), signal.SIGKILL) or list(chunk), 1) as pool,
        pytest.raises(Failed, match=r"memory runs out.*data\.workers"),
    ):
        list(pool.encode([[1], [2]]))
