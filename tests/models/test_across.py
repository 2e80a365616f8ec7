"""Attention of one rank's tokens over all keys: what whole rows give, for every kernel and feature, with gradients."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from luthier.batch import PADDING, Batch, Layout, PrefixKeys
from luthier.models import across
from luthier.models.kernels import KERNELS, LACKS
from luthier.models.scores import Scores, features
from luthier.parallel.context import Context, costs, deal
from luthier.parts import Part
from luthier.seeding import generator


class Alone(Context):
    """A rank that is given the others' keys and values."""

    def __init__(self, rank: int, ranks: int, whole: Tensor | None = None) -> None:
        self.rank, self.ranks, self.method, self.whole = rank, ranks, "gather", whole

    def gather(self, x: Tensor, share: Any) -> Tensor:
        assert self.whole is not None
        mine = share.of(self.whole.transpose(1, 2)).transpose(1, 2)
        assert torch.equal(x, mine)  # keys and values of this rank's own tokens
        return self.whole


ROWS = [[9, 3, 12], [21, 2], [1, 8]]
PREFIX = PrefixKeys(
    torch.randn(3, 2, 8, dtype=torch.float64, generator=generator(0, "keys")),
    torch.randn(3, 2, 6, dtype=torch.float64, generator=generator(0, "values")),
)
ALIBI = {"alibi": torch.tensor([0.5, 0.3, 0.2, 0.1], dtype=torch.float64)}
CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "window": {"window": 4},
    "softcap": {"softcap": 1.0},
    "sinks": {"sinks": torch.tensor([0.1, 0.2, -0.3, 0.4], dtype=torch.float64)},
    "alibi": ALIBI,
    "prefix": {"prefix": PREFIX},
    "prefix, alibi": {"prefix": PREFIX, **ALIBI},
    "prefix, window": {"prefix": PREFIX, "window": 4},
    "virtual, window": {"prefix": replace(PREFIX, virtual=True), "window": 5},
    "window, alibi": {"window": 4, **ALIBI},
    "dropout": {"dropout": 0.4, "dropout_key": (7, "layer"), "window": 5, "prefix": PREFIX},
    "dropout of heads": {
        "dropout": 0.4,
        "dropout_key": (7, "layer"),
        "heads": Part(-3, (8,), 1, 2),
    },
}


def with_context(batch: Batch) -> Batch:
    """Two axes of positions: the first half of each document is seen by all of it."""
    places = torch.stack([batch.position_ids, torch.ones_like(batch.position_ids)], 1)
    for s in Layout.of(batch).segments:
        places[s.row, 1, s.start : s.start + (s.stop - s.start) // 2] = 0
    return replace(batch, position_ids=places)


def results(out: Tensor, weights: Tensor, leaves: list[Tensor]) -> list[Tensor]:
    return [out.detach(), *torch.autograd.grad((out * weights).sum(), leaves)]


@pytest.mark.parametrize("ranks", [2, 3])
@pytest.mark.parametrize("context", [False, True])
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("kernel", ["math", "sdpa", "flex"])
def test_pieces_are_whole_rows(
    kernel: str, case: str, context: bool, ranks: int, random_batch: Any, monkeypatch: Any
) -> None:
    monkeypatch.setattr("luthier.parallel.context.CHUNK", 2)  # many chunks in short rows
    batch = random_batch(lengths_per_row=ROWS)
    batch = with_context(batch) if context else batch
    shares = [Alone(rank, ranks).split(batch) for rank in range(ranks)]
    whole = shares[0].share.whole
    scores = Scores(0.3, **CASES[case])
    layout = Layout.of(whole)
    if features(layout, scores) & LACKS[kernel]:
        pytest.skip(f"{kernel} lacks {case}")
    draw, width = generator(0, "inputs"), whole.input_ids.shape[1]
    shapes = [(3, 4, width, 8), (3, 2, width, 8), (3, 2, width, 6), (3, width, 4, 6)]
    if kernel == "flex":
        shapes = [(*s[:3], 8) if s[1] == 2 else s for s in shapes[:3]] + [(3, width, 4, 8)]
    q, k, v, weights = (torch.randn(s, dtype=torch.float64, generator=draw) for s in shapes)
    if kernel == "flex" and scores.prefix:
        scores = replace(scores, prefix=replace(scores.prefix, values=scores.prefix.keys))
    real = (whole.document_ids != PADDING)[..., None, None]
    weights = weights * real
    leaves = [x.requires_grad_(kernel != "flex") for x in (q, k, v)]
    reference = KERNELS[kernel](*leaves, layout, scores)
    wanted = [reference * real] if kernel == "flex" else results(reference * real, weights, leaves)
    out = torch.empty_like(reference)
    sums = [torch.zeros_like(x) for x in leaves]
    for rank, mine in enumerate(shares):
        exchange = Alone(rank, ranks, torch.cat([k, v], -1))
        share = replace(mine.share, exchange=exchange)
        parts = [share.of(x.transpose(1, 2)).transpose(1, 2) for x in leaves]
        found = across.attend(kernel, *parts, Layout.of(replace(mine, share=share)), scores, share)
        if kernel != "flex":
            some = results(found, share.of(weights), leaves)[1:]
            sums = [a + b for a, b in zip(sums, some, strict=True)]
        rows = torch.arange(3)[:, None]
        out[rows, share.columns] = found.detach() * share.of(real)
    ours = [out] if kernel == "flex" else [out, *sums]
    for mine, theirs in zip(ours, wanted, strict=True):
        torch.testing.assert_close(mine, theirs.detach(), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("window", [None, 5])
def test_spans_are_pieces(window: int | None, random_batch: Any, monkeypatch: Any) -> None:
    """What kernels on a GPU are given: runs of queries and keys whose last ones belong together."""
    monkeypatch.setattr("luthier.parallel.context.CHUNK", 4)
    mine = Alone(1, 2).split(random_batch(lengths_per_row=ROWS))
    draw, scores = generator(0, "spans"), Scores(0.3, window=window)
    width = mine.share.whole.input_ids.shape[1]
    q, k, v = (torch.randn(3, n, width, 8, dtype=torch.float64, generator=draw) for n in (4, 2, 2))
    share = replace(mine.share, exchange=Alone(1, 2, torch.cat([k, v], -1)))
    mine = replace(mine, share=share)
    parts = [share.of(x.transpose(1, 2)).transpose(1, 2) for x in (q, k, v)]

    def plainly(q: Tensor, k: Tensor, v: Tensor, spans: Any, scores: Scores) -> Tensor:
        out = []
        starts, begins = spans.queries.tolist(), spans.keys.tolist()
        for a, b, c, d in zip(starts, starts[1:], begins, begins[1:], strict=False):
            assert b - a <= spans.longest_queries and d - c <= spans.longest_keys
            distance = torch.arange(c - d, 0) - torch.arange(a - b, 0)[:, None]
            seen = (distance <= 0) & (distance > -(scores.window or width))
            table = torch.einsum("ihd,jhd->hij", q[a:b], k[c:d].repeat_interleave(2, 1))
            weights = (table * scores.scale).masked_fill(~seen, -torch.inf).softmax(-1)
            out.append(torch.einsum("hij,jhd->ihd", weights, v[c:d].repeat_interleave(2, 1)))
        return torch.cat(out)

    monkeypatch.setitem(across._GATHERED, "varlen", across._by_spans(plainly))
    real = (mine.document_ids != PADDING)[..., None, None]
    ours, theirs = (
        across.attend(kernel, *parts, Layout.of(mine), scores, share) * real
        for kernel in ("varlen", "math")
    )
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


def imbalance(lengths: list[list[int]], ranks: int, random_batch: Any) -> float:
    """Keys that the busiest rank's queries see, over the mean of all ranks."""
    batch = random_batch(lengths_per_row=lengths)
    work = []
    for rank in range(ranks):
        share = Alone(rank, ranks).split(batch).share
        work.append(int(share.of(costs(Layout.of(share.whole), 1)).sum()))
    assert sum(work) == sum(n * (n + 1) // 2 for row in lengths for n in row)
    return max(work) * ranks / sum(work)


@pytest.mark.parametrize("ranks", [2, 4, 8])
def test_work_is_shared_evenly(ranks: int, random_batch: Any) -> None:
    draw = generator(0, "documents")
    rows = []
    for _ in range(2):
        lengths = (torch.randn(200, generator=draw) * 0.9 + 5.5).exp().int().clamp(8, 4000).tolist()
        total = torch.tensor(lengths).cumsum(0)
        rows.append([n for n, t in zip(lengths, total.tolist(), strict=True) if t <= 16384])
    assert imbalance([[16384]], ranks, random_batch) < 1.001
    assert imbalance([[8192, *[256] * 32]], ranks, random_batch) < 1.001
    assert imbalance(rows, ranks, random_batch) < 1.01
    heads_and_tails = [[0, 1, 1, 0] for _ in range(2)]  # what one long document alone needs
    assert deal(torch.tensor([[1, 3, 5, 7]] * 2), 2).tolist() in (
        heads_and_tails,
        [[1, 0, 0, 1]] * 2,
    )
