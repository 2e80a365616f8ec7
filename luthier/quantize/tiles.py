"""How much of a quantised weight is written out at a time for a product with it."""

from __future__ import annotations

import math

import torch

from luthier.quantize import codes
from luthier.quantize.codes import Spec

# numbers dequantised at a time on CPU: a product with less of the weight is slower, by a quarter at 2**20
_TILE = 2**22


def tile_length(length: int, other: int, multiple: int, device: torch.device) -> int:
    """How many rows (or columns) of length `other` a tile has, a multiple of `multiple`; on a GPU all."""
    if device.type != "cpu":
        return length
    return min(length, max(1, _TILE // other // multiple) * multiple)


def tile_bytes(spec: Spec, device: torch.device, width: int) -> int:
    """Bytes of the largest part of a weight that its backward writes out, as numbers of `width` bytes with a piece's
    levels in float32."""
    rows, columns = spec.numel // spec.shape[-1], spec.shape[-1]
    if spec.by_rows:
        columns = tile_length(columns, rows, math.lcm(codes.column_step(spec), 64), device)
    numbers = rows * columns
    return numbers * width + 4 * min(numbers, codes.piece(device))
