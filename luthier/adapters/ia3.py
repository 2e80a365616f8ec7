"""(IA)^3 (Liu et al. 2022, arXiv:2205.05638): each output of a layer times a trained number, y = l * (W x + b).

Layers of `feedforward`, the second of each MLP, are scaled at their input instead: y = W (l * x) + b. All l are
one at first; there is no rank. In half precision l * y would round back to y while l is near one. There the
difference (l - 1) * y goes into the layer's own matrix product, as in `fused.py`; it takes a product of its own, so
the forward of a layer costs two. Layers of an unknown kind are scaled outside, as in float32.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from types import MethodType
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from luthier.adapters.base import ADAPTERS, Adapter, Placed, Removable
from luthier.adapters.fused import factor, forward_of, fused, product_dtype, times, times_back
from luthier.config import AdapterConfig
from luthier.errors import Refused, suggest
from luthier.layers import features, is_linear, is_transposed

# ends of paths: second linear layers of the MLPs of the families in transformers
FEEDFORWARD = (
    *("down_proj", "mlp.c_proj", "fc2", "dense_4h_to_h", "fc_out"),
    *("feed_forward.w2", "experts.w2", "output.dense", "ffn.proj_2", "linear2"),
)
_READ = {"feedforward_modules", "peft_type", "base_model_name_or_path", "modules_to_save"}
_INERT = {
    *("task_type", "inference_mode", "revision", "auto_mapping", "peft_version"),
    *("target_modules", "exclude_modules", "fan_in_fan_out", "init_ia3_weights"),
}


@ADAPTERS.register("ia3")
class IA3(Adapter):
    """One number for each output or input of a linear layer."""

    uses = frozenset({"targets", "feedforward"})
    follows: ClassVar = {"colwise": {"scale_out": 0}, "rowwise": {"scale_in": 0}}
    peft_types = ("IA3",)
    suffixes = ("ia3_l",)

    def __init__(self, layer: nn.Module, config: AdapterConfig, *, name: str, seed: int) -> None:
        super().__init__(layer, config, name=name, seed=seed)
        num_in, num_out = features(layer)
        self.at_input = is_feedforward(name, config)
        self.transposed = is_transposed(layer)
        if self.at_input:
            self.scale_in = self.new_parameter(layer, num_in)
        else:
            self.scale_out = self.new_parameter(layer, num_out)

    @classmethod
    def plan(cls, model: nn.Module, config: AdapterConfig) -> dict[str, AdapterConfig]:
        plan = super().plan(model, config)
        for item in config.feedforward or ():
            if not any(ends_with(name, item) for name in plan):
                names = sorted({name.rpartition(".")[2] for name in plan})
                raise Refused(
                    f"adapter.feedforward '{item}'",
                    f"no target of the adapter has this name; they are {', '.join(names)}",
                    suggest(item, names) or "give one of these",
                )
        return plan

    @classmethod
    def accepts(cls, layer: nn.Module) -> bool:
        return is_linear(layer)

    @classmethod
    def connect(cls, model: nn.Module, adapters: Mapping[str, Adapter]) -> list[Removable]:
        handles: list[Removable] = []
        for name, adapter in adapters.items():
            if adapter.stacked:  # its matrices are folded on the fly
                continue
            layer = model.get_submodule(name)
            if fused(layer):
                handles.append(
                    Placed(layer, "forward", MethodType(forward_of(layer, _forward), layer))
                )
            elif isinstance(adapter, IA3) and adapter.at_input:
                handles.append(layer.register_forward_pre_hook(_before))
            else:
                handles.append(layer.register_forward_hook(_after))
        return handles

    @property
    def scale(self) -> Tensor:
        return self.scale_in if self.at_input else self.scale_out

    def fold(self, weight: Tensor) -> Tensor:
        scale = self.scale.to(weight.dtype)
        return weight * (scale if self.at_input != self.transposed else scale[:, None])

    def fold_bias(self, bias: Tensor) -> Tensor:
        return bias if self.at_input else bias * self.scale.to(bias.dtype)

    def initialise(self, layer: nn.Module, generator: torch.Generator) -> None:
        self.scale.fill_(1.0)

    def tensors(self) -> dict[str, Tensor]:
        scale = self.scale
        return {"ia3_l": scale[None, :] if self.at_input else scale[:, None]}  # PEFT's shapes

    @classmethod
    def to_peft(cls, config: AdapterConfig, adapters: Mapping[str, Adapter]) -> dict[str, Any]:
        mine = {name: a for name, a in adapters.items() if isinstance(a, IA3)}
        others = [name for name, adapter in mine.items() if not adapter.at_input]
        inputs = {_ending(name, others) for name, a in mine.items() if a.at_input}
        # an expression, for PEFT wants names of a list to be among target_modules, literally
        either = "|".join(map(re.escape, sorted(inputs)))
        return {
            "peft_type": "IA3",
            "feedforward_modules": f".*({either})" if inputs else [],
            "fan_in_fan_out": any(adapter.transposed for adapter in mine.values()),
            "init_ia3_weights": True,
        }

    @classmethod
    def from_peft(
        cls, fields: Mapping[str, Any], layers: list[str]
    ) -> tuple[AdapterConfig, dict[str, AdapterConfig], list[str]]:
        remarks = [
            f"adapter_config.json has an unknown option {key}={value}: ignored"
            for key, value in fields.items()
            if key not in _READ | _INERT
        ]
        wanted = fields.get("feedforward_modules") or []
        try:
            if isinstance(wanted, str):
                inputs = [name for name in layers if re.fullmatch(wanted, name)]
            else:  # anywhere in a name, not only at a dot
                inputs = [name for name in layers if name.endswith(tuple(wanted))]
        except (re.error, TypeError) as error:
            raise Refused(
                "reading adapter_config.json",
                f"feedforward_modules={wanted} are no names and no regular expression",
                "mend the file",
            ) from error
        others = set(layers) - set(inputs)
        endings = tuple(dict.fromkeys(_ending(name, others) for name in inputs))
        config = AdapterConfig.model_validate({"method": "ia3", "feedforward": endings})
        return config, dict.fromkeys(layers, config), remarks


def is_feedforward(name: str, config: AdapterConfig) -> bool:
    """Whether the layer is scaled at its input."""
    known = FEEDFORWARD if config.feedforward is None else config.feedforward
    return any(ends_with(name, item) for item in known)


def ends_with(name: str, item: str) -> bool:
    return f".{name}".endswith(f".{item}")


def _ending(name: str, others: Any) -> str:
    """The shortest end of the path, cut at a dot, that none of the others has."""
    parts = name.split(".")
    ends = (".".join(parts[-n:]) for n in range(1, len(parts) + 1))
    return next((end for end in ends if not any(o.endswith(end) for o in others)), name)


def _before(layer: Any, args: tuple[Any, ...]) -> tuple[Any, ...]:
    x = args[0]
    return (x * layer.adapter.scale.to(x.dtype), *args[1:])


def _after(layer: Any, args: tuple[Any, ...], y: Tensor) -> Tensor:
    return y * layer.adapter.scale.to(y.dtype)


def _forward(layer: Any, x: Tensor) -> Tensor:
    adapter, bias = layer.adapter, layer.bias
    dtype = product_dtype(x)
    if dtype not in (torch.bfloat16, torch.float16):
        if adapter.at_input:
            return type(layer).forward(layer, x * adapter.scale)
        return type(layer).forward(layer, x) * adapter.scale
    matrix, codes = factor(layer, dtype)
    shape = x.shape[:-1]
    bias = None if bias is None else bias.to(dtype)
    rows = x.to(dtype).reshape(-1, x.shape[-1])  # [N, in]
    y: Any = _Scaled.apply(rows, matrix, bias, adapter.scale, adapter.at_input, codes)
    return y.view(*shape, y.shape[-1])


class _Scaled(torch.autograd.Function):
    """x [N, in] times matrix [in, out], scaled at the input or the output [N, out]; the matrix is frozen.

    In autograd's own terms the backward would multiply by the matrix twice.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        matrix: Tensor | None,
        bias: Tensor | None,
        scale: Tensor,
        at_input: bool,
        codes: Any,
    ) -> Tensor:
        step = (scale - 1).to(x.dtype)
        if at_input:
            kept = x
            delta = times(x * step, matrix, codes)
        else:
            kept = times(x, matrix, codes, bias)
            delta = kept * step
        ctx.save_for_backward(kept, matrix, step)
        ctx.at_input, ctx.dtype, ctx.codes = at_input, scale.dtype, codes
        y = times(x, matrix, codes, delta)
        return y if bias is None else y + bias

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grads
        kept, matrix, step = ctx.saved_tensors
        if ctx.at_input:
            inner = times_back(grad, matrix, ctx.codes)  # of the scaled input
            grad_scale = (inner * kept).sum(0, dtype=ctx.dtype)
            return torch.addcmul(inner, inner, step), None, None, grad_scale, None, None
        grad_scale = (grad * kept).sum(0, dtype=ctx.dtype)
        scaled = torch.addcmul(grad, grad, step)
        return times_back(scaled, matrix, ctx.codes), None, None, grad_scale, None, None
