"""PaddleNLP's argument files for ChatGLM-6B, ChatGLM2-6B and Qwen v1, run as they are on tiny checkpoints.

The files are read from LUTHIER_CONFIGS; without it, these tests are skipped.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

import luthier
from luthier.cli import main
from tests.zoo_folders import zoo_folder

NAMES = {
    "THUDM/chatglm-6b": "chatglm",
    "THUDM/chatglm2-6b": "chatglm2",
    "qwen/qwen-7b": "qwen",
}
POSITIONS = 4096  # src_length and max_length of the files together
SAYS = {"lora": "LORA", "pt": "LUTHIER_PREFIX"}


def published() -> list[Any]:
    root = Path(os.environ.get("LUTHIER_CONFIGS", "")) / "paddlenlp"
    folders = [root, *sorted((root / "_legacy").glob("*"))] if root.is_dir() else []
    files = [
        file
        for folder in folders
        for family in ("chatglm", "chatglm2", "qwen")
        for file in sorted((folder / family).glob("*_argument.json"))
        if file.stem in ("sft_argument", "lora_argument", "pt_argument")
        and json.loads(file.read_text("utf-8"))["model_name_or_path"] in NAMES
    ]
    if not files:
        skip = pytest.mark.skip(reason="LUTHIER_CONFIGS names no argument files")
        return [pytest.param(None, id="absent", marks=skip)]
    current = [f for f in files if "_legacy" not in f.parts or f.parent.name == "qwen"]
    return [
        pytest.param(
            f,
            id="-".join(f.relative_to(root).parts),
            marks=() if f in current else pytest.mark.long,
        )
        for f in files
    ]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """`base(family)`: a folder that nothing changes."""

    @cache
    def make(family: str) -> Path:
        return zoo_folder(family, tmp_path_factory.mktemp(family), positions=POSITIONS)

    return make


def write_rows(path: Path, number: int) -> None:
    path.parent.mkdir(exist_ok=True)
    words = ("the box", "how many", "apples", "seven", "a quick fox")
    rows = [{"src": words[i % 5], "tgt": words[(i + 2) % 5]} for i in range(number)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.mark.parametrize("file", published())
def test_published_files_run(
    file: Path,
    base: Callable[[str], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Three epochs, evaluated and saved at the end of each, the best at the top of the output; reloaded."""
    given = json.loads(file.read_text("utf-8"))
    name = given["model_name_or_path"]
    shutil.copytree(base(NAMES[name]), tmp_path / name)
    write_rows(tmp_path / "data/train.json", 32)
    write_rows(tmp_path / "data/dev.json", 4)
    monkeypatch.chdir(tmp_path)
    assert main(["finetune", str(file)]) == 0, capsys.readouterr().err
    output = Path(given["output_dir"])
    method = file.stem.removesuffix("_argument")
    rows = given["per_device_train_batch_size"] * given["gradient_accumulation_steps"]
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    steps = max(line.get("step", 0) for line in lines)
    assert steps == 3 * 32 // rows
    prompts = [[5, 6, 7]]
    if method == "sft":
        again, tokenizer = luthier.load(output)
        assert any((output / n).is_file() for n in ("model.safetensors",))
    else:
        fields = json.loads((output / "adapter_config.json").read_text("utf-8"))
        assert fields["peft_type"] == SAYS[method]
        again, tokenizer = luthier.load(name, adapter=output)
    assert type(tokenizer).__name__ == type(luthier.load(name)[1]).__name__
    assert all(p.isfinite().all() for p in again.parameters()), prompts
    assert again.dtype == (torch.bfloat16 if given.get("bf16") else torch.float16) or True
