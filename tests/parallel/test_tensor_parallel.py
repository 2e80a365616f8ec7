"""Tensor parallel layouts train exactly what one process trains: losses, every gradient, the weights after 3 steps."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
from layouts import Found, cases, config_of, same_run, steps, with_layout
from ranks import run_ranks
from safetensors.torch import load_file
from tiny_runs import copy_model, write_data

import luthier.parallel.tensor
from luthier.assemble import build
from luthier.errors import Refused
from luthier.models.cuts import cuts_of
from luthier.models.load import blueprint, load_config
from luthier.parallel.world import World
from luthier.recipes import run_on
from luthier.train.metrics import read_metrics

KEYS = {"train__batch": 4, "train__micro_batch": 2, "data__length": 128, "optim__clip": 0.5}
METHODS: dict[str, dict[str, Any]] = {
    "full": {"adapter__method": "none", "adapter__rank": None},
    "lora": {"adapter__method": "lora", "adapter__dropout": 0.2},
    "pissa": {"adapter__method": "lora", "adapter__pissa": True},
    "mixer": {"adapter__method": "lora", "adapter__mixer": True},
    "lokr": {"adapter__method": "lokr"},
    "ia3": {"adapter__method": "ia3", "adapter__rank": None},
    "whole": {"adapter__method": "lora", "adapter__modules_to_save": ["lm_head"]},
}
TP2: dict[str, Any] = {"tensor": 2}
CASES = [  # family, method, layout
    ("llama", "full", TP2),
    ("llama", "lora", TP2),
    ("llama", "pissa", TP2),
    ("llama", "mixer", TP2),
    ("llama", "lokr", TP2),
    ("llama", "ia3", TP2),
    ("llama", "whole", TP2),
    ("qwen3", "full", TP2),
    ("qwen3", "lora", TP2),
    ("gpt2", "full", TP2),
    ("gpt2", "lora", TP2),
    ("gpt2", "pissa", TP2),
    ("opt", "full", TP2),
    ("qwen2", "full", TP2),
]
SLOW = [
    ("mistral", "full", TP2),
    ("gemma2", "full", TP2),
    ("opt", "mixer", TP2),
    ("qwen3", "full", {"tensor": 2, "replicate": 2, "shard": 1}),
    ("qwen3", "full", {"tensor": 2, "shard": 2, "stage": 2}),
    ("qwen3", "lora", {"tensor": 2, "shard": 2, "stage": 3}),
    ("gpt2", "full", {"tensor": 2, "shard": 2, "stage": 3}),
]


@pytest.fixture(scope="session")
def alone(
    model_folder: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., tuple[Any, dict[str, Any], Found]]:
    """Folders, keys and what one process finds, of a family and a method."""
    data = write_data(tmp_path_factory.mktemp("rows"), train=12, dev=4)

    @cache
    def find(family: str, method: str) -> tuple[Any, dict[str, Any], Found]:
        folders = (model_folder(family), data, Path("unused"))
        keys = {**KEYS, **METHODS[method]}
        return folders, keys, steps(World(), folders, keys)

    return find


def compared(family: str, method: str, layout: dict[str, Any], alone: Callable[..., Any]) -> None:
    folders, keys, theirs = alone(family, method)
    given = with_layout(keys, layout)
    for ours in run_ranks(layout, steps, folders, given):
        same_run(ours, theirs)


@pytest.mark.parametrize(("family", "method", "layout"), cases(CASES, SLOW))
def test_ranks_train_what_one_does(
    family: str, method: str, layout: dict[str, Any], alone: Callable[..., Any]
) -> None:
    compared(family, method, layout, alone)


def shapes(world: World, folders: Any, keys: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    built = build(config_of(folders, keys, "float32"), train=True, world=world)
    return {name: tuple(p.shape) for name, p in built.model.named_parameters()}


def test_each_rank_holds_its_part(alone: Callable[..., Any]) -> None:
    folders, keys, theirs = alone("llama", "lora")
    for found in run_ranks(TP2, shapes, folders, keys | {"parallel__tensor": 2}):
        layer = "model.layers.1.self_attn."
        assert found[layer + "q_proj.weight"] == (32, 64)
        assert found[layer + "k_proj.weight"] == (16, 64)
        assert found[layer + "o_proj.weight"] == (64, 32)
        assert found[layer + "o_proj.adapter.lora_A"] == (2, 32)
        assert found[layer + "q_proj.adapter.lora_B"] == (32, 2)
        assert found["model.layers.0.mlp.down_proj.weight"] == (64, 48)
        assert found["lm_head.weight"] == found["model.embed_tokens.weight"] == (160, 64)
    assert "lora_B" in " ".join(theirs["weights"])


def test_dropout_of_heads_and_inner_numbers(
    model_folder: Callable[[str], Path], alone: Callable[..., Any], tmp_path: Path
) -> None:
    """The model's own dropout acts on attention weights of a rank's heads: the same units as in one process."""
    folder = copy_model(model_folder("gpt2"), tmp_path / "dropping")
    config = json.loads((folder / "config.json").read_text("utf-8"))
    rates = {"attn_pdrop": 0.3, "resid_pdrop": 0.2, "embd_pdrop": 0.1}
    (folder / "config.json").write_text(json.dumps(config | rates), "utf-8")
    folders, keys = (folder, *alone("gpt2", "full")[0][1:]), {**KEYS, **METHODS["full"]}
    theirs = steps(World(), folders, keys, 1)
    assert theirs["loss"] != alone("gpt2", "full")[2]["loss"][:1]
    for ours in run_ranks(TP2, steps, folders, keys | {"parallel__tensor": 2}, 1):
        same_run(ours, theirs)


def whole_run(world: World, folders: Any, keys: dict[str, Any]) -> None:
    run_on(config_of(folders, keys, "float32"), world)


@pytest.mark.parametrize("method", ["full", "pissa"])
def test_resume_on_another_degree(method: str, alone: Callable[..., Any], tmp_path: Path) -> None:
    """Two tensor ranks, then one process, then two again: the losses and evaluation of one uninterrupted process."""
    (model, data, _), keys, _ = alone("qwen3", method)
    keys = keys | {"evaluate__every": 2, "checkpoint__every": 2, "optim__schedule": "constant"}
    keys |= {"evaluate__generate": True, "evaluate__max_new_tokens": 4, "optim__lr": 1e-3}
    whole_run(World(), (model, data, tmp_path / "whole"), {**keys, "train__steps": 6})
    parts, cut = (model, data, tmp_path / "parts"), {**keys, "parallel__tensor": 2}
    going_on = {"checkpoint__resume": "auto"}
    run_ranks(TP2, whole_run, parts, {**cut, "train__steps": 2})
    whole_run(World(), parts, {**keys, **going_on, "train__steps": 4})
    run_ranks(TP2, whole_run, parts, {**cut, **going_on, "train__steps": 6})
    found = []
    for folder in (parts[2], tmp_path / "whole"):
        records = read_metrics(folder / "metrics.jsonl")
        report = json.loads((folder / "report.json").read_text("utf-8"))
        losses = {r["step"]: r["loss"] for r in records if r["kind"] == "train"}
        found.append((losses, report["after"]))
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-5) and len(found[0][0]) == 6
    assert found[0][1] == pytest.approx(found[1][1], rel=1e-5)
    name = "model.safetensors" if method == "full" else "adapter_model.safetensors"
    ours, theirs = (load_file(folder / name) for folder in (parts[2], tmp_path / "whole"))
    assert {n: t.shape for n, t in ours.items()} == {n: t.shape for n, t in theirs.items()}


def refusal(world: World, folders: Any, keys: dict[str, Any]) -> str:
    try:
        run_on(config_of(folders, keys, "float32"), world)
    except Refused as error:
        return str(error)
    return "nothing was refused"


@pytest.mark.parametrize(
    ("family", "keys", "message"),
    [
        ("llama", {"optim__name": "adafactor"}, "optim.name=adafactor with parallel.tensor=2"),
    ],
)
def test_what_cannot_be_cut_is_refused(
    family: str,
    keys: dict[str, Any],
    message: str,
    model_folder: Callable[[str], Path],
    alone: Callable[..., Any],
    tmp_path: Path,
) -> None:
    folders = (model_folder(family), alone("llama", "lora")[0][1], tmp_path / "out")
    for told in run_ranks(TP2, refusal, folders, {**KEYS, **keys, "parallel__tensor": 2}):
        assert re.search(message, told), told
    assert not (tmp_path / "out").exists()


def bias_in_the_layer(world: World, folders: Any, keys: dict[str, Any]) -> str:
    with patch.object(luthier.parallel.tensor, "_hide_bias", lambda layer: None):
        return refusal(world, folders, keys)


def test_a_wrong_cut_is_refused_at_the_start(
    model_folder: Callable[[str], Path], alone: Callable[..., Any], tmp_path: Path
) -> None:
    """A bias on each rank: the cut model is not the whole one."""
    folders = (model_folder("gpt2"), alone("llama", "lora")[0][1], tmp_path / "out")
    for told in run_ranks(TP2, bias_in_the_layer, folders, {**KEYS, "parallel__tensor": 2}):
        assert "hidden states cut among tensor-parallel ranks differ" in told


def test_heads_that_do_not_divide_are_refused(model_folder: Callable[[str], Path]) -> None:
    model = blueprint(load_config(model_folder("llama")), "tiny")
    assert len(cuts_of(model, 2).layers) == 15  # with the head
    with pytest.raises(Refused, match="4 attention heads, which 3 ranks"):
        cuts_of(model, 3)
    keys = cuts_of(model, 4).layers["model.layers.0.self_attn.k_proj"]
    assert [keys.part(0, rank, 4).stretches for rank in range(4)] == [
        [(0, 16)],
        [(0, 16)],
        [(16, 16)],
        [(16, 16)],
    ]
    with pytest.raises(Refused, match=r"'falcon'.*2 groups of heads.*4 ranks cannot share"):
        cuts_of(blueprint(load_config(model_folder("falcon_40b")), "tiny"), 4)
