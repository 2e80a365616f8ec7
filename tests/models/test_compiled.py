"""Compiled layers: one graph for rows of every length and any number of documents, gradients as without."""

from __future__ import annotations

from functools import partialmethod
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch._dynamo.utils import counters
from torch.nn.utils.rnn import pad_sequence

from luthier import native
from luthier.adapters.placing import attach
from luthier.batch import IGNORE
from luthier.config import QuantizeConfig
from luthier.config_adapter import AdapterConfig
from luthier.models import attention, fast
from luthier.models.recompute import compile_layers, set_recompute
from luthier.models.stage import Stage
from luthier.quantize.loading import Quantization
from luthier.train.loss import token_loss

PACKS = [[5, 9, 30], [61], [3, 3, 3, 3, 5, 20], [7, 16], [50, 2, 19], [11, 11, 40, 1]]
kernels = ["sdpa"] + (["native"] if native.library() is not None else [])

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:The .grad attribute"),
]


def adapted(make: Any, dtype: torch.dtype, kernel: str, scheme: Any = None, **keys: Any) -> Stage:
    model = make("llama", **keys).to(dtype)
    if scheme:
        Quantization(QuantizeConfig(weights=scheme)).convert(model)  # pyright: ignore[reportCallIssue]
    attention.install(model, kernel, train=True)
    if kernel == "native":
        assert not fast.fasten(model)
    return Stage(with_lora(model)).train()


def with_lora(model: Any) -> Any:
    attach(model, AdapterConfig(method="lora", rank=3), seed=1)
    draw = torch.Generator().manual_seed(3)
    for name, parameter in model.named_parameters():
        if name.endswith("lora_B"):
            with torch.no_grad():
                parameter.copy_(torch.randn(parameter.shape, generator=draw) * 0.1)
    return model


def gradients(stage: Stage, batch: Any) -> dict[str, torch.Tensor]:
    stage.model.zero_grad()
    loss = token_loss(stage(batch), batch.labels, stage.head, stage.head_parameters())
    return gradients_of(loss, stage.model)


def gradients_of(loss: torch.Tensor, model: Any) -> dict[str, torch.Tensor]:
    loss.backward()
    trained = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    return {n: p.grad.clone() for n, p in trained if p.grad is not None}


def plain_gradients(model: Any, batch: Any) -> dict[str, torch.Tensor]:
    """Of transformers' own forward and attention over padded documents."""
    model.zero_grad()
    sizes = batch.document_ids[0].unique(return_counts=True)[1].tolist()
    ids = pad_sequence(batch.input_ids[0].split(sizes), batch_first=True)
    labels = pad_sequence(batch.labels[0].split(sizes), batch_first=True, padding_value=IGNORE)
    mask = pad_sequence([torch.ones(size, dtype=torch.long) for size in sizes], batch_first=True)
    logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
    loss = F.cross_entropy(logits.float().flatten(0, 1), labels.flatten(), reduction="sum")
    return gradients_of(loss, model)


@pytest.mark.long
@pytest.mark.parametrize("mode", ["none", "layer"])
@pytest.mark.parametrize("kernel", kernels)
def test_packs_of_any_length_share_the_graphs(
    kernel: str, mode: Any, tiny_model: Any, random_batch: Any, relative: Any
) -> None:
    half = kernel == "native"
    dtype = torch.bfloat16 if half else torch.float32
    compiled, exact = (
        adapted(tiny_model, *kind) for kind in ((dtype, kernel), (torch.float32, "math"))
    )
    plain = with_lora(tiny_model("llama", dtype, attention="eager"))
    set_recompute(compiled, mode)
    torch._dynamo.reset()
    counters.clear()
    compile_layers(compiled)
    graphs = []
    errors: dict[str, list[tuple[float, float]]] = {}  # of each gradient: ours and transformers'
    for lengths in PACKS:
        batch = random_batch(lengths_per_row=[lengths])
        ours, wanted = gradients(compiled, batch), gradients(exact, batch)
        theirs = plain_gradients(plain, batch)
        graphs.append(counters["stats"]["unique_graphs"])
        for name, reference in wanted.items():
            pair = relative(ours[name], reference), relative(theirs[name], reference)
            errors.setdefault(name, []).append(pair)
    # [tensors, 2], over all packs: the error of one gradient of one pack is a draw of rounding, in either way between half and
    # twice the other's
    both = torch.tensor(list(errors.values())).square().mean(1).sqrt()
    if half:  # no further from float32 than transformers is in bfloat16
        assert float((both[:, 0] / both[:, 1]).max()) < 1.3, dict(zip(errors, both, strict=True))
        mine, other = both.square().mean(0).sqrt().tolist()
        assert mine < 1.1 * other
    else:
        assert max(pair[0] for pairs in errors.values() for pair in pairs) < 2e-6
    assert graphs[0] > 0
    assert graphs == graphs[:1] * len(PACKS)
    assert not counters["graph_break"]


@pytest.mark.parametrize("scheme", ["nf4", "int8"])
def test_a_quantised_base_has_no_graph_of_each_layer(
    scheme: str, tiny_model: Any, random_batch: Any, relative: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its products stay outside; what is between them is compiled once for all of many layers."""
    deep = {"num_hidden_layers": 10}  # more than torch compiles one function for
    plain, compiled = (adapted(tiny_model, torch.float64, "sdpa", scheme, **deep) for _ in range(2))
    torch._dynamo.reset()
    counters.clear()
    plainly = partialmethod(torch.nn.Module.compile, backend="aot_eager")  # graphs, no C++
    monkeypatch.setattr(torch.nn.Module, "compile", plainly)
    compile_layers(compiled)
    graphs = []
    for lengths in PACKS[:3]:
        batch = random_batch(lengths_per_row=[lengths])
        with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):
            ours, theirs = (gradients(x, batch) for x in (compiled, plain))
        graphs.append(counters["stats"]["unique_graphs"])
        errors = {name: relative(ours[name], theirs[name]) for name in theirs}
        assert max(errors.values()) < 1e-9, errors
    assert 0 < graphs[0] < 2 * 10  # pieces between the seven products of a layer, not of each layer
    assert graphs == graphs[:1] * 3
