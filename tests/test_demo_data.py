"""The demo's data: enough rows, fit to learn, held-out answers unseen, the same at each run."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "scripts" / "demo_data.py"


def run(output: Path, *options: str, hash_seed: int = 0, warnings: str = "error"):
    command = [sys.executable, f"-W{warnings}", str(SCRIPT), "--output", str(output), *options]
    environment = os.environ | {"PYTHONHASHSEED": str(hash_seed)}
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120)


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("demo") / "data"
    done = run(folder)
    assert done.returncode == 0, done.stderr
    # the modules' own prints and warnings stay away from the user
    assert done.stdout == f"{folder}: 1500 training rows, 100 held-out rows\n"
    assert done.stderr == ""
    return folder


def rows(folder: Path, name: str) -> list[dict[str, str]]:
    return [json.loads(line) for line in (folder / name).read_text("utf-8").splitlines()]


def test_rows(built: Path) -> None:
    train, dev = rows(built, "train.json"), rows(built, "dev.json")
    assert (len(train), len(dev)) == (1500, 100)
    question = re.compile(r"What (?:does `[\w.]+(?:\(.*\))?` do|is the class `[\w.]+`)\?")
    for row in train + dev:
        assert question.fullmatch(row["src"]), row
        assert 20 <= len(row["tgt"]) <= 400 and "\n" not in row["tgt"], row
        assert " at 0x" not in row["src"] and "<" not in row["src"], row
    assert all(sys.prefix not in row["src"] + row["tgt"] for row in train + dev)


def test_held_out_is_unseen(built: Path) -> None:
    train, dev = rows(built, "train.json"), rows(built, "dev.json")
    for field in ("src", "tgt"):
        seen = [" ".join(re.findall(r"\w+", row[field].casefold())) for row in train + dev]
        if field == "tgt":
            assert len(set(seen)) == len(seen)
        assert not set(seen[: len(train)]) & set(seen[len(train) :])


def test_same_at_each_run(built: Path, tmp_path: Path) -> None:
    assert run(tmp_path, hash_seed=1, warnings="default").returncode == 0
    for name in ("train.json", "dev.json"):
        assert (tmp_path / name).read_bytes() == (built / name).read_bytes()


def test_no_module_acts() -> None:
    """Nothing opens a browser or a window, prints, or puts the terminal in another state."""
    code = "import demo_data, sys; demo_data.collect(); print(*sys.modules)"
    command = [sys.executable, "-Wignore", "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, cwd=SCRIPT.parent, timeout=120)
    imported = done.stdout.split()
    assert "textwrap" in imported, done.stderr  # and the list is all that was printed
    assert not {"antigravity", "this", "turtle", "tkinter", "readline"} & set(imported)


def test_known_answer(tmp_path: Path) -> None:
    run(tmp_path, "--train", "100000")
    answers = {
        row["src"]: row["tgt"]
        for part in ("train", "dev")
        for row in rows(tmp_path, f"{part}.json")
    }
    answer = answers["What does `textwrap.shorten(text, width, **kwargs)` do?"]
    assert answer == "Collapse and truncate the given text to fit in the given width."
    assert "What does `os.getcwd()` do?" in answers  # under its public name, not posix.getcwd
    assert "What does `random.randint(a, b)` do?" in answers


def test_too_few(tmp_path: Path) -> None:
    done = run(tmp_path / "x", "--held-out", "100000")
    assert done.returncode == 1 and "Ask for fewer" in done.stderr
    assert not (tmp_path / "x").exists()
    assert run(tmp_path, "--train", "0").returncode == 2
