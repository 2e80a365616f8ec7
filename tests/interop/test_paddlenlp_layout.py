"""PaddleNLP's parallel degrees in several processes; in one they are off (test_paddlenlp.py)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from luthier.cli import main
from luthier.errors import Refused
from luthier.interop.read import read_config
from luthier.parallel.degrees import mesh_sizes


def config(folder: Path, processes: int, **arguments: Any) -> Any:
    given = {
        "model_name_or_path": "m",
        "dataset_name_or_path": "d",
        "output_dir": str(folder / "out"),
        **arguments,
    }
    path = folder / "lora_argument.json"
    path.write_text(json.dumps(given))
    return read_config([path], [], processes=processes)


@pytest.mark.parametrize(
    ("arguments", "processes", "sizes", "stage", "offload"),
    [
        ({}, 4, (4, 1), 2, False),
        ({"sharding": "stage1"}, 4, (1, 4), 1, False),
        ({"sharding": "stage3 offload"}, 4, (1, 4), 3, True),
        ({"sharding": "stage2", "sharding_parallel_degree": 2}, 4, (2, 2), 2, False),
        ({"sharding": "stage2", "data_parallel_degree": 2}, 8, (2, 4), 2, False),
        ({"data_parallel_degree": 4}, 4, (4, 1), 2, False),
    ],
)
def test_degrees_hold_in_several_processes(
    tmp_path: Path,
    arguments: dict[str, Any],
    processes: int,
    sizes: tuple[int, int],
    stage: int,
    offload: bool,
) -> None:
    found = config(tmp_path, processes, **arguments)
    parallel = found.config.parallel
    mesh = mesh_sizes(parallel, processes)
    assert (mesh["replicate"], mesh["shard"]) == sizes
    assert (parallel.stage, parallel.offload) == (stage, offload)
    assert not any("parallel settings are off" in remark for remark in found.remarks)


@pytest.mark.parametrize(
    ("arguments", "sequence", "asked"),
    [
        ({}, "auto", False),
        ({"sequence_parallel": False}, False, True),
        ({"sequence_parallel": True, "tensor_parallel_output": True}, "auto", True),
    ],
)
def test_tensor_parallel_keys(
    tmp_path: Path, arguments: dict[str, Any], sequence: bool | str, asked: bool
) -> None:
    """`tensor_parallel_output`, whether logits are gathered for the loss, changes no result: they are not."""
    parallel = config(tmp_path, 4, tensor_parallel_degree=2, **arguments).config.parallel
    sizes = mesh_sizes(parallel, 4)
    assert (sizes["tensor"], sizes["replicate"], sizes["shard"]) == (2, 2, 1)
    assert parallel.sequence == sequence
    assert ("sequence" in parallel.model_fields_set) == asked


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"data_parallel_degree": 2}, "2 processes, and 4 were started"),
        ({"sharding": "stage2", "sharding_parallel_degree": 3}, "3 processes"),
        ({"tensor_parallel_degree": 3}, "3 processes or a multiple, and 4 were started"),
        ({"sep_parallel_degree": 3}, "parallel.context=3"),
        ({"sep_parallel_degree": 2, "context_parallel_degree": 2}, "two ways.*give one of them"),
        ({"pipeline_parallel_degree": 3}, "3 processes or a multiple, and 4 were started"),
        ({"pipeline_parallel_config": "enable_magic"}, "'enable_magic' is none of its words"),
        ({"sharding_parallel_degree": 2}, r"sharding is not given"),
        ({"sharding": "offload"}, "sharding=offload"),
        ({"sharding": "stage1 stage2"}, "sharding=stage1 stage2"),
    ],
)
def test_a_mismatch_is_refused(tmp_path: Path, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(Refused, match=message):
        mesh_sizes(config(tmp_path, 4, **arguments).config.parallel, 4)


@pytest.mark.parametrize(
    ("name", "method"), [("sep_parallel_degree", "heads"), ("context_parallel_degree", "ring")]
)
def test_tokens_are_shared(tmp_path: Path, name: str, method: str) -> None:
    parallel = config(tmp_path, 4, **{name: 2}).config.parallel
    assert mesh_sizes(parallel, 4)["context"] == 2
    assert parallel.context_method == method


@pytest.mark.parametrize(
    ("arguments", "schedule", "virtual"),
    [
        ({"pipeline_parallel_config": "disable_p2p_cache_shape enable_timer"}, "1f1b", 1),
        ({"virtual_pp_degree": 2}, "interleaved", 2),
        ({"pipeline_parallel_config": "use_dualpipev"}, "zero_bubble", 2),
    ],
)
def test_pipelines(tmp_path: Path, arguments: dict[str, Any], schedule: str, virtual: int) -> None:
    parallel = config(tmp_path, 4, pipeline_parallel_degree=2, **arguments).config.parallel
    mesh = mesh_sizes(parallel, 4)
    assert (mesh["pipeline"], mesh["replicate"]) == (2, 2)
    assert (parallel.schedule, parallel.virtual_stages) == (schedule, virtual)


def test_one_process_takes_the_same_file(tmp_path: Path) -> None:
    found = config(tmp_path, 1, sharding="stage2", sharding_parallel_degree=8)
    assert mesh_sizes(found.config.parallel, 1)["shard"] == 1
    assert any("one process: the parallel settings are off" in r for r in found.remarks)


def test_a_refusal_names_what_was_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config(tmp_path, 4, tensor_parallel_degree=3)
    path = str(tmp_path / "lora_argument.json")
    assert main(["finetune", path, "--nproc", "4"]) == 2
    told = capsys.readouterr().err
    assert "parallel.tensor=3" in told
    assert "parallel.tensor comes from PaddleNLP tensor_parallel_degree (" in told
    assert "parallel.shard comes from" not in told  # a usual value of PaddleNLP's: nobody wrote it
