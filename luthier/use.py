"""Using a model: evaluate, predict, preview. As prose; see `recipes.py`."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from luthier.answers import Evaluator, generate_options, rows_to_answer
from luthier.assemble import Built, Progress, Text, build, open_data, open_text
from luthier.config import RunConfig
from luthier.data.corpus_open import prepare_corpus
from luthier.data.dataset import LazyDataset
from luthier.data.encode import reference
from luthier.data.formats import BadRow, Message
from luthier.data.indexed import write_tokens
from luthier.data.prepare import prepare
from luthier.data.preview import as_rich, as_text
from luthier.data.sources import Split
from luthier.errors import Refused
from luthier.files import check_writable, damage, write_text
from luthier.models.generate import generate
from luthier.models.load import resolve_device
from luthier.recipes import Source, resolve, say
from luthier.train.checkpoint import step_of, steps_in
from luthier.train.progress import open_progress


@dataclass(frozen=True)
class Chosen:
    """Which model a command uses: a folder, maybe with an adapter, and the words for it."""

    path: str
    adapter: str | None
    words: str


def choose_model(config: RunConfig) -> Chosen:
    """The run's final model in `output`; else its newest whole checkpoint; else adapter.path or the base.

    An adapter.path that differs from the one that the run in `output` went on from is asked for as it is.
    """
    base, output, given = config.model.path, Path(config.output), config.adapter.path
    folders = [(path, path.name) for _, path in reversed(steps_in(output)) if damage(path) is None]
    if not folders or (step_of(folders[0][0]) or 0) <= _final_step(output):
        folders.insert(0, (output, "final model"))  # else the run was extended and is not finished
    if given is not None and given != _started_from(output):
        folders = []
    for folder, what in folders:
        if (folder / "adapter_config.json").is_file():
            return Chosen(base, str(folder), f"{base} with the adapter {folder} ({what})")
        if (folder / "config.json").is_file():
            return Chosen(str(folder), None, f"{folder} ({what})")
    if given is not None:
        return Chosen(base, given, f"{base} with the adapter {given}")
    return Chosen(base, None, f"{base} (nothing was trained in {output})")


def _final_step(output: Path) -> int:
    """The last step of the run whose final model is in `output`; 0 when none was finished."""
    report = output / "report.json"
    return int(json.loads(report.read_text("utf-8")).get("steps", 0)) if report.is_file() else 0


def _started_from(output: Path) -> str | None:
    """adapter.path of the run in `output`."""
    recorded = output / "config.yaml"
    return resolve(recorded).config.adapter.path if recorded.is_file() else None


def _open(config: RunConfig) -> tuple[Text, Chosen]:
    resolve_device(config.model.device)
    chosen = choose_model(config)
    say(f"model: {chosen.words}")
    return open_text(config, chosen.path), chosen


def _build(config: RunConfig, chosen: Chosen) -> Built:
    built = build(config, train=False, path=chosen.path, adapter=chosen.adapter)
    for remark in built.remarks:
        say(f"note: {remark}")
    return built


def evaluate(source: Source, overrides: Sequence[str] = ()) -> dict[str, float]:
    """Loss, perplexity and accuracy on the evaluation rows; BLEU-4 and ROUGE with evaluate.generate."""
    config = resolve(source, overrides).config
    output = Path(config.output)
    if config.evaluate.save:
        check_writable(f"output={output} with evaluate.save=true", output)
    text, chosen = _open(config)
    dev = prepare(config, text.renderer, "dev")
    if dev is None or isinstance(dev, LazyDataset):
        raise Refused(
            f"evaluation rows at data.path={config.data.path}",
            "there is no dev, validation or test part",
            "give data.validation_path",
        )
    say(dev.ledger.summary())
    built = _build(config, chosen)
    if config.evaluate.save:
        output.mkdir(parents=True, exist_ok=True)
    with _activity(config) as progress:
        values = Evaluator(config, text, built, dev, output, progress)()
    for name, value in values.items():
        say(f"  {name:<12}{value:>12.6g}")
    return values


def predict(source: Source, overrides: Sequence[str] = ()) -> list[dict[str, str]]:
    """Answer the rows of `predict.input` and write one JSON line per row, in order, to `predict.output`."""
    config = resolve(source, overrides).config
    path = Path(config.predict.output or Path(config.output) / "predictions.jsonl")
    if path.is_dir():
        raise Refused(f"predict.output={path}", "it is a folder", "name a file")
    check_writable(f"answers in {path}", path.parent)
    text, chosen = _open(config)
    rows = rows_to_answer(config)
    prompts = _prompts(text, rows)
    built = _build(config, chosen)
    answered = 0
    with _activity(config) as progress:

        def count(number: int) -> None:
            nonlocal answered
            answered += number
            progress("generating", answered, len(prompts))

        ids = generate(
            built.model,
            prompts,
            generate_options(config, built),
            pad_id=text.pad_id,
            stop_ids=text.renderer.stop_ids,
            micro_batch=config.evaluate_micro_batch,
            progress=count,
            autocast=built.stage.autocast,
        )
    records = []
    for messages, answer in zip(rows, ids, strict=True):
        asked = [m.text for m in messages if m.role in ("user", "text")]
        record = {"prompt": asked[-1] if asked else "", "output": text.renderer.decode(answer)}
        target = reference(messages)
        records.append({**record, "tgt": target} if target else record)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in records))
    for record in records[:3]:
        say(f"  {record['prompt'][-100:]!r} -> {record['output'][:200]!r}")
    say(f"{len(records)} answers: {path}")
    return records


def _prompts(text: Text, rows: Sequence[Sequence[Message]]) -> list[list[int]]:
    """Ids to answer; says which prompts were cut. Refused for a row that gives none."""
    prompts, cut = [], []
    for number, messages in enumerate(rows, start=1):
        try:
            ids, lost = text.renderer.prompt_and_cut(messages)
        except BadRow as bad:
            raise Refused(f"answering row {number}", bad.reason, "correct the row") from bad
        prompts.append(ids)
        if lost:
            cut.append(f"row {number} by {lost} tokens")
    if cut:
        more = f" and {len(cut) - 3} more" if len(cut) > 3 else ""
        say(f"note: prompts longer than data.length allows were cut: {', '.join(cut[:3])}{more}")
    return prompts


@contextmanager
def _activity(config: RunConfig) -> Iterator[Progress]:
    """The live display of a command that does not train."""
    progress = open_progress(config.log.progress)
    try:
        yield progress.activity
    finally:
        progress.close()


def tokenize(
    source: Source, overrides: Sequence[str] = (), *, out: str | None = None
) -> dict[str, int]:
    """Make the shards of a pretraining run ahead of it, or with `out` the Megatron-style token files
    out.bin and out.idx of its training text. Gives the number of documents by split."""
    config = resolve(source, overrides).config
    if config.train.mode != "pretrain":
        raise Refused(
            f"tokenising for train.mode={config.train.mode}",
            "only pretraining keeps its tokens on disk",
            "add train.mode=pretrain",
        )
    config = config.model_copy(update={"data": config.data.model_copy(update={"lazy": False})})
    text = open_text(config)
    found: dict[str, int] = {}
    splits: tuple[Split, ...] = ("train",) if out else ("train", "dev", "test")
    with _activity(config) as progress:
        for split in splits:
            corpus = prepare_corpus(
                config, text.renderer, split, partial(progress, f"{split} rows")
            )
            if corpus is None:
                continue
            found[split] = corpus.ledger.num_examples
            say(corpus.ledger.summary())
            if out is None and corpus.shards is not None:
                for plan in corpus.shards.plans:
                    say(f"  {len(plan)} shards of {plan.name}: {plan.folder}")
            elif out is not None:
                tokens = text.renderer.tokens
                facts = {"tokenizer": tokens.fingerprint, "vocab_size": len(tokens.tokenizer)}
                write_tokens(Path(out), corpus.documents(), len(tokens.tokenizer), facts)
                say(f"  token files: {out}.bin and {out}.idx")
    return found


def preview(source: Source, overrides: Sequence[str] = (), *, rows: int = 3) -> str:
    """Show the first `rows` examples of the first step, token by token, and the ledger's totals."""
    config = resolve(source, overrides).config
    text = open_text(config)
    data = open_data(config, text)
    try:
        say(data.train.ledger.summary())
        batches = data.loader.peek()
    finally:
        data.loader.close()
    stops = text.renderer.stop_ids
    if sys.stdout.isatty():
        from rich.console import Console

        console = Console()
        for part in as_rich(batches, text.tokenizer, stops, rows):
            console.print(part)
    plain = as_text(batches, text.tokenizer, stops, rows)
    if not sys.stdout.isatty():
        say(plain)
    return plain
