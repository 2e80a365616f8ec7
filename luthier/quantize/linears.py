"""Frozen quantised weights as modules: a linear layer, and a stack of matrices (fused experts).

Codes and scales are parameters that need no gradient, not buffers, because FSDP shards parameters only.
Where rows hold whole blocks they keep the weight's dimensions: what cuts a dense weight by outputs or
inputs cuts them alike. Products are `products.py`'s, the numbers `codes.py`'s; which layers are replaced is
the caller's.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Self, cast

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from luthier.errors import Refused
from luthier.parts import Part
from luthier.quantize import codes
from luthier.quantize.parts import check_part, take_part
from luthier.quantize.products import Product, times, times_transposed
from luthier.quantize.spec import make_spec


class QuantizedTensor(nn.Module):
    """A frozen weight [..., out, in] as codes and scales (`Spec.layout` names and describes them)."""

    codes: nn.Parameter
    absmax: nn.Parameter
    transposed = False  # the weight it stands for is [..., in, out]

    def __init__(
        self,
        shape: tuple[int, ...],
        scheme: str,
        block_size: int | None = None,
        double_quant: bool = False,
        *,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        """Storage without values, on `device`; fill it with `load_from` or `load_state_dict`.

        `dtype` is that of the weight it stands for (default: torch's). Refused as `make_spec` says.
        """
        super().__init__()
        self.spec = make_spec(scheme, shape, block_size, double_quant)
        self.whole = self.spec.numel  # numbers of the weight, of which a rank may have a part
        self.dtype = dtype or torch.get_default_dtype()
        for name, (size, kind) in self.spec.layout.items():
            values = torch.empty(size, dtype=kind, device=device)
            self.register_parameter(name, nn.Parameter(values, requires_grad=False))

    @staticmethod
    def from_weight(
        weight: Tensor, scheme: str, block_size: int | None = None, double_quant: bool = False
    ) -> QuantizedTensor:
        """The quantised `weight` [..., out, in], on its device."""
        made = QuantizedTensor(
            tuple(weight.shape), scheme, block_size, double_quant, dtype=weight.dtype, device="meta"
        )
        made.load_from(weight)
        return made

    @property
    def scheme(self) -> str:
        return self.spec.scheme

    @property
    def block_size(self) -> int:
        return self.spec.block_size

    @property
    def device(self) -> torch.device:
        return self.codes.device

    def load_from(self, weight: Tensor) -> None:
        """Quantise `weight` (this shape, any floating type), where it is, into this storage.

        A storage on the meta device takes the weight's. Refused: another shape, numbers that are not
        finite, and weights that are quantised already.
        """
        if tuple(weight.shape) != self.spec.shape:
            raise Refused(
                f"quantising a weight of shape {list(weight.shape)}",
                f"the layer's is {list(self.spec.shape)}",
                "give the weights that belong to this model",
            )
        for name, values in codes.quantize(weight, self.spec).items():
            self._put(name, values)

    def dequantize(self, dtype: torch.dtype | None = None, index: int | None = None) -> Tensor:
        """The dense weight [..., out, in]; with `index`, one matrix [out, in] of a stack. Without gradient."""
        first, last = self._rows(index)
        out = torch.empty(
            last - first, self.spec.shape[-1], dtype=dtype or self.dtype, device=self.device
        )
        scale, width = codes.scales(self.tensors(), self.spec), self.spec.shape[-1]
        codes.dequantize_range(self.codes, scale, self.spec, first * width, last * width, out)
        return out.view(self.spec.shape if index is None else self.spec.shape[-2:])

    @torch.compiler.disable()  # decoding is table look-ups: there is nothing to fuse
    def product(self, x: Tensor, addend: Tensor | None = None, index: int | None = None) -> Tensor:
        """addend + x W^T with a gradient for x [..., in] and addend ([..., out] or [out]), not for W.

        In half precision too the sum is rounded once. `index` selects one matrix of a stack.
        Computed in x's type, or autocast's.
        """
        kind = x.device.type
        if torch.is_autocast_enabled(kind):
            x = x.to(torch.get_autocast_dtype(kind))
        rows = self._rows(index)
        lead = x.shape[:-1]
        if addend is not None:
            addend = addend.to(x.dtype)
            addend = addend if addend.dim() == 1 else addend.flatten(0, -2)
        x = x.reshape(-1, x.shape[-1])  # [N, in]
        y = Product.apply(x, addend, self.spec, rows, *self.tensors().values())
        return cast(Tensor, y).view(*lead, rows[1] - rows[0])

    @torch.compiler.disable()
    def multiply(self, x: Tensor, addend: Tensor | None = None, index: int | None = None) -> Tensor:
        """addend + x W^T, [N, out], for x [N, in], outside autograd: for nodes that compute more with it.

        An `addend` [N, out] becomes the result.
        """
        tensors = list(self.tensors().values())
        return times_transposed(x, addend, self.spec, self._rows(index), tensors)

    @torch.compiler.disable()
    def multiply_back(
        self, g: Tensor, addend: Tensor | None = None, index: int | None = None
    ) -> Tensor:
        """addend + g W, [N, in], for g [N, out], outside autograd: the gradient of x in such a node.

        `addend` [N, in] becomes the result.
        """
        return times(g, addend, self.spec, self._rows(index), list(self.tensors().values()))

    def check_part(self, how: Part, name: str, asked: str) -> None:
        """Refuse a cut (`keep`) of the layer `name` that would leave blocks too small."""
        check_part(self.spec, how, name, asked)

    def keep(self, how: Part) -> None:
        """Keep a tensor-parallel rank's part of the weight: outputs (`how.dim` -2) or inputs (-1)."""
        kept, self.spec = take_part(self.tensors(), self.spec, how)
        for name, values in kept.items():
            setattr(self, name, nn.Parameter(values, requires_grad=False))

    def tensors(self) -> dict[str, Tensor]:
        """The stored tensors by name."""
        return {name: getattr(self, name) for name in self.spec.layout}

    def extra_repr(self) -> str:
        double = ", double_quant=True" if self.spec.double_quant else ""
        return f"{list(self.spec.shape)}, {self.scheme}, block_size={self.block_size}{double}"

    def _rows(self, index: int | None) -> tuple[int, int]:
        """Rows of the flattened matrix [rows, in] that a matrix of the stack has, or all."""
        total, each = self.spec.numel // self.spec.shape[-1], self.spec.shape[-2]
        if index is None:
            return 0, total
        if not 0 <= index < total // each:
            raise IndexError(f"matrix {index} of a stack of {total // each}")
        return index * each, (index + 1) * each

    def _put(self, name: str, values: Tensor) -> None:
        held = getattr(self, name)
        if held.device.type == "meta":
            kept = nn.Parameter(values, requires_grad=held.requires_grad)
            setattr(self, name, kept)
        else:
            held.data.copy_(values)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        # `.to(bfloat16)` and `.half()` are meant for the model's weights; scales stay exact
        exact = {name: t.data for name, t in self.tensors().items() if t.dtype == torch.float32}
        super()._apply(fn, recurse)
        for name, values in exact.items():
            held = getattr(self, name)
            if held.dtype != values.dtype:
                held.data = values.to(held.device)
        return self


class QuantizedLinear(QuantizedTensor):
    """In place of an `nn.Linear`, or of a `Conv1D`, whose weight it keeps transposed, as [out, in].

    It has no `weight`: what reads one would read codes. `bias` stays in the base's type.
    """

    bias: nn.Parameter | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        scheme: str,
        block_size: int | None = None,
        double_quant: bool = False,
        *,
        bias: bool = False,
        transposed: bool = False,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        """As `QuantizedTensor`. `transposed`: the layer it stands for keeps its weight as [in, out]."""
        shape = (out_features, in_features)
        super().__init__(shape, scheme, block_size, double_quant, dtype=dtype, device=device)
        self.in_features, self.out_features = in_features, out_features
        self.transposed = transposed
        self.register_parameter("bias", None)  # a parameter also where there is none
        if bias:
            values = torch.zeros(out_features, dtype=self.dtype, device=device)
            self.bias = nn.Parameter(values, requires_grad=False)

    @classmethod
    def meta(
        cls,
        in_features: int,
        out_features: int,
        scheme: str,
        block_size: int | None = None,
        double_quant: bool = False,
        *,
        bias: bool = False,
        transposed: bool = False,
        dtype: torch.dtype | None = None,
    ) -> Self:
        """A layer without memory, for a loader that calls `load_from` when it has read the weight."""
        form = (in_features, out_features, scheme, block_size, double_quant)
        return cls(*form, bias=bias, transposed=transposed, dtype=dtype, device="meta")

    @classmethod
    def like(
        cls,
        layer: nn.Module,
        scheme: str,
        block_size: int | None = None,
        double_quant: bool = False,
    ) -> Self:
        """The form of `layer` on the meta device: its sizes, type and mode.

        Refused: a layer that is quantised already, or is no linear layer; and what `make_spec` refuses.
        """
        if isinstance(layer, QuantizedTensor):
            raise Refused(
                f"quantising a layer in {scheme}",
                f"it is quantised already, in {layer.scheme}",
                "start from the model in its original precision",
            )
        if not isinstance(layer, nn.Linear | Conv1D):
            raise Refused(
                f"quantising a layer of type {type(layer).__name__}",
                "only linear layers (Linear, Conv1D) are quantised",
                "leave it out of quantize.modules: it stays in full precision",
            )
        weight = layer.weight
        transposed = isinstance(layer, Conv1D)
        num_out, num_in = weight.shape[::-1] if transposed else weight.shape
        form = (num_in, num_out, scheme, block_size, double_quant)
        dtype = weight.dtype if weight.is_floating_point() else None
        made = cls.meta(*form, bias=layer.bias is not None, transposed=transposed, dtype=dtype)
        return made.train(layer.training)

    @classmethod
    def from_linear(
        cls,
        layer: nn.Module,
        scheme: str,
        block_size: int | None = None,
        double_quant: bool = False,
    ) -> Self:
        """The quantised form of `layer`, on its device; on the meta device, the form without values.

        Refused: what `like` and `load_from` refuse.
        """
        made = cls.like(layer, scheme, block_size, double_quant)
        weight = layer.get_parameter("weight")
        if weight.device.type != "meta":
            made.load_from(weight, getattr(layer, "bias", None))
        return made

    def keep(self, how: Part) -> None:
        super().keep(how)
        self.out_features, self.in_features = self.spec.shape

    def load_from(self, weight: Tensor, bias: Tensor | None = None) -> None:
        """Quantise `weight`, in the orientation of the layer it stands for, and take `bias` [out] over."""
        super().load_from(weight.t() if self.transposed else weight)
        if bias is not None:
            self._put("bias", bias.detach().to(self.dtype).clone())

    @torch.compiler.disable()
    def forward(self, x: Tensor) -> Tensor:
        """x [..., in] -> x W^T + bias, [..., out], in x's type."""
        return self.product(x, self.bias)

    def matmul_with(self, x: Tensor, addend: Tensor) -> Tensor:
        """addend [..., out] + x W^T + bias. Addend and product are summed before they are rounded.

        That is how an adapter's delta, mostly smaller than a rounding step of the output in half precision,
        survives.
        """
        y = self.product(x, addend)
        return y if self.bias is None else y + self.bias.to(y.dtype)
