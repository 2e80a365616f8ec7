"""The adapter methods side by side: `python -m benchmarks.methods --model FOLDER --data FOLDER`.

Two parts, of which `--part` chooses one. `learning`: every method trains the same number of steps on the same
batches at its usual rate (benchmarks/methods/table.py), each in a process of its own; held-out loss, scores of
generated answers, size, memory. `speed`: one optimiser step of every method, of the frozen base alone (forward
and input gradients), and of PEFT's LoRA on the same stage, batch and loss, in processes that take turns.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import peft
import torch
import transformers

from benchmarks.methods.step import PEFT
from benchmarks.methods.table import METHODS
from luthier.files import write_json

RESULTS = Path(__file__).parent / "results"
COMMON = (
    *("model.dtype=bfloat16", "data.length=256", "train.batch=2", "optim.warmup=0.1"),
    *("optim.schedule=cosine", "evaluate.every=end", "evaluate.generate=true"),
    *("evaluate.max_new_tokens=16", "evaluate.micro_batch=10", "checkpoint.every=never"),
    *("checkpoint.best=none", "log.sinks=[]", "log.progress=none"),
)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.methods", description=__doc__)
    parser.add_argument("--model", type=Path, required=True, help="folder of the base")
    parser.add_argument("--data", type=Path, help="folder with train.json and dev.json (learning)")
    parser.add_argument("--part", choices=["learning", "speed"], action="append")
    parser.add_argument(
        "--steps", type=int, default=24, help="optimiser steps of the learning part"
    )
    parser.add_argument("--rows", type=int, default=30, help="held-out rows")
    parser.add_argument("--repeats", type=int, default=3, help="turns of the speed part")
    parser.add_argument(
        "--shape", default="model", help="speed: `model`, or `1b` (two layers of it)"
    )
    parser.add_argument("--only", nargs="*", help="names of methods")
    parser.add_argument("--name", default="cpu", help="name of the results file")
    args = parser.parse_args()
    chosen = {n: o for n, o in METHODS.items() if not args.only or n in args.only}
    for part in args.part or ["learning", "speed"]:
        table = (
            learning(args, chosen)
            if part == "learning"
            else speed(args, ["frozen", *PEFT, *chosen])
        )
        RESULTS.mkdir(exist_ok=True)
        path = RESULTS / f"{part}-{args.name}.json"
        write_json(path, {**about(args), "table": table})
        print(path)


def learning(args: argparse.Namespace, chosen: dict[str, tuple[str, ...]]) -> list[dict[str, Any]]:
    """One run of each method; the base's own figures come first."""
    table: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        for number, (name, overrides) in enumerate(chosen.items()):
            output = Path(folder) / str(number)
            config = Path(folder) / f"{number}.yaml"
            config.write_text(
                f"model: {{path: {args.model}}}\ndata: {{path: {args.data}}}\noutput: {output}\n"
            )
            first = ["evaluate.before=true"] if not table else []
            rows = [f"train.steps={args.steps}", f"evaluate.rows={args.rows}", *first]
            command = [sys.executable, "-m", "luthier", "finetune", str(config), *COMMON]
            subprocess.run([*command, *rows, *overrides], check=True, stdout=subprocess.DEVNULL)
            facts = json.loads((output / "report.json").read_text())
            if not table:
                table.append({"method": "base", **scores(facts["before"])})
            weights = list(output.glob("adapter_*")) + list(output.glob("luthier.json"))
            row = {
                "method": name,
                "options": list(overrides),
                **scores(facts["after"]),
                "trained": facts["trained_parameters"],
                "tokens_per_second": round(facts["tokens_per_second"], 1),
                "peak_memory": facts.get("memory_peak"),
                "memory_loaded": facts.get("memory_loaded"),
                "folder_bytes": sum(path.stat().st_size for path in weights),
            }
            table.append(row)
            print(json.dumps(row), flush=True)
    return table


def scores(values: dict[str, float]) -> dict[str, float]:
    """Loss and scores of one evaluation, rounded."""
    return {key: round(values[key], 4) for key in ("loss", "bleu4", "rougel") if key in values}


def speed(args: argparse.Namespace, names: list[str]) -> list[dict[str, Any]]:
    """Median seconds of a step and peak memory of each, and ratios of one turn's neighbours."""
    found: dict[str, list[dict[str, float]]] = {name: [] for name in names}
    for turn in range(args.repeats):
        for name in names if turn % 2 == 0 else names[::-1]:
            command = [
                sys.executable,
                "-m",
                "benchmarks.methods.step",
                name,
                str(args.model),
                args.shape,
            ]
            done = subprocess.run(command, check=True, capture_output=True, text=True)
            found[name].append(json.loads(done.stdout.splitlines()[-1]))
            print(turn, name, found[name][-1], flush=True)
    return summary(found)


def summary(found: dict[str, list[dict[str, float]]]) -> list[dict[str, Any]]:
    """Rows of the table from the turns of each; ratios are those of one turn's neighbours."""
    table = []
    for name, turns in found.items():
        ratios = [a["seconds"] / b["seconds"] for a, b in zip(turns, found["frozen"], strict=True)]
        seconds = [turn["seconds"] for turn in turns]
        table.append({
            "method": name,
            "seconds": round(statistics.median(seconds), 4),
            "spread": [round(min(seconds), 4), round(max(seconds), 4)],
            "of_frozen": round(statistics.median(ratios), 3),
            "of_frozen_spread": [round(min(ratios), 3), round(max(ratios), 3)],
            "peak_memory": int(statistics.median(turn["peak"] for turn in turns)),
        })  # fmt: skip
    return table


def about(args: argparse.Namespace) -> dict[str, Any]:
    """What a results file says of its run."""
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True)
    config = {
        key: value for key, value in vars(args).items() if key not in ("model", "data", "only")
    }
    return {
        "config": {"model": args.model.name, **config},
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "peft": peft.__version__,
        },
        "commit": commit.stdout.strip() or None,
        "device": f"cpu, {torch.get_num_threads()} threads",
    }


if __name__ == "__main__":
    main()
