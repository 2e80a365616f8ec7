"""After 20 steps a run sets its plan beside what it took."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tiny_runs import tiny_config, write_data

from luthier.recipes import finetune
from luthier.train.loop import COMPARED
from luthier.train.metrics import read_metrics


@pytest.fixture(scope="module")
def run_folders(model_folder: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    return model_folder("llama"), write_data(tmp_path_factory.mktemp("data"))


def run(folders: Any, output: Path, **keys: Any) -> list[dict[str, Any]]:
    model, data = folders
    finetune(tiny_config(model, data, output, evaluate__every="never", **keys))
    return [r for r in read_metrics(output / "metrics.jsonl") if r["kind"] == "plan"]


def test_prediction_and_measurement_stand_side_by_side(
    run_folders: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (record,) = run(run_folders, tmp_path / "run", train__steps=COMPARED + 2, log__progress="plain")
    assert record["step"] == COMPARED
    for what in ("memory", "seconds"):
        predicted, measured = record[f"predicted_{what}"], record[f"measured_{what}"]
        assert predicted > 0 and measured > 0
        assert record[f"{what}_error"] == pytest.approx(predicted / measured - 1)
    assert record["text"] in capsys.readouterr().err


def test_a_short_run_is_not_held_up(run_folders: Any, tmp_path: Path) -> None:
    assert run(run_folders, tmp_path / "run", train__steps=COMPARED - 1) == []


def test_what_cannot_be_planned_says_why(
    run_folders: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("luthier.train.loop.COMPARED", 2)
    first = tmp_path / "first"
    run(run_folders, first)
    (record,) = run(run_folders, tmp_path / "second", adapter__path=str(first))
    assert "adapter.path" in record["reason"] and not record["text"]
