"""Fused experts: matrices of a mixture of experts that a family keeps as one parameter [E, out, in].

They are no layers; to an adapter each matrix is shown as a linear layer (`stand_in`). A stack is named by the
path of its parameter ("model.layers.0.mlp.experts.down_proj"). Which modules are meant is told by what
transformers' `use_experts_implementation` leaves on them. A quantised stack is a module in the parameter's place,
and the experts then compute by `run`, expert by expert. How adapters act on stacks is `adapters/experts.py`'s.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from luthier.held import is_away

STACKS = ("gate_up_proj", "up_proj", "down_proj")  # in the order of use


def stacks_of(model: nn.Module) -> list[str]:
    """Paths of all stacks of a model, in its order."""
    return [
        f"{path}.{name}".removeprefix(".")
        for path, module in model.named_modules()
        for name in own_stacks(module)
    ]


def shape_of(experts: Any, stack: str) -> tuple[int, int, int]:
    """(E, out, in) of a stack."""
    held = getattr(experts, stack)
    if coded(held):
        return held.spec.shape
    number, rows, columns = held.shape
    return (number, columns, rows) if experts.is_transposed else (number, rows, columns)


def coded(held: Any) -> bool:
    """Whether it is kept as codes and scales (`quantize.linears`)."""
    return hasattr(held, "multiply_back")


def linear_of(model: nn.Module, name: str) -> nn.Module:
    """The linear layer `name`, or the stand-in of a stack's first matrix."""
    path, _, last = name.rpartition(".")
    parent: Any = model.get_submodule(path)
    if last in own_stacks(parent):
        return stand_in(parent, last, 0)
    return model.get_submodule(name)


def shape_of_matrix(model: nn.Module, name: str) -> tuple[int, int] | None:
    """(out, in) of the matrices of stack `name`; None for what is no stack. No weight is looked at."""
    path, _, last = name.rpartition(".")
    parent: Any = model.get_submodule(path)
    return shape_of(parent, last)[1:] if last in own_stacks(parent) else None


def stand_in(experts: Any, stack: str, number: int) -> nn.Linear:
    """A linear layer without bias whose weight is matrix `number` of the stack, not a copy of it (of a quantised
    one: its dequantised matrix)."""
    weight = matrix(experts, stack, number)
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    layer.weight = nn.Parameter(weight, requires_grad=False)
    return layer


def matrix(experts: Any, stack: str, number: int) -> Tensor:
    """Matrix `number` of the stack as [out, in], whatever its orientation in the parameter."""
    held = getattr(experts, stack)
    if coded(held):
        if held.device.type == "meta":
            return torch.empty(held.spec.shape[1:], dtype=held.dtype, device="meta")
        if is_away(held.codes):  # rows of codes are no weight: its shape alone, as of a dense one
            nothing = torch.zeros((), dtype=held.dtype, device=held.device)
            return nothing.expand(held.spec.shape[1:])
        return held.dequantize(index=number)
    return held[number].t() if experts.is_transposed else held[number]


Product = Callable[[str, Tensor, int], Tensor]
"""(stack, x [n, in], number of the expert) -> [n, out], bias and all."""


@torch.compiler.disable  # which experts are used is data
def run(experts: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """The experts' forward: x [N, D], for each token its experts [N, K] and their weights [N, K] -> [N, D].

    `experts.products(experts)`, where it is set, gives the `Product` of this forward.
    """
    product: Product = vars(experts).get("products", _plain)(experts)
    out = torch.zeros_like(hidden_states)
    for e in top_k_index.unique().tolist():
        token, slot = (top_k_index == e).nonzero(as_tuple=True)
        x = hidden_states[token]  # [n, D]
        x = product("gate_up_proj" if experts.has_gate else "up_proj", x, e)
        x = experts._apply_gate(x) if experts.has_gate else experts.act_fn(x)
        x = product("down_proj", x, e)
        if experts.has_post_expert_norm:
            x = experts.post_expert_norm(x)
        x = x * top_k_weights[token, slot, None]
        out.index_add_(0, token, x.to(out.dtype))
    return out


def _plain(experts: Any) -> Product:
    return partial(plain_product, experts)


def plain_product(
    experts: Any, stack: str, x: Tensor, number: int, delta: Tensor | None = None
) -> Tensor:
    """delta [n, out] + x W^T + bias; delta and product are rounded once."""
    if torch.is_autocast_enabled(x.device.type):
        x = x.to(torch.get_autocast_dtype(x.device.type))
    held = getattr(experts, stack)
    if coded(held):
        y = held.product(x, delta, number)
    else:
        weight = matrix(experts, stack, number).t().to(x.dtype)  # [in, out]
        y = x @ weight if delta is None else torch.addmm(delta.to(x.dtype), x, weight)
    return y + getattr(experts, f"{stack}_bias")[number].to(y.dtype) if experts.has_bias else y


def own_stacks(module: nn.Module) -> list[str]:
    """Names of the stacks that the module itself holds, in the order of use; none if it is no experts' module."""
    if not (hasattr(module, "has_gate") and hasattr(module, "is_transposed")):
        return []
    own = {**module._parameters, **module._modules}
    return [
        name for name in STACKS if coded(own.get(name)) or getattr(own.get(name), "ndim", 0) == 3
    ]
