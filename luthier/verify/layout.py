"""`verify layout`: the first step in several processes is the first step in one: loss and every gradient.

The step's own rows go through the trainer's own step in the layout of `parallel.*`; then rank 0 does the whole step
alone, with the same micro-batches, and compares. In float32, so that rounding hides nothing; weights stay.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from typing import Any

from torch import Tensor

from luthier.adapters import adapters_of
from luthier.assemble import build, joined, make_updater, name_of
from luthier.built import Built
from luthier.config import OptimConfig, RunConfig
from luthier.configfile import Resolved
from luthier.errors import Failed, Refused
from luthier.parallel.degrees import check_sharding, fit_batch
from luthier.parallel.shard import gathered, whole
from luthier.parallel.world import World
from luthier.parts import marked
from luthier.train.optim import make_optimizer
from luthier.verify.loss import EXACT, Difference, Measured, compare, show_differences, wake
from luthier.verify.packing import open_training


def verify_layout(resolved: Resolved, say: Callable[[str], object] = print) -> dict[str, Any]:
    """Compare a step of all processes with the same in one; gives the differences.

    Raises Failed when they are beyond rounding, Refused for bad input.
    """
    with joined(resolved.config) as world:
        if world.size == 1:
            raise Refused(
                "luthier verify layout in one process",
                "there is nothing to compare it with",
                "start several: luthier verify layout FILE --nproc 2",
            )
        tell = say if world.is_main else lambda text: None
        for remark in resolved.remarks:
            tell(f"note: {remark}")
        return compare_layout(resolved.config, world, tell)


def compare_layout(config: RunConfig, world: World, say: Callable[[str], object]) -> dict[str, Any]:
    """`verify_layout` as one of the processes of `world`."""
    model = {"dtype": "float32", "autocast": "none"}
    config = config.model_copy(
        update={
            "model": config.model.model_copy(update=model),
            "train": config.train.model_copy(update={"compile": False}),
        }
    )
    config = fit_batch(config, world.data_size, world.sizes["pipeline"])
    check_sharding(config, world.sizes)
    ours, norm, built = _first_step(config, world)
    say(
        f"{world.layout(config.parallel)}; {config.batch} rows in micro-batches of "
        f"{config.micro_batch}; {name_of(built.dtype)} on {built.device}, "
        f"{built.num_trained:,} trained parameters in {len(ours.gradients)} tensors"
    )
    what = f"{world.size} processes = one process"

    def alone() -> dict[str, Any]:
        theirs, wanted, _ = _first_step(config, World())
        return {**asdict(compare(ours, theirs)), "norm": abs(norm - wanted) / wanted}

    found = world.lead(alone)
    norm_apart = found.pop("norm")
    show_differences({what: Difference(**found)}, {what: EXACT}, say)
    if not (
        found["loss"] <= EXACT.loss
        and found["worst"] <= EXACT.worst
        and norm_apart <= EXACT.gradients
    ):
        raise Failed(
            f"verify layout with {world.words}",
            f"the loss differs by {found['loss']:.2g}, the gradient of {found['name']} by {found['worst']:.2g}, "
            f"the norm of all of them by {norm_apart:.2g} (relative): more than rounding",
            "do not train in this layout; report this with the config",
        )
    say("verify layout: ok")
    return {what: found}


def _first_step(config: RunConfig, world: World) -> tuple[Measured, float, Built]:
    """Loss, whole gradients (on rank 0 alone) and their norm of the run's first step on this world."""
    config, _, data = open_training(config, world)
    try:
        micro_batches = data.loader.peek()
    finally:
        data.loader.close()
    built = build(config, train=True, world=world)
    with whole(*adapters_of(built.model).values(), world=world, write=True):
        wake(built, config.train.seed)
    updater = make_updater(config, built)
    updater.gate, updater.clip = (
        None,
        0.0,
    )  # clipped, gradients of any wrong scale would be the same
    still = OptimConfig.model_validate({"name": "sgd", "betas": (0.0, 0.0)})
    updater.optimizer = make_optimizer(updater.master.named, still, 0.0, idle=True)
    kept: dict[str, Tensor] = {}

    def keep(*_: Any) -> None:
        named = [(n, p, p.grad) for n, p in updater.master.named if p.grad is not None]
        live = {n: marked(g.detach(), p) for n, p, g in named}
        kept.update({n: g.clone() for n, g in gathered(live, world, keep=world.is_main).items()})

    updater.optimizer.register_step_pre_hook(keep)
    report = updater.update(micro_batches, step=1, lr=0.0)
    return Measured(report.loss or 0.0, kept), report.grad_norm or 0.0, built
