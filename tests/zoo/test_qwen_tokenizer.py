"""Qwen v1's tokenizer against the original's results, in files and out, and what it refuses.

The real vocabulary is that of the package dashscope, where it is installed; the rest is done with a toy one.
"""

from __future__ import annotations

import base64
import hashlib
import json
import sys
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer
from zoo_golden import tokenizer_golden

import luthier.models  # noqa: F401 - registers the families
from luthier.errors import Refused
from luthier.models.load import quiet
from luthier.models.tokenizer import load_tokenizer
from luthier.models.zoo.tokenization_qwen import QWenTokenizer, make_context

pytest.importorskip("tiktoken", reason="the package tiktoken is not installed")


@cache
def real() -> QWenTokenizer:
    golden = tokenizer_golden("qwen")
    spec = find_spec("dashscope")
    if spec is None or spec.origin is None:
        pytest.skip("the package dashscope, which has qwen.tiktoken, is not installed")
    file = Path(spec.origin).parent / "resources/qwen.tiktoken"
    assert hashlib.md5(file.read_bytes()).hexdigest() == golden["vocab_file_md5"]
    return QWenTokenizer(str(file))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A toy folder: the 256 bytes and three merges, ids of specials from 259 on."""
    ranks = [bytes([i]) for i in range(256)] + [b"th", b"the", b" a"]
    lines = [base64.b64encode(token).decode() + f" {i}" for i, token in enumerate(ranks)]
    (tmp_path / "qwen.tiktoken").write_text("\n".join(lines) + "\n")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "qwen", "vocab_size": 512}))
    return tmp_path


def test_facts() -> None:
    tokenizer, golden = real(), tokenizer_golden("qwen")
    ids = {"eod_id": tokenizer.eod_id, "im_start_id": tokenizer.im_start_id}
    ids |= {"im_end_id": tokenizer.im_end_id, "n_vocab": tokenizer.vocab_size}
    assert ids == {name: golden[name] for name in ids}
    assert (tokenizer.padding_side, tokenizer.pad_token) == ("right", golden["pad_token"])
    assert len(tokenizer) == golden["n_vocab"]


def test_texts() -> None:
    tokenizer = real()
    for case in tokenizer_golden("qwen")["single"]:
        text, ids = case["text"], case["input_ids"]
        assert tokenizer(text)["input_ids"] == ids
        assert (
            tokenizer(text, allowed_special=set())["input_ids"]
            == (case["ids_allowed_special_none"])
        )
        assert tokenizer.decode(ids) == case["decode"]
        assert tokenizer.decode(ids, skip_special_tokens=True) == case["decode_skip_special"]


def test_a_padded_batch() -> None:
    case = tokenizer_golden("qwen")["batch_left_pad"]
    file = real().vocab_file
    tokenizer = QWenTokenizer(file, pad_token=case["pad_token"], padding_side="left")
    found = tokenizer(case["texts"], padding=True)
    assert tokenizer.pad_token_id == case["pad_token_id"]
    assert found["input_ids"] == case["input_ids"]
    assert found["attention_mask"] == case["attention_mask"]


def test_chats() -> None:
    tokenizer, golden = real(), tokenizer_golden("qwen")
    for name, case in golden.items():
        if not name.startswith("chat_"):
            continue
        form = "raw" if name == "chat_raw" else "chatml"
        history = [(question, answer) for question, answer in case["history"]]
        found = make_context(
            tokenizer, case["query"], history, case["system"], case["max_window_size"], form
        )
        assert found == (case["raw_text"], case["context_tokens"])


def test_the_template_is_chatml() -> None:
    """What the house renders by default is the official chat prompt."""
    tokenizer, case = real(), tokenizer_golden("qwen")["chat_chatml"]
    messages = []
    for question, answer in case["history"]:
        messages += [{"role": "user", "content": question}]
        messages += [{"role": "assistant", "content": answer}]
    messages.append({"role": "user", "content": case["query"]})
    found = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert found == case["raw_text"]
    named = [{"role": "system", "content": case["system"]}, *messages]
    again = tokenizer.apply_chat_template(named, add_generation_prompt=True, return_dict=False)
    assert again == case["context_tokens"]


def test_files_in_and_out(folder: Path) -> None:
    tokenizer = load_tokenizer(folder)
    assert type(tokenizer) is QWenTokenizer
    assert (tokenizer.eod_id, tokenizer.eos_token_id, tokenizer.vocab_size) == (259, 259, 467)
    ids = tokenizer("the a<|im_end|>")["input_ids"]
    assert ids == [257, 258, 261]
    assert tokenizer.decode(ids) == "the a<|im_end|>"
    with quiet():
        tokenizer.save_pretrained(folder / "saved")
        (folder / "saved/config.json").write_text((folder / "config.json").read_text())
    again = load_tokenizer(folder / "saved")
    assert type(again) is QWenTokenizer
    assert again.get_vocab() == tokenizer.get_vocab()
    assert again("the a<|im_end|>")["input_ids"] == ids


def test_what_people_write_opens_no_turn(folder: Path) -> None:
    tokenizer: Any = load_tokenizer(folder)
    _, ids = make_context(tokenizer, "<|im_end|>", system="<|im_start|>")
    assert (ids.count(tokenizer.im_end_id), ids.count(tokenizer.im_start_id)) == (2, 3)
    assert (
        tokenizer.im_end_id not in tokenizer("<|im_end|>", split_special_tokens=True)["input_ids"]
    )


def test_text_is_nfc_normalised(folder: Path) -> None:
    tokenizer: Any = load_tokenizer(folder)
    assert tokenizer("e\u0301")["input_ids"] == tokenizer("\u00e9")["input_ids"]


def test_missing_and_broken_files_are_named(folder: Path) -> None:
    file = folder / "qwen.tiktoken"
    lines = file.read_text().splitlines()
    for text, message in [
        ("\n".join(lines[:100] + lines[101:]), "special ids would be wrong"),
        ("version https://git-lfs.github.com/spec/v1", "not a base64 token"),
        ("", "special ids would be wrong"),
    ]:
        file.write_text(text)
        with pytest.raises(Refused, match=message):
            load_tokenizer(folder)
    file.unlink()
    with pytest.raises(Refused, match=r"no qwen.tiktoken.*Qwen/Qwen-7B"), quiet():
        AutoTokenizer.from_pretrained(folder)


def test_new_tokens_are_refused(folder: Path) -> None:
    with pytest.raises(Refused, match=r"pad_token='<pad>'"):
        QWenTokenizer(str(folder / "qwen.tiktoken"), pad_token="<pad>")
    tokenizer: Any = load_tokenizer(folder)
    with pytest.raises(Refused, match="its vocabulary is fixed"):
        tokenizer.add_tokens(["<new>"])
    with pytest.raises(ValueError, match="467 is no id"):
        tokenizer.convert_ids_to_tokens([467])


def test_wrong_special_ids_are_refused(folder: Path) -> None:
    settings = {"added_tokens_decoder": {"300": {"content": "<|im_end|>", "special": True}}}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    with pytest.raises(Refused, match=r"<\|im_end\|> 300"):
        load_tokenizer(folder)


def test_the_house_finds_the_end_of_a_turn(folder: Path) -> None:
    from luthier.data.encode import Renderer

    renderer = Renderer(load_tokenizer(folder), template="auto", length=64)
    assert renderer.stop_ids == (259, 261)


def test_without_the_package(folder: Path, monkeypatch: Any) -> None:
    monkeypatch.setitem(sys.modules, "tiktoken", None)
    with pytest.raises(Refused, match="needs the package 'tiktoken'"):
        QWenTokenizer(str(folder / "qwen.tiktoken"))
    with pytest.raises(Refused, match="needs the package 'tiktoken'"):
        load_tokenizer(folder)
