"""Bad input: exit code 2, one clear paragraph, nothing written and nothing lost (cases: bad_input_data.py, bad_input_commands.py).

And what goes wrong on the way, which is no refusal: a full disk, a torn checkpoint, a loss that is not a
number. There the run's older checkpoints must survive.
"""

from __future__ import annotations

import json
import resource
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import bad_input_commands  # noqa: F401 (adds its cases)
import bad_input_data  # noqa: F401
import pytest
from bad_input_scene import CASES, GOOD, Case, Scene
from safetensors.torch import load_file, save_file
from tiny_runs import tiny_config, write_data

from luthier.cli import main

Capture = pytest.CaptureFixture[str]


@pytest.fixture(scope="module")
def finished(
    tmp_path_factory: pytest.TempPathFactory,
    model_folder: Callable[[str], Path],
    tiny_model: Callable[..., Any],
    tiny_tokenizer: Callable[[], Any],
) -> Scene:
    """A model, data, and a run of two steps with a checkpoint of each."""
    root = tmp_path_factory.mktemp("finished")
    model, data = model_folder("llama"), write_data(root / "data", train=8, dev=2)
    keys = {"train__steps": 2, "checkpoint__every": 1, "checkpoint__best": "none"}
    tree = tiny_config(model, data, root / "run", **keys)
    (root / "run.json").write_text(json.dumps(tree), "utf-8")
    assert main(["finetune", str(root / "run.json")]) == 0
    return Scene(root, model, data, root / "run", tiny_model, tiny_tokenizer)


@pytest.fixture
def scene(
    finished: Scene, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> Scene:
    capsys.readouterr()  # what the finished run said
    monkeypatch.chdir(tmp_path)
    f = finished
    return Scene(tmp_path, f.model, f.data, f.run, f.tiny_model, f.tiny_tokenizer)


def contents(*folders: Path) -> dict[Path, bytes | None]:
    """Every path below, with its bytes; None for a folder."""
    return {
        path: path.read_bytes() if path.is_file() else None
        for folder in folders
        for path in folder.rglob("*")
    }


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_refused(case: Case, scene: Scene, capsys: Capture) -> None:
    words = case.words(scene)
    if case.skip:
        pytest.skip(case.skip)
    before = contents(scene.here, scene.model, scene.data, scene.run)
    code = main(words)
    error = capsys.readouterr().err
    assert code == 2, error
    assert error.startswith("luthier: ") and error.endswith("\n")
    assert len(error) < 900 and "\n\n" not in error, "it is no short paragraph"
    assert "Traceback" not in error and "unexpected error" not in error
    for fragment in case.says:
        assert fragment in error
    assert contents(scene.here, scene.model, scene.data, scene.run) == before


def test_debug_shows_the_traceback(scene: Scene, capsys: Capture) -> None:
    assert main([*scene.finetune("adapter.rank=0"), "--debug"]) == 2
    assert "Traceback" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("policy", "says"),
    [
        ("cut", ("2 used, 1 cut (", "3 examples")),
        ("drop", ("2 used, 0 cut (0 tokens lost), 1 dropped", "2 examples")),
        ("split", ("3 used, 0 cut (0 tokens lost), 0 dropped", "4 examples")),
    ],
)
def test_rows_longer_than_length(
    policy: str, says: tuple[str, ...], scene: Scene, capsys: Capture
) -> None:
    """What each policy does with a long row is said; `refuse` is in the table above."""
    rounds = {key: [text] * 6 for key, text in GOOD.items()}
    rows = scene.rows(GOOD, rounds, GOOD)
    words = ["data.length=64", f"data.overlong={policy}"]
    assert main(["preview", str(scene.config(data__path=rows)), *words]) == 0
    said = capsys.readouterr().out
    assert all(fragment in said for fragment in says), said


@contextmanager
def small_files(most: int) -> Iterator[None]:
    """The system refuses to write any file beyond `most` bytes, as a full disk would."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (most, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_full_disk_leaves_the_older_checkpoints(scene: Scene, capsys: Capture) -> None:
    run = scene.copied_run()
    before = contents(run / "checkpoints")
    words = scene.finetune(
        "checkpoint.resume=auto", train__steps=3, checkpoint__every=1, checkpoint__best="none"
    )
    with small_files(12_000):
        code = main(words)
    error = capsys.readouterr().err
    assert code == 1
    assert "step-3" in error and "File too large" in error and "checkpoint.resume=auto" in error
    assert "Traceback" not in error
    assert contents(run / "checkpoints") == before
    assert main(words) == 0  # and on it goes
    assert "going on from" in (run / "report.html").read_text("utf-8")


def test_a_torn_checkpoint_is_passed_over(scene: Scene, capsys: Capture) -> None:
    run = scene.copied_run()
    torn = run / "checkpoints" / "step-2" / "training_state-00000.safetensors"
    torn.write_bytes(torn.read_bytes()[:-64])
    words = scene.finetune(
        "checkpoint.resume=auto",
        "log.progress=plain",
        train__steps=3,
        checkpoint__every=1,
        checkpoint__best="none",
    )
    assert main(words) == 0
    said = "".join(capsys.readouterr())
    assert "step-2 is not whole (training_state-00000.safetensors has" in said
    assert "going on from" in said and "step-1" in said


def test_a_loss_that_is_not_a_number_reaches_no_checkpoint(scene: Scene, capsys: Capture) -> None:
    model = scene.spoiled_model()
    tensors = load_file(model / "model.safetensors")
    tensors["lm_head.weight"] *= 1e38  # finite, but no logits are
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    code = main(scene.finetune(model__path=str(model)))
    error = capsys.readouterr().err
    assert code == 1
    assert "step 1" in error and "loss" in error
    assert "Traceback" not in error and "unexpected" not in error
    assert not list((scene.here / "out").rglob("*.safetensors"))
