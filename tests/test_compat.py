"""The suites' own commands: scripts/compat only call Luthier's command line."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import luthier.cli

FOLDER = Path(__file__).resolve().parents[1] / "scripts" / "compat"


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """The command lines that a script hands on; those that hold `fail` end with code 1."""
    found: list[list[str]] = []

    def main(words: list[str]) -> int:
        found.append(words)
        return int("fail" in words)

    monkeypatch.setattr(luthier.cli, "main", main)
    monkeypatch.syspath_prepend(str(FOLDER))
    monkeypatch.delitem(sys.modules, "run_finetune", raising=False)
    return found


def start(script: str, *words: str) -> Any:
    """The exit code of a script started as `python script words...`."""
    import runpy

    argv, sys.argv = sys.argv, [script, *words]
    try:
        with pytest.raises(SystemExit) as caught:
            runpy.run_path(str(FOLDER / script), run_name="__main__")
        return caught.value.code
    finally:
        sys.argv = argv
        sys.modules.pop("run_finetune", None)


@pytest.mark.parametrize("script", ["run_finetune.py", "finetune_generation.py"])
def test_fine_tuning(calls: list[list[str]], tmp_path: Path, script: str) -> None:
    path = tmp_path / "lora_argument.json"
    path.write_text(json.dumps({"model_name_or_path": "m", "do_train": True, "do_predict": True}))
    words = [str(path), "--lora_rank", "16"]
    assert start(script, *words) == 0
    assert calls == [["finetune", *words], ["predict", *words]]


def test_a_failure_ends_the_script(calls: list[list[str]], tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text('{"do_predict": true}')
    assert start("run_finetune.py", str(path), "--output_dir", "fail") == 1
    assert len(calls) == 1


def test_plain_options(calls: list[list[str]]) -> None:
    words = ["--model_name_or_path", "m", "--do_train", "false", "--do_eval"]
    assert start("run_finetune.py", *words) == 0
    assert calls == [["evaluate", *words]]


@pytest.mark.parametrize("kind", ["lora", "vera", "lokr"])
def test_merging(calls: list[list[str]], kind: str) -> None:
    words = ["--model_name_or_path", "m", f"--{kind}_path", "a", "--output_path", "o"]
    assert start(f"merge_{kind}_params.py", *words) == 0
    assert calls == [["merge", *words]]


def test_merging_parts_of_ranks(calls: list[list[str]]) -> None:
    words = ["--model_name_or_path", "m", "--tp", "2", "--pipeline_parallel_degree", "1"]
    assert start("merge_tp_params.py", *words) == 0
    assert start("merge_tp_params.py", *words, "--output_path", "o") == 0
    assert calls == [["convert", "m", "m/merged"], ["convert", "m", "o"]]


@pytest.mark.parametrize(
    ("script", "words"),
    [
        ("merge_tp_params.py", ["--model_name_or_path", "missing"]),
        ("run_finetune.py", ["missing.json"]),
        ("finetune_generation.py", ["--lora_rang", "3", "--lora"]),
        ("merge_lora_params.py", ["--lora_path", "a"]),
        ("merge_vera_params.py", ["--merge_vera_model_path", "o"]),
        ("merge_lokr_params.py", ["--lokr_path", "a", "--merge_lokr_model_path", "o", "--x", "1"]),
    ],
)
def test_bad_input_is_refused_with_code_2(script: str, words: list[str], tmp_path: Path) -> None:
    paths = [str(FOLDER.parents[1]), os.environ.get("PYTHONPATH", "")]
    done = subprocess.run(
        [sys.executable, str(FOLDER / script), *words],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))},
        check=False,
    )
    assert done.returncode == 2 and done.stderr.startswith("luthier: "), done.stderr
    assert "Traceback" not in done.stderr and list(tmp_path.iterdir()) == []


def test_the_command_line_takes_plain_options(capsys: pytest.CaptureFixture[str]) -> None:
    words = "--model_name_or_path m --dataset_name_or_path d --output_dir o --lora --lora_rank 4"
    assert luthier.cli.main(["show", *words.split()]) == 0
    assert "PaddleNLP lora_rank (override)" in capsys.readouterr().out
