"""GLM (glm-10b, glm-2b, glm-large-chinese, ...): blank infilling with two learned position axes.

A row is a context with one mask token, then <|startofpiece|> and what fills the blank. The context is seen
by all, the rest is causal; axis 0 of the positions is the place in the context (in the rest: the place of
the mask token), axis 1 counts the rest from 1 (context: 0). Parameter names, config fields and the
conventions of `forward` are those of THUDM/glm-10b (model_type "glm", which is also GLM-4's in
transformers: `register.py` tells them apart). Inside a stage the attention seam knows documents and
contexts; in a plain call `glm_generation.py` makes the mask. Tokenizers are in `tokenization_glm.py`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import Cache, DynamicCache, PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils.generic import can_return_tuple, merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from luthier.batch import IGNORE, current_layout
from luthier.errors import Refused
from luthier.models.zoo.configuration_glm import GLMConfig
from luthier.models.zoo.eager import eager_attention
from luthier.models.zoo.glm_generation import GLMGenerationMixin, check_range, visible

EPSILON = 1e-5  # of the layer norms; fixed in the original


class SelfAttention(nn.Module):
    """Heads from one projection laid out as all queries, all keys, all values ([3, N, d])."""

    def __init__(self, config: GLMConfig, layer_idx: int) -> None:
        super().__init__()
        self.config, self.layer_idx = config, layer_idx
        self.head_dim = config.hidden_size // config.num_attention_heads
        self.scaling = self.head_dim**-0.5
        self.attention_dropout = config.attention_dropout_prob
        self.is_causal = True  # where no mask says otherwise
        self.query_key_value = nn.Linear(config.hidden_size, 3 * config.hidden_size)
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)
        self.output_dropout = nn.Dropout(config.output_dropout_prob)

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        past_key_values: Cache | None = None,
        **extra: Any,
    ) -> tuple[Tensor, Tensor | None]:
        # [B, S, 3H] -> three times [B, N, S, d]
        query, key, value = (
            part.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
            for part in self.query_key_value(hidden_states).chunk(3, dim=-1)
        )
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, self.layer_idx)
        attend: Callable[..., tuple[Tensor, Tensor | None]] = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation or "eager", eager_attention
        )
        context, weights = attend(
            self,
            query,
            key,
            value,
            attention_mask,
            dropout=self.attention_dropout if self.training else 0.0,
            scaling=self.scaling,
            **extra,
        )
        return self.output_dropout(self.dense(context.flatten(2))), weights


class MLP(nn.Module):
    """No gate; the released code has the exact GELU (the training code the tanh form: 1e-3 in the logits)."""

    def __init__(self, config: GLMConfig) -> None:
        super().__init__()
        self.dense_h_to_4h = nn.Linear(config.hidden_size, 4 * config.hidden_size)
        self.dense_4h_to_h = nn.Linear(4 * config.hidden_size, config.hidden_size)
        self.dropout = nn.Dropout(config.output_dropout_prob)

    def forward(self, x: Tensor) -> Tensor:
        return self.dropout(self.dense_4h_to_h(F.gelu(self.dense_h_to_4h(x))))


class GLMBlock(GradientCheckpointingLayer):
    """Pre-norm: h = x + Attn(LN(x)); h + MLP(LN'(h))."""

    def __init__(self, config: GLMConfig, layer_idx: int) -> None:
        super().__init__()
        self.input_layernorm = nn.LayerNorm(config.hidden_size, eps=EPSILON)
        self.attention = SelfAttention(config, layer_idx)
        self.post_attention_layernorm = nn.LayerNorm(config.hidden_size, eps=EPSILON)
        self.mlp = MLP(config)

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        past_key_values: Cache | None = None,
        **extra: Any,
    ) -> Tensor:
        attended, _ = self.attention(
            self.input_layernorm(hidden_states),
            attention_mask=attention_mask,
            past_key_values=past_key_values,
            **extra,
        )
        hidden_states = hidden_states + attended
        return hidden_states + self.mlp(self.post_attention_layernorm(hidden_states))


class GLMStack(nn.Module):
    """Position tables (one row more than max_sequence_length), layers and final norm."""

    def __init__(self, config: GLMConfig) -> None:
        super().__init__()
        rows = config.max_sequence_length + 1
        self.embedding_dropout = nn.Dropout(config.embedding_dropout_prob)
        self.position_embeddings = nn.Embedding(rows, config.hidden_size)
        self.block_position_embeddings = nn.Embedding(rows, config.hidden_size)
        self.layers = nn.ModuleList(GLMBlock(config, i) for i in range(config.num_layers))
        self.final_layernorm = nn.LayerNorm(config.hidden_size, eps=EPSILON)


class GLMPreTrainedModel(PreTrainedModel):
    config_class = GLMConfig
    config: GLMConfig
    base_model_prefix = "glm"
    supports_gradient_checkpointing = True
    _no_split_modules = ["GLMBlock"]  # noqa: RUF012
    _skip_keys_device_placement = ["past_key_values"]  # noqa: RUF012
    _supports_sdpa = True
    _supports_attention_backend = True
    _can_record_outputs = {  # noqa: RUF012
        "hidden_states": GLMBlock,
        "attentions": SelfAttention,
    }

    @staticmethod
    def real_tokens(attention_mask: Tensor) -> Tensor:
        """[B, T], 1 = real, of a mask [B, 1, S, T]: the last token sees all that is real."""
        return (attention_mask[:, 0, -1] != 0).long()


class GLMModel(GLMPreTrainedModel):
    """Embedding and stack: hidden states after the final norm. Logits are `GLMForConditionalGeneration`'s."""

    def __init__(self, config: GLMConfig) -> None:
        super().__init__(config)
        self.word_embeddings = nn.Embedding(config.vocab_size, config.hidden_size)
        self.transformer = GLMStack(config)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.word_embeddings

    def set_input_embeddings(self, value: Any) -> None:
        self.word_embeddings = value

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        **extra: Any,
    ) -> BaseModelOutputWithPast:
        """input_ids [B, S], or `inputs_embeds` [B, S, H] before positions are added -> hidden [B, S, H].

        `position_ids` [B, 2, S]; [B, S] is axis 0 with axis 1 = 0; without them 0, 1, 2, ... and 0. For
        `attention_mask` see `visible`; a layout takes its place. Refused: positions beyond the tables.
        """
        x = self.word_embeddings(input_ids) if inputs_embeds is None else inputs_embeds
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        length = x.shape[1]
        past = 0 if past_key_values is None else past_key_values.get_seq_length()
        if position_ids is None:
            position_ids = torch.arange(past, past + length, device=x.device)[None]
        if position_ids.ndim == 2:
            position_ids = torch.stack([position_ids, torch.zeros_like(position_ids)], dim=1)
        # looked at only where a row is long enough to leave the tables: it waits for the device
        if past + length > self.config.max_sequence_length:
            check_range(position_ids, self.config.max_sequence_length)
        stack = self.transformer
        x = x + stack.position_embeddings(position_ids[:, 0])  # [B, S, H]
        x = stack.embedding_dropout(x + stack.block_position_embeddings(position_ids[:, 1]))
        bias = None
        if current_layout() is None:
            seen = visible(attention_mask, length, past, x.device)
            if seen is not None:
                bias = torch.zeros(seen.shape, dtype=x.dtype, device=x.device)
                bias = bias.masked_fill(~seen, torch.finfo(x.dtype).min)
        for layer in stack.layers:
            x = layer(x, attention_mask=bias, past_key_values=past_key_values, **extra)
        return BaseModelOutputWithPast(
            last_hidden_state=stack.final_layernorm(x), past_key_values=past_key_values
        )


class GLMForConditionalGeneration(GLMPreTrainedModel, GLMGenerationMixin):
    """GLM with its logits, which come from the embedding: `lm_head` is tied and never in a file."""

    _tied_weights_keys = {"lm_head.weight": "glm.word_embeddings.weight"}  # noqa: RUF012

    def __init__(self, config: GLMConfig) -> None:
        super().__init__(config)
        self.glm = GLMModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        mems: Any = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        **extra: Any,
    ) -> CausalLMOutputWithPast:
        """As `GLMModel.forward`, with logits [B, S, V].

        `labels` [B, S] are aligned: labels[i] is what input i predicts. The loss is not shifted; it is the
        mean cross entropy over labels other than -100. Refused: the original's `mems`.
        """
        if mems is not None:
            raise Refused(
                "a forward of GLM with mems",
                "this class keeps keys and values instead of hidden states",
                "pass past_key_values, which use_cache=True returns",
            )
        out = self.glm(
            input_ids=input_ids,
            position_ids=position_ids,
            attention_mask=attention_mask,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **extra,
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(out.last_hidden_state[:, kept])
        loss = None
        if labels is not None:
            flat = logits.flatten(0, 1).float()
            loss = F.cross_entropy(flat, labels.flatten(), ignore_index=IGNORE)
        return CausalLMOutputWithPast(
            loss=cast(Any, loss),
            logits=logits,
            past_key_values=out.past_key_values,
            hidden_states=out.hidden_states,
            attentions=out.attentions,
        )
