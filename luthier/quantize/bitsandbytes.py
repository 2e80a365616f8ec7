"""bitsandbytes' layout of quantised folders: nf4 and fp4 (also doubly quantised), int8 with a scale per row.

Names and types are those that its `Linear4bit` and `Linear8bitLt` save and transformers reads; the
library itself is not needed. The bytes of codes are the same as ours, so nothing is quantised anew in
either direction.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from luthier.errors import Refused
from luthier.quantize.codes import dynamic_levels, levels_of
from luthier.quantize.spec import Spec, make_spec
from luthier.quantize.stored import (
    BITS,
    FLOATING,
    Headers,
    Read,
    Stored,
    broken,
    check_part,
    scales_from,
)

METHOD = "bitsandbytes"
_STATE = ".quant_state.bitsandbytes__"
# after the name of a 4-bit weight
_PARTS = (".absmax", ".quant_map", ".nested_absmax", ".nested_quant_map")
_NESTED = 256
_SCHEMES = ("nf4", "fp4")


def config(specs: Mapping[str, Spec], kept: list[str], dtype: torch.dtype) -> dict[str, Any]:
    """`quantization_config` of a folder. `specs`: path of each quantised layer -> its form. `kept`: paths of
    the linear layers that are not quantised. `dtype`: of computation. What differs from layer to layer
    stands beside each weight."""
    spec = next(iter(specs.values()))
    eight = spec.bits == 8
    return {
        "quant_method": METHOD,
        "load_in_4bit": not eight,
        "load_in_8bit": eight,
        "_load_in_4bit": not eight,
        "_load_in_8bit": eight,
        "bnb_4bit_quant_type": "nf4" if eight else spec.scheme,
        "bnb_4bit_use_double_quant": spec.double_quant,
        "bnb_4bit_compute_dtype": str(dtype).removeprefix("torch."),
        "bnb_4bit_quant_storage": "uint8",
        "llm_int8_skip_modules": kept,
        "llm_int8_threshold": 6.0,
        "llm_int8_has_fp16_weight": False,
        "llm_int8_enable_fp32_cpu_offload": False,
    }


def fits(spec: Spec) -> bool:
    """Whether this layout can hold the weight."""
    whole = spec.block_size == spec.shape[-1] and len(spec.shape) == 2
    return spec.scheme in _SCHEMES or (spec.scheme == "int8" and whole)


def write(
    name: str, tensors: Mapping[str, Tensor], spec: Spec, dtype: torch.dtype
) -> dict[str, Tensor]:
    """The tensors that stand for the weight `name`, which was of type `dtype`, in a folder."""
    if spec.scheme == "int8":
        return {
            name: tensors["codes"].view(spec.shape),
            f"{_stem(name)}SCB": tensors["absmax"].flatten(),
            f"{_stem(name)}weight_format": torch.tensor(0, dtype=torch.uint8),  # row by row
        }
    state: dict[str, Any] = {
        "quant_type": spec.scheme,
        "blocksize": spec.block_size,
        "dtype": str(dtype).removeprefix("torch."),
        "shape": list(spec.shape),
    }
    made = {
        name: tensors["codes"].reshape(-1, 1),
        f"{name}.absmax": tensors["absmax"].flatten(),
        f"{name}.quant_map": levels_of(spec.scheme),
    }
    if spec.double_quant:
        state |= {"nested_blocksize": _NESTED, "nested_dtype": "float32"}
        state["nested_offset"] = tensors["nested_offset"].item()
        made[f"{name}.nested_absmax"] = tensors["nested_absmax"]
        made[f"{name}.nested_quant_map"] = dynamic_levels()
    text = json.dumps(state).encode()
    made[f"{name}{_STATE}{spec.scheme}"] = torch.tensor(list(text), dtype=torch.uint8)
    return made


def plan(folder: str, fields: Mapping[str, Any], headers: Headers, read: Read) -> dict[str, Stored]:
    """Weight name -> how it is stored, for a folder with the `quantization_config` `fields`.

    Reads the small tensors only. Refused, by name, when one of a weight's tensors is missing, of another
    size or type, or made by a code book that is not the known one.
    """
    if fields.get("load_in_8bit") or fields.get("_load_in_8bit"):
        found = _plan_8bit(folder, headers, read)
    else:
        found = _plan_4bit(folder, headers, read)
    if not found:
        raise Refused(
            f"model '{folder}' was asked for",
            "its config.json says that bitsandbytes quantised it, but none of its weights is quantised",
            "take quantization_config out of its config.json and set quantize.weights",
        )
    return found


def take(folder: str, stored: Stored, read: Read) -> dict[str, Tensor]:
    """The tensors of `stored.spec.layout`, read from the folder."""
    spec, layout = stored.spec, stored.spec.layout
    parts = {name: read(stored.parts[name]) for name in ("codes", "absmax")}
    codes = parts["codes"].contiguous().view(-1).view(layout["codes"][1])
    count = math.prod(layout["codes"][0])
    made = {"codes": codes[:count].view(layout["codes"][0])}  # wider types may pad
    if not spec.double_quant:
        scale = scales_from(folder, stored.parts["absmax"], parts["absmax"])
        return made | {"absmax": scale.view(layout["absmax"][0])}
    nested = stored.parts["nested_absmax"]
    offset = _state(folder, stored.parts["state"], read)["nested_offset"]
    return made | {
        "absmax": parts["absmax"].view(layout["absmax"][0]),
        "nested_absmax": scales_from(folder, nested, read(nested)),
        "nested_offset": scales_from(folder, stored.parts["state"], torch.tensor([offset])),
    }


def _plan_4bit(folder: str, headers: Headers, read: Read) -> dict[str, Stored]:
    names = {name.partition(_STATE)[0] for name in headers if _STATE in name}
    for part in _PARTS:
        names |= {name.removesuffix(part) for name in headers if name.endswith(part)}
    parts = {f"{name}{part}" for name in names for part in _PARTS}
    bytes_ = {n for n, entry in headers.items() if entry["dtype"] == "U8" and _STATE not in n}
    return {
        name: _stored_4bit(folder, name, headers, read) for name in sorted(names | bytes_ - parts)
    }


def _stored_4bit(folder: str, name: str, headers: Headers, read: Read) -> Stored:
    keys = [f"{name}{_STATE}{scheme}" for scheme in _SCHEMES]
    key = next((key for key in keys if key in headers), None)
    if key is None:
        raise broken(folder, keys[0], "it is missing")
    if name not in headers:
        raise broken(folder, name, "it is missing")
    state = _state(folder, key, read)
    double = "nested_blocksize" in state
    try:
        spec = make_spec(
            str(state["quant_type"]),
            tuple(int(n) for n in state["shape"]),
            int(state["blocksize"]),
            double,
        )
        dtype = getattr(torch, str(state["dtype"]))
        if spec.scheme not in _SCHEMES or not isinstance(dtype, torch.dtype):
            raise ValueError(spec.scheme)
        if double and (state["nested_blocksize"] != _NESTED or "nested_offset" not in state):
            raise ValueError("nested_blocksize")
    except (KeyError, TypeError, ValueError, AttributeError, Refused) as error:
        raise broken(folder, key, f"it describes no known form ({error})") from error
    entry = headers[name]
    size = math.prod(entry["shape"]) * BITS.get(entry["dtype"], 0) // 8
    width = BITS.get(entry["dtype"], 8) // 8
    needed = math.prod(spec.layout["codes"][0])
    if not needed <= size < needed + width:
        raise broken(folder, name, f"it has {size} bytes where its shape {spec.shape} has {needed}")
    parts = {"codes": name, "absmax": f"{name}.absmax", "state": key}
    kinds = ("U8",) if double else FLOATING
    check_part(folder, parts["absmax"], headers, kinds, spec.num_blocks)
    parts["map"] = f"{name}.quant_map"
    _check_map(folder, parts["map"], headers, read, levels_of(spec.scheme))
    if double:
        parts["nested_absmax"] = f"{name}.nested_absmax"
        count = -(-spec.num_blocks // _NESTED)
        check_part(folder, parts["nested_absmax"], headers, FLOATING, count)
        parts["nested_map"] = f"{name}.nested_quant_map"
        _check_map(folder, parts["nested_map"], headers, read, dynamic_levels())
    return Stored(spec, parts, dtype)


def _plan_8bit(folder: str, headers: Headers, read: Read) -> dict[str, Stored]:
    names = {f"{n.removesuffix('SCB')}weight" for n in headers if n.endswith(".SCB")}
    names |= {n for n, entry in headers.items() if entry["dtype"] == "I8"}
    found = {}
    for name in sorted(names):
        entry = headers.get(name, {"shape": [], "dtype": "I8"})
        if len(entry["shape"]) != 2:
            fault = f"its shape is {list(entry['shape'])}" if name in headers else "it is missing"
            raise broken(folder, name, fault)
        check_part(folder, name, headers, ("I8",), math.prod(entry["shape"]))
        spec = make_spec("int8", tuple(entry["shape"]))
        scale, form = f"{_stem(name)}SCB", f"{_stem(name)}weight_format"
        check_part(folder, scale, headers, FLOATING, spec.num_blocks)
        parts = {"codes": name, "absmax": scale}
        if form in headers:
            if int(read(form).flatten()[0]):
                raise broken(folder, form, "its weight is stored in a GPU's tiles, not row by row")
            parts["form"] = form
        found[name] = Stored(spec, parts)
    return found


def _state(folder: str, key: str, read: Read) -> dict[str, Any]:
    """The facts of a 4-bit weight: JSON text as bytes."""
    try:
        value = json.loads(bytes(read(key).flatten().tolist()).decode("utf-8"))
    except ValueError as error:
        raise broken(folder, key, "it is no JSON text") from error
    if not isinstance(value, dict):
        raise broken(folder, key, "it is no JSON object")
    return value


def _check_map(folder: str, name: str, headers: Headers, read: Read, levels: Tensor) -> None:
    check_part(folder, name, headers, FLOATING, len(levels))
    if not torch.allclose(read(name).flatten().float(), levels, rtol=1e-5, atol=1e-7):
        raise broken(folder, name, "it is not the code book that its name says")


def _stem(name: str) -> str:
    return name.removesuffix("weight")
