"""Rows of documents -> a `Batch` of tensors, padded to the longest row. Which rows come together is `loader.py`'s."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch

from luthier.batch import FILLER, IGNORE, PADDING, Batch
from luthier.data.checks import check_labels
from luthier.data.encode import Positions
from luthier.data.streaming import Row, Step


def collate(
    rows: Sequence[Row], pad_id: int, first: int = 0, positions_of: Positions | None = None
) -> Batch:
    """Rows of documents (ids and labels, [n] each) -> a `Batch` padded on the right to the longest row.

    `first` is the serial number of the first row. `positions_of` gives the positions [2, n] of a document in
    families with two axes; without it they are the document's third array, or 0, 1, ... Raises Failed for a
    label that is not the next token.
    """
    width = max(sum(len(ids) for ids, *_ in row) for row in rows)
    shape = (len(rows), width)
    input_ids = np.full(shape, pad_id, dtype=np.int64)  # [B, S]
    labels = np.full(shape, IGNORE, dtype=np.int64)
    axes = () if positions_of is None else (2,)
    positions = np.zeros((len(rows), *axes, width), dtype=np.int64)
    documents = np.full(shape, PADDING, dtype=np.int64)
    for r, row in enumerate(rows):
        start = 0
        for d, (ids, wanted, *places) in enumerate(row):
            span = slice(start, start + len(ids))
            input_ids[r, span] = ids
            labels[r, span] = wanted
            own = places[0] if places else np.arange(len(ids))
            positions[r, ..., span] = positions_of(ids) if positions_of else own
            documents[r, span] = d
            start += len(ids)
    check_labels(input_ids, labels, documents)
    tensors = (torch.from_numpy(array) for array in (input_ids, labels, positions, documents))
    return Batch(*tensors, rows=tuple(range(first, first + len(rows))))


def filler(step: Step, pad_id: int, positions_of: Positions | None) -> Batch:
    """A document of the step that supervises nothing, for a rank that has no row of its own.

    A real one: the forward has to reach every weight, as on the other ranks.
    """
    ids, labels, *places = step.rows[0][0]
    row = [(ids, np.full_like(labels, IGNORE), *places)]
    return replace(collate([row], pad_id, 0, positions_of), rows=(FILLER,))


def num_slots(sizes: Sequence[int], micro_batch: int) -> int:
    """Places of a step's batches, padding included, for rows of these sizes."""
    cut = [sizes[i : i + micro_batch] for i in range(0, len(sizes), micro_batch)]
    return sum(max(part) * len(part) for part in cut)
