"""All ranks rehearse the largest step, evaluation and save together, and nothing comes of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from layouts import config_of, with_layout
from ranks import run_ranks

from luthier.assemble import build, evaluation_rows, make_updater, open_data, open_text
from luthier.parallel.degrees import fit_batch
from luthier.parallel.shard import local
from luthier.parallel.world import World
from luthier.rehearsal import rehearse
from luthier.train.saving import Saver

KEYS: dict[str, Any] = {
    "train__micro_batch": 1,
    "adapter__method": "none",
    "adapter__rank": None,
    "checkpoint__every": 2,
}


def two_steps(
    world: World, folders: tuple[Path, Path, Path], keys: dict[str, Any], first: bool
) -> list[Any]:
    """Losses, norms and this rank's trained numbers after two steps, with a rehearsal before them or not."""
    config = fit_batch(
        config_of(folders, keys, "float32"), world.data_size, world.sizes["pipeline"]
    )
    text = open_text(config)
    data = open_data(config, text, world=world)
    built = build(config, train=True, world=world)
    updater = make_updater(config, built)
    if first:
        assert data.dev is not None
        rows = evaluation_rows(config, text, data.dev)
        told = rehearse(config, built, data.loader, updater, rows, Saver(world))
        assert "the copy of a save" in told
    batches = data.loader.step_batches()
    reports = [updater.update(next(batches), step=n, lr=0.01) for n in (1, 2)]
    data.loader.close()
    sums = [float(local(p).double().sum()) for p in updater.master.parameters]
    return [[(r.loss, r.grad_norm) for r in reports], sums]


@pytest.mark.parametrize(
    "layout",
    [
        {"shard": 2, "stage": 2},
        {"pipeline": 2},
        pytest.param({"shard": 2, "stage": 3}, marks=pytest.mark.long),
        pytest.param({"tensor": 2}, marks=pytest.mark.long),
        pytest.param({"context": 2}, marks=pytest.mark.long),
        pytest.param({"replicate": 2}, marks=pytest.mark.long),
    ],
)
def test_ranks_rehearse_together(layout: dict[str, Any], folders: tuple[Path, Path, Path]) -> None:
    given = with_layout(KEYS, layout)
    plain, other = (run_ranks(layout, two_steps, folders, given, first) for first in (False, True))
    assert plain == other
