"""Adapters on fused experts, against one linear layer a matrix with the method's own adapter, and against PEFT."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from adapter_table import METHODS, error, fill, options, run
from torch import Tensor, nn

from luthier.adapters import (
    adapter_parameters,
    adapters_of,
    attach,
    detach,
    fold_into,
    load_adapter,
    save_adapter,
    select_targets,
)
from luthier.adapters.experts import tensors_of
from luthier.errors import Refused
from luthier.stacks import matrix

on_linear = pytest.mark.parametrize("row", [n for n, r in METHODS.items() if r.on == "linear"])
STACKS = ("gate_up_proj", "down_proj")
# [E, out, in] and [E, in, out] with biases and a gate of its own
transformers_experts = pytest.mark.parametrize("family", ["mixtral", "gpt_oss"])


def experts_of(model: Any) -> Any:
    return next(m for n, m in model.named_modules() if n.endswith("layers.0.mlp.experts"))


class Separate(nn.Module):
    """The same experts as linear layers."""

    def __init__(self, experts: Any) -> None:
        super().__init__()
        self.apply_gate = experts._apply_gate
        for stack in STACKS:
            layers = []
            for e in range(experts.num_experts):
                weight = matrix(experts, stack, e).detach().clone()
                layer = nn.Linear(weight.shape[1], weight.shape[0], bias=experts.has_bias)
                layer.weight = nn.Parameter(weight.contiguous())
                if experts.has_bias:
                    layer.bias = nn.Parameter(getattr(experts, f"{stack}_bias")[e].detach().clone())
                layers.append(layer)
            self.add_module(stack, nn.ModuleList(layers))

    def forward(self, x: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        rows: Any = [0.0] * len(x)
        for i in range(len(x)):
            for e, weight in zip(index[i].tolist(), weights[i], strict=True):
                y = self.apply_gate(self.gate_up_proj[e](x[i : i + 1]))  # pyright: ignore
                rows[i] = rows[i] + weight * self.down_proj[e](y)  # pyright: ignore
        return torch.cat(rows)


@on_linear
@transformers_experts
def test_experts_are_linear_layers(tiny_model: Any, row: str, family: str) -> None:
    """Outputs and gradients of every method are those of its adapters on single layers, to rounding."""
    model = tiny_model(family, torch.float64)
    experts = experts_of(model)
    single = Separate(experts)
    chosen: dict[str, Any] = {"targets": STACKS}
    attach(model, options(row, **chosen), seed=1)
    if row == "ia3":  # known by its name, which is no end of a path here
        chosen["feedforward"] = tuple(f"down_proj.{e}" for e in range(4))
    attach(single, options(row, **(chosen | {"targets": ".*_proj.*"})), seed=1)
    fill(model)
    mine = {s: experts.adapter[s] for s in STACKS}
    for name, adapter in adapters_of(single).items():
        stack, number = name.split(".")
        with torch.no_grad():
            adapter.take({k: t[int(number)] for k, t in tensors_of(mine[stack]).items()})
    if METHODS[row].options["method"] == "vera" and "form" not in METHODS[row].options:
        theirs = next(iter(adapters_of(single).values())).projections
        theirs.fill(mine["down_proj"].projections.A, mine["down_proj"].projections.B)
    x = torch.randn(7, 64, dtype=torch.float64)
    index = torch.tensor(
        [[0, 1], [1, 2], [0, 2], [2, 1], [0, 1], [1, 0], [2, 0]]
    )  # none to expert 3
    weights = torch.rand(7, 2, dtype=torch.float64)
    ours, wanted = experts(x, index, weights), single(x, index, weights)
    assert error(ours, wanted) < 1e-12
    ours.square().sum().backward()
    wanted.square().sum().backward()
    for name, adapter in adapters_of(single).items():
        stack, number = name.split(".")
        for key, p in adapter.named_parameters():
            grad = mine[stack].get_parameter(key).grad
            assert grad is not None
            if p.grad is None:  # nobody went there
                assert number == "3" and not grad[3].any()
            else:
                assert error(grad[int(number)], p.grad) < 1e-11, (name, key)


@on_linear
def test_a_small_update_of_experts_survives_half_precision(tiny_model: Any, row: str) -> None:
    """On average over outputs, updates below half a rounding step of the product act in full."""
    model = tiny_model("mixtral", torch.bfloat16)
    experts = experts_of(model)
    wide = tiny_model("mixtral", torch.bfloat16).float()
    for each in (model, wide):
        attach(each, options(row, targets="gate_up_proj"), seed=1)
        fill(each, size=METHODS[row].small)
    torch.manual_seed(0)
    x = torch.randn(256, 64).bfloat16()
    index, weights = torch.zeros(256, 1, dtype=torch.long), torch.ones(256, 1)

    def outputs(model: Any, x: Tensor) -> tuple[Tensor, Tensor]:
        module, seen = experts_of(model), []
        module._apply_gate = lambda y: seen.append(y) or y[..., : y.shape[-1] // 2]
        with torch.no_grad():
            module(x, index, weights.to(x.dtype))
            detach(model)
            module.config._experts_implementation = "eager"
            type(module).forward(module, x, index, weights.to(x.dtype))
        return seen[0].float(), x.float() @ module.gate_up_proj[0].float().t()

    wanted, base = outputs(wide, x.float())
    found, exact = outputs(model, x)
    wanted = wanted - base
    # the base's own rounding is the same for both and falls out: it does not know the update
    found = found - exact
    assert 0.8 < float((found * wanted).sum() / wanted.square().sum()) < 1.2
    assert experts is experts_of(model)


def test_all_linear_reaches_the_experts(tiny_model: Any) -> None:
    names = select_targets(tiny_model("qwen3_moe"), "all-linear")
    assert "model.layers.1.mlp.experts.down_proj" in names
    assert [n for n in select_targets(tiny_model("gpt_oss"), "experts.down_proj")] == [
        f"model.layers.{i}.mlp.experts.down_proj" for i in range(2)
    ]
    dense = select_targets(tiny_model("deepseek_v3"), ".*shared_experts.*")
    assert dense == [f"model.layers.1.mlp.shared_experts.{n}_proj" for n in ("gate", "up", "down")]


def test_dropout_of_experts_is_refused(tiny_model: Any) -> None:
    model = tiny_model("mixtral")
    with pytest.raises(Refused, match="without the experts"):
        attach(model, options("lora", dropout=0.1), seed=1)
    attach(model, options("lora", dropout=0.1, targets=("q_proj", "v_proj")), seed=1)


def test_first_values_depend_on_the_expert(tiny_model: Any) -> None:
    model = tiny_model("mixtral")
    attach(model, options("lora", targets="down_proj"), seed=1)
    A = experts_of(model).adapter["down_proj"].lora_A
    assert len({a[0, 0].item() for a in A}) == 4 and not torch.equal(A[0], A[1])
    again = tiny_model("mixtral")
    attach(again, options("lora"), seed=1)
    assert torch.equal(experts_of(again).adapter["down_proj"].lora_A, A)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # PEFT's use of it
@transformers_experts
def test_lora_folders_go_to_peft_and_back(
    tiny_model: Any, random_batch: Any, tmp_path: Path, family: str
) -> None:
    peft = pytest.importorskip("peft")
    batch = random_batch()
    model = tiny_model(family)
    attach(model, options("lora"), seed=1)
    fill(model)
    save_adapter(model, tmp_path / "ours", options("lora"), "base", None)
    theirs = peft.PeftModel.from_pretrained(tiny_model(family), tmp_path / "ours")
    base, wanted = run(tiny_model(family), batch), run(model, batch)
    assert error(run(theirs, batch), wanted) < 2e-6
    assert error(wanted, base) > 1e-2
    with torch.no_grad():
        for name, p in theirs.named_parameters():
            if "lora_" in name:
                p.add_(0.05 * torch.randn(p.shape))
    theirs.save_pretrained(tmp_path / "theirs", save_embedding_layers=False)
    again = tiny_model(family)
    load_adapter(again, tmp_path / "theirs")
    assert error(run(again, batch), run(theirs, batch)) < 2e-6
    fold_into(again)
    assert error(run(again, batch), run(theirs, batch)) < 1e-5


def test_target_parameters_that_are_not_there(tiny_model: Any, tmp_path: Path) -> None:
    model = tiny_model("mixtral")
    attach(model, options("lora"), seed=1)
    save_adapter(model, tmp_path, options("lora"), "base", None)
    with pytest.raises(Refused, match="no such fused experts"):
        load_adapter(tiny_model("llama"), tmp_path)


def test_the_base_keeps_its_names(tiny_model: Any) -> None:
    model = tiny_model("mixtral")
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    attach(model, options("dora"), seed=1)
    fill(model)
    mine = adapter_parameters(model)
    assert {n for n, _ in model.named_parameters()} - set(mine) == before.keys()
    detach(model)
    after = dict(model.named_parameters())
    assert after.keys() == before.keys()
    assert all(torch.equal(after[n], p) for n, p in before.items())
    assert "forward" not in vars(experts_of(model))
