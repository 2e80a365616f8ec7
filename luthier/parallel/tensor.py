"""Tensor parallelism: linear layers cut among the ranks of the mesh's `tensor` axis.

A layer cut by its outputs takes whole inputs, whose gradient is summed in the backward; one cut by its inputs
gives a partial sum, which is added up in the forward, and its bias once. Between the two, heads and inner numbers are
a rank's own. Weights stay plain tensors of the rank's part (`parts.py`), so that adapters, recomputation and
sharding work on them as on any other. Embedding, norms and head are whole on every rank. Which layers are cut,
and how, is told by `models/cuts.py`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import Parameter

from luthier.errors import Refused
from luthier.layers import is_quantized, is_transposed
from luthier.parallel.world import World
from luthier.parts import Part, mark_part, mark_share


class LayerCut(Protocol):
    """How one linear layer is cut: `models.cuts.LayerCut`."""

    @property
    def along(self) -> str: ...  # "outputs" or "inputs"
    @property
    def sizes(self) -> tuple[int, ...]: ...  # what lies one after the other along that side
    @property
    def entering(
        self,
    ) -> bool: ...  # whether its inputs are whole up to here, or a rank's share of a branch
    def part(self, dim: int, rank: int, ranks: int) -> Part: ...


class Sides(NamedTuple):
    style: str  # in the words of adapters' `follows`
    weight: int  # axis of the weight [out, in] that is cut


SIDES = {"outputs": Sides("colwise", 0), "inputs": Sides("rowwise", 1)}


def check_method(method: str, follows: Mapping[str, Any], tensor: int) -> None:
    """Refuse an adapter method that says nothing about how it is cut (`Adapter.follows`)."""
    if not follows:
        raise Refused(
            f"adapter.method={method} with parallel.tensor={tensor}",
            "what it adds to a layer cannot be cut as the layer is",
            "use parallel.shard in place of parallel.tensor, or adapter.method=lora",
        )


def check_adapters(
    layers: Mapping[str, LayerCut], adapters: Mapping[str, nn.Module], world: World
) -> None:
    """Refuse adapters that cannot be cut as their layers are. `adapters`: path of the layer -> its adapter."""
    for path, adapter in adapters.items():
        config: Any = adapter.config
        asked = f"adapter.method={config.method} with parallel.tensor={world.sizes['tensor']}"
        follows: Any = adapter.follows
        check_method(config.method, follows, world.sizes["tensor"])
        if path not in layers:
            continue
        how = layers[path]
        if SIDES[how.along].style not in follows:
            raise Refused(
                asked,
                f"layer '{path}' is cut by its {how.along}, and with these options of the adapter "
                "the other side is needed whole",
                f"leave '{path.rpartition('.')[2]}' out of adapter.targets, or use parallel.shard",
            )
        for name, axis in follows[SIDES[how.along].style].items():
            tensor = getattr(adapter, name, None)
            if tensor is None:
                continue
            length = tensor.shape[axis + bool(adapter.stacked)]
            if part_beside(length, how, 0, 0, world.sizes["tensor"]) is None:
                raise Refused(
                    asked,
                    f"{name} of layer '{path}' has {length} rows or columns, which cannot be "
                    f"shared out as the layer's {sum(how.sizes)} {how.along} are",
                    "leave the layer out of adapter.targets, or use parallel.shard",
                )


def cut_layers(
    model: nn.Module,
    layers: Mapping[str, LayerCut],
    adapters: Mapping[str, nn.Module],
    shares: Iterable[str],
    world: World,
) -> None:
    """Cut the linear layers of `model` at these paths, and the adapters on them, to this rank's part.

    All values are there and whole before: they depend on no rank. `shares`: modules between the cuts whose
    parameters are whole on each rank and whose gradients are summed.
    """
    rank, ranks = world.mesh.get_local_rank("tensor"), world.sizes["tensor"]
    group = world.mesh.get_group("tensor")
    for path, how in layers.items():
        layer: Any = model.get_submodule(path)
        sides = SIDES[how.along]
        if is_quantized(layer):
            layer.keep(how.part(sides.weight - 2, rank, ranks))
        else:
            axis = 1 - sides.weight if is_transposed(layer) else sides.weight
            put_part(layer, "weight", how.part(axis, rank, ranks))
            _resize(layer, how.along, sum(how.part(0, rank, ranks).own_sizes))
        if how.along == "outputs":
            if layer._parameters.get("bias") is not None:
                put_part(layer, "bias", how.part(0, rank, ranks))
            if how.entering:
                layer.register_forward_pre_hook(_Entering(group), prepend=True)
        else:
            leaving = _Leaving(group)
            layer.register_forward_pre_hook(leaving.enter)
            layer.register_forward_hook(leaving.leave, always_call=True)
        if path in adapters:
            cut_adapter(adapters[path], how, rank, ranks)
    for path in shares:
        for parameter in model.get_submodule(path).parameters():
            mark_share(parameter)


def cut_adapter(adapter: Any, how: LayerCut, rank: int, ranks: int) -> None:
    """Cut an adapter as the layer, or the stack of experts, is that it is on."""
    if how.along == "inputs":
        adapter.entering = how.part(-1, rank, ranks)
    axes = adapter.follows[SIDES[how.along].style]
    for name, tensor in (*adapter.named_parameters(), *adapter.named_buffers()):
        if name in axes:
            axis = axes[name] + bool(adapter.stacked)
            part = part_beside(tensor.shape[axis], how, axis, rank, ranks)
            assert part is not None  # `check_adapters`
            put_part(adapter, name, part)
        elif isinstance(tensor, Parameter):
            mark_share(tensor)


def part_beside(length: int, how: LayerCut, axis: int, rank: int, ranks: int) -> Part | None:
    """How a side of an adapter's tensor is cut beside a layer; None if it cannot be."""
    part = how.part(axis, rank, ranks)
    if length == sum(how.sizes):
        return part
    plain = len(how.sizes) == 1 and length % ranks == 0 and how.sizes[0] % length == 0
    return Part(axis, (length,), rank, ranks) if plain and not part.copies else None


@torch.no_grad()
def put_part(owner: nn.Module, name: str, how: Part) -> None:
    """Put the rank's part in the place of a parameter, buffer or other tensor."""
    old = getattr(owner, name)
    mine = how.of(old.detach()).clone()
    if isinstance(old, Parameter):
        mine = Parameter(mine, requires_grad=old.requires_grad)
    setattr(owner, name, mine)
    mark_part(mine, how)


def _resize(layer: nn.Module, along: str, size: int) -> None:
    """The layer's own record of its sizes."""
    names = {"outputs": ("out_features", "nf"), "inputs": ("in_features", "nx")}[along]
    for name in names:
        if hasattr(layer, name):
            setattr(layer, name, size)


def _hide_bias(layer: nn.Module) -> None:
    """Let the layer compute without its bias, which stays among its parameters.

    An instance's own attribute comes before what nn.Module looks up among the parameters.
    """
    bias = layer._parameters.get("bias")
    if bias is not None:
        # Conv1D's product takes a vector in any case
        vars(layer)["bias"] = torch.zeros_like(bias) if is_transposed(layer) else None


class _Entering:
    """Whole inputs of a layer that is cut by its outputs."""

    def __init__(self, group: Any) -> None:
        self.group = group

    def __call__(self, layer: nn.Module, args: tuple[Any, ...]) -> Any:
        return (SumBackward.apply(args[0], self.group), *args[1:])


class _Leaving:
    """The sum of the ranks' outputs of a layer that is cut by its inputs, and its bias."""

    def __init__(self, group: Any) -> None:
        self.group = group

    def enter(self, layer: nn.Module, args: tuple[Any, ...]) -> None:
        _hide_bias(layer)

    def leave(self, layer: nn.Module, args: tuple[Any, ...], output: Tensor | None) -> Any:
        vars(layer).pop("bias", None)
        if (
            output is None
        ):  # the forward was left early: an error, or all is recomputed that is needed
            return None
        y: Any = SumForward.apply(output, self.group)
        bias = layer._parameters.get("bias")
        return y if bias is None else y + bias.to(y.dtype)


class SumBackward(torch.autograd.Function):
    """x -> x; the gradients of the ranks are summed."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Any) -> Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        total = gradient.clone(memory_format=torch.contiguous_format)
        torch.distributed.all_reduce(total, group=ctx.group)
        return total, None


class SumForward(torch.autograd.Function):
    """The ranks' y -> their sum; each gets the gradient of the sum."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, group: Any) -> Tensor:
        total = y.clone(memory_format=torch.contiguous_format)
        torch.distributed.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        return gradient, None
