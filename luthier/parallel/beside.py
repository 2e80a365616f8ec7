"""Whole adapters on cut layers: what of an update that is not cut itself a rank adds to its part of the layer.

For methods whose numbers each act on all inputs or outputs (MoRA; LoKr where its factors do not divide; VeRA with
its shared matrices). Every rank holds all of the adapter, and its gradient is the sum of the ranks'. A low-rank
update is cut where it is made, at no cost. Any other is computed whole on each rank; before a layer that is cut by
its inputs these are gathered for it, once in the forward and once in the backward.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from luthier.parallel.collectives import Axis, whole_features
from luthier.parts import Part

Delta = Callable[[Tensor], Tensor]
Cut = Callable[[int, int, int], Part]  # `LayerCut.part`: axis, rank, ranks


class Columns:
    """On a layer that is cut by its outputs."""

    def __init__(self, part: Cut, axis: Axis) -> None:
        self.outputs, self.rows = (part(dim, axis.rank, axis.ranks) for dim in (-1, 0))

    def delta(self, make: Delta, x: Tensor) -> Tensor:
        """What is added to the rank's outputs; x is whole."""
        return self.outputs.of(make(x))

    def low_rank(self, whole: Any) -> Any:
        """The rank's `adapters.base.LowRank`."""
        gain = None if whole.gain is None else self.rows.of(whole.gain)
        return whole._replace(up=self.rows.of(whole.up), gain=gain)


class Rows:
    """On a layer that is cut by its inputs."""

    def __init__(self, part: Cut, axis: Axis) -> None:
        self.inputs, self.axis = part(-1, axis.rank, axis.ranks), axis

    def delta(self, make: Delta, x: Tensor) -> Tensor:
        """An equal share of what is added to the sum; x is the rank's part."""
        return make(whole_features(x, self.axis, self.inputs, shares=True)) / self.axis.ranks

    def low_rank(self, whole: Any) -> Any:
        return whole._replace(down=self.inputs.of(whole.down))
