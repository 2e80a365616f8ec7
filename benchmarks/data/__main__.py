"""How fast rows become batches: `python -m benchmarks.data --model FOLDER`.

Short question-answer rows made of the Alpaca demo (in LUTHIER_DATA), many times as many. Rows a second of reading,
rendering with tokenising, packing and collating in one process, and of a whole run's reading with 0 and more
processes; resident memory while lazy data flow; the share of a real run's steps spent waiting for data.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

from luthier.assemble import Text, open_text
from luthier.config import RunConfig
from luthier.configfile import from_mapping
from luthier.data.dataset import Dataset, Encoder, LazyDataset, prepare
from luthier.data.loader import Loader, collate
from luthier.data.packing import pack
from luthier.data.sources import open_source
from luthier.files import write_json
from luthier.train.metrics import memory, read_metrics

RESULTS = Path(__file__).parent / "results"
WORDS = 14  # of a question and of an answer: short rows
STEP = 7919  # words between the places of two texts; prime, so that no place comes twice soon
LENGTH = 2048
SAMPLE = 4000  # rows that one process is timed on


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.data", description=__doc__)
    parser.add_argument("--model", required=True, help="folder of a model with its tokenizer")
    parser.add_argument("--rows", type=int, default=200_000)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--steps", type=int, default=12, help="of the real run; 0 = none")
    parser.add_argument("--quick", action="store_true", help="20,000 rows, once")
    parser.add_argument("--name", default="cpu", help="of the results file")
    parser.add_argument("--lazy", metavar="FILE", help=argparse.SUPPRESS)  # a process of `flat`
    args = parser.parse_args()
    if args.lazy:
        print(json.dumps(flow(args.model, Path(args.lazy), args.workers)))
        return 0
    if args.quick:
        args.rows, args.repeats = 20_000, 1
    source = Path(os.environ.get("LUTHIER_DATA", "")) / "alpaca_en_demo.json"
    if not source.is_file():
        print("set LUTHIER_DATA to a folder with alpaca_en_demo.json", file=sys.stderr)
        return 2
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "rows.jsonl"
        write_rows(path, json.loads(source.read_text("utf-8")), args.rows)
        found: dict[str, Any] = {**about(args)}
        config = config_of(args.model, path)
        text = open_text(config)
        found["stages"] = stages(config, text)
        found["whole"] = {
            str(n): whole(args.model, path, text, n, args.repeats, args.rows)
            for n in (0, args.workers)
        }
        found["lazy"] = flat(args, path)
        if args.steps:
            found["waiting"] = [wait(args, path, lazy) for lazy in (False, True)]
    for name, value in found.items():
        print(f"{name}: {json.dumps(value)}")
    RESULTS.mkdir(exist_ok=True)
    write_json(RESULTS / f"{args.name}.json", found)
    print(RESULTS / f"{args.name}.json")
    return 0


def write_rows(path: Path, rows: list[dict[str, str]], count: int) -> None:
    """`count` short rows as JSON lines: questions and answers are runs of words out of the data's own texts, each
    from a place of its own."""
    words = [
        w for row in rows for w in f"{row['instruction']} {row['output']}".split(" ") if w.strip()
    ]
    places = (i * STEP % (len(words) - WORDS) for i in itertools.count())
    with path.open("w", encoding="utf-8") as file:
        for _ in range(count):
            src, tgt = (" ".join(words[i : i + WORDS]) for i in itertools.islice(places, 2))
            file.write(json.dumps({"src": src, "tgt": tgt}) + "\n")


def config_of(model: str, path: Path, *overrides: str) -> RunConfig:
    tree = {"model": {"path": model}, "data": {"path": str(path)}, "output": "none"}
    words = [f"data.length={LENGTH}", "evaluate.every=never", *overrides]
    return from_mapping(tree, words).config


def stages(config: RunConfig, text: Text) -> dict[str, Any]:
    """Rows a second of each stage in this process, by its own processor time: others' load does not count."""
    source = open_source(config.data.path, config.data, "train")
    assert source is not None
    encoder = Encoder(source, config.data, text.renderer)
    size = min(SAMPLE, len(source) // 2)
    encoder(range(size))  # the words of the first rows are all new
    some = range(size, 2 * size)
    seconds, outcomes = timed(lambda: encoder(some))
    reading, _ = timed(lambda: [source.row(i) for i in some])
    examples = [example for outcome in outcomes for example in outcome.examples]
    lengths = [len(example.input_ids) for example in examples]
    packing, rows = timed(lambda: pack(lengths, LENGTH, "best"))
    documents = [[(examples[i].input_ids, examples[i].labels) for i in row] for row in rows]
    collating, _ = timed(lambda: [collate([row], text.pad_id) for row in documents])
    rates = {"reading": reading, "reading, rendering, tokenising": seconds}
    rates |= {"packing": packing, "collating": collating}
    return {
        "tokens_per_row": round(float(np.mean(lengths)), 1),
        "rows_per_cpu_second": {name: round(len(some) / each) for name, each in rates.items()},
    }


def timed(run: Any) -> tuple[float, Any]:
    begin = time.process_time()
    found = run()
    return max(time.process_time() - begin, 1e-9), found


def whole(
    model: str, path: Path, text: Text, workers: int, repeats: int, rows: int
) -> dict[str, float]:
    """Rows a second from the file to packed rows, as a run prepares them, by the clock on the wall; and by the
    processor time of all processes together, in which other programs' load does not count."""
    rates, used = [], []
    config = config_of(model, path, f"data.workers={workers}")
    for _ in range(repeats):
        begin, before = time.perf_counter(), sum(os.times()[:4])
        data = prepare(config, text.renderer, "train")
        assert isinstance(data, Dataset)
        pack(data.lengths, LENGTH, "best")
        rates.append(rows / (time.perf_counter() - begin))
        used.append(rows / (sum(os.times()[:4]) - before))
    found = {"median": statistics.median(rates), "min": min(rates), "max": max(rates)}
    found["per_cpu_second"] = statistics.median(used)
    return {name: round(value) for name, value in found.items()}


def flat(args: argparse.Namespace, path: Path) -> dict[str, Any]:
    """Memory of a process of its own, in which lazy data flow."""
    command = [sys.executable, "-m", "benchmarks.data", "--model", args.model]
    command += ["--workers", str(args.workers), "--lazy", str(path)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def flow(model: str, path: Path, workers: int) -> dict[str, Any]:
    """Draw nearly an epoch of lazy rows; resident bytes after each tenth, and rows a second."""
    lazy = ("data.lazy=true", "train.steps=1000000", f"data.workers={workers}")
    config = config_of(model, path, *lazy)
    text = open_text(config)
    data = prepare(config, text.renderer, "train")
    assert isinstance(data, LazyDataset)
    loader = Loader(
        data, batch=8, micro_batch=8, pad_id=text.pad_id, seed=0, length=LENGTH, packing="best"
    )
    steps = max(int(0.9 * len(data.source) * data.sample_lengths.mean() / LENGTH / 8), 10)
    resident, documents = [], 0
    begin = time.perf_counter()
    for number, step in zip(range(steps), loader.step_batches(), strict=False):
        documents += sum(int((batch.position_ids == 0).sum()) for batch in step)
        if (number + 1) % (steps // 10) == 0:
            resident.append(memory().now)
    seconds = time.perf_counter() - begin
    loader.close()
    return {"resident": resident, "rows_per_second": round(documents / seconds)}


def wait(args: argparse.Namespace, path: Path, lazy: bool) -> dict[str, Any]:
    """A real LoRA run; share of its steps (without the first) spent waiting for data."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "run.json"
        tree = {"model": {"path": args.model}, "data": {"path": str(path)}}
        file.write_text(json.dumps(tree), "utf-8")
        output = Path(folder) / "out"
        words = [f"output={output}", f"train.steps={args.steps}", f"data.lazy={str(lazy).lower()}"]
        words += ["train.batch=2", "train.micro_batch=1", f"data.length={LENGTH}"]
        words += ["adapter.method=lora", "checkpoint.every=never", "log.sinks=[]"]
        words += ["log.progress=none", f"data.workers={args.workers}", "model.dtype=bfloat16"]
        command = [sys.executable, "-m", "luthier", "finetune", str(file), *words]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        steps = [r for r in read_metrics(output / "metrics.jsonl") if r["kind"] == "train"]
    waits, seconds = ([r[k] for r in steps] for k in ("wait_seconds", "step_seconds"))
    return {
        "lazy": lazy,
        "steps": len(steps),
        "first_wait": round(waits[0], 3),
        "share": round(sum(waits[1:]) / sum(seconds[1:]), 5),
        "longest": round(max(waits[1:], default=0.0), 4),
        "step_seconds": round(statistics.median(seconds), 3),
    }


def about(args: argparse.Namespace) -> dict[str, Any]:
    """What a results file says of its run; no paths."""
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True)
    config = {k: v for k, v in vars(args).items() if k not in ("model", "lazy")}
    return {
        "command": f"python -m benchmarks.data --model {Path(args.model).name}",
        "config": {"model": Path(args.model).name, **config},
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
        "commit": commit.stdout.strip() or None,
        "device": f"cpu, {os.cpu_count()} cores",
    }


if __name__ == "__main__":
    raise SystemExit(main())
