"""What the layouts of quantised folders share: a weight as it lies on disk, and how a fault in it is told.

`bitsandbytes.py` and `compressed.py` are the layouts, `layouts.py` chooses between them. Files are opened by the
caller: here are headers and single tensors only.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from luthier.errors import Refused
from luthier.quantize.spec import Spec

Headers = Mapping[str, Mapping[str, Any]]
"""Tensor name -> {dtype, shape} of all files of a folder, as in safetensors' headers."""
Read = Callable[[str], Tensor]
"""Gives one tensor of the folder by name."""

BITS = {"I8": 8, "U8": 8, "F16": 16, "BF16": 16, "F32": 32, "I32": 32, "I64": 64, "F64": 64}
FLOATING = ("F16", "BF16", "F32", "F64")


@dataclass(frozen=True)
class Stored:
    """One quantised weight of a folder: the form that it has and the tensors that it is read from.

    `parts`: what each of its tensors is -> its name in the folder, all of them. `dtype` is that of the weight it was
    made from, where the folder tells.
    """

    spec: Spec
    parts: dict[str, str]
    dtype: torch.dtype | None = None


def broken(folder: str, name: str, found: str) -> Refused:
    return Refused(
        f"the quantised weights of '{folder}' were asked for",
        f"{name}: {found}",
        "copy or download the folder again, or quantise the original model anew",
    )


def check_part(
    folder: str, name: str, headers: Headers, dtypes: tuple[str, ...], count: int
) -> None:
    """Refuse a tensor that is absent, of another type, or has not `count` numbers."""
    if name not in headers:
        raise broken(folder, name, "it is missing")
    dtype, shape = headers[name]["dtype"], list(headers[name]["shape"])
    if dtype not in dtypes:
        raise broken(folder, name, f"its type is {dtype}, not {' or '.join(dtypes)}")
    if math.prod(shape) != count:
        raise broken(folder, name, f"its shape {shape} has {math.prod(shape)} numbers, not {count}")


def scales_from(folder: str, name: str, values: Tensor) -> Tensor:
    """`values` as float32 [blocks]; refused when one is not finite."""
    values = values.reshape(-1).float()
    if not bool(values.isfinite().all()):
        raise broken(folder, name, "it holds NaN or infinite scales")
    return values
