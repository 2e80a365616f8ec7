"""What every adapter method promises, one test per promise, on every row of `adapter_table.METHODS`."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from adapter_table import (
    FAMILIES,
    METHODS,
    QUICK,
    ZOO,
    error,
    fill,
    fitting,
    keep_state,
    options,
    run,
    take_state,
)
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from luthier.adapters import (
    adapter_parameters,
    adapters_of,
    attach,
    detach,
    fold_into,
    load_adapter,
    save_adapter,
)
from luthier.batch import Batch
from luthier.layers import count
from luthier.models.recompute import set_recompute
from luthier.models.stage import Stage, decoder_layers


def _rows(**wanted: Any) -> Any:
    found = [
        n for n, row in METHODS.items() if all(getattr(row, k) == v for k, v in wanted.items())
    ]
    return pytest.mark.parametrize("row", found)


def _on_families(**wanted: Any) -> Any:
    """Rows on families."""
    rows = [n for n, row in METHODS.items() if all(getattr(row, k) == v for k, v in wanted.items())]
    zoo = [(n, f) for f in ZOO for n in rows]
    found = [pytest.param(n, f) for f in FAMILIES for n in rows]
    found += [pytest.param(*p, marks=() if p[0] in QUICK else pytest.mark.long) for p in zoo]
    return pytest.mark.parametrize(("row", "family"), found)


each_method = _rows()
on_linear = _rows(on="linear")
folding_linear = _rows(folds=True, on="linear")
unchanging = _rows(unchanged=True)
ranked = _rows(rank=True)
drawing = _rows(drawn=True)
on_linear_by_derivative = _rows(on="linear", derivative=True)


@_on_families(unchanged=True)
def test_the_output_is_unchanged_at_first(
    tiny_model: Any, random_batch: Any, row: str, family: str
) -> None:
    for dtype in (torch.float32, torch.float64):
        model, batch = tiny_model(family, dtype), random_batch()
        before = run(model, batch)
        attach(model, options(row), seed=1)
        assert torch.equal(run(model, batch), before)


@unchanging
def test_the_output_is_unchanged_at_first_in_half_precision(
    tiny_model: Any, random_batch: Any, row: str
) -> None:
    for dtype in (torch.bfloat16, torch.float16):
        model, batch = tiny_model("llama", dtype), random_batch()
        before = run(model, batch)
        attach(model, options(row), seed=1)
        assert torch.equal(run(model, batch), before)


@on_linear
def test_a_biased_layer_in_half_precision_changes_by_rounding_only(row: str) -> None:
    x = torch.randn(1, 40, 32).bfloat16()
    for layer in (nn.Linear(32, 48), Conv1D(48, 32)):
        nn.init.normal_(layer.bias)
        model = nn.ModuleDict({"layer": layer.bfloat16()})
        before = layer(x)
        attach(model, options(row), seed=1)
        # the product is rounded before the bias is added: u = 2^-8 of it, and of either sum
        before = before.float()
        bound = 1.01 * 2**-8 * ((before - layer.bias.float()).abs() + 2 * before.abs())
        assert ((layer(x).float() - before).abs() <= bound).all()


@_on_families()
def test_only_adapters_get_gradients(
    tiny_model: Any, random_batch: Any, row: str, family: str
) -> None:
    model = tiny_model(family)
    plain = {name for name, _ in model.named_parameters()}
    attach(model, options(row), seed=1)
    fill(model)
    mine = adapter_parameters(model)
    run(model, random_batch()).square().mean().backward()
    assert mine and all(
        p.grad is not None and p.grad.isfinite().all() and p.grad.any() for p in mine.values()
    )
    others = {name: p for name, p in model.named_parameters() if name not in mine}
    assert others.keys() == plain  # the base's names are what they were
    assert not any(p.requires_grad or p.grad is not None for p in others.values())
    trained, total = count(model)
    assert trained == sum(p.numel() for p in mine.values())
    assert total == trained + sum(p.numel() for p in others.values())


@each_method
def test_gradients_of_the_first_step(tiny_model: Any, random_batch: Any, row: str) -> None:
    """Those that the method says are zero at the start are, and no others."""
    model = tiny_model("llama")
    adapters = attach(model, options(row), seed=1)
    run(model, random_batch()).square().mean().backward()
    for adapter in adapters.values():
        gradients = {n: p.grad for n, p in adapter.named_parameters() if p.grad is not None}
        assert gradients.keys() == {n for n, _ in adapter.named_parameters()}
        assert {n for n, grad in gradients.items() if not grad.any()} == adapter.zero_at_start


@_on_families(folds=True)
def test_fold_equals_hooks(tiny_model: Any, random_batch: Any, row: str, family: str) -> None:
    batch = random_batch()
    for dtype, bound in ((torch.float32, 1e-6), (torch.float64, 1e-14)):
        model = tiny_model(family, dtype)
        base = run(model, batch)
        attach(model, options(row), seed=1)
        fill(model)
        seen: dict[str, tuple[Tensor, Tensor]] = {}
        handles = [
            model.get_submodule(name).register_forward_hook(_watch(seen, name))
            for name in adapters_of(model)
        ]
        adapted = run(model, batch)
        for handle in handles:
            handle.remove()
        fold_into(model)
        assert not adapters_of(model)
        for name, (x, y) in seen.items():
            assert error(model.get_submodule(name)(x), y) < bound, name
        # through two layers of sharp attention and norms, rounding grows
        assert error(run(model, batch), adapted) < 10 * bound
        assert error(adapted, base) > 1e-3  # the adapter did something


@folding_linear
@pytest.mark.parametrize("kind", [nn.Linear, Conv1D])
def test_fold_rounds_once(row: str, kind: Any) -> None:
    """The update of a half-precision weight is computed in float32."""
    model = nn.ModuleDict({"layer": kind(24, 32).bfloat16()})
    attach(model, options(row), seed=1)
    fill(model)
    wide = copy.deepcopy(model).float()
    for each in (model, wide):
        fold_into(each)
    assert model["layer"].weight.dtype == torch.bfloat16
    assert torch.equal(model["layer"].weight, wide["layer"].weight.bfloat16())


def _watch(seen: dict[str, tuple[Tensor, Tensor]], name: str) -> Any:
    def hook(layer: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        seen[name] = (args[0], output)

    return hook


@_on_families()
def test_save_then_load_gives_the_same_output(
    tiny_model: Any, random_batch: Any, tmp_path: Path, row: str, family: str
) -> None:
    model, batch = tiny_model(family), random_batch()
    attach(model, options(row), seed=1)
    fill(model)
    save_adapter(model, tmp_path, options(row), "base", "0123")
    for trainable in (False, True):
        again = tiny_model(family)
        loaded = load_adapter(again, tmp_path, trainable=trainable, base_hash="0123")
        assert torch.equal(run(again, batch), run(model, batch))
        wanted = options(row)
        for key in wanted.model_fields_set - {"targets"}:
            assert getattr(loaded.config, key) == getattr(wanted, key)
        mine = adapter_parameters(again)
        assert {n for n, p in again.named_parameters() if p.requires_grad} == (
            set(mine) if trainable else set()
        )


@each_method
def test_tensors_are_read_back_bit_for_bit(tiny_model: Any, tmp_path: Path, row: str) -> None:
    for dtype in (torch.float32, torch.float64):
        model = tiny_model("llama", dtype)
        attach(model, options(row), seed=1)
        fill(model)
        wanted = {n: p.detach().clone() for n, p in adapter_parameters(model).items()}
        keep_state(model, tmp_path)
        fill(model, seed=5)
        take_state(model, tmp_path)
        assert all(torch.equal(p, wanted[n]) for n, p in adapter_parameters(model).items())


@on_linear_by_derivative
@pytest.mark.parametrize("kind", ["linear", "biased", "conv1d"])
def test_gradients_are_finite_differences(row: str, kind: str) -> None:
    layer = {
        "linear": lambda: nn.Linear(6, 5, bias=False),
        "biased": lambda: nn.Linear(6, 5),
        "conv1d": lambda: Conv1D(5, 6),
    }[kind]().double()
    model = nn.ModuleDict({"layer": layer})
    attach(model, options(row), seed=1)
    fill(model)
    mine = list(adapter_parameters(model).values())
    x = torch.randn(2, 3, 6, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda *_: layer(x), (x, *mine))


@_on_families(dropout=True)
def test_dropout_follows_the_row_not_the_micro_batch(
    tiny_model: Any, random_batch: Any, row: str, family: str
) -> None:
    model, batch = tiny_model(family), random_batch(lengths_per_row=[[5, 3], [8], [2, 6]])
    attach(model, options(row, dropout=0.5), seed=1)
    fill(model)
    plain = run(model, batch)
    model.train()
    whole = run(model, batch)
    assert torch.equal(run(model, batch), whole)  # as when a layer is recomputed
    assert not torch.allclose(whole, plain)
    parts = [
        run(model, Batch(*(getattr(batch, n)[i : i + 1] for n in _TENSORS), (i,))) for i in range(3)
    ]
    torch.testing.assert_close(torch.cat(parts), whole)
    other = run(model, Batch(*(getattr(batch, n) for n in _TENSORS), (7, 8, 9)))
    assert not torch.allclose(other, whole)
    model.eval()
    assert torch.equal(run(model, batch), plain)


_TENSORS = ("input_ids", "labels", "position_ids", "document_ids")


@_on_families()
def test_recomputed_layers_give_the_same_gradients(
    tiny_model: Any, random_batch: Any, row: str, family: str
) -> None:
    model, batch = tiny_model(family), random_batch()
    attach(model, options(row, **({"dropout": 0.2} if METHODS[row].dropout else {})), seed=1)
    fill(model)
    stage = Stage(model.train())
    grads = {}
    for mode in ("none", "layer", "selective"):
        set_recompute(stage, mode)
        stage(fitting(model, batch)).square().mean().backward()
        grads[mode] = [p.grad for p in adapter_parameters(model).values()]
        model.zero_grad(set_to_none=True)
    for mode in ("layer", "selective"):
        assert all(map(torch.equal, grads[mode], grads["none"]))


@_on_families()
def test_adapters_of_a_half_precision_base_are_float32(
    tiny_model: Any, random_batch: Any, row: str, family: str
) -> None:
    model, batch = tiny_model(family, torch.bfloat16), random_batch()
    attach(model, options(row), seed=1)
    fill(model)
    reference = tiny_model(family, torch.bfloat16).float()
    attach(reference, options(row), seed=1)
    fill(reference)
    if not METHODS[row].unchanged:  # its first values are the model's own, as it rounds them
        mine = adapter_parameters(model)
        with torch.no_grad():
            for name, wide in adapter_parameters(reference).items():
                wide.copy_(mine[name])
    for (name, ours), wide in zip(
        adapter_parameters(model).items(), adapter_parameters(reference).values(), strict=True
    ):
        assert ours.dtype == torch.float32 and torch.equal(ours, wide), name
    logits = run(model, batch)
    assert logits.dtype == torch.bfloat16
    logits.float().square().mean().backward()
    assert all(p.grad.dtype == torch.float32 for p in adapter_parameters(model).values())
    # as near to float32 as the base alone is; an adapted model is another one, so within a small factor
    detach(model)
    base = run(model, batch)
    wide_adapted = run(reference, batch)
    detach(reference)
    assert error(logits, wide_adapted) < 3 * error(base, run(reference, batch))


@each_method
def test_detach_leaves_the_base_as_it_was(tiny_model: Any, random_batch: Any, row: str) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        model, batch = tiny_model("gpt2", dtype), random_batch()
        before, names = run(model, batch), [n for n, _ in model.named_modules()]
        attach(model, options(row), seed=1)
        fill(model)
        assert not torch.equal(run(model, batch), before)
        detach(model)
        assert torch.equal(run(model, batch), before)
        assert [n for n, _ in model.named_modules()] == names
        layers = [m for m in model.modules() if isinstance(m, Conv1D)]
        assert not any("forward" in vars(m) or m._forward_hooks for m in layers)
        assert not any(m._forward_pre_hooks for m in layers)


@drawing
def test_first_values_depend_on_seed_and_name_alone(tiny_model: Any, row: str) -> None:
    def values(dtype: torch.dtype = torch.float32, seed: int = 1, **changes: Any) -> dict[str, Any]:
        model = tiny_model("llama", dtype)
        torch.manual_seed(0 if dtype == torch.float32 else 1)
        attach(model, options(row, **changes), seed=seed)
        return {n: p.detach().float() for n, p in adapter_parameters(model).items()}

    first = values()
    if METHODS[row].unchanged:
        again = (values(torch.bfloat16), values(torch.float64), values(targets="down_proj"))
    else:  # its first values are the model's own, as it rounds them
        again = (values(),)
    for same in again:
        assert all(torch.equal(first[name], value) for name, value in same.items())
    drawn = [value for value in first.values() if value.any()]
    assert len({value.flatten()[0].item() for value in drawn}) == len(drawn)  # no two alike
    other = values(seed=2)
    assert all(torch.equal(first[n], v) == (not v.any()) for n, v in other.items())


@each_method
def test_a_copied_model_is_on_its_own(tiny_model: Any, random_batch: Any, row: str) -> None:
    model, batch = tiny_model("llama", torch.bfloat16), random_batch()
    attach(model, options(row), seed=1)
    fill(model)
    before = run(model, batch)
    twin = copy.deepcopy(model)
    assert torch.equal(run(twin, batch), before)
    fill(twin, seed=3, size=1.0)
    assert not torch.equal(run(twin, batch), before)
    detach(twin)
    assert torch.equal(run(model, batch), before)


@ranked
def test_tensor_parallel_pieces_make_the_whole(row: str) -> None:
    """`follows`: each rank's layer with its part of the adapter, put together as the style says."""
    x = torch.randn(3, 8, dtype=torch.float64)
    whole = nn.ModuleDict({"layer": nn.Linear(8, 6, bias=False).double()})
    (adapter,) = attach(whole, options(row), seed=1).values()
    fill(whole)
    y = whole["layer"](x)
    assert adapter.follows.keys() == {"colwise", "rowwise"}
    for style, axis in (("colwise", 0), ("rowwise", 1)):
        outputs = []
        for rank in range(2):
            weight = whole["layer"].weight.chunk(2, axis)[rank]
            part = nn.ModuleDict({"layer": nn.Linear(*weight.T.shape, bias=False).double()})
            (piece,) = attach(part, options(row, rank=3, alpha=4.5), seed=1).values()
            for name, parameter in adapter.named_parameters():
                cut = adapter.follows[style].get(name)
                value = parameter if cut is None else parameter.chunk(2, cut)[rank]
                setattr(piece, name, nn.Parameter(value.detach()))
            part["layer"].weight = nn.Parameter(weight.detach())
            outputs.append(part["layer"](x if style == "colwise" else x.chunk(2, 1)[rank]))
        joined = torch.cat(outputs, 1) if style == "colwise" else outputs[0] + outputs[1]
        torch.testing.assert_close(joined, y)


@each_method
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")  # torch's own
@pytest.mark.filterwarnings("ignore:.*Function'> should not be instantiated:DeprecationWarning")
def test_compiled_layers_give_the_same(tiny_model: Any, random_batch: Any, row: str) -> None:
    batch = random_batch()
    for dtype in (torch.float32, torch.bfloat16):
        model = tiny_model("llama", dtype)
        attach(model, options(row, **({"dropout": 0.2} if METHODS[row].dropout else {})), seed=1)
        fill(model)
        stage = Stage(model.train())
        before = stage(batch)
        for layer in decoder_layers(model):
            layer.compile(
                backend="eager"
            )  # what tracing changes; not what the code generator rounds
        assert torch.equal(stage(batch), before)


@on_linear
@pytest.mark.parametrize("autocast", [False, True])
def test_a_small_update_survives_half_precision(row: str, autocast: bool) -> None:
    """Updates far below a step of the rounded output still act, on average over its elements."""
    torch.manual_seed(0)
    x = torch.randn(1, 256, 128).bfloat16()
    for layer in (nn.Linear(128, 512, bias=False), nn.Linear(128, 512), Conv1D(512, 128)):
        nn.init.normal_(layer.weight)
        model = nn.ModuleDict({"layer": layer.bfloat16()})
        wide = copy.deepcopy(model).float()
        for each in (model, wide):
            attach(each, options(row), seed=1)
            fill(each, size=METHODS[row].small)
        half, given = (wide, x.float()) if autocast else (model, x)
        with torch.no_grad():
            wanted = wide["layer"](x.float())
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                found = half["layer"](given)
                detach(half)
                base = half["layer"](given)
            detach(wide)
            wanted = wanted - wide["layer"](x.float())
        assert found.dtype == torch.bfloat16
        found = (found - base).float()
        assert wanted.abs().median() < base.float().abs().median() * 2**-7 / 8
        # by chance alone the share is within 0.05 of 1; adding to the rounded output gives 0.3
        assert 0.9 < float((found * wanted).sum() / wanted.square().sum()) < 1.1
