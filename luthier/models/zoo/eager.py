"""Attention by plain products, for families of this folder built with `attn_implementation="eager"`.

Documents and contexts are the attention seam's (`models/attention.py`); here a mask says what is seen.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def eager_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **extra: Any,
) -> tuple[Tensor, Tensor]:
    """Plain products: query [B, N, S, d], key and value [B, N, T, d] -> [B, S, N, d] and the weights."""
    scores = query @ key.transpose(-1, -2) * scaling  # [B, N, S, T]
    if attention_mask is not None:
        scores = scores + attention_mask
    weights = F.dropout(scores.softmax(-1, torch.float32).to(query.dtype), dropout, module.training)
    return (weights @ value).transpose(1, 2).contiguous(), weights
