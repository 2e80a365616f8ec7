"""Rows as a reader sees them, from the very arrays that training reads.

Each document is shown with what is trained and what is only context, its stop tokens, its end and the
padding, then a line of counts. With colours on a terminal; `as_text` has marks instead. A token counts
as trained when the label of the token before it asks for it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any, Literal

import numpy as np
from rich.text import Text

from luthier.batch import IGNORE, PADDING, Batch

Kind = Literal["context", "trained", "stop", "wrong"]
STYLES: dict[Kind, str] = {
    "context": "dim",
    "trained": "bold green",
    "stop": "bold black on green",
    "wrong": "bold white on red",
}
MARKS: dict[Kind, tuple[str, str]] = {
    "context": ("", ""),
    "trained": ("⟦", "⟧"),
    "stop": ("⟦", "⟧■"),
    "wrong": ("⚠⟦", "⟧⚠"),
}
LEGEND: dict[Kind, str] = {
    "context": "context",
    "trained": "trained",
    "stop": "trained stop token",
    "wrong": "label is not this token",
}


@dataclass(frozen=True)
class Document:
    """One document of one row: its runs of equal kind as text, and its counts. `labels_amiss` counts
    labels that are no token of the document, such as one on its last token."""

    row: int
    number: int
    runs: tuple[tuple[Kind, str], ...]
    num_tokens: int
    num_trained: int
    ends_in_stop: bool
    labels_amiss: int

    @property
    def counts(self) -> str:
        end = (
            "ends in a trained stop token"
            if self.ends_in_stop
            else "no trained stop token at its end"
        )
        amiss = f", {self.labels_amiss} labels amiss" if self.labels_amiss else ""
        return (
            f"row {self.row}, document {self.number}: {self.num_tokens} tokens, "
            f"{self.num_trained} trained, {end}{amiss}"
        )


@dataclass(frozen=True)
class Padding:
    row: int
    num_tokens: int

    @property
    def counts(self) -> str:
        return f"row {self.row}, padding: {self.num_tokens} tokens"


def as_rich(
    batches: Iterable[Batch], tokenizer: Any, stop_ids: Iterable[int], limit: int | None = None
) -> Iterator[Text]:
    """One coloured text for each of the first `limit` documents, the legend first. `stop_ids` are the renderer's."""
    yield Text(" ").join(Text(LEGEND[kind], STYLES[kind]) for kind in STYLES)
    for part in islice(documents(batches, tokenizer, stop_ids), limit):
        text = Text().append(f"── {part.counts}\n", "cyan")
        for kind, run in part.runs if isinstance(part, Document) else ():
            text.append(run, STYLES[kind])
        yield text


def as_text(
    batches: Iterable[Batch], tokenizer: Any, stop_ids: Iterable[int], limit: int | None = None
) -> str:
    """The same without colours: trained text in ⟦⟧, a trained stop token followed by ■."""
    lines = [" ".join(MARKS[kind][0] + LEGEND[kind] + MARKS[kind][1] for kind in MARKS)]
    for part in islice(documents(batches, tokenizer, stop_ids), limit):
        lines.append(f"── {part.counts}")
        if isinstance(part, Document):
            lines.append("".join(MARKS[kind][0] + run + MARKS[kind][1] for kind, run in part.runs))
    return "\n".join(lines)


def documents(
    batches: Iterable[Batch], tokenizer: Any, stop_ids: Iterable[int]
) -> Iterator[Document | Padding]:
    """The documents of all rows in order, and the padding behind them."""
    stops = np.array(sorted(stop_ids))
    for batch in batches:
        arrays = [
            a.cpu().numpy() for a in (batch.input_ids, batch.labels, batch.document_ids)
        ]  # each [B, S]
        for i, (ids, labels, numbers) in enumerate(zip(*arrays, strict=True)):
            row = batch.rows[i] if batch.rows else i
            borders = np.flatnonzero(np.diff(numbers)) + 1
            for part in np.split(np.arange(len(ids)), borders):
                if numbers[part[0]] == PADDING:
                    yield Padding(row, len(part))
                else:
                    number = int(numbers[part[0]])
                    yield _document(row, number, ids[part], labels[part], tokenizer, stops)


def _document(
    row: int, number: int, ids: np.ndarray, labels: np.ndarray, tokenizer: Any, stops: np.ndarray
) -> Document:
    asked = labels[:-1]  # asked[i] is what the model is asked for at ids[i + 1]
    trained = np.concatenate([[False], asked != IGNORE])
    wrong = np.concatenate([[False], (asked != IGNORE) & (asked != ids[1:])])
    kinds = np.where(trained, np.where(np.isin(ids, stops), 2, 1), 0)
    kinds[wrong] = 3
    names: tuple[Kind, ...] = ("context", "trained", "stop", "wrong")
    runs: list[tuple[Kind, str]] = [
        (names[kinds[part[0]]], tokenizer.decode(ids[part].tolist(), skip_special_tokens=False))
        for part in np.split(np.arange(len(ids)), np.flatnonzero(np.diff(kinds)) + 1)
    ]
    last = np.flatnonzero(trained)[-1:]
    return Document(
        row=row,
        number=number,
        runs=tuple(runs),
        num_tokens=len(ids),
        num_trained=int(trained.sum()),
        ends_in_stop=bool(len(last)) and bool(np.isin(ids[last], stops)[0]) and not wrong[last][0],
        labels_amiss=int(wrong.sum()) + int(labels[-1] != IGNORE),
    )
