"""Any suite's file, several files, overrides by foreign names, command lines without a file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from paddle_arguments import ARGUMENTS, SFT

from luthier.configfile import Resolved
from luthier.errors import Refused
from luthier.interop.read import commands, read_config, recognise, split_words


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def read(folder: Path, words: tuple[str, ...] = (), **arguments: Any) -> Resolved:
    path = folder / "arguments.json"
    path.write_text(json.dumps({**ARGUMENTS, **arguments}, indent=1))
    return read_config([path], words)


@pytest.mark.parametrize(
    "words",
    [
        ("lora_rank=16", "lora=true", "train.seed=5"),
        ("--lora_rank", "16", "--lora", "--train.seed", "5"),
        ("--lora", "lora_rank=16", "--train.seed=5"),
    ],
)
def test_overrides_use_their_own_names(here: Path, words: tuple[str, ...]) -> None:
    resolved = read(here, words, lora_rank=4, seed=9)
    assert (resolved.config.adapter.rank, resolved.config.train.seed) == (16, 5)
    assert resolved.origins["adapter.rank"] == "PaddleNLP lora_rank (override)"
    assert resolved.origins["train.seed"] == "override"


def test_our_batch_replaces_their_accumulation(here: Path) -> None:
    assert read(here, ("train.batch=16",), gradient_accumulation_steps=4).config.batch == 16


def test_a_second_file_wins(here: Path) -> None:
    second = here / "more.json"
    second.write_text('{"learning_rate": 0.01, "lora": true}')
    ours = here / "ours.yaml"
    ours.write_text("data: {length: 77}\n")
    first = here / "first.json"
    first.write_text(json.dumps({**ARGUMENTS, "learning_rate": 0.02}))
    config = read_config([first, second, ours]).config
    assert (config.lr, config.adapter.method, config.data.length) == (0.01, "lora", 77)
    with pytest.raises(Refused, match="give the PaddleNLP file first"):
        read_config([ours, first])


def test_a_plain_command_line(here: Path) -> None:
    words = [word for name, value in SFT.items() for word in (f"--{name}", str(value))]
    assert read_config([], words).config == read(here, **SFT).config
    with pytest.raises(Refused, match=r"model\.path is needed"):
        read_config([], ["data.length=5"])


def test_words_of_the_documents(here: Path) -> None:
    for name in ("a.json", "b.json"):
        (here / name).write_text("{}")
    files = [Path("a.json"), Path("b.json")]
    assert split_words(["--config", "a.json", "--lora", "b.json", "--lora", "true"]) == (
        files,
        ["--lora", "true"],
    )
    assert split_words(["a.json", "b.json", "x=1", "c.json"]) == (files, ["x=1", "c.json"])
    assert split_words(["--lora", "true"]) == ([], ["--lora", "true"])


@pytest.mark.parametrize(
    ("arguments", "want"),
    [
        ({}, ["finetune"]),
        ({"do_train": True, "do_eval": True}, ["finetune"]),
        ({"do_train": True, "do_predict": True}, ["finetune", "predict"]),
        ({"do_train": False, "do_eval": True}, ["evaluate"]),
        ({"do_train": False, "do_predict": True}, ["predict"]),
        ({"do_train": False}, ["finetune"]),
        ({"do_gptq": True, "do_train": False, "do_eval": True}, ["finetune"]),  # which refuses it
    ],
)
def test_commands_of_the_script(here: Path, arguments: dict[str, Any], want: list[str]) -> None:
    (here / "a.json").write_text(json.dumps({**ARGUMENTS, **arguments}))
    assert commands(["a.json", "seed=1"]) == [[name, "a.json", "seed=1"] for name in want]


# ---- whose file it is


@pytest.mark.parametrize(
    ("values", "suite"),
    [
        ({"model": {"path": "m"}, "output": "o"}, "luthier"),
        ({"optim": {"lr": 1}}, "luthier"),
        ({"optim": "adamw", "seed": 1}, "paddlenlp"),
        (ARGUMENTS, "paddlenlp"),
        (
            {"model": {"model_config": {}}, "trainer": {}, "runner_config": {}, "seed": 0},
            "mindformers",
        ),
        ({"foo": 1}, "luthier"),
    ],
)
def test_recognition(values: dict[str, Any], suite: str) -> None:
    assert recognise(values) == suite


def test_mindformers_is_refused_by_name(here: Path) -> None:
    path = here / "run.yaml"
    path.write_text("run_mode: train\ntrainer: {type: x}\nmodel: {arch: y}\n")
    with pytest.raises(Refused, match=r"MindFormers YAML \(run_mode, trainer\)"):
        read_config([path])
