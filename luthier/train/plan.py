"""When a run ends, when something is due, what is better: pure functions of how far a run is."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from statistics import median
from typing import Any, Literal, Protocol

from luthier.batch import Batch

Every = int | Literal["epoch", "end", "never"]
RECENT = 32  # steps that the time left is estimated from


class Data(Protocol):
    """`data.loader.Loader`: endless optimiser steps; `state()` is the position after the last one handed out."""

    @property
    def steps_per_epoch(self) -> int | None: ...
    @property
    def epoch(self) -> int: ...  # how many were handed out completely
    def step_batches(self) -> Iterator[list[Batch]]: ...
    def state(self) -> dict[str, Any]: ...
    def load_state(self, state: dict[str, Any], /) -> None: ...


@dataclass(frozen=True)
class Plan:
    """How long a run lasts and when it does what.

    It ends after `steps` optimiser steps or `tokens` real tokens; at least one is given. `best` is the metric
    of the evaluation that decides which weights are final, `none` for the last ones; `minimise` says
    whether its smallest value is best.
    """

    steps: int | None = None
    tokens: int | None = None
    evaluate_every: Every = "epoch"
    save_every: Every = "epoch"
    log_every: int = 1
    best: str = "none"
    minimise: bool = True

    def __post_init__(self) -> None:
        if self.steps is None and self.tokens is None:
            raise ValueError("a plan needs steps or tokens")

    def over(self, done: int, tokens: int) -> bool:
        """Whether a run of `done` steps and `tokens` real tokens is at its end."""
        return self.progress(done, tokens) >= 1.0

    def progress(self, done: int, tokens: int) -> float:
        """Share of the plan that is done, 0 to 1; below 1 until it is over."""
        shares = [done / self.steps] if self.steps else []
        shares += [tokens / self.tokens] if self.tokens else []
        return min(1.0, max(shares))

    def due(self, every: Every, done: int, *, epoch_ended: bool, over: bool) -> bool:
        """Whether what happens `every` so often happens after step `done`. All but `never` do at the end."""
        if every == "never" or every == "end":
            return over and every == "end"
        return over or (epoch_ended if every == "epoch" else done % every == 0)

    def better(self, new: float, old: float | None) -> bool:
        """Whether a value of `best` beats the best so far; NaN never does, and the first of equals stays."""
        if not math.isfinite(new) or old is None:
            return math.isfinite(new)
        return new < old if self.minimise else new > old


@dataclass
class Pace:
    """Time per step and per token of the recent steps."""

    recent: deque[tuple[float, int]] = field(default_factory=lambda: deque(maxlen=RECENT))

    def add(self, seconds: float, tokens: int) -> None:
        self.recent.append((seconds, tokens))

    def seconds(self) -> float:
        """The median step's."""
        return median(s for s, _ in self.recent)

    def seconds_left(self, plan: Plan, done: int, tokens: int) -> float | None:
        """Seconds to the end; None before the first step. Evaluations and saving are not foreseen."""
        seconds = sum(s for s, _ in self.recent)
        read = sum(t for _, t in self.recent)
        left = []
        if plan.steps is not None and self.recent:
            left.append((plan.steps - done) * seconds / len(self.recent))
        if plan.tokens is not None and read:
            left.append((plan.tokens - tokens) * seconds / read)
        return max(0.0, min(left)) if left else None


@dataclass(frozen=True)
class FitResult:
    """What a run came to. The model now has the weights of `final_step`, whose metrics are `evaluation`."""

    step: int
    epoch: float
    num_tokens: int  # real tokens
    seconds: float  # in training steps, over all parts of an interrupted run
    loss: float | None  # of the last step
    final_step: int
    evaluation: dict[str, float] | None
    peak_memory: int | None  # bytes
    remarks: tuple[str, ...]
