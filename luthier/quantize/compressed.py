"""compressed-tensors' layout of quantised folders: int4 and int8 weights, a scale per row or group of inputs.

Written as `pack-quantized`, which transformers and vLLM open for weight-only integers; read also as
`int-quantized` and `naive-quantized`. The library itself is not needed. Codes are taken over as they are;
a scale becomes the absmax that gives it: exactly where it has 16 bits, else to one unit in float32's last place.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from luthier.errors import Refused
from luthier.quantize.codes import pack, unpack
from luthier.quantize.spec import Spec, make_spec
from luthier.quantize.stored import (
    FLOATING,
    Headers,
    Read,
    Stored,
    broken,
    check_part,
    scales_from,
)

METHOD = "compressed-tensors"
PACKED, PLAIN = "pack-quantized", ("int-quantized", "naive-quantized")
_LARGEST = {8: 127, 4: 7}  # as in codes.py: scale = absmax / largest


def config(specs: Mapping[str, Spec], kept: list[str], dtype: torch.dtype) -> dict[str, Any]:
    """`quantization_config` of a folder. `specs`: path of each quantised layer -> its form. `kept`: paths of
    the linear layers that are not quantised."""
    groups: dict[tuple[int, int | None], list[str]] = {}
    for name, spec in specs.items():
        channel = spec.block_size == spec.shape[-1]
        groups.setdefault((spec.bits, None if channel else spec.block_size), []).append(name)
    return {
        "quant_method": METHOD,
        "format": PACKED,
        "quantization_status": "compressed",
        "config_groups": {
            f"group_{i}": {
                "targets": ["Linear"] if len(groups) == 1 else names,
                "weights": {
                    "num_bits": bits,
                    "type": "int",
                    "symmetric": True,
                    "strategy": "group" if size else "channel",
                    "group_size": size,
                    "dynamic": False,
                },
                "input_activations": None,
                "output_activations": None,
                "format": PACKED,
            }
            for i, ((bits, size), names) in enumerate(groups.items())
        },
        "ignore": kept,
        "kv_cache_scheme": None,
    }


def fits(spec: Spec) -> bool:
    """Whether this layout can hold the weight."""
    return spec.scheme in ("int4", "int8")


def write(
    name: str, tensors: Mapping[str, Tensor], spec: Spec, dtype: torch.dtype
) -> dict[str, Tensor]:
    """The tensors that stand for the weight `name` in a folder. Scales are float32, so that they are exact."""
    codes = tensors["codes"].reshape(-1)
    if spec.bits == 8:
        levels = codes.view(spec.shape).int().add(128).to(torch.uint8)
        levels = torch.nn.functional.pad(levels, (0, -spec.shape[-1] % 4))
    else:
        levels = unpack(codes)[: spec.numel].view(spec.shape)  # with 8 added
        levels = torch.nn.functional.pad(levels, (0, -spec.shape[-1] % 8))
        levels = levels[..., 0::2] | levels[..., 1::2] << 4  # the first of two in the low half
    scale = tensors["absmax"] / _LARGEST[spec.bits]
    return {
        f"{name}_packed": levels.contiguous().view(torch.int32),
        f"{name}_scale": scale.view(*spec.shape[:-1], -1),
        f"{name}_shape": torch.tensor(spec.shape),
    }


def plan(folder: str, fields: Mapping[str, Any], headers: Headers, read: Read) -> dict[str, Stored]:
    """Weight name -> how it is stored, for a folder with the `quantization_config` `fields`.

    Reads the small tensors only. Refused, by name: forms that are no symmetric weight-only integers of 4 or 8
    bits, and tensors that are missing or of another size or type.
    """
    bits = _check_groups(folder, fields)
    names = {n.removesuffix("_packed") for n in headers if n.endswith(".weight_packed")}
    names |= {n.removesuffix("_shape") for n in headers if n.endswith(".weight_shape")}
    names |= {
        n.removesuffix("_packed")
        for n in headers
        if f"{n.removesuffix('_packed')}_shape" in headers
    }
    plain = {n.removesuffix("_scale") for n in headers if n.endswith(".weight_scale")} - names
    plain |= {n for n, entry in headers.items() if entry["dtype"] == "I8"} - names
    found = {name: _stored_packed(folder, name, bits, headers, read) for name in sorted(names)}
    found |= {name: _stored_plain(folder, name, bits, headers) for name in sorted(plain)}
    if not found:
        raise Refused(
            f"model '{folder}' was asked for",
            "its config.json says that it is quantised (compressed-tensors), but none of its weights is",
            "take quantization_config out of its config.json and set quantize.weights",
        )
    for name in found:
        for part, what in (("_zero_point", "zero points"), ("_g_idx", "reordered groups")):
            if f"{name}{part}" in headers:
                raise _unknown(folder, f"{name} has {what}")
    return found


def take(folder: str, stored: Stored, read: Read) -> dict[str, Tensor]:
    """The tensors of `stored.spec.layout`, read from the folder."""
    spec, layout, largest = stored.spec, stored.spec.layout, _LARGEST[stored.spec.bits]
    if "packed" in stored.parts:
        levels = read(stored.parts["packed"]).contiguous().view(torch.uint8)  # [..., bytes]
        if spec.bits == 4:
            levels = torch.stack((levels & 15, levels >> 4), -1).flatten(-2)
        levels = levels[..., : spec.shape[-1]].reshape(-1)
        codes = (levels.int() - 128).to(torch.int8) if spec.bits == 8 else levels
    else:
        codes = read(stored.parts["codes"]).reshape(-1)
        if spec.bits == 4:
            if int(codes.min()) < -8 or int(codes.max()) > 7:
                raise broken(folder, stored.parts["codes"], "it holds codes outside of 4 bits")
            codes = (codes + 8).view(torch.uint8)
    if spec.bits == 4:
        codes = pack(torch.cat([codes, codes.new_full((1,), 8)]) if len(codes) % 2 else codes)
    scale = scales_from(folder, stored.parts["scale"], read(stored.parts["scale"]))
    absmax = _absmax(scale, largest).expand(spec.num_blocks).contiguous()
    return {"codes": codes.view(layout["codes"][0]), "absmax": absmax.view(layout["absmax"][0])}


def _absmax(scale: Tensor, largest: int) -> Tensor:
    """The float32 absmax whose division by `largest` gives `scale`, or comes nearest."""
    near = best = scale * largest
    for other in (torch.nextafter(near, near * 2), torch.nextafter(near, near * 0)):
        closer = (other / largest - scale).abs() < (best / largest - scale).abs()
        best = torch.where(closer, other, best)
    return best


def _check_groups(folder: str, fields: Mapping[str, Any]) -> set[int]:
    """The widths of the integers that the config announces; all else that it may say is refused."""
    for key in ("sparsity_config", "transform_config", "kv_cache_scheme"):
        if fields.get(key):
            raise _unknown(folder, f"it has a {key}")
    groups = fields.get("config_groups")
    if not isinstance(groups, dict) or not groups:
        raise _unknown(folder, "it has no config_groups")
    bits = set()
    for group in groups.values():
        weights = group.get("weights") if isinstance(group, dict) else None
        if not isinstance(weights, dict):
            raise _unknown(folder, "a group has no weights")
        layout = group.get("format") or fields.get("format") or PACKED
        if layout not in (PACKED, *PLAIN, "mixed-precision"):
            raise _unknown(folder, f"its format is {layout}")
        if group.get("input_activations") or group.get("output_activations"):
            raise _unknown(folder, "its activations are quantised too")
        facts = {"type": "int", "symmetric": True, "dynamic": False}
        other = [f"{k}={weights[k]}" for k, v in facts.items() if weights.get(k, v) != v]
        if weights.get("num_bits", 8) not in (4, 8):
            other.append(f"num_bits={weights['num_bits']}")
        if weights.get("strategy") not in (None, "channel", "group", "tensor"):
            other.append(f"strategy={weights['strategy']}")
        if other:
            raise _unknown(folder, f"its weights have {', '.join(other)}")
        bits.add(int(weights.get("num_bits", 8)))
    return bits


def _stored_packed(folder: str, name: str, bits: set[int], headers: Headers, read: Read) -> Stored:
    packed, shaped = f"{name}_packed", f"{name}_shape"
    for part in (packed, shaped):
        if part not in headers:
            raise broken(folder, part, "it is missing")
    check_part(folder, shaped, headers, ("I64", "I32"), len(headers[packed]["shape"]))
    shape = tuple(int(n) for n in read(shaped).flatten().tolist())
    if len(shape) < 2 or min(shape) < 1:
        raise broken(folder, shaped, f"it says {list(shape)}, which is no matrix")
    stored = tuple(headers[packed]["shape"])
    # where both widths would fill as many words, the config decides, or 8 where it leaves both open
    fitting = [b for b in sorted(bits) if stored == (*shape[:-1], -(-shape[-1] * b // 32))]
    if not fitting:
        wanted = " or ".join(str(b) for b in sorted(bits))
        raise broken(
            folder,
            packed,
            f"its shape {list(stored)} is not that of {list(shape)} in {wanted} bits",
        )
    check_part(folder, packed, headers, ("I32",), math.prod(stored))
    spec, scale = _with_scale(folder, name, fitting[-1], shape, headers)
    return Stored(spec, {"packed": packed, "scale": scale, "shape": shaped})


def _stored_plain(folder: str, name: str, bits: set[int], headers: Headers) -> Stored:
    if name not in headers:
        raise broken(folder, name, "it is missing")
    shape = tuple(headers[name]["shape"])
    if len(shape) < 2:
        raise broken(folder, name, f"its shape {list(shape)} is no matrix")
    check_part(folder, name, headers, ("I8",), math.prod(shape))
    spec, scale = _with_scale(folder, name, max(bits), shape, headers)
    return Stored(spec, {"codes": name, "scale": scale})


def _with_scale(
    folder: str, name: str, bits: int, shape: tuple[int, ...], headers: Headers
) -> tuple[Spec, str]:
    scale = f"{name}_scale"
    if scale not in headers:
        raise broken(folder, scale, "it is missing")
    rows, count = math.prod(shape[:-1]), math.prod(headers[scale]["shape"])
    per_row = 1 if count == 1 else count // rows  # one scale may stand for the whole weight
    if count != 1 and (count % rows or per_row < 1 or shape[-1] % per_row):
        raise broken(folder, scale, f"{count} scales do not divide a weight of shape {list(shape)}")
    check_part(folder, scale, headers, FLOATING, count)
    return make_spec(f"int{bits}", shape, shape[-1] // per_row), scale


def _unknown(folder: str, found: str) -> Refused:
    return Refused(
        f"model '{folder}' was asked for",
        f"it is quantised by compressed-tensors in a form that is not known here: {found}",
        "give the original model, or one with symmetric weight-only int4 or int8",
    )
