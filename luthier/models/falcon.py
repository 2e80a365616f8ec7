"""Falcon attends through the seam: its layers have kernels of their own, and masks that ignore positions.

Importing this file adds the subclass below to transformers' table of Falcon's attention layers, so that
`attn_implementation="luthier"` makes them; `repair` is called by `attention.install` on one model, also on
layers that were made otherwise. With `set_attn_implementation("eager")` they compute as the family's own.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, PreTrainedModel
from transformers.models.falcon.modeling_falcon import (
    FALCON_ATTENTION_CLASSES,
    FalconAttention,
    apply_rotary_pos_emb,
    build_alibi_tensor,
)

from luthier.models.replacing import replace_attention

OWN = ("eager", "sdpa")  # what the family computes by itself


class PackedFalconAttention(FalconAttention):
    """Falcon's attention layer; queries, keys and values go to the registered attention function."""

    alibi_slopes: Tensor | None = None  # [H] float32, the scale of the scores in it

    def forward(
        self,
        hidden_states: Tensor,
        alibi: Tensor | None,
        attention_mask: Tensor | None,
        position_ids: Tensor | None = None,
        layer_past: Any = None,
        use_cache: bool = False,
        output_attentions: bool = False,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """x [B, S, D]; `alibi` [B, H, 1, T] or [B*H, 1, T] is the model's bias of the keys."""
        name = self.config._attn_implementation
        if name in OWN:
            return super().forward(
                hidden_states,
                alibi,
                attention_mask,  # pyright: ignore[reportArgumentType]
                position_ids,  # pyright: ignore[reportArgumentType]
                layer_past,
                use_cache,
                output_attentions,
                position_embeddings,
                **kwargs,
            )
        parts = self._split_heads(self.query_key_value(hidden_states))
        query, key, value = (x.transpose(1, 2) for x in parts)  # [B, H or K, S, D]
        if alibi is None:
            assert position_embeddings is not None
            query, key = apply_rotary_pos_emb(query, key, *position_embeddings)
        if layer_past is not None:
            key, value = layer_past.update(key, value, self.layer_idx)
        if alibi is not None:
            # the model has put the bias into its mask: taken apart, as prefixes need both
            alibi = alibi.reshape(len(query), -1, 1, alibi.shape[-1]) * self.inv_norm_factor
            if attention_mask is not None:
                attention_mask = attention_mask > torch.finfo(attention_mask.dtype).min / 2
            here = getattr(self, "heads_here", None)
            if here is not None:  # both are of all heads
                alibi = here.of(alibi)
                attention_mask = None if attention_mask is None else here.of(attention_mask)
        out, _ = AttentionInterface()[name](
            self,
            query,
            key,
            value,
            attention_mask,
            # the family drops attention weights with ALiBi only
            dropout=self.attention_dropout.p if self.training and alibi is not None else 0.0,
            scaling=self.inv_norm_factor,
            alibi_slopes=self.alibi_slopes,
            alibi=alibi,
        )  # [B, S, H, D]
        return self.dense(out.flatten(2)), None


def repair(model: PreTrainedModel) -> None:
    """Make the attention layers of a Falcon model `PackedFalconAttention`, with the slopes of ALiBi."""
    config: Any = model.config
    slopes = None
    if config.alibi:
        # the bias of key 1, whose distance from key 0 is 1; it is scaled with the scores
        bias = build_alibi_tensor(torch.ones(1, 2), config.num_attention_heads, torch.float32)
        slopes = bias[:, 0, 1] * (config.hidden_size // config.num_attention_heads) ** -0.5
    replace_attention(model, FalconAttention, PackedFalconAttention, alibi_slopes=slopes)


FALCON_ATTENTION_CLASSES["luthier"] = PackedFalconAttention
