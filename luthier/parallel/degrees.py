"""`parallel.*` of the config and a number of processes -> the sizes of the mesh, or a refusal.

Pure arithmetic, done before any work; the mesh itself is made by `world.py`.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Mapping

from luthier.config import RunConfig
from luthier.config_parallel import ParallelConfig
from luthier.errors import Refused

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
    if sizes["context"] == 1 and parallel.context_method != "auto":
        raise Refused(
            f"parallel.context_method={parallel.context_method}",
            "it says how attention crosses context ranks, and parallel.context is 1",
            "give parallel.context=2 or more, or leave it out",
        )
    fixed = math.prod(size for size in sizes.values() if size != -1)
    rest = [axis for axis, size in sizes.items() if size == -1]
    given = ", ".join(
        f"parallel.{a}={s}" for a, s in sizes.items() if s > 1 or a in parallel.model_fields_set
    )
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
    check_pipeline(parallel, sizes["pipeline"])
    if sizes["shard"] == 1 and parallel.offload:
        raise Refused(
            "parallel.offload=true",
            "it keeps in CPU memory what parallel.shard cuts, and parallel.shard is 1",
            "start more processes, or leave it out",
        )
    return sizes


def without_effect(parallel: ParallelConfig, sizes: Mapping[str, int]) -> list[str]:
    """Remarks on what was asked for and changes nothing on this mesh. Refused it would keep a run that lost a
    process for good from going on in one."""
    found = []
    if sizes["shard"] == 1 and parallel.stage != type(parallel).model_fields["stage"].default:
        found.append(f"parallel.stage={parallel.stage} cuts nothing: parallel.shard is 1")
    if sizes["tensor"] == 1 and parallel.sequence is True:
        found.append("parallel.sequence=true cuts nothing: parallel.tensor is 1")
    return found


def check_pipeline(parallel: ParallelConfig, ranks: int) -> None:
    """Refuse schedules and virtual stages that say nothing or do not go together."""
    for key in ("virtual_stages", "schedule"):
        value, usual = getattr(parallel, key), type(parallel).model_fields[key].default
        if ranks == 1 and value != usual:
            raise Refused(
                f"parallel.{key}={value}",
                "it says how a pipeline works, and parallel.pipeline is 1",
                "leave it out, or give parallel.pipeline",
            )
    if ranks > 1 and parallel.schedule == "1f1b" and parallel.virtual_stages > 1:
        raise Refused(
            f"parallel.virtual_stages={parallel.virtual_stages} with parallel.schedule=1f1b",
            "that schedule has one stage a rank",
            "give parallel.schedule=interleaved (or zero_bubble)",
        )
    if ranks > 1 and parallel.schedule == "interleaved" and parallel.virtual_stages == 1:
        raise Refused(
            "parallel.schedule=interleaved with parallel.virtual_stages=1",
            "it interleaves the several stages of a rank",
            "give parallel.virtual_stages=2, or parallel.schedule=1f1b",
        )


def check_stages(parallel: ParallelConfig, ranks: int, num_layers: int) -> None:
    """Refuse more pipeline stages than the model has layers."""
    stages = ranks * parallel.virtual_stages
    if ranks > 1 and stages > num_layers:
        virtual = parallel.virtual_stages
        raise Refused(
            f"parallel.pipeline={ranks}"
            + (f" with parallel.virtual_stages={virtual}" if virtual > 1 else ""),
            f"that makes {stages} stages, and the model has {num_layers} layer{'s' * (num_layers > 1)}",
            f"give at most {num_layers} stages"
            if num_layers > 1
            else "leave parallel.pipeline out",
        )


def check_sharding(config: RunConfig, sizes: Mapping[str, int]) -> None:
    """Refuse what cannot be cut over several shards or tensor ranks."""
    for axis in ("shard", "tensor"):
        if sizes[axis] > 1 and config.optim.name in WHOLE:
            raise Refused(
                f"optim.name={config.optim.name} with parallel.{axis}={sizes[axis]}",
                "its moments are shared by rows of a tensor that would lie on different ranks",
                f"use optim.name=adamw, or parallel.replicate in place of parallel.{axis}",
            )
    if (
        config.parallel.schedule == "zero_bubble"
        and sizes["shard"] > 1
        and config.parallel.stage == 3
    ):
        raise Refused(
            f"parallel.schedule=zero_bubble with parallel.stage=3 and parallel.shard={sizes['shard']}",
            "it takes the gradients of weights when their layers are no longer gathered",
            "give parallel.schedule=1f1b or interleaved, or parallel.stage=2",
        )
    if config.parallel.schedule == "zero_bubble" and config.train.compile:
        raise Refused(
            "parallel.schedule=zero_bubble with train.compile=true",
            "it takes gradients of hidden states and of weights apart, which compiled layers give together",
            "give parallel.schedule=1f1b or interleaved, or leave train.compile out",
        )
    if sizes.get("context", 1) > 1 and config.train.compile:
        raise Refused(
            f"train.compile=true with parallel.context={sizes['context']}",
            "attention that exchanges tokens with other ranks is not compiled in this version",
            "leave train.compile out",
        )


def check_processes(config: RunConfig, processes: int) -> None:
    """Refuse a number of processes that the config alone tells cannot be."""
    sizes = mesh_sizes(config.parallel, processes)
    fit_batch(config, sizes["replicate"] * sizes["shard"], sizes["pipeline"])
    check_sharding(config, sizes)


def fewer(config: RunConfig, processes: int) -> int | None:
    """The largest number of processes below `processes` that the config allows."""
    if config.train.accumulation is not None:  # the batch stays what it was
        sizes = mesh_sizes(config.parallel, processes)
        fitted = fit_batch(config, sizes["replicate"] * sizes["shard"], sizes["pipeline"])
        config = with_batch(config, fitted.train.batch)
    for number in range(processes - 1, 0, -1):
        with contextlib.suppress(Refused):
            check_processes(config, number)
            return number
    return None


def with_batch(config: RunConfig, batch: int) -> RunConfig:
    """The config with this batch, also where `train.accumulation` made another of this number of ranks."""
    changes = {"batch": batch, "accumulation": None}
    return config.model_copy(update={"train": config.train.model_copy(update=changes)})


def fit_batch(config: RunConfig, data_ranks: int, stages: int = 1) -> RunConfig:
    """The config with `train.batch` and `train.micro_batch` filled in for this number of data ranks.

    `train.accumulation` counts per rank: batch = micro_batch x accumulation x data ranks. A pipeline of
    `stages` ranks gets at least as many micro-batches, twice that where it is left to us. Refused for a
    batch that cannot be cut into equal micro-batches on all ranks.
    """
    train = config.train
    _check_filling(config, data_ranks, stages)
    if train.accumulation is not None:
        micro = train.micro_batch or 1
        changes = {"batch": micro * train.accumulation * data_ranks, "accumulation": None}
    else:
        rows = max(1, train.batch // data_ranks)
        wanted = 1 if stages == 1 else min(rows, 2 * stages)
        usual = max(m for m in range(1, rows + 1) if rows % m == 0 and rows // m >= wanted)
        micro = train.micro_batch or usual
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


def _check_filling(config: RunConfig, data_ranks: int, stages: int) -> None:
    """Refuse fewer micro-batches than a pipeline has ranks: some would never have work."""
    train = config.train
    rows = train.batch // data_ranks
    passes = train.accumulation or rows // (train.micro_batch or 1)
    if passes >= stages or stages == 1:
        return
    batch, fitting = stages * data_ranks * (train.micro_batch or 1), rows // stages
    do = f"give train.batch={batch} or more"
    if train.accumulation is not None:
        do = f"give train.accumulation={stages} or more"
    elif fitting:
        do = f"give train.micro_batch={fitting} or less"
    raise Refused(
        f"parallel.pipeline={stages} with {passes} micro-batch{'es' if passes > 1 else ''} a step",
        f"a pipeline of {stages} needs {stages} micro-batches at least, or some of its processes idle for good",
        do,
    )
