"""The native cross entropy against torch's in float64: losses, gradients, odd widths, what is not finite."""

from __future__ import annotations

import pytest
import torch

from luthier import native
from luthier.train import loss

built = pytest.mark.skipif(native.library() is None, reason=native.status())


@built
@pytest.mark.parametrize("vocabulary", [1, 15, 16, 17, 320, 1003])
@pytest.mark.parametrize("padding", [0, 3])
def test_losses_and_gradients(
    vocabulary: int, padding: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    draw = torch.Generator().manual_seed(vocabulary)
    wide = torch.randn(7, vocabulary + padding, generator=draw) * 6 + 40
    logits = wide.bfloat16()[:, :vocabulary]  # rows of a wider matrix
    targets = torch.randint(0, vocabulary, (7,), generator=draw)
    targets[0], targets[1] = 0, vocabulary - 1
    exact = logits.double().requires_grad_()
    wanted = torch.nn.functional.cross_entropy(exact, targets, reduction="none")
    wanted.sum().backward()
    assert loss.by_native(logits)
    gradient = torch.empty(7, vocabulary, dtype=torch.bfloat16)
    ours = loss._cross_entropy(logits, targets, gradient)
    assert torch.equal(ours, loss._cross_entropy(logits, targets))
    assert (ours.double() - wanted).abs().max() < 2e-5  # float32 next to logits of 40
    assert exact.grad is not None
    # each number is rounded once: half an ulp of bfloat16, and 3e-7 beside labels of weight 1
    assert ((gradient.double() - exact.grad).abs() <= 2**-8 * exact.grad.abs() + 3e-7).all()
    monkeypatch.setenv(native.SWITCH, "0")
    assert not loss.by_native(logits)
    assert (ours - loss._cross_entropy(logits, targets)).abs().max() < 2e-5


@built
@pytest.mark.parametrize("place", [0, 5, 17])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_is_seen(place: int, value: float) -> None:
    """In a whole vector and behind the last whole one."""
    logits = torch.zeros(2, 18, dtype=torch.bfloat16)
    logits[1, place] = value
    gradient = torch.empty_like(logits)
    found = loss._cross_entropy(logits, torch.tensor([1, 1]), gradient)
    assert found[0].isfinite() and not found[1].isfinite()
    assert gradient[0].isfinite().all() and not gradient[1].isfinite().all()


@built
def test_a_masked_token_has_no_weight() -> None:
    logits = torch.zeros(1, 33, dtype=torch.bfloat16)
    logits[0, 1:] = -torch.inf
    gradient = torch.empty_like(logits)
    assert loss._cross_entropy(logits, torch.tensor([0]), gradient).item() == pytest.approx(
        0, abs=1e-6
    )
    assert gradient.abs().max() < 1e-6


@built
def test_other_types_stay_with_torch() -> None:
    assert not loss.by_native(torch.zeros(2, 4))
    assert not loss.by_native(torch.zeros(2, 4, dtype=torch.float16))
    assert not loss.by_native(torch.zeros(4, 2, dtype=torch.bfloat16).t())
