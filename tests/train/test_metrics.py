"""Metrics: the JSON lines, what a resume drops, sinks, the terminal."""

import importlib.util
import io
import json
import sys
import types

import pytest
import torch

from luthier.errors import Failed, Refused
from luthier.train import progress, sinks
from luthier.train.metrics import Metrics, StepReport, Window, cut_back, memory, read_metrics


def lines(output) -> list[dict]:
    def never(constant: str):
        raise AssertionError(f"{constant} is no JSON")

    text = (output / "metrics.jsonl").read_text("utf-8")
    return [json.loads(line, parse_constant=never) for line in text.splitlines()]


TRAIN = {"loss": 1.5, "lr": 1e-3, "tokens_per_second": 10.0, "total_steps": 4, "progress": 0.5}


def test_each_record_is_one_line_of_json_without_nan(tmp_path):
    with Metrics(tmp_path / "new", progress="none") as metrics:
        metrics.start()
        nested = {"loss": float("nan"), "norms": [1.0, float("inf")], "path": tmp_path, "text": "é"}
        metrics.log("train", 1, nested)
        assert lines(tmp_path / "new")  # at once, not when closed
        metrics.remark("note", 1)
    first, second = lines(tmp_path / "new")
    assert first == {
        "kind": "train",
        "step": 1,
        "loss": None,
        "norms": [1.0, None],
        "path": str(tmp_path),
        "text": "é",
    }
    assert second == {"kind": "remark", "step": 1, "text": "note"}


def test_a_resume_drops_what_came_after_the_checkpoint_and_torn_lines(tmp_path):
    with Metrics(tmp_path, progress="none") as metrics:
        metrics.start()
        for step in (1, 2, 3):
            metrics.log("train", step, {"loss": 1.0})
            metrics.log("evaluate", step, {"loss": 2.0})
    path = tmp_path / "metrics.jsonl"
    path.write_text(path.read_text() + '{"kind": "train", "step": 4, "lo')
    with Metrics(tmp_path, progress="none") as metrics:
        metrics.start(2)
        metrics.log("train", 3, {"loss": 3.0})
    assert [(r["kind"], r["step"]) for r in lines(tmp_path)] == [
        ("train", 1),
        ("evaluate", 1),
        ("train", 2),
        ("evaluate", 2),
        ("train", 3),
    ]
    cut_back(path, 2, evaluated=False)
    assert [(r["kind"], r["step"]) for r in lines(tmp_path)][-1] == ("train", 2)
    cut_back(path, 0)
    assert path.read_text() == ""


def test_nothing_is_written_before_the_start(tmp_path):
    metrics = Metrics(tmp_path / "out", sinks=["tensorboard"], progress="rich")
    with pytest.raises(ValueError, match="before start"):
        metrics.log("train", 1, {})
    metrics.flush()
    metrics.close()
    assert not (tmp_path / "out").exists()


def test_closing_does_not_hide_the_first_error(tmp_path, monkeypatch):
    def close() -> None:
        raise OSError("second")

    metrics = Metrics(tmp_path, progress="none")
    metrics.start()
    monkeypatch.setattr(metrics, "close", close)
    with pytest.raises(ValueError, match="first"), metrics:
        raise ValueError("first")
    with pytest.raises(OSError, match="second"), metrics:
        pass
    monkeypatch.undo()
    metrics.close()


def test_a_window_is_a_mean_over_tokens():
    window = Window()
    window.add(StepReport(1, 0.1, 10, 40, 50, loss=2.0, grad_norm=1.0, seconds=2.0, wait=0.5))
    window.add(StepReport(2, 0.1, 30, 60, 70, loss=4.0, grad_norm=1.0, seconds=3.0, wait=0.1))
    window.add(StepReport(3, 0.1, 0, 0, 80, skipped="no supervised token", seconds=1.0))
    assert window.values() == {
        "loss": pytest.approx(3.5),
        "tokens_per_second": pytest.approx(100 / 6),
        "supervised_share": pytest.approx(0.4),
        "padding_share": pytest.approx(0.5),
        "step_seconds": pytest.approx(2.0),
        "wait_seconds": pytest.approx(0.2),
        "skipped_steps": 1,
    }
    assert Window().values()["loss"] is None


def test_memory_grows_and_its_peak_stays():
    before = memory("cpu")
    if before.now is None or before.peak is None:
        pytest.skip("this system does not tell a process's memory")
    size = 200 * 2**20
    held = torch.ones(size // 4)
    during = memory("cpu")
    del held
    assert during.now is not None and during.peak is not None
    assert during.now - before.now > 0.9 * size
    slack = 2**21  # the kernel's counters lag by some pages per thread
    assert during.peak >= max(before.peak, during.now) - slack
    after = memory("cpu")
    assert after.peak is not None and after.peak >= during.peak - slack


# ---- sinks


def test_tensorboard_shows_the_numbers_and_purges_what_a_resume_redoes(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for start, steps, value in ((0, (1, 2, 3), 1.0), (2, (3, 4), 9.0)):
        with Metrics(tmp_path, sinks=["tensorboard"], progress="none") as metrics:
            metrics.start(start)
            for step in steps:
                metrics.log("train", step, {"loss": value, "text": "no number", "grad_norm": None})
            metrics.log("evaluate", steps[-1], {"accuracy": 0.5})
            metrics.remark("not a curve", steps[-1])
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert set(events.Tags()["scalars"]) == {"train/loss", "evaluate/accuracy"}
    found = [(e.step, e.value) for e in events.Scalars("train/loss")]
    assert found == [(1, 1.0), (2, 1.0), (3, 9.0), (4, 9.0)]


class Recorder:
    """Stands for the package of a service: notes each call."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, tuple, dict]] = []

    def __getattr__(self, name: str):
        def call(*args, **kwargs):
            self.calls.append((name, args, kwargs))
            return self

        return call


@pytest.mark.parametrize(
    ("name", "opened", "logged", "closed"),
    [
        ("wandb", "init", "log", "finish"),
        ("mlflow", "start_run", "log_metrics", "end_run"),
        ("swanlab", "init", "log", "finish"),
        ("trackio", "init", "log", "finish"),
    ],
)
def test_services_get_numbers_by_step(tmp_path, monkeypatch, name, opened, logged, closed):
    recorder = Recorder()
    module = types.ModuleType(name)
    module.__getattr__ = recorder.__getattr__  # pyright: ignore[reportAttributeAccessIssue]
    module.__spec__ = importlib.util.spec_from_loader(name, None)
    monkeypatch.setitem(sys.modules, name, module)
    with Metrics(tmp_path / "run", sinks=[name], progress="none", config={"a": 1}) as metrics:
        metrics.start()
        metrics.log("train", 7, {"loss": 1.5, "lr": float("nan")})
    calls = [call for call, _, _ in recorder.calls]
    assert calls.index(opened) < calls.index(logged) < calls.index(closed)
    args, kwargs = next((a, k) for call, a, k in recorder.calls if call == logged)
    assert args[0] == {"train/loss": 1.5} and (kwargs["step"] == 7)
    assert any("run" in [*k.values()] for _, _, k in recorder.calls)  # the folder names the run
    assert any({"a": 1} in [*a, *k.values()] for _, a, k in recorder.calls)


class Breaking:
    """A service that is down from the second record on, or from the start."""

    def __init__(self, output, step, config) -> None:
        self.steps: list[int] = []
        if config:
            raise ConnectionError("no server")

    def log(self, step, values) -> None:
        self.steps.append(step)
        if step == 2:
            raise ConnectionError("no server")

    def close(self) -> None:
        pass


def test_a_service_that_fails_is_left_out_and_the_run_goes_on(tmp_path, monkeypatch):
    monkeypatch.setitem(sinks.SINKS, "json", Breaking)
    with Metrics(tmp_path, sinks=["json"], progress="none") as metrics:
        metrics.start()
        (sink,) = metrics._sinks
        for step in (1, 2, 3):
            metrics.log("train", step, {"loss": 1.0})
    assert sink.steps == [1, 2]  # pyright: ignore[reportAttributeAccessIssue]
    records = lines(tmp_path)
    assert [r["step"] for r in records if r["kind"] == "train"] == [1, 2, 3]
    (remark,) = (r["text"] for r in records if r["kind"] == "remark")
    assert "Breaking gets no more metrics (ConnectionError: no server)" in remark


def test_a_service_that_cannot_be_opened_stops_the_run(tmp_path, monkeypatch):
    monkeypatch.setitem(sinks.SINKS, "json", Breaking)
    metrics = Metrics(tmp_path, sinks=["json"], progress="none", config={"a": 1})
    with metrics, pytest.raises(Failed, match=r"log.sinks=json. ConnectionError: no server"):
        metrics.start()


def test_a_sink_without_its_package_is_refused(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(Refused, match=r"log.sinks=wandb.*pip install 'luthier\[wandb\]'"):
        sinks.check_sinks(["wandb"])


# ---- the terminal


def test_plain_lines_are_few_and_go_to_stderr(capsys, monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: clock[0])
    shown = progress.open_progress("plain")
    for step in range(1, 31):
        clock[0] += 1.0
        shown.show("train", step, TRAIN | {"progress": step / 30})
    shown.show("remark", 30, {"text": "a remark"})
    shown.show("evaluate", 30, {"loss": 1.25, "tokens": 7})
    shown.show("checkpoint", 30, {"path": "out/checkpoints/step-30", "best": True})
    shown.show("start", 30, {"resumed": False})
    captured = capsys.readouterr()
    assert captured.out == ""
    text = captured.err.splitlines()
    assert [line.split()[1] for line in text[:-3]] == ["1/4", "11/4", "21/4", "30/4"]
    assert text[0] == "step 1/4  loss 1.5000  lr 0.001  10 tok/s"
    assert text[-3:] == [
        "a remark",
        "evaluated at step 30: loss 1.2500",
        "saved out/checkpoints/step-30 (best so far)",
    ]


def test_a_line_says_memory_and_time_left_and_bears_missing_values():
    text = progress.line("train", 3, TRAIN | {"memory": 3 * 2**29, "eta_seconds": 3725.4})
    assert text.endswith("1.50 GiB  1:02:05 left")
    text = progress.line("train", 3, {"loss": None, "lr": 0.0, "eta_seconds": 65.0})
    assert text == "step 3  loss -  lr 0  1:05 left"


def test_auto_is_a_live_display_on_a_terminal_only(monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    assert isinstance(progress.open_progress("auto"), progress.Plain)
    screen = Terminal()
    monkeypatch.setattr(sys, "stderr", screen)
    monkeypatch.setenv("TERM", "xterm")
    shown = progress.open_progress("auto")
    assert isinstance(shown, progress.Rich)
    shown.show("train", 1, TRAIN)
    shown.activity("evaluating", 1, 4)
    shown.show("remark", 1, {"text": "a [bold] remark"})
    shown.activity("", None, None)
    shown.close()
    text = screen.getvalue()
    assert "step 1/4" in text and "tok/s" in text and " 50%" in text
    assert "a [bold] remark" in text
    assert text.rstrip().endswith("\x1b[?25h")  # the cursor is back


def test_none_shows_nothing(capsys):
    shown = progress.open_progress("none")
    shown.show("train", 1, TRAIN)
    shown.activity("x", 1, 2)
    shown.close()
    assert capsys.readouterr() == ("", "")


def test_records_of_an_unreadable_line_are_left_out(tmp_path):
    path = tmp_path / "m.jsonl"
    path.write_bytes(
        b'{"kind": "a", "step": 1}\n[1]\n\xff\xfe\n{"step": 2}\n{"kind": "b", "step": 3}\n'
    )
    assert [r["kind"] for r in read_metrics(path)] == ["a", "b"]
