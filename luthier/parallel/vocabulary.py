"""Embedding and head cut by rows of the vocabulary among the ranks of the `tensor` axis.

A rank looks up the tokens of its rows, zeros for the others, and the sum is the embedding. The head gives a rank's
columns of the logits, uneven where the vocabulary does not divide. The loss needs no more of the others' than a few
numbers for each row (`cross_entropy` in `train/loss.py`); a plain call of the model, as `generate` makes, gathers them.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import MethodType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from luthier.parallel.collectives import Axis, sum_forward, total, whole_features
from luthier.parallel.tensor import put_part
from luthier.parts import Part, cut_of


class Vocabulary:
    """This rank's part of the tokens, and what is exchanged about them."""

    def __init__(self, size: int, axis: Axis) -> None:
        self.size, self.axis = size, axis
        self.part = Part(-1, (size,), axis.rank, axis.ranks)
        self.own_columns = False

    @property
    def start(self) -> int:
        """The rank's first token."""
        return self.part.stretches[0][0]

    @property
    def rank(self) -> int:
        return self.axis.rank

    @property
    def length(self) -> int:
        """How many tokens the rank has."""
        return self.part.length(self.axis.rank)

    @property
    def most(self) -> int:
        """The most tokens that a rank has."""
        return self.part.length(0)

    @contextmanager
    def columns(self) -> Iterator[None]:
        """Inside, the head gives a rank's own columns [N, V/n]; outside all of them."""
        self.own_columns = True
        try:
            yield
        finally:
            self.own_columns = False

    def locate(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Place of each token among the rank's own, 0 for the others', and whether it is one of them."""
        here = tokens - self.start
        own = (here >= 0) & (here < self.length)
        return here.where(own, 0), own

    def total(self, x: Tensor) -> Tensor:
        """The sum of the ranks' x, outside autograd."""
        return total(x, self.axis)

    def everybody(self, x: Tensor) -> Tensor:
        """x of each rank, stacked, outside autograd."""
        x = x.contiguous()
        parts = [torch.empty_like(x) for _ in range(self.axis.ranks)]
        dist.all_gather(parts, x, group=self.axis.group)
        return torch.stack(parts)


def cut_vocabulary(
    embedding: nn.Module | None, head: nn.Module | None, axis: Axis, *, tied: bool
) -> Vocabulary | None:
    """Cut the rows of `embedding`, and tell of those of `head`, which `cut_layers` has cut already.

    `tied`: they were one tensor, and are one again. None without a head.
    """
    if embedding is not None:
        _cut_embedding(embedding, axis)
    if head is None:
        return None
    if tied and embedding is not None:
        embedding.weight = head.get_parameter("weight")
    how = cut_of(head.get_parameter("weight"))
    assert how is not None
    vocabulary = Vocabulary(sum(how.sizes), axis)
    head.register_forward_hook(_Gathering(vocabulary))
    return vocabulary


def _cut_embedding(embedding: Any, axis: Axis) -> None:
    part = Part(0, (embedding.weight.shape[0],), axis.rank, axis.ranks)
    put_part(embedding, "weight", part)
    embedding.num_embeddings = len(embedding.weight)
    if embedding.padding_idx is not None:  # the row that gets no gradient
        place = embedding.padding_idx - part.stretches[0][0]
        embedding.padding_idx = place if 0 <= place < len(embedding.weight) else None
    lookup = Vocabulary(part.sizes[0], axis)

    def forward(self: Any, input: Tensor) -> Tensor:
        here, own = lookup.locate(input)
        found = type(self).forward(self, here)
        return sum_forward(found.masked_fill(~own[..., None], 0), axis)

    # not by hooks: some call `forward` alone, past them
    vars(embedding)["forward"] = MethodType(forward, embedding)


class _Gathering:
    """All columns of the logits, for plain calls of the model."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        self.vocabulary = vocabulary

    def __call__(self, head: nn.Module, args: Any, output: Tensor) -> Tensor | None:
        if self.vocabulary.own_columns:
            return None
        vocabulary = self.vocabulary
        return whole_features(output, vocabulary.axis, vocabulary.part, shares=False)
