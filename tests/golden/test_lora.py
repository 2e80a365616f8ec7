"""LoRA on one layer against numbers from PEFT (nn.Linear) and PaddleNLP (weights [in, out], our Conv1D)."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from luthier.adapters import LoRA, adapters_of, fold_into
from luthier.adapters.base import build, install

FOLDER = Path(os.environ.get("LUTHIER_GOLDEN", Path(__file__).parent / "data")) / "peft"
METHODS = {"lora", "rslora"}
LATER = {"dora", "moslora", "pissa", "loraplus"}  # forms of LoRA that arrive with the other methods


def cases() -> list[Any]:
    path = FOLDER / "manifest.json"
    if not path.is_file():
        return [pytest.param(None, id="absent", marks=pytest.mark.skip(reason=f"{path} is absent"))]
    params = []
    for case in json.loads(path.read_text("utf-8"))["cases"]:
        reason = None
        if case["method"] in LATER:
            reason = f"method {case['method']} is not there yet"
        elif case["method"] not in METHODS:
            continue
        elif not (FOLDER / case["file"]).is_file():
            reason = f"{case['file']} is absent"
        marks = pytest.mark.skip(reason=reason) if reason else ()
        params.append(pytest.param(case, id=case["id"], marks=marks))
    return params


@pytest.mark.parametrize("case", cases())
def test_layer(case: dict[str, Any]) -> None:
    stored = load_file(FOLDER / case["file"])
    tensors = {name: stored[entry["key"]] for name, entry in case["tensors"].items()}
    hyper = case["hyper"]
    paddle = case["tensors"]["weight"]["axes"] == ["in", "out"]
    layer = _layer(hyper, tensors, paddle)
    model = nn.ModuleDict({"layer": layer})
    fields = {
        "r": hyper["r"],
        "lora_alpha": hyper["lora_alpha"],
        "use_rslora": hyper.get("use_rslora", hyper.get("rslora")),
    }
    _, plan, _ = LoRA.from_peft(fields, ["layer"])
    install(model, build(model, plan, seed=0))
    adapter = adapters_of(model)["layer"]
    assert isinstance(adapter, LoRA)
    with torch.no_grad():
        adapter.lora_A.copy_(_turn(tensors["lora_A"], paddle))
        adapter.lora_B.copy_(_turn(tensors["lora_B"], paddle))

    x = tensors["x"].requires_grad_()
    y = layer(x)
    (y * tensors["grad_y"]).sum().backward()
    ours: dict[str, Tensor | None] = {
        "y": y.detach(),
        "grad_x": x.grad,
        "grad_lora_A": None if adapter.lora_A.grad is None else _turn(adapter.lora_A.grad, paddle),
        "grad_lora_B": None if adapter.lora_B.grad is None else _turn(adapter.lora_B.grad, paddle),
    }
    fold_into(model)
    ours["merged_weight"] = layer.weight.detach()
    for name, value in ours.items():
        assert value is not None, name
        torch.testing.assert_close(
            value, tensors[name], **case["tolerance"], msg=lambda m, n=name: f"{n}: {m}"
        )


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
