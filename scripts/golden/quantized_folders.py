"""Small quantised folders made by bitsandbytes and compressed-tensors, with the weights they decode to.

    python scripts/golden/quantized_folders.py tests/quantize/folders

needs both libraries beside transformers. Each folder is as its library saves it, plus `expected.safetensors`:
every quantised weight decoded by the library, and logits of plain transformers over these weights.
bitsandbytes' CPU kernel decodes matrices wrongly whose rows hold no whole blocks: it gets a flat view.
"""

from __future__ import annotations

import copy
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import bitsandbytes
import torch
from compressed_tensors import ModelCompressor
from compressed_tensors.quantization import QuantizationConfig, apply_quantization_config
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    LlamaConfig,
    LlamaForCausalLM,
)

CONFIG = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "max_position_embeddings": 64,
    "attention_bias": True,
}
BNB = {
    "bnb-nf4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
    "bnb-nf4-double": {
        "load_in_4bit": True,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": True,
    },
    "bnb-fp4-bfloat16": {
        "load_in_4bit": True,
        "bnb_4bit_quant_type": "fp4",
        "bnb_4bit_quant_storage": "bfloat16",
        "bnb_4bit_compute_dtype": "bfloat16",
    },
    "bnb-int8": {"load_in_8bit": True},
}
# bits, group size (None: one scale per row), format, type of the scales
CT = {
    "ct-int4-group": (4, 8, "pack-quantized", torch.float32),
    "ct-int4-channel": (4, None, "pack-quantized", torch.bfloat16),
    "ct-int8-channel": (8, None, "pack-quantized", torch.bfloat16),
    "ct-int8-plain": (8, 8, "int-quantized", torch.bfloat16),
}


def base(tied: bool) -> LlamaForCausalLM:
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**CONFIG, tie_word_embeddings=tied)).eval()
    for parameter in model.parameters():
        noise = 0.1 * torch.randn_like(parameter)
        parameter.data = parameter.data + noise if parameter.ndim == 1 else 3 * noise
    return model


def with_bitsandbytes(folder: Path, options: dict[str, Any]) -> dict[str, Tensor]:
    model = base(tied="fp4" in folder.name)
    dtype = torch.bfloat16 if "bfloat16" in folder.name else torch.float32
    model.to(dtype).save_pretrained(folder / "base")
    made = AutoModelForCausalLM.from_pretrained(
        folder / "base", quantization_config=BitsAndBytesConfig(**options), dtype=dtype
    )
    shutil.rmtree(folder / "base")
    made.save_pretrained(folder)
    weights = {}
    for name, layer in made.named_modules():
        if isinstance(layer, bitsandbytes.nn.Linear4bit):
            state = copy.copy(layer.weight.quant_state)
            shape, state.shape = state.shape, (state.shape.numel(),)
            flat = bitsandbytes.functional.dequantize_4bit(layer.weight.data.view(-1, 1), state)
            weights[f"{name}.weight"] = flat.view(shape)
        elif isinstance(layer, bitsandbytes.nn.Linear8bitLt):
            scale = layer.weight.SCB if layer.state.SCB is None else layer.state.SCB
            weights[f"{name}.weight"] = bitsandbytes.functional.int8_vectorwise_dequant(
                layer.weight.data, scale
            )
    return weights


def with_compressed_tensors(
    folder: Path, bits: int, group: int | None, layout: str, dtype: torch.dtype
) -> dict[str, Tensor]:
    model = base(tied=False).to(dtype)
    arguments = {"num_bits": bits, "strategy": "group" if group else "channel"}
    groups = {"group_0": {"targets": ["Linear"], "weights": arguments, "format": layout}}
    arguments["group_size"] = group
    fields = {"config_groups": groups, "ignore": ["lm_head"], "format": layout}
    apply_quantization_config(model, QuantizationConfig(**fields))
    for layer in model.modules():
        if isinstance(layer, nn.Linear) and hasattr(layer, "weight_scale"):
            blocks = layer.weight.data.view(len(layer.weight), -1, group or layer.in_features)
            # as a min-max observer sets it: half the range of the codes
            scale = blocks.abs().amax(-1) / ((2**bits - 1) / 2)
            layer.weight_scale.data = scale.to(layer.weight_scale.dtype)
    compressor = ModelCompressor.from_pretrained_model(model)
    compressor.compress_model(model)
    model.save_pretrained(folder)
    compressor.update_config(str(folder))
    compressor.decompress_model(model)
    return {
        f"{name}.weight": layer.weight.data.clone()
        for name, layer in model.named_modules()
        if isinstance(layer, nn.Linear) and hasattr(layer, "weight_scale")
    }


def main() -> None:
    target = Path(sys.argv[1])
    for name in (*BNB, *CT):
        folder = target / name
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        if name in BNB:
            weights = with_bitsandbytes(folder, BNB[name])
        else:
            weights = with_compressed_tensors(folder, *CT[name])
        plain = base(tied="fp4" in name)
        state = plain.state_dict()
        half = "bfloat16" in name or CT.get(name, [0])[-1] is torch.bfloat16
        with torch.no_grad():
            for key, value in state.items():
                value.copy_(weights[key] if key in weights else value.bfloat16() if half else value)
            logits = plain(torch.arange(24).view(2, 12)).logits
        expected = {key: value.contiguous() for key, value in weights.items()}
        save_file(expected | {"logits": logits}, folder / "expected.safetensors")
        for extra in ("generation_config.json",):
            (folder / extra).unlink(missing_ok=True)
        fields = json.loads((folder / "config.json").read_text())["quantization_config"]
        print(name, sum(f.stat().st_size for f in folder.iterdir()), json.dumps(fields))


if __name__ == "__main__":
    main()
