"""A resumed run is the same run: bit for bit, at every step, after kills, torn checkpoints and signals."""

import json
import multiprocessing
import os
import random
import signal
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from small_run import STDERR, Rows, child, everything, fit, real_loader, same, small_run, write_rows

from luthier.errors import Refused, Stopped
from luthier.files import damage
from luthier.train.checkpoint import find
from luthier.train.metrics import read_metrics
from luthier.train.state import Stored

TENSORS = "training_state-00000.safetensors"

STEPS = 7  # the stand-in data has three steps an epoch
TIMES = {"tokens_per_second", "step_seconds", "wait_seconds", "memory", "eta_seconds"}
PLANNED = {"progress", "total_steps"}  # differ when a finished run is extended


def measured(output: Path) -> list[dict[str, Any]]:
    """What metrics.jsonl says about training and evaluation, without times."""
    records = read_metrics(output / "metrics.jsonl")
    return [
        {k: v for k, v in r.items() if k not in TIMES | PLANNED}
        for r in records
        if r["kind"] in ("train", "evaluate")
    ]


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    """`reference(**options)`: what an uninterrupted run ends with."""
    made = {}

    def run(**options):
        key = json.dumps(options, default=str, sort_keys=True)
        if key not in made:
            output = tmp_path_factory.mktemp("reference")
            trainer, result = fit(output, steps=STEPS, **options)
            made[key] = everything(trainer), measured(output), result.final_step
        return made[key]

    return run


@pytest.mark.parametrize("stop", range(1, STEPS))
def test_a_run_resumed_at_any_step_equals_the_uninterrupted_one(tmp_path, reference, stop):
    weights, records, final = reference(evaluate_every="epoch")
    fit(tmp_path, steps=stop, evaluate_every="never", every="end")
    # an evaluation that was due in the first part is made up for, or its epoch is over
    resumed, result = fit(tmp_path, steps=STEPS, evaluate_every="epoch")
    assert same(everything(resumed), weights)
    train = [r for r in records if r["kind"] == "train"]
    assert [r for r in measured(tmp_path) if r["kind"] == "train"] == train
    assert result.step == STEPS and final == result.final_step


VARIANTS = {
    "lora with dropout": {"method": "lora"},
    "bfloat16 with masters": {"dtype": torch.bfloat16},
    "float16 while it overflows": {"dtype": torch.float16, "scale": 2.0**18},
    "float64": {"dtype": torch.float64},
    "sgd": {"optimizer": "sgd"},
    "adamw_mini": {"optimizer": "adamw_mini"},
    "adafactor": {"optimizer": "adafactor"},
    "logging every third step": {"log_every": 3},
    "saving every second step": {"every": 2, "evaluate_every": 2},
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_run_stopped_twice_equals_the_uninterrupted_one(tmp_path, reference, variant):
    options = VARIANTS[variant]
    weights, records, final = reference(**options)
    for stop in (2, 4):
        trainer = small_run(tmp_path, steps=STEPS, **options)
        schedule = trainer.schedule

        def interrupted(step: int, stop=stop, schedule=schedule) -> float:
            if step == stop - 1:
                os.kill(os.getpid(), signal.SIGTERM)
            return schedule(step)

        trainer.schedule = interrupted
        with pytest.raises(Stopped, match=f"after step {stop}"):
            trainer.fit(trainer.start_from)  # pyright: ignore[reportAttributeAccessIssue]
    resumed, result = fit(tmp_path, steps=STEPS, **options)
    assert same(everything(resumed), weights)
    assert measured(tmp_path) == records
    assert result.final_step == final


def test_a_resumed_run_may_cut_its_steps_differently(tmp_path, reference):
    """train.micro_batch may change (rule 2): equal up to the order of sums."""
    weights, _, _ = reference()
    fit(tmp_path, steps=3)
    resumed, _ = fit(tmp_path, steps=STEPS, micro_batch=4)
    for name, tensor in everything(resumed).items():
        torch.testing.assert_close(tensor, weights[name], rtol=1e-3, atol=1e-5)


def test_a_finished_run_has_nothing_left_to_do(tmp_path, reference):
    weights, records, _ = reference()
    fit(tmp_path, steps=STEPS)
    stamp = (tmp_path / "checkpoints" / f"step-{STEPS}" / TENSORS).stat().st_mtime_ns
    again, result = fit(tmp_path, steps=STEPS)
    assert result.step == STEPS and same(everything(again), weights)
    assert measured(tmp_path) == records
    assert stamp == (tmp_path / "checkpoints" / f"step-{STEPS}" / TENSORS).stat().st_mtime_ns


def test_a_torn_checkpoint_falls_back_to_the_newest_whole_one_and_says_so(tmp_path, reference):
    weights, records, _ = reference()
    fit(tmp_path, steps=5)
    newest = tmp_path / "checkpoints/step-5"
    file = newest / TENSORS
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1  # one bit
    file.write_bytes(data)
    resumed, result = fit(tmp_path, steps=STEPS)
    assert same(everything(resumed), weights)
    assert measured(tmp_path) == records
    told = [r["text"] for r in read_metrics(tmp_path / "metrics.jsonl") if r["kind"] == "remark"]
    for remarks in (result.remarks, told):
        assert any("step-5 is not whole" in text and TENSORS in text for text in remarks)
        assert any("going on from" in text and "step-4" in text for text in remarks)


def test_resuming_from_a_checkpoint_of_another_folder(tmp_path, reference):
    weights, _, _ = reference()
    fit(tmp_path / "a", steps=4)
    resumed, result = fit(
        tmp_path / "b", steps=STEPS, resume=str(tmp_path / "a/checkpoints/step-4")
    )
    assert same(everything(resumed), weights)
    # the best so far is a step whose weights are not in this folder
    assert any("is not there any more" in text for text in result.remarks)
    assert result.final_step > 4
    assert damage(tmp_path / "a/checkpoints/step-4") is None


def test_a_signal_right_after_resuming_from_another_folder_saves_in_this_one(tmp_path):
    fit(tmp_path / "a", steps=2)
    trainer = small_run(tmp_path / "b", resume=str(tmp_path / "a/checkpoints/step-2"))
    load = trainer.updater.load_weights

    def interrupted(stored: Stored) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        load(stored)

    trainer.updater.load_weights = interrupted
    with pytest.raises(Stopped, match="after step 2"):
        trainer.fit(trainer.start_from)  # pyright: ignore[reportAttributeAccessIssue]
    assert damage(tmp_path / "b/checkpoints/step-2") is None


def test_the_best_of_the_first_part_is_the_best_of_the_whole(tmp_path):
    losses = {1: 3.0, 2: 1.0, 3: 2.0, 4: 2.5}
    trainer = small_run(tmp_path, steps=3, evaluate_every=1, keep=1)
    trainer.evaluate = lambda: {"loss": losses[trainer.done]}
    trainer.fit()
    again = small_run(tmp_path, steps=4, evaluate_every=1, keep=1)
    again.evaluate = lambda: {"loss": losses[again.done]}
    result = again.fit(again.start_from)  # pyright: ignore[reportAttributeAccessIssue]
    assert result.final_step == 2 and result.evaluation == {"loss": 1.0}


def test_another_metric_for_the_best_is_sought_from_there_on(tmp_path):
    fit(tmp_path, steps=2, evaluate_every=1)
    trainer = small_run(tmp_path, steps=4, evaluate_every=1, best="accuracy", minimise=False)
    trainer.evaluate = lambda: {"loss": 0.0, "accuracy": {3: 0.5, 4: 0.4}[trainer.done]}
    result = trainer.fit(trainer.start_from)  # pyright: ignore[reportAttributeAccessIssue]
    assert result.final_step == 3


@pytest.mark.parametrize(("data", "final"), [("a", 1), ("b", 3)])
def test_the_best_on_other_evaluation_data_is_forgotten(tmp_path, data, final):
    """Its value does not compare: what is measured from there on decides, step 2's own weights included."""
    trainer = small_run(tmp_path, steps=2, evaluate_every=1)
    trainer.evaluation_data = "a"
    trainer.evaluate = lambda: {"loss": 1.0}
    trainer.fit()
    again = small_run(tmp_path, steps=4, evaluate_every=1)
    again.evaluation_data, measured = data, []

    def evaluate() -> dict[str, float]:
        measured.append(again.done)
        return {"loss": {2: 7.0, 3: 5.0, 4: 6.0}[again.done]}

    again.evaluate = evaluate
    result = again.fit(again.start_from)  # pyright: ignore[reportAttributeAccessIssue]
    assert measured == ([3, 4] if data == "a" else [2, 3, 4])
    said = any("was measured on other evaluation data" in remark for remark in result.remarks)
    assert said == (data == "b")
    assert result.final_step == final


def test_another_config_is_refused_and_nothing_is_lost(tmp_path):
    fit(tmp_path, steps=2)
    before = (tmp_path / "metrics.jsonl").read_bytes()
    with pytest.raises(Refused, match=r"train.seed was 1, now 2"):
        fit(tmp_path, steps=4, identity={"train.seed": 2})
    assert (tmp_path / "metrics.jsonl").read_bytes() == before
    with pytest.raises(Refused, match="holds another run"):
        fit(tmp_path, steps=4, resume="never")


# ---- processes that are killed


@pytest.fixture(scope="module")
def start():
    """`start(output, **options)`: a run in a process forked from one that has imported everything."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["small_run"])

    started = []

    def run(output: Path, **options: Any):
        process = context.Process(target=child, args=(str(output), options))
        with pytest.MonkeyPatch.context() as environment:
            # the server that imports for all is started by the first process
            environment.setenv("PYTHONPATH", os.pathsep.join(filter(None, sys.path)))
            process.start()
        started.append(process)
        return process

    yield run
    for process in started:
        process.kill()  # does nothing to those that have ended


def wait_for(path: Path, text: str, process) -> None:
    while not (path.exists() and text in path.read_text()):
        assert process.is_alive(), "the run ended too early"
        time.sleep(0.005)


@pytest.mark.parametrize("seed", [1, 2])
def test_a_run_killed_at_random_moments_ends_the_same(tmp_path, reference, start, seed):
    weights, records, _ = reference()
    random_moment, kills = random.Random(seed), 0
    while kills < 4:
        process = start(tmp_path, steps=STEPS, pause=0.05)
        wait_for(tmp_path / "metrics.jsonl", '"start"', process)
        process.join(random_moment.uniform(0.0, 0.3))
        if process.exitcode is not None:
            assert process.exitcode == 0
            break
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        kills += 1
    assert kills > 0
    resumed, result = fit(tmp_path, steps=STEPS)
    assert result.step == STEPS
    assert same(everything(resumed), weights)
    assert measured(tmp_path) == records
    assert not list(tmp_path.rglob(".partial-*"))


@pytest.mark.parametrize("kind", ["packed", "lazy"])
def test_a_killed_run_on_the_real_loader_ends_the_same(tmp_path, start, kind):
    data = write_rows(tmp_path / "data")
    options = {"steps": 6, "method": "lora", "every": 2, "evaluate_every": "never"}
    expected, _ = fit(tmp_path / "a", data=real_loader(data, kind), **options)
    process = start(tmp_path / "b", data=(str(data), kind), pause=0.02, **options)
    wait_for(tmp_path / "b/metrics.jsonl", '"checkpoint", "step": 2', process)
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    assert find(tmp_path / "b", "auto").path is not None
    resumed, _ = fit(tmp_path / "b", data=real_loader(data, kind), **options)
    assert same(everything(resumed), everything(expected))
    assert measured(tmp_path / "b") == measured(tmp_path / "a")


def test_sigterm_ends_a_process_with_143_after_saving(tmp_path, start):
    process = start(tmp_path, steps=2000, every="never", evaluate_every="never")
    wait_for(tmp_path / "metrics.jsonl", '"step": 3', process)
    os.kill(process.pid, signal.SIGTERM)
    process.join(60)
    assert process.exitcode == 128 + signal.SIGTERM
    (saved,) = tmp_path.glob("checkpoints/*")
    assert damage(saved) is None
    text = (tmp_path / STDERR).read_text()
    assert "SIGTERM: stopping after this step" in text
    assert f"saved as {saved}" in text and "checkpoint.resume=auto" in text


def test_a_second_signal_ends_at_once(tmp_path, start):
    # the step never ends by itself
    process = start(tmp_path, steps=3, hang=True, every="never", evaluate_every="never")
    wait_for(tmp_path / STDERR, "in the step", process)
    os.kill(process.pid, signal.SIGINT)
    process.join(0.5)
    assert process.is_alive()
    os.kill(process.pid, signal.SIGINT)
    process.join(60)
    assert process.exitcode == 128 + signal.SIGINT
    assert not (tmp_path / "checkpoints").exists()


def test_the_stand_in_data_gives_each_epoch_another_order():
    data = Rows()
    assert data.order(0) != data.order(1) and data.steps_per_epoch == 3
