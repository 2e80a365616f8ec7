"""Checkpoints: whole or not there, found, compared, retained; writing that fails at every point."""

import errno
import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError

from luthier import files
from luthier.errors import Failed, Refused
from luthier.files import MANIFEST, damage
from luthier.train import checkpoint
from luthier.train.checkpoint import (
    STATE,
    TENSORS,
    Checkpoints,
    check_identity,
    find,
    non_finite,
    read,
)

IDENTITY = {"model.path": "m", "train.batch": 8, "optim.betas": (0.9, 0.999), "train.seed": 1}


def made(output: Path, keep: int = 2, **identity) -> Checkpoints:
    return Checkpoints(output, keep=keep, identity=IDENTITY | identity)


def write_model(folder: Path) -> None:
    (folder / "config.json").write_text("{}")
    (folder / "deep").mkdir()
    (folder / "deep" / "model.safetensors").write_bytes(bytes(range(256)))


def save(checkpoints: Checkpoints, step: int, best: int | None = None) -> Path:
    tensors = {"optimizer/exp_avg/w": torch.full((3, 2), float(step)).T, "master/w": torch.ones(2)}
    return checkpoints.save(step, write_model, tensors, {"data": {"at": step}}, best=best)


def names(output: Path) -> list[str]:
    return sorted(p.name for p in (output / "checkpoints").iterdir())


def test_what_is_saved_is_read_again(tmp_path):
    path = save(made(tmp_path), 5)
    assert path == tmp_path / "checkpoints/step-5" and damage(path) is None
    saved = read(path)
    assert saved.step == 5 and saved.state == {"data": {"at": 5}}
    tensors = saved.tensors()
    assert tensors.keys() == {"optimizer/exp_avg/w", "master/w"}
    assert torch.equal(tensors["optimizer/exp_avg/w"], torch.full((2, 3), 5.0))
    assert (path / "deep/model.safetensors").read_bytes() == bytes(range(256))
    listed = json.loads((path / MANIFEST).read_text())["files"]
    assert listed.keys() == {"config.json", "deep/model.safetensors", TENSORS, STATE}
    record = json.loads((path / STATE).read_text())
    assert {"format", "luthier", "torch", "step", "identity", "state"} == record.keys()


@pytest.mark.parametrize(
    ("saves", "kept"),
    [
        ([(1, None), (2, None), (3, None)], ["step-2", "step-3"]),
        ([(1, 1), (2, 1), (3, 1), (4, 1)], ["step-1", "step-3", "step-4"]),
        ([(1, 1), (2, 2), (3, 2), (4, 4), (10, 4)], ["step-10", "step-4"]),
        ([(9, None), (10, None), (11, None)], ["step-10", "step-11"]),
    ],
)
def test_the_newest_and_the_best_are_kept(tmp_path, saves, kept):
    checkpoints = made(tmp_path)
    for step, best in saves:
        save(checkpoints, step, best)
    assert names(tmp_path) == kept


def test_nothing_is_removed_before_the_new_one_is_whole(tmp_path, monkeypatch):
    checkpoints = made(tmp_path, keep=1)
    save(checkpoints, 1)
    unlink = Path.unlink

    def check(path: Path, *args, **kwargs) -> None:
        if path == tmp_path / "checkpoints/step-1" / MANIFEST:
            assert damage(tmp_path / "checkpoints/step-2") is None
            raise KeyboardInterrupt
        unlink(path, *args, **kwargs)

    monkeypatch.setattr(Path, "unlink", check)
    with pytest.raises(KeyboardInterrupt):
        save(checkpoints, 2)
    assert names(tmp_path) == ["step-1", "step-2"]


def test_a_removal_that_is_cut_short_leaves_nothing_that_counts_as_whole(tmp_path, monkeypatch):
    checkpoints = made(tmp_path, keep=1)
    save(checkpoints, 1)
    monkeypatch.setattr(shutil, "rmtree", lambda *a, **k: None)
    save(checkpoints, 2)
    assert damage(tmp_path / "checkpoints/step-1") is not None
    assert find(tmp_path, "auto").path == tmp_path / "checkpoints/step-2"


def test_checkpoints_of_a_course_that_was_given_up_go_with_the_next_saving(tmp_path):
    for step in (10, 20, 30):
        save(made(tmp_path, keep=9), step)
    again = made(tmp_path, keep=2)
    again.start(tmp_path / "checkpoints/step-10")
    assert names(tmp_path) == ["step-10", "step-20", "step-30"]
    save(again, 11)
    assert names(tmp_path) == ["step-10", "step-11"]
    save(again, 12)
    assert names(tmp_path) == ["step-11", "step-12"]


# ---- finding


def truncate(path: Path) -> None:
    file = path / TENSORS
    file.write_bytes(file.read_bytes()[:-3])


def alter(path: Path) -> None:
    file = path / "deep/model.safetensors"
    file.write_bytes(bytes([1]) + file.read_bytes()[1:])


TEARS = {
    "truncated": (truncate, "bytes, not"),
    "altered": (alter, "SHA-256"),
    "without a manifest": (lambda p: (p / MANIFEST).unlink(), "no readable manifest"),
    "half a manifest": (lambda p: (p / MANIFEST).write_text('{"files"'), "no readable manifest"),
    "a file less": (lambda p: (p / STATE).unlink(), "is missing"),
}


@pytest.mark.parametrize("tear", TEARS)
def test_a_torn_checkpoint_is_passed_over_and_named(tmp_path, tear):
    for step in (1, 2):
        save(made(tmp_path), step)
    torn, reason = TEARS[tear]
    torn(tmp_path / "checkpoints/step-2")
    found = find(tmp_path, "auto")
    assert found.path == tmp_path / "checkpoints/step-1"
    assert "step-2 is not whole" in found.remarks[0] and reason in found.remarks[0]
    torn(tmp_path / "checkpoints/step-1")
    found = find(tmp_path, "auto")
    assert found.path is None and len(found.remarks) == 3
    assert "starting from the beginning" in found.remarks[-1]


def test_auto_takes_the_newest_by_number_or_nothing(tmp_path):
    assert find(tmp_path / "new", "auto").path is None
    for step in (9, 10):
        save(made(tmp_path), step)
    (tmp_path / "checkpoints/notes").mkdir()
    (tmp_path / "checkpoints/.partial-step-11").mkdir()
    assert find(tmp_path, "auto").path == tmp_path / "checkpoints/step-10"
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    "trace", ["config.yaml", "metrics.jsonl", "checkpoints/step-1/x", "config.json"]
)
def test_a_new_run_is_refused_in_a_folder_that_holds_one(tmp_path, trace):
    (tmp_path / "notes.txt").write_text("mine")
    assert find(tmp_path, "never").path is None
    (tmp_path / trace).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / trace).write_text("x")
    kind = "model" if trace == "config.json" else "run"
    with pytest.raises(Refused, match=f"holds another {kind}.*another output"):
        find(tmp_path, "never")


def test_an_output_that_is_a_file_is_refused(tmp_path):
    (tmp_path / "out").write_text("x")
    with pytest.raises(Refused, match="is a file"):
        find(tmp_path / "out", "never")


def test_a_named_checkpoint_must_be_whole_and_one(tmp_path):
    output = tmp_path / "a"
    path = save(made(output), 3)
    assert find(output, str(path)).path == path
    assert find(tmp_path / "b", str(path)).path == path
    for wrong in (tmp_path / "nowhere", output, output / "checkpoints"):
        with pytest.raises(Refused) as caught:
            find(output, str(wrong))
        assert "nowhere" in str(wrong) or "step-3" in str(caught.value)
    save(made(tmp_path / "b"), 1)
    with pytest.raises(Refused, match="another run"):
        find(tmp_path / "b", str(path))
    truncate(path)
    with pytest.raises(Refused, match=r"not whole.*resume=auto"):
        find(output, str(path))


def test_a_checkpoint_of_another_format_is_refused(tmp_path):
    path = save(made(tmp_path), 3)
    record = json.loads((path / STATE).read_text())
    (path / STATE).write_text(json.dumps(record | {"format": 99, "luthier": "9.9"}))
    with pytest.raises(Refused, match=r"99.*9\.9"):
        read(path)


def test_leftovers_of_a_crash_are_removed_at_the_start_only(tmp_path):
    save(made(tmp_path), 1)
    for folder in (tmp_path, tmp_path / "checkpoints"):
        (folder / ".partial-x").mkdir()
        (folder / ".partial-y").write_text("half")
    find(tmp_path, "auto")
    assert len(list(tmp_path.rglob(".partial-*"))) == 4
    with pytest.raises(Refused):
        made(tmp_path, **{"train.seed": 2}).start(tmp_path / "checkpoints/step-1")
    assert len(list(tmp_path.rglob(".partial-*"))) == 4
    made(tmp_path).start(None)
    assert not list(tmp_path.rglob(".partial-*"))
    assert names(tmp_path) == ["step-1"]


# ---- identity


def test_a_run_goes_on_only_with_the_same_config(tmp_path):
    path = save(made(tmp_path), 3)
    saved = made(tmp_path).start(path)  # tuples are lists in the file
    assert saved is not None and saved.step == 3
    with pytest.raises(Refused) as caught:
        made(tmp_path, **{"train.batch": 4, "model.path": "n"}).start(path)
    text = str(caught.value)
    assert 'model.path was "m", now "n"' in text and "train.batch was 8, now 4" in text
    assert "train.seed" not in text


def test_a_key_that_came_or_went_is_a_difference():
    check_identity({"a": None}, {"a": None})
    with pytest.raises(Refused, match=r"b was not there, now 1"):
        check_identity({"a": 1}, {"a": 1, "b": 1})
    with pytest.raises(Refused, match=r"a was null, now not there"):
        check_identity({"a": None}, {})


# ---- writing that fails


class Fails:
    """The n-th of all calls that write fails as a full disk does."""

    def __init__(self, monkeypatch, at: int) -> None:
        self.left, self.calls = at, 0
        for owner, name in [
            (os, "fsync"),
            (Path, "rename"),
            (Path, "replace"),
            (Path, "mkdir"),
            (Path, "write_text"),
            (Path, "write_bytes"),
        ]:
            self.wrap(monkeypatch, owner, name, OSError(errno.ENOSPC, "No space left on device"))
        self.wrap(monkeypatch, checkpoint, "save_file", SafetensorError("I/O error: No space left"))

    def wrap(self, monkeypatch, owner, name, error: Exception) -> None:
        real = getattr(owner, name)

        def call(*args, **kwargs):
            self.left -= 1
            self.calls += 1
            if self.left == 0:
                raise error
            return real(*args, **kwargs)

        monkeypatch.setattr(owner, name, call)


def test_a_full_disk_at_any_write_leaves_the_previous_checkpoint(tmp_path):
    checkpoints = made(tmp_path, keep=1)
    first = save(checkpoints, 1)
    at = 0
    while True:
        at += 1
        with pytest.MonkeyPatch.context() as monkeypatch:
            failing = Fails(monkeypatch, at)
            if failing.left > 0:
                try:
                    save(checkpoints, 2)
                    break
                except Failed as error:
                    assert "No space left" in str(error) and "resume=auto" in str(error)
        found = find(tmp_path, "auto")
        # the folder's own entry is flushed after the rename: then the new one is there already
        assert found.path in (first, tmp_path / "checkpoints/step-2"), at
        assert found.path == first or at == failing.calls
        if found.path != first:
            shutil.rmtree(found.path)
        assert [n for n in names(tmp_path) if n != ".partial-step-2"] == ["step-1"], at
    assert at > 12  # each file and folder was a point of failure
    assert names(tmp_path) == ["step-2"]


def test_a_failing_model_writer_leaves_the_previous_checkpoint(tmp_path):
    checkpoints = made(tmp_path)
    save(checkpoints, 1)

    def breaks(folder: Path) -> None:
        (folder / "half").write_text("x")
        raise SafetensorError("Error while serializing: I/O error: File too large (os error 27)")

    with pytest.raises(Failed, match="File too large"):
        checkpoints.save(2, breaks, {}, {})
    assert names(tmp_path) == ["step-1"]


def test_a_file_size_limit_is_met_as_a_full_disk_is(tmp_path):
    """The operating system's own refusal, inside safetensors."""
    resource = pytest.importorskip("resource")
    checkpoints = made(tmp_path)
    save(checkpoints, 1)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        with pytest.raises(Failed, match="what was saved before is untouched"):
            checkpoints.save(2, write_model, {"master/w": torch.zeros(100_000)}, {})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert names(tmp_path) == ["step-1"]


def test_nan_is_found_by_name():
    tensors = {"a": torch.ones(2), "b": torch.tensor([1.0, torch.nan]), "c": torch.tensor([1])}
    tensors |= {"d": torch.tensor(torch.inf, dtype=torch.float16)}
    assert non_finite(tensors) == ["b", "d"]
    assert files.MANIFEST == MANIFEST
