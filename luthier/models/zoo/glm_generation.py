"""Masks and positions of GLM in plain calls, and its side of transformers' `generate`.

A prompt ends with <|startofpiece|>. `generate` takes either the original's inputs (positions and mask made
ahead for g new tokens by the tokenizer) or ids with the [B, S] mask of their padding on either side, from
which positions and mask are found here. The network is in `glm.py`.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor
from transformers import Cache, GenerationMixin

from luthier.errors import Refused


def visible(mask: Tensor | None, length: int, past: int, device: torch.device) -> Tensor:
    """[B or 1, 1, S or 1, T] bool, True = query sees key, of the original's masks (1 = visible).

    None: causal. [B] or a number: this many leading tokens are seen by all, the rest is causal. [B, T]: the
    same keys for every query, not causal. [B, 1, S, T]: as it is; of a wider one the last T columns.
    """
    total = past + length
    causal = torch.ones(length, total, dtype=torch.bool, device=device).tril(past)[None, None]
    if mask is None:
        return causal
    if mask.ndim < 2:
        border = mask.reshape(-1, 1, 1, 1)
        return (torch.arange(total, device=device) < border) | causal
    if mask.ndim not in (2, 4) or mask.shape[-1] < total:
        raise Refused(
            f"a GLM attention_mask of the shape {list(mask.shape)}",
            f"there are {length} queries and {total} keys",
            "give [B] (leading tokens that all may see), [B, S] or [B, 1, S, S] with 1 = visible",
        )
    seen = mask[..., -total:] != 0
    return seen[:, None, None] if mask.ndim == 2 else seen


def context_mask(position_ids: Tensor, padding: Tensor | None) -> Tensor:
    """[B, 1, S, S] bool: real tokens of the context are seen by all, the rest is causal.

    `position_ids` [B, 2, S]: the context is where axis 1 is 0. `padding` [B, S]: 1 = real.
    """
    context = position_ids[:, 1] == 0  # [B, S]
    length = context.shape[1]
    causal = torch.ones(length, length, dtype=torch.bool, device=context.device).tril()
    seen = context[:, None] | causal  # [B, S, S]
    if padding is not None:
        seen = seen & (padding[:, None] != 0)
    return seen[:, None]


def infilling_positions(config: Any, input_ids: Tensor, padding: Tensor | None) -> Tensor:
    """[B, 2, S] of rows [B, S] with blanks; Refused without mask token or <|startofpiece|>.

    Axis 0 counts the context from its first real token; from the first <|startofpiece|> on it is the first mask
    token's place, from the second the second's, while there are mask tokens. Axis 1 is 0 in the context, then
    1, 2, ... in each piece.
    """
    sop, masks = config.sop_token_id, config.mask_token_ids
    asked = "GLM was asked to fill a blank"
    if sop is None or not masks:
        raise Refused(
            asked,
            "its config names neither <|startofpiece|> nor the mask tokens, and there are no position_ids",
            "set sop_token_id and mask_token_ids in config.json (set_special_ids(config, tokenizer) "
            "does), or give position_ids [B, 2, S]",
        )
    index = torch.arange(input_ids.shape[1], device=input_ids.device)[None]
    starts = input_ids == sop
    border = starts.int().argmax(1, keepdim=True)  # [B, 1], of the first <|startofpiece|>
    blanks = torch.isin(input_ids, input_ids.new_tensor(masks)) & (index < border)
    if not bool(starts.any(1).all()):
        raise Refused(asked, "a prompt has no <|startofpiece|>", "end prompts with it")
    if not bool(blanks.any(1).all()):
        raise Refused(
            asked,
            "a prompt has no mask token before its <|startofpiece|>",
            "put one of [MASK], [sMASK] and [gMASK] where the answer belongs",
        )
    first = torch.zeros_like(border)  # of the real tokens, where a row is padded on the left
    if padding is not None:
        first = (padding != 0).int().argmax(1, keepdim=True)
    starts &= starts.cumsum(1) <= blanks.sum(1, keepdim=True)  # those behind open no piece
    piece = starts.long().cumsum(1)  # [B, S], 0 in the context
    places = (
        torch.where(blanks, index, input_ids.shape[1]).sort(1).values
    )  # of the blanks, in order
    place = torch.where(piece == 0, index, places.gather(1, (piece - 1).clamp(min=0))) - first
    opened = torch.where(starts, index, 0).cummax(1).values
    behind = torch.where(piece == 0, 0, index - opened + 1)
    return torch.stack([place.clamp(min=0), behind], dim=1)


def set_special_ids(config: Any, tokenizer: Any) -> None:
    """Write the ids that `infilling_positions` needs from a GLM tokenizer into the model's config."""
    config.sop_token_id = tokenizer.sop_token_id
    config.mask_token_ids = list(tokenizer.mask_token_ids)


def check_range(position_ids: Tensor, last: int) -> None:
    """Refuse positions that the two tables lack."""
    highest = int(position_ids.max())
    if highest > last:
        raise Refused(
            f"position {highest} of a GLM row",
            f"the model's position tables end at {last} (max_sequence_length)",
            "give shorter rows (data.length), or start positions anew in each document",
        )


class GLMGenerationMixin(GenerationMixin):
    """What `generate` asks of a model with two position axes and a context that all may see."""

    config: Any

    def prepare_inputs_for_generation(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        input_ids: Tensor,
        position_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        generation_attention_mask: Tensor | None = None,
        past_key_values: Cache | None = None,
        **extra: Any,
    ) -> dict[str, Any]:
        """The slice of positions and mask that the tokens not yet in the cache need.

        Original form: `position_ids` [B, 2, S+g] and `generation_attention_mask` [B, 1, S+g, S+g] for the
        prompt and g new tokens. House form: [B, S] `attention_mask` of the padding; positions are found in
        the ids, or given for the prompt.
        """
        length = input_ids.shape[1]
        first = 0 if past_key_values is None else past_key_values.get_seq_length()
        assert position_ids is not None  # made by `_prepare_position_ids_for_generation`
        if generation_attention_mask is not None:
            if length > generation_attention_mask.shape[-1]:
                raise Refused(
                    f"{length} tokens with a generation_attention_mask",
                    f"the mask ends after {generation_attention_mask.shape[-1]}",
                    "give build_inputs_for_generation a larger max_gen_length",
                )
            seen = generation_attention_mask[:, :, first:length, :length]
        else:
            seen = context_mask(position_ids[..., :length], attention_mask)[:, :, first:]
        wanted = ("use_cache", "logits_to_keep", "output_attentions", "output_hidden_states")
        return {
            "input_ids": input_ids[:, first:],
            "position_ids": position_ids[..., first:length],
            "attention_mask": seen,
            "past_key_values": past_key_values,
            **{name: extra[name] for name in wanted if name in extra},
        }

    def _prepare_position_ids_for_generation(
        self, inputs_tensor: Tensor, model_kwargs: dict[str, Any]
    ) -> Tensor:
        """What transformers calls for a prompt without positions: they are read from the ids."""
        return infilling_positions(self.config, inputs_tensor, model_kwargs.get("attention_mask"))

    def _update_model_kwargs_for_generation(
        self, outputs: Any, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> dict[str, Any]:
        """The next token stays at the blank (axis 0) and is one further behind it (axis 1)."""
        position_ids = model_kwargs.pop("position_ids")
        updated = super()._update_model_kwargs_for_generation(
            outputs, model_kwargs, *args, **kwargs
        )
        step = position_ids.new_tensor([0, 1])[:, None]
        updated["position_ids"] = torch.cat([position_ids, position_ids[..., -1:] + step], dim=-1)
        return updated

    def _expand_inputs_for_generation(
        self,
        expand_size: int = 1,
        is_encoder_decoder: bool = False,
        input_ids: Tensor | None = None,
        **model_kwargs: Any,
    ) -> tuple[Tensor, dict[str, Any]]:
        """Rows of the positions are on the first axis; transformers takes three axes for another layout."""
        position_ids = model_kwargs.pop("position_ids").repeat_interleave(expand_size, dim=0)
        ids, rest = cast(Any, super())._expand_inputs_for_generation(
            expand_size, is_encoder_decoder, input_ids, **model_kwargs
        )
        return ids, rest | {"position_ids": position_ids}
