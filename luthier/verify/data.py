"""`verify data`: every row of the run, rendered and compared with what it says.

For each row that is used: the labels are its next tokens; the trained tokens are its answers, told by
their text and not by the renderer's own bookkeeping; no message is lost; the prompt is the one of
prediction; the stored arrays are those of the renderer. Reading and rendering are `data/`'s.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from luthier.assemble import open_text
from luthier.batch import IGNORE
from luthier.configfile import Resolved
from luthier.data.blanks import Blanks
from luthier.data.checks import check_labels, check_supervision
from luthier.data.dataset import Dataset, LazyDataset, prepare
from luthier.data.encode import Example, Renderer
from luthier.data.formats import Message
from luthier.data.jinja import LAST_ONLY
from luthier.data.ledger import Ledger
from luthier.data.sources import Split
from luthier.errors import Failed, Refused
from luthier.train.progress import open_progress
from luthier.verify.corpus import verify_corpus

TELL_ROWS = 200  # rows between two signs of life
MOST_PRELUDES = 3  # different ones that are shown


@dataclass
class Found:
    """What was compared in the rows of one split."""

    rows: int = 0  # with an example
    supervised: int = 0  # tokens, each the next token of its document
    answers: int = 0  # trained spans that are an answer
    ended: int = 0  # of them ending in an end token
    preludes: list[str] = field(default_factory=list)  # what templates print before answers
    whole: int = 0  # rows that were neither cut nor split: all their messages are there
    prompts: int = 0  # rows whose prompt is that of prediction
    systems: int = 0  # rows with a system message, which is there


def verify_data(resolved: Resolved, say: Callable[[str], object] = print) -> dict[str, Any]:
    """Check all training and evaluation rows of a run; gives the figures by split.

    Raises Failed naming the first row that is wrong, Refused for data that cannot be trained at all.
    """
    config = resolved.config
    for remark in resolved.remarks:
        say(f"note: {remark}")
    text = open_text(config)
    if config.train.mode == "pretrain":
        return verify_corpus(config, text, say)
    figures: dict[str, Any] = {}
    splits: tuple[Split, ...] = ("train", "dev")
    for split in splits:
        dataset = prepare(config, text.renderer, split)
        if dataset is None:
            if split == "train":
                raise Refused(
                    f"training data at data.path={config.data.path}",
                    "it has no training part",
                    "give a folder with train.json or train/*.json, or a file",
                )
            continue
        progress = open_progress(config.log.progress)
        try:
            found, ledger = _check_rows(dataset, progress.activity)
        finally:
            progress.close()
            if isinstance(dataset, LazyDataset):
                dataset.workers.close()
        say(ledger.summary())
        say(_words(found, ledger))
        figures[split] = {**asdict(found), "ledger": ledger.to_dict()}
    say("verify data: ok")
    return figures


def _words(found: Found, ledger: Ledger) -> str:
    lines = [
        f"labels: all {found.supervised:,} are the next token of their own document",
        f"of {found.rows:,} rows {found.whole:,} were neither cut nor split; in these:",
        f"  every message is in the tokens; {found.systems:,} rows have a system message",
        f"  {found.answers:,} answers are trained, and nothing else; "
        f"{found.ended:,} of them up to an end token",
        f"  {found.prompts:,} rows begin with the very tokens that prediction asks with",
    ]
    if ledger.unended:
        lines.append(f"not ending in a trained end token: {', '.join(ledger.unended)}, ...")
    if found.preludes:
        shown = ", ".join(repr(text[:40]) for text in found.preludes)
        lines.append(f"the template's own text is trained before answers: {shown}")
    return "\n".join(f"  {line}" for line in lines)


def _check_rows(
    dataset: Dataset | LazyDataset, tell: Callable[[str, int | None, int | None], object]
) -> tuple[Found, Ledger]:
    """Render every row again and check it; the ledger is that of all rows, lazy or not."""
    encoder, renderer = dataset.encoder, dataset.encoder.renderer
    total = len(dataset.source)
    found, ledger = Found(), Ledger(dataset.split, dataset.source.name)
    stored = _stored(dataset) if isinstance(dataset, Dataset) else None
    for index in range(total):
        outcome = encoder.outcome(index)
        ledger.add(outcome.record)
        if outcome.examples:
            try:
                _check_row(renderer, encoder.messages(index), outcome.examples, found)
                if stored is not None:
                    _check_stored(outcome.examples, stored)
            except Failed as error:
                raise Failed(
                    f"{outcome.record.place}: {error.asked}", error.found, error.do
                ) from error
        if index % TELL_ROWS == 0:
            tell(f"checking {dataset.split} rows", index, total)
    ledger.notes = list(dataset.ledger.notes)
    ledger.packing = dict(dataset.ledger.packing)
    ledger.check(training=dataset.split == "train")
    ledger.reconcile(total)
    if stored is not None and next(stored, None) is not None:
        raise Failed("the stored examples", "there are more than the rows give", "report this")
    return found, ledger


def _stored(dataset: Dataset) -> Iterator[tuple[np.ndarray, ...]]:
    return (dataset.example(i) for i in range(len(dataset)))


def _check_stored(examples: Sequence[Example], stored: Iterator[tuple[np.ndarray, ...]]) -> None:
    """The next stored examples are these. Raises Failed."""
    for example in examples:
        read = next(stored, ())
        made = (example.input_ids, example.labels, example.positions)
        made = tuple(array for array in made if array is not None)
        if len(read) != len(made) or not all(map(np.array_equal, read, made)):
            raise Failed(
                "comparing the arrays that training reads with the row",
                "they are not what the renderer makes of it",
                "report this, and try data.workers=0",
            )


def _check_row(
    renderer: Renderer, messages: list[Message], examples: Sequence[Example], found: Found
) -> None:
    """All checks of one row. Raises Failed."""
    found.rows += 1
    for example in examples:
        check_labels(example.input_ids, example.labels)
        found.supervised += int((example.labels != IGNORE).sum())
    if len(examples) > 1 or examples[0].cut:
        return
    (example,) = examples
    found.whole += 1
    found.systems += messages[0].role == "system"
    if messages[-1].role == "user":  # a question without an answer was left out, and is noted
        messages = messages[:-1]
    if renderer.blanks is not None and messages[0].role == "text":
        _check_blanks(renderer, renderer.blanks, messages[0], example, found)
        return
    _check_messages(renderer, messages, example)
    if messages[0].role != "text":
        check_supervision(renderer, messages, example)
        found.prompts += 1
    _check_answers(renderer, messages, renderer.without_marks(messages, example), found)


def _check_blanks(
    renderer: Renderer, blanks: Blanks, message: Message, example: Example, found: Found
) -> None:
    """What was cut out and is trained fills the blanks of the text again. Raises Failed."""
    ids = example.input_ids.tolist()
    if blanks.filled(ids) != renderer.tokens(message.text):
        raise Failed(
            "filling the blanks of a text with what is trained",
            f"it is not the text that begins {message.text.strip()[:60]!r}",
            "look at the row with luthier preview",
        )
    for span in _spans(example):
        found.answers += 1
        found.ended += span[-1] in renderer.stop_ids


def _check_messages(renderer: Renderer, messages: Sequence[Message], example: Example) -> None:
    """Every message's text stands in the example's. Raises Failed."""
    whole = _squeezed(renderer, example.input_ids)
    for i, message in enumerate(messages):
        if _text(renderer, message, last=i == len(messages) - 1) not in whole:
            raise Failed(
                "looking for every message in the tokens",
                f"the {message.role} message {message.text.strip()[:60]!r} is not there",
                "look at the row with luthier preview, and at data.template",
            )


def _check_answers(
    renderer: Renderer, messages: Sequence[Message], example: Example, found: Found
) -> None:
    """The trained spans hold the supervised answers, one each. Raises Failed.

    Text that a template prints before an answer (an empty thinking block) belongs to it, and is noted.
    """
    wanted = [
        (m, i == len(messages) - 1)
        for i, m in enumerate(messages)
        if m.supervised and m.role in ("assistant", "text")
    ]
    if LAST_ONLY in example.note:
        wanted = wanted[-1:]
    spans = _spans(example)
    if len(spans) != len(wanted):
        raise Failed(
            "comparing the trained tokens with the answers",
            f"{len(spans)} spans are trained, {len(wanted)} answers are to be",
            "look at the row with luthier preview",
        )
    for (message, last), span in zip(wanted, spans, strict=True):
        if message.role == "text" and example.labels[0] != IGNORE:
            span = [int(example.input_ids[0]), *span]  # without a BOS the first token has no label
        text, trained = _text(renderer, message, last=last), _squeezed(renderer, span)
        before, is_there, _ = trained.rpartition(text)
        if not is_there:
            raise Failed(
                "comparing the trained tokens with the answers",
                f"{renderer.tokens.decode(span, special=True)[:80]!r} is trained, "
                f"the answer is {message.text.strip()[:60]!r}",
                "look at the row with luthier preview, and at data.template",
            )
        found.answers += 1
        found.ended += span[-1] in renderer.stop_ids
        if before and before not in found.preludes and len(found.preludes) < MOST_PRELUDES:
            found.preludes.append(before)


def _spans(example: Example) -> list[list[int]]:
    """The labels of each run of trained tokens."""
    trained = np.flatnonzero(example.labels != IGNORE)
    runs = np.split(trained, np.flatnonzero(np.diff(trained) > 1) + 1)
    return [example.labels[run].tolist() for run in runs if len(run)]


def _text(renderer: Renderer, message: Message, *, last: bool) -> str:
    """What has to be found of a message; a template may drop the thinking of earlier answers."""
    text = message.text
    if message.role == "assistant" and not last:
        text = text.rpartition("</think>")[2]
    return _squeezed(renderer, renderer.tokens(text))


def _squeezed(renderer: Renderer, ids: Sequence[int] | np.ndarray) -> str:
    """Text of ids without white space, which templates trim and tokenizers add."""
    return "".join(renderer.tokens.decode([int(i) for i in ids], special=True).split())
