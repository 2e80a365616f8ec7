"""Checks that a run must pass: at start-up, after the first backward, and at every step.

Each raises Failed and names the culprit. `check_batch`: are the labels what the documents say?
`check_isolation`: does a document change what another one computes? `check_first_gradients`: is
exactly what should be trained being trained? `check_finite`: is anything NaN or infinite? They read models
and batches and leave both as they were; when to call them is the loop's affair.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from luthier.batch import IGNORE, PADDING, Batch, Layout, Segment
from luthier.errors import Failed, NotFinite
from luthier.train.evaluate import evaluating

# tokens of a document that the isolation check looks at; three in a row cross a block of 64
CUT = 32
DOCUMENTS = 6  # documents that it looks at


@dataclass(frozen=True)
class Isolation:
    """What `check_isolation` compared; no documents means there was nothing to compare."""

    documents: int
    tokens: int
    seconds: float


def check_batch(batch: Batch, *, skips: bool = False, axes: int | None = None) -> None:
    """Labels, positions and document borders of a batch agree with its tokens.

    Every label is IGNORE or the next token of the same document; the last token of a document and
    padding are not supervised; documents are numbered 0, 1, ... along a row with padding behind them;
    positions are 0, 1, ... in each, or with `skips` rise from 0 (families with two position axes are not
    checked for that) and have the family's number of `axes`. Catches
    labels shifted once too often or not at all, and labels that leak across a border. Raises Failed
    with row and position.
    """
    if axes is not None and batch.position_ids.ndim != axes + 1:
        raise Failed(
            "checking the positions of a batch",
            f"their shape is {list(batch.position_ids.shape)}, the model's family has {axes} position axes",
            "this is a defect of the data pipeline, please report it",
        )
    ids, labels, documents = batch.input_ids, batch.labels, batch.document_ids
    border = Layout.of(batch).borders  # [B, S], True on first tokens
    last = torch.cat([border[:, 1:], torch.ones_like(border[:, :1])], 1)
    following = torch.cat([ids[:, 1:], ids[:, -1:]], 1)  # [B, S] the next token
    real = documents != PADDING
    supervised = labels != IGNORE
    _report(batch, supervised & ~real, "padding is supervised")
    _report(
        batch, supervised & last & real, "the last token of a document is supervised", _shift_hint
    )
    _report(
        batch,
        supervised & (labels != following),
        "the label is not the next token",
        _shift_hint,
    )
    before = torch.cat([torch.full_like(documents[:, :1], -1), documents[:, :-1]], 1)
    first_column = torch.zeros_like(border)
    first_column[:, 0] = True
    numbered = ~border | (documents == before + 1)
    _report(batch, real & ~numbered, "documents are not numbered 0, 1, ... along the row")
    _report(batch, real & ~first_column & (before == PADDING), "a document stands behind padding")
    positions = batch.position_ids
    if positions.ndim == 2:
        previous = torch.cat([torch.full_like(positions[:, :1], -1), positions[:, :-1]], 1)
        wanted = torch.where(border, 0, previous + 1)
        wrong = positions != wanted
        if skips:
            wrong = torch.where(border, wrong, positions < wanted)
        words = "rise from 0" if skips else "run 0, 1, ..."
        _report(batch, real & wrong, f"positions do not {words} in each document")


def check_isolation(
    stage: nn.Module, batch: Batch, *, kernel: str, rounding: float = 0.0
) -> Isolation:
    """Prove on the model and data at hand that documents of a row do not see each other.

    The first tokens of a few documents of `batch` are laid side by side in two rows; then the tokens of
    the first, and those of the last document of row 0 are changed, and every hidden state of every other
    document must be bitwise the same (eval mode, no gradient; three short forwards). `stage(batch)` gives
    hidden states [B, S, D]. `rounding`: relative difference allowed instead, for mixtures of experts, whose
    products are rounded differently when an expert gets other tokens. Raises Failed naming the attention
    `kernel`.
    """
    begin = time.perf_counter()
    small, segments = _side_by_side(batch)
    if len(segments) < 2:
        return Isolation(0, 0, 0.0)
    with evaluating(stage):
        reference = stage(small)  # [2, s, D]
        if not torch.isfinite(reference).all():
            raise Failed(
                "running the model on the first batch",
                f"its hidden states are not finite; {_culprit(dict(stage.named_parameters()), {})}",
                "check the weights of the model, or use model.dtype=float32",
            )
        for changed in (segments[0], [s for s in segments if s.row == 0][-1]):
            hidden = stage(_with_other_tokens(small, changed))
            distance = (hidden - reference).norm(dim=-1)
            same = distance <= rounding * reference.norm(dim=-1)  # [2, s]
            if same[changed.row, changed.start : changed.stop].all():
                raise Failed(
                    "checking that documents do not see each other",
                    "the model's hidden states do not depend on its tokens at all",
                    "check the weights of the model",
                )
            for other in segments:
                if other is not changed and not same[other.row, other.start : other.stop].all():
                    at = int((~same[other.row, other.start : other.stop]).nonzero()[0])
                    raise Failed(
                        "checking that documents of a row do not see each other",
                        f"with attention kernel '{kernel}' another document's tokens change the hidden "
                        f"state at token {at} of a document",
                        "use model.attention=math or data.packing=none, and report this",
                    )
    tokens = sum(s.stop - s.start for s in segments)
    return Isolation(len(segments), tokens, time.perf_counter() - begin)


def check_first_gradients(
    model: nn.Module,
    expected_trainable: Collection[str],
    may_be_zero: Collection[str] = (),
    *,
    gradients: Mapping[str, Tensor | None] | None = None,
    step: int = 1,
    zeros: bool = True,
) -> None:
    """After the first step's backwards: exactly the expected tensors are trained, each one really.

    The names with requires_grad equal `expected_trainable`; each of them has a finite gradient that is
    not all zero, but for those in `may_be_zero` (LoRA's A while B = 0, experts that saw no token);
    no other tensor has a gradient. `gradients`: name -> gradient where it is not in `.grad`
    (`MasterWeights.gradients()`). `zeros=False` lets all be zero, for a step without
    `num_seeing_several_keys`. Raises Failed with the number of the `step` and the names.
    """
    wrong: dict[str, list[str]] = {}
    expected, excused = set(expected_trainable), set(may_be_zero)
    found = dict(model.named_parameters())
    for name in sorted(expected - found.keys()):
        wrong.setdefault("to be trained but not in the model", []).append(name)
    for name, p in found.items():
        gradient = p.grad if gradients is None else gradients.get(name, p.grad)
        if p.requires_grad != (name in expected):
            problem = "frozen but to be trained" if name in expected else "trained but to be frozen"
        elif name not in expected:
            problem = "frozen but has a gradient" if gradient is not None else None
        elif gradient is None or not torch.any(gradient):  # NaN counts as non-zero here
            excuse = name in excused or not zeros
            problem = None if excuse else "trained but its gradient is zero"
        else:
            finite = torch.isfinite(gradient).all()
            problem = None if finite else "its gradient is not finite"
        if problem:
            wrong.setdefault(problem, []).append(name)
    if wrong:
        raise Failed(
            f"checking the gradients of step {step}",
            "; ".join(f"{problem}: {_listed(names)}" for problem, names in wrong.items()),
            "nothing was updated; check adapter.targets, the weights and the data",
        )


def num_seeing_several_keys(batch: Batch) -> int:
    """Supervised tokens behind the first of their document.

    The first attends to itself alone, with weight 1 whatever query and key are: from it alone, the
    gradients of both are exactly zero.
    """
    return int(((batch.labels != IGNORE) & ~Layout.of(batch).borders).sum())


def check_finite(
    loss: float,
    norm: float,
    *,
    step: int,
    rows: Collection[int],
    weights: Mapping[str, Tensor],
    gradients: Mapping[str, Tensor | None],
) -> None:
    """Loss and gradient norm of a step are finite. Call before the optimiser's step.

    Raises NotFinite naming the step, its rows, and the first of `weights`, else of `gradients`, that is not
    finite.
    """
    if math.isfinite(loss) and math.isfinite(norm):
        return
    raise NotFinite(
        f"step {step} over rows {_listed([str(r) for r in rows])}",
        f"loss {loss}, gradient norm {norm}; {_culprit(weights, gradients)}",
        "nothing was updated; look at these rows, try a smaller optim.lr or model.dtype=float32, or pass such "
        "steps over with train.on_nan=skip",
    )


def _culprit(weights: Mapping[str, Tensor], gradients: Mapping[str, Tensor | None]) -> str:
    """The first weight, else the first gradient, that is not finite, in words."""
    for kind, tensors in (("weight", weights), ("gradient of", gradients)):
        bad = [n for n, t in tensors.items() if t is not None and not torch.isfinite(t).all()]
        if bad:
            return f"the first that is not finite is the {kind} {bad[0]} ({len(bad)} in all)"
    return "every weight and gradient is finite, so it arose in the forward"


def _report(
    batch: Batch, wrong: Tensor, what: str, hint: Callable[[Batch], str] | None = None
) -> None:
    if not wrong.any():
        return
    row, position = (int(x) for x in wrong.nonzero()[0])
    serial = batch.rows[row] if batch.rows else row
    token, label = int(batch.input_ids[row, position]), int(batch.labels[row, position])
    raise Failed(
        "checking the batch",
        f"{what}, first in row {serial} at position {position} (token {token}, label {label}; "
        f"{int(wrong.sum())} such places){hint(batch) if hint else ''}",
        "labels[i] must be the token after input_ids[i] in the same document, or -100",
    )


def _shift_hint(batch: Batch) -> str:
    """Which wrong shift would explain the labels, if one does."""
    width = batch.labels.shape[1]
    for shift, words in ((2, "shifted once too often"), (0, "not shifted")):
        labels = batch.labels[:, : width - shift]
        tokens = batch.input_ids[:, shift:]
        counted = labels != IGNORE
        if counted.any() and float((labels == tokens)[counted].float().mean()) > 0.8:
            return f". The labels look {words}"
    return ""


def _side_by_side(batch: Batch) -> tuple[Batch, list[Segment]]:
    """A small batch of two rows made of the first tokens of a few documents, and where they lie.

    At least two documents share row 0; a lone document is cut in two. Row 1 ends in padding.
    """
    chosen = list(Layout.of(batch).segments[:DOCUMENTS])
    if len(chosen) == 1 and chosen[0].stop - chosen[0].start > 1:
        row, start, stop = chosen[0].row, chosen[0].start, chosen[0].stop
        middle = (start + min(stop, start + 2 * CUT)) // 2
        chosen = [Segment(row, start, middle), Segment(row, middle, stop)]
    pieces = [Segment(s.row, s.start, min(s.stop, s.start + CUT)) for s in chosen]
    half = max(2, (len(pieces) + 1) // 2)
    rows = [pieces[:half], pieces[half:]]
    width = 1 + max(sum(s.stop - s.start for s in row) for row in rows)
    tensors: dict[str, list[Tensor]] = {"input_ids": [], "position_ids": [], "document_ids": []}
    segments = []
    for number, row in enumerate(rows):
        at, columns = 0, []
        documents = torch.full((width,), PADDING, device=batch.document_ids.device)
        for document, s in enumerate(row):
            length = s.stop - s.start
            segments.append(Segment(number, at, at + length))
            columns.append((s.row, torch.arange(s.start, s.stop)))
            documents[at : at + length] = document
            at += length
        tensors["document_ids"].append(documents)
        for name in ("input_ids", "position_ids"):
            whole = getattr(batch, name)
            out = whole.new_zeros((*whole.shape[1:-1], width))
            parts = [whole[r][..., c.to(whole.device)] for r, c in columns]
            if parts:
                out[..., :at] = torch.cat(parts, -1)
            tensors[name].append(out)
    stacked = {name: torch.stack(rows) for name, rows in tensors.items()}
    labels = torch.full_like(stacked["input_ids"], IGNORE)
    return Batch(labels=labels, rows=(0, 1), **stacked), segments  # pyright: ignore[reportArgumentType]


def _with_other_tokens(batch: Batch, segment: Segment) -> Batch:
    """The batch with every token of one document replaced by another token that occurs in it (or 0, 1)."""
    ids = batch.input_ids.clone()
    low, high = int(ids.min()), int(ids.max())
    if low == high:
        low = 0 if high else 1
    part = ids[segment.row, segment.start : segment.stop]
    ids[segment.row, segment.start : segment.stop] = torch.where(part == high, low, high)
    return Batch(ids, batch.labels, batch.position_ids, batch.document_ids, batch.rows)


def _listed(names: list[str], most: int = 5) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more
