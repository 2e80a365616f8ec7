"""Context-parallel layouts train exactly what one process trains: losses, every gradient, the weights after 3 steps."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from layouts import Found, steps
from ranks import run_ranks
from test_tensor_parallel import assert_same
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
    "dynamic": {"model__rope_scaling": {"type": "dynamic", "factor": 2.0}, **{"adapter__method": "lora"}},
    "router": {
        "train__router_loss": 0.5,
        "adapter__method": "lora",
        "adapter__targets": ["q_proj", "o_proj"],
    },
}
GATHER: dict[str, Any] = {"context": 2, "context_method": "gather"}
HEADS: dict[str, Any] = {"context": 2, "context_method": "heads"}
EVERY = [(f, m, how) for f in ("llama", "qwen3", "gpt2", "bloom", "mistral", "chatglm2", "mixtral") for m in METHODS for how in (GATHER, HEADS)]


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
    given = keys | {f"parallel__{name}": value for name, value in layout.items()}
    for ours in run_ranks(layout, steps, folders, given):
        assert_same(ours, theirs)


@pytest.mark.parametrize(("family", "method", "layout"), EVERY)
def test_ranks_train_what_one_does(
    family: str, method: str, layout: dict[str, Any], alone: Callable[..., Any]
) -> None:
    compared(family, method, layout, alone)
