"""Prompts of ChatGLM, ChatGLM2 and GLM as rows: ids, labels, positions, truncation; their vocabularies are toy ones."""

from __future__ import annotations

import os
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from luthier.batch import IGNORE, Layout
from luthier.data.checks import check_labels, check_supervision
from luthier.data.encode import Dropped, Renderer
from luthier.data.formats import BadRow, Message
from luthier.data.jinja import LAST_ONLY
from luthier.data.loader import collate
from luthier.errors import Refused
from luthier.models.load import quiet
from luthier.models.zoo.chatglm import position_ids_of
from luthier.models.zoo.glm_generation import infilling_positions
from luthier.models.zoo.tokenization_chatglm import ChatGLMTokenizer, two_axes
from luthier.models.zoo.tokenization_chatglm2 import ChatGLM2Tokenizer
from luthier.models.zoo.tokenization_glm import GLMChineseTokenizer

ROOT = (
    Path(os.environ.get("LUTHIER_GOLDEN", Path(__file__).parents[1] / "golden" / "data")) / "models"
)
CLASSES: dict[str, tuple[Any, str]] = {
    "chatglm": (ChatGLMTokenizer, "ice_text.model"),
    "chatglm2": (ChatGLM2Tokenizer, "tokenizer.model"),
    "glm": (GLMChineseTokenizer, "cog-pretrain.model"),
}
ROLE_NAMES = ("system", "user", "assistant", "observation")
SAID = ["how many apples ?", "seven", "in the box ?", "three"]


def tokenizer(family: str, **options: Any) -> Any:
    cls, name = CLASSES[family]
    file = ROOT / family / "tokenizer" / name
    if not file.is_file():
        pytest.skip(f"{file} is absent")
    pytest.importorskip("sentencepiece")
    with quiet():
        return cls(str(file), **options)


def messages(*texts: str, supervised: tuple[bool, ...] = ()) -> list[Message]:
    """A user's and an assistant's text in turn."""
    roles = ("user", "assistant")
    marks = supervised or (True,) * len(texts)
    return [
        Message(roles[i % 2], text, bool(i % 2) and marks[i // 2]) for i, text in enumerate(texts)
    ]


def plain(words: Any, text: str) -> list[int]:
    return words(text, add_special_tokens=False)["input_ids"]


def expected(family: str, words: Any, prompt: str, answer: str) -> tuple[list[int], int]:
    """The row by the rules of the family, and its first trained token."""
    said, answered = plain(words, prompt), plain(words, answer)
    if family == "chatglm":  # S(prompt) [gMASK] <sop> answer <eop>; <sop> is trained
        row = [*said, words.gmask_token_id, words.bos_token_id]
        return [*row, *answered, words.eos_token_id], len(row) - 1
    if family == "chatglm2":
        row = [words.get_command("[gMASK]"), words.get_command("sop"), *said]
        return [*row, *answered, words.eos_token_id], len(row)
    row = [words.cls_token_id, *said, words.gmask_token_id, words.eos_token_id, words.sop_token_id]
    return [*row, *answered, words.eop_token_id], len(row)


# what each family writes for one question, and for SAID[2] after a round
ROUNDS = {
    "chatglm": (
        "how many apples ?",
        "[Round 0]\n问：how many apples ?\n答：seven\n[Round 1]\n问：in the box ?\n答：",
    ),
    "chatglm2": (
        "[Round 1]\n\n问：how many apples ?\n\n答：",
        "[Round 1]\n\n问：how many apples ?\n\n答：seven\n\n[Round 2]\n\n问：in the box ?\n\n答：",
    ),
    "glm": ("how many apples ?", "how many apples ?\nseven\nin the box ?"),
}


@pytest.mark.parametrize("turns", [1, 2])
@pytest.mark.parametrize("family", CLASSES)
def test_rows_are_those_of_the_family(family: str, turns: int) -> None:
    words = tokenizer(family)
    renderer, said = Renderer(words, length=256), messages(*SAID[: 2 * turns])
    (example,) = renderer.encode(said)
    ids, first = expected(family, words, ROUNDS[family][turns - 1], SAID[2 * turns - 1])
    assert example.input_ids.tolist() == ids
    labels = [IGNORE] * (first - 1) + ids[first:] + [IGNORE]
    assert example.labels.tolist() == labels
    assert renderer.prompt(said) == ids[: first + renderer.tokens.trained_before]
    assert renderer.ends_in_stop(example) and set(words.stop_ids) <= set(renderer.stop_ids)
    assert (LAST_ONLY in example.note) == (turns == 2)
    check_labels(example.input_ids, example.labels)
    check_supervision(renderer, said, example)
    assert (
        renderer.decode(ids[first + renderer.tokens.trained_before :]).strip()
        == SAID[2 * turns - 1]
    )


def test_prompts_are_those_of_the_original_chat() -> None:
    import json

    for family in ("chatglm", "chatglm2"):
        words = tokenizer(family)
        chat = json.loads((ROOT / family / "tokenizer/tokenizer_golden.json").read_text())["chat"]
        history = [tuple(pair) for pair in chat["history"]]
        assert words.build_prompt(chat["query"], history) == chat["prompt"]
        assert words.build_prompt(chat["query"]) == chat["first_turn_prompt"]
        said = messages(*(text for pair in history for text in pair), chat["query"])
        assert Renderer(words, length=256).prompt(said) == chat["input_ids"]


def test_positions_are_those_of_the_models() -> None:
    """Of the rows with each kind of blank; batches restart them in each document, padding apart."""
    v1, glm = tokenizer("chatglm"), tokenizer("glm")
    for words, rule in (
        (v1, lambda ids: position_ids_of(ids, v1)),
        (glm, lambda ids: infilling_positions(glm, ids, None)),
    ):
        renderer = Renderer(words, length=256)
        texts = ("how many", "a [MASK] b", "the [sMASK] is", "a [MASK] b [gMASK] c")
        rows = [renderer.encode(messages(text, "seven apples"))[0] for text in texts]
        documents = [(row.input_ids, row.labels) for row in rows]
        batch = collate([documents[:3], documents[3:]], 0, positions_of=renderer.positions)
        assert batch.position_ids.shape == (2, 2, batch.input_ids.shape[1])
        layout = Layout.of(batch)
        for s, row in zip(layout.segments, rows, strict=True):
            ids = torch.from_numpy(row.input_ids.astype(np.int64))[None]
            found = batch.position_ids[s.row, :, s.start : s.stop]
            assert torch.equal(found, rule(ids)[0])
        # the prompt ends with the token that opens the answer, trained or not
        prompts = [len(renderer.prompt(messages(text, "seven apples"))) for text in texts]
        assert list(layout.prompt_lengths) == prompts
        assert pickle.loads(pickle.dumps(renderer)).positions is not None
    assert Renderer(tokenizer("chatglm2")).positions is None


def test_positions_of_pieces_are_defined() -> None:
    """Checks cut documents: without an opening token all is context, without a blank axis 0 counts on."""
    assert two_axes([7, 8, 9], 1, [2]).tolist() == [[0, 1, 2], [0, 0, 0]]
    assert two_axes([7, 1, 9], 1, [2]).tolist() == [[0, 1, 2], [0, 1, 2]]
    assert two_axes([7, 2, 3, 1, 9], 1, [3], [2]).tolist() == [[0, 1, 2, 2, 2], [0, 0, 0, 1, 2]]
    assert two_axes([7, 2, 3, 1, 9], 1, [2, 3]).tolist() == [[0, 1, 2, 1, 1], [0, 0, 0, 1, 2]]


def test_a_blank_in_the_text_is_the_blank_of_glm() -> None:
    words = tokenizer("glm")
    renderer = Renderer(words, length=64)
    for mask in ("[MASK]", "[sMASK]", "[gMASK]"):
        ids = renderer.prompt(messages(f"the quick brown {mask} jumps"))
        assert ids == [
            words.cls_token_id,
            *plain(words, f"the quick brown {mask} jumps"),
            words.eos_token_id,
            words.sop_token_id,
        ]


@pytest.mark.parametrize("family", CLASSES)
def test_cutting_keeps_special_tokens_and_the_blank(family: str) -> None:
    words = tokenizer(family)
    text = "the box is in the room and how many apples are in the box ?"
    asked = messages(text, "seven")
    whole = Renderer(words, length=256).prompt(asked)
    renderer = Renderer(words, length=64, source_length=20)
    (example,) = renderer.encode(asked)
    before, behind = words.special_ids_around([])
    kept = whole[len(before) : len(whole) - len(behind)][-(20 - len(before) - len(behind)) :]
    prompt = [*before, *kept, *behind]
    assert len(prompt) == 20
    assert example.input_ids[:20].tolist() == prompt == renderer.prompt(asked)
    assert example.cut == len(whole) - 20
    with pytest.raises(Dropped, match="no room for an answer"):
        Renderer(words, length=20).encode(asked)
    assert len(Renderer(words, length=20).prompt(messages(text))) == 20
    if family == "glm":  # the oldest text goes, but not beyond the blank
        (example,) = renderer.encode(messages(f"a [MASK] {text}", "seven"))
        assert words.convert_tokens_to_ids("[MASK]") == example.input_ids[1]
        assert len(renderer.prompt(messages(f"a [MASK] {text}"))) == 20


@pytest.mark.parametrize("family", CLASSES)
def test_too_many_rounds_lose_the_first(family: str) -> None:
    words = tokenizer(family)
    said = messages(*SAID[:2], *SAID[:2], *SAID[2:])
    short, long = (Renderer(words, length=256).prompt(said[i:]) for i in (4, 2))
    renderer = Renderer(words, length=len(long) + 2)
    assert renderer.prompt(said) == long
    (example,) = renderer.encode(said)
    assert example.cut > 0 and example.input_ids[: len(short)].tolist() == short


@pytest.mark.parametrize("family", CLASSES)
def test_a_text_is_learnt_whole_behind_an_empty_context(family: str) -> None:
    words = tokenizer(family)
    renderer = Renderer(words, length=64)
    (example,) = renderer.encode([Message("text", "seven apples", True)])
    before, behind = words.special_ids_around([])
    start, ids = [*before, *behind], [*plain(words, "seven apples"), words.stop_ids[0]]
    assert example.input_ids.tolist() == [*start, *ids]
    first = len(start) - words.trained_before
    assert example.labels.tolist() == [
        *[IGNORE] * (first - 1),
        *[*start, *ids][first:],
        IGNORE,
    ]
    continued = renderer.prompt([Message("text", "seven apples", True)])
    assert continued == [*start, *ids[:-1]]


def test_a_system_message_and_no_template() -> None:
    words = tokenizer("chatglm2")
    said = [Message("system", "be brief", False), *messages(*SAID)]
    prompt = Renderer(words, length=256).prompt(said)
    assert prompt[2:] == plain(words, f"be brief\n{ROUNDS['chatglm2'][1]}")
    bare = Renderer(words, template="none", length=256)
    assert bare.prompt(said)[2:] == plain(words, "be brief\nhow many apples ?\nseven\nin the box ?")


def test_what_cannot_be_is_said(tmp_path: Path) -> None:
    words = tokenizer("chatglm2", roles=True)
    assert Renderer(words).notes == Renderer(words, template="none").notes == ()
    words.chat_template = "{{ messages }}"
    assert any("chat template is not used" in note for note in Renderer(words).notes)
    file = tmp_path / "chat.jinja"
    file.write_text("{{ messages }}")
    with pytest.raises(Refused, match=r"ChatGLM2Tokenizer.*data.template=auto"):
        Renderer(words, template=str(file))


def test_chatglm3_has_a_token_for_each_role() -> None:
    """As its code writes and trains them: every answer with the newline before it and the token behind it."""
    words = tokenizer("chatglm2", roles=True)
    renderer = Renderer(words, length=256)
    system, user, assistant, seen = (words.get_command(f"<|{r}|>") for r in ROLE_NAMES)
    line = plain(words, "\n")
    said = [
        Message("system", "be brief", False),
        Message("user", "how many apples ?", False),
        Message("assistant", "count()", True, metadata="counter"),
        Message("tool", "seven", False),
        Message("assistant", "three", True),
    ]
    head = [words.get_command("[gMASK]"), words.get_command("sop"), system, *line]
    asked = [*plain(words, "be brief"), user, *line, *plain(words, "how many apples ?")]
    prompts = [[*head, *asked, assistant], [*line, *plain(words, "seven"), assistant]]
    answers = [
        [*plain(words, "counter\n"), *plain(words, "count()"), seen],
        [*line, *plain(words, "three"), words.eos_token_id],
    ]
    (example,) = renderer.encode(said)
    ids = [i for pair in zip(prompts, answers, strict=True) for part in pair for i in part]
    assert example.input_ids.tolist() == ids
    marks = [False] * len(prompts[0]) + [True] * len(answers[0])
    marks += [False] * len(prompts[1]) + [True] * len(answers[1])
    labels = [i if mark else IGNORE for i, mark in zip(ids, marks, strict=True)]
    assert example.labels.tolist() == [*labels[1:], IGNORE]
    check_labels(example.input_ids, example.labels)
    check_supervision(renderer, said, example)
    assert renderer.prompt(said[:3]) == prompts[0]
    assert renderer.prompt(said) == ids[: -len(answers[1])]
    assert set(renderer.stop_ids) == {words.eos_token_id, user, seen}
    assert renderer.decode(answers[1]) == "three"
    assert renderer.decode(answers[0]).startswith("counter")  # a call is shown with its tool
    short = Renderer(words, length=60, source_length=30)
    (cut,) = short.encode([said[0], Message("user", "how many apples ? " * 9, False), said[4]])
    assert cut.cut and cut.input_ids[:4].tolist() == prompts[0][:4]
    assert len(short.prompt([said[0], Message("user", "how many apples ? " * 9, False)])) == 30


def test_tool_turns_need_chatglm3() -> None:
    said = [*messages("a", "b"), Message("tool", "c", False), Message("assistant", "d", True)]
    with pytest.raises(BadRow, match="tool turn, for which only ChatGLM3"):
        Renderer(tokenizer("chatglm2")).encode(said)
