"""Which tensors' memory is alive at each moment of a piece of work, and which matrix products it does.

It works on tensors without memory, too. What the moments mean is for whoever looks: `footprint.py`.
"""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

PRODUCTS = {torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.addmm_, torch.ops.aten.bmm}


class Alive(TorchDispatchMode):
    """Inside: bytes of storages as `events`, (change, name) in their order; a change below zero is an end.

    `names`: address of a storage that is alive -> its name. `products`: which matrix products in bfloat16 there were.
    """

    def __init__(self) -> None:
        super().__init__()
        self.events: list[tuple[int, int]] = []
        self.names: dict[int, int] = {}
        self.products: set[Any] = set()
        self._ends: list[Any] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func.overloadpacket in PRODUCTS and out.dtype == torch.bfloat16:
            self.products.add((func, *((a.shape, a.stride()) for a in args)))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                self._see(tensor.untyped_storage())
        return out

    def _see(self, storage: torch.UntypedStorage) -> None:
        address, size = storage._cdata, storage.nbytes()
        if address in self.names:
            return
        name = len(self.events)  # an address is used again after its storage is gone

        def gone() -> None:
            self.names.pop(address, None)
            self.events.append((-size, name))

        self.events.append((size, name))
        self.names[address] = name
        self._ends.append(weakref.finalize(storage, gone))

    def know(self, tensor: Tensor) -> None:
        """Not to be counted: it was there before."""
        self.names.setdefault(tensor.untyped_storage()._cdata, -1)

    def stop(self) -> None:
        for end in self._ends:
            end.detach()
