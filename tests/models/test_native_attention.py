"""The native attention against plain softmax in float64, and where it is taken and where not."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from luthier import native
from luthier.batch import Layout, layout_scope
from luthier.config import ModelConfig
from luthier.errors import Refused
from luthier.models import cpu_attention, kernels
from luthier.models.kernels import Scores
from luthier.models.load import build_model

built = pytest.mark.skipif(native.library() is None, reason=native.status())

# documents per row, query heads, key heads, head size, size of a value, window
SHAPES = [
    ([[37]], 9, 3, 64, 64, None),
    ([[5, 140, 300], [9]], 9, 3, 64, 64, None),
    ([[1, 2, 63, 64, 65]], 4, 4, 20, 20, None),
    ([[300, 1, 257], [520]], 6, 1, 40, 24, None),
    ([[560]], 9, 1, 33, 33, 100),
    ([[513], [512], [256]], 2, 1, 128, 128, 257),
    ([[600]], 5, 5, 16, 16, 300),
    ([[70, 3]], 71, 1, 8, 8, None),
    ([[260], [61]], 3, 1, 1, 1, 2),
]


def inputs(shape: tuple[Any, ...], random_batch: Any) -> tuple[Layout, list[Tensor], Any]:
    """The layout; q, k, v and the gradient of the output as a model's projections lay them; the window."""
    lengths, heads, groups, size, value_size, window = shape
    layout = Layout.of(random_batch(lengths_per_row=lengths))
    rows, width = layout.document_ids.shape
    draw = torch.Generator().manual_seed(size)
    kinds = [(heads, size), (groups, size), (groups, value_size), (heads, value_size)]
    drawn = [torch.randn(rows, width, *kind, generator=draw).bfloat16() for kind in kinds]
    return layout, [x.transpose(1, 2) for x in drawn[:3]] + drawn[3:], window


def run(kernel: Any, layout: Layout, values: list[Tensor], window: int | None) -> list[Tensor]:
    """Output, and the gradients of q, k and v."""
    leaves = [x.detach().requires_grad_() for x in values[:3]]
    with layout_scope(layout):
        out = kernel(*leaves, layout, Scores(0.21, window=window))
    return [out.detach(), *torch.autograd.grad(out, leaves, values[3])]


def error(ours: Tensor, wanted: Tensor) -> float:
    """Relative; where all is zero (one key: its weight is 1) the gradient must be too."""
    return float((ours.double() - wanted).norm() / wanted.norm().clamp_min(1e-9))


@built
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_no_further_from_float64_than_plain_products(shape: Any, random_batch: Any) -> None:
    layout, values, window = inputs(shape, random_batch)
    wanted = run(kernels.math, layout, [x.double() for x in values], window)
    plain = run(kernels.math, layout, values, window)
    ours = run(kernels.native, layout, values, window)
    padding = layout.document_ids < 0
    for mine, theirs, reference in zip(ours, plain, wanted, strict=True):
        assert mine.dtype == torch.bfloat16 and mine.shape == reference.shape
        # half an ulp of bfloat16 is 2e-3 relative: what rounding the result alone costs
        assert error(mine, reference) < max(error(theirs, reference), 2.1e-3)
    assert not ours[0][padding].any()
    for gradient in ours[1:]:
        assert not gradient.transpose(1, 2)[padding].any()


@built
def test_a_document_alone_is_the_same_bit_for_bit(random_batch: Any) -> None:
    layout, values, _ = inputs(([[37, 300, 65]], 6, 2, 24, 24, None), random_batch)
    packed = run(kernels.native, layout, values, None)
    for segment in layout.segments:
        part = slice(segment.start, segment.stop)
        ids = torch.zeros(1, segment.stop - segment.start, dtype=torch.int64)
        alone = [x[:, :, part] for x in values[:3]] + [values[3][:, part]]
        out, *gradients = run(kernels.native, Layout(ids, ids), alone, None)
        assert torch.equal(out, packed[0][:, part])
        for ours, theirs in zip(gradients, packed[1:], strict=True):
            assert torch.equal(ours, theirs[:, :, part])


@built
def test_threads_do_not_change_a_bit(random_batch: Any) -> None:
    layout, values, _ = inputs(([[700, 90]], 6, 2, 24, 24, None), random_batch)
    found = []
    for threads in (1, 3):
        torch.set_num_threads(threads)
        found.append(run(kernels.native, layout, values, None))
    torch.set_num_threads(1)
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@built
def test_views_are_read_in_place(random_batch: Any) -> None:
    """Heads cut from one fused projection, and heads whose numbers are not side by side."""
    layout, values, _ = inputs(([[40, 9]], 4, 2, 16, 16, None), random_batch)
    wanted = run(kernels.native, layout, values, None)
    fused = torch.cat([x.transpose(1, 2) for x in values[:3]], 2)  # [B, S, H + 2K, D]
    views = [x.transpose(1, 2) for x in fused.split([4, 2, 2], 2)]
    turned = [x.transpose(2, 3).contiguous().transpose(2, 3) for x in values[:3]]
    for form in (views, turned):
        for a, b in zip(run(kernels.native, layout, [*form, values[3]], None), wanted, strict=True):
            assert torch.equal(a, b)


@built
@pytest.mark.parametrize(("dtype", "kernel"), [("bfloat16", "native"), ("float32", "sdpa")])
def test_auto_takes_it_in_bfloat16(dtype: str, kernel: str, model_folder: Any) -> None:
    path = str(model_folder("llama"))
    model = build_model(ModelConfig(path=path, dtype=dtype, device="cpu"), seed=1)
    assert {m.attention_kernel for m in model.modules() if hasattr(m, "attention_kernel")} == {
        kernel
    }


@built
def test_features_are_left_to_others(model_folder: Any) -> None:
    """ALiBi, which sdpa knows, and softcaps, which only math knows."""
    for family, kernel in (("bloom", "sdpa"), ("gemma2", "math")):
        path = str(model_folder(family))
        model = build_model(ModelConfig(path=path, dtype="bfloat16", device="cpu"), seed=1)
        found = {m.attention_kernel for m in model.modules() if hasattr(m, "attention_kernel")}
        assert found == {kernel}


def test_it_can_be_switched_off(monkeypatch: pytest.MonkeyPatch, model_folder: Any) -> None:
    monkeypatch.setenv(native.SWITCH, "0")
    assert native.status() == "off: LUTHIER_NATIVE=0"
    path = str(model_folder("llama"))
    model = build_model(ModelConfig(path=path, dtype="bfloat16", device="cpu"), seed=1)
    assert {m.attention_kernel for m in model.modules() if hasattr(m, "attention_kernel")} == {
        "sdpa"
    }
    with pytest.raises(Refused, match="LUTHIER_NATIVE=0"):
        build_model(
            ModelConfig(path=path, dtype="bfloat16", device="cpu", attention="native"), seed=1
        )


def test_asked_for_by_name_in_float32(model_folder: Any) -> None:
    config = ModelConfig(
        path=str(model_folder("llama")), dtype="float32", device="cpu", attention="native"
    )
    with pytest.raises(Refused, match="they compute in bfloat16, this is float32"):
        build_model(config, seed=1)


def test_a_machine_without_a_compiler_says_so(tmp_path: Path) -> None:
    """And trains by torch: no error, a status that tells why."""
    code = "from luthier import native; print(native.status(), native.library())"
    environment = {**os.environ, "XDG_CACHE_HOME": str(tmp_path), "CXX": "no-such-compiler"}
    environment.pop(native.SWITCH, None)
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip().startswith("off: ") and done.stdout.strip().endswith("None")
    assert "no C++ compiler" in done.stdout or "Linux" in done.stdout or "AVX2" in done.stdout


def test_a_user_without_a_home_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """A container may run as a user that has none: torch computes instead."""

    def home() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(native.Path, "home", home)
    monkeypatch.setattr(native, "_instructions", lambda: frozenset({"avx2"}))
    found = native._find.__wrapped__()
    assert found.library is None and found.status.startswith("off: ")


@built
def test_a_broken_build_is_told(tmp_path: Path) -> None:
    compiler = tmp_path / "compiler"
    compiler.write_text("#!/bin/sh\necho 'x.cpp:1: error: no such thing' >&2\nexit 1\n")
    compiler.chmod(0o755)
    code = "from luthier import native; print(native.status())"
    environment = {**os.environ, "XDG_CACHE_HOME": str(tmp_path), "CXX": str(compiler)}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "off: building failed: x.cpp:1: error: no such thing"
    assert not [p for p in tmp_path.rglob("*.so")]


@built
@pytest.mark.parametrize("damage", ["cut", "changed", "empty"])
def test_a_damaged_file_is_built_again(damage: str, tmp_path: Path) -> None:
    """Without a compiler it is refused, not loaded; torch computes, and the status tells why."""
    whole = Path(native.status().rpartition("in ")[2])
    copy = tmp_path / "luthier" / "native" / whole.name
    copy.parent.mkdir(parents=True)
    data = whole.read_bytes()
    middle = len(data) // 2
    harm = {
        "cut": data[:middle],
        "changed": data[:middle] + b"?" + data[middle + 1 :],
        "empty": b"",
    }
    copy.write_bytes(harm[damage])
    code = "from luthier import native; print(native.status())"
    environment = {**os.environ, "XDG_CACHE_HOME": str(tmp_path)}
    for compiler, wanted in (("no-such-compiler", "off: "), (None, "avx")):
        if compiler is None and damage != "cut":
            continue  # one build is slow enough
        given = environment | ({"CXX": compiler} if compiler else {})
        done = subprocess.run(
            [sys.executable, "-c", code], env=given, capture_output=True, text=True, check=True
        )
        assert done.stdout.startswith(wanted), done
        assert ("is damaged" in done.stdout) == (compiler is not None)
    if damage == "cut":
        assert native._is_whole(copy)


@built
def test_the_operator_needs_a_layout() -> None:
    q = torch.zeros(1, 1, 2, 8, dtype=torch.bfloat16)
    with pytest.raises(RuntimeError, match="outside of a layout"):
        cpu_attention.packed(q, q, q, 1.0, None, by_native=True)


@built
@pytest.mark.parametrize("place", [0, 1, 2])
def test_what_is_not_finite_is_seen(place: int, random_batch: Any) -> None:
    """A NaN in one query, key or value reaches the result and a gradient; other documents stay clean."""
    layout, values, _ = inputs(([[70, 20]], 2, 1, 16, 16, None), random_batch)
    values[place][0, 0, 3, 5] = torch.nan
    out, *gradients = run(kernels.native, layout, values, None)
    assert not out[:, :70].isfinite().all() and out[:, 70:].isfinite().all()
    assert any(not g[:, :, :70].isfinite().all() for g in gradients)
    assert all(g[:, :, 70:].isfinite().all() for g in gradients)
