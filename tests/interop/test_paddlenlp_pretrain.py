"""PaddleNLP's pre-training files: what they mean here, and a run of one as it is.

The learning rates are those of PaddleNLP's CosineAnnealingWithWarmupDecay and LinearAnnealingWithWarmupDecay
with last_epoch=0, whose first step is t = 1.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from conftest import VOCAB, tiny_tokenizer_
from paddle_arguments import ARGUMENTS

from luthier.config import DataPart, RunConfig
from luthier.data.indexed import write_tokens
from luthier.errors import Refused
from luthier.interop.read import commands, read_config
from luthier.train.schedules import make_schedule

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = os.environ.get("LUTHIER_CONFIGS")
PRETRAIN = {
    "model_name_or_path": "base",
    "input_dir": "./data",
    "output_dir": "./out",
    "max_steps": 50,
    "learning_rate": 3e-4,
    "min_learning_rate": 3e-5,
    "warmup_steps": 10,
}


def read(folder: Path, **arguments: Any) -> RunConfig:
    path = folder / "pretrain_argument.json"
    path.write_text(json.dumps({**PRETRAIN, **arguments}), "utf-8")
    return read_config([path]).config


def test_defaults_are_those_of_its_script(tmp_path: Path) -> None:
    config = read(tmp_path)
    assert config.train.mode == "pretrain" and config.model.init == "random"
    assert config.data.split == "949,50,1" and config.data.length == 1024
    assert config.data.borders == "ignore" and config.data.path == "./data"
    assert config.train.steps == 50 and config.checkpoint.every == 500
    assert config.evaluate.every == "never" and config.evaluate.rows == 80
    config = read(tmp_path, continue_training=1, do_eval=True, eval_steps=20, save_steps=7)
    assert config.model.init == "pretrained" and config.evaluate.every == 20
    assert config.checkpoint.every == 7
    config = read(tmp_path, num_hidden_layers=3, tokenizer_name_or_path="words", split="8,1,1")
    assert config.model.num_layers == 3 and config.model.tokenizer == "words"
    assert config.data.split == "8,1,1"
    assert read(tmp_path, tokenizer_name_or_path="base").model.tokenizer is None


def paddles(t: int, peak: float, low: float, warmup: int, decay: int, *, cosine: bool) -> float:
    """The rate of step t = 1, 2, ... as the two classes define it."""
    if warmup and t <= warmup:
        return peak * t / warmup
    if t > decay:
        return low
    share = (t - warmup) / (decay - warmup)
    return low + (peak - low) * (0.5 * (math.cos(math.pi * share) + 1) if cosine else 1 - share)


@pytest.mark.parametrize("kind", ["linear", "cosine"])
@pytest.mark.parametrize(
    "arguments",
    [{}, {"decay_steps": 30}, {"warmup_steps": 1}, {"warmup_steps": 0, "warmup_ratio": 0.1}],
    ids=str,
)
def test_learning_rates_are_those_of_its_schedules(
    tmp_path: Path, kind: str, arguments: dict[str, Any]
) -> None:
    config = read(tmp_path, lr_scheduler_type=kind, **arguments)
    rate = make_schedule(config.optim, config.lr, 50)
    warmup = arguments.get("warmup_steps", 10) or 5
    for t in range(1, 51):
        wanted = paddles(
            t, 3e-4, 3e-5, warmup, arguments.get("decay_steps", 50), cosine=kind == "cosine"
        )
        assert rate(t - 1) == pytest.approx(wanted, rel=1e-12), t


def test_several_files(tmp_path: Path) -> None:
    config = read(tmp_path, input_dir="3 a/first 1.5 b/second")
    assert isinstance(config.data.path, tuple)
    assert [(p.path, p.weight) for p in config.data.path] == [("a/first", 3), ("b/second", 1.5)]
    for name in ("x", "y"):
        write_tokens(tmp_path / "data" / name, [[3, 4]], VOCAB, {})
    config = read(tmp_path, input_dir=str(tmp_path / "data"))
    assert config.data.path == tuple(
        DataPart.model_validate({"path": str(tmp_path / "data" / name), "weight": 1.0})
        for name in ("x", "y")
    )


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"input_dir": "0.5 a 0.5"}, "a weight before each"),
        ({"input_dir": "a b c d"}, "a is no weight"),
        ({"input_dir": "1 a -1 b"}, "-1 is no weight"),
        ({"input_dir": "1 a nan b"}, "nan is no weight"),
        ({"input_dir": "1 a 0 b"}, "0 is no weight"),
        ({"split": "1,2"}, "three shares"),
        ({"data_impl": "lazy"}, "memory-mapped"),
        ({"max_steps": -1}, "without max_steps"),
        ({"input_dir": None}, "input_dir is not given"),
        ({"min_learning_rate": 1e-3}, r"optim\.lr_end"),
    ],
)
def test_bad_arguments_are_refused(tmp_path: Path, arguments: dict[str, Any], words: str) -> None:
    with pytest.raises(Refused, match=words):
        read(tmp_path, **arguments)


def test_a_folder_without_token_files_is_refused(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    with pytest.raises(Refused, match=r"no \.idx file"):
        read(tmp_path, input_dir=str(tmp_path / "data"))
    (tmp_path / "data" / "a_idx.npz").touch()
    with pytest.raises(Refused, match="the older"):
        read(tmp_path, input_dir=str(tmp_path / "data"))


def test_pretraining_predicts_nothing(tmp_path: Path) -> None:
    read(tmp_path, do_train=True, do_predict=True)
    words = [str(tmp_path / "pretrain_argument.json")]
    assert commands(words) == [["finetune", *words]]


def test_fine_tuning_says_what_it_does_not_read(tmp_path: Path) -> None:
    path = tmp_path / "sft_argument.json"
    path.write_text(json.dumps({**ARGUMENTS, "max_seq_length": 9}), "utf-8")
    assert any("max_seq_length" in remark for remark in read_config([path]).remarks)


@pytest.mark.skipif(not CONFIGS, reason="LUTHIER_CONFIGS is not set")
@pytest.mark.parametrize("family", ["llama", "gpt-3"])
def test_published_files_run_as_they_are(family: str, tmp_path: Path, model_folder: Any) -> None:
    """In a folder where their names are: a tiny checkpoint, and token files in ./data."""
    path = Path(str(CONFIGS)) / "paddlenlp" / family / "pretrain_argument.json"
    given = json.loads(path.read_text("utf-8"))
    shutil.copytree(
        model_folder("llama" if family == "llama" else "gpt2"),
        tmp_path / given["model_name_or_path"],
    )
    tokenizer = tiny_tokenizer_()
    documents = [[*tokenizer(f"{i} of the and " * (i % 9 + 1))["input_ids"], 2] for i in range(80)]
    write_tokens(tmp_path / "data" / "corpus", documents, VOCAB, {})
    paths = [str(ROOT), os.environ.get("PYTHONPATH", "")]
    command = [sys.executable, str(ROOT / "scripts" / "compat" / "run_pretrain.py"), str(path)]
    short = ["--max_steps", "3", "--max_seq_length", "64", "--eval_steps", "2", "--no_cuda"]
    done = subprocess.run(
        [*command, *short, "--warmup_steps", "2", "--report_to", "none"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))},
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "the parallel settings are off" in done.stdout
    output = tmp_path / given["output_dir"]
    records = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    assert [r["step"] for r in records if r["kind"] == "evaluate"] == [2, 3]
    assert (output / "model.safetensors").is_file()
