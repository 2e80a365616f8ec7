"""Ranks that are killed, stopped and hung at any moment: the job goes on as if nothing had been."""

from __future__ import annotations

import json
import os
import random
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from killed_ranks import HANG, Ranks, kill_until_done, result, saving, trained
from tiny_runs import tiny_config, write_data

from luthier.files import damage
from luthier.train.checkpoint import steps_in
from luthier.train.metrics import read_metrics

FULL = {"adapter__method": "none", "adapter__rank": None}
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "one": (1, {}),
    "copies": (2, {"parallel__replicate": 2, "parallel__shard": 1}),
    "shards": (2, {"parallel__shard": 2} | FULL),
    "stage 3": (2, {"parallel__shard": 2, "parallel__stage": 3} | FULL),
    "tensor": (2, {"parallel__tensor": 2, "parallel__shard": 1} | FULL),
    "four": (4, {"parallel__replicate": 2, "parallel__shard": 2} | FULL),
}


@pytest.fixture
def job(tmp_path: Path, model_folder: Callable[[str], Path]) -> Callable[..., list[str]]:
    """`job(**keys)`: the words of a run of 10 steps that saves at every second one."""

    def make(**keys: Any) -> list[str]:
        data = write_data(tmp_path / "data", train=20, dev=4)
        given = {"train__steps": 10, "checkpoint__every": 2, "evaluate__every": "never"} | keys
        tree = tiny_config(model_folder("llama"), data, tmp_path / "unused", **given)
        (tmp_path / "run.yaml").write_text(yaml.safe_dump(tree))
        return ["finetune", str(tmp_path / "run.yaml")]

    return make


def undisturbed(words: list[str], size: int, folder: Path) -> Any:
    output = folder / "whole" / "out"
    output.parent.mkdir()
    run = Ranks([*words, f"output={output}"], size, output.parent)
    assert run.wait() == [0] * size, run.text()
    return result(output)


def disturbed(
    layout: str, job: Callable[..., list[str]], folder: Path, kills: int, seed: int
) -> Any:
    size, keys = LAYOUTS[layout]
    words = job(**keys)
    expected = undisturbed(words, size, folder)
    output = folder / "killed" / "out"
    output.parent.mkdir()
    counts = kill_until_done(words, size, output, random.Random(seed), kills)
    assert result(output) == expected
    return counts


@pytest.mark.parametrize(("layout", "seed"), [("copies", 1), ("shards", 2)])
def test_killed_ranks_change_nothing(
    layout: str, seed: int, job: Callable[..., list[str]], tmp_path: Path
) -> None:
    counts = disturbed(layout, job, tmp_path, 3, seed)
    assert counts["kills"] == 3 and counts["saving"] >= 1


@pytest.mark.long
@pytest.mark.parametrize("layout", LAYOUTS)
def test_many_killed_ranks_change_nothing(
    layout: str, job: Callable[..., list[str]], tmp_path: Path
) -> None:
    """Ten kills in each layout; the counts go to the file that LUTHIER_KILLS names."""
    counts: dict[str, Any] = {"layout": layout, "kills": 0, "saving": 0, "first": 0, "recovery": []}
    for seed in range(3):
        folder = tmp_path / str(seed)
        folder.mkdir()
        for name, value in disturbed(layout, job, folder, 4, seed).items():
            counts[name] = counts.get(name, type(value)()) + value
    assert counts["kills"] >= 9 and counts["saving"] >= 3
    if path := os.environ.get("LUTHIER_KILLS"):
        with Path(path).open("a") as file:
            file.write(json.dumps(counts) + "\n")


def test_a_copy_that_is_left_saves_the_last_finished_step(
    job: Callable[..., list[str]], tmp_path: Path
) -> None:
    size, keys = LAYOUTS["copies"]
    words, output = job(**keys, train__steps=10**4, checkpoint__every="end"), tmp_path / "out"
    run = Ranks([*words, f"output={output}"], size, tmp_path)
    run.wait_for(lambda: max(trained(output), default=0) >= 5)
    run.signal(0, signal.SIGKILL)  # rank 0, which writes everything
    assert run.end_rest()[0] == -signal.SIGKILL
    ((step, path),) = steps_in(output)
    assert step >= 5 and damage(path) is None
    assert f"the last finished step, {step}, was saved as {path}" in run.notes()[1].text
    again = Ranks([*words, f"output={output}", f"train.steps={step + 2}"], size, tmp_path, 1)
    assert again.wait() == [0, 0], again.text()
    assert trained(output)[-2:] == [step + 1, step + 2]
    (told,) = [r for r in read_metrics(output / "metrics.jsonl") if r["kind"] == "restart"]
    assert told["reason"] == "a test" and told["recovery_seconds"] > 0


def test_a_rank_that_is_gone_when_the_first_save_begins_is_noticed(
    job: Callable[..., list[str]], tmp_path: Path
) -> None:
    """No signal is needed: what the ranks of a save exchange is over connections that end with a rank."""
    size, keys = LAYOUTS["copies"]
    output = tmp_path / "out"
    run = Ranks([*job(**keys), f"output={output}"], size, tmp_path, dies=1)
    assert run.wait() == [1, -signal.SIGKILL], run.text()
    assert run.notes()[0].lost and "another process of the run is gone" in run.notes()[0].text
    ((step, path),) = steps_in(output)
    assert step == 2 and damage(path) is None


@pytest.mark.parametrize(
    "stop", [True, pytest.param(False, marks=pytest.mark.long)], ids=["stop", "go on"]
)
def test_a_rank_that_cannot_write_is_heard_on_all(
    stop: bool, job: Callable[..., list[str]], tmp_path: Path
) -> None:
    """Rank 1 has room for 20 kB a file: no checkpoint gets whole, and what that means is asked of the config."""
    size, keys = LAYOUTS["shards"]
    output = tmp_path / "out"
    words = job(**keys, train__steps=10**4, checkpoint__on_failure="stop" if stop else "continue")
    run = Ranks([*words, f"output={output}"], size, tmp_path, limits={1: 20_000})
    if stop:
        assert run.wait() == [1, 1], run.text()
        assert trained(output)[-1] <= 4  # the first save began after step 2
        assert "File too large" in run.notes()[0].text
    else:
        run.wait_for(lambda: trained(output)[-1:] >= [6])
        assert run.alive, run.text()
        run.end()
        told = [r["text"] for r in read_metrics(output / "metrics.jsonl") if r["kind"] == "remark"]
        assert sum("NOT SAVED: writing" in text for text in told) >= 2
    assert not steps_in(output)
    assert not saving(output) or not stop


def test_sigterm_of_one_rank_saves_on_all(job: Callable[..., list[str]], tmp_path: Path) -> None:
    size, keys = LAYOUTS["shards"]
    output = tmp_path / "out"
    words = job(**keys, train__steps=10**4, checkpoint__every="never")
    run = Ranks([*words, f"output={output}"], size, tmp_path)
    run.wait_for(lambda: max(trained(output), default=0) >= 2)
    begin = time.monotonic()
    run.signal(1, signal.SIGTERM)
    assert run.wait() == [143, 143]
    assert time.monotonic() - begin < 120
    ((_, path),) = steps_in(output)
    assert damage(path) is None


def test_a_stopped_rank_is_noticed_and_the_others_tell_where_they_are(
    job: Callable[..., list[str]], tmp_path: Path
) -> None:
    size, keys = LAYOUTS["shards"]
    output = tmp_path / "out"
    words = job(**keys, train__steps=10**4, train__hang_timeout=1.5, checkpoint__every="never")
    run = Ranks([*words, f"output={output}"], size, tmp_path)
    run.wait_for(lambda: max(trained(output), default=0) >= 2)
    run.signal(1, signal.SIGSTOP)
    run.processes[0].join(HANG)
    assert run.processes[0].exitcode == 1
    run.end()
    assert "nothing moved for" in run.notes()[0].text
    (stacks,) = output.glob("stacks/step-*-rank-0.txt")
    assert "loop.py" in stacks.read_text()
