"""Master copies of half-precision weights, and the loss scale of float16."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from torch.nn import Parameter

from luthier.config import OptimConfig
from luthier.errors import Failed, Refused
from luthier.train.master import LossScaler, MasterWeights
from luthier.train.optim import clip_gradients, make_optimizer


def named(dtype: torch.dtype) -> list[tuple[str, Parameter]]:
    return [
        ("half.weight", Parameter(torch.ones(3, 2, dtype=dtype))),
        ("full.weight", Parameter(torch.ones(2, 2))),
    ]


@pytest.mark.parametrize(("kind", "moved"), [("float32", True), ("none", False)])
def test_small_updates_survive_only_in_a_master(kind: str, moved: bool) -> None:
    """300 steps of 1e-4 at 1.0, where neighbouring bfloat16 numbers are 0.004 or more apart."""
    model = named(torch.bfloat16)
    masters = MasterWeights(model, kind)  # pyright: ignore[reportArgumentType]
    optimizer = make_optimizer(masters.named, OptimConfig(name="sgd", betas=(0, 0)), 1e-4)
    for _ in range(300):
        model[0][1].grad = torch.ones(3, 2, dtype=torch.bfloat16)
        masters.collect()
        optimizer.step()
        masters.write_back()
        masters.zero_grad()
    wanted = torch.tensor(1 - 300e-4 if moved else 1.0).bfloat16()
    assert torch.equal(model[0][1].detach(), wanted.expand(3, 2))


def test_float32_weights_are_their_own_master() -> None:
    model = named(torch.bfloat16)
    masters = MasterWeights(model, "float32")
    assert masters.named[1][1] is model[1][1]
    assert masters.named[0][1].dtype == torch.float32
    assert list(masters.tensors()) == ["half.weight"]
    assert MasterWeights(model, "none").named == model
    assert not MasterWeights(model, "none").tensors()


def test_gradients_are_gathered_in_float32_and_leave_the_model() -> None:
    model = named(torch.bfloat16)
    masters = MasterWeights(model, "float32")
    for value in (256.0, *[0.5] * 64):  # in bfloat16, 256 + 0.5 = 256
        model[0][1].grad = torch.full((3, 2), value, dtype=torch.bfloat16)
        masters.collect()
        assert model[0][1].grad is None
    gradient = masters.gradients()["half.weight"]
    assert gradient is not None and torch.equal(gradient, torch.full((3, 2), 288.0))
    assert masters.gradients()["full.weight"] is None
    masters.zero_grad()
    assert masters.gradients()["half.weight"] is None


def test_float16_needs_masters() -> None:
    with pytest.raises(Refused, match=r"half\.weight is float16"):
        MasterWeights(named(torch.float16), "none")


def test_scale_shrinks_on_overflow_and_grows_after_good_steps() -> None:
    scaler = LossScaler(True, growth_interval=3)
    assert scaler.scale == 2.0**15
    assert not scaler.update(False)
    assert scaler.scale == 2.0**14
    assert [scaler.update(True) for _ in range(2)] == [True, True]
    again = LossScaler(True, growth_interval=3)
    again.load_state(scaler.state())
    for one in (scaler, again):
        assert one.scale == 2.0**14
        assert one.update(True)
        assert one.scale == 2.0**15


def test_scale_gives_up_when_nothing_helps() -> None:
    scaler = LossScaler(True)
    with pytest.raises(Failed, match="every loss scale"):
        for _ in range(20):
            scaler.update(False)


def test_other_types_are_not_scaled() -> None:
    scaler = LossScaler(False)
    assert scaler.scale == 1.0 and scaler.update(True) and scaler.update(False)
    assert scaler.scale == 1.0


def test_scaling_saves_gradients_that_float16_cannot_hold() -> None:
    """A gradient of 1e-8 is 0 in float16; scaled by 2**15, it arrives, and an overflow is skipped."""

    def gradient(scaler: LossScaler, factor: float) -> float:
        model = nn.Linear(1, 1, bias=False).half()
        masters = MasterWeights(list(model.named_parameters()), "float32")
        loss = (model(torch.ones(1, 1, dtype=torch.float16)).float() * factor).sum()
        (loss * scaler.scale).backward()
        masters.collect()
        scaler.unscale(masters.parameters)
        return clip_gradients(masters.parameters, 0)

    assert gradient(LossScaler(False), 1e-8) == 0.0
    assert gradient(LossScaler(True), 1e-8) == pytest.approx(1e-8, rel=2**-10)
    assert math.isinf(gradient(LossScaler(True), 1e3))
