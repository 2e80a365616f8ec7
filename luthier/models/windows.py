"""Sliding windows that cost their window: a document in blocks of queries, each with the keys it can see.

A table of [L, L] would cost the document's length squared, most of it for keys that no window reaches. Here keys
are cut once into blocks and a block of queries gets its own and the few before it: L * (window + block) in
all, forward and backward (cutting and joining are one pass each; slices that overlap would each write a
gradient of the whole document). `kernels.py` says how a block attends.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from luthier.batch import Layout

BLOCK = 128  # queries at a time, at least; more for wide windows, so that joining keys stays cheap

# q [l, H, D], k and v [P + t, K, D], what is added to the scores [l, P + t] -> [l, H, D]
Attend = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


def block_of(window: int) -> int:
    """Queries of a block."""
    return max(BLOCK, -(-window // 4))


def whole(layout: Layout, scores: Any) -> float:
    """Longest document that is computed by one table: all of them, or those for which blocks would save
    nothing. `scores` are those of `kernels.py`."""
    one_table = scores.alibi is not None or scores.dropout or layout.in_context is not None
    if one_table or scores.window is None:
        return math.inf
    return scores.window + block_of(scores.window)


def attend(
    attend_block: Attend, q: Tensor, k: Tensor, v: Tensor, window: int, ahead: int, virtual: bool
) -> Tensor:
    """Causal attention of q [L, H, D] over k and v [P + L, K, D] where a query sees `window` keys -> [L, H, D].

    The first `ahead` = P keys are a prefix: seen by all, or, if `virtual`, P tokens right before the
    document, whose distance counts.
    """
    size = block_of(window)
    reach = -(-(window - 1) // size)  # blocks before its own that a block of queries sees
    prefix = (k[:ahead], v[:ahead])
    keys, values = (x[ahead:].split(size) for x in (k, v))
    tables: dict[tuple[int, int, bool], Tensor] = {}
    out = []
    for i, queries in enumerate(q.split(size)):
        first = max(i - reach, 0)
        before = (i - first) * size
        # the prefix is in reach of its first blocks only, where its distance counts
        near = ahead if not virtual or first == 0 else 0
        shape = (len(queries), before, bool(near))
        if shape not in tables:
            tables[shape] = _table(len(queries), before, near, virtual, window, q)
        here = torch.cat([prefix[0][:near], *keys[first : i + 1]])
        there = torch.cat([prefix[1][:near], *values[first : i + 1]])
        out.append(attend_block(queries, here, there, tables[shape]))
    return torch.cat(out)


def _table(
    queries: int, before: int, near: int, virtual: bool, window: int, like: Tensor
) -> Tensor:
    """[l, P + before + l]: 0 where a query sees a key, -inf elsewhere."""
    place = torch.arange(queries, device=like.device)[:, None]
    distance = place - torch.arange(-before - near, queries, device=like.device)
    seen = (distance >= 0) & (distance < window)
    if not virtual:
        seen[:, :near] = True
    return torch.zeros(seen.shape, dtype=like.dtype, device=like.device).masked_fill_(
        ~seen, -torch.inf
    )
