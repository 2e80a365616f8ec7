"""Quantised numbers of bitsandbytes and Paddle, computed by their own code; bitsandbytes itself where installed."""

from __future__ import annotations

import json
import logging
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from luthier.quantize import codes, dequantize, make_spec, quantize
from luthier.seeding import generator

FOLDER = (
    Path(os.environ.get("LUTHIER_GOLDEN", Path(__file__).parents[1] / "golden" / "data")) / "data"
)


def cases(*methods: str) -> list[Any]:
    path = FOLDER / "manifest.json"
    if not path.is_file():
        return [pytest.param(None, id="absent", marks=pytest.mark.skip(reason=f"{path} is absent"))]
    found = json.loads(path.read_text("utf-8"))["cases"]
    return [pytest.param(case, id=case["id"]) for case in found if case["method"] in methods]


def tensors_of(case: dict[str, Any]) -> dict[str, Tensor]:
    stored = load_file(FOLDER / case["file"])
    return {name: stored[entry["key"]] for name, entry in case["tensors"].items()}


@pytest.mark.parametrize("case", cases("nf4", "fp4"))
def test_code_books_equal_bitsandbytes_bit_for_bit(case: dict[str, Any], relative: Any) -> None:
    golden, hyper = tensors_of(case), case["hyper"]
    weight = golden["weight"]
    spec = make_spec(case["method"], tuple(weight.shape), hyper["blocksize"], hyper["double_quant"])
    ours = quantize(weight, spec)
    assert torch.equal(ours["codes"].flatten(), golden["packed"])
    if "codes" in golden:
        assert torch.equal(codes.unpack(ours["codes"].flatten())[: spec.numel], golden["codes"])
    if "table" in golden:
        assert torch.equal(codes.levels_of(case["method"]), golden["table"])
    if hyper["double_quant"]:
        assert torch.equal(codes.dynamic_levels(), golden["table8"])
        assert ours["nested_offset"].item() == hyper["offset"]
        assert torch.equal(ours["absmax"].flatten(), golden["absmax_codes"])
        assert torch.equal(ours["nested_absmax"], golden["absmax2"])
        scale = codes.scales(ours, spec).flatten()
        assert relative(scale, golden["absmax_dequantized"]) < 1e-6
    else:
        assert torch.equal(ours["absmax"].flatten(), golden["absmax"])
    assert relative(dequantize(ours, spec, torch.float32), golden["dequantized"]) < 1e-6


@pytest.mark.parametrize("case", cases("dynamic8"))
def test_dynamic_8_bit_codes(case: dict[str, Any]) -> None:
    golden = tensors_of(case)
    found, peak = codes._quantize_dynamic(golden["weight"].flatten())
    assert torch.equal(peak, golden["absmax"])
    assert torch.equal(codes.dynamic_levels(), golden["table8"])
    # bitsandbytes looks numbers up on a grid of 2/65535 on CPU: beside a border it may take the next code
    wrong = (found != golden["codes"].flatten()).nonzero().flatten()
    scaled = (golden["weight"].view(-1, 256) / peak[:, None]).flatten()[wrong]
    table = codes.dynamic_levels()
    border = (table[found[wrong].int()] + table[golden["codes"].flatten()[wrong].int()]) / 2
    assert bool(((scaled - border).abs() < 2 / 65535).all())
    assert len(wrong) < 0.005 * len(found)


@pytest.mark.parametrize("case", cases("weight_only"))
def test_integers_equal_paddle(case: dict[str, Any]) -> None:
    golden, hyper = tensors_of(case), case["hyper"]
    weight = golden["weight"].t()  # [out, in]
    spec = make_spec("int4" if hyper["qmax"] == 7 else "int8", tuple(weight.shape))
    ours = quantize(weight, spec)
    assert torch.equal(ours["absmax"].flatten(), golden["absmax"])
    scale = codes.scales(ours, spec).flatten()
    if "quantized" in golden:  # llm.int8; the payload of the others is permuted for its kernels
        assert torch.equal(ours["codes"], golden["quantized"])
        assert torch.equal(scale, golden["scale"])
    else:  # theirs is stored in float16
        torch.testing.assert_close(scale, golden["scale"], rtol=2**-10, atol=0)


@pytest.fixture(scope="module")
def bitsandbytes() -> Any:
    logging.getLogger("bitsandbytes").setLevel(logging.CRITICAL)  # it reports optional kernels
    return pytest.importorskip("bitsandbytes")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("size", [64, 256])
@pytest.mark.parametrize("scheme", ["nf4", "fp4"])
def test_code_books_equal_the_bitsandbytes_installed(
    bitsandbytes: Any, scheme: str, size: int, dtype: torch.dtype
) -> None:
    weight = torch.randn(1000, 300, generator=generator(1, scheme)).to(
        dtype
    )  # ends in a short block
    weight[3] = 0
    weight[5] = weight[5].round()  # many equal numbers, some of them on borders
    packed, state = bitsandbytes.functional.quantize_4bit(weight, blocksize=size, quant_type=scheme)
    spec = make_spec(scheme, (1000, 300), size)
    ours = quantize(weight, spec)
    assert torch.equal(ours["codes"].flatten(), packed.flatten())
    assert torch.equal(ours["absmax"].flatten(), state.absmax)
    # its CPU code is wrong for rows that are not whole blocks: one flat row
    state.shape = torch.Size([weight.numel()])
    theirs = bitsandbytes.functional.dequantize_4bit(packed, state)
    difference = dequantize(ours, spec, dtype).flatten().float() - theirs.flatten().float()
    assert difference.norm() <= torch.finfo(dtype).eps * theirs.float().norm()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_int8_equals_the_bitsandbytes_installed(bitsandbytes: Any, dtype: torch.dtype) -> None:
    weight = torch.randn(64, 320, generator=generator(1, "int8")).to(dtype)
    theirs, absmax, _ = bitsandbytes.functional.int8_vectorwise_quant(weight.half())
    ours = quantize(weight, make_spec("int8", (64, 320)))
    assert torch.equal(ours["codes"], theirs)
    assert torch.equal(ours["absmax"].flatten(), absmax)
