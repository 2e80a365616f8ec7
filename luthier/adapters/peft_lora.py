"""What PEFT's LoRA folders say in adapter_config.json, read and written.

Options in PEFT's words <-> `AdapterConfig`; tensors are `lora.py`'s. LoRA with a mixer, which PEFT lacks, is
written in the same words under a type of our own.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError

from luthier.adapters.targets import pattern_value
from luthier.config import AdapterConfig
from luthier.errors import Refused

LORA, MIXER = "LORA", "LUTHIER_MIXER"  # peft_type

# what PEFT's options mean for a loaded adapter: read here or by the store; without effect on its output;
# not supported. Options of later versions of PEFT are in none of these lists
_READ = {"r", "lora_alpha", "lora_dropout", "rank_pattern", "alpha_pattern", "use_rslora"}
_READ |= {"use_dora", "init_lora_weights", "peft_type", "base_model_name_or_path"}
_READ |= {"modules_to_save", "bias"}
_INERT = {
    *("task_type", "inference_mode", "revision", "auto_mapping", "peft_version", "megatron_core"),
    *(
        "target_modules",
        "target_parameters",
        "exclude_modules",
        "layers_to_transform",
        "layers_pattern",
    ),
    *("fan_in_fan_out", "qalora_group_size", "runtime_config", "ensure_weight_tying"),
    *("loftq_config", "eva_config", "corda_config", "lora_ga_config"),
}
_UNSUPPORTED = {
    *("lora_bias", "use_qalora", "use_bdlora", "layer_replication", "kasa_config"),
    *("trainable_token_indices", "alora_invocation_tokens", "arrow_config", "megatron_config"),
    *("velora_config", "monteclora_config"),
}
# initialisations that leave the base as it is; the others (pissa, olora, ...) subtract from it
_INITS = (True, False, "gaussian", "eva", "orthogonal")


def write_options(
    config: AdapterConfig, layers: Mapping[str, AdapterConfig], transposed: bool
) -> dict[str, Any]:
    """Entries of adapter_config.json for `config` and the options of each layer, which may differ from it."""
    rank, alpha = _in_file(config)
    own = {name: _in_file(options) for name, options in layers.items()}
    return {
        "peft_type": MIXER if config.mixer else LORA,
        "r": rank,
        "lora_alpha": alpha,
        "lora_dropout": config.dropout,
        "rank_pattern": {re.escape(n): r for n, (r, _) in own.items() if r != rank},
        "alpha_pattern": {re.escape(n): a for n, (_, a) in own.items() if a != alpha},
        "fan_in_fan_out": transposed,
        "use_rslora": config.rslora,
        "use_dora": config.dora,
        "bias": "none",
        "init_lora_weights": True,
    }


def _in_file(config: AdapterConfig) -> tuple[int, float | int]:
    """(rank, alpha) of the tensors in the file. PiSSA's are those of a plain LoRA of twice the rank, and
    alpha grows so that the scale is the same."""
    if not config.pissa:
        return config.rank, _number(config.scale_alpha)
    return 2 * config.rank, _number(config.scale_alpha * (math.sqrt(2) if config.rslora else 2))


def read_options(
    fields: Mapping[str, Any], layers: list[str]
) -> tuple[AdapterConfig, dict[str, AdapterConfig], list[str]]:
    """adapter_config.json -> options, options of each of `layers`, remarks. Refused if one is not supported."""
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
    plan = {
        name: _options(fields, pattern_value(ranks, name, rank), pattern_value(alphas, name, alpha))
        for name in layers
    }
    return _options(fields, rank, alpha), plan, remarks


def _options(fields: Mapping[str, Any], rank: Any, alpha: Any) -> AdapterConfig:
    values = {
        "method": "lora",
        "rank": rank,
        "alpha": alpha,
        "dropout": fields.get("lora_dropout", 0.0),
        "rslora": bool(fields.get("use_rslora")),
        "dora": bool(fields.get("use_dora")),
        "mixer": fields.get("peft_type") == MIXER,
    }
    try:
        return AdapterConfig.model_validate(values)
    except (ValidationError, TypeError, ValueError) as error:
        raise Refused(
            "reading adapter_config.json",
            f"r={rank}, lora_alpha={alpha}, lora_dropout={values['dropout']} are no LoRA options",
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
