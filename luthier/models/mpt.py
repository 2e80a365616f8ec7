"""MPT attends through the seam: its attention is one that transformers never gave to the interface.

`repair` is called by `attention.install` on one model. Its attention layers become a subclass that calls the registered
function, with the slopes of ALiBi in place of the model's table, which ends at `max_seq_len`. The model converts the
mask that it is given, and cannot be given none: `attention._mask` gives it an empty one in a layout. With
`set_attn_implementation("eager")` the layers compute as the family's own.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, PreTrainedModel
from transformers.models.mpt.modeling_mpt import MptAttention, build_mpt_alibi_tensor

from luthier.batch import current_layout
from luthier.models.replacing import replace_attention


class PackedMptAttention(MptAttention):
    """MPT's attention layer; queries, keys and values go to the registered attention function."""

    is_causal = True
    config: Any  # the model's
    alibi_slopes: Tensor  # [H] float32

    def forward(
        self,
        hidden_states: Tensor,
        position_bias: Tensor,
        past_key_values: Any = None,
        attention_mask: Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """x [B, S, D]; the mask [B, 1, S, T] is that of transformers' sdpa: True is seen."""
        name = self.config._attn_implementation
        if name == "eager":
            return super().forward(hidden_states, position_bias, past_key_values, attention_mask)
        qkv = self.Wqkv(hidden_states)
        if self.clip_qkv:
            qkv = qkv.clamp(-self.clip_qkv, self.clip_qkv)
        query, key, value = (
            x.unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for x in qkv.chunk(3, dim=-1)
        )  # [B, H, S, D]
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, self.layer_idx)
        places = torch.arange(1 - key.shape[2], 1, device=key.device)
        alibi = self.alibi_slopes.to(key.device)[:, None, None] * places  # [H, 1, T]
        out, _ = AttentionInterface()[name](
            self,
            query,
            key,
            value,
            attention_mask if current_layout() is None else None,
            dropout=self.attn_dropout_p if self.training else 0.0,
            scaling=self.softmax_scale,
            alibi_slopes=self.alibi_slopes,
            alibi=alibi.expand(len(query), -1, -1, -1),
        )  # [B, S, H, D]
        return self.out_proj(out.flatten(2)), None


def repair(model: PreTrainedModel) -> None:
    """Make the attention layers of an MPT model `PackedMptAttention`."""
    config: Any = model.config
    # the bias of the last of two keys less that of the first, whose distance is 1
    table = build_mpt_alibi_tensor(config.n_heads, 2)  # [H, 1, 2]
    slopes = (table[:, 0, 1] - table[:, 0, 0]).float()
    replace_attention(model, MptAttention, PackedMptAttention, config=config, alibi_slopes=slopes)
