"""What a training step of a config keeps in memory, found without weights: sizes of tensors, and a rehearsed layer.

The model is built with two and with three layers out of tensors that have shapes but no memory, with its
adapter, its quantised layers and its recomputation, and a forward and backward of full rows are run on
it; what is alive at each moment is written down, and the other layers are added in proportion. Whole numbers of bytes;
how they are spread over devices is `plan.py`.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from luthier.adapters import attach
from luthier.alive import Alive
from luthier.bases import refuse_training
from luthier.batch import Batch, Layout, layout_scope
from luthier.built import EXPERTS
from luthier.config import RunConfig
from luthier.errors import Refused
from luthier.layers import features, is_linear, is_quantized
from luthier.models import attention, rotary
from luthier.models.dropout import seed_dropout
from luthier.models.fast import fasten
from luthier.models.folder import first_line, quiet
from luthier.models.load import check_family, load_config, resolve_device, resolve_dtype
from luthier.models.recompute import set_recompute
from luthier.models.stage import Stage, decoder_layers
from luthier.prequantized import prequantized
from luthier.quantize.linears import QuantizedLinear
from luthier.quantize.loading import plan_quantization
from luthier.quantize.products import tile_bytes
from luthier.train.loss import CHUNK_BYTES, MIN_ROWS

DEPTHS = (2, 3)  # the first layer differs: nothing below it may need a gradient
# what oneDNN, which computes bfloat16's products on a CPU, keeps of the code that it makes for each of other sizes
KERNEL_BYTES = 550_000
CHECKED = 3  # lengths of documents that the model is tried with before a run (`check_stage`)


@dataclass(frozen=True)
class Part:
    """Sizes of one layer, or of what is in no layer."""

    trained: int = 0  # numbers that get a gradient
    trained_bytes: int = 0
    frozen_bytes: int = 0  # codes and scales of quantised layers among them
    quantized_bytes: int = 0
    adapter: int = 0  # trained numbers that an adapter added
    products: int = 0  # weights that each token is multiplied with, the head's apart

    def __add__(self, other: Part) -> Part:
        return Part(*(a + b for a, b in zip(self._all(), other._all(), strict=True)))

    def __mul__(self, number: int) -> Part:
        return Part(*(a * number for a in self._all()))

    def _all(self) -> list[int]:
        return list(vars(self).values())


@dataclass(frozen=True)
class Footprint:
    """One micro-batch of a config's step. Bytes unless said otherwise."""

    layers: int
    layer: Part  # the largest one
    rest: Part  # embeddings, last norm, head
    total: Part
    saved: int  # alive between forward and backward, besides weights
    peak: int  # most that is alive in forward or backward, besides weights and their gradients
    hidden: int  # the last hidden states [B, S, D]
    logits: int  # a chunk of logits and its gradient
    entering: int  # a chunk of the hidden states that the head takes, and its gradient
    head_gradient: int  # while the loss is computed, where the head is trained
    tied_gradient: int  # a second gradient of tied embeddings
    head: Part  # also in `rest`
    tied: bool  # the head is the embedding
    keys: int  # one layer's keys and values
    heads: int  # of queries
    dtype: torch.dtype
    rows: int  # rows per micro-batch
    length: int
    flops: float  # of forward and backward of the micro-batch
    kernels: int = 0  # that the library of matrix products keeps
    tried: int = 0  # of them, those of a forward of one more length
    on_cpu: bool = True
    waiting: int = 0  # in `saved`: of micro-batches on their way through later stages

    @property
    def working(self) -> int:
        """What one layer's forward and backward needs beyond what is saved."""
        return self.peak - self.saved


def footprint(config: RunConfig, device: torch.device | None = None) -> Footprint:
    """The memory of `config`'s step on such a device, which need not be there (default: the run's). Refused: what
    training refuses of the model's folder, and mixtures of experts, and other models whose forward depends on its values."""
    if prequantized(config.model) is not None or config.adapter.path is not None:
        what = "adapter.path" if config.adapter.path is not None else "model.path"
        value = config.adapter.path or config.model.path
        raise Refused(
            f"planning a run with {what}={value}",
            "sizes are found from a config alone, without reading a quantised base or an adapter",
            "plan with the original model and with the same adapter.method or quantize.weights",
        )
    refuse_training(config, None)
    made = load_config(config.model.path, trust_remote_code=config.model.trust_remote_code)
    if config.model.rope_scaling is not None:
        rotary.scale(made, config.model.rope_scaling)
    text = made.get_text_config()
    if any(getattr(text, name, None) for name in EXPERTS):
        raise Refused(
            f"planning a run of '{config.model.path}'",
            "it is a mixture of experts, whose memory and time depend on where its tokens go",
            "run a few steps instead: metrics.jsonl has the memory of each",
        )
    layers = min(config.model.num_layers or text.num_hidden_layers, text.num_hidden_layers)
    depths = [layers] if layers <= DEPTHS[-1] else list(DEPTHS)
    device = device or resolve_device(config.model.device)
    rehearsed = [_rehearse(config, made, depth, device) for depth in depths]
    few, many = rehearsed[0], rehearsed[-1]
    more = layers - depths[-1]  # layers that were not built
    saved = many.saved + more * (many.saved - few.saved)
    peak = many.peak + more * (many.peak - few.peak)
    flops = many.flops + more * (many.flops - few.flops)
    total = many.total + many.layer * more
    return replace(many, layers=layers, total=total, saved=saved, peak=peak, flops=flops)


def _rehearse(
    config: RunConfig, made: PretrainedConfig, layers: int, device: torch.device
) -> Footprint:
    """The footprint of the model's first layers."""
    dtype = resolve_dtype(config.model.dtype, made, device)
    if config.model.dtype == "auto" and device.type == "cuda" and not torch.cuda.is_available():
        dtype = torch.bfloat16  # a GPU that is not here is taken for one that is fast in it
    rows, length = config.micro_batch, config.data.length
    places = torch.arange(length).expand(rows, length)
    zeros = torch.zeros(rows, length, dtype=torch.long)
    layout = Layout.of(Batch(zeros, zeros, places, zeros, tuple(range(rows))))
    assert layout.segments and layout.borders is not None  # found while values are at hand
    try:
        with FakeTensorMode(allow_non_fake_inputs=True) as mode, quiet():
            # quantised layers save nothing of their own; their many small tiles would take long to rehearse
            model = _build(config, made, layers, dtype, device, stored=False)
            sizes = model
            if config.quantize.on:
                sizes = _build(config, made, layers, dtype, device, stored=True)
            ids, places = mode.from_tensor(zeros), mode.from_tensor(places)
            ones = torch.ones_like(ids)
            alive = Alive()
            for tensor in (*model.parameters(), *model.buffers(), ids, places, ones):
                alive.know(tensor)
            autocast = config.model.autocast
            kind = None if autocast == "none" else getattr(torch, autocast)
            with alive, layout_scope(layout):
                with torch.autocast("cpu", kind, enabled=kind is not None):
                    out = model.base_model(
                        input_ids=ids, position_ids=places, attention_mask=ones, use_cache=False
                    )
                hidden = out[0]  # [B, S, D]
                del out
                between, products = len(alive.events), len(alive.products)
                if hidden.requires_grad:
                    hidden.backward(torch.empty_like(hidden))
            alive.stop()
            gradients = {
                alive.names[p.grad.untyped_storage()._cdata]
                for p in model.parameters()
                if p.grad is not None
            }
            curve = alive.events, between, gradients
            found = _read(config, sizes, *curve, hidden, dtype, device)
            kernels = (CHECKED * products + len(alive.products)) * KERNEL_BYTES
            here = int(found.on_cpu)
            return replace(found, kernels=here * kernels, tried=here * products * KERNEL_BYTES)
    except RuntimeError as error:  # torch's, where a forward asks a fake tensor for its values
        raise Refused(
            f"planning a run of '{config.model.path}'",
            f"its forward cannot be rehearsed without values ({first_line(error)})",
            "run a few steps instead: metrics.jsonl has the memory of each",
        ) from error


def _build(
    config: RunConfig,
    made: PretrainedConfig,
    layers: int,
    dtype: torch.dtype,
    device: torch.device,
    *,
    stored: bool,
) -> PreTrainedModel:
    """The model's first layers as the run has them; `stored`: with its quantised layers."""
    made = copy.deepcopy(made)
    text = made.get_text_config()
    whole, text.num_hidden_layers = text.num_hidden_layers, layers
    for name, value in list(vars(text).items()):
        if isinstance(value, list) and len(value) == whole:  # one entry per layer
            setattr(text, name, value[:layers])
    check_family(made)
    model = AutoModelForCausalLM.from_config(
        made,
        dtype=dtype,
        attn_implementation=attention.NAME,
        trust_remote_code=config.model.trust_remote_code,
    )
    if stored:
        for name, spec in plan_quantization(model, config.quantize).items():
            layer: Any = model.get_submodule(name)
            like = QuantizedLinear.like(layer, spec.scheme, spec.block_size, spec.double_quant)
            made_of_codes = QuantizedLinear(
                like.in_features,
                like.out_features,
                spec.scheme,
                spec.block_size,
                spec.double_quant,
                bias=layer.bias is not None,
                transposed=like.transposed,
                dtype=dtype,
                device="cpu",
            )
            model.set_submodule(name, made_of_codes)
    elif device.type == "cpu":
        with unset_fake_temporarily():
            fasten(model)
    attention.install(model, _kernel(config), train=True)
    if config.adapter.method == "none":
        model.requires_grad_(True)
    else:
        attach(model, config.adapter, seed=0)
    seed_dropout(model, 0)
    set_recompute(Stage(model), config.train.recompute, config.train.keep_attention)
    return model.train()


def _kernel(config: RunConfig) -> str:
    """One that is on a CPU and saves what the config's saves: `math` holds tables of scores, others none."""
    return "math" if config.model.attention == "math" else "auto"


def _part(module: nn.Module, but: set[int] | None = None) -> Part:
    """Sizes of a module's tensors, each counted once; without those whose ids are in `but`."""
    seen, found = set(but or ()), Part()
    for name, tensor in (*module.named_parameters(), *module.named_buffers()):
        if id(tensor) in seen:
            continue
        seen.add(id(tensor))
        size = tensor.numel() * tensor.element_size()
        if tensor.requires_grad:
            added = tensor.numel() if ".adapter." in f".{name}" else 0
            found += Part(tensor.numel(), size, adapter=added)
        else:
            found += Part(frozen_bytes=size)
    stored: list[Any] = [layer for layer in module.modules() if is_quantized(layer)]
    codes = (t for layer in stored for t in layer.tensors().values())
    return found + Part(quantized_bytes=sum(t.numel() * t.element_size() for t in codes))


def _products(module: nn.Module) -> list[int]:
    """Numbers in the weight of each linear layer."""
    return [math.prod(features(layer)) for layer in module.modules() if is_linear(layer)]


def _read(
    config: RunConfig,
    model: PreTrainedModel,
    events: list[tuple[int, int]],
    between: int,
    gradients: set[int],
    hidden: Tensor,
    dtype: torch.dtype,
    device: torch.device,
) -> Footprint:
    """Sizes and curves of a rehearsed model."""
    alive = peak = saved = 0
    for i, (change, key) in enumerate(events):
        if i == between:
            saved = alive
        if key not in gradients:
            alive += change
            peak = max(peak, alive)
    saved = saved or alive
    layers = list(decoder_layers(model))
    inside = {id(t) for m in layers for t in (*m.parameters(), *m.buffers())}
    parts = [replace(_part(m), products=sum(_products(m))) for m in layers]
    head: Any = model.get_output_embeddings()
    embedding: Any = model.get_input_embeddings()
    rest = replace(_part(model, inside), quantized_bytes=0)
    total = rest
    for part in parts:
        total += part
    rows, length = config.micro_batch, config.data.length
    width = hidden.element_size()
    quantized: list[Any] = [m for m in model.modules() if is_quantized(m)]
    peak += max((tile_bytes(m.spec, device, width) for m in quantized), default=0)
    vocabulary, trained = head.weight.shape[0], head.weight.requires_grad
    numbers = head.weight.numel() * trained
    budget = max(CHUNK_BYTES, numbers * 4)
    number = -(-rows * length // max(MIN_ROWS, budget // (4 * vocabulary)))
    chunk = -(-rows * length // number)
    # a GPU takes the softmax of a whole chunk, a CPU that of a few rows at a time
    scratch = 0 if device.type == "cpu" else max(4, dtype.itemsize)
    tied = head.weight is embedding.weight
    text = model.config.get_text_config()
    heads = text.num_attention_heads
    groups = getattr(text, "num_key_value_heads", None) or heads
    # forward 2 per weight and token; backward as much for the inputs, and as much again for trained weights
    again = 2 * (config.train.recompute == "layer")
    full = 2 * (config.adapter.method == "none")
    tokens = rows * length
    width_all = hidden.shape[-1]
    scores = (
        2 * tokens * length * width_all * len(layers) * (3.5 + again / 2)
    )  # causal: half of S x S
    flops = (
        tokens * (total.products * (4 + full + again) + head.weight.numel() * (4 + full)) + scores
    )
    return Footprint(
        layers=len(layers),
        layer=max(parts, key=lambda p: p.trained_bytes + p.frozen_bytes),
        rest=rest,
        total=total,
        saved=saved,
        peak=peak,
        hidden=hidden.numel() * width,
        logits=chunk * vocabulary * (2 * width + scratch),
        entering=2 * chunk * width_all * width,
        # a chunk's, and from the second one on their sum in float32
        head_gradient=numbers * (width + (4 if number > 1 else 0)),
        tied_gradient=numbers * width if tied else 0,
        head=_part(head),
        tied=tied,
        keys=2 * hidden.numel() * width * groups // heads,
        heads=heads,
        dtype=dtype,
        rows=rows,
        length=length,
        flops=float(flops),
        on_cpu=device.type == "cpu",
    )


def optimizer_bytes(config: RunConfig, numbers: int, width: int) -> int:
    """Bytes of the optimiser's state of `numbers` parameters of `width` bytes each."""
    moments: Mapping[str, int] = {
        "adamw": 2,
        "adamw_mini": 1,
        "sgd": int(config.optim.betas[0] > 0),
    }
    return numbers * width * moments.get(config.optim.name, 0)
