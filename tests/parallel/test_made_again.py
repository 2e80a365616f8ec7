"""What the backward makes again in place of keeping it (`models/fast.py`) has the same bits on every layout.

Shards free a layer's weights between forward and backward, pipelines take gradients of inputs and of weights apart.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
from layouts import steps, with_layout
from ranks import run_ranks

from luthier import native
from luthier.models import fast, recompute
from luthier.native import ops
from luthier.parallel.world import World

FULL = {"adapter__method": None, "adapter__rank": None, "train__batch": 8, "train__micro_batch": 2}
LORA = {"train__batch": 8, "train__micro_batch": 2}


def both_ways(world: World, folders: Any, keys: dict[str, Any]) -> tuple[list[int], bool]:
    """How often products were made with and without keeping them, and whether all else is the same."""
    made, plain, keep = [0, 0], ops.swiglu, fast.keep_products
    found: list[dict[str, Any]] = []
    for kept in (True, False):

        def swiglu(gate: Any, up: Any, kept: bool = kept) -> Any:
            made[kept] += 1
            return plain(gate, up)

        def keeping(model: Any, on: bool, kept: bool = kept) -> None:
            keep(model, on or kept)

        with patch.object(recompute, "keep_products", keeping), patch.object(ops, "swiglu", swiglu):
            found.append(steps(world, folders, keys, 2, "bfloat16"))
    ours, theirs = found
    same = ours["loss"] == theirs["loss"] and ours["norm"] == theirs["norm"]
    for name in theirs["weights"]:
        same = same and np.array_equal(ours["weights"][name], theirs["weights"][name])
    return made, same


@pytest.mark.skipif(native.library() is None, reason=native.status())
@pytest.mark.parametrize(
    ("layout", "keys"),
    [
        ({"shard": 2, "stage": 3}, FULL),
        ({"tensor": 2, "sequence": True}, LORA),
        ({"pipeline": 2, "schedule": "zero_bubble"}, FULL),
    ],
    ids=["shard", "tensor", "pipeline"],
)
def test_layouts_train_the_same_bits(
    layout: dict[str, Any], keys: dict[str, Any], folders: tuple[Path, Path, Path]
) -> None:
    degrees = {name: n for name, n in layout.items() if type(n) is int and name != "stage"}
    for made, same in run_ranks(degrees, both_ways, folders, with_layout(keys, layout)):
        assert made[0] > made[1] > 0  # it was made again
        assert same
