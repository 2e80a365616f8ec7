"""Tensor parallelism: linear layers cut among the ranks of the mesh's `tensor` axis.

A layer cut by its outputs takes whole inputs, whose gradient is summed in the backward; one cut by its inputs
gives a partial sum, which is added up in the forward, and its bias once. Between the two, heads and inner numbers are
a rank's own. Weights stay plain tensors of the rank's part (`parts.py`), so that adapters, recomputation and
sharding work on them as on any other. Embedding and head are cut by rows of the vocabulary (`vocabulary.py`);
between the layers a rank may hold its own tokens only (`sequence.py`). Which layers are cut, and how, is told
by `models/cuts.py`; adapters that cannot be cut are told their part by `beside.py`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import partial
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.nn import Parameter

from luthier.batch import current_layout
from luthier.held import hold, release, ways_of, whole_of
from luthier.layers import is_quantized, is_transposed
from luthier.parallel.beside import Columns, Rows
from luthier.parallel.collectives import Axis, sum_backward, sum_forward, sum_rows, total
from luthier.parts import Part, mark_part, mark_share


class LayerCut(Protocol):
    """How one linear layer is cut: `models.cuts.LayerCut`."""

    @property
    def along(self) -> str: ...  # "outputs" or "inputs"
    @property
    def sizes(self) -> tuple[int, ...]: ...  # what lies one after the other along that side
    @property
    def entering(self) -> bool: ...  # whether its inputs are whole up to here, or a rank's share
    def part(self, dim: int, rank: int, ranks: int) -> Part: ...


class Sides(NamedTuple):
    style: str  # in the words of adapters' `follows`
    weight: int  # axis of the weight [out, in] that is cut


AXIS = "tensor"
SIDES = {"outputs": Sides("colwise", 0), "inputs": Sides("rowwise", 1)}


def cut_layers(
    model: nn.Module,
    layers: Mapping[str, LayerCut],
    adapters: Mapping[str, nn.Module],
    shares: Iterable[str],
    axis: Axis,
    *,
    by_tokens: bool = False,
    whole: Iterable[str] = (),
) -> None:
    """Cut the linear layers of `model` at these paths, and the adapters on them, to this rank's part.

    All values are there and whole before: they depend on no rank. `shares`: modules between the cuts whose
    parameters are whole on each rank and whose gradients are summed. `by_tokens`: in a layout, tokens are gathered
    before the layers and scattered behind them; the layers of `whole` (the head) are outside of that.
    """
    kept = set(whole)
    for path, how in layers.items():
        layer: Any = model.get_submodule(path)
        sides = SIDES[how.along]
        if is_quantized(layer):
            keep_part(layer, part_of(sides.weight - 2, how, axis))
        else:
            dim = 1 - sides.weight if is_transposed(layer) else sides.weight
            put_part(layer, "weight", part_of(dim, how, axis))
            _resize(layer, how.along, part_of(0, how, axis).length(axis.rank))
        if how.along == "outputs":
            if layer._parameters.get("bias") is not None:
                put_part(layer, "bias", part_of(0, how, axis))
            if how.entering:
                entering = _Entering(axis, by_tokens and path not in kept)
                layer.register_forward_pre_hook(entering, prepend=True)
        else:
            leaving = _Leaving(axis, by_tokens)
            layer.register_forward_pre_hook(leaving.enter)
            layer.register_forward_hook(leaving.leave, always_call=True)
        if path in adapters:
            cut_adapter(adapters[path], how, axis)
    for path in shares:
        for parameter in model.get_submodule(path).parameters():
            mark_share(parameter)


def by_heads(adapters: Mapping[str, nn.Module], axis: Axis) -> None:
    """Give adapters that have heads of keys and values for all layers (prefixes) this rank's of them."""
    for adapter in adapters.values():
        one: Any = adapter
        if not one.by_heads:
            continue
        copies = (max(1, axis.ranks // one.kv_heads),)
        one.heads_here = Part(1, (one.kv_heads,), axis.rank, axis.ranks, copies)
        for parameter in one.parameters():
            mark_share(parameter)


def part_of(dim: int, how: LayerCut, axis: Axis) -> Part:
    return how.part(dim, axis.rank, axis.ranks)


def cut_adapter(adapter: Any, how: LayerCut, axis: Axis) -> None:
    """Cut an adapter as the layer, or the stack of experts, is that it is on; one that cannot be stays whole, and takes
    its part of what it gives. All that is whole then has a share of its gradient on each rank."""
    if how.along == "inputs":
        adapter.entering = part_of(-1, how, axis)
        adapter.total = partial(total, axis=axis)
    axes = adapter.follows.get(SIDES[how.along].style)
    named = [*adapter.named_parameters(), *adapter.named_buffers()]
    parts: dict[str, Part | None] = {}
    for name, tensor in named:
        if axes and name in axes:
            dim = axes[name] + bool(adapter.stacked)
            parts[name] = part_beside(tensor.shape[dim], how, dim, axis)
    if axes is None or None in parts.values():
        adapter.beside = (Columns if how.along == "outputs" else Rows)(how.part, axis)
        parts = {}
    for name, tensor in named:
        part = parts.get(name)
        if part is not None:
            put_part(adapter, name, part)
        elif isinstance(tensor, Parameter):
            mark_share(tensor)


def part_beside(length: int, how: LayerCut, dim: int, axis: Axis) -> Part | None:
    """How a side of an adapter's tensor is cut beside a layer; None if it cannot be."""
    part, ranks = part_of(dim, how, axis), axis.ranks
    if length == sum(how.sizes):
        return part
    even = length % ranks == 0 and how.sizes[0] % ranks == 0 and how.sizes[0] % length == 0
    plain = len(how.sizes) == 1 and even and not part.copies
    return Part(dim, (length,), axis.rank, ranks) if plain else None


@torch.no_grad()
def put_part(owner: nn.Module, name: str, how: Part) -> None:
    """Put the rank's part in the place of a parameter, buffer or other tensor."""
    old = getattr(owner, name)
    mine = how.of(whole_of(old).detach()).clone()
    if isinstance(old, Parameter):
        mine = Parameter(mine, requires_grad=old.requires_grad)
    hold(mine, [way for way in ways_of(old) if way.axis != AXIS])
    setattr(owner, name, mine)
    mark_part(mine, how)


def keep_part(layer: Any, how: Part) -> None:
    """Keep the rank's part of a quantised layer's, or stack's, codes."""
    ways = [way for way in ways_of(layer.codes) if way.axis != AXIS]
    release(layer)
    layer.keep(how)
    for tensor in layer.tensors().values():
        hold(tensor, ways)


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

    def __init__(self, axis: Axis, by_tokens: bool) -> None:
        self.axis, self.by_tokens = axis, by_tokens

    @torch.compiler.disable()
    def __call__(self, layer: nn.Module, args: tuple[Any, ...]) -> Any:
        if self.by_tokens and current_layout() is not None:
            return None  # the gradient is summed where the tokens were gathered
        return (sum_backward(args[0], self.axis), *args[1:])


class _Leaving:
    """The sum of the ranks' outputs of a layer that is cut by its inputs, and its bias."""

    def __init__(self, axis: Axis, by_tokens: bool) -> None:
        self.axis, self.by_tokens = axis, by_tokens

    @torch.compiler.disable()
    def enter(self, layer: nn.Module, args: tuple[Any, ...]) -> None:
        _hide_bias(layer)

    @torch.compiler.disable()
    def leave(self, layer: nn.Module, args: tuple[Any, ...], output: Tensor | None) -> Any:
        vars(layer).pop("bias", None)
        if (
            output is None
        ):  # the forward was left early: an error, or all is recomputed that is needed
            return None
        layout = current_layout() if self.by_tokens else None
        if layout is not None:
            y = sum_rows(output, self.axis, layout.shape[0])
        else:
            y = sum_forward(output, self.axis)
        bias = layer._parameters.get("bias")
        if bias is None:
            return y
        adapter: Any = getattr(layer, "adapter", None)
        if adapter is not None:
            bias = adapter.fold_bias(bias)
            # what the adapter has from here is whole on each rank, and of its own tokens only where they are cut
            bias = _shared(bias, self.axis.ranks) if layout is None else bias
        return y + bias.to(y.dtype)


def _shared(x: Tensor, ranks: int) -> Tensor:
    """x, of whose gradient each rank counts an equal share."""
    return x.detach() + (x - x.detach()) / ranks if x.requires_grad else x
