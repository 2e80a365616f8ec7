"""What each form costs a real model: perplexity on held-out rows in float32, and error of the model's own weights.

Alpaca rows are rendered with the model's chat template and count their answers, C4 documents all their tokens.
All forms see the same tokens. The dense model is read once and holds each form's dequantised weights in turn. The
data sets are those that docs/tasks/data-sets.md describes, in $LUTHIER_DATA.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from luthier.compress import Cost
from luthier.config import ModelConfig, QuantizeConfig
from luthier.data.encode import Renderer
from luthier.data.formats import FORMATS
from luthier.models.load import build_model
from luthier.models.tokenizer import load_tokenizer
from luthier.quantize import QuantizedLinear
from luthier.quantize.loading import plan_quantization

Form = tuple[str, int | None, bool]
Rows = dict[str, list[tuple[Tensor, Tensor]]]
SETS = {"alpaca": "alpaca_en_demo.json", "c4": "c4_demo.jsonl"}
EACH_FORM: tuple[Form, ...] = (
    ("nf4", 64, False),
    ("nf4", 64, True),
    ("fp4", 64, False),
    ("int8", None, False),
    ("int4", 64, False),
    ("int4", None, False),
)


def quality(
    path: str,
    rows: int,
    length: int,
    write: Callable[[list[dict[str, Any]]], None],
    known: Sequence[dict[str, Any]] = (),
) -> None:
    """One row per form, the model as it is first: bits and error of its weights, perplexity on each set.

    `write` gets the table whenever it has one row more. Rows that are `known` are not measured again, but that of the
    model as it is, which must come out as it was: the others are of the same model and rows then.
    """
    chosen = ModelConfig.model_validate({"path": path, "dtype": "float32", "attention": "sdpa"})
    model: Any = build_model(chosen, seed=0)
    sets = held_out(load_tokenizer(path), rows, length)
    table: list[dict[str, Any]] = []
    weights: dict[str, Tensor] = {}
    measured = {row["form"]: row for row in known}
    for form in (None, *EACH_FORM):
        if form is not None and label(form) in measured:
            table.append(measured[label(form)])
            continue
        row: dict[str, Any] = {"form": label(form), "bits": 32.0, "error": 0.0}
        if form is not None:
            asked = QuantizeConfig.model_validate(section(form))
            total = Cost()
            for name, spec in plan_quantization(model, asked).items():
                layer = model.get_submodule(name)
                weight = weights.setdefault(name, layer.weight.data)
                layer.weight.data = weight
                made = QuantizedLinear.from_linear(
                    layer, spec.scheme, spec.block_size, spec.double_quant
                )
                total.add(made, weight)
                layer.weight.data = made.dequantize(torch.float32)
            found = total.row("")
            row |= {"bits": round(found["bits"], 3), "error": round(found["error"], 5)}
        for name, examples in sets.items():
            row[name] = round(perplexity(model, examples), 4)
            row[f"{name}_tokens"] = sum(int((labels >= 0).sum()) for _, labels in examples)
        old = measured.get(row["form"], row)
        if any(
            abs(old[name] / row[name] - 1) > 1e-3 for name in sets
        ):  # other machines round otherwise
            raise SystemExit(f"--missing: of another model or other rows: {old}, now {row}")
        table.append(old)
        print(row, flush=True)
        write(table)


def label(form: Form | None) -> str:
    if form is None:
        return "none"
    return f"{form[0]} {form[1] or 'per output'}{' double' if form[2] else ''}"


def section(form: Form) -> dict[str, Any]:
    """The config's section `quantize`."""
    size = {} if form[1] is None else {"block_size": form[1]}
    return {"weights": form[0], **size, **({"double_quant": True} if form[2] else {})}


def held_out(tokenizer: Any, rows: int, length: int) -> Rows:
    """Ids and labels [1, S] of the last `rows` rows of each data set, cut at `length` tokens."""
    source = Path(os.environ.get("LUTHIER_DATA", "data"))
    found: Rows = {}
    for name, file in SETS.items():
        text = (source / file).read_text("utf-8")
        every = json.loads(text) if name == "alpaca" else map(json.loads, text.splitlines())
        template, reader = ("auto", "alpaca") if name == "alpaca" else ("none", "text")
        renderer = Renderer(tokenizer, template=template, length=length)
        examples = [renderer.encode(FORMATS[reader](row))[0] for row in list(every)[-rows:]]
        found[name] = [
            (torch.tensor([list(e.input_ids)]), torch.tensor([list(e.labels)])) for e in examples
        ]
    return found


def perplexity(model: Any, examples: list[tuple[Tensor, Tensor]]) -> float:
    """e to the mean loss per counted token."""
    loss = count = 0.0
    with torch.no_grad():
        for ids, labels in examples:
            hidden = model.base_model(input_ids=ids, use_cache=False).last_hidden_state  # [1, S, D]
            keep = labels >= 0
            logits = model.get_output_embeddings()(hidden[keep])  # [n, V]
            loss += float(F.cross_entropy(logits, labels[keep], reduction="sum"))
            count += int(keep.sum())
    return math.exp(loss / count)
