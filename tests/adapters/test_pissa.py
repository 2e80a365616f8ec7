"""PiSSA: the start by a decomposition, its gradients, the folder that a plain reload and PEFT understand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from adapter_table import error, fill, keep_state, options, run, take_state
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from luthier.adapters import adapter_parameters, adapters_of, attach, load_adapter, save_adapter
from luthier.adapters.facts import CONFIG, FACTS
from luthier.adapters.lora import MAGNITUDE
from luthier.adapters.store import WEIGHTS
from luthier.seeding import generator

pytestmark = [  # PEFT's own
    pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to False:UserWarning"),
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
]


def logits(model: Any) -> Tensor:
    return model(input_ids=torch.arange(3, 19)[None], use_cache=False).logits


def decaying(
    num_out: int, num_in: int, power: float = 0.3
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """A float64 matrix with singular values 1, 2^-power, 3^-power, ...: (weight, U, S, V^T)."""
    draw, size = generator(0, "matrix"), min(num_out, num_in)
    left, _ = torch.linalg.qr(torch.randn(num_out, size, generator=draw, dtype=torch.float64))
    right, _ = torch.linalg.qr(torch.randn(num_in, size, generator=draw, dtype=torch.float64))
    values = torch.arange(1, size + 1, dtype=torch.float64) ** -power
    return (left * values) @ right.t(), left, values, right.t()


def factors(weight: Tensor, rank: int, alpha: float, seed: int = 1) -> tuple[Tensor, Tensor]:
    """A and B of a layer with this weight, at first."""
    model: Any = nn.ModuleDict({"layer": nn.Linear(*weight.t().shape, bias=False)})
    model["layer"].weight = nn.Parameter(weight)
    (adapter,) = attach(model, options("pissa", rank=rank, alpha=alpha), seed=seed).values()
    return adapter.get_parameter("lora_A").detach(), adapter.get_parameter("lora_B").detach()


@pytest.mark.parametrize("shape", [(48, 64), (64, 48), (3, 40)])
def test_the_principal_part(shape: tuple[int, int]) -> None:
    weight, left, values, right = decaying(*shape)
    A, B = factors(weight, 3, 6.0)
    principal = (left[:, :3] * values[:3]) @ right[:3]
    assert error(2 * B @ A, principal) < 1e-13
    assert torch.allclose(A.norm(dim=1), (values[:3] / 2).sqrt())  # split evenly
    assert torch.allclose(B.norm(dim=0), (values[:3] / 2).sqrt())
    # the sign is the matrix's, not the draw's
    assert torch.equal(factors(weight, 3, 6.0, seed=2)[0], A)


@pytest.mark.parametrize("rank", [8, 64])
def test_a_large_matrix_at_random(rank: int) -> None:
    """Slowly falling singular values, as those of trained weights: nearly all of the part is caught."""
    weight, left, values, right = decaying(620, 680)
    A, B = factors(weight.float(), rank, rank / 2)
    assert A.dtype == torch.float32 and torch.equal(factors(weight.float(), rank, rank / 2)[0], A)
    residual = weight - 0.5 * (B @ A).double()
    best = weight - (left[:, :rank] * values[:rank]) @ right[:rank]
    assert 1 - 1e-6 < float(residual.norm() / best.norm()) < 1 + 1e-4
    # of the space all but the directions next to the cut, whose values hardly differ from the dropped ones
    cosines = torch.linalg.svdvals(right[:rank] @ torch.linalg.qr(A.double().t())[0])
    assert cosines.median() > 1 - 1e-5 and cosines.min() > 0.9


def test_the_base_stays_and_gradients_are_the_split_s() -> None:
    """As on a residual base with a plain LoRA, which is what the paper trains."""
    for layer in (nn.Linear(12, 16).double(), Conv1D(16, 12).double()):
        kept = layer.weight.detach().clone()
        model = nn.ModuleDict({"layer": layer})
        adapter: Any = attach(model, options("pissa"), seed=1)["layer"]
        x = torch.randn(5, 12, dtype=torch.float64)
        fill(model)
        gradient = torch.randn(5, 16, dtype=torch.float64)
        layer(x).backward(gradient)
        assert torch.equal(layer.weight, kept)
        A, B = (p.detach().clone().requires_grad_() for p in (adapter.lora_A, adapter.lora_B))
        weight = kept.t() if isinstance(layer, Conv1D) else kept
        residual = weight - adapter.scale * adapter.first_B @ adapter.first_A
        y = x @ (residual + adapter.scale * B @ A).t() + layer.bias
        y.backward(gradient)
        assert error(layer(x), y) < 1e-14
        assert error(adapter.lora_A.grad, A.grad) < 1e-14
        assert error(adapter.lora_B.grad, B.grad) < 1e-14


@pytest.mark.parametrize("changes", [{}, {"rslora": True, "lora_plus": 4}, {"dora": True}], ids=str)
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_the_folder(tiny_model: Any, tmp_path: Path, family: str, changes: dict[str, Any]) -> None:
    """A plain LoRA of twice the rank for the original base; with our own facts PiSSA again."""
    names = {"c_attn": 3} if family == "gpt2" else {"q_proj": 3}
    config = options("pissa", rank_pattern=names, alpha_pattern=dict.fromkeys(names, 5), **changes)
    model = tiny_model(family)
    attach(model, config, seed=1)
    fill(model)
    wanted = logits(model)
    save_adapter(model, tmp_path, config, "base", None)
    fields = json.loads((tmp_path / CONFIG).read_text("utf-8"))
    assert fields["r"] == 8 and fields["init_lora_weights"] is True
    assert set(fields["rank_pattern"].values()) == {6}
    tensors = load_file(tmp_path / WEIGHTS)
    assert {t.shape[0] for n, t in tensors.items() if "lora_A" in n} == {6, 8}
    theirs = peft.PeftModel.from_pretrained(tiny_model(family), tmp_path)
    assert error(logits(theirs), wanted) < 1e-5
    # trained on as PiSSA
    ours = tiny_model(family)
    loaded = load_adapter(ours, tmp_path, trainable=True)
    assert loaded.config.pissa and torch.equal(logits(ours), wanted)
    for name, parameter in adapter_parameters(model).items():
        assert torch.equal(parameter, ours.get_parameter(name)), name
    # without our facts: the same function, as a plain LoRA
    (tmp_path / FACTS).unlink()
    plain = tiny_model(family)
    config = load_adapter(plain, tmp_path).config
    assert not config.pissa and config.rank == 8 and config.rslora == changes.get("rslora", False)
    assert config.dora == changes.get("dora", False)
    assert error(logits(plain), wanted) < 1e-5


def test_resuming_takes_the_first_factors_along(
    tiny_model: Any, random_batch: Any, tmp_path: Path
) -> None:
    model, batch = tiny_model("llama"), random_batch()
    attach(model, options("pissa"), seed=1)
    fill(model)
    wanted = run(model, batch)
    keep_state(model, tmp_path)
    other = tiny_model("llama")
    with torch.no_grad():
        for adapter in attach(other, options("pissa"), seed=1).values():
            for buffer in adapter.buffers():
                buffer.zero_()
    take_state(other, tmp_path)
    assert torch.equal(run(other, batch), wanted)


def test_small_differences_survive_half_precision() -> None:
    """The factors are large and their changes small: taken together they would round away."""
    torch.manual_seed(0)
    layer = nn.Linear(64, 96, bias=False)
    nn.init.normal_(layer.weight)
    model: Any = nn.ModuleDict({"layer": layer.bfloat16()})
    (adapter,) = attach(model, options("pissa"), seed=1).values()
    fill(model, size=1e-4)
    x = torch.eye(64).bfloat16()
    assert error(adapter.delta(x).t(), adapter.update()) < 1e-2  # type: ignore[attr-defined]


def test_dropout_is_refused() -> None:
    with pytest.raises(ValueError, match="must not be dropped"):
        options("pissa", dropout=0.1)


def test_tensor_parallel_pieces_cut_the_first_factors_too() -> None:
    whole: Any = nn.ModuleDict({"layer": nn.Linear(8, 6, bias=False).double()})
    (adapter,) = attach(whole, options("pissa"), seed=1).values()
    fill(whole)
    x = torch.randn(3, 8, dtype=torch.float64)
    for style, axis in (("colwise", 0), ("rowwise", 1)):
        outputs = []
        for rank in range(2):
            weight = whole["layer"].weight.detach().chunk(2, axis)[rank]
            part: Any = nn.ModuleDict({"layer": nn.Linear(*weight.T.shape, bias=False).double()})
            (piece,) = attach(part, options("pissa", rank=3, alpha=4.5), seed=1).values()
            for name, value in [*adapter.named_parameters(), *adapter.named_buffers()]:
                cut = adapter.follows[style].get(name)
                piece_of = value.detach() if cut is None else value.detach().chunk(2, cut)[rank]
                kind = nn.Parameter if name in dict(adapter.named_parameters()) else Tensor.clone
                setattr(piece, name, kind(piece_of))
            part["layer"].weight = nn.Parameter(weight)
            outputs.append(part["layer"](x if style == "colwise" else x.chunk(2, 1)[rank]))
        joined = torch.cat(outputs, 1) if style == "colwise" else outputs[0] + outputs[1]
        torch.testing.assert_close(joined, whole["layer"](x))


def test_a_magnitude_beside_it_starts_at_the_base_s_norm(
    tiny_model: Any, random_batch: Any
) -> None:
    model, batch = tiny_model("qwen2"), random_batch()
    before = run(model, batch)
    attach(model, options("pissa", dora=True, rslora=True), seed=1)
    assert torch.equal(run(model, batch), before)
    for name, adapter in adapters_of(model).items():
        weight = model.get_submodule(name).weight
        torch.testing.assert_close(adapter.get_parameter(MAGNITUDE), weight.norm(dim=1))
