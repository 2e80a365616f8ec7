"""Bad input: exit code 2, one clear paragraph, nothing written and nothing lost."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from tests.bad_input_cases import CASES, Case, Scene
from tests.tiny_runs import tiny_config, write_data

from luthier.cli import main


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, model_folder: Any) -> Scene:
    """A model, data, and a run of two steps with a checkpoint of each."""
    root = tmp_path_factory.mktemp("finished")
    model, data = model_folder("llama"), write_data(root / "data", train=8, dev=2)
    tree = tiny_config(
        model, data, root / "run", train__steps=2, checkpoint__every=1, checkpoint__best="none"
    )
    (root / "run.json").write_text(json.dumps(tree), "utf-8")
    assert main(["finetune", str(root / "run.json")]) == 0
    return Scene(root, model, data, root / "run")


@pytest.fixture
def scene(finished: Scene, tmp_path: Path) -> Scene:
    return Scene(tmp_path, finished.model, finished.data, finished.run)


def contents(*folders: Path) -> dict[Path, bytes | None]:
    """Every path below, with its bytes; None for a folder."""
    return {
        path: path.read_bytes() if path.is_file() else None
        for folder in folders
        for path in folder.rglob("*")
    }


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_refused(case: Case, scene: Scene, capsys: pytest.CaptureFixture[str], monkeypatch) -> None:
    monkeypatch.chdir(scene.here)
    words = case.words(scene)
    before = contents(scene.here, scene.model, scene.data, scene.run)
    capsys.readouterr()
    code = main(words)
    error = capsys.readouterr().err
    if os.environ.get("SHOW"):
        changed = contents(scene.here, scene.model, scene.data, scene.run).items() ^ before.items()
        Path("/tmp/w/bi/log").open("a").write(
            f"{case.name} [{code}] {'CHANGED ' + str(sorted({str(p) for p,_ in changed})) if changed else ''}"
            f"{'' if all(f in error for f in case.says) else 'MISSING ' + str([f for f in case.says if f not in error])}\n   {error}"
        )
    assert code == 2, error
    assert "Traceback" not in error and "unexpected" not in error
    assert error.startswith("luthier: ") and error.endswith("\n")
    assert len(error) < 800 and "\n\n" not in error
    for fragment in case.says:
        assert fragment in error
    assert contents(scene.here, scene.model, scene.data, scene.run) == before
