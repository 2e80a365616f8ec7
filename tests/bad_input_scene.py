"""What a case of bad input starts from, and the table that cases are added to.

A case gets a `Scene`, spoils one thing in its own folder and returns the command line. `test_bad_input.py`
runs it and checks exit code, message and that no file changed.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tiny_runs import copy_model, tiny_config, write_rows

from luthier.models.load import save_model


@dataclass(frozen=True)
class Scene:
    """What a case starts from: a model, data, a finished run (read only), and an empty folder of its own."""

    here: Path
    model: Path
    data: Path
    run: Path
    tiny_model: Callable[..., Any]
    tiny_tokenizer: Callable[[], Any]

    def config(self, **keys: Any) -> Path:
        """A config file whose run is right but for `keys`."""
        path = self.here / "run.json"
        tree = tiny_config(self.model, self.data, self.here / "out", **keys)
        path.write_text(json.dumps(tree), "utf-8")
        return path

    def finetune(self, *overrides: str, **keys: Any) -> list[str]:
        return ["finetune", str(self.config(**keys)), *overrides]

    def text(self, name: str, content: str | bytes) -> str:
        """A data file of this content."""
        path = self.here / name
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return str(path)

    def rows(self, *rows: dict[str, Any], name: str = "train.json") -> str:
        return str(write_rows(self.here / name, rows))

    def spoiled_model(self) -> Path:
        """A copy of the model that may be changed."""
        return copy_model(self.model, self.here / "model")

    def other_model(self, **keys: Any) -> Path:
        """A model of other sizes."""
        folder = self.here / "other"
        folder.mkdir()
        save_model(self.tiny_model("llama", **keys), folder, self.tiny_tokenizer())
        return folder

    def copied_run(self) -> Path:
        return Path(shutil.copytree(self.run, self.here / "out"))


@dataclass(frozen=True)
class Case:
    name: str
    words: Callable[[Scene], list[str]]
    says: tuple[str, ...]
    skip: str = ""


CASES: list[Case] = []
GOOD = {"src": "what is red?", "tgt": "a colour"}
LONG = {"src": "what is red?", "tgt": "red and blue " * 60}


def case(
    *says: str, skip: str = ""
) -> Callable[[Callable[[Scene], list[str]]], Callable[[Scene], list[str]]]:
    """Add a case; its message must hold every fragment of `says`. `skip`: why it cannot be made here."""

    def add(words: Callable[[Scene], list[str]]) -> Callable[[Scene], list[str]]:
        CASES.append(Case(words.__name__, words, says, skip))
        return words

    return add


def override(name: str, text: str, *says: str, skip: str = "") -> None:
    """A case of one override of a right config."""
    CASES.append(Case(name, lambda s: s.finetune(*text.split()), says, skip))
