"""Which layers an adapter goes to: `all-linear`, names, regular expressions, decoder layers; and what is
trained whole beside it.

What a linear layer is and what its names mean is told by `layers.py`, matrices of fused experts (`stacks.py`)
count as such; what is done to them by `base.py`.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from typing import TypeVar

from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer

from luthier.config import AdapterConfig
from luthier.errors import Refused, suggest
from luthier.layers import is_quantized, select_linear
from luthier.stacks import stacks_of

Value = TypeVar("Value", int, float)


def select_targets(
    model: nn.Module, targets: str | Iterable[str], layers: Collection[int] | None = None
) -> list[str]:
    """Paths of the linear layers that `targets` asks for, in the model's order.

    As `select_linear` reads them. `layers` keeps those of these decoder layers only. Refused when one of the
    targets matches no linear layer, or when there is no such decoder layer.
    """
    found = select_linear(model, targets, "adapter.targets")
    if layers is None:
        return found
    stems = tuple(f"{decoders(model, layers)[number]}." for number in sorted(layers))
    chosen = [name for name in found if name.startswith(stems)]
    if not chosen:
        raise Refused(
            f"adapter.layers with adapter.targets={targets}",
            "the targets lie in other layers",
            "give targets inside of decoder layers, or adapter.layers=all",
        )
    return chosen


def decoders(model: nn.Module, wanted: Collection[int] | None = None) -> list[str]:
    """Paths of all decoder layers, in order. Refused when `wanted` names one that is not there."""
    found = [n for n, m in model.named_modules() if isinstance(m, GradientCheckpointingLayer)]
    beyond = sorted(number for number in wanted or () if number >= len(found))
    if beyond:
        raise Refused(
            f"adapter.layers with layer {beyond[0]}",
            f"the model has {len(found)} decoder layers, counted from 0",
            f"give numbers up to {len(found) - 1}, or all",
        )
    return found


def options_of(config: AdapterConfig, name: str) -> AdapterConfig:
    """The options of layer `name`: those of `config` with its rank and alpha patterns applied.

    A pattern is compared with the end of the path at a dot, as a regular expression; the first that
    matches counts. A layer with a rank of its own and no alpha keeps the alpha of the others.
    """
    if not config.rank_pattern and not config.alpha_pattern:
        return config
    rank = pattern_value(config.rank_pattern, name, config.rank)
    alpha = pattern_value(config.alpha_pattern, name, config.scale_alpha)
    none: dict[str, int] = {}
    changes = {"rank": rank, "alpha": alpha, "rank_pattern": none, "alpha_pattern": none}
    return config.model_copy(update=changes)


def refuse_idle_patterns(config: AdapterConfig, names: Collection[str]) -> None:
    """Refuse a rank or alpha pattern that fits none of the layers `names`."""
    for key in ("rank_pattern", "alpha_pattern"):
        for pattern in getattr(config, key):
            if not any(pattern_value({pattern: 1}, name, 0) for name in names):
                known = list(dict.fromkeys(name.rpartition(".")[2] for name in names))
                raise Refused(
                    f"adapter.{key} '{pattern}'",
                    f"it fits no adapted layer; these are {', '.join(known)}",
                    suggest(pattern, known) or "give one of these, or a regular expression",
                )


def pattern_value(patterns: Mapping[str, Value], name: str, usual: Value) -> Value:
    """The value of the first pattern that matches the end of the path at a dot, as PEFT has it."""
    try:
        matches = (v for p, v in patterns.items() if re.fullmatch(rf"(.*\.)?({p})", name))
        return next(matches, usual)
    except (re.error, AttributeError) as error:  # a file may hold anything
        raise Refused(
            f"the patterns {patterns}",
            f"they are no regular expressions ({error})",
            "give names like q_proj, or regular expressions like .*mlp.*",
        ) from error


def select_whole(
    model: nn.Module, modules: Iterable[str], adapted: Collection[str] = ()
) -> list[str]:
    """Paths of the parameters of `modules` (names at the end of paths), which are trained whole.

    Refused when a name matches nothing, a module without parameters, or a layer that is `adapted`.
    """
    named = dict(model.named_modules())
    found: list[str] = []
    for item in modules:
        paths = [n for n in named if n == item or n.endswith(f".{item}")]
        inside = {p: [f"{p}.{n}" for n, _ in named[p].named_parameters()] for p in paths}
        parameters = [n for names in inside.values() for n in names]
        if not parameters:
            known = sorted(
                {n.rpartition(".")[2] for n, m in named.items() if not list(m.children())}
            )
            raise Refused(
                f"adapter.modules_to_save '{item}'",
                "no module with parameters has this name",
                suggest(item, known) or f"modules are {', '.join(known[:12])}",
            )
        codes = [n for p in paths for n, m in named[p].named_modules(prefix=p) if is_quantized(m)]
        if codes:
            raise Refused(
                f"adapter.modules_to_save '{item}'",
                f"'{codes[0]}' is quantised (quantize.weights): codes cannot be trained",
                "leave it out of quantize.modules, or give it an adapter with adapter.targets",
            )
        inner = {id(p) for path in paths for p in named[path].parameters()}
        clash = [n for n in adapted if inner & {id(p) for p in named[n].parameters(recurse=False)}]
        if clash:
            raise Refused(
                f"adapter.modules_to_save '{item}'",
                f"layer '{clash[0]}' is to get an adapter: it cannot be trained whole beside it",
                "leave it out of adapter.targets or of adapter.modules_to_save",
            )
        found += [n for n in parameters if n not in found]
    return found


def shortest_targets(model: nn.Module, names: Collection[str]) -> list[str]:
    """Names that select exactly the layers `names` when compared with the end of every path.

    Last parts of the paths ("q_proj") where that selects nothing else, as PEFT compares them; else the paths.
    """
    last = {name.rpartition(".")[2] for name in names}
    layers = (name for name, _ in model.named_modules() if ".adapter." not in name)
    every = [*layers, *stacks_of(model)]
    same = {name for name in every if name.rpartition(".")[2] in last}
    return sorted(last if same == set(names) else names)
