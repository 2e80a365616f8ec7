"""What a run came to, as the plain facts that a report shows."""

from __future__ import annotations

import platform
from datetime import datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

import luthier
from luthier.adapters import ADAPTERS, adapters_of
from luthier.assemble import Built, Data
from luthier.bases import storage_words
from luthier.config import RunConfig
from luthier.train.metrics import Memory
from luthier.train.plan import FitResult, Plan
from luthier.train.report import Facts

PACKAGES = ("torch", "transformers", "peft", "safetensors", "tokenizers", "datasets")


def versions() -> dict[str, str]:
    """Versions of Luthier, Python and the packages that decide numbers."""
    found = {"luthier": luthier.__version__, "python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def device_name(device: torch.device) -> str:
    """`cpu, 2 threads, x86_64`, or the GPU's name."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type}, {torch.get_num_threads()} threads, {platform.machine()}"


NAMES = {
    **{"lora": "LoRA", "mora": "MoRA", "vera": "VeRA", "lokr": "LoKr", "reft": "ReFT"},
    **{"prefix": "prefix tuning", "prompt": "prompt tuning", "ia3": "(IA)3"},
}
LORA_WORDS = {"rslora": "rsLoRA", "pissa": "PiSSA", "dora": "DoRA", "mixer": "MoSLoRA"}


def method_words(config: RunConfig, built: Built) -> str:
    """The adapter in words, or `full fine-tuning`."""
    if built.adapter is None:
        if config.train.mode == "pretrain":
            return "pretraining" + (" from scratch" if built.init == "random" else "")
        return "full fine-tuning"
    a, layers = built.adapter, len(adapters_of(built.model))
    uses = ADAPTERS[a.method].uses
    words = [NAMES[a.method] if a.form is None else f"{NAMES[a.method]} ({a.form})"]
    words += [name for key, name in LORA_WORDS.items() if getattr(a, key)]
    words += [f"LoRA+ {a.lora_plus:g}"] if a.lora_plus != 1 else []
    words += [f"{a.num_prefix_tokens} virtual tokens"] if "num_prefix_tokens" in uses else []
    words += [f"rank {a.rank}"] if "rank" in uses else []
    words += [f"alpha {a.scale_alpha:g}"] if "alpha" in uses else []
    words += [f"positions {a.positions}"] if "positions" in uses else []
    words += [f"on {layers} layers"] if layers > 1 else []
    return ", ".join(words)


def facts_of(
    config: RunConfig, built: Built, data: Data, result: FitResult, loaded: Memory, plan: Plan
) -> Facts:
    """The facts of a finished run that do not depend on what it generated."""
    words = method_words(config, built)
    processes = {}
    if built.world.size > 1:
        processes["Processes"] = built.world.layout(config.parallel)
    facts = Facts(
        title=f"{words.split(',')[0][:1].upper()}{words.split(',')[0][1:]} of {Path(built.base).name}",
        status="finished",
        created=datetime.now().astimezone().strftime("%Y-%m-%d %H:%M %Z"),
        model=built.base,
        data=data.train.ledger.source,
        adapter=words,
        device=device_name(built.device),
        dtype=str(built.dtype).removeprefix("torch.")
        + (f"; {stored}" if (stored := storage_words(built.model)) else ""),
        trained_parameters=built.num_trained,
        total_parameters=built.num_base,
        steps=result.step,
        tokens=result.num_tokens,
        seconds=result.seconds,
        tokens_per_second=result.num_tokens / result.seconds if result.seconds else 0.0,
        versions=versions(),
        after=result.evaluation or {},
        ledger={d.split: d.ledger.to_dict() for d in (data.train, data.dev) if d is not None},
        remarks=list(result.remarks),
        more={"Final weights": f"step {result.final_step}", "Output": config.output, **processes},
    )
    if "padding_share" in data.train.ledger.packing:
        facts["padding_share"] = data.train.ledger.packing["padding_share"]
    if plan.steps is not None:
        facts["total_steps"] = plan.steps
    if loaded.now is not None:
        facts["memory_loaded"] = loaded.now
    if result.peak_memory is not None:
        facts["memory_peak"] = result.peak_memory
    return facts
