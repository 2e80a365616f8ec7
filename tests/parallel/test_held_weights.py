"""Ranks that cut a model read it together: none ever holds the whole of it, and each gets the values it would have had."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from layouts import config_of
from ranks import run_ranks
from torch.profiler import ProfilerActivity, profile
from transformers import LlamaConfig, LlamaForCausalLM

from luthier.assemble import build
from luthier.models.load import blueprint, load_config
from luthier.models.stage import decoder_layers
from luthier.parallel.shard import local
from luthier.parallel.world import World

FULL: dict[str, Any] = {"adapter__method": "none", "adapter__rank": None}
LORA: dict[str, Any] = {"adapter__method": "lora"}
NF4: dict[str, Any] = LORA | {"quantize__weights": "nf4"}
PREFIX: dict[str, Any] = {"adapter__method": "prefix", "adapter__rank": None}
PREFIX |= {"adapter__num_prefix_tokens": 4}
LAYOUTS: dict[str, dict[str, Any]] = {
    "tensor": {"tensor": 2},
    "stage 1": {"shard": 2, "stage": 1},
    "stage 3": {"shard": 2, "stage": 3},
    "pipeline": {"pipeline": 2},
    "both": {"tensor": 2, "shard": 2, "stage": 3},
}


def peak_of(recorded: Any, mapped: int) -> int:
    """The most bytes of tensors at one time, of those made since the recording began; a file that is mapped, of `mapped`
    bytes, takes no memory but is counted as an allocation."""
    events = recorded.profiler.kineto_results.events()
    sizes = [(e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]"]
    now = most = 0
    for _, size in sorted(sizes, key=lambda event: event[0]):
        now += size if abs(size) != mapped else 0
        most = max(most, now)
    return most


def building(world: World, folders: Any, keys: dict[str, Any]) -> tuple[int, int, int]:
    """Bytes: the peak of building a model, what is kept of it, and one layer with all that is in no layer, whole."""
    config = config_of(folders, keys, "float32")
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        built = build(config, train=True, world=world)
    here = [local(p) for p in built.model.parameters() if not p.is_meta]
    kept = sum(p.numel() * p.element_size() for p in here)
    whole = blueprint(load_config(folders[0]), "whole")
    layers = [sum(4 * p.numel() for p in layer.parameters()) for layer in decoder_layers(whole)]
    rest = sum(4 * p.numel() for p in whole.parameters()) - sum(layers)
    mapped = (folders[0] / "model.safetensors").stat().st_size
    return peak_of(recorded, mapped), kept, layers[0] + rest


@pytest.fixture(scope="module")
def deep(model_folder: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of many layers, each of which is small beside the whole."""
    from luthier.models.load import save_model

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=320, hidden_size=64, intermediate_size=256, num_hidden_layers=24,
        num_attention_heads=4, num_key_value_heads=4, tie_word_embeddings=True,
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("deep")
    save_model(LlamaForCausalLM(config), folder)
    for file in model_folder("llama").glob("*token*"):
        (folder / file.name).write_bytes(file.read_bytes())
    return folder


@pytest.mark.parametrize(
    ("layout", "keys"),
    [
        ("tensor", FULL),
        ("tensor", LORA | {"adapter__dora": True}),
        ("tensor", NF4),
        ("stage 1", FULL),
        ("stage 3", LORA),
        ("pipeline", PREFIX),
        ("both", FULL),
    ],
)
def test_no_rank_ever_holds_the_model(layout: str, keys: dict[str, Any], deep: Path) -> None:
    given = keys | {f"parallel__{axis}": size for axis, size in LAYOUTS[layout].items()}
    for peak, kept, piece in run_ranks(LAYOUTS[layout], building, (deep, deep, deep), given):
        # of a layer: the whole, the ranks' rows that it is joined of, and what is made of it
        assert peak < kept + 3 * piece
