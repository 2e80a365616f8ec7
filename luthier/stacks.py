"""Fused experts: matrices of a mixture of experts that a family keeps as one parameter [E, out, in].

They are no layers; to an adapter each matrix is shown as a linear layer (`stand_in`). A stack is named by the
path of its parameter ("model.layers.0.mlp.experts.down_proj"). Which modules are meant is told by what
transformers' `use_experts_implementation` leaves on them. How adapters act on stacks is
`adapters/experts.py`'s.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

STACKS = ("gate_up_proj", "up_proj", "down_proj")  # in the order of use


def stacks_of(model: nn.Module) -> list[str]:
    """Paths of all stacks of a model, in its order."""
    return [
        f"{path}.{name}".removeprefix(".")
        for path, module in model.named_modules()
        for name in own_stacks(module)
    ]


def linear_of(model: nn.Module, name: str) -> nn.Module:
    """The linear layer `name`, or the stand-in of a stack's first matrix."""
    path, _, last = name.rpartition(".")
    parent: Any = model.get_submodule(path)
    if last in own_stacks(parent):
        return stand_in(parent, last, 0)
    return model.get_submodule(name)


def stand_in(experts: Any, stack: str, number: int) -> nn.Linear:
    """A linear layer without bias whose weight is matrix `number` of the stack, not a copy of it."""
    weight = matrix(experts, stack, number)
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    layer.weight = nn.Parameter(weight, requires_grad=False)
    return layer


def matrix(experts: Any, stack: str, number: int | torch.Tensor) -> torch.Tensor:
    """Matrix `number` of the stack as [out, in], whatever its orientation in the parameter."""
    weight = getattr(experts, stack)[number]
    return weight.t() if experts.is_transposed else weight


def own_stacks(module: nn.Module) -> list[str]:
    """Names of the stacks that the module itself holds, in the order of use; none if it is no experts' module."""
    if not (hasattr(module, "has_gate") and hasattr(module, "is_transposed")):
        return []
    own = dict(module.named_parameters(recurse=False))
    return [name for name in STACKS if name in own and own[name].ndim == 3]
