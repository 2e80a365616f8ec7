"""Qwen v1 (Qwen-1.8B, 7B, 14B, 72B): rotary decoder with a fused c_attn, stretched in evaluation.

Beyond `seq_length`, and only in evaluation, the original widens its rotary base (dynamic NTK) and scales
queries by the logarithm of their place (logn). Parameter names, config fields and the conventions of
`forward` are those of Qwen/Qwen-7B (model_type "qwen"); position_ids are accepted and not looked at in a plain
call, as there (but for virtual tokens, which the original has not). Inside a stage places and lengths are those within each document. Registration is in
`register.py`, the tokenizer in `tokenization_qwen.py`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, cast

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

from luthier.batch import IGNORE, Layout, current_layout
from luthier.models.zoo.configuration_qwen import QWenConfig
from luthier.models.zoo.eager import eager_attention


class RMSNorm(nn.Module):
    """Normalised in float32 and cast back before the weight."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(size))

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        return (wide * torch.rsqrt(wide.pow(2).mean(-1, True) + self.eps)).type_as(x) * self.weight


def ntk_alpha(length: Tensor, seq_length: int) -> Tensor:
    """Dynamic NTK: 1 up to `seq_length` tokens, 3 up to twice as many, then 7, 15, ... (float64)."""
    doublings = torch.ceil(torch.log2(length.double() / seq_length) + 1)
    return (2**doublings - 1).clamp(min=1)


def rotary(places: Tensor, alpha: Tensor, dim: int, base: float) -> tuple[Tensor, Tensor]:
    """Cosines and sines [B, S, dim], float32, of `places` [B, S] and `alpha` [B, S] (either B may be 1).

    The base grows to base * alpha^(dim / (dim - 2)).
    """
    wide = (base * alpha ** (dim / (dim - 2))).float()
    shares = torch.arange(0, dim, 2, device=places.device).float() / dim
    angles = places[..., None].float() * (1.0 / wide[..., None] ** shares)
    angles = torch.cat([angles, angles], dim=-1)
    return angles.cos(), angles.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the first dims of x [B, N, S, d] in the rotate-half form, in float32."""
    turned, rest = x[..., : cos.shape[-1]].float(), x[..., cos.shape[-1] :]
    low, high = turned.chunk(2, dim=-1)
    half = torch.cat([-high, low], dim=-1)
    return torch.cat([(turned * cos[:, None] + half * sin[:, None]).type_as(x), rest], dim=-1)


class QWenAttention(nn.Module):
    """Heads from one projection laid out as all queries, all keys, all values ([3, N, d])."""

    def __init__(self, config: QWenConfig, layer_idx: int) -> None:
        super().__init__()
        self.config, self.layer_idx = config, layer_idx
        self.head_dim = config.kv_channels
        self.scaling = self.head_dim**-0.5
        self.attention_dropout = config.attn_dropout_prob
        self.is_causal = True
        self.c_attn = nn.Linear(config.hidden_size, 3 * config.hidden_size)
        self.c_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=not config.no_bias)

    def forward(
        self,
        hidden_states: Tensor,
        turns: tuple[Tensor, Tensor],
        logn: Tensor | None,
        attention_mask: Tensor | None = None,
        past_key_values: Cache | None = None,
        **extra: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """`turns` are cosines and sines, `logn` [B, S] the factors of the queries, both for these tokens."""
        # [B, S, 3H] -> three times [B, N, S, d]
        query, key, value = (
            part.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
            for part in self.c_attn(hidden_states).chunk(3, dim=-1)
        )
        query, key = rotate(query, *turns), rotate(key, *turns)
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, self.layer_idx)
        if logn is not None:
            query = query * logn[:, None, :, None].type_as(query)
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
        return self.c_proj(context.flatten(2)), weights


class QWenMLP(nn.Module):
    """w1(x) * silu(w2(x)): the gate is w2."""

    def __init__(self, config: QWenConfig) -> None:
        super().__init__()
        width, bias = config.intermediate_size // 2, not config.no_bias
        self.w1 = nn.Linear(config.hidden_size, width, bias=bias)
        self.w2 = nn.Linear(config.hidden_size, width, bias=bias)
        self.c_proj = nn.Linear(width, config.hidden_size, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.c_proj(self.w1(x) * F.silu(self.w2(x)))


class QWenBlock(GradientCheckpointingLayer):
    """Pre-norm: h = x + Attn(RMS(x)); h + MLP(RMS'(h))."""

    def __init__(self, config: QWenConfig, layer_idx: int) -> None:
        super().__init__()
        self.ln_1 = RMSNorm(config.hidden_size, config.layer_norm_epsilon)
        self.attn = QWenAttention(config, layer_idx)
        self.ln_2 = RMSNorm(config.hidden_size, config.layer_norm_epsilon)
        self.mlp = QWenMLP(config)

    def forward(self, hidden_states: Tensor, **inputs: Any) -> Tensor:
        attended, _ = self.attn(self.ln_1(hidden_states), **inputs)
        hidden_states = hidden_states + attended
        return hidden_states + self.mlp(self.ln_2(hidden_states))


class QWenPreTrainedModel(PreTrainedModel):
    config_class = QWenConfig
    config: QWenConfig
    base_model_prefix = "transformer"
    supports_gradient_checkpointing = True
    _no_split_modules = ["QWenBlock"]  # noqa: RUF012
    _skip_keys_device_placement = ["past_key_values"]  # noqa: RUF012
    # tables that older files hold; they are computed here
    _keys_to_ignore_on_load_unexpected = [r"rotary_emb\.inv_freq", r"attn\.masked_bias"]  # noqa: RUF012
    _supports_sdpa = True
    _supports_attention_backend = True
    _can_record_outputs = {  # noqa: RUF012
        "hidden_states": QWenBlock,
        "attentions": QWenAttention,
    }


class QWenModel(QWenPreTrainedModel):
    def __init__(self, config: QWenConfig) -> None:
        super().__init__(config)
        self.wte = nn.Embedding(config.vocab_size, config.hidden_size)
        self.drop = nn.Dropout(config.emb_dropout_prob)
        self.h = nn.ModuleList(QWenBlock(config, i) for i in range(config.num_hidden_layers))
        self.ln_f = RMSNorm(config.hidden_size, config.layer_norm_epsilon)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.wte

    def set_input_embeddings(self, value: Any) -> None:
        self.wte = value

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        **extra: Any,
    ) -> BaseModelOutputWithPast:
        """input_ids [B, S] or `inputs_embeds` [B, S, H] -> hidden states [B, S, H] after the final norm.

        `attention_mask` [B, T], 1 = real. `position_ids` [B, S] act inside a layout and behind virtual tokens;
        in any other plain call the place is the index in the padded row, as in the original.
        """
        x = self.wte(input_ids) if inputs_embeds is None else inputs_embeds
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        layout, length = current_layout(), x.shape[1]
        past = 0 if past_key_values is None else past_key_values.get_seq_length()
        if layout is None:
            places = torch.arange(past, past + length, device=x.device)[None]
            if (
                getattr(self.h[0].attn, "keys_values", None) is not None
                and position_ids is not None
            ):
                places = position_ids  # distances to the virtual tokens must not depend on padding
            alpha = self._plain_alpha(attention_mask, past + length, past_key_values, x.device)
            mask = create_causal_mask(
                config=self.config,
                inputs_embeds=x,
                attention_mask=attention_mask,
                past_key_values=past_key_values,
            )
        else:
            places = layout.here(layout.position_ids) if position_ids is None else position_ids
            alpha, mask = self._packed_alpha(layout), None
        config = self.config
        dim = int(config.kv_channels * config.rotary_pct)
        turns = rotary(places, alpha, dim, config.rotary_emb_base)
        logn = self._logn(places)
        x = self.drop(x)
        for layer in self.h:
            x = layer(
                x,
                turns=turns,
                logn=logn,
                attention_mask=mask,
                past_key_values=past_key_values,
                **extra,
            )
        return BaseModelOutputWithPast(
            last_hidden_state=self.ln_f(x), past_key_values=past_key_values
        )

    def _logn(self, places: Tensor) -> Tensor | None:
        """Factors [B, S] of queries beyond `seq_length`: log(place + 1) to that base. In evaluation only."""
        if self.training or not self.config.use_logn_attn:
            return None
        count, limit = (places + 1).float(), self.config.seq_length
        return (count.log() / math.log(limit)).where(count > limit, 1.0)

    def _plain_alpha(
        self, mask: Tensor | None, total: int, cache: Cache | None, device: torch.device
    ) -> Tensor:
        """[B or 1, 1]; by each row's real tokens where a mask is given and rows are long.

        While decoding it stays that of the prompt: cached keys have been rotated with it.
        """
        seq_length = self.config.seq_length
        if self.training or not self.config.use_dynamic_ntk:
            return torch.ones(1, 1, dtype=torch.float64, device=device)
        kept = getattr(cache, "ntk_alpha", None)
        if kept is not None and cache is not None and cache.get_seq_length() > 0:
            return kept
        lengths = torch.tensor([[total]], device=device)
        if mask is not None and mask.ndim == 2 and total > seq_length:
            lengths = (mask != 0).sum(1, keepdim=True)
        alpha = ntk_alpha(lengths, seq_length)
        if cache is not None:
            cache.ntk_alpha = alpha  # pyright: ignore[reportAttributeAccessIssue]
        return alpha

    def _packed_alpha(self, layout: Layout) -> Tensor:
        """[B, S]; by the length of each token's document, so that packed rows are as alone."""
        if self.training or not self.config.use_dynamic_ntk:
            return torch.ones(1, 1, dtype=torch.float64, device=layout.document_ids.device)
        number = layout.borders.flatten().cumsum(0) - 1
        lengths = number.bincount()[number].view_as(layout.document_ids)
        return layout.here(ntk_alpha(lengths, self.config.seq_length))


class QWenLMHeadModel(QWenPreTrainedModel, GenerationMixin):
    _tied_weights_keys = {"lm_head.weight": "transformer.wte.weight"}  # noqa: RUF012 - where the config ties

    def __init__(self, config: QWenConfig) -> None:
        super().__init__(config)
        self.transformer = QWenModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        **extra: Any,
    ) -> CausalLMOutputWithPast:
        """As `QWenModel.forward`, with logits [B, S, V].

        The loss of `labels` [B, S] (labels[i] is token i) is shifted: the mean cross entropy of each next
        token over labels other than -100.
        """
        out = self.transformer(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **extra,
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(out.last_hidden_state[:, kept])
        loss = None
        if labels is not None:
            before = logits[:, :-1].flatten(0, 1)
            loss = F.cross_entropy(before, labels[:, 1:].flatten(), ignore_index=IGNORE)
        return CausalLMOutputWithPast(
            loss=cast(Any, loss),
            logits=logits,
            past_key_values=out.past_key_values,
            hidden_states=out.hidden_states,
            attentions=out.attentions,
        )
