"""Pretraining of families with two position axes: rows cut out of mapped shards, each in the family's own form."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from luthier.assemble import evaluation_rows, open_data, open_text
from luthier.batch import IGNORE, Layout
from luthier.data.checks import check_labels
from luthier.data.corpus import Corpus
from luthier.errors import Refused
from luthier.recipes import finetune, resolve
from luthier.train.metrics import read_metrics
from luthier.use import evaluate, tokenize
from luthier.verify.data import verify_data
from luthier.verify.loss import verify_loss
from luthier.verify.packing import verify_packing
from tests.zoo_folders import zoo_folder

LENGTH = 48
TEXTS = [
    f"the box is in the room {i}. " + "how many apples? seven in the box. " * (1 + 3 * i % 7)
    for i in range(20)
]
FORMS = [("chatglm", "none"), ("glm_legacy", "none"), ("glm_legacy", "mixed")]
each_form = pytest.mark.parametrize(("family", "blanks"), FORMS)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {f: zoo_folder(f, tmp_path_factory.mktemp(f)) for f in ("chatglm", "glm_legacy")}


@pytest.fixture
def config(folders: dict[str, Path], tmp_path: Path) -> Callable[..., dict[str, Any]]:
    """`config(family, blanks, output, **sections)`: a run of four steps from random weights."""
    rows = "".join(json.dumps({"text": text}) + "\n" for text in TEXTS)
    (tmp_path / "texts.jsonl").write_text(rows, "utf-8")

    def make(family: str, blanks: str, output: str = "out", **sections: Any) -> dict[str, Any]:
        return {
            "model": {"path": str(folders[family]), "dtype": "float32", "init": "random"},
            "data": {
                **{"path": str(tmp_path / "texts.jsonl"), "length": LENGTH, "split": "8,2,0"},
                **{"borders": "ignore", "blanks": blanks, "cache": str(tmp_path / "cache")},
                "workers": 0,
            },
            "optim": {"lr": 1e-3, "schedule": "constant"},
            "train": {"mode": "pretrain", "steps": 4, "batch": 4, "micro_batch": 2},
            "evaluate": {"every": "end"},
            "checkpoint": {"every": "end"},
            "log": {"sinks": [], "progress": "none"},
            "output": str(tmp_path / output),
        } | sections

    return make


def corpus_of(tree: dict[str, Any]) -> tuple[Corpus, Any]:
    made = resolve(tree).config
    text = open_text(made)
    data = open_data(made, text)
    data.loader.close()
    assert isinstance(data.train, Corpus)
    return data.train, text


@each_form
def test_rows_hold_every_token_once(
    family: str, blanks: str, config: Callable[..., dict[str, Any]]
) -> None:
    corpus, text = corpus_of(config(family, blanks))
    tokens = text.renderer.tokens
    stream = [i for t in TEXTS[: round(0.8 * len(TEXTS))] for i in tokens.ended(t)]
    found: list[int] = []
    for n in range(corpus.num_rows or 0):
        ((ids, labels),) = corpus.row_in_order(n)
        check_labels(ids, labels)
        assert len(ids) <= LENGTH
        if text.renderer.blanks is None:
            opening = len(tokens.opening)
            assert ids[:opening].tolist() == tokens.opening
            found += ids[opening:].tolist()
            assert int((labels != IGNORE).sum()) == len(ids) - opening + tokens.trained_before
        else:
            found += text.renderer.blanks.filled(ids.tolist())
            assert int((labels != IGNORE).sum()) > 0
    assert found == stream
    assert corpus.num_rows and corpus.num_rows > 8


@each_form
def test_batches_have_the_familys_positions(
    family: str, blanks: str, config: Callable[..., dict[str, Any]]
) -> None:
    """Training and evaluation: the context is told by the second axis."""
    made = resolve(config(family, blanks)).config
    text = open_text(made)
    data = open_data(made, text)
    assert isinstance(data.dev, Corpus) and text.renderer.positions is not None
    batches = [*data.loader.peek(), *evaluation_rows(made, text, data.dev)]
    data.loader.close()
    for batch in batches:
        for s in Layout.of(batch).segments:
            wanted = text.renderer.positions(batch.input_ids[s.row, s.start : s.stop].numpy())
            assert batch.position_ids[s.row, :, s.start : s.stop].tolist() == wanted.tolist()
            assert (wanted[1] == 0).any() and wanted[1].any()


@each_form
def test_a_run_goes_on_in_the_middle(
    family: str, blanks: str, config: Callable[..., dict[str, Any]]
) -> None:
    whole = config(family, blanks, "whole", checkpoint={"every": 2, "best": "none"})
    facts = finetune(whole)
    assert facts["checks"] and all(passed for _, passed, _ in facts["checks"])
    measured = evaluate(whole)
    assert measured["loss"] == pytest.approx(facts["after"]["loss"], rel=1e-6)
    part = config(family, blanks, "part", checkpoint={"every": 2, "best": "none"})
    part["train"] = part["train"] | {"steps": 2}
    finetune(part)
    shutil.rmtree(Path(part["data"]["cache"]))
    on = config(family, blanks, "part", checkpoint={"every": 2, "best": "none", "resume": "auto"})
    finetune(on)
    first, second = (load_file(Path(t["output"]) / "model.safetensors") for t in (whole, on))
    assert all(torch.equal(first[name], second[name]) for name in first)
    records = read_metrics(Path(whole["output"]) / "metrics.jsonl")
    assert sum(r["kind"] == "train" for r in records) == 4


@each_form
def test_what_a_user_can_prove(
    family: str, blanks: str, config: Callable[..., dict[str, Any]]
) -> None:
    """`verify loss` compares with the model's own forward, positions and mask."""
    for verify in (verify_data, verify_loss, verify_packing):
        said: list[str] = []
        verify(resolve(config(family, blanks)), said.append)
        assert said[-1].startswith(f"verify {verify.__name__.partition('_')[2]}: ok")


def test_token_files_give_the_run_of_their_text(
    config: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    text = config("glm_legacy", "mixed")
    text["data"] = text["data"] | {"split": None}
    tokenize(text, out=str(tmp_path / "made" / "corpus"))
    files = config("glm_legacy", "mixed")
    files["data"] = files["data"] | {"split": None, "path": str(tmp_path / "made")}
    one, two = (corpus_of(tree)[0] for tree in (text, files))
    assert one.num_rows == two.num_rows
    for n in range(one.num_rows or 0):
        assert np.array_equal(one.row_in_order(n)[0][0], two.row_in_order(n)[0][0])


def test_mask_tokens_in_a_text_are_left_out(config: Callable[..., dict[str, Any]]) -> None:
    tree = config("glm_legacy", "spans")
    renderer = open_text(resolve(tree).config).renderer
    text = renderer.tokens("the box is in the room and how many apples are there")
    mask = renderer.tokens.tokenizer.mask_token_ids[0]
    made = renderer.piece([*text[:5], mask, *text[5:]])
    assert renderer.blanks is not None
    assert renderer.blanks.filled(made.input_ids.tolist()) == text
    alone = renderer.piece([mask])  # nothing is left: an empty text still has its end
    assert (alone.labels != IGNORE).any()


def test_borders_cannot_be_kept(config: Callable[..., dict[str, Any]]) -> None:
    tree = config("chatglm", "none")
    tree["data"] = tree["data"] | {"borders": "keep"}
    with pytest.raises(Refused, match=r"data\.borders=ignore"):
        finetune(tree)
    assert not Path(tree["output"]).exists()
