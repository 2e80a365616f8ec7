"""Adapter folders: PEFT reads ours and we read PEFT's; what does not fit or is broken is refused."""

from __future__ import annotations

import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from adapter_table import error, fill, options, run
from safetensors.torch import load_file, save_file

from luthier.adapters import (
    adapters_of,
    attach,
    detach,
    fold_into,
    load_adapter,
    save_adapter,
    whole_parameters,
)
from luthier.adapters.facts import CONFIG, FACTS
from luthier.adapters.store import PICKLED, WEIGHTS
from luthier.errors import Refused

PLAIN = {"r": 4, "lora_alpha": 6, "task_type": "CAUSAL_LM", "init_lora_weights": False}
pytestmark = [  # PEFT's own: remarks on gpt2's Conv1D and on heads, and what it uses of transformers
    pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`:UserWarning"),
    pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to False:UserWarning"),
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
]


@pytest.fixture
def folder(tiny_model: Any, tmp_path: Path) -> Path:
    """A saved LoRA of the tiny llama."""
    model = tiny_model("llama")
    attach(model, options("lora"), seed=1)
    fill(model)
    save_adapter(model, tmp_path / "adapter", options("lora"), "base", "0123")
    return tmp_path / "adapter"


def edit(folder: Path, **changes: Any) -> None:
    path = folder / CONFIG
    path.write_text(json.dumps({**json.loads(path.read_text("utf-8")), **changes}), "utf-8")


def peft_folder(model: Any, folder: Path, **fields: Any) -> torch.Tensor:
    """Save an adapter by PEFT, with random weights, and return the ids' logits with it."""
    wrapped = peft.get_peft_model(model, peft.LoraConfig(**{**PLAIN, **fields})).eval()
    with torch.no_grad():
        for parameter in wrapped.parameters():
            if parameter.requires_grad:
                parameter.copy_(0.1 * torch.randn_like(parameter))
    wrapped.save_pretrained(folder)
    return logits(wrapped)


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=torch.arange(3, 19)[None], use_cache=False).logits


# The two sides multiply in another order, so they agree to rounding through two layers.
CLOSE = 1e-5


@pytest.mark.parametrize("family", ["llama", "qwen2", "gpt2", "opt"])
def test_peft_loads_ours(tiny_model: Any, tmp_path: Path, family: str) -> None:
    model = tiny_model(family)
    attach(model, options("lora"), seed=1)
    fill(model)
    save_adapter(model, tmp_path, options("lora"), "base", None)
    theirs = peft.PeftModel.from_pretrained(tiny_model(family), tmp_path)
    assert error(logits(theirs), logits(model)) < CLOSE
    assert sum(p.numel() for n, p in theirs.named_parameters() if "lora_" in n) == sum(
        p.numel() for a in adapters_of(model).values() for p in a.parameters()
    )
    merged = theirs.merge_and_unload()
    fold_into(model)
    assert error(logits(merged), logits(model)) < CLOSE


@pytest.mark.parametrize(
    ("family", "fields"),
    [
        ("llama", {"target_modules": "all-linear"}),
        ("qwen2", {"target_modules": ["q_proj", "down_proj"], "use_rslora": True}),
        ("gpt2", {"target_modules": ["c_attn", "mlp.c_proj"]}),
        ("opt", {"target_modules": "all-linear", "bias": "all"}),
        ("gpt2", {"target_modules": ["c_attn"], "bias": "lora_only"}),
        (
            "llama",
            {
                "target_modules": ["q_proj", "up_proj", "down_proj"],
                "layers_to_transform": [1],
                "rank_pattern": {"down_proj": 3, r"layers\.\d\.mlp\.up_proj": 2},
                "alpha_pattern": {"q_proj": 5},
            },
        ),
        ("llama", {"target_modules": ["q_proj"], "modules_to_save": ["lm_head", "norm"]}),
        ("llama", {"target_modules": ["lm_head", "v_proj"]}),
    ],
)
def test_we_load_peft_s(
    tiny_model: Any, tmp_path: Path, family: str, fields: dict[str, Any]
) -> None:
    torch.manual_seed(0)
    wanted = peft_folder(tiny_model(family), tmp_path, **fields)
    model = tiny_model(family)
    load_adapter(model, tmp_path)
    assert error(logits(model), wanted) < CLOSE
    fold_into(model)
    assert error(logits(model), wanted) < CLOSE


def test_options_of_single_layers_survive_saving(tiny_model: Any, tmp_path: Path) -> None:
    torch.manual_seed(0)
    wanted = peft_folder(
        tiny_model("gpt2"),
        tmp_path / "peft",
        target_modules=r".*h\.1\..*c_proj|.*c_fc",
        rank_pattern={"c_fc": 3},
        alpha_pattern={"mlp.c_proj": 5.5},
        use_rslora=True,
        lora_dropout=0.25,
    )
    model = tiny_model("gpt2")
    loaded = load_adapter(model, tmp_path / "peft", trainable=True)
    assert loaded.config.dropout == 0.25 and loaded.config.rank == 4
    save_adapter(model, tmp_path / "ours", loaded.config, "base", None)
    again = tiny_model("gpt2")
    load_adapter(again, tmp_path / "ours")
    assert torch.equal(logits(again), logits(model))
    theirs = peft.PeftModel.from_pretrained(tiny_model("gpt2"), tmp_path / "ours")
    assert error(logits(theirs), wanted) < CLOSE


def test_what_is_written(folder: Path) -> None:
    fields = json.loads((folder / CONFIG).read_text("utf-8"))
    assert fields["peft_type"] == "LORA" and fields["r"] == 4 and fields["lora_alpha"] == 6
    assert fields["base_model_name_or_path"] == "base"
    assert fields["target_modules"] == sorted(
        ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    )
    known = {f.name for f in peft.LoraConfig.__dataclass_fields__.values()}
    assert fields.keys() <= known  # PEFT warns about others
    tensors = load_file(folder / WEIGHTS)
    assert len(tensors) == 28
    assert tensors["base_model.model.model.layers.1.mlp.up_proj.lora_B.weight"].shape == (96, 4)
    assert all(t.dtype == torch.float32 for t in tensors.values())
    assert json.loads((folder / FACTS).read_text("utf-8"))["base_hash"] == "0123"


def test_bin_files(tiny_model: Any, folder: Path) -> None:
    model, same = tiny_model("llama"), tiny_model("llama")
    load_adapter(model, folder)
    torch.save(load_file(folder / WEIGHTS), folder / PICKLED)
    (folder / WEIGHTS).unlink()
    load_adapter(same, folder)
    assert torch.equal(logits(model), logits(same))


def test_base_name_and_hash(tiny_model: Any, folder: Path) -> None:
    model = tiny_model("llama")
    with pytest.raises(Refused, match=r"other weights \(hash 0123, here 4567\).*: base\."):
        load_adapter(model, folder, base_name="base", base_hash="4567")
    assert load_adapter(model, folder, base_name="base", base_hash="0123").remarks == ()
    detach(model)
    (remark,) = load_adapter(model, folder, base_name="moved").remarks
    assert "base named base, here it is moved" in remark
    detach(model)
    (folder / FACTS).unlink()  # as PEFT saves it
    assert load_adapter(model, folder, base_hash="4567").remarks == ()


def test_unknown_options_are_a_remark(tiny_model: Any, folder: Path) -> None:
    edit(folder, some_other_tool=True)
    (remark,) = load_adapter(tiny_model("llama"), folder).remarks
    assert "some_other_tool=True" in remark


def refused(tiny_model: Any, folder: Path, words: str, family: str = "llama", **how: Any) -> None:
    """Loading is refused with these words and leaves the model as it was."""
    model = tiny_model(family)
    before = logits(model)
    with pytest.raises(Refused, match=words):
        load_adapter(model, folder, **how)
    assert not adapters_of(model) and torch.equal(logits(model), before)
    assert all(p.requires_grad for p in model.parameters())


def test_folders_that_are_none(tiny_model: Any, tmp_path: Path, folder: Path) -> None:
    refused(tiny_model, tmp_path / "absent", "no such folder")
    (folder / CONFIG).unlink()
    refused(tiny_model, folder, f"no {CONFIG}; it holds {WEIGHTS}, {FACTS}")
    (folder / CONFIG).write_text("{", "utf-8")
    refused(tiny_model, folder, "no JSON object")
    (folder / CONFIG).write_text("{}", "utf-8")
    refused(tiny_model, folder, "no peft_type")


def _truncate(folder: Path) -> None:
    data = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(data[: len(data) // 2])


def _as_bin(folder: Path, data: bytes) -> None:
    (folder / WEIGHTS).unlink()
    (folder / PICKLED).write_bytes(data)


class _Payload:
    def __reduce__(self) -> Any:
        return (print, ("code ran",))


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda f: (f / WEIGHTS).unlink(), f"no {WEIGHTS}"),
        (_truncate, "is corrupt"),
        (lambda f: (f / WEIGHTS).write_bytes(b""), "is corrupt"),
        (lambda f: _as_bin(f, b"no pickle"), "is corrupt"),
        (lambda f: _as_bin(f, pickle.dumps(_Payload(), 2)), "is corrupt"),
        (lambda f: _as_bin(f, pickle.dumps([1], 2)), "is corrupt"),
        (lambda f: save_file({}, f / WEIGHTS), "no tensors"),
    ],
    ids=["absent", "half", "empty", "text", "code", "list", "nothing"],
)
def test_broken_weights(
    tiny_model: Any,
    folder: Path,
    damage: Callable[[Path], Any],
    words: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    damage(folder)
    refused(tiny_model, folder, words)
    assert "code ran" not in capsys.readouterr().out


def _tensors(folder: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS)


NAME = "base_model.model.model.layers.1.mlp.up_proj.lora_{}.weight"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            lambda t: t.pop(NAME.format("B")),
            r"1 of its 27.*up_proj.lora_B.weight: the file lacks it",
        ),
        (
            lambda t: t.update({NAME.format("A"): torch.ones(4, 65)}),
            r"1 of its 28.*up_proj.lora_A.weight: its shape is 4x65, 4x64 would fit",
        ),
        (
            lambda t: t.update({NAME.replace("1", "7").format("A"): torch.ones(4, 64)}),
            r"layers.7.*no such layer",
        ),
        (
            lambda t: t.update(
                {"base_model.model.model.embed_tokens.lora_A.weight": torch.ones(4, 64)}
            ),
            "this layer is a Embedding",
        ),
        (lambda t: t.update({"base_model.model.x": torch.ones(1)}), "neither base nor adapter"),
        (
            lambda t: t.update({"base_model.model.lm_head.weight": torch.ones(3, 64)}),
            "lm_head.weight: its shape is 3x64, the base's is 320x64",
        ),
        (lambda t: t[NAME.format("B")].fill_(float("nan")), r"up_proj.lora_B.weight holds NaN"),
    ],
    ids=["missing", "shape", "layer", "kind", "unknown", "whole", "nan"],
)
def test_tensors_that_do_not_fit(
    tiny_model: Any, folder: Path, change: Callable[[Any], Any], words: str
) -> None:
    _tensors(folder, change)
    refused(tiny_model, folder, words)


def test_an_adapter_of_another_model(tiny_model: Any, folder: Path) -> None:
    refused(tiny_model, folder, r"28 of its 28 .*no such layer.*trained on: base", "gpt2")


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"peft_type": "BOFT"}, "type BOFT.*supported are .*LORA"),
        ({"use_dora": True}, "lora_magnitude_vector: the file lacks it"),
        ({"lora_bias": True}, "lora_bias=True"),
        ({"target_parameters": ["experts"]}, "target_parameters"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights=pissa"),
        ({"init_lora_weights": {"x": 1}}, "init_lora_weights"),
        ({"r": 0}, "r=0.*no LoRA options"),
        ({"r": "x"}, "r=x.*no LoRA options"),
        ({"lora_alpha": -1}, "lora_alpha=-1"),
        ({"rank_pattern": {"(": 2}}, "no regular expressions"),
        ({"rank_pattern": [2]}, "no regular expressions"),
        ({"r": 5}, "28 of its 28 tensors do not fit; .*its shape is 4x96, 5x96 would fit"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_unsupported_options(
    tiny_model: Any, folder: Path, fields: dict[str, Any], words: str
) -> None:
    edit(folder, **fields)
    refused(tiny_model, folder, words)


def test_whole_tensors_of_the_base(tiny_model: Any, tmp_path: Path) -> None:
    fields = {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}
    peft_folder(tiny_model("llama"), tmp_path / "a", **fields)
    for trainable in (False, True):
        model = tiny_model("llama")
        loaded = load_adapter(model, tmp_path / "a", trainable=trainable)
        assert any("lm_head.weight: taken from" in remark for remark in loaded.remarks)
        assert whole_parameters(model).keys() == {"lm_head.weight"}
        assert model.lm_head.weight.requires_grad == trainable
    # a tied head of its own would change the embedding as well
    tied = tiny_model("llama", tie_word_embeddings=True)
    tied.tie_weights()
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    with pytest.raises(Refused, match=r"model.embed_tokens.weight and lm_head.weight are one"):
        load_adapter(tied, tmp_path / "b")


def test_trained_biases_of_the_base(tiny_model: Any, tmp_path: Path) -> None:
    wanted = peft_folder(tiny_model("qwen2"), tmp_path, target_modules=["q_proj"], bias="all")
    model = tiny_model("qwen2")
    load_adapter(model, tmp_path)
    assert error(logits(model), wanted) < CLOSE
    with pytest.raises(Refused, match=r"_proj.bias.*PEFT's bias"):
        load_adapter(tiny_model("qwen2"), tmp_path, trainable=True)


def test_whole_tensors_that_are_the_base_s_own(tiny_model: Any, tmp_path: Path) -> None:
    """PEFT saves the untrained weight of an adapted head; it is no reason to refuse training."""
    wanted = peft_folder(tiny_model("llama"), tmp_path, target_modules=["lm_head"])
    assert "base_model.model.lm_head.base_layer.weight" in load_file(tmp_path / WEIGHTS)
    model = tiny_model("llama")
    assert load_adapter(model, tmp_path, trainable=True).remarks == ()
    assert error(logits(model), wanted) < CLOSE


def test_layers_that_the_file_lacks(tiny_model: Any, folder: Path) -> None:
    tensors = load_file(folder / WEIGHTS)
    save_file({n: t for n, t in tensors.items() if "layers.0." not in n}, folder / WEIGHTS)
    refused(
        tiny_model, folder, r"no tensors for 7 of its layers; the first is model.layers.0.*copy"
    )


def test_a_file_without_an_adapter(tiny_model: Any, folder: Path) -> None:
    tensor = tiny_model("llama").lm_head.weight + 1
    save_file({"base_model.model.lm_head.weight": tensor.detach()}, folder / WEIGHTS)
    refused(tiny_model, folder, "no tensor of an adapter, only base_model.model.lm_head.weight")


def test_a_second_adapter_is_refused(tiny_model: Any, folder: Path, random_batch: Any) -> None:
    model = tiny_model("llama")
    load_adapter(model, folder)
    before = run(model, random_batch())
    with pytest.raises(Refused, match="carries one already"):
        load_adapter(model, folder)
    assert torch.equal(run(model, random_batch()), before)
