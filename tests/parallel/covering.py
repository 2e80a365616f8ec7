"""Rows (family, method, layout) of the table of layouts: a covering set, in which every pair of values meets.

What Luthier refuses by name is left out by asking it (`refusals`). The greedy choice is deterministic, and takes
what covers most first, so that the beginning of the list already says the most. The two longest axes alone have 150
pairs, and a row holds one of them: a covering set cannot be smaller.
"""

from __future__ import annotations

import math
from functools import cache
from itertools import combinations, product
from typing import Any

from tiny_families import config_keys, model_type
from transformers import AutoConfig

from luthier.config_parallel import AXES, ParallelConfig
from luthier.errors import Refused
from luthier.models.across import check_heads
from luthier.models.cuts import cuts_of
from luthier.models.load import blueprint
from luthier.models.sequence import TokenCut, tokens_of
from luthier.parallel.degrees import check_stages, mesh_sizes

Row = tuple[str, str, str]  # family, method, layout

FAMILIES = ("llama", "qwen3", "gpt2", "bloom", "chatglm2", "mixtral")
DEPTH = {"gpt2": "n_layer", "bloom": "n_layer", "chatglm2": "num_layers"}
LAYERS = 4  # two stages on each of two ranks
_NO_RANK = {"adapter__rank": None}
METHODS: dict[str, dict[str, Any]] = {
    "full": {"adapter__method": "none", **_NO_RANK},
    "lora": {"adapter__method": "lora"},
    "pissa": {"adapter__method": "lora", "adapter__pissa": True},
    "dora": {"adapter__method": "lora", "adapter__dora": True},
    "vera": {"adapter__method": "vera"},
    "lokr": {"adapter__method": "lokr"},
    "mora": {"adapter__method": "mora"},
    "reft": {"adapter__method": "reft"},
    "prefix": {"adapter__method": "prefix", "adapter__num_prefix_tokens": 3, **_NO_RANK},
    "mixer": {"adapter__method": "lora", "adapter__mixer": True},
}
QLORA = {
    **METHODS["lora"],
    "quantize__weights": "nf4",
    "quantize__double_quant": True,
}
LAYOUTS: dict[str, dict[str, Any]] = {
    "dp2": {"replicate": 2},
    "shard2 stage 1": {"shard": 2, "stage": 1},
    "shard2 stage 2": {"shard": 2, "stage": 2},
    "shard2 stage 3": {"shard": 2, "stage": 3},
    "tp2": {"tensor": 2, "sequence": False},
    "tp2 sequence": {"tensor": 2, "sequence": True},
    "cp2 gather": {"context": 2, "context_method": "gather"},
    "cp2 heads": {"context": 2, "context_method": "heads"},
    "pp2": {"pipeline": 2},
    "pp2 interleaved": {"pipeline": 2, "virtual_stages": 2, "schedule": "interleaved"},
    "dp2 x tp2": {"replicate": 2, "tensor": 2},
    "pp2 x dp2 x tp2": {"pipeline": 2, "replicate": 2, "tensor": 2},
    "cp2 x tp2": {"context": 2, "tensor": 2},
    "cp2 x pp2": {"context": 2, "pipeline": 2},
    "shard2 x tp2 x pp2": {"shard": 2, "tensor": 2, "pipeline": 2},
}
# an nf4 base, LoRA on it; 36 of bloom's 72 inputs leave no blocks worth a scale, which is refused by name
QUANTISED: list[Row] = [
    (family, "nf4 qlora", layout)
    for family in FAMILIES
    if family != "bloom"
    for layout in ("dp2 x tp2", "pp2 x tp2")
]


def degrees_of(layout: str) -> dict[str, Any]:
    """`parallel.*` of a layout, every degree of it."""
    given = {**LAYOUTS, "pp2 x tp2": {"pipeline": 2, "tensor": 2}}[layout]
    return {"shard": 1, **given}


def processes_of(row: Row) -> int:
    degrees = degrees_of(row[2])
    return math.prod(degrees.get(axis, 1) for axis in AXES)


def keys_of(method: str) -> dict[str, Any]:
    return QLORA if method == "nf4 qlora" else METHODS[method]


@cache
def _tokens(family: str, ranks: int) -> TokenCut | str:
    """How tensor ranks cut a family's layers and tokens. Refused where they cannot."""
    keys = {**config_keys(family), DEPTH.get(family, "num_hidden_layers"): LAYERS}
    model = blueprint(AutoConfig.for_model(model_type(family), **keys), family)
    return tokens_of(model, cuts_of(model, ranks))


def _refusal(family: str, layout: str) -> str | None:
    """What Luthier says against a family in a layout, before any weights are read; None where nothing."""
    parallel = ParallelConfig.model_validate(degrees_of(layout))
    config = AutoConfig.for_model(model_type(family), **config_keys(family))
    try:
        sizes = mesh_sizes(parallel, processes_of((family, "full", layout)))
        check_stages(parallel, sizes["pipeline"], LAYERS)
        if parallel.context_method == "heads":
            check_heads(config.num_attention_heads, sizes["context"])
        if sizes["tensor"] > 1:
            tokens = _tokens(family, sizes["tensor"])
            if isinstance(tokens, str) and parallel.sequence is True:
                return tokens
    except Refused as error:
        return str(error)
    return None


@cache
def refusals() -> dict[tuple[str, str], str]:
    """(family, layout) that are refused -> why."""
    found = {pair: _refusal(*pair) for pair in product(FAMILIES, LAYOUTS)}
    return {pair: why for pair, why in found.items() if why is not None}


def allowed() -> list[Row]:
    """The whole product without what is refused."""
    refused = refusals()
    rows = product(FAMILIES, METHODS, LAYOUTS)
    return [row for row in rows if (row[0], row[2]) not in refused]


def pairs_of(row: Row) -> set[tuple[tuple[int, str], ...]]:
    """The pairs of values of two axes that a row has."""
    return set(combinations(enumerate(row), 2))


@cache
def covering() -> list[Row]:
    """Rows in which each pair of an allowed row occurs, those of an nf4 base after them."""
    candidates = {row: pairs_of(row) for row in allowed()}
    missing = set().union(*candidates.values())
    chosen: list[Row] = []
    while missing:
        # of equals the one whose values were taken least, so that no family is left for the end
        uses = {value: sum(value in row for row in chosen) for row in candidates for value in row}
        best = min(
            candidates,
            key=lambda row: (-len(candidates[row] & missing), sum(uses[value] for value in row)),
        )
        chosen.append(best)
        missing -= candidates.pop(best)
    return chosen + QUANTISED
