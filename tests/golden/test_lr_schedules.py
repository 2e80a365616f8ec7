"""Learning rates of every case of MindFormers' schedules, steps 0 to 23."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

import pytest

from luthier.config import OptimConfig
from luthier.train.schedules import make_schedule, warmup_steps

DATA = Path(os.environ.get("LUTHIER_GOLDEN") or Path(__file__).parent / "data")
FILES = sorted(DATA.glob("mindformers/lr_schedules*.json"))
CASES = {
    f"{path.stem}/{name}": case
    for path in FILES
    for name, case in json.loads(path.read_text("utf-8")).items()
}

NAMES = {
    "ConstantWarmUpLR": "constant",
    "LinearWithWarmUpLR": "linear",
    "CosineWithWarmUpLR": "cosine",
    "CosineWithRestartsAndWarmUpLR": "cosine_restarts",
    "PolynomialWithWarmUpLR": "polynomial",
    "ConstantWithCoolDownLR": "cooldown",
    "WarmUpStableDecayLR": "wsd",
    "CosineAnnealingLR": "anneal",
    "CosineAnnealingWarmRestarts": "anneal_restarts",
}
KEYS = {  # theirs -> ours, where the value is the same
    "warmup_steps": "warmup",
    "warmup_lr_init": "warmup_start",
    "lr_end": "lr_end",
    "lr_end1": "lr_end",
    "eta_min": "lr_end",
    "lr_end2": "lr_final",
    "num_cycles": "cycles",
    "power": "power",
    "decay_steps": "decay_steps",
    "decay_start_steps": "decay_start",
    "keep_steps": "keep_steps",
    "final_steps": "final_steps",
    "t_max": "period",
    "t_0": "period",
    "t_mult": "period_factor",
}


def translate(theirs: dict[str, Any]) -> tuple[OptimConfig, float, int]:
    """MindFormers' arguments -> our config, peak rate and total steps.

    Shares of the run become whole steps rounded down, as MindFormers does; ours round up, so a share is
    kept as such only where both agree. Its cool-down takes all steps of the run unless told otherwise.
    """
    rest = dict(theirs)
    name = NAMES[rest.pop("type")]
    lr = rest.pop("learning_rate", None) or rest.pop("base_lr")
    total = rest.pop("total_steps", None) or 20
    ours: dict[str, Any] = {"schedule": name, "lr": lr}
    for share, key in (("warmup_ratio", "warmup"), ("decay_start_ratio", "decay_start")):
        ratio = rest.pop(share, None)
        if ratio is not None:
            steps = int(ratio * total)
            ours[key] = ratio if math.ceil(ratio * total) == steps else steps
            rest.pop(share.replace("_ratio", "_steps"), None)
    ratio = rest.pop("decay_ratio", None)
    if ratio is not None:
        ours["decay_steps"] = int(ratio * total)
    elif name == "cooldown" and rest.get("decay_steps") is None:
        ours["decay_steps"] = total
    for key, value in rest.items():
        if value is not None:
            ours[KEYS[key]] = value
    return OptimConfig(**ours), lr, total


@pytest.mark.skipif(not CASES, reason="no mindformers/lr_schedules*.json in the golden folder")
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_equals_mindformers(case: dict[str, Any]) -> None:
    config, lr, total = translate(case["config"])
    schedule = make_schedule(config, lr, total)
    expected = next(value for key, value in case.items() if key.startswith("lr_at_step"))
    # Theirs is computed in float32: a few roundings of values up to lr, and of the cosine's angle,
    # which the cosine passes on with a factor of at most lr / 2.
    turns = (config.cycles or 1) if config.period is None else 24 / config.period
    tolerance = lr * 2**-23 * (4 + math.pi * turns)
    for step, value in enumerate(expected):
        if config.schedule in ("wsd", "polynomial") and step >= warmup_steps(config, total):
            # upstream goes on below lr_end, even below zero, past the end; here the rate stays at it
            value = max(value, config.lr_end or 0.0)
        assert schedule(step) == pytest.approx(value, rel=0, abs=tolerance), f"step {step}"


def test_every_kind_is_there() -> None:
    """The committed file has all schedules; another folder may lack some."""
    if "LUTHIER_GOLDEN" in os.environ:
        pytest.skip("another golden folder is tested")
    assert {case["config"]["type"] for case in CASES.values()} == NAMES.keys()
