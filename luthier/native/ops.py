"""The native kernels of layers as operators of torch: on tensors, known to compilation and recomputation.

Each is plain arithmetic without a gradient of its own; who calls it has a path in torch beside it and an autograd node
around it. Call them on what `takes` says yes to: bfloat16 on a CPU, where the kernels are.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from luthier import native

_LIBRARY = torch.library.Library("luthier", "FRAGMENT")


@torch.compiler.assume_constant_result
def on() -> bool:
    """Whether there are kernels."""
    return native.library() is not None


def takes(*tensors: Tensor) -> bool:
    """Whether the kernels compute with these: bfloat16 on a CPU."""
    return all(x.dtype == torch.bfloat16 and x.device.type == "cpu" for x in tensors) and on()


def _operator(schema: str, like: Callable[..., Any]) -> Callable[..., Any]:
    """Register a function as the CPU's implementation of an operator, and `like`, which makes its results' shapes."""

    def register(function: Callable[..., Any]) -> Any:
        name = schema.partition("(")[0]
        _LIBRARY.define(schema, tags=(torch.Tag.needs_fixed_stride_order,))
        _LIBRARY.impl(name, function, "CPU")
        torch.library.register_fake(f"luthier::{name}", like, lib=_LIBRARY)
        return getattr(torch.ops.luthier, name)

    return register


def _run(name: str, *values: Any) -> None:
    """Call a kernel: tensors as pointers, integers as int64, the number of threads last."""
    library = native.library()
    assert library is not None
    given = [_argument(value) for value in values]
    getattr(library, name)(*given, ctypes.c_int(torch.get_num_threads()))


def _argument(value: Any) -> Any:
    match value:
        case None:
            return ctypes.c_void_p(None)
        case Tensor():
            return ctypes.c_void_p(value.data_ptr())
        case bool():
            return ctypes.c_int(value)
        case float():
            return ctypes.c_float(value)
        case _:
            return ctypes.c_int64(value)


def _rows(x: Tensor) -> Tensor:
    """x [..., D] as [N, D], a view where rows are evenly spaced."""
    x = x.reshape(-1, x.shape[-1])
    return x if x.stride(1) == 1 else x.contiguous()


def _swiglu_like(gate: Tensor, up: Tensor) -> Tensor:
    return gate.new_empty(gate.shape)


@_operator("swiglu(Tensor gate, Tensor up) -> Tensor", _swiglu_like)
def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) up, all [..., D]; gate and up may be parts of wider rows."""
    out = _swiglu_like(gate, up)
    g, u = _rows(gate), _rows(up)
    _run("luthier_swiglu", g, u, *g.shape, g.stride(0), u.stride(0), out)
    return out


def _swiglu_backward_like(grad: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    return gate.new_empty(gate.shape), up.new_empty(up.shape)


@_operator(
    "swiglu_backward(Tensor grad, Tensor gate, Tensor up) -> (Tensor, Tensor)",
    _swiglu_backward_like,
)
def swiglu_backward(grad: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of gate and up."""
    out = _swiglu_backward_like(grad, gate, up)
    grad, g, u = grad.contiguous(), _rows(gate), _rows(up)
    _run("luthier_swiglu_backward", grad, g, u, *g.shape, g.stride(0), u.stride(0), out[0], out[1])
    return out


def _norm_like(x: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty(x.shape[:-1], dtype=torch.float32)


@_operator(
    "rms_norm(Tensor x, Tensor weight, float eps, float offset, bool rounded) -> (Tensor, Tensor)",
    _norm_like,
)
def rms_norm(
    x: Tensor, weight: Tensor, eps: float, offset: float, rounded: bool
) -> tuple[Tensor, Tensor]:
    """((offset + weight) x / sqrt(mean(x^2) + eps) [..., D], the inverse roots [...]).

    `rounded`: the normalised x is rounded to bfloat16 before the weight multiplies it.
    """
    out, inverse = _norm_like(x)
    x = x.contiguous()
    size = x.numel() // x.shape[-1], x.shape[-1]
    _run("luthier_rms_norm", x, weight, *size, eps, offset, rounded, out, inverse)
    return out, inverse


def _norm_backward_like(grad: Tensor, x: Tensor, weight: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), weight.new_empty(weight.shape, dtype=torch.float32)


@_operator(
    "rms_norm_backward(Tensor grad, Tensor x, Tensor weight, Tensor inverse, float offset, bool wanted)"
    " -> (Tensor, Tensor)",
    _norm_backward_like,
)
def rms_norm_backward(
    grad: Tensor, x: Tensor, weight: Tensor, inverse: Tensor, offset: float, wanted: bool
) -> tuple[Tensor, Tensor]:
    """Gradients of x and of the weight (float32; of no meaning unless `wanted`)."""
    out, found = _norm_backward_like(grad, x, weight)
    grad, x = grad.contiguous(), x.contiguous()
    rows, width = x.numel() // x.shape[-1], x.shape[-1]
    scratch = torch.empty(-(-rows // 64), -(-width // 16) * 16, dtype=torch.float32)
    _run(
        "luthier_rms_norm_backward",
        *(grad, x, weight, inverse, rows, width, offset, out),
        *((found, scratch) if wanted else (None, None)),
    )
    return out, found


@_operator(
    "dequantize(Tensor codes, Tensor scale, Tensor levels, int block, Tensor(a!) out) -> ()",
    lambda *_: None,
)
def dequantize(codes: Tensor, scale: Tensor, levels: Tensor, block: int, out: Tensor) -> None:
    """Write level x scale into `out` [rows, width], contiguous.

    `codes` [rows, bytes] of two 4-bit codes each and `scale` [rows, blocks], float32, may be parts of wider rows;
    `levels` [16], float32. Blocks are even, a row's last may be short.
    """
    rows = codes.stride(0), scale.stride(0)
    _run("luthier_dequantize", codes, scale, levels, *out.shape, block, *rows, out)
