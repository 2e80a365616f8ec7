"""The routers' loss of mixtures of experts, against plain transformers, packed, cut into micro-batches, recomputed."""

from __future__ import annotations

from dataclasses import replace
from functools import partialmethod
from typing import Any

import pytest
import torch
from family_checks import GRADIENTS, assert_same, error, plain_model, shuffled

from luthier.assemble import Built, make_updater
from luthier.batch import TENSORS, Batch
from luthier.config import RunConfig
from luthier.errors import Refused
from luthier.models.recompute import compile_layers, set_recompute
from luthier.models.stage import Stage

# rows of one document each and of two; the last has padding
DOCUMENTS = [[9], [8], [5, 3], [6]]
WEIGHT = 0.5  # large, so that it is seen in every gradient


def steps(family: str, tiny_model: Any, parts: list[Batch], **keys: Any) -> tuple[Any, Any]:
    """(gradients of one step, its report)."""
    train = {"steps": 1, **keys.pop("train", {})}
    model = tiny_model(family, **keys).train().requires_grad_(True)
    stage = Stage(model)
    set_recompute(stage, train.get("recompute", "none"))
    if train.get("compile"):
        compile_layers(stage)
    config = RunConfig.model_validate(
        {
            "model": {"path": "x", "dtype": "float32"},
            "data": {"path": "x"},
            "optim": {"name": "sgd", "lr": 1.0, "clip": 0.0},
            "train": train,
            "output": "x",
        }
    )
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    updater = replace(
        make_updater(config, Built(model, stage, torch.device("cpu"), "x")), gate=None
    )
    report = updater.update(parts, step=1, lr=1.0)
    return {n: before[n] - p.detach() for n, p in model.named_parameters()}, report


def cut(batch: Batch, size: int) -> list[Batch]:
    return [
        Batch(*(getattr(batch, n)[i : i + size] for n in TENSORS), rows=batch.rows[i : i + size])
        for i in range(0, len(batch.rows), size)
    ]


ON = {"output_router_logits": True, "router_aux_loss_coef": WEIGHT}


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe", "gpt_oss"])
def test_router_loss(family: str, tiny_model: Any, random_batch: Any) -> None:
    """The step's gradients are those of transformers' own loss over the padded documents."""
    batch = random_batch(lengths_per_row=DOCUMENTS)
    found, report = steps(family, tiny_model, [batch], **ON)
    rows = shuffled(batch, 9)
    plain = plain_model(family, **ON).requires_grad_(True)
    labels = torch.cat([torch.full_like(rows.labels[:, :1], -100), rows.labels[:, :-1]], 1)
    out = plain(
        input_ids=rows.input_ids, attention_mask=(rows.document_ids >= 0).long(), labels=labels
    )
    out.loss.backward()
    wanted = {n: p.grad for n, p in plain.named_parameters()}
    assert_same(found, wanted, GRADIENTS)
    assert error(torch.tensor(report.router_loss), WEIGHT * out.aux_loss) < 1e-6
    assert error(torch.tensor(report.loss + report.router_loss), out.loss) < 1e-6
    without, silent = steps(family, tiny_model, [batch])
    assert silent.router_loss is None
    router = next(n for n in found if n.endswith(("gate.weight", "router.weight")))
    assert error(without[router], found[router]) > 1e-2


def test_the_cut_into_micro_batches_changes_nothing(tiny_model: Any, random_batch: Any) -> None:
    batch = random_batch(lengths_per_row=DOCUMENTS)
    whole, report = steps("mixtral", tiny_model, [batch], **ON)
    for size in (1, 2):
        found, parts = steps("mixtral", tiny_model, cut(batch, size), **ON)
        assert_same(found, whole, GRADIENTS)
        assert parts.router_loss == pytest.approx(report.router_loss, rel=1e-6)
    for mode in ("layer", "selective"):
        found, _ = steps("mixtral", tiny_model, [batch], train={"recompute": mode}, **ON)
        assert_same(found, whole, GRADIENTS)


@pytest.mark.long
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
# torch's own: dynamo asks every tensor for it and hides the warning where it would be shown, not where it becomes an error
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")
def test_in_compiled_layers(
    tiny_model: Any, random_batch: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The logits leave the graphs with their gradient."""
    plainly = partialmethod(torch.nn.Module.compile, backend="aot_eager")  # graphs, no C++
    monkeypatch.setattr(torch.nn.Module, "compile", plainly)
    torch._dynamo.reset()
    batch = random_batch(lengths_per_row=DOCUMENTS)
    wanted, report = steps("mixtral", tiny_model, [batch], **ON)
    found, compiled = steps("mixtral", tiny_model, [batch], train={"compile": True}, **ON)
    assert_same(found, wanted, GRADIENTS)
    assert compiled.router_loss == pytest.approx(report.router_loss, rel=1e-6)


def test_the_key_overrides_the_checkpoint(tiny_model: Any, random_batch: Any) -> None:
    batch = random_batch(lengths_per_row=DOCUMENTS)
    wanted, _ = steps("qwen3_moe", tiny_model, [batch], **ON)
    asked = {"router_loss": WEIGHT}
    found, _ = steps("qwen3_moe", tiny_model, [batch], train=asked, router_aux_loss_coef=0.001)
    assert all(torch.equal(found[n], wanted[n]) for n in wanted)
    _, off = steps("qwen3_moe", tiny_model, [batch], train={"router_loss": 0.0}, **ON)
    assert off.router_loss is None
    for family in ("llama", "deepseek_v3"):
        with pytest.raises(Refused, match="no router"):
            steps(family, tiny_model, [batch], train=asked)


def test_z_loss(tiny_model: Any, random_batch: Any) -> None:
    """The mean of logsumexp(router logits)^2 over real tokens and layers."""
    batch = random_batch(lengths_per_row=DOCUMENTS)
    keys = {"output_router_logits": True, "router_aux_loss_coef": 0.0, "router_z_loss_coef": WEIGHT}
    found, report = steps("mixtral", tiny_model, [batch], **keys)
    plain = plain_model("mixtral").requires_grad_(True)
    rows = shuffled(batch, 9)
    real = (rows.document_ids >= 0).long()
    out = plain(input_ids=rows.input_ids, attention_mask=real, output_router_logits=True)
    picked = torch.stack([layer[real.flatten().bool()] for layer in out.router_logits])
    z = WEIGHT * picked.logsumexp(-1).square().mean()
    assert report.router_loss == pytest.approx(float(z.detach()), rel=1e-6)
    z.backward()
    ce, _ = steps("mixtral", tiny_model, [batch])
    name = "model.layers.0.mlp.gate.weight"
    assert error(found[name] - ce[name], plain.get_parameter(name).grad) < 1e-4
