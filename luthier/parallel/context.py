"""Context parallelism: the ranks of the context axis share the tokens of each row.

`Context.split` gives a rank its columns of a batch, in chunks that are dealt out so that each rank has as much
attention to compute; all else in a model looks at single tokens. `gather`, `to_heads` and `to_tokens` are how attention
reaches the other ranks' tokens; they are handed to it with the batch (`batch.Share`). Gradients of
weights are sums over these ranks too, which `shard.py` adds.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from luthier.batch import IGNORE, PADDING, TENSORS, Batch, Layout, Share
from luthier.parallel.world import World

CHUNK = 64  # tokens of a chunk, at most: small ones balance, large ones are quick to compute
CHUNKS = 8  # of a row on each rank, at least, if they have a quarter of that size


class Context:
    """This process's place on the context axis of `world`, and how it exchanges tokens (an `Exchange`)."""

    def __init__(self, world: World, method: str) -> None:
        self.method = method
        self.ranks: int = world.sizes["context"]
        self.rank: int = world.mesh.get_local_rank("context")
        self.group: Any = world.mesh.get_group("context")

    def split(self, batch: Batch) -> Batch:
        """This rank's columns [B, s] of a batch; rows are padded to n * s tokens, by one more document."""
        width = batch.input_ids.shape[1]
        share = math.ceil(width / self.ranks)
        # chunks of a row on each rank
        number = max(2, min(CHUNKS, 4 * share // CHUNK), math.ceil(share / CHUNK))
        size = math.ceil(width / (self.ranks * number))
        whole = _padded(batch, self.ranks * number * size)
        owners = deal(costs(Layout.of(whole), size), self.ranks)  # [B, chunks]
        owner = owners.repeat_interleave(size, 1)  # [B, S]
        everyone = owner.argsort(dim=1, stable=True)
        columns = everyone.unflatten(1, (self.ranks, -1))[:, self.rank]
        share = Share(whole, columns, everyone, everyone.argsort(1), width, self)
        parts = {name: getattr(whole, name) for name in TENSORS}
        index = {
            name: columns if x.ndim == 2 else columns[:, None].expand(-1, x.shape[1], -1)
            for name, x in parts.items()
        }
        mine = {name: x.gather(-1, index[name]) for name, x in parts.items()}
        return Batch(**mine, rows=batch.rows, share=share)

    def gather(self, x: Tensor, share: Share) -> Tensor:
        """[B, K, s, D] -> [B, K, S, D]: the tokens of all ranks, in the order of the row."""
        return _Gather.apply(x, share, self)  # pyright: ignore[reportReturnType]

    def to_heads(self, x: Tensor, share: Share) -> Tensor:
        """[B, H, s, D] -> [B, H/n, S, D]: all tokens of this rank's heads."""
        return _ToHeads.apply(x, share, self)  # pyright: ignore[reportReturnType]

    def to_tokens(self, x: Tensor, share: Share) -> Tensor:
        """[B, H/n, S, D] -> [B, H, s, D]: back again."""
        return _ToTokens.apply(x, share, self)  # pyright: ignore[reportReturnType]

    def exchanged(self, parts: Tensor) -> Tensor:
        """[n, ...], one part for each rank -> [n, ...], one part from each."""
        out = torch.empty_like(parts, memory_format=torch.contiguous_format)
        dist.all_to_all_single(out, parts.contiguous(), group=self.group)
        return out


def costs(layout: Layout, size: int) -> Tensor:
    """Keys that the queries of each chunk of `size` tokens see, [B, S / size]; padding is free."""
    index = torch.arange(layout.borders.shape[1], device=layout.borders.device)
    places = index - torch.where(layout.borders, index, 0).cummax(1).values
    seen = torch.where(layout.document_ids == PADDING, 0, places + 1)
    return seen.unflatten(1, (-1, size)).sum(-1)


def deal(work: Tensor, ranks: int) -> Tensor:
    """Which rank computes each chunk of a row, from the chunks' costs [B, chunks]: as many chunks for each.

    Of each `ranks` neighbours the dearest goes to whom has least so far, over all rows: with one document this is
    the usual pair of a chunk from the head and one from the tail, and documents of any lengths are balanced too.
    """
    owners = torch.empty_like(work)
    load = [0] * ranks
    for row, line in enumerate(work.tolist()):
        for first in range(0, len(line), ranks):
            group = sorted(range(first, first + ranks), key=lambda i: -line[i])
            takers = sorted(range(ranks), key=lambda rank: load[rank])
            for chunk, rank in zip(group, takers, strict=True):
                owners[row, chunk] = rank
                load[rank] += line[chunk]
    return owners


def _padded(batch: Batch, width: int) -> Batch:
    more = width - batch.input_ids.shape[1]
    fill = {"labels": IGNORE, "document_ids": PADDING}
    if not more:
        return batch
    return replace(
        batch, **{n: F.pad(getattr(batch, n), (0, more), value=fill.get(n, 0)) for n in TENSORS}
    )


def _take(x: Tensor, index: Tensor) -> Tensor:
    """x [B, H, S, D], index [B, S] -> x with its tokens in that order."""
    return x.gather(2, index[:, None, :, None].expand(-1, x.shape[1], -1, x.shape[3]))


def _to_heads(x: Tensor, share: Share, context: Context) -> Tensor:
    parts = x.unflatten(1, (context.ranks, -1)).transpose(0, 1)  # [n, B, H/n, s, D]
    found = context.exchanged(parts)
    return _take(found.permute(1, 2, 0, 3, 4).flatten(2, 3), share.order)


def _to_tokens(x: Tensor, share: Share, context: Context) -> Tensor:
    parts = _take(x, share.everyone).unflatten(2, (context.ranks, -1))  # [B, H/n, n, s, D]
    found = context.exchanged(parts.permute(2, 0, 1, 3, 4))
    return found.transpose(0, 1).flatten(1, 2)


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, share: Share, context: Context) -> Tensor:
        ctx.given = share, context
        x = x.contiguous()
        parts = [torch.empty_like(x) for _ in range(context.ranks)]
        dist.all_gather(parts, x, group=context.group)
        return _take(torch.cat(parts, 2), share.order)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        share, context = ctx.given
        parts = _take(gradient, share.everyone).unflatten(2, (context.ranks, -1))
        found = context.exchanged(parts.permute(2, 0, 1, 3, 4))  # [n, B, K, s, D]
        wide = torch.promote_types(found.dtype, torch.float32)  # half precision is added in float32
        return found.sum(0, dtype=wide).to(gradient.dtype), None, None


class _ToHeads(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, share: Share, context: Context) -> Tensor:
        ctx.given = share, context
        return _to_heads(x, share, context)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        return _to_tokens(gradient, *ctx.given), None, None


class _ToTokens(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, share: Share, context: Context) -> Tensor:
        ctx.given = share, context
        return _to_tokens(x, share, context)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        return _to_heads(gradient, *ctx.given), None, None
