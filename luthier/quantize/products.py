"""Products with a quantised matrix, tile by tile: a dense weight is never kept, forward or backward.

`Product` is the node of autograd; `times_transposed` and `times` are for nodes that compute more with it. A
tile is written out and multiplied while it is in the cache. The numbers are `codes.py`'s.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from luthier.quantize import codes
from luthier.quantize.spec import Spec

# numbers dequantised at a time on CPU: a product with less of the weight is slower, by a quarter at 2**20
TILE = 2**22


class Product(torch.autograd.Function):
    """addend + x W^T of rows of a quantised matrix. What it saves for backward is codes and scales."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,  # [N, in]
        addend: Tensor | None,  # [N, out] or [out]
        spec: Spec,
        rows: tuple[int, int],
        *tensors: Tensor,
    ) -> Tensor:
        ctx.save_for_backward(*tensors)
        ctx.spec, ctx.rows = spec, rows
        if addend is not None and addend.dim() == 2:
            addend = addend.clone()
        return times_transposed(x, addend, spec, rows, tensors)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (g,) = grads  # [N, out]
        rest = [None] * (2 + len(ctx.spec.layout))
        for_x = None
        if ctx.needs_input_grad[0]:
            for_x = times(g, None, ctx.spec, ctx.rows, ctx.saved_tensors)
        # where the addend was [out], autograd sums
        return for_x, g if ctx.needs_input_grad[1] else None, *rest


def times_transposed(
    x: Tensor, addend: Tensor | None, spec: Spec, rows: tuple[int, int], tensors: Sequence[Tensor]
) -> Tensor:
    """addend + x W^T, [N, out], where W is the rows `rows` of the matrix that `tensors` store. An `addend` of that
    shape takes the sum: a second [N, out] would be the peak of a step."""
    scale = codes.scales(dict(zip(spec.layout, tensors, strict=True)), spec)
    (first, last), width = rows, spec.shape[-1]
    y = addend if addend is not None and addend.dim() == 2 else x.new_empty(len(x), last - first)
    step = tile_length(last - first, width, spec.unit // math.gcd(spec.unit, width), x.device)
    buffer = x.new_empty(step, width)
    for start in range(first, last if len(x) else first, step):
        stop = min(start + step, last)
        tile = buffer[: stop - start]  # [rows, in]
        codes.dequantize_range(tensors[0], scale, spec, start * width, stop * width, tile)
        part = slice(start - first, stop - first)
        if addend is None:
            torch.mm(x, tile.t(), out=y[:, part])
        else:
            torch.addmm(addend[..., part], x, tile.t(), out=y[:, part])
    return y


def times(
    g: Tensor, addend: Tensor | None, spec: Spec, rows: tuple[int, int], tensors: Sequence[Tensor]
) -> Tensor:
    """addend + g W, [N, in], in `addend` if there is one: the other way."""
    scale = codes.scales(dict(zip(spec.layout, tensors, strict=True)), spec)
    (first, last), width = rows, spec.shape[-1]
    if not spec.by_rows:
        # blocks run on over the ends of rows: columns cannot be had alone, and summing over tiles of rows
        # would round each time
        tile = g.new_empty(last - first, width)
        codes.dequantize_range(tensors[0], scale, spec, first * width, last * width, tile)
        return g @ tile if addend is None else addend.addmm_(g, tile)
    packed, scale = (t.flatten(0, -2)[first:last] for t in (tensors[0], scale))
    step = tile_length(width, last - first, math.lcm(codes.column_step(spec), 64), g.device)
    y = g.new_empty(len(g), width) if addend is None else addend  # [N, in]
    buffer = g.new_empty((last - first) * step)
    for start in range(0, width, step):
        stop = min(start + step, width)
        tile = buffer[: (last - first) * (stop - start)].view(-1, stop - start)  # [out, columns]
        codes.dequantize_columns(packed, scale, spec, start, stop, tile)
        if addend is None:
            torch.mm(g, tile, out=y[:, start:stop])
        else:
            torch.addmm(addend[..., start:stop], g, tile, out=y[:, start:stop])
    return y


def tile_bytes(spec: Spec, device: torch.device, width: int) -> int:
    """Bytes of the largest part of a weight that its backward writes out, as numbers of `width` bytes with a piece's
    levels in float32."""
    rows, columns = spec.numel // spec.shape[-1], spec.shape[-1]
    if spec.by_rows:
        columns = tile_length(columns, rows, math.lcm(codes.column_step(spec), 64), device)
    numbers = rows * columns
    return numbers * width + 4 * min(numbers, codes.piece(device))


def tile_length(length: int, other: int, multiple: int, device: torch.device) -> int:
    """How many rows (or columns) of length `other` a tile has, a multiple of `multiple`; on a GPU all."""
    if device.type != "cpu":
        return length
    return min(length, max(1, TILE // other // multiple) * multiple)
