"""Small data sets on disk, and the config and renderer to read them with."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

from luthier.config import RunConfig
from luthier.data.encode import Renderer


def write_lines(path: Path, rows: list[Any]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), "utf-8")
    return path


def random_rows(number: int, seed: int = 0, longest: int = 12) -> list[dict[str, str]]:
    """src/tgt rows; the source names the row, so that it can be found again in the tokens."""
    draw = random.Random(seed)
    words = ["the", "and", "of", "a", "ring", "on", "what", "does", "tone", "é"]
    return [
        {"src": f"{seed}-{i}", "tgt": " ".join(draw.choices(words, k=draw.randint(1, longest)))}
        for i in range(number)
    ]


def config(path: Any, *, seed: int = 3, rows: int | None = None, **data: Any) -> RunConfig:
    data = {
        "length": 64,
        "workers": 0,
        **data,
        "path": str(path) if isinstance(path, Path) else path,
    }
    train = {"seed": seed} | ({"steps": 1} if data.get("lazy") else {})
    return RunConfig(
        model={"path": "model"},  # pyright: ignore[reportArgumentType]
        data=data,  # pyright: ignore[reportArgumentType]
        train=train,  # pyright: ignore[reportArgumentType]
        evaluate={"rows": rows},  # pyright: ignore[reportArgumentType]
        output="out",
    )


def renderer(tokenizer: Any, run: RunConfig) -> Renderer:
    data = run.data
    return Renderer(tokenizer, data.template, data.length, data.source_length, data.overlong)
