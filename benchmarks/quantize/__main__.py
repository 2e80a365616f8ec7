"""Error, rates and products of each quantised form: `python -m benchmarks.quantize [--gpu]`.

Errors are relative Frobenius norms on fixed random matrices. Rates are of the linear layers of a 1B
Llama. Products are timed forward and backward (gradient of the input) in bfloat16 against a dense layer
of the same shape, and against bitsandbytes' Linear4bit where it is installed, in turns. Nothing is downloaded.
`--quality MODEL` measures a real model's perplexity instead (quality.py).
"""

from __future__ import annotations

import argparse
import json
import logging
import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.quantize.quality import quality
from luthier.files import write_json
from luthier.quantize import QuantizedLinear, dequantize, make_spec, quantize
from luthier.seeding import generator

# scheme, block size (None: one scale per output channel), double quantisation
FORMS = (
    ("nf4", 64, False),
    ("nf4", 64, True),
    ("nf4", 128, False),
    ("fp4", 64, False),
    ("int8", None, False),
    ("int8", 128, False),
    ("int4", None, False),
    ("int4", 128, False),
    ("int4", 64, False),
)
PRODUCTS = (("nf4", 64, False), ("nf4", 64, True), ("int8", None, False), ("int4", 64, False))
# (out, in) of the linear layers of one of a 1B Llama's 16 blocks
LLAMA_1B = ((2048, 2048), (512, 2048), (512, 2048), (2048, 2048)) + ((8192, 2048),) * 2
LLAMA_1B += ((2048, 8192),)
NUM_LAYERS = 16
SHAPES = ((2048, 2048), (8192, 2048), (2048, 8192))
TOKENS = (1, 512, 2048)
RESULTS = Path(__file__).parent / "results"

Form = tuple[str, int | None, bool]


def matrices() -> dict[str, Tensor]:
    """The fixed matrices [1024, 1024]: normal, heavy tails, outlier input channels, uniform."""
    normal, tail, even = (
        torch.randn(1024, 1024, generator=generator(0, name)) for name in ("w", "tail", "even")
    )
    outliers = normal.clone()
    outliers[:, ::128] *= 10
    return {
        "normal": normal,
        "heavy tails": normal * (0.7 * tail).exp(),
        "outlier inputs": outliers,
        "uniform": torch.erf(even),
    }


def label(form: Form) -> str:
    scheme, size, double = form
    return f"{scheme} {size or 'channel'}{' double' if double else ''}"


def errors(device: torch.device) -> list[dict[str, Any]]:
    """Bits per weight, scales included, and ||dequantised - w|| / ||w|| of each form on each matrix."""
    table = []
    for form in FORMS:
        row: dict[str, Any] = {"form": label(form)}
        for name, weight in matrices().items():
            weight = weight.to(device)
            spec = make_spec(form[0], tuple(weight.shape), form[1], form[2])
            tensors = quantize(weight, spec)
            size = sum(t.numel() * t.element_size() for t in tensors.values())
            row["bits"] = round(8 * size / weight.numel(), 3)
            error = (dequantize(tensors, spec, torch.float32) - weight).norm() / weight.norm()
            row[name] = round(float(error), 5)
        table.append(row)
    return table


def rates(device: torch.device) -> list[dict[str, Any]]:
    """Seconds for a billion weights: the layers of a 1B Llama in bfloat16, one after the other.

    All 16 blocks in the first form; the others are scaled up from two.
    """
    weights = [torch.randn(s, generator=generator(0, str(i))) for i, s in enumerate(LLAMA_1B)]
    weights = [(0.02 * w).to(device, torch.bfloat16) for w in weights]
    table = []
    for form in FORMS:
        num_layers = NUM_LAYERS if form == FORMS[0] else 2
        total = num_layers * sum(w.numel() for w in weights)
        specs = [make_spec(form[0], tuple(w.shape), form[1], form[2]) for w in weights]
        made = [quantize(w, s) for w, s in zip(weights, specs, strict=True)]  # fills the look-ups
        begin = now(device)
        for _ in range(num_layers):
            made = [quantize(w, s) for w, s in zip(weights, specs, strict=True)]
        middle = now(device)
        for _ in range(num_layers):
            for tensors, spec in zip(made, specs, strict=True):
                dequantize(tensors, spec, torch.bfloat16)
        end = now(device)
        row = {"form": label(form), "weights": total}
        row["quantise_seconds_per_billion"] = round((middle - begin) / total * 1e9, 2)
        row["dequantise_seconds_per_billion"] = round((end - middle) / total * 1e9, 2)
        table.append(row)
    return table


def products(device: torch.device, repeats: int) -> list[dict[str, Any]]:
    """Milliseconds of forward, and of forward with backward, of one layer; the competitors in turns."""
    table = []
    for shape in SHAPES:
        dense = nn.Linear(shape[1], shape[0], bias=False, device=device, dtype=torch.bfloat16)
        dense.requires_grad_(False)
        layers: dict[str, nn.Module] = {"dense": dense}
        for form in PRODUCTS:
            layers[label(form)] = QuantizedLinear.from_linear(dense, *form)
        layers |= peer(dense, device)
        for tokens in TOKENS:
            x = torch.randn(tokens, shape[1], device=device, dtype=torch.bfloat16)
            runs = {name: (forward(layer, x), both(layer, x)) for name, layer in layers.items()}
            times: dict[str, list[tuple[float, float]]] = {name: [] for name in layers}
            for turn in range(repeats + 1):
                for name, (once, twice) in runs.items():
                    pair = (seconds(once, device), seconds(twice, device))
                    if turn:  # the first one warms up
                        times[name].append(pair)
            for i, what in enumerate(("forward", "forward and backward")):
                base = statistics.median(t[i] for t in times["dense"])
                for name, found in times.items():
                    mine = [t[i] for t in found]
                    row = {"shape": list(shape), "tokens": tokens, "what": what, "layer": name}
                    row["ms"] = round(1e3 * statistics.median(mine), 3)
                    row["ms_range"] = [round(1e3 * min(mine), 3), round(1e3 * max(mine), 3)]
                    row["to_dense"] = round(statistics.median(mine) / base, 3)
                    table.append(row)
    return table


def forward(layer: nn.Module, x: Tensor) -> Callable[[], Any]:
    def run() -> None:
        with torch.no_grad():
            layer(x)

    return run


def both(layer: nn.Module, x: Tensor) -> Callable[[], Any]:
    x = x.detach().requires_grad_()
    upstream = x.new_ones(len(x), int(layer.out_features))  # pyright: ignore[reportArgumentType]

    def run() -> None:
        torch.autograd.grad(layer(x), x, upstream)

    return run


def peer(dense: nn.Linear, device: torch.device) -> dict[str, nn.Module]:
    """bitsandbytes' nf4 layer with the same weight, if it is installed."""
    try:
        import bitsandbytes  # pyright: ignore[reportMissingImports]
    except ImportError:
        return {}
    size = (dense.in_features, dense.out_features)
    layer = bitsandbytes.nn.Linear4bit(
        *size, bias=False, compute_dtype=torch.bfloat16, compress_statistics=False, quant_type="nf4"
    )
    layer.weight = bitsandbytes.nn.Params4bit(
        dense.weight.data.clone(), quant_type="nf4", compress_statistics=False
    )
    return {"bitsandbytes nf4 64": layer.to(device)}


def seconds(run: Callable[[], Any], device: torch.device) -> float:
    begin = now(device)
    run()
    return now(device) - begin


def now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def show(table: list[dict[str, Any]]) -> None:
    keys = list(table[0])
    cells = [keys, *([str(row[key]) for key in keys] for row in table)]
    widths = [max(len(line[i]) for line in cells) for i in range(len(keys))]
    for line in cells:
        print("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)))
    print()


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.quantize", description=__doc__)
    parser.add_argument("--gpu", action="store_true")
    parser.add_argument("--threads", type=int, default=2, help="on CPU (default: 2)")
    parser.add_argument("--repeats", type=int, default=3, help="of each product (default: 3)")
    parser.add_argument("--quality", metavar="MODEL", help="a model folder or hub name")
    parser.add_argument("--name", help="what to call the model in the results")
    parser.add_argument("--missing", action="store_true", help="only forms that its results lack")
    parser.add_argument("--rows", type=int, default=24, help="of each data set (default: 24)")
    parser.add_argument("--length", type=int, default=256, help="of a row in tokens (default: 256)")
    args = parser.parse_args()
    device = torch.device("cuda" if args.gpu else "cpu")
    torch.set_num_threads(args.threads)
    logging.getLogger("bitsandbytes").setLevel(logging.CRITICAL)  # it reports optional kernels
    RESULTS.mkdir(exist_ok=True)
    if args.quality:
        source, args.quality = args.quality, args.name or Path(args.quality).name
        path = RESULTS / f"quality-{args.quality}.json"
        known = json.loads(path.read_text("utf-8")) if args.missing else {"tables": {"quality": []}}
        quality(
            source,
            args.rows,
            args.length,
            lambda table: write_json(path, {**_about(args, device), "tables": {"quality": table}}),
            known["tables"]["quality"],
        )
        print(path)
        return
    path = RESULTS / f"{device.type}.json"
    tables: dict[str, Any] = {}
    times = partial(products, repeats=args.repeats)
    for name, measure in (("error", errors), ("rate", rates), ("product", times)):
        tables[name] = measure(device)
        show(tables[name])
        write_json(path, {**_about(args, device), "tables": tables})
    print(path)


def _about(args: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True)
    versions = {"python": platform.python_version(), "torch": torch.__version__}
    try:
        import bitsandbytes  # pyright: ignore[reportMissingImports]

        versions["bitsandbytes"] = bitsandbytes.__version__
    except ImportError:
        pass
    return {
        "config": vars(args),
        "versions": versions,
        "commit": commit.stdout.strip() or None,
        "device": torch.cuda.get_device_name() if device.type == "cuda" else _processor(),
    }


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"cpu: {names[0]}" if names else "cpu"


if __name__ == "__main__":
    main()
