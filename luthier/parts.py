"""Marks on tensors that tensor parallelism cuts: which part of the whole a rank holds, and whose gradient is a share.

A cut parameter stays a plain tensor of its own shape, under its name, so that layers and adapters compute with it
as with any other; the mark says how the whole is put together. Moments, masters and gradients take the
mark of their parameter (`marked`). Who cuts is `parallel/tensor.py`, who gathers `parallel/shard.py`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol, TypeVar

import torch
from torch import Tensor
from torch.nn.functional import pad

_PART, _SHARE, _COPY = "luthier_part", "luthier_share", "luthier_copy"  # attributes of tensors
T = TypeVar("T", bound=Tensor)


@dataclass(frozen=True)
class Part:
    """The part that rank `rank` of `ranks` has of a tensor along `dim`.

    `sizes`: what lies one after the other along `dim` in the whole tensor (queries, keys and values, say), each cut
    into stretches that are equal, or one longer for the first ranks; a rank has one of each. `copies`: how many neighbours have the same stretch of it
    (keys of which there are fewer than ranks); 1 each where it is empty.
    """

    dim: int
    sizes: tuple[int, ...]
    rank: int
    ranks: int
    copies: tuple[int, ...] = ()

    @property
    def stretches(self) -> list[tuple[int, int]]:
        """(start, length) in the whole of what this rank has of each piece."""
        found, start = [], 0
        for size, copies in zip(self.sizes, self._copies, strict=True):
            number, place = self.ranks // copies, self.rank // copies
            length, longer = divmod(size, number)
            before = place * length + min(place, longer)
            found.append((start + before, length + (place < longer)))
            start += size
        return found

    @property
    def own_sizes(self) -> list[int]:
        """How long its stretch of each piece is."""
        return [length for _, length in self.stretches]

    def length(self, rank: int) -> int:
        """How long the part of a rank is along `dim`; no rank's is longer than that of rank 0."""
        return sum(replace(self, rank=rank).own_sizes)

    @property
    def _copies(self) -> tuple[int, ...]:
        return self.copies or (1,) * len(self.sizes)

    def of(self, whole: Tensor) -> Tensor:
        """This rank's part, contiguous."""
        mine = [whole.narrow(self.dim, start, length) for start, length in self.stretches]
        return torch.cat(mine, self.dim).contiguous()

    def join(self, parts: Sequence[Tensor]) -> Tensor:
        """The whole of every rank's part, in the ranks' order."""
        own = (replace(self, rank=rank).own_sizes for rank in range(self.ranks))
        split = (part.split(sizes, self.dim) for part, sizes in zip(parts, own, strict=True))
        pieces = zip(*split, strict=True)
        groups = (group[::n] for group, n in zip(pieces, self._copies, strict=True))
        return torch.cat([piece for group in groups for piece in group], self.dim)

    def copied(self, part: Tensor) -> Tensor | None:
        """What of a rank's part others have too, True, as a mask in its shape; None where they have nothing of it."""
        if max(self._copies) == 1:
            return None
        mask = torch.zeros(part.shape, dtype=torch.bool, device=part.device)
        for there, copies in zip(mask.split(self.own_sizes, self.dim), self._copies, strict=True):
            there.fill_(copies > 1)
        return mask

    @property
    def holders(self) -> range:
        """The ranks that have the same of what is copied."""
        number = max(self._copies)
        first = self.rank // number * number
        return range(first, first + number)

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
class Stretch:
    """The tokens [B, S/n, ...] that rank `rank` of n `ranks` has of a tensor [B, S, ...] of S = `width`; the last
    stretch is filled up."""

    width: int
    rank: int
    ranks: int

    @property
    def length(self) -> int:
        return -(-self.width // self.ranks)

    def of(self, whole: Tensor) -> Tensor:
        missing = -self.width % self.ranks
        filled = pad(whole, (0, 0) * (whole.ndim - 2) + (0, missing))
        return filled.chunk(self.ranks, 1)[self.rank]

    def whole_shape(self, shape: Sequence[int]) -> tuple[int, ...]:
        return (shape[0], self.width, *shape[2:])


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


@dataclass(frozen=True)
class Copy:
    """A tensor that several pipeline stages have: its gradient is the sum of theirs.

    `everywhere`: all stages, else the first and the last (tied embeddings). `counts`: whether this one counts in
    what is summed over stages (norms).
    """

    everywhere: bool
    counts: bool


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


def copy_of(tensor: Tensor) -> Copy | None:
    """How a tensor is on several pipeline stages; None for one that is on one."""
    return getattr(tensor, _COPY, None)


def mark_copy(tensor: Tensor, how: Copy) -> None:
    setattr(tensor, _COPY, how)


def marked(tensor: T, like: Tensor) -> T:
    """`tensor` with the marks of `like`, to which it belongs."""
    for name in (_PART, _SHARE, _COPY):
        if hasattr(like, name):
            setattr(tensor, name, getattr(like, name))
    return tensor


def whole_numel(tensor: Tensor) -> int:
    """How many numbers the whole tensor has."""
    how = cut_of(tensor)
    return tensor.numel() if how is None else math.prod(how.whole_shape(tensor.shape))
