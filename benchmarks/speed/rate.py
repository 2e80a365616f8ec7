"""The machine's matrix-product rate on the shapes of a model: `python -m benchmarks.speed.rate JOB` prints JSON.

Every product of a forward over one micro-batch's tokens, x [T, I] times W [O, I] transposed, into a buffer that
is reused; the rate is that of all of them together, weighted by how often a forward has each.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.speed.workload import Shape

REPEATS = 7


def main() -> None:
    job = json.loads(Path(sys.argv[1]).read_text("utf-8"))
    torch.set_num_threads(job["threads"])
    print(json.dumps(measure(Shape(**job["shape"]), job["tokens"], job["dtype"], job["device"])))


def measure(shape: Shape, tokens: int, dtype: str, device: str) -> dict[str, Any]:
    """GFLOP/s of each product and of all together (medians of `REPEATS`)."""
    kind = getattr(torch, dtype)
    found, work, seconds = {}, 0.0, 0.0
    for name, i, o, n in [*shape.products(), ("head", shape.hidden, shape.vocab, 1)]:
        x = torch.randn(tokens, i, dtype=kind, device=device)
        weight = torch.randn(o, i, dtype=kind, device=device)
        out = torch.empty(tokens, o, dtype=kind, device=device)
        times = []
        for _ in range(REPEATS + 2):
            begin = time.perf_counter()
            torch.mm(x, weight.t(), out=out)
            if device != "cpu":
                torch.cuda.synchronize()
            times.append(time.perf_counter() - begin)
        each = statistics.median(times[2:])
        found[name] = round(2 * tokens * i * o / each / 1e9, 1)
        work, seconds = work + n * 2 * tokens * i * o, seconds + n * each
    return {"all": round(work / seconds / 1e9, 1), "each": found}


if __name__ == "__main__":
    main()
