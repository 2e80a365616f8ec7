"""Every family, against plain transformers: packing, padding, gradients, generation, files, recomputation.

One row a family (`tests/tiny_families.py`), one test a promise; the columns of the support table are the
names of these tests. Adapters are in test_conformance_adapters.py, whole runs in test_conformance_runs.py.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from family_checks import (
    DOCUMENTS,
    GRADIENTS,
    LOGITS,
    assert_same,
    error,
    gradients,
    plain_loss,
    plain_model,
    shuffled,
    stage_loss,
)
from tiny_families import FAMILIES
from transformers import AutoModelForCausalLM

from luthier.batch import Layout
from luthier.config import ModelConfig
from luthier.models.generate import GenerateOptions, generate
from luthier.models.load import build_model, save_model
from luthier.models.stage import Stage, check_stage, set_recompute

each_family = pytest.mark.parametrize("family", FAMILIES)
PROMPTS = [[7, 9, 4, 11, 30, 31, 8], [5], [200, 3, 17, 99]]


@each_family
def test_packed(family: str, tiny_model: Any, random_batch: Any) -> None:
    """Logits and all gradients of packed rows are those of each document alone in plain transformers."""
    ours, plain = tiny_model(family), plain_model(family)
    stage, batch = Stage(ours), random_batch(lengths_per_row=DOCUMENTS)
    check_stage(stage)
    with torch.no_grad():
        hidden = stage(batch)
        for s in Layout.of(batch).segments:
            ids = batch.input_ids[s.row : s.row + 1, s.start : s.stop]
            reference = plain(input_ids=ids, use_cache=False).logits[0]
            assert error(stage.head(hidden[s.row, s.start : s.stop]), reference) < LOGITS
    mine = gradients(ours, stage_loss(stage, batch))
    assert mine.keys() == {name for name, _ in ours.named_parameters()}
    assert_same(mine, gradients(plain, plain_loss(plain, batch)), GRADIENTS)


@each_family
def test_padded(family: str, tiny_model: Any, random_batch: Any) -> None:
    """Documents in padded rows of their own give the gradients of the packed rows."""
    model, batch = tiny_model(family), random_batch(lengths_per_row=DOCUMENTS)
    stage = Stage(model)
    packed = gradients(model, stage_loss(stage, batch))
    assert_same(gradients(model, stage_loss(stage, shuffled(batch, 17))), packed, GRADIENTS)


@each_family
def test_generation(family: str, tiny_model: Any) -> None:
    """Greedy answers with a cache and left padding are those of plain transformers, token by token anew."""
    model, plain = tiny_model(family), plain_model(family)
    options = GenerateOptions(max_new_tokens=9)
    answers = generate(model, PROMPTS, options, pad_id=0, stop_ids=(), micro_batch=2)
    for prompt, answer in zip(PROMPTS, answers, strict=True):
        ids = list(prompt)
        with torch.no_grad():
            for _ in range(9):
                logits = plain(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1]
                ids.append(int(logits.argmax()))
        assert ids[len(prompt) :] == answer


@each_family
def test_saved(family: str, tiny_model: Any, tmp_path: Path) -> None:
    """What is saved loads in plain transformers and here, with the same logits; tied heads are tied."""
    model, ids = tiny_model(family), torch.tensor([PROMPTS[0]])
    save_model(model, tmp_path)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="eager").eval()
    ours = build_model(ModelConfig(path=str(tmp_path), dtype="float32", device="cpu"), seed=0)
    names = {n for n, _ in model.named_parameters()}
    for other in (plain, ours):
        assert {n for n, _ in other.named_parameters()} == names
        state = other.state_dict()
        assert all(torch.equal(state[n], t) for n, t in model.state_dict().items())
    tied = model.config.tie_word_embeddings
    for each in (model, plain, ours):
        head, embedding = each.get_output_embeddings(), each.get_input_embeddings()
        assert (head.weight is embedding.weight) == tied
    with torch.no_grad():
        wanted = model(input_ids=ids, use_cache=False).logits
        assert torch.equal(ours(input_ids=ids, use_cache=False).logits, wanted)


@each_family
def test_recomputed(family: str, tiny_model: Any, random_batch: Any) -> None:
    """Recomputing layers changes no gradient, bit for bit."""
    model, batch = tiny_model(family), random_batch(lengths_per_row=DOCUMENTS)
    stage = Stage(model.train())
    wanted = gradients(model, stage_loss(stage, batch))
    for mode in ("layer", "selective"):
        set_recompute(stage, mode)
        found = gradients(model, stage_loss(stage, batch))
        assert found.keys() == wanted.keys()
        assert all(torch.equal(found[n], wanted[n]) for n in wanted)
