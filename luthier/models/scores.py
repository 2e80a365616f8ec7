"""What a layer's attention does besides plain causal attention, and how scores become weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from luthier.batch import Layout, PrefixKeys


@dataclass(frozen=True)
class Scores:
    """What a layer does besides plain causal attention."""

    scale: float
    window: int | None = None  # a query sees this many keys, itself included
    softcap: float | None = None  # scores -> c * tanh(scores / c)
    sinks: Tensor | None = None  # [H]: one more score per head that takes weight and gives no value
    dropout: float = 0.0  # of the attention weights
    dropout_key: tuple[int, str] = (0, "")  # (seed, name of the layer)
    heads: Any = None  # the Part of all heads that is here (axis -3), under tensor parallelism
    alibi: Tensor | None = None  # [H] slopes: score + slope * (j - i) (arXiv:2108.12409, section 3)
    prefix: PrefixKeys | None = None  # P keys before each document's own, at j = -P, ..., -1


def features(layout: Layout, scores: Scores) -> set[str]:
    """Names, as in `LACKS`, of what a kernel must know to compute this."""
    found = {n for n in ("softcap", "sinks", "alibi", "prefix") if getattr(scores, n) is not None}
    found |= {"dropout"} if scores.dropout else set()
    return found | ({"context"} if layout.in_context is not None else set())


def reach(prefix: PrefixKeys | None) -> tuple[int, bool]:
    """(P, virtual)."""
    return (0, False) if prefix is None else (prefix.keys.shape[0], prefix.virtual)


def softmax(scores: Tensor, dtype: torch.dtype) -> Tensor:
    """Softmax over the last axis, at least in float32, given back in `dtype`."""
    wide = torch.promote_types(scores.dtype, torch.float32)
    return torch.softmax(scores, dim=-1, dtype=wide).to(dtype)


def capped(scores: Tensor, softcap: float | None) -> Tensor:
    """Scores after the tanh softcap of Gemma 2 (arXiv:2408.00118, section 2)."""
    return scores if softcap is None else softcap * torch.tanh(scores / softcap)


def with_sinks(scores: Tensor, sinks: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Weights [..., H, Q, J] of scores of that shape, where a sink per head [H] may take part of the mass."""
    if sinks is None:
        return softmax(scores, dtype)
    column = sinks.to(scores.dtype).view(-1, 1, 1).expand(*scores.shape[:-1], 1)
    return softmax(torch.cat([scores, column], dim=-1), dtype)[..., :-1]
