"""Adapters on fused experts (`stacks.py`): one adapter a stack, whose tensors have an axis of experts in front.

It is the method's own class, made for one matrix; `expert` lets it be, for a moment, the adapter of matrix e. The
experts' module gets a forward of its own, expert by expert, so that a delta enters its matrix product before
that is rounded, as in `fused.py` (`stacks.run`). Methods that add nothing to an output (DoRA, (IA)^3) act through their folded
matrix, made on the fly. Also here: PEFT's names and shapes of LoRA on parameters (`target_parameters`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

from luthier import seeding
from luthier.adapters.base import Adapter, Additive, Placed, Removable, wide
from luthier.config import AdapterConfig
from luthier.errors import Refused
from luthier.stacks import (
    STACKS,
    Product,
    coded,
    linear_of,
    matrix,
    plain_product,
    run,
    shape_of,
    stacks_of,
    stand_in,
)

NESTED = "base_layer."  # PEFT wraps an experts' module once for each of its adapted parameters


def make(
    method: type[Adapter], model: nn.Module, name: str, config: AdapterConfig, seed: int
) -> Adapter:
    """The adapter of the stack `name`, without values; every tensor [E, ...] of one matrix' adapter."""
    number = number_of(model, name)
    adapter = method(linear_of(model, name), config, name=name, seed=seed)
    adapter.stacked = number
    for tensors in _held(adapter):
        for key, tensor in tensors.items():
            if tensor is not None:
                new = tensor.new_zeros(number, *tensor.shape)
                tensors[key] = nn.Parameter(new) if isinstance(tensor, nn.Parameter) else new
    return adapter


def number_of(model: nn.Module, name: str) -> int:
    """How many experts the stack `name` has."""
    path, _, stack = name.rpartition(".")
    return shape_of(model.get_submodule(path), stack)[0]


def place(experts: Any, adapters: Mapping[str, Adapter]) -> list[Removable]:
    """Put adapters on the stacks of an experts' module: name of the stack -> adapter."""
    experts.adapter = nn.ModuleDict(dict(adapters)).train(experts.training)
    handles: list[Removable] = [Placed(experts, "products", _products)]
    if "forward" not in vars(experts):  # a quantised one has it already
        handles.append(Placed(experts, "forward", MethodType(run, experts)))
    return handles


def initialise(model: nn.Module, adapter: Adapter, seed: int) -> None:
    """First values, a function of (seed, path of the stack, number of the expert)."""
    path, _, stack = adapter.name.rpartition(".")
    experts = model.get_submodule(path)
    for e, _ in _each(adapter):
        draw = seeding.generator(seed, "adapter", adapter.name, e)
        adapter.initialise(stand_in(experts, stack, e), draw)


def tensors_of(adapter: Adapter) -> dict[str, Tensor]:
    """`Adapter.tensors`, of a stack [E, ...] each."""
    if not adapter.stacked:
        return adapter.tensors()
    parts = [{key: t.detach() for key, t in adapter.tensors().items()} for _ in _each(adapter)]
    return {key: torch.stack([part[key] for part in parts]) for key in parts[0]}


def take(adapter: Adapter, tensors: Mapping[str, Tensor]) -> None:
    """`Adapter.take` of what `tensors_of` gave."""
    if not adapter.stacked:
        adapter.take(tensors)
        return
    for e, _ in _each(adapter):
        adapter.take({key: tensor[e] for key, tensor in tensors.items()})


def fold(experts: Any, stack: str, adapter: Adapter) -> None:
    """Fold the adapter into every matrix of the stack, in place; each is rounded once."""
    held, bias = getattr(experts, stack), getattr(experts, f"{stack}_bias", None)
    dense = held.dequantize(torch.float32) if coded(held) else None  # [E, out, in]
    for e, _ in _each(adapter):
        weight = matrix(experts, stack, e) if dense is None else dense[e]
        weight.copy_(adapter.fold(weight.to(wide(weight.dtype))))
        if bias is not None:
            bias[e].copy_(adapter.fold_bias(bias[e].to(wide(bias.dtype))))
    if dense is not None:
        held.load_from(dense)


@contextmanager
def expert(adapter: Adapter, parts: Mapping[str, Sequence[Tensor]], number: int) -> Iterator[None]:
    """Make `adapter` that of matrix `number`; `parts`: its tensors, taken apart (`_apart`)."""
    kept = [(own, dict(own)) for own in _held(adapter)]
    for own, whole in kept:
        own.update({key: parts[key][number] for key in whole if key in parts})
    try:
        yield
    finally:
        for own, whole in kept:
            for key in parts:
                if key in whole:
                    own[key] = whole[key]


def _held(adapter: Adapter) -> list[dict[str, Any]]:
    """Where a module keeps its own tensors: slices of parameters are put there, which are none themselves."""
    return [adapter._parameters, adapter._buffers]


def _apart(adapter: Adapter) -> dict[str, Sequence[Tensor]]:
    """Every tensor as a sequence over experts; taken apart once, its gradient is put together once."""
    tensors = {**adapter._parameters, **adapter._buffers}
    return {key: t.unbind(0) for key, t in tensors.items() if t is not None}


def _each(adapter: Adapter) -> Iterator[tuple[int, Adapter]]:
    """The adapter as that of each matrix in turn, to be read or written outside autograd."""
    with torch.no_grad():
        parts = _apart(adapter)
        views = {
            key: [nn.Parameter(t, requires_grad=False) for t in parts[key]]
            if key in adapter._parameters
            else parts[key]
            for key in parts
        }
        for e in range(adapter.stacked):
            with expert(adapter, views, e):
                yield e, adapter


def _products(experts: Any) -> Product:
    """The products of one forward, in which adapters are taken apart once."""
    parts = {name: _apart(adapter) for name, adapter in experts.adapter.items()}

    def product(stack: str, x: Tensor, e: int) -> Tensor:
        if stack not in parts:
            return plain_product(experts, stack, x, e)
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        adapter = experts.adapter[stack]
        with expert(adapter, parts[stack], e):
            if adds(adapter):
                delta = adapter.delta_here(x)
            else:
                exact = matrix(experts, stack, e)
                exact = exact.to(wide(exact.dtype))
                delta = x @ (adapter.fold(exact) - exact).t().to(x.dtype)
                if experts.has_bias:
                    bias = getattr(experts, f"{stack}_bias")[e]
                    delta = delta + (adapter.fold_bias(bias) - bias).to(x.dtype)
            return plain_product(experts, stack, x, e, delta)

    return product


def adds(adapter: Adapter) -> bool:
    """Whether all that the adapter does is to add `delta(x)`."""
    return isinstance(adapter, Additive) and not adapter.config.dora


# ---- PEFT's files


def to_file(adapters: Mapping[str, Adapter], plain: bool) -> dict[str, Tensor]:
    """Tensors of the adapters of stacks by their names in a file, without its prefix.

    `plain`: LoRA as PEFT has it on parameters: A [E * R, in], B [out, R * E], under the module's path, where the
    last stack is the outermost. Other methods: [E, ...] under the stack's path.
    """
    found = {}
    for name, adapter in adapters.items():
        path, _, stack = name.rpartition(".")
        later = STACKS[STACKS.index(stack) + 1 :]
        depth = sum(f"{path}.{other}" in adapters for other in later)
        for suffix, tensor in tensors_of(adapter).items():
            if not plain:
                found[f"{name}.{suffix}"] = tensor
                continue
            rows = (
                tensor.flatten(0, 1) if "lora_A" in suffix else tensor.permute(1, 2, 0).flatten(1)
            )
            found[f"{path}.{NESTED * depth}{suffix}"] = rows
    return found


def from_file(
    tensors: Mapping[str, Tensor], model: nn.Module, targets: Sequence[str] | None
) -> dict[str, Tensor]:
    """Tensors as `to_file` names them with `plain` -> by stack [E, ...]; all others as they are.

    Names have no prefix. `targets`: PEFT's target_parameters. Refused when they name no stack of the model.
    """
    if not targets:
        return dict(tensors)
    every = stacks_of(model)
    chosen = [name for name in every if any(f".{name}".endswith(f".{t}") for t in targets)]
    if not chosen:
        raise Refused(
            f"a LoRA folder with target_parameters={list(targets)}",
            f"the base has no such fused experts; it has {', '.join(every[:2]) or 'none'}",
            "give the base it was trained on, or let PEFT merge it into that",
        )
    found = dict(tensors)
    for name in chosen:
        path, _, stack = name.rpartition(".")
        later = STACKS[STACKS.index(stack) + 1 :]
        depth = sum(f"{path}.{other}" in chosen for other in later)
        number = number_of(model, name)
        for suffix in ("lora_A.weight", "lora_B.weight"):
            tensor = found.pop(f"{path}.{NESTED * depth}{suffix}", None)
            if tensor is None:
                continue
            if suffix == "lora_A.weight":
                found[f"{name}.{suffix}"] = tensor.unflatten(0, (number, -1))
            else:
                found[f"{name}.{suffix}"] = tensor.unflatten(1, (-1, number)).permute(2, 0, 1)
    return found


def file_targets(model: nn.Module, adapters: Mapping[str, Adapter]) -> list[str]:
    """target_parameters: ends of paths where they mean exactly the adapted stacks, else the paths."""
    names = [name for name, adapter in adapters.items() if adapter.stacked]
    ends = {".".join(name.split(".")[-2:]) for name in names}
    same = {name for name in stacks_of(model) if ".".join(name.split(".")[-2:]) in ends}
    return sorted(ends if same == set(names) else names)
