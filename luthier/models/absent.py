"""What stands in the place of a module that is on another pipeline stage.

It has no parameters, answers to the names that a model asks of its modules, and changes nothing that is used.
What is left out of a model is told by `partial.py`.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer

from luthier.crossing import Crossing, current_crossing


class Absent(GradientCheckpointingLayer):
    """In the place of layer `number`, of another stage: hidden states cross here. It answers as the layer does when
    a model asks what kind of layer it is."""

    def __init__(self, layer: nn.Module, number: int, crossing: Crossing, tuples: bool) -> None:
        super().__init__()
        vars(self)["kept"] = layer  # no sub-module
        self.number, self.crossing, self.tuples = number, crossing, tuples

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(vars(self)["kept"], name)

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        cache = kwargs.get("past_key_values")
        if self.number == 0 and cache is not None and hasattr(cache, "update"):
            # the length of a cache is that of its first layer
            seen = hidden_states.new_zeros(len(hidden_states), 1, hidden_states.shape[1], 1)
            cache.update(seen, seen, 0)
        out = (current_crossing() or self.crossing).at(self.number, hidden_states)
        return (out,) if self.tuples else out


class Blank(nn.Module):
    """In the place of a module of another stage, of which nothing is used: zeros of the `width` that it gives."""

    def __init__(self, module: nn.Module, width: int | None) -> None:
        super().__init__()
        vars(self)["kept"] = module
        tensor = next(module.parameters(), None)
        self.width, self.dtype = width, None if tensor is None else tensor.dtype

    @property
    def weight(self) -> Tensor:
        """The shape and type of what is elsewhere."""
        kept: Any = vars(self)["kept"]
        return kept.weight

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if self.width is None:
            return x
        if not x.is_floating_point():  # tokens
            return torch.zeros(*x.shape, self.width, dtype=self.dtype, device=x.device)
        kind = x.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
        return torch.zeros(*x.shape[:-1], self.width, dtype=dtype, device=x.device)


class Nothing(Blank):
    """In the place of a table whose rows are added."""

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        return torch.zeros((), dtype=self.dtype)


def present(layers: Iterable[nn.Module]) -> list[nn.Module]:
    """Those of a model's layers that are on this rank."""
    return [layer for layer in layers if not isinstance(layer, Absent)]
