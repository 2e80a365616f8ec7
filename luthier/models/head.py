"""Logits of a plain half-precision head, each row less its label's: what counts is hardly rounded.

A logit of 20 is rounded to a multiple of 1/8 in bfloat16, and the rounding of the label's goes straight into the loss. The
softmax does not see a number that is taken off a whole row. Taken off inside of the product, before anything is
rounded, it leaves small numbers where the probabilities are large. Which heads are plain is asked here; the others' logits are
`Stage.head`'s.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable

_HALF = (torch.bfloat16, torch.float16)


def is_plain(layer: nn.Module, hidden: Tensor) -> bool:
    """Whether the layer is one product in half precision on a CPU and nothing else. (On a GPU the pass over the
    logits before the product has not been measured.)"""
    if type(layer) is not nn.Linear or layer.bias is not None or "forward" in vars(layer):
        return False
    weight = layer.weight
    hooked = layer._forward_hooks or layer._forward_pre_hooks
    half = hidden.device.type == "cpu" and hidden.dtype in _HALF and weight.dtype == hidden.dtype
    return half and not hooked and type(weight) is nn.Parameter


def logits_less(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """hidden [N, D], weight [V, D], targets [N] -> logits [N, V] less (about) the target's in each row."""
    return _Less.apply(hidden, weight, targets)  # pyright: ignore[reportReturnType]


class _Less(Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        ctx.save_for_backward(hidden, weight)
        picked = (hidden.float() * weight[targets].float()).sum(-1, keepdim=True)  # [N, 1]
        # the accumulator's start: any number near the logit will do, so that its rounding does not matter
        return torch.addmm(-picked.to(hidden.dtype), hidden, weight.t())

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> Any:
        hidden, weight = ctx.saved_tensors
        (dy,) = grads
        wanted = ctx.needs_input_grad
        return dy @ weight if wanted[0] else None, dy.t() @ hidden if wanted[1] else None, None
