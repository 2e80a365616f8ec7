"""Proofs of labels and supervision, on the arrays that training reads."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from luthier.batch import IGNORE, PADDING
from luthier.data.encode import Example, Renderer
from luthier.data.formats import Message
from luthier.data.jinja import LAST_ONLY
from luthier.errors import Failed


def check_labels(input_ids: Any, labels: Any, document_ids: Any = None) -> None:
    """Raise Failed unless every label is -100 or the next token of its own document; the last label of
    a document and all labels of padding must be -100. Arrays or CPU tensors, [n] or [B, S]."""
    ids, wanted = np.atleast_2d(np.asarray(input_ids)), np.atleast_2d(np.asarray(labels))  # [B, S]
    documents = (
        np.zeros_like(ids) if document_ids is None else np.atleast_2d(np.asarray(document_ids))
    )
    allowed = np.full(ids.shape, IGNORE, dtype=np.int64)
    same = (documents[:, 1:] == documents[:, :-1]) & (documents[:, 1:] != PADDING)
    allowed[:, :-1] = np.where(same, ids[:, 1:], IGNORE)
    wrong = (wanted != IGNORE) & (wanted != allowed)
    if wrong.any():
        row, column = (int(i) for i in np.argwhere(wrong)[0])
        raise Failed(
            "checking the labels",
            f"{int(wrong.sum())} of {int((wanted != IGNORE).sum())} are not the next token of their document; "
            f"the first in row {row} at token {column}: label {wanted[row, column]}, next token {allowed[row, column]}",
            "this is a defect of the data pipeline, please report it",
        )


def check_supervision(renderer: Renderer, messages: Sequence[Message], example: Example) -> None:
    """Raise Failed unless the trained spans begin exactly where a prompt ends and the ids agree with it.

    `example` holds all of `messages`: not one of several after a split. One that was cut is not checked.
    """
    if example.cut or messages[0].role == "text":
        return
    example = renderer.without_marks(messages, example)
    answers = [i for i, message in enumerate(messages) if message.role == "assistant"]
    prompts = [renderer.prompt(messages[: i + 1]) for i in answers if messages[i].supervised]
    trained = example.labels != IGNORE
    starts = np.flatnonzero(trained & ~np.concatenate([[False], trained[:-1]])).tolist()
    expected = [len(prompt) - 1 - renderer.tokens.trained_before for prompt in prompts]
    if LAST_ONLY in example.note:
        expected, prompts = expected[-1:], prompts[-1:]
    same = all(example.input_ids[: len(p)].tolist() == p for p in prompts)
    if starts != expected or not same:
        raise Failed(
            "checking which tokens are trained",
            f"trained spans begin at tokens {starts}, answers at {expected}"
            + ("" if same else "; the prompt differs from the one used in prediction"),
            "this is a defect of the data pipeline, please report it",
        )
