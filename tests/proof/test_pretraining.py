"""Training from scratch on c4 follows a plain transformers loop, step by step.

GPT-2-, NeoX-, OPT- and Bloom-shaped models. The reference tokenises the texts itself, lays them end to end, cuts
rows (which row comes when is ours) and trains with transformers' forward, torch's cross entropy and AdamW. With
borders kept it runs every document of a row alone, padded. In float32 the losses and gradient norms of a whole
`luthier finetune` agree to 1e-5 over 20 steps; in float64 losses to 1e-8 and weights to 1e-6 over 200 steps
(softmax and loss in float64 on both sides, which the families have in float32).
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import VOCAB, tiny_tokenizer_
from test_equality import KERNEL, computing_in
from tiny_runs import resolved, tiny_config
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import AutoConfig, AutoModelForCausalLM

from luthier.assemble import make_updater, open_data, open_text
from luthier.batch import IGNORE
from luthier.config import RunConfig
from luthier.data.corpus import Corpus
from luthier.models.attention import install
from luthier.models.load import build_model
from luthier.models.stage import Stage
from luthier.parallel.pipeline import OneStage
from luthier.parallel.world import World
from luthier.recipes import finetune
from luthier.train.metrics import read_metrics

DATA = os.environ.get("LUTHIER_DATA")
C4 = Path(str(DATA)) / "c4_demo.jsonl"
pytestmark = pytest.mark.skipif(
    not DATA or not C4.is_file(), reason="LUTHIER_DATA has no c4_demo.jsonl"
)

WIDTH, LAYERS, HEADS = 32, 2, 4
SMALL: dict[str, Any] = {
    "vocab_size": VOCAB,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
DECODER = {"hidden_size": WIDTH, "num_hidden_layers": LAYERS, "num_attention_heads": HEADS}
SHAPES: dict[str, dict[str, Any]] = {
    "gpt2": {
        **{"n_embd": WIDTH, "n_layer": LAYERS, "n_head": HEADS, "n_positions": 128},
        **{"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0},
    },
    "gpt_neox": {**DECODER, "intermediate_size": 64, "max_position_embeddings": 128},
    "opt": {
        **DECODER,
        **{"word_embed_proj_dim": WIDTH, "ffn_dim": 64, "max_position_embeddings": 128},
        **{"dropout": 0.0, "attention_dropout": 0.0},
    },
    "bloom": {"hidden_size": WIDTH, "n_layer": LAYERS, "n_head": HEADS},
}
BATCH, RATE = 4, 1e-3


@pytest.fixture
def folder(tmp_path: Path) -> Any:
    """`folder(family)`: a config and a tokenizer, no weights."""

    def make(family: str) -> Path:
        place = tmp_path / family
        AutoConfig.for_model(family, **SMALL, **SHAPES[family]).save_pretrained(place)
        tiny_tokenizer_().save_pretrained(place)
        return place

    return make


def config_of(model: Path, length: int, **keys: Any) -> dict[str, Any]:
    base = {
        **{"adapter__method": None, "adapter__rank": None, "train__mode": "pretrain"},
        **{"model__init": "random", "data__length": length, "train__batch": BATCH},
        **{"data__cache": str(model.parent / "cache"), "evaluate__every": "never"},
        **{"optim__lr": RATE, "optim__schedule": "constant", "checkpoint__every": "never"},
    }
    return tiny_config(model, C4, model.parent / "out", **{**base, **keys})


@cache
def stream() -> list[int]:
    """All texts end to end, each with its EOS."""
    texts = (json.loads(line)["text"] for line in C4.read_text("utf-8").splitlines())
    tokenizer = tiny_tokenizer_()
    return [i for text in texts for i in [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]]


def plain_rows(corpus: Corpus) -> Iterator[list[list[int]]]:
    """Rows of the stream, in the order of our run."""
    ids, length, n = stream(), corpus.length, 0
    while True:
        at = [corpus.drawn[0].place(n + i)[1] * (length - 1) for i in range(BATCH)]
        yield [ids[start : start + length] for start in at]
        n += BATCH


def documents_of(rows: list[list[int]]) -> list[list[int]]:
    """The rows' documents: a document ends with EOS."""
    found: list[list[int]] = []
    for row in rows:
        begin = 0
        for i, token in enumerate(row):
            if token == 2 or i == len(row) - 1:
                found.append(row[begin : i + 1])
                begin = i + 1
    return found


def plain_loss(model: Any, texts: list[list[int]]) -> Tensor:
    """The mean over all next tokens of texts of any length, which do not see each other."""
    width = max(map(len, texts))
    ids = torch.zeros(len(texts), width, dtype=torch.long)
    mask, labels = torch.zeros_like(ids), torch.full_like(ids, IGNORE)
    for i, text in enumerate(texts):
        ids[i, : len(text)], mask[i, : len(text)] = torch.tensor(text), 1
        labels[i, 1 : len(text)] = torch.tensor(text[1:])
    logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
    return cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())


def plain_run(
    model: Any, rows: Iterator[list[list[int]]], steps: int, borders: str
) -> tuple[list[float], list[float], list[dict[str, Tensor]]]:
    """Losses, gradient norms and the first step's gradients of a plain loop."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=0.0)
    losses, norms, first = [], [], []
    for step in range(steps):
        batch = next(rows)
        loss = plain_loss(model, documents_of(batch) if borders == "keep" else batch)
        optimizer.zero_grad()
        loss.backward()
        norms.append(float(torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)))
        if step == 0:  # clipped, as the trainer's are where they are looked at
            first.append({n: p.grad.clone() for n, p in model.named_parameters()})
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses, norms, first


def twin(model: Any, attention: str) -> Any:
    """A plain transformers model with the same values."""
    made = AutoModelForCausalLM.from_config(model.config, attn_implementation=attention)
    made = made.to(model.dtype)
    made.load_state_dict(model.state_dict())
    return made.train()


def relative(found: float, wanted: float) -> float:
    return abs(found - wanted) / abs(wanted)


@pytest.mark.parametrize("borders", ["keep", "ignore"])
@pytest.mark.parametrize("family", SHAPES)
def test_twenty_steps_in_float32(family: str, borders: str, folder: Any) -> None:
    tree = config_of(folder(family), 128, data__borders=borders, train__steps=20)
    config = resolved(tree).config
    finetune(tree)
    records = [
        r for r in read_metrics(Path(config.output) / "metrics.jsonl") if r["kind"] == "train"
    ]
    text = open_text(config)
    corpus = open_data(config, text).train
    assert isinstance(corpus, Corpus)
    rows = plain_rows(corpus)
    model = twin(build_model(config.model, seed=config.train.seed, train=True), "eager")
    losses, norms, _ = plain_run(model, rows, 20, borders)
    assert len(records) == 20 and losses[-1] < losses[0] - 0.5
    for record, loss, norm in zip(records, losses, norms, strict=True):
        assert relative(record["loss"], loss) < 1e-5, record["step"]
        assert relative(record["grad_norm"], norm) < 1e-4, record["step"]
    again = plain_rows(corpus)
    several = sum(len(documents_of(next(again))) > BATCH for _ in range(20))
    assert several > 1  # rows with a border were among them


@pytest.mark.long
@pytest.mark.parametrize("family", SHAPES)
def test_two_hundred_steps_in_float64(family: str, folder: Any) -> None:
    tree = config_of(folder(family), 48, train__steps=200)
    ours, updater_losses, gradients, corpus, start = our_run(resolved(tree).config, 200)
    with computing_in(torch.float64):
        model = twin(start, "whole_table")
        losses, _, first = plain_run(model, plain_rows(corpus), 200, "keep")
    assert losses[-1] < losses[0] - 1
    for step, (found, wanted) in enumerate(zip(updater_losses, losses, strict=True)):
        assert relative(found, wanted) < 1e-8, step
    scale = max(float(g.abs().max()) for g in first[0].values())
    for name, wanted in first[0].items():
        if float(wanted.abs().max()) > 1e-12 * scale:  # what shifts all scores has none
            distance = (gradients[name] - wanted).norm() / wanted.norm()
            assert float(distance) < 1e-10, name
    found = {name: p.detach() for name, p in ours.named_parameters()}
    for name, p in model.named_parameters():
        wanted = p.detach()
        # opt's bias of keys, without a gradient, stays at the rounding that Adam makes of nothing: 1e-12
        assert float((found[name] - wanted).norm()) < 1e-6 * float(wanted.norm()) + 1e-10, name


def our_run(
    config: RunConfig, steps: int
) -> tuple[Any, list[float], dict[str, Tensor], Corpus, Any]:
    """The trainer's own steps in float64: model, losses, the first step's gradients, corpus, first model."""
    with computing_in(torch.float64):
        built = build_model(config.model, seed=config.train.seed, train=True).double()
        start = build_model(config.model, seed=config.train.seed, train=True).double()
        install(built, KERNEL[torch.float64], train=True)
        built.requires_grad_(True).train()
        data = open_data(config, open_text(config))
        assert isinstance(data.train, Corpus)

        parts: Any = SimpleNamespace(  # what `make_updater` reads of a built model
            model=built,
            stage=Stage(built),
            adapter=None,
            trained=list(built.named_parameters()),
            device=torch.device("cpu"),
            dtype=built.dtype,
            world=World(),
            context=None,
            pipeline=lambda _: OneStage(),
        )
        updater = make_updater(config, parts)
        gate, first = updater.gate, {}

        def noting(*args: Any, gradients: Any, **more: Any) -> Any:
            first.update({n: g.clone() for n, g in gradients.items()})
            return gate(*args, gradients=gradients, **more)

        updater.gate = noting
        losses = []
        batches = data.loader.step_batches()
        for step in range(steps):
            report = updater.update(next(batches), step=step + 1, lr=RATE)
            assert report.loss is not None
            losses.append(report.loss)
        batches.close()
        data.loader.close()
    return built, losses, first, data.train, start
