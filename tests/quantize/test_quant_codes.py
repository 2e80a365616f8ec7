"""Quantised numbers against a slow reference written from the formulas, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from luthier import native
from luthier.errors import Refused
from luthier.quantize import codes, dequantize, make_spec, quantize
from luthier.quantize.spec import Scheme, Spec
from luthier.seeding import generator

SCHEMES: tuple[Scheme, ...] = ("nf4", "fp4", "int8", "int4")
# whole blocks in rows; blocks over the ends of rows; a short last block; odd rows; one odd row; a stack
SHAPES = [(6, 128), (16, 48), (10, 40), (7, 33), (1, 1), (3, 5, 64), (2, 3, 7)]


def weight_of(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=generator(seed, "weight")).mul(0.05).to(dtype)


def slow(weight: Tensor, spec: Spec) -> tuple[list[int], list[float], list[float]]:
    """(codes, absmax, values) number by number: the nearest level of each, in float64."""
    numbers = weight.float().double().flatten().tolist()
    size = spec.block_size
    absmax = [max(map(abs, numbers[i : i + size])) for i in range(0, len(numbers), size)]
    found, values = [], []
    top = {"int8": 127, "int4": 7}.get(spec.scheme)
    levels = list(range(-top, top + 1)) if top else codes.levels_of(spec.scheme).double().tolist()
    for i, number in enumerate(numbers):
        scale = absmax[i // size] / (top or 1)
        distances = [abs(number - level * scale) for level in levels]
        nearest = distances.index(min(distances))
        if spec.scheme == "fp4" and nearest == 0 and number > 0:
            nearest = 8  # fp4 has two zeros; bitsandbytes on CPU takes the second for small positive numbers
        found.append(levels[nearest] if top else nearest)
        values.append(levels[nearest] * scale)
    return found, absmax, values


def stored_codes(tensors: dict[str, Tensor], spec: Spec) -> list[int]:
    if spec.scheme == "int8":
        return tensors["codes"].flatten().tolist()
    found = codes.unpack(tensors["codes"].flatten())[: spec.numel].tolist()
    return [code - 8 for code in found] if spec.scheme == "int4" else found


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("scheme", SCHEMES)
def test_codes_scales_and_values_are_those_of_the_formulas(
    scheme: Scheme, shape: tuple[int, ...], relative: Any
) -> None:
    weight, spec = weight_of(*shape), make_spec(scheme, shape)
    tensors = quantize(weight, spec)
    found, absmax, values = slow(weight, spec)
    assert stored_codes(tensors, spec) == found
    assert tensors["absmax"].flatten().tolist() == absmax
    dense = dequantize(tensors, spec, torch.float32)
    assert dense.shape == shape
    # one rounding of the scale and one of the product
    assert relative(dense, torch.tensor(values).view(shape)) < 1e-6


@pytest.mark.parametrize("scheme", ["int8", "int4"])
def test_groups_along_the_inputs_have_scales_of_their_own(scheme: Scheme) -> None:
    weight = weight_of(4, 96) * torch.tensor([1.0, 10, 100]).repeat_interleave(32)
    spec = make_spec(scheme, (4, 96), 32)
    tensors = quantize(weight, spec)
    assert tensors["absmax"].shape == (4, 3)
    assert torch.equal(tensors["absmax"], weight.view(4, 3, 32).abs().amax(-1))
    assert stored_codes(tensors, spec) == slow(weight, spec)[0]
    top = 127 if scheme == "int8" else 7
    assert torch.equal(codes.scales(tensors, spec), tensors["absmax"] / top)
    per_row = quantize(weight, make_spec(scheme, (4, 96)))
    assert per_row["absmax"].shape == (4, 1)


@pytest.mark.parametrize("scheme", ["nf4", "fp4"])
def test_every_border_between_levels_and_its_neighbours(scheme: Scheme) -> None:
    """With an absmax of 1 the numbers are looked up as they are; a border itself falls to the lower level."""
    levels = codes.levels_of(scheme)
    order = levels.sort().values
    borders = (order[1:] + order[:-1]) / 2
    above = torch.nextafter(borders, torch.tensor(2.0))
    below = torch.nextafter(borders, torch.tensor(-2.0))
    blocks = torch.zeros(3, 64)
    for row, numbers in zip(blocks, (below, borders, above), strict=True):
        row[0], row[1:16] = 1, numbers
    got = dequantize(quantize(blocks, spec := make_spec(scheme, (3, 64))), spec, torch.float32)
    assert torch.equal(got[0, 1:16], order[:-1])
    assert torch.equal(got[1, 1:16], order[:-1])
    assert torch.equal(got[2, 1:16], order[1:])


def test_whole_blocks_multiply_by_the_reciprocal_and_a_short_one_divides() -> None:
    """As bitsandbytes: where the two fall on different sides of a border, the codes tell which it was."""
    order = codes.levels_of("nf4")
    border = (order[13] + order[14]) / 2
    peaks = 1 + torch.rand(200_000, generator=generator(0, "peaks"))
    numbers = border * peaks
    product, quotient = numbers * (1 / peaks) > border, numbers / peaks > border
    chosen = (product != quotient).nonzero().flatten()[:20].tolist()
    assert chosen
    for i in chosen:
        whole, short = torch.zeros(1, 64), torch.zeros(1, 62)
        for row in (whole, short):
            row[0, 0], row[0, 1] = peaks[i], numbers[i]
        found = [
            codes.unpack(quantize(row, make_spec("nf4", tuple(row.shape)))["codes"].flatten())[1]
            for row in (whole, short)
        ]
        assert found == [13 + int(product[i]), 13 + int(quotient[i])]


@pytest.mark.parametrize("scheme", ["nf4", "fp4"])
def test_a_cell_of_the_look_up_holds_one_border_at_most(scheme: Scheme) -> None:
    order = codes.levels_of(scheme).sort().values
    cells = ((order[1:] + order[:-1]) / 2).view(torch.int32) >> 16
    assert len(cells.unique()) == 15


def test_integers_round_half_to_even() -> None:
    row = torch.tensor([[127.0, 0.5, 1.5, 2.5, -0.5, -1.5, -2.5, -127.0]])
    tensors = quantize(row, make_spec("int8", (1, 8)))
    assert tensors["codes"].tolist() == [[127, 0, 2, 2, 0, -2, -2, -127]]


@pytest.mark.parametrize("shape", [(64, 256), (10, 40)], ids=str)
def test_nested_scales_are_those_of_the_formulas(shape: tuple[int, ...]) -> None:
    weight, spec = weight_of(*shape), make_spec("nf4", shape, 64, True)
    once = quantize(weight, make_spec("nf4", shape, 64))
    tensors = quantize(weight, spec)
    assert torch.equal(tensors["codes"], once["codes"])
    absmax = once["absmax"].flatten()
    offset = sum(absmax.tolist()) / len(absmax)
    assert tensors["nested_offset"].item() == pytest.approx(offset, rel=1e-7)
    table = codes.dynamic_levels().tolist()
    assert len(set(table)) == 256
    for i, code in enumerate(tensors["absmax"].flatten().tolist()):
        block = absmax[i // 256 * 256 : (i // 256 + 1) * 256] - tensors["nested_offset"]
        peak = block.abs().max().item()
        distances = [abs((absmax[i].item() - offset) / peak - level) for level in table]
        assert distances[code] <= min(distances) + 1e-6  # float32 of the difference, relative to 1
        assert tensors["nested_absmax"][i // 256].item() == pytest.approx(peak, rel=1e-6)
    error = (codes.scales(tensors, spec).flatten() - absmax).abs().max()
    # half the widest gap between levels, 0.9 / 128, of the largest deviation
    assert 0 < error <= 0.9 / 128 * tensors["nested_absmax"].max() * 1.001


@pytest.mark.parametrize("shape", [(6, 128), (7, 33), (3, 5, 64)], ids=str)
@pytest.mark.parametrize(
    ("scheme", "double"), [*((s, False) for s in SCHEMES), ("nf4", True), ("fp4", True)]
)
def test_what_was_quantised_quantises_to_itself(
    scheme: Scheme, double: bool, shape: tuple[int, ...], relative: Any
) -> None:
    spec = make_spec(scheme, shape, double_quant=double)
    first = quantize(weight_of(*shape), spec)
    again = quantize(dequantize(first, spec, torch.float32), spec)
    values = [dequantize(t, spec, torch.float32) for t in (first, again)]
    # nested scales move a little each time: their offset is a new mean
    assert relative(values[1], values[0]) < (0.02 if double else 1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_values_are_rounded_once(scheme: Scheme, dtype: torch.dtype) -> None:
    spec = make_spec(scheme, (6, 128))
    tensors = quantize(weight_of(6, 128, dtype=dtype), spec)
    exact = dequantize(tensors, spec, torch.float32)
    assert torch.equal(dequantize(tensors, spec, dtype), exact.to(dtype))


@pytest.mark.parametrize("shape", [(6, 128), (7, 33), (9, 50)], ids=str)
@pytest.mark.parametrize("scheme", SCHEMES)
def test_any_part_is_that_part_of_the_whole(scheme: Scheme, shape: tuple[int, int]) -> None:
    spec = make_spec(scheme, shape)
    tensors = quantize(weight_of(*shape), spec)
    whole = dequantize(tensors, spec, torch.float32).flatten()
    scale = codes.scales(tensors, spec)
    for start, stop in ((0, 1), (1, 2), (3, 131), (shape[1], 3 * shape[1]), (65, spec.numel)):
        out = torch.empty(stop - start)
        codes.dequantize_range(tensors["codes"], scale, spec, start, stop, out)
        assert torch.equal(out, whole[start:stop])


# whole blocks in rows, also small ones; blocks over the ends of rows, a short last one; a stack; rows as blocks
KERNEL_CASES = [
    *((scheme, (6, 128), 64) for scheme in ("nf4", "fp4", "int4")),
    *((scheme, (7, 33), None) for scheme in ("nf4", "fp4")),
    *((scheme, (3, 5, 64), 32) for scheme in ("nf4", "fp4", "int4")),
    *((scheme, (3, 2100), None) for scheme in ("nf4", "fp4", "int4")),
    ("int4", (9, 130), 26),
    ("int4", (7, 33), None),  # odd: left to torch
]


@pytest.mark.skipif(native.library() is None, reason=native.status())
@pytest.mark.parametrize(("scheme", "shape", "block"), KERNEL_CASES, ids=str)
def test_the_kernel_gives_the_bits_of_the_path_in_torch(
    scheme: Scheme, shape: tuple[int, ...], block: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    # from rows that bfloat16 rounds to zero, or to numbers below its normal ones, to large ones
    rows = torch.logspace(-44, 30, shape[-2])[:, None]
    weight, spec = weight_of(*shape) * rows, make_spec(scheme, shape, block)
    tensors, results = quantize(weight, spec), []
    scale = codes.scales(tensors, spec)
    lead, width = weight[..., 0].numel(), shape[-1]
    parts = [(0, spec.numel), (width + 1, spec.numel - 1), (spec.unit, spec.numel)]
    for switch in ("1", "0"):
        monkeypatch.setenv(native.SWITCH, switch)
        found = [torch.empty(max(0, b - a), dtype=torch.bfloat16) for a, b in parts]
        for (start, stop), out in zip(parts, found, strict=True):
            if start < stop:
                codes.dequantize_range(tensors["codes"], scale, spec, start, stop, out)
        if spec.by_rows:
            step = codes.column_step(spec)
            for start in (0, step):
                found.append(torch.empty(lead, width - start, dtype=torch.bfloat16))
                packed = tensors["codes"]
                codes.dequantize_columns(packed, scale, spec, start, width, found[-1])
        results.append(torch.cat([x.flatten() for x in found]).view(torch.int16))
    assert torch.equal(*results)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_pieces_do_not_show(scheme: Scheme, monkeypatch: pytest.MonkeyPatch) -> None:
    weight, spec = weight_of(37, 75), make_spec(scheme, (37, 75))
    whole = quantize(weight, spec)
    values = dequantize(whole, spec, torch.float32)
    pieces = codes._pieces

    def small(start: int, stop: int, unit: int, device: torch.device) -> Any:
        assert list(pieces(start, stop, unit, device)) == [(start, stop)]
        return [(i, min(i + unit, stop)) for i in range(start, stop, unit)]

    monkeypatch.setattr(codes, "_pieces", small)
    cut = quantize(weight, spec)
    assert all(torch.equal(cut[name], whole[name]) for name in whole)
    assert torch.equal(dequantize(cut, spec, torch.float32), values)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_codes_may_lie_anywhere_in_memory(scheme: Scheme) -> None:
    spec = make_spec(scheme, (6, 128))
    tensors = quantize(weight_of(6, 128), spec)
    values = dequantize(tensors, spec, torch.float32)
    held = tensors["codes"]
    memory = torch.empty(held.numel() + 1, dtype=held.dtype)
    memory[1:] = held.flatten()
    tensors["codes"] = memory[1:].view(held.shape)  # at an odd byte
    assert torch.equal(dequantize(tensors, spec, torch.float32), values)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_block_of_zeros_stays_zero(scheme: Scheme) -> None:
    weight = weight_of(4, 64)
    weight[1] = 0
    spec = make_spec(scheme, (4, 64))
    tensors = quantize(weight, spec)
    levels = codes._levels(tensors["codes"].flatten(), spec).view(4, 64)
    assert torch.equal(levels[1], torch.zeros(64))
    dense = dequantize(tensors, spec, torch.float32)
    assert torch.equal(dense[1], torch.zeros(64))
    assert dense[0].abs().max() > 0
    assert dense.isfinite().all()


def test_pack_puts_the_first_of_two_in_the_high_half() -> None:
    four = torch.tensor([1, 15, 0, 7], dtype=torch.uint8)
    assert codes.pack(four).tolist() == [0x1F, 0x07]
    assert torch.equal(codes.unpack(codes.pack(four)), four)


def test_the_dimensions_stay_where_rows_hold_whole_blocks() -> None:
    assert make_spec("nf4", (3, 8, 128)).layout["codes"][0] == (3, 8, 64)
    assert make_spec("nf4", (3, 8, 128)).layout["absmax"][0] == (3, 8, 2)
    assert make_spec("nf4", (10, 40)).layout["codes"][0] == (200,)
    assert make_spec("nf4", (10, 40)).layout["absmax"][0] == (7,)
    assert make_spec("int8", (3, 8, 7)).layout["codes"][0] == (3, 8, 7)
    assert make_spec("int4", (3, 7)).layout["codes"][0] == (11,)


@pytest.mark.parametrize(
    ("scheme", "shape", "options", "words"),
    [
        ("nf5", (4, 64), {}, ["quantize.weights=nf5", "did you mean 'nf4'", "int8"]),
        ("nf4", (4, 64), {"block_size": 48}, ["block_size=48", "64, 128"]),
        ("fp4", (4, 64), {"block_size": 0}, ["block_size=0"]),
        ("int4", (4, 96), {"block_size": 64}, ["block_size=64", "96 inputs"]),
        ("int8", (4, 96), {"block_size": -1}, ["block_size=-1", "one scale per output channel"]),
        ("int8", (4, 64), {"double_quant": True}, ["double_quant=true", "int8"]),
        ("nf4", (64,), {}, ["shape [64]", "quantize.modules"]),
        ("nf4", (0, 64), {}, ["shape [0, 64]"]),
    ],
)
def test_what_cannot_be_stored_is_refused(
    scheme: str, shape: tuple[int, ...], options: dict[str, Any], words: list[str]
) -> None:
    with pytest.raises(Refused) as caught:
        make_spec(scheme, shape, **options)
    assert all(word in str(caught.value) for word in words), caught.value


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_weights_that_are_not_finite_are_refused(scheme: Scheme, value: float) -> None:
    weight = weight_of(7, 33)
    weight[6, 32] = value
    with pytest.raises(Refused, match="NaN or infinite"):
        quantize(weight, make_spec(scheme, (7, 33)))


def test_codes_are_not_quantised_again() -> None:
    spec = make_spec("nf4", (4, 128))
    stored = quantize(weight_of(4, 128), spec)["codes"]
    with pytest.raises(Refused, match="quantised already"):
        quantize(stored, make_spec("nf4", (4, 64)))
