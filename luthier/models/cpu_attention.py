"""Causal attention of one document on a CPU: torch's forward, a backward of plain matrix products.

The backward of torch's flash attention on CPU is slow in half precision: three to eight times its forward. Here it is
five batched products over blocks of queries, with the query heads of a group folded into the rows; the
weights come from the log-sum-exp that the forward kept, so nothing of the size of the weights is saved.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

BLOCK = 128  # queries at a time: keys behind the block's last query are left out, the rest stays in the cache


def helps(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Whether `causal` is the faster way: gradients are wanted, in half precision, on a CPU."""
    wanted = torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad)
    half = q.device.type == "cpu" and q.dtype in (torch.bfloat16, torch.float16)
    return wanted and half and q.shape[-1] == v.shape[-1]  # latent attention has two sizes


def causal(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """q [L, H, D], k and v [L, K, D] of one document -> [L, H, D]; query i sees keys 0..i."""
    out = _Causal.apply(q, k, v, scale)
    assert isinstance(out, Tensor)
    return out


class _Causal(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        repeat = q.shape[1] // k.shape[1]
        keys, values = (x.repeat_interleave(repeat, 1) if repeat > 1 else x for x in (k, v))
        heads = (x.transpose(0, 1)[None] for x in (q, keys, values))  # [1, H, L, D]
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            *heads, dropout_p=0.0, is_causal=True, scale=scale
        )
        out = out[0].transpose(0, 1)  # [L, H, D]
        ctx.save_for_backward(q, k, v, out, lse[0])  # lse [H, L]
        ctx.scale = scale
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> Any:
        q, k, v, out, lse = ctx.saved_tensors
        groups = k.shape[1]
        wide = lse.dtype
        queries, given = _fold(q, groups), _fold(grads[0].contiguous(), groups)  # [K, G, L, D]
        delta = _fold((grads[0] * out).sum(-1, dtype=wide, keepdim=True), groups)  # [K, G, L, 1]
        lse = lse.view(groups, -1, len(q), 1)
        keys, values = k.transpose(0, 1), v.transpose(0, 1)  # [K, L, D]
        dq, dk, dv = torch.empty_like(queries), torch.zeros_like(keys), torch.zeros_like(values)
        size = len(q) if len(q) < BLOCK + BLOCK // 2 else BLOCK
        for start in range(0, len(q), size):
            stop = min(start + size, len(q))
            rows = slice(start, stop)
            here, back = queries[:, :, rows].flatten(1, 2), given[:, :, rows].flatten(1, 2)
            some, theirs = keys[:, :stop], values[:, :stop]  # [K, T, D]
            shape = (groups, -1, stop - start, stop)  # [K, G, l, T]
            scores = (here @ some.mT).view(shape).to(wide).mul_(ctx.scale)
            weights = scores.sub_(lse[:, :, rows]).exp_().tril_(start)
            change = (back @ theirs.mT).view(shape).to(wide).sub_(delta[:, :, rows])
            change.mul_(weights).mul_(ctx.scale)
            weights, change = (x.to(q.dtype).flatten(1, 2) for x in (weights, change))
            dq[:, :, rows] = (change @ some).view(groups, -1, stop - start, q.shape[-1])
            dk[:, :stop] += change.mT @ here
            dv[:, :stop] += weights.mT @ back
        return dq.flatten(0, 1).transpose(0, 1), dk.transpose(0, 1), dv.transpose(0, 1), None


def _fold(x: Tensor, groups: int) -> Tensor:
    """[L, H, D] -> [K, H / K, L, D]."""
    return x.transpose(0, 1).unflatten(0, (groups, -1))
