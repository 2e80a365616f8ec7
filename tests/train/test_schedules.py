"""Learning-rate schedules: PaddleNLP's (transformers' own are the reference), shares, ends, refusals."""

from __future__ import annotations

from typing import Any, get_args

import pytest
import torch
from transformers import get_scheduler

from luthier.config import SCHEDULES, OptimConfig
from luthier.errors import Refused
from luthier.train.schedules import make_schedule, warmup_steps

NEEDED: dict[str, dict[str, Any]] = {
    "wsd": {"decay_start": 0.5},
    "anneal": {"period": 7},
    "anneal_restarts": {"period": 7},
}


@pytest.mark.parametrize("warmup", [0, 3])
@pytest.mark.parametrize(
    ("ours", "theirs", "options"),
    [
        ({"schedule": "linear"}, "linear", {}),
        ({"schedule": "cosine"}, "cosine", {}),
        ({"schedule": "cosine", "cycles": 1.5}, "cosine", {"num_cycles": 1.5}),
        ({"schedule": "cosine_restarts", "cycles": 3}, "cosine_with_restarts", {"num_cycles": 3}),
        ({"schedule": "constant"}, "constant_with_warmup", {}),
        (
            {"schedule": "polynomial", "power": 2, "lr_end": 1e-5},
            "polynomial",
            {"power": 2, "lr_end": 1e-5},
        ),
        ({"schedule": "polynomial"}, "polynomial", {}),
    ],
)
def test_equals_transformers(
    ours: dict[str, Any], theirs: str, options: dict[str, Any], warmup: int
) -> None:
    lr, total = 1e-3, 20
    schedule = make_schedule(OptimConfig(warmup=warmup, **ours), lr, total)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr)
    training = {} if theirs == "constant_with_warmup" else {"num_training_steps": total}
    reference = get_scheduler(
        theirs, optimizer, warmup, scheduler_specific_kwargs=options, **training
    )
    for step in range(total + 1):
        # both in float64, the operations in another order
        assert schedule(step) == pytest.approx(reference.get_last_lr()[0], rel=1e-12, abs=1e-18)
        optimizer.step()
        reference.step()


@pytest.mark.parametrize("name", get_args(SCHEDULES))
def test_stays_between_its_ends(name: str) -> None:
    config = OptimConfig(
        schedule=name, lr=1e-3, lr_end=None if name == "constant" else 1e-5, **NEEDED.get(name, {})
    )  # pyright: ignore[reportArgumentType]
    schedule = make_schedule(config, 1e-3, 20)
    rates = [schedule(step) for step in range(60)]
    assert max(rates) == rates[0] == pytest.approx(1e-3)
    assert min(rates) >= 1e-5 * (1 - 1e-12)
    if name in ("linear", "cosine", "cosine_restarts", "polynomial", "wsd", "cooldown"):
        assert rates[20] == rates[59] == pytest.approx(1e-5)
        assert rates[19] > rates[20]


def test_odd_power_never_goes_negative_after_decay_steps() -> None:
    config = OptimConfig(schedule="polynomial", decay_steps=5)
    assert make_schedule(config, 1e-3, 20)(12) == 1e-7


def test_warmup_share_is_rounded_up_and_starts_where_asked() -> None:
    config = OptimConfig(schedule="constant", warmup=0.21, warmup_start=1e-4)
    assert warmup_steps(config, 10) == 3
    schedule = make_schedule(config, 1e-3, 10)
    assert [schedule(t) for t in range(5)] == pytest.approx([1e-4, 4e-4, 7e-4, 1e-3, 1e-3])


def test_cooldown_fills_the_run_by_default() -> None:
    config = OptimConfig(
        schedule="cooldown", warmup=2, keep_steps=4, final_steps=3, lr_end=1e-4, lr_final=1e-5
    )
    schedule = make_schedule(config, 1e-3, 20)
    assert [schedule(t) for t in (2, 6)] == [1e-3, 1e-3]  # kept, and the first step of the fall
    assert 1e-4 < schedule(16) < schedule(7) < 1e-3  # falls from step 6 to 17
    assert [schedule(t) for t in (17, 19, 20)] == [1e-4, 1e-4, 1e-5]


def test_refuses_an_end_above_the_peak_and_a_decay_that_never_comes() -> None:
    with pytest.raises(Refused, match="lr_end"):
        make_schedule(OptimConfig(schedule="linear", lr_end=1e-3), 1e-4, 10)
    with pytest.raises(Refused, match="decay_start"):
        make_schedule(OptimConfig(schedule="wsd", decay_start=10), 1e-4, 10)
