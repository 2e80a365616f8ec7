"""Causal attention of packed documents on a CPU, as one operator of torch with a backward of its own.

The operator `luthier::attention` reads the documents from the current layout when it runs, and gives their
ids back beside its result, for its backward: a compiled graph that calls it knows no documents. Two ways:
the native kernels (`luthier/native/attention.cpp`), and products in torch, which are the reference. There the
backward of torch's flash attention would be slow in half precision: three to eight times its forward. It
is five batched products over blocks of queries, with the query heads of a group folded into the rows; the
weights come from the log-sum-exp that the forward kept, so nothing of the size of the weights is saved.
"""

from __future__ import annotations

import ctypes
from typing import Any

import torch
from torch import Tensor

from luthier import native
from luthier.batch import Layout, current_layout, layout_scope

BLOCK = 128  # queries at a time: keys behind the block's last query are left out, the rest stays in the cache
HALF = (torch.bfloat16, torch.float16)


def helps(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Whether the operator is the faster way in torch: gradients are wanted, in half precision, on a CPU."""
    wanted = torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad)
    half = q.device.type == "cpu" and q.dtype in HALF
    return wanted and half and q.shape[-1] == v.shape[-1]  # latent attention has two sizes


def lacks(dtype: torch.dtype) -> str | None:
    """Why the native kernels cannot be taken for queries of this type; None if they can."""
    if dtype != torch.bfloat16:
        return f"they compute in bfloat16, this is {str(dtype).removeprefix('torch.')}"
    return None if native.library() is not None else native.status().removeprefix("off: ")


def why_torch(kernel: str, device: torch.device, dtype: torch.dtype) -> list[str]:
    """A remark for the user where `auto` took torch for a type that the native kernels are for."""
    why = lacks(dtype) if (kernel, device.type, dtype) == ("sdpa", "cpu", torch.bfloat16) else None
    return [f"attention is computed by torch, the native kernels are off: {why}"] if why else []


def packed(
    q: Tensor, k: Tensor, v: Tensor, scale: float, window: int | None, *, by_native: bool
) -> Tensor:
    """q [B, H, S, D], k [B, K, S, D], v [B, K, S, E] in the current layout -> [B, S, H, E]; 0 on padding.

    A query sees `window` keys, itself included; all that come before it without one. Torch's way has none.
    """
    return torch.ops.luthier.attention(q, k, v, scale, window or 0, by_native)[0]


def causal(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """q [L, H, D], k and v [L, K, D] of one document -> [L, H, D]; query i sees keys 0..i."""
    ids = torch.zeros(1, len(q), dtype=torch.int64)
    with layout_scope(Layout(ids, ids)):
        q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
        return packed(q, k, v, scale, None, by_native=False)[0]


@torch.library.custom_op("luthier::attention", mutates_args=())
def _attention(
    q: Tensor, k: Tensor, v: Tensor, scale: float, window: int, by_native: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """(out [B, S, H, E], log-sum-exp [B, H, S], document_ids [B, S]); window 0 is none."""
    layout = current_layout()
    if layout is None:
        raise RuntimeError("luthier::attention was called outside of a layout")
    out, lse, _ = _like(q, k, v, scale, window, by_native)
    ids = layout.document_ids.clone()
    if by_native:
        q, k, v = (_rows(x) for x in (q, k, v))
        _call("luthier_attention", [q, k, v, out.transpose(1, 2)], lse, ids, scale, window)
    else:
        assert not window
        _forward(q, k, v, out, lse, layout, scale)
    return out, lse, ids


@_attention.register_fake
def _like(
    q: Tensor, k: Tensor, v: Tensor, scale: float, window: int, by_native: bool
) -> tuple[Tensor, Tensor, Tensor]:
    batch, heads, width, _ = q.shape
    wide = torch.promote_types(q.dtype, torch.float32)
    return (
        q.new_empty(batch, width, heads, v.shape[-1]),
        q.new_empty(batch, heads, width, dtype=wide),
        q.new_empty(batch, width, dtype=torch.int64),
    )


@torch.library.custom_op("luthier::attention_backward", mutates_args=())
def _attention_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    ids: Tensor,
    scale: float,
    window: int,
    by_native: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v; `grad` and `out` [B, S, H, E]."""
    dq, dk, dv = _gradients_like(grad, q, k, v)
    if by_native:
        read = [_rows(x) for x in (q, k, v, out.transpose(1, 2), grad.transpose(1, 2))]
        _call("luthier_attention_backward", [*read, dq, dk, dv], lse, ids, scale, window)
    else:
        _backward(grad, q, k, v, out, lse, (dq, dk, dv), Layout(ids, ids), scale)
    return dq, dk, dv


@_attention_backward.register_fake
def _gradients_like(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, *_: Any
) -> tuple[Tensor, Tensor, Tensor]:
    # [B, H or K, S, D], token after token as a projection lays them
    dq, dk, dv = (x.new_empty(x.transpose(1, 2).shape).transpose(1, 2) for x in (q, k, v))
    return dq, dk, dv


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    q, k, v, *ctx.rest = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(q, k, v, *output)


def _differentiate(ctx: Any, grad: Tensor, *_: Any) -> tuple[Any, ...]:
    found = torch.ops.luthier.attention_backward(grad, *ctx.saved_tensors, *ctx.rest)
    return *found, None, None, None


_attention.register_autograd(_differentiate, setup_context=_keep)


# ---- native


def _rows(x: Tensor) -> Tensor:
    """x, a copy where the numbers of a head are not side by side."""
    return x if x.stride(-1) == 1 else x.contiguous()


def _call(
    name: str, heads: list[Tensor], lse: Tensor, ids: Tensor, scale: float, window: int
) -> None:
    """Run a kernel over `heads`, all [B, H or K, S, D or E]: q, k, v, what it reads besides, what it writes."""
    library = native.library()
    assert library is not None
    q, k, v = heads[:3]
    sizes = [k.shape[1], q.shape[1] // k.shape[1], q.shape[-1], v.shape[-1], window]
    strides = [s for x in heads for s in (x.stride(0), x.stride(2), x.stride(1))]
    data = [ctypes.c_void_p(x.data_ptr()) for x in heads]
    first = 5 if name.endswith("backward") else len(heads)  # where the log-sum-exp stands
    getattr(library, name)(
        *data[:first],
        ctypes.c_void_p(lse.data_ptr()),
        *data[first:],
        ctypes.c_void_p(ids.data_ptr()),
        ctypes.c_int64(ids.shape[0]),
        ctypes.c_int64(ids.shape[1]),
        (ctypes.c_int64 * len(sizes))(*sizes),
        (ctypes.c_int64 * len(strides))(*strides),
        ctypes.c_float(scale),
        ctypes.c_int(torch.get_num_threads()),
    )


# ---- torch


def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    layout: Layout,
    scale: float,
) -> None:
    repeat, done = q.shape[1] // k.shape[1], [0] * len(q)
    for row, start, stop in ((s.row, s.start, s.stop) for s in layout.segments):
        out[row, done[row] : start], done[row] = 0, stop
        here, keys, values = (x[row : row + 1, :, start:stop] for x in (q, k, v))
        if repeat > 1:
            keys, values = (x.repeat_interleave(repeat, 1) for x in (keys, values))
        given, sums = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            here, keys, values, dropout_p=0.0, is_causal=True, scale=scale
        )
        out[row, start:stop] = given[0].transpose(0, 1)
        lse[row, :, start:stop] = sums[0]
    for row, last in enumerate(done):
        out[row, last:] = 0


def _backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    found: tuple[Tensor, Tensor, Tensor],
    layout: Layout,
    scale: float,
) -> None:
    for x in found:
        x.zero_()
    for row, start, stop in ((s.row, s.start, s.stop) for s in layout.segments):
        here = slice(start, stop)
        back, given = (x[row, here].transpose(0, 1) for x in (grad, out))  # [H, L, D]
        queries, keys, values, some = (x[row, :, here] for x in (q, k, v, lse))
        into = tuple(x[row, :, here] for x in found)  # [H or K, L, D]
        _document_backward(back, given, queries, keys, values, into, some, scale)


def _document_backward(
    grad: Tensor,
    out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    found: tuple[Tensor, ...],
    lse: Tensor,
    scale: float,
) -> None:
    """Gradients of one document into those of q, k and v, which hold zeros."""
    dq, dk, dv = found
    groups, length = k.shape[0], q.shape[1]
    wide = lse.dtype
    queries, given, into = (x.unflatten(0, (groups, -1)) for x in (q, grad, dq))  # [K, G, L, D]
    delta = (grad * out).sum(-1, dtype=wide, keepdim=True).unflatten(0, (groups, -1))
    lse = lse.unflatten(0, (groups, -1)).unsqueeze(-1)  # [K, G, L, 1]
    size = length if length < BLOCK + BLOCK // 2 else BLOCK
    for start in range(0, length, size):
        stop = min(start + size, length)
        rows = slice(start, stop)
        here, back = queries[:, :, rows].flatten(1, 2), given[:, :, rows].flatten(1, 2)
        keys, values = k[:, :stop], v[:, :stop]  # [K, T, D]
        shape = (groups, -1, stop - start, stop)  # [K, G, l, T]
        scores = (here @ keys.mT).view(shape).to(wide).mul_(scale)
        weights = scores.sub_(lse[:, :, rows]).exp_().tril_(start)
        change = (back @ values.mT).view(shape).to(wide).sub_(delta[:, :, rows])
        change.mul_(weights).mul_(scale)
        weights, change = (x.to(q.dtype).flatten(1, 2) for x in (weights, change))
        into[:, :, rows] = (change @ keys).view(groups, -1, stop - start, q.shape[-1])
        dk[:, :stop] += change.mT @ here
        dv[:, :stop] += weights.mT @ back
