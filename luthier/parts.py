"""Marks on tensors that tensor parallelism cuts: which part of the whole a rank holds, and whose gradient is a share.

A cut parameter stays a plain tensor of its own shape, under its name, so that layers and adapters compute with it
as with any other; the mark says how the whole is put together. Moments, masters and gradients take the
mark of their parameter (`marked`). Who cuts is `parallel/tensor.py`, who gathers `parallel/shard.py`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

import torch
from torch import Tensor

_PART, _SHARE = "luthier_part", "luthier_share"  # attributes of tensors
T = TypeVar("T", bound=Tensor)


@dataclass(frozen=True)
class Part:
    """The part that rank `rank` of `ranks` has of a tensor along `dim`.

    `sizes`: what lies one after the other along `dim` in the whole tensor (queries, keys and values, say), each cut
    into `ranks` equal stretches; a rank has one stretch of each.
    """

    dim: int
    sizes: tuple[int, ...]
    rank: int
    ranks: int

    def of(self, whole: Tensor) -> Tensor:
        """This rank's part, contiguous."""
        pieces = whole.split(self.sizes, self.dim)
        mine = [piece.chunk(self.ranks, self.dim)[self.rank] for piece in pieces]
        return torch.cat(mine, self.dim).contiguous()

    def join(self, parts: Sequence[Tensor]) -> Tensor:
        """The whole of every rank's part, in the ranks' order."""
        own = [size // self.ranks for size in self.sizes]
        pieces = zip(*(part.split(own, self.dim) for part in parts), strict=True)
        return torch.cat([piece for group in pieces for piece in group], self.dim)

    def whole_shape(self, shape: Sequence[int]) -> tuple[int, ...]:
        """The shape of the whole, of a part's."""
        out = list(shape)
        out[self.dim] = sum(self.sizes)
        return tuple(out)


class Piece(Protocol):
    """A part of a larger tensor, by shapes and places alone."""

    def of(self, whole: Tensor, /) -> Tensor: ...
    def whole_shape(self, shape: Sequence[int], /) -> tuple[int, ...]: ...


@dataclass(frozen=True)
class Both:
    """The piece `inner` of the piece `outer`."""

    inner: Piece
    outer: Piece

    def of(self, whole: Tensor) -> Tensor:
        return self.inner.of(self.outer.of(whole))

    def whole_shape(self, shape: Sequence[int]) -> tuple[int, ...]:
        return self.outer.whole_shape(self.inner.whole_shape(shape))


def both(inner: Piece | None, outer: Piece | None) -> Piece | None:
    """`Both`, where there are two."""
    return Both(inner, outer) if inner and outer else inner or outer


def cut_of(tensor: Tensor) -> Part | None:
    """How `tensor` was cut; None for a tensor that every tensor-parallel rank holds whole."""
    return getattr(tensor, _PART, None)


def is_share(tensor: Tensor) -> bool:
    """Whether the gradient of this whole tensor is the sum of the tensor-parallel ranks' (norms of heads, LoRA's A
    before a layer that is cut by its outputs); that of the other whole ones is the same on each."""
    return getattr(tensor, _SHARE, False)


def mark_part(tensor: Tensor, how: Part) -> None:
    setattr(tensor, _PART, how)


def mark_share(tensor: Tensor) -> None:
    setattr(tensor, _SHARE, True)


def marked(tensor: T, like: Tensor) -> T:
    """`tensor` with the marks of `like`, to which it belongs."""
    for name in (_PART, _SHARE):
        if hasattr(like, name):
            setattr(tensor, name, getattr(like, name))
    return tensor


def whole_numel(tensor: Tensor) -> int:
    """How many numbers the whole tensor has."""
    how = cut_of(tensor)
    return tensor.numel() if how is None else math.prod(how.whole_shape(tensor.shape))
