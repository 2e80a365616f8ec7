"""Tokens cut between the layers, and every adapter method on cut layers: still what one process trains."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from layouts import Found, cases, config_of, same_run, steps, with_layout
from ranks import run_ranks
from tiny_runs import copy_model, write_data

import luthier.built
from luthier.assemble import build
from luthier.errors import Refused
from luthier.models.cuts import cuts_of
from luthier.models.load import blueprint, load_config
from luthier.models.sequence import tokens_of
from luthier.models.stage import _trial, decoder_layers
from luthier.parallel.world import World

pytestmark = [  # torch's own, while it compiles
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:The .grad attribute"),
]
KEYS = {"train__batch": 4, "train__micro_batch": 2, "data__length": 128, "optim__clip": 0.5}
NO_RANK = {"adapter__rank": None}
VIRTUAL = {"adapter__num_prefix_tokens": 3, **NO_RANK}
METHODS: dict[str, dict[str, Any]] = {
    "full": {"adapter__method": "none", **NO_RANK},
    "lora": {"adapter__rslora": True, "adapter__dropout": 0.2},
    "dora": {"adapter__dora": True},
    "mora": {"adapter__method": "mora", "adapter__dropout": 0.2},
    "vera": {"adapter__method": "vera", "adapter__dropout": 0.2},
    "vera of PaddleNLP": {"adapter__method": "vera", "adapter__form": "paddlenlp"},
    "lokr of two factors": {
        **{"adapter__method": "lokr", "adapter__decompose_both": True, "adapter__rank": 1}
    },
    "lokr": {"adapter__method": "lokr"},
    "reft": {"adapter__method": "reft", "adapter__dropout": 0.1},
    "prefix": {"adapter__method": "prefix", **VIRTUAL},
    "prefix network": {
        **{"adapter__method": "prefix", "adapter__prefix_projection": True, **VIRTUAL}
    },
    "prompt": {"adapter__method": "prompt", **VIRTUAL},
    # outputs of all layers are scaled, and their biases
    "ia3": {"adapter__method": "ia3", "adapter__feedforward": [], **NO_RANK},
    "head": {"adapter__targets": ["lm_head", "q_proj"]},
    "head mora": {"adapter__method": "mora", "adapter__targets": ["lm_head", "q_proj"]},
    "noise": {"adapter__neftune_alpha": 5.0},
    "whole": {"adapter__modules_to_save": ["lm_head", "embed_tokens", "input_layernorm"]},
    "layer": {"train__recompute": "layer", "adapter__method": "none", **NO_RANK},
    "selective": {"train__recompute": "selective", "adapter__dropout": 0.2},
    "compiled": {"train__compile": True, "adapter__method": "none", **NO_RANK},
    "compiled layers": {"train__compile": True, "train__recompute": "layer"},
}
TP2: dict[str, Any] = {"tensor": 2}
BESIDE: dict[str, Any] = {"tensor": 2, "sequence": False}
FOUR: dict[str, Any] = {"tensor": 4}  # llama has two heads of keys and values
CASES = [
    *(("llama", method, TP2) for method in METHODS if not method.startswith("compiled")),
    *(("llama", method, BESIDE) for method in ("full", "mora", "reft", "prefix", "dora")),
    *(("gpt2", method, TP2) for method in ("lora", "dora", "mora", "prefix", "ia3")),
    *(("gpt2", method, BESIDE) for method in ("full", "ia3")),
    ("qwen3", "full", BESIDE),
    ("granite", "full", TP2),
    ("gemma2", "full", TP2),
    ("opt", "full", TP2),
]
SLOW = [
    *(("llama", method, FOUR) for method in ("full", "lora", "dora", "mora", "lokr", "prefix", "ia3")),
    *(("qwen3", method, FOUR) for method in ("full", "lora")),
    *(
        (family, "full", TP2)
        for family in ("opt_350m", "gemma", "gemma3_text", "phi", "starcoder2", "cohere", "cohere2", "seed_oss")
    ),
    *((family, "full", TP2) for family in ("smollm3", "gpt_neox", "mistral")),
    *((family, "compiled", TP2) for family in ("llama", "gpt2")),
    ("llama", "compiled layers", TP2),
    ("llama", "compiled layers", BESIDE),
    *(
        (family, method, {"tensor": 2, **data})
        for data in ({"replicate": 2, "shard": 1}, {"shard": 2, "stage": 2}, {"shard": 2, "stage": 3})
        for family, method in (("llama", "reft"), ("granite", "full"), ("gemma2", "full"), ("gpt2", "vera"))
    ),
]  # fmt: skip
# these norms compute in float32 in any model: sums over each rank's tokens, or heads' shares, round apart
ROUNDING = {**dict.fromkeys(("gemma", "gemma2", "gemma3_text", "cohere", "cohere2"), 2e-6)}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_data(tmp_path_factory.mktemp("rows"), train=12, dev=4)


@pytest.fixture(scope="module")
def alone(
    model_folder: Callable[[str], Path], data: Path
) -> Callable[[str, str], tuple[Any, dict[str, Any], Found]]:
    @cache
    def find(family: str, method: str) -> tuple[Any, dict[str, Any], Found]:
        folders, keys = (model_folder(family), data, Path("unused")), {**KEYS, **METHODS[method]}
        return folders, keys, steps(World(), folders, keys)

    return find


def compared(family: str, method: str, layout: dict[str, Any], alone: Callable[..., Any]) -> None:
    folders, keys, theirs = alone(family, method)
    tolerance = ROUNDING.get(family, 1e-9)
    if family == "qwen3" and layout == FOUR:  # norms of the keys' heads too
        tolerance = 2e-6
    for ours in run_ranks(layout, steps, folders, with_layout(keys, layout)):
        same_run(ours, theirs, tolerance)


@pytest.mark.parametrize(("family", "method", "layout"), cases(CASES, SLOW))
def test_ranks_train_what_one_does(
    family: str, method: str, layout: dict[str, Any], alone: Callable[..., Any]
) -> None:
    compared(family, method, layout, alone)


def widths(world: World, folders: Any, keys: dict[str, Any]) -> tuple[list[int], list[str]]:
    """Tokens of a row of 13 that enter a decoder layer, its norm, its attention and the final norm."""
    built = build(config_of(folders, keys, "float32"), train=True, world=world)
    model: Any = built.model
    layer, found = model.model.layers[1], []
    for module in (layer, layer.input_layernorm, layer.self_attn.q_proj, model.model.norm):
        module.register_forward_pre_hook(lambda module, args: found.append(args[0].shape[1]))
    with torch.no_grad():
        built.stage(_trial(built.stage)[0])
    return found, built.remarks


def test_a_rank_holds_its_own_tokens(alone: Callable[..., Any]) -> None:
    """A row of 13 tokens is no multiple of two: each has 7, the last of them filled up."""
    folders, keys, _ = alone("llama", "full")
    for found, remarks in run_ranks(TP2, widths, folders, with_layout(keys, TP2)):
        assert found == [7, 7, 13, 13] and remarks == []
    for found, _ in run_ranks(TP2, widths, folders, with_layout(keys, BESIDE)):
        assert found == [13, 13, 13, 13]


@pytest.mark.parametrize("family", ["gpt2", "opt"])
def test_dropout_of_the_model_drops_the_same_units(
    family: str, model_folder: Callable[[str], Path], data: Path, tmp_path: Path
) -> None:
    folder = copy_model(model_folder(family), tmp_path / "dropping")
    config = json.loads((folder / "config.json").read_text("utf-8"))
    rates = {"attn_pdrop": 0.3, "resid_pdrop": 0.2, "embd_pdrop": 0.1}
    rates |= {"dropout": 0.2, "attention_dropout": 0.3}
    (folder / "config.json").write_text(json.dumps(config | rates), "utf-8")
    folders, keys = (folder, data, Path("unused")), {**KEYS, **METHODS["full"]}
    theirs = steps(World(), folders, keys, 1)
    for layout in (TP2, BESIDE):
        for ours in run_ranks(TP2, steps, folders, with_layout(keys, layout), 1):
            same_run(ours, theirs)


def remarks_of(world: World, folders: Any, keys: dict[str, Any], train: bool = True) -> str:
    """What a family says that cannot cut tokens."""
    reason = "its 'gate' is whole on each process"
    with patch.object(luthier.built, "tokens_of", lambda model, cuts: reason):
        try:
            built = build(config_of(folders, keys, "float32"), train=train, world=world)
        except Refused as error:
            return str(error)
    return " ".join(built.remarks)


def test_a_family_that_cannot_is_told_once_or_refused(alone: Callable[..., Any]) -> None:
    folders, keys, _ = alone("llama", "full")
    for told in run_ranks(TP2, remarks_of, folders, with_layout(keys, TP2)):
        assert told == "parallel.sequence is off: its 'gate' is whole on each process"
    assert run_ranks(TP2, remarks_of, folders, with_layout(keys, TP2), False) == ["", ""]
    for told in run_ranks(TP2, remarks_of, folders, with_layout(keys, {**TP2, "sequence": True})):
        assert told.startswith("parallel.sequence=true for the model family 'llama'. its 'gate'")


def test_modules_that_see_whole_rows(model_folder: Callable[[str], Path]) -> None:
    def found(family: str) -> Any:
        model = blueprint(load_config(model_folder(family)), "tiny")
        cuts = cuts_of(model, 2)
        return model, cuts, tokens_of(model, cuts)

    model, cuts, tokens = found("gpt2")
    assert tokens.entries[:2] == ["transformer.h.0.attn", "transformer.h.0.mlp"]
    assert "transformer.h.1.mlp.c_proj.bias" in tokens.shares
    assert "transformer.h.1.ln_1.weight" in tokens.shares
    assert "transformer.h.1.mlp.c_fc.bias" not in tokens.shares
    assert found("opt")[2].entries[:2] == ["model.decoder.layers.0.self_attn", "model.decoder.layers.0.fc1"]  # fmt: skip
    # what is whole inside of a module that gathers is read by the rank's own heads alone
    attention: Any = decoder_layers(model)[0].get_submodule("attn")
    attention.gate = torch.nn.Linear(4, 4)
    assert "transformer.h.0.attn.gate.weight" in tokens_of(model, cuts).shares  # pyright: ignore[reportAttributeAccessIssue]
    del attention.gate
    # routers see own tokens; experts take care of themselves
    tokens = found("qwen2_moe")[2]
    assert "model.layers.1.mlp.shared_expert" in tokens.entries
    assert {"model.layers.1.mlp.gate.weight", "model.layers.1.mlp.shared_expert_gate.weight"} <= {
        *tokens.shares
    }
    assert not [path for path in (*tokens.shares, *tokens.entries) if ".experts" in path]
    assert "model.layers.1.self_attn.kv_a_proj_with_mqa.weight" in found("deepseek_v3")[2].shares
    lone = {path: cut for path, cut in cuts.layers.items() if not path.endswith("attn.c_proj")}
    cuts.layers.clear()
    cuts.layers.update(lone)
    assert "'transformer.h.0.attn' has no layer that is cut by its inputs" in str(
        tokens_of(model, cuts)
    )
