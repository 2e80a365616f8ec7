"""What every kernel and every cache must give, for tests: attention written out for one query after the other, and
greedy answers without a cache."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from luthier.batch import Layout
from luthier.models.kernels import Scores


def attention(q: Tensor, k: Tensor, v: Tensor, layout: Layout, scores: Scores) -> Tensor:
    """q [B, H, S, D], k and v [B, K, S, D] -> [B, S, H, D]; zeros on padding. No dropout."""
    prefix = scores.prefix
    ahead = prefix.keys.shape[0] if prefix else 0
    rows = []
    for b in range(q.shape[0]):
        queries = [q.new_zeros(q.shape[1], q.shape[3])] * q.shape[2]
        for s in (s for s in layout.segments if s.row == b):
            for i in range(s.stop - s.start):
                seen = [
                    j for j in range(-ahead, s.stop - s.start) if _sees(i, j, s, layout, scores)
                ]
                keys, values = (
                    torch.stack([_at(j, b, s, own, given) for j in seen])  # [J, K, D]
                    for own, given in (
                        (k, prefix and prefix.keys),
                        (v, prefix and prefix.values),
                    )
                )
                place = torch.tensor(seen, dtype=q.dtype)
                queries[s.start + i] = _one(q[b, :, s.start + i], keys, values, place - i, scores)
        rows.append(torch.stack(queries))
    return torch.stack(rows)


def _sees(i, j, s, layout, scores) -> bool:
    """Whether query i of document `s` sees its key j; those of the prefix are -P to -1."""
    near = scores.window is None or i - j < scores.window
    if j < 0:
        return near or not scores.prefix.virtual
    if layout.position_ids.ndim == 3 and layout.position_ids[s.row, 1, s.start + j] == 0:
        return True
    return j <= i and near


def _at(j, row, s, own, given) -> Tensor:
    """[K, D]: key or value j."""
    return own[row, :, s.start + j] if j >= 0 else given[j]


def _one(q, keys, values, distance, scores) -> Tensor:
    """One query [H, D] over J keys -> [H, D]; `distance` [J] is j - i."""
    groups = q.shape[0] // keys.shape[1]
    keys, values = (x.repeat_interleave(groups, dim=1) for x in (keys, values))
    table = torch.einsum("hd,jhd->hj", q, keys) * scores.scale
    if scores.softcap is not None:
        table = scores.softcap * torch.tanh(table / scores.softcap)
    if scores.alibi is not None:
        table = table + scores.alibi.to(q.dtype)[:, None] * distance
    weights = table.exp()
    total = weights.sum(-1, keepdim=True)
    if scores.sinks is not None:
        total = total + scores.sinks.exp()[:, None]
    return torch.einsum("hj,jhd->hd", weights / total, values)


@torch.no_grad()
def greedy(model: Any, prompts: Sequence[Sequence[int]], tokens: int) -> list[list[int]]:
    """The next `tokens` of each prompt: one prompt at a time, all of it anew for each token."""
    answers = []
    for prompt in prompts:
        ids = list(prompt)
        while len(ids) < len(prompt) + tokens:
            logits = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1]
            ids.append(int(logits.argmax()))
        answers.append(ids[len(prompt) :])
    return answers
