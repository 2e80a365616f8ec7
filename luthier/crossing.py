"""Where hidden states leave one pipeline stage and enter the next, inside a model's forward.

In the place of a layer of another stage stands `models.partial.Absent`, which hands its input to the crossing of the
forward that runs. A training stage has a `Border`: what was received enters there, what is to be sent
leaves. Anything else that runs the model (checks, evaluation, generation) crosses by `parallel.pipeline.Relay`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor


class Crossing(Protocol):
    def at(self, number: int, hidden: Tensor) -> Tensor:
        """What leaves the place of layer `number`, of another stage, where `hidden` [B, S, D] entered it."""
        ...


@dataclass
class Border:
    """The two ends of one stage, which has the layers `first` to `last`.

    `given` enters in the place of the layer before the first: whatever the model made of its input until there is
    dropped, so a family that scales or shifts embeddings does it on the first stage alone.
    `aside`: the same for tokens of their own that pass through the layers beside the batch's (prompt tuning).
    """

    first: int
    last: int
    given: Tensor | None = None
    taken: Tensor | None = None
    aside: Border | None = None

    def at(self, number: int, hidden: Tensor) -> Tensor:
        if number == self.first - 1 and self.given is not None:
            return self.given
        if number == self.last + 1:
            self.taken = hidden
        return hidden


_current: ContextVar[Crossing | None] = ContextVar("luthier_crossing", default=None)


def current_crossing() -> Crossing | None:
    """The crossing of the forward that runs; None where no stage set one."""
    return _current.get()


@contextmanager
def crossing(how: Crossing | None) -> Iterator[None]:
    token = _current.set(how)
    try:
        yield
    finally:
        _current.reset(token)


@contextmanager
def aside() -> Iterator[None]:
    """Inside, tokens of their own run through the model: they cross beside the batch's."""
    here = _current.get()
    with crossing(here.aside if isinstance(here, Border) else here):
        yield
