"""Which layers an adapter goes to: `all-linear`, names, regular expressions.

A linear layer is an `nn.Linear` (weight [out, in]) or the `Conv1D` of gpt2 (weight [in, out]). Layers
are named by their path in the model. What is done to them is `base.py`'s.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable

from torch import nn
from transformers.pytorch_utils import Conv1D

from luthier.errors import Refused, suggest

ALL_LINEAR = "all-linear"


def features(layer: nn.Module) -> tuple[int, int]:
    """(in, out) of a linear layer."""
    if isinstance(layer, Conv1D):
        return layer.nx, layer.nf
    if isinstance(layer, nn.Linear):
        return layer.in_features, layer.out_features
    raise TypeError(f"{type(layer).__name__} is no linear layer")


def head_name(model: nn.Module) -> str | None:
    """Path of the output layer, or None where the model has none."""
    get = getattr(model, "get_output_embeddings", None)
    head = get() if get else None
    return next((name for name, module in model.named_modules() if module is head), None)


def select_targets(model: nn.Module, targets: str | Iterable[str]) -> list[str]:
    """Paths of the linear layers that `targets` asks for, in the model's order.

    `all-linear` is every one but the output layer and those with a single input or output. Anything else is a name, compared with the end of
    the path at a dot ("q_proj", "mlp.c_proj"), or else a regular expression for the whole path; a list
    is their union. Refused when one of them matches no linear layer.
    """
    modules = dict(model.named_modules())
    linear = [name for name, module in modules.items() if isinstance(module, nn.Linear | Conv1D)]
    chosen: set[str] = set()
    for item in [targets] if isinstance(targets, str) else targets:
        if item == ALL_LINEAR:
            head = head_name(model)
            # a rank-1 update of a layer with one output (a gate) would be no less than the layer itself
            found = {n for n in linear if n != head and min(features(modules[n])) > 1}
        else:
            found = _matches(item, linear)
        if not found:
            raise _no_match(item, modules, linear)
        chosen |= found
    return [name for name in linear if name in chosen]


def shortest_targets(model: nn.Module, names: Collection[str]) -> list[str]:
    """Names that select exactly the layers `names` when compared with the end of every path.

    Last parts of the paths ("q_proj") where that selects nothing else, as PEFT compares them; else the paths.
    """
    last = {name.rpartition(".")[2] for name in names}
    same = {name for name, _ in model.named_modules() if name.rpartition(".")[2] in last}
    return sorted(last if same == set(names) else names)


def _matches(item: str, names: Iterable[str]) -> set[str]:
    named = {name for name in names if name == item or name.endswith(f".{item}")}
    if named:
        return named
    try:
        return {name for name in names if re.fullmatch(item, name)}
    except re.error as error:
        raise Refused(
            f"adapter.targets '{item}'",
            f"it is no layer's name and no regular expression ({error})",
            "give names like q_proj, or a regular expression like .*self_attn.*",
        ) from error


def _no_match(item: str, modules: dict[str, nn.Module], linear: list[str]) -> Refused:
    other = sorted(_matches(item, set(modules) - {""}))
    known = list(dict.fromkeys(name.rpartition(".")[2] for name in linear))
    if other:
        kind = type(modules[other[0]]).__name__
        found = f"it matches no linear layer, only '{other[0]}' ({kind})"
    else:
        found = "it matches no layer"
    return Refused(
        f"adapter.targets '{item}'",
        f"{found}; linear layers are {', '.join(known) or 'none'}",
        suggest(item, known) or f"give one of these, a regular expression, or {ALL_LINEAR}",
    )
