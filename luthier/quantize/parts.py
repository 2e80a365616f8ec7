"""The part of a quantised weight that a tensor-parallel rank has: the same codes, each with the same scale.

A cut may go through blocks, which run along rows and over their ends. Then the part has smaller blocks, none of
which lies in two of the whole's, and each has the scale of the one that it was in: every number stands for what it
stood for, bit for bit. Codes of scales (double quantisation) are cut alike. Nothing is quantised anew.
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor

from luthier.errors import Refused
from luthier.parts import Part
from luthier.quantize.codes import Tensors
from luthier.quantize.spec import NESTED_BLOCK, Spec

LEAST = 8  # numbers of a block: of less, scales would outweigh the codes


def part_block(spec: Spec, how: Part) -> int:
    """The largest block of a part's numbers that lies in one block of the whole. `how.dim`: -2 outputs, -1 inputs."""
    width = spec.shape[-1]
    step = 1 if how.dim == -1 else width
    matrix = math.prod(spec.shape[-2:])
    ranks = (Part(how.dim, how.sizes, r, how.ranks, how.copies) for r in range(how.ranks))
    edges = {edge * step for part in ranks for stretch in part.stretches for edge in stretch}
    return math.gcd(spec.block_size, width if how.dim == -1 else matrix, matrix, *edges)


def check_part(spec: Spec, how: Part, name: str, asked: str) -> None:
    """Refuse a cut of layer `name` that would leave blocks of only a few numbers."""
    block = part_block(spec, how)
    if block < min(LEAST, spec.block_size):
        raise Refused(
            f"{asked} with quantize.weights={spec.scheme}",
            f"layer '{name}' would be cut through its {'inputs' if how.dim == -1 else 'outputs'} so that blocks of "
            f"{spec.block_size} numbers leave pieces of {block}, too few for a scale each",
            "leave it out of quantize.modules, or give another parallel.tensor or quantize.block_size",
        )


def take_part(tensors: Tensors, spec: Spec, how: Part) -> tuple[dict[str, Tensor], Spec]:
    """The stored tensors of a rank's part, and how they are stored."""
    block = part_block(spec, how)
    codes, scales = tensors["codes"], tensors["absmax"].view(-1)
    width, number = spec.shape[-1], spec.numel // block
    # blocks in a row, or in a matrix, of which the part has stretches
    length, step = (width, 1) if how.dim == -1 else (math.prod(spec.shape[-2:]), width)
    sizes = tuple(size * step // block for size in how.sizes)
    blocks = torch.arange(number, device=codes.device).view(-1, length // block)
    chosen = Part(1, sizes, how.rank, how.ranks, how.copies).of(blocks).view(-1)
    size = list(spec.shape)
    size[how.dim] = sum(how.own_sizes)
    made = replace(spec, shape=tuple(size), block_size=block)
    found = {"codes": codes.view(number, -1).index_select(0, chosen)}
    before = chosen * block // spec.block_size  # the block of the whole
    found["absmax"] = scales.index_select(0, before)
    if spec.double_quant:
        outer = before // spec.nested_block
        nested = _nested(outer)
        made = replace(made, nested_block=nested)
        found["nested_absmax"] = tensors["nested_absmax"].index_select(0, outer[::nested])
        found["nested_offset"] = tensors["nested_offset"]
    return {name: t.view(made.layout[name][0]) for name, t in found.items()}, made


def _nested(outer: Tensor) -> int:
    """The largest run of neighbours, a power of two, that are of one outer block throughout."""
    size = NESTED_BLOCK
    while size > 1:
        short = -len(outer) % size
        runs = torch.cat([outer, outer[-1:].expand(short)]).view(-1, size)
        if bool((runs == runs[:, :1]).all()):
            break
        size //= 2
    return size
