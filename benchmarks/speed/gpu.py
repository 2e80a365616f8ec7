"""Luthier's step on a GPU: one script for a bare environment that holds torch, transformers and this checkout.

Random weights of Llama-3-8B's shape, packed rows of real document lengths (`lengths.json`), bf16: tokens/s, MFU and
peak memory of LoRA, full fine-tuning and QLoRA, with and without recomputation, and the head alone. Cases
stand in order of interest; what the time does not reach is listed as not run. `--tiny` runs the same code
on any device at tiny sizes and writes nothing.
"""

from __future__ import annotations

import gc
import json
import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn

from benchmarks.speed import bare

BARE = bare.stand_in()

from transformers import AutoModelForCausalLM, LlamaConfig  # noqa: E402

from luthier.adapters import attach, lr_scales  # noqa: E402
from luthier.batch import IGNORE, PADDING, Batch  # noqa: E402
from luthier.config import AdapterConfig, OptimConfig  # noqa: E402
from luthier.data.packing import pack  # noqa: E402
from luthier.models import attention  # noqa: E402
from luthier.models.recompute import compile_layers, set_recompute  # noqa: E402
from luthier.models.stage import Stage, decoder_layers  # noqa: E402
from luthier.quantize.linears import QuantizedLinear  # noqa: E402
from luthier.train.loss import token_loss  # noqa: E402
from luthier.train.master import MasterWeights  # noqa: E402
from luthier.train.optim import make_optimizer  # noqa: E402
from luthier.train.step import Updater  # noqa: E402

SECONDS = 500  # of the whole script; a case is not begun behind it
WARM, STEPS = 2, 5
SUPERVISED = 0.7  # share of a document's tokens that are its answer, as in instruction data
EIGHT: dict[str, Any] = {
    **{"vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336},
    **{"num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8},
    **{"head_dim": 128, "max_position_embeddings": 131072, "tie_word_embeddings": False},
    "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0},
}
TINY: dict[str, Any] = {
    **{"vocab_size": 512, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2},
    **{"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16},
    **{"max_position_embeddings": 1024, "tie_word_embeddings": False},
}
# bf16 without sparsity, FLOP/s, from NVIDIA's data sheets
PEAKS = {"H100 PCIe": 756e12, "H100": 989e12, "H200": 989e12, "A100": 312e12, "L40S": 362e12}


@dataclass(frozen=True)
class Case:
    """`length` tokens a row, `rows` rows a step, what trains, and how."""

    method: str  # lora, full, qlora
    length: int
    rows: int
    recompute: str = "none"
    compile: bool = False
    attention: str = "auto"


CASES = (
    Case("lora", 4096, 2),
    Case("lora", 4096, 2, compile=True),
    Case("lora", 4096, 2, attention="varlen"),
    Case("full", 8192, 2, "layer"),
    Case("lora", 8192, 1),
    Case("lora", 4096, 2, "layer"),
    Case("full", 4096, 2),
    Case("lora", 4096, 2, "selective"),
    Case("lora", 8192, 1, "layer", compile=True),
    Case("full", 8192, 2, "layer", compile=True),
    Case("full", 4096, 2, "layer"),
)
QUANTISED = (Case("qlora", 4096, 2), Case("qlora", 4096, 2, "layer"))
TINIES = (Case("lora", 256, 2), Case("lora", 256, 1, "layer"), Case("full", 256, 1))


def main(path: Path, *, tiny: bool, quantize: str | None) -> int:
    """Run the cases and write `path`; without a GPU only `tiny` runs, and nothing is written."""
    if not tiny and not torch.cuda.is_available():
        print("there is no GPU here: no figure. `--gpu --tiny` tries the script's code on a CPU")
        return 2
    begin = time.monotonic()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    shape = TINY if tiny else EIGHT
    cases = list(TINIES if tiny else CASES)
    quantised = [Case("qlora", 256, 1)] if tiny else list(QUANTISED)
    cases[3:3] = quantised if quantize else []
    found = about(device) | {"shape": shape, "quantize": quantize, "table": []}
    found["products"] = products(device, 256 if tiny else 8192)
    print(json.dumps(found), flush=True)
    head = (512, 1024, 64) if tiny else (16384, 248320, 2048)
    todo: list[tuple[str, Callable[[], dict[str, Any]]]] = [
        ("head", lambda trained=trained: time_head(device, *head, trained))
        for trained in (True, False)
    ]
    todo += [
        ("step", lambda case=case: step(case, shape, device, quantize or "nf4")) for case in cases
    ]
    names = [{"head": "trained"}, {"head": "frozen"}, *map(asdict, cases)]
    for name, (kind, run) in zip(names, todo, strict=True):
        left = SECONDS - (time.monotonic() - begin)
        row = {
            "kind": kind,
            **name,
            **(attempt(run) if left > 0 else {"failed": "not run: out of time"}),
        }
        clear()
        found["table"].append(row)
        print(json.dumps(row), flush=True)
        if not tiny:  # after every case: a run that is cut short has told what it has
            path.parent.mkdir(exist_ok=True)
            path.write_text(json.dumps(found, indent=2) + "\n", "utf-8")
    return 0


def attempt(run: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What `run` found, or why there is nothing."""
    try:
        return run()
    except torch.OutOfMemoryError:
        return {"failed": "out of memory"}
    except Exception as error:  # a case that breaks must not cost the others
        return {"failed": f"{type(error).__name__}: {str(error)[:300]}"}


def about(device: torch.device) -> dict[str, Any]:
    """Versions, commit, device, and how MFU is counted."""
    git = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    try:
        commit = subprocess.run(git, capture_output=True, text=True).stdout.strip() or None
    except OSError:
        commit = None
    gpu = device.type == "cuda"
    name = torch.cuda.get_device_name(device) if gpu else "cpu"
    versions = {"python": platform.python_version(), "torch": torch.__version__}
    return {
        "command": "python -m benchmarks.speed --gpu",
        "device": name,
        "memory": torch.cuda.get_device_properties(device).total_memory if gpu else None,
        "peak_flops": next((peak for key, peak in PEAKS.items() if key in name), None),
        "mfu": "4 (frozen base) or 6 FLOP per weight of linears and head and per real token, over the peak; attention and recomputation not counted",
        "versions": {**versions, "transformers": transformers.__version__},
        "pydantic": not BARE,
        "commit": commit,
    }


def products(device: torch.device, size: int) -> dict[str, Any]:
    """TFLOP/s of square bf16 products: what the device gives in this very run."""
    a, b = (torch.randn(size, size, dtype=torch.bfloat16, device=device) for _ in range(2))
    times = timed(lambda: a @ b, device, 10)
    return {"size": size, "tflops": round(2 * size**3 / statistics.median(times) / 1e12, 2)}


def timed(run: Callable[[], object], device: torch.device, times: int) -> list[float]:
    """Seconds of each run, behind `WARM` that are not counted."""
    found = []
    for _ in range(times + WARM):
        wait(device)
        begin = time.perf_counter()
        run()
        wait(device)
        found.append(time.perf_counter() - begin)
    return found[WARM:]


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def clear() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def peak(device: torch.device) -> int | None:
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None


# ---- a step


def step(case: Case, shape: dict[str, Any], device: torch.device, scheme: str) -> dict[str, Any]:
    """Optimiser steps of one case on packed rows, other rows in each step."""
    model = make_model(shape, device, scheme if case.method == "qlora" else None)
    attention.install(model, case.attention, train=True)
    stage = Stage(model)
    if case.method == "full":
        model.requires_grad_(True)
        # 8 billion weights with float32 copies and moments are 128 GB: bf16 ones, as the published figures
        master, lr = "none", 1e-5
    else:
        attach(model, AdapterConfig.model_validate({"method": "lora", "rank": 8}), seed=0)
        master, lr = "float32", 3e-4
    set_recompute(stage, case.recompute)  # pyright: ignore[reportArgumentType]
    if case.compile:
        compile_layers(stage)
    model.train()
    wait(device)
    loaded = torch.cuda.memory_allocated(device) if device.type == "cuda" else None
    trained = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    weights = MasterWeights(trained, master)  # pyright: ignore[reportArgumentType]
    names = dict(weights.named)
    scales = {n: s for n, s in lr_scales(model).items() if n in names}
    optimizer = make_optimizer(weights.named, OptimConfig.model_validate({}), lr, scales)
    updater = Updater(stage=stage, master=weights, optimizer=optimizer, device=device)
    batches = rows(case, shape["vocab_size"], WARM + STEPS)
    losses, tokens = [], []

    def one() -> None:
        batch = batches[len(losses)]
        report = updater.update([batch], step=len(losses) + 1, lr=lr)
        losses.append(report.loss)
        tokens.append(report.num_tokens)

    begin = time.perf_counter()
    seconds = timed(one, device, STEPS)
    timed_tokens = tokens[WARM:]
    rates = [n / s for n, s in zip(timed_tokens, seconds, strict=True)]
    speed = sum(timed_tokens) / sum(seconds)
    flops = flops_per_token(shape, case.method)
    top = next((p for k, p in PEAKS.items() if k in about(device)["device"]), None)
    return {
        "tokens_per_second": round(speed, 1),
        "spread": [round(min(rates), 1), round(max(rates), 1)],
        "tokens_per_step": round(statistics.mean(timed_tokens)),
        "documents_per_step": round(statistics.mean(map(num_documents, batches))),
        "mfu": round(speed * flops / top, 4) if top else None,
        "tflops": round(speed * flops / 1e12, 2),
        "warm_seconds": round(time.perf_counter() - begin - sum(seconds), 2),
        "memory_loaded": loaded,
        "memory_peak": peak(device),
        "losses": [round(loss, 4) for loss in losses if loss is not None],
    }


def make_model(shape: dict[str, Any], device: torch.device, scheme: str | None) -> Any:
    """Random bf16 weights on the device; with `scheme` the linears of the layers quantised one by one."""
    torch.manual_seed(0)
    with device:
        model: Any = AutoModelForCausalLM.from_config(LlamaConfig(**shape), dtype=torch.bfloat16)
    model.requires_grad_(False)
    if scheme is not None:
        for layer in decoder_layers(model):
            linears = [(n, m) for n, m in layer.named_modules() if isinstance(m, nn.Linear)]
            for name, linear in linears:
                layer.set_submodule(name, QuantizedLinear.from_linear(linear, scheme, 64))
        clear()
    return model


def rows(case: Case, vocab: int, count: int) -> list[Batch]:
    """`count` batches of packed rows from the committed lengths, random ids, answers at the ends."""
    lengths = json.loads((Path(__file__).parent / "lengths.json").read_text("utf-8"))["lengths"]
    lengths = [min(n, case.length) for n in lengths]
    lengths *= 1 + 2 * count * case.rows * case.length // sum(lengths)
    packed = pack(lengths, case.length, "best")[: count * case.rows]
    draw = torch.Generator().manual_seed(0)
    return [
        batch(
            [[lengths[i] for i in row] for row in packed[j : j + case.rows]],
            case.length,
            vocab,
            draw,
        )
        for j in range(0, count * case.rows, case.rows)
    ]


def batch(rows: list[list[int]], width: int, vocab: int, draw: torch.Generator) -> Batch:
    """Rows of documents of the given lengths as a `Batch`, padded to `width`."""
    shape = (len(rows), width)
    ids = torch.randint(3, vocab, shape, generator=draw)  # [B, S]
    labels = torch.full(shape, IGNORE)
    positions = torch.zeros(shape, dtype=torch.long)
    documents = torch.full(shape, PADDING)
    for r, row in enumerate(rows):
        start = 0
        for d, n in enumerate(row):
            span = slice(start, start + n)
            positions[r, span] = torch.arange(n)
            documents[r, span] = d
            answer = start + int(n * (1 - SUPERVISED))
            labels[r, answer : start + n - 1] = ids[r, answer + 1 : start + n]
            start += n
    return Batch(ids, labels, positions, documents, tuple(range(len(rows))))


def num_documents(batch: Batch) -> int:
    return int(((batch.position_ids == 0) & (batch.document_ids != PADDING)).sum())


def flops_per_token(shape: dict[str, Any], method: str) -> float:
    """FLOP per real token: see `mfu` in the results."""
    h, q = shape["hidden_size"], shape["num_attention_heads"] * shape["head_dim"]
    kv = shape["num_key_value_heads"] * shape["head_dim"]
    layer = h * (2 * q + 2 * kv + 3 * shape["intermediate_size"])
    weights = shape["num_hidden_layers"] * layer + h * shape["vocab_size"]
    return (6 if method == "full" else 4) * weights


# ---- the head


def time_head(
    device: torch.device, tokens: int, vocab: int, width: int, trained: bool
) -> dict[str, Any]:
    """Forward and gradients of head and cross entropy over `tokens` supervised positions."""
    hidden = torch.randn(1, tokens, width, dtype=torch.bfloat16, device=device, requires_grad=True)
    head = nn.Linear(width, vocab, bias=False, dtype=torch.bfloat16, device=device)
    head.requires_grad_(trained)
    labels = torch.randint(vocab, (1, tokens), device=device)
    before = torch.cuda.memory_allocated(device) if device.type == "cuda" else 0

    def one() -> None:
        hidden.grad = head.weight.grad = None
        loss = token_loss(hidden, labels, head, list(head.parameters())) / tokens
        loss.backward()

    seconds = timed(one, device, STEPS)
    highest = peak(device)
    return {
        "tokens": tokens,
        "vocabulary": vocab,
        "hidden": width,
        "milliseconds": round(1000 * statistics.median(seconds), 3),
        "spread": [round(1000 * min(seconds), 3), round(1000 * max(seconds), 3)],
        "memory_above": None if highest is None else highest - before,
    }
