"""Reading a model's weights otherwise than transformers' loader does by itself.

Only some layers, as a pipeline stage needs them: the loader reads the tensors that the model it made has parameters
for, so the other layers are put aside, on the meta device, before it looks, and put back, still there, at the end.
Which layers are read is told by `partial.py`. Only some rows of each matrix (`held.py`), by the seam that transformers
has for quantisers. And each tensor into memory of its own, where it is not kept as it is.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import nn
from transformers import GenerationConfig, PreTrainedModel
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from luthier.held import Holding, HoldingQuantizer, Way
from luthier.models.stage import decoder_layers

LeaveOut = Callable[[PreTrainedModel], Collection[int]]
"""A model without values -> the numbers of layers that are not read."""
ROWS = "luthier-rows"  # our name among transformers' quantisers


def unmapped(folder: Path, files: Sequence[Path]) -> dict[str, Any]:
    """Arguments of `from_pretrained` in place of the folder whose safetensors are `files`.

    By itself the loader maps them: whatever was read stays resident for as long as one tensor of the file is kept.
    Here each tensor is read when its turn comes, and is gone when it was quantised. Raises what safetensors and
    transformers raise.
    """
    state: dict[str, Any] = {}
    for file in files:
        opened = safe_open(file, framework="pt", backend="pread")
        state |= {name: opened.get_slice(name) for name in sorted(opened.keys())}
    found: dict[str, Any] = {"pretrained_model_name_or_path": None, "state_dict": state}
    if (folder / "generation_config.json").is_file():  # it is looked for beside a path only
        found["generation_config"] = GenerationConfig.from_pretrained(folder)
    return found


class Reading:
    """One reading of a model whose layers are not all wanted."""

    def __init__(self, leave_out: LeaveOut) -> None:
        self.leave_out = leave_out
        self.aside: dict[int, nn.Module] = {}

    def class_of(self, kind: Any) -> Any:
        """`kind`, whose new instances lack the layers."""
        reading = self

        class Partial(kind):
            __module__ = kind.__module__

            def __init__(self, *args: Any, **options: Any) -> None:
                super().__init__(*args, **options)
                reading.put_aside(self)

        Partial.__name__, Partial.__qualname__ = kind.__name__, kind.__qualname__
        return Partial

    def put_aside(self, model: PreTrainedModel) -> None:
        layers = decoder_layers(model)
        for number in self.leave_out(model):
            self.aside[number] = layers[number]
        self.layers = layers
        for number in self.aside:
            layers[number] = nn.Module()

    def skipped(self, name: str) -> bool:
        """Whether a tensor of the checkpoint belongs to a layer that is not read."""
        number = re.search(r"\.(\d+)\.", name)
        return number is not None and int(number[1]) in self.aside

    def put_back(self) -> None:
        for number, layer in self.aside.items():
            self.layers[number] = layer


class Rows(QuantizationConfigMixin):
    """`quantization_config` of a `from_pretrained` that holds rows and quantises nothing."""

    quant_method: Any = ROWS

    def __init__(self, ways: Collection[Way], device: torch.device) -> None:
        self.ways, self.device = ways, device


@register_quantizer(ROWS)
class _RowReader(HoldingQuantizer):
    quantization_config: Rows

    def _process_model_before_weight_loading(self, model: Any, **kwargs: Any) -> None:
        asked = self.quantization_config
        self.holding = Holding(model, asked.ways, asked.device)

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> None:
        self.holding.settle(model)
        self.remove_quantization_config(model)
        del model.is_quantized
        for module in model.modules():
            if isinstance(module, PreTrainedModel):
                vars(module.config).pop("_is_quantized", None)


register_quantization_config(ROWS)(Rows)
