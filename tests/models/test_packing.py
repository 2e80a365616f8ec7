"""Packed rows mean what their documents mean alone, for every family: hidden states, logits, loss, gradients."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch.nn import functional as F

from luthier.batch import IGNORE, PADDING, Layout
from luthier.models.attention import install
from luthier.models.dropout import seed_dropout
from luthier.models.stage import Stage, check_stage, compile_layers, set_recompute

FAMILIES = ("llama", "qwen2", "qwen3", "mistral", "gemma2", "gpt2", "opt")
DOCUMENTS = [[5, 3, 7], [8, 4], [1, 14]]  # rows of 15, so the second one has padding
TOLERANCE = {torch.float32: 1e-6, torch.float64: 1e-10}


def _gradients(model):
    """Name -> gradient; without those that are zero by mathematics, where only rounding is left.

    The softmax does not see a shift of all scores of a query, so OPT's bias of the keys has no gradient.
    """
    zero = "k_proj.bias" if model.config.model_type == "opt" else "nothing"
    found = {n: p.grad for n, p in model.named_parameters() if zero not in n}
    assert all(g is not None for g in found.values())
    return found


def _loss(stage, batch):
    """Summed cross entropy over the supervised positions."""
    hidden = stage(batch)
    keep = batch.labels != IGNORE
    return hidden, F.cross_entropy(stage.head(hidden[keep]), batch.labels[keep], reduction="sum")


def _alone(model, batch):
    """(Segment, hidden states, logits) of each document in a plain call of its own."""
    for s in Layout.of(batch).segments:
        ids = batch.input_ids[s.row : s.row + 1, s.start : s.stop]
        out = model(input_ids=ids, use_cache=False, output_hidden_states=True)
        yield s, out.hidden_states[-1][0], out.logits[0]


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_packed_is_alone(family, dtype, tiny_model, random_batch, relative):
    batch = random_batch(lengths_per_row=DOCUMENTS)
    model, other = tiny_model(family, dtype), tiny_model(family, dtype)
    stage = Stage(model)
    hidden, loss = _loss(stage, batch)
    loss.backward()
    total = torch.zeros((), dtype=dtype)
    for s, alone, logits in _alone(other, batch):
        mine = hidden[s.row, s.start : s.stop]
        assert relative(mine, alone) < TOLERANCE[dtype]
        assert relative(stage.head(mine), logits) < TOLERANCE[dtype]
        labels = batch.labels[s.row, s.start : s.stop]
        total = total + F.cross_entropy(logits, labels, ignore_index=IGNORE, reduction="sum")
    total.backward()
    assert relative(loss, total) < TOLERANCE[dtype]
    reference = _gradients(other)
    for name, gradient in _gradients(model).items():
        assert relative(gradient, reference[name]) < TOLERANCE[dtype], name


@pytest.mark.parametrize("family", FAMILIES)
def test_packed_is_padded_rows_of_plain_transformers(family, tiny_model, random_batch, relative):
    """Against transformers' eager attention, padding mask and own loss."""
    batch = random_batch(lengths_per_row=DOCUMENTS)
    model, plain = tiny_model(family), tiny_model(family, attention="eager")
    hidden, loss = _loss(Stage(model), batch)
    loss.backward()
    segments = Layout.of(batch).segments
    width = max(s.stop - s.start for s in segments)
    ids = torch.zeros(len(segments), width, dtype=torch.long)
    labels, mask = torch.full_like(ids, IGNORE), torch.zeros_like(ids)
    for i, s in enumerate(segments):
        length = s.stop - s.start
        ids[i, :length] = batch.input_ids[s.row, s.start : s.stop]
        # transformers shifts labels itself
        labels[i, 1:length] = batch.labels[s.row, s.start : s.stop - 1]
        mask[i, :length] = 1
    out = plain(input_ids=ids, attention_mask=mask, labels=labels, use_cache=False)
    (out.loss * batch.num_supervised).backward()
    assert relative(loss, out.loss * batch.num_supervised) < 1e-6
    stage = Stage(model)
    for i, s in enumerate(segments):
        logits = stage.head(hidden[s.row, s.start : s.stop])
        assert relative(logits, out.logits[i, : s.stop - s.start]) < 1e-6
    reference = _gradients(plain)
    for name, gradient in _gradients(model).items():
        print(family, name, relative(gradient, reference[name]))
