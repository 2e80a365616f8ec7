"""The renderer's truncation and labels against PaddleNLP's own results.

The cases are ids; a tokenizer whose words are numbered gives back the same ids. Upstream's arrays are
shifted by dropping the last token; ours keep it, with an ignored label. Where no room is left for the
answer upstream's row is too long; ours is dropped.
"""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from golden_cases import ROOT, VARIABLE, absent
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from luthier.batch import IGNORE
from luthier.data.encode import Dropped, Example, Renderer
from luthier.data.formats import Message
from luthier.data.loader import collate
from luthier.models.zoo.chatglm import visible
from luthier.models.zoo.tokenization_chatglm import two_axes

FOLDER = ROOT
FILE = FOLDER / "data" / "tokenization.json"
TESTED = {"single_turn", "multi_round", "prefix_lm_chatglm"}
LATER = {
    "autoregressive": "PaddleNLP's autoregressive mode (EOS is an input, never a target)",
}


def cases(table: str) -> list[Any]:
    if not FILE.is_file():
        return [absent(FILE)]
    found = json.loads(FILE.read_text("utf-8")).get(table, [])
    return [pytest.param(case, id=f"{table}-{i}") for i, case in enumerate(found)]


@cache
def numbered(add_bos: bool, bos: int, eos: int, size: int = 200_000) -> PreTrainedTokenizerFast:
    """The text `w7x w8x` has the ids 7 and 8."""
    core = Tokenizer(models.WordLevel({f"w{i}x": i for i in range(size)}, unk_token="w0x"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    if add_bos:
        core.post_processor = processors.TemplateProcessing(
            single=f"w{bos}x $A", special_tokens=[(f"w{bos}x", bos)]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token=f"w{bos}x", eos_token=f"w{eos}x", unk_token="w0x"
    )


def words(ids: list[int]) -> str:
    return " ".join(f"w{i}x" for i in ids)


def upstream(example: Example) -> dict[str, list[int]]:
    """Our arrays without the last token, whose label must be ignored."""
    assert example.labels[-1] == IGNORE
    return {"input_ids": example.input_ids[:-1].tolist(), "labels": example.labels[:-1].tolist()}


@pytest.mark.parametrize("case", cases("single_turn"))
def test_single_turn(case: dict[str, Any]) -> None:
    tokenizer = numbered(case["add_bos"], case["bos_id"], case["eos_id"])
    renderer = Renderer(tokenizer, "none", case["max_length"], case["src_length"])
    messages = [
        Message("user", words(case["src_ids"]), False),
        Message("assistant", words(case["tgt_ids"]), True),
    ]
    source = len(case["src_ids"]) + case["add_bos"]
    if min(source, case["src_length"]) >= case["max_length"]:
        assert len(case["train_side_honoured"]["input_ids"]) >= case["max_length"]
        with pytest.raises(Dropped, match="no room"):
            renderer.encode(messages)
        return
    (example,) = renderer.encode(messages)
    assert upstream(example) == case["train_side_honoured"]
    whole = source + len(case["tgt_ids"]) + 1
    assert len(example.input_ids) == whole - example.cut <= case["max_length"]
    if source <= case["src_length"]:  # else upstream's own prompt is cut on the wrong side
        assert renderer.prompt(messages) == case["eval"]["input_ids"]


@pytest.mark.parametrize("case", cases("multi_round"))
def test_multi_round(case: dict[str, Any], tmp_path: Path) -> None:
    template = {
        "system": words(case["system_ids"]),
        "conversation": ["{{user}} ", "{{bot}} "],
        "query": "{{query}} ",
    }
    file = tmp_path / "chat_template.json"
    file.write_text(json.dumps(template), "utf-8")
    renderer = Renderer(numbered(False, 1, 2), str(file), case["max_length"], case["src_length"])
    messages = []
    for prompt, answer in case["rounds"]:
        messages += [
            Message("user", words(prompt), False),
            Message("assistant", words(answer), True),
        ]
    if "error" in case["train"]:  # upstream stops: the system message alone is too long
        with pytest.raises(Dropped):
            renderer.encode(messages)
        return
    (example,) = renderer.encode(messages)
    assert upstream(example) == {k: case["train"][k] for k in ("input_ids", "labels")}


class Prefixed:
    """A numbered tokenizer that puts the last two ids of a prompt behind its text, as ChatGLM-6B's does."""

    trained_before, blank_ids, prompt_notes, stop_ids, chat_template = 1, (), (), (2,), None
    eos_token_id, bos_token_id = 2, None

    def __init__(self, behind: list[int]) -> None:
        self.behind = behind

    def __call__(
        self, text: str, add_special_tokens: bool = True, **_: Any
    ) -> dict[str, list[int]]:
        ids = numbered(False, 1, 2)(text)["input_ids"]
        return {"input_ids": [*ids, *self.behind] if add_special_tokens else ids}

    def build_prompt(self, query: str, history: Any = ()) -> str:
        return query

    def special_ids_around(self, ids: list[int]) -> tuple[list[int], list[int]]:
        return [], self.behind

    def document_positions(self, ids: Any) -> np.ndarray:
        return two_axes(ids, self.behind[1], self.behind[:1])


@pytest.mark.parametrize("case", cases("prefix_lm_chatglm"))
def test_prefix_lm_chatglm(case: dict[str, Any]) -> None:
    """Ids, labels and what each token sees. Upstream's packed positions are the reverse of those that its own
    tokenizer makes for rows alone; ours are the latter, so its table of positions is not compared."""
    source = case["src_ids"][: case["src_length"]]  # cut on the wrong side, as in `meaning`
    tokenizer = Prefixed(source[-2:])
    renderer = Renderer(tokenizer, "auto", case["max_length"], case["src_length"])
    messages = [
        Message("user", words(source[:-2]), False),
        Message("assistant", words(case["tgt_ids"]), True),
    ]
    (example,) = renderer.encode(messages)
    assert upstream(example) == {key: case[key] for key in ("input_ids", "labels")}
    assert renderer.prompt(messages) == source
    batch = collate([[(example.input_ids, example.labels)]], 0, positions_of=renderer.positions)
    rows = case["attention_mask_rows"]
    seen = visible(batch.position_ids, 0, None)[0, 0, : len(rows), : len(rows)]
    assert ["".join(str(int(mark)) for mark in row) for row in seen] == rows


@pytest.mark.skipif(not FILE.is_file(), reason=f"{FILE} is absent: see {VARIABLE}")
def test_no_table_is_overlooked() -> None:
    tables = {k for k, v in json.loads(FILE.read_text("utf-8")).items() if isinstance(v, list)}
    assert tables - set(LATER) <= TESTED


@pytest.mark.parametrize("table", sorted(LATER))
def test_later(table: str) -> None:
    pytest.skip(LATER[table])
