"""The forward of a linear layer with an additive adapter, in one matrix product where that matters.

In half precision the sum of the layer's product and the adapter's has to be formed before it is rounded: a
rounded y lies on its grid, and a delta below half a step, as all are at the start of training, would always
be rounded away. The matrix product accumulates in float32, so the delta goes in there. A low-rank update
(`LowRank`) is computed with the layer in one autograd node: no pass over x, y or their gradients is made
twice, in any precision.
"""

from __future__ import annotations

from collections.abc import Callable
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Function
from transformers.pytorch_utils import Conv1D

from luthier.adapters.base import Placed, Removable
from luthier.layers import is_quantized, is_transposed

_HALF = (torch.bfloat16, torch.float16)


def fused(layer: nn.Module) -> bool:
    """Whether the layer's own forward is known here; a subclass with another one gets hooks."""
    return type(layer) in (nn.Linear, Conv1D) or is_quantized(layer)


def install_fused(layer: Any) -> Removable:
    """Make the layer compute itself and its adapter together."""
    return Placed(layer, "forward", MethodType(forward_of(layer, _forward), layer))


def forward_of(layer: nn.Module, forward: Callable[..., Tensor]) -> Any:
    """`forward`, left out of compilation where the layer is quantised: nothing of it could be fused, and a graph
    would be made for every single layer."""
    return torch.compiler.disable(forward) if is_quantized(layer) else forward


def _forward(layer: Any, x: Tensor) -> Tensor:
    adapter, bias = layer.adapter, layer.bias
    dtype = product_dtype(x)
    low_rank = adapter.low_rank_here()
    if low_rank is None and dtype not in _HALF:
        return adapter.after(x, type(layer).forward(layer, x))
    x = x.to(dtype)
    matrix, codes = factor(layer, dtype)
    bias = None if bias is None else bias.to(dtype)
    flat = x.reshape(-1, x.shape[-1])  # [N, in]
    if low_rank is None:
        delta = adapter.delta_here(x)  # [..., out]
        delta = delta.reshape(-1, delta.shape[-1])
        y = (
            codes.product(flat, delta) if codes is not None else torch.addmm(delta, flat, matrix)
        )  # [N, out]
        y = y if bias is None else y + bias
    else:
        dropped = adapter.drop(x)
        source = None if dropped is x else dropped.reshape(flat.shape)
        y = _LowRankProduct.apply(flat, source, matrix, bias, *low_rank, codes)
    return y.view(*x.shape[:-1], y.shape[-1])


def product_dtype(x: Tensor) -> torch.dtype:
    """The type a linear layer computes x in: autocast's, or x's own."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype


def factor(layer: Any, dtype: torch.dtype) -> tuple[Any, Any]:
    """What `times` and `times_back` multiply with: the dense weight as [in, out] in `dtype`, or else the
    quantised layer."""
    if is_quantized(layer):
        return None, layer
    weight = layer.weight
    return (weight if is_transposed(layer) else weight.t()).to(dtype), None


def times(x: Tensor, matrix: Tensor | None, codes: Any, addend: Tensor | None = None) -> Tensor:
    """addend + x W^T [N, out], rounded once; outside autograd. `addend`, [N, out] or [out], may be overwritten."""
    if codes is not None:
        return codes.multiply(x, addend)
    assert matrix is not None
    if addend is None:
        return x @ matrix
    # in place where it can be: `addmm` would copy the addend first
    return addend.addmm_(x, matrix) if addend.ndim == 2 else torch.addmm(addend, x, matrix)


def times_back(
    g: Tensor, matrix: Tensor | None, codes: Any, addend: Tensor | None = None
) -> Tensor:
    """addend + g W [N, in]; `addend` may be overwritten."""
    if codes is not None:
        return codes.multiply_back(g, addend)
    assert matrix is not None
    return g @ matrix.t() if addend is None else addend.addmm_(g, matrix.t())


class _LowRankProduct(Function):
    """(1 + gain) * (x matrix + source down^T up^T) + bias -> [N, out].

    x [N, in]; source [N, in] is what enters the update, None for x itself; matrix [in, out] (None where the layer
    `codes` is quantised and stands for it) and bias [out] are frozen; down [R, in], up [out, R] and gain [out] (None for zeros) are of the adapter's precision.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        source: Tensor | None,
        matrix: Tensor | None,
        bias: Tensor | None,
        down: Tensor,
        up: Tensor,
        gain: Tensor | None,
        codes: Any,
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
                plain = times(x, matrix, codes, delta.clone())
                delta.addcmul_(plain, gain)
            y = times(x, matrix, codes, delta)
            y = y if bias is None else y + bias
        else:
            # the bias first, as the layer alone has it: equal to the layer bit for bit while up is zero
            y = times(x, matrix, codes, delta if bias is None else delta.add_(bias))
            if gain is not None:
                plain = y if bias is None else y - bias
                y = torch.addcmul(y, plain, gain)
        ctx.save_for_backward(x, source, matrix, down, up, gain, low, plain)
        ctx.codes = codes
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
            dx, dsource = times_back(dy, matrix, ctx.codes), dlow @ down
        elif ctx.needs_input_grad[0]:
            dx = times_back(dy, matrix, ctx.codes, dlow @ down)
        return dx, dsource, None, None, ddown, dup, dgain, None
