"""One step's footprint spread over devices: what each device of a layout holds, sends and computes.

A device's part of the model is found first (`device_share`: layers of its stage, its part of each layer and of the
tokens), then data parallelism cuts that part as `parallel/shard.py` does. Every row counts as full. Times are sums of
arithmetic, waiting for the pipeline and communication by given rates, nothing hidden behind anything.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch

from luthier.config import RunConfig
from luthier.footprint import Footprint, Part, optimizer_bytes
from luthier.parallel.degrees import WHOLE
from luthier.parallel.shard import BUCKET
from luthier.train.loss import BLOCK_BYTES

COPY = "copy of a background save"
NODE = 8  # devices behind one fast link: tensor parallelism is proposed up to here
NOMINAL = (
    8e3  # operations in the time of a byte, where rates are not given: 400 TFLOP/s and 50 GB/s
)


@dataclass(frozen=True)
class Way:
    """A layout: the degrees of the mesh, and what `shard` cuts."""

    replicate: int
    shard: int
    stage: int
    tensor: int = 1
    context: int = 1
    pipeline: int = 1

    def __str__(self) -> str:
        words = [f"replicate={self.replicate}"] if self.replicate > 1 else []
        words += [f"shard={self.shard} stage={self.stage}"] if self.shard > 1 else []
        for axis in ("tensor", "context", "pipeline"):
            words += [f"{axis}={getattr(self, axis)}"] if getattr(self, axis) > 1 else []
        return " ".join(words) or "one device"

    @property
    def data(self) -> int:
        """How many devices, or groups of them, read different rows."""
        return self.replicate * self.shard


@dataclass(frozen=True)
class Estimate:
    """One layout's fullest device: bytes by item when most is alive, and what a step moves."""

    way: Way
    moment: str
    items: dict[str, int]
    moved: int  # bytes that each device sends and receives in a step
    flops: float  # operations of a device's step, as long as those it waits for in the pipeline
    seconds: float | None  # of a step; None where a rate was not given
    host: int = 0  # bytes of the CPU's memory beside a device of its own

    @property
    def total(self) -> int:
        return sum(self.items.values())


def estimate(
    config: RunConfig,
    found: Footprint,
    way: Way,
    *,
    flops: float | None,
    bandwidth: float | None,
    saving: bool = True,
) -> Estimate:
    """What `way` costs its fullest device. `flops` and `bandwidth` are per second and device. `saving`: while a
    checkpoint is written, if the config has that."""
    micro_batches = max(1, num_micro_batches(config, found.rows, way.data))
    ends = [device_share(config, found, way, last, micro_batches) for last in (False, True)]
    if way.pipeline == 1:
        ends = ends[-1:]
    both = [_moments(config, part, way, micro_batches > 1, saving) for part in ends]
    moment, items = max(both, key=lambda pair: sum(pair[1].values()))
    host = 0 if found.on_cpu else max(_copied(config, part, way) for part in ends) * saving
    part = ends[0]
    moved = _moved(config, found, part, way, micro_batches)
    virtual = config.parallel.virtual_stages
    bubble = 1 + (way.pipeline - 1) / (micro_batches * virtual)
    work = found.flops / (way.tensor * way.context * way.pipeline) * micro_batches * bubble
    seconds = None
    if flops is not None and (bandwidth is not None or moved == 0):
        seconds = work / flops + (moved / bandwidth if bandwidth else 0.0)
    return Estimate(way, moment, items, moved, work, seconds, host)


def num_micro_batches(config: RunConfig, rows: int, data_ranks: int) -> int:
    """How many forwards of `rows` a step has on each data rank; 0 where the batch cannot be shared out so."""
    if config.train.accumulation is not None:
        return config.train.accumulation
    return 0 if config.batch % (rows * data_ranks) else config.batch // (rows * data_ranks)


# ---- a device's part of the model


def device_share(
    config: RunConfig, found: Footprint, way: Way, last: bool, micro_batches: int
) -> Footprint:
    """What one device of a pipeline's first or last stage, of a tensor and of a context group has of a micro-batch."""
    t, c, p = way.tensor, way.context, way.pipeline
    layers = -(-found.layers // p)
    if p == 1:
        rest = found.rest
    else:
        tied = found.tied_gradient > 0 or found.tied
        rest = found.head if last else found.rest if tied else found.rest + found.head * -1
    layer = _cut(found.layer, t, found.dtype)
    # the largest layer stands for a stage's, and the average one for all of them
    inside = found.total + found.rest * -1
    stack = _cut(inside, t, found.dtype)
    stack = _scaled(stack, layers / found.layers)
    rest = _scaled(rest, 1 / t)
    sequence = config.parallel.sequence
    again = config.train.recompute == "layer"
    # what stays whole beside tensor parallelism: inputs of layers, and of norms without sequence parallelism
    kept = (0 if again else 2) if sequence else (1 if again else 4)
    whole = min(found.saved, kept * found.hidden * found.layers)
    saved = whole + (found.saved - whole) / t if t > 1 else found.saved
    in_flight = 1.0 if last else float(min(p, micro_batches))
    if (virtual := config.parallel.virtual_stages) > 1:
        in_flight *= 1 + (p - 1) / (p * virtual)
    one = saved * layers / found.layers / c
    saved = one * in_flight
    working = found.working / t / c
    working += 2 * found.hidden / c * (t > 1)  # gathered inputs, or inputs that are whole
    working += found.keys / t * (c > 1)  # keys and values of all ranks
    heads = (last or p == 1) / t
    # a rank's part of the probabilities is scaled in float32, some rows at a time
    shares = 2 * BLOCK_BYTES * (t > 1 and heads > 0 and found.on_cpu)
    return replace(
        found,
        layers=layers,
        layer=layer,
        rest=rest,
        total=stack + rest,
        saved=int(saved),
        waiting=int(saved - one),
        peak=int(saved + working),
        hidden=int(found.hidden / c),
        # the cut is tried before the run: a forward of the whole model, and one of what is cut
        kernels=found.kernels + 2 * found.tried * (t > 1),
        logits=int(found.logits * heads) + shares,
        head_gradient=int(found.head_gradient * heads),
        tied_gradient=int(found.tied_gradient / t) if p == 1 else 0,
    )


def _scaled(part: Part, share: float) -> Part:
    return part if share == 1 else Part(*(round(n * share) for n in vars(part).values()))


def _cut(part: Part, tensor: int, dtype: torch.dtype) -> Part:
    """A rank's part of layers: matrices are cut, what stands beside them is whole, and one of two factors of an
    adapter is cut."""
    if tensor == 1:
        return part
    gone = 1 - 1 / tensor
    base = part.trained - part.adapter
    matrices = int(part.products * gone)
    trained = int(part.adapter * gone / 2) + (matrices if base else 0)
    bytes_each = part.trained_bytes / max(part.trained, 1)
    quantized = int(part.quantized_bytes * gone)
    frozen = quantized
    if not base and not part.quantized_bytes:
        frozen = matrices * dtype.itemsize
    return Part(
        trained=part.trained - trained,
        trained_bytes=part.trained_bytes - int(trained * bytes_each),
        frozen_bytes=part.frozen_bytes - frozen,
        quantized_bytes=part.quantized_bytes - quantized,
        adapter=part.adapter - int(part.adapter * gone / 2),
        products=part.products - matrices,
    )


# ---- data parallelism of that part


def _moments(
    config: RunConfig, found: Footprint, way: Way, accumulates: bool, saving: bool
) -> tuple[str, dict[str, int]]:
    """The moment of a step with most memory, and what fills it."""
    total, layer, stage = found.total, found.layer, way.stage
    cut, wide, masters, kept = _state(config, found, way)
    whole_gradient = total.trained_bytes
    gathered = (
        layer.trained_bytes * 2 + found.rest.trained_bytes
    )  # of stage 3: this layer and the next

    frozen = total.frozen_bytes - total.quantized_bytes
    weights = total.trained_bytes
    if cut > 1:
        weights = total.trained_bytes // cut
        weights += min(gathered, total.trained_bytes) if stage == 3 else total.trained_bytes
        if stage == 3:
            gathered_frozen = 2 * (layer.frozen_bytes - layer.quantized_bytes)
            rest = found.rest.frozen_bytes - found.rest.quantized_bytes
            frozen = frozen // cut + min(frozen, gathered_frozen + rest)
    lasting = {
        "weights, frozen": frozen,
        "weights, quantised": total.quantized_bytes,
        "weights, trained": weights,
        "float32 copies": wide * total.trained // cut if masters else 0,
        "optimiser": optimizer_bytes(config, total.trained, round(kept)) // cut,
        "compiled matrix products": found.kernels,
    }
    copy = {COPY: _copied(config, found, way) if saving and found.on_cpu else 0}
    beside = copy if config.checkpoint.every != "end" else {}
    # gradients while the backward runs: of earlier micro-batches, and one layer's on its way
    every = int(total.trained * kept)
    if cut > 1 and not (stage == 1 and accumulates):
        before, after = every // cut, every // cut + layer.trained * wide
    else:
        # half-precision gradients are widened one by one once all are there
        before, after = every, every + (whole_gradient if masters and accumulates else 0)
    before = before if accumulates else 0
    if way.replicate > 1 and cut == 1:
        after += 2 * min(BUCKET, total.trained) * wide
    moments = {
        "loss": {
            "gradients": before,
            "activations": found.saved + found.hidden,
            "logits": found.logits + found.entering,
            "gradient of the head": found.head_gradient,
        },
        "backward, last layer": {
            "gradients": before,
            "activations": found.saved,
            "one layer's working space": found.working,
            "gradient of the head": found.head_gradient,
        },
        "backward, first layer": {
            "gradients": after,
            "activations": found.waiting + (found.saved - found.waiting) // found.layers,
            "one layer's working space": found.working,
            "gradient of tied embeddings": found.tied_gradient,
        },
    }
    moments = {name: items | beside for name, items in moments.items()} | {"saving": copy}
    moment, items = max(moments.items(), key=lambda pair: sum(pair[1].values()))
    return moment, lasting | items


def _state(config: RunConfig, found: Footprint, way: Way) -> tuple[int, int, bool, float]:
    """How many ranks the trained numbers are cut over, bytes of a wide one, whether there are masters, and bytes of
    those that the optimiser has."""
    total = found.total
    # the ranks that share a row's tokens are cut over with the shards
    cut = way.shard * way.context if way.shard > 1 else 1
    wide = 8 if found.dtype == torch.float64 else 4
    half = total.trained_bytes < wide * total.trained
    masters = half and config.model.master_dtype == "float32"
    kept = wide if masters else total.trained_bytes / max(total.trained, 1)
    return cut, wide, masters, kept


def _copied(config: RunConfig, found: Footprint, way: Way) -> int:
    """Bytes of a rank's copy of what a background save writes: each number's by one of those that have it."""
    if not config.checkpoint.background or config.checkpoint.every == "never":
        return 0
    total = found.total
    cut, wide, masters, kept = _state(config, found, way)
    numbers = total.trained_bytes + wide * total.trained * masters
    numbers += optimizer_bytes(config, total.trained, round(kept))
    peft = total.trained_bytes if config.adapter.method != "none" else 0  # rank 0's
    return numbers // (cut * max(1, way.data * way.context // cut)) + peft


def _moved(
    config: RunConfig, whole: Footprint, found: Footprint, way: Way, micro_batches: int
) -> int:
    """Bytes per device and step: rings send (n - 1) / n of what they gather or reduce, and sums twice that."""
    wide = 8 if found.dtype == torch.float64 else 4
    total, n, r = found.total, way.shard, way.replicate * way.context
    t, c, p = way.tensor, way.context, way.pipeline
    gradients = total.trained * wide
    moved = 2 * (r - 1) / r * gradients / n
    if n > 1:
        ring = (n - 1) / n
        if way.stage == 3:
            weights = total.trained_bytes + total.frozen_bytes - total.quantized_bytes
            moved += ring * (2 * weights + gradients) * micro_batches
        else:
            moved += ring * total.trained_bytes
            moved += ring * gradients * (micro_batches if way.stage == 2 else 1)
    # per layer two sums in the forward and two in the backward; keys and values are gathered in both
    layer = 8 * (t - 1) / t * found.hidden + 3 * (c - 1) / c * whole.keys / t
    moved += layer * found.layers * micro_batches
    if p > 1:
        moved += 2 * found.hidden * micro_batches * config.parallel.virtual_stages
    return int(moved)


def ways(devices: int, config: RunConfig, found: Footprint) -> Iterator[Way]:
    """Every layout of so many devices that the config may be trained in."""
    for tensor in _divisors(devices):
        if tensor > NODE or found.heads % tensor:
            continue
        for context in _divisors(devices // tensor):
            if found.length % (2 * context):
                continue
            for pipeline in _divisors(devices // tensor // context):
                left = devices // tensor // context // pipeline
                number = num_micro_batches(config, found.rows, left)
                if pipeline > found.layers or number < pipeline:  # rows that do not divide: 0
                    continue
                others = tensor, context, pipeline
                for shard in _divisors(left):
                    if shard == 1:
                        yield Way(left, 1, config.parallel.stage, *others)
                    elif config.optim.name not in WHOLE:
                        yield from (Way(left // shard, shard, s, *others) for s in (1, 2, 3))


def _divisors(number: int) -> list[int]:
    return [n for n in range(1, number + 1) if number % n == 0]
