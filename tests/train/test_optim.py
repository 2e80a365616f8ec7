"""Optimisers: groups, formulas, ratios, clipping, and a state that survives a checkpoint bit for bit."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import Parameter

from luthier.config import OptimConfig
from luthier.errors import Refused
from luthier.seeding import generator
from luthier.train.adamw_mini import AdamWMini
from luthier.train.optim import (
    Named,
    clip_gradients,
    decays,
    load_optimizer_tensors,
    make_optimizer,
    optimizer_tensors,
    set_lr,
)

NAMES = ("adamw", "adamw_mini", "sgd", "adafactor")
SHAPES = {
    "embed_tokens.weight": (7, 6),
    "layers.0.q_proj.weight": (8, 6),
    "layers.0.q_proj.bias": (8,),
    "layers.0.up_proj.weight": (5, 6),
    "norm.weight": (6,),
}


def parameters() -> list[tuple[str, Parameter]]:
    draw = generator(0, "parameters")
    return [(n, Parameter(torch.randn(shape, generator=draw))) for n, shape in SHAPES.items()]


def set_gradients(named: Named, step: int) -> None:
    for name, p in named:
        p.grad = torch.randn(p.shape, generator=generator(step, "gradient", name), dtype=p.dtype)


def config(name: str, **options: Any) -> OptimConfig:
    usual = {"weight_decay": 0.1} | ({} if name == "adafactor" else {"betas": (0.9, 0.99)})
    return OptimConfig(name=name, **{**usual, **options})  # pyright: ignore[reportArgumentType]


def adamw_by_hand(
    p: Tensor, grads: list[Tensor], lr: float, decay: float, spread: Callable[[Tensor], Tensor]
) -> Tensor:
    """AdamW after all `grads` in float64; `spread(g*g)` is what enters the second moment."""
    p = p.detach().double().clone()
    m, v = torch.zeros_like(p), torch.zeros_like(p)
    for t, grad in enumerate((g.double() for g in grads), start=1):
        m = 0.9 * m + 0.1 * grad
        v = 0.99 * v + 0.01 * spread(grad * grad)
        p = p * (1 - lr * decay)
        p = p - lr / (1 - 0.9**t) * m / ((v / (1 - 0.99**t)).sqrt() + 1e-8)
    return p


def by_blocks(rows: int) -> Callable[[Tensor], Tensor]:
    def spread(square: Tensor) -> Tensor:
        blocks = square.reshape(-1, rows * (square.shape[-1] if square.ndim > 1 else 1))
        return blocks.mean(1, keepdim=True).expand_as(blocks).reshape(square.shape)

    return spread


def identity(square: Tensor) -> Tensor:
    return square


# rows of the matrix that share a second moment: heads of 4 in q_proj, else single rows
MINI = {
    "embed_tokens.weight": by_blocks(1),
    "layers.0.q_proj.weight": by_blocks(4),
    "layers.0.q_proj.bias": by_blocks(8),
    "layers.0.up_proj.weight": by_blocks(1),
    "norm.weight": by_blocks(6),
}


@pytest.mark.parametrize("name", ["adamw", "adamw_mini"])
def test_formula(name: str) -> None:
    named = parameters()
    optimizer = make_optimizer(named, config(name), 0.01, head_dim=4)
    before = {n: p.detach().clone() for n, p in named}
    grads: dict[str, list[Tensor]] = {n: [] for n, _ in named}
    for step in range(4):
        set_gradients(named, step)
        for n, p in named:
            assert p.grad is not None
            grads[n].append(p.grad.clone())
        optimizer.step()
    for n, p in named:
        decay = 0.1 if p.ndim > 1 else 0.0
        spread = MINI[n] if name == "adamw_mini" else identity
        wanted = adamw_by_hand(before[n], grads[n], 0.01, decay, spread)
        # four float32 updates of 0.01 on values of about 1
        torch.testing.assert_close(p.detach().double(), wanted, rtol=0, atol=1e-6)


def test_adamw_mini_keeps_one_second_moment_per_block() -> None:
    named = parameters()
    optimizer = make_optimizer(named, config("adamw_mini"), 0.01, head_dim=4)
    set_gradients(named, 0)
    optimizer.step()
    sizes = {n: len(optimizer.state[p]["block_avg_sq"]) for n, p in named}
    assert list(sizes.values()) == [7, 2, 1, 5, 1]
    assert isinstance(optimizer, AdamWMini)


def test_sgd_has_momentum_and_decoupled_decay() -> None:
    p = Parameter(torch.ones(2, 2))
    optimizer = make_optimizer([("w.weight", p)], config("sgd", betas=(0.5, 0.9)), 0.1)
    for _ in range(2):
        p.grad = torch.ones(2, 2)
        optimizer.step()
    # velocity 1, then 1.5; an L2 term would have entered it
    wanted = (1 * 0.99 - 0.1) * 0.99 - 0.15
    torch.testing.assert_close(p.detach(), torch.full((2, 2), wanted))


def test_adafactor_steps_relative_to_the_weights() -> None:
    """alpha = max(1e-3, RMS(p)) min(lr, 1/sqrt t), and the first update of a constant gradient is 1."""
    p = Parameter(torch.full((3, 4), 2.0))
    optimizer = make_optimizer([("w.weight", p)], config("adafactor", weight_decay=0), 0.01)
    p.grad = torch.ones(3, 4)
    optimizer.step()
    torch.testing.assert_close(p.detach(), torch.full((3, 4), 2 - 2 * 0.01))


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "gemma2", "gpt2", "opt"])
def test_matrices_decay_and_nothing_else(family: str, tiny_model: Any) -> None:
    kept = {n for n, p in tiny_model(family).named_parameters() if not decays(n, p)}
    model = tiny_model(family)
    assert kept == {n for n, p in model.named_parameters() if p.ndim == 1}
    assert any("norm" in n or "ln_" in n for n in kept)


@pytest.mark.parametrize(
    ("name", "shape", "wanted"),
    [
        ("layers.0.self_attn.q_norm.weight", (4, 16), False),  # one norm per head
        ("router.bias", (4, 16), False),
        ("layers.0.q_proj.adapter.lora_A", (4, 16), True),
    ],
)
def test_decay_of_odd_shapes(name: str, shape: tuple[int, ...], wanted: bool) -> None:
    assert decays(name, torch.zeros(shape)) is wanted


@pytest.mark.parametrize("name", NAMES)
def test_ratios_follow_the_rate(name: str) -> None:
    named = parameters()
    scales = {"layers.0.up_proj.weight": 16.0, "norm.weight": 0.0}
    optimizer = make_optimizer(named, config(name), 0.5, scales)
    set_lr(optimizer, 0.001)
    rates = {p: group["lr"] for group in optimizer.param_groups for p in group["params"]}
    assert {n: rates[p] for n, p in named if n in scales} == {
        "layers.0.up_proj.weight": 0.016,
        "norm.weight": 0.0,
    }
    assert rates[named[0][1]] == 0.001
    before = {n: p.detach().clone() for n, p in named}
    set_gradients(named, 0)
    optimizer.step()
    assert [n for n, p in named if torch.equal(p, before[n])] == ["norm.weight"]


def test_refusals() -> None:
    with pytest.raises(Refused, match="no parameter is trainable"):
        make_optimizer([], config("adamw"), 0.1)
    with pytest.raises(ValueError, match="not trained"):
        make_optimizer(parameters(), config("adamw"), 0.1, {"gone": 2.0})


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_state_survives_bit_for_bit(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    def fresh(order: int = 1) -> tuple[list[tuple[str, Parameter]], torch.optim.Optimizer]:
        named = [(n, Parameter(p.detach().to(dtype))) for n, p in parameters()][::order]
        return named, make_optimizer(named, config(name), 0.01, head_dim=4)

    def run(named: Named, optimizer: torch.optim.Optimizer, steps: range) -> None:
        for step in steps:
            set_gradients(named, step)
            set_lr(optimizer, 0.01 / (step + 1))
            optimizer.step()

    straight, optimizer = fresh()
    run(straight, optimizer, range(3))
    saved = {n: p.detach().clone() for n, p in straight}
    save_file(optimizer_tensors(optimizer, straight), tmp_path / "state.safetensors")
    run(straight, optimizer, range(3, 6))

    resumed, optimizer = fresh(-1)  # the order of parameters is another one
    with torch.no_grad():
        for n, p in resumed:
            p.copy_(saved[n])
    load_optimizer_tensors(optimizer, resumed, load_file(tmp_path / "state.safetensors"))
    run(resumed, optimizer, range(3, 6))
    found = dict(resumed)
    assert all(torch.equal(p, found[n]) for n, p in straight)


def test_a_foreign_state_is_refused_and_nothing_changed() -> None:
    named = parameters()
    adamw = make_optimizer(named, config("adamw"), 0.01)
    set_gradients(named, 0)
    adamw.step()
    tensors = optimizer_tensors(adamw, named)
    assert set(tensors) == {f"{k}/{n}" for k in ("step", "exp_avg", "exp_avg_sq") for n in SHAPES}
    sgd = make_optimizer(named, config("sgd"), 0.01)
    with pytest.raises(Refused, match=r"step/embed_tokens.*which this run has not"):
        load_optimizer_tensors(sgd, named, tensors)
    with pytest.raises(Refused, match="which this run has not"):
        load_optimizer_tensors(adamw, named, {"exp_avg/other.weight": torch.zeros(1)})
    with pytest.raises(Refused, match=r"shape is \(1,\), the parameter's \(7, 6\)"):
        load_optimizer_tensors(adamw, named, {"exp_avg/embed_tokens.weight": torch.zeros(1)})
    assert torch.equal(
        optimizer_tensors(adamw, named)["exp_avg/norm.weight"], tensors["exp_avg/norm.weight"]
    )


def gradients(dtype: torch.dtype = torch.float32) -> list[Parameter]:
    named = [(n, Parameter(p.detach().to(dtype))) for n, p in parameters()]
    set_gradients(named, 0)
    return [p for _, p in named]


def test_clipping() -> None:
    mine, theirs = gradients(), gradients()
    norm = clip_gradients(mine, 0.5)
    assert norm == pytest.approx(float(torch.nn.utils.clip_grad_norm_(theirs, 0.5)), rel=1e-6)
    assert clip_gradients(mine, 0) == pytest.approx(0.5, rel=1e-5)
    for a, b in zip(mine, theirs, strict=True):
        torch.testing.assert_close(a.grad, b.grad)


def test_clipping_leaves_small_and_broken_gradients_alone() -> None:
    for limit in (0, 1e6):
        mine, before = gradients(), gradients()
        clip_gradients(mine, limit)
        assert all(torch.equal(a.grad, b.grad) for a, b in zip(mine, before, strict=True))  # pyright: ignore[reportArgumentType]
    for bad in (math.nan, math.inf):
        mine = gradients()
        assert mine[0].grad is not None and mine[1].grad is not None
        mine[0].grad[0, 0] = bad
        kept = mine[1].grad.clone()
        assert not math.isfinite(clip_gradients(mine, 0.5))
        assert torch.equal(mine[1].grad, kept)
    assert clip_gradients([Parameter(torch.zeros(2))], 1.0) == 0.0


def test_norm_of_half_gradients_is_not_rounded() -> None:
    mine = gradients(torch.bfloat16)
    exact = math.sqrt(
        sum(float(p.grad.double().square().sum()) for p in mine if p.grad is not None)
    )
    assert clip_gradients(mine, 0) == pytest.approx(exact, rel=1e-6)
