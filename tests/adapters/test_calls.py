"""Where prompts lie in plain calls: padding on either side, caches, beams, calls that fail."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from adapter_table import FAMILIES, run

from luthier.adapters.calls import Call, current_call, watch_calls
from luthier.errors import Refused
from luthier.models.stage import decoder_layers

each_family = pytest.mark.parametrize("family", (*FAMILIES, "bloom"))
IDS = torch.arange(3, 15).view(2, 6)
LEFT = torch.tensor([[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1]])
RIGHT = torch.tensor([[1, 1, 1, 0, 0, 0], [1, 1, 1, 1, 1, 0]])


def watched(model: Any) -> list[Call | None]:
    """The calls that the model's last layer sees, as they come."""
    seen: list[Call | None] = []
    watch_calls(model)
    layer = decoder_layers(model)[-1]
    layer.register_forward_pre_hook(lambda *_: seen.append(current_call()))
    return seen


def prompts(call: Call | None) -> list[tuple[int, int, int]]:
    assert call is not None
    return [(p.row, p.start, p.length) for p in call.prompts]


@each_family
@torch.no_grad()
def test_a_plain_call(tiny_model: Any, family: str) -> None:
    model = tiny_model(family)
    seen = watched(model)
    model(input_ids=IDS)
    model(IDS, attention_mask=LEFT)
    model(input_ids=IDS, attention_mask=RIGHT)
    model(inputs_embeds=model.get_input_embeddings()(IDS), attention_mask=LEFT)
    model.base_model(IDS, attention_mask=LEFT)
    assert [prompts(call) for call in seen] == [
        [(0, 0, 6), (1, 0, 6)],
        [(0, 2, 4), (1, 0, 6)],
        [(0, 0, 3), (1, 0, 5)],
        [(0, 2, 4), (1, 0, 6)],
        [(0, 2, 4), (1, 0, 6)],
    ]
    assert {(call.width, call.past) for call in seen if call} == {(6, 0)}
    assert current_call() is None


@each_family
@torch.no_grad()
def test_behind_a_cache_the_prompt_is_what_was_cached(tiny_model: Any, family: str) -> None:
    model = tiny_model(family)
    seen = watched(model)
    cache = model(IDS[:, :4], attention_mask=LEFT[:, :4], use_cache=True).past_key_values
    model(IDS[:, 4:], attention_mask=LEFT, past_key_values=cache)
    assert prompts(seen[0]) == [(0, 2, 2), (1, 0, 4)]
    assert prompts(seen[1]) == [(0, -2, 2), (1, -4, 4)]
    assert seen[1] is not None and (seen[1].width, seen[1].past) == (2, 4)


@each_family
def test_generate_keeps_the_prompts_of_its_first_call(tiny_model: Any, family: str) -> None:
    model = tiny_model(family)
    seen = watched(model)
    model.generation_config.eos_token_id = None
    fixed = {"max_new_tokens": 3, "do_sample": False, "pad_token_id": 0}
    for cached in (True, False):
        seen.clear()
        model.generate(IDS, attention_mask=LEFT, use_cache=cached, **fixed)
        pasts = [0, 6, 7] if cached else [0, 0, 0]
        assert [call.past for call in seen if call] == pasts
        for call, past in zip(seen, pasts, strict=True):
            assert prompts(call) == [(0, 2 - past, 4), (1, -past, 6)]
    seen.clear()
    model.generate(IDS, attention_mask=LEFT, num_beams=2, **fixed)
    rows = [prompts(call) for call in seen]
    assert rows[0] == [(0, 2, 4), (1, 2, 4), (2, 0, 6), (3, 0, 6)]
    assert rows[2] == [(row, start - 7, length) for row, start, length in rows[0]]
    # after it, a plain call is one again
    seen.clear()
    model(IDS)
    assert prompts(seen[0]) == [(0, 0, 6), (1, 0, 6)]


def test_generate_without_a_mask_takes_that_of_its_first_call(tiny_model: Any) -> None:
    model = tiny_model("llama")
    seen = watched(model)
    padded = IDS * LEFT  # transformers makes a mask of the padding's id
    model.generate(padded, max_new_tokens=2, do_sample=False, pad_token_id=0, use_cache=False)
    assert [prompts(call) for call in seen] == [[(0, 2, 4), (1, 0, 6)]] * 2


def test_masks_of_a_static_cache_and_prompts_in_chunks(tiny_model: Any) -> None:
    model = tiny_model("llama")
    seen = watched(model)
    fixed = {"max_new_tokens": 2, "do_sample": False, "pad_token_id": 0}
    model.generate(IDS, attention_mask=LEFT, cache_implementation="static", **fixed)
    assert [prompts(call) for call in seen] == [
        [(0, 2, 4), (1, 0, 6)],
        [(0, -4, 4), (1, -6, 6)],
    ]
    seen.clear()
    model.generate(IDS, attention_mask=LEFT, prefill_chunk_size=4, **fixed)
    assert [(call.past, call.width) for call in seen if call] == [(0, 4), (4, 2), (6, 1)]
    assert prompts(seen[1]) == [(0, -2, 4), (1, -4, 6)]
    with pytest.raises(Refused, match="prefill_chunk_size=4"):
        model.generate(IDS, prefill_chunk_size=4, **fixed)


def test_what_does_not_tell_the_prompts_is_refused(tiny_model: Any) -> None:
    model = tiny_model("llama")
    watch_calls(model)
    with pytest.raises(Refused, match=r"not \[rows, tokens\] \(\[2, 1, 6, 6\]\)"):
        model(IDS, attention_mask=torch.ones(2, 1, 6, 6))
    with pytest.raises(Refused, match="restart inside a row"):
        model(IDS, position_ids=torch.tensor([[0, 1, 2, 0, 1, 2]]).expand(2, -1))
    assert current_call() is None


@each_family
def test_a_call_that_fails_is_over(tiny_model: Any, family: str) -> None:
    model = tiny_model(family)
    watch_calls(model)

    def fail(*_: Any) -> None:
        assert current_call() is not None
        raise ArithmeticError

    handle = decoder_layers(model)[0].register_forward_pre_hook(fail)
    with pytest.raises(ArithmeticError):
        model.generate(IDS, max_new_tokens=1, pad_token_id=0)
    assert current_call() is None
    handle.remove()
    model(IDS)


@each_family
def test_a_layout_needs_no_call(tiny_model: Any, random_batch: Any, family: str) -> None:
    model = tiny_model(family)
    seen = watched(model)
    run(model, random_batch())
    assert seen == [None]


def test_removing_leaves_the_model_as_it_was(tiny_model: Any) -> None:
    model = tiny_model("opt")
    hooks = {
        n: (len(m._forward_hooks), len(m._forward_pre_hooks)) for n, m in model.named_modules()
    }
    for handle in watch_calls(model):
        handle.remove()
    assert "generate" not in vars(model)
    assert hooks == {
        n: (len(m._forward_hooks), len(m._forward_pre_hooks)) for n, m in model.named_modules()
    }
