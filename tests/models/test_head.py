"""A half-precision head's logits less their label's: the same loss and gradients, and less of it rounded away."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from luthier.models import head
from luthier.models.stage import Stage
from luthier.train.loss import token_loss, token_stats

SIZES = [(1, 1, 1), (3, 5, 17), (70, 33, 321)]  # rows, width, tokens


def drawn(rows: int, width: int, tokens: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    draw = torch.Generator().manual_seed(tokens)
    hidden = torch.randn(rows, width, generator=draw).to(dtype)
    weight = torch.randn(tokens, width, generator=draw).to(dtype)
    return hidden, weight, torch.randint(0, tokens, (rows,), generator=draw)


@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_loss_and_gradients_are_those_of_the_logits(sizes: tuple[int, int, int]) -> None:
    hidden, weight, targets = drawn(*sizes, torch.float64)

    def run(logits_of: Any) -> tuple[Tensor, ...]:
        x, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
        loss = cross_entropy(logits_of(x, w), targets, reduction="none")
        return loss.detach(), *torch.autograd.grad(loss.square().sum(), (x, w))

    plain = run(lambda x, w: x @ w.t())
    for ours, wanted in zip(run(lambda x, w: head.logits_less(x, w, targets)), plain, strict=True):
        assert float((ours - wanted).norm()) <= 1e-12 * float(wanted.norm())


def test_less_is_rounded_away(relative: Any) -> None:
    """Logits that are far from zero and near each other, as a trained model's likely ones are."""
    hidden, weight, targets = drawn(300, 64, 321, torch.bfloat16)
    weight *= 0.25
    hidden[:, 0], weight[:, 0] = 1, 16
    exact = hidden.double() @ weight.double().t()
    wanted = cross_entropy(exact, targets, reduction="none")
    probabilities = exact.softmax(-1)
    errors = []
    for logits in (hidden @ weight.t(), head.logits_less(hidden, weight, targets)):
        loss = cross_entropy(logits.double(), targets, reduction="none")
        errors.append(
            (
                float((loss - wanted).square().mean().sqrt()),
                relative(logits.double().softmax(-1), probabilities),
            )
        )
    for plain, ours in zip(*errors, strict=True):
        assert ours < plain / 3


@pytest.mark.parametrize("kind", ["plain", "bias", "float32", "hook", "forward", "subclass"])
def test_what_is_a_plain_head(kind: str) -> None:
    layer: nn.Module = nn.Linear(4, 6, bias=kind == "bias", dtype=torch.bfloat16)
    hidden = torch.zeros(2, 4, dtype=torch.bfloat16)
    match kind:
        case "float32":
            layer, hidden = layer.float(), hidden.float()
        case "hook":
            layer.register_forward_hook(lambda *_: None)
        case "forward":  # as an adapter sets it
            vars(layer)["forward"] = lambda x: x
        case "subclass":
            layer.__class__ = type("Other", (nn.Linear,), {})
    assert head.is_plain(layer, hidden) == (kind == "plain")


@pytest.mark.parametrize("family", ["llama", "gemma2", "granite"])
def test_of_a_model(family: str, tiny_model: Any, random_batch: Any) -> None:
    """Gemma 2 caps its logits and Granite divides them: they have no shift."""
    stage = Stage(tiny_model(family, torch.bfloat16))
    batch = random_batch(lengths_per_row=[[40, 9], [30]])
    labels, targets = batch.labels, torch.tensor([3, 5])
    hidden = torch.randn(2, stage.model.config.hidden_size).bfloat16()
    with torch.no_grad():
        plain, ours = stage.head(hidden), stage.relative_logits(hidden, targets)
        states = stage(batch)
        hows: list[dict[str, Any]] = [{}, {"relative": stage.relative_logits}]
        losses = [
            found
            for how in hows
            for found in (
                float(token_loss(states, labels, stage.head, **how)),
                token_stats(states, labels, stage.head, **how)[0],
            )
        ]
    shift = plain.float() - ours.float()
    if family == "llama":
        assert ours[0, 3].abs() < 0.05 and ours[1, 5].abs() < 0.05
        assert float((shift - shift[:, :1]).abs().max()) < 0.05 and float(shift.abs().max()) > 0.1
    else:
        assert torch.equal(plain, ours)
    assert max(losses) - min(losses) < 1e-3 * losses[0]
