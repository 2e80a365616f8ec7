"""Writing safetensors files: tensor after tensor, hashed on the way, without holding up other threads.

The format is the library's (a header of JSON, then the bytes), which also reads it. Its own writer keeps Python's
lock until all is on disk, so that a save in the background would stop the training for as long.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from luthier.files import Entry, sync_handle

TYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
DTYPES = {name: dtype for dtype, name in TYPES.items()}
PIECE = 2**24  # bytes that are hashed and written at once


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> Entry:
    """Write tensors to `path`, one after the other, and flush it; its size and hash. Raises OSError."""
    order = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name in order:
        tensor = tensors[name]
        begin, end = end, end + tensor.numel() * tensor.element_size()
        shape = list(tensor.shape)
        header[name] = {"dtype": TYPES[tensor.dtype], "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    digest = hashlib.sha256()
    with path.open("wb") as handle:
        _write(handle.write, digest, memoryview(len(text).to_bytes(8, "little") + text))
        for name in order:
            flat = tensors[name].detach().cpu().contiguous().reshape(-1).view(torch.uint8)
            _write(handle.write, digest, memoryview(flat.numpy()))  # pyright: ignore[reportArgumentType]
        sync_handle(handle)
    return {"size": 8 + len(text) + end, "sha256": digest.hexdigest()}


def _write(write: Callable[[memoryview], Any], digest: Any, data: memoryview) -> None:
    for at in range(0, len(data), PIECE):
        piece = data[at : at + PIECE]
        digest.update(piece)
        write(piece)


def num_bytes(shape: tuple[int, ...], dtype: torch.dtype) -> int:
    return math.prod(shape) * dtype.itemsize
