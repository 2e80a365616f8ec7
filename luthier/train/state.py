"""Training state on disk: tensors cut in any way, readable on any other.

Each rank writes its pieces into a safetensors file of its own; an index says where each lies in its whole tensor. What
has to be read for another cut is computed by torch's own resharding (`torch.distributed.checkpoint`), whose
storage is not used: it is made of pickles. Whole tensors are read from it one by one for those who need them.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from luthier.adapters import Adapter
from luthier.errors import Failed, Refused
from luthier.files import Entry, flushed, write_text
from luthier.parallel.pieces import Piece, Pieces, pieces_of
from luthier.tensorfiles import DTYPES, TYPES, write_tensors

PREFIX = "training_state"
INDEX = f"{PREFIX}.index.json"


def model_tensors(model: nn.Module) -> dict[str, Tensor]:
    """What a run changes in a model, by name: parameters that are trained, and what belongs to them without
    being trained (buffers of adapters; of a model without adapters, those that are saved with it)."""
    found: dict[str, Tensor] = {n: p for n, p in model.named_parameters() if p.requires_grad}
    adapters = [(path, m) for path, m in model.named_modules() if isinstance(m, Adapter)]
    for path, adapter in adapters:
        for name, buffer in adapter.named_buffers(path):
            if buffer.is_floating_point():
                found[name] = buffer
    if not adapters:
        state = model.state_dict(keep_vars=True)
        found |= {name: b for name, b in model.named_buffers() if name in state}
    return found


Chunk = tuple[list[int], list[int], str, str]  # offsets, sizes, file, name in it


def write_pieces(
    folder: Path, rank: int, state: Mapping[str, Pieces]
) -> tuple[dict[str, Entry], dict[str, Any]]:
    """Write a rank's pieces; files with their hashes, and this rank's part of the index (JSON)."""
    file = f"{PREFIX}-{rank:05d}.safetensors"
    tensors: dict[str, Tensor] = {}
    index: dict[str, Any] = {}
    for name, pieces in state.items():
        chunks: list[Chunk] = []
        for part in pieces.parts:
            key = name
            if tuple(part.values.shape) != pieces.shape:
                key = f"{name}@{','.join(map(str, part.offsets))}"
            tensors[key] = part.values
            chunks.append((list(part.offsets), list(part.values.shape), file, key))
        if chunks:
            index[name] = [TYPES[pieces.dtype], list(pieces.shape), chunks]
    entries = {file: write_tensors(folder / file, tensors)} if tensors else {}
    return entries, index


def write_index(folder: Path, parts: Sequence[Mapping[str, Any]]) -> dict[str, Entry]:
    """Write the index of all ranks' parts. Raises Failed where they do not make whole tensors."""
    tensors: dict[str, Any] = {}
    for part in parts:
        for name, (dtype, shape, chunks) in part.items():
            known = tensors.setdefault(name, {"dtype": dtype, "shape": shape, "chunks": []})
            if (known["dtype"], known["shape"]) != (dtype, shape):
                raise _torn(name, f"it is {dtype} {shape} on one rank, and {known['dtype']} {known['shape']} on another")  # fmt: skip
            known["chunks"] += chunks
    for name, found in tensors.items():
        there = sum(math.prod(sizes) for _, sizes, _, _ in found["chunks"])
        if there != math.prod(found["shape"]):
            raise _torn(name, f"of its {math.prod(found['shape'])} numbers the ranks hold {there}")
    write_text(folder / INDEX, json.dumps({"format": 1, "tensors": tensors}) + "\n")
    return {INDEX: flushed(folder / INDEX)}


def _torn(name: str, found: str) -> Failed:
    return Failed(
        f"saving {name}",
        f"{found}; nothing was published",
        "report this, with the config and the number of processes",
    )


class Stored(Mapping[str, Tensor]):
    """The tensors of a folder's training state; each is read when it is asked for, whole, on the CPU."""

    def __init__(self, folder: Path) -> None:
        """Reads the index. Raises Refused where there is none that can be read."""
        self.folder = folder
        try:
            self._tensors = json.loads((folder / INDEX).read_text("utf-8"))["tensors"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise Refused(
                f"reading {folder / INDEX}",
                f"it is no index of a training state ({type(error).__name__})",
                "take another checkpoint",
            ) from error
        self._files: dict[str, Any] = {}

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._tensors[name]["shape"])

    def dtype(self, name: str) -> torch.dtype:
        return DTYPES[self._tensors[name]["dtype"]]

    def __getitem__(self, name: str) -> Tensor:
        whole = torch.empty(self.shape(name), dtype=self.dtype(name))
        self._fill(name, [Piece((0,) * whole.ndim, whole)])
        return whole

    def load(self, name: str, target: Tensor) -> None:
        """Read this rank's pieces of a tensor into `target`, cut in whatever way. Refused for another shape."""
        pieces = pieces_of(target)
        if pieces.shape != self.shape(name):
            raise Refused(
                f"reading '{name}' of {self.folder}",
                f"its shape is {self.shape(name)}, here it is {pieces.shape}",
                "resume with the model and adapter settings of the checkpoint",
            )
        self._fill(name, pieces.parts)

    @torch.no_grad()
    def _fill(self, name: str, parts: Sequence[Piece]) -> None:
        stored = self._tensors[name]["chunks"]
        known = TensorStorageMetadata(
            TensorProperties(self.dtype(name)),
            torch.Size(self.shape(name)),
            [ChunkStorageMetadata(torch.Size(at), torch.Size(size)) for at, size, _, _ in stored],
        )
        for part in parts:
            wanted = ChunkStorageMetadata(torch.Size(part.offsets), part.values.shape)
            for item in create_read_items_for_chunk_list(name, known, [wanted]):
                assert item.storage_index.index is not None
                _, _, file, key = stored[item.storage_index.index]
                values = self._open(file).get_slice(key)
                from_, to = item.storage_offsets, part.values
                ranges = tuple(slice(a, a + n) for a, n in zip(from_, item.lengths, strict=True))
                for axis, (at, length) in enumerate(
                    zip(item.dest_offsets, item.lengths, strict=True)
                ):
                    to = to.narrow(axis, at, length)
                to.copy_(values[ranges] if ranges else self._open(file).get_tensor(key))

    def _open(self, file: str) -> Any:
        if file not in self._files:
            self._files[file] = safe_open(self.folder / file, "pt")
        return self._files[file]
