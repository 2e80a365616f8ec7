"""What the conformance tests share: losses and gradients, of a stage and of plain transformers."""

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
from luthier.train.loss import token_loss

# CI runs the families of the first list, `make test-all` every one
every_family = pytest.mark.parametrize(
    "family", [*FAMILIES, *(pytest.param(name, marks=pytest.mark.long) for name in MORE)]
)
# the longest document is longer than the windows, the shortest is one token; a row of three documents
DOCUMENTS = [[5, 3, 7], [8, 4], [1, 13]]
# rounding of float32, ||difference|| / ||reference||: what two orders of summation differ by in logits, and
# in gradients, which go through every layer twice
LOGITS, GRADIENTS = 2e-6, 2e-5


def plain_model(family: str, **keys: Any) -> Any:
    """transformers' model with the weights of `tiny_model(family)`, as slow and plain as it comes."""
    # Falcon's own eager attention adds ALiBi twice: to the mask and to the scores
    model = tiny_model_(family, attention="sdpa" if family == "falcon_alibi" else "eager", **keys)
    model.config._experts_implementation = "eager"
    return model


def stage_loss(stage: Stage, batch: Batch) -> Tensor:
    """The mean loss over the supervised tokens of a batch, as the trainer's."""
    total = token_loss(stage(batch), batch.labels, stage.head, stage.head_parameters())
    return total / batch.num_supervised


def plain_loss(model: Any, batch: Batch) -> Tensor:
    """The same by plain transformers, each document alone."""
    total = 0.0
    for s in Layout.of(batch).segments:
        ids, labels = (x[s.row, s.start : s.stop] for x in (batch.input_ids, batch.labels))
        logits = model(input_ids=ids[None], use_cache=False).logits[0]
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
            cut = getattr(batch, name)[s.row, s.start : s.stop]
            part.append(F.pad(cut, (0, width - len(cut)), value=fill))
        ids = torch.full((width,), -1)
        ids[: s.stop - s.start] = 0
        rows.append([*part, ids])
    tensors = [torch.stack(column) for column in zip(*rows, strict=True)]
    return Batch(*tensors, rows=tuple(range(len(rows))))
