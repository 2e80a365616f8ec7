"""Padding share of each packing method on AdvertiseGen and Alpaca: `python -m benchmarks.packing`.

Needs `LUTHIER_DATA`, a folder with `advertisegen/` and `alpaca_en_demo.json`, and a tokenizer folder. Two
shares are given: of full rows (rows x length), and of what a run computes on (batches padded to their
longest row). Rows longer than the length are cut. Nothing is downloaded.
"""

from __future__ import annotations

import argparse
import itertools
import math
import os
import platform
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from transformers import AutoTokenizer

from luthier.config import RunConfig
from luthier.data.dataset import Dataset, prepare
from luthier.data.encode import Renderer
from luthier.data.loader import Loader
from luthier.data.packing import Method, pack
from luthier.files import write_json

SETS = {"advertisegen": "advertisegen", "alpaca": "alpaca_en_demo.json"}
LENGTHS = (1024, 2048, 4096)
METHODS: tuple[Method, ...] = ("none", "sequential", "greedy", "best")
RESULTS = Path(__file__).parent / "results"


def read(path: Path, tokenizer: Any, template: str, length: int) -> Dataset:
    """The training examples of one data set."""
    config = RunConfig(
        model={"path": "none"},  # pyright: ignore[reportArgumentType]
        data={"path": str(path), "length": length, "workers": 0, "template": template},  # pyright: ignore[reportArgumentType]
        output="none",
    )
    found = prepare(config, Renderer(tokenizer, template, length), "train")
    assert isinstance(found, Dataset)
    return found


def measure(
    data: Dataset, length: int, method: Method, batch: int, micro_batch: int
) -> dict[str, Any]:
    """Rows, seconds, and the two shares of padding of one epoch."""
    tokens = int(data.lengths.sum())
    begin = time.process_time()
    rows = pack(data.lengths, length, method)
    seconds = time.process_time() - begin
    loader = Loader(
        data, batch=batch, micro_batch=micro_batch, pad_id=0, seed=0, length=length, packing=method
    )
    steps = itertools.islice(loader.step_batches(), loader.steps_per_epoch)
    slots = sum(micro.input_ids.numel() for step in steps for micro in step)
    loader.close()
    return {
        "method": method,
        "length": length,
        "rows": len(rows),
        "fewest_rows_possible": math.ceil(tokens / length),
        "padding_of_full_rows": round(1 - tokens / (len(rows) * length), 5),
        "padding_of_batches": round(1 - tokens / slots, 5),
        "seconds": round(seconds, 3),
    }


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.packing", description=__doc__)
    parser.add_argument("--tokenizer", required=True, help="folder with tokenizer files")
    parser.add_argument("--template", default="auto", help="data.template (default: auto)")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--micro-batch", type=int, default=8)
    args = parser.parse_args()
    folder = os.environ.get("LUTHIER_DATA")
    if folder is None or not Path(folder).is_dir():
        sys.exit("set LUTHIER_DATA to a folder with advertisegen/ and alpaca_en_demo.json")
    tokenizer = AutoTokenizer.from_pretrained(args.tokenizer)
    tables = {}
    for name, path in SETS.items():
        table = tables[name] = []
        for length in LENGTHS:
            data = read(Path(folder) / path, tokenizer, args.template, length)
            table += [measure(data, length, m, args.batch, args.micro_batch) for m in METHODS]
        mean = float(np.mean(data.lengths))
        print(f"\n{name}: {len(data)} examples of {mean:.0f} tokens on average")
        print(f"{'length':>6} {'method':<11}{'rows':>6}  of full rows  of batches  seconds")
        for r in table:
            print(
                f"{r['length']:>6} {r['method']:<11}{r['rows']:>6}"
                f"{r['padding_of_full_rows']:>13.2%}{r['padding_of_batches']:>12.2%}{r['seconds']:>9.2f}"
            )
    write_json(_result_file(Path(args.tokenizer).name), {**_about(args), "tables": tables})


def _about(args: argparse.Namespace) -> dict[str, Any]:
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True)
    return {
        "config": {
            "tokenizer": Path(args.tokenizer).name,
            **{k: v for k, v in vars(args).items() if k != "tokenizer"},
        },
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
        "commit": commit.stdout.strip() or None,
        "device": "cpu",
    }


def _result_file(name: str) -> Path:
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    print(f"\n{path}")
    return path


if __name__ == "__main__":
    main()
