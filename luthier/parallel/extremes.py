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
    rows = world.gather({n: _peak(local(t)) for n, t in tensors.items() if t is not None})
    for name in {name: None for row in rows for name in row}:
        # amax hands NaN on, max() does not
        values = [row[name] for row in rows if name in row]
        most[name] = torch.tensor(values, dtype=torch.float64).amax(0)
    return most


def _peak(tensor: Tensor) -> float:
    if not tensor.numel():
        return 0.0
    low, high = torch.aminmax(tensor)  # NaN is handed on; abs() would be a copy
    return float(torch.stack([-low, high]).amax())
