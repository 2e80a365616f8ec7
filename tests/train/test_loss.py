"""The chunked head's loss and gradients against plain cross entropy over full logits."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from luthier.batch import IGNORE
from luthier.errors import Failed
from luthier.models.stage import Stage
from luthier.seeding import generator
from luthier.train import loss as loss_module
from luthier.train.loss import MIN_ROWS, token_loss, token_stats

B, S, D, V = 3, 11, 8, 37

# Rounding: sums of at most a few hundred terms in another order, relative to the largest entry
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-6, torch.bfloat16: 2e-2}


def problem(dtype: torch.dtype, *, bias: bool = False) -> tuple[Tensor, Tensor, nn.Linear]:
    draw = generator(0, "loss")
    hidden = torch.randn(B, S, D, generator=draw).to(dtype).requires_grad_()
    labels = torch.randint(0, V, (B, S), generator=draw)
    labels[torch.rand(B, S, generator=draw) < 0.4] = IGNORE
    labels[1] = IGNORE  # a whole row without supervision
    head = nn.Linear(D, V, bias=bias)
    with torch.no_grad():
        for p in head.parameters():
            p.copy_(torch.randn(p.shape, generator=draw))
    return hidden, labels, head.to(dtype)


def plain(logits: Tensor, labels: Tensor) -> Tensor:
    wide = logits if logits.dtype == torch.float64 else logits.float()
    return F.cross_entropy(
        wide.flatten(0, -2), labels.flatten(), ignore_index=IGNORE, reduction="sum"
    )


def assert_close(
    found: Tensor | None, wanted: Tensor | None, tolerance: float, floor: float = 0.0
) -> None:
    """||found - wanted|| <= tolerance x (||wanted|| + floor), in float64."""
    assert found is not None and wanted is not None
    assert found.dtype == wanted.dtype and found.shape == wanted.shape
    error = (found.detach().double() - wanted.detach().double()).norm().item()
    assert error <= tolerance * (wanted.detach().double().norm().item() + floor)


def softcapped(layer: nn.Linear) -> Callable[[Tensor], Tensor]:
    return lambda x: 3 * torch.tanh(layer(x) / 3)


HEADS: dict[str, Callable[[nn.Linear], Callable[[Tensor], Tensor]]] = {
    "plain": lambda layer: layer,
    "softcap": softcapped,
    "scaled": lambda layer: lambda x: layer(x) / 4,
    "output saved by autograd": lambda layer: lambda x: torch.tanh(layer(x)),
}


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("name", HEADS)
@pytest.mark.parametrize("chunk_rows", [1, 5, None])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_equals_plain(dtype: torch.dtype, chunk_rows: int | None, name: str, bias: bool) -> None:
    hidden, labels, layer = problem(dtype, bias=bias)
    head = HEADS[name](layer)
    parameters = list(layer.parameters())
    wanted = plain(head(hidden), labels)
    wanted_grads = torch.autograd.grad(wanted / 7, [hidden, *parameters])

    found = token_loss(hidden, labels, head, parameters, chunk_rows=chunk_rows)
    (found / 7).backward()

    assert found.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    # logits are the same; sums of 15 or so losses are float32 even for bfloat16
    assert_close(found, wanted, 1e-12 if dtype == torch.float64 else 1e-6)
    for tensor, grad in zip([hidden, *parameters], wanted_grads, strict=True):
        assert_close(tensor.grad, grad, TOLERANCE[dtype])
    with torch.no_grad():
        assert_close(token_loss(hidden, labels, head, chunk_rows=chunk_rows), found.detach(), 1e-6)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_blocks_of_a_chunk_change_nothing(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    hidden, labels, layer = problem(dtype)
    results = []
    for rows in (1000, 2):  # rows of logits that are worked on at a time
        monkeypatch.setattr(loss_module, "BLOCK_BYTES", 4 * V * rows)
        loss = token_loss(hidden, labels, layer, [layer.weight], chunk_rows=5)
        results.append((loss, *torch.autograd.grad(loss / 7, [hidden, layer.weight])))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("chunk_rows", [4, None])
def test_gradcheck(chunk_rows: int | None) -> None:
    hidden = (
        problem(torch.float64)[0].detach()[0, :7].requires_grad_()
    )  # [S, D]: few numbers, each is shaken
    labels = torch.tensor([1, 0, IGNORE, 4, 2, IGNORE, 3])
    layer = nn.Linear(D, 5, dtype=torch.float64)

    def function(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        def head(rows: Tensor) -> Tensor:
            return 2 * torch.tanh(F.linear(rows, weight, bias) / 2)

        return token_loss(x, labels, head, [weight, bias], chunk_rows=chunk_rows)

    assert torch.autograd.gradcheck(function, (hidden, layer.weight, layer.bias))


@pytest.mark.parametrize(("hidden_grad", "head_grad"), [(True, False), (False, True)])
def test_only_what_is_trained_gets_a_gradient(hidden_grad: bool, head_grad: bool) -> None:
    hidden, labels, layer = problem(torch.float32, bias=True)
    hidden.requires_grad_(hidden_grad)
    layer.weight.requires_grad_(head_grad)
    layer.bias.requires_grad_(False)
    token_loss(hidden, labels, layer, list(layer.parameters()), chunk_rows=4).backward()
    assert (hidden.grad is not None) == hidden_grad
    assert (layer.weight.grad is not None) == head_grad
    assert layer.bias.grad is None


def test_an_adapted_head_gets_its_gradient() -> None:
    """A hook on a frozen head, as adapters act; its parameters are trained, the head's are not."""
    hidden, labels, layer = problem(torch.float64)
    layer.requires_grad_(False)
    layer.adapter = nn.Linear(D, V, bias=False).double()
    layer.register_forward_hook(lambda module, args, y: y + module.adapter(args[0]))
    wanted = torch.autograd.grad(plain(layer(hidden), labels), layer.adapter.weight)[0]
    token_loss(hidden, labels, layer, list(layer.parameters()), chunk_rows=4).backward()
    assert_close(layer.adapter.weight.grad, wanted, 1e-12)
    assert layer.weight.grad is None


def test_parameter_gradients_are_summed_in_float32() -> None:
    """One chunk gives 128, each of 64 more gives 0.5: added up in bfloat16 these would all be lost."""
    hidden = torch.ones(1, 65, 1, dtype=torch.bfloat16)
    hidden[0, 0] = 256
    labels = torch.zeros(1, 65, dtype=torch.long)
    weight = nn.Parameter(torch.zeros(2, 1, dtype=torch.bfloat16))
    token_loss(hidden, labels, lambda x: F.linear(x, weight), [weight], chunk_rows=1).backward()
    assert weight.grad is not None
    assert weight.grad.flatten().tolist() == [-160.0, 160.0]


def test_no_supervised_token_gives_a_connected_zero() -> None:
    hidden, labels, layer = problem(torch.float32)
    found = token_loss(hidden, torch.full_like(labels, IGNORE), layer, list(layer.parameters()))
    assert found.item() == 0.0
    found.backward()
    assert hidden.grad is not None and not hidden.grad.any()
    assert layer.weight.grad is not None and not layer.weight.grad.any()
    assert token_stats(hidden, torch.full_like(labels, IGNORE), layer) == (0.0, 0, 0)


@pytest.mark.parametrize("label", [V, -1])
def test_label_outside_the_vocabulary_is_named(label: int) -> None:
    hidden, labels, layer = problem(torch.float32)
    labels[0, 0] = label
    with pytest.raises(Failed, match=f"label is {label}, the model's head has {V} tokens"):
        token_loss(hidden, labels, layer, list(layer.parameters()))
    with pytest.raises(Failed, match="tokenizer"):
        token_stats(hidden, labels, layer)


class Counting:
    """A head that notes how many rows it is asked for."""

    def __init__(self, head: Callable[[Tensor], Tensor]) -> None:
        self.head = head
        self.rows: list[int] = []

    def __call__(self, x: Tensor) -> Tensor:
        self.rows.append(len(x))
        return self.head(x)


def test_the_head_sees_supervised_rows_only_and_few_at_a_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    draw = generator(1, "many")
    hidden = torch.randn(4, 300, D, generator=draw).requires_grad_()
    labels = torch.randint(0, V, (4, 300), generator=draw)
    labels[:2] = IGNORE
    layer = nn.Linear(D, V).requires_grad_(False)
    for chunk_rows, most in ((100, 100), (None, 600)):
        head = Counting(layer)
        token_loss(hidden, labels, head, chunk_rows=chunk_rows).backward()
        token_stats(hidden, labels, head, chunk_rows=chunk_rows)
        assert max(head.rows) <= most and sum(head.rows) == 2 * 600
    # the default follows the memory that logits take, down to MIN_ROWS
    monkeypatch.setattr(loss_module, "CHUNK_BYTES", 4 * V * 150)
    for budget, most in ((4 * V * 150, 150), (0, MIN_ROWS)):
        monkeypatch.setattr(loss_module, "CHUNK_BYTES", budget)
        head = Counting(layer)
        token_loss(hidden, labels, head).backward()
        assert most - 14 < max(head.rows) <= most


def test_stats() -> None:
    hidden, labels, layer = problem(torch.float32)
    logits = layer(hidden)
    kept = labels != IGNORE
    loss, correct, count = token_stats(hidden, labels, layer, chunk_rows=4)
    assert loss == pytest.approx(plain(logits, labels).item(), rel=1e-6)
    assert correct == int((logits.argmax(-1) == labels)[kept].sum())
    assert count == int(kept.sum())
    likeliest = torch.where(kept, logits.argmax(-1), IGNORE)
    assert token_stats(hidden, likeliest, layer)[1] == count


def test_a_tie_is_not_a_hit_for_the_later_token() -> None:
    hidden = torch.ones(1, 2, 1)
    weight = torch.tensor([[1.0], [2.0], [2.0]])
    assert token_stats(hidden, torch.tensor([[1, 2]]), lambda x: F.linear(x, weight))[1] == 1


def test_large_logits_do_not_overflow() -> None:
    hidden = torch.full((1, 2, 1), 300.0, dtype=torch.float16).requires_grad_()
    weight = nn.Parameter(torch.tensor([[-100.0], [100.0]], dtype=torch.float16))
    found = token_loss(hidden, torch.tensor([[1, 0]]), lambda x: F.linear(x, weight), [weight])
    assert found.item() == 60000.0  # logits -30000 and 30000


def test_under_autocast() -> None:
    """Float32 weights, bfloat16 products: the cached cast of the weight serves several chunks."""
    hidden, labels, layer = problem(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        wanted = plain(layer(hidden), labels)
        wanted_grads = torch.autograd.grad(wanted, [hidden, layer.weight])
        found = token_loss(hidden, labels, layer, list(layer.parameters()), chunk_rows=5)
    found.backward()
    assert_close(found, wanted, 1e-6)
    assert_close(hidden.grad, wanted_grads[0], TOLERANCE[torch.bfloat16])
    assert_close(layer.weight.grad, wanted_grads[1], TOLERANCE[torch.bfloat16])


@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma2", "gpt2", "opt"])
def test_tiny_models(family: str, tiny_model: Any, random_batch: Any) -> None:
    """All gradients of the whole model, tied heads (qwen2, gemma2, gpt2, opt) and softcaps included."""
    batch = random_batch(lengths_per_row=[[9, 4], [13]])
    stage = Stage(tiny_model(family, torch.float64))
    wanted_grads = {}
    model: nn.Module = stage.model
    logits = stage.head(stage(batch).flatten(0, 1)).unflatten(0, batch.labels.shape)
    wanted = plain(logits, batch.labels)
    wanted.backward()
    for name, p in model.named_parameters():
        wanted_grads[name], p.grad = p.grad, None
    found = token_loss(
        stage(batch), batch.labels, stage.head, stage.head_parameters(), chunk_rows=5
    )
    found.backward()
    assert_close(found, wanted, 1e-12)
    for name, p in model.named_parameters():
        # 1e-12 grown by two layers' backward; the gradient of a key bias is zero but for rounding
        assert_close(p.grad, wanted_grads[name], 1e-11, floor=1e-2)
