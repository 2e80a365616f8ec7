"""How a weight is cut into blocks of few-bit codes: scheme, sizes, and the tensors that hold them."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

import torch

from luthier.errors import Refused, suggest

Scheme = Literal["nf4", "fp4", "int8", "int4"]

CODE_BOOKS = ("nf4", "fp4")
BLOCK_SIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)  # of code books, as in bitsandbytes
NESTED_BLOCK = 256


@dataclass(frozen=True)
class Spec:
    """How a weight of `shape` [..., out, in] is stored. Make it with `make_spec`, which checks it."""

    scheme: Scheme
    shape: tuple[int, ...]
    block_size: int
    double_quant: bool
    nested_block: int = NESTED_BLOCK  # scales per scale of theirs, under double_quant

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def num_blocks(self) -> int:
        return -(-self.numel // self.block_size)

    @property
    def bits(self) -> int:
        return 8 if self.scheme == "int8" else 4

    @property
    def unit(self) -> int:
        """Numbers that can be decoded alone: whole blocks, and whole pairs of bytes of 4-bit codes."""
        return self.block_size if self.bits == 8 else math.lcm(self.block_size, 4)

    @property
    def by_rows(self) -> bool:
        """Whether each row has its own blocks and bytes: then the weight's dimensions are those of the tensors."""
        return self.shape[-1] % self.unit == 0

    @property
    def layout(self) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """Name -> (shape, dtype) of the stored tensors.

        `codes`: int8, or uint8 with two 4-bit codes per byte, the first in the high half. `absmax`:
        float32, or uint8 under `double_quant`, where it is dynamic 8-bit codes of absmax - nested_offset in
        blocks of `nested_block` with scales `nested_absmax`.
        """
        if self.by_rows:
            lead = self.shape[:-1]
            codes = (*lead, self.shape[-1] * self.bits // 8)
            absmax = (*lead, self.shape[-1] // self.block_size)
        else:
            codes, absmax = (-(-self.numel * self.bits // 8),), (self.num_blocks,)
        code_type = torch.int8 if self.bits == 8 else torch.uint8
        if not self.double_quant:
            return {"codes": (codes, code_type), "absmax": (absmax, torch.float32)}
        nested = -(-self.num_blocks // self.nested_block)
        return {
            "codes": (codes, code_type),
            "absmax": (absmax, torch.uint8),
            "nested_absmax": ((nested,), torch.float32),
            "nested_offset": ((1,), torch.float32),
        }


def make_spec(
    scheme: str, shape: tuple[int, ...], block_size: int | None = None, double_quant: bool = False
) -> Spec:
    """The checked `Spec` of a weight [..., out, in].

    `block_size`: numbers per scale. None is 64 for nf4 and fp4, whose blocks run on over the ends of
    rows, and a whole row (one scale per output channel) for int8 and int4. Refused: an unknown scheme, a
    block size that the scheme or the shape does not allow, `double_quant` of integers.
    """
    if scheme not in get_args(Scheme):
        raise Refused(
            f"quantize.weights={scheme}",
            f"known are {', '.join(get_args(Scheme))}",
            suggest(scheme, get_args(Scheme)) or "give one of these",
        )
    if len(shape) < 2 or math.prod(shape) == 0:
        raise Refused(
            f"quantising a weight of shape {list(shape)}",
            "only matrices, or stacks of them, with at least one number are quantised",
            "leave this layer out of quantize.modules",
        )
    if scheme in CODE_BOOKS:
        block_size = 64 if block_size is None else block_size
        if block_size not in BLOCK_SIZES:
            raise Refused(
                f"quantize.block_size={block_size} with quantize.weights={scheme}",
                f"its block sizes are {', '.join(map(str, BLOCK_SIZES))}",
                "give one of these",
            )
    else:
        block_size = shape[-1] if block_size is None else block_size
        if block_size < 1 or shape[-1] % block_size:
            raise Refused(
                f"quantize.block_size={block_size} with quantize.weights={scheme}",
                f"it does not divide the {shape[-1]} inputs of a weight of shape {list(shape)}",
                "give a divisor, or none for one scale per output channel",
            )
        if double_quant:
            raise Refused(
                f"quantize.double_quant=true with quantize.weights={scheme}",
                "only the scales of nf4 and fp4 are quantised a second time",
                "set quantize.double_quant=false, or quantize.weights=nf4",
            )
    return Spec(scheme, tuple(shape), block_size, double_quant)  # pyright: ignore[reportArgumentType]
