"""What the tests of all adapter methods share: the table of methods, and values for their parameters."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from luthier.adapters import adapter_parameters, retract
from luthier.batch import Batch, Layout, layout_scope
from luthier.config import AdapterConfig
from luthier.parallel.pieces import pieces_of
from luthier.positions import TWO_AXES
from luthier.seeding import generator
from luthier.train.state import Stored, model_tensors, write_index, write_pieces


@dataclass(frozen=True)
class Row:
    """A method, or a form of one, and what the contract tests have to know about it."""

    options: dict[str, Any]
    on: Literal["linear", "layer", "model"] = "linear"  # what its adapters sit on
    folds: bool = True  # it can be folded into the weight
    dropout: bool = True  # it reads adapter.dropout
    exact: bool = True  # the first output is the base's bit for bit, else to rounding
    unchanged: bool = (
        True  # the first output is the base's; not so where virtual tokens take attention
    )
    rank: bool = True  # it has a rank, which tensor parallelism may cut
    drawn: bool = True  # its first values are drawn, none is made of the weights
    derivative: bool = True  # its gradient is the whole derivative (DoRA takes a norm as constant)
    small: float = 3e-3  # a change of its parameters whose effect is below a step of the output


# what sits on the model itself: it takes part in attention, also at first
_ON_MODEL: dict[str, Any] = {"on": "model", "folds": False, "dropout": False, "rank": False}
_ON_MODEL |= {"unchanged": False}
# what sits on decoder layers; first values that are constants or equal others have a test of their own
_ON_LAYER: dict[str, Any] = {"on": "layer", "folds": False, "rank": False, "drawn": False}
# One row per method; every test in test_contract.py runs on it.
METHODS: dict[str, Row] = {
    "lora": Row({"method": "lora", "rank": 4, "alpha": 6}),
    "mixer": Row({"method": "lora", "rank": 4, "alpha": 6, "mixer": True}),
    "pissa": Row(
        {"method": "lora", "rank": 4, "alpha": 6, "pissa": True},
        dropout=False,
        rank=False,
        drawn=False,
        small=3e-4,
    ),
    "dora": Row(
        {"method": "lora", "rank": 4, "alpha": 6, "dora": True, "rslora": True},
        rank=False,
        drawn=False,
        derivative=False,
    ),
    "reft": Row({"method": "reft", "rank": 4, "positions": "f3+l2"}, **_ON_LAYER),
    "reft_tied": Row(
        {"method": "reft", "form": "noreft", "rank": 4, "positions": "f2+l3", "tied": True},
        **_ON_LAYER,
    ),
    "reft_direft": Row(
        {"method": "reft", "form": "direft", "rank": 4, "positions": "l3", "act_fn": "relu"},
        **_ON_LAYER,
    ),
    "reft_tiny_all": Row(
        {"method": "reft", "form": "tiny", "rank": 4, "positions": "all"}, **_ON_LAYER
    ),
    "prefix": Row({"method": "prefix", "num_prefix_tokens": 4}, **_ON_MODEL),
    "prefix_network": Row(
        {
            "method": "prefix",
            "form": "paddlenlp",
            "num_prefix_tokens": 4,
            "prefix_projection": True,
            "projection_size": 12,
        },
        **_ON_MODEL,
    ),
    "prompt": Row({"method": "prompt", "num_prefix_tokens": 4}, **_ON_MODEL),
    "mora": Row({"method": "mora", "rank": 4}, rank=False, small=3e-4),
    "mora_type1": Row({"method": "mora", "form": "type1", "rank": 4}, rank=False, small=1e-4),
    "mora_type4": Row({"method": "mora", "form": "type4", "rank": 2}, rank=False, small=1e-4),
    "mora_paddlenlp": Row(
        {"method": "mora", "form": "paddlenlp", "rank": 4}, rank=False, small=3e-4
    ),
    "vera": Row({"method": "vera", "rank": 4}, rank=False, drawn=False),
    "vera_paddlenlp": Row(
        {"method": "vera", "form": "paddlenlp", "rank": 4}, rank=False, drawn=False, small=1e-3
    ),
    "lokr": Row({"method": "lokr", "rank": 4, "alpha": 6}, dropout=False),
    "lokr_both": Row(
        {"method": "lokr", "rank": 1, "decompose_both": True},
        dropout=False,
        rank=False,
    ),
    "lokr_lycoris": Row(
        {"method": "lokr", "form": "lycoris", "rank": 4, "alpha": 6}, dropout=False
    ),
    "ia3": Row({"method": "ia3"}, dropout=False, rank=False, drawn=False, small=1e-3),
}
# plain, biased and tied, Conv1D, flattened tokens, ALiBi and attention of its own
FAMILIES = ("llama", "qwen2", "gpt2", "opt", "bloom")
ZOO = (*TWO_AXES, "chatglm2", "qwen")  # of models/zoo: all rows in `make test-all`, a few always
QUICK = ("lora", "reft", "prefix_network")


def options(row: str, **changes: Any) -> AdapterConfig:
    return AdapterConfig(**{**METHODS[row].options, **changes})


def fill(model: nn.Module, seed: int = 0, size: float = 0.1) -> None:
    """Adapter parameters as if trained: also those that the method makes zero at first."""
    with torch.no_grad():
        for name, parameter in adapter_parameters(model).items():
            noise = torch.randn(parameter.shape, generator=generator(seed, name))
            parameter.add_(size * noise.to(parameter.dtype))
    retract(model)


def fitting(model: Any, batch: Batch) -> Batch:
    """The batch with positions [B, 2, S] in families with two axes: the first half of a document is context."""
    if model.config.model_type not in TWO_AXES or batch.position_ids.ndim == 3:
        return batch
    places = torch.stack([batch.position_ids, torch.zeros_like(batch.position_ids)], dim=1)
    for s in Layout.of(batch).segments:
        context = (s.stop - s.start) // 2
        index = torch.arange(s.stop - s.start)
        places[s.row, 0, s.start : s.stop] = index.clamp(max=max(context - 1, 0))
        places[s.row, 1, s.start : s.stop] = (index - context + 1).clamp(min=0)
    return replace(batch, position_ids=places)


def run(model: Any, batch: Batch) -> Tensor:
    """Logits [B, S, V] inside the batch's layout."""
    batch = fitting(model, batch)
    with layout_scope(Layout.of(batch)):
        return model(
            input_ids=batch.input_ids, position_ids=batch.position_ids, use_cache=False
        ).logits


def error(ours: Tensor, reference: Tensor) -> float:
    """||ours - reference|| / ||reference||."""
    ours, reference = ours.detach().double(), reference.detach().double()
    return float((ours - reference).norm() / reference.norm())


def keep_state(model: nn.Module, folder: Path) -> None:
    """What a checkpoint keeps of the model itself."""
    state = {name: pieces_of(tensor) for name, tensor in model_tensors(model).items()}
    write_index(folder, [write_pieces(folder, 0, state)[1]])


def take_state(model: nn.Module, folder: Path) -> None:
    """What a resumed run does with it."""
    stored = Stored(folder)
    for name, tensor in model_tensors(model).items():
        stored.load(name, tensor)
