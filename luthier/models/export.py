"""A trained model as a Hugging Face folder, written by several ranks without any of them holding it whole.

Weights are read one after the other from what the ranks wrote (`Weights`), a layer in one file, so that names and
forms that transformers changes on the way to disk can be made of them. Everything that is asked of transformers and
the tokenizer is asked when the copy is made, not while the training goes on.
"""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.core_model_loading import revert_weight_conversion

from luthier.files import Entry, write_text
from luthier.models.folder import INDEXES, SINGLE, quiet
from luthier.tensorfiles import num_bytes, write_tensors

FILE_BYTES = 2 * 10**9  # of one file, which is what a rank holds at a time
PREFIX = "weights/"


class Weights(Protocol):
    """`train.state.Stored`: tensors by name, each read whole when it is asked for."""

    def __iter__(self) -> Iterator[str]: ...
    def __getitem__(self, name: str, /) -> Tensor: ...
    def shape(self, name: str, /) -> tuple[int, ...]: ...
    def dtype(self, name: str, /) -> torch.dtype: ...


@dataclass(frozen=True)
class FullModel:
    """`train.saving.ModelCopy` of a model that was trained whole."""

    skeleton: PreTrainedModel  # without values
    small: Mapping[str, bytes]  # config, tokenizer, ...

    def write(self, folder: Path, weights: Weights, rank: int, ranks: int) -> dict[str, Any]:
        """Every `ranks`-th file of the weights."""
        files = _files(weights)
        entries: dict[str, Entry] = {}
        names: dict[str, str] = {}  # tensor -> file
        total = [0, 0]  # numbers, bytes
        for number in range(rank, len(files), ranks):
            file = f"model-{number + 1:05d}-of-{len(files):05d}.safetensors"
            file = SINGLE[0] if len(files) == 1 else file
            whole = {name: weights[f"{PREFIX}{name}"] for name in files[number]}
            tensors = revert_weight_conversion(self.skeleton, whole)
            for tensor in tensors.values():
                total[0] += tensor.numel()
                total[1] += tensor.numel() * tensor.element_size()
            entries[file] = write_tensors(folder / file, tensors)
            names |= dict.fromkeys(tensors, file)
        return {"files": entries, "names": names, "total": total}

    def complete(self, folder: Path, parts: list[dict[str, Any]]) -> None:
        """The index, where there are several files, and the small files."""
        names = {name: file for part in parts for name, file in part["names"].items()}
        if len(set(names.values())) > 1:
            totals = [sum(part["total"][i] for part in parts) for i in range(2)]
            facts = {"total_parameters": totals[0], "total_size": totals[1]}
            index = {"metadata": facts, "weight_map": dict(sorted(names.items()))}
            write_text(folder / INDEXES[0], json.dumps(index, indent=2) + "\n")
        for name, content in self.small.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(content)


def full_model(
    model: PreTrainedModel, dtype: torch.dtype, tokenizer: PreTrainedTokenizerBase | None
) -> FullModel:
    """What has to be known of `model` to write it later; its values are not. `dtype`: that of the whole model."""
    config: Any = copy.deepcopy(model.config)
    kind: Any = type(model)
    with quiet(), TemporaryDirectory() as made:
        with torch.device("meta"):
            skeleton: Any = kind(config).to(dtype)
        skeleton.generation_config = copy.deepcopy(model.generation_config)
        loaded: Any = getattr(model, "_weight_conversions", None)
        vars(skeleton)["_weight_conversions"] = loaded
        skeleton.save_pretrained(made, state_dict={})
        if tokenizer is not None:
            tokenizer.save_pretrained(made)
        files = [path for path in Path(made).rglob("*") if path.is_file()]
        kept = [path for path in files if path.suffix != ".safetensors"]
        small = {str(path.relative_to(made)): path.read_bytes() for path in kept}
    return FullModel(skeleton, small)


def _files(weights: Weights) -> list[list[str]]:
    """Names of the model's tensors by file; all of a decoder layer is in one."""
    groups: dict[str, list[str]] = {}
    for name in sorted(weights, key=_natural):
        if name.startswith(PREFIX):
            bare = name.removeprefix(PREFIX)
            layer = re.match(r".*?\.\d+\.", bare)
            groups.setdefault(layer[0] if layer else bare, []).append(bare)
    files: list[list[str]] = []
    room = 0
    for names in groups.values():
        full = [f"{PREFIX}{name}" for name in names]
        size = sum(num_bytes(weights.shape(name), weights.dtype(name)) for name in full)
        if not files or size > room:
            files.append([])
            room = FILE_BYTES
        files[-1] += names
        room -= size
    return files


def _natural(name: str) -> list[tuple[int, str]]:
    """Order in which layer 10 comes after layer 9."""
    return [(int(word), "") if word.isdigit() else (0, word) for word in re.split(r"(\d+)", name)]
