"""The one reader of foreign pickles: arrays and plain containers, nothing else.

Paddle's `.pdparams` are pickles of {name: numpy array}. A pickle is a program; this reader runs none: only
what rebuilds a numpy array or an ordered dictionary is looked up, everything else is refused by name.
"""

from __future__ import annotations

import io
import pickle
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from luthier.errors import Refused

_ARRAY: Any = np.zeros(1).__reduce__()  # (the function that rebuilds an array, ...)
_ALLOWED: dict[tuple[str, str], Any] = {
    ("numpy", "ndarray"): np.ndarray,
    ("numpy", "dtype"): np.dtype,
    ("collections", "OrderedDict"): OrderedDict,
    # numpy 1 and numpy 2 call the module differently
    ("numpy.core.multiarray", "_reconstruct"): _ARRAY[0],
    ("numpy._core.multiarray", "_reconstruct"): _ARRAY[0],
}


class _Reader(pickle.Unpickler):
    def find_class(self, module_name: str, global_name: str) -> Any:
        try:
            return _ALLOWED[module_name, global_name]
        except KeyError:
            raise pickle.UnpicklingError(f"it asks for {module_name}.{global_name}") from None


def read_arrays(path: Path) -> dict[str, Tensor]:
    """The named arrays of a `.pdparams` file, as tensors; bfloat16 (kept as uint16 there) as bfloat16.

    Refused for a file that is no such pickle, or that asks for anything but arrays.
    """
    try:
        value = _Reader(io.BytesIO(path.read_bytes())).load()
        if not isinstance(value, dict):
            raise ValueError("it holds no dictionary")
        arrays = {name: _array(item) for name, item in value.items() if not _about(name)}
        return {str(name): _tensor(array) for name, array in arrays.items()}
    except (
        *(OSError, EOFError, pickle.UnpicklingError, ValueError, TypeError),
        *(AttributeError, IndexError, KeyError, MemoryError, UnicodeDecodeError),
    ) as error:
        raise Refused(
            f"reading {path}",
            f"it is no file of named arrays ({str(error).splitlines()[0][:120] if str(error) else type(error).__name__})",
            "copy the folder again; only arrays are read from pickles",
        ) from error


def _about(name: Any) -> bool:
    """Paddle's own notes beside the arrays: names of parameters in its program."""
    return isinstance(name, str) and name.endswith("@@")


def _array(item: Any) -> np.ndarray:
    if isinstance(item, tuple) and len(item) == 2 and isinstance(item[1], np.ndarray):
        item = item[1]  # (name in the program, array)
    if not isinstance(item, np.ndarray) or item.dtype == object:
        raise ValueError(f"it holds a {type(item).__name__} where an array was expected")
    return item


def _tensor(array: np.ndarray) -> Tensor:
    whole = np.ascontiguousarray(array)
    if whole.dtype == np.uint16:
        return torch.from_numpy(whole.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(whole.copy())
