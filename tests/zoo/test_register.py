"""The four families by the Auto classes: from their keys and files, with no code of theirs, beside transformers' own."""

from __future__ import annotations

import json
import runpy
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from zoo_golden import ROOT, folders

import luthier.models  # noqa: F401 - what is tested
from luthier.config import ModelConfig
from luthier.errors import Refused
from luthier.models.load import build_model, load_config, quiet

# remote code as the released folders name it; none of it is there
AUTO_MAP = {
    "AutoConfig": "configuration_x.XConfig",
    "AutoModel": "modeling_x.XModel",
    "AutoModelForCausalLM": "modeling_x.XModel",
}
FAMILIES = {
    "chatglm": ("ChatGLMConfig", "ChatGLMForCausalLM", "ChatGLMTokenizer", "ice_text.model"),
    "chatglm2": ("ChatGLM2Config", "ChatGLM2ForCausalLM", "ChatGLM2Tokenizer", "tokenizer.model"),
    "glm": (
        "GLMConfig",
        "GLMForConditionalGeneration",
        "GLMChineseTokenizer",
        "cog-pretrain.model",
    ),
    "qwen": ("QWenConfig", "QWenLMHeadModel", "QWenTokenizer", "qwen.tiktoken"),
}
# what their tokenizer_config.json says: ChatGLM2's is ChatGLM's
TOKENIZERS = {"chatglm2": "ChatGLMTokenizer"}
# the least that tells a family in a config.json
KEYS: dict[str, dict[str, Any]] = {
    "ChatGLMConfig": {"model_type": "chatglm", "inner_hidden_size": 64},
    "ChatGLM2Config": {"model_type": "chatglm", "padded_vocab_size": 512},
    "GLMConfig": {"model_type": "glm", "num_layers": 2},
    "GlmConfig": {"model_type": "glm", "num_hidden_layers": 2, "hidden_size": 64},
    "QWenConfig": {"model_type": "qwen"},
    "Glm4Config": {"model_type": "glm4"},
}


@pytest.fixture
def checkpoint(tmp_path: Path) -> Callable[..., Path]:
    """`checkpoint(family, remote, named)`: a released folder in small; `named` adds tokenizer_config.json."""

    def make(family: str, remote: bool, named: bool) -> Path:
        source = next(iter(sorted((ROOT / family).glob("*/model.safetensors"))), None)
        if source is None:
            pytest.skip(f"{ROOT / family} is absent")
        for name in ("config.json", "model.safetensors"):
            shutil.copyfile(source.parent / name, tmp_path / name)
        if remote:
            config = json.loads((tmp_path / "config.json").read_text("utf-8"))
            (tmp_path / "config.json").write_text(json.dumps(config | {"auto_map": AUTO_MAP}))
        name = TOKENIZERS.get(family, FAMILIES[family][2])
        settings: dict[str, Any] = {"tokenizer_class": name}
        if remote:
            settings["auto_map"] = {"AutoTokenizer": [f"tokenization_x.{name}", None]}
        if named:
            (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
        vocabulary = FAMILIES[family][3]
        if (ROOT / family / "tokenizer" / vocabulary).is_file():
            shutil.copyfile(ROOT / family / "tokenizer" / vocabulary, tmp_path / vocabulary)
        else:  # of Qwen the bytes are enough
            import base64

            lines = [base64.b64encode(bytes([i])).decode() + f" {i}" for i in range(256)]
            (tmp_path / vocabulary).write_text("\n".join(lines))
        return tmp_path

    return make


@pytest.mark.parametrize(("remote", "named"), [(True, True), (False, True), (True, False)])
@pytest.mark.parametrize("family", FAMILIES)
def test_original_checkpoints_load(
    family: str, remote: bool, named: bool, checkpoint: Callable[..., Path]
) -> None:
    folder = checkpoint(family, remote, named)
    config, model, tokenizer, _ = FAMILIES[family]
    with quiet():
        assert type(AutoConfig.from_pretrained(folder)).__name__ == config
        made, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
        words = AutoTokenizer.from_pretrained(folder)
        assert type(made).__name__ == model
        assert not any(info.values())  # nothing missing, left over or of another shape
        assert type(words).__name__ == tokenizer
        made.save_pretrained(folder / "saved")
        words.save_pretrained(folder / "saved")
        again = AutoModelForCausalLM.from_pretrained(folder / "saved")
        assert type(AutoTokenizer.from_pretrained(folder / "saved")).__name__ == tokenizer
    assert type(again) is type(made)
    state = again.state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in made.state_dict().items())
    stored = json.loads((folder / "config.json").read_text("utf-8"))["model_type"]
    saved = json.loads((folder / "saved/config.json").read_text("utf-8"))["model_type"]
    assert saved == stored


@pytest.mark.parametrize("family", FAMILIES)
def test_the_house_builds_them(family: str, checkpoint: Callable[..., Path]) -> None:
    """With remote code named and not allowed; two of the layers; with new weights."""
    folder = checkpoint(family, True, True)
    for options in ({}, {"num_layers": 2}, {"init": "random"}):
        model = build_model(ModelConfig.model_validate({"path": str(folder)} | options), seed=0)
        assert type(model).__name__ == FAMILIES[family][1]
        assert model.config.num_hidden_layers == options.get(
            "num_layers", model.config.num_hidden_layers
        )


@pytest.mark.parametrize("name", KEYS)
def test_keys_tell_the_families_apart(name: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(KEYS[name]))
    assert type(load_config(tmp_path)).__name__ == name
    keys = {key: value for key, value in KEYS[name].items() if key != "model_type"}
    assert type(AutoConfig.for_model(KEYS[name]["model_type"], **keys)).__name__ == name


def test_glm4_stays_transformers_own() -> None:
    config = AutoConfig.for_model(
        "glm",
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        vocab_size=64,
        pad_token_id=0,
    )
    with quiet():
        model = AutoModelForCausalLM.from_config(config)
    assert type(model).__module__.startswith("transformers.models.glm.")


def test_a_chatglm_of_no_generation_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "chatglm"}))
    with pytest.raises(Refused, match="which generation"):
        load_config(tmp_path)


@pytest.mark.parametrize("family", ["chatglm", "chatglm2", "glm", "qwen"])
def test_lost_vocabularies_are_named(family: str, checkpoint: Callable[..., Path]) -> None:
    folder = checkpoint(family, True, True)
    vocabulary = FAMILIES[family][3]
    (folder / vocabulary).unlink()
    with pytest.raises(Refused, match=rf"{vocabulary}.*(THUDM/|Qwen/)"), quiet():
        AutoTokenizer.from_pretrained(folder)


def test_the_package_stays_light() -> None:
    """The families come with `luthier.models`, not with `luthier`."""
    code = (
        "import sys, luthier, luthier.cli; "
        "sys.exit(', '.join({'torch', 'transformers', 'luthier.models'} & set(sys.modules)) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.filterwarnings("ignore:.*golden.json:pytest.PytestUnraisableExceptionWarning")  # its
@pytest.mark.filterwarnings("ignore:unclosed file.*golden.json:ResourceWarning")
@pytest.mark.parametrize("folder", [p for f in FAMILIES for p in folders(f)])
def test_the_reference_script_passes_without_adapting_anything(folder: Path) -> None:
    """`compare(folder, load)` as it lies beside the golden files, with the Auto classes alone."""
    script = ROOT / "compare_golden.py"
    if not script.is_file():
        pytest.skip(f"{script} is absent")
    compare = runpy.run_path(str(script))["compare"]

    def load(where: str, overrides: dict[str, Any]) -> Any:
        with quiet():
            return AutoModelForCausalLM.from_pretrained(where, dtype=torch.float32, **overrides)

    def generate(model: Any, inputs: dict[str, Any], count: int, record: Any) -> torch.Tensor:
        out = model.generate(**inputs, max_new_tokens=count, do_sample=False, eos_token_id=None)
        return out[:, inputs["input_ids"].shape[1] :]

    with quiet():
        worst = compare(str(folder), load, generate=generate, verbose=False)
    assert worst["logits"] < 1e-4 and worst["loss"] < 1e-5
    assert worst["grad(rel)"] < 1e-4 and worst["generation"] == 0
