"""GLM's tokenizers against the original's results, in files and out, and what they refuse."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer
from zoo_golden import ROOT, tokenizer_golden

import luthier.models  # noqa: F401 - registers the families
from luthier.batch import IGNORE
from luthier.errors import Refused
from luthier.models.load import quiet
from luthier.models.zoo.tokenization_glm import (
    CHINESE_TOKENS,
    GLMBertTokenizer,
    GLMChineseTokenizer,
    GLMGPT2Tokenizer,
)

CONFIG = {"model_type": "glm", "num_layers": 2, "max_sequence_length": 64}
GPT2_TOKENS = ("<|endoftext|>", "<|startofpiece|>", "<|endofpiece|>", "[CLS]", "[MASK]", "[SEP]")
GPT2_TOKENS += ("[UNK]", "[gMASK]", "[sMASK]")


def chinese(**kwargs: Any) -> tuple[Any, dict[str, Any]]:
    golden = tokenizer_golden("glm")
    with quiet():
        tokenizer = GLMChineseTokenizer(str(ROOT / "glm/tokenizer/cog-pretrain.model"), **kwargs)
    return tokenizer, golden


def gpt2(folder: Path, tokens: tuple[str, ...] = GPT2_TOKENS) -> Any:
    """A folder with the bytes and one merge."""
    from tokenizers import pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {letter: i for i, letter in enumerate([*alphabet, "th"])}
    (folder / "vocab.json").write_text(json.dumps(vocab))
    (folder / "merges.txt").write_text("#version: 0.2\nt h\n")
    added = {token: len(vocab) + i for i, token in enumerate(tokens)}
    (folder / "added_tokens.json").write_text(json.dumps(added))
    (folder / "config.json").write_text(json.dumps(CONFIG))
    settings = {"tokenizer_class": "GLMGPT2Tokenizer"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    with quiet():
        return AutoTokenizer.from_pretrained(folder)


def test_ids_and_sides() -> None:
    tokenizer, golden = chinese()
    assert {t: tokenizer.convert_tokens_to_ids(t) for t in golden["ids"]} == golden["ids"]
    assert tuple(golden["added_tokens_in_order"]) == CHINESE_TOKENS
    sides = (tokenizer.padding_side, tokenizer.truncation_side)
    assert sides == (golden["padding_side"], golden["truncation_side"])
    assert (tokenizer.vocab_size, len(tokenizer)) == (golden["vocab_size"], golden["len"])
    ids = golden["ids"]
    assert tokenizer.mask_token_ids == [ids["[MASK]"], ids["[sMASK]"], ids["[gMASK]"]]
    assert (tokenizer.sop_token_id, tokenizer.eop_token_id) == (
        ids["<|startofpiece|>"],
        ids["<|endofpiece|>"],
    )
    assert tokenizer.stop_ids == [ids["<|endofpiece|>"]]


def test_texts() -> None:
    tokenizer, golden = chinese()
    for case in golden["single"]:
        assert tokenizer(case["text"])["input_ids"] == case["input_ids"]
        bare = tokenizer(case["text"], add_special_tokens=False)["input_ids"]
        assert bare == case["ids_no_special"]
        assert tokenizer.decode(case["input_ids"]) == case["decode"]
    cut = golden["truncation"]
    found = tokenizer(cut["text"], truncation=True, max_length=cut["max_length"])["input_ids"]
    assert found == cut["input_ids"]


def test_inputs_of_blanks() -> None:
    tokenizer, golden = chinese()
    for case in [*golden["generation"], *golden["train"]]:
        source = tokenizer(case["texts"], padding=True, return_tensors="pt")
        given = {k: case[k] for k in ("targets", "padding") if k in case}
        found = tokenizer.build_inputs_for_generation(source, case["max_gen_length"], **given)
        keys = set(case) - {"texts", "targets", "max_gen_length", "padding"}
        assert {k: found[k].tolist() for k in keys} == {k: case[k] for k in keys}
        assert set(found) == keys


def test_one_text_and_ids_as_target() -> None:
    tokenizer, _ = chinese()
    source = tokenizer("how many [MASK]", return_tensors="pt")
    text = tokenizer.build_inputs_for_generation(source, 9, targets="seven")
    ids = tokenizer("seven", add_special_tokens=False)["input_ids"]
    same = tokenizer.build_inputs_for_generation(source, 9, targets=ids)
    assert {k: v.tolist() for k, v in text.items()} == {k: v.tolist() for k, v in same.items()}
    labels = text["labels"][0]
    assert labels[labels != IGNORE].tolist() == [*ids, tokenizer.eop_token_id]


def test_a_source_without_blank_is_refused() -> None:
    tokenizer, _ = chinese()
    with pytest.raises(Refused, match="no mask token"):
        tokenizer.build_inputs_for_generation(tokenizer(["how many"], return_tensors="pt"))
    with pytest.raises(Refused, match="takes one text"):
        tokenizer("how", "many")


def test_files_in_and_out(tmp_path: Path) -> None:
    tokenizer, golden = chinese()
    tokenizer.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    with quiet():
        again = AutoTokenizer.from_pretrained(tmp_path)
    assert type(again) is GLMChineseTokenizer
    assert again.get_vocab() == tokenizer.get_vocab()
    case = golden["single"][0]
    assert again(case["text"])["input_ids"] == case["input_ids"]


def test_gpt2_pieces(tmp_path: Path) -> None:
    tokenizer = gpt2(tmp_path)
    assert type(tokenizer) is GLMGPT2Tokenizer
    ids = tokenizer("the [gMASK]")["input_ids"]
    names = tokenizer.convert_ids_to_tokens(ids)
    assert names[0] == "[CLS]"
    assert names[1:3] == ["th", "e"]
    assert names[-2:] == ["[gMASK]", "<|endoftext|>"]
    before, behind = tokenizer.special_ids_around(ids[1:-2])
    assert [*before, *ids[1:-2], *behind] == [*ids, tokenizer.sop_token_id]
    assert (tokenizer.padding_side, tokenizer.truncation_side) == ("right", "left")
    made = tokenizer.build_inputs_for_generation(
        tokenizer(["the [gMASK]"], return_tensors="pt"), 4, targets=["th"]
    )
    assert made["input_ids"][0, -2:].tolist() == [tokenizer.sop_token_id, ids[1]]
    assert made["labels"][0, -2:].tolist() == [ids[1], tokenizer.eop_token_id]
    with quiet():
        tokenizer.save_pretrained(tmp_path / "saved")
        (tmp_path / "saved/config.json").write_text(json.dumps(CONFIG))
        again = AutoTokenizer.from_pretrained(tmp_path / "saved")
    assert type(again) is GLMGPT2Tokenizer
    assert again("the [gMASK]")["input_ids"] == ids


def test_bert_pieces(tmp_path: Path) -> None:
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "the", "dog"]
    (tmp_path / "vocab.txt").write_text("\n".join(words))
    added = {"<|startofpiece|>": 7, "<|endofpiece|>": 8}
    (tmp_path / "added_tokens.json").write_text(json.dumps(added))
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    with quiet():
        tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    assert type(tokenizer) is GLMBertTokenizer
    assert tokenizer("the [MASK] dog")["input_ids"] == [2, 5, 4, 6, 3]
    assert (tokenizer.mask_token_ids, tokenizer.sop_token_id) == ([4], 7)
    # its one mask token is the blank of a prompt; [SEP] ends the source
    assert tokenizer.special_ids_around([5, 6]) == ([2], [4, 3, 7])
    assert tokenizer.special_ids_around([5, 4, 6]) == ([2], [3, 7])


def test_lost_and_shared_ids_are_refused(tmp_path: Path) -> None:
    with pytest.raises(Refused, match=r"no id for \[sMASK\].*added_tokens.json"):
        gpt2(tmp_path, GPT2_TOKENS[:-1])
    tokenizer, golden = chinese()
    ids = dict(tokenizer.added_tokens_decoder)
    ids[golden["ids"]["[UNUSED1]"]] = ids.pop(golden["ids"]["[gMASK]"])
    del ids[golden["ids"]["<|endofpiece|>"]]
    with pytest.raises(Refused, match=r"no id for <\|endofpiece\|>"):
        chinese(added_tokens_decoder=ids)


def test_two_tokens_of_one_id_are_refused(monkeypatch: Any) -> None:
    """As in the training code of glm-10b-chinese, whose [gMASK] is its <|endofpiece|>."""
    right = GLMChineseTokenizer.get_vocab

    def get_vocab(self: Any) -> dict[str, int]:
        found = right(self)
        return found | {"[gMASK]": found["<|endofpiece|>"]}

    tokenizer, _ = chinese()
    monkeypatch.setattr(GLMChineseTokenizer, "get_vocab", get_vocab)
    with pytest.raises(Refused, match="share an id"):
        tokenizer.check_special_ids()


def test_missing_and_broken_files_are_named(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    with pytest.raises(Refused, match=r"cog-pretrain.model.*THUDM/glm"), quiet():
        AutoTokenizer.from_pretrained(tmp_path)
    settings = {"tokenizer_class": "GLMChineseTokenizer"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    with pytest.raises(Refused, match=r"no cog-pretrain.model.*THUDM/glm"), quiet():
        AutoTokenizer.from_pretrained(tmp_path)
    (tmp_path / "cog-pretrain.model").write_text("version https://git-lfs.github.com/spec/v1\n")
    with pytest.raises(Refused, match="not a SentencePiece model"), quiet():
        AutoTokenizer.from_pretrained(tmp_path)


def test_without_the_package(monkeypatch: Any) -> None:
    monkeypatch.setitem(sys.modules, "sentencepiece", None)
    with pytest.raises(Refused, match="needs the package 'sentencepiece'"):
        GLMChineseTokenizer("cog-pretrain.model")
