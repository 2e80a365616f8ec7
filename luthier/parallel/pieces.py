"""Which rectangles of a whole tensor this rank holds, however it was cut: the words that a checkpoint uses.

A tensor may be sharded (a DTensor of FSDP2), a part by tensor parallelism (`parts.py`, for fused layers a stretch of
each piece), or both, or whole. A rectangle is a view of the rank's memory and its place in the whole, so what
was written on one layout is read on any other (`train/state.py`). Equal rectangles on several ranks are
replicas: `share_out` says which of them a rank writes.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from luthier.parallel.world import World
from luthier.parts import cut_of


@dataclass(frozen=True)
class Piece:
    """`values` is a view of this rank's memory; it lies at `offsets` of the whole tensor."""

    offsets: tuple[int, ...]
    values: Tensor


@dataclass(frozen=True)
class Pieces:
    """What this rank holds of a tensor of `shape`; nothing overlaps."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    parts: tuple[Piece, ...]


def pieces_of(tensor: Tensor) -> Pieces:
    """The rectangles of the whole tensor that lie on this rank; views, not copies."""
    shape, how = tuple(tensor.shape), cut_of(tensor)
    local, start = tensor.detach(), (0,) * tensor.ndim
    if isinstance(local, DTensor):
        _, start = compute_local_shape_and_global_offset(
            local.shape, local.device_mesh, local.placements
        )
        local = local.to_local()
    if how is None:
        return Pieces(shape, tensor.dtype, _solid([Piece(tuple(start), local)]))
    axis = how.dim % tensor.ndim
    begin, parts = start[axis], []
    here = 0  # where a stretch begins in the rank's part
    for there, length in how.stretches:
        first = max(begin, here)
        last = min(begin + local.shape[axis], here + length)
        if first < last:
            offsets = (*start[:axis], there + first - here, *start[axis + 1 :])
            parts.append(Piece(tuple(offsets), local.narrow(axis, first - begin, last - first)))
        here += length
    return Pieces(how.whole_shape(shape), tensor.dtype, _solid(parts))


def _solid(parts: list[Piece]) -> tuple[Piece, ...]:
    return tuple(part for part in parts if part.values.numel())


Place = tuple[str, tuple[int, ...]]  # name and offsets of a piece


class Shares:
    """Which pieces this rank writes. Ranks agree on it once per layout, not at every save."""

    def __init__(self, world: World) -> None:
        self.world = world
        self._known: dict[str, set[Place]] = {}  # digest of all ranks' pieces -> those of this rank

    def of(self, state: Mapping[str, Pieces]) -> dict[str, Pieces]:
        """The pieces that this rank writes; every rank must ask, each piece is written by one of them."""
        if self.world.size == 1:
            return dict(state)
        ours = [
            [name, list(part.offsets), part.values.numel() * part.values.element_size()]
            for name, pieces in state.items()
            for part in pieces.parts
        ]
        digest = hashlib.sha256(json.dumps(ours).encode()).hexdigest()
        known = json.dumps(self.world.gather(digest))
        if known not in self._known:
            self._known[known] = _shared_out(self.world.gather(ours), self.world.rank)
        mine = self._known[known]
        return {
            name: Pieces(
                pieces.shape,
                pieces.dtype,
                tuple(part for part in pieces.parts if (name, part.offsets) in mine),
            )
            for name, pieces in state.items()
        }


def _shared_out(every: list[list[tuple[str, list[int], int]]], rank: int) -> set[Place]:
    """Of all ranks' pieces those that `rank` writes: each goes to the rank with the least so far of those that
    have it, the largest first."""
    holders: dict[Place, list[int]] = {}
    sizes: dict[Place, int] = {}
    for holder, pieces in enumerate(every):
        for name, offsets, size in pieces:
            holders.setdefault((name, tuple(offsets)), []).append(holder)
            sizes[name, tuple(offsets)] = size
    load = [0] * len(every)
    mine: set[Place] = set()
    for place in sorted(holders, key=lambda place: (-sizes[place], place)):
        writer = min(holders[place], key=lambda holder: (load[holder], holder))
        load[writer] += sizes[place]
        if writer == rank:
            mine.add(place)
    return mine
