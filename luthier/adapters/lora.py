"""LoRA (Hu et al. 2021, arXiv:2106.09685): y = W x + b + (alpha / rank) B A drop(x).

A [rank, in] starts uniform within 1/sqrt(in) of zero, B [out, rank] at zero. Also here: what PEFT's
LoRA folders say in adapter_config.json, read and written.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from pydantic import ValidationError
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from luthier.adapters.base import ADAPTERS, Adapter, Additive
from luthier.adapters.targets import features
from luthier.config import AdapterConfig
from luthier.errors import Refused

# what PEFT's options mean for a loaded adapter: read here or by the store; without effect on its output;
# not supported. Options of later versions of PEFT are in none of these lists
_READ = {"r", "lora_alpha", "lora_dropout", "rank_pattern", "alpha_pattern", "use_rslora"}
_READ |= {"init_lora_weights", "peft_type", "base_model_name_or_path", "modules_to_save", "bias"}
_INERT = {
    *("task_type", "inference_mode", "revision", "auto_mapping", "peft_version", "megatron_core"),
    *("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern"),
    *("fan_in_fan_out", "qalora_group_size", "runtime_config", "ensure_weight_tying"),
    *("loftq_config", "eva_config", "corda_config", "lora_ga_config"),
}
_UNSUPPORTED = {
    *("use_dora", "lora_bias", "use_qalora", "use_bdlora", "layer_replication", "kasa_config"),
    *("trainable_token_indices", "alora_invocation_tokens", "arrow_config", "megatron_config"),
    *("velora_config", "monteclora_config", "target_parameters"),
}
# initialisations that leave the base as it is; the others (pissa, olora, ...) subtract from it
_INITS = (True, False, "gaussian", "eva", "orthogonal")


@ADAPTERS.register("lora")
class LoRA(Additive):
    """A low-rank update of one linear layer."""

    uses = frozenset({"rank", "alpha", "dropout", "targets"})
    follows: ClassVar = {"colwise": {"lora_B": 0}, "rowwise": {"lora_A": 1}}
    peft_type = "LORA"
    zero_at_start = frozenset({"lora_A"})
    suffixes = ("lora_A.weight", "lora_B.weight")

    def __init__(self, layer: nn.Module, config: AdapterConfig, *, name: str, seed: int) -> None:
        super().__init__(layer, config, name=name, seed=seed)
        num_in, num_out = features(layer)
        self.transposed = isinstance(layer, Conv1D)
        self.scale = config.scale_alpha / config.rank
        self.lora_A = self.new_parameter(layer, config.rank, num_in)  # [R, in]
        self.lora_B = self.new_parameter(layer, num_out, config.rank)  # [out, R]

    @classmethod
    def plan(cls, model: nn.Module, config: AdapterConfig) -> dict[str, AdapterConfig]:
        plan = super().plan(model, config)
        for name in plan:
            num_in, num_out = features(model.get_submodule(name))
            if config.rank > min(num_in, num_out):
                raise Refused(
                    f"adapter.rank={config.rank}",
                    f"layer '{name}' is {num_in} -> {num_out}: its weight has rank {min(num_in, num_out)} at most",
                    f"give adapter.rank={min(num_in, num_out)} or less, or leave this layer out of adapter.targets",
                )
        return plan

    def delta(self, x: Tensor) -> Tensor:
        low = F.linear(self.drop(x), self.lora_A.to(x.dtype))  # [..., R]
        return F.linear(low, (self.scale * self.lora_B).to(x.dtype))  # [..., out]

    def fold(self, weight: Tensor) -> Tensor:
        update = (self.scale * self.lora_B).to(weight.dtype) @ self.lora_A.to(weight.dtype)
        return weight + (update.t() if self.transposed else update)

    def initialise(self, layer: nn.Module, generator: torch.Generator) -> None:
        bound = 1 / math.sqrt(self.lora_A.shape[1])
        # drawn on the CPU in float32: the same values on every device and for every precision of the base
        drawn = torch.empty(self.lora_A.shape).uniform_(-bound, bound, generator=generator)
        self.lora_A.copy_(drawn)
        self.lora_B.zero_()

    @classmethod
    def to_peft(cls, config: AdapterConfig, adapters: Mapping[str, Adapter]) -> dict[str, Any]:
        options = {name: adapter.config for name, adapter in adapters.items()}
        usual = _number(config.scale_alpha)
        return {
            "r": config.rank,
            "lora_alpha": usual,
            "lora_dropout": config.dropout,
            "rank_pattern": {
                re.escape(n): o.rank for n, o in options.items() if o.rank != config.rank
            },
            "alpha_pattern": {
                re.escape(n): _number(o.scale_alpha)
                for n, o in options.items()
                if o.scale_alpha != usual
            },
            "fan_in_fan_out": any(getattr(a, "transposed", False) for a in adapters.values()),
            "use_rslora": False,
            "use_dora": False,
            "bias": "none",
            "modules_to_save": None,
            "init_lora_weights": True,
        }

    @classmethod
    def from_peft(
        cls, fields: Mapping[str, Any], layers: list[str]
    ) -> tuple[AdapterConfig, dict[str, AdapterConfig], list[str]]:
        remarks = []
        for key, value in fields.items():
            if key in _UNSUPPORTED and value:
                raise _unsupported(key, value)
            if key not in _READ | _INERT | _UNSUPPORTED:
                remarks.append(f"adapter_config.json has an unknown option {key}={value}: ignored")
        init = fields.get("init_lora_weights", True)
        if init not in _INITS:
            raise _unsupported("init_lora_weights", init)
        rank, alpha = fields.get("r", 8), fields.get("lora_alpha", 8)
        ranks, alphas = fields.get("rank_pattern") or {}, fields.get("alpha_pattern") or {}
        config = _options(fields, rank, alpha)
        plan = {
            name: _options(fields, _pattern(ranks, name, rank), _pattern(alphas, name, alpha))
            for name in layers
        }
        return config, plan, remarks


def _options(fields: Mapping[str, Any], rank: Any, alpha: Any) -> AdapterConfig:
    try:
        # rsLoRA scales by alpha / sqrt(rank): plain LoRA with another alpha
        alpha = alpha * math.sqrt(rank) if fields.get("use_rslora") else alpha
        dropout = fields.get("lora_dropout", 0.0)
        values = {"method": "lora", "rank": rank, "alpha": alpha, "dropout": dropout}
        return AdapterConfig.model_validate(values)
    except (ValidationError, TypeError, ValueError) as error:
        raise Refused(
            "reading adapter_config.json",
            f"r={rank}, lora_alpha={alpha}, lora_dropout={fields.get('lora_dropout')} are no LoRA options",
            "mend the file",
        ) from error


def _pattern(patterns: Any, name: str, usual: Any) -> Any:
    """The value of the first pattern that matches the end of the path at a dot, as PEFT has it."""
    try:
        matches = (v for p, v in patterns.items() if re.fullmatch(rf"(.*\.)?({p})", name))
        return next(matches, usual)
    except (re.error, AttributeError) as error:
        raise Refused(
            "reading adapter_config.json",
            f"{patterns} are no regular expressions with values ({error})",
            "mend the file",
        ) from error


def _number(value: float) -> float | int:
    return int(value) if value == int(value) else value


def _unsupported(key: str, value: Any) -> Refused:
    return Refused(
        f"a LoRA folder with {key}={value}",
        "this form of LoRA is not supported",
        "let PEFT merge it into its base, or convert it to a plain LoRA",
    )
