"""Tensor parallel layouts train exactly what one process trains: losses, every gradient, the weights after 3 steps."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from layouts import Found, steps, worst
from ranks import run_ranks
from tiny_runs import write_data

from luthier.parallel.world import World

KEYS = {"train__batch": 4, "train__micro_batch": 2, "data__length": 128, "optim__clip": 0.5}
METHODS: dict[str, dict[str, Any]] = {
    "full": {"adapter__method": "none", "adapter__rank": None},
    "lora": {"adapter__method": "lora", "adapter__dropout": 0.2},
    "pissa": {"adapter__method": "lora", "adapter__pissa": True},
    "mixer": {"adapter__method": "lora", "adapter__mixer": True},
    "lokr": {"adapter__method": "lokr"},
    "ia3": {"adapter__method": "ia3", "adapter__rank": None},
    "whole": {"adapter__method": "lora", "adapter__modules_to_save": ["lm_head"]},
    "dora": {
        "adapter__method": "lora",
        "adapter__dora": True,
        "adapter__targets": ["q_proj", "k_proj", "v_proj", "up_proj"],
    },
}
TP2: dict[str, Any] = {"tensor": 2}
CASES = [  # family, method, layout
    ("llama", "full", TP2),
    ("llama", "lora", TP2),
    ("llama", "pissa", TP2),
    ("llama", "mixer", TP2),
    ("llama", "dora", TP2),
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


def assert_same(ours: Found, theirs: Found, tolerance: float = 1e-9) -> None:
    assert ours["tokens"] == theirs["tokens"]
    assert ours["loss"] == pytest.approx(theirs["loss"], rel=tolerance)
    assert ours["norm"] == pytest.approx(theirs["norm"], rel=1e-7)  # their norms are float32's
    for step, (mine, other) in enumerate(
        zip(ours["gradients"], theirs["gradients"], strict=True), 1
    ):
        error, name = worst(mine, other)
        assert error < tolerance, f"gradient of {name} in step {step}: {error}"
    error, name = worst(ours["weights"], theirs["weights"])
    assert error < tolerance, f"{name}: {error}"


def compared(family: str, method: str, layout: dict[str, Any], alone: Callable[..., Any]) -> None:
    folders, keys, theirs = alone(family, method)
    given = keys | {f"parallel__{name}": value for name, value in layout.items()}
    for ours in run_ranks(layout, steps, folders, given):
        assert_same(ours, theirs)


@pytest.mark.parametrize(("family", "method", "layout"), CASES)
def test_ranks_train_what_one_does(
    family: str, method: str, layout: dict[str, Any], alone: Callable[..., Any]
) -> None:
    compared(family, method, layout, alone)


@pytest.mark.long
@pytest.mark.parametrize(("family", "method", "layout"), SLOW)
def test_more_layouts(
    family: str, method: str, layout: dict[str, Any], alone: Callable[..., Any]
) -> None:
    compared(family, method, layout, alone)
