"""What was made for one process alone is the same on two ranks: skipping positions, routers' losses, corpora, few bits."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from layouts import same_run, steps, with_layout
from ranks import run_ranks
from test_data_parallel import KEYS, LAYOUTS, METHODS
from tiny_runs import write_data, write_rows

from luthier.parallel.world import World

POSE = {"data__pose": "paper", "data__pose_window": 200, "adapter__method": "lora"}
ROUTER = {
    "train__router_loss": 0.5,
    "adapter__dropout": 0.2,
    "adapter__targets": ["q_proj", "o_proj"],
}
CORPUS = {
    **{"train__mode": "pretrain", "data__split": "8,2,0", "data__length": 48},
    **METHODS["full"],
}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "pose": ("llama", POSE),
    "pose lazy": ("llama", {**POSE, "data__lazy": True}),
    "dynamic": ("llama", {"model__rope_scaling": {"type": "dynamic", "factor": 2.0}}),
    "router": ("mixtral", ROUTER),
    "router full": ("mixtral", {**METHODS["full"], "train__router_loss": 0.5}),
    "corpus": ("gpt2", CORPUS),
    "corpus lazy": ("llama", {**CORPUS, "data__lazy": True}),
    "corpus nf4": ("llama", {**CORPUS, **METHODS["qlora"]}),
    "nf4 stored": ("mixtral", {**METHODS["qlora"], "train__router_loss": 0.5}),
}


@pytest.fixture(scope="session")
def rows(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A folder of conversations; a file of texts."""
    data = write_data(tmp_path_factory.mktemp("talks"), train=20, dev=6)
    texts = [{"text": f"{i} the moon and the star " * (1 + 5 * i % 17)} for i in range(50)]
    return {"sft": data, "pretrain": write_rows(data.parent / "texts" / "train.jsonl", texts)}


OFTEN = {  # each case once, each layout twice; the others are for `make test-all`
    *(("pose", "dp2"), ("pose lazy", "shard2-2"), ("dynamic", "shard2-1"), ("router", "shard2-2")),
    *(("router full", "shard2-3"), ("corpus", "shard2-3"), ("corpus lazy", "dp2")),
    *(("corpus nf4", "shard2-1"), ("nf4 stored", "shard2-3")),
}


def pairs() -> list[Any]:
    return [
        pytest.param(c, where, marks=[] if (c, where) in OFTEN else [pytest.mark.long])
        for c in CASES
        for where in LAYOUTS
    ]


@pytest.mark.parametrize(("case", "layout"), pairs())
def test_two_ranks_train_what_one_does(
    case: str, layout: str, rows: dict[str, Path], model_folder: Callable[[str], Path]
) -> None:
    family, changes = CASES[case]
    keys = {**KEYS, **changes}
    if "train__mode" in keys:
        keys["data__cache"] = str(rows["pretrain"].parent / "cache")
    folders = (model_folder(family), rows[keys.get("train__mode", "sft")], Path("unused"))
    # torch has no grouped products in double precision, which experts need
    dtype, tolerance = ("float32", 1e-5) if family == "mixtral" else ("float64", 1e-9)
    theirs = steps(World(), folders, keys, 3, dtype)
    given = with_layout(keys, LAYOUTS[layout])
    found = run_ranks(LAYOUTS[layout], steps, folders, given, 3, dtype)
    for ours in found:
        same_run(ours, theirs, tolerance, norm=max(tolerance, 1e-7))
    for mine, yours, every in zip(found[0]["rows"], found[1]["rows"], theirs["rows"], strict=True):
        assert sorted(mine + yours) == sorted(every)
