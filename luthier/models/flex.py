"""FlexAttention over the documents of a packed batch, with a block mask made from the document ids.

The signature is that of `kernels.py`. Under context parallelism (`across.py`) the queries are some columns of the
rows, and keys and values are whole rows.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor

from luthier.batch import PADDING, Layout
from luthier.models.scores import Scores, capped, reach


def flex(q: Tensor, k: Tensor, v: Tensor, layout: Layout, scores: Scores) -> Tensor:
    """FlexAttention with a block mask made from the document ids. No sinks or dropout.

    Compiled on GPU. On CPU it runs unfused and without gradients: torch has no more there.
    """
    from torch.nn.attention.flex_attention import flex_attention

    if scores.prefix is not None:
        k, v = (
            torch.cat([before.to(x.dtype).transpose(0, 1).expand(len(x), -1, -1, -1), x], dim=2)
            for before, x in ((scores.prefix.keys, k), (scores.prefix.values, v))
        )  # [B, K, P + S, D]
    kwargs: dict[str, Any] = {
        "score_mod": _score_mod(layout, scores, q),
        "block_mask": _block_mask(layout, scores, q.device),
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


def _block_mask(layout: Layout, scores: Scores, device: torch.device) -> Any:
    """FlexAttention's block-sparse mask of this batch, made once per window width and prefix."""
    from torch.nn.attention.flex_attention import create_block_mask

    window = scores.window
    ahead, virtual = reach(scores.prefix)
    key = f"flex {window} {ahead} {virtual}"
    if key not in layout.cache:
        ids, context, places = layout.document_ids, layout.in_context, _places(layout)
        here = _here(layout)

        def visible(b: Tensor, h: Tensor, query: Tensor, key: Tensor) -> Tensor:
            i = query if here is None else here[b, query]
            j = (key - ahead).clamp(min=0) if ahead else key
            seen = j <= i if window is None else (j <= i) & (i - j < window)
            if context is not None:
                seen = seen | context[b, j]
            seen = seen & (ids[b, i] == ids[b, j])
            if ahead:
                near = key >= 0
                if virtual and window is not None:
                    near = places[b, i] + ahead - key < window
                seen = torch.where(key < ahead, near, seen)
            return seen & (ids[b, i] != PADDING)

        batch, width = ids.shape
        size = layout.shape[1], ahead + width
        layout.cache[key] = create_block_mask(
            visible, batch, None, *size, device, _compile=device.type == "cuda"
        )
    return layout.cache[key]


def _score_mod(layout: Layout, scores: Scores, q: Tensor) -> Callable[..., Tensor] | None:
    """Softcap and ALiBi for FlexAttention; one function per batch, so that all layers share it."""
    softcap, alibi = scores.softcap, scores.alibi
    if alibi is None:
        return None if softcap is None else _softcap_mod(softcap)
    ahead, _ = reach(scores.prefix)
    wide = torch.promote_types(q.dtype, torch.float32)
    key = f"flex alibi {softcap} {ahead} {wide}"
    if key not in layout.cache or layout.cache[key][0] is not alibi:
        slopes, places, here = alibi.to(q.device, wide), _places(layout), _here(layout)

        def bias(score: Tensor, b: Tensor, h: Tensor, query: Tensor, key: Tensor) -> Tensor:
            i = query if here is None else here[b, query]
            place = torch.where(key < ahead, places[b, i], i) if ahead else i
            return capped(score, softcap) + slopes[h] * (key - ahead - place)

        layout.cache[key] = alibi, bias
    return layout.cache[key][1]


def _places(layout: Layout) -> Tensor:
    """[B, S]: the place of each token in its document, whatever its position is called."""
    index = torch.arange(layout.borders.shape[1], device=layout.borders.device)
    return index - torch.where(layout.borders, index, 0).cummax(1).values


def _here(layout: Layout) -> Tensor | None:
    """[B, s]: which columns the queries are, if not all."""
    return None if layout.share is None else layout.share.columns


@cache
def _softcap_mod(softcap: float) -> Callable[..., Tensor]:
    return lambda score, b, h, i, j: capped(score, softcap)


@cache
def _compiled_flex() -> Callable[..., Tensor]:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention)
