"""Luthier and its peers side by side: `python -m benchmarks.speed --model FOLDER --data FILE --peers FOLDER`.

Jobs: LoRA r 8 on all linears, full fine-tuning, and with `--quantize nf4` LoRA on a quantised random 1B
model; then shapes of data, Luthier alone. `--setup FOLDER` makes the peers' environments, `--quick` takes 4
minutes, `--gpu` runs `gpu.py` and the peers on a GPU. Writes `results/NAME.json`; docs take their tables
from there (`make docs`).
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from benchmarks.speed import peers
from benchmarks.speed.runners.watch import versions

RESULTS = Path(__file__).parent / "results"
PRIVATE = ("model", "data", "peers", "peer", "setup")  # paths, and what only makes environments


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.speed", description=__doc__)
    parser.add_argument("--model", help="folder of a base with its tokenizer")
    known = os.environ.get("LUTHIER_DATA")
    parser.add_argument(
        "--data",
        default=str(Path(known) / "alpaca_en_demo.json") if known else None,
        help="conversations, as data.path takes them (default: alpaca_en_demo.json of LUTHIER_DATA)",
    )
    parser.add_argument("--peers", type=Path, help="folder of environments made by --setup")
    parser.add_argument("--peer", action="append", default=[], metavar="NAME=PYTHON")
    parser.add_argument("--setup", type=Path, metavar="FOLDER", help="make the environments there")
    parser.add_argument("--only-peers", nargs="*", help="environments that --setup makes")
    parser.add_argument("--only", nargs="*", help="names of contestants")
    parser.add_argument("--also", action="append", default=[], metavar="NAME:KEY=VALUE,...",
                        help="one more way of Luthier: its name, overrides and variables")  # fmt: skip
    parser.add_argument("--jobs", nargs="*", choices=["lora", "full", "qlora", "shapes"])
    parser.add_argument("--quantize", choices=["nf4", "fp4"], help="adds the job qlora")
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--batch", type=int, default=1, help="packed rows per step")
    parser.add_argument("--micro-batch", type=int, default=1)
    parser.add_argument("--steps", type=int, default=8, help="steps of a turn, warm ones included")
    parser.add_argument("--warm", type=int, default=2, help="steps that are not timed")
    parser.add_argument("--repeats", type=int, default=3, help="turns")
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--lr", type=float, default=3e-4)
    parser.add_argument("--full-lr", type=float, default=2e-5)
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32"])
    parser.add_argument("--layers", type=int, help="of the random model, 16 in all")
    parser.add_argument("--seed", type=int, default=42)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--limit", type=float, default=900, help="seconds of one run")
    parser.add_argument("--quick", action="store_true", help="one turn of four steps, LoRA only")
    parser.add_argument("--gpu", action="store_true")
    parser.add_argument(
        "--tiny", action="store_true", help="with --gpu: tiny shapes, on any device"
    )
    parser.add_argument("--name", help="of the results file (default: cpu, or gpu)")
    args = parser.parse_args(argv)
    if args.quick:
        args.repeats, args.steps, args.warm = 1, 4, 1
        args.jobs = args.jobs or ["lora"]
    if args.jobs is None:
        args.jobs = ["lora", "full", "shapes"]
    if args.quantize and "qlora" not in args.jobs:
        args.jobs.append("qlora")
    elif "qlora" in args.jobs:
        args.quantize = args.quantize or "nf4"
    args.name = args.name or ("gpu" if args.gpu else "cpu")
    return args


def main() -> int:
    args = parse()
    if args.setup is not None:
        return peers.setup(args.setup, args.only_peers, torch.cuda.is_available())
    path = RESULTS / f"{args.name}.json"
    if args.gpu:
        from benchmarks.speed import gpu  # it runs where what is imported below is not installed

        code = gpu.main(path, tiny=args.tiny, quantize=args.quantize)
        if code or args.tiny or not args.model:
            return code
        path = RESULTS / f"{args.name}-peers.json"
    if not args.model or not args.data:
        print(
            "--model FOLDER is needed, and --data FILE or the folder LUTHIER_DATA", file=sys.stderr
        )
        return 2
    from benchmarks.speed import jobs, shapes, table

    known = peers.python_words(args.peer)
    device = "cuda" if args.gpu else "cpu"
    found = about(args, device)
    with tempfile.TemporaryDirectory() as folder:
        kinds = [kind for kind in args.jobs if kind != "shapes"]
        found["jobs"] = []
        for kind in kinds:
            home = Path(folder) / kind
            found["jobs"].append(jobs.measure(args, kind, home, known, device, say))
            write(path, found)
        if "shapes" in args.jobs:
            found["shapes"] = shapes.measure(args, Path(folder) / "shapes", device, say)
            write(path, found)
    print("\n".join(["", table.page(found, path.name), str(path)]))
    return 0


def write(path: Path, found: dict[str, Any]) -> None:
    """After every job: a run that is cut short has told what it has."""
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(found, indent=2) + "\n", "utf-8")


def about(args: argparse.Namespace, device: str) -> dict[str, Any]:
    """What a results file says of its run; no paths."""
    git = ["git", "-C", str(Path(__file__).parent)]
    commit = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True)
    changed = subprocess.run([*git, "status", "--porcelain"], capture_output=True, text=True)
    config = {key: value for key, value in vars(args).items() if key not in PRIVATE}
    words = [
        f"--{k.replace('_', '-')} {v}" for k, v in config.items() if v not in (None, False, [])
    ]
    return {
        "command": f"python -m benchmarks.speed --model {Path(args.model).name} "
        f"--data {Path(args.data).name} {' '.join(words)}",
        "config": {"model": Path(args.model).name, "data": Path(args.data).name, **config},
        "date": datetime.now(UTC).date().isoformat(),
        "versions": versions(),
        "commit": commit.stdout.strip() or None,
        "changed": bool(changed.stdout.strip()),  # files that differ from that commit
        "device": torch.cuda.get_device_name()
        if device == "cuda"
        else f"cpu, {cpu_name()}, {args.threads} threads",
    }


def cpu_name() -> str:
    """The processor's name and the units that decide its speed in bf16, where the system tells."""
    info = Path("/proc/cpuinfo")
    text = info.read_text("utf-8", "replace") if info.is_file() else ""
    lines = dict(line.split(":", 1) for line in text.splitlines() if ":" in line)
    found = {key.strip(): value.strip() for key, value in lines.items()}
    flags = found.get("flags", "").split()
    units = [f for f in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if f in flags]
    return f"{found.get('model name') or platform.machine()} ({', '.join(units)})"


def say(text: str) -> None:
    print(text, flush=True)


if __name__ == "__main__":
    raise SystemExit(main())
