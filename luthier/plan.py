"""`luthier plan`: will a run fit, in which layout, how long is a step; before weights or rows are read.

`footprint.py` finds what a step keeps in memory, `spread.py` what is left of it on each device of a layout; here
every layout of that many devices is put in order and into words.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from luthier.config import RunConfig
from luthier.config_parallel import AXES, ParallelConfig
from luthier.configfile import Resolved
from luthier.errors import LuthierError, Refused
from luthier.footprint import Footprint, footprint
from luthier.models.load import resolve_device
from luthier.parallel.degrees import fit_batch, mesh_sizes
from luthier.spread import COPY, NOMINAL, Estimate, Way, estimate, ways

BEST = 4  # layouts that are shown
UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12, "P": 10**15}
BINARY = {"KI": 2**10, "MI": 2**20, "GI": 2**30, "TI": 2**40}


# ---- what the user gave


def parse_size(option: str, text: str) -> float:
    """`80GB`, `24GiB`, `989T`, `1e12` as a number. Refused: anything else, and what is not above zero."""
    word = text.strip().upper().removesuffix("/S").removesuffix("FLOP").removesuffix("B")
    number, factor = word, 1
    for unit, value in (*BINARY.items(), *UNITS.items()):
        if unit and word.endswith(unit):
            number, factor = word[: -len(unit)], value
            break
    try:
        value = float(number) * factor
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise Refused(f"{option} {text}", "it is no amount above zero", f"{option} 80GB")
    return value


def parse_layout(text: str, devices: int) -> Way:
    """`shard=8,stage=3` of so many devices, refused where a run would refuse it."""
    values: dict[str, Any] = {}
    for word in text.replace(",", " ").split():
        key, _, value = word.removeprefix("parallel.").partition("=")
        if key not in (*AXES, "stage") or not value.isdigit() or int(value) < 1:
            raise Refused(
                f"--layout {text}",
                f"'{word}' is none of {', '.join(f'{axis}=N' for axis in AXES)}, stage=1, 2 or 3",
                "--layout shard=8,stage=3",
            )
        values[key] = int(value)
    if values.get("stage", 1) > 3:
        raise Refused(f"--layout {text}", "stages are 1, 2 and 3", "--layout shard=8,stage=3")
    parallel = ParallelConfig.model_validate(values)
    return Way(**mesh_sizes(parallel, devices), stage=parallel.stage)


def device_bytes(device: torch.device, devices: int) -> float:
    """Memory of this machine's device; on a CPU, a process's share."""
    if device.type == "cuda":
        return float(torch.cuda.get_device_properties(device).total_memory)
    lines = Path("/proc/meminfo")
    if not lines.is_file():
        raise Refused(
            "the memory of a device", "this system does not tell", "give --device-memory 16GB"
        )
    words = dict(line.split(":") for line in lines.read_text("ascii").splitlines())
    return int(words["MemTotal"].split()[0]) * 1024 / devices


def measured_flops(dtype: torch.dtype) -> float:
    """FLOP/s of this CPU's matrix product in `dtype`: the best of a few short ones."""
    size = 768
    a, b = (torch.ones(size, size, dtype=dtype) for _ in range(2))
    best, end = float("inf"), time.perf_counter() + 0.5
    while time.perf_counter() < end:
        begin = time.perf_counter()
        torch.mm(a, b)
        best = min(best, time.perf_counter() - begin)
    return 2 * size**3 / best


# ---- the command


def plan(
    resolved: Resolved,
    *,
    devices: int = 1,
    device_memory: str | None = None,
    layout: str | None = None,
    device_flops: str | None = None,
    bandwidth: str | None = None,
) -> dict[str, Any]:
    """Print what a step of the config needs on so many devices, and give it back. Nothing is written."""
    config = resolved.config
    if config.parallel.offload:
        raise Refused(
            "planning with parallel.offload=true",
            "what lies in CPU memory then is not told apart",
            "plan without it: it is the upper bound",
        )
    if device_memory is None:
        device = resolve_device(config.model.device)
        limit = device_bytes(device, devices)
    else:  # devices of another machine, that is, unless the config says CPU
        device = torch.device("cpu" if config.model.device == "cpu" else "cuda")
        limit = parse_size("--device-memory", device_memory)
    rate = None if bandwidth is None else parse_size("--bandwidth", bandwidth)
    way = parse_layout(layout, devices) if layout else None
    config = _with_rows(config, devices) if way is None else fit_batch(config, way.data)
    found = footprint(config, device)
    chosen = list(ways(devices, config, found)) if way is None else [way]
    if not chosen:
        fit_batch(config, devices)  # says why
    flops = None if device_flops is None else parse_size("--device-flops", device_flops)
    here = flops is None and device.type == "cpu" and device_memory is None
    if here:
        flops = measured_flops(found.dtype)
    estimates = _ordered(
        [estimate(config, found, way, flops=flops, bandwidth=rate) for way in chosen], limit
    )
    print(_head(config, found, devices, limit, len(estimates)))
    for one in estimates[:BEST]:
        print(_row(one, limit))
    best = estimates[0]
    print(f"\n{best.way}, at the fullest moment ({best.moment}):")
    for name, size in sorted(best.items.items(), key=lambda pair: -pair[1]):
        if size:
            print(f"  {name:<28}{size / 1e9:>10.3f} GB")
    print(f"  {'together':<28}{best.total / 1e9:>10.3f} GB")
    if best.host:
        print(f"  {COPY:<28}{best.host / 1e9:>10.3f} GB, of the CPU's memory")
    if best.seconds is not None:
        where = "as measured on this machine" if here else "as given"
        print(
            f"  a step: {best.seconds:.3g} s at {(flops or 0) / 1e12:.3g} TFLOP/s ({where}), nothing overlapped"
        )
    fits = best.total <= limit
    remedies = [] if fits else list(_remedies(config, device, devices, chosen, limit))
    largest = max(best.items, key=lambda name: best.items[name])
    if fits:
        print(f"\nfits: {best.total / 1e9:.2f} of {limit / 1e9:.2f} GB")
    else:
        print(
            f"\ndoes not fit: {best.total / 1e9:.2f} GB of {limit / 1e9:.2f}; most of it is {largest}"
        )
        for remedy in remedies:
            print(f"  {remedy}")
    return {
        "fits": fits,
        "limit": limit,
        "largest": largest,
        "remedies": remedies,
        "layouts": [vars(e) | {"way": str(e.way), "total": e.total} for e in estimates],
    }


def _with_rows(config: RunConfig, devices: int) -> RunConfig:
    """The config with as many rows per forward as a run whose devices all read different rows has; one where there
    are more devices than rows, some of which then share a row."""
    if config.train.micro_batch:
        return config
    rows = 1 if config.train.accumulation else max(1, config.batch // devices)
    changes = {"train": config.train.model_copy(update={"micro_batch": rows})}
    return config.model_copy(update=changes)


def _ordered(estimates: Sequence[Estimate], limit: float) -> list[Estimate]:
    """Those that fit first, of them the one whose step is shortest, by the rates or, without any, by usual ones;
    else the smallest."""

    def key(e: Estimate) -> tuple[bool, float, int]:
        fits = e.total <= limit
        time = e.flops + NOMINAL * e.moved if e.seconds is None else e.seconds
        return (not fits, time if fits else e.total, e.total)

    return sorted(estimates, key=key)


def _head(config: RunConfig, found: Footprint, devices: int, limit: float, number: int) -> str:
    total, what = found.total, "full fine-tuning"
    if config.adapter.method != "none":
        what = f"{config.adapter.method}, {total.adapter:,} adapter parameters"
    batch = f"batch {config.batch}"
    if config.train.accumulation is not None:
        batch = f"accumulation {config.train.accumulation}"
    return (
        f"{config.model.path}: {found.layers} layers in {str(found.dtype).removeprefix('torch.')}, {what}, "
        f"{total.trained:,} trained\n"
        f"{devices} device{'s' * (devices > 1)} of {limit / 1e9:.1f} GB, {batch}, "
        f"rows of {found.length} x {found.rows} per device and forward, "
        f"recompute {config.train.recompute}\n\n"
        f"{'layout (best ' + str(min(BEST, number)) + ' of ' + str(number) + ')':<46}{'per device':>12}"
        f"{'moved/step':>14}{'step':>12}"
    )


def _row(one: Estimate, limit: float) -> str:
    step = "-" if one.seconds is None else f"{one.seconds:.3g} s"
    verdict = "fits" if one.total <= limit else "does not fit"
    return f"{one.way!s:<46}{one.total / 1e9:>9.2f} GB{one.moved / 1e9:>11.2f} GB  {step:>10}  {verdict}"


def _remedies(
    config: RunConfig, device: torch.device, devices: int, chosen: Sequence[Way], limit: float
) -> Iterator[str]:
    """Changes of the config, each planned: what they come to, and whether that fits."""
    changes: list[dict[str, dict[str, Any]]] = []
    saves = config.checkpoint.every not in ("end", "never")
    if device.type == "cpu" and config.checkpoint.background and saves:
        changes.append({"checkpoint": {"background": False}})
    if len(chosen) == 1 and devices > 1:
        chosen = list(ways(devices, config, footprint(config, device)))
        changes.append({})
    layer = {"train": {"recompute": "layer"}}
    if config.train.recompute != "layer":
        changes.append(layer)
    if config.micro_batch > 1:
        changes.append({"train": {"recompute": "layer", "micro_batch": 1}})
    least = {"train": {"recompute": "layer", "micro_batch": 1}}
    if config.adapter.method == "none":
        changes.append({"adapter": {"method": "lora"}} | least)
    if not config.quantize.on:
        stored = {"adapter": {"method": config.adapter.method}}
        if config.adapter.method == "none":
            stored = {"adapter": {"method": "lora"}}
        changes.append(stored | {"quantize": {"weights": "nf4"}} | least)
    for change in changes:
        other = config.model_copy(
            update={
                section: getattr(config, section).model_copy(update=values)
                for section, values in change.items()
            }
        )
        try:
            found = footprint(other, device)
        except LuthierError:
            continue  # the model cannot be changed so (its layers' sizes do not divide, say)
        estimates = [estimate(other, found, w, flops=None, bandwidth=None) for w in chosen]
        best = _ordered(estimates, limit)[0]
        words = [
            f"{section}.{key}={value}"
            for section, values in change.items()
            for key, value in values.items()
            if value != getattr(getattr(config, section), key)
        ]
        verdict = "fits" if best.total <= limit else "does not fit either"
        yield f"{' '.join(words)} ({best.way}): {best.total / 1e9:.2f} GB, {verdict}"
