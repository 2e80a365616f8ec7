"""Every row of `adapter_table.METHODS` in use: packed rows, generation, whole runs with resume and merging."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from adapter_table import (
    FAMILIES,
    METHODS,
    QUICK,
    TWO_AXES,
    ZOO,
    error,
    fill,
    fitting,
    options,
    run,
)
from safetensors.torch import load_file
from torch import Tensor

from luthier.adapters import adapter_parameters, adapters_of, attach
from luthier.batch import IGNORE, Batch
from luthier.errors import Refused
from luthier.exchange import merge
from luthier.models.stage import Stage
from luthier.recipes import finetune
from luthier.train.loss import token_loss
from luthier.use import evaluate, predict
from tests.conftest import VOCAB
from tests.tiny_runs import tiny_config, write_data

each_method = pytest.mark.parametrize("row", METHODS)
on_families = pytest.mark.parametrize(
    ("row", "family"),
    [pytest.param(row, family) for family in FAMILIES for row in METHODS]
    + [
        pytest.param(row, family, marks=() if row in QUICK else pytest.mark.long)
        for family in ZOO
        for row in METHODS
    ],
)
_TENSORS = ("input_ids", "labels", "position_ids", "document_ids")


def prompts_then_answers(lengths_per_row: list[list[int]], random_batch: Any) -> Batch:
    """Documents of which about the second half is supervised, as one answer."""
    batch = random_batch(lengths_per_row=lengths_per_row)
    labels = torch.full_like(batch.labels, IGNORE)
    for row, lengths in enumerate(lengths_per_row):
        start = 0
        for length in lengths:
            first, last = start + length // 2 - 1, start + length - 1
            labels[row, first:last] = batch.input_ids[row, first + 1 : last + 1]
            start += length
    return Batch(batch.input_ids, labels, batch.position_ids, batch.document_ids, batch.rows)


def loss_and_gradients(model: Any, batches: list[Batch]) -> tuple[Tensor, dict[str, Tensor]]:
    stage = Stage(model)
    losses = [token_loss(stage(b), b.labels, stage.head, stage.head_parameters()) for b in batches]
    total = torch.stack(losses).sum()
    total.backward()
    found = {n: p.grad.clone() for n, p in adapter_parameters(model).items() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return total.detach(), found


@on_families
def test_packed_is_alone(tiny_model: Any, random_batch: Any, row: str, family: str) -> None:
    """Logits, loss and every gradient of packed rows are those of the documents one by one."""
    lengths = [[9, 6, 12], [7, 16]]
    packed = prompts_then_answers(lengths, random_batch)
    model = tiny_model(family, torch.float64)
    packed = fitting(model, packed)
    attach(model, options(row), seed=1)
    fill(model)
    together = run(model, packed).detach()
    alone = []
    for i, parts in enumerate(lengths):
        start = 0
        for length in parts:
            cut = {n: getattr(packed, n)[i : i + 1, ..., start : start + length] for n in _TENSORS}
            alone.append(Batch(**cut, rows=(i,)))
            one = run(model, alone[-1]).detach()
            assert error(together[i : i + 1, start : start + length], one) < 1e-10
            start += length
    loss, gradients = loss_and_gradients(model, [packed])
    wanted_loss, wanted = loss_and_gradients(model, alone)
    assert abs(loss - wanted_loss) < 1e-10 * abs(wanted_loss)
    assert gradients.keys() == wanted.keys()
    idle = {
        f"{layer}.adapter.{name}"
        for layer, adapter in adapters_of(model).items()
        for name in adapter.may_idle
    }
    # what virtual tokens get back from all documents goes through the model's float32 norms once, or once each
    bound = 1e-6 if METHODS[row].on == "model" else 1e-9
    for name in gradients.keys() - idle:
        assert wanted[name].any() and error(gradients[name], wanted[name]) < bound, name


@on_families
def test_generation_with_cache_is_that_without(
    tiny_model: Any, row: str, family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Greedy answers of a batch padded on the left: with a cache, without, and each prompt alone."""
    # Qwen v1 beyond its seq_length counts places in the padded row, as the original
    model = tiny_model(family, torch.float64, **({"seq_length": 64} if family == "qwen" else {}))
    attach(model, options(row), seed=1)
    fill(model)
    prompts = [[5, 9, 14, 30, 8, 77, 21, 40], [60, 7, 33], [12, 80, 81, 82, 90]]
    # of random weights residuals this large make nothing but the last token, again and again
    monkeypatch.setattr("luthier.models.zoo.chatglm.ALPHA", 0.3)
    if family in TWO_AXES:  # [gMASK] and the token that opens the answer
        prompts = [[*prompt, VOCAB - 4, VOCAB - 2] for prompt in prompts]
    width = max(map(len, prompts))
    ids = torch.tensor([[0] * (width - len(p)) + p for p in prompts])
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts])
    options_ = {"max_new_tokens": 9, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    with torch.no_grad():
        cached = model.generate(ids, attention_mask=mask, use_cache=True, **options_)
        plain = model.generate(ids, attention_mask=mask, use_cache=False, **options_)
        assert torch.equal(cached, plain)
        for i, prompt in enumerate(prompts):
            one = torch.tensor([prompt])
            alone = model.generate(one, attention_mask=torch.ones_like(one), **options_)
            assert torch.equal(alone[0, len(prompt) :], cached[i, width:])
    assert len({tuple(answer) for answer in cached[:, width:].tolist()}) > 1


@each_method
def test_whole_runs(
    model_folder: Callable[[str], Path], tmp_path: Path, capsys: Any, row: str
) -> None:
    """Trained, taken up again bit for bit, measured, used, and merged or refused."""
    data, base = write_data(tmp_path / "data"), model_folder("llama")
    adapter = {
        f"adapter__{key}": list(value) if isinstance(value, tuple) else value
        for key, value in METHODS[row].options.items()
    }
    keys: dict[str, Any] = {"adapter__rank": None, **adapter, "checkpoint__every": 2}
    keys |= {"checkpoint__best": "none", "optim__lr": 1e-2, "optim__schedule": "constant"}

    def config(name: str, **more: Any) -> dict[str, Any]:
        return tiny_config(base, data, tmp_path / name, **{**keys, **more})

    facts = finetune(config("whole", train__steps=4))
    finetune(config("parts", train__steps=2))
    finetune(config("parts", train__steps=4, checkpoint__resume="auto"))
    whole, parts = (
        load_file(tmp_path / n / "adapter_model.safetensors") for n in ("whole", "parts")
    )
    assert whole.keys() == parts.keys()
    assert all(torch.equal(whole[name], parts[name]) for name in whole)
    losses = [
        json.loads(line)["loss"]
        for line in (tmp_path / "whole" / "metrics.jsonl").read_text().splitlines()
        if json.loads(line)["kind"] == "train"
    ]
    assert losses[-1] != losses[0]
    assert evaluate(config("whole"))["loss"] == pytest.approx(facts["after"]["loss"], rel=1e-5)
    assert len(predict(config("whole", evaluate__max_new_tokens=3))) == 6
    again = config("again", train__steps=1, adapter__path=str(tmp_path / "whole"))
    finetune(again)
    if METHODS[row].folds:
        checked = merge(str(base), str(tmp_path / "whole"), str(tmp_path / "merged"))
        assert checked["fold_error"] < 1e-5 and checked["kl"] < 1e-6
    else:
        with pytest.raises(Refused, match=r"no change of a weight.*use the base together"):
            merge(str(base), str(tmp_path / "whole"), str(tmp_path / "merged"))
