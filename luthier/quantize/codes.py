"""Weights as few-bit codes and scales, and back: nf4, fp4, int8, int4. Plain functions of plain tensors.

A weight is cut into blocks of its flattened row-major numbers; each block has one scale, its absmax.
nf4 and fp4 are bitsandbytes' code books (QLoRA, Dettmers et al. 2023, arXiv:2305.14314), int8 its
vector-wise form (LLM.int8(), arXiv:2208.07339), int8 and int4 also weight-only per output channel or
per group of inputs. Works on any device, in pieces that stay in a CPU's cache. Modules around the
tensors are `linears.py`'s, products with them `products.py`'s.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from functools import cache

import torch
from torch import Tensor

from luthier.errors import Refused
from luthier.native import ops
from luthier.quantize.spec import CODE_BOOKS, NESTED_BLOCK, Scheme, Spec

# quantiles of a normal distribution, scaled to [-1, 1], with an exact zero (arXiv:2305.14314, appendix E)
_NF4 = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
    *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
    *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
    *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
)
# one sign bit and three bits of magnitude, in twelfths
_FP4 = (0, 0.0625, 8, 12, 4, 6, 2, 3)
# the codes of fp4 by value; of its two zeros code 0 is the lower one, as in bitsandbytes
_FP4_ORDER = (11, 10, 13, 12, 15, 14, 9, 0, 8, 1, 6, 7, 4, 5, 2, 3)

_LARGEST_CODE = {"int8": 127, "int4": 7}
_TINY = 1e-38  # instead of a zero absmax, as in bitsandbytes

Tensors = Mapping[str, Tensor]
"""The tensors of one quantised weight, by the names in `Spec.layout`."""


def quantize(weight: Tensor, spec: Spec) -> dict[str, Tensor]:
    """The tensors of `spec.layout` for `weight` (spec.shape, any floating type), on its device.

    Each number becomes the nearest level of its block; at equal distance the lower one (code books) or
    the even one (integers). Refused for weights that are not floating point or not finite.
    """
    if tuple(weight.shape) != spec.shape:
        raise ValueError(f"weight of shape {tuple(weight.shape)}, not {spec.shape}")
    if not weight.is_floating_point():
        raise Refused(
            f"quantising a weight of type {str(weight.dtype).split('.')[1]}",
            "it holds no floating-point numbers: it is quantised already",
            "start from the model in its original precision",
        )
    flat = weight.detach().reshape(-1)
    layout = spec.layout
    codes = torch.empty(layout["codes"][0], dtype=layout["codes"][1], device=flat.device)
    absmax = torch.empty(spec.num_blocks, dtype=torch.float32, device=flat.device)
    code_list, size, pair = codes.view(-1), spec.block_size, 8 // spec.bits
    for start, stop in _pieces(0, spec.numel, spec.unit, flat.device):
        whole = start + (stop - start) // size * size
        for begin, end in ((start, whole), (whole, stop)):  # the last block of all may be short
            if begin < end:
                x = flat[begin:end].float().view(-1, min(size, end - begin))  # [blocks, block]
                peak = x.abs().amax(1)
                absmax[begin // size : -(-end // size)] = peak
                code_list[begin // pair : -(-end // pair)] = _encode(x, peak, spec)
    if not bool(absmax.isfinite().all()):
        raise Refused(
            f"quantising a weight of shape {list(spec.shape)}",
            "it holds NaN or infinite values",
            "use another checkpoint",
        )
    if not spec.double_quant:
        return {"codes": codes, "absmax": absmax.view(layout["absmax"][0])}
    # in float64, so that it does not depend on how many threads add
    offset = absmax.mean(dtype=torch.float64).float().view(1)
    nested, peak = _quantize_dynamic(absmax - offset)
    return {
        "codes": codes,
        "absmax": nested.view(layout["absmax"][0]),
        "nested_absmax": peak,
        "nested_offset": offset,
    }


def scales(tensors: Tensors, spec: Spec) -> Tensor:
    """What the level of each block is multiplied by, float32 in absmax's shape.

    Absmax (code books) or absmax / 127, absmax / 7 (int8, int4: their levels are whole numbers).
    """
    absmax = tensors["absmax"]
    if spec.double_quant:
        table = _dynamic_levels(absmax.device)
        outer = tensors["nested_absmax"].repeat_interleave(spec.nested_block)[: spec.num_blocks]
        levels = table.index_select(0, absmax.view(-1).int())
        return (levels * outer + tensors["nested_offset"]).view(absmax.shape)
    if absmax.dtype != torch.float32:
        # a cast would go unnoticed and cost more than quantising did
        raise TypeError(f"scales of a quantised weight are float32, not {absmax.dtype}")
    return absmax if spec.scheme in CODE_BOOKS else absmax / _LARGEST_CODE[spec.scheme]


def dequantize_range(
    codes: Tensor, scale: Tensor, spec: Spec, start: int, stop: int, out: Tensor
) -> None:
    """Write numbers start..stop of the flattened weight into `out` (contiguous), in its type.

    `scale` is what `scales` gives. Each number is level x scale in float32, rounded once.
    """
    first = start // spec.unit * spec.unit
    last = min(-(-stop // spec.unit) * spec.unit, spec.numel)
    if (first, last) != (start, stop):  # a cut inside a unit: decode the units around it
        wide = out.new_empty(last - first)
        dequantize_range(codes, scale, spec, first, last, wide)
        out.view(-1).copy_(wide[start - first : stop - first])
        return
    codes, scale, flat, size = codes.view(-1), scale.view(-1), out.view(-1), spec.block_size
    if _by_native(spec, size, out):
        packed, scale = codes[None, start // 2 : -(-stop // 2)], scale[None, start // size :]
        ops.dequantize(packed, scale, levels_of(spec.scheme), size, flat[None])
        return
    for begin, end in _pieces(start, stop, spec.unit, codes.device):
        levels = _levels(codes[begin * spec.bits // 8 : -(-end * spec.bits // 8)], spec)
        levels, scale_of = levels[: end - begin], scale[begin // size : -(-end // size)]
        whole = (end - begin) // size
        levels[: whole * size].view(whole, size).mul_(scale_of[:whole, None])
        levels[whole * size :].mul_(scale_of[whole:])  # the short last block, if any
        flat[begin - start : end - start].copy_(levels)


def dequantize_columns(
    codes: Tensor, scale: Tensor, spec: Spec, start: int, stop: int, out: Tensor
) -> None:
    """Write inputs start..stop of all rows into `out` [rows, stop - start], where `spec.by_rows`.

    start and stop are multiples of `column_step(spec)`, or the end of the row.
    """
    width, size = stop - start, min(spec.block_size, stop - start)
    codes = codes.flatten(0, -2)[:, start * spec.bits // 8 : stop * spec.bits // 8]
    scale = scale.flatten(0, -2)[:, start // spec.block_size : -(-stop // spec.block_size)]
    if _by_native(spec, size, out):
        ops.dequantize(codes, scale, levels_of(spec.scheme), size, out)
        return
    for begin, end in _pieces(0, len(out) * width, width, codes.device):
        rows = slice(begin // width, end // width)
        levels = _levels(codes[rows].reshape(-1), spec)  # contiguous: the columns were strided
        levels.view(-1, size).mul_(scale[rows].reshape(-1, 1))
        out[rows].copy_(levels.view(-1, width))


def _by_native(spec: Spec, size: int, out: Tensor) -> bool:
    """Whether the kernel writes `out`; torch's path is its reference, and as fast for int8."""
    return spec.bits == 4 and size % 2 == 0 and ops.takes(out)


def column_step(spec: Spec) -> int:
    """Columns that `dequantize_columns` can cut at: between blocks, or anywhere in a block of a whole row."""
    return spec.unit if spec.block_size < spec.shape[-1] else 4


def dequantize(tensors: Tensors, spec: Spec, dtype: torch.dtype) -> Tensor:
    """The whole weight in its shape [..., out, in]."""
    out = torch.empty(spec.shape, dtype=dtype, device=tensors["codes"].device)
    dequantize_range(tensors["codes"], scales(tensors, spec), spec, 0, spec.numel, out)
    return out


def pack(codes: Tensor) -> Tensor:
    """4-bit codes (uint8, an even number of them) -> bytes, the first of two in the high half."""
    return (codes[0::2] << 4) | codes[1::2]


def unpack(packed: Tensor) -> Tensor:
    """The inverse of `pack`."""
    return torch.stack((packed >> 4, packed & 15), -1).view(-1)


def levels_of(scheme: Scheme) -> Tensor:
    """Value of each 4-bit code: [16], float32. int4 is stored with 8 added."""
    if scheme == "int4":
        return torch.arange(-8, 8, dtype=torch.float32)
    if scheme == "nf4":
        return torch.tensor(_NF4)
    half = torch.tensor(_FP4) / 12
    return torch.cat([half, -half])


def dynamic_levels() -> Tensor:
    """Value of each code of the signed dynamic 8-bit map: [256], float32, rising (arXiv:1511.04561).

    Seven decades below 1, each with twice as many evenly spaced levels as the one below it, and 0 and 1.
    """
    values = [0.0, 1.0]
    for i in range(7):
        edges = torch.linspace(0.1, 1, 2**i + 1)
        middles = 10.0 ** (i - 6) * (edges[:-1] + edges[1:]) / 2
        values += middles.tolist() + (-middles).tolist()
    return torch.tensor(sorted(values))


def piece(device: torch.device) -> int:
    """Numbers that are decoded or encoded at a time."""
    return 2**19 if device.type == "cpu" else 2**24


def _pieces(start: int, stop: int, unit: int, device: torch.device) -> Iterator[tuple[int, int]]:
    """Cut start..stop at multiples of `unit` numbers; on CPU into what stays in its caches."""
    step = max(1, piece(device) // unit) * unit
    for begin in range(start, stop, step):
        yield begin, min(begin + step, stop)


def _encode(x: Tensor, peak: Tensor, spec: Spec) -> Tensor:
    """x [blocks, block] with its absmax -> packed codes."""
    if spec.scheme in _LARGEST_CODE:
        # a block whose absmax is below float32's normal range would divide by next to nothing
        rate = _LARGEST_CODE[spec.scheme] / peak.clamp(min=1e-30)
        codes = (x * rate[:, None]).round_().view(-1)
        if spec.bits == 8:
            return codes.to(torch.int8)
        return pack(_even((codes + 8).to(torch.uint8), 8))
    # bitsandbytes multiplies by the reciprocal, but divides in a short last block
    peak = peak.clamp(min=_TINY)[:, None]
    scaled = (x / peak if x.shape[1] < spec.block_size else x * (1 / peak)).view(-1)
    below, bound, renumber = _cells(spec.scheme, x.device)
    # the upper half of a float names a cell; a cell holds at most one border between two levels
    cell = (scaled.view(torch.int32) >> 16).bitwise_and_(0xFFFF)
    ranks = below.index_select(0, cell)
    ranks += scaled > bound.index_select(0, cell)
    packed = pack(_even(ranks, int((levels_of(spec.scheme) < 0).sum())))
    return packed if renumber is None else renumber.index_select(0, packed.int())


def _even(codes: Tensor, zero: int) -> Tensor:
    """Codes with one for zero appended where their number is odd."""
    return torch.cat([codes, codes.new_full((1,), zero)]) if codes.numel() % 2 else codes


def _levels(codes: Tensor, spec: Spec) -> Tensor:
    """Levels of stored codes (contiguous): float32, one per code, up to three more where bytes are odd."""
    if spec.bits == 8:
        return codes.float()
    if codes.numel() % 2:
        codes = torch.cat([codes, codes.new_zeros(1)])
    if codes.storage_offset() % 2:
        codes = codes.clone()
    pairs = codes.view(torch.int16).int().bitwise_and_(0xFFFF)
    return _quads(spec.scheme, codes.device).index_select(0, pairs).view(torch.float32)


@cache
def _quads(scheme: Scheme, device: torch.device) -> Tensor:
    """For each value of two bytes the levels of their four codes, 16 bytes that are moved as one number.

    One look-up per four codes: on CPU several times faster than one per code. [65536], complex128 by
    name only. The first byte is the lower half of the value (little endian).
    """
    value = torch.arange(65536)
    codes = torch.stack((value >> 4, value, value >> 12, value >> 8), -1) & 15  # [65536, 4]
    return levels_of(scheme)[codes].view(torch.complex128).view(-1).to(device)


@cache
def _cells(scheme: Scheme, device: torch.device) -> tuple[Tensor, Tensor, Tensor | None]:
    """For each upper half of a float32: how many borders lie below all such floats, and the next border.

    Equal to a search among the 15 borders between levels for each number, and five times as fast on
    CPU. With it, for fp4, two codes by rank (a byte) -> two codes (a byte).
    """
    levels = levels_of(scheme).sort().values
    borders = (levels[1:] + levels[:-1]) / 2  # [15]
    upper = torch.arange(65536, dtype=torch.int32) << 16
    lowest = torch.where(upper < 0, upper | 0xFFFF, upper).view(torch.float32)
    below = torch.bucketize(lowest, borders)  # [65536]
    bound = torch.cat([borders, borders.new_tensor([math.inf])])[below]
    renumber = None
    if scheme == "fp4":
        order = torch.tensor(_FP4_ORDER, dtype=torch.uint8)
        renumber = pack(order[unpack(torch.arange(256).to(torch.uint8)).int()]).to(device)
    return below.to(device, torch.uint8), bound.to(device), renumber


@cache
def _dynamic_levels(device: torch.device) -> Tensor:
    return dynamic_levels().to(device)


def _quantize_dynamic(values: Tensor) -> tuple[Tensor, Tensor]:
    """Nearest dynamic 8-bit codes of `values` [n] in blocks of 256, and the blocks' absmax."""
    short = -len(values) % NESTED_BLOCK
    blocks = torch.nn.functional.pad(values, (0, short)).view(-1, NESTED_BLOCK)
    peak = blocks.abs().amax(1)
    table = _dynamic_levels(values.device)
    scaled = blocks / peak.clamp(min=_TINY)[:, None]
    codes = torch.bucketize(scaled, (table[1:] + table[:-1]) / 2)
    return codes.to(torch.uint8).view(-1)[: len(values)], peak
