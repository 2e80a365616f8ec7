"""The forward of a linear layer with an additive adapter, in one matrix product where that matters.

In half precision the sum of the layer's product and the adapter's has to be formed before it is rounded: a
rounded y lies on its grid, and a delta below half a step, as all are at the start of training, would always
be rounded away. The matrix product accumulates in float32, so the delta goes in there. A low-rank update
(`LowRank`) is computed with the layer in one autograd node: no pass over x, y or their gradients is made
twice, in any precision.
"""

from __future__ import annotations

from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Function
from transformers.pytorch_utils import Conv1D

from luthier.adapters.base import Placed, Removable

_HALF = (torch.bfloat16, torch.float16)


def fused(layer: nn.Module) -> bool:
    """Whether the layer's own forward is known here; a subclass with another one gets hooks."""
    return type(layer) in (nn.Linear, Conv1D)


def install_fused(layer: Any) -> Removable:
    """Make the layer compute itself and its adapter together."""
    return Placed(layer, "forward", MethodType(_forward, layer))


def _forward(layer: Any, x: Tensor) -> Tensor:
    adapter, weight, bias = layer.adapter, layer.weight, layer.bias
    device = x.device.type
    autocast = torch.is_autocast_enabled(device)
    dtype = torch.get_autocast_dtype(device) if autocast else x.dtype
    low_rank = adapter.low_rank()
    if low_rank is None and dtype not in _HALF:
        return adapter.after(x, type(layer).forward(layer, x))
    x = x.to(dtype)
    matrix = (weight if isinstance(layer, Conv1D) else weight.t()).to(dtype)  # [in, out]
    bias = None if bias is None else bias.to(dtype)
    flat = x.reshape(-1, x.shape[-1])  # [N, in]
    if low_rank is None:
        delta = adapter.delta(x)  # [..., out]
        y = torch.addmm(delta.reshape(-1, delta.shape[-1]), flat, matrix)  # [N, out]
        y = y if bias is None else y + bias
    else:
        dropped = adapter.drop(x)
        source = None if dropped is x else dropped.reshape(flat.shape)
        y = _LowRankProduct.apply(flat, source, matrix, bias, *low_rank)
    return y.view(*x.shape[:-1], y.shape[-1])


class _LowRankProduct(Function):
    """(1 + gain) * (x matrix + source down^T up^T) + bias -> [N, out].

    x [N, in]; source [N, in] is what enters the update, None for x itself; matrix [in, out] and bias [out]
    are frozen; down [R, in], up [out, R] and gain [out] (None for zeros) are of the adapter's precision.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        source: Tensor | None,
        matrix: Tensor,
        bias: Tensor | None,
        down: Tensor,
        up: Tensor,
        gain: Tensor | None,
    ) -> Tensor:
        down, up = down.to(x.dtype), up.to(x.dtype)
        gain = None if gain is None else gain.to(x.dtype)
        low = (x if source is None else source) @ down.t()  # [N, R]
        # written into a tensor that is there: selective recomputation keeps the results of `mm`, and this one
        # need not be kept beside the sum
        delta = torch.mm(low, up.t(), out=low.new_empty(low.shape[0], up.shape[0]))
        plain = None
        if x.dtype in _HALF:
            if gain is not None:
                # y is 1 * (exact product) + gain * (rounded product): the second base product costs time, but
                # a gain of less than half a rounding step would vanish if it multiplied the rounded one
                plain = torch.addmm(delta, x, matrix)
                delta.addcmul_(plain, gain)
            y = torch.addmm(delta, x, matrix)
            y = y if bias is None else y + bias
        else:
            # the bias first, as the layer alone has it: equal to the layer bit for bit while up is zero
            y = torch.addmm(delta if bias is None else delta.add_(bias), x, matrix)
            if gain is not None:
                plain = y if bias is None else y - bias
                y = torch.addcmul(y, plain, gain)
        ctx.save_for_backward(x, source, matrix, down, up, gain, low, plain)
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        x, source, matrix, down, up, gain, low, plain = ctx.saved_tensors
        (dy,) = grads
        dgain = None
        if gain is not None:
            dgain = (dy * plain).sum(0)
            dy = torch.addcmul(dy, dy, gain)
        dlow = dy @ up  # [N, R]
        ddown = None  # [R, in]; VeRA's is not trained
        if ctx.needs_input_grad[4]:
            ddown = dlow.t() @ (x if source is None else source)
        dup = (low.t() @ dy).t()  # [out, R]; this order reads dy along its rows
        dx = dsource = None
        if source is not None:
            dx, dsource = dy @ matrix.t(), dlow @ down
        elif ctx.needs_input_grad[0]:
            dx = (dlow @ down).addmm_(dy, matrix.t())
        return dx, dsource, None, None, ddown, dup, dgain
