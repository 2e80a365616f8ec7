"""The tokenizers of ChatGLM-6B and ChatGLM2-6B against golden results of their original code; bad files.

The vocabularies are toy ones under LUTHIER_GOLDEN/models.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from luthier.errors import Refused
from luthier.models.zoo import tokenization_chatglm
from luthier.models.zoo.tokenization_chatglm import ChatGLMTokenizer
from luthier.models.zoo.tokenization_chatglm2 import APPENDED, ROLES, ChatGLM2Tokenizer

ROOT = (
    Path(os.environ.get("LUTHIER_GOLDEN", Path(__file__).parents[1] / "golden" / "data")) / "models"
)
CLASSES: dict[str, Any] = {"chatglm": ChatGLMTokenizer, "chatglm2": ChatGLM2Tokenizer}
NAMES = {"chatglm": "ice_text.model", "chatglm2": "tokenizer.model"}

golden = pytest.mark.parametrize(
    "family",
    [
        pytest.param(
            name,
            marks=pytest.mark.skipif(
                not (ROOT / name / "tokenizer").is_dir(), reason=f"{ROOT / name} is absent"
            ),
        )
        for name in CLASSES
    ],
)


def cases(family: str) -> dict[str, Any]:
    file = ROOT / family / "tokenizer" / "tokenizer_golden.json"
    return json.loads(file.read_text("utf-8"))


def tokenizer(family: str, **options: Any) -> Any:
    pytest.importorskip("sentencepiece")
    return CLASSES[family](str(ROOT / family / "tokenizer" / NAMES[family]), **options)


@golden
@pytest.mark.parametrize("reloaded", [False, True])
def test_as_the_original(family: str, reloaded: bool, tmp_path: Path) -> None:
    ours, expected = tokenizer(family), cases(family)
    if reloaded:
        ours.save_pretrained(tmp_path)
        assert (tmp_path / NAMES[family]).is_file()
        ours = CLASSES[family].from_pretrained(tmp_path)
    assert ours.vocab_size == len(ours) == expected["vocab_size"]
    assert ours.padding_side == expected["padding_side"]
    for key, number in expected.items():
        if key.endswith("_token_id"):
            assert getattr(ours, key) == number
    for token, number in (expected.get("ids") or expected["special"]).items():
        if token not in ("<bos>", "<eos>") and (family, token) != ("chatglm2", "<pad>"):
            assert ours.convert_tokens_to_ids(token) == number
    for case in expected["single"]:
        text = case["text"]
        assert ours.tokenize(text) == case["tokens"]
        assert ours.encode(text, add_special_tokens=False) == case["ids_no_special"]
        found = ours(text)
        assert list(found) == case.get("keys", ["input_ids", "attention_mask", "position_ids"])
        assert {k: found[k] for k in found} == {k: case[k] for k in found}
        assert ours.decode(case["input_ids"]) == case["decode"]
        if "decode_skip_special" in case:
            skipped = ours.decode(case["input_ids"], skip_special_tokens=True)
            assert skipped == case["decode_skip_special"]
    for case in expected["pair"]:
        assert ours(case["text"], case["text_pair"])["input_ids"] == case["input_ids"]
    for case in expected["batch"]:
        found = ours(case["texts"], padding=True, return_tensors="pt")
        for key in ("input_ids", "attention_mask", "position_ids"):
            assert found[key].int().tolist() == case[key]
        if "batch_decode_skip_special" in case:
            spoken = ours.batch_decode(found["input_ids"], skip_special_tokens=True)
            assert spoken == case["batch_decode_skip_special"]
    chat = expected["chat"]
    assert ours(chat["prompt"])["input_ids"] == chat["input_ids"]
    if "max_length" in expected:
        case = expected["max_length"]
        found = ours(case["text"], padding="max_length", max_length=case["max_length"])
        assert found["input_ids"] == case["input_ids"]
        assert found["position_ids"].tolist() == case["position_ids"]
        case = expected["truncation"]
        found = ours(case["text"], truncation=True, max_length=case["max_length"])
        assert found["input_ids"] == case["input_ids"]


@golden
def test_a_batch_of_one_is_what_the_model_takes(family: str) -> None:
    found = tokenizer(family)("a b", padding=True, return_tensors="pt")
    size = found["input_ids"].shape[1]
    shapes = {"chatglm": ((1, 1, size, size), (1, 2, size)), "chatglm2": ((1, size), (1, size))}
    assert (found["attention_mask"].shape, found["position_ids"].shape) == shapes[family]
    if family == "chatglm":
        assert found["attention_mask"].dtype == torch.bool


@golden
def test_padding_to_a_multiple(family: str) -> None:
    ours = tokenizer(family)
    found = ours("a b c", padding=True, pad_to_multiple_of=16)
    assert len(found["input_ids"]) == 16 and found["input_ids"][0] == ours.pad_token_id
    assert ours.decode(found["input_ids"]) == ours.decode(ours("a b c")["input_ids"])
    with pytest.raises(Refused, match="pads on the left only"):
        ours("a", padding=True, padding_side="right")


def test_the_first_release_had_image_tokens() -> None:
    if not (ROOT / "chatglm").is_dir():
        pytest.skip(f"{ROOT} is absent")
    plain, ours = tokenizer("chatglm"), tokenizer("chatglm", num_image_tokens=20)
    assert ours("a b")["input_ids"] == [i + 20 for i in plain("a b")["input_ids"]]
    assert ours.bos_token_id == plain.bos_token_id + 20 and len(ours) == len(plain) + 20
    assert ours.decode(ours("a b")["input_ids"]) == plain.decode(plain("a b")["input_ids"])


@pytest.mark.parametrize("said", [{"roles": True}, {"additional_special_tokens": ["<|user|>"]}])
def test_roles_of_chatglm3(said: dict[str, Any], tmp_path: Path) -> None:
    if not (ROOT / "chatglm2").is_dir():
        pytest.skip(f"{ROOT} is absent")
    tokenizer("chatglm2", **said).save_pretrained(tmp_path)
    ours = ChatGLM2Tokenizer.from_pretrained(tmp_path)
    ids = ours.convert_tokens_to_ids([*APPENDED, *ROLES])
    assert ids == list(range(len(ours) - 9, len(ours)))
    assert ours.get_command("<|user|>") == ids[6]
    assert ours.decode(ids) == ""


# ---- bad files


@pytest.mark.parametrize("family", CLASSES)
def test_no_vocabulary(family: str, tmp_path: Path) -> None:
    (tmp_path / "tokenizer_config.json").write_text("{}", "utf-8")
    message = f"has no {NAMES[family]}. copy {NAMES[family]} from THUDM/{family}-6b"
    with pytest.raises(Refused, match=message):
        CLASSES[family]()
    with pytest.raises(Refused, match=message):
        CLASSES[family].from_pretrained(tmp_path)


@pytest.mark.parametrize("family", CLASSES)
def test_a_pointer_instead_of_the_vocabulary(family: str, tmp_path: Path) -> None:
    pytest.importorskip("sentencepiece")
    file = tmp_path / NAMES[family]
    file.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "utf-8")
    with pytest.raises(Refused, match=r"is not a SentencePiece model. .*git-lfs"):
        CLASSES[family].from_pretrained(tmp_path)


def test_the_vocabulary_of_the_other_generation() -> None:
    pytest.importorskip("sentencepiece")
    file = ROOT / "chatglm2" / "tokenizer" / "tokenizer.model"
    if not file.is_file():
        pytest.skip(f"{file} is absent")
    with pytest.raises(Refused, match=r"lacks <sop>, <eop>, \[MASK\]"):
        ChatGLMTokenizer(str(file))


@pytest.mark.parametrize("family", CLASSES)
def test_without_sentencepiece(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokenization_chatglm, "find_spec", lambda name: None)
    with pytest.raises(
        Refused, match=r"'sentencepiece'. it is not installed. pip install 'luthier\[tokenizers\]'"
    ):
        CLASSES[family]("somewhere")
