"""Models into memory and back to disk, in Hugging Face's format.

A folder is checked by `folder.py` before anything is built; afterwards every tensor must have been there,
have fitted and be finite. Nothing of transformers' own prints reaches the terminal. Tokenizers are read
by `tokenizer.py`, adapters saved by `adapters/store.py`; what is saved here is the base.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Collection
from pathlib import Path
from typing import Any, cast

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from luthier.config import ModelConfig
from luthier.errors import Refused
from luthier.files import write_json
from luthier.held import Way
from luthier.models import attention, folder, misfits, rotary
from luthier.models.folder import fingerprint as fingerprint
from luthier.models.folder import quiet as quiet
from luthier.models.reading import LeaveOut, Reading, Rows, unmapped
from luthier.seeding import derive

ADAPTER = ".adapter."  # in the name of every tensor that an adapter adds


def resolve_device(name: str) -> torch.device:
    """`auto` (a GPU if there is one), `cpu`, `cuda` or `gpu`, `cuda:1`, ...; Refused when it is not there."""
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    if name == "auto":
        return accelerator or torch.device("cpu")
    asked = f"model.device={name} was asked for"
    try:
        device = torch.device("cuda" if name == "gpu" else name)
    except RuntimeError as error:
        raise Refused(asked, "that is no device", "use auto, cpu, cuda or cuda:0") from error
    if device.type == "cpu":
        return device
    if accelerator is None or device.type != accelerator.type:
        found = "none" if accelerator is None else accelerator.type
        raise Refused(
            asked, f"PyTorch sees no such device here (accelerator: {found})", "use cpu or auto"
        )
    count = torch.accelerator.device_count()
    if device.index is not None and device.index >= count:
        raise Refused(
            asked, f"there are {count}", f"use {device.type}:0 to {device.type}:{count - 1}"
        )
    return device


def resolve_dtype(name: str, config: PretrainedConfig, device: torch.device) -> torch.dtype:
    """`model.dtype` as a torch dtype.

    `auto`: bfloat16 on a GPU that computes fast in it. Elsewhere float32 for float32 checkpoints, and
    for half-precision ones bfloat16 on CPU (which computes slowly in float16) and float16 on a GPU
    without bfloat16. `config.dtype` tells what the checkpoint is; without it, float32.
    """
    if name != "auto":
        return getattr(torch, name)
    dtype = config.dtype or torch.float32
    stored = getattr(torch, dtype) if isinstance(dtype, str) else dtype
    if device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False):
        return torch.bfloat16
    if stored not in (torch.float16, torch.bfloat16):
        return torch.float32
    return torch.float16 if device.type == "cuda" else torch.bfloat16


def build_model(
    config: ModelConfig,
    *,
    seed: int,
    train: bool = False,
    quantization: Any = None,
    leave_out: LeaveOut | None = None,
    ways: Collection[Way] = (),
) -> PreTrainedModel:
    """The model of `config` in eval mode on its device, attention installed (`attention.install`).

    Everything that can be refused is refused before weights are read: device, folder, family, shards.
    Afterwards: tensors that were missing, left over, of another shape, or not finite. `seed` decides
    the values for `init=random`. `train`: gradients will be needed, which not every kernel offers.
    `quantization` is a `quantize.loading.Quantization`: layers are quantised as their weights are read. Layers
    that `leave_out` names stay on meta, where nothing is quantised and values are read, not drawn. With `ways` there
    matrices that are read are held by several ranks (`held.py`).
    """
    device = resolve_device(config.device)
    path = folder.find_folder(config.path, code=config.trust_remote_code)
    made = load_config(path, trust_remote_code=config.trust_remote_code)
    if config.rope_scaling is not None:
        rotary.scale(made, config.rope_scaling)
    files = folder.weight_files(path) if config.init == "pretrained" else []
    remote = {"trust_remote_code": config.trust_remote_code}
    with quiet():
        check_family(made)
        if made.dtype is None and files:
            made.dtype = _stored_dtype(files[0])
        _check_quantised(path, made, quantization)
        dtype = resolve_dtype(config.dtype, made, device)
        layers = _shorten(made, config.num_layers)
        part = leave_out and Reading(leave_out)
        known = type(made) in cast(Any, AutoModelForCausalLM._model_mapping)
        if config.init == "random" or quantization is not None or not known:
            part = None
        if config.init == "random":
            model = _random(made, seed, dtype, remote)
            if quantization is not None:
                quantization.convert(model)
        else:
            accept = seed if config.misfits == "accept" else None
            if part is not None:  # it reads its own layers only
                ways = [way for way in ways if way.axis != "pipeline"]
            if ways and quantization is not None:
                quantization.ways, quantization.device = ways, device
            elif ways and accept is None:
                quantization = Rows(ways, device)
            model = _pretrained(path, made, dtype, layers, remote, quantization, accept, part)
        model.to(device).eval()  # pyright: ignore[reportCallIssue, reportArgumentType]
        attention.install(model, config.attention, train=train)
    if part is not None:
        part.put_back()
    return model


def blueprint(config: PretrainedConfig, name: str) -> PreTrainedModel:
    """The model of `config` without values. Refused, naming model `name`, where its family cannot build it."""
    try:
        with torch.device("meta"), quiet():
            return AutoModelForCausalLM.from_config(copy.deepcopy(config))
    except (ValueError, TypeError, RuntimeError, AttributeError, KeyError) as error:
        raise Refused(
            f"model '{name}' was asked for",
            f"no model can be built by its config.json: {folder.first_line(error)}",
            "correct the file",
        ) from error


def check_family(config: PretrainedConfig) -> None:
    """Refuse a family that this house's attention cannot serve, by its config alone. Remote code is looked at when
    it is there."""
    classes = cast(Any, AutoModelForCausalLM._model_mapping)
    if type(config) in classes:
        attention.check_family(classes[type(config)], config)


def load_config(path: str | Path, *, trust_remote_code: bool = False) -> PretrainedConfig:
    """config.json of a folder or hub name. Refused for a family that transformers does not know, or remote
    code that is not allowed."""
    where = folder.find_folder(path, code=trust_remote_code)
    folder.read_config(where, code=trust_remote_code)
    with quiet():
        try:
            return AutoConfig.from_pretrained(where, trust_remote_code=trust_remote_code)
        except (ValueError, TypeError, KeyError, OSError, StrictDataclassError) as error:
            raise Refused(
                f"model '{where}' was asked for",
                f"its config.json is not valid for its family: {folder.first_line(error)}",
                "mend the file",
            ) from error


def save_model(
    model: PreTrainedModel,
    target: Path,
    tokenizer: PreTrainedTokenizerBase | None = None,
    *,
    dtype: torch.dtype | None = None,
    pack: Any = None,
) -> None:
    """Write `model` without its adapters as a Hugging Face folder that plain transformers loads.

    To be called inside `files.publish`. `dtype` is that of the saved weights (default: the model's). A quantised
    model needs `pack`, which is `quantize.folders.pack`.
    """
    state = {
        name: t.detach() for name, t in model.state_dict().items() if ADAPTER not in f".{name}"
    }
    if dtype is not None:
        made: dict[int, Tensor] = {}  # tied tensors stay one tensor
        for name, tensor in state.items():
            if tensor.is_floating_point():
                state[name] = made.setdefault(tensor.data_ptr(), tensor.to(dtype))
    fields = None
    if pack is not None:
        state, fields = pack(model, state)
    if fields is not None:
        model.config.quantization_config = fields
    kept = model.config.dtype  # save_pretrained writes the model's own into it
    with quiet():
        model.save_pretrained(target, state_dict=state)
        model.config.dtype = kept
        if fields is not None:
            vars(model.config).pop("quantization_config")
        if dtype is not None:
            stored = folder.read_json(target / "config.json", target)
            write_json(target / "config.json", stored | {"dtype": str(dtype).split(".")[1]})
        if tokenizer is not None:
            tokenizer.save_pretrained(target)


def _pretrained(
    path: Path,
    config: PretrainedConfig,
    dtype: torch.dtype,
    layers: int | None,
    remote: dict,
    quantization: Any,
    accept: int | None = None,
    part: Reading | None = None,
) -> PreTrainedModel:
    """Read the weights; `layers` is the checkpoint's number of layers where fewer are built. `accept`: the seed of
    tensors that the checkpoint has not, which are refused without it."""
    maker: Any = AutoModelForCausalLM
    kind: Any = cast(Any, maker._model_mapping).get(type(config), None)
    if part is not None:
        maker, remote = part.class_of(kind), {}
    source: dict[str, Any] = {"pretrained_model_name_or_path": path, **remote}
    try:
        files = folder.weight_files(path)
        own = kind is not None and not remote.get("trust_remote_code")  # no code of the folder
        if quantization is not None and own and files[0].suffix == ".safetensors":
            maker, source = kind if part is None else maker, unmapped(path, files)
        made: Any = maker.from_pretrained(
            **source,
            config=config,
            dtype=dtype,
            attn_implementation=attention.NAME,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # they are refused below, by name
            quantization_config=quantization,
        )
        model, info = made
        model.name_or_path = model.config.name_or_path = str(path)
    except (RuntimeError, ValueError, OSError, SafetensorError) as error:
        raise Refused(
            f"the weights of '{path}' were asked for",
            f"they cannot be read: {folder.first_line(error)}",
            "copy or download the folder again",
        ) from error
    unexpected = set(info["unexpected_keys"])
    if quantization is not None and not isinstance(quantization, Rows):
        unexpected -= quantization.tensors(model)
    if layers is not None:
        built = config.get_text_config().num_hidden_layers
        unexpected = {name for name in unexpected if not _later_layer(name, built)}
    if part is not None:
        model.__class__ = kind
        unexpected = {name for name in unexpected if not part.skipped(name)}
    faults = {
        "missing": sorted(info["missing_keys"]),
        "unexpected": sorted(unexpected),
        "of another shape": sorted(key[0] for key in info["mismatched_keys"]),
    }
    found = [misfits.listed(what, names) for what, names in faults.items() if names]
    if found and accept is None:
        raise Refused(
            f"the weights of '{path}' were asked for",
            f"they do not fit its config.json: {'; '.join(found)}",
            "give a whole model, with the config.json it was saved with (for full fine-tuning, "
            "model.misfits=accept draws anew what is missing and leaves out the rest)",
        )
    if found and accept is not None:
        misfits.draw(model, {*faults["missing"], *faults["of another shape"]}, accept)
        vars(model)["misfits"] = [
            f"model.misfits=accept: the weights do not fit config.json; {'; '.join(found)}. What is missing or of another "
            "shape starts from random values, what is unexpected is left out"
        ]
    bad = [name for name, p in model.named_parameters() if p.is_floating_point() and not _finite(p)]
    if bad:
        raise Refused(
            f"the weights of '{path}' were asked for",
            f"NaN or infinite values: {misfits.listed('tensors', bad)}",
            "use another checkpoint",
        )
    return model


def _check_quantised(path: Path, config: PretrainedConfig, quantization: Any) -> None:
    """Take the facts of a quantised folder out of its config: `quantization` knows them, or it is refused."""
    fields = getattr(config, "quantization_config", None)
    if not fields:
        return
    if not getattr(quantization, "opens_folder", False):
        method = fields.get("quant_method", "unknown") if isinstance(fields, dict) else "?"
        raise Refused(
            f"model '{path}' was asked for",
            f"its weights are quantised ({method}), which this command does not take",
            "give the model's original, unquantised weights",
        )
    vars(config).pop("quantization_config")


def _random(
    config: PretrainedConfig, seed: int, dtype: torch.dtype, remote: dict[str, bool]
) -> PreTrainedModel:
    """A new model whose values come from the family's own scheme, drawn per module from (seed, its name).

    So they do not depend on the order in which modules are made, nor on how many there are.
    """
    with torch.random.fork_rng(devices=[]):
        model = AutoModelForCausalLM.from_config(
            config, dtype=torch.float32, attn_implementation=attention.NAME, **remote
        )
        for parameter in model.parameters():
            parameter._is_hf_initialized = False  # pyright: ignore[reportAttributeAccessIssue]
        with torch.no_grad():
            # from the leaves up, as transformers does: a parent may refine its children's values
            for name, module in reversed(list(model.named_modules())):
                torch.manual_seed(derive(seed, "init", name))
                model._init_weights(module)
    for parameter in model.parameters():
        # drawn in float32; buffers (rotary frequencies) stay in the type their family wants
        parameter.data = parameter.data.to(dtype)
    return model


def _shorten(config: PretrainedConfig, num_layers: int | None) -> int | None:
    """Set the number of layers; gives the checkpoint's own number when it was changed."""
    text = config.get_text_config()
    whole = text.num_hidden_layers
    if num_layers is None or num_layers == whole:
        return None
    if num_layers > whole:
        raise Refused(
            f"model.num_layers={num_layers} was asked for",
            f"the model has {whole} layers",
            f"use at most {whole}",
        )
    text.num_hidden_layers = num_layers
    for name, value in list(vars(text).items()):
        if isinstance(value, list) and len(value) == whole:  # one entry per layer
            setattr(text, name, value[:num_layers])
    return whole


def _later_layer(name: str, built: int) -> bool:
    """Whether a tensor belongs to a layer that was not built."""
    number = re.search(r"\.(\d+)\.", name)
    return number is not None and int(number[1]) >= built


def _stored_dtype(file: Path) -> torch.dtype | None:
    for _, tensor in folder.read_tensors(file):
        if tensor.is_floating_point():
            return tensor.dtype
    return None


def _finite(tensor: Tensor) -> bool:
    """One pass without a temporary: a sum of bfloat16 would be of a float32 copy. NaN is its own least and greatest."""
    if not tensor.numel():
        return True
    return all(bool(end.isfinite()) for end in torch.aminmax(tensor.detach()))
