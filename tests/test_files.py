"""A reader never sees half of a folder, whatever happens while it is written."""

import errno
import json
from pathlib import Path

import pytest

from luthier import files
from luthier.errors import Failed


def fill(folder: Path, text: str) -> None:
    with files.publish(folder) as partial:
        (partial / "a.txt").write_text(text)
        (partial / "deep").mkdir()
        (partial / "deep" / "b.bin").write_bytes(text.encode() * 100)


def test_published_folder_is_whole_and_replaces_the_old_one(tmp_path):
    target = tmp_path / "step-1"
    fill(target, "one")
    assert files.damage(target) is None
    fill(target, "two")
    assert (target / "a.txt").read_text() == "two"
    assert files.damage(target) is None
    assert [p.name for p in tmp_path.iterdir()] == ["step-1"]  # nothing temporary is left


@pytest.mark.parametrize("when", ["while filling", "at the manifest", "at the rename"])
def test_a_failing_write_leaves_the_old_folder(tmp_path, monkeypatch, when):
    target = tmp_path / "step-1"
    fill(target, "one")
    full = OSError(errno.ENOSPC, "No space left on device")

    def fail(*args, **kwargs):
        raise full

    if when == "at the manifest":
        monkeypatch.setattr(files, "write_json", fail)
    if when == "at the rename":
        original = Path.rename
        monkeypatch.setattr(
            Path,
            "rename",
            lambda self, to: (
                fail() if self.name.startswith(".partial-step") else original(self, to)
            ),
        )
    with pytest.raises(Failed, match="No space left"), files.publish(target) as partial:
        (partial / "a.txt").write_text("two")
        if when == "while filling":
            fail()
    monkeypatch.undo()
    assert (target / "a.txt").read_text() == "one"
    assert files.damage(target) is None
    assert [p.name for p in tmp_path.iterdir()] == ["step-1"]


@pytest.mark.parametrize(
    ("harm", "named"),
    [
        (lambda f: (f / "a.txt").write_text("On3"), "was altered"),
        (lambda f: (f / "a.txt").write_text("longer text"), "bytes, not"),
        (lambda f: (f / "deep" / "b.bin").unlink(), "is missing"),
        (lambda f: (f / "manifest.json").unlink(), "no readable manifest"),
        (lambda f: (f / "manifest.json").write_text('{"fil'), "no readable manifest"),
    ],
)
def test_damage_names_what_is_wrong(tmp_path, harm, named):
    target = tmp_path / "step-1"
    fill(target, "one")
    harm(target)
    assert named in (files.damage(target) or "")


def test_write_json_is_atomic_and_refuses_nan(tmp_path):
    path = tmp_path / "x.json"
    files.write_json(path, {"a": 1})
    with pytest.raises(ValueError):
        files.write_json(path, {"a": float("nan")})
    assert json.loads(path.read_text()) == {"a": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["x.json"]
