"""Every family, against plain transformers: packing, padding, gradients, generation, files, recomputation.

One row a family (`tests/tiny_families.py`), one test a promise; the columns of the support table are the
names of these tests. Adapters are in test_conformance_adapters.py, whole runs in test_conformance_runs.py.
"""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from family_checks import (
    ANSWERING,
    GRADIENTS,
    LOGITS,
    asking,
    assert_same,
    documents,
    error,
    every_family,
    gradients,
    plain_logits,
    plain_loss,
    plain_model,
    shuffled,
    stage_loss,
)
from transformers import AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

from luthier.adapters import adapter_parameters, adapters_of, attach, fold_into
from luthier.batch import Layout
from luthier.config import AdapterConfig, ModelConfig
from luthier.models.generate import GenerateOptions, generate
from luthier.models.load import build_model, save_model
from luthier.models.recompute import set_recompute
from luthier.models.stage import Stage, check_stage
from luthier.seeding import generator

PROMPTS = [[7, 9, 4, 11, 30, 31, 8], [5], [200, 3, 17, 99]]


@every_family
def test_packed(family: str, tiny_model: Any, random_batch: Any) -> None:
    """Logits and all gradients of packed rows are those of each document alone in plain transformers."""
    ours, plain = tiny_model(family), plain_model(family)
    stage, batch = Stage(ours), documents(family, random_batch)
    check_stage(stage)
    with torch.no_grad():
        hidden = stage(batch)
        for s in Layout.of(batch).segments:
            ids = batch.input_ids[s.row : s.row + 1, s.start : s.stop]
            reference = plain_logits(plain, ids)
            assert error(stage.head(hidden[s.row, s.start : s.stop]), reference) < LOGITS
    mine = gradients(ours, stage_loss(stage, batch))
    assert mine.keys() == {name for name, _ in ours.named_parameters()}
    assert_same(mine, gradients(plain, plain_loss(plain, batch)), GRADIENTS)


@every_family
def test_lora_gradients(family: str, tiny_model: Any, random_batch: Any) -> None:
    """LoRA's gradients, on every linear layer and expert, follow from plain transformers' of the folded weights."""
    model, batch = tiny_model(family), documents(family, random_batch)
    config = AdapterConfig(method="lora", rank=4, alpha=6)
    attach(model, config, seed=1)
    with torch.no_grad():
        for name, p in adapter_parameters(model).items():
            p.add_(0.1 * torch.randn(p.shape, generator=generator(0, name)))
    mine = gradients(model, stage_loss(Stage(model), batch))
    plain, folded = plain_model(family), deepcopy(model)
    fold_into(folded)
    plain.load_state_dict(folded.state_dict())
    theirs = gradients(plain.requires_grad_(True), plain_loss(plain, batch))
    wanted = {}
    for name, adapter in adapters_of(model).items():
        # d loss / d W as [..., out, in]
        weight = theirs[name if adapter.stacked else f"{name}.weight"]
        owner = plain.get_submodule(name.rpartition(".")[0] if adapter.stacked else name)
        if isinstance(owner, Conv1D) or getattr(owner, "is_transposed", False):
            weight = weight.transpose(-1, -2)
        scale = config.scale_alpha / config.rank
        A, B = adapter.get_parameter("lora_A"), adapter.get_parameter("lora_B")
        wanted[f"{adapter.path}.lora_A"] = scale * B.transpose(-1, -2) @ weight
        wanted[f"{adapter.path}.lora_B"] = scale * weight @ A.transpose(-1, -2)
    assert_same(mine, wanted, GRADIENTS)


@every_family
def test_padded(family: str, tiny_model: Any, random_batch: Any) -> None:
    """Documents in padded rows of their own give the gradients of the packed rows."""
    model, batch = tiny_model(family), documents(family, random_batch)
    stage = Stage(model)
    packed = gradients(model, stage_loss(stage, batch))
    assert_same(gradients(model, stage_loss(stage, shuffled(batch, 17))), packed, GRADIENTS)


@every_family
def test_generation(family: str, tiny_model: Any) -> None:
    """Greedy answers with a cache and left padding are those of plain transformers, token by token anew."""
    keys = ANSWERING.get(family, {})
    model, plain = tiny_model(family, **keys), plain_model(family, **keys)
    prompts, options = asking(family, PROMPTS), GenerateOptions(max_new_tokens=9)
    answers = generate(model, prompts, options, pad_id=0, stop_ids=(), micro_batch=2)
    for prompt, answer in zip(prompts, answers, strict=True):
        ids = list(prompt)
        with torch.no_grad():
            for _ in range(9):
                ids.append(int(plain_logits(plain, torch.tensor([ids]))[-1].argmax()))
        assert ids[len(prompt) :] == answer


@every_family
def test_saved(family: str, tiny_model: Any, tmp_path: Path) -> None:
    """What is saved loads in plain transformers and here, with the same logits; tied heads are tied."""
    model, ids = tiny_model(family), torch.tensor(asking(family, PROMPTS[:1]))
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


@every_family
def test_recomputed(family: str, tiny_model: Any, random_batch: Any) -> None:
    """Recomputing layers changes no gradient, bit for bit."""
    model, batch = tiny_model(family), documents(family, random_batch)
    stage = Stage(model.train())
    wanted = gradients(model, stage_loss(stage, batch))
    for mode in ("layer", "selective"):
        set_recompute(stage, mode)
        found = gradients(model, stage_loss(stage, batch))
        assert found.keys() == wanted.keys()
        assert all(torch.equal(found[n], wanted[n]) for n in wanted)
