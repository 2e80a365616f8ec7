"""Putting adapters on a model, taking them off, folding them into its weights, and listing them.

Beside adapters a model may train whole modules (`modules_to_save`): their parameters stay where they are and
are trained in place; what they were is kept, so that `detach` gives the base back.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from luthier import seeding
from luthier.adapters import experts
from luthier.adapters.base import ADAPTERS, Adapter, Additive, Removable, wide
from luthier.adapters.fused import fused, install_fused
from luthier.adapters.targets import select_whole
from luthier.config import GENERAL, AdapterConfig
from luthier.errors import Refused
from luthier.held import filled, lent, whole_of
from luthier.layers import dense_weight, head_name, is_quantized, is_transposed
from luthier.stacks import stacks_of

COMMON = frozenset({"layers", "modules_to_save", "form"}) | GENERAL  # keys of every method
_STATE = "luthier_adapted"  # attribute of a model that carries adapters


class Adapted:
    """What `install` changed besides the layers themselves."""

    def __init__(self, handles: list[Removable], whole: dict[str, Tensor]) -> None:
        self.handles = handles
        self.whole = whole  # path of a parameter that is trained whole -> its value in the base


def attach(model: nn.Module, config: AdapterConfig, *, seed: int) -> dict[str, Adapter]:
    """Freeze `model`, put an adapter of `config.method` on each target and give it its first values.

    The model's output stays what it was. Returns layer path -> adapter. Refused, before anything is
    changed, for targets that match nothing and options that the method or the layers do not allow.
    """
    plan = plan_of(model, config)
    adapters = build(model, plan, seed=seed)
    install(model, adapters, select_whole(model, config.modules_to_save, plan))
    initialise(model, seed=seed)
    return adapters


def plan_of(model: nn.Module, config: AdapterConfig) -> dict[str, AdapterConfig]:
    """Layers to adapt -> the options of each; refuses what `attach` refuses. `model` may be on meta."""
    method = ADAPTERS[config.method]
    for key, value in config.changed().items():
        if key not in method.uses | COMMON:
            raise Refused(
                f"adapter.{key}={value}",
                f"adapter.method={config.method} has no such option",
                f"its options are {', '.join(sorted(method.uses | COMMON - GENERAL - {'form'}))}",
            )
    plan = method.plan(model, config)
    if config.dropout and head_name(model) in plan:
        raise Refused(
            f"adapter.dropout={config.dropout} on the output layer '{head_name(model)}'",
            "it sees the supervised tokens of all rows together",
            "set adapter.dropout=0, or leave it out of adapter.targets",
        )
    stacks = sorted(plan.keys() & set(stacks_of(model)))
    if config.dropout and stacks:
        raise Refused(
            f"adapter.dropout={config.dropout} on the experts '{stacks[0]}'",
            "tokens come to an expert regrouped, and no row of the batch decides what is dropped there",
            "set adapter.dropout=0, or name adapter.targets without the experts",
        )
    select_whole(model, config.modules_to_save, plan)
    return plan


def build(model: nn.Module, plan: Mapping[str, AdapterConfig], *, seed: int) -> dict[str, Adapter]:
    """Adapters for the layers of `plan`, not yet on the model and without values."""
    stacks = set(stacks_of(model))
    adapters = {
        name: experts.make(ADAPTERS[config.method], model, name, config, seed)
        if name in stacks
        else ADAPTERS[config.method](model.get_submodule(name), config, name=name, seed=seed)
        for name, config in plan.items()
    }
    for adapter in list(adapters.values())[:1]:
        adapter.share(model, adapters)
    return adapters


def install(model: nn.Module, adapters: Mapping[str, Adapter], whole: Collection[str] = ()) -> None:
    """Freeze the model and put the adapters on their layers, in the layers' mode (train or eval).

    `whole`: paths of parameters of the base that are trained beside them.
    """
    if adapters_of(model):
        raise Refused(
            "an adapter for this model", "it carries one already", "merge or detach that one first"
        )
    model.requires_grad_(False)
    chosen = {id(model.get_parameter(name)) for name in whole}
    # by the model's own names: tied parameters are one, and would be trained twice under two
    kept = {n: whole_of(p).detach().clone() for n, p in model.named_parameters() if id(p) in chosen}
    for name in kept:
        model.get_parameter(name).requires_grad_(True)
    stacks = {name: adapter for name, adapter in adapters.items() if adapter.stacked}
    handles = _install_stacks(model, stacks)
    for name, adapter in adapters.items():
        if adapter.stacked:
            continue
        layer = model.get_submodule(name)
        layer.adapter = adapter.train(layer.training)
        kind = type(adapter)
        if kind.before is not Adapter.before:
            adapter.handles.append(layer.register_forward_pre_hook(_before))
        if isinstance(adapter, Additive) and fused(layer):
            adapter.handles.append(install_fused(layer))
        elif kind.after is not Adapter.after:
            adapter.handles.append(layer.register_forward_hook(_after))
    handles += next(iter(adapters.values())).connect(model, adapters) if adapters else []
    setattr(model, _STATE, Adapted(handles, kept))


def _install_stacks(model: nn.Module, adapters: Mapping[str, Adapter]) -> list[Removable]:
    """Put the adapters of fused experts on the modules that hold these."""
    owners: dict[str, dict[str, Adapter]] = {}
    for name, adapter in adapters.items():
        owner, _, stack = name.rpartition(".")
        owners.setdefault(owner, {})[stack] = adapter
    placed = (experts.place(model.get_submodule(owner), own) for owner, own in owners.items())
    return [handle for handles in placed for handle in handles]


def initialise(model: nn.Module, *, seed: int) -> None:
    """First values of all adapters, as a function of (seed, layer path) alone."""
    with torch.no_grad():
        for name, adapter in adapters_of(model).items():
            if any(parameter.is_meta for parameter in adapter.parameters()):
                continue  # of a layer that is on another rank
            if adapter.stacked:
                with filled(model.get_submodule(name.rpartition(".")[0])):
                    experts.initialise(model, adapter, seed)
                continue
            draw = seeding.generator(seed, "adapter", name)
            with nullcontext() if name else lent(model):  # of all layers: it computes with the base
                adapter.initialise(model.get_submodule(name), draw)


def detach(model: nn.Module) -> None:
    """Take the adapters off. The base is as it was, still frozen."""
    state = _state(model)
    with torch.no_grad():
        for name, value in state.whole.items():
            model.get_parameter(name).requires_grad_(False).copy_(value)
    _take_off(model)


def fold_into(model: nn.Module) -> None:
    """Fold every adapter into its layer's weight, in float32 and then rounded once, and take it off.

    Call it on a base in its original precision; where a layer is quantised its weight is dequantised, changed and
    quantised again, which loses some of the change. Modules that were trained whole stay as they are. Refused,
    with the model unchanged, for methods that are no change of a weight and for weights that another
    layer shares.
    """
    adapters = adapters_of(model)
    for name, adapter in adapters.items():
        if type(adapter).fold is Adapter.fold:
            adapter.fold(torch.empty(0))  # refuses, with the method's reason
        owner, _, last = name.rpartition(".")
        holder = model.get_submodule(owner)
        if is_quantized(getattr(holder, last)):
            continue  # codes are of one layer
        paths = names_of(model, model.get_parameter(name if adapter.stacked else f"{name}.weight"))
        if len(paths) > 1:
            raise Refused(
                f"folding the adapter of layer '{name}' into its weight",
                f"the weight is shared: {' and '.join(paths)} are one tensor",
                "use the base together with the adapter, or train without this target",
            )
    with torch.no_grad():
        for name, adapter in adapters.items():
            if adapter.stacked:
                owner, _, stack = name.rpartition(".")
                experts.fold(model.get_submodule(owner), stack, adapter)
                continue
            layer: Any = model.get_submodule(name)
            if is_quantized(layer):
                dense = dense_weight(layer, torch.float32)  # [out, in]
                layer.load_from(adapter.fold(dense.t() if is_transposed(layer) else dense))
            else:
                layer.weight.copy_(adapter.fold(layer.weight.to(wide(layer.weight.dtype))))
            bias = layer.bias
            if bias is not None:
                bias.copy_(adapter.fold_bias(bias.to(wide(bias.dtype))))
    _take_off(model)


def adapters_of(model: nn.Module) -> dict[str, Adapter]:
    """Layer path -> its adapter, in the model's order; "" is the model itself."""
    return {
        module.name: module
        for path, module in model.named_modules()
        if isinstance(module, Adapter) and path == module.path
    }


def adapter_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Path in the model -> parameter, of all adapters."""
    return {path: parameter for path, (_, _, parameter) in _parameters(model).items()}


def whole_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Path -> parameter of the base that is trained beside the adapters."""
    state = getattr(model, _STATE, None)
    return {} if state is None else {name: model.get_parameter(name) for name in state.whole}


def lr_scales(model: nn.Module) -> dict[str, float]:
    """Path in the model -> learning-rate multiple, of all adapters' parameters."""
    return {path: adapter.lr_scale(name) for path, (adapter, name, _) in _parameters(model).items()}


def retract(model: nn.Module) -> None:
    """`retract` of all adapters; for use after each step of the optimiser."""
    with torch.no_grad():
        for adapter in adapters_of(model).values():
            adapter.retract()


def names_of(model: nn.Module, parameter: nn.Parameter) -> list[str]:
    """All paths of one parameter; several where layers share it (tied embeddings)."""
    every = model.named_parameters(remove_duplicate=False)
    return [path for path, other in every if other is parameter]


def _parameters(model: nn.Module) -> dict[str, tuple[Adapter, str, nn.Parameter]]:
    return {
        f"{adapter.path}.{name}": (adapter, name, parameter)
        for adapter in adapters_of(model).values()
        for name, parameter in adapter.named_parameters()
    }


def _state(model: nn.Module) -> Adapted:
    return getattr(model, _STATE, None) or Adapted([], {})


def _take_off(model: nn.Module) -> None:
    for handle in _state(model).handles:
        handle.remove()
    for adapter in adapters_of(model).values():
        for handle in adapter.handles:
            handle.remove()
        adapter.handles.clear()
        owner = model.get_submodule(
            adapter.name.rpartition(".")[0] if adapter.stacked else adapter.name
        )
        if hasattr(owner, "adapter"):  # one for all stacks of a module
            del owner.adapter
    for parameter in whole_parameters(model).values():
        parameter.requires_grad_(False)
    if hasattr(model, _STATE):
        delattr(model, _STATE)


def _before(layer: Any, args: tuple[Any, ...]) -> tuple[Any, ...]:
    return (layer.adapter.before(args[0]), *args[1:])


def _after(layer: Any, args: tuple[Any, ...], output: Any) -> Any:
    if isinstance(output, tuple):  # a decoder layer may give more than its hidden states
        return (layer.adapter.after(args[0], output[0]), *output[1:])
    return layer.adapter.after(args[0], output)
