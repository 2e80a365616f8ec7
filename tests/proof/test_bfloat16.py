"""LoRA in bfloat16 from B = 0 follows float32: the losses of steps 1, 4 and 8, and what was learned by then.

Both compute with the same weights, those that bfloat16 can hold. A reported loss carries the rounding of the forward
that reports it, which plain transformers' forward has too: its error on the same rows is the measure. What was learned
carries none: the adapters of step 8 are put into the float32 model. `LUTHIER_MODEL`, a folder with
SmolLM2-135M-Instruct, and `LUTHIER_DATA` make the long test: the bound of 0.005 on a packed row of Alpaca.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import partialmethod
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM

from luthier import native
from luthier.adapters import adapter_parameters, attach
from luthier.assemble import open_data, open_text
from luthier.batch import IGNORE, Batch
from luthier.config import AdapterConfig, OptimConfig
from luthier.configfile import from_mapping
from luthier.models import attention, fast
from luthier.models.recompute import compile_layers
from luthier.models.stage import Stage
from luthier.train.loss import token_loss
from luthier.train.optim import make_optimizer

COMPARED = (1, 4, 8)  # steps
MODEL, DATA = os.environ.get("LUTHIER_MODEL", ""), os.environ.get("LUTHIER_DATA", "")
built = pytest.mark.skipif(native.library() is None, reason=native.status())
PATHS = [
    "torch",
    pytest.param("native", marks=built),
    pytest.param("compiled", marks=built),
]
pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # of compilation
    pytest.mark.filterwarnings("ignore:The .grad attribute"),
]


def adapted(model: Any, kernel: str, path: str = "") -> Stage:
    attention.install(model, kernel, train=True)
    if path in ("native", "compiled"):
        assert not fast.fasten(model)
    attach(model, AdapterConfig.model_validate({"method": "lora", "rank": 8}), seed=1)
    stage = Stage(model).train()
    if path == "compiled":
        compile_layers(stage)
    return stage


def loss_of(stage: Stage, batch: Batch) -> Tensor:
    """Mean over the supervised tokens."""
    how: Any = {"relative": stage.relative_logits}
    total = token_loss(stage(batch), batch.labels, stage.head, stage.head_parameters(), **how)
    return total / batch.num_supervised


def eight_steps(stage: Stage, batch: Batch, lr: float) -> list[float]:
    """The losses of eight steps of AdamW, from B = 0."""
    named = [(n, p) for n, p in stage.model.named_parameters() if p.requires_grad]
    assert all(p.dtype == torch.float32 for _, p in named)
    optimizer, losses = make_optimizer(named, OptimConfig.model_validate({}), lr, {}), []
    for _ in range(8):
        optimizer.zero_grad()
        loss = loss_of(stage, batch)
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses


@torch.no_grad()
def learned(stage: Stage, exact: Stage, batch: Batch) -> float:
    """The loss of the adapters of `stage` in the float32 model `exact`."""
    ours, theirs = adapter_parameters(stage.model), adapter_parameters(exact.model)
    for name, parameter in theirs.items():
        parameter.copy_(ours[name])
    return float(loss_of(exact, batch))


@torch.no_grad()
def plain(model: Any, batch: Batch) -> float:
    """The loss of transformers' own forward, each document alone."""
    total = 0.0
    for row, documents in enumerate(batch.document_ids):
        for document in documents.unique():
            here = documents == document
            logits = model(batch.input_ids[row : row + 1, here]).logits[0].float()
            wanted = batch.labels[row, here]
            total += float(cross_entropy(logits, wanted, ignore_index=IGNORE, reduction="sum"))
    return total / batch.num_supervised


@pytest.fixture(scope="module")
def scene(tiny_model: Any, random_batch: Any) -> tuple[Batch, list[float], float, float]:
    """A batch, float32's losses, the loss of what float32 learned, and the root mean square of the errors of plain
    transformers' bfloat16 on six batches."""
    lengths = [[173, 51, 290, 333]] * 4
    errors = []
    for seed in range(6):
        batch = random_batch(lengths_per_row=lengths, supervised_share=0.9, seed=seed)
        half = tiny_model("llama", torch.bfloat16, attention="sdpa")
        wide = tiny_model("llama", torch.bfloat16, attention="sdpa").float()
        errors.append(plain(half, batch) - plain(wide, batch))
    batch = random_batch(lengths_per_row=lengths, supervised_share=0.9)
    exact = adapted(tiny_model("llama", torch.bfloat16).float(), "math")
    losses = eight_steps(exact, batch, LR)
    with torch.no_grad():
        spread = sum(error**2 for error in errors) / len(errors)
        return batch, losses, float(loss_of(exact, batch)), spread**0.5


LR = 3e-5  # so small that deltas lie below half a step of what they are added to, all eight steps long


def check(losses: list[float], wanted: list[float], bound: float) -> None:
    differences = {step: losses[step - 1] - wanted[step - 1] for step in COMPARED}
    assert all(abs(value) < bound for value in differences.values()), (differences, bound)


@pytest.mark.parametrize("path", PATHS)
def test_losses_are_as_near_as_plain_forwards(
    path: str, scene: Any, tiny_model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    batch, wanted, end, error = scene
    # compiled without C++: what tracing changes; the long tests have the real compiler
    monkeypatch.setattr(nn.Module, "compile", partialmethod(nn.Module.compile, backend="aot_eager"))
    monkeypatch.setenv(native.SWITCH, "0" if path == "torch" else "1")
    stage = adapted(tiny_model("llama", torch.bfloat16), "auto", path)
    check(eight_steps(stage, batch, LR), wanted, 4 * error)
    # a hundredth of the way: two float32 runs that round in another order differ by less
    exact = adapted(tiny_model("llama", torch.bfloat16).float(), "math")
    assert abs(learned(stage, exact, batch) - end) < 0.01 * (wanted[0] - end)


def test_it_would_see_deltas_that_are_rounded_away(scene: Any, tiny_model: Any) -> None:
    batch, wanted, _, error = scene
    stage = adapted(tiny_model("llama", torch.bfloat16), "auto")
    layers: list[Any] = [m for m in stage.model.modules() if hasattr(m, "adapter")]
    for layer in layers:
        layer.adapter.handles[0].remove()
        layer.register_forward_hook(lambda m, args, y: m.adapter.after(args[0], y))
    with pytest.raises(AssertionError):
        check(eight_steps(stage, batch, LR), wanted, 4 * error)


# ---- a real model and real rows


@pytest.fixture(scope="module")
def real() -> tuple[Callable[[torch.dtype], Any], Batch, list[float], float]:
    """What loads the model with bfloat16's weights, a packed row, float32's losses and what they end at."""
    config = from_mapping(
        {"model": {"path": MODEL}, "data": {"path": str(Path(DATA) / "alpaca_en_demo.json")}},
        ["output=none", "train.batch=1", "data.workers=0", "evaluate.every=never"],
    ).config
    data = open_data(config, open_text(config))
    (batch,) = data.loader.peek()
    data.loader.close()

    def load(dtype: torch.dtype) -> Any:
        model: Any = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.bfloat16)
        return model.to(dtype)

    exact = adapted(load(torch.float32), "sdpa")
    losses = eight_steps(exact, batch, 3e-4)
    with torch.no_grad():
        return load, batch, losses, float(loss_of(exact, batch))


@pytest.mark.long  # a quarter of an hour on two cores
@pytest.mark.skipif(not (MODEL and DATA), reason="LUTHIER_MODEL and LUTHIER_DATA are not set")
@pytest.mark.parametrize("path", PATHS)
def test_a_real_model(path: str, real: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    load, batch, wanted, end = real
    monkeypatch.setenv(native.SWITCH, "0" if path == "torch" else "1")
    stage = adapted(load(torch.bfloat16), "auto", path)
    losses = eight_steps(stage, batch, 3e-4)
    print(path, [round(a - b, 4) for a, b in zip(losses, wanted, strict=True)])
    check(losses, wanted, 0.005)
    exact = adapted(load(torch.float32), "sdpa")
    behind = learned(stage, exact, batch) - end
    print(path, round(behind, 5), wanted[0] - end)
    assert abs(behind) < 0.01 * (wanted[0] - end)
