"""DoRA: the norm without the matrix, its constant gradient, half precision, and PEFT's form of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from adapter_table import error, fill, options
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from luthier.adapters import (
    LoRA,
    adapter_parameters,
    adapters_of,
    attach,
    detach,
    fold_into,
    load_adapter,
    save_adapter,
)
from luthier.adapters.facts import FACTS
from luthier.adapters.lora import MAGNITUDE

pytestmark = [  # PEFT's own
    pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to False:UserWarning"),
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
]
KINDS = {"linear": lambda: nn.Linear(12, 16), "conv1d": lambda: Conv1D(16, 12)}


def logits(model: Any) -> Tensor:
    return model(input_ids=torch.arange(3, 19)[None], use_cache=False).logits


def by_the_paper(layer: Any, adapter: Any, x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """m V / ||V|| with the norm as a constant, from leaves of its own."""
    weight = layer.weight.detach()
    weight = weight.t() if isinstance(layer, Conv1D) else weight
    own = {n: p.detach().clone().requires_grad_() for n, p in adapter.named_parameters()}
    v = weight + adapter.scale * own["lora_B"] @ own["lora_A"]
    scale = own[MAGNITUDE] / v.detach().norm(dim=1)
    return x @ (scale[:, None] * v).t() + layer.bias, own


@pytest.mark.parametrize("kind", KINDS)
def test_output_and_gradients_are_the_paper_s(kind: str) -> None:
    model: Any = nn.ModuleDict({"layer": KINDS[kind]().double()})
    nn.init.normal_(model["layer"].bias)  # which is not scaled
    (adapter,) = attach(model, options("dora"), seed=1).values()
    fill(model)
    x = torch.randn(2, 5, 12, dtype=torch.float64, requires_grad=True)
    y = model["layer"](x)
    gradient = torch.randn_like(y)
    y.backward(gradient)
    twin = x.detach().clone().requires_grad_()
    wanted, own = by_the_paper(model["layer"], adapter, twin)
    wanted.backward(gradient)
    assert error(y, wanted) < 1e-14
    assert x.grad is not None and twin.grad is not None and error(x.grad, twin.grad) < 1e-14
    for name, leaf in own.items():
        found = adapter.get_parameter(name).grad
        assert found is not None and leaf.grad is not None
        assert error(found, leaf.grad) < 1e-13, name
    # where the layer's forward is not known, the hook gives the same
    plain = type(model["layer"]).forward(model["layer"], x)
    assert error(adapter.after(x, plain), wanted) < 1e-14


def test_the_gradient_is_the_derivative_at_a_constant_norm(monkeypatch: Any) -> None:
    from luthier.adapters import lora

    model: Any = nn.ModuleDict({"layer": nn.Linear(6, 5).double()})
    attach(model, options("dora"), seed=1)
    fill(model)
    norm = torch.rand(5, dtype=torch.float64) + 0.5
    monkeypatch.setattr(lora, "_excess", lambda magnitude, _: magnitude / norm - 1)
    x = torch.randn(2, 3, 6, dtype=torch.float64, requires_grad=True)
    mine = list(adapter_parameters(model).values())
    assert torch.autograd.gradcheck(lambda *_: model["layer"](x), (x, *mine))


def test_the_first_magnitude_is_the_norm(tiny_model: Any) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        model = tiny_model("gpt2", dtype)
        for name, adapter in attach(model, options("dora"), seed=1).items():
            weight = model.get_submodule(name).weight.float()
            magnitude = adapter.get_parameter(MAGNITUDE)
            torch.testing.assert_close(magnitude, weight.norm(dim=0))
            assert magnitude.dtype == torch.float32


def test_a_row_of_zeros_stays_finite() -> None:
    """A pruned output has no direction: it is zero, and so are its gradients."""
    model: Any = nn.ModuleDict({"layer": nn.Linear(12, 16, bias=False)})
    with torch.no_grad():
        model["layer"].weight[3] = 0
    attach(model, options("dora"), seed=1)
    y = model["layer"](torch.randn(5, 12))
    assert not y[:, 3].any()
    y.sum().backward()
    assert all(p.grad.isfinite().all() for p in adapter_parameters(model).values())
    fold_into(model)
    assert model["layer"].weight.isfinite().all() and not model["layer"].weight[3].any()


@pytest.mark.parametrize("kind", ["linear", "conv1d"])
def test_a_small_change_of_the_magnitude_survives_half_precision(kind: str) -> None:
    """An eighth of a rounding step of bf16: rounded after the product, all of it would be lost."""
    torch.manual_seed(0)
    layer: Any = {"linear": lambda: nn.Linear(128, 512, bias=False), "conv1d": lambda: Conv1D(512, 128)}[kind]()  # fmt: skip
    nn.init.normal_(layer.weight)
    model: Any = nn.ModuleDict({"layer": layer.bfloat16()})
    (adapter,) = attach(model, options("dora"), seed=1).values()
    x = torch.randn(256, 128).bfloat16()
    with torch.no_grad():
        before = layer(x).float()
        magnitude = adapter.get_parameter(MAGNITUDE)
        change = 2**-11 * torch.randn(512).sign()
        magnitude.mul_(1 + change)
        found = layer(x).float() - before
    wanted = before * change
    assert 0.9 < float((found * wanted).sum() / wanted.square().sum()) < 1.1


@pytest.mark.parametrize(
    ("family", "fields"),
    [
        ("llama", {"target_modules": ["q_proj", "down_proj"], "use_rslora": True}),
        ("qwen2", {"target_modules": "all-linear", "rank_pattern": {"k_proj": 2}}),
        ("gpt2", {"target_modules": ["c_attn", "mlp.c_proj"]}),
    ],
)
def test_peft_s_folders_and_gradients(
    tiny_model: Any, tmp_path: Path, family: str, fields: dict[str, Any]
) -> None:
    torch.manual_seed(0)
    config = peft.LoraConfig(
        r=4,
        lora_alpha=6,
        task_type="CAUSAL_LM",
        init_lora_weights=False,
        use_dora=True,
        fan_in_fan_out=family == "gpt2",
        **fields,
    )
    theirs: Any = peft.get_peft_model(tiny_model(family), config).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    theirs.save_pretrained(tmp_path / "theirs")
    ours = tiny_model(family)
    loaded = load_adapter(ours, tmp_path / "theirs", trainable=True)
    assert loaded.config.dora and loaded.config.rslora == fields.get("use_rslora", False)
    wanted = logits(theirs)
    assert error(logits(ours), wanted) < 1e-5
    for model in (theirs, ours):
        logits(model).square().mean().backward()
    gradients = [p.grad for p in theirs.parameters() if p.requires_grad]
    mine = adapter_parameters(ours)
    assert len(mine) == len(gradients)
    named = {n.replace(".default", ""): p.grad for n, p in theirs.named_parameters()}
    for name, parameter in mine.items():
        path = "base_model.model." + name.replace(".adapter.", ".") + ".weight"
        assert error(parameter.grad, named[path]) < 1e-5, name
    # and ours is theirs
    save_adapter(ours, tmp_path / "ours", loaded.config, "base", None)
    again = peft.PeftModel.from_pretrained(tiny_model(family), tmp_path / "ours")
    assert error(logits(again), wanted) < 1e-5
    (tmp_path / "ours" / FACTS).unlink()
    reloaded = tiny_model(family)
    load_adapter(reloaded, tmp_path / "ours")
    assert torch.equal(logits(reloaded), logits(ours))
    merged: Any = theirs.merge_and_unload()
    fold_into(ours)
    assert error(logits(ours), logits(merged)) < 1e-5


def test_tensor_parallel_pieces_by_output() -> None:
    """A norm is over all inputs, which a cut by outputs leaves together; other cuts are in tests/parallel."""
    whole: Any = nn.ModuleDict({"layer": nn.Linear(8, 6, bias=False).double()})
    (adapter,) = attach(whole, options("dora"), seed=1).values()
    assert adapter.follows.keys() == LoRA.follows.keys() == {"colwise", "rowwise"}
    fill(whole)
    x = torch.randn(3, 8, dtype=torch.float64)
    outputs = []
    for rank in range(2):
        part: Any = nn.ModuleDict({"layer": nn.Linear(8, 3, bias=False).double()})
        part["layer"].weight.data.copy_(whole["layer"].weight.detach().chunk(2)[rank])
        (piece,) = attach(part, options("dora", rank=3, alpha=6 * (3 / 4) ** 0.5), seed=1).values()
        for name, value in adapter.named_parameters():
            cut = adapter.follows["colwise"].get(name)
            value = value.detach() if cut is None else value.detach().chunk(2, cut)[rank]
            setattr(piece, name, nn.Parameter(value))
        outputs.append(part["layer"](x))
    torch.testing.assert_close(torch.cat(outputs, 1), whole["layer"](x))


def test_detached_and_attached_again(tiny_model: Any) -> None:
    """The base's norms are taken anew from the base that is there."""
    model = tiny_model("llama")
    attach(model, options("dora"), seed=1)
    logits(model)
    detach(model)
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight.mul_(2)
    before = logits(model)
    attach(model, options("dora"), seed=1)
    assert torch.equal(logits(model), before) and len(adapters_of(model)) == 14
