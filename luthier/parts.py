"""Marks on tensors that tensor parallelism cuts: which part of the whole a rank holds, and whose gradient is a share.

A cut parameter stays a plain tensor of its own shape, under its name, so that layers and adapters compute with it
as with any other; the mark says how the whole is put together. Moments, masters and gradients take the
mark of their parameter (`marked`). Who cuts is `parallel/tensor.py`, who gathers `parallel/shard.py`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

_PART, _SHARE = "luthier_part", "luthier_share"  # attributes of tensors
T = TypeVar("T", bound=Tensor)


@dataclass(frozen=True)
class Part:
    """The part that rank `rank` of `ranks` has of a tensor along `dim`.

    `sizes`: what lies one after the other along `dim` in the whole tensor (queries, keys and values, say), each cut
    into stretches that are equal, or one longer for the first ranks; a rank has one stretch of each.
    `copies`: so many neighbouring ranks have the same part (heads of keys and values, of which there are fewer than ranks).
    """

    dim: int
    sizes: tuple[int, ...]
    rank: int
    ranks: int
    copies: int = 1

    def of(self, whole: Tensor) -> Tensor:
        """This rank's part, contiguous."""
        number = self.ranks // self.copies
        pieces = whole.split(self.sizes, self.dim)
        mine = [piece.tensor_split(number, self.dim)[self.rank // self.copies] for piece in pieces]
        return torch.cat(mine, self.dim).contiguous()

    def join(self, parts: Sequence[Tensor]) -> Tensor:
        """The whole of every rank's part, in the ranks' order."""
        pieces = [
            part.split(self._lengths(rank), self.dim)
            for rank, part in enumerate(parts)
            if rank % self.copies == 0
        ]
        groups = zip(*pieces, strict=True)
        return torch.cat([piece for group in groups for piece in group], self.dim)

    def length(self, rank: int) -> int:
        """How long the part of a rank is along `dim`; no rank's is longer than that of rank 0."""
        return sum(self._lengths(rank))

    @property
    def start(self) -> int:
        """Where this rank's part begins in a tensor of one size."""
        return sum(
            self.length(rank)
            for rank in range(0, self.rank // self.copies * self.copies, self.copies)
        )

    def _lengths(self, rank: int) -> list[int]:
        number, place = self.ranks // self.copies, rank // self.copies
        return [size // number + (place < size % number) for size in self.sizes]

    def whole_shape(self, shape: Sequence[int]) -> tuple[int, ...]:
        """The shape of the whole, of a part's."""
        out = list(shape)
        out[self.dim] = sum(self.sizes)
        return tuple(out)


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
