"""LoRA's options: rsLoRA, LoRA+, the mixer, what PEFT makes of them, modules trained whole; and the fused node."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from adapter_table import error, fill, options, run
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers.pytorch_utils import Conv1D

from luthier.adapters import (
    adapter_parameters,
    adapters_of,
    attach,
    detach,
    fold_into,
    load_adapter,
    lr_scales,
    save_adapter,
    whole_parameters,
)
from luthier.adapters.facts import CONFIG, FACTS
from luthier.adapters.fused import install_fused
from luthier.adapters.store import WEIGHTS
from luthier.batch import Batch, Layout, layout_scope
from luthier.errors import Refused

# PEFT's own: remarks on gpt2's Conv1D, on heads and on tied weights, and what it uses of transformers
pytestmark = [
    pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to False:UserWarning"),
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:Model.*tie_word_embeddings:UserWarning"),
    pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`:UserWarning"),
]
CLOSE = 1e-5  # two orders of multiplication, through two layers


def logits(model: Any) -> Tensor:
    return model(input_ids=torch.arange(3, 19)[None], use_cache=False).logits


def saved(model: Any, folder: Path, **changes: Any) -> Any:
    """`model` with a trained adapter, saved in `folder`; its options."""
    config = options("lora", **changes)
    attach(model, config, seed=1)
    fill(model)
    with torch.no_grad():
        for parameter in whole_parameters(model).values():
            parameter.add_(0.1 * torch.randn_like(parameter))
    save_adapter(model, folder, config, "base", None)
    return config


def test_rslora_scales_by_the_root_of_the_rank(tiny_model: Any, tmp_path: Path) -> None:
    model, plain = tiny_model("llama"), tiny_model("llama")
    config = saved(model, tmp_path, rslora=True)
    attach(plain, options("lora", alpha=6 * 2), seed=1)  # alpha / sqrt(4) = 2 alpha / 4
    fill(plain)
    assert torch.equal(logits(model), logits(plain))
    fields = json.loads((tmp_path / CONFIG).read_text("utf-8"))
    assert fields["use_rslora"] is True and fields["lora_alpha"] == 6 and fields["r"] == 4
    theirs = peft.PeftModel.from_pretrained(tiny_model("llama"), tmp_path)
    assert error(logits(theirs), logits(model)) < CLOSE
    (tmp_path / FACTS).unlink()
    again = tiny_model("llama")
    assert load_adapter(again, tmp_path).config == config.model_copy(
        update={"targets": tuple(sorted(fields["target_modules"]))}
    )
    assert torch.equal(logits(again), logits(model))


def test_lora_plus_scales_b_alone(tiny_model: Any) -> None:
    model = tiny_model("llama")
    attach(model, options("mixer", lora_plus=16, dora=False), seed=1)
    scales = lr_scales(model)
    assert {n.rpartition(".")[2]: s for n, s in scales.items()} == {
        "lora_A": 1.0,
        "lora_B": 16.0,
        "lora_AB": 1.0,
    }
    assert scales.keys() == adapter_parameters(model).keys()


def test_the_mixer_s_first_values(tiny_model: Any) -> None:
    model = tiny_model("llama")
    for adapter in attach(model, options("mixer"), seed=1).values():
        values = adapter.get_parameter("lora_AB")
        assert values.shape == (4, 4) and 0.3 < values.abs().max() <= 0.5  # 1 / sqrt(4)


def test_a_mixer_s_folder_is_our_own_type(tiny_model: Any, tmp_path: Path) -> None:
    model = tiny_model("gpt2")
    attach(model, options("mixer", rslora=True, rank_pattern={"c_fc": 3}), seed=1)
    fill(model)
    save_adapter(model, tmp_path, options("mixer", rslora=True), "base", None)
    fields = json.loads((tmp_path / CONFIG).read_text("utf-8"))
    assert fields["peft_type"] == "LUTHIER_MIXER" and fields["use_rslora"] is True
    assert load_file(tmp_path / WEIGHTS)[
        "base_model.model.transformer.h.0.mlp.c_fc.lora_AB.weight"
    ].shape == (3, 3)
    (tmp_path / FACTS).unlink()
    again = tiny_model("gpt2")
    config = load_adapter(again, tmp_path).config
    assert config.mixer and config.rslora and config.rank == 4
    assert torch.equal(logits(again), logits(model))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"rank": 65, "targets": "q_proj"}, "rank 64 at most"),
        ({"rank_pattern": {"k_proj": 40}, "targets": "k_proj"}, "k_proj' is 64 -> 32"),
        ({"factor": 4}, "adapter.factor=4.*no such option"),
        ({"dropout": 0.1, "targets": "lm_head"}, "adapter.dropout=0.1 on the output layer"),
        ({"modules_to_save": ("norms",)}, "no module with parameters has this name"),
        ({"modules_to_save": ("lm_head",), "targets": "lm_head"}, "cannot be trained whole"),
    ],
    ids=["rank", "pattern", "option", "dropout", "name", "both"],
)
def test_bad_options(tiny_model: Any, changes: dict[str, Any], words: str) -> None:
    model = tiny_model("llama")
    with pytest.raises(Refused, match=words):
        attach(model, options("lora", **changes), seed=1)
    assert not adapters_of(model) and all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("other", [{"pissa": True}, {"dora": True}])
def test_the_mixer_combines_with_no_other_form(other: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="no one has defined their combination"):
        options("mixer", **other)


def test_decoder_layers_and_patterns_survive_in_peft(tiny_model: Any, tmp_path: Path) -> None:
    model = tiny_model("llama")
    config = saved(
        model,
        tmp_path,
        layers="1",
        targets=("all-linear",),
        rank_pattern={"mlp.*": 2, "q_proj": 3},
        alpha_pattern={"q_proj": 9},
    )
    tensors = load_file(tmp_path / WEIGHTS)
    assert len(tensors) == 14 and all(".layers.1." in name for name in tensors)
    ranks = {n.split(".")[-3]: t.shape[0] for n, t in tensors.items() if "lora_A" in n}
    assert ranks["up_proj"] == 2 and ranks["q_proj"] == 3 and ranks["k_proj"] == config.rank == 4
    theirs = peft.PeftModel.from_pretrained(tiny_model("llama"), tmp_path)
    assert error(logits(theirs), logits(model)) < CLOSE
    for facts in (True, False):
        again = tiny_model("llama")
        load_adapter(again, tmp_path)
        assert torch.equal(logits(again), logits(model))
        if facts:
            (tmp_path / FACTS).unlink()


@pytest.mark.parametrize("row", ["lora", "mixer", "pissa", "dora"])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_packed_is_alone_and_cached_is_uncached(
    tiny_model: Any, random_batch: Any, row: str, family: str
) -> None:
    model, batch = tiny_model(family), random_batch(lengths_per_row=[[5, 3]])
    attach(model, options(row), seed=1)
    fill(model)
    packed = run(model, batch)
    for start, stop in ((0, 5), (5, 8)):
        parts = (batch.input_ids, batch.labels, batch.position_ids, 0 * batch.document_ids)
        alone = run(model, Batch(*(part[:, start:stop] for part in parts), (0,)))
        assert error(packed[:, start:stop], alone) < 1e-6
    how = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    answers = [
        model.generate(batch.input_ids[:, :5], attention_mask=torch.ones(1, 5), use_cache=c, **how)
        for c in (True, False)
    ]
    assert answers[0].shape[1] == 11 and torch.equal(*answers)


WHOLE = [  # family, config of the model, modules, names in the file
    ("llama", {}, ("lm_head",), ["lm_head.weight"]),
    ("llama", {}, ("norm", "embed_tokens"), ["model.embed_tokens.weight", "model.norm.weight"]),
    (
        "qwen2",  # tied: one tensor, two names
        {},
        ("embed_tokens",),
        ["lm_head.weight", "model.embed_tokens.weight"],
    ),
    ("qwen2", {}, ("lm_head",), ["lm_head.weight", "model.embed_tokens.weight"]),
    ("gpt2", {}, ("ln_f",), ["transformer.ln_f.bias", "transformer.ln_f.weight"]),
]


@pytest.mark.parametrize(("family", "changes", "modules", "names"), WHOLE)
def test_modules_to_save(
    tiny_model: Any,
    tmp_path: Path,
    family: str,
    changes: dict[str, Any],
    modules: tuple[str, ...],
    names: list[str],
) -> None:
    model = tiny_model(family, **changes)
    base = logits(model)
    saved(model, tmp_path, modules_to_save=modules)
    wanted = logits(model)
    tensors = load_file(tmp_path / WEIGHTS)
    whole = sorted(n.removeprefix("base_model.model.") for n in tensors if "lora_" not in n)
    assert whole == names
    # PEFT has ours
    theirs = peft.PeftModel.from_pretrained(
        tiny_model(family, **changes), tmp_path, is_trainable=True
    )
    assert error(logits(theirs), wanted) < CLOSE
    trained = [n for n, p in theirs.named_parameters() if p.requires_grad and "lora_" not in n]
    assert len(trained) == len(names), trained  # and no other module, such as every layer's norm
    # we have ours: used, trained on, from PEFT's words alone
    for trainable, facts in ((False, True), (True, True), (True, False)):
        if not facts:
            (tmp_path / FACTS).unlink()
        again = tiny_model(family, **changes)
        load_adapter(again, tmp_path, trainable=trainable)
        assert torch.equal(logits(again), wanted)
        trained = {n for n, p in again.named_parameters() if p.requires_grad}
        expected = adapter_parameters(again).keys() | whole_parameters(again).keys()
        assert trained == (expected if trainable else set())
        if trainable:
            logits(again).square().mean().backward()
            assert all(p.grad.any() for p in whole_parameters(again).values())
    # off again, and for good
    detach(again)
    assert torch.equal(logits(again), base)
    fold_into(model)
    assert error(logits(model), wanted) < CLOSE


@pytest.mark.parametrize(
    ("family", "modules"), [("llama", ["lm_head", "norm"]), ("gpt2", ["ln_f"])]
)
def test_peft_s_modules_to_save_are_trained_on(
    tiny_model: Any, tmp_path: Path, family: str, modules: list[str]
) -> None:
    torch.manual_seed(0)
    fields = {"r": 4, "lora_alpha": 6, "task_type": "CAUSAL_LM", "init_lora_weights": False}
    targets = ["c_attn"] if family == "gpt2" else ["q_proj", "down_proj"]
    config = peft.LoraConfig(**fields, target_modules=targets, modules_to_save=modules)
    theirs: Any = peft.get_peft_model(tiny_model(family), config).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    theirs.save_pretrained(tmp_path)
    ours = tiny_model(family)
    loaded = load_adapter(ours, tmp_path, trainable=True)
    assert any("taken from the adapter's folder" in remark for remark in loaded.remarks)
    wanted = logits(theirs)
    assert error(logits(ours), wanted) < CLOSE
    for model in (theirs, ours):
        logits(model).square().mean().backward()
    gradients = {
        n.replace(".modules_to_save.default", "").replace(".default", ""): p.grad
        for n, p in theirs.named_parameters()
        if p.requires_grad
    }
    mine = adapter_parameters(ours) | whole_parameters(ours)
    assert len(mine) == len(gradients)
    for name, parameter in mine.items():
        path = name.replace(".adapter.lora_A", ".lora_A.weight")
        path = "base_model.model." + path.replace(".adapter.lora_B", ".lora_B.weight")
        assert error(parameter.grad, gradients[path]) < CLOSE, name


# The fused node against the separate products, which autograd differentiates.
KINDS = {
    "linear": lambda: nn.Linear(24, 32, bias=False),
    "biased": lambda: nn.Linear(24, 32),
    "conv1d": lambda: Conv1D(32, 24),
}


def _gradients(model: Any, x: Tensor, **how: Any) -> dict[str, Tensor]:
    layer, x = model["layer"], x.clone().requires_grad_()
    for parameter in model.parameters():
        parameter.grad = None
    draw = torch.Generator().manual_seed(4)
    with torch.autocast("cpu", torch.bfloat16, enabled=how.get("autocast", False)):
        y = checkpoint(layer, x, use_reentrant=False) if how.get("recompute") else layer(x)
    y.backward(torch.randn(y.shape, generator=draw).to(y.dtype))
    found = {n: p.grad for n, p in adapter_parameters(model).items()}
    return {"y": y.detach(), "x": x.grad, **found}


def _separate(model: Any) -> Any:
    """A copy whose adapter acts after the layer, in float64."""
    twin = copy.deepcopy(model).double()
    twin["layer"].adapter.handles[0].remove()
    twin["layer"].register_forward_hook(lambda layer, args, y: layer.adapter.after(args[0], y))
    return twin


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("row", ["lora", "mixer", "pissa", "dora"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_the_fused_node_gives_what_separate_products_give(
    kind: str, row: str, dtype: torch.dtype
) -> None:
    torch.manual_seed(0)
    layer: Any = KINDS[kind]().to(dtype)
    nn.init.normal_(layer.weight)
    model = nn.ModuleDict({"layer": layer})
    attach(model, options(row), seed=1)
    fill(model)
    separate = _separate(model)
    # bf16 rounds what it multiplies, 2^-9 each, and sums that partly cancel
    bound = {torch.float64: 1e-14, torch.float32: 2e-6, torch.bfloat16: 1e-2}[dtype]
    for shape in ((5, 24), (2, 7, 24), (1, 24)):
        x = torch.randn(shape).to(dtype)
        wanted = _gradients(separate, x.double())
        hows: list[dict[str, Any]] = [{}, {"recompute": True}]
        for how in hows:
            for name, value in _gradients(model, x, **how).items():
                assert error(value, wanted[name]) < bound, (name, how)
        if dtype == torch.float32:
            for name, value in _gradients(model, x, autocast=True).items():
                assert error(value, wanted[name]) < 1e-2, (name, "autocast")


@pytest.mark.parametrize("row", ["lora", "mixer", "dora"])
def test_the_fused_node_drops_before_the_update_alone(random_batch: Any, row: str) -> None:
    torch.manual_seed(0)
    model: Any = nn.ModuleDict({"layer": nn.Linear(24, 32).double()})
    attach(model, options(row, dropout=0.5), seed=1)
    fill(model)
    separate = _separate(model)
    model.train(), separate.train()
    batch = random_batch()
    with layout_scope(Layout.of(batch)):
        x = torch.randn(*batch.input_ids.shape, 24, dtype=torch.float64)
        found, wanted = _gradients(model, x), _gradients(separate, x)
        assert all(error(found[name], wanted[name]) < 1e-14 for name in wanted)
        model.eval()
        assert error(_gradients(model, x)["lora_A" if "lora_A" in found else "y"], wanted["y"]) > 0


def test_a_layer_without_input_gradient() -> None:
    """The first layer's input needs none, and none is computed."""
    model: Any = nn.ModuleDict({"layer": nn.Linear(24, 32)})
    attach(model, options("lora"), seed=1)
    fill(model)
    x = torch.randn(3, 24)
    model["layer"](x).square().sum().backward()
    assert all(p.grad.any() for p in adapter_parameters(model).values()) and x.grad is None
    with torch.no_grad():
        assert not model["layer"](x).requires_grad


def test_installing_and_removing_the_node_leaves_the_layer() -> None:
    layer = nn.Linear(4, 4)
    install_fused(layer).remove()
    assert "forward" not in vars(layer)


def test_a_tensor_trained_on_learns(tiny_model: Any, random_batch: Any) -> None:
    """One step down the gradient lowers the loss, of every form and of their combinations."""
    for changes in (
        {"rslora": True, "lora_plus": 4},
        {"mixer": True},
        {"pissa": True, "rslora": True, "lora_plus": 4},
        {"dora": True, "pissa": True, "lora_plus": 4},
    ):
        model, batch = tiny_model("llama"), random_batch()
        attach(model, options("lora", **changes), seed=1)
        target = torch.zeros_like(run(model, batch))
        scales = lr_scales(model)
        losses = []
        for _ in range(3):
            model.zero_grad()
            loss = (run(model, batch) - target).square().mean()
            loss.backward()
            losses.append(loss.item())
            with torch.no_grad():
                for name, parameter in adapter_parameters(model).items():
                    parameter -= 1e-2 * scales[name] * parameter.grad
        assert losses[2] < losses[1] < losses[0], changes
