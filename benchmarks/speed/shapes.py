"""Rows of unusual shapes: does the speed fall off a cliff? Luthier alone, on a few layers of the model.

Each shape is a data file made of the text of the run's own data, trained in the way of any user. Few layers,
because a document of 32k tokens on all of them would keep more activations than a small machine has memory.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import AutoConfig

from benchmarks.speed import contest
from benchmarks.speed.peers import CONTESTANTS
from benchmarks.speed.workload import Shape, make
from luthier.assemble import open_data, open_text
from luthier.configfile import from_mapping
from luthier.data.dataset import Dataset

LAYERS = 6


@dataclass(frozen=True)
class Rows:
    """Documents of `tokens` tokens, rows of `length`, `batch` rows a step, packed or not."""

    name: str
    tokens: int
    length: int
    batch: int
    packing: str = "best"
    steps: int = 5


# the first is what the others are compared with
SHAPES = (
    Rows("normal: packed rows of 2,048 from documents of 200", 200, 2048, 1),
    Rows("many tiny documents: of 16 tokens in packed rows", 16, 2048, 1),
    Rows("short rows: 8 of 50 tokens, not packed", 50, 2048, 8, "none"),
    Rows("one document of 8k tokens", 8192, 8192, 1, steps=3),
    Rows("one document of 32k tokens", 32768, 32768, 1, steps=2),
)


def measure(
    args: argparse.Namespace, folder: Path, device: str, say: Callable[[str], object]
) -> dict[str, Any]:
    """The table of shapes; one run each."""
    shapes = SHAPES[:3] if args.quick else SHAPES
    pool = token_pool(args, max(s.tokens for s in shapes))
    config = AutoConfig.from_pretrained(args.model)
    config.num_hidden_layers = LAYERS
    table: list[dict[str, Any]] = []
    for number, shape in enumerate(shapes):
        home = folder / str(number)
        table.append({"shape": shape.name, **one(args, shape, home, pool, config, device)})
        row, first = table[-1], table[0]
        if "failed" not in row and "failed" not in first:
            row["of_normal"] = round(row["tokens_per_second"] / first["tokens_per_second"], 3)
        say(f"shapes: {row}")
    return {"layers": LAYERS, "model": Path(args.model).name, "table": table}


def one(
    args: argparse.Namespace,
    shape: Rows,
    folder: Path,
    pool: Callable[[int, int], str],
    config: Any,
    device: str,
) -> dict[str, Any]:
    """A run over rows of one shape."""
    folder.mkdir(parents=True)
    needed = shape.steps * shape.batch * max(shape.length // shape.tokens, 1) + 1
    needed = shape.steps * shape.batch if shape.packing == "none" else needed
    lines = [{"text": pool(i, shape.tokens)} for i in range(needed)]
    data = folder / "rows.jsonl"
    data.write_text("".join(json.dumps(line) + "\n" for line in lines), "utf-8")
    settings = vars(args) | {"data": str(data), "device": device, "quantize": None}
    settings |= {"length": shape.length, "batch": shape.batch, "micro_batch": shape.batch}
    settings["steps"] = shape.steps
    overrides = (f"model.num_layers={LAYERS}", f"data.packing={shape.packing}", "data.format=text")
    if (known := config.max_position_embeddings) < shape.length:  # stretched, as a user would
        factor = -(-shape.length // known)
        overrides += ("model.rope_scaling.type=linear", f"model.rope_scaling.factor={factor}")
    work = make(folder / "rows", "lora", settings, overrides)
    place = contest.own(CONTESTANTS[0])
    sizes = Shape.of(config)
    rates = contest.hold(
        [place],
        work,
        shape.name,
        folder,
        repeats=1,
        limit=args.limit,
        rate=lambda: contest.machine_rate(work, vars(sizes), folder),
        say=lambda text: None,
    )
    turn = place.turns[0]
    if "failed" in turn:
        return turn
    steps = turn["steps"][1:]
    tokens, seconds = sum(s["tokens"] for s in steps), sum(s["seconds"] for s in steps)
    flops = (work.flops + work.attention_flops) * len(steps)
    return {
        "tokens_per_step": tokens / len(steps),
        "tokens_per_second": round(tokens / seconds, 1),
        "share_with_attention": round(flops / seconds / (rates[0]["all"] * 1e9), 4),
        "memory_peak": turn["memory_peak"],
        "rate": rates[0]["all"],
    }


def token_pool(args: argparse.Namespace, longest: int) -> Callable[[int, int], str]:
    """Text of nearly the tokens asked for, cut from the data's own documents: `pool(i, tokens)`."""
    tree = {"model": {"path": args.model}, "data": {"path": args.data}, "output": "none"}
    config = from_mapping(tree, [f"data.length={args.length}", "evaluate.every=never"]).config
    text = open_text(config)
    data = open_data(config, text)
    assert isinstance(data.train, Dataset)
    ids = data.train.ids.tolist()
    data.loader.close()
    special = set(text.tokenizer.all_special_ids)
    ids = [i for i in ids if i not in special]
    ids *= 1 + (2 * longest) // len(ids)

    def pool(number: int, tokens: int) -> str:
        start = number * tokens % (len(ids) - tokens - 64)
        # text cut and read again may have more tokens, and a document that is cut has no end
        fewer = 64 if tokens > 1000 else 0
        return text.tokenizer.decode(ids[start : start + tokens - fewer])

    return pool
