"""Sequence parallelism: between the cut layers a rank holds its own tokens of the hidden states, not all of them.

Each rank has one stretch of every row. The first decoder layer of a pipeline stage splits the tokens, its last one joins
them again; what is before and behind (embedding, final norm, head, other stages) sees whole rows, as do attention, MLPs and
experts, which gather tokens on entering and scatter their sums (`tensor.py`, `branches.py`). So rotary tables, masks and the
layout stay those of whole rows, or of a context rank's part of them. All by hooks, inside a layout only: a plain call
(`generate`) has whole rows everywhere. Which modules these are is told by `models/sequence.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from luthier.batch import current_layout
from luthier.parallel.collectives import Axis, split_tokens, whole_rows, whole_tokens
from luthier.parts import mark_share


def split_sequence(
    model: nn.Module,
    runs: Sequence[Sequence[nn.Module]],
    entries: Sequence[str],
    shares: Sequence[str],
    axis: Axis,
) -> None:
    """Let the decoder layers of `model` hold a rank's own tokens, in `runs`: the layers of each pipeline stage.

    `entries`: modules that need all of them; `shares`: parameters of whose gradient a rank has a share, which are
    summed. An adapter on a decoder layer itself (ReFT) sees whole rows.
    """
    for path in shares:
        mark_share(model.get_parameter(path))
    for path in entries:
        hook = _Joining(axis)
        model.get_submodule(path).register_forward_pre_hook(hook, with_kwargs=True, prepend=True)
    for layers in runs:
        layers[0].register_forward_pre_hook(_Splitting(axis).enter, with_kwargs=True)
    ends = {id(layers[-1]) for layers in runs}
    for layer in (layer for layers in runs for layer in layers):
        edited, last = hasattr(layer, "adapter"), id(layer) in ends
        if edited or last:
            layer.register_forward_hook(_Rejoining(axis), prepend=True)
        if edited and not last:
            layer.register_forward_hook(_Splitting(axis).leave)


class _Splitting:
    """Whole rows, the same on every rank -> the rank's own tokens."""

    def __init__(self, axis: Axis) -> None:
        self.axis = axis

    @torch.compiler.disable()
    def enter(self, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if current_layout() is None:
            return None
        return _first(args, kwargs, lambda x: split_tokens(x, self.axis))

    @torch.compiler.disable()
    def leave(self, layer: nn.Module, args: Any, output: Any) -> Any:
        if current_layout() is None:
            return None
        return _of_output(output, lambda x: split_tokens(x, self.axis))


class _Joining:
    """The rank's own tokens -> whole rows, of which the rank's layers compute a share."""

    def __init__(self, axis: Axis) -> None:
        self.axis = axis

    @torch.compiler.disable()
    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        layout = current_layout()
        if layout is None:
            return None
        shape = layout.shape
        return _first(args, kwargs, lambda x: whole_rows(x, self.axis, shape, shares=True))


class _Rejoining:
    """The rank's own tokens of a layer's output -> whole rows, with which every rank does the same."""

    def __init__(self, axis: Axis) -> None:
        self.axis = axis

    @torch.compiler.disable()
    def __call__(self, layer: nn.Module, args: Any, output: Any) -> Any:
        layout = current_layout()
        if layout is None:
            return None
        width = layout.shape[1]
        return _of_output(output, lambda x: whole_tokens(x, self.axis, width, shares=False))


def _first(args: tuple[Any, ...], kwargs: dict[str, Any], change: Any) -> Any:
    """The arguments of a forward with its hidden states changed."""
    if args:
        return (change(args[0]), *args[1:]), kwargs
    return args, {**kwargs, "hidden_states": change(kwargs["hidden_states"])}


def _of_output(output: Any, change: Any) -> Any:
    """The output of a decoder layer with its hidden states changed; it may give more than these."""
    return (change(output[0]), *output[1:]) if isinstance(output, tuple) else change(output)
