"""Token cross entropy from hidden states, without ever building [B, S, V] logits.

Only supervised positions reach the language-model head, some rows at a time, and each chunk's
gradient is taken right after its forward: what lives at once is two chunks of logits. The head is any
function [N, D] -> [N, V], so softcaps, logit scaling, biases, tied and adapted heads need nothing special. Losses
are sums; who divides them by the step's count of supervised tokens is the loop.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from luthier.batch import IGNORE
from luthier.errors import Failed

Head = Callable[[Tensor], Tensor]

CHUNK_BYTES = 64 * 2**20  # of one chunk's logits, counted as float32
MIN_ROWS = 64  # fewer rows would leave matrix units idle


def token_loss(
    hidden: Tensor,
    labels: Tensor,
    head: Head,
    parameters: Sequence[Tensor] = (),
    *,
    chunk_rows: int | None = None,
) -> Tensor:
    """Sum over supervised positions of -log softmax(head(hidden))[label]; a scalar, differentiable once.

    `hidden` [B, S, D]; `labels` [B, S], already shifted, IGNORE where not supervised; `head` maps [N, D]
    to logits [N, V]; `parameters` are the tensors inside `head` that are trained, and all of them: others
    get no gradient. The gradient is computed together with the loss and scaled in backward.

    Statistics, the sum and the sum of parameter gradients over chunks are float32 (float64 for float64
    models). `chunk_rows`: rows per call of `head`; by default as many as keep their float32 logits within
    CHUNK_BYTES, or within the size of the head's own float32 gradient where that is larger, at least
    MIN_ROWS (the first call has MIN_ROWS: it tells V). Without supervised positions: a zero that is
    connected to the graph. Raises Failed for a label outside the vocabulary.
    """
    trained = [p for p in parameters if p.requires_grad]
    if torch.is_grad_enabled() and (hidden.requires_grad or trained):
        return _TokenLoss.apply(hidden, labels, head, chunk_rows, *trained)  # pyright: ignore[reportReturnType]
    rows, targets, index = _supervised(hidden.detach(), labels)
    loss = torch.zeros((), dtype=_wide(hidden.dtype), device=hidden.device)
    with torch.no_grad():
        for at, logits in _chunks(rows, index, head, chunk_rows, CHUNK_BYTES, False):
            loss += _cross_entropy(logits[1], targets[at]).sum()
    return loss
