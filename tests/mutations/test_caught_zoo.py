"""Faults in what is particular to ChatGLM, GLM and Qwen v1 that a named check catches on the public path.

What numbers of the original code catch (sqrt(56), normed residuals, float16 frequencies, the GELUs, Qwen's gate,
stretching in evaluation only, ...) is flipped in tests/zoo/test_*_golden.py.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tiny_runs import resolved, tiny_config, write_data

import luthier.models.stage
import luthier.models.zoo.register
import luthier.verify.loss
from luthier.batch import Layout
from luthier.data.blanks import Blanks
from luthier.data.infilling import Roles
from luthier.errors import Failed, LuthierError, Refused
from luthier.models.families import family_of
from luthier.models.zoo.tokenization_chatglm import two_axes
from luthier.models.zoo.tokenization_glm import BlankInfilling
from luthier.recipes import finetune
from luthier.verify import CHECKS
from tests.zoo_folders import zoo_folder


@pytest.fixture
def run(tmp_path: Path) -> Callable[..., dict[str, Any]]:
    """`run(family, **keys)`: the config of a LoRA run; with `text` on rows of text with blanks."""

    def make(family: str, text: bool = False, roles: bool = False, **keys: Any) -> dict[str, Any]:
        folder = zoo_folder(family, tmp_path / "model", positions=512, roles=roles)
        data = tmp_path / "data"
        if text:
            data.mkdir()
            lines = [
                {"text": f"the box {i}. how many apples; seven in the box. " * 3} for i in range(12)
            ]
            (data / "train.json").write_text("".join(json.dumps(line) + "\n" for line in lines))
            keys = {"data__blanks": "spans"} | keys
        else:
            write_data(data)
        keys = {"data__length": 400} | keys
        return tiny_config(folder, data, tmp_path / "out", **keys)

    return make


@pytest.mark.parametrize("check", ["data", "packing", "loss"])  # layout takes two processes
@pytest.mark.parametrize("kind", ["chatglm", "chatglm3", "glm_legacy", "blanks", "qwen"])
def test_sound_runs_pass(kind: str, check: str, run: Any) -> None:
    """What all faults below start from."""
    family = {"chatglm3": "chatglm2", "blanks": "glm_legacy"}.get(kind, kind)
    config = run(family, text=kind == "blanks", roles=kind == "chatglm3")
    CHECKS[check](resolved(config))


def without_contexts(patch: Any) -> None:
    patch.setattr(Layout, "in_context", None)


def shifted_labels(patch: Any) -> None:
    patch.setattr(
        luthier.verify.loss,
        "family_of",
        lambda name: replace(family_of(name), aligned_labels=False),
    )


def first_blank_for_all(patch: Any) -> None:
    patch.setattr(
        BlankInfilling,
        "document_positions",
        lambda self, ids: two_axes(ids, self.sop_token_id, self.mask_token_ids),
    )


def pieces_mixed_up(patch: Any) -> None:
    right = Blanks.rounds

    def wrong(self: Blanks, ids: Any) -> Any:
        rounds = list(right(self, ids))
        answers = [r.answer for r in rounds][::-1]
        return tuple(r._replace(answer=a) for r, a in zip(rounds, answers, strict=True))

    patch.setattr(Blanks, "rounds", wrong)


def endless_answers(patch: Any) -> None:
    right = Roles.render

    def wrong(self: Roles, *args: Any) -> Any:
        found = right(self, *args)
        return found._replace(rounds=tuple(r._replace(answer=r.answer[:-1]) for r in found.rounds))

    patch.setattr(Roles, "render", wrong)


def causal_positions(patch: Any) -> None:
    """The context of a plain call begins with the answer: packed rows and the model's own no longer agree."""
    right = luthier.models.zoo.chatglm.context_of
    patch.setattr(luthier.models.zoo.chatglm, "context_of", lambda p: right(p) & (p[:, 0] < 2))


FAULTS: dict[str, tuple[str, dict[str, Any], Callable[[Any], None], str, type, str]] = {
    "contexts seen forwards only": (
        *("chatglm", {}, without_contexts, "packing", Refused),
        "hidden states in a packed row differ",
    ),
    "contexts of glm": (
        *("glm_legacy", {}, without_contexts, "packing", Refused),
        "hidden states in a packed row differ",
    ),
    "the plain model's context": (
        *("chatglm", {}, causal_positions, "loss", Refused),
        "hidden states in a packed row differ",
    ),
    "labels of glm shifted": (
        *("glm_legacy", {}, shifted_labels, "loss", Failed),
        "its loss is .* the cross entropy of its logits",
    ),
    "all pieces at the first blank": (
        *("glm_legacy", {"text": True}, first_blank_for_all, "loss", Failed),
        "plain transformers, padded rows = packed rows. they differ",
    ),
    "pieces in another order": (
        *("glm_legacy", {"text": True}, pieces_mixed_up, "data", Failed),
        "filling the blanks of a text",
    ),
    "answers without an end": (
        *("chatglm2", {"roles": True}, endless_answers, "data", Refused),
        "no answer ends in a trained end token",
    ),
}


@pytest.mark.parametrize("name", FAULTS)
def test_faults(name: str, run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    family, keys, fault, check, kind, message = FAULTS[name]
    assert issubclass(kind, LuthierError)
    config = run(family, **keys)
    fault(monkeypatch)
    with pytest.raises(kind, match=message):
        CHECKS[check](resolved(config))
    if kind is Refused:
        with pytest.raises(Refused, match=message):
            finetune(config)
        assert not (Path(config["output"])).exists()


@pytest.mark.parametrize(
    ("function", "family"), [("is_legacy_glm", "glm_legacy"), ("is_chatglm_v1", "chatglm")]
)
def test_name_clashes(
    function: str, family: str, run: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A folder taken for the other family of its model_type is refused."""
    config = run(family)
    monkeypatch.setattr(luthier.models.zoo.register, function, lambda keys: False)
    with pytest.raises(Refused):
        finetune(config)
    assert not Path(config["output"]).exists()
