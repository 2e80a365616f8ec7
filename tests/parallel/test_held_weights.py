"""Ranks that cut a model read it together: none ever holds the whole of it, and each gets the values it would have had."""

from __future__ import annotations

import gc
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from layouts import config_of
from ranks import end_ranks, run_ranks
from transformers import LlamaConfig, LlamaForCausalLM

from luthier.adapters.store import save_adapter
from luthier.assemble import build
from luthier.heap import return_freed_memory
from luthier.parallel.shard import full, local
from luthier.parallel.world import World

FULL: dict[str, Any] = {"adapter__method": "none", "adapter__rank": None}
LORA: dict[str, Any] = {"adapter__method": "lora"}
NF4: dict[str, Any] = LORA | {"quantize__weights": "nf4"}
PREFIX: dict[str, Any] = {"adapter__method": "prefix", "adapter__rank": None}
PREFIX |= {"adapter__num_prefix_tokens": 4}
LAYOUTS: dict[str, dict[str, Any]] = {
    "tensor": {"tensor": 2},
    "stage 3": {"shard": 2, "stage": 3},
    "pipeline": {"pipeline": 2},
    "both": {"tensor": 2, "shard": 2, "stage": 3},
}


def anonymous() -> int:
    """Bytes of this process that no file backs: a checkpoint that is mapped takes no memory."""
    status = Path("/proc/self/status").read_text("ascii", "replace")
    return next(int(x.split()[1]) * 1024 for x in status.splitlines() if x.startswith("RssAnon:"))


def building(world: World, folders: Any, tiny: Any, keys: dict[str, Any]) -> tuple[int, int]:
    """Bytes: the most that building a model takes, and what is kept of it."""
    build(config_of(tiny, keys, "float32"), train=True, world=world)  # libraries load their parts
    gc.collect()
    return_freed_memory()
    config = config_of(folders, keys, "float32")
    before, most, over = anonymous(), [0], threading.Event()

    def watch() -> None:
        while not over.wait(0.002):
            most[0] = max(most[0], anonymous() - before)

    thread = threading.Thread(target=watch)
    thread.start()
    built = build(config, train=True, world=world)
    over.set()
    thread.join()
    here = [local(p) for p in built.model.parameters() if not p.is_meta]
    return most[0], sum(p.numel() * p.element_size() for p in here)


@pytest.fixture(scope="module", autouse=True)
def exact() -> Iterator[None]:
    """Ranks whose allocator gives freed memory back at once."""
    end_ranks()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MALLOC_MMAP_THRESHOLD_", "131072")
        patch.setenv("MALLOC_TRIM_THRESHOLD_", "131072")
        yield
        end_ranks()


@pytest.fixture(scope="module")
def deep(model_folder: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of many layers, each of which is small beside the whole."""
    from luthier.models.load import save_model

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=320, hidden_size=256, intermediate_size=1024, num_hidden_layers=20,
        num_attention_heads=4, num_key_value_heads=4, tie_word_embeddings=True,
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("deep")
    # what is read in another type than it is stored in cannot stay a view of the file
    save_model(LlamaForCausalLM(config), folder, dtype=torch.bfloat16)
    for file in model_folder("llama").glob("*token*"):
        (folder / file.name).write_bytes(file.read_bytes())
    return folder


@pytest.mark.parametrize(
    ("layout", "keys"),
    [
        ("tensor", FULL),
        ("tensor", LORA | {"adapter__dora": True}),
        ("tensor", NF4),
        ("stage 3", FULL),
        ("stage 3", LORA),
        ("pipeline", PREFIX),
        pytest.param("both", FULL, marks=pytest.mark.long),
    ],
)
def test_no_rank_ever_holds_the_model(
    layout: str, keys: dict[str, Any], deep: Path, model_folder: Callable[[str], Path]
) -> None:
    given = keys | {f"parallel__{axis}": size for axis, size in LAYOUTS[layout].items()}
    llama = model_folder("llama")
    whole = (
        2 * (deep / "model.safetensors").stat().st_size
    )  # in float32 84 MB, of which a layer is 4
    for most, kept in run_ranks(LAYOUTS[layout], building, (deep,) * 3, (llama,) * 3, given):
        assert kept < 0.6 * whole
        assert most < kept + 0.25 * whole


def head_of(world: World, folders: Any, keys: dict[str, Any]) -> Any:
    """The head of a run that goes on with an adapter, whole."""
    built = build(config_of(folders, keys, "float32"), train=True, world=world)
    return full(built.model.get_parameter("lm_head.weight"), world).detach().numpy()


@pytest.mark.parametrize("layout", ["tensor", "stage 3"])
def test_weights_that_an_adapters_folder_brings_take_the_place_of_held_ones(
    layout: str, model_folder: Callable[[str], Path], tmp_path: Path
) -> None:
    folder = model_folder("llama")
    llama = folder, folder, folder
    keys = LORA | {"adapter__modules_to_save": ["lm_head"]}
    made = build(config_of(llama, keys, "float32"), train=True)
    head = made.model.get_parameter("lm_head.weight")
    with torch.no_grad():
        head.add_(1.0)
    assert made.adapter is not None
    save_adapter(made.model, tmp_path, made.adapter, made.base, made.base_hash)
    given = LORA | {"adapter__path": str(tmp_path), "adapter__rank": None}
    given |= {f"parallel__{axis}": size for axis, size in LAYOUTS[layout].items()}
    for found in run_ranks(LAYOUTS[layout], head_of, llama, given):
        assert torch.equal(torch.from_numpy(found), head.detach())
