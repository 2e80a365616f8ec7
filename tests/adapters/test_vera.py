"""VeRA: the shared projections, its folders and PEFT's, PaddleNLP's form, what is refused."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from adapter_table import error, fill, keep_state, run, take_state
from safetensors.torch import load_file, save_file
from torch import nn

from luthier.adapters import (
    adapter_parameters,
    adapters_of,
    attach,
    fold_into,
    initialise,
    load_adapter,
    plan_of,
    save_adapter,
)
from luthier.adapters.facts import CONFIG, FACTS
from luthier.adapters.placing import build, install
from luthier.adapters.store import WEIGHTS
from luthier.adapters.svd import principal
from luthier.adapters.vera import SHARED, Projections
from luthier.config import AdapterConfig
from luthier.errors import Refused

pytestmark = [
    pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`:UserWarning"),
    pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to False:UserWarning"),
    pytest.mark.filterwarnings("ignore:Specified to not (save|load) vera_A:UserWarning"),
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
]
CLOSE = 1e-5  # another order of products, rounded through two layers


def options(**changes: Any) -> AdapterConfig:
    return AdapterConfig.model_validate({"method": "vera", "rank": 6, **changes})


def logits(model: Any) -> torch.Tensor:
    return model(input_ids=torch.arange(3, 19)[None], use_cache=False).logits


def gradients(model: Any) -> dict[str, torch.Tensor]:
    """Of the trained vectors, by layer and name."""
    model.zero_grad(set_to_none=True)
    logits(model).square().mean().backward()
    return {
        n.removeprefix("base_model.model.").replace(".adapter", "").removesuffix(".default"): p.grad
        for n, p in model.named_parameters()
        if "vera_lambda" in n and p.grad is not None
    }


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt"])
@pytest.mark.parametrize("saved", [False, True])
def test_peft_loads_ours(tiny_model: Any, tmp_path: Path, family: str, saved: bool) -> None:
    model, config = tiny_model(family), options(save_projection=saved)
    attach(model, config, seed=11)
    fill(model)
    save_adapter(model, tmp_path, config, "base", None)
    assert (SHARED[0] in load_file(tmp_path / WEIGHTS)) == saved
    theirs = peft.PeftModel.from_pretrained(tiny_model(family), tmp_path, is_trainable=True)
    assert error(logits(theirs), logits(model)) < CLOSE
    ours, wanted = gradients(model), gradients(theirs)
    assert ours.keys() == wanted.keys()
    assert all(error(ours[n], wanted[n]) < CLOSE for n in ours)
    merged = theirs.merge_and_unload()
    fold_into(model)
    assert error(logits(merged), logits(model)) < CLOSE


@pytest.mark.parametrize(
    ("family", "fields"),
    [
        ("llama", {"target_modules": "all-linear", "r": 100}),  # above every layer's rank
        ("llama", {"target_modules": ["q_proj", "down_proj"], "save_projection": False}),
        ("gpt2", {"target_modules": ["c_attn", "mlp.c_proj"], "save_projection": False}),
        ("opt", {"target_modules": ["k_proj", "fc1"], "bias": "all"}),
    ],
)
def test_we_load_peft_s(
    tiny_model: Any, tmp_path: Path, family: str, fields: dict[str, Any]
) -> None:
    torch.manual_seed(0)
    fields = {"r": 8, "projection_prng_key": 7, "vera_dropout": 0.25, **fields}
    config = peft.VeraConfig(**fields, task_type="CAUSAL_LM")
    theirs = peft.get_peft_model(tiny_model(family), config).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            if parameter.requires_grad:
                parameter.copy_(0.1 * torch.randn_like(parameter))
    theirs.save_pretrained(str(tmp_path / "theirs"))
    wanted = logits(theirs)
    model = tiny_model(family)
    loaded = load_adapter(model, tmp_path / "theirs")
    assert not [remark for remark in loaded.remarks if "unknown" in remark]
    assert loaded.config.dropout == 0.25 and loaded.config.projection_seed == 7
    assert error(logits(model), wanted) < CLOSE
    fold_into(model)
    assert error(logits(model), wanted) < CLOSE


def test_first_values_are_peft_s(tiny_model: Any) -> None:
    """Bit for bit, over layers of different shapes, whatever the precision of the base."""
    config = peft.VeraConfig(r=6, projection_prng_key=3, target_modules="all-linear")
    theirs: Any = peft.get_peft_model(tiny_model("llama"), config)
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        model = tiny_model("llama", dtype)
        adapters: Any = attach(model, options(projection_seed=3, d_initial=0.25), seed=1)
        shared = {a.projections for a in adapters.values()}
        assert len(shared) == 1
        for made in shared:
            assert torch.equal(made.A.float(), theirs.base_model.vera_A["default"])
            assert torch.equal(made.B.float(), theirs.base_model.vera_B["default"])
        for adapter in adapters.values():
            assert not adapter.vera_lambda_b.any() and (adapter.vera_lambda_d == 0.25).all()


def test_projections_exist_once(tiny_model: Any, random_batch: Any) -> None:
    """Also after a copy and a move to another type; they are in no state dict."""
    model, batch = tiny_model("llama"), random_batch()
    attach(model, options(), seed=1)
    fill(model)
    wanted = run(model, batch)
    twin = copy.deepcopy(model)
    for each in (model, twin, copy.deepcopy(model).to(torch.float64)):
        assert sum(isinstance(m, Projections) for m in each.modules()) == 1
        assert not any("projections" in name for name in each.state_dict())
    for made in twin.modules():
        if isinstance(made, Projections):
            made.A.zero_()
    assert torch.equal(run(model, batch), wanted) and not torch.equal(run(twin, batch), wanted)


def test_a_model_made_without_values_gets_its_projections() -> None:
    x, deltas = torch.randn(3, 24), []
    for device in ("cpu", "meta"):
        model = nn.ModuleDict({n: nn.Linear(24, 40, device=device) for n in "ab"})
        install(model, build(model, plan_of(model, options()), seed=1))
        if device == "meta":
            model.to_empty(device="cpu")
            for buffer in model.buffers():
                buffer.fill_(7.0)
        initialise(model, seed=1)
        fill(model)
        adapter: Any = adapters_of(model)["b"]
        deltas.append(adapter.delta(x))
    assert torch.equal(*deltas)


def test_the_runs_seed_is_recorded(tiny_model: Any, random_batch: Any, tmp_path: Path) -> None:
    model, batch = tiny_model("llama"), random_batch()
    attach(model, options(), seed=11)
    fill(model)
    save_adapter(model, tmp_path, options(), "base", None)
    for facts in (True, False):
        if not facts:
            (tmp_path / FACTS).unlink()
        again = tiny_model("llama")
        assert load_adapter(again, tmp_path, seed=5).config.projection_seed == 11
        assert torch.equal(run(again, batch), run(model, batch))


@pytest.mark.parametrize("saved", [False, True])
def test_a_resumed_run_has_its_projections(tiny_model: Any, tmp_path: Path, saved: bool) -> None:
    model, config = tiny_model("llama"), options(save_projection=saved)
    attach(model, config, seed=11)
    fill(model)
    wanted = logits(model)
    keep_state(model, tmp_path)
    again = tiny_model("llama")
    adapters: Any = attach(again, config, seed=11)
    next(iter(adapters.values())).projections.A.zero_()
    take_state(again, tmp_path)
    assert torch.equal(logits(again), wanted)


def test_projections_that_do_not_fit_are_refused(tiny_model: Any, tmp_path: Path) -> None:
    config = options(save_projection=True)
    model = tiny_model("llama")
    attach(model, config, seed=1)
    save_adapter(model, tmp_path, config, "base", None)
    tensors = load_file(tmp_path / WEIGHTS)
    a, b = (tensors[name] for name in SHARED)
    wider = {SHARED[0]: torch.cat([a, a], 1), SHARED[1]: torch.cat([b, b])}
    save_file({**tensors, **wider}, tmp_path / WEIGHTS)
    again = tiny_model("llama")
    load_adapter(again, tmp_path)  # made for more layers: their corners are these
    assert torch.equal(logits(again), logits(model))
    for wrong in ({SHARED[0]: a[:, :-1]}, {SHARED[0]: a[:-1]}, {SHARED[1]: b[0]}):
        broken = {n: t.contiguous() for n, t in {**tensors, **wrong}.items()}
        save_file(broken, tmp_path / WEIGHTS)
        with pytest.raises(Refused, match=next(iter(wrong))):
            load_adapter(tiny_model("llama"), tmp_path)
    save_file({n: t for n, t in tensors.items() if n != SHARED[1]}, tmp_path / WEIGHTS)
    with pytest.raises(Refused, match=r"vera_B.*none"):
        load_adapter(tiny_model("llama"), tmp_path)


def test_paddlenlp_starts_at_the_principal_part() -> None:
    torch.manual_seed(0)
    layer = nn.Linear(20, 30).double()
    model = nn.ModuleDict({"layer": layer})
    x = torch.randn(4, 20, dtype=torch.float64)
    before = layer(x)
    adapter: Any = attach(model, options(form="paddlenlp", rank=3), seed=1)["layer"]
    assert torch.equal(layer(x), before) and not adapter.update().any()
    u, s, vt = torch.linalg.svd(layer.weight)
    product = adapter.vera_B @ adapter.vera_A
    assert error(product, u[:, :3] * s[:3] @ vt[:3]) < 1e-13
    assert adapter.scale == 1  # alpha is the rank
    with torch.no_grad():
        adapter.vera_lambda_d.mul_(2)  # the principal part, once more
    assert error(layer(x), before + x @ product.t()) < 1e-13


def test_paddlenlp_is_loaded_without_an_svd(
    tiny_model: Any, random_batch: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, batch = tiny_model("gpt2"), random_batch()
    config = options(form="paddlenlp", alpha=4, dropout=0.5)
    attach(model, config, seed=1)
    fill(model)
    save_adapter(model, tmp_path, config, "base", None)
    fields = json.loads((tmp_path / CONFIG).read_text("utf-8"))
    assert fields["peft_type"] == "LUTHIER_VERA_SVD"
    (tmp_path / FACTS).unlink()
    monkeypatch.setattr("luthier.adapters.vera.principal", None)
    again = tiny_model("gpt2")
    loaded = load_adapter(again, tmp_path, trainable=True).config
    assert (loaded.form, loaded.alpha, loaded.dropout) == ("paddlenlp", 4, 0.5)
    assert torch.equal(run(again, batch), run(model, batch))
    # what is fixed is not trained
    names = {name.rpartition(".")[2] for name in adapter_parameters(again)}
    assert names == {"vera_B", "vera_lambda_b", "vera_lambda_d"}


def test_randomised_svd_is_the_exact_one() -> None:
    torch.manual_seed(0)
    weight = torch.randn(300, 200, dtype=torch.float64) * 0.9 ** torch.arange(200)
    u, s, v = principal(weight, 4, torch.Generator().manual_seed(0))  # wide enough for a sketch
    exact = torch.linalg.svd(weight)
    assert error(s, exact.S[:4]) < 1e-12
    assert error((u * s) @ v.t(), (exact.U[:, :4] * exact.S[:4]) @ exact.Vh[:4]) < 1e-10
    for part in (u, v):
        assert error(part.t() @ part, torch.eye(4)) < 1e-13
    columns = u[u.abs().argmax(0), torch.arange(4)]
    assert (columns > 0).all()
    small = principal(weight[:20], 4, torch.Generator())
    assert error((small[0] * small[1]) @ small[2].t(), best(weight[:20], 4)) < 1e-13


def best(weight: torch.Tensor, rank: int) -> torch.Tensor:
    u, s, vt = torch.linalg.svd(weight, full_matrices=False)
    return (u[:, :rank] * s[:rank]) @ vt[:rank]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"alpha": 4}, "adapter.alpha=4.*form=paper"),
        ({"form": "paddlenlp", "d_initial": 0.2}, "adapter.d_initial=0.2.*form=paddlenlp"),
        ({"form": "paddlenlp", "save_projection": True}, "adapter.save_projection"),
        ({"form": "paddlenlp", "rank": 33}, "rank 32 at most"),
        ({"rank_pattern": {"q_proj": 2}}, "adapter.rank_pattern"),
    ],
)
def test_refused(tiny_model: Any, changes: dict[str, Any], message: str) -> None:
    model = tiny_model("llama")
    with pytest.raises(Refused, match=message):
        attach(model, options(**changes), seed=1)
    assert not adapters_of(model)


def test_bad_peft_options_are_refused(tiny_model: Any, tmp_path: Path) -> None:
    model = tiny_model("llama")
    attach(model, options(), seed=1)
    save_adapter(model, tmp_path, options(), "base", None)
    path = tmp_path / CONFIG
    fields = json.loads(path.read_text("utf-8"))
    path.write_text(json.dumps({**fields, "projection_prng_key": -1}), "utf-8")
    with pytest.raises(Refused, match="projection_seed=-1"):
        load_adapter(tiny_model("llama"), tmp_path)
    path.write_text(json.dumps({**fields, "shiny": 1}), "utf-8")
    assert "shiny=1" in " ".join(load_adapter(tiny_model("llama"), tmp_path).remarks)
    (tmp_path / FACTS).unlink()
    save_file({SHARED[0]: torch.zeros(6, 6)}, tmp_path / WEIGHTS)
    with pytest.raises(Refused, match="no layer's vectors"):
        load_adapter(tiny_model("llama"), tmp_path)
