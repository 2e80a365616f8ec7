"""Layers whose forward and backward the native kernels compute in one pass: RMSNorm and gated MLPs with SiLU.

A module is known by its shape, then by what it computes: on a few numbers ours and its own forward have to
agree. Then the instance gets a forward of its own, as adapters give to linear layers; class, names and weights stay.
What is not known, or computes something else, is left to torch, and `fasten` says so. The kernels are
for bfloat16 on a CPU, in compiled layers too.
"""

from __future__ import annotations

import copy
from types import MethodType
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable
from torch.autograd.graph import saved_tensors_hooks

from luthier.held import filled
from luthier.native import ops

ERROR = 2**-7  # what two orders of rounding in bfloat16 may differ by, relative to the whole
WIDTH = 64  # of matrices that a trial makes: one of few numbers may be far off by rounding
NORMS = "RMSNorm"  # what the names of classes of such norms end with


class Norm(NamedTuple):
    """What an RMSNorm computes: (offset + weight) x / sqrt(mean(x^2) + eps)."""

    eps: float
    offset: float  # Gemma's weights are kept less one
    rounded: bool  # x is rounded before the weight multiplies it


def fasten(model: nn.Module) -> list[str]:
    """Give every norm and MLP of `model` that is known the fast forward; remarks on those that are not.

    Call it on a model with its weights and without adapters, or, to find its sizes alone, on one of fake tensors,
    outside of their mode. Where the kernels are not for the model at all nothing is done and nothing said.
    """
    here = next((p for p in model.parameters() if not p.is_meta), None)
    if here is None or not ops.takes(here):
        return []
    left: dict[str, str] = {}
    known: dict[tuple[Any, ...], str | None] = {}  # one layer of a kind is tried, its weights cost
    for module in list(model.modules()):
        if any(p.is_meta for p in module.parameters()):
            continue  # of another stage of a pipeline
        name = type(module).__name__
        if name.endswith(NORMS):
            why = _fasten_norm(module)
        elif _is_gated(module):
            kind = type(module), type(module.act_fn)
            if kind not in known:
                known[kind] = _differs_mlp(module)
            why = known[kind]
            if why is None:
                vars(module)["forward"] = MethodType(_mlp_forward, module)
                vars(module)["luthier_keeps"] = False
        else:
            continue
        if why is not None:
            left.setdefault(name, why)
    return [
        f"{name} is computed by torch, not by the native kernels: {why}"
        for name, why in left.items()
    ]


# ---- RMSNorm


def _small(module: nn.Module) -> nn.Module:
    """What a trial is run on: the module, or where its tensors have no values one of its class that has, with small
    matrices."""
    if not any(isinstance(p, FakeTensor) for p in module.parameters()):
        return module
    made, draw = copy.copy(module), torch.Generator().manual_seed(0)
    own = {
        name: torch.randn(p.shape, generator=draw).to(p.dtype)
        for name, p in module.named_parameters(recurse=False)
    }
    vars(made)["_parameters"] = {n: nn.Parameter(w, requires_grad=False) for n, w in own.items()}
    vars(made)["_modules"] = dict(module.named_children())
    for name, child in module.named_children():
        if any(True for _ in child.parameters()):
            made._modules[name] = layer = nn.Linear(WIDTH, WIDTH, bias=False, device="meta")
            weight = torch.randn(WIDTH, WIDTH, generator=draw) / WIDTH**0.5
            layer.weight = nn.Parameter(weight.bfloat16(), requires_grad=False)
    return made


def _fasten_norm(module: nn.Module) -> str | None:
    """Install ours, or say why not."""
    weight = getattr(module, "weight", None)
    eps = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    if not isinstance(weight, Tensor) or weight.ndim != 1 or not isinstance(eps, float):
        return "it is not one weight and one epsilon"
    if not ops.takes(weight):
        return f"its weight is {str(weight.dtype).removeprefix('torch.')}"
    if not weight.is_contiguous():
        return "its weight is a view"
    tried = _small(module)
    weight = tried.get_parameter("weight")
    # numbers of two sizes: beside the small ones the epsilon counts
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(4, len(weight), generator=draw) * torch.tensor([[8.0], [1.0], [3e-3], [1e-4]])
    x = x.bfloat16()
    with torch.no_grad():
        wanted = type(module).forward(tried, x)
        forms = (Norm(eps, 0.0, True), Norm(eps, 0.0, False), Norm(eps, 1.0, False))
        ours = {form: ops.rms_norm(x, weight, *form)[0] for form in forms}
    # the nearest: they differ in where they round, too
    form = min(forms, key=lambda form: float((ours[form].double() - wanted.double()).norm()))
    if wanted.dtype != ours[form].dtype or not _alike(ours[form], wanted):
        return "it computes something else"
    vars(module)["luthier_norm"] = form
    vars(module)["forward"] = MethodType(_norm_forward, module)
    return None


def _alike(ours: Tensor, wanted: Tensor) -> bool:
    """Whether each row is the same up to rounding."""
    a, b = ours.double(), wanted.double()
    return bool(((a - b).norm(dim=-1) <= ERROR * b.norm(dim=-1)).all())


def _norm_forward(self: Any, x: Tensor) -> Tensor:
    if not ops.takes(x, self.weight):
        return type(self).forward(self, x)
    return _RMSNorm.apply(x, self.weight, self.luthier_norm)  # pyright: ignore[reportReturnType]


class _RMSNorm(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, form: Norm) -> Tensor:
        out, inverse = ops.rms_norm(x, weight, *form)
        ctx.save_for_backward(x, weight, inverse)
        ctx.offset = form.offset
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> Any:
        wanted = ctx.needs_input_grad[1]
        x, weight, inverse = ctx.saved_tensors
        dx, dweight = ops.rms_norm_backward(grads[0], x, weight, inverse, ctx.offset, wanted)
        return dx, dweight.to(weight.dtype) if wanted else None, None


# ---- MLP


def _is_gated(module: nn.Module) -> bool:
    """Whether it has the shape of Llama's MLP: gate, up and down, and one activation."""
    return {name for name, _ in module.named_children()} == {
        *("gate_proj", "up_proj", "down_proj", "act_fn")
    }


def _differs_mlp(module: Any) -> str | None:
    """Why the MLP is not down(silu(gate(x)) up(x)); None if it is."""
    numbers = torch.tensor([-9.0, -1.0, -0.1, 0.0, 0.5, 2.0, 12.0])
    if not torch.allclose(module.act_fn(numbers), F.silu(numbers), atol=1e-6):
        return "its activation is not SiLU"
    draw = torch.Generator().manual_seed(0)
    module = _small(module)
    width = module.gate_proj.in_features
    x = torch.randn(1, 3, width, generator=draw).bfloat16() * 4
    with torch.no_grad(), filled(module):
        wanted, ours = type(module).forward(module, x), _mlp_forward(module, x)
    if not ops.takes(ours):
        return f"it computes in {str(ours.dtype).removeprefix('torch.')}"
    return None if _alike(ours, wanted) else "it computes something else"


def _mlp_forward(self: Any, x: Tensor) -> Tensor:
    gate, up = self.gate_proj(x), self.up_proj(x)
    if not ops.takes(gate, up):
        return self.down_proj(self.act_fn(gate) * up)
    product: Any = _SwiGLU.apply(gate, up)
    if not product.requires_grad or self.luthier_keeps or torch.compiler.is_compiling():
        return self.down_proj(product)
    with _made_again(product, gate, up):
        return self.down_proj(product)


def keep_products(model: nn.Module, on: bool) -> None:
    """Whether MLPs keep silu(gate) up for the backward. If not they make it again from gate and up, which are kept
    anyway: a fifth less where the MLP is four times as wide as the model. In a layer that is recomputed as a whole
    nothing is kept, and keeping gate and up for this would be more."""
    for module in model.modules():
        if "luthier_keeps" in vars(module):
            module.luthier_keeps = on  # pyright: ignore[reportArgumentType]


def _made_again(product: Tensor, gate: Tensor, up: Tensor) -> saved_tensors_hooks:
    """Inside, `product` is not kept for the backward."""
    where, gate, up = product.untyped_storage()._cdata, gate.detach(), up.detach()

    def pack(x: Tensor) -> Tensor | torch.Size:
        same = x.untyped_storage()._cdata == where and x.numel() == gate.numel()
        return x.shape if same and x.is_contiguous() else x.detach()

    def unpack(kept: Tensor | torch.Size) -> Tensor:
        return kept if isinstance(kept, Tensor) else ops.swiglu(gate, up).view(kept)

    return saved_tensors_hooks(pack, unpack)


class _SwiGLU(Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return ops.swiglu(gate, up)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> Any:
        return ops.swiglu_backward(grads[0], *ctx.saved_tensors)
