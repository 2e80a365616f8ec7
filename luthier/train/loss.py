"""Token cross entropy from hidden states, without ever building [B, S, V] logits.

Only supervised positions reach the language-model head, some rows at a time, and each chunk's
gradient is taken right after its forward: what lives at once is one chunk of logits and its gradient.
The head is any function [N, D] -> [N, V], so softcaps, logit scaling, biases, tied and adapted heads need
nothing special. Where it is cut by tokens among ranks, each works on its own columns, and no rank ever has
all of a row. Losses are sums; who divides them by the step's count of supervised tokens is the loop.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from luthier import native
from luthier.batch import IGNORE
from luthier.errors import Failed
from luthier.parallel.vocabulary import Vocabulary

Head = Callable[[Tensor], Tensor]
Relative = Callable[[Tensor, Tensor], Tensor]
"""Rows and their targets -> logits, of which each row may be less a number."""

CHUNK_BYTES = 48 * 2**20  # one chunk's logits, counted as float32; 256 rows of 49,152 tokens
MIN_ROWS = 64  # fewer rows would leave matrix units idle
BLOCK_BYTES = 4 * 2**20  # float32 logits worked on at a time on a CPU: stays in the cache


def token_loss(
    hidden: Tensor,
    labels: Tensor,
    head: Head,
    parameters: Sequence[Tensor] = (),
    *,
    relative: Relative | None = None,
    chunk_rows: int | None = None,
    vocabulary: Vocabulary | None = None,
) -> Tensor:
    """Sum over supervised positions of -log softmax(head(hidden))[label]: a scalar, differentiable once.

    `hidden` [B, S, D]; `labels` [B, S], already shifted, IGNORE where not supervised; `head` maps [N, D]
    to logits [N, V]; `parameters` are the tensors that `head` reads and that are to get a gradient (the
    frozen among them are skipped). The gradient is computed with the loss, and scaled in backward. `relative`
    is called in the place of `head` where it is given (`Stage.relative_logits`); its logits may be shifted.

    Statistics, the sum, and the sum of parameter gradients over chunks are float32 (float64 for float64
    models). `chunk_rows` is the most rows per call of `head`. Default: what keeps float32 logits within
    CHUNK_BYTES (or, if the head is trained, within the size of its own float32 gradient, since each
    chunk adds to all of it), at least MIN_ROWS. V is learned from a call with no rows.
    Without supervised positions the loss is a zero connected to the graph. `vocabulary`: `head` gives this rank's
    columns of the logits, and sums the gradient of what enters it; the loss is everybody's. Raises Failed for a
    label outside the vocabulary.
    """
    trained = [p for p in parameters if p.requires_grad]
    if torch.is_grad_enabled() and (hidden.requires_grad or trained):
        how = relative, chunk_rows, vocabulary
        return _TokenLoss.apply(hidden, labels, head, *how, *trained)  # pyright: ignore[reportReturnType]
    loss = torch.zeros((), dtype=_wide(hidden.dtype), device=hidden.device)
    with torch.no_grad():
        for rows, targets in _chunks(hidden, labels, head, chunk_rows, CHUNK_BYTES, vocabulary):
            chunk = hidden.reshape(-1, hidden.shape[-1])[rows]
            logits = head(chunk) if relative is None else relative(chunk, targets)
            loss += _losses(logits, targets, vocabulary).sum()
            del logits
    return loss


@torch.no_grad()
def token_stats(
    hidden: Tensor,
    labels: Tensor,
    head: Head,
    *,
    relative: Relative | None = None,
    chunk_rows: int | None = None,
    vocabulary: Vocabulary | None = None,
) -> tuple[float, int, int]:
    """(summed loss, number of positions whose likeliest token is the label, number of supervised positions).

    Shapes, chunks, `relative` and `vocabulary` as in `token_loss`; nothing is differentiable. A tie counts for the
    smallest token.
    """
    flat = hidden.reshape(-1, hidden.shape[-1])
    loss, correct, count = 0.0, 0, 0
    for rows, targets in _chunks(hidden, labels, head, chunk_rows, CHUNK_BYTES, vocabulary):
        logits = head(flat[rows]) if relative is None else relative(flat[rows], targets)  # [n, V]
        loss += float(_losses(logits, targets, vocabulary).sum(dtype=torch.float64))
        correct += _hits(logits, targets, vocabulary)
        count += len(targets)
        del logits
    return loss, correct, count


def _hits(logits: Tensor, targets: Tensor, vocabulary: Vocabulary | None) -> int:
    """In how many rows the target is the likeliest token, of logits [n, V] or a rank's columns of them."""
    # argmax is slow: look for it only where the target reaches the maximum
    if vocabulary is None:
        best = logits.gather(1, targets[:, None]).squeeze(1) == logits.amax(-1)
        return int((logits[best].argmax(-1) == targets[best]).sum())
    here, own = vocabulary.locate(targets)
    picked = vocabulary.total(logits.gather(1, here[:, None]).squeeze(1) * own)
    best = picked == vocabulary.everybody(logits.amax(-1)).amax(0)
    values, places = logits[best].max(-1)
    tokens = (places + vocabulary.start).where(values == picked[best], vocabulary.size)
    return int((vocabulary.everybody(tokens).amin(0) == targets[best]).sum())


class _TokenLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        labels: Tensor,
        head: Head,
        relative: Relative | None,
        chunk_rows: int | None,
        vocabulary: Vocabulary | None,
        *trained: Tensor,
    ) -> Tensor:
        flat = hidden.detach().reshape(-1, hidden.shape[-1])  # [B*S, D]
        wants_hidden = ctx.needs_input_grad[0]
        grad_hidden = torch.zeros_like(flat) if wants_hidden else None
        grads: list[Tensor | None] = [None] * len(trained)
        loss = torch.zeros((), dtype=_wide(hidden.dtype), device=hidden.device)
        budget = max(CHUNK_BYTES, sum(_numbers(p, vocabulary) for p in trained) * 4)
        buffer = (
            None  # the gradient of a chunk's logits; fresh memory would cost page faults each time
        )
        for rows, targets in _chunks(hidden, labels, head, chunk_rows, budget, vocabulary):
            chunk = flat[rows].requires_grad_(wants_hidden)  # [n, D]
            with torch.enable_grad():
                logits = head(chunk) if relative is None else relative(chunk, targets)  # [n, V]
            if buffer is None:
                buffer = torch.empty_like(logits)
            grad_logits = buffer[: len(rows)]
            loss += _losses(logits.detach(), targets, vocabulary, grad_logits).sum()
            inputs = (*([chunk] if wants_hidden else []), *trained)
            found = list(torch.autograd.grad(logits, inputs, grad_logits, allow_unused=True))
            if grad_hidden is not None:
                grad_chunk = found.pop(0)
                if grad_chunk is not None:
                    grad_hidden.index_copy_(0, rows, grad_chunk)
            grads = [_add(total, part) for total, part in zip(grads, found, strict=True)]
            del logits  # or it would stand beside the next chunk's
        ctx.shapes = hidden.shape, [(p.shape, p.dtype) for p in trained]
        ctx.save_for_backward(grad_hidden, *grads)
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        scale = grad_outputs[0]
        shape, like = ctx.shapes
        grad_hidden, *grads = ctx.saved_tensors
        out = [
            scale.new_zeros(size, dtype=dtype) if grad is None else _scaled(grad, scale, dtype)
            for grad, (size, dtype) in zip(grads, like, strict=True)
        ]
        scaled = None if grad_hidden is None else (grad_hidden * scale).view(shape)
        return scaled, None, None, None, None, None, *out


def _add(total: Tensor | None, part: Tensor | None) -> Tensor | None:
    """Sum of chunk gradients, in float32 from the second chunk on; a single chunk costs no copy."""
    if total is None or part is None:
        return part if total is None else total
    total = total.to(_wide(total.dtype))
    for block, more in zip(_blocks(total), _blocks(part), strict=True):
        block += more.to(block.dtype)
    return total


def _scaled(grad: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    out = torch.empty_like(grad, dtype=dtype)
    for block, part in zip(_blocks(out), _blocks(grad), strict=True):
        block.copy_(part * scale)
    return out


def _blocks(x: Tensor) -> tuple[Tensor, ...]:
    """Views of x; on a CPU small ones, so that a conversion in between does not leave the cache."""
    if x.device.type != "cpu" or x.ndim == 0:
        return (x,)
    return x.split(max(1, BLOCK_BYTES * x.shape[0] // (4 * x.numel() or 1)))


def _chunks(
    hidden: Tensor,
    labels: Tensor,
    head: Head,
    chunk_rows: int | None,
    budget: int,
    vocabulary: Vocabulary | None,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Flat positions and labels, both [n], of the supervised tokens, in chunks of nearly equal size."""
    flat = labels.reshape(-1)
    rows = (flat != IGNORE).nonzero().squeeze(1)  # [N]
    if len(rows) == 0:
        return
    targets = flat[rows]
    if vocabulary is None:
        with torch.no_grad():
            columns = num_tokens = head(hidden.detach().reshape(-1, hidden.shape[-1])[:0]).shape[-1]
    else:  # the same number on every rank, for they go through the chunks together
        columns, num_tokens = vocabulary.most, vocabulary.size
    low, high = (int(x) for x in targets.aminmax())
    if low < 0 or high >= num_tokens:
        raise Failed(
            "computing the loss",
            f"a label is {low if low < 0 else high}, the model's head has {num_tokens} tokens",
            "check that the tokenizer belongs to the model",
        )
    size = chunk_rows or max(MIN_ROWS, budget // (4 * columns))
    number = -(-len(rows) // size)
    yield from zip(rows.tensor_split(number), targets.tensor_split(number), strict=True)


def _numbers(parameter: Tensor, vocabulary: Vocabulary | None) -> int:
    """How many numbers a parameter of the head has, on the rank that has the most of them."""
    if vocabulary is None or len(parameter) != vocabulary.length:
        return parameter.numel()
    return parameter.numel() // len(parameter) * vocabulary.most


def _losses(
    logits: Tensor,
    targets: Tensor,
    vocabulary: Vocabulary | None,
    gradient: Tensor | None = None,
) -> Tensor:
    """As `_cross_entropy`, also of a rank's columns of the logits [n, V/ranks].

    Each rank takes the loss among its own columns; with their log-sum-exps a and that of all, A, probabilities
    are exp(a - A) times those among its own.
    """
    if vocabulary is None:
        return _cross_entropy(logits, targets, gradient)
    here, own = vocabulary.locate(targets)
    among = _cross_entropy(logits, here, gradient)  # a - logits[here]
    picked = logits.gather(1, here[:, None]).squeeze(1).to(among.dtype)
    parts = vocabulary.everybody(torch.stack([among + picked, picked * own]))  # [ranks, 2, n]
    log_sum = parts[:, 0].logsumexp(0)  # A
    if gradient is not None:
        blocks = _blocks(gradient)  # at once it would be multiplied as a float32 copy of all of it
        share = (among + picked - log_sum).exp()[:, None].split([len(block) for block in blocks])
        for block, by in zip(blocks, share, strict=True):
            block *= by
        wanted = (picked - log_sum).exp() - own.to(picked.dtype)
        gradient.scatter_(1, here[:, None], wanted[:, None].to(gradient.dtype))
    return log_sum - parts[:, 1].sum(0)


def _cross_entropy(logits: Tensor, targets: Tensor, gradient: Tensor | None = None) -> Tensor:
    """Losses [n] of logits [n, V]; `gradient` [n, V], if given, receives softmax - onehot.

    On a CPU by the native kernel, or a few rows at a time, so that their float32 copy never leaves the cache.
    """
    num_rows, vocabulary = logits.shape
    wide = _wide(logits.dtype)
    losses = torch.empty(num_rows, dtype=wide, device=logits.device)
    if by_native(logits):
        _native(logits, targets, losses, gradient)
        return losses
    step = max(1, BLOCK_BYTES // (4 * vocabulary)) if logits.device.type == "cpu" else num_rows
    scratch = torch.empty(min(step, num_rows), vocabulary, dtype=wide, device=logits.device)
    for start in range(0, num_rows, step):
        stop = min(start + step, num_rows)
        block, target = logits[start:stop], targets[start:stop, None]
        x = scratch[: stop - start].copy_(block)
        x -= x.amax(-1, keepdim=True)
        picked = x.gather(1, target)
        total = x.exp_().sum(-1, keepdim=True)
        losses[start:stop] = (total.log() - picked).squeeze(1)
        if gradient is not None:
            x *= total.reciprocal()
            x.scatter_add_(1, target, x.new_full((1, 1), -1.0).expand_as(target))
            gradient[start:stop] = x
    return losses


def by_native(logits: Tensor) -> bool:
    """Whether the native kernel takes these logits; the path in torch is its reference."""
    fits = logits.device.type == "cpu" and logits.dtype == torch.bfloat16 and logits.stride(1) == 1
    return fits and native.library() is not None


def _native(logits: Tensor, targets: Tensor, losses: Tensor, gradient: Tensor | None) -> None:
    library, targets = native.library(), targets.contiguous()
    assert library is not None
    assert gradient is None or (gradient.dtype == logits.dtype and gradient.stride(1) == 1)
    library.luthier_cross_entropy(
        ctypes.c_void_p(logits.data_ptr()),
        ctypes.c_int64(logits.stride(0)),
        ctypes.c_void_p(targets.data_ptr()),
        ctypes.c_int64(logits.shape[0]),
        ctypes.c_int64(logits.shape[1]),
        ctypes.c_void_p(losses.data_ptr()),
        ctypes.c_void_p(None if gradient is None else gradient.data_ptr()),
        ctypes.c_int64(0 if gradient is None else gradient.stride(0)),
        ctypes.c_int(torch.get_num_threads()),
    )


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32
