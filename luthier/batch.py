"""What the model is fed: four tensors, and the layout of documents derived from them once.

A `Batch` is all a model sees of the data. A `Layout` says where documents lie and is what attention
kernels, dropout and position-dependent adapters read. Stages enter `layout_scope` around the model's
forward, so that no model has to pass it on. Who packs rows is `data/`; who attends is `models/attention`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Protocol

import torch
from torch import Tensor

IGNORE = -100  # a label that is not supervised
FILLER = -1  # the serial number of a row that counts for nothing
PADDING = -1  # the document id of padding: one more document, seen by nobody else


@dataclass(frozen=True)
class Batch:
    """Rows of packed documents.

    `input_ids` [B, S]; `labels` [B, S], already shifted (labels[i] is the token after input_ids[i]),
    `IGNORE` where not supervised and always on a document's last token; `position_ids` [B, S] (or
    [B, 2, S] for families with two axes), restarting in each document; `document_ids` [B, S], 0, 1, ...
    along a row and `PADDING` behind the last document. `rows` are the serial numbers of the rows in
    the order of the whole run: they name the rows in reports and seed per-row randomness.
    """

    input_ids: Tensor
    labels: Tensor
    position_ids: Tensor
    document_ids: Tensor
    rows: tuple[int, ...] = ()
    share: Share | None = None  # where the tensors above are some columns of the rows only

    @property
    def num_supervised(self) -> int:
        """Tokens whose loss counts."""
        return int((self.labels != IGNORE).sum())

    @property
    def num_real_tokens(self) -> int:
        """Non-padding tokens, prompt and answer (rule 8 of the contract)."""
        return int((self.document_ids != PADDING).sum())

    @property
    def is_filler(self) -> bool:
        """Whether no row of the data is in it: its tokens count nowhere."""
        return set(self.rows) == {FILLER}

    def to(self, device: torch.device | str) -> Batch:
        move = {n: getattr(self, n).to(device, non_blocking=True) for n in TENSORS}
        return replace(self, share=self.share and self.share.to(device), **move)


TENSORS = ("input_ids", "labels", "position_ids", "document_ids")


class Exchange(Protocol):
    """How attention reaches the tokens of the other context-parallel ranks (`parallel/context.py`); n ranks.

    `method` is `parallel.context_method`. All of them are differentiable, and every rank must call them.
    """

    method: str
    rank: int
    ranks: int

    def gather(self, x: Tensor, share: Share, /) -> Tensor:
        """[B, K, s, D] -> [B, K, S, D]: the tokens of all ranks, in the order of the row."""
        ...

    def to_heads(self, x: Tensor, share: Share, /) -> Tensor:
        """[B, H, s, D] -> [B, H/n, S, D]: all tokens of this rank's heads."""
        ...

    def to_tokens(self, x: Tensor, share: Share, /) -> Tensor:
        """[B, H/n, S, D] -> [B, H, s, D]: back again."""
        ...


@dataclass(frozen=True)
class Share:
    """The part of each row of a batch that one of n context-parallel ranks has: s of its S columns.

    `whole` are the rows, padded so that S = n * s; `width` is S before that. `columns` [B, s] rise along the row.
    `everyone` [B, S] are the columns of all ranks, one rank after the other; `order` [B, S] undoes it: column j
    of the row is at order[j] there.
    """

    whole: Batch
    columns: Tensor
    everyone: Tensor
    order: Tensor
    width: int
    exchange: Exchange

    def of(self, whole: Tensor) -> Tensor:
        """[B, S, ...] -> [B, s, ...]."""
        rows = torch.arange(len(whole), device=whole.device)[:, None]
        return whole[rows, self.columns.to(whole.device)]

    def whole_shape(self, shape: Sequence[int]) -> tuple[int, ...]:
        """[B, s, ...] -> [B, S, ...]."""
        return (shape[0], self.everyone.shape[1], *shape[2:])

    @cached_property
    def places(self) -> list[dict[int, int]]:
        """Of each row: column -> where this rank has it."""
        return [{c: i for i, c in enumerate(row)} for row in self.columns.tolist()]

    def to(self, device: torch.device | str) -> Share:
        names = ("whole", "columns", "everyone", "order")
        return replace(self, **{name: getattr(self, name).to(device) for name in names})


@dataclass(frozen=True)
class PrefixKeys:
    """Keys and values that one layer's attention sees before each document's own (prefix tuning, prompt tuning).

    `keys` and `values` are used as they are: rotated already, where the family rotates. `virtual`: they are
    those of P tokens right before the document, so that a sliding window counts their distance; otherwise
    no window hides them.
    """

    keys: Tensor  # [P, K, D]
    values: Tensor  # [P, K, D]
    virtual: bool = False


@dataclass(frozen=True)
class Segment:
    """One document inside a batch: tokens `start` to `stop` (exclusive) of row `row`."""

    row: int
    start: int
    stop: int


@dataclass(frozen=True)
class Layout:
    """Where the documents of one batch lie. Derived facts are computed on first use and kept.

    Everything in it is about whole rows; with `share`, the model that runs has some of their columns only.
    """

    document_ids: Tensor  # [B, S]
    position_ids: Tensor  # [B, S] or [B, 2, S]
    rows: tuple[int, ...] = ()
    cache: dict[str, Any] = field(default_factory=dict)  # a kernel's own per-batch artefacts
    labels: Tensor | None = None  # [B, S]
    share: Share | None = None

    @classmethod
    def of(cls, batch: Batch) -> Layout:
        share, whole = batch.share, batch if batch.share is None else batch.share.whole
        ids, places = whole.document_ids, whole.position_ids
        return cls(ids, places, batch.rows, labels=whole.labels, share=share)

    def here(self, whole: Tensor) -> Tensor:
        """Of a tensor [B, S, ...] the columns that the running model has, [B, s, ...]."""
        return whole if self.share is None else self.share.of(whole)

    @property
    def shape(self) -> tuple[int, int]:
        """(B, s): the rows of the running model."""
        batch, width = (self.document_ids if self.share is None else self.share.columns).shape
        return batch, width

    @cached_property
    def borders(self) -> Tensor:
        """[B, S] bool: True on the first token of each run of equal document ids."""
        ids = self.document_ids
        first = torch.ones_like(ids[:, :1], dtype=torch.bool)
        return torch.cat([first, ids[:, 1:] != ids[:, :-1]], dim=1)

    @cached_property
    def segments(self) -> tuple[Segment, ...]:
        """All real documents in row order; padding is left out."""
        ids = self.document_ids.cpu()
        width = ids.shape[1]
        rows, starts = self.borders.cpu().nonzero(as_tuple=True)
        out = []
        pairs = list(zip(rows.tolist(), starts.tolist(), strict=True))
        for i, (row, start) in enumerate(pairs):
            last = i + 1 == len(pairs) or pairs[i + 1][0] != row
            stop = width if last else pairs[i + 1][1]
            if int(ids[row, start]) != PADDING:
                out.append(Segment(row, start, stop))
        return tuple(out)

    @cached_property
    def prompt_lengths(self) -> tuple[int, ...]:
        """Tokens of each document of `segments` that stand before its last answer: what a model is given
        when it is to generate that answer. The whole document where nothing is supervised. With two
        position axes the context and the token that opens the answer, which may be trained itself."""
        if self.labels is None:
            return tuple(s.stop - s.start for s in self.segments)
        supervised = (self.labels != IGNORE).cpu()
        if self.in_context is not None:
            context = self.in_context.cpu()
            counts = []
            for s in self.segments:
                trained = bool(supervised[s.row, s.start : s.stop].any())
                size = int(context[s.row, s.start : s.stop].sum()) + 1
                counts.append(min(size, s.stop - s.start) if trained else s.stop - s.start)
            return tuple(counts)
        out = []
        for s in self.segments:
            marks = supervised[s.row, s.start : s.stop]
            before = torch.cat([marks.new_zeros(1), marks[:-1]])
            firsts = (marks & ~before).nonzero()  # label i is token i + 1: the prompt ends with i
            out.append(int(firsts[-1]) + 1 if len(firsts) else s.stop - s.start)
        return tuple(out)

    @cached_property
    def in_context(self) -> Tensor | None:
        """[B, S] bool: tokens that all of their document sees, in families with two position axes (second
        position 0). None in families with one: there a token is seen from itself onward."""
        return self.position_ids[:, 1] == 0 if self.position_ids.ndim == 3 else None

    @cached_property
    def cumulative_lengths(self) -> tuple[Tensor, int]:
        """Borders in the flattened [B*S] tokens, [n+1] int32 with padding as a document, and the longest."""
        flat = self.borders.flatten().nonzero().flatten()
        total = torch.tensor([self.document_ids.numel()], device=flat.device)
        bounds = torch.cat([flat, total]).to(torch.int32)
        return bounds, int(bounds.diff().max())

    @cached_property
    def flashmask_bounds(self) -> Tensor:
        """[B, S] int32: the first query row that may no longer see this key column (exclusive end of its
        document); 0 on padding columns. Query i sees key j iff j <= i < bounds[j]."""
        ids = self.document_ids
        width = ids.shape[1]
        index = torch.arange(width, device=ids.device).expand_as(ids)
        starts = torch.where(self.borders, index, width)
        # the end of column j's document is the next border after j
        after = torch.cat([starts[:, 1:], torch.full_like(starts[:, :1], width)], dim=1)
        ends = after.flip(1).cummin(1).values.flip(1)
        return torch.where(ids == PADDING, 0, ends).to(torch.int32)


_current: ContextVar[Layout | None] = ContextVar("luthier_layout", default=None)


def current_layout() -> Layout | None:
    """The layout of the forward that is running, or None outside a stage."""
    return _current.get()


@contextmanager
def layout_scope(layout: Layout | None) -> Iterator[None]:
    """Make `layout` the current one. A recomputed forward must enter the scope of its first run again."""
    token = _current.set(layout)
    try:
        yield
    finally:
        _current.reset(token)


_captured: ContextVar[dict[int, tuple[Tensor, Tensor]] | None] = ContextVar(
    "luthier_captured", default=None
)


def current_capture() -> dict[int, tuple[Tensor, Tensor]] | None:
    """Where the attention layers of the forward that is running put their keys and values; None outside `capture`."""
    return _captured.get()


@contextmanager
def capture() -> Iterator[dict[int, tuple[Tensor, Tensor]]]:
    """Collect what the layers attend to in the calls inside: layer_idx -> key, value [B, K, T, D].

    They are the tensors that the layers gave, with their gradients' graph. Prefix keys are left out
    meanwhile: this is how they are computed.
    """
    found: dict[int, tuple[Tensor, Tensor]] = {}
    token = _captured.set(found)
    try:
        yield found
    finally:
        _captured.reset(token)
