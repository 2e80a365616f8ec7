"""The adapter contract, and putting adapters on a model and taking them off.

An adapter is a submodule `adapter` of an otherwise untouched layer: parameters of the base keep their
names. It acts by hooks (`before`, `after`), or, if it adds something to a layer's output (`Additive`),
inside the layer's own matrix product. A method is a subclass registered in `ADAPTERS`; which layers it
may go to is `targets.py`'s, files are `store.py`'s.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from types import MethodType
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers.pytorch_utils import Conv1D

from luthier import seeding
from luthier.adapters.targets import head_name, select_targets
from luthier.batch import current_layout
from luthier.config import AdapterConfig
from luthier.errors import Failed, Refused
from luthier.registry import Registry

ADAPTERS: Registry[type[Adapter]] = Registry("adapter method")


class Adapter(nn.Module):
    """One method on one layer. Weights are float32 (float64 on a float64 base), computation is the base's.

    Subclasses override what they need; a member that is not overridden costs nothing.
    """

    uses: ClassVar[frozenset[str]] = frozenset()
    """Keys of `AdapterConfig` that the method reads; another one that is set is refused."""

    follows: ClassVar[Mapping[str, Mapping[str, int]]] = {}
    """Under tensor parallelism: style of the layer ("colwise", "rowwise") -> parameter -> axis that is cut
    like the layer's; the others are whole on every rank. Empty: the method is refused with it."""

    peft_type: ClassVar[str] = ""
    """`peft_type` in adapter_config.json; a name of our own where PEFT lacks the method."""

    suffixes: ClassVar[tuple[str, ...]] = ()
    """What may follow a layer's path in the names of the adapter file's tensors."""

    zero_at_start: ClassVar[frozenset[str]] = frozenset()
    """Parameters whose gradient is zero at the first step (LoRA's A while B is zero)."""

    def __init__(self, layer: nn.Module, config: AdapterConfig, *, name: str, seed: int) -> None:
        """Make the parameters, on the layer's device, without values; `name` is the layer's path."""
        super().__init__()
        self.config, self.name, self.seed = config, name, seed
        self.handles: list[RemovableHandle] = []

    @classmethod
    def plan(cls, model: nn.Module, config: AdapterConfig) -> dict[str, AdapterConfig]:
        """Layers to adapt -> the options of each. Refused if that is impossible."""
        return dict.fromkeys(select_targets(model, config.targets), config)

    @classmethod
    def accepts(cls, layer: nn.Module) -> bool:
        """Whether the method can adapt this kind of layer."""
        return True

    def before(self, x: Tensor) -> Tensor:
        """What enters the layer instead of x."""
        return x

    def after(self, x: Tensor, y: Tensor) -> Tensor:
        """What leaves the layer instead of y, where x entered it."""
        return y

    def fold(self, weight: Tensor) -> Tensor:
        """The layer's weight, in its own orientation, that does alone what layer and adapter do.

        `weight` is float32 or wider; so is the result.
        """
        raise Refused(
            f"folding the adapter of layer '{self.name}' into its weight",
            f"what adapter.method={self.config.method} does is no change of a weight",
            "use the base together with the adapter",
        )

    def initialise(self, layer: nn.Module, generator: torch.Generator) -> None:
        """Set the first values, once the layer's weights are read; the layer's output stays the same."""
        for parameter in self.parameters():
            nn.init.zeros_(parameter)

    def lr_scale(self, parameter: str) -> float:
        """Learning rate of the adapter's parameter of this name, as a multiple of the run's."""
        return 1.0

    def tensors(self) -> dict[str, Tensor]:
        """Tensors of the adapter's file: suffix -> tensor."""
        return {f"{name}.weight": parameter for name, parameter in self.named_parameters()}

    @classmethod
    def to_peft(cls, config: AdapterConfig, adapters: Mapping[str, Adapter]) -> dict[str, Any]:
        """Entries of adapter_config.json that only this method has; layers may differ from `config`."""
        raise TypeError(f"{cls.__name__} is not saved")

    @classmethod
    def from_peft(
        cls, fields: Mapping[str, Any], layers: list[str]
    ) -> tuple[AdapterConfig, dict[str, AdapterConfig], list[str]]:
        """adapter_config.json -> options, options of each layer, remarks. Refused if one is not supported."""
        raise TypeError(f"{cls.__name__} is not loaded")

    def new_parameter(self, layer: nn.Module, *shape: int) -> nn.Parameter:
        """A new parameter of zeros that fits the layer: its device, float32 or the layer's float64."""
        weight = next(layer.parameters())
        return nn.Parameter(torch.zeros(shape, dtype=_wide(weight.dtype), device=weight.device))

    def drop(self, x: Tensor) -> Tensor:
        """`adapter.dropout` of x [B, S, ...] or [B*S, ...], in training mode.

        Which units are dropped is a function of (seed, layer, row), so the cut into micro-batches does
        not matter. Outside a layout there are no rows, and the global generator decides.
        """
        if not self.training or self.config.dropout == 0:
            return x
        return self._drop(x)

    @torch.compiler.disable()
    def _drop(self, x: Tensor) -> Tensor:
        p, layout = self.config.dropout, current_layout()
        if layout is None:
            return F.dropout(x, p)
        batch, width = layout.document_ids.shape
        flat = x.shape[0] != batch
        if flat and x.shape[0] != batch * width:
            raise Failed(
                f"adapter.dropout={p} on layer '{self.name}'",
                f"the model regroups the tokens before it ({x.shape[0]} of {batch * width})",
                "set adapter.dropout=0, or leave this layer out of adapter.targets",
            )
        x = x.unflatten(0, (batch, width)) if flat else x
        rows = layout.rows or tuple(range(batch))
        x = seeding.dropout(x, p, seed=self.seed, name=f"{self.name}.adapter", rows=rows)
        return x.flatten(0, 1) if flat else x


class Additive(Adapter):
    """A method on linear layers that adds `delta(x)` to the layer's output."""

    @classmethod
    def accepts(cls, layer: nn.Module) -> bool:
        return isinstance(layer, nn.Linear | Conv1D)

    @abstractmethod
    def delta(self, x: Tensor) -> Tensor:
        """x [..., in] -> what is added to the layer's output, [..., out], in x's dtype."""

    def after(self, x: Tensor, y: Tensor) -> Tensor:
        return y + self.delta(x)


def attach(model: nn.Module, config: AdapterConfig, *, seed: int) -> dict[str, Adapter]:
    """Freeze `model`, put an adapter of `config.method` on each target and give it its first values.

    The model's output stays what it was. Returns layer path -> adapter. Refused, before anything is
    changed, for targets that match nothing and options that the method or the layers do not allow.
    """
    method = ADAPTERS[config.method]
    for key in sorted(config.model_fields_set - method.uses - {"method", "path"}):
        if getattr(config, key) != type(config).model_fields[key].default:
            raise Refused(
                f"adapter.{key}={getattr(config, key)}",
                f"adapter.method={config.method} has no such option",
                f"its options are {', '.join(sorted(method.uses))}",
            )
    adapters = build(model, method.plan(model, config), seed=seed)
    if config.dropout and head_name(model) in adapters:
        raise Refused(
            f"adapter.dropout={config.dropout} on the output layer '{head_name(model)}'",
            "it sees the supervised tokens of all rows together",
            "set adapter.dropout=0, or leave it out of adapter.targets",
        )
    install(model, adapters)
    initialise(model, seed=seed)
    return adapters


def build(model: nn.Module, plan: Mapping[str, AdapterConfig], *, seed: int) -> dict[str, Adapter]:
    """Adapters for the layers of `plan`, not yet on the model and without values."""
    return {
        name: ADAPTERS[config.method](model.get_submodule(name), config, name=name, seed=seed)
        for name, config in plan.items()
    }


def install(model: nn.Module, adapters: Mapping[str, Adapter]) -> None:
    """Freeze the model and put the adapters on their layers, in the layers' mode (train or eval)."""
    if adapters_of(model):
        raise Refused(
            "an adapter for this model", "it carries one already", "merge or detach that one first"
        )
    model.requires_grad_(False)
    for name, adapter in adapters.items():
        layer = model.get_submodule(name)
        layer.adapter = adapter.train(layer.training)
        kind = type(adapter)
        if kind.before is not Adapter.before:
            adapter.handles.append(layer.register_forward_pre_hook(_before))
        if isinstance(adapter, Additive) and type(layer) in (nn.Linear, Conv1D):
            layer.forward = MethodType(_forward, layer)
        elif kind.after is not Adapter.after:
            adapter.handles.append(layer.register_forward_hook(_after))


def initialise(model: nn.Module, *, seed: int) -> None:
    """First values of all adapters, as a function of (seed, layer path) alone."""
    with torch.no_grad():
        for name, adapter in adapters_of(model).items():
            draw = seeding.generator(seed, "adapter", name)
            adapter.initialise(model.get_submodule(name), draw)


def detach(model: nn.Module) -> None:
    """Take the adapters off. The base is as it was, still frozen."""
    for name, adapter in adapters_of(model).items():
        layer = model.get_submodule(name)
        for handle in adapter.handles:
            handle.remove()
        if getattr(vars(layer).get("forward"), "__func__", None) is _forward:
            del layer.forward
        del layer.adapter


def fold_into(model: nn.Module) -> None:
    """Fold every adapter into its layer's weight, in float32 and then rounded once, and take it off.

    Call it on a base in its original precision. Refused, with the model unchanged, for methods that are
    no change of a weight and for weights that another layer shares.
    """
    adapters = adapters_of(model)
    weights = {name: _weight(model, name) for name in adapters}
    for name, weight in weights.items():
        paths = names_of(model, weight)
        if len(paths) > 1:
            raise Refused(
                f"folding the adapter of layer '{name}' into its weight",
                f"the weight is shared: {' and '.join(paths)} are one tensor",
                "use the base together with the adapter, or train without this target",
            )
    with torch.no_grad():
        for name, weight in weights.items():
            weight.copy_(adapters[name].fold(weight.to(_wide(weight.dtype))))
    detach(model)


def adapters_of(model: nn.Module) -> dict[str, Adapter]:
    """Layer path -> its adapter, in the model's order."""
    return {
        path.removesuffix("adapter").removesuffix("."): module
        for path, module in model.named_modules()
        if isinstance(module, Adapter)
    }


def adapter_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Path in the model -> parameter, of all adapters."""
    return {path: parameter for path, (_, _, parameter) in _parameters(model).items()}


def lr_scales(model: nn.Module) -> dict[str, float]:
    """Path in the model -> learning-rate multiple, of all adapters' parameters."""
    return {path: adapter.lr_scale(name) for path, (adapter, name, _) in _parameters(model).items()}


def count_parameters(model: nn.Module) -> tuple[int, int]:
    """(trained, all) numbers in the model's parameters; what is shared counts once."""
    sizes = [(p.requires_grad, p.numel()) for p in model.parameters()]
    return sum(n for trained, n in sizes if trained), sum(n for _, n in sizes)


def names_of(model: nn.Module, parameter: nn.Parameter) -> list[str]:
    """All paths of one parameter; several where layers share it (tied embeddings)."""
    every = model.named_parameters(remove_duplicate=False)
    return [path for path, other in every if other is parameter]


def _parameters(model: nn.Module) -> dict[str, tuple[Adapter, str, nn.Parameter]]:
    return {
        f"{layer}.adapter.{name}".removeprefix("."): (adapter, name, parameter)
        for layer, adapter in adapters_of(model).items()
        for name, parameter in adapter.named_parameters()
    }


def _weight(model: nn.Module, name: str) -> nn.Parameter:
    return model.get_parameter(f"{name}.weight".removeprefix("."))


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _before(layer: Any, args: tuple[Any, ...]) -> tuple[Any, ...]:
    return (layer.adapter.before(args[0]), *args[1:])


def _after(layer: Any, args: tuple[Any, ...], output: Any) -> Any:
    if isinstance(output, tuple):  # a decoder layer may give more than its hidden states
        return (layer.adapter.after(args[0], output[0]), *output[1:])
    return layer.adapter.after(args[0], output)


def _forward(layer: Any, x: Tensor) -> Tensor:
    """A linear layer's forward with an additive adapter.

    In half precision the sum has to be formed before it is rounded: a rounded y lies on its grid, and a
    delta below half a step, as all are at the start of training, would always be rounded away. The
    matrix product accumulates in float32, so the delta goes in there.
    """
    adapter, weight, bias = layer.adapter, layer.weight, layer.bias
    device = x.device.type
    autocast = torch.is_autocast_enabled(device)
    dtype = torch.get_autocast_dtype(device) if autocast else x.dtype
    if dtype not in (torch.bfloat16, torch.float16):
        return adapter.after(x, type(layer).forward(layer, x))
    delta = adapter.delta(x)  # [..., out]
    matrix = weight if isinstance(layer, Conv1D) else weight.t()  # [in, out]
    y = torch.addmm(delta.flatten(0, -2), x.flatten(0, -2), matrix).view(delta.shape)
    return y if bias is None else y + bias.to(y.dtype)
