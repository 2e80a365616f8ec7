"""Predicted against measured memory: `python -m benchmarks.plan`.

Random Llama-shaped models are trained for a few steps on a CPU, each configuration in a process of its own, with
rows that are full. Measured is the peak of resident memory in training steps less what was resident before
the model was built, after a tiny one was trained in the same way (libraries load parts of themselves at first
use); predicted is what `luthier plan` says of the same config.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import platform
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
# glibc gives freed memory back at once; by itself it keeps a part, which no plan can know
RETURNING = {"MALLOC_MMAP_THRESHOLD_": "131072", "MALLOC_TRIM_THRESHOLD_": "131072"}
TINY = {"hidden_size": 128, "intermediate_size": 128, "num_hidden_layers": 2, "vocab_size": 256}
LORA, NF4 = {"adapter.method": "lora"}, {"adapter.method": "lora", "quantize.weights": "nf4"}
CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    f"{size}, {method}, {dtype}, recompute {again}, {number} micro-batch{'es' * (number > 1)}": (
        shape,
        keys | {"model.dtype": dtype, "train.recompute": again, "train.batch": 2 * number},
    )
    for size, shape, method, keys, dtype, again, number in (
        ("small", SMALL, "full", {}, "float32", "none", 1),
        ("small", SMALL, "full", {}, "float32", "layer", 2),
        ("small", SMALL, "full", {}, "bfloat16", "none", 2),
        ("small", SMALL, "full", {}, "bfloat16", "layer", 1),
        ("small", SMALL, "LoRA", LORA, "float32", "none", 1),
        ("small", SMALL, "LoRA nf4", NF4, "bfloat16", "none", 1),
        ("large", LARGE, "full", {}, "bfloat16", "selective", 1),
        ("large", LARGE, "LoRA", LORA, "float32", "none", 1),
        ("large", LARGE, "LoRA", LORA, "bfloat16", "layer", 1),
        ("large", LARGE, "LoRA nf4", NF4, "float32", "none", 1),
    )
}


def config_of(name: str, folder: Path) -> dict[str, Any]:
    """The mapping of one case's run, whose model folder is made; two rows of 512 tokens in a forward."""
    shape, keys = CASES[name]
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
        "train.micro_batch": 2,
        **keys,
    }
    for key, value in flat.items():
        section, _, last = key.partition(".")
        tree.setdefault(section, {})[last] = value
    return tree


def train(config: Any) -> int:
    """Train a few steps on full rows, in this process; the peak of resident bytes within them."""
    from luthier.assemble import build, make_updater
    from luthier.batch import Batch
    from luthier.train.metrics import memory

    updater = make_updater(config, build(config, train=True))
    rows, length = config.micro_batch, config.data.length
    ids = torch.randint(1, 64, (rows, length))
    places = torch.arange(length).expand(rows, length).contiguous()
    batch = Batch(ids, ids, places, torch.zeros_like(ids), tuple(range(rows)))
    Path("/proc/self/clear_refs").write_text("5", "ascii")  # the peak starts afresh
    for step in (1, 2):  # from the second on there are moments
        updater.update([batch] * (config.batch // rows), step=step, lr=1e-5)
    return memory().peak or 0


def measure(name: str, folder: Path) -> dict[str, Any]:
    """Predict and train one case, in this process, after a tiny model: libraries load parts at first use."""
    from luthier.configfile import from_mapping
    from luthier.footprint import footprint
    from luthier.plan import Way, estimate
    from luthier.train.metrics import memory

    config = from_mapping(config_of(name, folder)).config
    found = estimate(config, footprint(config), Way(1, 1, 2), flops=None, bandwidth=None)
    model = folder / "model" / "config.json"
    shape = model.read_text("utf-8")
    model.write_text(json.dumps(json.loads(shape) | TINY), "utf-8")
    train(config)
    gc.collect()
    model.write_text(shape, "utf-8")
    before = memory().now or 0
    measured = train(config) - before
    return {
        "name": name,
        "predicted": found.total,
        "measured": measured,
        "moment": found.moment,
        "items": found.items,
    }


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
        f"Random Llama-shaped models, rows of 2 x {LENGTH} tokens, one process each on a CPU, torch "
        f"{results['torch']}: the peak of resident memory in two steps, beyond what the process held before the "
        f"model was made, where the allocator gives freed memory back at once. {near} of {len(errors)} are within "
        "10 %. The last column is with the allocator as it is by itself: freed memory that it keeps is not "
        "planned. `benchmarks/plan/results/cpu.json`.",
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.plan")
    parser.add_argument("--case", default=None)
    parser.add_argument("--held", action="store_true", help="with the allocator as it usually is")
    parser.add_argument("--only", default="", help="words that a case's name has to hold")
    args = parser.parse_args()
    if args.case is not None:
        with tempfile.TemporaryDirectory() as folder:
            print(json.dumps(measure(args.case, Path(folder))))
        return
    found: dict[str, Any] = {}
    if RESULTS.exists():
        found = {row["name"]: row for row in json.loads(RESULTS.read_text("utf-8"))["rows"]}
    for name in CASES:
        if args.only not in name:
            continue
        words = [sys.executable, "-m", "benchmarks.plan", "--case", name]
        settings = os.environ | ({} if args.held else RETURNING)
        done = subprocess.run(words, capture_output=True, text=True, check=False, env=settings)
        if done.returncode:
            sys.exit(f"{name}: {done.stderr[-2000:]}")
        row = json.loads(done.stdout.splitlines()[-1])
        if args.held:
            row["held"] = row.pop("measured")
        found[name] = found.get(name, {}) | row
        print(table({"rows": [found[name]], "torch": ""}).splitlines()[2:3], flush=True)
        rows = [found[name] for name in CASES if name in found]
        made = {"torch": torch.__version__, "python": platform.python_version(), "rows": rows}
        RESULTS.parent.mkdir(exist_ok=True)
        RESULTS.write_text(json.dumps(made, indent=1) + "\n", "utf-8")


if __name__ == "__main__":
    main()
