"""The place of a process, the mesh, and what is refused before any work."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
from tiny_runs import resolved

from luthier.config_parallel import ParallelConfig
from luthier.errors import LostPeer, Refused
from luthier.parallel import world as module
from luthier.parallel.degrees import (
    check_sharding,
    check_stages,
    fit_batch,
    mesh_sizes,
    without_effect,
)
from luthier.parallel.joining import Place
from luthier.parallel.world import OTHERS, World, place

TORCHRUN = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}
TORCHRUN |= {"MASTER_ADDR": "node1", "MASTER_PORT": "29501", "TORCHELASTIC_RESTART_COUNT": "2"}


@pytest.fixture(autouse=True)
def bare(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (*OTHERS, *TORCHRUN, "TORCHELASTIC_USE_AGENT_STORE"):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize("value", [None, "1", " 1 "])
def test_one_process_is_the_main_one(monkeypatch: pytest.MonkeyPatch, value: str | None) -> None:
    if value is not None:
        monkeypatch.setenv("WORLD_SIZE", value)
    world = World.start(ParallelConfig.model_validate({}))
    assert world == World() and world.is_main and (world.size, world.data_size) == (1, 1)
    assert (world.sum(2.5), world.max(2.5), world.values(2.5)) == (2.5, 2.5, [2.5])
    assert world.gather({"a": 1}) == [{"a": 1}] and world.lead(lambda: (1, 2)) == (1, 2)


def test_torchrun_says_where_this_process_is(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in TORCHRUN.items():
        monkeypatch.setenv(name, value)
    assert place() == Place(3, 4, 1, 2, attempt=2, address="node1", port=29501)
    assert module.processes() == 4
    monkeypatch.setenv("WORLD_SIZE", "four")
    with pytest.raises(Refused, match=r"no number.*four"):
        place()


def test_torchrun_is_told_what_a_process_ends_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What follows another process's end is no cause."""
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

    for name, value in TORCHRUN.items():
        monkeypatch.setenv(name, value)
    path = tmp_path / "error.json"
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(path))
    module.note(LostPeer("training", "another process of the run is gone"))
    module.note(RuntimeError("Connection closed by peer"))
    assert not path.exists()
    module.note(Refused("data.path=nowhere", "there is no such file", "check data.path"))
    failure = ProcessFailure(local_rank=1, pid=1, exitcode=2, error_file=str(path))
    told = str(ChildFailedError("luthier", {3: failure}))
    assert "traceback : data.path=nowhere. there is no such file. check data.path.\n" in told


@pytest.mark.parametrize("name", OTHERS)
@pytest.mark.parametrize("value", ["2", "0", "many"])
def test_launchers_of_others_are_refused(
    monkeypatch: pytest.MonkeyPatch, name: str, value: str
) -> None:
    monkeypatch.setenv(name, value)
    with pytest.raises(Refused, match=rf"{name}={value}.*--nproc") as caught:
        place()
    assert caught.value.exit_code == 2 and module.processes() == 1


def parallel(**keys: Any) -> ParallelConfig:
    return ParallelConfig.model_validate(keys)


@pytest.mark.parametrize(
    ("keys", "processes", "sizes"),
    [
        ({}, 1, (1, 1)),
        ({}, 6, (1, 6)),
        ({"replicate": 2}, 6, (2, 3)),
        ({"replicate": -1}, 6, (6, 1)),
        ({"replicate": -1, "shard": 3}, 6, (2, 3)),
        ({"replicate": 2, "shard": 2}, 4, (2, 2)),
    ],
)
def test_degrees_fill_the_mesh(
    keys: dict[str, Any], processes: int, sizes: tuple[int, int]
) -> None:
    found = mesh_sizes(parallel(**keys), processes)
    assert (found["replicate"], found["shard"]) == sizes
    assert list(found) == ["pipeline", "replicate", "shard", "context", "tensor"]


@pytest.mark.parametrize(
    ("keys", "processes", "message"),
    [
        ({"shard": 2}, 1, "parallel.shard=2.*2 processes, and 1 was started.*--nproc 2"),
        ({"shard": 2}, 3, "2 processes, and 3 were started"),
        ({"replicate": 2}, 3, "2 processes or a multiple, and 3 were started"),
        ({"replicate": 2, "shard": 2}, 8, "4 processes, and 8 were started"),
        ({"tensor": 2}, 3, "parallel.tensor=2 was asked for.*2 processes or a multiple, and 3"),
        ({"context": 2}, 3, "parallel.context=2 was asked for.*2 processes or a multiple, and 3"),
        ({"context_method": "heads"}, 2, "context_method=heads.*parallel.context is 1"),
        ({"pipeline": 2}, 3, "parallel.pipeline=2 was asked for.*2 processes or a multiple, and 3"),
        ({"schedule": "zero_bubble"}, 2, "parallel.schedule=zero_bubble.*parallel.pipeline is 1"),
        ({"virtual_stages": 2}, 2, "parallel.virtual_stages=2.*parallel.pipeline is 1"),
        ({"pipeline": 2, "virtual_stages": 2}, 2, "parallel.virtual_stages=2 with.*1f1b"),
        ({"pipeline": 2, "schedule": "interleaved"}, 2, "interleaved with.*virtual_stages=1"),
        ({"offload": True}, 1, "parallel.offload=true.*parallel.shard is 1"),
    ],
)
def test_meshes_that_cannot_be_are_refused(
    keys: dict[str, Any], processes: int, message: str
) -> None:
    with pytest.raises(Refused, match=message):
        mesh_sizes(parallel(**keys), processes)


def test_what_was_asked_for_and_changes_nothing_is_told() -> None:
    asked = {"stage": 3, "sequence": True}
    stage, sequence = without_effect(parallel(**asked), World().sizes)
    assert stage == "parallel.stage=3 cuts nothing: parallel.shard is 1"
    assert sequence == "parallel.sequence=true cuts nothing: parallel.tensor is 1"
    assert without_effect(parallel(**asked, tensor=2), mesh_sizes(parallel(tensor=2), 4)) == []
    assert without_effect(parallel(), World().sizes) == []


def test_only_one_axis_takes_what_is_left() -> None:
    with pytest.raises(ValueError, match="are all -1"):
        parallel(replicate=-1, shard=-1)
    with pytest.raises(ValueError, match="at least 1"):
        parallel(shard=0)


@pytest.mark.parametrize(
    ("train", "ranks", "stages", "micro"),
    [
        ({"batch": 8}, 1, 2, 2),  # twice as many micro-batches as stages, where it is left to us
        ({"batch": 6}, 1, 4, 1),
        ({"batch": 16}, 2, 2, 2),
        ({"batch": 8, "micro_batch": 4}, 1, 2, 4),
    ],
)
def test_a_pipeline_gets_enough_micro_batches(
    train: dict[str, int], ranks: int, stages: int, micro: int
) -> None:
    assert fit_batch(config(train=train), ranks, stages).train.micro_batch == micro


@pytest.mark.parametrize(
    ("train", "message"),
    [
        ({"batch": 2}, "parallel.pipeline=4 with 2 micro-batches.*train.batch=4 or more"),
        ({"batch": 8, "micro_batch": 4}, "with 2 micro-batches.*train.micro_batch=2 or less"),
        ({"accumulation": 3, "micro_batch": 2}, "with 3 micro-.*train.accumulation=4 or more"),
    ],
)
def test_too_few_micro_batches_are_refused(train: dict[str, int], message: str) -> None:
    with pytest.raises(Refused, match=message):
        fit_batch(config(train=train), 1, 4)


def test_more_stages_than_layers_are_refused() -> None:
    with pytest.raises(Refused, match=r"virtual_stages=2.*4 stages, and the model has 3 layers"):
        check_stages(parallel(pipeline=2, virtual_stages=2, schedule="interleaved"), 2, 3)


def config(**keys: Any) -> Any:
    tree = {"model": {"path": "m"}, "data": {"path": "d"}, "output": "o", **keys}
    return resolved(tree).config


@pytest.mark.parametrize(
    ("train", "ranks", "batch", "micro"),
    [
        ({"batch": 8}, 1, 8, 8),
        ({"batch": 8}, 4, 8, 2),
        ({"batch": 12, "micro_batch": 2}, 3, 12, 2),
        ({"accumulation": 3, "micro_batch": 2}, 1, 6, 2),
        ({"accumulation": 3, "micro_batch": 2}, 4, 24, 2),
    ],
)
def test_the_batch_is_shared_out(train: dict[str, Any], ranks: int, batch: int, micro: int) -> None:
    found = fit_batch(config(train=train), ranks)
    assert (found.batch, found.micro_batch, found.evaluate_micro_batch) == (batch, micro, micro)


@pytest.mark.parametrize(
    ("train", "ranks", "near"),
    [({"batch": 8}, 3, 9), ({"batch": 8, "micro_batch": 4}, 4, 16), ({"batch": 2}, 4, 4)],
)
def test_a_batch_that_cannot_be_shared_out_is_refused(
    train: dict[str, Any], ranks: int, near: int
) -> None:
    with pytest.raises(Refused, match=rf"{ranks} data ranks.*train.batch={near}"):
        fit_batch(config(train=train), ranks)


def test_zero_bubble_needs_layers_that_stay_gathered() -> None:
    sizes = {"shard": 2, "tensor": 1}
    for stage in (1, 2, 3):
        given = {"pipeline": 2, "schedule": "zero_bubble", "stage": stage}
        with (
            pytest.raises(Refused, match=r"zero_bubble with parallel.stage=3")
            if stage == 3
            else nullcontext()
        ):
            check_sharding(config(parallel=given), sizes)


def test_compiled_layers_that_cannot_be() -> None:
    for parallel_keys, sizes, told in (
        ({"pipeline": 2, "schedule": "zero_bubble"}, {"context": 1}, "zero_bubble with train.comp"),
        ({"context": 2}, {"context": 2}, "train.compile=true with parallel.context=2"),
    ):
        chosen = config(parallel=parallel_keys, train={"compile": True})
        with pytest.raises(Refused, match=told):
            check_sharding(chosen, {"shard": 1, "tensor": 1, **sizes})


@pytest.mark.parametrize("name", ["adamw_mini", "adafactor"])
def test_optimisers_that_need_whole_tensors(name: str) -> None:
    chosen = config(optim={"name": name})
    check_sharding(chosen, {"shard": 1, "context": 1, "tensor": 1})
    with pytest.raises(Refused, match=rf"optim.name={name} with parallel.shard=2"):
        check_sharding(chosen, {"shard": 2, "context": 1, "tensor": 1})
    with pytest.raises(Refused, match=rf"optim.name={name} with parallel.tensor=2"):
        check_sharding(chosen, {"shard": 1, "context": 1, "tensor": 2})
