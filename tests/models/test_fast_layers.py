"""The native norm and SwiGLU against float64, and which layers of a model take them."""

from __future__ import annotations

import weakref
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from luthier import native
from luthier.adapters import adapter_parameters, attach
from luthier.config import AdapterConfig
from luthier.models import fast
from luthier.models.recompute import set_recompute
from luthier.models.stage import Stage
from luthier.native import ops
from luthier.train.loss import token_loss

built = pytest.mark.skipif(native.library() is None, reason=native.status())

SHAPES = [(1, 1), (3, 15), (5, 16), (65, 33), (130, 576), (2, 3, 47)]
HALF_ULP = 2.1e-3  # of a bfloat16, relative


def drawn(*shape: int, seed: int = 0, scale: float = 1.0) -> Tensor:
    draw = torch.Generator().manual_seed(seed + sum(shape))
    return (torch.randn(shape, generator=draw) * scale).bfloat16()


def error(ours: Tensor, wanted: Tensor) -> float:
    return float((ours.double() - wanted).norm() / wanted.norm().clamp_min(1e-30))


def plain_norm(x: Tensor, weight: Tensor, eps: float, offset: float) -> Tensor:
    return (weight + offset) * x * (x.square().mean(-1, keepdim=True) + eps).rsqrt()


@built
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_swiglu(shape: tuple[int, ...]) -> None:
    gate, up, grad = (drawn(*shape, seed=i, scale=3) for i in range(3))
    g, u = (x.double().requires_grad_() for x in (gate, up))
    wanted = F.silu(g) * u
    dg, du = torch.autograd.grad(wanted, (g, u), grad.double())
    assert error(ops.swiglu(gate, up), wanted.detach()) < HALF_ULP
    for ours, exact in zip(ops.swiglu_backward(grad, gate, up), (dg, du), strict=True):
        # near the zero of silu's slope the sum loses digits of float32, not of the whole
        assert error(ours, exact) < HALF_ULP


@built
def test_swiglu_of_parts_of_wider_rows() -> None:
    whole, grad = drawn(4, 6, 2 * 19), drawn(4, 6, 19, seed=1)
    gate, up = whole.chunk(2, -1)
    assert torch.equal(ops.swiglu(gate, up), ops.swiglu(gate.contiguous(), up.contiguous()))
    parts = ops.swiglu_backward(grad, gate, up)
    copies = ops.swiglu_backward(grad, gate.contiguous(), up.contiguous())
    assert all(torch.equal(a, b) for a, b in zip(parts, copies, strict=True))


@built
@pytest.mark.parametrize("offset", [0.0, 1.0])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_norm(shape: tuple[int, ...], offset: float) -> None:
    x, grad = drawn(*shape, scale=0.3), drawn(*shape, seed=1)
    weight = drawn(shape[-1], seed=2) + 1
    a, w = (t.double().requires_grad_() for t in (x, weight))
    wanted = plain_norm(a, w, 1e-3, offset)
    da, dw = torch.autograd.grad(wanted, (a, w), grad.double())
    for rounded, bound in ((False, HALF_ULP), (True, 1.5 * HALF_ULP)):
        out, inverse = ops.rms_norm(x, weight, 1e-3, offset, rounded)
        assert error(out, wanted.detach()) < bound
    ours, found = ops.rms_norm_backward(grad, x, weight, inverse, offset, True)
    # of one number the gradient is a small difference: measured against what it is made of
    parts = (grad.double() * (w.detach() + offset) * inverse.double()[..., None]).norm()
    assert float((ours.double() - da).norm()) < HALF_ULP * float(parts)
    assert error(found, dw) < 1e-6  # float32
    again, _ = ops.rms_norm_backward(grad, x, weight, inverse, offset, False)
    assert torch.equal(ours, again)


@built
def test_threads_do_not_change_a_bit() -> None:
    x, grad, weight = drawn(300, 48), drawn(300, 48, seed=1), drawn(48)
    found = []
    for threads in (1, 3):
        torch.set_num_threads(threads)
        out, inverse = ops.rms_norm(x, weight, 1e-6, 0.0, True)
        norm = ops.rms_norm_backward(grad, x, weight, inverse, 0.0, True)
        found.append([out, inverse, *norm, ops.swiglu(x, grad), *ops.swiglu_backward(x, grad, x)])
    torch.set_num_threads(1)
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@built
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_what_is_not_finite_is_seen(value: float) -> None:
    x, other, weight = drawn(2, 20), drawn(2, 20, seed=1), drawn(20)
    x[0, 17] = value
    out, inverse = ops.rms_norm(x, weight, 1e-6, 0.0, True)
    results = [
        out,
        ops.rms_norm_backward(other, x, weight, inverse, 0.0, False)[0],
        ops.swiglu(x, other) if value != value else out,  # silu of infinity is infinite by right
        ops.swiglu_backward(other, x, other)[0],
    ]
    for result in results:
        assert not result[0].isfinite().all() and result[1].isfinite().all()


def gradients(model: Any, batch: Any, recompute: Any = "none") -> dict[str, Tensor]:
    stage = Stage(model.train().requires_grad_(True))
    set_recompute(stage, recompute)
    model.zero_grad()
    token_loss(stage(batch), batch.labels, stage.head, stage.head_parameters()).backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


@built
@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma2"])
def test_gradients_no_further_from_float32(
    family: str, tiny_model: Any, random_batch: Any, relative: Any
) -> None:
    """Of every weight; gemma2's norms are 1 + weight, its MLP stays with torch."""
    batch = random_batch(lengths_per_row=[[5, 17], [30]])
    plain, ours = (tiny_model(family, torch.bfloat16) for _ in range(2))
    wanted = tiny_model(family)
    wanted.load_state_dict(plain.state_dict())
    said = fast.fasten(ours)
    changed = {type(m).__name__ for m in ours.modules() if "forward" in vars(m)}
    assert any(name.endswith("RMSNorm") for name in changed)
    if family == "gemma2":
        assert said == [
            "Gemma2MLP is computed by torch, not by the native kernels: its activation is not SiLU"
        ]
    else:
        assert not said and any(name.endswith("MLP") for name in changed)
    found = [gradients(model, batch) for model in (ours, plain, wanted)]
    errors = [[relative(part[n], found[2][n]) for n in found[2]] for part in found[:2]]
    mine, theirs = (sum(part) / len(part) for part in errors)
    assert mine < 1.1 * theirs  # the mean over tensors: single ones are rounding's chance
    for mode in ("layer", "selective"):
        again = gradients(ours, batch, mode)
        assert all(torch.equal(again[n], found[0][n]) for n in again)


@built
@pytest.mark.parametrize("method", ["full", "lora"])
def test_the_product_of_gate_and_up_is_made_again(
    method: str, tiny_model: Any, random_batch: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing keeps it between forward and backward, and the gradients have the same bits."""
    batch = random_batch(lengths_per_row=[[5, 17], [30]])
    stage = Stage(tiny_model("llama", torch.bfloat16).train().requires_grad_(True))
    assert not fast.fasten(stage.model)
    if method == "lora":
        attach(stage.model, AdapterConfig.model_validate({"method": "lora", "rank": 2}), seed=0)
        for parameter in adapter_parameters(stage.model).values():
            parameter.data.add_(0.01)
    made: list[Any] = []
    plain = ops.swiglu

    def swiglu(gate: Tensor, up: Tensor) -> Tensor:
        out = plain(gate, up)
        made.append(weakref.ref(out.untyped_storage()))
        return out

    monkeypatch.setattr(ops, "swiglu", swiglu)
    found: list[list[Tensor]] = []
    for kept in (False, True):
        stage.model.zero_grad()
        fast.keep_products(stage.model, kept)
        made.clear()
        loss = token_loss(stage(batch), batch.labels, stage.head, stage.head_parameters())
        assert [one() is not None for one in made] == [kept] * 2  # one for each layer
        loss.backward()
        assert (len(made) > 2) == (not kept)
        found.append([p.grad for p in stage.model.parameters() if p.grad is not None])
    assert len(found[0]) > 10 and all(torch.equal(a, b) for a, b in zip(*found, strict=True))


class OtherRMSNorm(nn.Module):
    """A norm of the usual shape that computes something else: the mean is taken off first."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(32).bfloat16()), 1e-6

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x - x.mean(-1, keepdim=True), (32,), self.weight, self.eps)


@built
def test_what_computes_something_else_is_left_alone(tiny_model: Any) -> None:
    model = tiny_model("llama", torch.bfloat16)
    model.model.norm = OtherRMSNorm()
    inner = model.model.layers[1].mlp
    inner.__class__ = type("ScaledMLP", (type(inner),), {"forward": _scaled})
    said = fast.fasten(model)
    assert said == [
        "ScaledMLP is computed by torch, not by the native kernels: it computes something else",
        "OtherRMSNorm is computed by torch, not by the native kernels: it computes something else",
    ]
    assert "forward" not in vars(inner) and "forward" not in vars(model.model.norm)
    assert "forward" in vars(model.model.layers[0].mlp)


@built
@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma2"])
def test_a_model_without_values_gets_the_same_layers(family: str, tiny_model: Any) -> None:
    """For its sizes (`footprint.py`); gemma2's MLP is left to torch there, too."""
    real = tiny_model(family, torch.bfloat16)
    with FakeTensorMode():
        empty = type(real)._from_config(real.config, dtype=torch.bfloat16)
    assert fast.fasten(empty) == fast.fasten(real)
    for name, module in real.named_modules():
        other = empty.get_submodule(name)
        assert ("forward" in vars(module)) == ("forward" in vars(other))
        assert vars(module).get("luthier_norm") == vars(other).get("luthier_norm")
        assert all(isinstance(p, FakeTensor) for p in other.parameters())


def _scaled(self: Any, x: Tensor) -> Tensor:
    return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x) * 1.05)


def test_nothing_is_changed_where_the_kernels_are_not_for_the_model(
    tiny_model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        model = tiny_model("llama", dtype)
        if dtype == torch.bfloat16:
            monkeypatch.setenv(native.SWITCH, "0")
        assert fast.fasten(model) == []
        assert not any("forward" in vars(m) for m in model.modules())
