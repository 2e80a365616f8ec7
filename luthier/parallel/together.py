"""Which ranks read a model together, because they cut it afterwards (`held.py`)."""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import Tensor

from luthier.config import RunConfig
from luthier.held import Way
from luthier.parallel.collectives import all_parts
from luthier.parallel.world import World
from luthier.parts import Part


def reading_ways(config: RunConfig, world: World, *, train: bool) -> list[Way]:
    """This rank's place on each axis that cuts what is read; none in one process."""
    axes = ["tensor", "pipeline"]
    if train and world.sharded and (config.adapter.method == "none" or config.parallel.stage == 3):
        axes += ["shard", "context"]
    mesh = world.mesh
    return [
        Way(
            axis,
            mesh.get_local_rank(axis),
            world.sizes[axis],
            partial(_joined, mesh.get_group(axis)),
        )
        for axis in axes
        if world.sizes[axis] > 1
    ]


def _joined(group: Any, own: Tensor, part: Part) -> Tensor:
    return all_parts(own, group, part)
