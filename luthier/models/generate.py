"""Batched generation with a KV cache, through transformers' `generate`.

Prompts are sorted by length, padded on the left and answered in micro-batches; answers come back in the
order of the prompts. Sampling adds Gumbel noise drawn from (seed, prompt) to the logits and takes the
largest, which samples exactly from the softmax: so an answer depends neither on the micro-batch nor on
what else is asked. Prompts are made and answers decoded by `data/encode.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedModel,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from luthier.batch import layout_scope
from luthier.errors import Refused
from luthier.models.load import quiet
from luthier.positions import num_positions
from luthier.seeding import generator


@dataclass(frozen=True)
class GenerateOptions:
    """How to answer. `top_k` 1 or `temperature` 0 is greedy; `top_k` 0 samples among all tokens.

    `reserved`: positions of the model that are taken before a prompt begins (by a prefix adapter).
    """

    max_new_tokens: int = 256
    top_k: int = 1
    top_p: float = 1.0
    temperature: float = 1.0
    seed: int = 0
    reserved: int = 0

    @property
    def greedy(self) -> bool:
        return self.top_k == 1 or self.temperature == 0


def generate(
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    options: GenerateOptions,
    *,
    pad_id: int,
    stop_ids: Sequence[int],
    micro_batch: int,
    progress: Callable[[int], None] | None = None,
    autocast: torch.dtype | None = None,
) -> list[list[int]]:
    """The new tokens of each prompt, in the prompts' order, without the stop token and padding.

    An answer ends at a token of `stop_ids`, after `max_new_tokens`, or where the model's positions end.
    `progress(n)` is called after each micro-batch with the number of its prompts. `autocast` is the type
    of matrix products over wider weights, as `Stage.autocast`. Compiled layers run as they were before:
    lengths grow with each token, and each would be compiled anew. Refused: an empty prompt, and one
    that leaves no position for an answer.
    """
    limit = num_positions(model.config)
    limit = None if limit is None else limit - options.reserved
    room = [
        min(options.max_new_tokens, limit - len(p)) if limit else options.max_new_tokens
        for p in prompts
    ]
    for i, (prompt, left) in enumerate(zip(prompts, room, strict=True)):
        if not prompt or left < 1:
            raise Refused(
                f"an answer to prompt {i} was asked for",
                f"it has {len(prompt)} tokens and the model {limit} positions",
                "give prompts that are not empty and leave room (data.source_length cuts them)",
            )
    # only prompts with the same room share a micro-batch: nearly always that is max_new_tokens
    order = sorted(range(len(prompts)), key=lambda i: (room[i], len(prompts[i]), i), reverse=True)
    groups: list[list[int]] = []
    for i in order:
        if groups and len(groups[-1]) < micro_batch and room[groups[-1][0]] == room[i]:
            groups[-1].append(i)
        else:
            groups.append([i])
    answers: list[list[int]] = [[] for _ in prompts]
    device = next(model.parameters()).device
    training, defaults = model.training, model.generation_config
    model.eval()
    model.generation_config = GenerationConfig()  # the checkpoint's own defaults are not asked for
    try:
        with (
            layout_scope(None),
            quiet(),
            torch.no_grad(),
            torch.autocast(device.type, autocast, enabled=autocast is not None),
            torch.compiler.set_stance("force_eager"),
        ):
            for group in groups:
                rows = [prompts[i] for i in group]
                new = _answer(model, rows, group, options, room[group[0]], pad_id, stop_ids)
                for i, tokens in zip(group, new, strict=True):
                    answers[i] = _until_stop(tokens, stop_ids)
                if progress is not None:
                    progress(len(group))
    finally:
        model.generation_config = defaults
        model.train(training)
    return answers


def _answer(
    model: PreTrainedModel,
    rows: list[Sequence[int]],
    numbers: list[int],
    options: GenerateOptions,
    max_new: int,
    pad_id: int,
    stop_ids: Sequence[int],
) -> list[list[int]]:
    """New tokens of one micro-batch, with what follows a stop token; `numbers` seed the rows."""
    width = max(map(len, rows))
    input_ids = torch.full((len(rows), width), pad_id)  # [B, S]
    mask = torch.zeros_like(input_ids)
    for i, row in enumerate(rows):
        input_ids[i, width - len(row) :] = torch.tensor(row)
        mask[i, width - len(row) :] = 1
    device = next(model.parameters()).device
    out = model.generate(  # pyright: ignore[reportCallIssue]
        input_ids.to(device),
        attention_mask=mask.to(device),
        generation_config=GenerationConfig(
            max_new_tokens=max_new,
            do_sample=False,
            pad_token_id=pad_id,
            eos_token_id=list(stop_ids) or None,
            use_cache=True,
        ),
        logits_processor=_processors(options, numbers),
    )
    assert isinstance(out, Tensor)
    return out[:, width:].tolist()


def _processors(options: GenerateOptions, numbers: list[int]) -> LogitsProcessorList:
    found = LogitsProcessorList()
    if options.greedy:
        return found
    if options.temperature != 1:
        found.append(TemperatureLogitsWarper(options.temperature))
    if options.top_k > 0:
        found.append(TopKLogitsWarper(options.top_k))
    if options.top_p < 1:
        found.append(TopPLogitsWarper(options.top_p))
    found.append(_GumbelNoise(options.seed, numbers))
    return found


class _GumbelNoise(LogitsProcessor):
    """logits + noise whose argmax is a sample of softmax(logits) (Gumbel, 1954; arXiv:1411.0030)."""

    def __init__(self, seed: int, numbers: list[int]) -> None:
        self.streams = [generator(seed, "generate", number) for number in numbers]

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """scores [B, V] -> [B, V]; each row draws V numbers from its own stream."""
        wide = scores.double()
        uniform = torch.stack(
            [torch.rand(wide.shape[1], generator=g, dtype=torch.float64) for g in self.streams]
        )
        return wide - torch.log(-torch.log(uniform.clamp_min(1e-300))).to(wide.device)


def _until_stop(tokens: list[int], stop_ids: Sequence[int]) -> list[int]:
    """Tokens before the first stop token; without one, all of them (nothing was padded then)."""
    stops = set(stop_ids)
    for i, token in enumerate(tokens):
        if token in stops:
            return tokens[:i]
    return tokens
