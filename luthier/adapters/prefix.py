"""Prefix tuning (Li & Liang 2021, arXiv:2101.00190): trained keys and values before every document's own.

A table [P, layers x 2 x kv heads x head dim], trained as it is or given by a small network (embedding ->
linear -> tanh -> linear). Its keys are used as they are, unrotated. Form `paper` is PEFT's: the tokens' positions
start at P; in form `paddlenlp` they start at 0. Also here: what PEFT's PREFIX_TUNING folders say.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from luthier.adapters.base import ADAPTERS, Adapter
from luthier.adapters.virtual import TABLE, Virtual, alone, draw_tokens, options_from
from luthier.config import AdapterConfig

# parameter of the network -> its name in the adapter's file, which PEFT does not read
NETWORK = {
    "embedding": "prompt_encoder.embedding.weight",
    "linear1": "prompt_encoder.transform.0.weight",
    "bias1": "prompt_encoder.transform.0.bias",
    "linear2": "prompt_encoder.transform.2.weight",
    "bias2": "prompt_encoder.transform.2.bias",
}
PEFT_TYPE = {"paper": "PREFIX_TUNING", "paddlenlp": "LUTHIER_PREFIX"}
KNOWN = frozenset({"encoder_hidden_size", "prefix_projection", "init_weights"})


@ADAPTERS.register("prefix")
class Prefix(Virtual):
    """Trained keys and values in all layers."""

    uses = frozenset({"num_prefix_tokens", "prefix_projection", "projection_size"})
    peft_types = tuple(PEFT_TYPE.values())
    from_layer = False
    shared_names = (TABLE, *NETWORK.values())
    by_heads = True

    def __init__(self, layer: Any, config: AdapterConfig, *, name: str, seed: int) -> None:
        super().__init__(layer, config, name=name, seed=seed)
        text = layer.config.get_text_config()
        self.num_layers = text.num_hidden_layers
        self.kv_heads, self.head_dim, self.value_dim = key_value_sizes(text)
        width = self.kv_heads * self.head_dim
        total = self.num_layers * (width + self.kv_heads * self.value_dim)
        self.hidden = config.projection_size or text.hidden_size
        if config.prefix_projection:
            self.embedding = self.new_parameter(layer, config.num_prefix_tokens, width)
            self.linear1 = self.new_parameter(layer, self.hidden, width)
            self.bias1 = self.new_parameter(layer, self.hidden)
            self.linear2 = self.new_parameter(layer, total, self.hidden)
            self.bias2 = self.new_parameter(layer, total)
        else:
            self.embedding = self.new_parameter(layer, config.num_prefix_tokens, total)

    @classmethod
    def reserve(cls, config: AdapterConfig) -> int:
        return config.num_prefix_tokens if config.form_ == "paper" else 0

    def table(self) -> Tensor:
        """[P, layers x 2 x kv heads x head dim], in this order, in the parameters' type; where values are of
        another width than keys, each layer's keys and then its values."""
        if not self.config.prefix_projection:
            return self.embedding
        with torch.autocast(self.embedding.device.type, enabled=False):
            hidden = torch.tanh(F.linear(self.embedding, self.linear1, self.bias1))  # [P, hidden]
            return F.linear(hidden, self.linear2, self.bias2)

    def compute(self, decoder: Any) -> Mapping[int, tuple[Tensor, Tensor]]:
        sizes = [self.kv_heads * self.head_dim, self.kv_heads * self.value_dim] * self.num_layers
        # split, not indexed: the gradients of single slices would each be as large as the table
        parts = [part.unflatten(1, (self.kv_heads, -1)) for part in self.table().split(sizes, 1)]
        pairs = zip(parts[::2], parts[1::2], strict=True)
        here = (lambda x: x) if self.heads_here is None else self.heads_here.of
        return {
            i: (here(keys), here(values)) for i, (keys, values) in enumerate(pairs)
        }  # [P, K, D] each

    def initialise(self, layer: Any, generator: torch.Generator) -> None:
        """The keys and values of common tokens; the network starts by giving them, as far as it is wide enough."""
        decoder, size = layer.get_decoder(), self.config.num_prefix_tokens
        # they stand right before position P, or before position 0 where a position is only a rotation
        before_zero = self.reserve(self.config) == 0 and hasattr(decoder, "rotary_emb")
        tokens = draw_tokens(layer, size, generator)
        found = alone(decoder, tokens, -size if before_zero else 0)
        parts = [part.flatten(1) for i in range(self.num_layers) for part in found[i]]  # [P, K * D]
        table = torch.cat(parts, dim=1).to(self.embedding.dtype)
        if not self.config.prefix_projection:
            self.embedding.copy_(table)
            return
        bound = 1 / math.sqrt(self.linear1.shape[1])
        self.embedding.copy_(torch.empty(self.embedding.shape).normal_(generator=generator))
        drawn = torch.empty(self.linear1.shape).uniform_(-bound, bound, generator=generator)
        self.linear1.copy_(drawn)
        self.bias1.zero_()
        hidden = torch.tanh(F.linear(self.embedding, self.linear1))  # [P, hidden]
        inverse = torch.linalg.pinv(hidden.double(), rtol=1e-3).to(table.dtype)  # [hidden, P]
        self.bias2.copy_(table.mean(0))
        self.linear2.copy_((table - self.bias2).t() @ inverse.t())

    @classmethod
    def shared_tensors(cls, adapters: Mapping[str, Adapter]) -> dict[str, Tensor]:
        adapter: Any = adapters[""]
        return {TABLE: adapter.table(), **adapter.stored()}

    def stored(self) -> dict[str, nn.Parameter]:
        if not self.config.prefix_projection:
            return {TABLE: self.embedding}
        return {name: self.get_parameter(own) for own, name in NETWORK.items()}

    @classmethod
    def to_peft(cls, config: AdapterConfig, adapters: Mapping[str, Adapter]) -> dict[str, Any]:
        adapter: Any = adapters[""]
        return {
            "peft_type": PEFT_TYPE[config.form_],
            "num_virtual_tokens": config.num_prefix_tokens,
            "num_transformer_submodules": 1,
            "num_layers": adapter.num_layers,
            "num_attention_heads": adapter.kv_heads,  # as PEFT counts them with grouped queries
            "token_dim": adapter.kv_heads * adapter.head_dim,
            "encoder_hidden_size": adapter.hidden,
            "prefix_projection": config.prefix_projection,
            "init_weights": None,
        }

    @classmethod
    def from_peft(
        cls, fields: Mapping[str, Any], layers: list[str]
    ) -> tuple[AdapterConfig, dict[str, AdapterConfig], list[str]]:
        form = next(f for f, kind in PEFT_TYPE.items() if kind == fields["peft_type"])
        values = {"method": "prefix", "form": form}
        remarks = []
        if fields.get("prefix_projection"):
            if form == "paper":
                remarks.append(
                    "the folder holds the prefix without the network that made it (PEFT's prefix_projection): "
                    "training goes on with the prefix itself"
                )
            else:
                values |= {
                    "prefix_projection": True,
                    "projection_size": fields.get("encoder_hidden_size"),
                }
        config, more = options_from(fields, values, KNOWN)
        return config, {"": config}, remarks + more


def key_value_sizes(text: Any) -> tuple[int, int, int]:
    """(heads of keys and values, width of a key, width of a value) that a layer's attention is given."""
    heads = text.num_attention_heads
    width = getattr(text, "head_dim", None) or text.hidden_size // heads
    if hasattr(
        text, "qk_head_dim"
    ):  # latent attention (DeepSeek): head_dim is that of the rotated part
        return heads, text.qk_head_dim, text.v_head_dim
    if (
        text.model_type == "falcon"
    ):  # num_kv_heads counts in one of its forms, which repeats them itself
        return 1 if text.multi_query and not text.new_decoder_architecture else heads, width, width
    return getattr(text, "num_key_value_heads", None) or heads, width, width
