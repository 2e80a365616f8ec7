"""A tensor-parallel rank's part of a quantised weight stands for the same numbers, bit for bit, as in the whole."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from luthier.bases import storage_words
from luthier.errors import Refused
from luthier.layers import count
from luthier.parts import Part
from luthier.quantize.linears import QuantizedLinear, QuantizedTensor
from luthier.quantize.parts import part_block
from luthier.quantize.spec import make_spec

NF4D = {"scheme": "nf4", "double_quant": True}
CASES: list[tuple[Any, tuple[int, ...], dict[str, Any], int]] = [
    # dim, sizes of the pieces, scheme, block that is left; of a weight 192 -> the sum of sizes, or the other way
    (-2, (96,), {"scheme": "nf4"}, 64),
    (-2, (64, 32, 32), NF4D, 64),
    (-2, (20, 20), {"scheme": "fp4", "block_size": 128}, 128),
    (-1, (192,), NF4D, 32),
    (-1, (256,), NF4D, 64),
    (-1, (96,), {"scheme": "nf4"}, 16),  # rows end in blocks
    (-1, (192,), {"scheme": "int8"}, 96),
    (-1, (192,), {"scheme": "int4"}, 96),
    (-1, (192,), {"scheme": "int4", "block_size": 64}, 32),
    (-2, (64, 32, 32), {"scheme": "int4"}, 192),
    (-2, (10, 10), {"scheme": "int8"}, 192),
]


@pytest.mark.parametrize(("dim", "sizes", "options", "block"), CASES)
@pytest.mark.parametrize("lead", [(), (3,)], ids=["layer", "stack"])
def test_a_part_stands_for_the_same_numbers(
    dim: int, sizes: tuple[int, ...], options: dict[str, Any], block: int, lead: tuple[int, ...]
) -> None:
    shape = [*lead, 192, 192]
    shape[dim] = sum(sizes)
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    weight *= torch.linspace(0.1, 3, shape[-1]) * torch.linspace(0.1, 3, shape[-2])[:, None]
    whole = QuantizedTensor.from_weight(weight, **options).dequantize()
    parts = []
    for rank in range(2):
        how = Part(dim, sizes, rank, 2)
        held = QuantizedTensor.from_weight(weight, **options)
        held.keep(how)
        assert held.block_size == block or lead
        assert torch.equal(held.dequantize(), how.of(whole))
        x = torch.randn(5, held.spec.shape[-1], dtype=torch.float64)
        index = 1 if lead else None
        dense = held.dequantize(torch.float64, index)
        torch.testing.assert_close(held.multiply(x, index=index), x @ dense.t())
        torch.testing.assert_close(
            held.multiply_back(x @ dense.t(), index=index), x @ dense.t() @ dense
        )
        parts.append(held.dequantize())
    assert torch.equal(how.join(parts), whole)


def test_double_quantised_scales_stay_codes() -> None:
    """A layer of a real size: its part takes half the memory, scales and theirs too."""
    weight = torch.randn(512, 1024, generator=torch.Generator().manual_seed(1))
    for dim in (-2, -1):
        held = QuantizedTensor.from_weight(weight, "nf4", double_quant=True)
        before = sum(t.nbytes for t in held.tensors().values())
        held.keep(Part(dim, (weight.shape[dim],), 1, 2))
        assert held.absmax.dtype == torch.uint8
        assert sum(t.nbytes for t in held.tensors().values()) < 0.51 * before


def test_a_copied_part() -> None:
    """Two groups of keys on four ranks: neighbours have the same one."""
    weight = torch.randn(32, 128, generator=torch.Generator().manual_seed(1))
    whole = QuantizedTensor.from_weight(weight, "nf4").dequantize()
    for rank in range(4):
        how = Part(-2, (32,), rank, 4, (2,))
        layer = QuantizedLinear.meta(128, 32, "nf4")
        layer.load_from(weight)
        layer.keep(how)
        assert layer.out_features == 16
        assert torch.equal(layer.dequantize(), whole[rank // 2 * 16 :][:16])
        assert storage_words(layer) == "4,096 weights in nf4, 0 MB per process"
        assert count(layer) == (0, 4096)


def test_blocks_that_are_cut_to_pieces_are_refused() -> None:
    spec, how = make_spec("nf4", (8, 68)), Part(-1, (68,), 0, 2)
    assert part_block(spec, how) == 2
    layer = QuantizedLinear.meta(68, 8, "nf4")
    with pytest.raises(Refused, match=r"layer 'x' would be cut .* leave pieces of 2"):
        layer.check_part(how, "x", "parallel.tensor=2")
