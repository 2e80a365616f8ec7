"""Adapter folders in PEFT's format: `adapter_config.json` and `adapter_model.safetensors`.

Tensors are named `base_model.model.<layer path>.<suffix>`; names and shapes decide whether an adapter
fits a base. What PEFT would not understand (the base's hash) stands beside, in `luthier.json`. What the
options of a method mean is said by its class (`to_peft`, `from_peft`). Nothing unpickles.
"""

from __future__ import annotations

import json
import pickle
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from luthier.adapters.base import ADAPTERS, Adapter, adapters_of, build, install, names_of
from luthier.adapters.targets import shortest_targets
from luthier.config import AdapterConfig
from luthier.errors import Refused
from luthier.files import write_json

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
PICKLED = "adapter_model.bin"
FACTS = "luthier.json"
PREFIX = "base_model.model."

Parts = dict[str, dict[str, Tensor]]  # layer path -> suffix -> tensor


@dataclass(frozen=True)
class LoadedAdapter:
    """What a folder held: the adapter's options, and remarks for the user."""

    config: AdapterConfig
    remarks: tuple[str, ...]


def save_adapter(
    model: nn.Module,
    folder: Path,
    config: AdapterConfig,
    base_name: str,
    base_hash: str | None,
    base_options: Mapping[str, Any] | None = None,
) -> None:
    """Write the model's adapters into `folder`, which exists or is made; PEFT loads it.

    `config` holds the options of most layers; those of others become patterns. Call it inside
    `files.publish`. Tensors are in the adapters' own type. `base_options`: how the base was made of its
    folder (`num_layers`, `init`), for whoever makes it again.
    """
    adapters = adapters_of(model)
    method = ADAPTERS[config.method]
    tensors = {
        f"{PREFIX}{layer}.{suffix}": tensor.detach().cpu().contiguous()
        for layer, adapter in adapters.items()
        for suffix, tensor in adapter.tensors().items()
    }
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    fields = {
        "peft_type": method.peft_type,
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_name,
        "target_modules": shortest_targets(model, adapters),
        "inference_mode": True,
        **method.to_peft(config, adapters),
    }
    write_json(folder / CONFIG, fields)
    facts = {
        "format": 1,
        "base_name": base_name,
        "base_hash": base_hash,
        "base_options": dict(base_options or {}),
    }
    write_json(folder / FACTS, facts)


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
    method = _method(fields)
    made_for = fields.get("base_model_name_or_path")
    remarks = check_base(folder, made_for, base_name, base_hash)
    tensors = _read_tensors(folder)
    parts, whole, misfits = _sort(tensors, model, method)
    config, plan, more = method.from_peft(fields, list(parts))
    _refuse_misfits(folder, made_for, misfits, len(tensors))
    adapters = build(model, plan, seed=seed)
    _refuse_misfits(folder, made_for, _compare(parts, adapters), len(tensors))
    _refuse_whole(folder, model, list(whole), trainable)
    install(model, adapters)
    with torch.no_grad():
        for layer, adapter in adapters.items():
            for suffix, tensor in adapter.tensors().items():
                tensor.copy_(parts[layer][suffix])
            adapter.requires_grad_(trainable)
        for name, tensor in whole.items():
            model.get_parameter(name).copy_(tensor)
    if whole:
        remarks.append(f"{', '.join(whole)}: taken from the adapter's folder, not from the base")
    targets = tuple(shortest_targets(model, adapters))
    return LoadedAdapter(config.model_copy(update={"targets": targets}), (*remarks, *more))


def load_tensors(model: nn.Module, folder: Path) -> None:
    """Copy the tensors that `save_adapter` wrote into the adapters that `model` has, bit for bit."""
    saved = _read_tensors(folder)
    with torch.no_grad():
        for layer, adapter in adapters_of(model).items():
            for suffix, tensor in adapter.tensors().items():
                tensor.copy_(saved[f"{PREFIX}{layer}.{suffix}"])


def read_adapter_config(folder: Path) -> dict[str, Any]:
    """adapter_config.json of a PEFT folder; Refused when there is none."""
    if not folder.is_dir():
        raise Refused(f"the adapter folder {folder}", "there is no such folder", "check the path")
    path = folder / CONFIG
    if not path.is_file():
        names = sorted(p.name for p in folder.iterdir())
        raise Refused(
            f"the adapter folder {folder}",
            f"it has no {CONFIG}; it holds {', '.join(names[:8]) or 'nothing'}",
            "give a folder in PEFT's format",
        )
    fields = _read_json(path)
    if not fields.get("peft_type"):
        raise Refused(f"reading {path}", "it has no peft_type", "give a folder in PEFT's format")
    return fields


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text("utf-8"))
        if not isinstance(value, dict):
            raise ValueError("not an object")
    except (OSError, ValueError) as error:
        raise Refused(
            f"reading {path}", f"it is no JSON object ({error})", "copy the folder again"
        ) from error
    return value


def _method(fields: Mapping[str, Any]) -> type[Adapter]:
    known = {method.peft_type: method for _, method in ADAPTERS.items()}
    kind = str(fields["peft_type"])
    if kind not in known:
        raise Refused(
            f"an adapter of PEFT's type {kind}",
            f"supported are {', '.join(sorted(known))}",
            "let PEFT merge it into its base and use the merged model",
        )
    return known[kind]


def check_base(
    folder: Path, made_for: Any, base_name: str | None, base_hash: str | None
) -> list[str]:
    """Refuse a base of another hash than the one recorded in `folder`; another name is a remark."""
    facts = _read_json(folder / FACTS) if (folder / FACTS).is_file() else {}
    recorded = facts.get("base_hash")
    if recorded and base_hash and recorded != base_hash:
        raise Refused(
            f"the adapter {folder} on {base_name or 'this base'}",
            f"it was trained on a base with other weights (hash {recorded[:12]}, here {base_hash[:12]})",
            f"give the base it was trained on: {made_for}",
        )
    if made_for and base_name and made_for != base_name:
        return [f"the adapter was trained on a base named {made_for}, here it is {base_name}"]
    return []


def base_options(folder: Path) -> dict[str, Any]:
    """How the adapter's base was made of its folder: `num_layers` and `init` as in `model`."""
    facts = _read_json(folder / FACTS) if (folder / FACTS).is_file() else {}
    return {"num_layers": None, "init": "pretrained", **(facts.get("base_options") or {})}


def layers_of_base(folder: Path) -> dict[str, int | None]:
    """`num_layers` of the base for use without the run's config. Refused where no folder holds that base."""
    options = base_options(folder)
    if options["init"] == "random":
        raise Refused(
            f"the adapter {folder}",
            "it was trained on random weights (model.init=random), which are in no folder",
            "use it through the config of its run",
        )
    return {"num_layers": options["num_layers"]}


def _read_tensors(folder: Path) -> dict[str, Tensor]:
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


def _sort(
    tensors: Mapping[str, Tensor], model: nn.Module, method: type[Adapter]
) -> tuple[Parts, dict[str, Tensor], dict[str, str]]:
    """The file's tensors: those of adapters by layer and suffix, whole parameters of the base, and misfits
    (name -> why)."""
    modules = dict(model.named_modules())
    parameters = dict(model.named_parameters(remove_duplicate=False))
    parts: Parts = {}
    whole: dict[str, Tensor] = {}
    misfits: dict[str, str] = {}
    for name, tensor in tensors.items():
        path = name.removeprefix(PREFIX)
        suffix = next((s for s in method.suffixes if path.endswith(f".{s}")), None)
        parameter = parameters.get(path.replace(".base_layer.", "."))
        if suffix is not None:
            layer = path.removesuffix(f".{suffix}")
            if layer not in modules:
                misfits[name] = "the base has no such layer"
            elif not method.accepts(modules[layer]):
                misfits[name] = f"this layer is a {type(modules[layer]).__name__}"
            else:
                parts.setdefault(layer, {})[suffix] = tensor
        elif parameter is None:
            misfits[name] = "neither base nor adapter has such a tensor"
        elif parameter.shape != tensor.shape:
            misfits[name] = f"its shape is {_shape(tensor)}, the base's is {_shape(parameter)}"
        elif not torch.equal(parameter.cpu(), tensor.to(parameter.dtype)):  # PEFT saves heads too
            whole[path.replace(".base_layer.", ".")] = tensor
    return parts, whole, misfits


def _compare(parts: Parts, adapters: Mapping[str, Adapter]) -> dict[str, str]:
    """Tensors that are missing, too many or of another shape (name -> why)."""
    misfits = {}
    for layer, adapter in adapters.items():
        wanted = adapter.tensors()
        for suffix in sorted(wanted.keys() | parts[layer].keys()):
            name = f"{PREFIX}{layer}.{suffix}"
            if suffix not in parts[layer]:
                misfits[name] = "the file lacks it"
            elif suffix not in wanted:
                misfits[name] = f"{CONFIG} knows no such tensor"
            elif parts[layer][suffix].shape != wanted[suffix].shape:
                found, fit = _shape(parts[layer][suffix]), _shape(wanted[suffix])
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


def _refuse_whole(folder: Path, model: nn.Module, names: list[str], trainable: bool) -> None:
    """Whole parameters of the base (PEFT's modules_to_save, trained biases) can be used, not trained on."""
    for name in names:
        shared = names_of(model, model.get_parameter(name))
        if trainable:
            raise Refused(
                f"going on training the adapter {folder}",
                f"it holds a whole tensor of the base, {name} (PEFT's modules_to_save or bias)",
                "merge it into its base and train a new adapter on the result",
            )
        if len(shared) > 1:
            raise Refused(
                f"the adapter {folder} on this base",
                f"it holds {name} of its own, but here {' and '.join(shared)} are one tensor",
                "let PEFT merge it into its base and use the merged model",
            )


def _shape(tensor: Tensor) -> str:
    return "x".join(map(str, tensor.shape))
