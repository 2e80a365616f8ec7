"""Every family on every quantised storage: LoRA's gradients are those on the dense model of the same numbers."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import pytest
import torch
from family_checks import (
    GRADIENTS,
    asking,
    assert_same,
    documents,
    every_family,
    gradients,
    stage_loss,
)

from luthier.adapters import adapter_parameters, attach
from luthier.config import AdapterConfig, QuantizeConfig
from luthier.layers import dense_weight, is_quantized, is_transposed
from luthier.models.generate import GenerateOptions, generate
from luthier.models.stage import Stage
from luthier.quantize.loading import Quantization
from luthier.seeding import generator

SCHEMES = ("nf4", "fp4", "int8", "int4")
OFTEN = ("nf4",)  # CI; the others are `make test-all`'s


@pytest.mark.parametrize(
    "scheme", [s if s in OFTEN else pytest.param(s, marks=pytest.mark.long) for s in SCHEMES]
)
@every_family
def test_storage(family: str, scheme: str, tiny_model: Any, random_batch: Any) -> None:
    model, batch = tiny_model(family), documents(family, random_batch)
    dense = deepcopy(model)
    Quantization(QuantizeConfig.model_validate({"weights": scheme})).convert(model)
    stored = {name: layer for name, layer in model.named_modules() if is_quantized(layer)}
    assert stored
    for name, layer in stored.items():
        owner, _, last = name.rpartition(".")
        held: Any = getattr(dense.get_submodule(owner), last)
        target = held.weight if isinstance(held, torch.nn.Module) else held  # a stack of experts
        weight = dense_weight(layer)
        target.data.copy_(weight.mT if is_transposed(layer) else weight)
    found = []
    for one in (model, dense):
        attach(one, AdapterConfig(method="lora", rank=4, alpha=6), seed=1)
        with torch.no_grad():
            for name, p in adapter_parameters(one).items():
                p.add_(0.1 * torch.randn(p.shape, generator=generator(0, name)))
        found.append(gradients(one, stage_loss(Stage(one), batch)))
    assert found[0].keys() == adapter_parameters(model).keys()
    assert_same(found[0], found[1], GRADIENTS)
    prompts = asking(family, [[7, 9, 4, 11, 30, 31, 8], [5, 6]])
    options = GenerateOptions(max_new_tokens=3)
    answers = [
        generate(one.eval(), prompts, options, pad_id=0, stop_ids=(), micro_batch=2)
        for one in (model, dense)
    ]
    assert answers[0] == answers[1]
