"""Pretraining data: what rows hold, their order, shards that are made once, splits, weights, bad input."""

from __future__ import annotations

import errno
import json
import shutil
import threading
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import VOCAB, tiny_tokenizer_
from tiny_runs import tiny_config, write_rows

import luthier.data.shards
from luthier.batch import IGNORE
from luthier.config import RunConfig
from luthier.data import blocks
from luthier.data.blocks import CYCLE, Mixture, first_blocks
from luthier.data.corpus import Corpus
from luthier.data.corpus_open import prepare_corpus, split_of
from luthier.data.encode import Renderer
from luthier.data.indexed import TokenFile, write_tokens
from luthier.data.loader import CorpusBatches, Loader
from luthier.data.sources import Split
from luthier.data.tokens import Tokens
from luthier.errors import Failed, Refused

TEXTS = [" ".join(["the", "and", "of", str(i)] * (1 + 7 * i % 40)) for i in range(60)]


def renderer() -> Renderer:
    return Renderer(tiny_tokenizer_(), length=32)


def ids_of(text: str) -> list[int]:
    tokens = Tokens(tiny_tokenizer_())
    return [*tokens.opening, *tokens.ended(text)]


def config_of(path: Any, tmp_path: Path, **keys: Any) -> RunConfig:
    base = {"train__mode": "pretrain", "data__length": 32, "data__cache": str(tmp_path / "cache")}
    base |= {"adapter__method": None, "adapter__rank": None}
    tree = tiny_config(Path("model"), Path("x"), tmp_path / "out", **{**base, **keys})
    tree["data"]["path"] = str(path) if isinstance(path, Path) else path
    return RunConfig.model_validate(tree)


def corpus_of(path: Any, tmp_path: Path, split: Split = "train", **keys: Any) -> Corpus:
    found = prepare_corpus(config_of(path, tmp_path, **keys), renderer(), split)
    assert found is not None
    return found


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    return write_rows(tmp_path / "texts.jsonl", [{"text": text} for text in TEXTS])


@pytest.fixture
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    """Seven documents a shard, so that there are several windows."""
    monkeypatch.setattr(luthier.data.shards, "SHARD_ROWS", 7)
    monkeypatch.setattr(blocks, "WINDOW", 2)


def flat(row: Any) -> list[int]:
    return [int(i) for ids, _ in row for i in ids]


# ---- what a row holds


@pytest.mark.parametrize("borders", ["keep", "ignore"])
def test_rows_are_the_documents_end_to_end(texts: Path, tmp_path: Path, borders: str) -> None:
    corpus = corpus_of(texts, tmp_path, data__borders=borders)
    stream = [i for text in TEXTS for i in ids_of(text)]
    rows = [corpus.row_in_order(n) for n in range(corpus.num_rows or 0)]
    assert [len(flat(row)) for row in rows[:-1]] == [32] * (len(rows) - 1)
    joined = flat(rows[0])
    for row in rows[1:]:  # a row begins with the last token of the row before it
        assert flat(row)[0] == joined[-1]
        joined += flat(row)[1:]
    assert joined == stream
    supervised = sum(int((labels != IGNORE).sum()) for row in rows for _, labels in row)
    if borders == "ignore":
        assert all(len(row) == 1 for row in rows) and supervised == len(stream) - 1
    else:  # every token of every document but its first is predicted, once
        assert supervised == len(stream) - len(TEXTS) == corpus.ledger.num_supervised
        assert max(len(row) for row in rows) > 1
    for row in rows:
        for ids, labels in row:
            assert labels[-1] == IGNORE and np.array_equal(labels[:-1], ids[1:])


def test_documents_of_a_row_have_positions_of_their_own(texts: Path, tmp_path: Path) -> None:
    for borders, several in (("keep", True), ("ignore", False)):
        corpus = corpus_of(texts, tmp_path, data__borders=borders)
        (batch, *_) = CorpusBatches(corpus, 200, 0)
        assert (int(batch.document_ids.max()) > 0) == several
        starts = batch.position_ids == 0
        changes = torch.ones_like(starts)
        changes[:, 1:] = batch.document_ids[:, 1:] != batch.document_ids[:, :-1]
        assert torch.equal(starts & (batch.document_ids >= 0), changes & (batch.document_ids >= 0))


@pytest.mark.parametrize("borders", ["keep", "ignore"])
def test_positions_skip_up_to_the_window(texts: Path, tmp_path: Path, borders: str) -> None:
    """PoSE, of training rows alone: two chunks a document, drawn anew in each epoch, the same for row n of a run."""
    keys = {"data__borders": borders, "data__pose": "paper", "data__pose_window": 200}
    corpus = corpus_of(texts, tmp_path, **keys)
    bare = corpus_of(texts, tmp_path, data__borders=borders)
    total, skips, far = corpus.num_rows or 0, [], 0
    for n in range(2 * total):
        row = corpus.row(n)
        assert [d[0].tolist() for d in row] == [d[0].tolist() for d in bare.row(n)]
        for _, labels, places in row:
            steps = np.diff(places)
            assert places[0] == 0 and places[-1] < 200 and (steps > 0).all()
            assert (steps > 1).sum() <= 1 and len(labels) == len(places)
            far = max(far, int(places[-1]))
        skips.append([d[2].tolist() for d in row])
        assert all(np.array_equal(a[2], b[2]) for a, b in zip(row, corpus.row(n), strict=True))
    assert far > 150 and skips[:total] != skips[total:]
    dev = corpus_of(texts, tmp_path, "dev", data__split="8,2,0", **keys)
    assert all(len(document) == 2 for document in dev.row(0))


# ---- order


def test_an_epoch_has_every_row_once_in_an_order_of_its_own(
    texts: Path, tmp_path: Path, small_shards: None
) -> None:
    corpus = corpus_of(texts, tmp_path)
    total = corpus.num_rows or 0
    assert corpus.parts[0].num_blocks == 9
    every = sorted(flat(corpus.row_in_order(n)) for n in range(total))
    epochs = [[flat(corpus.row(e * total + n)) for n in range(total)] for e in range(3)]
    assert all(sorted(rows) == every for rows in epochs)
    assert epochs[0] != epochs[1] != epochs[2]
    other = corpus_of(texts, tmp_path, train__seed=1)
    assert [flat(other.row(n)) for n in range(total)] != epochs[0]


def test_row_n_does_not_depend_on_what_was_read_before(
    texts: Path, tmp_path: Path, small_shards: None
) -> None:
    corpus = corpus_of(texts, tmp_path)
    total = 3 * (corpus.num_rows or 0)
    in_turn = [flat(corpus.row(n)) for n in range(total)]
    for n in (total - 1, 5, total // 2, 0, total // 3):
        assert flat(corpus_of(texts, tmp_path).row(n)) == in_turn[n]


def test_lazy_shards_give_the_same_rows(texts: Path, tmp_path: Path, small_shards: None) -> None:
    whole = corpus_of(texts, tmp_path)
    lazy = corpus_of(texts, tmp_path, data__lazy=True, data__cache=str(tmp_path / "second"))
    try:
        assert lazy.num_rows is None
        total = whole.num_rows or 0
        for n in range(2 * total + 3):
            assert flat(lazy.row(n)) == flat(whole.row(n)), n
            assert lazy.epoch(n) == whole.epoch(n) == n // total
        lazy.book()
        assert lazy.ledger.to_dict()["tokens"] == whole.ledger.to_dict()["tokens"]
    finally:
        lazy.close()


def test_lazy_data_starts_before_all_is_tokenised(
    texts: Path, tmp_path: Path, small_shards: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    made, go = [], threading.Event()
    real = luthier.data.shards.Shards._make

    def slow(self: Any, source: int, number: int, *rest: Any) -> None:
        if len(made) >= 2 and not go.wait(30):
            raise TimeoutError
        made.append(number)
        real(self, source, number, *rest)

    monkeypatch.setattr(luthier.data.shards.Shards, "_make", slow)
    corpus = corpus_of(texts, tmp_path, data__lazy=True)
    try:
        assert len(made) == 2 and flat(corpus.row(0))  # two of nine shards
        go.set()
        corpus.row(150)
        assert len(made) > 2
    finally:
        go.set()
        corpus.close()


def test_the_first_needed_shards_come_first() -> None:
    order = first_blocks([(0, 20), (3, 9)], seed=5)
    assert sorted(order) == [(0, b) for b in range(20)] + [(1, b) for b in range(9)]
    assert [p for p, _ in order] == [0] * 8 + [1] * 8 + [0] * 8 + [1] + [0] * 4


def test_a_resumed_loader_gives_the_same_batches(texts: Path, tmp_path: Path) -> None:
    def loader() -> Loader:
        corpus = corpus_of(texts, tmp_path)
        return Loader(corpus, batch=6, micro_batch=4, pad_id=0, seed=42, length=32, packing="best")

    def take(steps: Any, number: int) -> list[Any]:
        return [next(steps) for _ in range(number)]

    first = loader()
    steps = first.step_batches()
    take(steps, 30)
    state = json.loads(json.dumps(first.state()))
    wanted = take(steps, 20)
    second = loader()
    second.load_state(state)
    assert second.epoch == state["position"]["epoch"]
    again = second.step_batches()
    found = take(again, 20)
    for a, b in zip(wanted, found, strict=True):
        assert [batch.rows for batch in a] == [batch.rows for batch in b]
        for x, y in zip(a, b, strict=True):
            assert torch.equal(x.input_ids, y.input_ids) and torch.equal(x.labels, y.labels)
    steps.close()
    again.close()
    assert first.epoch > 0  # over the end of an epoch


def test_other_data_is_not_gone_on_with(texts: Path, tmp_path: Path) -> None:
    def loader(path: Path) -> Loader:
        return Loader(
            corpus_of(path, tmp_path), batch=6, micro_batch=6, pad_id=0, seed=42, length=32,
            packing="best",
        )  # fmt: skip

    state = loader(texts).state()
    other = write_rows(tmp_path / "other.jsonl", [{"text": text} for text in TEXTS[1:]])
    with pytest.raises(Refused, match="the data has changed since"):
        loader(other).load_state(state)


# ---- weights


def test_weights_hold_and_small_parts_come_again(tmp_path: Path) -> None:
    paths = [
        write_rows(tmp_path / f"{name}.jsonl", [{"text": f"{name} {t}"} for t in TEXTS[:n]])
        for name, n in (("large", 60), ("small", 8))
    ]
    parts = [{"path": str(paths[0]), "weight": 3}, {"path": str(paths[1]), "weight": 1}]
    corpus = corpus_of(parts, tmp_path)
    assert corpus.mixture.counts.tolist() == [CYCLE * 3 // 4, CYCLE // 4]
    seen: Counter[int] = Counter()
    for n in range(CYCLE + 10):
        part, before = corpus.mixture.place(n)
        assert before == seen[part]
        assert corpus.mixture.drawn(n).tolist() == [seen[0], seen[1]]
        seen[part] += 1
    small = corpus.drawn[1].count()
    assert seen[1] > 2 * small  # it comes again and again, each turn all of it
    drawn = [corpus.drawn[1].place(m) for m in range(2 * small)]
    assert (
        {row for _, row in drawn[:small]} == {row for _, row in drawn[small:]} == set(range(small))
    )
    assert any("75.00%" in note for note in corpus.ledger.notes)


def test_a_weight_too_small_to_draw_is_refused() -> None:
    with pytest.raises(Refused, match="weight=1 of b"):
        Mixture(["a", "b"], [1e6, 1], 0)


# ---- splits


def test_splits_are_megatrons() -> None:
    def bounds(number: int, shares: str) -> list[tuple[int, int]]:
        return [split_of(number, shares, split) for split in ("train", "dev", "test")]

    # Megatron-LM's get_train_valid_test_split_ for these
    assert bounds(300, "949,50,1") == [(0, 285), (285, 300), (300, 300)]
    assert bounds(1000, "949,50,1") == [(0, 949), (949, 999), (999, 1000)]
    assert bounds(10, "1,0,0") == [(0, 10), (10, 10), (10, 10)]
    for number in range(40):
        found = bounds(number, "8,1,1")
        assert found[0][0] == 0 and found[2][1] == number
        assert found[0][1] == found[1][0] and found[1][1] == found[2][0]


def test_text_and_token_files_are_split_alike(texts: Path, tmp_path: Path) -> None:
    write_tokens(tmp_path / "tokens", [ids_of(text) for text in TEXTS], VOCAB, {})
    for split, documents in (("train", TEXTS[:48]), ("dev", TEXTS[48:54]), ("test", TEXTS[54:])):
        wanted = [i for text in documents for i in ids_of(text)]
        for path in (texts, tmp_path / "tokens"):
            corpus = corpus_of(path, tmp_path, split, data__split="8,1,1")
            assert [int(i) for d in corpus.documents() for i in d] == wanted
            assert corpus.ledger.num_examples == len(documents)
            assert corpus.ledger.num_tokens == len(wanted)
            assert corpus.ledger.num_ended == len(documents)
    text, file = (
        corpus_of(path, tmp_path, data__split="8,1,1") for path in (texts, tmp_path / "tokens")
    )
    assert text.num_rows == file.num_rows
    for n in range(text.num_rows or 0):
        for (a, wanted), (b, found) in zip(text.row(n), file.row(n), strict=True):
            assert np.array_equal(a, b) and np.array_equal(wanted, found)


def test_no_split_trains_all_and_held_out_rows_are_apart(texts: Path, tmp_path: Path) -> None:
    assert prepare_corpus(config_of(texts, tmp_path), renderer(), "dev") is None
    keys = {"data__validation_share": 0.2}
    train, dev = (corpus_of(texts, tmp_path, s, **keys) for s in ("train", "dev"))
    assert train.ledger.num_examples + dev.ledger.num_examples == len(TEXTS)
    assert 4 < dev.ledger.num_examples < 20
    given = corpus_of(texts, tmp_path, "dev", data__validation_path=str(texts))
    assert given.ledger.num_examples == len(TEXTS)
    write_tokens(tmp_path / "tokens", [ids_of(text) for text in TEXTS], VOCAB, {})
    with pytest.raises(Refused, match=r"divided by data\.split"):
        corpus_of(tmp_path / "tokens", tmp_path, **keys)
    with pytest.raises(Refused, match="these are token files"):
        corpus_of(tmp_path / "tokens", tmp_path, data__columns={"text": "body"})


def test_evaluation_rows_are_spread_over_all(texts: Path, tmp_path: Path) -> None:
    corpus = corpus_of(texts, tmp_path)
    total = corpus.num_rows or 0
    batches = CorpusBatches(corpus, 4, 0, most=10)
    assert len(batches) == 3
    rows = [r.tolist() for batch in batches for r in batch.input_ids]
    assert rows[0] == flat(corpus.row_in_order(0)) and len(rows) == 10
    assert rows[-1][: len(flat(corpus.row_in_order(total - 1)))] == flat(
        corpus.row_in_order(total - 1)
    )


# ---- shards


def places(tmp_path: Path) -> list[Path]:
    return sorted(path.parent for path in (tmp_path / "cache").rglob("tokens.idx"))


def test_shards_are_made_once_by_data_and_tokenizer(
    texts: Path, tmp_path: Path, small_shards: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = []
    real = luthier.data.shards.Shards._make
    monkeypatch.setattr(
        luthier.data.shards.Shards,
        "_make",
        lambda self, *at: (made.append(at[:2]), real(self, *at))[1],
    )
    first = corpus_of(texts, tmp_path)
    assert len(made) == 9 == len(places(tmp_path))
    before = first.ledger.to_dict()
    made.clear()
    again = corpus_of(texts, tmp_path, train__seed=3, data__length=64)
    assert not made and again.ledger.to_dict() == before
    copied = shutil.copy(texts, tmp_path / "elsewhere.jsonl")
    assert corpus_of(Path(copied), tmp_path).parts[0].key == first.parts[0].key and not made
    rows = [{"text": text} for text in [*TEXTS[:-1], "other"]]
    assert corpus_of(write_rows(texts, rows), tmp_path).parts[0].key != first.parts[0].key
    assert made


def test_the_hash_of_a_tokenizer() -> None:
    from copy import deepcopy

    same, other = tiny_tokenizer_(), deepcopy(tiny_tokenizer_())
    hashed = Tokens(same).fingerprint
    same(["a", "bc"], padding=True)  # leaves its mark in the tokenizer's state
    assert Tokens(same).fingerprint == hashed
    other.add_tokens(["new"])
    assert Tokens(other).fingerprint != hashed
    ends = deepcopy(tiny_tokenizer_())
    ends.eos_token = "<s>"
    assert Tokens(ends).fingerprint != hashed


def test_empty_texts_are_dropped_and_counted(tmp_path: Path, small_shards: None) -> None:
    rows = [{"text": text} for text in [*[""] * 10, *TEXTS[:9], "  ", *TEXTS[9:12]]]
    corpus = corpus_of(write_rows(tmp_path / "texts.jsonl", rows), tmp_path)
    assert corpus.ledger.rows["dropped"] in (10, 11)
    corpus.ledger.reconcile(len(rows))
    assert corpus.row(0)


# ---- bad input


def test_a_damaged_shard_is_made_again(texts: Path, tmp_path: Path, small_shards: None) -> None:
    wanted = [flat(corpus_of(texts, tmp_path).row(n)) for n in range(20)]
    for name, spoil in {
        "tokens.bin": lambda p: p.write_bytes(p.read_bytes()[:-2]),
        "tokens.idx": lambda p: p.write_bytes(p.read_bytes()[:40]),
        "manifest.json": lambda p: p.unlink(),
        "tokens.json": lambda p: p.write_text("{"),
    }.items():
        spoil(places(tmp_path)[3] / name)
        corpus = corpus_of(texts, tmp_path)
        assert [flat(corpus.row(n)) for n in range(20)] == wanted


def test_a_full_disk_publishes_no_shard(
    texts: Path, tmp_path: Path, small_shards: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, written = luthier.data.shards.Writer.add, 0

    def add(self: Any, ids: Any) -> None:
        nonlocal written
        written += 1
        if written > 16:  # in the third shard
            raise OSError(errno.ENOSPC, "No space left on device")
        real(self, ids)

    with monkeypatch.context() as patch:
        patch.setattr(luthier.data.shards.Writer, "add", add)
        with pytest.raises(Failed, match=r"No space left.*data\.cache"):
            corpus_of(texts, tmp_path)
        assert len(places(tmp_path)) == 2
        with pytest.raises(Failed, match="No space left"):
            corpus_of(texts, tmp_path, data__lazy=True)
    assert not list((tmp_path / "cache").rglob(".partial-*"))
    found = corpus_of(texts, tmp_path)
    assert found.ledger.num_examples == len(TEXTS)


def test_tokens_of_another_tokenizer_are_refused(texts: Path, tmp_path: Path) -> None:
    corpus_of(texts, tmp_path)
    (place,) = places(tmp_path)
    facts = json.loads((place / "tokens.json").read_text())
    facts["tokenizer"] = "0" * 64
    size = (place / "tokens.json").stat().st_size
    (place / "tokens.json").write_text(json.dumps(facts, indent=2, ensure_ascii=False) + "\n")
    assert (place / "tokens.json").stat().st_size == size
    for path in (texts, place, place / "tokens.bin"):
        with pytest.raises(Refused, match="another tokenizer made them"):
            corpus_of(path, tmp_path)


@pytest.mark.parametrize("where", [0, 57, -1])
def test_ids_beyond_the_vocabulary_are_refused(tmp_path: Path, where: int) -> None:
    documents = [ids_of(text) for text in TEXTS]
    documents[where][3 if where else 0] = 286
    write_tokens(tmp_path / "tokens", documents, VOCAB, {})
    with pytest.raises(Refused, match="is 286, the model's tokenizer ends at 285"):
        corpus_of(tmp_path / "tokens.idx", tmp_path)


def test_ids_that_were_not_seen_beforehand_fail_when_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("luthier.data.corpus_open.LOOKS", 2)
    monkeypatch.setattr("luthier.data.corpus_open.LOOKED", 8)
    documents = [ids_of(text) for text in TEXTS]
    documents[7][3] = 300
    write_tokens(tmp_path / "tokens", documents, VOCAB, {})
    corpus = corpus_of(tmp_path / "tokens", tmp_path)
    with pytest.raises(Failed, match="is 300, the model's tokenizer ends at 285"):
        for n in range(corpus.num_rows or 0):
            corpus.row(n)


def test_documents_without_eos_are_remarked(tmp_path: Path) -> None:
    write_tokens(tmp_path / "tokens", [ids_of(text)[:-1] for text in TEXTS], VOCAB, {})
    corpus = corpus_of(tmp_path / "tokens", tmp_path)
    assert any("no document ends in EOS" in note for note in corpus.ledger.notes)


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ([{"text": ""}, {"text": " "}], "no row of 2 is usable"),
        ([{"text": "one"}, {"content": "two"}], "2.*text"),
        ([{"text": "one"}, {"text": 7}], ":2"),
        ([{"messages": [{"role": "user", "content": "a"}]}], "text"),
    ],
)
def test_texts_that_cannot_be_used_are_refused(tmp_path: Path, rows: list[Any], words: str) -> None:
    with pytest.raises(Refused, match=words):
        corpus_of(write_rows(tmp_path / "texts.jsonl", rows), tmp_path)
    assert places(tmp_path) == [] or rows[0] == {"text": ""}


def test_an_invalid_row_ends_a_lazy_run(tmp_path: Path, small_shards: None) -> None:
    rows: list[dict[str, Any]] = [{"text": text} for text in TEXTS]
    rows[33] = {"text": 3}
    path = write_rows(tmp_path / "texts.jsonl", rows)
    with pytest.raises(Refused, match=r"texts\.jsonl:34"):
        corpus = corpus_of(path, tmp_path, data__lazy=True)
        try:
            for n in range(1000):
                corpus.row(n)
        finally:
            corpus.close()


def test_a_tokenizer_without_eos_is_refused(texts: Path, tmp_path: Path) -> None:
    from copy import deepcopy

    bare = deepcopy(tiny_tokenizer_())
    bare.eos_token = None
    found = Renderer(bare, length=32, stop_ids=[2])
    with pytest.raises(Refused, match="no EOS to put behind each document"):
        prepare_corpus(config_of(texts, tmp_path), found, "train")


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"data__split": "949,50"}, "expected three shares"),
        ({"data__split": "949,-50,1"}, "expected three shares"),
        ({"data__split": "a,b,c"}, "expected three shares"),
        ({"data__split": "nan,1,1"}, "expected three shares"),
        ({"data__split": "0,50,1"}, "leaves nothing to train"),
        ({"data__split": "9,1,0", "data__validation_share": 0.1}, "exclude each other"),
        ({"data__split": "9,1,0", "data__validation_path": "x"}, "exclude each other"),
        ({"data__packing": "greedy"}, r"data\.packing has no meaning"),
        ({"data__overlong": "split"}, r"data\.overlong has no meaning"),
        ({"data__format": "alpaca"}, r"data\.format=alpaca"),
        ({"evaluate__generate": True}, "no answers to compare"),
        ({"train__mode": "sft"}, r"data\.cache has no meaning for train\.mode=sft"),
        ({"data__supervise": "turns"}, r"data\.supervise has no meaning for train\.mode=pretrain"),
    ],
)
def test_keys_without_a_meaning_are_refused(
    tmp_path: Path, keys: dict[str, Any], words: str
) -> None:
    with pytest.raises(ValueError, match=words):
        config_of("x", tmp_path, **keys)


@pytest.mark.parametrize("weight", [0, -1, float("nan"), "much"])
def test_weights_are_above_zero(tmp_path: Path, weight: Any) -> None:
    with pytest.raises(ValueError, match="weight"):
        config_of([{"path": "a", "weight": weight}], tmp_path)


def test_one_token_is_no_data(tmp_path: Path) -> None:
    write_tokens(tmp_path / "tokens", [[5]], VOCAB, {})
    with pytest.raises(Refused, match="two tokens"):
        corpus_of(tmp_path / "tokens", tmp_path)
    assert len(TokenFile(tmp_path / "tokens")) == 1
