"""NEFTune in models: whose tokens get noise, what decides it, and what leaves it alone."""

from __future__ import annotations

import copy
import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from luthier.adapters import add_noise, attach, remove_noise
from luthier.batch import PADDING, Batch, Layout, layout_scope
from luthier.config import AdapterConfig
from luthier.models.recompute import set_recompute
from luthier.models.stage import Stage

LENGTHS = [[5, 3, 7], [8], [1, 4]]
CONFIG = AdapterConfig.model_validate({"neftune_alpha": 5.0})


def noise_of(model: Any, batch: Batch) -> Tensor:
    """What the embedding layer gives more than its weights' rows."""
    embedding = model.get_input_embeddings()
    with layout_scope(Layout.of(batch)), torch.no_grad():
        return embedding(batch.input_ids) - embedding.forward(batch.input_ids)


def noisy(tiny_model: Any, family: str = "llama", seed: int = 1, **options: Any) -> Any:
    model = tiny_model(family).train()
    add_noise(model, CONFIG.model_copy(update=options), seed=seed)
    return model


def rows_of(batch: Batch, *rows: int) -> Batch:
    """Some rows of a batch, cut to what they hold."""
    width = max(int((batch.document_ids[row] != PADDING).sum()) for row in rows)
    names = ("input_ids", "labels", "position_ids", "document_ids")
    cut = (getattr(batch, n)[list(rows), :width] for n in names)
    return Batch(*cut, tuple(batch.rows[row] for row in rows))  # pyright: ignore[reportCallIssue]


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt", "bloom", "gemma2"])
def test_each_document_has_its_own_bound(tiny_model: Any, random_batch: Any, family: str) -> None:
    batch = random_batch(lengths_per_row=LENGTHS)
    noise = noise_of(noisy(tiny_model, family), batch)
    for s in Layout.of(batch).segments:
        drawn = noise[s.row, s.start : s.stop]
        bound = 5 / math.sqrt(drawn.numel())
        # uniform: the largest of n draws lies below the bound by a share of 1/n, and its mean square is a third
        assert bound * 0.9 < float(drawn.abs().max()) < bound * 1.001
        if len(drawn) > 2:
            assert 0.7 < 3 * float(drawn.square().mean()) / bound**2 < 1.3
    assert not noise[batch.document_ids == PADDING].any()


def test_packed_is_as_large_as_alone_and_paddlenlp_is_of_the_batch(
    tiny_model: Any, random_batch: Any
) -> None:
    batch = random_batch(lengths_per_row=[[6, 2]])
    paper = noise_of(noisy(tiny_model), batch)
    theirs = noise_of(noisy(tiny_model, neftune_scaling="paddlenlp"), batch)
    wide = math.sqrt(64)
    for part, length in ((slice(0, 6), 6), (slice(6, 8), 2)):
        ratio = math.sqrt(length) * wide / math.sqrt(8)
        torch.testing.assert_close(theirs[0, part], ratio * paper[0, part], rtol=1e-4, atol=1e-5)


def test_it_depends_on_seed_row_and_place_alone(tiny_model: Any, random_batch: Any) -> None:
    batch = random_batch(lengths_per_row=LENGTHS)
    model = noisy(tiny_model)
    whole = noise_of(model, batch)
    torch.manual_seed(3)
    assert torch.equal(noise_of(model, batch), whole)
    for rows in ((0,), (1, 2), (2,)):
        part = rows_of(batch, *rows)
        assert torch.equal(noise_of(model, part), whole[list(rows), : part.input_ids.shape[1]])
    assert not torch.allclose(noise_of(noisy(tiny_model, seed=2), batch), whole)
    later = noise_of(model, replace(batch, rows=(3, 4, 5)))
    assert not torch.allclose(later, whole)
    same = noise_of(model, random_batch(lengths_per_row=[[4, 4]]))[0]
    assert not torch.allclose(same[:4], same[4:])  # documents of a row differ


def test_off_in_evaluation_and_taken_off(tiny_model: Any, random_batch: Any) -> None:
    batch = random_batch()
    model = noisy(tiny_model)
    assert noise_of(model, batch).any()
    assert not noise_of(model.eval(), batch).any()
    twin = copy.deepcopy(model.train())
    remove_noise(model)
    assert not noise_of(model, batch).any() and noise_of(twin, batch).any()
    remove_noise(twin)
    assert not noise_of(twin, batch).any() and not twin.get_input_embeddings()._forward_hooks
    remove_noise(twin)
    add_noise(twin, AdapterConfig.model_validate({}), seed=1)  # not asked for
    assert not noise_of(twin, batch).any()
    for _ in range(2):  # once, however often
        add_noise(twin, CONFIG, seed=1)
    assert len(twin.get_input_embeddings()._forward_hooks) == 1


@pytest.mark.parametrize("method", ["none", "lora", "prefix", "prompt"])
def test_with_every_method_and_in_a_stage(tiny_model: Any, random_batch: Any, method: str) -> None:
    """Micro-batches, recomputation and half precision; no random number but the seed's."""
    batch = random_batch(lengths_per_row=LENGTHS)
    for dtype in (torch.float32, torch.bfloat16):
        model = tiny_model("llama", dtype)
        options = {"num_prefix_tokens": 3} if method in ("prefix", "prompt") else {}
        if method != "none":
            attach(model, AdapterConfig.model_validate({"method": method, **options}), seed=1)
        stage = Stage(model.train())
        plain = stage(batch)
        add_noise(model, CONFIG, seed=1)
        stage._randomness_checked = False  # it looks again
        whole = stage(batch)
        real = batch.document_ids != PADDING
        assert not torch.allclose(whole[real], plain[real])
        set_recompute(stage, "layer")
        assert torch.equal(stage(batch), whole)
        part = stage(rows_of(batch, 1))
        torch.testing.assert_close(part[0], whole[1, : part.shape[1]])
        assert whole.dtype == dtype
        assert torch.equal(Stage(model.eval())(batch), plain)


def test_outside_a_layout_each_row_is_a_document(tiny_model: Any) -> None:
    model = noisy(tiny_model)
    ids = torch.arange(3, 23).view(2, 10)
    embedding = model.get_input_embeddings()
    drawn = (embedding(ids) - embedding.forward(ids)).detach()
    bound = 5 / math.sqrt(10 * 64)
    assert bound * 0.9 < float(drawn.abs().max()) < bound * 1.001


def test_noise_reaches_no_virtual_token(tiny_model: Any, random_batch: Any) -> None:
    """What every document sees first is the same with noise and without."""
    model = tiny_model("llama")
    config = AdapterConfig.model_validate({"method": "prompt", "num_prefix_tokens": 3})
    adapter: Any = attach(model, config, seed=1)[""]
    stage = Stage(model.train())
    stage(random_batch())
    before = adapter.kept.layers[1]
    add_noise(model, CONFIG, seed=1)
    stage(random_batch())
    assert all(map(torch.equal, adapter.kept.layers[1], before))
