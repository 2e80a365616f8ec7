"""Virtual tokens before a context (ChatGLM-6B, GLM): what they mean there, against the plain models with a mask."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from adapter_table import error, fill, fitting, run
from torch import Tensor

from luthier.adapters import adapters_of, attach
from luthier.adapters.virtual import draw_tokens
from luthier.batch import Batch, Layout
from luthier.config import AdapterConfig
from luthier.positions import TWO_AXES
from luthier.seeding import generator
from tests.conftest import VOCAB

SIZE = 5
each_family = pytest.mark.parametrize("family", TWO_AXES)
each_method = pytest.mark.parametrize("method", ["prefix", "prompt"])


def options(method: str) -> AdapterConfig:
    return AdapterConfig.model_validate({"method": method, "num_prefix_tokens": SIZE})


def after_tokens(model: Any, tokens: Tensor, ids: Tensor, places: Tensor) -> Tensor:
    """Logits [S, V] of a document ids [S] behind virtual tokens [P, D], all in one row of the plain model.

    They are P tokens of context that see each other; the document sees them, its context and what came before.
    """
    size, length = len(tokens), len(ids)
    ahead = torch.stack([torch.arange(size), torch.zeros(size, dtype=torch.long)])  # [2, P]
    positions = torch.cat([ahead, places + torch.tensor([[size], [0]])], dim=1)
    seen = torch.zeros(size + length, size + length, dtype=torch.bool)
    seen[:, :size] = True
    seen[size:, size:] = torch.ones(length, length).tril().bool() | (places[1] == 0)
    hidden = model.config.model_type == "chatglm"  # which says what is hidden, GLM what is seen
    rows = torch.cat([tokens, model.get_input_embeddings()(ids)])
    out = model(
        inputs_embeds=rows[None],
        position_ids=positions[None],
        attention_mask=(~seen if hidden else seen.long())[None, None],
        use_cache=False,
    )
    return out.logits[0, size:]


def documents(batch: Batch) -> list[tuple[Any, Tensor, Tensor]]:
    """(segment, ids [S], positions [2, S]) of each."""
    found = []
    for s in Layout.of(batch).segments:
        part = (s.row, ..., slice(s.start, s.stop))
        found.append((s, batch.input_ids[part], batch.position_ids[part]))
    return found


@each_family
@each_method
def test_the_start_is_tokens_of_the_model_as_a_context_of_their_own(
    tiny_model: Any, random_batch: Any, family: str, method: str
) -> None:
    model, plain = tiny_model(family), tiny_model(family, attention="sdpa")
    batch = fitting(model, random_batch(lengths_per_row=[[7, 4], [9]]))
    attach(model, options(method), seed=1)
    logits = run(model, batch)
    tokens = draw_tokens(plain, SIZE, generator(1, "adapter", ""))
    for s, ids, places in documents(batch):
        expected = after_tokens(plain, tokens, ids, places)
        assert error(logits[s.row, s.start : s.stop], expected) < 2e-6


@each_family
def test_gradients_of_embeddings_are_those_of_rows_that_begin_with_them(
    tiny_model: Any, random_batch: Any, family: str
) -> None:
    """In float64: packed documents against one row of the plain model each."""
    model = tiny_model(family, torch.float64)
    plain = tiny_model(family, torch.float64, attention="sdpa")
    batch = fitting(model, random_batch(lengths_per_row=[[7, 4], [9]]))
    attach(model, options("prompt"), seed=1)
    fill(model)
    adapter: Any = adapters_of(model)[""]
    tokens = adapter.embedding.detach().clone().requires_grad_()
    logits = run(model, batch)
    for s, ids, places in documents(batch):
        expected = after_tokens(plain, tokens, ids, places)
        ours = logits[s.row, s.start : s.stop]
        assert error(ours, expected) < 1e-10
        weights = torch.randn(ours.shape, generator=generator(s.start, "weights")).double()
        (ours * weights).sum().backward(retain_graph=True)
        (expected * weights).sum().backward()
    # both models have norms and angles of float32 inside
    assert error(adapter.embedding.grad, tokens.grad) < 1e-6


@each_family
@each_method
def test_plain_calls_are_the_packed_rows(
    tiny_model: Any, random_batch: Any, family: str, method: str
) -> None:
    """With the positions and the mask that the families make of ids, given or not, in steps from a cache."""
    model = tiny_model(family, torch.float64)
    attach(model, options(method), seed=1)
    fill(model)
    ids = torch.tensor(
        [[7, 9, VOCAB - 4, 31, VOCAB - 2, 40, 41]]
    )  # context, [gMASK], <sop>, answer
    places = torch.tensor([[0, 1, 2, 3, 2, 2, 2], [0, 0, 0, 0, 1, 2, 3]])[None]
    labels = torch.full_like(ids, -100)
    packed = run(model, Batch(ids, labels, places, torch.zeros_like(ids), (0,)))
    seen = (places[0, 1] == 0) | torch.ones(7, 7).tril().bool()
    mask = (~seen if family == "chatglm" else seen.long())[None, None]
    with torch.no_grad():
        given = model(ids, position_ids=places, attention_mask=mask, use_cache=False).logits
        assert error(given, packed) < 1e-12
        if family == "chatglm":  # GLM finds no blanks by itself in a plain call
            assert error(model(ids, use_cache=False).logits, packed) < 1e-12
            assert error(model(ids, attention_mask=torch.ones_like(ids)).logits, packed) < 1e-12
        first = model(
            ids[:, :5],
            position_ids=places[..., :5],
            attention_mask=mask[..., :5, :5],
            use_cache=True,
        )
        rest = model(
            ids[:, 5:],
            position_ids=places[..., 5:],
            attention_mask=mask[..., 5:, :],
            past_key_values=first.past_key_values,
            use_cache=True,
        )
    assert error(torch.cat([first.logits, rest.logits], 1), packed) < 1e-12
