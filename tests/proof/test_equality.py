"""A step is the same however its rows are cut and packed, and it is plain transformers' step.

Eight real rows go through the trainer's own path (loader, stage, chunked loss, updater): as one batch, as
micro-batches of 4 and of 1, and packed. The reference is a model built apart from the same seed: padded rows,
an attention that multiplies the whole table of scores under a mask, torch's cross entropy, and PEFT's LoRA.
Loss and every gradient agree to 1e-6 in float32 and 1e-10 in float64, relative per tensor.

In float32 our attention is `math`, which multiplies what eager attention multiplies: each of the two is up to
1.6e-6 (qwen3's norms of queries and keys) off the exact gradients, and another kernel adds its own rounding.
In float64 it is the one that `auto` takes; they agree to 1e-15.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import FAMILIES, tiny_model_, tiny_tokenizer_
from peft import LoraConfig, get_peft_model
from tiny_runs import tiny_config, write_rows
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.functional import cross_entropy, softmax
from transformers import AttentionInterface, AttentionMaskInterface

from luthier.adapters import adapters_of, attach
from luthier.batch import IGNORE
from luthier.config import AdapterConfig, OptimConfig, RunConfig
from luthier.data.dataset import Dataset, prepare
from luthier.data.encode import Renderer
from luthier.data.loader import Loader
from luthier.models.attention import install
from luthier.models.stage import Stage
from luthier.seeding import generator
from luthier.train.master import MasterWeights
from luthier.train.optim import make_optimizer
from luthier.train.step import Updater

TOLERANCE = {torch.float32: 1e-6, torch.float64: 1e-10}
KERNEL = {torch.float32: "math", torch.float64: "auto"}
# The softmax does not see a shift of all scores of a query. Where keys are not rotated, their bias is such a
# shift: its true gradient is zero, and what is computed is rounding. It is held to the scale of the others.
ZERO = {"opt": "k_proj.bias"}
LORA = AdapterConfig.model_validate({"method": "lora", "rank": 3, "alpha": 5.0})
ROWS = [("a", "red"), ("of one", "to the"), ("what is it?", "it is on"), ("b", "on and on")] * 2


@dataclass
class Measured:
    """Mean loss over the supervised tokens, and name -> gradient."""

    loss: Tensor
    gradients: dict[str, Tensor]


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    """Eight examples of different lengths, one with two rounds and one with a system message."""
    rows: list[dict[str, Any]] = [
        {"src": f"{i} {src}", "tgt": tgt + " er" * (i % 4)} for i, (src, tgt) in enumerate(ROWS)
    ]
    rows[2] = {"src": ["one", "two"], "tgt": ["is", "does the"]}
    rows[5]["system"] = "do"
    folder = tmp_path_factory.mktemp("rows")
    path = write_rows(folder / "train.json", rows)
    tree = tiny_config(Path("unused"), path, folder, evaluate__every="never")
    config = RunConfig.model_validate(tree)
    found = prepare(config, Renderer(tiny_tokenizer_(), length=128), "train")
    assert isinstance(found, Dataset) and len(found) == 8
    return found


def step_of(dataset: Dataset, micro_batch: int, packing: Any) -> list[Any]:
    """The micro-batches of the one step that holds all eight examples."""
    loader = Loader(
        dataset, batch=8, micro_batch=micro_batch, pad_id=0, seed=3, length=64, packing=packing
    )
    assert loader.steps_per_epoch == 1
    steps = loader.step_batches()
    try:
        found = next(steps)
    finally:
        steps.close()
    shared = any(int(batch.document_ids.max()) > 0 for batch in found)
    assert len(found) == loader.num_rows or micro_batch > 1
    assert shared == (packing != "none")
    return found


def trainer_step(model: Any, micro_batches: list[Any]) -> Measured:
    """Loss and gradients of the trainer's own step, at rate 0."""
    kept: dict[str, Tensor] = {}
    trained = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    master = MasterWeights(trained, "float32")
    config = OptimConfig.model_validate({"name": "sgd"})
    updater = Updater(
        stage=Stage(model),
        master=master,
        optimizer=make_optimizer(master.named, config, 0.0),
        clip=0.0,
        gate=lambda *, gradients, **_: kept.update(
            {n: g for n, g in gradients.items() if g is not None}
        ),
    )
    report = updater.update(micro_batches, step=1, lr=0.0)
    assert report.loss is not None
    return Measured(torch.tensor(report.loss, dtype=torch.float64), kept)


def whole_table(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    scaling: float | None = None,
    softcap: float | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Eager attention in the tensors' own type; transformers' takes its softmax in float32."""
    assert mask is not None
    repeat = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(repeat, 1), value.repeat_interleave(repeat, 1)
    scores = query @ key.mT * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    return (softmax(scores + mask, -1) @ value).transpose(1, 2), None


AttentionInterface.register("whole_table", whole_table)
AttentionMaskInterface.register("whole_table", AttentionMaskInterface()["eager"])


def padded(dataset: Dataset) -> tuple[Tensor, Tensor, Tensor]:
    """Ids, mask and labels (not shifted, as transformers has them) of one example per row."""
    width = int(dataset.lengths.max())
    ids = torch.zeros(8, width, dtype=torch.long)
    mask, labels = torch.zeros_like(ids), torch.full_like(ids, IGNORE)
    for i in range(8):
        tokens, wanted = (torch.as_tensor(x).long() for x in dataset.example(i))
        ids[i, : len(tokens)], mask[i, : len(tokens)] = tokens, 1
        labels[i, 1 : len(tokens)] = wanted[:-1]
    return ids, mask, labels


def plain_step(model: Any, dataset: Dataset) -> Measured:
    """The reference: the model's plain forward and torch's cross entropy over shifted logits."""
    ids, mask, labels = padded(dataset)
    logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
    loss = cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    loss.backward()
    named = {n: p.grad for n, p in model.named_parameters() if p.requires_grad}
    return Measured(loss.detach(), {n: g for n, g in named.items() if g is not None})


@contextmanager
def computing_in(dtype: torch.dtype) -> Iterator[None]:
    """In float64 nothing shall be float32, as gemma2's norms and bloom's softmax are whatever they are given."""
    with pytest.MonkeyPatch.context() as patch:
        if dtype == torch.float64:
            patch.setattr(torch.Tensor, "float", torch.Tensor.double)
            patch.setattr(functional, "softmax", lambda x, dim, **_: torch.softmax(x, dim))
        yield


def our_model(family: str, dtype: torch.dtype) -> Any:
    model = tiny_model_(family, dtype)
    install(model, KERNEL[dtype])
    return model


def plain_model(family: str, dtype: torch.dtype) -> Any:
    attention = "whole_table" if dtype == torch.float64 else "eager"
    return tiny_model_(family, dtype, attention=attention)


def compare(ours: Measured, reference: Measured, tolerance: float, zero: str | None) -> None:
    """The loss and every gradient, relative per tensor; the names are the same."""
    assert abs(ours.loss - reference.loss) <= tolerance * abs(reference.loss)
    assert ours.gradients.keys() == reference.gradients.keys()
    scale = max(float(g.abs().max()) for g in reference.gradients.values())
    for name, wanted in reference.gradients.items():
        distance = (ours.gradients[name].double() - wanted.double()).norm()
        if zero is not None and name.endswith(zero):
            assert float(wanted.abs().max()) <= tolerance * scale, f"{name} is not zero"
            assert float(ours.gradients[name].abs().max()) <= tolerance * scale, name
        else:
            assert float(distance / wanted.double().norm()) <= tolerance, name


CUTS = {  # micro-batch, packing
    "8": (8, "none"),
    "2 x 4": (4, "none"),
    "8 x 1": (1, "none"),
    "packed rows": (8, "best"),
    "packed rows x 1": (1, "best"),
}


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_full(family: str, dtype: torch.dtype, dataset: Dataset) -> None:
    with computing_in(dtype):
        reference = plain_step(plain_model(family, dtype), dataset)
        for cut in CUTS.values():
            ours = trainer_step(our_model(family, dtype), step_of(dataset, *cut))
            compare(ours, reference, TOLERANCE[dtype], ZERO.get(family))


@pytest.mark.filterwarnings(
    "ignore:.is_gradient_checkpointing. is deprecated:FutureWarning"
)  # PEFT's
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_lora(family: str, dtype: torch.dtype, dataset: Dataset) -> None:
    """B is not zero, so that A has a gradient too."""
    with computing_in(dtype):
        reference = plain_step(peft_model(family, dtype), dataset)
        named = {_our_name(n): g for n, g in reference.gradients.items()}
        reference = Measured(reference.loss, named)
        for cut in CUTS.values():
            ours = trainer_step(lora_model(family, dtype), step_of(dataset, *cut))
            compare(ours, reference, TOLERANCE[dtype], None)


def lora_model(family: str, dtype: torch.dtype) -> Any:
    model = our_model(family, dtype)
    attach(model, LORA, seed=5)
    with torch.no_grad():
        for name, adapter in adapters_of(model).items():
            drawn = torch.randn(adapter.lora_B.shape, generator=generator(6, name))
            adapter.lora_B.copy_(0.1 * drawn)
    return model


def peft_model(family: str, dtype: torch.dtype) -> Any:
    """PEFT's LoRA with the same values on a model built apart."""
    model = lora_model(family, dtype)
    values = {n: p.detach() for n, p in model.named_parameters() if ".adapter." in n}
    config = LoraConfig(
        r=LORA.rank,
        lora_alpha=LORA.scale_alpha,  # pyright: ignore[reportArgumentType]
        target_modules=list(adapters_of(model)),
        fan_in_fan_out=family == "gpt2",
    )
    wrapped = get_peft_model(plain_model(family, dtype), config)
    taken = 0
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if parameter.requires_grad:
                parameter.copy_(values[_our_name(name)])
                taken += 1
    assert taken == len(values)
    return wrapped.eval()


def _our_name(name: str) -> str:
    """PEFT's name of a parameter -> ours."""
    name = name.removeprefix("base_model.model.").removesuffix(".default.weight")
    return name.replace(".lora_", ".adapter.lora_")


def test_the_comparison_finds_a_wrong_share(dataset: Dataset) -> None:
    """The mean of the micro-batches' means, which other trainers take, is told apart."""
    reference = plain_step(plain_model("llama", torch.float32), dataset)
    micro_batches = step_of(dataset, 1, "none")
    parts = [trainer_step(tiny_model_("llama"), [batch]) for batch in micro_batches]
    mean = Measured(
        torch.stack([p.loss for p in parts]).mean(),
        {n: torch.stack([p.gradients[n] for p in parts]).mean(0) for n in parts[0].gradients},
    )
    with pytest.raises(AssertionError):
        compare(mean, reference, 1e-2, None)
