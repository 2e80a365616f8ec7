"""Memory of each process when several share a model: `python -m benchmarks.memory MODEL_FOLDER`.

Full fine-tuning on gloo processes of one CPU, short rows. Counted is memory that no file backs (RssAnon), which a
thread reads every few milliseconds, beyond what the process held before: its libraries, the run's groups and
the training of a tiny model, at whose time they load their last parts. A process tells the most that it held
while the model was built and in training steps, and what it held after each of the two.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import platform
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

RESULTS = Path(__file__).parent / "results" / "cpu.json"
LENGTH, STEPS, BATCH = 64, 3, 4
# glibc gives freed memory back at once: by itself it keeps a part
RETURNING = {"MALLOC_MMAP_THRESHOLD_": "131072", "MALLOC_TRIM_THRESHOLD_": "131072"}
TINY = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 96,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 3,
    "vocab_size": 256,
    "bos_token_id": None,
    "eos_token_id": 0,
    "tie_word_embeddings": True,
}
LAYOUTS = [{"shard": n, "stage": stage} for n in (2, 4) for stage in (1, 2, 3)] + [{"tensor": 3}]


def held() -> int:
    """Bytes of this process that no file backs."""
    status = Path("/proc/self/status").read_text("ascii", "replace")
    return next(int(x.split()[1]) * 1024 for x in status.splitlines() if x.startswith("RssAnon:"))


@contextmanager
def most() -> Iterator[list[int]]:
    """The most bytes `held` inside, once it is left."""
    found, over = [held()], threading.Event()

    def watch() -> None:
        while not over.wait(0.003):
            found[0] = max(found[0], held())

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield found
    finally:
        over.set()
        thread.join()
        found[0] = max(found[0], held())


def train(config: Any, world: Any, before: int) -> dict[str, int]:
    """Build and train in this process; bytes beyond `before`."""
    from luthier.assemble import build, make_updater
    from luthier.batch import Batch

    with most() as loading:
        built = build(config, train=True, world=world)
        gc.collect()
    loaded = held()
    updater = make_updater(config, built)
    rows = config.micro_batch
    ids = torch.randint(1, 64, (rows, LENGTH))
    places = torch.arange(LENGTH).expand(rows, LENGTH).contiguous()
    batch = Batch(ids, ids, places, torch.zeros_like(ids), tuple(range(rows)))
    with most() as training:
        for step in range(1, STEPS + 1):
            updater.update([batch] * (config.batch // rows // world.data_size), step=step, lr=1e-5)
    gc.collect()
    found = {"loading": loading[0], "loaded": loaded, "training": training[0], "trained": held()}
    return {name: value - before for name, value in found.items()}


def config_of(model: Path, init: str, layout: dict[str, int]) -> Any:
    from luthier.configfile import from_mapping

    tree = {
        "model": {"path": str(model), "init": init, "device": "cpu", "dtype": "float32"},
        "data": {"path": "none", "length": LENGTH},
        "adapter": {"method": "none"},
        "train": {"batch": BATCH, "micro_batch": 1, "recompute": "layer"},
        "parallel": layout,
        "output": "unused",
    }
    return from_mapping(tree).config


def measure(model: Path, layout: dict[str, int], out: Path) -> None:
    """One rank of a layout."""
    from luthier.assemble import joined

    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(TINY), "utf-8")
        with joined(config_of(model, "pretrained", layout)) as world:
            train(config_of(Path(folder), "random", layout), world, 0)
            gc.collect()
            found = train(config_of(model, "pretrained", layout), world, held())
            (out / f"{world.rank}.json").write_text(json.dumps(found), "utf-8")


def run(model: Path, layout: dict[str, int]) -> list[dict[str, int]]:
    """What each rank of a layout found."""
    size = layout.get("shard", 1) * layout.get("tensor", 1)
    with socket.socket() as made:
        made.bind(("127.0.0.1", 0))
        port = made.getsockname()[1]
    words = [sys.executable, "-m", "benchmarks.memory", str(model), "--layout", json.dumps(layout)]
    with tempfile.TemporaryDirectory() as folder:
        ranks = []
        for rank in range(size):
            place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size}
            place |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
            told = {name: str(value) for name, value in place.items()} if size > 1 else {}
            settings = os.environ | RETURNING | {"OMP_NUM_THREADS": "1"} | told
            ranks.append(subprocess.Popen([*words, "--out", folder], env=settings))
        codes = [rank.wait() for rank in ranks]
        if any(codes):
            sys.exit(f"{layout}: exit codes {codes}")
        return [json.loads((Path(folder) / f"{r}.json").read_text("utf-8")) for r in range(size)]


def name_of(layout: dict[str, int]) -> str:
    return ", ".join(f"`parallel.{key}={value}`" for key, value in layout.items()) or "one process"


def table(results: dict[str, Any]) -> str:
    """The committed figures as Markdown: the largest of a layout's processes, in MB."""
    size = results["parameters"] * 4 / 1e6
    lines = [
        "| layout | most while loading | after loading | most in a step | between steps |",
        "|---|---|---|---|---|",
    ]
    for row in results["rows"]:
        worst = [
            max(rank[name] for rank in row["ranks"]) / 1e6
            for name in ("loading", "loaded", "training", "trained")
        ]
        lines.append(
            f"| {name_of(row['layout'])} | {' | '.join(f'{value:,.0f}' for value in worst)} |"
        )
    lines += [
        "",
        f"MB of the process that holds most; {results['model']}, full fine-tuning in float32, whose weights are "
        f"{size:,.0f} MB, with gradients and AdamW's moments {4 * size:,.0f} MB; rows of {LENGTH} tokens, {STEPS} steps, "
        f"gloo processes on one CPU, torch {results['torch']}. Memory that no file backs, beyond what the process "
        "held after training a tiny model, where the allocator gives freed memory back at once. "
        "`benchmarks/memory/results/cpu.json`.",
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.memory")
    parser.add_argument("model", type=Path, help="a Hugging Face folder")
    parser.add_argument("--name", default="SmolLM2-135M", help="its name in the table")
    parser.add_argument("--only", type=json.loads, default=None, help="one layout, as JSON")
    parser.add_argument("--layout", type=json.loads, default=None, help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, default=None, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.layout is not None:
        measure(args.model, args.layout, args.out)
        return
    from luthier.models.load import blueprint, load_config

    number = sum(p.numel() for p in blueprint(load_config(args.model), "it").parameters())
    rows: list[dict[str, Any]] = []
    if RESULTS.exists() and args.only is not None:
        rows = json.loads(RESULTS.read_text("utf-8"))["rows"]
    for layout in [{}, *LAYOUTS] if args.only is None else [args.only]:
        begin = time.perf_counter()
        found = run(args.model, layout)
        rows = [row for row in rows if row["layout"] != layout]
        rows.append({"layout": layout, "ranks": found})
        made = {"model": args.name, "parameters": number, "rows": rows}
        made |= {"torch": torch.__version__, "python": platform.python_version()}
        print(
            table(made).splitlines()[1 + len(rows)],
            f"{time.perf_counter() - begin:.0f} s",
            flush=True,
        )
        RESULTS.parent.mkdir(exist_ok=True)
        RESULTS.write_text(json.dumps(made, indent=1) + "\n", "utf-8")


if __name__ == "__main__":
    main()
