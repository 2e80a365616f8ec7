"""Tensor parallelism of what is no single linear layer: experts, norms over the width of all heads, latents.

An experts' module is cut by the inner numbers of each expert, as one MLP is: what enters (tokens and the router's
weights of them) has its gradient summed, what leaves is summed, and a bias of the outputs is the first rank's. A
norm over all heads gets the whole width and keeps a rank's part of its result. What is cut how is `models.cuts.Cuts`;
linear layers are `tensor.py`'s.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from luthier.batch import current_layout
from luthier.layers import is_quantized
from luthier.parallel.collectives import (
    Axis,
    all_parts,
    sum_backward,
    sum_forward,
    sum_rows,
    total,
    whole_rows,
)
from luthier.parallel.tensor import SIDES, LayerCut, cut_adapter, keep_part, put_part
from luthier.parts import Part, mark_share


class Cuts(Protocol):
    """`models.cuts.Cuts`."""

    @property
    def experts(self) -> Mapping[str, Mapping[str, LayerCut]]: ...
    @property
    def rows(self) -> Mapping[str, LayerCut]: ...
    @property
    def gathered(self) -> Mapping[str, LayerCut]: ...
    @property
    def branches(self) -> list[str]: ...


def cut_branches(
    model: nn.Module,
    cuts: Cuts,
    adapters: Mapping[str, nn.Module],
    axis: Axis,
    *,
    by_tokens: bool = False,
) -> None:
    """Cut all of `cuts` that is no linear layer, and the adapters on experts, to this rank's part; `by_tokens` as of
    `tensor.cut_layers`."""
    rank, ranks = axis.rank, axis.ranks
    for path, stacks in cuts.experts.items():
        experts: Any = model.get_submodule(path)
        for name, how in stacks.items():
            _cut_stack(experts, name, how, rank, ranks)
            if (adapter := adapters.get(f"{path}.{name}")) is not None:
                cut_adapter(adapter, how, axis)
        hooks = _Experts(axis, by_tokens)
        experts.register_forward_pre_hook(hooks.enter)
        experts.register_forward_hook(hooks.leave, always_call=True)
    for path, how in cuts.rows.items():
        owner, _, name = path.rpartition(".")
        put_part(model.get_submodule(owner), name, how.part(0, rank, ranks))
    for path, how in cuts.gathered.items():
        norm, hooks = model.get_submodule(path), _Width(axis, how.part(-1, rank, ranks))
        norm.register_forward_pre_hook(hooks.enter)
        norm.register_forward_hook(hooks.leave)
    for path in cuts.branches:
        model.get_submodule(path).register_forward_hook(_Branch(axis, by_tokens))


def _cut_stack(experts: Any, name: str, how: LayerCut, rank: int, ranks: int) -> None:
    held, side = getattr(experts, name), SIDES[how.along].weight  # of [E, out, in]
    if is_quantized(held):
        keep_part(held, how.part(side - 2, rank, ranks))
    else:
        put_part(
            experts, name, how.part(2 - side if experts.is_transposed else 1 + side, rank, ranks)
        )
    if not experts.has_bias:
        return
    if how.along == "outputs":
        put_part(experts, f"{name}_bias", how.part(1, rank, ranks))
    else:  # the first rank's alone; the others' gradient is 0
        mark_share(getattr(experts, f"{name}_bias"))


class _Experts:
    """x [N, D], the experts of each token and their weights [N, K] -> the sum of what the ranks' parts give."""

    def __init__(self, axis: Axis, by_tokens: bool) -> None:
        self.axis, self.by_tokens = axis, by_tokens

    @torch.compiler.disable()
    def enter(self, experts: Any, args: tuple[Any, ...]) -> Any:
        hidden, chosen, weights = args
        if experts.has_bias:
            # an instance's own attribute comes before its parameter
            bias = experts._parameters["down_proj_bias"]
            vars(experts)["down_proj_bias"] = bias * float(self.axis.rank == 0)
        layout = current_layout() if self.by_tokens else None
        if layout is None:
            return sum_backward(hidden, self.axis), chosen, sum_backward(weights, self.axis)
        return tuple(whole_rows(x, self.axis, layout.shape, shares=True) for x in args)

    @torch.compiler.disable()
    def leave(self, experts: Any, args: tuple[Any, ...], output: Tensor | None) -> Any:
        vars(experts).pop("down_proj_bias", None)
        if output is None:  # left early: an error, or all is recomputed that is needed
            return None
        layout = current_layout() if self.by_tokens else None
        if layout is None:
            return sum_forward(output, self.axis)
        return sum_rows(output, self.axis, layout.shape[0])


class _Width:
    """A norm over numbers of which each rank has a part."""

    def __init__(self, axis: Axis, how: Part) -> None:
        self.axis, self.how = axis, how

    def enter(self, norm: nn.Module, args: tuple[Any, ...]) -> Any:
        return (_Gather.apply(args[0], self.axis, self.how), *args[1:])

    def leave(self, norm: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        return self.how.of(output)


class _Branch:
    """Outputs that the heads of every rank read."""

    def __init__(self, axis: Axis, by_tokens: bool) -> None:
        self.axis, self.by_tokens = axis, by_tokens

    @torch.compiler.disable()
    def __call__(self, layer: nn.Module, args: tuple[Any, ...], output: Tensor) -> Any:
        if self.by_tokens and current_layout() is not None:
            return None  # the gradient is summed where the tokens were gathered
        return sum_backward(output, self.axis)


class _Gather(torch.autograd.Function):
    """A rank's part -> the whole, of which each rank uses its own; the gradients of the ranks are summed.

    Of what several ranks have alike the first one gets the gradient: those of a copied weight are summed afterwards.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: Axis, how: Part) -> Tensor:
        ctx.axis, ctx.how = axis, how
        return all_parts(x, axis.group, how)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        how = ctx.how
        own = how.of(total(gradient, ctx.axis))
        if how.rank != how.holders[0]:
            own = own.masked_fill(how.copied(own), 0)
        return own, None, None
