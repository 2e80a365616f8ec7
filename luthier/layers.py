"""Linear layers of a model by name: what counts as one, its sizes, and what a name or an expression means.

A linear layer is an `nn.Linear` (weight [out, in]), the `Conv1D` of gpt2 (weight [in, out]), or a quantised one
that stands for either: it has no `weight` but `multiply`, `multiply_back` and `dequantize`. Layers are
named by their path in the model. What is done to them, adapting or quantising, is others'.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from luthier.errors import Refused, suggest
from luthier.held import filled, whole_of
from luthier.parts import whole_numel
from luthier.stacks import own_stacks, shape_of

ALL_LINEAR = "all-linear"


def is_quantized(layer: nn.Module) -> bool:
    """Whether its weight is kept as codes and scales (`quantize.linears`)."""
    return hasattr(layer, "multiply_back")


def is_linear(layer: nn.Module) -> TypeGuard[Any]:
    """Whether it is a linear layer, quantised or not."""
    return isinstance(layer, nn.Linear | Conv1D) or (
        is_quantized(layer) and hasattr(layer, "in_features")
    )


def is_transposed(layer: nn.Module) -> bool:
    """Whether the weight, or that which codes stand for, is [in, out]."""
    return isinstance(layer, Conv1D) or getattr(layer, "transposed", False) is True


def features(layer: nn.Module) -> tuple[int, int]:
    """(in, out) of a linear layer."""
    if isinstance(layer, Conv1D):
        return layer.nx, layer.nf
    if is_linear(layer):
        return layer.in_features, layer.out_features
    raise TypeError(f"{type(layer).__name__} is no linear layer")


def dense_weight(layer: nn.Module, dtype: torch.dtype | None = None) -> Tensor:
    """The weight of a linear layer as [out, in], without gradient; `dtype` default: the layer's."""
    if is_quantized(layer):
        with filled(layer):
            return layer.dequantize(dtype)  # pyright: ignore[reportCallIssue]
    weight = whole_of(layer.get_parameter("weight")).detach()
    weight = weight.t() if is_transposed(layer) else weight
    return weight if dtype is None else weight.to(dtype)


def weight_dtype(layer: nn.Module) -> torch.dtype:
    """The type of the weight, or of that which codes stand for."""
    dtype = getattr(layer, "dtype", None) if is_quantized(layer) else None
    return layer.get_parameter("weight").dtype if dtype is None else dtype


def times_weight(layer: nn.Module, x: Tensor) -> Tensor:
    """x W^T [N, out] of the layer's weight W for x [N, in], without gradient and in W's type."""
    x = x.detach().to(weight_dtype(layer))
    if is_quantized(layer):
        return layer.multiply(x)  # pyright: ignore[reportCallIssue]
    return x @ dense_weight(layer).t()


def is_double(module: nn.Module) -> bool:
    """Whether any number of it is float64: what is added to it should be too."""
    stands_for = getattr(module, "dtype", None)  # codes do not tell
    return stands_for == torch.float64 or any(p.dtype == torch.float64 for p in module.parameters())


def count(model: nn.Module) -> tuple[int, int]:
    """(trained, all) numbers in the model's parameters; what is shared counts once.

    A quantised weight counts as the weight that it stands for.
    """
    trained = total = 0
    seen: set[int] = set()
    module: Any
    for module in model.modules():
        stored = set(module.spec.layout) if is_quantized(module) else set()
        total += module.whole if stored else 0
        for name, parameter in module.named_parameters(recurse=False):
            if name in stored or id(parameter) in seen:
                continue
            seen.add(id(parameter))
            total += whole_numel(parameter)
            trained += whole_numel(parameter) if parameter.requires_grad else 0
    return trained, total


def head_name(model: nn.Module) -> str | None:
    """Path of the output layer, or None where the model has none."""
    get = getattr(model, "get_output_embeddings", None)
    head = get() if get else None
    return next((name for name, module in model.named_modules() if module is head), None)


def select_linear(model: nn.Module, wanted: str | Iterable[str], key: str) -> list[str]:
    """Paths of the linear layers that `wanted`, the value of the config's `key`, asks for, in the model's order.

    `all-linear` is every one but the output layer and those with a single input or output. Anything else is
    a name, compared with the end of the path at a dot ("q_proj", "mlp.c_proj"), or else a regular expression
    for the whole path; a list is their union. Fused experts count as the linear layers they are. Refused when one of
    them matches no linear layer.
    """
    modules = dict(model.named_modules())
    sizes: dict[str, Collection[int]] = {}
    for name, module in modules.items():
        if is_linear(module):
            sizes[name] = features(module)
        for stack in own_stacks(module):
            sizes[f"{name}.{stack}".removeprefix(".")] = shape_of(module, stack)[1:]
    linear = list(sizes)
    chosen: set[str] = set()
    for item in [wanted] if isinstance(wanted, str) else wanted:
        if item == ALL_LINEAR:
            head = head_name(model)
            # a gate with one output would be no less as an update than as a layer
            found = {n for n in linear if n != head and min(sizes[n]) > 1}
        else:
            found = matches(item, linear, key)
        if not found:
            raise _no_match(item, modules, linear, key)
        chosen |= found
    return [name for name in linear if name in chosen]


def matches(item: str, names: Iterable[str], key: str) -> set[str]:
    """Those of `names` that end with `item` at a dot, else those that it matches as an expression."""
    named = {name for name in names if name == item or name.endswith(f".{item}")}
    if named:
        return named
    try:
        return {name for name in names if re.fullmatch(item, name)}
    except re.error as error:
        raise Refused(
            f"{key} '{item}'",
            f"it is no layer's name and no regular expression ({error})",
            "give names like q_proj, or a regular expression like .*self_attn.*",
        ) from error


def _no_match(item: str, modules: dict[str, nn.Module], linear: list[str], key: str) -> Refused:
    other = sorted(matches(item, set(modules) - {""}, key))
    known = list(dict.fromkeys(name.rpartition(".")[2] for name in linear))
    if other:
        kind = type(modules[other[0]]).__name__
        found = f"it matches no linear layer, only '{other[0]}' ({kind})"
    else:
        found = "it matches no layer"
    return Refused(
        f"{key} '{item}'",
        f"{found}; linear layers are {', '.join(known) or 'none'}",
        suggest(item, known) or f"give one of these, a regular expression, or {ALL_LINEAR}",
    )
