"""How good the model is: loss, perplexity and accuracy of given answers; scores of generated ones.

The first are taken with the references as input, streamed over batches packed or not, without full
logits. The second come from generating after each prompt of the one renderer, which does not depend on
how rows are packed. Measures of text are `scores.py`; what is best and when to evaluate is the loop's.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import nn

from luthier.batch import Batch
from luthier.data.encode import Renderer, reference
from luthier.data.formats import BadRow, Message
from luthier.errors import Failed, Refused
from luthier.files import write_text
from luthier.models.generate import GenerateOptions, generate
from luthier.models.stage import Stage
from luthier.parallel.world import World
from luthier.train.loss import token_stats
from luthier.train.scores import text_scores

GENERATED = "generated_output.json"
LARGEST_EXPONENT = 700.0  # e^700 is about 1e304; the largest float is e^709.78

Progress = Callable[
    [int], None
]  # is told after each batch how many more (batches, or answers) are done


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode and no gradients inside; afterwards each module has its own mode again."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module in training:
            module.training = True  # not train(), which would change the modules below as well


def perplexity(loss: float) -> float:
    """e^loss for a loss in nats per token; above a loss of 700 it stays at 1e304 instead of overflowing."""
    return math.exp(min(loss, LARGEST_EXPONENT))


def evaluate_loss(
    stage: Stage,
    batches: Iterable[Batch],
    device: torch.device | str,
    progress: Progress | None = None,
    world: World | None = None,
    split: Callable[[Batch], Batch] | None = None,
) -> dict[str, float]:
    """`loss`, `perplexity`, `accuracy` and `tokens` of all supervised tokens of `batches`.

    `loss` is the mean over tokens, not over rows or batches, in nats, so it does not depend on packing or
    on the batch size; `accuracy` is the share of tokens that are the likeliest one given the true tokens
    before them; `tokens` is their number. The ranks of `world` share the batches (and, by `split`, the tokens of
    each), and all give the same values. Raises Failed without supervised tokens and for a loss that is no finite number.
    """
    world = world or World()
    losses, correct, tokens = [], 0, 0
    coming = iter(batches)  # a corpus's may not fit in memory: no more of them than there are ranks
    with evaluating(stage), stage.quietly():
        while group := list(islice(coming, world.data_size)):
            # a rank for which none is left runs one again: forwards gather weights, and all must take part
            own = world.data_rank < len(group)
            batch = group[world.data_rank if own else 0]
            batch = (split(batch) if split else batch).to(device)
            hidden = stage(batch)  # [B, S, D]
            if own and stage.has_head:
                loss, hits, count = token_stats(
                    hidden,
                    batch.labels,
                    stage.head,
                    relative=stage.relative_logits,
                    vocabulary=stage.vocabulary,
                )
                losses.append(loss)
                correct += hits
                tokens += count
            if progress:
                progress(len(group))
    one = world.of_tokens if split else world.of_data
    parts = one(world.gather([losses, correct, tokens]))
    losses = [loss for part in parts for loss in part[0]]
    correct, tokens = (sum(part[i] for part in parts) for i in (1, 2))
    if not tokens:
        raise Failed(
            "evaluation",
            "its data has no supervised token",
            "give data.validation_path rows with answers, or set evaluate.every=never",
        )
    mean = math.fsum(losses) / tokens
    if not math.isfinite(mean):
        raise Failed(
            f"evaluation on {tokens} tokens",
            f"the loss is {mean}: the weights or activations hold NaN or infinity",
            "look at the loss before this step; a lower optim.lr or model.dtype=float32 may help",
        )
    return {
        "loss": mean,
        "perplexity": perplexity(mean),
        "accuracy": correct / tokens,
        "tokens": tokens,
    }


def evaluate_generation(
    model: Any,
    renderer: Renderer,
    rows: Iterable[Sequence[Message]],
    options: GenerateOptions,
    *,
    pad_id: int,
    micro_batch: int,
    progress: Progress | None = None,
    autocast: torch.dtype | None = None,
    world: World | None = None,
) -> tuple[dict[str, float], list[dict[str, str]]]:
    """Generate the last answer of each row and score it against the row's own.

    Earlier turns are given as they stand in the row. Rows without an answer (plain text) and rows that
    give no prompt (which the ledger counts) are left out. `autocast` and `world` as in `generate_all`. Returns
    `bleu4, rouge1, rouge2, rougel` (0..1, see `scores.text_scores`) with `answers`, the number of rows
    generated for; and one record per such row, in order: `prompt` (the last user turn), `output`
    (generated), `tgt` (the reference). Raises Refused when no row is left.
    """
    prompts, records = [], []
    for messages in rows:
        target = reference(messages)
        if not target:
            continue
        try:
            prompts.append(renderer.prompt(messages))
        except BadRow:
            continue
        asked = [message.text for message in messages if message.role == "user"]
        records.append({"prompt": asked[-1] if asked else "", "output": "", "tgt": target})
    if not prompts:
        raise Refused(
            "evaluate.generate=true",
            "no evaluation row has a prompt and an answer",
            "give data.validation_path such rows, or set evaluate.generate=false",
        )
    with evaluating(model):
        answers = generate_all(
            model,
            prompts,
            options,
            world or World(),
            pad_id=pad_id,
            stop_ids=renderer.stop_ids,
            micro_batch=micro_batch,
            progress=progress,
            autocast=autocast,
        )
    for record, ids in zip(records, answers, strict=True):
        record["output"] = renderer.decode(ids)
    scores = text_scores([r["output"] for r in records], [r["tgt"] for r in records])
    return {**scores, "answers": len(records)}, records


def generate_all(
    model: Any, prompts: Sequence[Sequence[int]], options: GenerateOptions, world: World, **how: Any
) -> list[list[int]]:
    """`generate`, the micro-batches shared out among the ranks of `world`; every rank gets all answers."""
    share = (world.data_rank, world.data_size)
    mine = generate(model, prompts, options, share=share, **how)
    # an answer is empty on all ranks but the one that gave it
    parts = zip(*world.of_data(world.gather(mine)), strict=True)
    return [[token for part in answers for token in part] for answers in parts]


def write_generated(output: Path, records: Iterable[dict[str, str]]) -> Path:
    """Write `output`/generated_output.json: one line `{"output": ..., "tgt": ...}` per record, atomically."""
    path = output / GENERATED
    lines = (
        json.dumps({"output": r["output"], "tgt": r["tgt"]}, ensure_ascii=False) for r in records
    )
    write_text(path, "".join(line + "\n" for line in lines))
    return path
