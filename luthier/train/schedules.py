"""Learning-rate schedules: the rate at optimiser step t = 0, 1, ... as a pure function.

The formulas are those of MindFormers' schedules; `linear`, `cosine`, `constant` and `polynomial` are
also PaddleNLP's and transformers' (same numbers where both define them). The warm-up gives
`warmup_start` (default 0) at step 0 in both suites, so a run with a warm-up does nothing in its first step.
A schedule has no state: a resumed run asks for step t again. Applying the rate is `optim.set_lr`.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from luthier.config import OptimConfig
from luthier.errors import Refused


def warmup_steps(config: OptimConfig, total_steps: int) -> int:
    """Whole steps of `optim.warmup`; a share is rounded up, as PaddleNLP and transformers do."""
    return _steps(config.warmup, total_steps)


def make_schedule(config: OptimConfig, lr: float, total_steps: int) -> Callable[[int], float]:
    """The learning rate as a function of the optimiser step, counted from 0.

    `lr` is the peak rate, `total_steps` (T) the length of the run; W is the warm-up. For t < W the rate
    is warmup_start + (lr - warmup_start) t / W, then with e = lr_end and x = (t - W) / (T - W):

    - constant: lr
    - linear: e + (lr - e) max(0, 1 - (t - W) / D), D = decay_steps or T - W
    - polynomial: e + (lr - e) (1 - (t - W) / D)^power up to step T, then e. With decay_steps below T - W
      and an even power this rises again after W + D, as it does in MindFormers
    - cosine: e + (lr - e) (1 + cos(2 pi cycles x)) / 2, and e from step decay_steps (or T) on; decay_steps
      cuts the wave off, it does not set its period (MindFormers)
    - cosine_restarts: the same with cos(pi (cycles x mod 1))
    - cooldown: lr for keep_steps; cosine to e over decay_steps (or all that is left before final_steps);
      e for final_steps; then lr_final
    - wsd: lr up to decay_start, then linearly to e at T
    - anneal: e + (lr - e) (1 + cos(pi t / period)) / 2, for ever
    - anneal_restarts: a half wave per period, each `period_factor` times as long (SGDR)

    Past T every rate but the annealing ones stays where it is, and none falls below e.
    Raises Refused when lr_end or decay_start cannot fit lr and T.
    """
    end = _lr_end(config, lr)
    warmup = warmup_steps(config, total_steps)
    after = _after_warmup(config, lr, end, warmup, total_steps)

    def schedule(step: int) -> float:
        if step < warmup:
            return config.warmup_start + (lr - config.warmup_start) * step / warmup
        return after(step)

    return schedule


def _steps(value: float, total_steps: int) -> int:
    return math.ceil(total_steps * value) if value < 1 else int(value)


def _lr_end(config: OptimConfig, lr: float) -> float:
    if config.lr_end is None:
        return min(1e-7, lr) if config.schedule in ("polynomial", "wsd") else 0.0
    if config.lr_end > lr:
        raise Refused(
            f"optim.lr_end={config.lr_end}", f"the peak rate is {lr}", "give a smaller optim.lr_end"
        )
    return config.lr_end


def _after_warmup(
    config: OptimConfig, lr: float, end: float, warmup: int, total: int
) -> Callable[[int], float]:
    """The rate from step `warmup` on."""
    left = max(1, total - warmup)  # steps after the warm-up
    span = lr - end

    def wave(angle: float) -> float:
        return end + span * max(0.0, 0.5 * (1 + math.cos(angle)))

    match config.schedule:
        case "constant":
            return lambda step: lr
        case "linear":
            fall = config.decay_steps or left
            return lambda step: end + span * max(0.0, 1 - (step - warmup) / fall)
        case "polynomial":
            return lambda step: end + span * _power(config, step - warmup, left)
        case "cosine":
            stop = config.decay_steps or total
            turns = 2 * math.pi * (config.cycles or 0.5)
            return lambda step: end if step >= stop else wave(turns * (step - warmup) / left)
        case "cosine_restarts":
            stop = min(config.decay_steps or total, total)
            cycles = config.cycles or 1.0
            return lambda step: (
                end if step >= stop else wave(math.pi * (cycles * (step - warmup) / left % 1.0))
            )
        case "cooldown":
            return _cooldown(config, lr, end, warmup, left, wave)
        case "wsd":
            start = _steps(config.decay_start or 0.0, total)
            if start >= total:
                raise Refused(
                    f"optim.decay_start={config.decay_start}",
                    f"the run has {total} steps, so the rate would never fall",
                    "give an earlier step, a share below 1, or optim.schedule=constant",
                )
            fall = total - start
            return lambda step: end + span * min(1.0, max(0.0, 1 - (step - start) / fall))
        case "anneal":
            period = config.period or total
            return lambda step: wave(math.pi * step / period)
        case "anneal_restarts":
            return lambda step: wave(math.pi * _phase(step, config.period or total, config))


def _power(config: OptimConfig, step: int, left: int) -> float:
    """(1 - step/D)^power, never negative; 0 past the last step."""
    remaining = 1 - step / (config.decay_steps or left)
    if step > left or (remaining < 0 and config.power % 2 != 0):
        return 0.0
    return remaining**config.power


def _cooldown(
    config: OptimConfig,
    lr: float,
    end: float,
    warmup: int,
    left: int,
    wave: Callable[[float], float],
) -> Callable[[int], float]:
    fall = config.decay_steps or max(1, left - config.keep_steps - config.final_steps)
    final = end if config.lr_final is None else config.lr_final
    turns = 2 * math.pi * (config.cycles or 0.5)

    def rate(step: int) -> float:
        since = step - warmup - config.keep_steps  # steps since the rate began to fall
        if since < 0:
            return lr
        if since < fall:
            return wave(turns * since / fall)
        return end if since < fall + config.final_steps else final

    return rate


def _phase(step: int, period: int, config: OptimConfig) -> float:
    """Share of the current period that is over."""
    while step >= period:
        step, period = step - period, period * config.period_factor
    return step / period
