"""Measuring a model on evaluation rows, and the rows that a prediction answers."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from luthier.assemble import Built, Progress, Text, evaluation_rows
from luthier.config import RunConfig
from luthier.data.corpus import Corpus
from luthier.data.dataset import Dataset
from luthier.data.formats import FORMATS, BadRow, Message, detect, rename
from luthier.data.rowfiles import Unreadable
from luthier.data.sources import open_evaluation, open_source
from luthier.errors import Refused
from luthier.models.generate import GenerateOptions
from luthier.train.evaluate import evaluate_generation, evaluate_loss, write_generated


@dataclass
class Evaluator:
    """Measures a model on the evaluation rows; `records` are the answers of the latest generation."""

    config: RunConfig
    text: Text
    built: Built
    dev: Dataset | Corpus
    output: Path | None = None
    progress: Progress | None = None
    records: list[dict[str, str]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.batches = evaluation_rows(self.config, self.text, self.dev)

    def __call__(self) -> dict[str, float]:
        """Loss, perplexity, accuracy, and the scores of generated answers where asked."""
        tell = self.progress or (lambda what, done, total: None)
        values = evaluate_loss(
            self.built.stage,
            self.batches,
            self.built.device,
            lambda done: tell("evaluating", done, len(self.batches)),
            self.built.world,
            self.built.context and self.built.context.split,
        )
        self.built.settle()
        if self.config.evaluate.generate:
            values |= self.generate()
        return values

    def generate(self) -> dict[str, float]:
        """Answer the rows and score the answers."""
        tell = self.progress or (lambda what, done, total: None)
        assert isinstance(self.dev, Dataset)  # the config refuses to generate for pretraining
        rows: list[list[Message]] = list(self.dev.conversations())
        answered = 0

        def count(number: int) -> None:
            nonlocal answered
            answered += number
            tell("generating", answered, len(rows))

        with self.built.gathered():
            scores, self.records = evaluate_generation(
                self.built.model,
                self.text.renderer,
                rows,
                generate_options(self.config, self.built),
                pad_id=self.text.pad_id,
                micro_batch=self.config.evaluate_micro_batch,
                progress=count,
                autocast=self.built.stage.autocast,
                world=self.built.world,
            )
        if self.config.evaluate.save and self.output is not None and self.built.world.is_main:
            write_generated(self.output, self.records)
        return scores


def generate_options(config: RunConfig, built: Built) -> GenerateOptions:
    e = config.evaluate
    return GenerateOptions(
        e.max_new_tokens, e.top_k, e.top_p, e.temperature, config.train.seed, built.reserved
    )


def rows_to_answer(config: RunConfig) -> list[list[Message]]:
    """The conversations of `predict.input`, or of the data's test (else dev) part; answers may be absent."""
    given = config.predict.input
    if given is not None and Path(given).is_dir():
        raise Refused(f"predict.input={given}", "it is a folder", "name the file of rows to answer")
    if given is not None:
        source = open_source(given, config.data, "train")
    else:
        source = open_evaluation(config.data, "test")
    if source is None:
        raise Refused(
            f"rows to answer at {given or config.data.path}",
            "there is no test or dev part",
            "give predict.input=FILE",
        )
    rows = []
    for index in range(len(source)):
        place = source.name
        try:
            row, place = source.row(index)
            row = rename(row, config.data.columns)
            form = config.data.format
            name = detect(row) if form == "auto" else form
            rows.append(FORMATS[name](row, predict=True))
        except (BadRow, Unreadable) as bad:
            where = bad.place if isinstance(bad, Unreadable) else place
            raise Refused(f"answering {where}", bad.reason, "correct the row") from bad
    return rows
