"""Data parallel layouts train exactly what one process trains: losses, every gradient, the weights after 3 steps."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from layouts import Found, same_run, steps, with_layout
from ranks import run_ranks
from tiny_runs import write_data

from luthier.parallel.world import World

# the last step of an epoch has 5 rows: on two ranks the third micro-batch of one of them is padding alone
KEYS = {"train__batch": 6, "train__micro_batch": 1, "data__length": 128, "optim__clip": 0.5}
METHODS: dict[str, dict[str, Any]] = {
    "full": {"adapter__method": "none", "adapter__rank": None},
    "lora": {"adapter__method": "lora", "adapter__dropout": 0.2},
    "dora": {"adapter__method": "lora", "adapter__dora": True},
    "pissa": {"adapter__method": "lora", "adapter__pissa": True},
    "mixer": {"adapter__method": "lora", "adapter__mixer": True},
    "mora": {"adapter__method": "mora"},
    "vera": {"adapter__method": "vera"},
    "lokr": {"adapter__method": "lokr"},
    "ia3": {"adapter__method": "ia3", "adapter__rank": None},
    "prefix": {"adapter__method": "prefix", "adapter__rank": None},
    "prompt": {"adapter__method": "prompt", "adapter__rank": None},
    # trained weights that virtual tokens go through, in a forward whose last output nobody uses
    "prompt-whole": {
        "adapter__method": "prompt",
        "adapter__rank": None,
        "adapter__modules_to_save": ["k_proj", "down_proj"],
    },
    "reft": {"adapter__method": "reft"},
    "qlora": {"adapter__method": "lora", "quantize__weights": "nf4"},
    "whole": {"adapter__method": "lora", "adapter__modules_to_save": ["lm_head"]},
}
LAYOUTS: dict[str, dict[str, Any]] = {
    "dp2": {"replicate": 2, "shard": 1},
    **{f"shard2-{s}": {"shard": 2, "stage": s} for s in (1, 2, 3)},
}
OFTEN = {  # the pairs that every run of the tests sees: each method and each layout
    *(("full", layout) for layout in LAYOUTS),
    *(("lora", layout) for layout in LAYOUTS),
    *(("dora", "shard2-3"), ("pissa", "shard2-3"), ("vera", "shard2-3"), ("reft", "shard2-3")),
    *(("mora", "shard2-2"), ("lokr", "shard2-1"), ("prefix", "shard2-3"), ("whole", "shard2-2")),
    *(("qlora", "dp2"), ("qlora", "shard2-3")),
    *(("prompt", "dp2"), ("ia3", "shard2-2"), ("mixer", "shard2-1"), ("reft", "dp2")),
    *(("prompt", "shard2-3"), ("prompt-whole", "shard2-2")),
}


def pairs() -> list[Any]:
    return [
        pytest.param(m, where, marks=[] if (m, where) in OFTEN else [pytest.mark.long])
        for m in METHODS
        for where in LAYOUTS
    ]


@pytest.fixture(scope="session")
def data_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_data(tmp_path_factory.mktemp("rows"), train=20, dev=6)


@pytest.fixture(scope="session")
def alone(
    model_folder: Callable[[str], Path], data_folder: Path
) -> Callable[..., tuple[Any, dict[str, Any], Found]]:
    """Folders, keys and what one process finds, of a method and a family."""

    @cache
    def find(method: str, family: str = "llama") -> tuple[Any, dict[str, Any], Found]:
        folders = (model_folder(family), data_folder, Path("unused"))
        keys = {**KEYS, **METHODS[method]}
        return folders, keys, steps(World(), folders, keys)

    return find


@pytest.mark.parametrize(("method", "layout"), pairs())
def test_two_ranks_train_what_one_does(method: str, layout: str, alone: Callable[..., Any]) -> None:
    folders, keys, theirs = alone(method)
    found = run_ranks(LAYOUTS[layout], steps, folders, with_layout(keys, LAYOUTS[layout]))
    for ours in found:
        same_run(ours, theirs)
    for mine, yours, every in zip(found[0]["rows"], found[1]["rows"], theirs["rows"], strict=True):
        assert sorted(mine + yours) == sorted(every)
