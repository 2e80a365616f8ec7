"""Texts with blanks for GLM, and Qwen's way of supervising: ids, labels, positions and what is refused."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from small_data import config

from luthier.batch import IGNORE
from luthier.data.blanks import KINDS, Blanks, _spans
from luthier.data.checks import check_labels, check_supervision
from luthier.data.dataset import prepare
from luthier.data.encode import Renderer
from luthier.data.formats import BadRow, Message
from luthier.errors import Failed, Refused
from luthier.models.load import quiet
from luthier.models.tokenizer import load_tokenizer
from luthier.models.zoo.glm_generation import infilling_positions
from tests.zoo_folders import zoo_folder

TEXT = "the box is in the room. how many apples? seven of them are in the box; a quick fox. " * 3


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """`words(family)`: a tokenizer."""

    def make(family: str) -> Any:
        with quiet():
            return load_tokenizer(zoo_folder(family, tmp_path_factory.mktemp(family)))

    return {family: make(family) for family in ("glm_legacy", "qwen", "chatglm")}


def row(renderer: Renderer, text: str = TEXT) -> tuple[list[int], list[int]]:
    (example,) = renderer.encode([Message("text", text, True)])
    check_labels(example.input_ids, example.labels)
    return example.input_ids.tolist(), example.labels.tolist()


@pytest.mark.parametrize("kind", KINDS)
def test_a_text_with_blanks(kind: str, words: Any) -> None:
    """Context with mask tokens, then each piece behind its opening token, trained with its end."""
    glm = words["glm_legacy"]
    renderer = Renderer(glm, length=400, blanks=kind)
    ids, labels = row(renderer)
    mask = dict(zip(KINDS, glm.mask_token_ids, strict=True))[kind]
    starts = [i for i, token in enumerate(ids) if token == glm.sop_token_id]
    context, pieces = ids[: starts[0]], []
    for start, stop in zip(starts, [*starts[1:], len(ids)], strict=True):
        assert ids[stop - 1] == glm.eop_token_id
        assert labels[start:stop] == [*ids[start + 1 : stop], IGNORE]
        pieces.append(ids[start + 1 : stop - 1])
    assert labels[: starts[0]] == [IGNORE] * len(context)
    assert (context[0], context[-1]) == (glm.cls_token_id, glm.eos_token_id)
    assert context.count(mask) == len(pieces) and not set(glm.mask_token_ids) - {mask} & set(
        context
    )
    rest, filled = iter(pieces), []
    for token in context[1:-1]:
        filled += next(rest) if token == mask else [token]
    plain = glm(TEXT, add_special_tokens=False)["input_ids"]
    assert filled == plain == Blanks(kind, renderer.tokens).filled(ids)
    share = sum(map(len, pieces)) / len(plain)
    if kind == "spans":
        assert len(pieces) > 3 and 0.14 < share < 0.35
    elif kind == "sentences":
        assert share >= 0.14 and all(glm.decode(p[-1:]) in ".?;" for p in pieces)
    else:
        assert context[-2] == mask and len(pieces) == 1 and share >= 0.25
    assert row(renderer) == (ids, labels)  # a function of the text
    assert row(renderer, f"a{TEXT}") != (ids, labels)


def test_positions_of_each_piece_are_its_blanks(words: Any) -> None:
    """By the tokenizer and by the model's own rule."""
    glm = words["glm_legacy"]
    for kind in KINDS:
        renderer = Renderer(glm, length=400, blanks=kind)
        ids, _ = row(renderer)
        assert renderer.positions is not None
        places, behind = renderer.positions(np.asarray(ids))
        blanks = iter(i for i, token in enumerate(ids) if token in glm.mask_token_ids)
        piece, count = -1, 0
        for i, token in enumerate(ids):
            if token == glm.sop_token_id:
                piece, count = next(blanks), 0
            count += piece >= 0
            assert (places[i], behind[i]) == ((i, 0) if piece < 0 else (piece, count))
        both = infilling_positions(glm, torch.tensor([ids]), None)[0]
        assert np.array_equal(both, np.stack([places, behind]))
        padded = torch.tensor([[0, 0, *ids]])
        mask = torch.tensor([[0, 0, *[1] * len(ids)]])
        assert torch.equal(infilling_positions(glm, padded, mask)[0, :, 2:], both)


def test_all_kinds_occur_by_chance(words: Any) -> None:
    glm = words["glm_legacy"]
    renderer = Renderer(glm, length=400, blanks="mixed")
    counts = dict.fromkeys(glm.mask_token_ids, 0)
    for i in range(200):
        ids, _ = row(renderer, f"{i} {TEXT}")
        counts[next(token for token in ids if token in counts)] += 1
    shares = [count / 200 for count in counts.values()]
    assert shares == pytest.approx([0.4, 0.3, 0.3], abs=0.12)  # three deviations of 200 draws


def test_long_texts_are_pieces_that_fit(words: Any) -> None:
    glm = words["glm_legacy"]
    whole = glm(TEXT, add_special_tokens=False)["input_ids"]
    renderer = Renderer(glm, length=64, overlong="split", blanks="spans")
    pieces = renderer.encode([Message("text", TEXT, True)])
    assert len(pieces) > 3 and all(len(p.input_ids) <= 64 for p in pieces)
    blanks = Blanks("spans", renderer.tokens)
    assert [i for p in pieces for i in blanks.filled(p.input_ids.tolist())] == whole
    (cut,) = Renderer(glm, length=64, blanks="spans").encode([Message("text", TEXT, True)])
    assert cut.cut == len(whole) - len(blanks.filled(cut.input_ids.tolist()))


def test_spans_never_touch_and_short_texts_have_one() -> None:
    import random

    for count in range(1, 60):
        for seed in range(20):
            found = _spans(count, random.Random(seed))
            assert found and all(0 <= start < stop <= count for start, stop in found)
            assert all(a[1] < b[0] for a, b in itertools.pairwise(found))


def test_blanks_are_glms(words: Any) -> None:
    for family in ("qwen", "chatglm"):
        with pytest.raises(Refused, match=r"data.blanks=spans.*fills no blanks"):
            Renderer(words[family], blanks="spans")
    with pytest.raises(BadRow, match="holds a mask token"):
        row(Renderer(words["glm_legacy"], blanks="rest"), "a [MASK] b")


def test_rows_in_which_no_blanks_are_made_are_told(words: Any, tmp_path: Path) -> None:
    for name, told in (("src", True), ("text", False)):
        file = tmp_path / f"{name}.json"
        file.write_text(json.dumps({name: "seven apples", "tgt": "in the box"}) + "\n", "utf-8")
        run = config(file)
        renderer = Renderer(words["glm_legacy"], length=64, blanks="spans")
        data = prepare(run, renderer, "train")
        assert data and any("data.blanks" in note for note in data.ledger.notes) == told


# ---- Qwen's own supervision


SAID = [
    Message("user", "how many apples?", False),
    Message("assistant", "seven", True),
    Message("user", "in the box?", False),
    Message("assistant", "three", True),
]


def test_qwens_own_code_also_trains_what_opens_and_closes_messages(words: Any) -> None:
    qwen = words["qwen"]
    opened, closed, line = qwen.im_start_id, qwen.im_end_id, qwen("\n")["input_ids"]
    ids, targets = [], []
    texts = [("system", "You are a helpful assistant.")]
    texts += [(m.role, m.text) for m in SAID]
    for role, text in texts:  # as finetune.py of the Qwen repository
        begin = [opened, *qwen(role)["input_ids"], *line]
        said = qwen(text)["input_ids"]
        ids += [*begin, *said, closed, *line]
        targets += [opened, *[IGNORE] * (len(begin) - 1)]
        targets += said if role == "assistant" else [IGNORE] * len(said)
        targets += [closed, *line]
    renderer = Renderer(qwen, length=400, supervise="turns")
    (example,) = renderer.encode(SAID)
    assert example.input_ids.tolist() == ids
    assert example.labels.tolist() == [*targets[1:], IGNORE]
    check_labels(example.input_ids, example.labels)
    check_supervision(renderer, SAID, example)
    (answers,) = Renderer(qwen, length=400).encode(SAID)
    assert renderer.without_marks(SAID, example).labels.tolist() == answers.labels.tolist()
    assert renderer.ends_in_stop(example)
    assert (answers.labels != IGNORE).sum() < (example.labels != IGNORE).sum()
    example.labels[3] = example.input_ids[4]  # a token of the system message
    with pytest.raises(Failed, match="not the answers and the tokens that open"):
        check_supervision(renderer, SAID, example)


def test_turns_need_chatml(words: Any, tiny_tokenizer: Any) -> None:
    for tokenizer in (words["glm_legacy"], tiny_tokenizer()):
        with pytest.raises(Refused, match=r"data.supervise=turns.*<\|im_start\|>"):
            Renderer(tokenizer, supervise="turns")


def test_the_keys_reach_the_renderer(tmp_path: Path) -> None:
    from luthier.configfile import from_mapping
    from luthier.text import open_text

    folder = zoo_folder("glm_legacy", tmp_path / "glm")
    data = {"path": "d", "length": 100, "blanks": "rest"}
    tree = {"model": {"path": str(folder)}, "data": data, "output": "o"}
    assert open_text(from_mapping(tree).config).renderer.blanks is not None
