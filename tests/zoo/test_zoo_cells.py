"""The zoo's families do from the command line what README says of them: train, pack, generate, merge."""

from __future__ import annotations

import contextlib
import io
import json
from pathlib import Path

import pytest

from luthier.cli import main
from tests.zoo_folders import ZOO, zoo_folder

PAIRS = [
    {"src": f"how many apples in the box {i}?", "tgt": " ".join(["seven"] * (1 + i % 3))}
    for i in range(8)
]


@pytest.mark.parametrize("family", ZOO)
def test_commands_of_a_user(family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    base = str(zoo_folder(family, tmp_path / family))
    Path("data").mkdir()
    Path("data/train.json").write_text("".join(json.dumps(row) + "\n" for row in PAIRS), "utf-8")
    Path("questions.jsonl").write_text(json.dumps({"src": "how many apples?"}) + "\n", "utf-8")
    words = [f"model.path={base}", "model.dtype=float32", "data.path=data", "data.length=256"]
    words += ["train.steps=1", "train.batch=2", "evaluate.every=never", "checkpoint.every=never"]
    words += ["log.sinks=[]", "log.progress=none"]
    lora = ["adapter.method=lora", "adapter.rank=2"]
    asking = ["predict.input=questions.jsonl", "evaluate.max_new_tokens=2"]
    for command in (
        ["finetune", *words, "output=full"],
        ["finetune", *words, *lora, "output=lora"],
        ["finetune", *words, *lora, "quantize.weights=nf4", "output=qlora"],
        ["predict", *words, *asking, "output=lora"],
        ["merge", base, "lora", "merged"],
    ):
        out = io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
            code = main(command)
        assert code == 0, f"{command}\n{out.getvalue()}"
    ledger = json.loads(Path("lora/ledger.json").read_text())["train"]
    assert ledger["packing"]["rows"] < ledger["examples"]  # documents shared rows
    assert "documents compared bit by bit" in Path("lora/report.html").read_text()
