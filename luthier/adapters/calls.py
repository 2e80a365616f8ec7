"""Where prompts lie in a plain call of a model, outside a stage: for adapters that act on some positions.

Inside a stage the layout knows. Outside one (a plain call, `generate`) hooks on the model read the
arguments of the call: which tokens are real, how many are cached. The whole input of the first call is the
prompt; within one `generate` that of its first call stays it, so that an answer does not depend on the
cache. What is done at a position is the method's.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from types import MethodType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from luthier.adapters.base import Placed, Removable
from luthier.batch import current_layout
from luthier.errors import Refused


class Prompt(NamedTuple):
    """`length` prompt tokens of row `row`; the first is token `start` of the running forward, negative if
    it is cached."""

    row: int
    start: int
    length: int


@dataclass(frozen=True)
class Call:
    """A running forward of `model` on rows of `width` tokens that stand behind `past` cached ones."""

    model: nn.Module
    prompts: tuple[Prompt, ...]  # one per row
    width: int
    past: int
    outer: Call | None = None  # of the whole model, around this of its base model
    cache: dict[str, Any] = field(default_factory=dict)  # what a method derived from it


@dataclass
class Generation:
    """A running `generate`. `spans`, for each row: the token that the prompt starts with, and its length."""

    model: nn.Module
    mask: Tensor | None  # [B, S], as it was given
    spans: list[tuple[int, int]] | None = None

    def of(self, module: nn.Module) -> bool:
        return module is self.model or module is getattr(self.model, "base_model", None)


_call: ContextVar[Call | None] = ContextVar("luthier_call", default=None)
_generation: ContextVar[Generation | None] = ContextVar("luthier_generation", default=None)


def current_call() -> Call | None:
    """The plain call that is running on a watched model, or None: in a stage, or outside of any call."""
    return None if current_layout() is not None else _call.get()


@contextmanager
def given_prompts(model: nn.Module, lengths: Sequence[int]) -> Iterator[None]:
    """Plain calls of `model` inside: row i's prompt is its first `lengths[i]` tokens, whatever follows."""
    token = _generation.set(Generation(model, None, [(0, length) for length in lengths]))
    try:
        yield
    finally:
        _generation.reset(token)


def watch_calls(model: nn.Module) -> list[Removable]:
    """Make `current_call` known in the forwards of `model` and of its base model, and in `generate`."""
    handles: list[Removable] = []
    # the base model may be called alone, and some families (opt) go past it to a part of it
    for module in {id(m): m for m in (model, getattr(model, "base_model", model))}.values():
        handles.append(module.register_forward_pre_hook(_enter, with_kwargs=True))
        handles.append(module.register_forward_hook(_leave, always_call=True))
    if hasattr(model, "generate"):
        handles.append(Placed(model, "generate", MethodType(_generate, model)))
    return handles


def _generate(model: Any, *args: Any, **kwargs: Any) -> Any:
    mask = _real(model, kwargs.get("attention_mask"))
    config = kwargs.get("generation_config") or model.generation_config
    chunk = kwargs.get("prefill_chunk_size") or getattr(config, "prefill_chunk_size", None)
    if chunk and mask is None:
        raise Refused(
            f"generate with prefill_chunk_size={chunk}",
            "the first call sees a part of the prompt, and there is no attention_mask of all of it",
            "give generate the prompt's attention_mask",
        )
    token = _generation.set(Generation(model, mask))
    try:
        return type(model).generate(model, *args, **kwargs)
    finally:
        _generation.reset(token)


@torch.compiler.disable()
def _enter(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    if current_layout() is not None:
        return
    given = dict(zip(inspect.signature(module.forward).parameters, args, strict=False)) | kwargs
    tokens = given.get("input_ids")
    num_rows, width = (given["inputs_embeds"] if tokens is None else tokens).shape[:2]
    cache = given.get("past_key_values")
    past = 0 if cache is None else int(cache.get_seq_length())
    mask = _real(module, given.get("attention_mask"))
    if mask is None and past == 0:
        _refuse_packed(given.get("position_ids"))
    generation = _generation.get()
    if generation is not None and generation.of(module):
        if generation.spans is None:
            whole, stop = mask, past + width
            if generation.mask is not None:
                whole, stop = generation.mask, generation.mask.shape[-1]
            generation.spans = _spans(whole, num_rows, stop)
        spans = generation.spans
    else:
        # behind a cache nothing says which of its tokens were the prompt: all of them, and none of these
        spans = _spans(mask, num_rows, past or width)
    beams = num_rows // len(spans)  # `generate` repeats a row for each beam or sample
    prompts = (
        Prompt(row, spans[row // beams][0] - past, spans[row // beams][1])
        for row in range(num_rows)
    )
    _call.set(Call(module, tuple(prompts), width, past, outer=_call.get()))


@torch.compiler.disable()
def _leave(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
    call = _call.get()
    if call is not None and call.model is module:
        _call.set(call.outer)


def _real(module: nn.Module, mask: Any) -> Any:
    """The mask [B, T] of real tokens, of families whose own masks are [B, 1, S, T] and which can tell it."""
    tell = getattr(module, "real_tokens", None)
    return tell(mask) if tell is not None and getattr(mask, "ndim", 2) == 4 else mask


def _spans(mask: Tensor | None, num_rows: int, stop: int) -> list[tuple[int, int]]:
    """First real token of each row and the number of tokens from there to the last real one before `stop`."""
    if mask is None:
        return [(0, stop)] * num_rows
    if not isinstance(mask, Tensor) or mask.ndim != 2:
        shape = list(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
        raise Refused(
            "finding the prompts' first and last tokens",
            f"the model was called with an attention_mask that is not [rows, tokens] ({shape})",
            "give a mask with 1 for each real token and 0 for padding; give it to generate itself",
        )
    rows: Sequence[Sequence[int]] = mask[:, :stop].long().tolist()
    found = []
    for row in rows:
        real = [i for i, value in enumerate(row) if value]
        found.append((real[0], real[-1] + 1 - real[0]) if real else (0, 0))
    return found


def _refuse_packed(position_ids: Tensor | None) -> None:
    """transformers takes positions that restart for packed documents, whose prompts nobody can tell here."""
    if position_ids is not None and position_ids.ndim == 3:
        position_ids = position_ids[:, 1]  # the other axis goes back to the blank
    if position_ids is not None and bool((position_ids.diff(dim=-1) < 0).any()):
        raise Refused(
            "finding the prompts' first and last tokens",
            "the positions restart inside a row: it holds several documents, and no one says their prompts",
            "call the model through its stage, or give one document in each row",
        )
