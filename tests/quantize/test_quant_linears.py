"""Quantised layers against dense layers that hold the dequantised weight: values, gradients, memory, files."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers.pytorch_utils import Conv1D

from luthier.errors import Refused
from luthier.quantize import QuantizedLinear, QuantizedTensor, codes, make_spec, products, quantize
from luthier.seeding import generator

# scheme, block size, double quantisation
FORMS = [
    ("nf4", 64, False),
    ("nf4", 128, True),
    ("fp4", 64, False),
    ("int8", None, False),
    ("int8", 32, False),
    ("int4", None, False),
    ("int4", 32, False),
]
# (in, out): whole blocks in rows; blocks over the ends of rows; odd rows and a short last block
SIZES = [(256, 96), (160, 50), (33, 7)]
CASES = [
    pytest.param(form, size, id=f"{form[0]}-{form[1]}{'-double' * form[2]}-{size[0]}x{size[1]}")
    for form in FORMS
    for size in SIZES
    if not (form[0].startswith("int") and form[1] and size[0] % form[1])
]


def draw(name: str, *shape: int) -> Tensor:
    return torch.randn(shape, generator=generator(0, name))


def linear(num_in: int, num_out: int, bias: bool = True, dtype: Any = torch.float32) -> nn.Linear:
    layer = nn.Linear(num_in, num_out, bias=bias)
    layer.weight.data = draw("weight", num_out, num_in) * 0.05
    if bias:
        layer.bias.data = draw("bias", num_out)
    return layer.to(dtype)


@pytest.fixture(params=[False, True], ids=["one-tile", "many-tiles"])
def tiles(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """With many tiles, a tile of these small layers is far less than the layer."""
    if request.param:
        monkeypatch.setattr(products, "TILE", 2**10)
    return request.param


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize(("form", "size"), CASES)
def test_values_and_gradients_are_those_of_the_dense_layer(
    form: Any, size: tuple[int, int], dtype: torch.dtype, tiles: bool, relative: Any
) -> None:
    base = linear(*size, dtype=dtype)
    layer = QuantizedLinear.from_linear(base, *form)
    weight = layer.dequantize(dtype)
    x = draw("x", 2, 3, size[0]).to(dtype).requires_grad_()
    addend = draw("addend", 2, 3, size[1]).to(dtype).requires_grad_()
    upstream = draw("upstream", 2, 3, size[1]).to(dtype)

    def both(y: Tensor) -> list[Tensor]:
        return [y, *torch.autograd.grad(y, [x, addend], upstream.to(y.dtype))]

    assert layer.bias is not None
    wide, bias = weight.double(), layer.bias.double()
    exact = both(F.linear(x.double(), wide, bias) + addend.double())
    # float32: products of up to 256 numbers; bfloat16: one rounding of the sum, one for the bias
    bound = 1e-6 if dtype == torch.float32 else 2**-8
    for ours, reference in zip(both(layer.matmul_with(x, addend)), exact, strict=True):
        assert ours.dtype == dtype
        assert ours.shape == reference.shape
        assert relative(ours, reference) < bound
    with torch.no_grad():  # the parts, for autograd nodes of others
        rows, back, flat = (t.flatten(0, 1) for t in (x, upstream, addend))
        taken = flat.clone()
        sums = layer.multiply(rows, taken)
        assert relative(sums, (exact[0] - bias).flatten(0, 1)) < bound
        given = rows.clone()
        more = layer.multiply_back(back, given)
        assert relative(more, (exact[1] + x).flatten(0, 1)) < bound
        assert (sums.data_ptr(), more.data_ptr()) == (taken.data_ptr(), given.data_ptr())
    plain = layer(x)
    assert relative(plain, F.linear(x.double(), wide, bias)) < bound
    (grad,) = torch.autograd.grad(plain, x, upstream)
    assert relative(grad, exact[1]) < bound


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_the_error_is_that_of_the_scheme(form: Any, relative: Any) -> None:
    base = linear(256, 96)
    layer = QuantizedLinear.from_linear(base, *form)
    # of normal numbers, known from the literature for blocks of 64 and 128, or measured generously
    bound = {"nf4": 0.105, "fp4": 0.135, "int8": 0.009, "int4": 0.16}[form[0]]
    assert bound / 4 < relative(layer.dequantize(), base.weight) < bound
    assert layer.dequantize().dtype == torch.float32


def test_the_sum_is_formed_before_it_is_rounded() -> None:
    """Outputs near 100 lie on a grid of 0.5 in bfloat16; an addend of 0.1 still moves their mean by 0.1."""
    base = linear(256, 512, bias=False, dtype=torch.bfloat16)
    layer = QuantizedLinear.from_linear(base, "nf4")
    x = (draw("x", 64, 256) * 130).bfloat16()
    with torch.no_grad():
        y = layer(x).double()
        assert y.abs().mean() > 60
        moved = layer.matmul_with(x, torch.full_like(y, 0.1, dtype=torch.bfloat16)).double() - y
    assert moved.mean().item() == pytest.approx(0.1, rel=0.15)


def test_a_conv1d_becomes_a_layer_with_the_same_output(relative: Any) -> None:
    base = Conv1D(96, 64)
    base.weight.data, base.bias.data = draw("weight", 64, 96) * 0.05, draw("bias", 96)
    layer = QuantizedLinear.from_linear(base, "int8")
    assert (layer.in_features, layer.out_features, layer.transposed) == (64, 96, True)
    assert torch.equal(layer.absmax.flatten(), base.weight.abs().amax(0))
    x = draw("x", 5, 64)
    assert relative(layer(x), base(x)) < 0.01


def test_matrices_of_a_stack_are_quantised_alone(tiles: bool, relative: Any) -> None:
    for shape in ((3, 48, 128), (3, 7, 33)):
        experts = draw("experts", *shape)
        stack = QuantizedTensor.from_weight(experts, "nf4")
        assert stack.dequantize().shape == shape
        x = draw("x", 4, shape[2]).requires_grad_()
        for i in range(3):
            dense = stack.dequantize()[i]
            assert torch.equal(stack.dequantize(index=i), dense)
            y, reference = stack.product(x, index=i), F.linear(x, dense)
            assert relative(y, reference) < 1e-6
            ours, theirs = (torch.autograd.grad(v.square().sum(), x)[0] for v in (y, reference))
            assert relative(ours, theirs) < 1e-6
        with pytest.raises(IndexError):
            stack.dequantize(index=3)


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_an_empty_batch(size: tuple[int, int]) -> None:
    layer = QuantizedLinear.from_linear(linear(*size), "nf4")
    x = torch.zeros(0, 3, size[0], requires_grad=True)
    y = layer(x)
    assert y.shape == (0, 3, size[1])
    y.sum().backward()
    assert x.grad is not None
    assert x.grad.shape == x.shape


def test_a_row_without_a_batch_dimension(relative: Any) -> None:
    layer = QuantizedLinear.from_linear(linear(64, 32), "nf4")
    x = draw("x", 64)
    assert relative(layer(x), F.linear(x, layer.dequantize(), layer.bias)) < 1e-6
    assert layer.matmul_with(x, torch.zeros(32)).shape == (32,)


def test_a_gradient_only_where_one_is_asked_for() -> None:
    layer = QuantizedLinear.from_linear(linear(64, 32), "nf4")
    assert not any(p.requires_grad for p in layer.parameters())
    addend = torch.zeros(5, 32, requires_grad=True)
    layer.matmul_with(draw("x", 5, 64), addend).sum().backward()
    assert torch.equal(addend.grad, torch.ones(5, 32))  # pyright: ignore[reportArgumentType]
    assert layer.bias is not None
    layer.bias.requires_grad_(True)  # bias tuning
    layer(draw("x", 5, 64)).sum().backward()
    assert torch.equal(layer.bias.grad, torch.full((32,), 5.0))  # pyright: ignore[reportArgumentType]


def test_the_same_twice_and_on_any_number_of_threads() -> None:
    base, x = linear(256, 96), draw("x", 8, 256)
    made = []
    threads = torch.get_num_threads()
    for count in (1, 2, 2):
        torch.set_num_threads(count)
        layer = QuantizedLinear.from_linear(base, "nf4", 64, True)
        made.append({**layer.state_dict(), "weight": layer.dequantize()})
    torch.set_num_threads(threads)
    assert all(torch.equal(made[0][name], other[name]) for other in made[1:] for name in made[0])
    assert torch.equal(layer(x), layer(x))


def test_autocast_decides_the_type(relative: Any) -> None:
    layer = QuantizedLinear.from_linear(linear(256, 96), "nf4")
    x = draw("x", 5, 256).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
        mixed = layer.matmul_with(x, torch.zeros(5, 96))
    assert (y.dtype, mixed.dtype) == (torch.bfloat16, torch.bfloat16)
    (grad,) = torch.autograd.grad(y.sum(), x)
    assert grad.dtype == torch.float32
    assert relative(y, layer(x)) < 2**-7  # x, weight and output rounded


class Largest(TorchDispatchMode):
    """The most bytes a tensor had that any operation gave."""

    most = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self.most = max(self.most, leaf.numel() * leaf.element_size())
        return result


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_no_dense_weight_is_made_or_kept(form: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "TILE", 2**19)
    num_in, num_out = 2048, 2048
    dense = 2 * num_in * num_out  # bytes in bfloat16
    layer = QuantizedLinear.from_linear(linear(num_in, num_out, dtype=torch.bfloat16), *form)
    x = draw("x", 4, num_in).bfloat16().requires_grad_()
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        with Largest() as forward:
            y = layer(x)
        with Largest() as backward:
            y.sum().backward()
    stored = {t.data_ptr() for t in layer.tensors().values()}
    assert {t.data_ptr() for t in saved} <= stored
    codes_size = layer.codes.numel()  # one byte each; the storage itself passes through views
    for seen in (forward, backward):
        assert seen.most <= max(dense // 4, codes_size), seen.most
    assert max(dense // 4, codes_size) < dense


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_saved_and_loaded_it_is_the_same(form: Any, tmp_path: Path) -> None:
    layer = QuantizedLinear.from_linear(linear(256, 96), *form)
    names = {"codes", "absmax", "bias"} | ({"nested_absmax", "nested_offset"} if form[2] else set())
    assert set(layer.state_dict()) == names
    save_file(layer.state_dict(), tmp_path / "layer.safetensors")
    state = load_file(tmp_path / "layer.safetensors")
    empty = QuantizedLinear(256, 96, *form, bias=True)
    empty.load_state_dict(state)
    meta = QuantizedLinear.meta(256, 96, *form, bias=True)
    assert all(t.device.type == "meta" for t in meta.state_dict().values())
    meta.load_state_dict(state, assign=True)
    x = draw("x", 3, 256)
    for other in (empty, meta, copy.deepcopy(layer)):
        assert torch.equal(other(x), layer(x))
        assert not any(p.requires_grad for p in other.parameters())


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_a_loader_quantises_tensor_by_tensor(form: Any) -> None:
    base = linear(256, 96, dtype=torch.bfloat16)
    meta = QuantizedLinear.meta(256, 96, *form, bias=True, dtype=torch.bfloat16)
    meta.load_from(base.weight.float(), base.bias.float())
    whole = QuantizedLinear.from_linear(base, *form)
    for name, tensor in whole.state_dict().items():
        assert torch.equal(meta.state_dict()[name], tensor)
    assert meta.dtype == torch.bfloat16
    assert meta.state_dict()["bias"].dtype == torch.bfloat16
    blueprint = QuantizedLinear.from_linear(base.to("meta"), *form)
    assert blueprint.device.type == "meta"
    empty = QuantizedLinear(256, 96, *form, bias=True, dtype=torch.bfloat16)
    empty.load_from(draw("other", 96, 256))
    assert not torch.equal(empty.codes, whole.codes)


def test_scales_stay_exact_when_the_model_changes_type() -> None:
    layer = QuantizedLinear.from_linear(linear(256, 96), "nf4", 64, True)
    before = layer.dequantize()
    model = nn.Sequential(layer).to(torch.bfloat16)
    assert torch.equal(layer.dequantize(torch.float32), before)
    assert model.state_dict()["0.bias"].dtype == torch.bfloat16
    plain = QuantizedLinear.from_linear(linear(256, 96), "int8").half()
    assert plain.absmax.dtype == torch.float32
    plain.absmax.data = plain.absmax.bfloat16()
    with pytest.raises(TypeError, match="float32"):
        plain(draw("x", 2, 256))


def test_rows_and_columns_can_be_cut() -> None:
    """What tensor parallelism needs: a cut of the tensors is the storage of the cut weight."""
    weight = draw("weight", 96, 256)
    for scheme, size in (("nf4", 64), ("fp4", 64), ("int8", 32), ("int4", 32)):
        whole = quantize(weight, make_spec(scheme, (96, 256), size))
        dense = codes.dequantize(whole, make_spec(scheme, (96, 256), size), torch.float32)
        for dim in (0, 1):
            parts = {name: t.chunk(2, dim)[1].contiguous() for name, t in whole.items()}
            part = dense.chunk(2, dim)[1]
            spec = make_spec(scheme, tuple(part.shape), size)
            assert torch.equal(codes.dequantize(parts, spec, torch.float32), part)


def test_what_is_no_linear_layer_is_refused_by_name() -> None:
    with pytest.raises(Refused, match=r"LayerNorm.*only linear layers"):
        QuantizedLinear.from_linear(nn.LayerNorm(64), "nf4")
    with pytest.raises(Refused, match=r"Embedding.*quantize\.modules"):
        QuantizedLinear.from_linear(nn.Embedding(64, 64), "nf4")


def test_quantising_twice_is_refused() -> None:
    layer = QuantizedLinear.from_linear(linear(64, 32), "nf4")
    with pytest.raises(Refused, match="quantised already, in nf4"):
        QuantizedLinear.from_linear(layer, "int8")
    foreign = linear(64, 32)
    foreign.weight = nn.Parameter(layer.codes.data.view(32, 32), requires_grad=False)
    with pytest.raises(Refused, match=r"uint8.*quantised already"):
        QuantizedLinear.from_linear(foreign, "int8")


def test_a_weight_of_another_shape_is_refused() -> None:
    layer = QuantizedLinear.meta(64, 32, "nf4")
    with pytest.raises(Refused, match=r"\[64, 32\].*\[32, 64\]"):
        layer.load_from(torch.ones(64, 32))
    assert layer.device.type == "meta"


def test_a_refused_weight_leaves_the_storage_as_it_was() -> None:
    layer = QuantizedLinear.from_linear(linear(64, 32), "nf4")
    before = layer.dequantize()
    with pytest.raises(Refused, match="NaN or infinite"):
        layer.load_from(torch.full((32, 64), float("nan")))
    assert torch.equal(layer.dequantize(), before)


def test_there_is_no_weight_to_mistake_for_a_dense_one() -> None:
    layer = QuantizedLinear.from_linear(linear(64, 32), "int4", 32)
    with pytest.raises(AttributeError, match="weight"):
        _ = layer.weight
    assert repr(layer) == "QuantizedLinear([32, 64], int4, block_size=32)"
