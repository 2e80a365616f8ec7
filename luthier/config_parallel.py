"""The part of the configuration that says how a run is laid out over processes."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from luthier.config_optim import Positive, Section

AXES = ("pipeline", "replicate", "shard", "context", "tensor")  # of the mesh, outermost first
Degree = Annotated[int, Field(ge=-1)]


class ParallelConfig(Section):
    replicate: Degree = Field(
        1,
        description="Copies of the model that train on different rows; -1 = as many as processes are left.",
    )
    shard: Degree = Field(
        -1,
        description="Processes that train on different rows and share the training state as `stage` says; "
        "-1 = as many as are left.",
    )
    stage: Annotated[int, Field(ge=1, le=3)] = Field(
        2,
        description="What is cut into `shard` parts: 1 the optimiser's state, 2 also gradients, 3 also the "
        "weights. The result does not depend on it.",
    )
    offload: bool = Field(
        False, description="Keep the parts that are cut in CPU memory; the optimiser runs there."
    )
    tensor: Degree = Field(
        1,
        description="Processes that share each layer's heads and inner numbers; they read the same rows.",
    )
    sequence: bool | Literal["auto"] = Field(
        "auto",
        description="With `tensor`: between the layers a process holds its own tokens of the hidden states, not all "
        "of them. `auto`: where the family and the layout can. The result does not depend on it.",
    )
    context: Degree = Field(
        1, description="Processes that share the tokens of each row; they read the same rows."
    )
    context_method: Literal["auto", "ring", "gather", "heads"] = Field(
        "auto",
        description="How attention crosses `context`: `gather` (or `ring`, the same) brings the keys and "
        "values of all tokens together, `heads` exchanges tokens for heads (Ulysses); `auto` takes `heads` where the "
        "heads of keys and values divide.",
    )
    pipeline: Degree = Field(
        1,
        description="Processes that each have some of the layers, one after the other; they read the same "
        "rows and need as many micro-batches a step, better several times as many.",
    )
    virtual_stages: Positive = Field(
        1,
        description="Stages of each process of the pipeline, not next to each other: shorter idle times, "
        "more messages. With `schedule: interleaved` or `zero_bubble`.",
    )
    schedule: Literal["1f1b", "interleaved", "zero_bubble"] = Field(
        "1f1b",
        description="Order of micro-batches in the pipeline. `1f1b`: one forward, one backward; "
        "`interleaved`: the same with several stages a process; `zero_bubble`: gradients of weights are "
        "taken later than those of hidden states. The result does not depend on it.",
    )

    @field_validator(*AXES)
    @classmethod
    def _not_zero(cls, value: int) -> int:
        if value == 0:
            raise ValueError("a degree is at least 1, or -1 for what is left")
        return value

    @model_validator(mode="after")
    def _one_rest(self) -> ParallelConfig:
        rest = [axis for axis in AXES if getattr(self, axis) == -1]
        if "shard" in rest and len(rest) > 1 and "shard" not in self.model_fields_set:
            object.__setattr__(self, "shard", 1)  # the default gives way to what was asked for
        elif len(rest) > 1:
            raise ValueError(
                f"parallel.{' and parallel.'.join(rest)} are all -1: only one can take what is left"
            )
        return self
