"""Tokens cut between the layers beside what else cuts a model: stages, experts, latents, the tokens of context ranks.

Losses, every gradient and the weights after three steps are those of one process, in double precision; routers other than
mixtral's compute in float32 whatever the model's type.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from conftest import tiny_model_, tiny_tokenizer_
from layouts import Found, cases, config_of, same_run, steps, steps_in_double, with_layout, worst
from ranks import run_ranks
from tiny_runs import write_data

import luthier.built
from luthier.assemble import build
from luthier.models.load import save_model
from luthier.models.sequence import tokens_of
from luthier.models.stage import _trial, decoder_layers
from luthier.parallel.world import World

KEYS = {"train__batch": 8, "train__micro_batch": 2, "data__length": 128, "optim__clip": 0.5}
FULL = {"adapter__method": "none", "adapter__rank": None}
METHODS: dict[str, dict[str, Any]] = {
    "full": FULL,
    "lora": {},
    "dropout": {"adapter__dropout": 0.2},
    # what sees own tokens, and what is whole inside of attention
    "gates": {
        "adapter__rank": 1,
        "adapter__dropout": 0.2,
        "adapter__targets": ["q_proj", "shared_expert_gate"],
    },
    "latents": {
        "adapter__dropout": 0.2,
        "adapter__targets": ["q_a_proj", "kv_a_proj_with_mqa", "o_proj"],
    },
    "dora": {"adapter__dora": True},
    "mora": {"adapter__method": "mora", "adapter__dropout": 0.2},
    "reft": {"adapter__method": "reft", "adapter__dropout": 0.1},
    "prefix": {**FULL, "adapter__method": "prefix", "adapter__num_prefix_tokens": 3},
    "prompt": {**FULL, "adapter__method": "prompt", "adapter__num_prefix_tokens": 3},
    "router": {**FULL, "train__router_loss": 0.5},
    "recomputed": {**FULL, "train__recompute": "layer"},
    "dropping": FULL,  # the checkpoint's own dropout
}
TP2: dict[str, Any] = {"tensor": 2}
WHOLE: dict[str, Any] = {"tensor": 2, "sequence": False}
PIPE: dict[str, Any] = {"pipeline": 2, "tensor": 2}
LOOP: dict[str, Any] = {**PIPE, "virtual_stages": 2, "schedule": "interleaved"}
ZERO: dict[str, Any] = {**PIPE, "schedule": "zero_bubble"}
GATHER: dict[str, Any] = {"context": 2, "tensor": 2, "context_method": "gather"}
HEADS: dict[str, Any] = {"context": 2, "tensor": 2, "context_method": "heads"}
EXPERTS = ("mixtral", "qwen3_moe", "deepseek_v3", "gpt_oss", "qwen2_moe")
CASES = [
    ("mixtral", "router", TP2),
    ("mixtral", "lora", TP2),
    ("qwen3_moe", "full", TP2),
    ("gpt_oss", "full", TP2),
    ("qwen2_moe", "gates", TP2),
    ("deepseek_v3", "full", TP2),
    ("deepseek_v3", "latents", TP2),
    ("deepseek_v3", "full", WHOLE),
    ("llama", "full", PIPE),
    ("llama", "reft", PIPE),
    ("llama", "full", GATHER),
]
SLOW = [
    *(("llama", method, PIPE) for method in ("dropout", "dora", "mora", "prefix", "prompt", "recomputed")),
    *((family, method, LOOP) for family, method in (("gpt2", "dropping"), ("qwen3", "lora"), ("llama", "reft"))),
    *(("llama", method, ZERO) for method in ("full", "lora")),
    *(("llama", method, GATHER) for method in ("dropout", "mora", "prompt", "reft")),
    *((family, method, HEADS) for family, method in (("qwen3", "full"), ("gpt2", "dropping"), ("llama", "prefix"))),
    *((family, method, TP2) for family in EXPERTS for method in ("full", "lora")),
    *((family, "full", WHOLE) for family in ("mixtral", "gpt_oss", "qwen2_moe")),
    *(("mixtral", method, TP2) for method in ("reft", "prefix", "recomputed")),
    *(("mixtral", "router", layout) for layout in (PIPE, GATHER, WHOLE)),
    *((family, method, layout) for family, method in (("deepseek_v3", "latents"), ("qwen2_moe", "gates")) for layout in (PIPE, GATHER)),
    ("mixtral", "router", {**TP2, "shard": 2, "stage": 3}),
    ("llama", "full", {**PIPE, "context": 2}),
]  # fmt: skip
SLOW = [case for case in SLOW if case not in CASES]
DEPTH = {"gpt2": "n_layer"}
DROPPING = {"attn_pdrop": 0.3, "resid_pdrop": 0.2, "embd_pdrop": 0.1}


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Any]:
    """Folders, keys and what one process finds, of a family and a method; four layers, for two stages of two ranks."""
    data = write_data(tmp_path_factory.mktemp("rows"), train=20, dev=4)

    @cache
    def folder(family: str, **config: Any) -> Path:
        made = tmp_path_factory.mktemp(family)
        depth = {} if family == "gpt_oss" else {DEPTH.get(family, "num_hidden_layers"): 4}
        save_model(tiny_model_(family, **depth), made, tiny_tokenizer_())
        if family in EXPERTS:  # torch has no grouped products in double precision
            config = config | {"experts_implementation": "eager"}
        said = json.loads((made / "config.json").read_text("utf-8")) | config
        (made / "config.json").write_text(json.dumps(said), "utf-8")
        return made

    @cache
    def find(family: str, method: str) -> tuple[Any, dict[str, Any], Found]:
        made = folder(family, **(DROPPING if method == "dropping" else {}))
        folders, keys = (made, data, Path("unused")), {**KEYS, **METHODS[method]}
        return folders, keys, steps_of(family)(World(), folders, keys)

    return find


def steps_of(family: str) -> Callable[..., Found]:
    return steps_in_double if family == "mixtral" else steps


def tolerance(family: str, method: str) -> float:
    if family in EXPERTS:
        return 1e-9 if family == "mixtral" else 2e-5
    # a virtual token's gradient is a sum over ranks of what norms in float32 gave
    return 1e-6 if method == "prompt" else 1e-9


@pytest.mark.parametrize(("family", "method", "layout"), cases(CASES, SLOW))
def test_ranks_train_what_one_does(
    family: str, method: str, layout: dict[str, Any], alone: Callable[..., Any]
) -> None:
    folders, keys, theirs = alone(family, method)
    found = run_ranks(layout, steps_of(family), folders, with_layout(keys, layout))
    within = tolerance(family, method)
    for ours in found[:1] if "pipeline" in layout else found:  # what stages have is gathered by one
        same_run(ours, theirs, within, norm=max(within, 1e-7))


def widths(world: World, folders: Any, keys: dict[str, Any]) -> tuple[list[int], list[str]]:
    """Tokens of a row of 13 that enter a decoder layer and its norm, and the remarks."""
    built = build(config_of(folders, keys, "float32"), train=True, world=world)
    batch, found = _trial(built.stage)[0], []
    batch = built.context.split(batch) if built.context else batch
    here = [layer for layer in decoder_layers(built.model) if list(layer.parameters())]
    for module in (here[1], here[1].get_submodule("input_layernorm")):
        module.register_forward_pre_hook(lambda module, args: found.append(args[0].shape[1]))
    with torch.no_grad():
        built.stage(batch)
    return found, built.remarks


@pytest.mark.parametrize(
    ("family", "layout", "tokens"),
    [("mixtral", TP2, 7), ("deepseek_v3", TP2, 7), ("llama", PIPE, 7), ("llama", GATHER, 4)],
)
def test_a_rank_holds_its_own_tokens(
    family: str, layout: dict[str, Any], tokens: int, alone: Callable[..., Any]
) -> None:
    """Of 13 tokens two ranks have 7 each, the last one filled up; of the 8 of a context rank, with padding, 4."""
    folders, keys, _ = alone(family, "full")
    for found, remarks in run_ranks(layout, widths, folders, with_layout(keys, layout)):
        assert found == [tokens, tokens]
        assert not any("sequence" in remark for remark in remarks)


def without_shares(world: World, named: str, folders: Any, keys: dict[str, Any]) -> Any:
    """The first step's gradients where parameters of that name are not known to have a share on each rank."""

    def fewer(model: Any, cuts: Any) -> Any:
        found: Any = tokens_of(model, cuts)
        found.shares[:] = [path for path in found.shares if named not in path]
        return found

    with patch.object(luthier.built, "tokens_of", fewer):
        return steps(world, folders, keys, 1)["gradients"][0]


@pytest.mark.parametrize(
    ("family", "named"), [("mixtral", "mlp.gate"), ("deepseek_v3", "self_attn.q_a_proj")]
)
def test_a_share_that_is_not_summed(family: str, named: str, alone: Callable[..., Any]) -> None:
    """Routers see a rank's own tokens, latents are read by its own heads: their gradients are sums."""
    folders, keys, theirs = alone(family, "full")
    given = with_layout(keys, TP2)
    for found in run_ranks(TP2, without_shares, named, folders, given):
        error, name = worst(found, theirs["gradients"][0])
        assert error > 0.1 and named in name, (error, name)
