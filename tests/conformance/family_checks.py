"""What the conformance tests share: losses and gradients, of a stage and of plain transformers.

Of the four families of `models/zoo` the plain model is our own class without packing, whose numbers are compared with
the original code's in tests/zoo.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from conftest import tiny_model_
from tiny_families import FAMILIES, MORE
from torch import Tensor
from torch.nn import functional as F

from luthier.batch import IGNORE, Batch, Layout
from luthier.models.stage import Stage
from luthier.models.zoo.chatglm import position_ids_of
from luthier.models.zoo.glm_generation import context_mask, infilling_positions
from luthier.positions import position_axes
from luthier.train.loss import token_loss
from tests.zoo_configs import ZOO_CONFIGS
from tests.zoo_folders import ZOO

# CI runs the families of the first list, `make test-all` every one
every_family = pytest.mark.parametrize(
    "family", [*FAMILIES, *(pytest.param(name, marks=pytest.mark.long) for name in (*MORE, *ZOO))]
)
# the longest document is longer than the windows, the shortest is one token; a row of three documents
DOCUMENTS = [[5, 3, 7], [8, 4], [1, 13]]
# rounding of float32, ||difference|| / ||reference||: what two orders of summation differ by in logits, and
# in gradients, which go through every layer twice
LOGITS, GRADIENTS = 2e-6, 2e-5
ASKED = [ZOO_CONFIGS["chatglm"]["gmask_token_id"], ZOO_CONFIGS["chatglm"]["bos_token_id"]]
# what Qwen v1 stretches it counts with padding and with what is in its cache, as its own code
ANSWERING: dict[str, dict[str, Any]] = {"qwen": {"seq_length": 256}}


def plain_model(family: str, **keys: Any) -> Any:
    """transformers' model with the weights of `tiny_model(family)`, as slow and plain as it comes."""
    # Falcon's own eager attention adds ALiBi twice: to the mask and to the scores
    model = tiny_model_(family, attention="sdpa" if family == "falcon_alibi" else "eager", **keys)
    model.config._experts_implementation = "eager"
    return model


def documents(family: str, random_batch: Any) -> Batch:
    """Packed rows of `DOCUMENTS`. With two position axes each has a context that ends in a mask token, and
    <sop> behind it."""
    if position_axes(family) == 1:
        return random_batch(lengths_per_row=DOCUMENTS)
    batch = random_batch(lengths_per_row=[[max(n, 3) for n in row] for row in DOCUMENTS])
    ids, labels = batch.input_ids % 300, batch.labels
    places = torch.zeros(len(ids), 2, ids.shape[1], dtype=torch.long)
    for s in Layout.of(batch).segments:
        border = s.start + (s.stop - s.start) // 2
        ids[s.row, border - 1 : border + 1] = torch.tensor(ASKED)
        own = slice(s.start, s.stop)
        places[s.row, :, own] = positions_of(family, ids[s.row : s.row + 1, own])
    keep = labels[:, :-1] != IGNORE
    labels[:, :-1][keep] = ids[:, 1:][keep]
    return Batch(ids, labels, places, batch.document_ids, batch.rows)


def positions_of(family: str, ids: Tensor) -> Tensor:
    """The plain model's positions [B, 2, S] of one document."""
    config: Any = tiny_model_(family).config
    if family == "chatglm":
        return position_ids_of(ids, config)
    return infilling_positions(config, ids, None)


def asking(family: str, prompts: list[list[int]]) -> list[list[int]]:
    """Prompts, with two position axes such that ask for an answer behind them."""
    return prompts if position_axes(family) == 1 else [[*prompt, *ASKED] for prompt in prompts]


def plain_logits(model: Any, ids: Tensor) -> Tensor:
    """[1, S] -> [S, V] of a plain call."""
    inputs: dict[str, Any] = {"input_ids": ids}
    if model.config.model_type == "glm_legacy":  # its code expects both from its tokenizer
        inputs["position_ids"] = infilling_positions(model.config, ids, None)
        inputs["attention_mask"] = context_mask(inputs["position_ids"], None)
    return model(**inputs, use_cache=False).logits[0]


def stage_loss(stage: Stage, batch: Batch) -> Tensor:
    """The mean loss over the supervised tokens of a batch, as the trainer's."""
    total = token_loss(stage(batch), batch.labels, stage.head, stage.head_parameters())
    return total / batch.num_supervised


def plain_loss(model: Any, batch: Batch) -> Tensor:
    """The same by plain transformers, each document alone."""
    total = 0.0
    for s in Layout.of(batch).segments:
        ids, labels = (x[s.row, s.start : s.stop] for x in (batch.input_ids, batch.labels))
        logits = plain_logits(model, ids[None])
        total = total + F.cross_entropy(logits, labels, ignore_index=IGNORE, reduction="sum")
    return total / batch.num_supervised  # pyright: ignore[reportReturnType]


def gradients(model: Any, loss: Tensor) -> dict[str, Tensor]:
    """Name -> gradient of what is trained; parameters that the loss does not reach are left out."""
    model.zero_grad(set_to_none=True)
    loss.backward()
    found = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return found


def error(ours: Tensor, reference: Tensor) -> float:
    """||ours - reference|| / ||reference||; of zeros, what is left of ours."""
    a, b = ours.detach().double(), reference.detach().double()
    return float((a - b).norm() / b.norm().clamp_min(1e-12))


def assert_same(ours: dict[str, Tensor], reference: dict[str, Tensor], bound: float) -> None:
    """Every tensor of both within `bound` of the other."""
    assert ours.keys() == reference.keys()
    # a gradient that is zero but for rounding (a key's bias) is measured by the others
    scale = max(float(t.detach().double().norm()) for t in reference.values())
    for name, wanted in reference.items():
        size = max(float(wanted.detach().double().norm()), 1e-3 * scale)
        difference = ours[name].detach().double() - wanted.detach().double()
        assert float(difference.norm()) / size < bound, name


def shuffled(batch: Batch, width: int) -> Batch:
    """Each document of `batch` in a row of its own, padded to `width`."""
    rows = []
    for s in Layout.of(batch).segments:
        part = []
        for name, fill in (("input_ids", 0), ("labels", IGNORE), ("position_ids", 0)):
            cut = getattr(batch, name)[s.row, ..., s.start : s.stop]
            part.append(F.pad(cut, (0, width - cut.shape[-1]), value=fill))
        ids = torch.full((width,), -1)
        ids[: s.stop - s.start] = 0
        rows.append([*part, ids])
    tensors = [torch.stack(column) for column in zip(*rows, strict=True)]
    return Batch(*tensors, rows=tuple(range(len(rows))))
