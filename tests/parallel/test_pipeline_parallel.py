"""Pipeline layouts train exactly what one process trains: losses, every gradient, the weights after 3 steps."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from conftest import tiny_model_, tiny_tokenizer_
from layouts import Found, cases, same_run, steps, with_layout
from ranks import run_ranks
from test_data_parallel import METHODS as DATA_METHODS
from tiny_runs import write_data

from luthier.parallel.world import World

pytestmark = [  # torch's own, while it compiles
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:The .grad attribute"),
]
KEYS = {"train__batch": 8, "train__micro_batch": 2, "data__length": 128, "optim__clip": 0.5}
METHODS = {**DATA_METHODS, "recomputed": {**DATA_METHODS["full"], "train__recompute": "layer"}}
METHODS["router"] = {**METHODS["full"], "train__router_loss": 0.5}
METHODS["noise"] = {
    **METHODS["lora"],
    "adapter__neftune_alpha": 5.0,
    "train__recompute": "selective",
}
# what is trained lies on one of the stages
METHODS["early"] = {**METHODS["lora"], "adapter__layers": "0"}
METHODS["late"] = {
    **METHODS["full"],
    "adapter__method": "lora",
    "adapter__rank": 2,
    "adapter__targets": ["lm_head"],
}
METHODS["compiled"] = {**METHODS["full"], "train__compile": True}
PP2: dict[str, Any] = {"pipeline": 2}
LOOP: dict[str, Any] = {"pipeline": 2, "virtual_stages": 2, "schedule": "interleaved"}
ZERO: dict[str, Any] = {"pipeline": 2, "schedule": "zero_bubble"}
ZERO2: dict[str, Any] = {"pipeline": 2, "virtual_stages": 2, "schedule": "zero_bubble"}
CASES: list[tuple[str, str, dict[str, Any]]] = [
    ("llama", "full", PP2),
    ("llama", "full", LOOP),
    ("llama", "full", ZERO),
    ("llama", "lora", PP2),
    ("qwen2", "full", PP2),
    ("qwen2", "full", LOOP),
    ("qwen2", "full", ZERO2),
    ("gpt2", "full", PP2),
    ("qwen3", "lora", LOOP),
    ("bloom", "full", PP2),
    ("chatglm2", "full", PP2),
    ("mixtral", "router", PP2),
    ("granite", "full", PP2),
    ("llama", "prefix", LOOP),
    ("llama", "prompt", PP2),
    ("llama", "reft", ZERO),
    ("llama", "lora", ZERO2),
    ("qwen2", "recomputed", PP2),
    ("gpt2", "noise", PP2),
    ("llama", "qlora", PP2),
    ("llama", "vera", PP2),
    ("llama", "early", PP2),
    ("llama", "late", PP2),
    ("qwen2", "full", {**ZERO, "shard": 2, "stage": 2}),
]
SLOW: list[tuple[str, str, dict[str, Any]]] = [
    ("qwen2", "full", {"pipeline": 2, "replicate": 2, "shard": 1}),
    ("qwen3", "lora", {"pipeline": 2, "replicate": 2, "shard": 1}),
    ("llama", "reft", {"pipeline": 2, "replicate": 2, "shard": 1}),
    ("llama", "prefix", {"pipeline": 2, "replicate": 2, "shard": 1}),
    ("llama", "full", {"pipeline": 2, "tensor": 2}),
    (
        "gpt2",
        "lora",
        {"pipeline": 2, "tensor": 2, **{k: LOOP[k] for k in ("virtual_stages", "schedule")}},
    ),
    ("qwen2", "full", {"pipeline": 2, "shard": 2, "stage": 3}),
    ("qwen2", "full", {**LOOP, "shard": 2, "stage": 1}),
    ("llama", "lora", {"pipeline": 2, "shard": 2, "stage": 2}),
    ("llama", "lora", {**ZERO, "replicate": 2, "shard": 1}),
    ("llama", "full", {**ZERO, "shard": 2, "stage": 1}),
    ("llama", "lora", {**ZERO2, "shard": 2, "stage": 2}),
    ("llama", "full", {**ZERO, "shard": 2, "context": 2, "stage": 2}),
    ("llama", "early", ZERO),
    ("llama", "late", LOOP),
    ("llama", "early", {"pipeline": 2, "replicate": 2, "shard": 1}),
    ("llama", "late", {"pipeline": 2, "shard": 2, "stage": 3}),
    ("llama", "compiled", PP2),
    ("llama", "compiled", LOOP),
]
DEPTH = {"gpt2": "n_layer", "bloom": "n_layer", "chatglm2": "num_layers"}


@pytest.fixture(scope="session")
def deep_folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of a tiny model of four layers."""
    from luthier.models.load import save_model

    @cache
    def make(family: str) -> Path:
        folder = tmp_path_factory.mktemp(f"deep-{family}")
        model = tiny_model_(family, **{DEPTH.get(family, "num_hidden_layers"): 4})
        save_model(model, folder, tiny_tokenizer_())
        return folder

    return make


@pytest.fixture(scope="session")
def alone(
    deep_folder: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., tuple[Any, dict[str, Any], Found]]:
    """Folders, keys and what one process finds, of a family and a method."""
    data = write_data(tmp_path_factory.mktemp("rows"), train=20, dev=6)

    @cache
    def find(family: str, method: str) -> tuple[Any, dict[str, Any], Found]:
        folders = (deep_folder(family), data, Path("unused"))
        keys = {**KEYS, **METHODS[method]}
        dtype = "float32" if family == "mixtral" else "float64"
        return folders, keys, steps(World(), folders, keys, 3, dtype)

    return find


def compared(family: str, method: str, layout: dict[str, Any], alone: Callable[..., Any]) -> None:
    """Rank 0 has gathered what all stages have."""
    folders, keys, theirs = alone(family, method)
    given = with_layout(keys, layout)
    # torch has no grouped products in double precision, which experts need
    dtype, tolerance = ("float32", 1e-5) if family == "mixtral" else ("float64", 1e-9)
    ours = run_ranks(layout, steps, folders, given, 3, dtype)[0]
    same_run(ours, theirs, tolerance, norm=max(tolerance, 1e-7))


@pytest.mark.parametrize(("family", "method", "layout"), cases(CASES, SLOW))
def test_stages_train_what_one_process_does(
    family: str, method: str, layout: dict[str, Any], alone: Callable[..., Any]
) -> None:
    compared(family, method, layout, alone)
