"""Whole runs on a tiny model folder with a little real-looking data: what a user would do, in a second."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from luthier.configfile import Resolved, from_mapping

WORDS = [
    "red",
    "green",
    "blue",
    "one",
    "two",
    "three",
    "sun",
    "moon",
    "star",
    "rain",
    "wind",
    "snow",
]


def rows_(number: int = 24, *, system: bool = True) -> list[dict[str, Any]]:
    """Conversations of one or two rounds; every third one has a system message."""
    rows = []
    for i in range(number):
        answer = " ".join(WORDS[(i + k) % len(WORDS)] for k in range(2 + i % 5))
        messages = [
            {"role": "user", "content": f"what follows {WORDS[i % len(WORDS)]}, number {i}?"},
            {"role": "assistant", "content": answer},
        ]
        if i % 4 == 1:
            messages += [
                {"role": "user", "content": f"and what else, {i}?"},
                {"role": "assistant", "content": f"nothing but {answer}"},
            ]
        if system and i % 3 == 0:
            messages.insert(0, {"role": "system", "content": f"be brief, reader {i}"})
        rows.append({"messages": messages})
    return rows


def write_rows(path: Path, rows: Sequence[Mapping[str, Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return path


def write_data(folder: Path, train: int = 24, dev: int = 6) -> Path:
    """A data folder with a training and an evaluation part."""
    write_rows(folder / "train.json", rows_(train))
    write_rows(folder / "dev.json", rows_(train + dev)[train:])
    return folder


def tiny_config(model: Path, data: Path, output: Path, **keys: Any) -> dict[str, Any]:
    """The mapping of a LoRA run of three steps in float32; `keys` are `section__key=value`, None removes."""
    values: dict[str, Any] = {
        "model.path": str(model),
        "model.dtype": "float32",
        "data.path": str(data),
        "data.length": 128,
        "data.workers": 0,
        "adapter.method": "lora",
        "adapter.rank": 2,
        "train.steps": 3,
        "train.batch": 4,
        "evaluate.every": "end",
        "checkpoint.every": "end",
        "log.sinks": [],
        "log.progress": "none",
        "output": str(output),
    } | {name.replace("__", "."): value for name, value in keys.items()}
    tree: dict[str, Any] = {}
    for name, value in values.items():
        section, dot, key = name.partition(".")
        if value is None:
            continue
        if dot:
            tree.setdefault(section, {})[key] = value
        else:
            tree[section] = value
    return tree


def resolved(tree: Mapping[str, Any]) -> Resolved:
    return from_mapping(tree)


def copy_model(folder: Path, target: Path) -> Path:
    """A copy of a model folder that a test may spoil."""
    shutil.copytree(folder, target)
    return target
