"""Faults that a named check must catch on the public path: a whole run, a verify command, a merge.

Each fault is put into the product's code or its input; the message proves which check spoke, and that it is
wired. Nothing may have been trained or published by then.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import CHAT_TEMPLATE, tiny_model_, tiny_tokenizer_
from safetensors.torch import load_file, save_file
from tiny_runs import copy_model, resolved, tiny_config, write_data

import luthier.adapters.placing
import luthier.assemble
import luthier.data.encode
import luthier.data.loader
import luthier.models.kernels
import luthier.recipes
from luthier.adapters.base import LowRank
from luthier.adapters.lora import LoRA
from luthier.batch import IGNORE, PADDING, Batch
from luthier.data.encode import Example, Renderer
from luthier.errors import Failed, LuthierError, Refused
from luthier.exchange import merge
from luthier.models.families import Family
from luthier.models.load import save_model
from luthier.models.stage import Stage
from luthier.recipes import finetune
from luthier.train.step import Updater, _Passes
from luthier.verify import CHECKS


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return write_data(tmp_path / "data")


@pytest.fixture
def run(tmp_path: Path, data: Path, model_folder: Any) -> Callable[..., dict[str, Any]]:
    """`run(**keys)`: the config of a LoRA run of llama, `keys` as in `tiny_config`."""

    def make(model: Path | None = None, **keys: Any) -> dict[str, Any]:
        return tiny_config(model or model_folder("llama"), data, tmp_path / "out", **keys)

    return make


def caught(config: dict[str, Any], kind: type[LuthierError], message: str) -> None:
    """The run stops with this message, and has trained and saved nothing."""
    with pytest.raises(kind, match=message):
        finetune(config)
    output = Path(config["output"])
    assert not list(output.glob("checkpoints/step-*")) and not list(output.glob("*.safetensors"))
    if kind is Refused:
        assert not output.exists()


def test_a_sound_run_passes(run: Any) -> None:
    """What all faults below start from."""
    config = run()
    finetune(config)
    assert (Path(config["output"]) / "adapter_model.safetensors").is_file()
    for check in (CHECKS[name] for name in ("data", "packing", "loss")):
        check(resolved(config))


# ---- labels and what is trained


def spoilt_examples(monkeypatch: pytest.MonkeyPatch, spoil: Callable[[Example], Any]) -> None:
    """The renderer's labels are replaced by `spoil(example)`."""
    right = Renderer._example

    def wrong(self: Renderer, *args: Any) -> Example:
        example = right(self, *args)
        return replace(example, labels=spoil(example))

    monkeypatch.setattr(Renderer, "_example", wrong)


def moved(example: Example, by: int) -> Any:
    """Label i is token i + 1 + `by` instead of token i + 1, at the same trained places."""
    ids = example.input_ids.astype(np.int64)
    return np.where(example.labels == IGNORE, IGNORE, np.roll(ids, -1 - by))


@pytest.mark.parametrize("by", [1, -1], ids=["shifted once too often", "not shifted"])
def test_labels_of_the_renderer(by: int, run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    spoilt_examples(monkeypatch, lambda example: moved(example, by))
    caught(run(), Failed, "^checking the labels. .* are not the next token of their document")
    with pytest.raises(Failed, match="checking the labels"):
        CHECKS["data"](resolved(run()))


def spoilt_batches(monkeypatch: pytest.MonkeyPatch, spoil: Callable[[Batch], Batch]) -> None:
    """The loader's batches are replaced by `spoil(batch)`, behind all checks of the loader itself."""
    right = luthier.data.loader.collate
    monkeypatch.setattr(
        luthier.data.loader, "collate", lambda *args, **kwargs: spoil(right(*args, **kwargs))
    )


def shifted_again(batch: Batch) -> Batch:
    return replace(batch, labels=batch.labels.roll(-1, 1))


def not_shifted(batch: Batch) -> Batch:
    labels = torch.where(batch.labels == IGNORE, IGNORE, batch.input_ids)
    return replace(batch, labels=labels)


def running_on(batch: Batch) -> Batch:
    positions = torch.arange(batch.input_ids.shape[1]).expand_as(batch.input_ids)
    return replace(batch, position_ids=positions)


def padding_too(batch: Batch) -> Batch:
    labels = torch.where(batch.document_ids == PADDING, batch.input_ids, batch.labels)
    return replace(batch, labels=labels)


def merged_documents(batch: Batch) -> Batch:
    """Two documents count as one; their positions still restart."""
    documents = torch.where(batch.document_ids > 0, batch.document_ids - 1, batch.document_ids)
    return replace(batch, document_ids=documents)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (shifted_again, "The labels look shifted once too often"),
        (not_shifted, "The labels look not shifted"),
        (running_on, "positions do not run 0, 1, ... in each document"),
        (padding_too, "padding is supervised"),
        (merged_documents, "positions do not run 0, 1, ... in each document"),
    ],
)
def test_batches(spoil: Any, message: str, run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    spoilt_batches(monkeypatch, spoil)
    caught(run(), Failed, f"^checking the batch. .*{message}")
    with pytest.raises(Failed, match="checking the batch"):
        CHECKS["packing"](resolved(run()))


def test_eos_untrained(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    spoilt_examples(monkeypatch, lambda e: np.where(e.labels == 2, IGNORE, e.labels))
    message = "no answer ends in a trained end token .*train.json:1"
    caught(run(), Refused, message)
    with pytest.raises(Refused, match=message):
        CHECKS["data"](resolved(run()))


def test_prompt_trained(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def everything(example: Example) -> Any:
        return np.append(example.input_ids[1:], IGNORE).astype(np.int64)

    spoilt_examples(monkeypatch, everything)
    caught(run(), Failed, "^checking which tokens are trained. trained spans begin at tokens .0.")
    with pytest.raises(Failed, match="checking which tokens are trained"):
        CHECKS["data"](resolved(run()))


def test_prompt_trained_in_one_late_row(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run looks at its first rows; `verify data` looks at all and names the line."""

    def one(example: Example) -> Any:
        late = "number 20" in tiny_tokenizer_().decode(example.input_ids)
        return np.append(example.input_ids[1:], IGNORE).astype(np.int64) if late else example.labels

    spoilt_examples(monkeypatch, one)
    with pytest.raises(Failed, match=r"train.json:21: checking which tokens are trained"):
        CHECKS["data"](resolved(run()))


@pytest.mark.parametrize(
    ("skipped", "message"),
    [
        ("message['role'] == 'system'", "it drops the system message 'be brief, reader 0'"),
        (
            "loop.index0 == 2 and message['role'] == 'user'",
            "it drops the user message 'and what else, 1\\?'",
        ),
    ],
)
def test_templates_that_lose_a_message(
    skipped: str, message: str, run: Any, tmp_path: Path
) -> None:
    template = tmp_path / "template.jinja"
    begin, rest = CHAT_TEMPLATE.split(" %}", 1)
    body, end = rest.split("{% endfor %}")
    template.write_text(
        f"{begin} %}}{{% if not ({skipped}) %}}{body}{{% endif %}}{{% endfor %}}{end}"
    )
    caught(run(data__template=str(template)), Refused, message)
    with pytest.raises(Refused, match=message):
        CHECKS["data"](resolved(run(data__template=str(template))))


def test_an_example_that_the_loader_loses(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    right = luthier.data.loader.pack
    monkeypatch.setattr(luthier.data.loader, "pack", lambda *args: right(*args)[:-1])
    with pytest.raises(Failed, match="counting the first pass against the ledger"):
        CHECKS["packing"](resolved(run()))


# ---- documents that see each other, and wrong formulas


def whole_rows(q: Any, k: Any, v: Any, layout: Any, scores: Any) -> torch.Tensor:
    """Causal attention over the whole row, whatever its documents."""
    out = torch.nn.functional.scaled_dot_product_attention(
        q, k, v, is_causal=True, scale=scores.scale, enable_gqa=True
    )
    return out.transpose(1, 2)


def across_rows(q: Any, k: Any, v: Any, layout: Any, scores: Any) -> torch.Tensor:
    """Right within a row, but every row also feels the values of the row before it."""
    right = luthier.models.kernels.math(q, k, v, layout, scores)
    return right + 1e-3 * right.roll(1, 0) if q.shape[0] > 1 else right


def other_scale(q: Any, k: Any, v: Any, layout: Any, scores: Any) -> torch.Tensor:
    scores = replace(scores, scale=1.01 * scores.scale)
    return luthier.models.kernels.math(q, k, v, layout, scores)


@pytest.mark.parametrize(
    ("kernel", "kind", "message"),
    [
        (whole_rows, Refused, "its hidden states in a packed row differ from its plain forward's"),
        (other_scale, Refused, "its hidden states in a packed row differ from its plain forward's"),
        (
            across_rows,
            Failed,
            "^checking that documents of a row do not see each other. with attention kernel 'sdpa'",
        ),
    ],
)
def test_leaks(
    kernel: Any, kind: type[LuthierError], message: str, run: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(luthier.models.kernels.KERNELS, "sdpa", kernel)
    caught(run(), kind, message)
    with pytest.raises(kind, match=message):
        CHECKS["packing"](resolved(run()))


def test_a_softcap_that_is_forgotten(
    run: Any, model_folder: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("luthier.models.stage.family_of", lambda name: Family())
    caught(run(model_folder("gemma2")), Refused, "its logits differ from its plain forward's")


def test_the_mean_of_the_micro_batches_means(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    right = _Passes.loss

    def wrong(self: _Passes, hidden: torch.Tensor, batch: Batch) -> torch.Tensor:
        mean = right(self, hidden, batch) * self.report.num_supervised / batch.num_supervised / 4
        self.losses[-1] = mean.detach()
        return mean

    monkeypatch.setattr(_Passes, "loss", wrong)
    with pytest.raises(Failed, match="comparing loss and gradients: 4 micro-batches of 1 row"):
        CHECKS["loss"](resolved(run()))


def test_a_head_that_loses_a_token(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    right = Stage.head
    monkeypatch.setattr(Stage, "head", lambda self, hidden: right(self, hidden) * 1.001)
    monkeypatch.setattr(luthier.assemble, "check_stage", lambda stage: None)
    with pytest.raises(Failed, match="comparing loss and gradients: plain transformers"):
        CHECKS["loss"](resolved(run()))


# ---- what is trained and what is frozen


def after_install(monkeypatch: pytest.MonkeyPatch, spoil: Callable[[Any], None]) -> None:
    right = luthier.adapters.placing.install

    def wrong(model: Any, *parts: Any) -> None:
        right(model, *parts)
        spoil(model)

    monkeypatch.setattr(luthier.adapters.placing, "install", wrong)


def test_one_frozen_layer_trained(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    after_install(
        monkeypatch, lambda model: model.model.layers[1].mlp.up_proj.weight.requires_grad_(True)
    )
    message = "checking the gradients of step 1. trained but to be frozen: model.layers.1.mlp.up_proj.weight"
    caught(run(), Failed, message)


def test_one_adapter_frozen(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    after_install(
        monkeypatch,
        lambda model: model.model.layers[0].mlp.up_proj.adapter.requires_grad_(False),
    )
    caught(run(), Failed, "frozen but to be trained: model.layers.0.mlp.up_proj.adapter.lora_A")


def test_one_layer_frozen_in_full_fine_tuning(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    right = luthier.assemble.build_model

    def wrong(*args: Any, **kwargs: Any) -> Any:
        model = right(*args, **kwargs)
        weight = model.model.layers[1].self_attn.k_proj.weight
        plain = model.requires_grad_
        model.requires_grad_ = lambda on=True: plain(on) and weight.requires_grad_(False)
        return model

    monkeypatch.setattr(luthier.assemble, "build_model", wrong)
    config = run(adapter__method=None, adapter__rank=None)
    caught(config, Failed, "frozen but to be trained: model.layers.1.self_attn.k_proj.weight")


def test_an_adapter_that_does_not_act(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    name = "model.layers.0.self_attn.q_proj"
    right = LoRA.low_rank

    def wrong(self: LoRA) -> LowRank | None:
        factors = right(self)
        assert factors is not None
        return factors if self.name != name else factors._replace(up=0 * factors.up)

    monkeypatch.setattr(LoRA, "low_rank", wrong)
    caught(
        run(), Failed, "trained but its gradient is zero: model.layers.0.self_attn.q_proj.adapter"
    )


# ---- model folders


def truncated(folder: Path) -> None:
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])


def with_nan(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][0, 0] = float("nan")
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (truncated, "model.safetensors"),
        (with_nan, "NaN or infinite values: 1 tensors: model.layers.1.mlp.up_proj.weight"),
    ],
)
def test_broken_weights(
    spoil: Any, message: str, run: Any, model_folder: Any, tmp_path: Path
) -> None:
    folder = copy_model(model_folder("llama"), tmp_path / "spoilt")
    spoil(folder)
    caught(run(folder), Refused, message)


def test_a_tokenizer_of_another_model(run: Any, tmp_path: Path) -> None:
    folder = tmp_path / "small"
    save_model(tiny_model_("llama", vocab_size=200), folder, tiny_tokenizer_())
    caught(
        run(folder),
        Refused,
        "the tokenizer and the model do not fit. .* exceed the embedding's 200 rows",
    )


def test_nan_that_arises_in_training(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    right = luthier.recipes.make_updater

    def wrong(config: Any, built: Any) -> Updater:
        updater = right(config, built)
        with torch.no_grad():
            built.model.model.layers[1].mlp.down_proj.weight[0, 0] = float("nan")
        return updater

    monkeypatch.setattr(luthier.recipes, "make_updater", wrong)
    message = "step 1 over rows 0, .* is the weight model.layers.1.mlp.down_proj.weight"
    caught(run(evaluate__every="never"), Failed, message)


# ---- merging and resuming


@pytest.mark.parametrize("factor", [2.0, 1.01, -1.0])
def test_a_merge_with_another_scale(
    factor: float, run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = run(optim__lr=1e-3)  # a small update: the error is smaller still
    finetune(config)
    right = LoRA.fold
    monkeypatch.setattr(
        LoRA, "fold", lambda self, weight: weight + factor * (right(self, weight) - weight)
    )
    with pytest.raises(Failed, match=r"the folded weights' logits differ .* nothing was published"):
        merge(config["model"]["path"], config["output"], str(tmp_path / "merged"))
    assert not (tmp_path / "merged").exists()
    monkeypatch.setattr(LoRA, "fold", right)
    merge(config["model"]["path"], config["output"], str(tmp_path / "merged"))


@pytest.mark.parametrize("name", ["training_state-00000.safetensors", "adapter_model.safetensors"])
def test_an_altered_checkpoint(name: str, run: Any, tmp_path: Path) -> None:
    config = run(checkpoint__every=1)
    finetune(config)
    newest = tmp_path / "out" / "checkpoints" / "step-3"
    content = bytearray((newest / name).read_bytes())
    content[-1] ^= 1
    (newest / name).write_bytes(content)
    message = f"the checkpoint is not whole: {name} was altered .its SHA-256 differs."
    again = json.loads(json.dumps(config))
    again["train"]["steps"] = 4
    with pytest.raises(Refused, match=message):
        finetune(again | {"checkpoint": {"resume": str(newest)}})
    finetune(again | {"checkpoint": {"resume": "auto"}})
    lines = (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()
    told = [record["text"] for record in map(json.loads, lines) if "text" in record]
    assert any(f"step-3 is not whole ({name} was altered" in text for text in told)
    assert any(text.endswith("step-2") and "going on from" in text for text in told)
