"""What each form costs a real model: perplexity on held-out rows, through `luthier.evaluate` in float32.

Alpaca rows count their answers, C4 documents all their tokens. Beside it the relative error of the model's own weights.
The data sets are those that docs/tasks/data-sets.md describes, in $LUTHIER_DATA.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import tempfile
from pathlib import Path
from typing import Any

import torch

import luthier
from luthier.compress import Cost
from luthier.config import ModelConfig, QuantizeConfig
from luthier.models.load import build_model
from luthier.quantize import QuantizedLinear
from luthier.quantize.loading import Quantization

Form = tuple[str, int | None, bool]
SETS = {"alpaca": "alpaca_en_demo.json", "c4": "c4_demo.jsonl"}


def quality(model: str, forms: tuple[Form, ...], rows: int, length: int) -> list[dict[str, Any]]:
    """One row per form, the model as it is first: bits and error of its weights, perplexity on each set."""
    table: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        sets = held_out(Path(folder), rows)
        for form in (None, *forms):
            row: dict[str, Any] = {"form": label(form)}
            row |= {"bits": 32.0, "error": 0.0} if form is None else cost(model, form)
            for name, path in sets.items():
                found = measure(model, form, path, name, length, Path(folder))
                row[name] = round(found["perplexity"], 4)
                row[f"{name}_tokens"] = found["tokens"]
            table.append(row)
            print(row, flush=True)
    return table


def label(form: Form | None) -> str:
    if form is None:
        return "none"
    return f"{form[0]} {form[1] or 'channel'}{' double' if form[2] else ''}"


def section(form: Form | None) -> dict[str, Any]:
    """The config's section `quantize`."""
    if form is None:
        return {}
    size = {} if form[1] is None else {"block_size": form[1]}
    return {"weights": form[0], **size, **({"double_quant": True} if form[2] else {})}


def held_out(folder: Path, rows: int) -> dict[str, Path]:
    """The last `rows` rows of each data set, in files of their own."""
    source = Path(os.environ.get("LUTHIER_DATA", "data"))
    found = {}
    for name, file in SETS.items():
        text = (source / file).read_text("utf-8")
        every = json.loads(text) if file.endswith(".json") else [json.loads(x) for x in text.splitlines()]  # fmt: skip
        found[name] = folder / f"{name}.jsonl"
        lines = "".join(json.dumps(row) + "\n" for row in every[-rows:])
        found[name].write_text(lines, "utf-8")
    return found


def cost(model: str, form: Form) -> dict[str, Any]:
    """Bits per weight and relative error over all quantised layers."""
    total = Cost()

    def seen(layer: QuantizedLinear, weight: torch.Tensor) -> None:
        total.add(layer, weight)

    asked = Quantization(QuantizeConfig.model_validate(section(form)), seen=seen)
    chosen = ModelConfig.model_validate({"path": model, "dtype": "float32"})
    build_model(chosen, seed=0, quantization=asked)
    row = total.row("")
    return {"bits": round(row["bits"], 3), "error": round(row["error"], 5)}


def measure(
    model: str, form: Form | None, path: Path, name: str, length: int, folder: Path
) -> dict[str, Any]:
    """Loss and perplexity as `luthier evaluate` measures them."""
    config: dict[str, Any] = {
        "model": {"path": model, "dtype": "float32"},
        "data": {"path": str(path), "validation_path": str(path), "length": length, "workers": 0},
        "train": {"batch": 4},
        "quantize": section(form),
        "output": str(folder / "nothing"),
    }
    if name == "c4":
        config["data"] |= {"format": "text", "template": "none"}
    with contextlib.redirect_stdout(io.StringIO()):
        return luthier.evaluate(config)
