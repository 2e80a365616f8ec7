"""Predicted against measured memory: `python -m benchmarks.plan`.

Random Llama-shaped models are trained for a few steps on a CPU, each configuration in processes of its own, with
rows that are full. Measured is the peak of resident memory in training steps less what was resident before
the model was built, after a tiny one was trained in the same way (libraries load parts of themselves at first
use), of the process with most; predicted is what `luthier plan` says of the same config.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import os
import platform
import socket
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

RESULTS = Path(__file__).parent / "results" / "cpu.json"
LENGTH = 512
SHAPE = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 8192,
    "max_position_embeddings": 2048,
    "bos_token_id": None,
    "eos_token_id": 0,
    "rms_norm_eps": 1e-5,
}
SMALL = {"hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 8} | {
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "tie_word_embeddings": True,
}
LARGE = {"hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 6} | {
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "tie_word_embeddings": False,
}
SMOL = {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30} | {
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "vocab_size": 49152,
    "tie_word_embeddings": True,
}  # SmolLM2-135M
SHAPES = {"small": SMALL, "large": LARGE, "135M": SMOL}
# glibc gives freed memory back at once; by itself it keeps a part, which no plan can know
RETURNING = {"MALLOC_MMAP_THRESHOLD_": "131072", "MALLOC_TRIM_THRESHOLD_": "131072"}
TINY = {"hidden_size": 128, "intermediate_size": 128, "num_hidden_layers": 2, "vocab_size": 256} | {
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
}
METHODS: dict[str, dict[str, Any]] = {
    "full": {},
    "LoRA": {"adapter.method": "lora"},
    "LoRA nf4": {"adapter.method": "lora", "quantize.weights": "nf4"},
}
ROWS = 2  # of a micro-batch
# shape, method, type, recomputation, micro-batches per process and step, layout
RUNS = (
    ("small", "full", "float32", "none", 1, ""),
    ("small", "full", "float32", "layer", 2, ""),
    ("small", "full", "bfloat16", "none", 2, ""),
    ("small", "full", "bfloat16", "layer", 1, ""),
    ("small", "LoRA", "float32", "none", 1, ""),
    ("small", "LoRA nf4", "bfloat16", "none", 1, ""),
    ("large", "full", "bfloat16", "selective", 1, ""),
    ("large", "LoRA", "float32", "none", 1, ""),
    ("large", "LoRA", "bfloat16", "layer", 1, ""),
    ("large", "LoRA nf4", "float32", "none", 1, ""),
    ("135M", "full", "bfloat16", "none", 1, ""),
    ("135M", "LoRA nf4", "bfloat16", "layer", 2, ""),
    ("large", "full", "float32", "none", 1, "replicate=2"),
    ("large", "full", "bfloat16", "none", 2, "shard=2 stage=2"),
    ("large", "LoRA", "bfloat16", "none", 1, "tensor=2"),
    ("large", "LoRA", "float32", "layer", 1, "context=2"),
    ("large", "LoRA nf4", "bfloat16", "none", 1, "replicate=2"),
    ("large", "full", "float32", "none", 4, "pipeline=2"),
    ("large", "full", "float32", "layer", 2, "shard=3 stage=1"),
    ("large", "full", "float32", "layer", 1, "shard=4 stage=3"),
    ("large", "LoRA nf4", "bfloat16", "layer", 1, "shard=2 tensor=2 stage=2"),
    ("large", "full", "bfloat16", "none", 2, "tensor=2 pipeline=2"),
)


def _case(
    size: str, method: str, dtype: str, again: str, number: int, layout: str
) -> tuple[str, tuple[dict[str, Any], dict[str, Any], int]]:
    """Name of a run -> shape, keys of the config, processes."""
    degrees = {key: int(n) for key, n in (word.split("=") for word in layout.split())}
    data = degrees.get("replicate", 1) * degrees.get("shard", 1)
    keys = METHODS[method] | {"model.dtype": dtype, "train.recompute": again}
    keys |= {"train.batch": ROWS * number * data}
    keys |= {f"parallel.{key}": n for key, n in degrees.items()}
    processes = math.prod(n for key, n in degrees.items() if key != "stage")
    name = (
        f"{size}, {method}, {dtype}, recompute {again}, {number} micro-batch{'es' * (number > 1)}"
    )
    name += f", {layout}" if layout else ""
    return name, (SHAPES[size], keys, processes)


CASES = dict(_case(*run) for run in RUNS)


def config_of(name: str, folder: Path) -> dict[str, Any]:
    """The mapping of one case's run, whose model folder is made; two rows of 512 tokens in a forward."""
    shape, keys, _ = CASES[name]
    model = folder / "model"
    model.mkdir(exist_ok=True)
    (model / "config.json").write_text(json.dumps(SHAPE | shape), "utf-8")
    tree: dict[str, Any] = {"output": str(folder / "run")}
    flat = {
        "model.path": str(model),
        "model.init": "random",
        "model.device": "cpu",
        "data.path": "none",
        "data.length": LENGTH,
        "train.micro_batch": ROWS,
        **keys,
    }
    for key, value in flat.items():
        section, _, last = key.partition(".")
        tree.setdefault(section, {})[last] = value
    return tree


def train(config: Any, world: Any) -> int:
    """Train a few steps on full rows, in this process; the peak of resident bytes within them."""
    from luthier.assemble import build, make_updater
    from luthier.batch import Batch
    from luthier.heap import return_freed_memory
    from luthier.train.metrics import memory

    updater = make_updater(config, build(config, train=True, world=world))
    gc.collect()
    return_freed_memory()
    rows, length = config.micro_batch, config.data.length
    ids = torch.randint(1, 64, (rows, length))
    places = torch.arange(length).expand(rows, length).contiguous()
    batch = Batch(ids, ids, places, torch.zeros_like(ids), tuple(range(rows)))
    world.gather(None)  # nobody's peak starts before all have built
    Path("/proc/self/clear_refs").write_text("5", "ascii")  # the peak starts afresh
    for step in (1, 2):  # from the second on there are moments
        updater.update([batch] * (config.batch // rows // world.data_size), step=step, lr=1e-5)
    return memory().peak or 0


def measure(name: str, folder: Path) -> dict[str, Any]:
    """Predict and train one case, in this process, after a tiny model: libraries load parts at first use."""
    from luthier.assemble import joined
    from luthier.configfile import from_mapping
    from luthier.footprint import footprint
    from luthier.heap import return_freed_memory
    from luthier.parallel.degrees import fit_batch
    from luthier.spread import Way, estimate
    from luthier.train.metrics import memory

    tree = config_of(name, folder)
    tiny = folder / "tiny"
    tiny.mkdir(exist_ok=True)
    (tiny / "config.json").write_text(json.dumps(SHAPE | TINY), "utf-8")
    small = from_mapping(tree | {"model": tree["model"] | {"path": str(tiny)}}).config
    with joined(from_mapping(tree).config) as world:
        config, small = (
            fit_batch(each, world.data_size, world.sizes["pipeline"])
            for each in (from_mapping(tree).config, small)
        )
        way = Way(**world.sizes, stage=config.parallel.stage)
        found = estimate(config, footprint(config), way, flops=None, bandwidth=None, saving=False)
        train(small, world)
        gc.collect()
        return_freed_memory()
        before = memory().now or 0
        measured = max(world.gather(train(config, world) - before))
    return {
        "name": name,
        "predicted": found.total,
        "measured": measured,
        "moment": found.moment,
        "items": found.items,
    }


def run(name: str, *, held: bool) -> dict[str, Any]:
    """Measure one case in processes of its own; what rank 0 tells."""
    settings = os.environ | ({} if held else RETURNING)
    with tempfile.TemporaryDirectory() as folder, socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        words = [sys.executable, "-m", "benchmarks.plan", "--case", name, "--folder", folder]
        number = CASES[name][2]
        if number > 1:
            place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
            settings |= place | {n: str(number) for n in ("WORLD_SIZE", "LOCAL_WORLD_SIZE")}
        free.close()
        ranks = [
            subprocess.Popen(
                words,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                env=settings | ({"RANK": str(r), "LOCAL_RANK": str(r)} if number > 1 else {}),
            )
            for r in range(number)
        ]
        told = [rank.communicate() for rank in ranks]
    for rank, (_, errors) in zip(ranks, told, strict=True):
        if rank.returncode:
            sys.exit(f"{name}: {errors[-2000:]}")
    return json.loads(told[0][0].splitlines()[-1])


def table(results: dict[str, Any]) -> str:
    """The committed figures as Markdown."""
    lines = [
        "| run | predicted | measured | error | measured, freed memory kept |",
        "|---|---|---|---|---|",
    ]
    errors = []
    for row in results["rows"]:
        if "measured" not in row:
            continue
        errors.append(row["predicted"] / row["measured"] - 1)
        sizes = f"{row['predicted'] / 1e6:,.0f} MB | {row['measured'] / 1e6:,.0f} MB"
        held = f"{row['held'] / 1e6:,.0f} MB" if "held" in row else ""
        lines.append(f"| {row['name']} | {sizes} | {errors[-1]:+.1%} | {held} |")
    near = sum(abs(error) <= 0.1 for error in errors)
    lines += [
        "",
        f"Random Llama-shaped models, rows of 2 x {LENGTH} tokens, one process unless a layout is named, on a CPU, torch "
        f"{results['torch']}: the peak of resident memory in two steps, beyond what the process held before the "
        f"model was made, where the allocator gives freed memory back at once. {near} of {len(errors)} are within "
        "10 %. The last column is with the allocator as it is by itself: freed memory that it keeps is not "
        "planned. `benchmarks/plan/results/cpu.json`.",
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.plan")
    parser.add_argument("--case", default=None)
    parser.add_argument("--folder", default="")
    parser.add_argument("--held", action="store_true", help="with the allocator as it usually is")
    parser.add_argument("--only", default="", help="words that a case's name has to hold")
    args = parser.parse_args()
    if args.case is not None:
        print(json.dumps(measure(args.case, Path(args.folder))))
        return
    found: dict[str, Any] = {}
    if RESULTS.exists():
        found = {row["name"]: row for row in json.loads(RESULTS.read_text("utf-8"))["rows"]}
    for name in CASES:
        if args.only not in name:
            continue
        row = run(name, held=args.held)
        if args.held:
            row["held"] = row.pop("measured")
        found[name] = found.get(name, {}) | row
        print(*table({"rows": [found[name]], "torch": ""}).splitlines()[2:3], flush=True)
        rows = [found[name] for name in CASES if name in found]
        made = {"torch": torch.__version__, "python": platform.python_version(), "rows": rows}
        RESULTS.parent.mkdir(exist_ok=True)
        RESULTS.write_text(json.dumps(made, indent=1) + "\n", "utf-8")


if __name__ == "__main__":
    main()
