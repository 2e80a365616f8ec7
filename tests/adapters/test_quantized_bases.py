"""Every adapter method on every quantised storage: it does what it does on the dense model of the same numbers."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from adapter_table import METHODS, ZOO, error, fill, keep_state, options, run, take_state

from luthier.adapters import (
    adapter_parameters,
    adapters_of,
    attach,
    fold_into,
    load_adapter,
    save_adapter,
)
from luthier.config import QuantizeConfig
from luthier.layers import count, dense_weight, is_quantized, is_transposed
from luthier.quantize.loading import Quantization, plan_quantization

SCHEMES = ("nf4", "fp4", "int8", "int4")
each_scheme = pytest.mark.parametrize("scheme", SCHEMES)
each_method = pytest.mark.parametrize("row", METHODS)
# plain; Conv1D and biases; no attention interface and a subclass of Linear is among the families' own tests
each_family = pytest.mark.parametrize("family", ("llama", "gpt2"))


def pair(model: Any, scheme: str) -> tuple[Any, Any]:
    """The quantised model, and the dense one of exactly its numbers."""
    dense = copy.deepcopy(model)
    Quantization(QuantizeConfig(weights=scheme)).convert(model)  # pyright: ignore[reportArgumentType]
    for name, layer in model.named_modules():
        if is_quantized(layer):
            weight = dense_weight(layer)
            owner, _, last = name.rpartition(".")
            target = getattr(dense.get_submodule(owner), last)
            target = target.weight if isinstance(target, torch.nn.Module) else target  # experts
            target.data.copy_(weight.mT if is_transposed(layer) else weight)
    return model, dense


def gradients(model: Any, batch: Any) -> dict[str, torch.Tensor]:
    run(model, batch).square().mean().backward()
    return {n: p.grad for n, p in adapter_parameters(model).items() if p.grad is not None}


def assert_same_gradients(models: tuple[Any, Any], batch: Any, bound: float) -> None:
    """Every adapter tensor's gradient on codes is that on the dense model, in float64."""
    ours, theirs = (gradients(model, batch) for model in models)
    assert ours.keys() == theirs.keys() == adapter_parameters(models[0]).keys()
    for name, gradient in ours.items():
        assert error(gradient, theirs[name]) < bound, name


@each_method
@each_scheme
@each_family
def test_outputs_and_gradients_are_those_of_the_dense_model(
    tiny_model: Any, random_batch: Any, row: str, scheme: str, family: str
) -> None:
    batch = random_batch()
    models = pair(tiny_model(family, torch.float64), scheme)
    for model in models:
        attach(model, options(row), seed=1)
        fill(model)
    quantized, dense = models
    # float64: what is left is the order of sums
    assert error(run(quantized, batch), run(dense, batch)) < 1e-13
    assert_same_gradients(models, batch, 1e-11)


@pytest.mark.parametrize("row", ["lora", "dora", "reft"])
@pytest.mark.parametrize("scheme", ("nf4", "int8"))
@pytest.mark.parametrize("family", ZOO)
def test_the_zoo_too(
    tiny_model: Any, random_batch: Any, row: str, scheme: str, family: str
) -> None:
    models = pair(tiny_model(family, torch.float64), scheme)
    for model in models:
        attach(model, options(row), seed=1)
        fill(model)
    assert_same_gradients(models, random_batch(), 1e-11)


@pytest.mark.parametrize("row", [name for name, r in METHODS.items() if r.on == "linear"])
@pytest.mark.parametrize(("family", "scheme"), [("mixtral", "nf4"), ("gpt_oss", "int8")])
def test_fused_experts_are_quantised_under_every_method(
    tiny_model: Any, random_batch: Any, row: str, family: str, scheme: str
) -> None:
    """Mixtral's stacks, and gpt-oss's, which are transposed and have biases; folded they are the same again."""
    batch = random_batch()
    models = pair(tiny_model(family, torch.float64), scheme)
    stacks = [name for name, _ in models[0].named_modules() if name.endswith("experts.down_proj")]
    assert all(is_quantized(models[0].get_submodule(name)) for name in stacks) and stacks
    for model in models:
        attach(model, options(row), seed=1)
        fill(model)
    quantized, dense = models
    assert error(run(quantized, batch), run(dense, batch)) < 1e-12
    assert_same_gradients(models, batch, 1e-10)
    if METHODS[row].folds:
        for model in models:
            fold_into(model)
        for name in stacks:
            found = dense_weight(quantized.get_submodule(name))
            wanted = dense.get_parameter(name)
            wanted = wanted.mT if is_transposed(quantized.get_submodule(name)) else wanted
            assert error(found, wanted) < (0.02 if scheme == "int8" else 0.15), name


@each_method
@each_scheme
def test_half_precision_keeps_small_updates(
    tiny_model: Any, random_batch: Any, row: str, scheme: str
) -> None:
    """Half precision on codes is no further from float32 than on dense weights, to a fifth."""
    batch = random_batch()
    quantized, dense = pair(tiny_model("llama", torch.bfloat16), scheme)
    exact = copy.deepcopy(dense).float()
    for model in (quantized, exact, dense):
        attach(model, options(row), seed=1)
        fill(model, size=0.05)
        for name, adapter in adapters_of(
            model
        ).items():  # PiSSA's and VeRA's depend on the weights' last bits
            theirs = adapters_of(quantized)[name]
            adapter.load_state_dict(theirs.state_dict())
            for buffer in ("vera_A", "vera_B0") if row == "vera_paddlenlp" else ():
                adapter.get_buffer(buffer).copy_(theirs.get_buffer(buffer))
    wanted = run(exact, batch)
    far, usual = (error(run(m, batch).float(), wanted) for m in (quantized, dense))
    assert far < 1.2 * usual + 1e-3


@each_method
@each_scheme
def test_saved_and_loaded_again(
    tiny_model: Any, random_batch: Any, tmp_path: Path, row: str, scheme: str
) -> None:
    batch = random_batch()
    model, _ = pair(tiny_model("llama"), scheme)
    fresh = copy.deepcopy(model)
    base = count(model)[1]
    attach(model, options(row), seed=1)
    assert count(model)[1] - sum(p.numel() for p in adapter_parameters(model).values()) == base
    fill(model)
    save_adapter(model, tmp_path, options(row), "base", None)
    load_adapter(fresh, tmp_path, trainable=True)
    assert error(run(fresh, batch), run(model, batch)) < 1e-6
    keep_state(model, tmp_path)
    fill(fresh, seed=5)
    take_state(fresh, tmp_path)
    for name, parameter in adapter_parameters(model).items():
        assert torch.equal(adapter_parameters(fresh)[name], parameter), name


@pytest.mark.parametrize("row", [name for name, r in METHODS.items() if r.folds])
@each_family
def test_folding_into_codes_changes_the_dequantised_weight(
    tiny_model: Any, row: str, family: str
) -> None:
    """int8's rounding is small enough to see that the change went in, in the right orientation."""
    model, dense = pair(tiny_model(family), "int8")
    for m in (model, dense):
        attach(m, options(row), seed=1)
        fill(m)
    names = list(adapters_of(model))
    for m in (model, dense):
        fold_into(m)
    for name in names:
        assert is_quantized(model.get_submodule(name))
        wanted = dense_weight(dense.get_submodule(name))
        assert error(dense_weight(model.get_submodule(name)), wanted) < 0.02, name


@each_scheme
def test_generation_with_a_cache_is_generation_without(tiny_model: Any, scheme: str) -> None:
    model, _ = pair(tiny_model("llama"), scheme)
    attach(model, options("lora"), seed=1)
    fill(model)
    ids = torch.tensor([[5, 6, 7, 8]])
    made = [
        model.generate(ids, max_new_tokens=6, do_sample=False, use_cache=cache)
        for cache in (True, False)
    ]
    assert torch.equal(*made)


def test_modules_of_different_schemes(tiny_model: Any) -> None:
    model = tiny_model("llama")
    asked = QuantizeConfig(
        weights="nf4", modules={"mlp.up_proj": "int8", r".*layers\.1\..*": "none", "o_proj": "int4"}
    )
    schemes = {name: spec.scheme for name, spec in plan_quantization(model, asked).items()}
    assert schemes["model.layers.0.self_attn.q_proj"] == "nf4"
    assert schemes["model.layers.0.mlp.up_proj"] == "int8"
    assert schemes["model.layers.1.self_attn.o_proj"] == "int4"  # the last that matches counts
    assert "model.layers.1.self_attn.q_proj" not in schemes
    assert "lm_head" not in schemes
