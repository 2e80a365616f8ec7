"""`verify packing`: rows hold every example once, and a document computes what it computes alone.

The first pass over the data is handed out by the training loader and counted against the ledger. Then real
rows go through the user's own model: the tokens of some documents are changed and every hidden state of
the others must keep its bits; and each document's hidden states are compared with those of a row of its
own. What is checked at the start of every run, on less, is `train/gates.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from luthier.assemble import Built, Data, Text, build, name_of, open_data, open_text
from luthier.batch import IGNORE, Batch, Layout, Segment
from luthier.config import RunConfig
from luthier.configfile import Resolved
from luthier.data.corpus import Corpus
from luthier.data.dataset import Dataset
from luthier.data.loader import collate
from luthier.errors import Failed
from luthier.parallel.world import World
from luthier.train.evaluate import evaluating
from luthier.train.gates import check_batch, check_isolation

Document = tuple[np.ndarray, np.ndarray]  # ids and labels, [n] each

ROWS, TOKENS = 4, 2048  # rows that go through the model, and the most tokens of all of them
LAZY_STEPS = 20  # of lazy data, whose passes have no known end
# Largest ||packed - alone|| / ||alone||. Sums run in another order, no more; what saw other tokens is off
# by about 1. Half precision rounds every layer's result: 2^-8 (2^-11) in each of some dozens.
ROUNDING = {torch.float64: 1e-9, torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1}


@dataclass
class Counted:
    """What the loader handed out."""

    steps: int = 0
    rows: int = 0
    documents: int = 0
    tokens: int = 0
    supervised: int = 0
    slots: int = 0  # with padding
    longest: int = 0  # tokens of the longest row


def verify_packing(resolved: Resolved, say: Callable[[str], object] = print) -> dict[str, Any]:
    """Check the rows of the first pass, and a few of them on the model; gives the figures.

    Raises Failed when documents see each other or examples get lost, Refused for bad input.
    """
    for remark in resolved.remarks:
        say(f"note: {remark}")
    config, text, data = open_training(resolved.config)
    try:
        counted, batch = _first_pass(config, data, text.pad_id)
    finally:
        data.loader.close()
    about = data.train.ledger.packing
    say(
        f"{counted.documents:,} documents in {counted.rows:,} rows of at most {config.data.length:,} tokens "
        f"(packing {about['method']}): padding {1 - counted.tokens / counted.slots:.2%}\n"
        f"  {_accounted(counted, data)}"
    )
    built = build(config, train=False)
    batch = batch.to(built.device)
    kernel = f"attention {built.kernel}, {name_of(built.model.dtype)} on {built.device}"
    documents = Layout.of(batch).segments
    say(f"on the model ({kernel}): {len(documents)} documents in {len(batch.rows)} of these rows")
    changed = _check_bits(built, batch)
    say(
        f"  documents do not see each other: {changed} were changed, the others kept every bit"
        if changed
        else "  no row holds two documents: there is nothing to keep apart"
    )
    worst = _check_alone(built, batch, text)
    allowed = ROUNDING[built.model.dtype]
    say(
        f"  packed or alone: hidden states differ by {worst:.1e} at most (rounding; allowed {allowed:g})"
    )
    say(
        "verify packing: ok"
        if changed
        else "verify packing: ok, but there was nothing to keep apart"
    )
    return {
        **vars(counted),
        "padding_share": 1 - counted.tokens / counted.slots,
        "kernel": built.kernel,
        "documents_compared": len(documents),
        "documents_changed": changed,
        "largest_difference": worst,
    }


def open_training(config: RunConfig, world: World | None = None) -> tuple[RunConfig, Text, Data]:
    """Training rows alone (this rank's, in a `world`), and the config without evaluation."""
    quiet = config.evaluate.model_copy(update={"every": "never", "before": False})
    config = config.model_copy(update={"evaluate": quiet})
    text = open_text(config)
    return config, text, open_data(config, text, world=world)


def documents_of(batch: Batch) -> list[list[Document]]:
    """Ids and labels of the documents of each row."""
    rows: list[list[Document]] = [[] for _ in batch.rows]
    for s in Layout.of(batch).segments:
        ids, labels = batch.input_ids[s.row], batch.labels[s.row]
        rows[s.row].append((ids[s.start : s.stop].numpy(), labels[s.start : s.stop].numpy()))
    return rows


def _first_pass(config: RunConfig, data: Data, pad_id: int) -> tuple[Counted, Batch]:
    """Count the first pass over the data, check its labels, and take rows for the model."""
    counted = Counted()
    taken: list[list[Document]] = []
    lone: list[list[Document]] = []  # a row of one document, where no row has two
    steps = data.loader.step_batches()
    for _ in range(data.loader.steps_per_epoch or LAZY_STEPS):
        for batch in next(steps):
            check_batch(batch, skips=config.data.pose != "off")
            _count(counted, batch)
            for row in documents_of(batch) if len(taken) < ROWS else ():
                if len(row) > 1 and len(taken) < ROWS:
                    taken.append(_cut(row, TOKENS // ROWS))
                lone = lone or [_cut(row, TOKENS // ROWS)]
        counted.steps += 1
    steps.close()
    if counted.longest > config.data.length:
        raise Failed(
            f"packing rows of data.length={config.data.length}",
            f"one has {counted.longest} tokens",
            "report this",
        )
    train = data.train
    positions = train.positions if isinstance(train, Corpus) else train.encoder.renderer.positions
    return counted, collate(taken or lone, pad_id, positions_of=positions)


def _count(counted: Counted, batch: Batch) -> None:
    counted.rows += len(batch.rows)
    counted.documents += len(Layout.of(batch).segments)
    counted.tokens += batch.num_real_tokens
    counted.supervised += batch.num_supervised
    counted.slots += batch.input_ids.numel()
    counted.longest = max(counted.longest, batch.input_ids.shape[1])


def _cut(row: list[Document], room: int) -> list[Document]:
    """The first documents of a row that fit into `room` tokens, but two if it has them, cut to half of it."""
    kept: list[Document] = []
    used = 0
    for number, (ids, labels) in enumerate(row):
        size = min(len(ids), room // 2) if number < 2 else len(ids)
        if used + size > room:
            break
        used += size
        kept.append(shortened(ids[:size], labels[:size]))
    return kept


def shortened(ids: np.ndarray, labels: np.ndarray) -> Document:
    """A part of a document as one of its own: its last token has no next one."""
    labels = labels.copy()
    labels[-1] = IGNORE
    return ids, labels


def _accounted(counted: Counted, data: Data) -> str:
    """Compare what was handed out with the ledger. Raises Failed."""
    dataset = data.train
    if not isinstance(dataset, Dataset) or len(dataset.source.parts) > 1:
        kind = "a mixture is drawn" if isinstance(dataset, Dataset) else "lazy data is endless"
        kind = "verify data counts the rows" if isinstance(dataset, Corpus) else kind
        return f"the labels of {counted.steps} steps are right ({kind}: not counted against the ledger)"
    ledger = dataset.ledger
    given = (counted.documents, counted.tokens, counted.supervised)
    wanted = (ledger.num_examples, ledger.num_tokens, ledger.num_supervised)
    if given != wanted:
        raise Failed(
            "counting the first pass against the ledger",
            f"the loader gave {given} documents, tokens and trained tokens, the ledger has {wanted}",
            "report this; data.packing=none may help",
        )
    return (
        f"one pass hands out each of them once: {counted.tokens:,} tokens, "
        f"{counted.supervised:,} trained, as in the ledger"
    )


def _check_bits(built: Built, batch: Batch) -> int:
    """Change documents and look at all others; gives how many were changed. Raises Failed."""
    check_isolation(built.stage, batch, kernel=built.kernel)
    segments = list(Layout.of(batch).segments)
    changed = 0
    with evaluating(built.stage):
        reference = built.stage(batch)  # [B, S, D]
        for part in _rounds(segments):
            hidden = built.stage(_with_other_tokens(batch, part))
            same = torch.eq(hidden, reference).all(-1)  # [B, S]
            for s in segments:
                if s not in part and not same[s.row, s.start : s.stop].all():
                    raise Failed(
                        "checking that documents of a row do not see each other",
                        f"with attention kernel '{built.kernel}' a document of {s.stop - s.start} tokens in "
                        f"row {s.row} changes with other documents",
                        "use model.attention=math or data.packing=none, and report this",
                    )
            changed += len(part)
    return changed


def _rounds(segments: list[Segment]) -> Iterator[list[Segment]]:
    """Documents that are changed together, one per row of several: the first, the middle, the last ones."""
    rows: dict[int, list[Segment]] = {}
    for s in segments:
        rows.setdefault(s.row, []).append(s)
    several = [row for row in rows.values() if len(row) > 1]
    places = [sorted({0, len(row) // 2, len(row) - 1}) for row in several]
    for turn in range(3):
        chosen = zip(several, places, strict=True)
        part = [row[place[turn]] for row, place in chosen if turn < len(place)]
        if part:
            yield part


def _with_other_tokens(batch: Batch, part: list[Segment]) -> Batch:
    """Every token of these documents replaced by another one of the batch."""
    ids = batch.input_ids.clone()
    low, high = int(ids.min()), int(ids.max())
    for s in part:
        old = ids[s.row, s.start : s.stop]
        ids[s.row, s.start : s.stop] = torch.where(old == high, low, high)
    return replace(batch, input_ids=ids)


def _check_alone(built: Built, batch: Batch, text: Text) -> float:
    """Largest relative difference of a document's hidden states packed and alone. Raises Failed."""
    worst = 0.0
    with evaluating(built.stage):
        packed = built.stage(batch)  # [B, S, D]
        rows = documents_of(batch.to("cpu"))
        documents = [document for row in rows for document in row]
        for s, document in zip(Layout.of(batch).segments, documents, strict=True):
            one = collate([[document]], text.pad_id, positions_of=text.renderer.positions)
            alone = built.stage(one.to(built.device))[0]
            difference = relative(packed[s.row, s.start : s.stop], alone)
            worst = max(worst, difference)
            if not difference <= ROUNDING[built.model.dtype]:
                raise Failed(
                    "comparing documents in packed rows with the same documents alone",
                    f"the hidden states of one with {s.stop - s.start} tokens in row {s.row} differ by "
                    f"{difference:.1e} (relative; rounding explains {ROUNDING[built.model.dtype]:g})",
                    "use data.packing=none, and report this with the model's family",
                )
    return worst


def relative(ours: Tensor, reference: Tensor) -> float:
    """||ours - reference|| / ||reference||, in float64."""
    a, b = ours.detach().double(), reference.detach().double()
    return float((a - b).norm() / b.norm())
