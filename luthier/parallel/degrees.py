"""`parallel.*` of the config and a number of processes -> the sizes of the mesh, or a refusal.

Pure arithmetic, done before any work; the mesh itself is made by `world.py`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

from luthier.config import RunConfig
from luthier.config_parallel import ParallelConfig
from luthier.errors import Refused

ABSENT = {
    "pipeline": "pipeline parallelism",
}

WHOLE = ("adamw_mini", "adafactor")  # optimisers that need all rows of a tensor in one place


def mesh_sizes(parallel: ParallelConfig, processes: int) -> dict[str, int]:
    """Size of each axis, outermost first (`AXES`); their product is `processes`. Refused if it cannot be."""
    sizes = {
        "pipeline": parallel.pipeline,
        "replicate": parallel.replicate,
        "shard": parallel.shard,
        "context": parallel.context,
        "tensor": parallel.tensor,
    }
    for axis, words in ABSENT.items():
        if sizes[axis] != 1:
            raise Refused(
                f"parallel.{axis}={sizes[axis]}",
                f"{words} is not there in this version of Luthier",
                "use parallel.shard (with parallel.stage=3 for models that do not fit) or parallel.replicate",
            )
    beside = {  # says how an absent axis works
        "virtual_stages": (parallel.virtual_stages, "pipeline"),
        "schedule": (parallel.schedule, "pipeline"),
    }
    for key, (value, axis) in beside.items():
        if value != type(parallel).model_fields[key].default:
            raise Refused(
                f"parallel.{key}={value}",
                f"it says how {ABSENT[axis]} works, which is not there in this version of Luthier",
                "leave it out",
            )
    if sizes["tensor"] != 1 and parallel.sequence and "sequence" in parallel.model_fields_set:
        raise Refused(
            "parallel.sequence=true",
            "sequence parallelism is not there in this version of Luthier",
            "leave it out: parallel.tensor works without it",
        )
    if sizes["context"] == 1 and parallel.context_method != "auto":
        raise Refused(
            f"parallel.context_method={parallel.context_method}",
            "it says how attention crosses context ranks, and parallel.context is 1",
            "give parallel.context=2 or more, or leave it out",
        )
    fixed = math.prod(size for size in sizes.values() if size != -1)
    rest = [axis for axis, size in sizes.items() if size == -1]
    given = ", ".join(f"parallel.{a}={s}" for a, s in sizes.items() if s not in (-1, 1))
    if processes % fixed or (not rest and fixed != processes):
        more = "" if processes > 1 else f": add --nproc {fixed}"
        raise Refused(
            f"{given} was asked for",
            f"that makes {fixed} processes{' or a multiple' if rest else ''}, and {processes} "
            f"{'was' if processes == 1 else 'were'} started",
            f"start as many as the degrees multiply to{more}",
        )
    for axis in rest:
        sizes[axis] = processes // fixed
    if sizes["shard"] == 1 and parallel.offload:
        raise Refused(
            "parallel.offload=true",
            "it keeps in CPU memory what parallel.shard cuts, and parallel.shard is 1",
            "start more processes, or leave it out",
        )
    return sizes


def check_sharding(config: RunConfig, sizes: Mapping[str, int]) -> None:
    """Refuse what cannot be cut over several shards or tensor ranks."""
    for axis in ("shard", "tensor"):
        if sizes[axis] > 1 and config.optim.name in WHOLE:
            raise Refused(
                f"optim.name={config.optim.name} with parallel.{axis}={sizes[axis]}",
                "its moments are shared by rows of a tensor that would lie on different ranks",
                f"use optim.name=adamw, or parallel.replicate in place of parallel.{axis}",
            )
    for axis in ("tensor", "context"):
        if sizes[axis] > 1 and config.train.compile:
            raise Refused(
                f"train.compile=true with parallel.{axis}={sizes[axis]}",
                "layers that exchange something with other ranks are not compiled in this version",
                "leave train.compile out",
            )


def fit_batch(config: RunConfig, data_ranks: int) -> RunConfig:
    """The config with `train.batch` and `train.micro_batch` filled in for this number of data ranks.

    `train.accumulation` counts per rank: batch = micro_batch x accumulation x data ranks. Refused for a
    batch that cannot be cut into equal micro-batches on all ranks.
    """
    train = config.train
    if train.accumulation is not None:
        micro = train.micro_batch or 1
        changes = {"batch": micro * train.accumulation * data_ranks, "accumulation": None}
    else:
        micro = train.micro_batch or max(1, train.batch // data_ranks)
        changes = {"batch": train.batch, "micro_batch": micro}
        if train.batch % (micro * data_ranks):
            step = data_ranks * (train.micro_batch or 1)
            near = max(step, round(train.batch / step) * step)
            raise Refused(
                f"train.batch={train.batch}"
                + (f" with train.micro_batch={micro}" if train.micro_batch else ""),
                f"its rows cannot be shared out evenly among {data_ranks} data ranks",
                f"give train.batch={near}, or a number of processes that divides {train.batch}",
            )
    return config.model_copy(update={"train": train.model_copy(update=changes)})
