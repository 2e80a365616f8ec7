"""Four steps on one layout, four more on another: what an uninterrupted run does, in double precision."""

from __future__ import annotations

import random
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from layouts import config_of
from ranks import run_ranks
from test_data_parallel import METHODS
from tiny_runs import write_data
from transformers import AutoModelForCausalLM

from luthier.files import damage
from luthier.parallel.world import World
from luthier.recipes import run_on
from luthier.train.metrics import read_metrics
from luthier.train.state import Stored

KEYS: dict[str, Any] = {
    **{"train__batch": 12, "train__micro_batch": 1, "data__length": 128, "train__epochs": 9},
    **{"optim__schedule": "constant", "optim__lr": 1e-2, "optim__clip": 0.5},
    **{"evaluate__every": "never", "checkpoint__every": 4, "checkpoint__best": "none"},
}
LAYOUTS: dict[str, dict[str, Any]] = {
    "one": {},
    "dp2": {"replicate": 2, "shard": 1},
    **{f"shard2-{s}": {"shard": 2, "stage": s} for s in (1, 2, 3)},
    "tp2": {"tensor": 2, "shard": 1},
    "pp2": {"pipeline": 2, "shard": 1},
    "shard3": {"shard": 3, "stage": 3},
    "dp2 shard2": {"replicate": 2, "shard": 2, "stage": 3},
    "shard2 tp2": {"shard": 2, "tensor": 2, "stage": 2},
    "dp2 tp2": {"replicate": 2, "tensor": 2, "shard": 1},
    "pp2 tp2": {"pipeline": 2, "tensor": 2, "shard": 1},
}
METHOD_FAMILY = {"full": "gpt2", "lora": "qwen3", "qlora": "qwen3"}  # gpt2 has fused layers


def pairs() -> list[Any]:
    """Random pairs; a few are tried in every run of the tests."""
    every = [
        (method, first, second)
        for method in METHOD_FAMILY
        for first in LAYOUTS
        for second in LAYOUTS
        if first != second
    ]
    random.Random(9).shuffle(every)
    often = {
        *(("full", "shard2-3", "tp2"), ("full", "tp2", "shard2-1"), ("lora", "tp2", "dp2")),
        *(("lora", "shard2-2", "one"), ("qlora", "dp2", "shard2-3"), ("full", "pp2", "shard2-1")),
        *(("lora", "tp2", "pp2"), ("qlora", "shard2-3", "tp2")),
    }
    chosen = [*sorted(often), *[pair for pair in every if pair not in often][:25]]
    return [pytest.param(*p, marks=[] if p in often else [pytest.mark.long]) for p in chosen]


def whole_run(world: World, folders: Any, keys: dict[str, Any]) -> None:
    run_on(config_of(folders, keys, "float64"), world)


@pytest.fixture(scope="module")
def train(
    model_folder: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., Path]:
    """The output of so many steps by a method on a layout, maybe going on from the checkpoint of another one."""
    data = write_data(tmp_path_factory.mktemp("rows"), train=40, dev=6)  # 12 rows for 1 to 4 ranks

    @cache
    def run(method: str, layout: str, steps: int, begun: str | None = None) -> Path:
        output = tmp_path_factory.mktemp("run")
        folders = (model_folder(METHOD_FAMILY[method]), data, output)
        degrees = LAYOUTS[layout]
        keys = KEYS | METHODS[method] | {"train__steps": steps}
        keys |= {f"parallel__{name}": value for name, value in degrees.items()}
        if begun is not None:
            keys["checkpoint__resume"] = str(run(method, begun, 4) / "checkpoints/step-4")
        if degrees:
            run_ranks(degrees, whole_run, folders, keys)
        else:
            whole_run(World(), folders, keys)
        return output

    return run


def losses(output: Path) -> dict[int, float]:
    records = read_metrics(output / "metrics.jsonl")
    return {r["step"]: r["loss"] for r in records if r["kind"] == "train"}


def worst(ours: Path, theirs: Path) -> float:
    """The largest ||difference|| / ||reference|| of weights and moments."""
    mine, other = Stored(ours / "checkpoints/step-8"), Stored(theirs / "checkpoints/step-8")
    assert set(mine) == set(other)
    found = [0.0]
    for name in other:
        distance, size = float((mine[name] - other[name]).norm()), float(other[name].norm())
        found.append(distance / max(size, 1e-12))
    return max(found)


@pytest.mark.parametrize(("method", "first", "second"), pairs())
def test_another_layout_goes_on_as_if_nothing_had_happened(
    method: str, first: str, second: str, train: Callable[..., Path]
) -> None:
    reference, resumed = train(method, "one", 8), train(method, second, 8, first)
    wanted, found = losses(reference), losses(resumed)
    assert sorted(found) == [5, 6, 7, 8]
    assert found == pytest.approx({step: wanted[step] for step in found}, rel=1e-9)
    assert worst(resumed, reference) < 1e-7
    assert damage(resumed / "checkpoints/step-8") is None
    if method == "full":
        model = AutoModelForCausalLM.from_pretrained(resumed / "checkpoints/step-8")
        stored = Stored(resumed / "checkpoints/step-8")
        for name, tensor in model.named_parameters():
            assert torch.equal(tensor.detach(), stored[f"weights/{name}"]), name


SAME = {("full", "one"), ("lora", "shard2-3"), ("full", "tp2")}


@pytest.mark.parametrize(
    ("method", "layout"),
    [
        pytest.param(m, where, marks=[] if (m, where) in SAME else [pytest.mark.long])
        for m in METHOD_FAMILY
        for where in ("one", "dp2", "shard2-3", "tp2", "pp2")
    ],
)
def test_the_same_layout_goes_on_bit_for_bit(
    method: str, layout: str, train: Callable[..., Path]
) -> None:
    whole, resumed = train(method, layout, 8), train(method, layout, 8, layout)
    found = losses(resumed)
    assert found == {step: losses(whole)[step] for step in found} and len(found) == 4
    ours, theirs = (Stored(output / "checkpoints/step-8") for output in (resumed, whole))
    assert set(ours) == set(theirs)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_no_piece_is_written_twice_and_every_rank_writes(train: Callable[..., Path]) -> None:
    for layout, ranks in (("dp2", 2), ("tp2", 2), ("pp2", 2)):
        folder = train("full", layout, 4) / "checkpoints/step-4"
        sizes = [p.stat().st_size for p in sorted(folder.glob("training_state-*.safetensors"))]
        assert len(sizes) == ranks and max(sizes) < 1.6 * min(sizes)
        one = train("full", "one", 4) / "checkpoints/step-4/training_state-00000.safetensors"
        assert sum(sizes) < 1.1 * one.stat().st_size
