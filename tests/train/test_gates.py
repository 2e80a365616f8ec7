"""The checks of a run, each with the faults that it must catch."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import luthier.models.stage as stage_module
from luthier.adapters import attach
from luthier.batch import IGNORE, PADDING, Batch, Layout
from luthier.config import AdapterConfig
from luthier.errors import Failed
from luthier.models.stage import Stage
from luthier.train.gates import (
    check_batch,
    check_finite,
    check_first_gradients,
    check_isolation,
    num_seeing_several_keys,
)
from luthier.train.loss import token_loss
from luthier.train.master import MasterWeights

LENGTHS = [[7, 5, 4], [9, 3], [6]]


@pytest.fixture
def batch(random_batch: Any) -> Batch:
    return replace(random_batch(lengths_per_row=LENGTHS, supervised_share=0.9), rows=(40, 41, 42))


def test_a_right_batch_passes(batch: Batch, random_batch: Any) -> None:
    check_batch(batch)
    check_batch(random_batch(lengths_per_row=[[5]], width=9))
    two_axes = torch.stack([batch.position_ids] * 2, 1)
    check_batch(replace(batch, position_ids=two_axes), axes=2)
    with pytest.raises(Failed, match="2 position axes"):
        check_batch(batch, axes=2)


def shifted_again(batch: Batch) -> Batch:
    following = torch.cat([batch.labels[:, 1:], torch.full_like(batch.labels[:, :1], IGNORE)], 1)
    return replace(batch, labels=following)


def not_shifted(batch: Batch) -> Batch:
    labels = torch.where(batch.document_ids == PADDING, IGNORE, batch.input_ids)
    return replace(batch, labels=labels)


def with_changed(batch: Batch, name: str, row: int, position: int, value: int) -> Batch:
    tensor = getattr(batch, name).clone()
    tensor[row, position] = value
    return replace(batch, **{name: tensor})


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (shifted_again, "labels look shifted once too often"),
        (not_shifted, "labels look not shifted"),
        # the label of a document's last token is the first token of the next one
        (lambda b: with_changed(b, "labels", 0, 6, int(b.input_ids[0, 7])), "row 40 at position 6"),
        (lambda b: with_changed(b, "labels", 2, 5, 3), "last token of a document is supervised"),
        (lambda b: with_changed(b, "labels", 1, 13, 3), "padding is supervised, first in row 41"),
        (lambda b: with_changed(b, "position_ids", 1, 9, 9), "positions .* row 41 at position 9"),
        (lambda b: with_changed(b, "document_ids", 0, 10, 3), "last token of a document"),
        (lambda b: replace(b, document_ids=b.document_ids + (b.document_ids == 2)), "not numbered"),
        (lambda b: with_changed(b, "document_ids", 2, 9, 0), "behind padding"),
        (lambda b: replace(b, document_ids=b.document_ids + (b.document_ids >= 0)), "not numbered"),
    ],
)
def test_wrong_batches(batch: Batch, fault: Any, message: str) -> None:
    with pytest.raises(Failed, match=message):
        check_batch(fault(batch))


def test_every_single_wrong_label_is_found(batch: Batch) -> None:
    for row, position in (batch.labels != IGNORE).nonzero().tolist():
        wrong = (int(batch.labels[row, position]) + 1) % 320
        with pytest.raises(Failed, match=f"in row {40 + row} at position {position} "):
            check_batch(with_changed(batch, "labels", row, position, wrong))


FAMILIES = ["llama", "qwen2", "qwen3", "mistral", "gemma2", "gpt2", "opt", "bloom"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_documents_are_isolated(
    family: str, dtype: torch.dtype, batch: Batch, tiny_model: Any
) -> None:
    model = tiny_model(family, dtype, dropout=0.1)
    model.train()
    model.base_model.eval()
    modes = [m.training for m in model.modules()]
    report = check_isolation(Stage(model), batch, kernel="auto")
    assert (report.documents, report.tokens) == (6, 34)
    assert [m.training for m in model.modules()] == modes


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize(
    "lengths", [LENGTHS, [[30]], [[8], [9]], [[100, 80]]], ids=["packed", "one", "unpacked", "long"]
)
def test_a_leak_is_caught(
    family: str,
    lengths: list[list[int]],
    tiny_model: Any,
    random_batch: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    batch = random_batch(lengths_per_row=lengths)
    stage = Stage(tiny_model(family))
    assert check_isolation(stage, batch, kernel="sdpa").documents > 1

    class Merged(Layout):
        @classmethod
        def of(cls, batch: Batch) -> Layout:
            return Layout(batch.document_ids.clamp(max=0), batch.position_ids, batch.rows)

    monkeypatch.setattr(stage_module, "Layout", Merged)
    with pytest.raises(Failed, match="attention kernel 'sdpa' another document's tokens"):
        check_isolation(stage, batch, kernel="sdpa")


class Toy(nn.Module):
    """Hidden states [B, S, 4] of a batch without attention; `leak` makes documents see something."""

    def __init__(self, leak: str = "") -> None:
        super().__init__()
        self.embed = nn.Embedding(320, 4)
        self.leak = leak

    def forward(self, batch: Batch) -> Tensor:
        hidden = self.embed(batch.input_ids)
        match self.leak:
            case "rows":
                return hidden + hidden.mean(0, keepdim=True)
            case "backwards":
                return hidden + hidden.flip(1).cumsum(1).flip(1)
            case "constant":
                return torch.ones_like(hidden)
        return hidden


@pytest.mark.parametrize("leak", ["rows", "backwards"])
def test_leaks_across_rows_and_backwards_are_caught(leak: str, batch: Batch) -> None:
    check_isolation(Toy(), batch, kernel="x")
    with pytest.raises(Failed, match="another document's tokens change"):
        check_isolation(Toy(leak), batch, kernel="x")


def test_a_model_blind_to_its_input_proves_nothing(batch: Batch) -> None:
    with pytest.raises(Failed, match="do not depend on its tokens"):
        check_isolation(Toy("constant"), batch, kernel="x")


def test_a_broken_weight_is_named_and_no_leak_is_claimed(batch: Batch, tiny_model: Any) -> None:
    model = tiny_model("llama")
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[0, 0] = math.nan
    with pytest.raises(
        Failed, match=r"not finite; .* weight model\.model\.layers\.1\.mlp\.up_proj"
    ):
        check_isolation(Stage(model), batch, kernel="x")


def test_nothing_to_compare(random_batch: Any) -> None:
    assert check_isolation(Toy(), random_batch(lengths_per_row=[[1]]), kernel="x").documents == 0


def test_equal_tokens_are_told_apart(batch: Batch) -> None:
    for token in (0, 5):
        same = replace(batch, input_ids=torch.full_like(batch.input_ids, token))
        with pytest.raises(Failed, match="another document's tokens"):
            check_isolation(Toy("rows"), same, kernel="x")


def backward(stage: Stage, batch: Batch) -> None:
    token_loss(stage(batch), batch.labels, stage.head, stage.head_parameters()).backward()


def trainable(model: nn.Module) -> list[str]:
    return [name for name, p in model.named_parameters() if p.requires_grad]


def lora(tiny_model: Any, batch: Batch) -> tuple[Any, list[str], list[str]]:
    """An adapted model after one backward, what it trains, and LoRA's A, whose gradient is zero."""
    model = tiny_model("llama")
    attach(model, AdapterConfig(method="lora", rank=2), seed=0)
    backward(Stage(model), batch)
    names = trainable(model)
    return model, names, [name for name in names if "lora_A" in name]


def test_right_gradients_pass(batch: Batch, tiny_model: Any) -> None:
    model, names, at_zero = lora(tiny_model, batch)
    assert len(at_zero) == len(names) / 2
    check_first_gradients(model, names, at_zero)
    with pytest.raises(Failed, match=r"trained but its gradient is zero: .*lora_A"):
        check_first_gradients(model, names)


def test_gradients_of_masters(batch: Batch, tiny_model: Any) -> None:
    model = tiny_model("opt", torch.bfloat16)
    masters = MasterWeights(list(model.named_parameters()), "float32")
    backward(Stage(model), batch)
    masters.collect()
    names = trainable(model)
    check_first_gradients(model, names, gradients=masters.gradients())
    with pytest.raises(Failed, match="its gradient is zero"):
        check_first_gradients(model, names)


def test_wrong_gradients(batch: Batch, tiny_model: Any) -> None:
    frozen = "model.layers.0.self_attn.q_proj.weight"

    model, names, at_zero = lora(tiny_model, batch)
    model.get_parameter(frozen).requires_grad_(True)
    with pytest.raises(Failed, match=f"trained but to be frozen: {frozen}"):
        check_first_gradients(model, names, at_zero)

    model, names, at_zero = lora(tiny_model, batch)
    model.get_parameter(frozen).grad = torch.zeros_like(model.get_parameter(frozen))
    with pytest.raises(Failed, match=f"frozen but has a gradient: {frozen}"):
        check_first_gradients(model, names, at_zero)

    model, names, at_zero = lora(tiny_model, batch)
    late = next(name for name in names if "lora_B" in name)
    model.get_parameter(late).requires_grad_(False)
    with pytest.raises(Failed, match=f"frozen but to be trained: {late}"):
        check_first_gradients(model, names, at_zero)

    for value, words in ((math.nan, "not finite"), (0.0, "zero")):
        model, names, at_zero = lora(tiny_model, batch)
        model.get_parameter(late).grad.fill_(value)
        with pytest.raises(Failed, match=f"gradient is {words}: {late}"):
            check_first_gradients(model, names, at_zero)
    model.get_parameter(at_zero[0]).grad.fill_(math.inf)
    with pytest.raises(Failed, match=f"not finite: {at_zero[0]}"):
        check_first_gradients(model, [n for n in names if n != late], [*at_zero, late])

    model, names, at_zero = lora(tiny_model, batch)
    with pytest.raises(Failed, match="to be trained but not in the model: gone"):
        check_first_gradients(model, [*names, "gone"], at_zero)


def test_all_but_zeros_is_checked_at_any_step(batch: Batch, tiny_model: Any) -> None:
    model, names, _ = lora(tiny_model, batch)
    check_first_gradients(model, names, zeros=False)
    with pytest.raises(Failed, match=r"gradients of step 9\. trained but its gradient is zero"):
        check_first_gradients(model, names, step=9)
    model.get_parameter(names[0]).grad.fill_(math.inf)
    with pytest.raises(
        Failed, match=rf"gradients of step 4\. its gradient is not finite: {names[0]}"
    ):
        check_first_gradients(model, names, zeros=False, step=4)
    model, names, _ = lora(tiny_model, batch)
    model.get_parameter(names[0]).requires_grad_(False)
    with pytest.raises(Failed, match=f"frozen but to be trained: {names[0]}"):
        check_first_gradients(model, names, zeros=False)


def test_supervised_tokens_that_see_several_keys(random_batch: Any) -> None:
    pairs = random_batch(lengths_per_row=[[2, 2], [2]], supervised_share=1.0)
    assert pairs.num_supervised and not num_seeing_several_keys(pairs)
    mixed = random_batch(lengths_per_row=[[2, 4], [3]], supervised_share=1.0)
    assert num_seeing_several_keys(mixed) == 3  # positions 1 and 2 of four tokens, 1 of three
    unsupervised = replace(mixed, labels=torch.full_like(mixed.labels, IGNORE))
    assert not num_seeing_several_keys(unsupervised)


def test_finite(tiny_model: Any) -> None:
    model = tiny_model("llama")
    plain = {"weights": dict(model.named_parameters()), "gradients": {}}
    check_finite(1.0, 2.0, step=3, rows=(1, 2), **plain)
    with pytest.raises(Failed, match=r"step 3 over rows 1, 2\. loss nan.*arose in the forward"):
        check_finite(math.nan, 2.0, step=3, rows=(1, 2), **plain)
    grads = {"model.norm.weight": torch.tensor([1.0, math.inf])}
    with pytest.raises(Failed, match=r"norm inf; .* gradient of model\.norm\.weight \(1 in all\)"):
        check_finite(1.0, math.inf, step=3, rows=(1,), **plain | {"gradients": grads})
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[0, 0] = math.nan
    with pytest.raises(Failed, match=r"the weight model\.layers\.1\.mlp\.up_proj\.weight"):
        check_finite(math.nan, math.inf, step=3, rows=(1,), **plain | {"gradients": grads})
