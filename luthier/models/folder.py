"""A model's folder on disk, checked before anything is built: its config, its weight files, its hash.

Each fault is refused by name: no folder, no config, an unknown or quantised model, a shard that is
missing, a truncated or altered safetensors file. It reads headers only, except for `fingerprint`. The
model itself is made in `load.py`.
"""

from __future__ import annotations

import hashlib
import json
import logging
import pickle
import re
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import NoneType
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers.utils import logging as hf_logging

from luthier.errors import Refused, suggest
from luthier.files import write_json
from luthier.models.zoo import MODEL_TYPES, VOCABULARIES

SINGLE = ("model.safetensors", "pytorch_model.bin")  # in the order of preference
INDEXES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "vocab.json",
    "vocab.txt",
    "spiece.model",
    "sentencepiece.bpe.model",
    *VOCABULARIES,
)
HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?")
_BITS = {"F64": 64, "F32": 32, "F16": 16, "BF16": 16, "I64": 64, "I32": 32, "I16": 16, "I8": 8}
_BITS |= {"U64": 64, "U32": 32, "U16": 16, "U8": 8, "BOOL": 8, "F8_E4M3": 8, "F8_E5M2": 8}


@contextmanager
def quiet() -> Iterator[None]:
    """Without transformers' log lines and progress bars."""
    level, bars = hf_logging.get_verbosity(), hf_logging.is_progress_bar_enabled()
    hf_logging.set_verbosity(logging.CRITICAL)
    hf_logging.disable_progress_bar()
    try:
        yield
    finally:
        hf_logging.set_verbosity(level)
        if bars:
            hf_logging.enable_progress_bar()


def find_folder(path: str | Path, *, code: bool = False) -> Path:
    """The local folder of `path`: itself, or a hub name's files, downloaded if need be.

    `code`: also fetch Python files (remote code). Refused when there is none.
    """
    folder = Path(path).expanduser()
    if folder.is_dir():
        return folder
    if folder.is_file():
        gguf = folder.suffix == ".gguf"
        raise Refused(
            f"model '{path}' was asked for",
            "it is a file, not a Hugging Face folder",
            f"luthier convert {path} FOLDER" if gguf else "give the folder with its config.json",
        )
    name = str(path)
    if not HUB_NAME.fullmatch(name) or name.startswith("."):
        raise Refused(
            f"model folder '{path}' was asked for", "it does not exist", "check model.path"
        )
    return _download(name, code)


def _download(name: str, code: bool) -> Path:
    from huggingface_hub import snapshot_download

    patterns = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja", "*.tiktoken"]
    patterns += ["*.py"] * code
    try:
        folder = Path(snapshot_download(name, allow_patterns=patterns, ignore_patterns=["*/*"]))
        if not any(folder.glob("*.safetensors")):
            snapshot_download(name, allow_patterns=["*.bin"], ignore_patterns=["*/*"])
    except Exception as error:  # the hub's client raises errors of several libraries
        raise Refused(
            f"model '{name}' was asked for",
            f"there is no such folder, and the hub gave {type(error).__name__}: {first_line(error)}",
            "check model.path, or the network and your access to the model",
        ) from error
    return folder


def read_config(folder: Path, *, code: bool = False) -> dict[str, Any]:
    """config.json, refused unless transformers knows its `model_type` (or `code` allows remote code)."""
    from transformers import CONFIG_MAPPING
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    config = read_json(folder / "config.json", folder)
    model_type = config.get("model_type")
    asked = f"model '{folder}' was asked for"
    if not isinstance(model_type, str):
        raise Refused(asked, "its config.json has no model_type", "give a Hugging Face folder")
    if not isinstance(config.get("quantization_config", {}), dict | NoneType):
        found = "quantization_config in its config.json is no JSON object"
        raise Refused(asked, found, "mend the file")
    ours = model_type in MODEL_TYPES  # code that comes with them is not needed
    remote = not ours and "AutoModelForCausalLM" in config.get("auto_map", {})
    if model_type not in CONFIG_MAPPING:
        if remote and not code:
            raise Refused(
                asked,
                f"its family '{model_type}' is Python code that comes with it",
                "set model.trust_remote_code=true if you trust its author",
            )
        if not remote:
            raise Refused(
                asked,
                f"its family '{model_type}' is not known to the installed transformers",
                suggest(model_type, CONFIG_MAPPING.keys()) or "a newer transformers may know it",
            )
    elif model_type not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES and not remote and not ours:
        raise Refused(
            asked,
            f"its family '{model_type}' is no causal language model",
            "give a decoder-only model",
        )
    return config


def weight_files(folder: Path) -> list[Path]:
    """The weight files of a folder, safetensors before .bin; refused when one is missing or not whole."""
    files: list[Path] = []
    tensors: dict[str, list[str]] = {}  # file -> tensors that the index promises in it
    for single, index in zip(SINGLE, INDEXES, strict=True):
        if (folder / single).is_file():
            files = [folder / single]
        elif (folder / index).is_file():
            for tensor, name in read_json(folder / index, folder).get("weight_map", {}).items():
                tensors.setdefault(name, []).append(tensor)
            files = [folder / name for name in sorted(tensors)]
        if files:
            break
    if not files:
        raise Refused(
            f"the weights of '{folder}' were asked for",
            f"there is no {' or '.join((SINGLE[0], INDEXES[0], SINGLE[1]))}",
            "give a folder with weights, or set model.init=random",
        )
    missing = [file.name for file in files if not file.is_file()]
    if missing:
        raise Refused(
            f"the weights of '{folder}' were asked for",
            f"{len(missing)} of {len(files)} files are missing: {', '.join(missing[:5])}",
            "copy or download the folder again",
        )
    for file in files:
        if file.suffix == ".safetensors":
            header = read_header(file)
            absent = [t for t in tensors.get(file.name, []) if t not in header]
            if absent:
                raise _broken(file, f"it lacks {len(absent)} tensors of the index: {absent[0]} ...")
        else:
            _load_bin(file)
    return files


def read_header(file: Path) -> dict[str, dict[str, Any]]:
    """Tensor name -> {dtype, shape, data_offsets} of a safetensors file; refused when it is not whole."""
    size = file.stat().st_size
    with file.open("rb") as handle:
        length = int.from_bytes(handle.read(8), "little")
        if size < 8 or length > size - 8:
            raise _broken(file, f"it has {size} bytes, less than its header: it is truncated")
        try:
            header = json.loads(handle.read(length))
            header.pop("__metadata__", None)
            end = max((entry["data_offsets"][1] for entry in header.values()), default=0)
            whole = all(_fits(entry) for entry in header.values())
        except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
            raise _broken(file, "its header is not that of a safetensors file") from error
    if size != 8 + length + end:
        verdict = "truncated" if size < 8 + length + end else "too long"
        raise _broken(
            file, f"it has {size} bytes where its header says {8 + length + end}: it is {verdict}"
        )
    if not whole:
        raise _broken(file, "sizes in its header do not match the shapes")
    return header


def read_tensors(file: Path) -> Iterator[tuple[str, Tensor]]:
    """The tensors of a weight file, one at a time, sorted by name; nothing is unpickled but arrays."""
    if file.suffix == ".safetensors":
        # read, not mapped: pages of a mapping stay resident when their tensor is done with
        with safe_open(file, framework="pt", backend="pread") as handle:
            for name in sorted(handle.keys()):
                yield name, handle.get_tensor(name)
        return
    state = _load_bin(file)
    for name in sorted(state):
        yield name, state[name]


def fingerprint(path: str | Path) -> str:
    """SHA-256 over (name, dtype, shape, bytes) of all weights: the same however they are cut into files."""
    parts = {}
    for file in weight_files(find_folder(path)):
        try:
            for name, tensor in read_tensors(file):
                digest = hashlib.sha256(f"{name}\0{tensor.dtype}\0{tuple(tensor.shape)}\0".encode())
                flat = tensor.contiguous().reshape(-1).view(torch.uint8)
                digest.update(flat.numpy())  # pyright: ignore[reportArgumentType]
                parts[name] = digest.digest()
        except (SafetensorError, RuntimeError, ValueError) as error:
            raise _broken(file, first_line(error)) from error
    return hashlib.sha256(b"".join(parts[name] for name in sorted(parts))).hexdigest()


ORIGIN = "luthier.json"  # in a folder that `luthier quantize` wrote: what it was made of


def write_origin(folder: Path, path: str | Path) -> None:
    """Record in `folder` that it was made of the model `path`."""
    write_json(
        folder / ORIGIN, {"format": 1, "original": str(path), "original_hash": fingerprint(path)}
    )


def original_hash(path: str | Path) -> str | None:
    """`fingerprint` of the model that a quantised folder was made of; None where none is recorded."""
    file = find_folder(path) / ORIGIN
    found = read_json(file, file.parent).get("original_hash") if file.is_file() else None
    return found if isinstance(found, str) else None


def _load_bin(file: Path) -> dict[str, Tensor]:
    """The tensors of a .bin file, mapped from disk where its format allows; refused when it holds more."""
    try:
        return torch.load(
            file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file)
        )
    except pickle.UnpicklingError as error:
        # torch's own text advises to load it all the same
        if "GLOBAL" in str(error):
            raise _broken(file, "it holds Python objects, which are not loaded") from error
        raise _broken(file, "it cannot be read as tensors: it is damaged") from error
    except (RuntimeError, EOFError, ValueError, OSError) as error:
        raise _broken(file, f"it cannot be read: {first_line(error)}") from error


def has_tokenizer(folder: Path) -> bool:
    return any((folder / name).is_file() for name in TOKENIZER_FILES)


def _fits(entry: dict[str, Any]) -> bool:
    begin, end = entry["data_offsets"]
    count = 1
    for dim in entry["shape"]:
        count *= dim
    bits = _BITS.get(entry["dtype"])
    return bits is None or end - begin == count * bits // 8


def read_json(file: Path, folder: Path) -> dict[str, Any]:
    asked = f"model '{folder}' was asked for"
    try:
        value = json.loads(file.read_text("utf-8"))
    except FileNotFoundError as error:
        raise Refused(
            asked, f"the folder has no {file.name}", "give a Hugging Face folder"
        ) from error
    except (OSError, ValueError) as error:
        raise Refused(
            asked, f"{file.name} cannot be read: {first_line(error)}", "mend the file"
        ) from error
    if not isinstance(value, dict):
        raise Refused(asked, f"{file.name} holds no JSON object", "mend the file")
    return value


def _broken(file: Path, found: str) -> Refused:
    return Refused(f"weight file '{file}' was asked for", found, "copy or download the file again")


def first_line(error: BaseException) -> str:
    """The first line of an error's text."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
