"""Folders of the four families of `models/zoo`: tiny random weights and a toy vocabulary, made in code.

The files and their names are those of released folders; special tokens stand where the originals' do
(behind the pieces, or among them in ChatGLM-6B). The words of the tests are pieces, the rest is bytes.
"""

from __future__ import annotations

import base64
import io
import json
from pathlib import Path
from typing import Any

import pytest

from luthier.models.load import load_tokenizer, quiet, save_model
from tests.conftest import tiny_model_

ZOO = ("chatglm", "chatglm2", "glm_legacy", "qwen")
POSITIONS = {
    "chatglm": "max_sequence_length",
    "chatglm2": "seq_length",
    "glm_legacy": "max_sequence_length",
    "qwen": "max_position_embeddings",
}
SIZE = 480  # rows of the embedding: more than the vocabularies have
WORDS = [
    "the",
    "box",
    "how",
    "many",
    "apples",
    "seven",
    "a",
    "quick",
    "fox",
    "in",
    "what",
    "is",
    "capital",
    "of",
    "You",
    "are",
    "helpful",
    "assistant",
    "system",
    "user",
    "Round",
    "three",
    "blue",
    "one",
    "two",
    "red",
    "green",
    "Yes",
    "Are",
    "sure",
    "Answer",
    "word",
]
V1_SYMBOLS = ["<n>", "[MASK]", "[gMASK]", "[sMASK]", "<sop>", "<eop>", "<|tab|>", "<|blank_2|>"]


def zoo_folder(
    family: str, folder: Path, positions: int = 256, roles: bool = False, **fields: Any
) -> Path:
    """Write a folder of `family`; `fields` are keys of its config, `roles` ChatGLM3's tokens."""
    folder.mkdir(parents=True, exist_ok=True)
    settings: dict[str, Any] = {}
    fields = {POSITIONS[family]: positions} | fields
    if family == "qwen":
        pytest.importorskip("tiktoken")
        ranks = [bytes([i]) for i in range(256)]
        pieces = [word[:n].encode() for word in WORDS for n in range(2, len(word) + 1)]
        pieces += [b" " + word[:n].encode() for word in WORDS for n in range(1, len(word) + 1)]
        ranks += list(dict.fromkeys(pieces))
        lines = [base64.b64encode(token).decode() + f" {i}" for i, token in enumerate(ranks)]
        (folder / "qwen.tiktoken").write_text("\n".join(lines))
        fields |= {"vocab_size": len(ranks) + 256, "seq_length": positions}
        settings["tokenizer_class"] = "QWenTokenizer"
    elif family == "chatglm":
        (folder / "ice_text.model").write_bytes(_pieces(user_defined_symbols=V1_SYMBOLS, pad_id=3))
        settings["tokenizer_class"] = "ChatGLMTokenizer"
        fields["vocab_size"] = SIZE
    elif family == "chatglm2":
        (folder / "tokenizer.model").write_bytes(_pieces())
        settings["tokenizer_class"] = "ChatGLMTokenizer"
        settings |= {"additional_special_tokens": ["<|user|>"]} if roles else {}
        fields["padded_vocab_size"] = SIZE
    else:
        (folder / "cog-pretrain.model").write_bytes(_pieces())
        settings["tokenizer_class"] = "GLMChineseTokenizer"
        fields |= {"vocab_size": SIZE, "mask_token_ids": None, "sop_token_id": None}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    save_model(tiny_model_(family), folder)  # a config.json, which says whose the tokenizer is
    with quiet():
        words: Any = load_tokenizer(folder)
        words.save_pretrained(folder)
    if family == "chatglm":
        names = {"bos": words.bos_token_id, "eos": words.eos_token_id, "pad": words.pad_token_id}
        names |= {"mask": words.mask_token_id, "gmask": words.gmask_token_id}
        fields |= {f"{name}_token_id": number for name, number in names.items()}
    if family == "glm_legacy":
        fields |= {
            "sop_token_id": words.sop_token_id,
            "mask_token_ids": words.mask_token_ids,
        }
    save_model(tiny_model_(family, **fields), folder)
    return folder


def _pieces(**options: Any) -> bytes:
    """A SentencePiece model whose pieces are words of the tests, and bytes."""
    spm = pytest.importorskip("sentencepiece")
    written = io.BytesIO()
    spm.SentencePieceTrainer.train(
        sentence_iterator=iter([" ".join(WORDS)] * 20),
        model_writer=written,
        vocab_size=400,
        hard_vocab_limit=False,
        byte_fallback=True,
        normalization_rule_name="identity",
        add_dummy_prefix=True,
        remove_extra_whitespaces=False,
        minloglevel=2,
        **options,
    )
    return written.getvalue()
