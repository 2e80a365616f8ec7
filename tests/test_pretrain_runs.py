"""Whole pretraining runs on a tiny model: stopped and gone on with, lazy, from token files, with an adapter."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import VOCAB, tiny_tokenizer_
from safetensors.torch import load_file
from tiny_runs import resolved, tiny_config, write_rows

import luthier.data.shards
from luthier.cli import main
from luthier.data import blocks
from luthier.data.indexed import TokenFile, write_tokens
from luthier.errors import Failed, Refused
from luthier.models.load import load_config
from luthier.recipes import finetune
from luthier.train.metrics import read_metrics
from luthier.use import evaluate, preview, tokenize
from luthier.verify.data import verify_data

TEXTS = [f"{i} the moon and the star " * (1 + 5 * i % 17) for i in range(50)]
Scratch = Callable[..., dict[str, Any]]


@pytest.fixture
def scratch(tmp_path: Path, model_folder: Any) -> Scratch:
    """`scratch(name, **keys)`: the config of a run of eight steps from random weights."""
    write_rows(tmp_path / "texts.jsonl", [{"text": text} for text in TEXTS])
    folder = tmp_path / "gpt2"
    folder.mkdir()
    for path in model_folder("gpt2").iterdir():
        if path.suffix == ".json":
            shutil.copy(path, folder)

    def make(name: str = "out", **keys: Any) -> dict[str, Any]:
        base = {
            **{"adapter__method": None, "adapter__rank": None, "train__mode": "pretrain"},
            **{"model__init": "random", "data__length": 48, "data__split": "8,2,0"},
            **{"data__cache": str(tmp_path / "cache"), "train__steps": 8, "optim__lr": 1e-3},
        }
        return tiny_config(folder, tmp_path / "texts.jsonl", tmp_path / name, **{**base, **keys})

    return make


def weights(tree: dict[str, Any]) -> dict[str, torch.Tensor]:
    return load_file(Path(tree["output"]) / "model.safetensors")


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[n], b[n]) for n in a)


def losses(tree: dict[str, Any]) -> list[float]:
    records = read_metrics(Path(tree["output"]) / "metrics.jsonl")
    return [r["loss"] for r in records if r["kind"] == "train"]


def test_the_loss_falls_and_the_model_is_written(scratch: Scratch) -> None:
    tree = scratch(train__steps=40, optim__lr=1e-2)
    facts = finetune(tree)
    found = losses(tree)
    assert found[-1] < found[0] - 1 and facts["after"]["loss"] < found[0] - 1
    assert facts["title"] == "Pretraining from scratch of gpt2"
    output = Path(tree["output"])
    assert load_config(output).model_type == "gpt2" and (output / "tokenizer.json").is_file()
    ledger = json.loads((output / "ledger.json").read_text())
    assert ledger["train"]["rows"]["read"] == 40 and ledger["dev"]["rows"]["read"] == 10
    values = evaluate({**tree, "evaluate": {"micro_batch": 3}})
    assert values["loss"] == pytest.approx(facts["after"]["loss"], rel=1e-6)


@pytest.mark.parametrize("lazy", [False, True])
def test_going_on_in_the_middle_equals_not_stopping(
    scratch: Scratch, monkeypatch: pytest.MonkeyPatch, lazy: bool
) -> None:
    monkeypatch.setattr(luthier.data.shards, "SHARD_ROWS", 5)
    monkeypatch.setattr(blocks, "WINDOW", 2)
    keys = {"checkpoint__every": 3, "data__lazy": lazy, "checkpoint__best": "none"}
    keys |= {"optim__schedule": "constant"}  # the first part does not know how long the run is
    whole = scratch("whole", **keys)
    finetune(whole)
    part = scratch("part", **keys, train__steps=5)
    finetune(part)
    shutil.rmtree(Path(part["data"]["cache"]))  # what is on the way does not matter
    shutil.rmtree(Path(part["output"]) / "checkpoints" / "step-5")
    on = scratch("part", **keys, checkpoint__resume="auto")
    finetune(on)
    assert same(weights(whole), weights(on))
    assert losses(on)[-5:] == losses(whole)[-5:]


def test_micro_batches_and_lazy_data_change_nothing(scratch: Scratch) -> None:
    one = scratch("one", train__batch=6)
    two = scratch("two", train__batch=6, train__micro_batch=2)
    lazy = scratch("lazy", train__batch=6, data__lazy=True, data__workers=1)
    for tree in (one, two, lazy):
        finetune(tree)
    assert same(weights(one), weights(lazy))
    assert losses(two) == pytest.approx(losses(one), rel=1e-6)


def test_tokens_end_the_run(scratch: Scratch) -> None:
    facts = finetune(scratch(train__steps=None, train__tokens=1000))
    assert facts["steps"] == 6 and 1000 <= facts["tokens"] <= 6 * 4 * 48


def test_token_files_give_the_run_of_their_text(scratch: Scratch, tmp_path: Path) -> None:
    text = scratch("text", data__split=None)
    finetune(text)
    found = tokenize(text, out=str(tmp_path / "made" / "corpus"))
    file = TokenFile(tmp_path / "made" / "corpus")
    assert found == {"train": 50} and len(file) == 50
    tree = scratch("files", data__split=None)
    tree["data"]["path"] = str(tmp_path / "made")
    finetune(tree)
    assert same(weights(text), weights(tree))


def test_tokenising_ahead(scratch: Scratch, capsys: pytest.CaptureFixture[str]) -> None:
    assert tokenize(scratch()) == {"train": 40, "dev": 10}
    assert "1 shards of" in capsys.readouterr().out
    with pytest.raises(Refused, match="only pretraining keeps its tokens"):
        tokenize(scratch(train__mode="sft", data__split=None, data__cache=None))
    assert main(["tokenize", "x.yaml", "--out"]) == 2


def test_continued_with_an_adapter(scratch: Scratch, model_folder: Any) -> None:
    tree = scratch(adapter__method="lora", adapter__rank=2, model__init="pretrained")
    tree["model"]["path"] = str(model_folder("llama"))
    finetune(tree)
    assert (Path(tree["output"]) / "adapter_config.json").is_file()


def test_what_a_user_can_prove(scratch: Scratch) -> None:
    told: list[Any] = []
    figures = verify_data(resolved(scratch()), told.append)
    assert figures["train"]["texts"] == 40 and figures["dev"]["texts"] == 10
    assert figures["train"]["trained"] == figures["train"]["ledger"]["tokens"]["supervised"]
    shown = preview(scratch(), rows=2)
    assert "labels amiss" not in shown and "⟦" in shown


def test_a_changed_shard_is_found(scratch: Scratch, tmp_path: Path) -> None:
    tokenize(scratch())
    place = next((tmp_path / "cache").rglob("tokens.bin"))
    place.write_bytes(place.read_bytes()[:-2] + b"\x09\x00")
    with pytest.raises(Failed, match="was altered"):
        verify_data(resolved(scratch()), lambda _: None)


# ---- bad input


def spoilt(scratch: Scratch, **config: Any) -> dict[str, Any]:
    """A run from a config.json with other values; None removes the file."""
    tree = scratch()
    path = Path(tree["model"]["path"]) / "config.json"
    given = json.loads(path.read_text())
    path.write_text(json.dumps({**given, **config}))
    return tree


def test_random_weights_need_a_config(scratch: Scratch) -> None:
    tree = scratch()
    (Path(tree["model"]["path"]) / "config.json").unlink()
    with pytest.raises(Refused, match=r"config\.json"):
        finetune(tree)
    tree["model"]["path"] += "-elsewhere/x/y"
    with pytest.raises(Refused, match="does not exist"):
        finetune(tree)
    assert not Path(tree["output"]).exists()


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"model_type": "gpt2000"}, "gpt2000"),
        ({"n_head": 5}, "divisible"),
        ({"n_positions": 16}, "16 positions"),
        ({"vocab_size": 100}, "exceed the embedding"),
    ],
)
def test_unusable_configs_are_refused(scratch: Scratch, config: Any, words: str) -> None:
    tree = spoilt(scratch, **config)
    with pytest.raises(Refused, match=words):
        finetune(tree)
    assert not Path(tree["output"]).exists()


def test_a_model_without_a_tokenizer(scratch: Scratch, tmp_path: Path) -> None:
    tree = scratch()
    for path in Path(tree["model"]["path"]).glob("*token*"):
        path.unlink()
    with pytest.raises(Refused, match=r"model\.tokenizer"):
        finetune(tree)
    tiny_tokenizer_().save_pretrained(tmp_path / "words")
    tree["model"]["tokenizer"] = str(tmp_path / "words")
    finetune(tree)
    assert (Path(tree["output"]) / "tokenizer.json").is_file()


def test_tokens_of_another_vocabulary(scratch: Scratch, tmp_path: Path) -> None:
    write_tokens(tmp_path / "corpus", [[5, 300, 2]] * 9, VOCAB, {})
    tree = scratch(data__split=None)
    tree["data"]["path"] = str(tmp_path / "corpus")
    with pytest.raises(Refused, match="another tokenizer made them"):
        finetune(tree)
    assert not Path(tree["output"]).exists()
