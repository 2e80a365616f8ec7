"""Attention over the documents of a packed batch: one function per kernel, all with the same signature.

Each takes q [B, H, S, D], k and v [B, K, S, D] (K divides H: grouped heads), the `Layout` and the
`Scores`, and gives [B, S, H, D]. Query i sees key j iff both lie in one document and j <= i (and i - j <
window). `math` and `sdpa` loop over the documents, so their cost is that of the documents' own lengths and padding
costs nothing; `flex`, `varlen` and `flash` take all documents in one launch. `math` is the reference and
knows every feature. Who calls which one is `attention.py`.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from luthier import seeding
from luthier.batch import PADDING, Layout


@dataclass(frozen=True)
class Scores:
    """What a model does to its attention scores besides masking."""

    scale: float
    window: int | None = None  # a query sees this many keys, itself included
    softcap: float | None = None  # scores -> c * tanh(scores / c)
    sinks: Tensor | None = None  # [H]: one more score per head that takes weight and gives no value
    dropout: float = 0.0  # of the attention weights
    dropout_key: tuple[int, str] = (0, "")  # (seed, name of the layer)


Kernel = Callable[[Tensor, Tensor, Tensor, Layout, Scores], Tensor]


def math(q: Tensor, k: Tensor, v: Tensor, layout: Layout, scores: Scores) -> Tensor:
    """Plain matrix products per document; the query heads of a group are folded into the rows."""
    return _per_document(_math_document, q, k, v, layout, scores)


def sdpa(q: Tensor, k: Tensor, v: Tensor, layout: Layout, scores: Scores) -> Tensor:
    """torch's scaled_dot_product_attention per document. No softcap, sinks or dropout."""
    return _per_document(_sdpa_document, q, k, v, layout, scores)


def flex(q: Tensor, k: Tensor, v: Tensor, layout: Layout, scores: Scores) -> Tensor:
    """FlexAttention with a block mask made from the document ids. No sinks or dropout.

    Compiled on GPU. On CPU it runs unfused and without gradients: torch has no more there.
    """
    from torch.nn.attention.flex_attention import flex_attention

    mask = _block_mask(layout, scores.window, q.device)
    kwargs: dict[str, Any] = {
        "score_mod": None if scores.softcap is None else _softcap_mod(scores.softcap),
        "block_mask": mask,
        "scale": scores.scale,
        "enable_gqa": q.shape[1] != k.shape[1],
    }
    if q.device.type == "cuda":
        out = _compiled_flex()(q, k, v, **kwargs)
    else:
        with warnings.catch_warnings():  # it advises to compile
            warnings.filterwarnings("ignore", message="flex_attention called without torch.compile")
            out = flex_attention(q, k, v, **kwargs)
    return out.transpose(1, 2)  # [B, S, H, D]


def varlen(q: Tensor, k: Tensor, v: Tensor, layout: Layout, scores: Scores) -> Tensor:
    """torch's varlen_attn (FlashAttention 2), GPU and half precision. No softcap, sinks or dropout."""
    from torch.nn.attention.varlen import varlen_attn

    bounds, longest = layout.cumulative_lengths
    left = -1 if scores.window is None else scores.window - 1
    out = varlen_attn(
        _tokens(q),
        _tokens(k),
        _tokens(v),
        bounds,
        bounds,
        longest,
        longest,
        scale=scores.scale,
        window_size=(left, 0),
        enable_gqa=q.shape[1] != k.shape[1],
    )
    assert isinstance(out, Tensor)
    return out.unflatten(0, (q.shape[0], q.shape[2]))


def flash(q: Tensor, k: Tensor, v: Tensor, layout: Layout, scores: Scores) -> Tensor:
    """flash_attn_varlen_func of the package flash-attn, GPU and half precision. No sinks or dropout."""
    from flash_attn import flash_attn_varlen_func  # pyright: ignore[reportMissingImports]

    bounds, longest = layout.cumulative_lengths
    left = -1 if scores.window is None else scores.window - 1
    out = flash_attn_varlen_func(
        _tokens(q),
        _tokens(k),
        _tokens(v),
        bounds,
        bounds,
        longest,
        longest,
        softmax_scale=scores.scale,
        causal=True,
        window_size=(left, 0),
        softcap=scores.softcap or 0.0,
    )
    return out.unflatten(0, (q.shape[0], q.shape[2]))


KERNELS: dict[str, Kernel] = {
    "math": math,
    "sdpa": sdpa,
    "flex": flex,
    "varlen": varlen,
    "flash": flash,
}
# what a kernel lacks; `attention.py` computes such layers by `math`, or refuses the kernel
LACKS: dict[str, frozenset[str]] = {
    "math": frozenset(),
    "sdpa": frozenset({"softcap", "sinks", "dropout"}),
    "flex": frozenset({"sinks", "dropout"}),
    "varlen": frozenset({"softcap", "sinks", "dropout"}),
    "flash": frozenset({"sinks", "dropout"}),
}


def softmax(scores: Tensor, dtype: torch.dtype) -> Tensor:
    """Softmax over the last axis, at least in float32, given back in `dtype`."""
    wide = torch.promote_types(scores.dtype, torch.float32)
    return torch.softmax(scores, dim=-1, dtype=wide).to(dtype)


def capped(scores: Tensor, softcap: float | None) -> Tensor:
    """Scores after the tanh softcap of Gemma 2 (arXiv:2408.00118, section 2)."""
    return scores if softcap is None else softcap * torch.tanh(scores / softcap)


def with_sinks(scores: Tensor, sinks: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Weights [..., H, Q, J] of scores of that shape, where a sink per head [H] may take part of the mass."""
    if sinks is None:
        return softmax(scores, dtype)
    column = sinks.to(scores.dtype).view(-1, 1, 1).expand(*scores.shape[:-1], 1)
    return softmax(torch.cat([scores, column], dim=-1), dtype)[..., :-1]


def _math_document(
    q: Tensor, k: Tensor, v: Tensor, visible: Tensor, scores: Scores, row: int, start: int
) -> Tensor:
    """One document: q [L, H, D], k and v [L, K, D], visible [L, L] bool -> [L, H, D]."""
    length, heads, _ = q.shape
    groups = k.shape[1]
    # [K, H/K * L, D]: one product per key head instead of one per query head
    folded = q.unflatten(1, (groups, -1)).permute(1, 2, 0, 3).flatten(1, 2)
    products = folded @ k.permute(1, 2, 0) * scores.scale
    table = capped(products.view(heads, length, length), scores.softcap)  # [H, L, L]
    weights = with_sinks(table.masked_fill(~visible, -torch.inf), scores.sinks, v.dtype)
    if scores.dropout:
        seed, name = scores.dropout_key
        # the name holds the place in the row: each document of the row draws its own mask
        weights = seeding.dropout(
            weights[None], scores.dropout, seed=seed, name=f"{name}@{start}", rows=(row,)
        )[0]
    out = weights.view(groups, -1, length) @ v.transpose(0, 1)  # [K, H/K * L, D]
    return out.view(heads, length, -1).transpose(0, 1)


def _sdpa_document(
    q: Tensor, k: Tensor, v: Tensor, visible: Tensor, scores: Scores, row: int, start: int
) -> Tensor:
    """As `_math_document`. The mask is only needed where the window is shorter than the document."""
    windowed = scores.window is not None and scores.window < q.shape[0]
    out = F.scaled_dot_product_attention(
        q.transpose(0, 1)[None],
        k.transpose(0, 1)[None],
        v.transpose(0, 1)[None],
        attn_mask=visible if windowed else None,
        is_causal=not windowed,
        scale=scores.scale,
        enable_gqa=q.shape[1] != k.shape[1],
    )
    return out[0].transpose(0, 1)


def _per_document(
    attend: Callable[..., Tensor], q: Tensor, k: Tensor, v: Tensor, layout: Layout, scores: Scores
) -> Tensor:
    """Apply `attend` to each document and lay the results out as [B, S, H, D], zeros on padding.

    Splitting and joining the flat tokens is one pass each in the backward too; indexing per document would
    write a whole gradient for each of them.
    """
    batch, heads, width, _ = q.shape
    pieces = list(_pieces(layout))
    lengths = [length for length, _, _, _ in pieces]
    visible = _visible(layout, scores.window, q.device)
    out = []
    parts = (_tokens(x).split(lengths) for x in (q, k, v))
    for (length, row, start, real), a, b, c in zip(pieces, *parts, strict=True):
        if real:
            out.append(attend(a, b, c, visible[:length, :length], scores, row, start))
        else:
            out.append(c.new_zeros(length, heads, c.shape[-1]))
    return torch.cat(out).unflatten(0, (batch, width))  # [B, S, H, D]


def _tokens(x: Tensor) -> Tensor:
    """[B, H, S, D] -> [B*S, H, D]; no copy where the heads were split from one projection."""
    return x.transpose(1, 2).flatten(0, 1)


def _pieces(layout: Layout) -> Iterator[tuple[int, int, int, bool]]:
    """(length, serial number of the row, start in the row, is a document) over the flat tokens in order."""
    width = layout.document_ids.shape[1]
    done = 0
    for segment in layout.segments:
        begin = segment.row * width + segment.start
        if begin > done:
            yield begin - done, 0, 0, False
        serial = layout.rows[segment.row] if layout.rows else segment.row
        yield segment.stop - segment.start, serial, segment.start, True
        done = segment.row * width + segment.stop
    if layout.document_ids.numel() > done:
        yield layout.document_ids.numel() - done, 0, 0, False


def _visible(layout: Layout, window: int | None, device: torch.device) -> Tensor:
    """[L, L] bool for the longest document: which keys a query sees. A shorter one takes the corner."""
    key = f"visible {window}"
    if key not in layout.cache:
        longest = max((s.stop - s.start for s in layout.segments), default=0)
        index = torch.arange(longest, device=device)
        distance = index[:, None] - index[None, :]
        seen = distance >= 0
        layout.cache[key] = seen if window is None else seen & (distance < window)
    return layout.cache[key]


def _block_mask(layout: Layout, window: int | None, device: torch.device) -> Any:
    """FlexAttention's block-sparse mask of this batch, made once per window width."""
    from torch.nn.attention.flex_attention import create_block_mask

    key = f"flex {window}"
    if key not in layout.cache:
        ids = layout.document_ids

        def visible(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
            seen = (ids[b, i] == ids[b, j]) & (ids[b, i] != PADDING) & (j <= i)
            return seen if window is None else seen & (i - j < window)

        batch, width = ids.shape
        layout.cache[key] = create_block_mask(
            visible, batch, None, width, width, device, _compile=device.type == "cuda"
        )
    return layout.cache[key]


@cache
def _softcap_mod(softcap: float) -> Callable[..., Tensor]:
    def cap(score: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return softcap * torch.tanh(score / softcap)

    return cap


@cache
def _compiled_flex() -> Callable[..., Tensor]:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention)
