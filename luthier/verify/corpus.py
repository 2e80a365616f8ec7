"""`verify data` for pretraining: every row of the corpus, and every shard, against the text itself.

Shards are whole by their hashes and hold what the tokenizer makes of each text now; the rows of one pass
have the next tokens for labels, and train each token of the ledger once.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from luthier.batch import IGNORE
from luthier.config import RunConfig
from luthier.data.blocks import TextPart
from luthier.data.checks import check_labels
from luthier.data.corpus import Corpus
from luthier.data.corpus_open import prepare_corpus
from luthier.data.shards import Shards
from luthier.data.sources import Split
from luthier.errors import Failed, Refused
from luthier.files import damage
from luthier.text import Text

Say = Callable[[str], object]


def verify_corpus(config: RunConfig, text: Text, say: Say) -> dict[str, Any]:
    """Check all training and evaluation rows; gives the figures by split.

    Raises Failed naming the first row or shard that is wrong, Refused for data that cannot be trained.
    """
    whole = config.data.model_copy(update={"lazy": False})
    config = config.model_copy(update={"data": whole})
    figures: dict[str, Any] = {}
    splits: tuple[Split, ...] = ("train", "dev")
    for split in splits:
        corpus = prepare_corpus(config, text.renderer, split)
        if corpus is None:
            if split == "train":
                raise Refused(
                    f"training data at data.path={config.data.path}",
                    "it has no training part",
                    "give a file of texts, or token files",
                )
            continue
        rows, trained = _check_rows(corpus)
        texts = sum(
            _check_shards(part.shards, part.source)
            for part in corpus.parts
            if isinstance(part, TextPart)
        )
        say(corpus.ledger.summary())
        say(f"  labels: all {trained:,} are the next token of their own document")
        if corpus.borders == "keep":
            say(f"  one pass of {rows:,} rows trains each of them once, as in the ledger")
        if texts:
            say(f"  shards: whole by their hashes; {texts:,} texts tokenised again give the same")
        figures[split] = {"rows": rows, "trained": trained, "texts": texts}
        figures[split]["ledger"] = corpus.ledger.to_dict()
    say("verify data: ok")
    return figures


def _check_rows(corpus: Corpus) -> tuple[int, int]:
    """Rows of one pass and the tokens they train. Raises Failed."""
    trained, rows = 0, corpus.num_rows or 0
    for n in range(rows):
        for ids, labels, *_ in corpus.row_in_order(n):
            check_labels(ids, labels)
            trained += int((labels != IGNORE).sum())
    if corpus.borders == "keep" and trained != corpus.ledger.num_supervised:
        raise Failed(
            "counting the tokens that one pass trains",
            f"the rows train {trained}, the ledger has {corpus.ledger.num_supervised}",
            "report this",
        )
    return rows, trained


def _check_shards(shards: Shards, source: int) -> int:
    """Tokenise the text of all shards of a source again; gives the number of texts. Raises Failed."""
    plan, texts = shards.plans[source], 0
    for number in range(len(plan)):
        place = plan.place(number)
        do = f"remove {place}: it is made again"
        if (reason := damage(place)) is not None:
            raise Failed(f"the shard {place}", reason, do)
        file, document = shards.open(source, number), 0
        for row in plan.rows(number):
            outcome = shards.encoder.outcome(row)
            for example in outcome.examples:
                stored = (
                    file.tokens[file.start(document) : file.start(document + 1)] if file else []
                )
                if not np.array_equal(stored, example.input_ids):
                    raise Failed(
                        f"comparing document {document} of {place} with its text",
                        f"{outcome.record.place} gives other tokens now",
                        do,
                    )
                document += 1
                texts += 1
    return texts
