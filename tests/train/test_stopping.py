"""How a run ends before its time: signals at any moment, unexpected errors."""

import os
import signal
from pathlib import Path

import pytest
from small_run import Changed, everything, fit, same, small_run

from luthier.batch import Batch
from luthier.errors import Failed, Stopped
from luthier.files import damage
from luthier.train.metrics import read_metrics


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_finishes_the_step_saves_and_says_how_to_go_on(tmp_path, number):
    trainer = small_run(tmp_path, every="never", evaluate_every="never")
    schedule, handler = trainer.schedule, signal.getsignal(number)

    def interrupted(step: int) -> float:
        if step == 2:
            os.kill(os.getpid(), number)
        return schedule(step)

    trainer.schedule = interrupted
    with pytest.raises(Stopped, match=r"after step 3.*resume=auto") as caught:
        trainer.fit()
    assert caught.value.exit_code == 128 + number
    assert [p.name for p in tmp_path.glob("checkpoints/*")] == ["step-3"]
    assert signal.getsignal(number) is handler


def test_a_signal_before_the_first_step_has_nothing_to_save(tmp_path, monkeypatch):
    trainer = small_run(tmp_path)
    start = trainer.metrics.start

    def interrupted(*args, **kwargs) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        start(*args, **kwargs)

    monkeypatch.setattr(trainer.metrics, "start", interrupted)
    with pytest.raises(Stopped, match="nothing was trained"):
        trainer.fit()
    assert not (tmp_path / "checkpoints").exists()


def test_a_signal_ends_an_evaluation_which_the_resumed_run_makes_up_for(tmp_path):
    plain, expected = fit(tmp_path / "a", steps=6)
    trainer = small_run(tmp_path / "b", steps=6)
    evaluate, calls = trainer.evaluate, []

    def interrupted() -> dict[str, float]:
        calls.append(trainer.done)
        os.kill(os.getpid(), signal.SIGTERM)
        raise AssertionError("the signal should have ended the evaluation")

    trainer.evaluate = interrupted
    with pytest.raises(Stopped, match="after step 3"):
        trainer.fit()
    assert evaluate and calls == [3]
    resumed, result = fit(tmp_path / "b", steps=6)
    assert same(everything(plain), everything(resumed))
    assert result.evaluation == expected.evaluation
    for name in ("a", "b"):
        records = read_metrics(tmp_path / name / "metrics.jsonl")
        assert [r["step"] for r in records if r["kind"] == "evaluate"] == [3, 6]
        assert [r["step"] for r in records if r["kind"] == "train"] == [1, 2, 3, 4, 5, 6]


def test_an_unexpected_error_leaves_the_checkpoints_and_says_where_to_go_on(tmp_path):
    def change(index: int, batch: Batch) -> Batch:
        if index == 2:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory")
        return batch

    with pytest.raises(Failed) as caught:
        fit(tmp_path, data=Changed(change), evaluate_every="never")
    text = str(caught.value)
    assert "after step 2" in text and "can't allocate memory" in text
    assert f"{Path('checkpoints') / 'step-2'}" in text and "micro_batch" in text
    assert isinstance(caught.value.__cause__, RuntimeError)
    assert damage(tmp_path / "checkpoints/step-2") is None


def test_a_signal_ends_the_evaluation_before_the_first_step(tmp_path):
    trainer = small_run(tmp_path)

    def interrupted() -> dict[str, float]:
        os.kill(os.getpid(), signal.SIGTERM)
        raise AssertionError("the signal should have ended the evaluation")

    trainer.before = interrupted
    with pytest.raises(Stopped, match="nothing was trained"):
        trainer.fit()
    again = small_run(tmp_path, steps=2)
    again.before = lambda: {"loss": 7.0}
    again.fit()
    records = read_metrics(tmp_path / "metrics.jsonl")
    assert next((r["step"], r["loss"]) for r in records if r["kind"] == "evaluate") == (0, 7.0)
    third = small_run(tmp_path, steps=3)
    third.before = interrupted  # a resumed run does not begin again
    third.fit(third.start_from)  # pyright: ignore[reportAttributeAccessIssue]
