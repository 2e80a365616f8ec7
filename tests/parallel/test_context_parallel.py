"""Context-parallel layouts train exactly what one process trains: losses, every gradient, the weights after 3 steps."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
from layouts import Found, cases, config_of, same_run, steps, with_layout
from ranks import run_ranks
from tiny_runs import copy_model, write_data, write_rows
from zoo_folders import WORDS, zoo_folder

from luthier.errors import Refused
from luthier.parallel.world import World
from luthier.recipes import run_on
from luthier.train.metrics import read_metrics

KEYS = {"train__batch": 4, "train__micro_batch": 2, "data__length": 150, "optim__clip": 0.5}
METHODS: dict[str, dict[str, Any]] = {
    "full": {"adapter__method": "none", "adapter__rank": None},
    "lora": {"adapter__method": "lora", "adapter__dropout": 0.2},
    "prefix": {"adapter__method": "prefix", "adapter__num_prefix_tokens": 5, "adapter__rank": None},
    "prompt": {"adapter__method": "prompt", "adapter__num_prefix_tokens": 5, "adapter__rank": None},
    "reft": {"adapter__method": "reft", "adapter__dropout": 0.2},
    "mora": {"adapter__method": "mora"},
    "noise": {"adapter__method": "lora", "adapter__neftune_alpha": 5.0},
    "noise of rows": {
        "adapter__method": "lora",
        "adapter__neftune_alpha": 5.0,
        "adapter__neftune_scaling": "paddlenlp",
    },
    "dynamic": {
        "model__rope_scaling": {"type": "dynamic", "factor": 2.0},
        **{"adapter__method": "lora"},
    },
    "router": {
        "train__router_loss": 0.5,
        "adapter__method": "lora",
        "adapter__targets": ["q_proj", "o_proj"],
    },
}
GATHER: dict[str, Any] = {"context": 2, "context_method": "gather"}
HEADS: dict[str, Any] = {"context": 2, "context_method": "heads"}
CASES = [  # family, method, layout
    ("llama", "full", GATHER),
    ("llama", "lora", GATHER),
    ("llama", "lora", HEADS),
    ("llama", "prompt", GATHER),
    ("llama", "reft", GATHER),
    ("llama", "noise of rows", GATHER),
    ("llama", "dynamic", GATHER),
    ("qwen3", "full", HEADS),
    ("gpt2", "full", GATHER),
    ("gpt2", "reft", HEADS),
    ("bloom", "full", HEADS),
    ("bloom", "prefix", GATHER),
    ("mistral", "full", GATHER),
    ("mistral", "prefix", HEADS),
    ("chatglm2", "mora", GATHER),
    ("mixtral", "router", GATHER),
]
# where float32 is computed with in any case: the gradients of tokens that all ranks share (prompt tuning) and of
# gemma's norms are sums of what was rounded to it, grouped products of experts know no float64, and gpt_oss has
# biases of keys, whose gradients cancel
ROUNDED = {"prompt": 1e-6, "gemma2": 1e-6, "mixtral": 1e-5, "deepseek_v3": 1e-5, "gpt_oss": 1e-4}
EXPERTS = ("mixtral", "gpt_oss", "deepseek_v3")
PLAIN = ("llama", "qwen3", "gpt2", "bloom", "mistral", "chatglm2", "qwen")
SLOW = [
    *[
        (family, method, layout)
        for family in (*PLAIN, "gpt_oss", "gemma2", "deepseek_v3", "falcon_alibi", "mixtral")
        for method in ("full", "lora", "prefix", "reft", "mora")
        for layout in (GATHER, HEADS)
        if (family, method, layout) not in CASES
        # no answer reads the first tokens of a prompt through two windows of 4
        and (family, method) not in (("mistral", "reft"), ("gemma2", "reft"))
        # dropout of tokens that experts regroup is refused
        and (method != "lora" or family not in EXPERTS)
    ],
    ("llama", "noise", GATHER),
    ("llama", "prompt", HEADS),
    ("mixtral", "router", HEADS),
]
FOUR = [
    ("llama", "lora", {**GATHER, "pipeline": 2}),
    ("qwen3", "full", {**HEADS, "pipeline": 2}),
    ("llama", "lora", {**GATHER, "tensor": 2}),
    ("qwen3", "full", {**HEADS, "tensor": 2}),
    ("gpt2", "full", {"context": 2, "tensor": 2}),
    ("llama", "full", {**GATHER, "shard": 2, "stage": 2}),
    ("qwen3", "lora", {**HEADS, "shard": 2, "stage": 3}),
    ("gpt2", "reft", {**GATHER, "shard": 2, "stage": 3}),
    ("llama", "lora", {"context": 2, "replicate": 2, "shard": 1}),
    ("llama", "full", {"context": 4, "context_method": "gather"}),
    ("llama", "lora", {"context": 4, "context_method": "heads"}),  # 2 heads of keys on 4 ranks
]


def context_folders(family: str, folder: Path) -> tuple[Path, Path, Path]:
    """A family whose contexts are seen in both directions, with its own tokenizer, and questions of its words."""
    data = folder / "data"
    for name, number in (("train", 12), ("dev", 4)):
        rows = [
            {"src": " ".join(WORDS[:3] * (2 + i % 5)), "tgt": " ".join(WORDS[i : i + 5])}
            for i in range(number)
        ]
        write_rows(data / f"{name}.json", rows)
    return zoo_folder(family, folder / "model"), data, Path("unused")


@pytest.mark.parametrize(
    ("family", "method", "layout"),
    [("chatglm", "lora", GATHER), ("glm_legacy", "full", GATHER), ("chatglm", "full", HEADS)],
)
def test_contexts_seen_in_both_directions(
    family: str, method: str, layout: dict[str, Any], tmp_path: Path
) -> None:
    folders, keys = context_folders(family, tmp_path), {**KEYS, **METHODS[method]}
    theirs = steps(World(), folders, keys)
    given = with_layout(keys, layout)
    for ours in run_ranks(layout, steps, folders, given):
        same_run(ours, theirs)


def dtype_of(family: str) -> str:
    return "float32" if family in EXPERTS else "float64"


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
        return folders, keys, steps(World(), folders, keys, 3, dtype_of(family))

    return find


def compared(family: str, method: str, layout: dict[str, Any], alone: Callable[..., Any]) -> None:
    folders, keys, theirs = alone(family, method)
    given = with_layout(keys, layout)
    tolerance = ROUNDED.get(method, ROUNDED.get(family, 1e-9))
    found = run_ranks(layout, steps, folders, given, 3, dtype_of(family))
    for ours in found:
        if "pipeline" in layout:  # a rank has the tensors of its own layers
            ours["weights"] = {n: w for rank in found for n, w in rank["weights"].items()}
            every = zip(*(rank["gradients"] for rank in found), strict=True)
            ours["gradients"] = [{n: g for one in step for n, g in one.items()} for step in every]
        same_run(ours, theirs, tolerance, norm=max(tolerance, 1e-7))


@pytest.mark.parametrize(("family", "method", "layout"), cases(CASES, [*SLOW, *FOUR]))
def test_ranks_train_what_one_does(
    family: str, method: str, layout: dict[str, Any], alone: Callable[..., Any]
) -> None:
    compared(family, method, layout, alone)


@pytest.mark.parametrize("layout", [GATHER, HEADS], ids=["gather", "heads"])
def test_half_precision(layout: dict[str, Any], alone: Callable[..., Any]) -> None:
    """Loss and norm but for bfloat16's rounding, which is 0.4 % for each number."""
    folders, keys, _ = alone("llama", "lora")
    theirs = steps(World(), folders, keys, 1, "bfloat16")
    given = with_layout(keys, layout)
    for ours in run_ranks(layout, steps, folders, given, 1, "bfloat16"):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=4e-3)
        assert ours["norm"] == pytest.approx(theirs["norm"], rel=4e-2)


def whole_run(world: World, folders: Any, keys: dict[str, Any]) -> None:
    run_on(config_of(folders, keys, "float32"), world)


def test_resume_on_another_degree(alone: Callable[..., Any], tmp_path: Path) -> None:
    """Two context ranks, then one process: the losses and the evaluation of one uninterrupted process."""
    (model, data, _), keys, _ = alone("qwen3", "full")
    keys = keys | {"evaluate__every": 2, "checkpoint__every": 2, "optim__schedule": "constant"}
    keys |= {"evaluate__generate": True, "evaluate__max_new_tokens": 4, "optim__lr": 1e-3}
    whole_run(World(), (model, data, tmp_path / "whole"), {**keys, "train__steps": 4})
    parts = (model, data, tmp_path / "parts")
    run_ranks({"context": 2}, whole_run, parts, {**keys, "parallel__context": 2, "train__steps": 2})
    whole_run(World(), parts, {**keys, "checkpoint__resume": "auto", "train__steps": 4})
    found = []
    for folder in (parts[2], tmp_path / "whole"):
        records = read_metrics(folder / "metrics.jsonl")
        losses = {r["step"]: r["loss"] for r in records if r["kind"] == "train"}
        evaluated = [r["loss"] for r in records if r["kind"] == "evaluate"]
        assert len(losses) == 4 and len(evaluated) >= 2, [r["kind"] for r in records]
        report = json.loads((folder / "report.json").read_text("utf-8"))
        found.append((losses, evaluated[:2], report["after"]))
    for mine, theirs in zip(*found, strict=True):
        assert mine == pytest.approx(theirs, rel=1e-5)


def refusal(world: World, folders: Any, keys: dict[str, Any]) -> str:
    try:
        run_on(config_of(folders, keys, "float32"), world)
    except Refused as error:
        return str(error)
    return "nothing was refused"


def test_what_cannot_be_shared_is_refused(alone: Callable[..., Any], tmp_path: Path) -> None:
    (model, data, _), keys, _ = alone("gpt2", "full")
    odd = copy_model(model, tmp_path / "odd")
    config = json.loads((odd / "config.json").read_text("utf-8"))
    (odd / "config.json").write_text(json.dumps(config | {"n_head": 1}), "utf-8")
    context = {**keys, "parallel__context": 2}
    for folder, more, message in (
        (model, {"train__compile": True}, "train.compile=true with parallel.context=2"),
        (odd, {"parallel__context_method": "heads"}, "1 attention heads cannot be shared out"),
    ):
        folders = (folder, data, tmp_path / "out")
        for told in run_ranks({"context": 2}, refusal, folders, context | more):
            assert message in told
    assert not (tmp_path / "out").exists()


def mixed(world: World, folders: Any, keys: dict[str, Any]) -> str:
    """A family whose layers also look at the token before: a shift in the feed-forward part."""
    from transformers.models.llama.modeling_llama import LlamaMLP

    plain = LlamaMLP.forward
    with patch.object(
        LlamaMLP, "forward", lambda self, x: plain(self, (x + x.roll(1, dims=1)) / 2)
    ):
        return refusal(world, folders, keys)


def test_layers_that_look_at_other_tokens_are_refused(
    alone: Callable[..., Any], tmp_path: Path
) -> None:
    (model, data, _), keys, _ = alone("llama", "lora")
    given = {**keys, "parallel__context": 2}
    for told in run_ranks({"context": 2}, mixed, (model, data, tmp_path / "out"), given):
        assert "context-parallel ranks differ" in told
