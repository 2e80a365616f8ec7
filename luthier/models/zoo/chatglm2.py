"""ChatGLM2-6B and ChatGLM3-6B, which are one network: a causal decoder with grouped keys and values.

Half of each head is rotated, in interleaved pairs. Parameter names, config fields and the conventions of
`forward` are those of THUDM/chatglm2-6b (config model_type "chatglm"). Masks are transformers' own, which
inside a stage are none: the attention seam knows the documents. The config and what is refused are in
`configuration_chatglm.py`, the tokenizer in `tokenization_chatglm2.py`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import Cache, DynamicCache, GenerationMixin, PreTrainedModel
from transformers.masking_utils import create_causal_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils.generic import can_return_tuple, merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from luthier.batch import current_layout
from luthier.models.zoo import eager
from luthier.models.zoo.configuration_chatglm import ChatGLM2Config as ChatGLM2Config
from luthier.models.zoo.configuration_chatglm import refuse_length, refuse_weights


class ChatGLM2RMSNorm(nn.Module):
    """Float32 throughout, weight included; rounded to the input's type at the very end."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        scale = torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        return (self.weight * (wide * scale)).to(x.dtype)


def rotary_table(position_ids: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """cos and sin, float32, of `dim` rotated numbers: position_ids [B, S] -> [B, 1, S, dim / 2]."""
    exponent = torch.arange(0, dim, 2, device=position_ids.device).float() / dim
    angles = position_ids[:, None, :, None].float() / 10000**exponent
    return angles.cos(), angles.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn the pairs (0, 1), (2, 3), ... of the first numbers of the heads [B, n, S, d]; the rest stays."""
    dim = 2 * cos.shape[-1]
    even, odd = x[..., :dim].unflatten(-1, (-1, 2)).unbind(-1)
    turned = torch.stack([even * cos - odd * sin, odd * cos + even * sin], dim=-1).flatten(-2)
    return torch.cat([turned, x[..., dim:]], dim=-1)


def gated(both: Tensor) -> Tensor:
    """[B, S, 2F], gate before value -> [B, S, F]."""
    gate, value = both.chunk(2, dim=-1)
    return F.silu(gate) * value


def of_group(x: Tensor, groups: int) -> Tensor:
    """Keys or values [B, g, T, d], each repeated for the neighbouring heads that share it -> [B, n, T, d]."""
    return x.repeat_interleave(groups, dim=1)


def eager_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any
) -> tuple[Tensor, Tensor]:
    """Plain products: query [B, n, S, d], key and value [B, g, T, d] -> [B, S, n, d] and the weights."""
    repeat = query.shape[1] // key.shape[1]
    return eager.eager_attention(
        module, query, of_group(key, repeat), of_group(value, repeat), *args, **kwargs
    )


class ChatGLM2Attention(nn.Module):
    def __init__(self, config: ChatGLM2Config, layer_idx: int) -> None:
        super().__init__()
        self.config, self.layer_idx = config, layer_idx
        self.head_dim = config.kv_channels
        self.num_key_value_groups = config.num_attention_heads // config.multi_query_group_num
        self.scaling = self.head_dim**-0.5
        self.attention_dropout = config.attention_dropout
        self.is_causal = True
        heads = config.num_attention_heads * self.head_dim
        groups = config.multi_query_group_num * self.head_dim
        self.sizes = [heads, groups, groups]  # rows of the fused layer: queries, keys, values
        self.query_key_value = nn.Linear(
            config.hidden_size, sum(self.sizes), bias=config.add_bias_linear or config.add_qkv_bias
        )
        self.dense = nn.Linear(heads, config.hidden_size, bias=config.add_bias_linear)

    def forward(
        self,
        hidden_states: Tensor,  # [B, S, H]
        position_embeddings: tuple[Tensor, Tensor],
        attention_mask: Tensor | None = None,
        past_key_values: Cache | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        parts = self.query_key_value(hidden_states).split(self.sizes, dim=-1)
        query, key, value = (
            part.unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for part in parts
        )  # [B, n, S, d] and twice [B, g, S, d]
        cos, sin = (part.to(query.dtype) for part in position_embeddings)
        query, key = rotate(query, cos, sin), rotate(key, cos, sin)
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, self.layer_idx)
        attend: Callable[..., Any] = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation or "eager", eager_attention
        )
        out, weights = attend(
            self,
            query,
            key,
            value,
            attention_mask,
            dropout=self.attention_dropout if self.training else 0.0,
            scaling=self.scaling,
            **kwargs,
        )
        return self.dense(out.flatten(-2)), weights


class ChatGLM2MLP(nn.Module):
    def __init__(self, config: ChatGLM2Config) -> None:
        super().__init__()
        size, inner, bias = config.hidden_size, config.ffn_hidden_size, config.add_bias_linear
        self.dense_h_to_4h = nn.Linear(size, 2 * inner, bias=bias)
        self.dense_4h_to_h = nn.Linear(inner, size, bias=bias)

    def forward(self, hidden_states: Tensor) -> Tensor:
        return self.dense_4h_to_h(gated(self.dense_h_to_4h(hidden_states)))


class ChatGLM2Block(GradientCheckpointingLayer):
    def __init__(self, config: ChatGLM2Config, layer_idx: int) -> None:
        super().__init__()
        eps = config.layernorm_epsilon
        self.input_layernorm = ChatGLM2RMSNorm(config.hidden_size, eps)
        self.self_attention = ChatGLM2Attention(config, layer_idx)
        self.post_attention_layernorm = ChatGLM2RMSNorm(config.hidden_size, eps)
        self.mlp = ChatGLM2MLP(config)
        # two, since seeded dropout drops the same units wherever the same module is called
        self.attention_dropout = nn.Dropout(config.hidden_dropout)
        self.mlp_dropout = nn.Dropout(config.hidden_dropout)

    def forward(self, hidden_states: Tensor, **kwargs: Any) -> Tensor:
        """[B, S, H] -> [B, S, H]."""
        out, _ = self.self_attention(self.input_layernorm(hidden_states), **kwargs)
        hidden_states = hidden_states + self.attention_dropout(out)
        out = self.mlp(self.post_attention_layernorm(hidden_states))
        return hidden_states + self.mlp_dropout(out)


class ChatGLM2Embedding(nn.Module):
    def __init__(self, config: ChatGLM2Config) -> None:
        super().__init__()
        self.word_embeddings = nn.Embedding(config.padded_vocab_size, config.hidden_size)

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.word_embeddings(input_ids)


class ChatGLM2Encoder(nn.Module):
    """The layers and the final norm, under the names of the original."""

    def __init__(self, config: ChatGLM2Config) -> None:
        super().__init__()
        self.layers = nn.ModuleList(ChatGLM2Block(config, i) for i in range(config.num_layers))
        self.final_layernorm = ChatGLM2RMSNorm(config.hidden_size, config.layernorm_epsilon)

    def forward(self, hidden_states: Tensor, **kwargs: Any) -> Tensor:
        for layer in self.layers:
            hidden_states = layer(hidden_states, **kwargs)
        return self.final_layernorm(hidden_states)


class ChatGLM2PreTrainedModel(PreTrainedModel):
    config_class = ChatGLM2Config
    base_model_prefix = "transformer"
    supports_gradient_checkpointing = True
    _no_split_modules: ClassVar = ["ChatGLM2Block"]
    _skip_keys_device_placement: ClassVar = ["past_key_values"]
    _supports_sdpa = True
    _supports_attention_backend = True
    _can_record_outputs: ClassVar = {
        "hidden_states": ChatGLM2Block,
        "attentions": ChatGLM2Attention,
    }
    # released files hold the frequencies, which are computed here
    _keys_to_ignore_on_load_unexpected: ClassVar = [r"rotary_pos_emb\.inv_freq$"]

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Any:
        refuse_weights(pretrained_model_name_or_path, "ChatGLM2", "transformer.encoder.")
        return super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs)


class ChatGLM2Model(ChatGLM2PreTrainedModel):
    """The output layer is in here, as in released files, but only `ChatGLM2ForCausalLM` applies it."""

    def __init__(self, config: ChatGLM2Config) -> None:
        super().__init__(config)
        self.embedding = ChatGLM2Embedding(config)
        self.encoder = ChatGLM2Encoder(config)
        self.output_layer = nn.Linear(config.hidden_size, config.padded_vocab_size, bias=False)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.embedding.word_embeddings

    def set_input_embeddings(self, value: nn.Embedding) -> None:
        self.embedding.word_embeddings = value

    @merge_with_config_defaults
    @capture_outputs(tie_last_hidden_states=False)  # the original's last one is before the norm
    def forward(
        self,
        input_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """Hidden states [B, S, H] after the final norm; arguments as in `ChatGLM2ForCausalLM.forward`."""
        hidden_states = self.embedding(input_ids) if inputs_embeds is None else inputs_embeds
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        past = past_key_values.get_seq_length() if past_key_values is not None else 0
        size = hidden_states.shape[1]
        if current_layout() is None:
            refuse_length("ChatGLM2", past + size, self.config)
        if position_ids is None:
            position_ids = torch.arange(past, past + size, device=hidden_states.device)[None]
        mask = create_causal_mask(
            config=self.config,
            inputs_embeds=hidden_states,
            attention_mask=attention_mask,
            past_key_values=past_key_values,
            position_ids=position_ids,
        )
        hidden_states = self.encoder(
            hidden_states,
            position_embeddings=rotary_table(position_ids, self.config.kv_channels // 2),
            attention_mask=mask,
            past_key_values=past_key_values,
            position_ids=position_ids,
            **kwargs,
        )
        return BaseModelOutputWithPast(
            last_hidden_state=hidden_states, past_key_values=past_key_values
        )


class ChatGLM2ForCausalLM(ChatGLM2PreTrainedModel, GenerationMixin):
    def __init__(self, config: ChatGLM2Config) -> None:
        super().__init__(config)
        self.transformer = ChatGLM2Model(config)
        self.post_init()

    def get_output_embeddings(self) -> nn.Module:
        return self.transformer.output_layer

    def set_output_embeddings(self, new_embeddings: nn.Linear) -> None:
        self.transformer.output_layer = new_embeddings

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        return_last_logit: bool = False,
        logits_to_keep: int | Tensor = 0,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Logits [B, S, V] and the shifted loss, the mean over labels that are not -100.

        `attention_mask` [B, T] with 1 = real; `position_ids` [B, S], by default 0, 1, ... Refused: rows
        longer than `seq_length`.
        """
        out = self.transformer(
            input_ids=input_ids,
            position_ids=position_ids,
            attention_mask=attention_mask,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )
        if return_last_logit:  # the original's name for it
            logits_to_keep = 1
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.transformer.output_layer(out.last_hidden_state[:, kept])
        loss = None
        if labels is not None:
            size = self.config.padded_vocab_size
            loss = self.loss_function(logits, labels, vocab_size=size, **kwargs)
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=out.past_key_values,
            hidden_states=out.hidden_states,
            attentions=out.attentions,
        )
