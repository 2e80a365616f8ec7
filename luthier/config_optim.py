"""The optimiser's part of the configuration, and what all parts have in common.

Schedules are those of both suites; each reads some of the optional keys and refuses the others.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

Positive = Annotated[int, Field(ge=1)]


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


SCHEDULES = Literal[
    "linear",
    "cosine",
    "cosine_restarts",
    "constant",
    "polynomial",
    "cooldown",
    "wsd",
    "anneal",
    "anneal_restarts",
]
# which of the optional schedule keys each schedule reads; a key that would do nothing is refused
SCHEDULE_KEYS: dict[str, frozenset[str]] = {
    "linear": frozenset({"warmup_start", "lr_end", "decay_steps"}),
    "cosine": frozenset({"warmup_start", "lr_end", "decay_steps", "cycles"}),
    "cosine_restarts": frozenset({"warmup_start", "lr_end", "decay_steps", "cycles"}),
    "constant": frozenset({"warmup_start"}),
    "polynomial": frozenset({"warmup_start", "lr_end", "decay_steps", "power"}),
    "cooldown": frozenset(
        {"warmup_start", "lr_end", "decay_steps", "cycles", "keep_steps", "final_steps", "lr_final"}
    ),
    "wsd": frozenset({"warmup_start", "lr_end", "decay_start"}),
    "anneal": frozenset({"lr_end", "period"}),
    "anneal_restarts": frozenset({"lr_end", "period", "period_factor"}),
}


class OptimConfig(Section):
    name: Literal["adamw", "adamw_mini", "sgd", "adafactor"] = Field(
        "adamw", description="Optimiser."
    )
    lr: float | None = Field(
        None,
        gt=0,
        le=100,
        description="Peak learning rate. Default: 5e-5 for full fine-tuning, 3e-4 for adapters.",
    )
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = Field(
        (0.9, 0.999),
        description="Decay of the first and second moment (sgd: the first is the momentum).",
    )
    eps: float = Field(1e-8, gt=0, description="Term added to the denominator.")
    weight_decay: float = Field(
        0.0, ge=0, description="Decoupled weight decay; never on biases and norms."
    )
    clip: float = Field(1.0, ge=0, description="Largest norm of the whole gradient; 0 = off.")
    schedule: SCHEDULES = Field(
        "linear", description="Course of the learning rate after the warm-up."
    )
    warmup: float = Field(
        0, ge=0, description="Warm-up: an integer = steps, below 1 = share of all steps."
    )
    warmup_start: float = Field(
        0.0, ge=0, description="Learning rate at the first step of the warm-up."
    )
    lr_end: float | None = Field(
        None, ge=0, description="Learning rate at the end. Default: 0 (polynomial and wsd: 1e-7)."
    )
    decay_steps: Positive | None = Field(
        None, description="Steps over which the rate falls. Default: all."
    )
    decay_start: float | None = Field(
        None, gt=0, description="wsd: where the decay begins; an integer = step, below 1 = share."
    )
    cycles: float | None = Field(
        None, gt=0, description="Cosine waves. Default: 0.5 (cosine_restarts: 1)."
    )
    power: float = Field(1.0, gt=0, description="polynomial: exponent.")
    keep_steps: Annotated[int, Field(ge=0)] = Field(
        0, description="cooldown: steps at the peak rate."
    )
    final_steps: Annotated[int, Field(ge=0)] = Field(
        0, description="cooldown: steps at lr_end before lr_final."
    )
    lr_final: float | None = Field(
        None, ge=0, description="cooldown: rate after final_steps. Default: lr_end."
    )
    period: Positive | None = Field(
        None, description="anneal, anneal_restarts: steps of the first period."
    )
    period_factor: Positive = Field(
        1, description="anneal_restarts: each period is this much longer."
    )

    @model_validator(mode="after")
    def _optimiser_keys(self) -> OptimConfig:
        for key, name in (("eps", "sgd"), ("betas", "adafactor")):
            if self.name == name and getattr(self, key) != type(self).model_fields[key].default:
                raise ValueError(f"optim.{key} has no meaning for optim.name={name}")
        return self

    @model_validator(mode="after")
    def _schedule_keys(self) -> OptimConfig:
        allowed = SCHEDULE_KEYS[self.schedule]
        for key in sorted(
            frozenset.union(*SCHEDULE_KEYS.values()) & self.model_fields_set - allowed
        ):
            if getattr(self, key) != type(self).model_fields[key].default:
                raise ValueError(f"optim.{key} has no meaning for optim.schedule={self.schedule}")
        if self.warmup and self.schedule in ("anneal", "anneal_restarts"):
            raise ValueError(f"optim.warmup has no meaning for optim.schedule={self.schedule}")
        if self.warmup > 1 and self.warmup != int(self.warmup):
            raise ValueError(
                f"optim.warmup={self.warmup}: give a whole number of steps, or a share below 1"
            )
        if (self.decay_start or 0) > 1 and self.decay_start != int(self.decay_start or 0):
            raise ValueError(
                f"optim.decay_start={self.decay_start}: give a whole step, or a share below 1"
            )
        if self.schedule == "wsd" and self.decay_start is None:
            raise ValueError(
                "optim.schedule=wsd needs optim.decay_start (a step, or a share below 1)"
            )
        if self.schedule.startswith("anneal") and self.period is None:
            raise ValueError(f"optim.schedule={self.schedule} needs optim.period (steps)")
        if self.lr is not None and self.lr_end is not None and self.lr_end > self.lr:
            raise ValueError(f"optim.lr_end={self.lr_end} is above optim.lr={self.lr}")
        return self
