"""ChatGLM-6B (v1): a decoder that reads its context in both directions, then writes after <sop>.

Rows hold context (with one [gMASK] or [MASK]), <sop>, answer, <eop>. Positions have two axes: where in
the context, and how far behind it (0 = context). Parameter names, config fields and the conventions of `forward`
are those of THUDM/chatglm-6b. Inside a stage the attention seam knows documents and contexts; in a plain call
the mask is made here. `register.py` tells the Auto classes; the tokenizer is in `tokenization_chatglm.py`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import Cache, DynamicCache, GenerationMixin, PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils.generic import can_return_tuple, merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from luthier.batch import current_layout
from luthier.errors import Refused
from luthier.models.zoo.configuration_chatglm import ChatGLMConfig as ChatGLMConfig
from luthier.models.zoo.configuration_chatglm import is_chatglm_v1 as is_chatglm_v1
from luthier.models.zoo.configuration_chatglm import refuse_length, refuse_weights

# the released code fixes 28 layers here, whatever the config says
ALPHA = math.sqrt(2 * 28)


# ---- positions and the mask


def position_ids_of(input_ids: Tensor, config: Any, real: Tensor | None = None) -> Tensor:
    """Positions of rows of ids: [B, S] -> [B, 2, S]. A mask `real` of more axes says nothing of padding.

    Axis 0 counts the context, then stays at its first [gMASK] (without one: [MASK]). Axis 1 is 0 in the
    context and 1, 2, ... from <sop> on. `real` [B, S] is 0 on padding: counting starts behind left padding.
    Refused: a row without <sop> or without a mask token.
    """
    index = torch.arange(input_ids.shape[1], device=input_ids.device)

    def first(token: int) -> tuple[Tensor, Tensor]:
        """Where `token` first stands, and whether it does: both [B, 1]."""
        hit = input_ids == token
        return hit.int().argmax(1, keepdim=True), hit.any(1, keepdim=True)

    start, started = first(config.bos_token_id)
    gmask, has_gmask = first(config.gmask_token_id)
    mask, has_mask = first(config.mask_token_id)
    _require(started, f"<sop> (bos_token_id={config.bos_token_id})")
    _require(
        has_gmask | has_mask,
        f"[gMASK] or [MASK] (gmask_token_id={config.gmask_token_id}, mask_token_id={config.mask_token_id})",
    )
    padding = 0 if real is None or real.ndim > 2 else real.int().argmax(1, keepdim=True)  # [B, 1]
    where = torch.where(has_gmask, gmask, mask) - padding
    context = (index - padding).clamp(min=0)
    return torch.stack(
        [torch.where(index < start, context, where), (index - start + 1).clamp(min=0)], dim=1
    )


def _require(found: Tensor, what: str) -> None:
    if not bool(found.all()):
        row = int(found.flatten().int().argmin())
        raise Refused(
            "ChatGLM-6B reads rows of context, [gMASK], <sop>, answer",
            f"row {row} has no {what}",
            "make rows with the checkpoint's own tokenizer, or give position_ids [B, 2, S]",
        )


def context_of(position_ids: Tensor) -> Tensor:
    """[B, 2, S] -> [B, S]: True on context, which every later token and the context itself sees."""
    return position_ids[:, 1] == 0


def visible(position_ids: Tensor, past: int, real: Tensor | None) -> Tensor:
    """What each query sees: position_ids [B, 2, S], `past` cached keys, real [B, T] -> bool [B, 1, S, T]."""
    size = position_ids.shape[2]
    keys = torch.arange(past + size, device=position_ids.device)
    causal = keys <= keys[past:, None]  # [S, T]
    context = F.pad(context_of(position_ids), (past, 0))  # the past is seen anyway
    seen = causal | context[:, None]  # [B, S, T]
    if real is not None:
        seen = seen & real[:, None].bool()
    return seen[:, None]


# ---- layers


def frequencies(dim: int, device: torch.device) -> Tensor:
    """[dim / 2]: 10000^(-2j / dim), rounded to float16 as the original's are."""
    exponent = torch.arange(0, dim, 2, device=device).float() / dim
    return (1.0 / 10000**exponent).half().float()


def rotary_table(position_ids: Tensor, head_dim: int) -> tuple[Tensor, Tensor]:
    """cos and sin, float32: position_ids [B, 2, S] -> [B, 1, S, 2, head_dim / 2], one half of a head per axis."""
    table = frequencies(head_dim // 2, position_ids.device)
    angles = position_ids.transpose(1, 2)[..., None].float() * table  # [B, S, 2, head_dim / 4]
    angles = torch.cat([angles, angles], dim=-1)[:, None]
    return angles.cos(), angles.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn each half of the heads [B, n, S, d] by its own axis."""
    halves = x.unflatten(-1, (2, -1))  # [B, n, S, 2, d / 2]
    first, second = halves.chunk(2, dim=-1)
    turned = torch.cat([-second, first], dim=-1)
    return (halves * cos + turned * sin).flatten(-2)


def split_heads(mixed: Tensor, head_dim: int) -> tuple[Tensor, Tensor, Tensor]:
    """[B, S, 3H], for each head its query, key and value -> three of [B, n, S, d]."""
    heads = mixed.unflatten(-1, (-1, 3, head_dim)).transpose(1, 2)  # [B, n, S, 3, d]
    query, key, value = heads.unbind(-2)
    return query, key, value


def eager_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    **kwargs: Any,
) -> tuple[Tensor, Tensor]:
    """Plain products: query [B, n, S, d], a bool mask with True = visible -> [B, S, n, d], weights.

    The original divides queries by the layer's number and multiplies scores back, lest float16 overflows;
    float32 products need no such guard.
    """
    scores = query.float() @ key.float().transpose(-1, -2) * scaling  # [B, n, S, T]
    if attention_mask is not None:
        scores = scores.masked_fill(~attention_mask, torch.finfo(scores.dtype).min)
    weights = scores.softmax(-1).to(value.dtype)
    return (weights @ value).transpose(1, 2).contiguous(), weights


class ChatGLMAttention(nn.Module):
    def __init__(self, config: ChatGLMConfig, layer_idx: int) -> None:
        super().__init__()
        self.config, self.layer_idx = config, layer_idx
        self.head_dim = config.hidden_size // config.num_attention_heads
        self.num_key_value_groups = 1
        self.scaling = self.head_dim**-0.5
        self.is_causal = True  # behind the context
        self.query_key_value = nn.Linear(config.hidden_size, 3 * config.hidden_size)
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(
        self,
        hidden_states: Tensor,  # [B, S, H]
        position_embeddings: tuple[Tensor, Tensor],
        attention_mask: Tensor | None = None,
        past_key_values: Cache | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        query, key, value = split_heads(self.query_key_value(hidden_states), self.head_dim)
        cos, sin = (part.to(query.dtype) for part in position_embeddings)
        query, key = rotate(query, cos, sin), rotate(key, cos, sin)
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, self.layer_idx)
        attend: Callable[..., Any] = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation or "eager", eager_attention
        )
        out, weights = attend(
            self, query, key, value, attention_mask, dropout=0.0, scaling=self.scaling, **kwargs
        )
        return self.dense(out.flatten(-2)), weights


class ChatGLMMLP(nn.Module):
    def __init__(self, config: ChatGLMConfig) -> None:
        super().__init__()
        self.dense_h_to_4h = nn.Linear(config.hidden_size, config.inner_hidden_size)
        self.dense_4h_to_h = nn.Linear(config.inner_hidden_size, config.hidden_size)

    def forward(self, hidden_states: Tensor) -> Tensor:
        return self.dense_4h_to_h(F.gelu(self.dense_h_to_4h(hidden_states), approximate="tanh"))


class ChatGLMBlock(GradientCheckpointingLayer):
    def __init__(self, config: ChatGLMConfig, layer_idx: int) -> None:
        super().__init__()
        self.input_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layernorm_epsilon)
        self.attention = ChatGLMAttention(config, layer_idx)
        self.post_attention_layernorm = nn.LayerNorm(
            config.hidden_size, eps=config.layernorm_epsilon
        )
        self.mlp = ChatGLMMLP(config)

    def forward(self, hidden_states: Tensor, **kwargs: Any) -> Tensor:
        """[B, S, H] -> [B, S, H]. The residuals are the normed inputs, scaled."""
        normed = self.input_layernorm(hidden_states)
        hidden_states = residual(normed, self.attention(normed, **kwargs)[0])
        normed = self.post_attention_layernorm(hidden_states)
        return residual(normed, self.mlp(normed))


def residual(normed: Tensor, out: Tensor) -> Tensor:
    return ALPHA * normed + out


class ChatGLMPreTrainedModel(PreTrainedModel):
    config_class = ChatGLMConfig
    base_model_prefix = "transformer"
    supports_gradient_checkpointing = True
    _no_split_modules: ClassVar = ["ChatGLMBlock"]
    _skip_keys_device_placement: ClassVar = ["past_key_values"]
    _supports_sdpa = True
    _supports_attention_backend = True
    _can_record_outputs: ClassVar = {"hidden_states": ChatGLMBlock, "attentions": ChatGLMAttention}
    # released files hold the frequencies, which are computed here
    _keys_to_ignore_on_load_unexpected: ClassVar = [r"rotary_emb\.inv_freq$"]

    @staticmethod
    def real_tokens(attention_mask: Tensor) -> Tensor:
        """[B, T], 1 = real, of a mask [B, 1, S, T] with True = hidden: the last token sees all that is real."""
        return (~attention_mask[:, 0, -1].bool()).long()

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Any:
        refuse_weights(pretrained_model_name_or_path, "ChatGLM-6B", "transformer.layers.")
        return super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs)


class ChatGLMModel(ChatGLMPreTrainedModel):
    def __init__(self, config: ChatGLMConfig) -> None:
        super().__init__(config)
        self.word_embeddings = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(ChatGLMBlock(config, i) for i in range(config.num_layers))
        self.final_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layernorm_epsilon)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.word_embeddings

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.word_embeddings = value

    def positions_of(self, input_ids: Tensor | None, attention_mask: Tensor | None) -> Tensor:
        """Positions [B, 2, S] where none are given."""
        if input_ids is None:
            raise ValueError("inputs_embeds need position_ids [B, 2, S]")
        return position_ids_of(input_ids, self.config, attention_mask)

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
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """Hidden states [B, S, H] after the final norm; arguments as in `ChatGLMForCausalLM.forward`."""
        inputs_embeds = self.word_embeddings(input_ids) if inputs_embeds is None else inputs_embeds
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        past = past_key_values.get_seq_length() if past_key_values is not None else 0
        real = attention_mask if attention_mask is not None and attention_mask.ndim == 2 else None
        if position_ids is None:
            position_ids = self.positions_of(input_ids, attention_mask)
        if position_ids.ndim != 3 or position_ids.shape[1] != 2:
            raise Refused(
                "ChatGLM-6B has positions with two axes",
                f"position_ids have the shape {tuple(position_ids.shape)}",
                "give position_ids [B, 2, S]",
            )
        mask = None  # inside a stage the seam knows documents and contexts
        if current_layout() is None:
            refuse_length("ChatGLM-6B", past + position_ids.shape[2], self.config)
            if attention_mask is not None and real is None:
                mask = ~attention_mask.bool()  # [B, 1, S, T], the original's True is hidden
            else:
                mask = visible(position_ids, past, real)
        table = rotary_table(
            position_ids, self.config.hidden_size // self.config.num_attention_heads
        )
        hidden_states = inputs_embeds
        for layer in self.layers:
            hidden_states = layer(
                hidden_states,
                position_embeddings=table,
                attention_mask=mask,
                past_key_values=past_key_values,
                position_ids=position_ids,
                **kwargs,
            )
        return BaseModelOutputWithPast(
            last_hidden_state=self.final_layernorm(hidden_states), past_key_values=past_key_values
        )


class ChatGLMForCausalLM(ChatGLMPreTrainedModel, GenerationMixin):
    _tied_weights_keys: ClassVar = {"lm_head.weight": "transformer.word_embeddings.weight"}

    def __init__(self, config: ChatGLMConfig) -> None:
        super().__init__(config)
        self.transformer = ChatGLMModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

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
        logits_to_keep: int | Tensor = 0,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Logits [B, S, V] and the shifted loss, the mean over labels that are not -100.

        `attention_mask`: bool [B, 1, S, T] with True = hidden, as the original's; or [B, T] with 1 = real.
        `position_ids` [B, 2, S]. Both follow from `input_ids` when not given, as in the original.
        Refused: rows without <sop> or mask token, and rows longer than the positions.
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
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(out.last_hidden_state[:, kept])
        loss = None
        if labels is not None:
            loss = self.loss_function(logits, labels, vocab_size=self.config.vocab_size, **kwargs)
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=out.past_key_values,
            hidden_states=out.hidden_states,
            attentions=out.attentions,
        )

    def generate(self, *args: Any, attention_mask: Tensor | None = None, **kwargs: Any) -> Any:
        """As transformers'; the mask [B, S] with 1 = real, or the original tokenizer's [B, 1, S, S].

        Refused: a four-dimensional mask that is more than padding, context and causal order.
        """
        if attention_mask is not None and attention_mask.ndim == 4:
            hidden = attention_mask[:, 0].bool()  # [B, S, S]
            attention_mask = self.real_tokens(attention_mask)
            positions = kwargs.get("position_ids")
            if positions is None:
                ids: Any = args[0] if args else kwargs.get("input_ids", kwargs.get("inputs"))
                positions = position_ids_of(ids, self.config, attention_mask)
            rows = attention_mask.bool()
            if not torch.equal(visible(positions, 0, attention_mask)[:, 0][rows], ~hidden[rows]):
                raise Refused(
                    "generation with an attention_mask [B, 1, S, S] was asked for",
                    "it is not the one of its rows' context and padding",
                    "give attention_mask [B, S] with 1 = real, or none",
                )
        plain: Any = super()
        return plain.generate(*args, attention_mask=attention_mask, **kwargs)

    def _prepare_position_ids_for_generation(
        self, inputs_tensor: Tensor, model_kwargs: dict[str, Any]
    ) -> Tensor:
        ids = model_kwargs.get("input_ids", inputs_tensor)
        return position_ids_of(ids, self.config, model_kwargs.get("attention_mask"))

    def _update_model_kwargs_for_generation(
        self,
        outputs: Any,
        model_kwargs: dict[str, Any],
        is_encoder_decoder: bool = False,
        num_new_tokens: int = 1,
    ) -> dict[str, Any]:
        """New tokens stay at the mask token's place on axis 0 and count on along axis 1."""
        positions = model_kwargs.pop("position_ids")  # [B, 2, T]
        grown = super()._update_model_kwargs_for_generation(
            outputs, model_kwargs, is_encoder_decoder, num_new_tokens
        )
        step = torch.arange(1, num_new_tokens + 1, device=positions.device)
        steps = torch.stack([torch.zeros_like(step), step])  # [2, new]
        grown["position_ids"] = torch.cat([positions, positions[..., -1:] + steps], dim=-1)
        return grown
