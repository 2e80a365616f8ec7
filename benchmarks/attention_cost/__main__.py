"""What attention costs: `python -m benchmarks.attention_cost [--longest 32768] [--gpu]`.

Forward and backward of one layer's attention, as training calls it, over a fixed number of tokens: short documents
packed into rows of growing length (against one mask for the whole row, what a packed row costs elsewhere), single
documents of growing length, and the same with sliding windows. Cases are measured in turns, one after the
other, short ones more often, and the fastest turn counts: CPU seconds of the process, or seconds on a GPU. Needs
no data.
"""

from __future__ import annotations

import argparse
import platform
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from torch.nn import functional as F

from luthier.batch import Layout
from luthier.files import write_json
from luthier.models.attention import check_kernel
from luthier.models.kernels import KERNELS, Scores
from luthier.seeding import generator

RESULTS = Path(__file__).parent / "results"
SHORTEST = 2048
WINDOWS = (512, 2048)
LONG = 5.0  # seconds of a case to which the first use of a kernel adds nothing that is seen
DENSE = (
    8192  # longest row for which the mask of a whole row is tried: its memory is the row squared
)


def layout_of(rows: list[list[int]], device: torch.device) -> Layout:
    """The layout of rows that hold documents of these lengths."""
    ids, positions = [], []
    for lengths in rows:
        ids.append(torch.cat([torch.full((n,), d) for d, n in enumerate(lengths)]))
        positions.append(torch.cat([torch.arange(n) for n in lengths]))
    return Layout(torch.stack(ids).to(device), torch.stack(positions).to(device))


def short_documents(tokens: int, mean: int) -> list[int]:
    """Lengths between half and one and a half of the mean that add up to `tokens`, always the same."""
    draw, lengths = generator(0, "lengths"), []
    while (left := tokens - sum(lengths)) > 0:
        n = int(torch.randint(mean // 2, 3 * mean // 2 + 1, (1,), generator=draw))
        lengths.append(min(n, left))
    return lengths


def inputs(rows: int, width: int, args: argparse.Namespace, device: torch.device) -> list[Tensor]:
    """Queries, keys and values [B, H or K, S, D] as projections lay them out."""
    draw = generator(0, "inputs")
    found = []
    for heads in (args.heads, args.kv_heads, args.kv_heads):
        x = torch.randn(rows, width, heads, args.head_dim, generator=draw)
        x = x.to(device, getattr(torch, args.dtype)).requires_grad_()
        found.append(x.transpose(1, 2))
    return found


def ours(
    rows: list[list[int]], args: argparse.Namespace, window: int | None = None
) -> Callable[[], Any]:
    """One forward and backward over these rows by the kernel that training takes."""
    device = torch.device(args.device)
    layout = layout_of(rows, device)
    q, k, v = inputs(len(rows), sum(rows[0]), args, device)
    kernel = KERNELS[check_kernel("auto", device, True)]
    scores = Scores(args.head_dim**-0.5, window=window)
    return lambda: kernel(q, k, v, layout, scores).sum().backward()


def dense(rows: list[list[int]], args: argparse.Namespace) -> Callable[[], Any]:
    """The same by torch's sdpa with a mask [B, 1, S, S] of the whole row."""
    device = torch.device(args.device)
    ids = layout_of(rows, device).document_ids
    width = ids.shape[1]
    index = torch.arange(width, device=device)
    mask = (ids[:, :, None] == ids[:, None]) & (index[:, None] >= index)
    q, k, v = inputs(len(rows), width, args, device)

    def run() -> None:
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask[:, None], enable_gqa=True)
        out.sum().backward()

    return run


def measure(cases: dict[str, Callable[[], Any]], args: argparse.Namespace) -> dict[str, Any]:
    """Name -> microseconds per token of the fastest turn, and the slowest turn over it."""
    gpu = args.device == "cuda"
    clock = time.perf_counter if gpu else time.process_time
    spent: dict[str, list[float]] = {name: [] for name in cases}
    warm: set[str] = set()

    def enough(name: str) -> bool:
        return len(spent[name]) >= args.turns and sum(spent[name]) >= args.seconds

    while waiting := [name for name in cases if not enough(name)]:
        for name in waiting:
            if gpu:
                torch.cuda.synchronize()
            begin = clock()
            cases[name]()
            if gpu:
                torch.cuda.synchronize()
            took = clock() - begin
            if name in warm or took > LONG:
                spent[name].append(took)
            warm.add(name)
    return {
        name: {
            "us_per_token": round(1e6 * min(s) / args.tokens, 3),
            "slowest_over_fastest": round(max(s) / min(s), 3),
        }
        for name, s in spent.items()
    }


def widths(args: argparse.Namespace) -> list[int]:
    """2k, 4k, ... up to the longest."""
    found = [SHORTEST]
    while 2 * found[-1] <= args.longest:
        found.append(2 * found[-1])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.attention_cost", description=__doc__
    )
    parser.add_argument(
        "--longest", type=int, default=32768, help="longest row; also the token budget"
    )
    parser.add_argument("--document", type=int, default=256, help="mean length of a short document")
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--kv-heads", type=int, default=2)
    parser.add_argument("--head-dim", type=int, default=64)
    parser.add_argument("--dtype", default=None, help="default: float32, on a GPU bfloat16")
    parser.add_argument("--turns", type=int, default=2, help="at least so many of each case")
    parser.add_argument(
        "--seconds", type=float, default=6.0, help="and more, until they took so long in all"
    )
    parser.add_argument("--gpu", action="store_true")
    parser.add_argument(
        "--only", help="one case, such as packed or 'window 512', in a results file of its own"
    )
    args = parser.parse_args()
    args.device = "cuda" if args.gpu else "cpu"
    args.dtype = args.dtype or ("bfloat16" if args.gpu else "float32")
    args.tokens = args.longest
    order = ("packed", "mask of the row", "one document")
    tables: dict[str, dict[str, Any]] = {n: {} for n in order if args.only in (None, n)}
    for width in widths(args):
        count = args.tokens // width
        packed = [short_documents(width, args.document) for _ in range(count)]
        single = [[width]] * count
        cases = {"packed": ours(packed, args), "one document": ours(single, args)}
        cases |= {f"window {w}": ours(single, args, w) for w in WINDOWS}
        if width <= DENSE and args.only in (None, "mask of the row"):
            cases["mask of the row"] = dense(packed, args)
        if args.only:
            cases = {name: case for name, case in cases.items() if name == args.only}
        for name, found in measure(cases, args).items():
            tables.setdefault(name, {})[str(width)] = found
            print(f"{width:>6} {name:<16}{found['us_per_token']:>10.2f} us/token", flush=True)
    first = next(iter(tables))  # short documents, unless another case was asked for
    flat = [row["us_per_token"] for row in tables[first].values()]
    spread = max(flat) / min(flat) - 1
    print(f"\n{first}, rows of {SHORTEST} to {args.longest}: within {spread:.1%} of each other")
    name = "-".join([args.device, args.dtype, *(args.only or "").split()])
    path = RESULTS / f"{name}.json"
    RESULTS.mkdir(exist_ok=True)
    write_json(path, {**_about(args), "spread": round(spread, 4), "tables": tables})
    print(path)


def _about(args: argparse.Namespace) -> dict[str, Any]:
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True)
    device = torch.cuda.get_device_name() if args.gpu else platform.processor() or "cpu"
    return {
        "config": {key: value for key, value in vars(args).items() if key != "gpu"},
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
        "commit": commit.stdout.strip() or None,
        "device": device,
        "threads": torch.get_num_threads(),
    }


if __name__ == "__main__":
    main()
