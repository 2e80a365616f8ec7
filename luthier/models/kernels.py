"""Attention over the documents of a packed batch: one function per kernel, all with the same signature.

Each takes q [B, H, S, D], k and v [B, K, S, D] (K divides H: grouped heads), the `Layout` and the
`Scores`, and gives [B, S, H, D]. Query i sees key j iff both lie in one document and j <= i (and i - j <
window), or j is in the context of that document; and it sees the prefix. `math` and `sdpa` loop over the
documents, so their cost is that of the documents' own lengths and padding costs nothing; `flex`, `varlen` and
`flash` take all documents in one launch. `math` is the reference and knows every feature. Who calls which one
is `attention.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from luthier import seeding
from luthier.batch import Layout
from luthier.models import cpu_attention, windows
from luthier.models.flex import flex
from luthier.models.scores import Scores, capped, features, reach, with_sinks


class Spans(NamedTuple):
    """Runs of queries and the runs of keys that they see, one after the other: where they begin and end in the flat
    tokens, [n + 1] int32 each, and the longest of each."""

    queries: Tensor
    keys: Tensor
    longest_queries: int
    longest_keys: int


Kernel = Callable[[Tensor, Tensor, Tensor, Layout, Scores], Tensor]


def math(q: Tensor, k: Tensor, v: Tensor, layout: Layout, scores: Scores) -> Tensor:
    """Plain matrix products per document; the query heads of a group are folded into the rows."""
    return _per_document(_math_document, q, k, v, layout, scores)


def sdpa(q: Tensor, k: Tensor, v: Tensor, layout: Layout, scores: Scores) -> Tensor:
    """torch's scaled_dot_product_attention per document. No softcap, sinks or dropout."""
    longest = max((s.stop - s.start for s in layout.segments), default=0)
    plain = not features(layout, scores) and (scores.window is None or scores.window >= longest)
    if plain and cpu_attention.helps(q, k, v):
        return cpu_attention.packed(q, k, v, scores.scale, None, by_native=False)
    return _per_document(_sdpa_document, q, k, v, layout, scores)


def native(q: Tensor, k: Tensor, v: Tensor, layout: Layout, scores: Scores) -> Tensor:
    """The kernels of `luthier/native`: bfloat16 on a CPU. No feature but windows."""
    return cpu_attention.packed(q, k, v, scores.scale, scores.window, by_native=True)


def varlen(q: Tensor, k: Tensor, v: Tensor, layout: Layout, scores: Scores) -> Tensor:
    """torch's varlen_attn (FlashAttention 2), GPU and half precision. No feature but windows."""
    out = varlen_spans(tokens(q), tokens(k), tokens(v), _spans(layout), scores)
    return out.unflatten(0, (q.shape[0], q.shape[2]))


def varlen_spans(q: Tensor, k: Tensor, v: Tensor, spans: Spans, scores: Scores) -> Tensor:
    """q [N, H, D], k and v [T, K, D] -> [N, H, D]; the last query of a span sees its last key."""
    from torch.nn.attention.varlen import varlen_attn

    left = -1 if scores.window is None else scores.window - 1
    out = varlen_attn(  # pyright: ignore[reportCallIssue, reportArgumentType]
        *(q, k, v, *spans),
        scale=scores.scale,
        window_size=(left, 0),
        enable_gqa=q.shape[1] != k.shape[1],
    )
    assert isinstance(out, Tensor)
    return out


def flash(q: Tensor, k: Tensor, v: Tensor, layout: Layout, scores: Scores) -> Tensor:
    """flash_attn_varlen_func of the package flash-attn, GPU and half precision. Windows and softcap."""
    out = flash_spans(tokens(q), tokens(k), tokens(v), _spans(layout), scores)
    return out.unflatten(0, (q.shape[0], q.shape[2]))


def flash_spans(q: Tensor, k: Tensor, v: Tensor, spans: Spans, scores: Scores) -> Tensor:
    """As `varlen_spans`."""
    from flash_attn import flash_attn_varlen_func  # pyright: ignore[reportMissingImports]

    left = -1 if scores.window is None else scores.window - 1
    return flash_attn_varlen_func(
        *(q, k, v, *spans),
        softmax_scale=scores.scale,
        causal=True,
        window_size=(left, 0),
        softcap=scores.softcap or 0.0,
    )


def _spans(layout: Layout) -> Spans:
    bounds, longest = layout.cumulative_lengths
    return Spans(bounds, bounds, longest, longest)


KERNELS: dict[str, Kernel] = {
    "math": math,
    "sdpa": sdpa,
    "native": native,
    "flex": flex,
    "varlen": varlen,
    "flash": flash,
}
# what a kernel lacks; `attention.py` computes such layers by `math`, or refuses the kernel
LACKS: dict[str, frozenset[str]] = {
    "math": frozenset(),
    "sdpa": frozenset({"softcap", "sinks", "dropout"}),
    "native": frozenset({"softcap", "sinks", "dropout", "alibi", "prefix", "context"}),
    "flex": frozenset({"sinks", "dropout"}),
    "varlen": frozenset({"softcap", "sinks", "dropout", "alibi", "prefix", "context"}),
    "flash": frozenset({"sinks", "dropout", "alibi", "prefix", "context"}),
}


class _Document(NamedTuple):
    """A run of tokens of the flattened batch: `begin` in it, `start` in its row, `row` the serial number."""

    length: int
    begin: int
    start: int
    row: int
    real: bool  # not padding


def _math_document(
    q: Tensor, k: Tensor, v: Tensor, document: _Document, layout: Layout, scores: Scores
) -> Tensor:
    """One document: q [L, H, D], k and v [P + L, K, D], the prefix first -> [L, H, D]."""
    if len(q) > windows.whole(layout, scores):
        block = partial(math_products, document=document, scores=scores)
        return windows.attend(block, q, k, v, scores.window or 1, *reach(scores.prefix))
    # in half precision, ALiBi of a far key would lose its distance
    dtype = q.dtype if scores.alibi is None else torch.promote_types(q.dtype, torch.float32)
    table = _mask(layout, document, scores, dtype, q.device)
    return math_products(q, k, v, table, document, scores)


def math_products(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor, document: _Document, scores: Scores
) -> Tensor:
    """q [l, H, D], k and v [t, K, D], what is added to the scores [l, t] or [H, l, t] -> [l, H, D]."""
    length, heads, _ = q.shape
    groups = k.shape[1]
    # [K, H/K * L, D]: one product per key head instead of one per query head
    folded = q.unflatten(1, (groups, -1)).permute(1, 2, 0, 3).flatten(1, 2)
    products = folded @ k.permute(1, 2, 0) * scores.scale
    table = capped(products.view(heads, length, -1), scores.softcap)  # [H, L, P + L]
    table = table + mask
    weights = with_sinks(table, scores.sinks, v.dtype)
    if scores.dropout:
        seed, layer = scores.dropout_key
        # the name holds the place in the row: each document of the row draws its own mask
        name, rows = f"{layer}@{document.start}", (document.row,)
        drop = partial(seeding.dropout, seed=seed, name=name, rows=rows, part=scores.heads)
        weights = drop(weights[None], scores.dropout)[0]
    out = weights.view(groups, -1, k.shape[0]) @ v.transpose(0, 1)  # [K, H/K * L, D]
    return out.view(heads, length, -1).transpose(0, 1)


def _sdpa_document(
    q: Tensor, k: Tensor, v: Tensor, document: _Document, layout: Layout, scores: Scores
) -> Tensor:
    """As `_math_document`. Without window, ALiBi and context, no mask is made.

    torch's causal triangle starts at the first key, so the prefix gets queries of its own, which nobody reads.
    """
    ahead = k.shape[0] - q.shape[0]
    span = k.shape[0] if scores.prefix and scores.prefix.virtual else q.shape[0]
    windowed = scores.window is not None and scores.window < span
    if len(q) > windows.whole(layout, scores):
        block = partial(sdpa_products, scores.scale)
        return windows.attend(block, q, k, v, scores.window or 1, *reach(scores.prefix))
    plain = not windowed and scores.alibi is None and layout.in_context is None
    mask = None if plain else _mask(layout, document, scores, q.dtype, q.device)
    if plain and ahead:
        q = torch.cat([q.new_zeros(ahead, *q.shape[1:]), q])
    if plain and cpu_attention.helps(q, k, v):
        return cpu_attention.causal(q, k, v, scores.scale)[ahead:]
    out = sdpa_products(scores.scale, q, k, v, mask)
    return out[ahead:] if plain else out


def sdpa_products(scale: float, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """q [l, H, D], k and v [t, K, D], what is added to the scores or None for causal -> [l, H, D]."""
    return F.scaled_dot_product_attention(
        q.transpose(0, 1)[None],
        k.transpose(0, 1)[None],
        v.transpose(0, 1)[None],
        attn_mask=mask,
        is_causal=mask is None,
        scale=scale,
        enable_gqa=q.shape[1] != k.shape[1],
    )[0].transpose(0, 1)


def _per_document(
    attend: Callable[..., Tensor], q: Tensor, k: Tensor, v: Tensor, layout: Layout, scores: Scores
) -> Tensor:
    """Apply `attend` to each document and lay the results out as [B, S, H, D], zeros on padding.

    Splitting and joining the flat tokens is one pass each in the backward too; indexing per document would
    write a whole gradient for each of them.
    """
    batch, heads, width, _ = q.shape
    documents = list(documents_of(layout))
    lengths = [document.length for document in documents]
    before = scores.prefix and (scores.prefix.keys.to(k.dtype), scores.prefix.values.to(v.dtype))
    out = []
    parts = (tokens(x).split(lengths) for x in (q, k, v))
    for document, a, b, c in zip(documents, *parts, strict=True):
        if not document.real:
            out.append(c.new_zeros(document.length, heads, c.shape[-1]))
            continue
        if before:
            b, c = torch.cat([before[0], b]), torch.cat([before[1], c])  # [P + L, K, D]
        out.append(attend(a, b, c, document, layout, scores))
    return torch.cat(out).unflatten(0, (batch, width))  # [B, S, H, D]


def tokens(x: Tensor) -> Tensor:
    """[B, H, S, D] -> [B*S, H, D]; no copy where the heads were split from one projection."""
    return x.transpose(1, 2).flatten(0, 1)


def documents_of(layout: Layout) -> Iterator[_Document]:
    """The documents and the stretches of padding, in the order of the flat tokens."""
    width = layout.document_ids.shape[1]
    done = 0
    for segment in layout.segments:
        begin = segment.row * width + segment.start
        if begin > done:
            yield _Document(begin - done, done, 0, 0, False)
        serial = layout.rows[segment.row] if layout.rows else segment.row
        yield _Document(segment.stop - segment.start, begin, segment.start, serial, True)
        done = segment.row * width + segment.stop
    if layout.document_ids.numel() > done:
        yield _Document(layout.document_ids.numel() - done, done, 0, 0, False)


def _mask(
    layout: Layout, document: _Document, scores: Scores, dtype: torch.dtype, device: torch.device
) -> Tensor:
    """What is added to the scores, [L, P + L] or with ALiBi [H, L, P + L]: -inf where a key is not seen.

    Made once per batch, for all layers: the documents take corners of the longest one's table; where they
    have a context, each has a table of its own.
    """
    slopes, context = scores.alibi, layout.in_context
    ahead, virtual = reach(scores.prefix)
    place = "" if context is None else document.begin
    key = f"mask {scores.window} {ahead} {virtual} {dtype} {place}"
    if key not in layout.cache or layout.cache[key][0] is not slopes:
        longest = document.length
        if context is None:
            lengths = [s.stop - s.start for s in layout.segments]
            longest = max(n for n in lengths if n <= windows.whole(layout, scores))
        index = torch.arange(longest, device=device)
        distance = torch.arange(-ahead, longest, device=device) - index[:, None]  # j - i
        seen = distance <= 0
        if scores.window is not None:
            near = distance > -scores.window
            if not virtual:
                near[:, :ahead] = True
            seen &= near
        if context is not None:
            seen[:, ahead:] |= context.flatten()[document.begin : document.begin + longest]
        wide = torch.promote_types(dtype, torch.float32)
        slope = 0.0 if slopes is None else slopes.to(device, wide)[:, None, None]
        table = (slope * distance.to(wide)).masked_fill_(~seen, -torch.inf).to(dtype)
        layout.cache[key] = slopes, table
    return layout.cache[key][1][..., : document.length, : ahead + document.length]
