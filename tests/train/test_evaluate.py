"""Evaluation: loss as plain transformers has it, packed or not; generated answers in order; modes kept."""

from __future__ import annotations

import json
import math
import weakref
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from luthier.batch import IGNORE, PADDING, Batch
from luthier.data.encode import Renderer
from luthier.data.formats import BadRow, Message
from luthier.errors import Failed, Refused
from luthier.models.generate import GenerateOptions
from luthier.models.stage import Stage
from luthier.train import evaluate
from luthier.train.evaluate import (
    evaluate_generation,
    evaluate_loss,
    evaluating,
    perplexity,
    write_generated,
)

LENGTHS = [[7, 4, 9], [12, 3], [5]]


def alone(batch: Batch) -> list[Batch]:
    """Each document of a packed batch in a batch of its own."""
    out = []
    for row in range(len(batch.input_ids)):
        documents = batch.document_ids[row]
        for number in documents.unique().tolist():
            if number != PADDING:
                at = documents == number
                parts = (batch.input_ids, batch.labels, batch.position_ids, batch.document_ids)
                ids, labels, positions, _ = (part[row, at][None] for part in parts)
                out.append(Batch(ids, labels, positions, torch.zeros_like(ids), (0,)))
    return out


@pytest.mark.parametrize("family", ["llama", "gemma2"])  # gemma2 has a softcap behind its head
def test_loss_is_that_of_plain_transformers(family, tiny_model, random_batch) -> None:
    batch = random_batch(lengths_per_row=LENGTHS)
    plain = tiny_model(family, attention="eager")
    logits, labels = [], []
    with torch.no_grad():
        for part in alone(batch):
            logits.append(plain(part.input_ids, use_cache=False).logits[0])  # [n, V]
            labels.append(part.labels[0])
    logits, labels = torch.cat(logits), torch.cat(labels)
    known = labels != IGNORE
    loss = F.cross_entropy(logits, labels, ignore_index=IGNORE).item()
    found = evaluate_loss(Stage(tiny_model(family)), [batch], "cpu")
    assert found["loss"] == pytest.approx(loss, rel=1e-6)
    assert found["perplexity"] == pytest.approx(math.exp(loss), rel=1e-5)
    assert found["tokens"] == int(known.sum())
    right = (logits.argmax(-1) == labels)[known].float().mean().item()
    assert found["accuracy"] == pytest.approx(right)


def test_mean_over_tokens_whatever_the_batches(tiny_model, random_batch) -> None:
    """Rows and batches differ in supervised tokens, so a mean of means would differ."""
    stage = Stage(tiny_model("llama"))
    batch = random_batch(lengths_per_row=LENGTHS)
    counts = [part.num_supervised for part in alone(batch)]
    assert len(set(counts)) > 2
    told = []
    whole = evaluate_loss(stage, [batch], "cpu")
    parts = evaluate_loss(stage, iter(alone(batch)), "cpu", told.append)
    assert parts["loss"] == pytest.approx(whole["loss"], rel=1e-6)
    assert (parts["accuracy"], parts["tokens"]) == (whole["accuracy"], whole["tokens"])
    assert told == [1] * len(counts)


def test_batches_are_not_held(tiny_model, random_batch) -> None:
    """Of a corpus that does not fit in memory, one batch is there at a time."""
    made: list[weakref.ref[Batch]] = []

    def batches() -> Iterator[Batch]:
        for _ in range(4):
            assert sum(ref() is not None for ref in made) <= 1
            batch = random_batch(lengths_per_row=LENGTHS)
            made.append(weakref.ref(batch))
            yield batch

    assert evaluate_loss(Stage(tiny_model("llama")), batches(), "cpu")["tokens"] and len(made) == 4


def test_only_supervised_positions_reach_the_head(tiny_model, random_batch, monkeypatch) -> None:
    stage, rows = Stage(tiny_model("llama")), []
    head = stage.head
    monkeypatch.setattr(stage, "head", lambda hidden: rows.append(len(hidden)) or head(hidden))
    found = evaluate_loss(stage, [random_batch(lengths_per_row=LENGTHS)], "cpu")
    assert sum(rows) == found["tokens"]


def test_modes_return_after_use_and_after_an_error(tiny_model) -> None:
    stage = Stage(tiny_model("gpt2", dropout=0.5)).train()
    stage.model.base_model.eval()  # mixed modes, as with a frozen part
    stage.model.get_input_embeddings().train()
    modes = {name: module.training for name, module in stage.named_modules()}
    with pytest.raises(KeyError), evaluating(stage):
        assert not any(module.training for module in stage.modules())
        assert not torch.is_grad_enabled()
        raise KeyError
    assert {name: module.training for name, module in stage.named_modules()} == modes
    assert torch.is_grad_enabled()


def test_dropout_is_off(tiny_model, random_batch) -> None:
    stage = Stage(tiny_model("gpt2", dropout=0.5)).train()
    batch = random_batch()
    assert evaluate_loss(stage, [batch], "cpu") == evaluate_loss(stage.eval(), [batch], "cpu")


def test_perplexity_does_not_overflow() -> None:
    assert perplexity(2.0) == math.exp(2)
    assert perplexity(1e6) == perplexity(1e9) == pytest.approx(1.01e304, rel=0.01)


def test_nothing_supervised(tiny_model, random_batch) -> None:
    batch = random_batch(supervised_share=0.0)
    for batches in ([batch], []):
        with pytest.raises(Failed, match="no supervised token"):
            evaluate_loss(Stage(tiny_model("llama")), batches, "cpu")


def test_not_a_number(tiny_model, random_batch) -> None:
    model = tiny_model("llama")
    with torch.no_grad():
        model.model.norm.weight[0] = float("nan")
    with pytest.raises(Failed, match="the loss is nan"):
        evaluate_loss(Stage(model), [random_batch()], "cpu")


# ---- generation


def turns(*texts: str) -> list[Message]:
    roles = ("user", "assistant")
    return [Message(roles[i % 2], text, bool(i % 2)) for i, text in enumerate(texts)]


ROWS = [
    turns("what is the song", "a"),
    turns("hi"),  # not answered
    [Message("text", "a document", True)],
    [Message("system", "be kind", False), *turns("one", "eins", "and two", "zwei drei vier fünf")],
    turns("天气?", "今天天气很好"),
]
ANSWERED = [ROWS[0], ROWS[3], ROWS[4]]


@pytest.fixture
def renderer(tiny_tokenizer) -> Renderer:
    return Renderer(tiny_tokenizer(), length=64)


def ask(model: Any, renderer: Renderer, rows: Any = ROWS, **options: Any):
    chosen = GenerateOptions(**{"max_new_tokens": 5, **options})
    return evaluate_generation(model, renderer, rows, chosen, pad_id=0, micro_batch=2)


def test_answers_are_of_the_autocast_type(tiny_model, renderer) -> None:
    model, seen = tiny_model("llama"), set()
    model.lm_head.register_forward_hook(lambda module, args, out: seen.add(out.dtype))
    evaluate_generation(
        model,
        renderer,
        ROWS,
        GenerateOptions(max_new_tokens=2),
        pad_id=0,
        micro_batch=2,
        autocast=torch.bfloat16,
    )
    assert seen == {torch.bfloat16}


def test_answers_are_the_models_own(tiny_model, renderer) -> None:
    """One prompt at a time through plain transformers gives the same answers in the same order."""
    scores, records = ask(tiny_model("llama").train(), renderer)
    plain = tiny_model("llama", attention="eager")
    for messages, record in zip(ANSWERED, records, strict=True):
        prompt = torch.tensor([renderer.prompt(messages)])
        ids = plain.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=5,
            do_sample=False,
            eos_token_id=list(renderer.stop_ids),
            pad_token_id=0,
        )
        wanted = renderer.decode(ids[0, prompt.shape[1] :].tolist())
        assert record == {
            "prompt": messages[-2].text,
            "output": wanted,
            "tgt": messages[-1].text,
        }
    assert scores["answers"] == 3
    assert set(scores) == {"bleu4", "rouge1", "rouge2", "rougel", "answers"}


def test_the_prompt_ends_before_the_reference(tiny_model, renderer, monkeypatch) -> None:
    """A model that says the references scores 1; it is asked with the earlier turns, without the answer."""
    model = tiny_model("llama")

    def answer(model: Any, prompts: list[list[int]], options: Any, **others: Any):
        assert not model.training
        assert others["stop_ids"] == renderer.stop_ids
        text = [renderer.tokens.tokenizer.decode(prompt) for prompt in prompts]
        assert "<|user|>one<|assistant|>eins</s>" in text[1]
        assert text[1].endswith("<|user|>and two<|assistant|>")
        return [renderer.tokens(messages[-1].text) for messages in ANSWERED]

    monkeypatch.setattr(evaluate, "generate", answer)
    scores, _ = ask(model.train(), renderer)
    assert scores == {
        **dict.fromkeys(("bleu4", "rouge1", "rougel"), 1.0),
        "rouge2": pytest.approx(2 / 3),  # an answer of one word has no pair of words
        "answers": 3,
    }
    assert model.training


def test_rows_without_a_prompt_are_left_out(tiny_model, tiny_tokenizer) -> None:
    short = Renderer(tiny_tokenizer(), length=8)
    rows = [[Message("system", "x" * 50, False), *turns("a", "b")], turns("c", "d")]
    with pytest.raises(BadRow, match="chat template alone"):
        short.prompt(rows[0])
    scores, records = ask(tiny_model("llama"), short, rows)
    assert [record["prompt"] for record in records] == ["c"] and scores["answers"] == 1


def test_no_row_to_answer(tiny_model, renderer) -> None:
    with pytest.raises(Refused, match="no evaluation row has a prompt and an answer"):
        ask(tiny_model("llama"), renderer, ROWS[1:3])


def test_generated_output(tmp_path) -> None:
    records = [{"prompt": "p", "output": "很好\n\u2028", "tgt": 'a"b'}] * 2
    path = write_generated(tmp_path, records)
    assert path == tmp_path / "generated_output.json"
    lines = path.read_text("utf-8").split("\n")
    assert lines[0] == lines[1] == '{"output": "很好\\n\u2028", "tgt": "a\\"b"}' and lines[2:] == [
        ""
    ]
    write_generated(tmp_path, records[:1])  # rewritten at each evaluation
    assert json.loads(path.read_text("utf-8")) == {"output": "很好\n\u2028", "tgt": 'a"b'}
    assert list(tmp_path.iterdir()) == [path]
