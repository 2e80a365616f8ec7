"""What `quantize` means for the base of a run: what is quantised of it, and what cannot be asked of it then."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn

from luthier.adapters import plan_of
from luthier.adapters.residual import FirstSplit, SavedSplit
from luthier.config import AdapterConfig, ModelConfig, QuantizeConfig, RunConfig
from luthier.errors import Refused
from luthier.layers import is_quantized
from luthier.prequantized import prequantized
from luthier.quantize.folders import Prequantized
from luthier.quantize.loading import Quantization


def refuse_training(config: RunConfig, adapter: str | None) -> None:
    """Refuse what cannot be trained: a quantised base itself, and PiSSA on one that was quantised before."""
    path, held = config.model.path, prequantized(config.model) is not None
    if (held or config.quantize.on) and config.adapter.method == "none" and adapter is None:
        found = (
            f"'{path}', which is quantised"
            if held
            else f"quantize.weights={config.quantize.weights}"
        )
        raise Refused(
            "full fine-tuning of a quantised base",
            f"adapter.method=none with {found}: codes cannot be trained",
            "set adapter.method=lora (QLoRA), or take a base that is not quantised",
        )
    if held and config.adapter.pissa and adapter is None:
        raise Refused(
            f"adapter.pissa=true on '{path}'",
            "it is quantised already: what the adapter takes out of a weight can no longer be subtracted",
            "start from the model in its original precision, with quantize.weights",
        )


def quantization_of(
    config: QuantizeConfig,
    adapter: str | Path | None,
    new: AdapterConfig | None = None,
    seed: int = 0,
    *,
    model: ModelConfig,
) -> Quantization | Prequantized | None:
    """The quantisation of a base that the adapter in folder `adapter`, or a new one of options `new`, goes to.

    `model` names the base, which may be a folder that is quantised already.
    """
    held = prequantized(model, config)
    if held is not None or not config.on:
        return held
    if adapter is not None:
        return Quantization(config, lambda _: SavedSplit(Path(adapter)))
    if new is None or not new.pissa:
        return Quantization(config)
    return Quantization(config, lambda model: FirstSplit(plan_of(model, new), seed=seed))


def storage_words(model: nn.Module) -> str:
    """How the base is kept: `106,168,320 weights in nf4, 60 MB`; empty where none is quantised.

    Where tensor-parallel ranks share the weights, the megabytes are a rank's.
    """
    layers: list[Any] = [module for module in model.modules() if is_quantized(module)]
    if not layers:
        return ""
    schemes = sorted({layer.scheme for layer in layers})
    weights = sum(layer.whole for layer in layers)
    each = " per process" if any(layer.whole != layer.spec.numel for layer in layers) else ""
    size = sum(t.numel() * t.element_size() for layer in layers for t in layer.tensors().values())
    return f"{weights:,} weights in {' and '.join(schemes)}, {size / 1e6:,.0f} MB{each}"
