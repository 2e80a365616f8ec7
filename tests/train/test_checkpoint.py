"""Checkpoints: whole or not there, found, compared, retained; writing that fails or is torn at every point."""

import errno
import json
import os
import shutil
import threading
from pathlib import Path
from typing import Any

import pytest
import torch

from luthier import files
from luthier.errors import Failed, Refused
from luthier.files import MANIFEST, damage
from luthier.train import saving
from luthier.train.checkpoint import STATE, Checkpoints, check_identity, find, non_finite, read
from luthier.train.state import INDEX

IDENTITY = {"model.path": "m", "train.batch": 8, "optim.betas": (0.9, 0.999), "train.seed": 1}
TENSORS = "training_state-00000.safetensors"


def made(output: Path, keep: int = 2, background: bool = False, **identity) -> Checkpoints:
    return Checkpoints(output, keep=keep, identity=IDENTITY | identity, background=background)


class Model:
    """Two files, of which one comes from what was saved."""

    def write(self, folder: Path, weights: Any, rank: int, ranks: int) -> dict[str, Any]:
        (folder / "deep").mkdir()
        (folder / "deep" / "model.safetensors").write_bytes(bytes(range(256)))
        return {"files": {}}

    def complete(self, folder: Path, parts: list[dict[str, Any]]) -> None:
        (folder / "config.json").write_text("{}")


def save(checkpoints: Checkpoints, step: int, best: int | None = None) -> Path:
    tensors = {"optimizer/exp_avg/w": torch.full((3, 2), float(step)).T, "master/w": torch.ones(2)}
    return checkpoints.save(step, Model, tensors, {"data": {"at": step}}, best=best)


def names(output: Path) -> list[str]:
    return sorted(p.name for p in (output / "checkpoints").iterdir())


def test_what_is_saved_is_read_again(tmp_path):
    path = save(made(tmp_path), 5)
    assert path == tmp_path / "checkpoints/step-5" and damage(path) is None
    saved = read(path)
    assert saved.step == 5 and saved.state == {"data": {"at": 5}}
    tensors = saved.tensors()
    assert set(tensors) == {"optimizer/exp_avg/w", "master/w"}
    assert torch.equal(tensors["optimizer/exp_avg/w"], torch.full((2, 3), 5.0))
    assert (path / "deep/model.safetensors").read_bytes() == bytes(range(256))
    listed = json.loads((path / MANIFEST).read_text())["files"]
    assert listed.keys() == {"config.json", "deep/model.safetensors", TENSORS, STATE, INDEX}
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


def test_an_old_checkpoint_that_stays_is_told_and_no_failure(tmp_path, monkeypatch):
    checkpoints = made(tmp_path, keep=1)
    save(checkpoints, 1)

    remove = shutil.rmtree

    def busy(path, *args, **kwargs):
        if Path(path).name == "step-1":
            raise OSError(errno.ENOTEMPTY, "Directory not empty", str(path))
        remove(path, *args, **kwargs)

    monkeypatch.setattr(shutil, "rmtree", busy)
    save(checkpoints, 2)
    assert damage(tmp_path / "checkpoints/step-2") is None
    told = dict(checkpoints.finished())
    assert "step-1: Directory not empty" in told[2]["not_removed"] and "not_removed" not in told[1]


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
    for other, told in ((99, "or a newer one"), (1, "use that version")):
        (path / STATE).write_text(json.dumps(record | {"format": other, "luthier": "9.9"}))
        with pytest.raises(Refused, match=rf"{other}.*9\.9.*{told}.*luthier convert"):
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


class Lost(BaseException):
    """The machine lost its power."""


class Faults:
    """The n-th of all operations that write fails as a full disk does, after half of its bytes; or the power goes.

    Without power nothing can be written any more, and files that were not flushed lose their ends.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch, at: int, *, power: bool) -> None:
        self.left, self.power, self.dead, self.calls = at, power, False, 0
        self.loose: set[Path] = set()  # written and not flushed
        for owner, name in [
            *((Path, name) for name in ("rename", "replace", "mkdir", "unlink", "rmdir")),
            *((os, name) for name in ("fsync", "unlink", "rmdir")),
        ]:
            monkeypatch.setattr(owner, name, self.counted(getattr(owner, name), name))
        opened = Path.open

        def opens(path: Path, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
            handle = opened(path, mode, *args, **kwargs)
            if "w" in mode:
                self.loose.add(path)
                handle = Half(handle, self)
            return handle

        monkeypatch.setattr(Path, "open", opens)

    def counted(self, real: Any, name: str) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            self.count()
            if name == "fsync":
                self.loose -= {p for p in self.loose if p.exists() and same_file(p, args[0])}
            return real(*args, **kwargs)

        return call

    def count(self) -> None:
        if self.dead:
            raise Lost
        self.left -= 1
        self.calls += 1
        if self.left == 0:
            self.fall()

    def fall(self) -> None:
        if not self.power:
            raise OSError(errno.ENOSPC, "No space left on device")
        self.dead = True
        for path in self.loose:
            if path.exists():
                os.truncate(path, path.stat().st_size // 2)
        raise Lost


def same_file(path: Path, handle: int) -> bool:
    ours, theirs = path.stat(), os.fstat(handle)
    return (ours.st_dev, ours.st_ino) == (theirs.st_dev, theirs.st_ino)


class Half:
    """A file of which the fatal write leaves half."""

    def __init__(self, handle: Any, faults: Faults) -> None:
        self.handle, self.faults = handle, faults

    def write(self, data: Any) -> Any:
        if self.faults.left == 1:
            self.handle.write(data[: len(data) // 2])
            self.handle.flush()
        self.faults.count()
        return self.handle.write(data)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.handle, name)

    def __enter__(self) -> Any:
        return self

    def __exit__(self, *error: object) -> None:
        self.handle.close()


@pytest.mark.parametrize("power", [False, True], ids=["full disk", "power loss"])
@pytest.mark.parametrize("keep", [1, 2])
def test_whatever_happens_at_any_write_the_newest_whole_checkpoint_is_found(
    tmp_path: Path, power: bool, keep: int
) -> None:
    at, reached = 0, True
    while reached:
        at, saved = at + 1, False
        output = tmp_path / str(at)
        first = save(made(output, keep), 1)
        checkpoints = made(output, keep)
        with pytest.MonkeyPatch.context() as monkeypatch:
            faults = Faults(monkeypatch, at, power=power)
            try:
                save(checkpoints, 2)
                saved = True
            except Failed as error:
                assert not power
                assert "No space left" in str(error) and "resume=auto" in str(error)
            except Lost:
                assert power
        reached = faults.calls >= at
        found = find(output, "auto").path
        second = output / "checkpoints/step-2"
        assert found is not None and damage(found) is None, at
        # after its name was given only the entry of the folder and what is no longer kept are left to do
        assert found == second if saved else found in (first, second), at
        state = read(found)
        assert torch.equal(
            state.tensors()["optimizer/exp_avg/w"], torch.full((2, 3), float(state.step))
        )
        again = made(output, keep)
        again.start(found)
        assert damage(save(again, 3)) is None
        shutil.rmtree(output)
    assert at == faults.calls + 1 > 25  # each write, flush, name and removal was a point of failure


def test_a_failing_model_writer_leaves_the_previous_checkpoint(tmp_path, monkeypatch):
    checkpoints = made(tmp_path)
    save(checkpoints, 1)

    def breaks(model: Model, folder: Path, parts: Any) -> None:
        (folder / "half").write_text("x")
        raise OSError(errno.EFBIG, "File too large")

    monkeypatch.setattr(Model, "complete", breaks)
    with pytest.raises(Failed, match="File too large"):
        save(checkpoints, 2)
    assert names(tmp_path) == ["step-1"]


@pytest.mark.parametrize("background", [False, True])
def test_a_file_size_limit_is_met_as_a_full_disk_is(tmp_path, background):
    """The operating system's own refusal."""
    resource = pytest.importorskip("resource")
    checkpoints = made(tmp_path, background=background)
    save(checkpoints, 1)
    checkpoints.saver.wait()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        with pytest.raises(Failed, match="what was saved before is untouched"):
            checkpoints.save(2, Model, {"master/w": torch.zeros(100_000)}, {})
            checkpoints.saver.wait()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert names(tmp_path) == ["step-1"]


# ---- behind the training's back


def test_what_is_written_is_what_was_there_when_saving_began(tmp_path, monkeypatch):
    going_on = threading.Event()
    write = saving.write_pieces

    def slow(*args: Any) -> Any:
        assert going_on.wait(20)
        return write(*args)

    monkeypatch.setattr(saving, "write_pieces", slow)
    checkpoints, weight = made(tmp_path, background=True), torch.ones(4)
    path = checkpoints.save(1, Model, {"weights/w": weight}, {})
    weight.zero_()  # the next step
    assert not checkpoints.saver.finished() and not path.exists()
    going_on.set()
    checkpoints.saver.wait()
    (written,) = checkpoints.saver.finished()
    assert written.path == path and written.step == 1 and written.num_bytes > 256
    assert 0 < written.blocked < written.seconds
    assert torch.equal(read(path).tensors()["weights/w"], torch.ones(4))


def test_one_save_waits_for_the_other_and_tells_its_error(tmp_path, monkeypatch):
    checkpoints = made(tmp_path, background=True)
    for step in (1, 2, 3):
        save(checkpoints, step)
    checkpoints.saver.wait()
    assert [w.step for w in checkpoints.saver.finished()] == [1, 2, 3]
    assert names(tmp_path) == ["step-2", "step-3"]

    def breaks(*_: Any) -> Any:
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(saving, "write_pieces", breaks)
    save(checkpoints, 4)
    with pytest.raises(Failed, match="Read-only file system"):
        save(checkpoints, 5)
    assert names(tmp_path) == ["step-2", "step-3"] and not checkpoints.saver.failed


def test_nan_is_found_by_name():
    tensors = {"a": torch.ones(2), "b": torch.tensor([1.0, torch.nan]), "c": torch.tensor([1])}
    tensors |= {"d": torch.tensor(torch.inf, dtype=torch.float16)}
    assert non_finite(tensors) == ["b", "d"]
    assert files.MANIFEST == MANIFEST
