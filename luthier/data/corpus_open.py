"""Opens pretraining data: text and token files, their splits, what is refused and what is said of them.

Text is tokenised once by `shards.py`; token files are checked against the model's tokenizer, by the hash they
record or by their ids. The rows are those of `corpus.py`.
"""

from __future__ import annotations

import copy
import sys
from pathlib import Path

import numpy as np

from luthier.config import DataPart, RunConfig
from luthier.data.blocks import FilePart, Span, TextPart, first_blocks
from luthier.data.corpus import Corpus, check_ids, run_length
from luthier.data.dataset import Encoder, Progress, open_rows
from luthier.data.encode import Renderer
from luthier.data.indexed import TokenFile, find_prefixes, read_facts
from luthier.data.ledger import Ledger
from luthier.data.shards import Plan, Shards, check_made_by, default_cache, plan_shards
from luthier.data.sources import Source, Split, open_source
from luthier.data.tokens import Tokens
from luthier.errors import Failed, Refused

SPLITS: tuple[Split, ...] = ("train", "dev", "test")
LOOKS = 256  # places at which ids of a token file are looked at beforehand
LOOKED = 1 << 14  # tokens at each
COUNTED = 1 << 20  # documents of a token file of which the last token is looked at


def prepare_corpus(
    config: RunConfig, renderer: Renderer, split: Split, progress: Progress | None = None
) -> Corpus | None:
    """The corpus of `split`; None where the data has no such part. Text is tokenised now, or with `data.lazy`
    by a thread that has made the first shards when this returns. Raises Refused for data that cannot be
    trained."""
    if renderer.positions is not None and config.data.borders == "keep":
        raise Refused(
            "train.mode=pretrain with data.borders=keep and a model of two position axes (ChatGLM, GLM)",
            "a row of such a model is one text, with its special tokens and blanks around",
            "give data.borders=ignore; or train.mode=sft with data.format=text and data.overlong=split, "
            "where each document is a text of its own",
        )
    files, texts = _given(config, split)
    vocab_size = max(renderer.tokens.tokenizer.get_vocab().values()) + 1
    source, notes = _text_source(config, texts, split)
    ledger = Ledger(
        split, ", ".join([part.path for part in files] + ([source.name] if source else []))
    )
    for note in [*notes, *renderer.notes]:
        ledger.note(note)
    parts: list[FilePart | TextPart] = []
    for part in files:
        made = _file_part(config, part, split, renderer, vocab_size, ledger)
        parts += [made] if made else []
    shards = None
    if source is not None:
        shards = _shards(config, renderer, source, split)
        made = [
            TextPart(p.weight, shards, n, run_length(renderer)) for n, p in enumerate(source.parts)
        ]
        parts += [part for part in made if part.num_blocks]
    if not parts:
        return None
    corpus = Corpus(split, parts, config, vocab_size, ledger, shards, renderer)
    try:
        _start(corpus, progress)
    except BaseException:
        corpus.close()
        raise
    return corpus


def _start(corpus: Corpus, progress: Progress | None) -> None:
    """Make the shards, or wait for the first ones; then refuse what the ledger tells."""
    texts = [(p, part) for p, part in enumerate(corpus.parts) if isinstance(part, TextPart)]
    if corpus.shards is not None and corpus.lazy:
        order = first_blocks([(p, part.num_blocks) for p, part in texts], corpus.drawn[0].seed)
        corpus.shards.start([(texts[at][1].source, block) for at, block in order])
    elif corpus.shards is not None:
        corpus.shards.make_all(progress)
        for _, part in texts:
            for block in range(part.num_blocks):
                part.block(block)
        corpus.book()
        corpus.ledger.check(training=False)  # before it is said that there are no rows
    for drawn in corpus.drawn:
        drawn.place(0)
        if not corpus.lazy:
            drawn.count()
    corpus.book()
    corpus.ledger.check(training=False)  # that no document ends in EOS is remarked
    if len(corpus.parts) > 1 and corpus.split == "train":
        shares = corpus.mixture.counts / corpus.mixture.counts.sum()
        for part, share in zip(corpus.parts, shares, strict=True):
            corpus.ledger.note(
                f"mixture: {share:.2%} of the rows from {part.name} (weight {part.weight:g})"
            )
    if corpus.borders == "ignore":
        corpus.ledger.note("data.borders=ignore: tokens see the documents before theirs in the row")
    if corpus.positions is not None:
        corpus.ledger.note(
            f"each row is one text of at most {corpus.length} tokens, in the form of its family"
        )


def _given(config: RunConfig, split: Split) -> tuple[list[DataPart], tuple[DataPart, ...]]:
    """The parts of the data that are token files, and those that are text."""
    data = config.data
    path = data.path
    if split != "train" and data.validation_path is not None:
        path = data.validation_path
    given = (DataPart.model_validate({"path": path}),) if isinstance(path, str) else path
    files = [part for part in given if find_prefixes(Path(part.path).expanduser())]
    for part in files if data.split is None else ():
        if data.validation_share:
            raise Refused(
                f"data.validation_share={data.validation_share} of {part.path}",
                "token files are divided by data.split",
                'give data.split, "95,5,0" say',
            )
    texts = tuple(part for part in given if part not in files)
    if data.columns and not texts and data.validation_path is None:
        raise Refused(
            f"data.columns of {', '.join(part.path for part in files)}",
            "they name fields of rows, and these are token files",
            "leave data.columns out",
        )
    if split != "train" and data.validation_path is None and data.split is None:
        files = []  # token files are training data unless they are split
    return files, texts


def _text_source(
    config: RunConfig, texts: tuple[DataPart, ...], split: Split
) -> tuple[Source | None, list[str]]:
    """The rows of text of a split, and what to remark on them."""
    if not texts:
        return None, []
    data = config.data.model_copy(update={"format": "text"})
    if data.validation_path is None or split == "train":
        data = data.model_copy(update={"path": texts})
    if data.split is None:
        return open_rows(config.model_copy(update={"data": data}), split)
    source = open_source(texts, data, "train")
    if source is None:
        return None, []
    chosen, begin = [], 0
    for part in source.parts:
        first, last = split_of(part.num_rows, data.split, split)
        chosen.append(np.arange(begin + first, begin + last))
        begin += part.num_rows
    rows = np.concatenate(chosen)
    note = f"data.split={data.split}: {len(rows)} of {len(source)} rows of text"
    return (source.take(rows), [note]) if len(rows) else (None, [])


def split_of(number: int, shares: str, split: Split) -> tuple[int, int]:
    """First and behind-last of `number` documents that belong to `split`, by shares such as "949,50,1"
    (Megatron's rounding: that of each share's border, what is left over goes to the last)."""
    weights = [float(share) for share in shares.split(",")]
    bounds = [0]
    for weight in weights:
        bounds.append(bounds[-1] + round(weight / sum(weights) * number))
    over = bounds[-1] - number
    bounds[1:] = [bound - over for bound in bounds[1:]]
    which = SPLITS.index(split)
    return max(bounds[which], 0), max(bounds[which + 1], 0)


def _file_part(
    config: RunConfig,
    given: DataPart,
    split: Split,
    renderer: Renderer,
    vocab_size: int,
    ledger: Ledger,
) -> FilePart | None:
    """Token files as a part, checked against the model's tokenizer and booked; None where the split has
    none of their documents."""
    spans, tokens = [], renderer.tokens
    for prefix in find_prefixes(Path(given.path).expanduser()):
        file = TokenFile(prefix)
        check_made_by(prefix, read_facts(prefix), tokens.fingerprint)
        _look_at_ids(file, vocab_size)
        first, last = 0, len(file)
        if config.data.split is not None:
            first, last = split_of(len(file), config.data.split, split)
        if last > first:
            spans.append(Span(file, file.start(first), file.start(last)))
            _book_file(file, first, last, tokens, ledger)
    return FilePart(given.path, given.weight, spans, run_length(renderer)) if spans else None


def _look_at_ids(file: TokenFile, vocab_size: int) -> None:
    """Refuse a file with ids that the tokenizer lacks, where they are seen at many places of it."""
    total = len(file.tokens)
    step = max(total // LOOKS, LOOKED)
    for start in range(0, total, step):
        ids = file.tokens[start : start + min(step, LOOKED)]
        try:
            check_ids(file, ids, start, vocab_size)
        except Failed as error:
            raise Refused(error.asked, error.found, error.do) from error


def _book_file(file: TokenFile, first: int, last: int, tokens: Tokens, ledger: Ledger) -> None:
    """Count the documents first to last of a file in the ledger."""
    number = last - first
    counted = range(first, last, -(-number // COUNTED))
    total = file.start(last) - file.start(first)
    ended = sum(
        file.start(d + 1) > file.start(d) and int(file.tokens[file.start(d + 1) - 1]) == tokens.end
        for d in counted
    )
    ledger.rows["used"] += number
    ledger.num_examples += number
    ledger.num_tokens += total
    ledger.num_supervised += total - number
    ledger.num_ended += ended
    if len(counted) < number:
        ledger.note(f"{file.prefix}: the ends of {len(counted):,} documents were looked at")
    if not ended:
        ledger.note(
            f"{file.prefix}: no document ends in EOS; the model will not learn where a text ends"
        )


def _shards(config: RunConfig, renderer: Renderer, source: Source, split: Split) -> Shards:
    """The shards of all sources of text; with `data.lazy` they begin to be made."""
    whole = copy.copy(renderer)
    whole.length = sys.maxsize  # a document is tokenised as one, and cut into rows where it is read
    if renderer.positions is not None:  # what is around a text, and its blanks, come with the row
        whole.blanks, whole.tokens = None, copy.copy(renderer.tokens)
        whole.tokens.opening = []
    if whole.tokens.end is None:
        raise Refused(
            "train.mode=pretrain",
            "the tokenizer has no EOS to put behind each document",
            "set eos_token in the model's tokenizer_config.json",
        )
    data = config.data.model_copy(update={"format": "text"})
    encoder = Encoder(source, data, whole)
    encoder.prove()
    cache = Path(data.cache).expanduser() if data.cache else default_cache()
    plans: list[Plan] = []
    begin = raw = 0
    for part, size in zip(source.parts, source.sizes(), strict=True):
        rows = np.arange(raw, raw + part.num_rows)
        if source.selection is not None:
            rows = source.selection[begin : begin + size]
        plans.append(plan_shards(cache, part, begin, rows - raw, data.columns, renderer.tokens))
        begin, raw = begin + size, raw + part.num_rows
    return Shards(plans, encoder, split, data.workers)
