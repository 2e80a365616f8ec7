"""Prompt tuning (Lester et al. 2021, arXiv:2104.08691): P trained embeddings before every document.

As attention is causal, the keys and values of these tokens do not depend on the document that follows: they
are computed once in each forward, as a document of their own, and every document sees them. That equals putting
the embeddings before each document, as PEFT does, at the cost of P tokens. Positions start behind them. ChatGLM and
GLM, whose context sees all of itself, would let them see each document's; here they see each other alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from luthier.adapters.base import ADAPTERS, Adapter
from luthier.adapters.virtual import TABLE, Virtual, alone, draw_tokens, options_from
from luthier.config import AdapterConfig

KNOWN = frozenset({"prompt_tuning_init", "prompt_tuning_init_text", "tokenizer_name_or_path", "tokenizer_kwargs"})  # fmt: skip


@ADAPTERS.register("prompt")
class Prompt(Virtual):
    """Trained embeddings of virtual tokens."""

    uses = frozenset({"num_prefix_tokens"})
    peft_types = ("PROMPT_TUNING",)
    shared_names = (TABLE,)
    virtual = True

    def __init__(self, layer: Any, config: AdapterConfig, *, name: str, seed: int) -> None:
        super().__init__(layer, config, name=name, seed=seed)
        text = layer.config.get_text_config()
        self.sizes = {"num_layers": text.num_hidden_layers, "num_attention_heads": text.num_attention_heads}  # fmt: skip
        width = layer.get_input_embeddings().weight.shape[1]
        self.embedding = self.new_parameter(layer, config.num_prefix_tokens, width)  # [P, D]
        self.tokens_aside = config.num_prefix_tokens

    @classmethod
    def reserve(cls, config: AdapterConfig) -> int:
        return config.num_prefix_tokens

    def compute(self, decoder: Any) -> Mapping[int, tuple[Tensor, Tensor]]:
        return alone(decoder, self.embedding.to(decoder.get_input_embeddings().weight.dtype))

    def initialise(self, layer: Any, generator: torch.Generator) -> None:
        """Embeddings of common tokens."""
        self.embedding.copy_(draw_tokens(layer, self.config.num_prefix_tokens, generator))

    @classmethod
    def shared_tensors(cls, adapters: Mapping[str, Adapter]) -> dict[str, Tensor]:
        adapter: Any = adapters[""]
        return adapter.stored()

    def stored(self) -> dict[str, nn.Parameter]:
        return {TABLE: self.embedding}

    @classmethod
    def to_peft(cls, config: AdapterConfig, adapters: Mapping[str, Adapter]) -> dict[str, Any]:
        adapter: Any = adapters[""]
        return {
            "peft_type": "PROMPT_TUNING",
            "num_virtual_tokens": config.num_prefix_tokens,
            "num_transformer_submodules": 1,
            "token_dim": adapter.embedding.shape[1],
            "prompt_tuning_init": "RANDOM",
            **adapter.sizes,
        }

    @classmethod
    def from_peft(
        cls, fields: Mapping[str, Any], layers: list[str]
    ) -> tuple[AdapterConfig, dict[str, AdapterConfig], list[str]]:
        config, remarks = options_from(fields, {"method": "prompt"}, KNOWN)
        return config, {"": config}, remarks
