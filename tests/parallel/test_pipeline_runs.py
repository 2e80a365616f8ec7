"""Whole runs in a pipeline: evaluation, generation, checkpoints and final folders are those of one process."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from ranks import run_ranks
from safetensors.torch import load_file
from test_data_parallel import METHODS
from test_many_ranks import losses, using_the_result, whole_run
from test_pipeline_parallel import LOOP, PP2, deep_folder  # noqa: F401
from tiny_runs import write_data

from luthier.parallel.world import World

RUN = {
    **{"train__batch": 6, "train__micro_batch": 1, "data__length": 128, "train__epochs": 9},
    **{"optim__schedule": "constant", "optim__lr": 1e-2},
    **{"evaluate__every": 2, "checkpoint__every": 2, "evaluate__before": True},
    **{"evaluate__generate": True, "evaluate__max_new_tokens": 4, "evaluate__micro_batch": 2},
}


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_data(tmp_path_factory.mktemp("many"), train=20, dev=7)


def layout(of: dict[str, Any]) -> dict[str, Any]:
    return {f"parallel__{name}": value for name, value in of.items()}


@pytest.mark.parametrize(
    ("family", "method", "where"),
    [
        ("qwen2", "full", PP2),
        ("llama", "lora", LOOP),
        pytest.param("gpt2", "prompt", PP2, marks=pytest.mark.long),
        pytest.param("llama", "prefix", LOOP, marks=pytest.mark.long),
        pytest.param("chatglm2", "full", PP2, marks=pytest.mark.long),
        pytest.param("mixtral", "lora", PP2, marks=pytest.mark.long),
        pytest.param("qwen2", "full", {**PP2, "shard": 2, "stage": 3}, marks=pytest.mark.long),
        pytest.param("llama", "lora", {**PP2, "tensor": 2}, marks=pytest.mark.long),
    ],
)
def test_a_run_resumed_in_a_pipeline(
    family: str,
    method: str,
    where: dict[str, Any],
    rows: Path,
    deep_folder: Callable[[str], Path],  # noqa: F811
    tmp_path: Path,
) -> None:
    """Two steps in a pipeline, two alone, two in the pipeline again: the losses of one uninterrupted process."""
    model, keys = deep_folder(family), {**RUN, **METHODS[method]}
    whole_run(World(), (model, rows, tmp_path / "whole"), {**keys, "train__steps": 6})
    parts = (model, rows, tmp_path / "parts")
    run_ranks(where, whole_run, parts, {**keys, "train__steps": 2, **layout(where)})
    going_on = {**keys, "checkpoint__resume": "auto"}
    whole_run(World(), parts, {**going_on, "train__steps": 4})
    run_ranks(where, whole_run, parts, {**going_on, "train__steps": 6, **layout(where)})
    ours, theirs = losses(parts[2]), losses(tmp_path / "whole")
    assert sorted(ours) == sorted(theirs) == [1, 2, 3, 4, 5, 6]
    assert ours == pytest.approx(theirs, rel=1e-5)
    found = [json.loads((f / "report.json").read_text("utf-8")) for f in (parts[2], tmp_path / "whole")]  # fmt: skip
    for when in ("before", "after"):
        assert found[0][when] == pytest.approx(found[1][when], rel=1e-5)
    assert found[0]["trained_parameters"] == found[1]["trained_parameters"]
    assert found[0]["total_parameters"] == found[1]["total_parameters"]
    name = "model.safetensors" if method == "full" else "adapter_model.safetensors"
    mine, other = (load_file(folder / name) for folder in (parts[2], tmp_path / "whole"))
    assert mine.keys() == other.keys()
    for key, tensor in mine.items():
        assert float((tensor - other[key]).norm()) <= 1e-4 * float(other[key].norm()) + 1e-12, key
    alone = using_the_result(World(), parts, keys)
    for found in run_ranks(where, using_the_result, parts, {**keys, **layout(where)}):
        assert found[0] == pytest.approx(alone[0], rel=1e-5) and found[1] == alone[1]
