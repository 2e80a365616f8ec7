"""(IA)^3: its folders and PEFT's, which layers are scaled where, half precision, what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from adapter_table import error, fill, run
from torch import nn
from transformers.pytorch_utils import Conv1D

from luthier.adapters import adapters_of, attach, detach, fold_into, load_adapter, save_adapter
from luthier.adapters.facts import CONFIG, FACTS
from luthier.config import AdapterConfig
from luthier.errors import Refused

pytestmark = [
    pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`:UserWarning"),
    pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to False:UserWarning"),
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
]
CLOSE = 1e-5  # rounded through two layers


def options(**changes: Any) -> AdapterConfig:
    return AdapterConfig.model_validate({"method": "ia3", **changes})


def logits(model: Any) -> torch.Tensor:
    return model(input_ids=torch.arange(3, 19)[None], use_cache=False).logits


def gradients(model: Any) -> dict[str, torch.Tensor]:
    """Of the scales, flat, by layer."""
    model.zero_grad(set_to_none=True)
    logits(model).square().mean().backward()
    return {
        n.removeprefix("base_model.model.")
        .split(".ia3_l")[0]
        .split(".adapter")[0]: p.grad.flatten()
        for n, p in model.named_parameters()
        if p.grad is not None
    }


def at_input(model: Any) -> set[str]:
    adapters: dict[str, Any] = dict(adapters_of(model))
    return {name for name, adapter in adapters.items() if adapter.at_input}


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("llama", {}),
        ("gpt2", {}),  # two layers of the name c_proj, one of them of an MLP
        ("opt", {"targets": ("q_proj", "fc2")}),
        ("llama", {"targets": ("k_proj", "v_proj"), "layers": "1"}),
        ("qwen2", {"feedforward": ("up_proj", "0.self_attn.q_proj")}),
    ],
)
def test_peft_loads_ours(
    tiny_model: Any, tmp_path: Path, family: str, changes: dict[str, Any]
) -> None:
    model = tiny_model(family)
    attach(model, options(**changes), seed=1)
    fill(model)
    save_adapter(model, tmp_path, options(**changes), "base", None)
    theirs = peft.PeftModel.from_pretrained(tiny_model(family), tmp_path, is_trainable=True)
    assert error(logits(theirs), logits(model)) < CLOSE
    ours, wanted = gradients(model), gradients(theirs)
    assert ours.keys() == wanted.keys()
    assert all(error(ours[n], wanted[n]) < CLOSE for n in ours)
    (tmp_path / FACTS).unlink()
    again = tiny_model(family)
    load_adapter(again, tmp_path)
    assert at_input(again) == at_input(model) and torch.equal(logits(again), logits(model))
    merged = theirs.merge_and_unload()
    fold_into(model)
    assert error(logits(merged), logits(model)) < CLOSE


@pytest.mark.parametrize(
    ("family", "fields"),
    [
        ("llama", {}),  # PEFT's own choice of targets
        ("gpt2", {}),
        ("gpt2", {"target_modules": ["c_attn", "c_proj"], "feedforward_modules": ["c_proj"]}),
        ("opt", {"target_modules": "all-linear", "feedforward_modules": r".*layers\.1\.fc\d"}),
        ("llama", {"target_modules": ["q_proj", "o_proj"], "feedforward_modules": []}),
    ],
)
def test_we_load_peft_s(
    tiny_model: Any, tmp_path: Path, family: str, fields: dict[str, Any]
) -> None:
    torch.manual_seed(0)
    config = peft.IA3Config(**fields, task_type="CAUSAL_LM")
    theirs = peft.get_peft_model(tiny_model(family), config).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            if parameter.requires_grad:
                parameter.copy_(1 + 0.2 * torch.randn_like(parameter))
    theirs.save_pretrained(str(tmp_path / "theirs"))
    wanted = logits(theirs)
    model = tiny_model(family)
    loaded = load_adapter(model, tmp_path / "theirs", trainable=True)
    assert not loaded.remarks
    assert error(logits(model), wanted) < CLOSE
    save_adapter(model, tmp_path / "ours", loaded.config, "base", None)
    again = tiny_model(family)
    load_adapter(again, tmp_path / "ours")
    assert torch.equal(logits(again), logits(model))
    fold_into(model)
    assert error(logits(model), wanted) < CLOSE


def test_second_layers_of_mlps_are_scaled_at_their_input(tiny_model: Any) -> None:
    ends = {"llama": "down_proj", "gpt2": "mlp.c_proj", "opt": "fc2", "bloom": "dense_4h_to_h"}
    for family, end in ends.items():
        model = tiny_model(family)
        attach(model, options(), seed=1)
        found = at_input(model)
        assert len(found) == 2 and all(name.endswith(end) for name in found)


@pytest.mark.parametrize("kind", [nn.Linear, Conv1D])
@pytest.mark.parametrize("side", ["layer", "down_proj"])
def test_half_precision_has_float32_s_gradients(kind: Any, side: str) -> None:
    """The two products of the forward and the one of the backward, against plain autograd."""
    torch.manual_seed(0)
    layer = (kind(48, 96) if kind is nn.Linear else kind(96, 48)).bfloat16()
    nn.init.normal_(layer.bias)
    x, grad = torch.randn(2, 9, 48).bfloat16(), torch.randn(2, 9, 96).bfloat16()
    results = []
    for dtype in (torch.bfloat16, torch.float32):
        model = nn.ModuleDict({side: layer}).to(dtype)
        adapter: Any = attach(model, options(), seed=1)[side]
        assert adapter.at_input == (side == "down_proj")
        fill(model, size=0.3)
        inputs = x.detach().to(dtype).requires_grad_()
        y = layer(inputs)
        y.backward(grad.to(dtype))
        results.append((y.detach(), inputs.grad, adapter.scale.grad))
        assert adapter.scale.grad.dtype == torch.float32
        detach(model)
    for ours, wanted in zip(*results, strict=True):
        assert error(ours, wanted) < 2**-8  # two roundings of 2^-9


@pytest.mark.parametrize("side", ["layer", "down_proj"])
def test_both_sides_have_right_gradients_and_pieces(side: str) -> None:
    """Finite differences; and each rank's part of layer and scale gives its part of the output."""
    layer = nn.Linear(6, 4, bias=False).double()
    model = nn.ModuleDict({side: layer})
    adapter: Any = attach(model, options(), seed=1)[side]
    fill(model)
    x = torch.randn(3, 6, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda *_: layer(x), (x, adapter.scale))
    for style, axis in (("colwise", 0), ("rowwise", 1)):
        outputs = []
        for rank in range(2):
            weight = layer.weight.chunk(2, axis)[rank]
            part = nn.Linear(*weight.T.shape, bias=False).double()
            part.weight = nn.Parameter(weight.detach())
            piece: Any = attach(nn.ModuleDict({side: part}), options(), seed=1)[side]
            for name, parameter in adapter.named_parameters():
                cut = adapter.follows[style].get(name)
                value = parameter if cut is None else parameter.chunk(2, cut)[rank]
                setattr(piece, name, nn.Parameter(value.detach()))
            outputs.append(part(x if style == "colwise" else x.chunk(2, 1)[rank]))
        joined = torch.cat(outputs, 1) if style == "colwise" else outputs[0] + outputs[1]
        torch.testing.assert_close(joined, layer(x))


def test_a_layer_of_an_unknown_kind_is_scaled_by_hooks(random_batch: Any, tiny_model: Any) -> None:
    class Own(nn.Linear):
        def forward(self, input: torch.Tensor) -> torch.Tensor:
            return 2 * super().forward(input)

    for name in ("layer", "down_proj"):
        layer, x = Own(6, 4), torch.randn(3, 6)
        model = nn.ModuleDict({name: layer})
        before = layer(x)
        adapter: Any = attach(model, options(), seed=1)[name]
        assert torch.equal(layer(x), before)
        fill(model)
        wanted = (
            2 * (layer.weight @ (x * adapter.scale).T).T + 2 * layer.bias
            if adapter.at_input
            else before * adapter.scale
        )
        torch.testing.assert_close(layer(x), wanted)
        detach(model)
        assert torch.equal(layer(x), before)


def test_targets_near_one_act_in_a_model(tiny_model: Any, random_batch: Any) -> None:
    """A change of every scale by a quarter of a rounding step is seen, and about as large as in float32."""
    batch = random_batch()
    changes = []
    for dtype in (torch.bfloat16, torch.float32):
        model = tiny_model("llama", torch.bfloat16).to(dtype)
        adapters: dict[str, Any] = dict(attach(model, options(), seed=1))
        before = run(model, batch)
        with torch.no_grad():
            for adapter in adapters.values():
                adapter.scale.add_(2**-11)
        changes.append((run(model, batch) - before).float().norm())
    assert changes[0] > changes[1] / 2


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rank": 4}, "adapter.rank=4"),
        ({"dropout": 0.1}, "adapter.dropout"),
        ({"feedforward": ("down_prj",)}, "did you mean 'down_proj'"),
        ({"targets": "q_proj", "feedforward": ("down_proj",)}, "they are q_proj"),
    ],
)
def test_refused(tiny_model: Any, changes: dict[str, Any], message: str) -> None:
    model = tiny_model("llama")
    with pytest.raises(Refused, match=message):
        attach(model, options(**changes), seed=1)
    assert not adapters_of(model)


def test_bad_peft_options_are_refused(tiny_model: Any, tmp_path: Path) -> None:
    model = tiny_model("llama")
    attach(model, options(), seed=1)
    save_adapter(model, tmp_path, options(), "base", None)
    path = tmp_path / CONFIG
    fields = json.loads(path.read_text("utf-8"))
    for wrong, message in (("*", "feedforward_modules"), ([], "its shape is 1x96, 64x1 would fit")):
        path.write_text(json.dumps({**fields, "feedforward_modules": wrong}), "utf-8")
        with pytest.raises(Refused, match=message):
            load_adapter(tiny_model("llama"), tmp_path)
    path.write_text(json.dumps({**fields, "shiny": 1}), "utf-8")
    assert "shiny=1" in " ".join(load_adapter(tiny_model("llama"), tmp_path).remarks)
