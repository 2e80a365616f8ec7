"""LoKr: its folders and PEFT's, its forms, parallel pieces, what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from adapter_table import error, fill, run
from peft.tuners.lokr.layer import factorization
from torch import nn
from transformers.pytorch_utils import Conv1D

from luthier.adapters import adapter_parameters, attach, fold_into, load_adapter, save_adapter
from luthier.adapters.facts import CONFIG, FACTS
from luthier.adapters.lokr import split
from luthier.config import AdapterConfig
from luthier.errors import Refused

pytestmark = [
    pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`:UserWarning"),
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
]
CLOSE = 1e-5  # another order of products, rounded through two layers


def options(**changes: Any) -> AdapterConfig:
    return AdapterConfig.model_validate({"method": "lokr", **changes})


def logits(model: Any) -> torch.Tensor:
    return model(input_ids=torch.arange(3, 19)[None], use_cache=False).logits


def gradients(model: Any, names: str) -> dict[str, torch.Tensor]:
    """Of the adapter's parameters, by the ends of their names."""
    model.zero_grad(set_to_none=True)
    logits(model).square().mean().backward()
    found = {n: p.grad for n, p in model.named_parameters() if names in n and p.grad is not None}
    return {n.split("model.layers.")[1].replace(".adapter", ""): g for n, g in found.items()}


def test_splits_are_peft_s() -> None:
    for dimension in [*range(1, 130), 576, 1536, 5632]:
        for factor in (-1, *range(1, 20)):
            assert split(dimension, factor) == factorization(dimension, factor)
            small, large = split(dimension, factor, ordered=True)
            assert small <= large and small * large == dimension


@pytest.mark.parametrize(
    "changes",
    [
        {"rank": 4, "alpha": 6},
        {"rank": 2, "factor": 8, "decompose_both": True},
        {"rank": 3, "rank_pattern": {"q_proj": 1}, "alpha_pattern": {"down_proj": 5.5}},
        {"rank": 1, "form": "paddlenlp", "targets": ("k_proj", "up_proj")},
    ],
)
@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_peft_loads_ours(
    tiny_model: Any, tmp_path: Path, family: str, changes: dict[str, Any]
) -> None:
    model = tiny_model(family)
    attach(model, options(**changes), seed=1)
    fill(model)
    save_adapter(model, tmp_path, options(**changes), "base", None)
    theirs = peft.PeftModel.from_pretrained(tiny_model(family), tmp_path, is_trainable=True)
    assert error(logits(theirs), logits(model)) < CLOSE
    wanted = {n.replace(".default", ""): g for n, g in gradients(theirs, "lokr_").items()}
    ours = gradients(model, "lokr_")
    assert ours.keys() == wanted.keys()
    assert all(error(ours[n], wanted[n]) < CLOSE for n in ours)
    merged = theirs.merge_and_unload()
    fold_into(model)
    assert error(logits(merged), logits(model)) < CLOSE


@pytest.mark.parametrize(
    ("family", "fields"),
    [
        ("llama", {"target_modules": "all-linear", "r": 4, "alpha": 2}),
        ("opt", {"target_modules": ["q_proj", "fc1"], "r": 2, "decompose_both": True}),
        # 7 divides no dimension: the split is the nearest below
        ("qwen2", {"target_modules": ["q_proj", "down_proj"], "r": 2, "decompose_factor": 7}),
        (
            "llama",
            {
                "target_modules": ["q_proj", "up_proj"],
                "rank_pattern": {"up_proj": 3, r"layers\.0\.self_attn\.q_proj": 1},
                "alpha_pattern": {"q_proj": 5},
                "init_weights": "lycoris",
            },
        ),
    ],
)
def test_we_load_peft_s(
    tiny_model: Any, tmp_path: Path, family: str, fields: dict[str, Any]
) -> None:
    torch.manual_seed(0)
    config = peft.LoKrConfig(**fields, task_type="CAUSAL_LM")
    theirs = peft.get_peft_model(tiny_model(family), config).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            if parameter.requires_grad:
                parameter.copy_(0.1 * torch.randn_like(parameter))
    theirs.save_pretrained(str(tmp_path / "theirs"))
    wanted = logits(theirs)
    model = tiny_model(family)
    loaded = load_adapter(model, tmp_path / "theirs", trainable=True)
    assert not loaded.remarks
    assert error(logits(model), wanted) < CLOSE
    save_adapter(model, tmp_path / "ours", loaded.config, "base", None)
    again = peft.PeftModel.from_pretrained(tiny_model(family), tmp_path / "ours")
    assert error(logits(again), wanted) < CLOSE
    fold_into(model)
    assert error(logits(model), wanted) < CLOSE


def test_lycoris_folders_have_a_type_of_their_own(
    tiny_model: Any, random_batch: Any, tmp_path: Path
) -> None:
    model, batch = tiny_model("gpt2"), random_batch()
    config = options(form="lycoris", rank=2, factor=32, alpha=3)
    attach(model, config, seed=1)
    fill(model)
    save_adapter(model, tmp_path, config, "base", None)
    assert json.loads((tmp_path / CONFIG).read_text("utf-8"))["peft_type"] == "LUTHIER_LOKR"
    (tmp_path / FACTS).unlink()
    again = tiny_model("gpt2")
    load_adapter(again, tmp_path)
    assert torch.equal(run(again, batch), run(model, batch))


def test_forms_differ_as_they_should() -> None:
    def adapter(num_in: int, num_out: int, **changes: Any) -> Any:
        model = nn.ModuleDict({"layer": nn.Linear(num_in, num_out)})
        return attach(model, options(**changes), seed=1)["layer"]

    # both factors whole: LyCORIS does not scale
    assert adapter(36, 36, rank=16, alpha=8, form="lycoris").scale == 1
    assert adapter(36, 36, rank=16, alpha=8).scale == 0.5
    # the factor divides: it comes first, in LyCORIS the smaller part does
    assert adapter(64, 64, factor=16, rank=1).lokr_w1.shape == (16, 16)
    assert adapter(64, 64, factor=16, rank=1, form="lycoris").lokr_w1.shape == (4, 4)
    # PaddleNLP's alpha is the rank
    assert adapter(64, 64, rank=2, form="paddlenlp").scale == 1
    # bounds of the first values: rows or columns of w2_a [64, 2]
    wide, narrow = (adapter(4096, 4096, rank=2, form=form) for form in ("peft", "paddlenlp"))
    for made, bound in ((wide, 2**-0.5), (narrow, 64**-0.5)):
        assert 0.9 * bound < made.lokr_w2_a.abs().max() <= bound
    assert not wide.lokr_w1.any() and not narrow.lokr_w1.any()
    lycoris = adapter(4096, 4096, rank=2, form="lycoris")
    assert lycoris.lokr_w1.any() and lycoris.lokr_w2_a.any() and not lycoris.lokr_w2_b.any()


@pytest.mark.parametrize("kind", [nn.Linear, Conv1D])
@pytest.mark.parametrize(
    ("num_in", "num_out", "changes"),
    [
        (24, 36, {"rank": 2, "factor": 4, "decompose_both": True}),  # w2 of low rank
        (64, 64, {"rank": 3, "factor": 16, "decompose_both": True}),  # w1 of low rank
        (12, 64, {"rank": 99}),  # whole; w1 first
        (64, 12, {"rank": 99}),  # whole; w2 first
    ],
)
def test_delta_is_the_kronecker_product(
    kind: Any, num_in: int, num_out: int, changes: dict[str, Any]
) -> None:
    layer = (kind(num_in, num_out) if kind is nn.Linear else kind(num_out, num_in)).double()
    model = nn.ModuleDict({"layer": layer})
    adapter: Any = attach(model, options(**changes), seed=1)["layer"]
    fill(model)
    parameters = dict(adapter.named_parameters())
    w1, w2 = (
        parameters[n] if n in parameters else parameters[f"{n}_a"] @ parameters[f"{n}_b"]
        for n in ("lokr_w1", "lokr_w2")
    )
    x = torch.randn(2, 3, num_in, dtype=torch.float64, requires_grad=True)
    update = adapter.scale * torch.kron(w1, w2)
    assert error(adapter.delta(x), x @ update.t()) < 1e-14
    assert torch.autograd.gradcheck(lambda *_: layer(x), (x, *parameters.values()), fast_mode=True)


def test_parallel_pieces_of_low_rank_factors() -> None:
    """As the contract's test, with w1 = w1_a w1_b: colwise cuts w1_a, rowwise w1_b."""
    whole = nn.ModuleDict({"layer": nn.Linear(64, 64, bias=False).double()})
    config = options(rank=3, alpha=4.5, factor=16, decompose_both=True)
    adapter: Any = attach(whole, config, seed=1)["layer"]
    fill(whole)
    x = torch.randn(3, 64, dtype=torch.float64)
    for style in ("colwise", "rowwise"):
        deltas = []
        for rank in range(2):
            size = (64, 32) if style == "colwise" else (32, 64)
            part = nn.ModuleDict({"layer": nn.Linear(*size, bias=False).double()})
            piece: Any = attach(part, config, seed=1)["layer"]
            for name, parameter in adapter.named_parameters():
                cut = adapter.follows[style].get(name)
                value = parameter if cut is None else parameter.chunk(2, cut)[rank]
                setattr(piece, name, nn.Parameter(value.detach()))
            deltas.append(piece.delta(x if style == "colwise" else x.chunk(2, 1)[rank]))
        joined = torch.cat(deltas, 1) if style == "colwise" else deltas[0] + deltas[1]
        assert error(joined, adapter.delta(x)) < 1e-14


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"factor": 7}, r"layers.0.self_attn.q_proj' \(64 -> 64\). 4 or 8 would"),
        ({"factor": 96, "targets": "gate_proj"}, r"\(64 -> 96\). 32 would"),
        ({"factor": 64, "targets": "gate_proj"}, r"\(64 -> 96\). 32 would"),
        ({"factor": 0}, "adapter.factor=0"),
        ({"dropout": 0.1}, "adapter.dropout"),
        ({"d_initial": 0.2}, "adapter.d_initial"),
    ],
)
def test_refused(tiny_model: Any, changes: dict[str, Any], message: str) -> None:
    model = tiny_model("llama")
    with pytest.raises(Refused, match=message):
        attach(model, options(**changes), seed=1)
    assert not adapter_parameters(model)


def test_peft_s_other_options(tiny_model: Any, tmp_path: Path) -> None:
    config = options(rank=2)
    model = tiny_model("llama")
    attach(model, config, seed=1)
    save_adapter(model, tmp_path, config, "base", None)
    path = tmp_path / CONFIG
    fields = json.loads(path.read_text("utf-8"))
    path.write_text(json.dumps({**fields, "rank_dropout": 0.5, "shiny": 1}), "utf-8")
    remarks = " ".join(load_adapter(tiny_model("llama"), tmp_path).remarks)
    assert "rank_dropout=0.5" in remarks and "shiny=1" in remarks
    path.write_text(json.dumps({**fields, "r": "two"}), "utf-8")
    with pytest.raises(Refused, match="rank=two"):
        load_adapter(tiny_model("llama"), tmp_path)
