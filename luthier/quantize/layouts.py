"""Quantised folders on disk: which layout holds which weights, and back to our storage. No model, no files.

nf4, fp4 and int8 with a scale per row are written as bitsandbytes does, other integers as
compressed-tensors does; plain transformers opens both. Read are both layouts, whoever wrote them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from luthier.errors import Refused
from luthier.quantize import bitsandbytes, compressed
from luthier.quantize.spec import Spec
from luthier.quantize.stored import Headers, Read, Stored

BITSANDBYTES, COMPRESSED = bitsandbytes.METHOD, compressed.METHOD
_LAYOUTS: dict[str, Any] = {bitsandbytes.METHOD: bitsandbytes, compressed.METHOD: compressed}


def choose(specs: Mapping[str, Spec]) -> str:
    """The layout, by its `quant_method`, of a folder with these weights (name -> form).

    Refused where no single one holds them all: bitsandbytes has no small groups of integers and does not
    mix 4 with 8 bits, compressed-tensors has neither nf4 nor fp4.
    """
    found = set(specs.values())
    if all(bitsandbytes.fits(spec) for spec in found) and len({spec.bits for spec in found}) == 1:
        return BITSANDBYTES
    if all(compressed.fits(spec) for spec in found):
        return COMPRESSED
    schemes = sorted({spec.scheme for spec in found})
    raise Refused(
        f"saving a model quantised in {', '.join(schemes)}",
        "no layout that other programs read holds code books (nf4, fp4) and integers together",
        "quantise all layers in nf4 and fp4, or all in int8 and int4",
    )


def config(
    method: str, specs: Mapping[str, Spec], kept: list[str], dtype: torch.dtype
) -> dict[str, Any]:
    """`quantization_config` for config.json.

    `specs`: path of each quantised layer -> its form. `kept`: paths of the linear layers that stay as they
    are. `dtype`: of computation.
    """
    return _LAYOUTS[method].config(specs, kept, dtype)


def write(
    method: str, name: str, tensors: Mapping[str, Tensor], spec: Spec, dtype: torch.dtype
) -> dict[str, Tensor]:
    """The tensors of the folder that stand for the weight `name`, which was of type `dtype`."""
    return _LAYOUTS[method].write(name, tensors, spec, dtype)


def plan(folder: str, fields: Mapping[str, Any], headers: Headers, read: Read) -> dict[str, Stored]:
    """Weight name -> how it lies in the folder, by its config's `quantization_config`.

    Every fault that headers and small tensors show is refused here, before any work: other methods (GPTQ,
    AWQ, ...), missing tensors, wrong shapes.
    """
    return _layout(folder, fields).plan(folder, fields, headers, read)


def take(folder: str, fields: Mapping[str, Any], stored: Stored, read: Read) -> dict[str, Tensor]:
    """One weight of the plan as the tensors of `stored.spec.layout`. Nothing is quantised anew."""
    return _layout(folder, fields).take(folder, stored, read)


def _layout(folder: str, fields: Mapping[str, Any]) -> Any:
    method = fields.get("quant_method")
    if method is None and (fields.get("load_in_4bit") or fields.get("load_in_8bit")):
        method = BITSANDBYTES  # its folders of 2023 do not name it
    if method not in _LAYOUTS:
        raise Refused(
            f"model '{folder}' was asked for",
            f"its weights are quantised by a method that is not read here ({method})",
            "give the model's original weights, with quantize.weights=nf4 if need be, or a folder of "
            "bitsandbytes or compressed-tensors",
        )
    return _LAYOUTS[method]
