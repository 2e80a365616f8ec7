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

from luthier.layers import is_quantized
from luthier.parallel.tensor import SIDES, LayerCut, SumBackward, SumForward, cut_adapter, put_part
from luthier.parallel.world import World
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
    model: nn.Module, cuts: Cuts, adapters: Mapping[str, nn.Module], world: World
) -> None:
    """Cut all of `cuts` that is no linear layer, and the adapters on experts, to this rank's part."""
    rank, ranks = world.mesh.get_local_rank("tensor"), world.sizes["tensor"]
    group = world.mesh.get_group("tensor")
    for path, stacks in cuts.experts.items():
        experts: Any = model.get_submodule(path)
        for name, how in stacks.items():
            _cut_stack(experts, name, how, rank, ranks)
            if (adapter := adapters.get(f"{path}.{name}")) is not None:
                cut_adapter(adapter, how, rank, ranks)
        hooks = _Experts(group, rank)
        experts.register_forward_pre_hook(hooks.enter)
        experts.register_forward_hook(hooks.leave, always_call=True)
    for path, how in cuts.rows.items():
        owner, _, name = path.rpartition(".")
        put_part(model.get_submodule(owner), name, how.part(0, rank, ranks))
    for path, how in cuts.gathered.items():
        norm, hooks = model.get_submodule(path), _Width(group, how.part(-1, rank, ranks))
        norm.register_forward_pre_hook(hooks.enter)
        norm.register_forward_hook(hooks.leave)
    for path in cuts.branches:
        model.get_submodule(path).register_forward_hook(_Branch(group))


def _cut_stack(experts: Any, name: str, how: LayerCut, rank: int, ranks: int) -> None:
    held, side = getattr(experts, name), SIDES[how.along].weight  # of [E, out, in]
    if is_quantized(held):
        held.keep(how.part(side - 2, rank, ranks))
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

    def __init__(self, group: Any, rank: int) -> None:
        self.group, self.rank = group, rank

    def enter(self, experts: Any, args: tuple[Any, ...]) -> Any:
        hidden, chosen, weights = args
        if experts.has_bias:
            # an instance's own attribute comes before its parameter
            bias = experts._parameters["down_proj_bias"]
            vars(experts)["down_proj_bias"] = bias * float(self.rank == 0)
        return (
            SumBackward.apply(hidden, self.group),
            chosen,
            SumBackward.apply(weights, self.group),
        )

    def leave(self, experts: Any, args: tuple[Any, ...], output: Tensor | None) -> Any:
        vars(experts).pop("down_proj_bias", None)
        # none if the forward was left early: an error, or all is recomputed that is needed
        return None if output is None else SumForward.apply(output, self.group)


class _Width:
    """A norm over numbers of which each rank has a part."""

    def __init__(self, group: Any, how: Part) -> None:
        self.group, self.how = group, how

    def enter(self, norm: nn.Module, args: tuple[Any, ...]) -> Any:
        return (_Gather.apply(args[0], self.group, self.how), *args[1:])

    def leave(self, norm: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        return self.how.of(output)


class _Branch:
    """Outputs that the heads of every rank read."""

    def __init__(self, group: Any) -> None:
        self.group = group

    def __call__(self, layer: nn.Module, args: tuple[Any, ...], output: Tensor) -> Any:
        return SumBackward.apply(output, self.group)


class _Gather(torch.autograd.Function):
    """A rank's part -> the whole, of which each rank uses its own; the gradients of the ranks are summed.

    Of what several ranks have alike the first one gets the gradient: those of a copied weight are summed afterwards.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Any, how: Part) -> Tensor:
        ctx.group, ctx.how = group, how
        parts = [torch.empty_like(x) for _ in range(how.ranks)]
        torch.distributed.all_gather(parts, x.contiguous(), group=group)
        return how.join(parts)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        total, how = gradient.clone(memory_format=torch.contiguous_format), ctx.how
        torch.distributed.all_reduce(total, group=ctx.group)
        own = how.of(total)
        if how.rank != how.holders[0]:
            own = own.masked_fill(how.copied(own), 0)
        return own, None, None
