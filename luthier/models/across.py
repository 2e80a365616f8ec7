"""Attention where a rank has some of each row's tokens (context parallelism, `batch.Share`); all heads see all tokens.

Two ways. By heads (Ulysses, arXiv:2309.14509): tokens are exchanged for heads, then any kernel computes whole rows of a
rank's heads. By gathering: a rank has the keys and values of all tokens, and computes its own queries, piece
by piece: a piece is a run of neighbouring queries of one document, which sees that document's keys up to its last
query, or those that its window reaches. How tokens are exchanged is `parallel/context.py`'s.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from luthier.batch import Layout, PrefixKeys, Share, layout_scope
from luthier.errors import Refused
from luthier.models import kernels
from luthier.models.kernels import KERNELS, Spans
from luthier.models.scores import Scores, reach
from luthier.parts import Part, both


def attend(
    kernel: str, q: Tensor, k: Tensor, v: Tensor, layout: Layout, scores: Scores, share: Share
) -> Tensor:
    """q [B, H, s, D], k and v [B, K, s, D] of this rank's tokens -> [B, s, H, D], by the kernel of that name."""
    exchange, heads, groups = share.exchange, q.shape[1], k.shape[1]
    if exchange.method == "heads":
        check_heads(heads, exchange.ranks)
    if exchange.method == "heads" or (exchange.method == "auto" and groups % exchange.ranks == 0):
        return _by_heads(kernel, q, k, v, layout, scores, share)
    width = k.shape[-1]
    found = exchange.gather(torch.cat([k, v], -1), share)  # [B, K, S, D + E]
    k, v = found[..., :width], found[..., width:]
    return _GATHERED[kernel](q, k, v, layout, scores)


def check_heads(heads: int, ranks: int) -> None:
    """Refuse `parallel.context_method=heads` where the ranks do not divide the heads."""
    if heads % ranks:
        raise Refused(
            "parallel.context_method=heads",
            f"{heads} attention heads cannot be shared out among {ranks} context ranks",
            "use parallel.context_method=gather",
        )


# ---- by heads


def _by_heads(
    kernel: str, q: Tensor, k: Tensor, v: Tensor, layout: Layout, scores: Scores, share: Share
) -> Tensor:
    exchange, heads = share.exchange, q.shape[1]
    # fewer heads of keys than ranks, or a number that does not divide: each is sent to several
    repeat = math.lcm(k.shape[1], exchange.ranks) // k.shape[1]
    if repeat > 1:
        k, v = (x.repeat_interleave(repeat, 1) for x in (k, v))
    q, k, v = (exchange.to_heads(x, share) for x in (q, k, v))
    whole = layout.cache.setdefault("whole rows", replace(layout, share=None, cache={}))
    with layout_scope(whole):
        mine = _of_heads(scores, layout, heads, repeat, exchange.rank, exchange.ranks)
        out = KERNELS[kernel](q, k, v, whole, mine)  # [B, S, H/n, E]
    return exchange.to_tokens(out.transpose(1, 2), share).transpose(1, 2)


def _of_heads(
    scores: Scores, layout: Layout, heads: int, repeat: int, rank: int, ranks: int
) -> Scores:
    """What of `scores` belongs to the heads of a rank."""
    above = scores.heads or Part(-3, (heads,), 0, 1)
    prefix, alibi = scores.prefix, scores.alibi
    if prefix is not None:
        pair = (prefix.keys, prefix.values)
        keys, values = (x.repeat_interleave(repeat, 1).chunk(ranks, 1)[rank] for x in pair)
        prefix = PrefixKeys(keys, values, prefix.virtual)
    if alibi is not None:
        # kernels tell by the tensor itself whether they made a table for it
        kept = layout.cache.get("slopes")
        if kept is None or kept[0] is not alibi:
            kept = layout.cache["slopes"] = alibi, alibi.chunk(ranks)[rank]
        alibi = kept[1]
    return replace(
        scores,
        sinks=None if scores.sinks is None else scores.sinks.chunk(ranks)[rank],
        alibi=alibi,
        prefix=prefix,
        heads=replace(above, rank=above.rank * ranks + rank, ranks=above.ranks * ranks),
    )


# ---- by gathering


class Piece(NamedTuple):
    """Queries `first` to `last` (exclusive) of document number `document` of the batch."""

    document: int
    first: int
    last: int

    def keys(self, window: int | None) -> tuple[int, int]:
        """The first and the last (exclusive) of the document's keys that any of these queries sees."""
        return (0 if window is None else max(self.first + 1 - window, 0)), self.last


@dataclass(frozen=True)
class Corner:
    """Of the weights [..., L, P + L] of a document those of some queries and of the keys that they may see."""

    size: tuple[int, int]
    rows: slice
    columns: tuple[slice, slice]  # the prefix, the document's own

    def of(self, whole: Tensor) -> Tensor:
        return torch.cat([whole[..., self.rows, columns] for columns in self.columns], -1)

    def whole_shape(self, shape: Sequence[int]) -> tuple[int, ...]:
        return (*shape[:-2], *self.size)


def pieces(layout: Layout) -> list[Piece]:
    """This rank's tokens in their order, as runs; the documents are numbered as `kernels.documents_of` gives them."""
    if "pieces" not in layout.cache:
        assert layout.share is not None
        columns, width = layout.share.columns.cpu(), layout.document_ids.shape[1]
        begins = [document.begin for document in _documents(layout)]
        flat = (columns + width * torch.arange(len(columns))[:, None]).flatten()  # [B*s]
        number = torch.searchsorted(torch.tensor(begins), flat, right=True) - 1
        new = (flat.diff() != 1) | (number.diff() != 0)
        starts = [0, *(new.nonzero().flatten() + 1).tolist()]
        found = []
        for start, stop in zip(starts, [*starts[1:], len(flat)], strict=True):
            first = int(flat[start]) - begins[int(number[start])]
            found.append(Piece(int(number[start]), first, first + stop - start))
        layout.cache["pieces"] = found
    return layout.cache["pieces"]


def _documents(layout: Layout) -> list[Any]:
    if "documents" not in layout.cache:
        layout.cache["documents"] = list(kernels.documents_of(layout))
    return layout.cache["documents"]


def _per_piece(
    products: Callable[..., Tensor], q: Tensor, k: Tensor, v: Tensor, layout: Layout, scores: Scores
) -> Tensor:
    """Apply `products` to each piece and lay the results out as [B, s, H, D], zeros on padding."""
    batch, heads, width, _ = q.shape
    found, documents = pieces(layout), _documents(layout)
    lengths = [document.length for document in documents]
    keys, values = (kernels.tokens(x).split(lengths) for x in (k, v))
    parts = kernels.tokens(q).split([piece.last - piece.first for piece in found])
    ahead, virtual = reach(scores.prefix)
    before = scores.prefix and (scores.prefix.keys.to(k.dtype), scores.prefix.values.to(v.dtype))
    # in half precision, ALiBi of a far key would lose its distance
    alibi = products is kernels.math_products and scores.alibi is not None
    dtype = torch.promote_types(q.dtype, torch.float32) if alibi else q.dtype
    out = []
    for piece, queries in zip(found, parts, strict=True):
        document = documents[piece.document]
        if not document.real:
            out.append(queries.new_zeros(len(queries), heads, v.shape[-1]))
            continue
        low, high = piece.keys(scores.window)
        if layout.in_context is not None:
            low, high = 0, document.length  # a context is seen by all of its document
        # virtual tokens stand right before the document: no window reaches them without its first token
        near = ahead if not virtual or low == 0 else 0
        a, b = keys[piece.document][low:high], values[piece.document][low:high]
        if before:
            a, b = torch.cat([before[0][:near], a]), torch.cat([before[1][:near], b])
        table = _table(piece, low, high, near, layout, scores, dtype, q.device)
        mine = scores
        if scores.dropout:
            columns = slice(near), slice(ahead + low, ahead + high)
            size = (document.length, ahead + document.length)
            corner = Corner(size, slice(piece.first, piece.last), columns)
            mine = replace(scores, heads=both(corner, scores.heads))
        out.append(products(queries, a, b, table, document, mine))
    return torch.cat(out).unflatten(0, (batch, width))  # [B, s, H, D]


def _table(
    piece: Piece,
    low: int,
    high: int,
    near: int,
    layout: Layout,
    scores: Scores,
    dtype: torch.dtype,
    device: torch.device,
) -> Tensor:
    """What is added to the scores of a piece over P prefix keys and those from `low` to `high`, [l, P + t] or with
    ALiBi [H, l, P + t]: -inf where a key is not seen.

    Where distances alone decide, it is the corner of one table, which is made once per batch, for all layers.
    """
    ahead, virtual = reach(scores.prefix)
    context = layout.in_context
    always = near if not virtual and scores.window is not None else 0  # seen at any distance
    size = piece.last - piece.first, near + high - low
    if context is None and not always:
        every = pieces(layout)
        key = f"pieces {scores.window} {ahead} {dtype}"
        most = max(p.last - p.first for p in every)
        far = max(
            p.last if scores.window is None else min(p.last, p.last - p.first + scores.window)
            for p in every
        )
        queries, keys = torch.arange(far - most, far), torch.arange(-ahead, far)
    else:
        key = f"{piece} {scores.window} {ahead} {dtype}"
        queries = torch.arange(piece.first, piece.last)
        keys = torch.cat([torch.arange(-near, 0), torch.arange(low, high)])
    if key not in layout.cache or layout.cache[key][0] is not scores.alibi:
        distance = (keys - queries[:, None]).to(device)  # [l, P + t]
        seen = distance <= 0
        if scores.window is not None:
            close = distance > -scores.window
            close[:, :always] = True
            seen &= close
        if context is not None:
            begin = _documents(layout)[piece.document].begin
            seen[:, near:] |= context.flatten()[begin + low : begin + high]
        wide = torch.promote_types(dtype, torch.float32)
        slope = 0.0 if scores.alibi is None else scores.alibi.to(device, wide)[:, None, None]
        table = (slope * distance.to(wide)).masked_fill_(~seen, -torch.inf).to(dtype)
        layout.cache[key] = scores.alibi, table
    return layout.cache[key][1][..., -size[0] :, -size[1] :]


def _math(q: Tensor, k: Tensor, v: Tensor, layout: Layout, scores: Scores) -> Tensor:
    return _per_piece(kernels.math_products, q, k, v, layout, scores)


def _sdpa(q: Tensor, k: Tensor, v: Tensor, layout: Layout, scores: Scores) -> Tensor:
    def products(a: Tensor, b: Tensor, c: Tensor, table: Tensor, *_: Any) -> Tensor:
        return kernels.sdpa_products(scores.scale, a, b, c, table)

    return _per_piece(products, q, k, v, layout, scores)


def _by_spans(run: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def attend(q: Tensor, k: Tensor, v: Tensor, layout: Layout, scores: Scores) -> Tensor:
        seen, spans = _spans(layout, scores.window, q.device)
        keys, values = (kernels.tokens(x)[seen] for x in (k, v))
        return run(kernels.tokens(q), keys, values, spans, scores).unflatten(0, layout.shape)

    return attend


def _spans(layout: Layout, window: int | None, device: torch.device) -> tuple[Tensor, Spans]:
    """Which flat keys the pieces see, piece after piece, and the borders of both; once per window."""
    key = f"spans {window}"
    if key not in layout.cache:
        found, documents = pieces(layout), _documents(layout)
        ranges = [(documents[p.document].begin, *p.keys(window)) for p in found]
        seen = torch.cat([torch.arange(begin + low, begin + high) for begin, low, high in ranges])
        sizes = [p.last - p.first for p in found], [high - low for _, low, high in ranges]
        bounds = [torch.tensor([0, *n]).cumsum(0).to(device, torch.int32) for n in sizes]
        layout.cache[key] = (
            seen.to(device),
            Spans(bounds[0], bounds[1], max(sizes[0]), max(sizes[1])),
        )
    return layout.cache[key]


_GATHERED: dict[str, Callable[..., Tensor]] = {
    "math": _math,
    "sdpa": _sdpa,
    "native": _sdpa,
    "varlen": _by_spans(kernels.varlen_spans),
    "flash": _by_spans(kernels.flash_spans),
    "flex": kernels.flex,
}
