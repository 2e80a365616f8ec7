"""Exchanges between the ranks of the `tensor` axis, each with the backward that its place in a model asks for.

The gradient of a sum is everybody's; that of what every rank computes a share from is summed; that of what every
rank computes the same from is nobody's to sum. Tokens are cut in stretches of equal length, the last
filled up with zeros. Who exchanges what is told by `tensor.py`, `sequence.py` and `vocabulary.py`.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from luthier.parallel.world import World
from luthier.parts import Part


class Axis(NamedTuple):
    """The ranks that cut a model's layers, and this one's place among them."""

    group: Any
    rank: int
    ranks: int

    @classmethod
    def of(cls, world: World) -> Axis:
        mesh = world.mesh
        return cls(mesh.get_group("tensor"), mesh.get_local_rank("tensor"), world.sizes["tensor"])


def total(x: Tensor, axis: Axis) -> Tensor:
    """The sum of the ranks' x, outside autograd."""
    out = x.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(out, group=axis.group)
    return out


def all_parts(x: Tensor, group: Any, how: Part) -> Tensor:
    """The whole of every rank's part x, outside autograd."""
    dim = how.dim % x.ndim
    missing = how.length(0) - x.shape[dim]
    if missing:  # parts of different lengths travel alike
        x = torch.cat([x, x.new_zeros(*x.shape[:dim], missing, *x.shape[dim + 1 :])], dim)
    x = x.contiguous()
    parts = [torch.empty_like(x) for _ in range(how.ranks)]
    dist.all_gather(parts, x, group=group)
    return how.join([part.narrow(dim, 0, how.length(i)) for i, part in enumerate(parts)])


# ---- sums


def sum_backward(x: Tensor, axis: Axis) -> Tensor:
    """x, whose gradient is the sum of the ranks'."""
    return _SumBackward.apply(x, axis)  # pyright: ignore[reportReturnType]


def sum_forward(y: Tensor, axis: Axis) -> Tensor:
    """The sum of the ranks' y; each gets the gradient of the sum."""
    return _SumForward.apply(y, axis)  # pyright: ignore[reportReturnType]


class _SumBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: Axis) -> Tensor:
        ctx.axis = axis
        return x.view_as(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        return total(gradient, ctx.axis), None


class _SumForward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y: Tensor, axis: Axis) -> Tensor:
        return total(y, axis)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        return gradient, None


# ---- features


def whole_features(x: Tensor, axis: Axis, how: Part, *, shares: bool) -> Tensor:
    """The whole of every rank's x. `shares`: what follows is a share on each rank, so gradients are summed."""
    return _WholeFeatures.apply(x, axis, how, shares)  # pyright: ignore[reportReturnType]


class _WholeFeatures(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: Axis, how: Part, shares: bool) -> Tensor:
        ctx.axis, ctx.how, ctx.shares = axis, how, shares
        return all_parts(x, axis.group, how)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        gradient = total(gradient, ctx.axis) if ctx.shares else gradient
        return ctx.how.of(gradient), None, None, None


# ---- tokens, [B, S, D]


def split_tokens(x: Tensor, axis: Axis) -> Tensor:
    """This rank's tokens of x [B, S, D], which is the same on every rank -> [B, S/n, D]."""
    return _SplitTokens.apply(x, axis)  # pyright: ignore[reportReturnType]


def sum_tokens(y: Tensor, axis: Axis) -> Tensor:
    """This rank's tokens of the sum of the ranks' y [B, S, D] -> [B, S/n, D]."""
    return _SumTokens.apply(y, axis)  # pyright: ignore[reportReturnType]


def whole_tokens(x: Tensor, axis: Axis, width: int, *, shares: bool) -> Tensor:
    """Every rank's tokens x [B, S/n, D] -> [B, S, D] of S = `width`; `shares` as in `whole_features`."""
    return _WholeTokens.apply(x, axis, width, shares)  # pyright: ignore[reportReturnType]


def whole_rows(x: Tensor, axis: Axis, shape: tuple[int, int], *, shares: bool) -> Tensor:
    """`whole_tokens` of x [B, S/n, D] or [B*S/n, D], with `shape` (B, S)."""
    if x.ndim > 2:
        return whole_tokens(x, axis, shape[1], shares=shares)
    rows = x.unflatten(0, (shape[0], -1))
    return whole_tokens(rows, axis, shape[1], shares=shares).flatten(0, 1)


def sum_rows(y: Tensor, axis: Axis, rows: int) -> Tensor:
    """`sum_tokens` of y [B, S, D] or [B*S, D] of `rows` B."""
    if y.ndim > 2:
        return sum_tokens(y, axis)
    return sum_tokens(y.unflatten(0, (rows, -1)), axis).flatten(0, 1)


class _SplitTokens(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: Axis) -> Tensor:
        ctx.axis, ctx.width = axis, x.shape[1]
        return _stretches(x, axis)[axis.rank].clone()  # no view of x: who follows may write into it

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        return _joined(gradient, ctx.axis, ctx.width), None


class _SumTokens(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y: Tensor, axis: Axis) -> Tensor:
        ctx.axis, ctx.width = axis, y.shape[1]
        return _scattered(y, axis)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        return _joined(gradient, ctx.axis, ctx.width), None


class _WholeTokens(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: Axis, width: int, shares: bool) -> Tensor:
        ctx.axis, ctx.shares = axis, shares
        return _joined(x, axis, width)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        axis = ctx.axis
        own = _scattered(gradient, axis) if ctx.shares else _stretches(gradient, axis)[axis.rank]
        return own, None, None, None


def _stretches(x: Tensor, axis: Axis) -> list[Tensor]:
    """The tokens of each rank, contiguous."""
    missing = -x.shape[1] % axis.ranks
    x = F.pad(x, (0, 0, 0, missing)) if missing else x
    return [part.contiguous() for part in x.chunk(axis.ranks, 1)]


def _scattered(x: Tensor, axis: Axis) -> Tensor:
    parts = _stretches(x, axis)
    out = torch.empty_like(parts[0])
    dist.reduce_scatter(out, parts, group=axis.group)
    return out


def _joined(x: Tensor, axis: Axis, width: int) -> Tensor:
    x = x.contiguous()
    parts = [torch.empty_like(x) for _ in range(axis.ranks)]
    dist.all_gather(parts, x, group=axis.group)
    return torch.cat(parts, 1).narrow(1, 0, width).contiguous()
