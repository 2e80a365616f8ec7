"""BLOOM attends through the seam: its attention is the one that transformers never gave to the interface.

`repair` is called by `attention.install` on one model. Its attention layers become a subclass that calls
the registered function, with the slopes of ALiBi; everything else of the family stays as it is. With
`set_attn_implementation("eager")` the layers compute as the family's own.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import AttentionInterface, PreTrainedModel
from transformers.models.bloom.modeling_bloom import BloomAttention

from luthier.errors import Refused
from luthier.models.replacing import replace_attention


class PackedBloomAttention(BloomAttention):
    """BLOOM's attention layer; queries, keys and values go to the registered attention function."""

    is_causal = True
    config: Any  # the model's
    alibi_slopes: Tensor  # [H] float32, one tensor for all layers

    def forward(
        self,
        hidden_states: Tensor,
        residual: Tensor,
        alibi: Tensor,
        attention_mask: Tensor | None,
        layer_past: Any = None,
        use_cache: bool = False,
        output_attentions: bool = False,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """x [B, S, D] and the residual; `alibi` [B*H, 1, T] is the model's bias of the keys."""
        name = self.config._attn_implementation
        if name == "eager":
            return super().forward(
                hidden_states,
                residual,
                alibi,
                attention_mask,  # pyright: ignore[reportArgumentType]
                layer_past,
                use_cache,
                output_attentions,
            )
        query, key, value = self._reshape(self.query_key_value(hidden_states))  # [B, H, S, D]
        if layer_past is not None:
            key, value = layer_past.update(key, value, self.layer_idx)
        out, _ = AttentionInterface()[name](
            self,
            query,
            key,
            value,
            attention_mask,
            dropout=self.attention_dropout.p if self.training else 0.0,
            scaling=self.inv_norm_factor,
            alibi_slopes=self.alibi_slopes,
            alibi=self._of_heads(alibi.unflatten(0, (len(query), -1))),
        )  # [B, S, H, D]
        out = F.dropout(self.dense(out.flatten(2)), self.hidden_dropout, self.training)
        return residual + out, None

    def _of_heads(self, alibi: Tensor) -> Tensor:
        """The bias of the heads that are here, of all heads' [B, H, 1, T]."""
        here = getattr(self, "heads_here", None)
        return alibi if here is None else here.of(alibi)


def repair(model: PreTrainedModel) -> None:
    """Make the attention layers of a BLOOM model `PackedBloomAttention`.

    Refused: the sliced products of `slow_but_exact`, which go past the linear layers (and their adapters).
    """
    config: Any = model.config
    if config.slow_but_exact and config.pretraining_tp > 1:
        raise Refused(
            "a BLOOM model was asked for",
            "its config.json says slow_but_exact=true, by which layers are computed in slices",
            "set slow_but_exact to false there; only the order of sums changes",
        )
    base: Any = model.base_model
    # the bias of key 1, whose distance from key 0 is 1; as the family computes it, for any number of heads
    slopes = base.build_alibi_tensor(torch.ones(1, 2), config.n_head, torch.float32)[:, 0, 1]
    replace_attention(
        model, BloomAttention, PackedBloomAttention, config=config, alibi_slopes=slopes
    )
