"""Messages -> ids and labels in one pass: the one renderer of training, evaluation and prediction.

(interface first; the implementation follows)
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from luthier.data.formats import BadRow, Message


class Dropped(BadRow):
    """A sound row that gives no example: too long under `overlong=drop`, or no room for its answer."""


class TooLong(BadRow):
    """A row longer than `length` under `overlong=refuse`; the reader refuses the data with its line."""


@dataclass(frozen=True)
class Example:
    """One document: `input_ids` int32 [n], `labels` int64 [n] already shifted (labels[i] is the token
    after input_ids[i], or -100), the last always -100; 2 <= n <= length. `cut` counts the tokens that
    truncation lost; `note` is a remark for the ledger, or empty."""

    input_ids: np.ndarray
    labels: np.ndarray
    cut: int = 0
    note: str = ""


class Renderer:
    """Renderer(tokenizer, template="auto", length=2048, source_length=None, overlong="cut", stop_ids=())

    `template` is `data.template`; `stop_ids` are the end ids of the model's generation config. Picklable.
    """

    notes: tuple[str, ...]  # remarks on the template that hold for all rows, to be shown once
    stop_ids: tuple[int, ...]  # tokens that end an answer

    def __init__(
        self,
        tokenizer: Any,
        template: str = "auto",
        length: int = 2048,
        source_length: int | None = None,
        overlong: str = "cut",
        stop_ids: Iterable[int] = (),
    ) -> None: ...

    def encode(self, messages: Sequence[Message]) -> list[Example]:
        """One example; several under `overlong=split`. Raises BadRow, Dropped, TooLong; Refused when the
        template loses a message."""
        ...

    def prompt(self, messages: Sequence[Message]) -> list[int]:
        """Ids to generate from: everything before the last answer (which may be absent)."""
        ...

    def decode(self, ids: Sequence[int]) -> str:
        """Text of generated ids, without special tokens and without what follows the first stop token."""
        ...

    def ends_in_stop(self, example: Example) -> bool:
        """Whether the last supervised token is a stop token."""
        ...


def reference(messages: Sequence[Message]) -> str:
    """The last answer, what a generated one is compared to; empty where there is none."""
    ...


def check_labels(input_ids: Any, labels: Any, document_ids: Any = None) -> None:
    """Raise Failed unless every label is -100 or the next token of its own document; the last label of
    a document and all labels of padding must be -100. Arrays or CPU tensors, [n] or [B, S]."""
    ...


def check_supervision(renderer: Renderer, messages: Sequence[Message], example: Example) -> None:
    """Raise Failed unless exactly the supervised answers are trained, by comparing with `prompt`."""
    ...
