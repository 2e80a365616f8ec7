"""Context-parallel layouts train exactly what one process trains: losses, every gradient, the weights after 3 steps."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from layouts import Found, steps
from ranks import run_ranks
from test_data_parallel import assert_same
from tiny_runs import write_data

from luthier.parallel.world import World

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
    given = keys | {f"parallel__{name}": value for name, value in layout.items()}
    tolerance = ROUNDED.get(method, ROUNDED.get(family, 1e-9))
    for ours in run_ranks(layout, steps, folders, given, 3, dtype_of(family)):
        assert_same(ours, theirs, tolerance)


@pytest.mark.parametrize(("family", "method", "layout"), CASES)
def test_ranks_train_what_one_does(
    family: str, method: str, layout: dict[str, Any], alone: Callable[..., Any]
) -> None:
    compared(family, method, layout, alone)


@pytest.mark.long
@pytest.mark.parametrize(("family", "method", "layout"), SLOW)
def test_more_families(
    family: str, method: str, layout: dict[str, Any], alone: Callable[..., Any]
) -> None:
    compared(family, method, layout, alone)


@pytest.mark.long
@pytest.mark.parametrize(("family", "method", "layout"), FOUR)
def test_four_ranks(
    family: str, method: str, layout: dict[str, Any], alone: Callable[..., Any]
) -> None:
    compared(family, method, layout, alone)
