"""The largest step, evaluation batch and save of a run, before its first step: what does not fit is refused then.

Nothing but the memory that they take comes of it: gradients are dropped, no optimiser steps, no weight, generator,
position in the data or ledger changes. The optimiser's state, which is not there yet, is stood for by
numbers of its size. Not rehearsed: the optimiser's own working space, and answers that an evaluation generates.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import islice

import torch
from torch import Tensor

from luthier.batch import Batch
from luthier.built import Built
from luthier.config import RunConfig
from luthier.data.loader import Loader
from luthier.errors import Refused
from luthier.footprint import optimizer_bytes
from luthier.heap import return_freed_memory
from luthier.parallel.pieces import Pieces, pieces_of
from luthier.parallel.shard import local
from luthier.train.ending import out_of_memory
from luthier.train.evaluate import evaluating
from luthier.train.loss import token_stats
from luthier.train.saving import Saver, num_bytes
from luthier.train.step import Updater

LESS = "give a smaller train.micro_batch, which changes no result, or train.recompute=layer"


def wanted(config: RunConfig, device: torch.device) -> bool:
    """Whether a run on this device rehearses: by itself where its memory is its own."""
    asked = config.train.rehearse
    return device.type != "cpu" if asked == "auto" else asked


def rehearse(
    config: RunConfig,
    built: Built,
    loader: Loader,
    updater: Updater,
    evaluation: Iterable[Batch],
    saver: Saver,
) -> str:
    """Rehearse a run, on all ranks together; what was done, in words. `evaluation`: batches of its evaluation, none or
    all. Refused, naming the part, where the memory does not suffice."""
    begin = time.perf_counter()
    device, world, step = built.device, built.world, loader.largest()
    size, told, beside, less = words(step), [], "", LESS
    with _refused(f"the state of optim.name={config.optim.name}", "train fewer weights: LoRA, say"):
        held = [_filled(_state_bytes(config, p), device) for p in updater.master.parameters]
    # a corpus's batches are made one by one, all alike
    known = evaluation if isinstance(evaluation, list) else islice(evaluation, 1)
    largest = max(known, key=lambda batch: batch.input_ids.numel(), default=None)
    if largest is not None:
        told.append(f"an evaluation batch of {words(largest)}")
        with _refused(told[-1], "give a smaller evaluate.micro_batch"):
            _evaluate(built, largest)
    copies: list[tuple[dict[str, Pieces], Tensor]] = []
    if saver.background and config.checkpoint.every not in ("end", "never"):
        with _refused(
            "the copy of a save, which is written in the background",
            "give checkpoint.background=false: steps then wait for the disk",
        ):
            copies.append(_copy(updater, saver, sum(state.nbytes for state in held)))
        copied = sum(num_bytes(pieces) + more.nbytes for pieces, more in copies)
        told.append(f"the copy of a save ({copied / 2**20:,.0f} MiB)")
        if device.type == "cpu":
            beside = ", beside the copy of a save"
            less += ", or checkpoint.background=false"
    number = config.batch // (config.micro_batch * world.data_size)
    if world.sizes["pipeline"] == 1:
        number = min(2, number)  # from the second one on gradients are added up
    told.append(f"a step of {size}")
    with _refused(f"{told[-1]}{beside}", less):
        updater.rehearse([step] * number)
    built.settle()
    del held, copies
    if device.type == "cpu":
        return_freed_memory()
    return f"rehearsed in {time.perf_counter() - begin:.1f} s, and there is memory for it: {', '.join(told)}"


def _state_bytes(config: RunConfig, parameter: Tensor) -> int:
    own = local(parameter)
    return optimizer_bytes(config, own.numel(), own.element_size())


def _evaluate(built: Built, batch: Batch) -> None:
    """One batch of `evaluate_loss`."""
    stage = built.stage
    with evaluating(stage), stage.quietly():
        batch = (built.context.split(batch) if built.context else batch).to(built.device)
        hidden = stage(batch)  # [B, S, D]
        if stage.has_head:
            how = {"relative": stage.relative_logits, "vocabulary": stage.vocabulary}
            token_stats(hidden, batch.labels, stage.head, **how)
    built.settle()


def _copy(updater: Updater, saver: Saver, state: int) -> tuple[dict[str, Pieces], Tensor]:
    """A save's copy. Of the optimiser's state, `state` bytes here, a rank has the same share as of what is there."""
    tensors = updater.tensors()
    ours = num_bytes({name: pieces_of(tensor) for name, tensor in tensors.items()})
    pieces = saver.copy(tensors)
    more = state * num_bytes(pieces) // max(1, ours)
    return pieces, _filled(more, torch.device("cpu"))


def words(batch: Batch) -> str:
    rows, length = batch.input_ids.shape
    return f"{rows} row{'s' * (rows > 1)} of {length} tokens"


def _filled(number: int, device: torch.device) -> Tensor:
    """Bytes that are written: memory that nobody wrote to is given out without being there."""
    return torch.ones(number, dtype=torch.uint8, device=device)


@contextmanager
def _refused(what: str, do: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        if not out_of_memory(error):
            raise
        text = str(error).splitlines()[0][:200] if str(error) else type(error).__name__
        raise Refused(f"rehearsing {what}", f"the memory does not suffice ({text})", do) from error
