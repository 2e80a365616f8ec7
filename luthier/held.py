"""Weights of which a process holds a stretch of rows, from when they are read until the model is cut.

Ranks that will cut a model read it together: of each matrix every rank keeps its rows, and the parameter has its
shape without the memory for it. Who needs a whole matrix (the cut, an adapter's first values, a forward) gets it joined
of all ranks' rows, one matrix or one layer at a time; so no rank has to hold the model. All ranks of the axes must ask
alike. How many rows a rank has says nothing of how the model is cut: that may be through fused pieces, heads or
blocks of codes, and is done to whole matrices. Axes are given by `parallel`, weights by the models' loader.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import Parameter
from transformers import PreTrainedModel
from transformers.core_model_loading import ConversionOps
from transformers.quantizers.base import HfQuantizer

from luthier.heap import return_freed_memory
from luthier.parts import Part

_HELD = "luthier_held"  # attribute of parameters
BLOCK = 2**20  # numbers that are summed at once


class Way(NamedTuple):
    """This process's place on an axis of the mesh whose ranks read a model together. `join(own, part)` makes the whole
    of what all of them have."""

    axis: str
    rank: int
    ranks: int
    join: Callable[[Tensor, Part], Tensor]

    def __deepcopy__(self, memo: Any) -> Way:
        # a model's loader copies what it is configured by; groups of processes cannot be
        return self


class Held(NamedTuple):
    """The rows that are here, and how they were taken: along the first axis, once for each way."""

    own: Tensor
    taken: tuple[tuple[Way, Part], ...]
    stand: Tensor  # what stands in the place of the whole

    def whole(self) -> Tensor:
        found = self.own
        for way, part in reversed(self.taken):
            found = way.join(found, part)
        return found

    @property
    def ways(self) -> list[Way]:
        return [way for way, _ in self.taken]


class Holding(ConversionOps):
    """A step of transformers' loader that gets the tensors of a model as they are read (`get_quantize_ops`), for the
    names `wanted`; `settle` when all are."""

    def __init__(
        self, model: PreTrainedModel, ways: Collection[Way], device: torch.device | None
    ) -> None:
        """Vectors, which are small, and what is of another type than the model are not held."""
        self.ways, self.device = ways, device
        self.wanted = {
            name: tuple(p.shape)
            for name, p in model.named_parameters(remove_duplicate=False)
            if ways and p.ndim > 1 and p.dtype == model.dtype
        }
        self.dtype, self.found = model.dtype, dict[str, Held]()

    def convert(self, input_dict: dict[str, Any], **kwargs: Any) -> dict[str, Tensor]:
        read = {name: t[0] if isinstance(t, list) else t for name, t in input_dict.items()}
        return {name: self.take(name, tensor) for name, tensor in read.items()}

    def take(self, name: str, whole: Tensor) -> Tensor:
        """What the loader puts in the place of tensor `name`; of another shape than the model's, the tensor itself."""
        if self.wanted.get(name) != tuple(whole.shape):
            self.wanted.pop(name, None)
            return whole
        self.found[name] = held = _rows(whole, self.ways, self.device or whole.device, self.dtype)
        return_freed_memory()
        return held.stand

    def settle(self, model: nn.Module) -> None:
        for name, held in self.found.items():
            parameter = model.get_parameter(name)
            parameter.data = held.stand
            setattr(parameter, _HELD, held)


class HoldingQuantizer(HfQuantizer):
    """What is ours of transformers' seam for quantised models: it hands us tensors as they are read. A subclass makes
    `holding` before weights are read and settles it behind them. A loaded model forgets it
    (`remove_quantization_config`): to transformers it is an ordinary model, whatever its layers."""

    holding: Holding

    def is_serializable(self) -> bool:
        return False

    @property
    def is_trainable(self) -> bool:
        return True

    def param_needs_quantization(self, model: Any, param_name: str, **kwargs: Any) -> bool:
        return param_name in self.holding.wanted

    def get_quantize_ops(self) -> ConversionOps:
        return self.holding


def hold(tensor: Tensor, ways: Collection[Way], device: torch.device | None = None) -> None:
    """Keep of a whole tensor only the rows that this rank has, on `device`."""
    if ways and tensor.ndim:
        held = _rows(tensor.detach(), ways, device or tensor.device, tensor.dtype)
        tensor.data = held.stand
        setattr(tensor, _HELD, held)


def put(tensor: Tensor, whole: Tensor) -> None:
    """Give a tensor, held or not, the values of a whole one. All ranks must give the same."""
    if is_away(tensor):
        ways, tensor.data = ways_of(tensor), whole.to(tensor.device, tensor.dtype)
        hold(tensor, ways)
    else:
        tensor.copy_(whole)


def ways_of(tensor: Tensor) -> list[Way]:
    """How a tensor is held; none for one that is here."""
    held: Held | None = getattr(tensor, _HELD, None)
    return [] if held is None else held.ways


def whole_of(tensor: Tensor) -> Tensor:
    """The whole of a held tensor, without gradient; any other as it is."""
    return getattr(tensor, _HELD).whole() if is_away(tensor) else tensor


def release(module: nn.Module, axis: str | None = None, *, keep: bool = True) -> None:
    """Give the module its whole weights for good; with `axis` only those that are held over it, which stay held
    over other axes. Without `keep` the other ranks get theirs, and here only the shape stays."""
    for p in list(module.parameters()):
        ways = ways_of(p)
        if ways and axis in (None, *(way.axis for way in ways)):
            whole = whole_of(p)
            delattr(p, _HELD)
            if keep:
                p.data = whole
                hold(p, [way for way in ways if axis not in (None, way.axis)])
            del whole
            return_freed_memory()


@contextmanager
def filled(module: nn.Module) -> Iterator[None]:
    """The module has its whole weights inside."""
    parameters = [p for p in module.parameters() if is_away(p)]
    _fill(parameters)
    try:
        yield
    finally:
        _empty(parameters)


@contextmanager
def lent(model: nn.Module) -> Iterator[None]:
    """A forward of the model finds whole weights inside: each layer's while it computes, and all that is in no layer."""
    held = {id(p): p for p in model.parameters() if is_away(p)}
    handles = []
    for layer in _layers(model) if held else []:
        own = [held.pop(id(p)) for p in layer.parameters() if id(p) in held]
        if own:
            handles += [
                layer.register_forward_pre_hook(lambda *_, own=own: _fill(own)),
                layer.register_forward_hook(lambda *_, own=own: _empty(own), always_call=True),
            ]
    rest = list(held.values())
    _fill(rest)
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        _empty(rest)


def is_away(tensor: Tensor) -> bool:
    """Whether only rows of it are here, and nobody has lent it the others."""
    held: Held | None = getattr(tensor, _HELD, None)
    return held is not None and tensor.data_ptr() == held.stand.data_ptr()


def _layers(module: nn.Module) -> Iterator[nn.Module]:
    """The members of the outermost lists of modules."""
    for child in module.children():
        if isinstance(child, nn.ModuleList):
            yield from child
        else:
            yield from _layers(child)


def _fill(parameters: Collection[Parameter]) -> None:
    for p in parameters:
        p.data = getattr(p, _HELD).whole()


def _empty(parameters: Collection[Parameter]) -> None:
    for p in parameters:
        p.data = getattr(p, _HELD).stand


def _rows(whole: Tensor, ways: Collection[Way], device: torch.device, dtype: torch.dtype) -> Held:
    own, taken = whole, []
    for way in ways:
        part = Part(0, (len(own),), way.rank, way.ranks)
        ((start, length),) = part.stretches
        own = own.narrow(0, start, length)
        taken.append((way, part))
    mine = own.to(device, dtype, copy=True, memory_format=torch.contiguous_format)
    return Held(mine, tuple(taken), _stand(whole, device, dtype))


def _stand(whole: Tensor, device: torch.device, dtype: torch.dtype) -> Tensor:
    """A tensor of this shape that is one number: the mean, by which a loader can tell two tensors apart, or NaN where
    there is one, or an infinite number."""
    number = torch.zeros((), device=device, dtype=dtype)
    if dtype.is_floating_point and whole.numel():
        wide = torch.promote_types(whole.dtype, torch.float32)
        # in blocks: torch would make a float32 copy of all of a half-precision matrix
        total = sum(float(x.sum(dtype=wide)) for x in whole.reshape(-1).split(BLOCK))
        if math.isfinite(total):
            number.fill_(total / whole.numel())
        elif not whole.isfinite().all():
            number.fill_(torch.nan)
    return number.expand(whole.shape)
