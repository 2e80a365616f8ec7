"""What the tests of all adapter methods share: the table of methods, and values for their parameters."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from luthier.adapters import adapter_parameters
from luthier.batch import Batch, Layout, layout_scope
from luthier.config import AdapterConfig
from luthier.seeding import generator

# One row per method: a name for the test, and its options. A new method adds its row here, and every
# test in test_contract.py runs on it.
METHODS: dict[str, dict[str, Any]] = {
    "lora": {"method": "lora", "rank": 4, "alpha": 6},
}
FAMILIES = ("llama", "qwen2", "gpt2", "opt")  # plain, biased and tied, Conv1D, flattened tokens


def options(row: str, **changes: Any) -> AdapterConfig:
    return AdapterConfig(**{**METHODS[row], **changes})


def fill(model: nn.Module, seed: int = 0, size: float = 0.1) -> None:
    """Adapter parameters as if trained: also those that the method makes zero at first."""
    with torch.no_grad():
        for name, parameter in adapter_parameters(model).items():
            noise = torch.randn(parameter.shape, generator=generator(seed, name))
            parameter.add_(size * noise.to(parameter.dtype))


def run(model: Any, batch: Batch) -> Tensor:
    """Logits [B, S, V] inside the batch's layout."""
    with layout_scope(Layout.of(batch)):
        return model(
            input_ids=batch.input_ids, position_ids=batch.position_ids, use_cache=False
        ).logits


def error(ours: Tensor, reference: Tensor) -> float:
    """||ours - reference|| / ||reference||."""
    ours, reference = ours.detach().double(), reference.detach().double()
    return float((ours - reference).norm() / reference.norm())
