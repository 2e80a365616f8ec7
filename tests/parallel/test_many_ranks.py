"""Three and four ranks: replicas of shards, the same batches and losses on any number, resuming on another one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from layouts import config_of, steps, worst
from ranks import run_ranks

from luthier.parallel.degrees import fit_batch
from luthier.parallel.world import World
from luthier.recipes import run_on
from luthier.train.metrics import read_metrics
from luthier.use import _evaluate, _predict

FULL = {"adapter__method": "none", "adapter__rank": None}
TWELVE = {"train__batch": 12, "train__micro_batch": 1, "data__length": 128, "train__epochs": 9}
FOLDERS = ("qwen2", 32, 6)  # tied embeddings


@pytest.mark.parametrize(
    ("method", "stage"),
    [
        (FULL, 3),
        ({"adapter__method": "lora"}, 2),
        pytest.param(FULL, 1, marks=pytest.mark.long),
        pytest.param(FULL, 2, marks=pytest.mark.long),
        pytest.param({"adapter__method": "lora"}, 3, marks=pytest.mark.long),
        pytest.param({"adapter__method": "reft"}, 3, marks=pytest.mark.long),
        pytest.param(
            {"adapter__method": "prefix", "adapter__rank": None}, 3, marks=pytest.mark.long
        ),
    ],
)
def test_replicas_of_shards_train_what_one_process_does(
    method: dict[str, Any], stage: int, folders: tuple[Path, Path, Path]
) -> None:
    keys = {**TWELVE, **method}
    theirs = steps(World(), folders, keys)
    layout = {"replicate": 2, "shard": 2, "stage": stage}
    given = keys | {f"parallel__{name}": value for name, value in layout.items()}
    for ours in run_ranks(layout, steps, folders, given):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-9)
        assert ours["norm"] == pytest.approx(theirs["norm"], rel=1e-7)
        for mine, other in zip(ours["gradients"], theirs["gradients"], strict=True):
            assert worst(mine, other)[0] < 1e-9
        assert worst(ours["weights"], theirs["weights"])[0] < 1e-9


@pytest.mark.parametrize("ranks", [3, pytest.param(4, marks=pytest.mark.long)])
def test_any_number_of_ranks_sees_the_same_batches(
    ranks: int, folders: tuple[Path, Path, Path]
) -> None:
    """Two epochs and a part: their last steps have fewer rows than there are micro-batches."""
    keys = {**TWELVE, "adapter__dropout": 0.2}
    theirs = steps(World(), folders, keys, 5, "float32")
    found = run_ranks({"shard": ranks}, steps, folders, keys, 5, "float32")
    for step, rows in enumerate(theirs["rows"]):
        seen = [row for ours in found for row in ours["rows"][step]]
        assert sorted(seen) == sorted(rows)
        sizes = [len(ours["rows"][step]) for ours in found]
        assert max(sizes) - min(sizes) <= 1
    for ours in found:
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-6)
        assert ours["tokens"] == theirs["tokens"]


def losses(output: Path) -> dict[int, float]:
    return {
        r["step"]: r["loss"] for r in read_metrics(output / "metrics.jsonl") if r["kind"] == "train"
    }


def whole_run(world: World, folders: tuple[Path, Path, Path], keys: dict[str, Any]) -> Any:
    config = config_of(folders, keys, "float32")
    run_on(config, world)
    return None


def using_the_result(world: World, folders: tuple[Path, Path, Path], keys: dict[str, Any]) -> Any:
    """`luthier evaluate` and `luthier predict`, sampling."""
    config = fit_batch(
        config_of(folders, keys | {"evaluate__top_k": 5}, "float32"), world.data_size
    )
    return _evaluate(config, world), _predict(config, world)


@pytest.mark.parametrize("method", [FULL, {"adapter__method": "lora"}], ids=["full", "lora"])
def test_resume_on_another_number_of_ranks(
    method: dict[str, Any], folders: tuple[Path, Path, Path], tmp_path: Path
) -> None:
    """2 ranks, then 1, then 3, each of them with another stage: the losses of one uninterrupted process."""
    model, data, _ = folders
    keys = {
        **{**TWELVE, "train__batch": 6, "optim__schedule": "constant", "optim__lr": 1e-2},
        **{"evaluate__every": 2, "checkpoint__every": 2, **method},
        **{"evaluate__generate": True, "evaluate__max_new_tokens": 4, "evaluate__micro_batch": 2},
    }
    whole_run(World(), (model, data, tmp_path / "whole"), {**keys, "train__steps": 6})
    parts = (model, data, tmp_path / "parts")
    run_ranks({"shard": 2}, whole_run, parts, {**keys, "train__steps": 2, "parallel__stage": 3})
    going_on = {**keys, "checkpoint__resume": "auto"}
    whole_run(World(), parts, {**going_on, "train__steps": 4})
    last = {**going_on, "train__steps": 6, "parallel__stage": 1}
    run_ranks({"shard": 3}, whole_run, parts, last)
    ours, theirs = losses(parts[2]), losses(tmp_path / "whole")
    assert sorted(ours) == sorted(theirs) == [1, 2, 3, 4, 5, 6]
    assert ours == pytest.approx(theirs, rel=1e-6)
    mine, other = (
        json.loads((folder / "report.json").read_text("utf-8"))["after"]
        for folder in (parts[2], tmp_path / "whole")
    )
    assert mine == pytest.approx(other, rel=1e-6) and mine["answers"] == 6
    using = (*parts[:2], parts[2])
    alone = using_the_result(World(), using, keys)
    for found in run_ranks({"shard": 2}, using_the_result, using, keys):
        assert found[0] == pytest.approx(alone[0], rel=1e-6) and found[1] == alone[1]
