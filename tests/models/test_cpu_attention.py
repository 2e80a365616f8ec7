"""The CPU's own backward of causal attention against plain softmax in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from luthier.batch import Layout, layout_scope
from luthier.models import cpu_attention, kernels
from luthier.models.cpu_attention import BLOCK, causal
from luthier.models.kernels import Scores

HEADS = [(9, 3), (4, 4), (4, 1)]  # query heads, key heads
LENGTHS = [1, 2, 37, BLOCK, BLOCK + BLOCK // 2 - 1, BLOCK + BLOCK // 2, 2 * BLOCK + 3]


def inputs(length: int, heads: tuple[int, int], dtype: torch.dtype) -> list[Tensor]:
    """q, k, v and the gradient of the output."""
    draw = torch.Generator().manual_seed(length)
    shapes = [heads[0], heads[1], heads[1], heads[0]]
    return [torch.randn(length, n, 16, generator=draw).to(dtype) for n in shapes]


def plain(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
    scores = torch.einsum("ihd,jhd->hij", q, k) * scale
    later = torch.ones(scores.shape[1:], dtype=torch.bool).triu(1)
    weights = scores.masked_fill(later, -torch.inf).softmax(-1)
    return torch.einsum("hij,jhd->ihd", weights, v)


def run(attend: Any, values: list[Tensor]) -> list[Tensor]:
    """Output, and the gradients of q, k and v."""
    leaves = [x.detach().clone().requires_grad_() for x in values[:3]]
    out = attend(*leaves, 0.3)
    return [out.detach(), *torch.autograd.grad(out, leaves, values[3])]


def error(ours: Tensor, wanted: Tensor) -> float:
    return float((ours.double() - wanted).norm() / wanted.norm())


@pytest.mark.parametrize("heads", HEADS, ids=str)
@pytest.mark.parametrize("length", LENGTHS)
def test_output_and_gradients(length: int, heads: tuple[int, int]) -> None:
    for dtype, bound in ((torch.float64, 1e-13), (torch.float32, 2e-6)):
        values = inputs(length, heads, dtype)
        wanted = run(plain, [x.double() for x in values])
        for ours, reference in zip(run(causal, values), wanted, strict=True):
            if (
                length == 1 and not reference.any()
            ):  # one key: its weight is 1, whatever q and k are
                assert ours.abs().max() < bound
            else:
                assert error(ours, reference) < bound


@pytest.mark.parametrize("heads", HEADS, ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_as_near_as_torch(heads: tuple[int, int], dtype: torch.dtype) -> None:
    """No gradient is further from float64 than torch's own two ways, by more than half."""
    values = inputs(200, heads, dtype)
    wanted = run(plain, [x.double() for x in values])
    ours = run(causal, values)
    eager = run(plain, values)
    for mine, theirs, reference in zip(ours, eager, wanted, strict=True):
        assert mine.dtype == dtype
        assert error(mine, reference) < 1.5 * error(theirs, reference)


def test_it_is_taken_where_it_helps(monkeypatch: pytest.MonkeyPatch, random_batch: Any) -> None:
    """Half precision, with gradients, without features that need a mask; and never else."""
    taken: list[tuple[torch.dtype, int | None]] = []
    packed = cpu_attention.packed

    def watch(q: Tensor, k: Tensor, v: Tensor, scale: float, window: Any, **how: Any) -> Tensor:
        taken.append((q.dtype, window))
        return packed(q, k, v, scale, window, **how)

    monkeypatch.setattr(cpu_attention, "packed", watch)
    layout = Layout.of(random_batch(lengths_per_row=[[5, 3]]))

    def attend(dtype: torch.dtype, grad: bool, **more: Any) -> None:
        q, k = torch.randn(1, 4, 8, 16), torch.randn(1, 2, 8, 16)
        leaves = [x.to(dtype).requires_grad_(grad) for x in (q, k, k)]
        with layout_scope(layout):
            out = kernels.sdpa(*leaves, layout, Scores(0.25, **more))
        if grad:
            out.sum().backward()

    attend(torch.bfloat16, True)
    attend(torch.bfloat16, True, window=5)  # no document is longer
    assert taken == [(torch.bfloat16, None)] * 2
    taken.clear()
    attend(torch.float32, True)
    attend(torch.bfloat16, False)
    attend(torch.bfloat16, True, window=2)
    attend(torch.bfloat16, True, alibi=torch.ones(4))
    assert taken == []
