"""Cases of one layer from the golden manifest: what the golden tests of single methods share.

PaddleNLP's weights are [in, out], as our Conv1D's; those of all others are [out, in].
"""

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

from luthier.adapters import fold_into
from luthier.adapters.placing import build, install
from luthier.config import AdapterConfig

VARIABLE = "LUTHIER_GOLDEN"  # another golden folder, of the same files
ROOT = Path(os.environ.get(VARIABLE) or Path(__file__).parent / "data")
FOLDER = ROOT / "peft"


def absent(path: Path) -> Any:
    """The one parameter of a test whose file is not in the golden folder: skipped, with the reason."""
    return pytest.param(None, id="absent", marks=skip_absent(path))


def skip_absent(path: Path) -> Any:
    return pytest.mark.skip(reason=f"{path} is absent: the golden folder is {VARIABLE}, or {ROOT}")


def cases(*methods: str, prefix: str = "") -> list[Any]:
    """Parameters of a test: the cases of these methods whose id starts so; skipped with a reason if absent."""
    path = FOLDER / "manifest.json"
    if not path.is_file():
        return [absent(path)]
    params = []
    for case in json.loads(path.read_text("utf-8"))["cases"]:
        if case["method"] in methods and case["id"].startswith(prefix):
            file = FOLDER / case["file"]
            marks = () if file.is_file() else skip_absent(file)
            params.append(pytest.param(case, id=case["id"], marks=marks))
    return params


def tensors_of(case: dict[str, Any]) -> dict[str, Tensor]:
    stored = load_file(FOLDER / case["file"])
    return {name: stored[entry["key"]] for name, entry in case["tensors"].items()}


def layer_of(tensors: dict[str, Tensor], paddle: bool) -> Any:
    weight, bias = tensors["weight"], tensors.get("bias")
    layer: Any = (
        Conv1D(weight.shape[1], weight.shape[0])
        if paddle
        else nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None)
    )
    with torch.no_grad():
        layer.weight.copy_(weight)
        if bias is not None:
            layer.bias.copy_(bias)
    return layer


def adapted(layer: nn.Module, **options: Any) -> tuple[nn.ModuleDict, Any]:
    """The layer in a model, and its adapter, without values."""
    model = nn.ModuleDict({"layer": layer})
    plan = {"layer": AdapterConfig(**options)}
    install(model, build(model, plan, seed=0))
    return model, layer.get_submodule("adapter")


def results(model: nn.ModuleDict, adapter: Any, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """y, grad_x, merged_weight and the gradient of each of the adapter's parameters, grad_<name>."""
    x = tensors["x"].clone().requires_grad_()
    y = model["layer"](x)
    (y * tensors["grad_y"]).sum().backward()
    grads: dict[str, Any] = {f"grad_{n}": p.grad for n, p in adapter.named_parameters()}
    fold_into(model)
    found = {
        "y": y.detach(),
        "grad_x": x.grad,
        "merged_weight": model["layer"].get_parameter("weight").detach(),
    }
    return {name: value for name, value in {**found, **grads}.items() if value is not None}


def compare(ours: dict[str, Tensor], tensors: dict[str, Tensor], case: dict[str, Any]) -> None:
    for name, value in ours.items():
        torch.testing.assert_close(
            value, tensors[name], **case["tolerance"], msg=lambda m, n=name: f"{n}: {m}"
        )
