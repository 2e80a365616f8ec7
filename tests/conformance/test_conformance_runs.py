"""Every family from the command line: `luthier finetune`, full and LoRA, answers and merging, on a tiny folder."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from family_checks import every_family
from safetensors.torch import load_file
from tiny_runs import tiny_config, write_data, write_rows
from transformers import AutoModelForCausalLM

from luthier.cli import main


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_data(tmp_path_factory.mktemp("data"), train=8, dev=2)


def finetune(here: Path, model: Path, data: Path, **keys: Any) -> Path:
    """Train from a file; the run's folder."""
    out = here / "run"
    keys = {"train__steps": 2, "train__micro_batch": 2, "checkpoint__every": "never", **keys}
    (here / "run.json").write_text(json.dumps(tiny_config(model, data, out, **keys)), "utf-8")
    assert main(["finetune", str(here / "run.json")]) == 0
    ledger = json.loads((out / "ledger.json").read_text("utf-8"))["train"]
    assert ledger["packing"]["rows"] < ledger["examples"]  # documents shared rows
    assert "documents compared bit by bit" in (out / "report.html").read_text("utf-8")
    return out


def plain(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()


@every_family
def test_full_run(
    family: str, model_folder: Callable[[str], Path], data: Path, tmp_path: Path
) -> None:
    """Full fine-tuning changes every tensor, keeps tied heads tied and gives a plain folder."""
    base = model_folder(family)
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
    model_folder: Callable[[str], Path],
    data: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """LoRA trains on all linear layers and experts, the result answers, and merges into a plain folder."""
    base = model_folder(family)
    out = finetune(tmp_path, base, data, optim__lr=0.01)
    questions = write_rows(tmp_path / "questions.json", [{"src": "what is red?"}])
    words = [f"predict.input={questions}", "evaluate.max_new_tokens=2"]
    assert main(["predict", str(tmp_path / "run.json"), *words]) == 0
    assert main(["merge", str(base), str(out), str(tmp_path / "merged")]) == 0, capsys.readouterr()
    ids = torch.tensor([[7, 9, 4]])
    with torch.no_grad():
        before, after = (plain(f)(ids).logits for f in (base, tmp_path / "merged"))
    assert not torch.equal(before, after)
