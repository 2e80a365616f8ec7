"""Every family, and every quantised base, cut among two tensor-parallel ranks trains what one process trains.

In double precision, so that losses, gradients and weights agree to 1e-9: rounding explains no more. Layers that
compute in float32 whatever the model's type (`WIDER`) agree to that type's rounding.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
from layouts import Found, config_of, steps, with_layout, worst
from ranks import run_ranks
from safetensors.torch import load_file
from tiny_runs import copy_model, write_data, write_rows

import luthier.models.cuts
from luthier.assemble import build
from luthier.errors import Refused
from luthier.layers import is_quantized
from luthier.models.families import Cut
from luthier.parallel.shard import local
from luthier.parallel.world import World
from luthier.recipes import run_on
from tests.zoo_folders import ZOO, zoo_folder

KEYS = {"train__batch": 4, "train__micro_batch": 2, "data__length": 128, "optim__clip": 0.5}
METHODS: dict[str, dict[str, Any]] = {
    "full": {"adapter__method": "none", "adapter__rank": None},
    "lora": {"adapter__method": "lora"},
}
TP2: dict[str, Any] = {"tensor": 2}
FAMILIES = (
    *("llama", "qwen2", "qwen3", "mistral", "mixtral", "gemma", "gemma2", "gemma3_text", "phi3"),
    *(
        "glm4",
        "gpt2",
        "gpt_neox",
        "opt",
        "bloom",
        "falcon",
        "falcon_40b",
        "falcon_alibi",
        "granite",
    ),
    *("olmo2", "qwen3_moe", "deepseek_v3", "gpt_oss", "chatglm", "chatglm2", "glm_legacy", "qwen"),
    *(
        "opt_350m",
        "cohere",
        "cohere2",
        "glm",
        "phi",
        "qwen2_moe",
        "seed_oss",
        "smollm3",
        "starcoder2",
    ),
)
EXPERTS = ("mixtral", "qwen3_moe", "deepseek_v3", "gpt_oss", "qwen2_moe")
# families whose routers, or norms between the cut layers, compute in float32 whatever the model's type
WIDER = {*EXPERTS, "gemma3_text", "olmo2", "qwen"}
WORDS = ("the box", "apples", "seven", "a quick fox")
ROWS = [  # what catches most
    ("phi3", "full"),  # fused pieces, numbers of heads in the config
    ("bloom", "full"),  # slopes
    ("falcon", "full"),  # one key and value on both ranks
    ("olmo2", "full"),  # norms over all heads
    ("deepseek_v3", "full"),  # latents, experts, shared experts
    ("gpt_oss", "full"),  # sinks, interleaved gates, biases of experts
    ("mixtral", "lora"),  # adapters on experts
    ("chatglm2", "lora"),
]
MORE = [(family, method) for family in FAMILIES for method in METHODS]
MORE = [row for row in MORE if row not in ROWS]


@pytest.fixture(scope="module")
def alone(
    model_folder: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., tuple[Any, dict[str, Any], Found]]:
    """Folders, keys and what one process finds, of a family and a method."""
    long, short = (tmp_path_factory.mktemp(name) for name in ("long", "short"))
    write_data(long, train=12, dev=4)
    texts = [{"src": f"how many {WORDS[i % 3]}", "tgt": WORDS[i % 4]} for i in range(16)]
    write_rows(short / "train.json", texts[:12])
    write_rows(short / "dev.json", texts[12:])

    @cache
    def folder(family: str) -> Path:
        zoo = family in ZOO
        made = zoo_folder(family, tmp_path_factory.mktemp(family)) if zoo else model_folder(family)
        if family in EXPERTS:
            made = copy_model(made, tmp_path_factory.mktemp(family) / "model")
            config = json.loads((made / "config.json").read_text("utf-8"))
            said = config | {
                "experts_implementation": "eager"
            }  # `grouped_mm` is in float32 at most
            (made / "config.json").write_text(json.dumps(said), "utf-8")
        return made

    @cache
    def find(family: str, method: str, **more: Any) -> tuple[Any, dict[str, Any], Found]:
        folders = (folder(family), short if family in ZOO else long, Path("unused"))
        keys = {**KEYS, **METHODS[method], "data__length": 60 if family in ZOO else 128, **more}
        return folders, keys, steps(World(), folders, keys)

    return find


def assert_same(ours: Found, theirs: Found, tolerance: float = 1e-9) -> None:
    assert ours["tokens"] == theirs["tokens"]
    assert ours["loss"] == pytest.approx(theirs["loss"], rel=tolerance)
    for step, both in enumerate(zip(ours["gradients"], theirs["gradients"], strict=True), 1):
        error, name = worst(*both)
        # rounded weights differ a little after the first step
        assert error < tolerance * (1 if step == 1 else 10), (
            f"gradient of {name} in step {step}: {error}"
        )
    error, name = worst(ours["weights"], theirs["weights"])
    # AdamW makes large steps of the small gradients in which rounding shows most
    assert error < 10 * tolerance, f"{name}: {error}"


def compared(
    family: str,
    method: str,
    alone: Callable[..., Any],
    layout: dict[str, Any] | None = None,
    /,
    **keys: Any,
) -> None:
    layout = layout or TP2
    folders, all_keys, theirs = alone(family, method, **keys)
    given = with_layout(all_keys, layout)
    found = run_ranks(layout, steps, folders, given)
    for ours in found[:1] if "pipeline" in layout else found:  # what stages have is gathered by one
        assert_same(ours, theirs, 2e-6 if family in WIDER else 1e-9)


@pytest.mark.parametrize(("family", "method"), ROWS)
def test_a_cut_family_trains_what_it_does_whole(
    family: str, method: str, alone: Callable[..., Any]
) -> None:
    compared(family, method, alone)


@pytest.mark.long
@pytest.mark.parametrize(("family", "method"), MORE)
def test_the_other_families(family: str, method: str, alone: Callable[..., Any]) -> None:
    compared(family, method, alone)


BASES = [  # scheme, the rest of the section
    ("nf4", {"quantize__double_quant": True}),
    ("fp4", {"quantize__block_size": 32}),
    ("int8", {}),
    ("int4", {"quantize__block_size": 16}),
]


@pytest.mark.parametrize(("scheme", "options"), BASES)
def test_a_quantised_base_is_cut(
    scheme: str, options: dict[str, Any], alone: Callable[..., Any]
) -> None:
    """Inputs and outputs of a layer, through the middle of blocks: the cut base is the whole one."""
    compared("llama", "lora", alone, quantize__weights=scheme, **options)


@pytest.mark.long
@pytest.mark.parametrize(
    "family", ["gpt2", "mixtral", "phi3", "falcon", "bloom", "chatglm2", "deepseek_v3"]
)
def test_quantised_bases_of_other_families(family: str, alone: Callable[..., Any]) -> None:
    # 72 inputs do not leave nf4 blocks worth a scale
    scheme = {"quantize__weights": "nf4", "quantize__double_quant": True}
    compared(
        family, "lora", alone, **{"quantize__weights": "int8"} if family == "bloom" else scheme
    )


def stored(world: World, folders: Any, keys: dict[str, Any]) -> tuple[int, int]:
    """Bytes of codes and scales that a rank holds, and those of one process."""
    built = build(config_of(folders, keys, "float32"), train=True, world=world)
    held: list[Any] = [m for m in built.model.modules() if is_quantized(m)]
    ours = sum(local(t).nbytes for m in held for t in m.tensors().values())
    return ours, sum(t.nbytes for m in held for t in m.tensors().values())


def test_stage_3_cuts_a_quantised_base(alone: Callable[..., Any]) -> None:
    layout = {"shard": 2, "stage": 3}
    options = {"quantize__weights": "nf4", "quantize__double_quant": True}
    compared("llama", "lora", alone, layout, **options)
    folders, keys, _ = alone("llama", "lora", **options)
    given = keys | {f"parallel__{name}": value for name, value in layout.items()}
    for ours, whole in run_ranks(layout, stored, folders, given):
        assert ours < 0.52 * whole  # an odd number of scales does not halve


@pytest.mark.long
@pytest.mark.parametrize(
    ("family", "layout", "keys"),
    [
        ("mixtral", TP2, {"train__router_loss": 0.05}),
        ("mixtral", TP2, {"adapter__pissa": True}),
        ("gpt_oss", TP2, {"adapter__method": "ia3", "adapter__rank": None}),
        ("llama", {"tensor": 4}, {}),  # two heads of keys and values on four ranks
        ("olmo2", {"tensor": 4}, {}),
        ("chatglm2", {"tensor": 4}, {}),
        ("llama", {"tensor": 2, "replicate": 2, "shard": 1}, {"quantize__weights": "nf4"}),
        ("llama", {"tensor": 2, "shard": 2, "stage": 3}, {"quantize__weights": "nf4"}),
        ("llama", {"tensor": 2, "pipeline": 2}, {"quantize__weights": "nf4"}),
        ("phi3", {"tensor": 2, "pipeline": 2}, {}),
        ("deepseek_v3", {"tensor": 2, "pipeline": 2}, {}),
        ("mixtral", {"tensor": 2, "shard": 2, "stage": 3}, {}),
        ("falcon", {"tensor": 2, "shard": 2, "stage": 2}, {}),
    ],
)
def test_more_ranks(
    family: str, layout: dict[str, Any], keys: dict[str, Any], alone: Callable[..., Any]
) -> None:
    for method in ("lora",) if keys else ("lora", "full"):
        compared(family, method, alone, layout, **keys)


def wrong_order(real: Any, config: Any) -> Any:
    """Keys and values before queries."""
    split = real(config)
    fused = {"self_attn.qkv_proj": Cut("outputs", ("groups", "groups", "heads"))}
    return replace(split, cuts=split.cuts | fused)


def whole_slopes(real: Any, config: Any) -> Any:
    return replace(real(config), rows={})


def norms_of_parts(real: Any, config: Any) -> Any:
    return replace(
        real(config),
        gathered=(),
        rows={"self_attn.q_norm.weight": "heads", "self_attn.k_norm.weight": "groups"},
    )


def no_branch(real: Any, config: Any) -> Any:
    return replace(real(config), branches={})


def with_fault(world: World, fault: Callable[..., Any], folders: Any, keys: dict[str, Any]) -> Any:
    """What a layer's cut comes to if `fault` tells it: a refusal, or the first gradients."""
    with patch.object(
        luthier.models.cuts, "split_of", partial(fault, luthier.models.cuts.split_of)
    ):
        try:
            return steps(world, folders, keys, 1)["gradients"][0]
        except (Refused, RuntimeError) as error:
            return str(error)


@pytest.mark.parametrize(
    ("family", "fault"),
    [("phi3", wrong_order), ("bloom", whole_slopes), ("olmo2", norms_of_parts)],
)
def test_a_wrong_cut_is_refused_at_the_start(
    family: str, fault: Callable[..., Any], alone: Callable[..., Any]
) -> None:
    folders, keys, _ = alone(family, "full")
    for told in run_ranks(TP2, with_fault, fault, folders, {**keys, "parallel__tensor": 2}):
        said = "hidden states cut among tensor-parallel ranks differ"
        assert (
            said in told or "The size of tensor a (3) must match" in told
        )  # slopes of other heads


def test_a_fault_that_only_gradients_show(alone: Callable[..., Any]) -> None:
    """The keys' turned part, one for all heads, without the other ranks' gradient: no loss is another."""
    folders, keys, theirs = alone("deepseek_v3", "full")
    given = with_layout(keys, {**TP2, "sequence": False})
    for found in run_ranks(TP2, with_fault, no_branch, folders, given):
        error, name = worst(found, theirs["gradients"][0])
        assert error > 1e-2, (error, name)


def whole_run(world: World, folders: Any, keys: dict[str, Any]) -> None:
    run_on(config_of(folders, keys, "float32"), world)


@pytest.mark.long
@pytest.mark.parametrize(
    ("family", "method", "keys"),
    [
        ("gpt_oss", "full", {}),
        ("phi3", "full", {}),
        ("falcon", "full", {}),
        ("mixtral", "lora", {"quantize__weights": "nf4"}),
    ],
)
def test_what_is_saved_is_whole(
    family: str, method: str, keys: dict[str, Any], alone: Callable[..., Any], tmp_path: Path
) -> None:
    (model, data, _), every, _ = alone(family, method, **keys)
    whole_run(World(), (model, data, tmp_path / "one"), every)
    given = every | {"parallel__tensor": 2}
    run_ranks(TP2, whole_run, (model, data, tmp_path / "cut"), given)
    name = "model.safetensors" if method == "full" else "adapter_model.safetensors"
    ours, theirs = (load_file(tmp_path / folder / name) for folder in ("cut", "one"))
    arrays = ({n: t.double().numpy() for n, t in found.items()} for found in (ours, theirs))
    error, name = worst(*arrays)
    assert error < 1e-2, (error, name)  # AdamW's steps of float32's gradients; a wrong order is 1
