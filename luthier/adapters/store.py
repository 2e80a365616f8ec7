"""Adapter folders in PEFT's format: `adapter_config.json` and `adapter_model.safetensors`.

Tensors are named `base_model.model.<layer path>.<suffix>`; names and shapes decide whether an adapter
fits a base. What else a folder says is `facts.py`'s; what the options of a method mean in PEFT's words is
said by its class (`to_peft`, `from_peft`). Nothing unpickles.
"""

from __future__ import annotations

import pickle
import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from luthier.adapters import experts
from luthier.adapters.base import ADAPTERS, Adapter
from luthier.adapters.facts import (
    CONFIG,
    check_base,
    check_positions_of,
    own_options,
    read_adapter_config,
    write_facts,
)
from luthier.adapters.facts import base_options as base_options_of
from luthier.adapters.peft_lora import LORA
from luthier.adapters.placing import adapters_of, build, install, names_of, whole_parameters
from luthier.adapters.targets import options_of, shortest_targets
from luthier.config import AdapterConfig
from luthier.errors import Refused
from luthier.held import put
from luthier.layers import is_quantized
from luthier.stacks import stacks_of
from luthier.tensorfiles import write_tensors

WEIGHTS = "adapter_model.safetensors"
PICKLED = "adapter_model.bin"
PREFIX = "base_model.model."


@dataclass(frozen=True)
class LoadedAdapter:
    """What a folder held: the adapter's options, and remarks for the user."""

    config: AdapterConfig
    remarks: tuple[str, ...]


@dataclass
class Contents:
    """The tensors of an adapter's file."""

    parts: dict[str, dict[str, Tensor]] = field(default_factory=dict)  # layer -> suffix -> tensor
    shared: dict[str, Tensor] = field(default_factory=dict)  # of no single layer
    whole: dict[str, Tensor] = field(default_factory=dict)  # parameters of the base itself
    misfits: dict[str, str] = field(default_factory=dict)  # name -> why it does not fit


def save_adapter(
    model: nn.Module,
    folder: Path,
    config: AdapterConfig,
    base_name: str,
    base_hash: str | None,
    base_options: Mapping[str, Any] | None = None,
) -> None:
    """Write the model's adapters into `folder`, which exists or is made; see `copy_adapter`."""
    copy_adapter(model, config, base_name, base_hash, base_options)(folder)


def copy_adapter(
    model: nn.Module,
    config: AdapterConfig,
    base_name: str,
    base_hash: str | None,
    base_options: Mapping[str, Any] | None = None,
) -> Callable[[Path], None]:
    """Copy the model's adapters; what is given writes the copy into a folder, and PEFT loads it if it has the method.

    `config` holds the options of most layers; those of others become patterns. Let it write inside
    `files.publish`. Tensors are in the adapters' own type. `base_options`: how the base was made of its
    folder (`num_layers`, `init`), for whoever makes it again.
    """
    adapters = adapters_of(model)
    method = ADAPTERS[config.method]
    config = method.settle(config, adapters)
    with torch.no_grad():
        tensors = {
            f"{PREFIX}{layer}.{suffix}": tensor
            for layer, adapter in adapters.items()
            if not adapter.stacked
            for suffix, tensor in adapter.tensors().items()
        }
        stacks = {name: adapter for name, adapter in adapters.items() if adapter.stacked}
        options = method.to_peft(config, adapters)
        plain = options["peft_type"] == LORA and not options["use_dora"]
        tensors |= {f"{PREFIX}{n}": t for n, t in experts.to_file(stacks, plain).items()}
        tensors |= method.shared_tensors(adapters)
    whole = [n for p in whole_parameters(model).values() for n in names_of(model, p)]
    tensors |= {f"{PREFIX}{name}": model.get_parameter(name) for name in whole}
    # a copy each: tied parameters are one tensor, and the format wants every name to hold its own
    copies = {name: t.detach().cpu().clone().contiguous() for name, t in tensors.items()}
    modules = {name.rpartition(".")[0] for name in whole}
    layers = adapters.keys() - stacks.keys() if plain else adapters
    fields = {
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_name,
        "inference_mode": True,
        **({} if "" in adapters else {"target_modules": shortest_targets(model, layers)}),
        **({"target_parameters": experts.file_targets(model, stacks)} if stacks and plain else {}),
        "modules_to_save": _ends(model, modules) or None,
        **options,
    }
    described = _with_patterns(config, adapters)

    def write(folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        write_tensors(folder / WEIGHTS, copies)
        write_facts(folder, fields, described, base_name, base_hash, base_options)

    return write


def _with_patterns(config: AdapterConfig, adapters: Mapping[str, Adapter]) -> AdapterConfig:
    """`config` with patterns that give every layer its own rank and alpha."""

    def sizes(options: AdapterConfig) -> tuple[int, float]:
        return options.rank, options.scale_alpha

    if all(sizes(options_of(config, n)) == sizes(a.config) for n, a in adapters.items()):
        return config
    ranks = {re.escape(n): a.config.rank for n, a in adapters.items()}
    alphas = {re.escape(n): a.config.scale_alpha for n, a in adapters.items()}
    return config.model_copy(update={"rank_pattern": ranks, "alpha_pattern": alphas})


def load_adapter(
    model: nn.Module,
    folder: str | Path,
    *,
    trainable: bool = False,
    seed: int = 42,
    base_name: str | None = None,
    base_hash: str | None = None,
) -> LoadedAdapter:
    """Put the adapter of a PEFT folder on `model`, which becomes frozen but for it if `trainable`.

    `seed` decides dropout in training. `base_name` and `base_hash` say what the model is: another hash than
    the recorded one is refused, another name is a remark. Refused, with the model unchanged, for
    files that are missing or corrupt, kinds of adapters that are not supported, and tensors that do
    not fit; the message names the first.
    """
    folder = Path(folder)
    fields = read_adapter_config(folder)
    method = method_of(fields)
    made_for = fields.get("base_model_name_or_path")
    remarks = check_base(folder, made_for, base_name, base_hash)
    check_positions_of(folder, getattr(model, "config", None))
    stored = (base_options_of(folder).get("quantize") or {}).get("weights")
    if stored and not any(is_quantized(module) for module in model.modules()):
        remarks.append(
            f"the adapter was trained on the base in {stored}, here the base is in full precision; "
            f"quantize.weights={stored} gives what was trained"
        )
    tensors = read_tensors(folder)
    contents = _sort(
        _by_stack(tensors, model, fields), model, method, fields.get("modules_to_save") or ()
    )
    layers = list(contents.parts)
    config = own = own_options(folder, fields)
    if config is None:
        config, plan, more = method.from_peft(fields, layers)
        remarks += more
    else:
        plan = {name: options_of(config, name) for name in layers or [""]}
    _refuse_misfits(folder, made_for, contents.misfits, len(tensors))
    if not layers and not contents.shared and not method.shared_names:
        raise Refused(
            f"the adapter {folder}",
            f"it holds no tensor of an adapter, only {next(iter(tensors))}",
            "copy the folder again",
        )
    lost = [] if own is None else sorted(method.plan(model, own).keys() - plan.keys())
    if lost:
        raise Refused(
            f"the adapter {folder}",
            f"its file has no tensors for {len(lost)} of its layers; the first is {lost[0]}",
            "copy the folder again",
        )
    adapters = build(model, plan, seed=seed)
    _refuse_misfits(folder, made_for, _compare(contents.parts, adapters), len(tensors))
    _refuse_whole(folder, model, contents.whole, fields.get("modules_to_save"), trainable)
    with torch.no_grad():
        method.take_shared(adapters, contents.shared)
        for layer, adapter in adapters.items():
            experts.take(adapter, contents.parts.get(layer, {}))
            adapter.requires_grad_(trainable)
    install(model, adapters, contents.whole)
    with torch.no_grad():
        for name, tensor in contents.whole.items():
            put(model.get_parameter(name).requires_grad_(trainable), tensor)
    if contents.whole:
        names = ", ".join(contents.whole)
        remarks.append(f"{names}: taken from the adapter's folder, not from the base")
    if layers and "targets" in method.uses:
        targets = tuple(shortest_targets(model, adapters))
        config = config.model_copy(update={"targets": targets, "layers": "all"})
    return LoadedAdapter(config, tuple(remarks))


def method_of(fields: Mapping[str, Any]) -> type[Adapter]:
    """The method of an adapter_config.json; Refused for a type that is not supported."""
    known = {kind: method for _, method in ADAPTERS.items() for kind in method.peft_types}
    kind = str(fields["peft_type"])
    if kind not in known:
        raise Refused(
            f"an adapter of PEFT's type {kind}",
            f"supported are {', '.join(sorted(known))}",
            "let PEFT merge it into its base and use the merged model",
        )
    return known[kind]


def layer_of(name: str, suffix: str) -> str | None:
    """The layer path of the file's tensor `name`, if it ends with `suffix`."""
    path = name.removeprefix(PREFIX)
    return path.removesuffix(f".{suffix}") if path.endswith(f".{suffix}") else None


def read_tensors(folder: Path) -> dict[str, Tensor]:
    """All tensors of an adapter folder by their names in it; Refused for files that are missing or corrupt."""
    path = folder / WEIGHTS
    try:
        if path.is_file():
            tensors = load_file(path)
        elif (path := folder / PICKLED).is_file():
            tensors = torch.load(path, map_location="cpu", weights_only=True)
        else:
            names = sorted(p.name for p in folder.iterdir())
            raise Refused(
                f"the adapter folder {folder}",
                f"it has no {WEIGHTS}; it holds {', '.join(names[:8])}",
                "copy the folder again",
            )
        if not isinstance(tensors, dict) or not all(
            isinstance(t, Tensor) for t in tensors.values()
        ):
            raise ValueError("not a table of tensors")
    except (
        *(SafetensorError, pickle.UnpicklingError),
        *(OSError, RuntimeError, ValueError, EOFError, KeyError),
    ) as error:
        raise Refused(
            f"reading {path}",
            f"the file is corrupt ({str(error).splitlines()[0][:120]})",
            "copy the folder again",
        ) from error
    for name, tensor in tensors.items():
        if not tensor.isfinite().all():
            raise Refused(
                f"reading {path}", f"{name} holds NaN or infinity", "use another checkpoint"
            )
    return tensors


def _by_stack(
    tensors: Mapping[str, Tensor], model: nn.Module, fields: Mapping[str, Any]
) -> dict[str, Tensor]:
    """The file's tensors with those of fused experts under the names of their stacks."""
    bare = {name.removeprefix(PREFIX): tensor for name, tensor in tensors.items()}
    found = experts.from_file(bare, model, fields.get("target_parameters"))
    kept = tensors.keys() - {
        f"{PREFIX}{name}" for name in bare
    }  # VeRA's, which have another prefix
    return {name if name in kept else f"{PREFIX}{name}": tensor for name, tensor in found.items()}


def _sort(
    tensors: Mapping[str, Tensor],
    model: nn.Module,
    method: type[Adapter],
    modules_to_save: Collection[str],
) -> Contents:
    """The file's tensors by what they belong to. Parameters of the base that are as the base has them are
    left out (PEFT saves heads too), unless they belong to `modules_to_save`."""
    modules, stacks = dict(model.named_modules()), set(stacks_of(model))
    parameters = dict(model.named_parameters(remove_duplicate=False))
    found = Contents()
    for name, tensor in tensors.items():
        path = name.removeprefix(PREFIX)
        suffix = next((s for s in method.suffixes if path.endswith(f".{s}")), None)
        plain = path.replace(".base_layer.", ".")
        parameter = parameters.get(plain)
        if name in method.shared_names:
            found.shared[name] = tensor
        elif suffix is not None:
            layer = path.removesuffix(f".{suffix}")
            if layer not in modules and layer not in stacks:
                found.misfits[name] = "the base has no such layer"
            elif layer not in stacks and not method.accepts(modules[layer]):
                found.misfits[name] = f"this layer is a {type(modules[layer]).__name__}"
            else:
                found.parts.setdefault(layer, {})[suffix] = tensor
        elif parameter is None:
            found.misfits[name] = "neither base nor adapter has such a tensor"
        elif parameter.shape != tensor.shape:
            shapes = f"its shape is {_shape(tensor)}, the base's is {_shape(parameter)}"
            found.misfits[name] = shapes
        elif (
            _inside(plain, modules_to_save)
            or parameter.is_meta  # of a layer that is on another rank
            or not torch.equal(parameter.cpu(), tensor.to(parameter.dtype))
        ):
            found.whole[plain] = tensor
    return found


def _inside(parameter: str, modules: Collection[str]) -> bool:
    """Whether a parameter belongs to one of these modules: what PEFT compares are the ends of paths, so that
    "norm" is also an input_layernorm."""
    owner, names = "", []
    for part in parameter.split(".")[:-1]:
        owner = f"{owner}.{part}".removeprefix(".")
        names.append(owner)
    return any(name.endswith(tuple(modules)) for name in names)


def _ends(model: nn.Module, modules: Collection[str]) -> list[str]:
    """Names that mean exactly these modules as PEFT compares them (`_inside`)."""
    last = tuple({name.rpartition(".")[2] for name in modules})
    same = {name for name, _ in model.named_modules() if name.endswith(last)} if last else set()
    return sorted(last if same == set(modules) else modules)


def _compare(
    parts: Mapping[str, Mapping[str, Tensor]], adapters: Mapping[str, Adapter]
) -> dict[str, str]:
    """Tensors that are missing, too many or of another shape (name -> why)."""
    misfits = {}
    for layer, adapter in adapters.items():
        wanted = experts.tensors_of(adapter)
        has = parts.get(layer, {})
        for suffix in sorted(wanted.keys() | has.keys()):
            name = f"{PREFIX}{layer}.{suffix}"
            if suffix not in has:
                misfits[name] = "the file lacks it"
            elif suffix not in wanted:
                misfits[name] = f"{CONFIG} knows no such tensor"
            elif has[suffix].shape != wanted[suffix].shape:
                found, fit = _shape(has[suffix]), _shape(wanted[suffix])
                misfits[name] = f"its shape is {found}, {fit} would fit"
    return misfits


def _refuse_misfits(folder: Path, made_for: Any, misfits: Mapping[str, str], total: int) -> None:
    if total == 0:
        raise Refused(f"the adapter {folder}", "it holds no tensors", "copy the folder again")
    if misfits:
        first = next(iter(misfits))
        raise Refused(
            f"the adapter {folder} on this base",
            f"{len(misfits)} of its {total} tensors do not fit; the first is {first}: {misfits[first]}",
            f"give the base it was trained on: {made_for}" if made_for else "",
        )


def _refuse_whole(
    folder: Path,
    model: nn.Module,
    whole: Mapping[str, Tensor],
    modules_to_save: Collection[str] | None,
    trainable: bool,
) -> None:
    """Whole parameters of the base: those of modules_to_save can be trained on, trained biases only used."""
    for name, tensor in whole.items():
        if trainable and not _inside(name, modules_to_save or ()):
            raise Refused(
                f"going on training the adapter {folder}",
                f"it holds a tensor of the base, {name}, that is in no module of modules_to_save (PEFT's bias)",
                "merge it into its base and train a new adapter on the result",
            )
        shared = names_of(model, model.get_parameter(name))
        if any(n not in whole or not torch.equal(whole[n], tensor) for n in shared):
            raise Refused(
                f"the adapter {folder} on this base",
                f"it holds {name} of its own, but here {' and '.join(shared)} are one tensor",
                "let PEFT merge it into its base and use the merged model",
            )


def _shape(tensor: Tensor) -> str:
    return "x".join(map(str, tensor.shape))
