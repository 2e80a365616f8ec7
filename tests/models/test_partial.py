"""Which layers a pipeline stage has, and that the others are not read."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import luthier.models.partial
from luthier.config import ModelConfig
from luthier.errors import Refused
from luthier.models.load import build_model
from luthier.models.partial import balanced, costs_of, places_of


@pytest.mark.parametrize(
    ("costs", "head", "stages", "sizes"),
    [
        ([1, 1, 1, 1], 0, 2, [2, 2]),
        ([1, 1, 1, 1], 2, 2, [3, 1]),  # the head is worth two layers
        ([1, 1, 1, 1], 100, 2, [3, 1]),  # every stage has a layer
        ([5, 1, 1, 1, 1, 1], 0, 2, [1, 5]),
        ([1] * 7, 1, 4, [2, 2, 2, 1]),
    ],
)
def test_stages_are_balanced(costs: list[int], head: int, stages: int, sizes: list[int]) -> None:
    parts = balanced(costs, head, stages)
    assert [len(part) for part in parts] == sizes
    assert [layer for part in parts for layer in part] == list(range(len(costs)))


def test_experts_cost_what_a_token_sees(tiny_model: Callable[..., Any]) -> None:
    model = tiny_model("mixtral")
    layers, head = costs_of(model, places_of(model))
    assert head == 320 * 64
    # two of four experts
    stacked = sum(p.numel() for p in model.model.layers[0].parameters() if p.ndim == 3)
    every = sum(p.numel() for p in model.model.layers[0].parameters())
    assert layers == [every - stacked // 2] * 2


@pytest.mark.parametrize("family", ["llama", "qwen2", "gpt2", "mixtral", "bloom"])
def test_layers_of_others_are_not_read(family: str, model_folder: Callable[[str], Path]) -> None:
    config = ModelConfig(path=str(model_folder(family)), device="cpu", dtype="float32")
    whole = build_model(config, seed=0)
    model = build_model(config, seed=0, leave_out=lambda _: {1})
    assert type(model) is type(whole) and repr(type(model)) == repr(type(whole))
    theirs = dict(whole.named_parameters())
    ours = dict(model.named_parameters())
    assert ours.keys() == theirs.keys()
    for name, parameter in ours.items():
        assert parameter.is_meta == (".1." in name), name
        assert parameter.shape == theirs[name].shape
        assert parameter.is_meta or torch.equal(parameter, theirs[name])


def test_families_without_a_plan_are_refused(
    tiny_model: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(Refused, match=r"model family 'opt'.*another width"):
        places_of(tiny_model("opt_350m"))
    monkeypatch.setattr(luthier.models.partial, "plan_of", lambda family: None)
    with pytest.raises(Refused, match=r"model family 'gpt2'.*nobody says which"):
        places_of(tiny_model("gpt2"))
