"""Largest magnitudes of tensors that lie on several ranks, for whoever looks at how training goes."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from luthier.parallel.shard import local
from luthier.parallel.world import World


def peaks(tensors: Mapping[str, Tensor | None], world: World) -> dict[str, Tensor | None]:
    """Largest magnitude of each (maybe sharded) tensor on any rank, as scalars; NaN if one is in it."""
    most: dict[str, Tensor | None] = dict.fromkeys(tensors)
    ours = {name: local(t).abs() for name, t in tensors.items() if t is not None}
    rows = world.gather({n: float(t.max()) if t.numel() else 0.0 for n, t in ours.items()})
    for name in {name: None for row in rows for name in row}:
        # amax hands NaN on, max() does not
        values = [row[name] for row in rows if name in row]
        most[name] = torch.tensor(values, dtype=torch.float64).amax(0)
    return most
