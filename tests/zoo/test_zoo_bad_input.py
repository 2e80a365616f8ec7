"""Broken folders of the four families, through the command line: one short refusal, nothing written."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from luthier.cli import main
from tests.zoo_folders import zoo_folder

Spoil = Callable[[Path, Callable[[str], Path]], Any]


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    @cache
    def make(family: str) -> Path:
        return zoo_folder(family, tmp_path_factory.mktemp(family))

    return make


def changed(**fields: Any) -> Spoil:
    def spoil(folder: Path, sound: Any) -> None:
        file = folder / "config.json"
        file.write_text(json.dumps(json.loads(file.read_text("utf-8")) | fields))

    return spoil


def config_of(family: str) -> Spoil:
    def spoil(folder: Path, sound: Callable[[str], Path]) -> None:
        shutil.copyfile(sound(family) / "config.json", folder / "config.json")

    return spoil


def lost(name: str) -> Spoil:
    return lambda folder, sound: (folder / name).unlink()


def pointer(name: str) -> Spoil:
    """What git-lfs leaves."""
    text = "version https://git-lfs.github.com/spec/v1\noid sha256:5e974d9a\nsize 2706249\n"
    return lambda folder, sound: (folder / name).write_text(text)


def int4(folder: Path, sound: Any) -> None:
    tensors = load_file(folder / "model.safetensors")
    name = next(n for n in tensors if n.endswith("attention.dense.weight"))
    tensors[name] = tensors[name].to(torch.int8)[:, ::2].contiguous()
    tensors[f"{name}_scale"] = torch.ones(len(tensors[name]))
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def shared_id(folder: Path, sound: Any) -> None:
    file = folder / "added_tokens.json"
    ids = json.loads(file.read_text("utf-8"))
    file.write_text(json.dumps(ids | {"[gMASK]": ids["<|endofpiece|>"]}))
    settings = folder / "tokenizer_config.json"
    kept = json.loads(settings.read_text("utf-8"))
    kept.pop("added_tokens_decoder", None)
    settings.write_text(json.dumps(kept))


def other_ids(folder: Path, sound: Any) -> None:
    file = folder / "tokenizer_config.json"
    entry = {"content": "<|im_end|>", "special": True, "normalized": False}
    settings = json.loads(file.read_text("utf-8"))
    file.write_text(json.dumps(settings | {"added_tokens_decoder": {"7": entry}}))


def nothing(folder: Path, sound: Any) -> None:
    pass


BAD: dict[str, tuple[str, Spoil, str]] = {
    "v2 weights, v1 config": (
        "chatglm2",
        config_of("chatglm"),
        "config.json is of the family 'chatglm', whose positions have 2 axes; the tokenizer makes 1",
    ),
    "v1 weights, v2 config": (
        "chatglm",
        config_of("chatglm2"),
        "config.json is of the family 'chatglm2', whose positions have 1 axes; the tokenizer makes 2",
    ),
    "v2 key in a v1 config": ("chatglm", changed(kv_channels=16), "both"),
    "int4 config": ("chatglm", changed(quantization_bit=4), "quantization_bit=4"),
    "int4 config of v2": ("chatglm2", changed(quantization_bit=4), "quantization_bit=4"),
    "int4 weights": ("chatglm", int4, "quantised by the original code"),
    "int4 weights of v2": ("chatglm2", int4, "quantised by the original code"),
    "GPTQ": (
        "qwen",
        changed(quantization_config={"quant_method": "gptq", "bits": 4}),
        "quantised (gptq)",
    ),
    "P-tuning": ("chatglm", changed(pre_seq_len=128), "adapter.method=prefix"),
    "32k": ("chatglm2", changed(rope_ratio=16), "rope_ratio=16"),
    "no ice_text": ("chatglm", lost("ice_text.model"), "THUDM/chatglm-6b"),
    "no tokenizer.model": ("chatglm2", lost("tokenizer.model"), "THUDM/chatglm2-6b"),
    "no cog-pretrain": ("glm_legacy", lost("cog-pretrain.model"), "THUDM/glm-"),
    "no qwen.tiktoken": ("qwen", lost("qwen.tiktoken"), "Qwen/Qwen-7B"),
    "lfs pointer v1": ("chatglm", pointer("ice_text.model"), "git-lfs"),
    "lfs pointer v2": ("chatglm2", pointer("tokenizer.model"), "git-lfs"),
    "lfs pointer glm": ("glm_legacy", pointer("cog-pretrain.model"), "git-lfs"),
    "lfs pointer qwen": ("qwen", pointer("qwen.tiktoken"), "git-lfs"),
    "blank id twice": ("chatglm", changed(mask_token_id=5, gmask_token_id=5), "gmask_token_id=5"),
    "end id outside": ("chatglm", changed(eos_token_id=9999), "eos_token_id=9999"),
    "opening id outside": ("glm_legacy", changed(sop_token_id=9999), "sop_token_id=9999"),
    "shared id": ("glm_legacy", shared_id, "it has no id for <|endofpiece|>"),
    "other ids": ("qwen", other_ids, "<|im_end|> 7"),
    "ids of another tokenizer": ("chatglm", changed(bos_token_id=9), "bos_token_id=9"),
    "ids of another glm": ("glm_legacy", changed(sop_token_id=9), "sop_token_id=9"),
    "beyond the positions": ("chatglm", nothing, "the model has 256 positions"),
    "beyond the positions of glm": ("glm_legacy", nothing, "the model has 256 positions"),
}


@pytest.mark.parametrize("name", BAD)
def test_refused_by_the_command(
    name: str,
    sound: Callable[[str], Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    family, spoil, message = BAD[name]
    folder = tmp_path / "model"
    shutil.copytree(sound(family), folder)
    spoil(folder, sound)
    (tmp_path / "train.json").write_text('{"src": "how many apples", "tgt": "seven"}\n' * 8)
    length = 300 if "beyond" in name else 100
    words = [
        f"model.path={folder}",
        f"data.path={tmp_path / 'train.json'}",
        f"data.length={length}",
    ]
    words += ["data.packing=none", "data.workers=0", "train.steps=1", f"output={tmp_path / 'out'}"]
    code = main(["finetune", *words])
    error = capsys.readouterr().err
    assert code == 2, error
    assert message in error and error.startswith("luthier: ") and len(error) < 600
    assert not (tmp_path / "out").exists()
