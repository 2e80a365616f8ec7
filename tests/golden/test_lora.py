"""LoRA and its forms on one layer against numbers from PEFT and MoSLoRA's authors (nn.Linear) and PaddleNLP
(weights [in, out], our Conv1D); LoRA+ against the optimiser steps of both suites."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from golden_cases import cases, tensors_of
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from luthier.adapters import LoRA, adapters_of, attach, fold_into, lr_scales
from luthier.adapters.lora import MAGNITUDE
from luthier.adapters.placing import build, install
from luthier.config import AdapterConfig, OptimConfig
from luthier.train.optim import make_optimizer


def is_paddle(case: dict[str, Any]) -> bool:
    return case["source"]["impl"] == "PaddleNLP"


def adapter_config(**options: Any) -> AdapterConfig:
    return AdapterConfig.model_validate({"method": "lora", **options})


def rslora(hyper: dict[str, Any]) -> bool:
    return bool(hyper.get("use_rslora", hyper.get("rslora", False)))


def close(ours: dict[str, Tensor | None], stored: dict[str, Tensor], case: dict[str, Any]) -> None:
    for name, value in ours.items():
        assert value is not None, name
        torch.testing.assert_close(
            value.detach(), stored[name], **case["tolerance"], msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.mark.parametrize("case", cases("lora", "rslora", "moslora", "dora"))
def test_layer(case: dict[str, Any]) -> None:
    stored, hyper, paddle = tensors_of(case), case["hyper"], is_paddle(case)
    layer = _layer(hyper, stored, paddle)
    model = nn.ModuleDict({"layer": layer})
    fields = {
        "peft_type": "LUTHIER_MIXER" if case["method"] == "moslora" else "LORA",
        "r": hyper["r"],
        "lora_alpha": hyper["lora_alpha"],
        "use_rslora": rslora(hyper),
        "use_dora": case["method"] == "dora",
    }
    _, plan, _ = LoRA.from_peft(fields, ["layer"])
    install(model, build(model, plan, seed=0))
    adapter = adapters_of(model)["layer"]
    assert isinstance(adapter, LoRA)
    names = {name: name for name, _ in adapter.named_parameters()}
    if MAGNITUDE in names:
        names[MAGNITUDE] = "magnitude"
    with torch.no_grad():
        if "magnitude" in stored:
            adapter.initialise(layer, torch.Generator())
            magnitude = adapter.get_parameter(MAGNITUDE)
            close({"magnitude_init": magnitude}, stored, case)
        for ours, theirs in names.items():
            adapter.get_parameter(ours).copy_(_turn(stored[theirs], paddle))

    x = stored["x"].requires_grad_()
    y = layer(x)
    (y * stored["grad_y"]).sum().backward()
    found: dict[str, Tensor | None] = {"y": y, "grad_x": x.grad}
    for ours, theirs in names.items():
        gradient = adapter.get_parameter(ours).grad
        found[f"grad_{theirs}"] = None if gradient is None else _turn(gradient, paddle)
    fold_into(model)
    found["merged_weight"] = layer.weight
    close(found, stored, case)


@pytest.mark.parametrize("case", cases("pissa"))
def test_pissa(case: dict[str, Any], relative: Any) -> None:
    stored, hyper, paddle = tensors_of(case), case["hyper"], is_paddle(case)
    layer = _layer(hyper, stored, paddle)
    model = nn.ModuleDict({"layer": layer})
    config = adapter_config(
        rank=hyper["r"],
        alpha=hyper["r"] if paddle else hyper["lora_alpha"],  # PaddleNLP's scale is always 1
        rslora=rslora(hyper),
        pissa=True,
    )
    adapter: Any = attach(model, config, seed=0)["layer"]
    assert adapter.scale == pytest.approx(hyper["scaling"])
    A, B = adapter.lora_A, adapter.lora_B
    signs = (A.detach() * _turn(stored["lora_A"], paddle)).sum(1).sign()  # the pair's sign is free
    x = stored["x"].requires_grad_()
    y = layer(x)
    (y * stored["grad_y"]).sum().backward()
    assert A.grad is not None and B.grad is not None
    factors = {
        "lora_A": signs[:, None] * A,
        "lora_B": signs * B,
        "grad_lora_A": signs[:, None] * A.grad,
        "grad_lora_B": signs * B.grad,
    }
    for name, value in factors.items():
        # as near as a decomposition in float32, theirs, comes to single singular vectors
        assert relative(_turn(value, paddle), stored[name]) < 1e-5, name
    product = (B @ A).detach()
    close(
        {
            "y": y,
            "grad_x": x.grad,
            "residual": layer.weight - adapter.scale * _turn(product, paddle),
            "lora_AB" if paddle else "lora_BA": _turn(product, paddle),
        },
        stored,
        case,
    )
    if paddle:
        fold_into(model)
        close({"merged_weight": layer.weight}, stored, case)
        values = B.norm(dim=0) * A.norm(dim=1)
        torch.testing.assert_close(
            values.detach(), stored["singular_values"][: hyper["r"]], **case["tolerance"]
        )


@pytest.mark.parametrize("case", cases("loraplus"))
def test_lora_plus(case: dict[str, Any]) -> None:
    """Parameter groups and optimiser steps."""
    stored, hyper = tensors_of(case), case["hyper"]
    (_paddle_steps if is_paddle(case) else _peft_steps)(case, stored, hyper)


def _paddle_steps(case: dict[str, Any], stored: dict[str, Tensor], hyper: dict[str, Any]) -> None:
    layer = _layer(hyper, stored, paddle=True)
    model = nn.ModuleDict({"layer": layer})
    config = adapter_config(
        rank=hyper["r"], alpha=hyper["lora_alpha"], lora_plus=hyper["lora_plus_scale"]
    )
    (adapter,) = attach(model, config, seed=0).values()
    named = list(adapter.named_parameters())
    scales = {name.rpartition(".")[2]: scale for name, scale in lr_scales(model).items()}
    assert scales == hyper["lr_multiplier"]
    sgd = hyper["optimizer"] == "sgd"  # PaddleNLP's has no momentum, which is our first beta
    optim = OptimConfig.model_validate(
        {
            "name": hyper["optimizer"],
            "betas": (0.0, 0.999) if sgd else hyper["betas"],
            "eps": hyper["eps"],
            "weight_decay": hyper["weight_decay"],
        }
    )
    optimizer = make_optimizer(named, optim, hyper["lr"], scales)
    with torch.no_grad():
        for name, parameter in named:
            parameter.copy_(stored[f"{name}0"].t())
    for step in range(hyper["steps"]):
        optimizer.zero_grad()
        (layer(stored["x"][step]) * stored["grad_y"][step]).sum().backward()
        found = {f"grad_{n}": p.grad.t() for n, p in named if p.grad is not None}
        optimizer.step()
        found |= {name: parameter.t() for name, parameter in named}
        assert len(found) == 4
        close({**found}, {name: stored[name][step] for name in found}, case)


def _peft_steps(case: dict[str, Any], stored: dict[str, Tensor], hyper: dict[str, Any]) -> None:
    """PEFT's rates for what we do not scale (norms, biases, embeddings) are given as its groups say."""
    names = [n.removeprefix("before/") for n in stored if n.startswith("before/")]
    named = [(name, nn.Parameter(stored[f"before/{name}"].clone())) for name in names]
    scales = {n: g["lr"] / hyper["lr"] for g in hyper["groups"] for n in g["params"]}
    model = nn.ModuleDict({"lin": nn.Linear(4, 4)})
    config = adapter_config(rank=2, lora_plus=hyper["loraplus_lr_ratio"])
    attach(model, config, seed=0)
    ours = {name.rpartition(".")[2]: scale for name, scale in lr_scales(model).items()}
    for name in ours:
        assert ours[name] == pytest.approx(scales[f"base_model.model.lin.{name}.default.weight"])
    decay = {"weight_decay": hyper["loraplus_weight_decay"]}
    optim = OptimConfig.model_validate({"betas": hyper["betas"], "eps": hyper["eps"], **decay})
    optimizer = make_optimizer(named, optim, hyper["lr"], scales)
    by_id = {id(parameter): name for name, parameter in named}
    groups = {
        by_id[id(p)]: (g["lr"], g["weight_decay"])
        for g in optimizer.param_groups
        for p in g["params"]
    }
    for group in hyper["groups"]:
        for name in group["params"]:
            assert groups[name] == pytest.approx((group["lr"], group["weight_decay"])), name
    for step in range(hyper["steps"]):
        for name, parameter in named:
            parameter.grad = stored[f"grads/{name}"][step].clone()
        optimizer.step()
        wanted = {name: stored[f"after/{name}"][step] for name in names}
        close({**dict(named)}, wanted, case)


def _layer(hyper: dict[str, Any], tensors: dict[str, Tensor], paddle: bool) -> Any:
    num_in, num_out = hyper["in_features"], hyper["out_features"]
    bias = tensors.get("bias")
    layer: Any = (
        Conv1D(num_out, num_in) if paddle else nn.Linear(num_in, num_out, bias=bias is not None)
    )
    with torch.no_grad():
        layer.weight.copy_(tensors["weight"])
        if bias is not None:
            layer.bias.copy_(bias)
    return layer


def _turn(tensor: Tensor, paddle: bool) -> Tensor:
    """PaddleNLP stores every factor transposed."""
    return tensor.t() if paddle else tensor
