"""The principal part of a matrix: its largest singular values with their vectors.

Exact for small matrices. For large ones by random projection (Halko, Martinsson and Tropp 2011,
arXiv:0909.4061, algorithms 4.4 and 5.1), which costs a few thin products where the exact decomposition
costs minutes per model. Used by PiSSA and by PaddleNLP's form of VeRA.
"""

from __future__ import annotations

import torch
from torch import Tensor

# iterations; weights' spectra fall slowly, where fewer would mix in what lies below the rank
POWER = 8


def principal(
    weight: Tensor, rank: int, generator: torch.Generator
) -> tuple[Tensor, Tensor, Tensor]:
    """weight [m, n], float32 or wider -> U [m, rank], S [rank] falling, V [n, rank] of weight ~ U diag(S) V^T.

    U and V have orthonormal columns. Their signs are free; here the entry of largest magnitude in each
    column of U is positive. `generator` is the CPU's; only large matrices draw from it.
    """
    width = 2 * rank + 16  # of the sketch
    if 4 * width >= min(weight.shape):
        u, s, vt = torch.linalg.svd(weight, full_matrices=False)
    else:
        draw = torch.randn(weight.shape[1], width, generator=generator)
        basis = torch.linalg.qr(weight @ draw.to(weight)).Q  # [m, width]
        # each product is made orthonormal: powers alone would lose all but the first vector
        for _ in range(POWER):
            basis = torch.linalg.qr(weight.t() @ basis).Q
            basis = torch.linalg.qr(weight @ basis).Q
        u, s, vt = torch.linalg.svd(basis.t() @ weight, full_matrices=False)
        u = basis @ u
    u, s, v = u[:, :rank], s[:rank], vt[:rank].t()
    largest = u.gather(0, u.abs().argmax(0, keepdim=True))  # [1, rank]
    sign = torch.where(largest < 0, -1.0, 1.0).to(u.dtype)
    return u * sign, s, v * sign
