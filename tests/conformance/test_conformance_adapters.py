"""Every adapter method on every family: it attaches, leaves the output, trains, folds, and is read back.

CI runs one form of each method, `make test-all` more.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from family_checks import (
    ANSWERING,
    LOGITS,
    asking,
    documents,
    error,
    every_family,
    gradients,
    stage_loss,
)

from luthier.adapters import (
    adapter_parameters,
    adapters_of,
    attach,
    fold_into,
    load_adapter,
    retract,
    save_adapter,
)
from luthier.config import AdapterConfig
from luthier.models.generate import GenerateOptions, generate
from luthier.models.stage import Stage
from luthier.seeding import generator

# method -> (options, whether it folds, whether the first output is the base's)
METHODS: dict[str, tuple[dict[str, Any], bool, bool]] = {
    "lora": ({"rank": 4}, True, True),
    "mora": ({"rank": 4}, True, True),
    "vera": ({"rank": 4}, True, True),
    "lokr": ({"rank": 4}, True, True),
    "ia3": ({}, True, True),
    "reft": ({"rank": 4, "positions": "f2+l2"}, False, True),
    "prefix": ({"num_prefix_tokens": 4}, False, False),
    "prompt": ({"num_prefix_tokens": 4}, False, False),
}
# forms of a method that CI leaves to `make test-all`
FORMS: dict[str, tuple[dict[str, Any], bool, bool]] = {
    "dora": ({"method": "lora", "rank": 4, "dora": True}, True, True),
    "pissa": ({"method": "lora", "rank": 4, "pissa": True}, True, True),
    "mixer": ({"method": "lora", "rank": 4, "mixer": True}, True, True),
    "mora_type1": ({"method": "mora", "rank": 4, "form": "type1"}, True, True),
    "vera_paddlenlp": ({"method": "vera", "rank": 4, "form": "paddlenlp"}, True, True),
    "lokr_both": ({"method": "lokr", "rank": 1, "decompose_both": True}, True, True),
    "reft_tiny": ({"method": "reft", "rank": 4, "form": "tiny", "positions": "all"}, False, True),
    "prefix_network": (
        {
            "method": "prefix",
            "num_prefix_tokens": 4,
            "form": "paddlenlp",
            "prefix_projection": True,
            "projection_size": 12,
        },
        False,
        False,
    ),
}
PROMPTS = [[7, 9, 4, 11, 30, 31, 8], [5, 6], [200, 3, 17, 99]]


def fill(model: Any) -> None:
    """Adapter parameters as if trained."""
    with torch.no_grad():
        for name, parameter in adapter_parameters(model).items():
            noise = torch.randn(parameter.shape, generator=generator(0, name))
            parameter.add_(0.1 * noise)
    retract(model)


@pytest.mark.parametrize(
    "method", [*METHODS, *(pytest.param(name, marks=pytest.mark.long) for name in FORMS)]
)
@every_family
def test_adapter(
    family: str, method: str, tiny_model: Any, random_batch: Any, tmp_path: Path
) -> None:
    given, folds, unchanged = {**METHODS, **FORMS}[method]
    config = AdapterConfig.model_validate({"method": method, **given})
    keys = ANSWERING.get(family, {})
    model, batch = tiny_model(family, **keys), documents(family, random_batch)
    stage = Stage(model)
    with torch.no_grad():
        base = stage(batch)
    attach(model, config, seed=1)
    with torch.no_grad():
        first = stage(batch)
    assert (
        not unchanged or error(first, base) < LOGITS
    )  # bit for bit on linear layers: test_contract
    fill(model)
    mine = adapter_parameters(model)
    found = gradients(model, stage_loss(stage, batch))
    assert found.keys() == mine.keys()
    reached = {n for n, g in found.items() if g.any()}
    excused = {
        f"{adapter.path}.{n}" for adapter in adapters_of(model).values() for n in adapter.may_idle
    }
    assert mine.keys() - excused <= reached
    with torch.no_grad():
        adapted = stage(batch)
    assert error(adapted, base) > 1e-3
    prompts, options = asking(family, PROMPTS), GenerateOptions(max_new_tokens=4)
    answers = generate(model, prompts, options, pad_id=0, stop_ids=(), micro_batch=3)
    alone = [
        generate(model, [p], options, pad_id=0, stop_ids=(), micro_batch=1)[0] for p in prompts
    ]
    assert answers == alone
    save_adapter(model, tmp_path, config, "base", None)
    again = tiny_model(family, **keys)
    load_adapter(again, tmp_path)
    with torch.no_grad():
        assert torch.equal(Stage(again)(batch), adapted)
    if folds:
        fold_into(model)
        assert not adapters_of(model)
        with torch.no_grad():
            assert error(stage(batch), adapted) < 10 * LOGITS
