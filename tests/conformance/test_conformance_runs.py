"""Every family from the command line: pretraining, full and LoRA fine-tuning, answers and merging, on a tiny folder."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from family_checks import every_family
from safetensors.torch import load_file
from tiny_runs import tiny_config, write_data, write_rows
from transformers import AutoModelForCausalLM

from luthier.cli import main
from luthier.positions import position_axes
from tests.zoo_folders import ZOO, zoo_folder

TEXTS = [f"{i} the moon and the star " * (1 + 5 * i % 7) for i in range(20)]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_data(tmp_path_factory.mktemp("data"), train=8, dev=2)


@pytest.fixture(scope="module")
def folder_of(
    model_folder: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], Path]:
    """`folder_of(family)`: weights and tokenizer; of the four families of `models/zoo` with their vocabularies."""

    @cache
    def make(family: str) -> Path:
        if family in ZOO:
            return zoo_folder(family, tmp_path_factory.mktemp("zoo") / family / "model")
        return model_folder(family)

    return make


def finetune(here: Path, model: Path, data: Path, **keys: Any) -> Path:
    """Train from a file; the run's folder."""
    out = here / "run"
    fixed = {"train__steps": 2, "train__micro_batch": 2, "checkpoint__every": "never"}
    # the vocabularies of those four are mostly bytes
    keys = {**fixed, "data__length": 256 if model.parent.name in ZOO else 128, **keys}
    (here / "run.json").write_text(json.dumps(tiny_config(model, data, out, **keys)), "utf-8")
    assert main(["finetune", str(here / "run.json")]) == 0
    ledger = json.loads((out / "ledger.json").read_text("utf-8"))["train"]
    if keys.get("train__mode") != "pretrain":
        assert ledger["packing"]["rows"] < ledger["examples"]  # documents shared rows
    assert "documents compared bit by bit" in (out / "report.html").read_text("utf-8")
    return out


def plain(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()


@every_family
def test_full_run(
    family: str, folder_of: Callable[[str], Path], data: Path, tmp_path: Path
) -> None:
    """Full fine-tuning changes every tensor, keeps tied heads tied and gives a plain folder."""
    base = folder_of(family)
    out = finetune(tmp_path, base, data, adapter__method=None, adapter__rank=None, optim__lr=0.01)
    before, after = (load_file(f / "model.safetensors") for f in (base, out))
    assert before.keys() == after.keys()
    fixed = {n for n in before if torch.equal(before[n], after[n])}
    assert all(
        n.endswith("e_score_correction_bias") for n in fixed
    )  # no gradient is defined for it
    model = plain(out)
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    assert (head.weight is embedding.weight) == plain(base).config.tie_word_embeddings


@every_family
def test_lora_run(
    family: str,
    folder_of: Callable[[str], Path],
    data: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """LoRA trains on all linear layers and experts, the result answers, and merges into a plain folder."""
    base = folder_of(family)
    out = finetune(tmp_path, base, data, optim__lr=0.01)
    questions = write_rows(tmp_path / "questions.json", [{"src": "what is red?"}])
    words = [f"predict.input={questions}", "evaluate.max_new_tokens=2"]
    assert main(["predict", str(tmp_path / "run.json"), *words]) == 0
    assert main(["merge", str(base), str(out), str(tmp_path / "merged")]) == 0, capsys.readouterr()
    model, ids = plain(base), [7, 9, 4]
    if family == "chatglm":
        ids += [model.config.gmask_token_id, model.config.bos_token_id]
    with torch.no_grad():
        before, after = (
            one(torch.tensor([ids])).logits for one in (model, plain(tmp_path / "merged"))
        )
    assert not torch.equal(before, after)


@every_family
def test_pretrain_run(family: str, folder_of: Callable[[str], Path], tmp_path: Path) -> None:
    """From random weights, on texts laid end to end: every tensor changes, and the folder is a plain one."""
    base, texts = folder_of(family), tmp_path / "texts.jsonl"
    write_rows(texts, [{"text": text} for text in TEXTS])
    keys = {"train__mode": "pretrain", "model__init": "random", "data__length": 48}
    keys |= {"data__cache": str(tmp_path / "cache"), "evaluate__every": "never"}
    keys |= {"adapter__method": None, "adapter__rank": None, "optim__lr": 0.01}
    if position_axes(family) == 2:  # a row is one text
        keys["data__borders"] = "ignore"
    out = finetune(tmp_path, base, texts, **keys)
    given, model = plain(base), plain(out)
    after = load_file(out / "model.safetensors")
    assert after.keys() == load_file(base / "model.safetensors").keys()
    assert all(torch.isfinite(t).all() for t in after.values())
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    assert (head.weight is embedding.weight) == given.config.tie_word_embeddings
    records = (out / "metrics.jsonl").read_text("utf-8").splitlines()
    losses = [r["loss"] for r in map(json.loads, records) if r["kind"] == "train"]
    # of random weights about log(vocabulary); one step makes it less
    assert losses[1] < losses[0]
