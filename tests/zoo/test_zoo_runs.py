"""The four families from a folder and rows to a trained model: finetune, evaluate, predict; packed rows = alone."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from luthier.api import load
from luthier.assemble import build, open_data, open_text
from luthier.batch import IGNORE, Layout
from luthier.compress import quantize_model
from luthier.errors import Refused
from luthier.exchange import merge
from luthier.models.stage import Stage, check_stage
from luthier.models.zoo.glm_generation import context_mask, infilling_positions
from luthier.positions import position_axes
from luthier.recipes import finetune, resolve
from luthier.use import evaluate, predict
from luthier.verify.data import verify_data
from luthier.verify.loss import verify_loss
from luthier.verify.packing import verify_packing
from tests.adapters.adapter_table import METHODS as ADAPTERS
from tests.zoo_folders import ZOO, zoo_folder

LENGTH = {"chatglm3": 100, "chatglm": 100, "chatglm2": 100, "glm_legacy": 60, "qwen": 220}
WORDS = ("the box", "how many", "apples", "seven", "a quick fox", "in")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """`checkpoint(family)`: a folder with tiny weights and a toy vocabulary; read only."""

    @cache
    def make(family: str) -> Path:
        roles = family == "chatglm3"
        return zoo_folder(
            "chatglm2" if roles else family, tmp_path_factory.mktemp(family), roles=roles
        )

    return make


def pairs(number: int, start: int = 0) -> str:
    """Lines of one question and its answer; every fourth has an earlier round."""
    rows = []
    for i in range(start, start + number):
        said = [WORDS[i % 6], WORDS[(i + 3) % 6]]
        rows.append([WORDS[(i + 1) % 6], WORDS[(i + 2) % 6], *said] if i % 4 == 3 else said)
    roles = ("user", "assistant")
    lines = [
        {"messages": [{"role": roles[k % 2], "content": text} for k, text in enumerate(row)]}
        for row in rows
    ]
    return "".join(json.dumps(line) + "\n" for line in lines)


@pytest.fixture
def config(checkpoint: Callable[[str], Path], tmp_path: Path) -> Callable[..., dict[str, Any]]:
    """`config(family, **sections)`: a full fine-tuning run of two packed steps in float32."""

    def make(family: str, **sections: Any) -> dict[str, Any]:
        data = tmp_path / "data"
        data.mkdir(exist_ok=True)
        (data / "train.json").write_text(pairs(16), "utf-8")
        (data / "dev.json").write_text(pairs(4, 16), "utf-8")
        return {
            "model": {"path": str(checkpoint(family)), "dtype": "float32"},
            "data": {"path": str(data), "length": LENGTH[family], "workers": 0},
            "optim": {"lr": 1e-3},
            "train": {"steps": 2, "batch": 4, "micro_batch": 2},
            "evaluate": {"every": "end", "generate": True, "max_new_tokens": 3},
            "checkpoint": {"every": "end"},
            "log": {"sinks": [], "progress": "none"},
            "output": str(tmp_path / "out"),
        } | sections

    return make


@pytest.mark.parametrize("method", ["none", "lora"])
@pytest.mark.parametrize("family", [*ZOO, "chatglm3"])
def test_they_train_and_answer(
    family: str, method: str, config: Callable[..., dict[str, Any]]
) -> None:
    run = config(family, adapter={"method": method})
    facts = finetune(run)
    assert facts["checks"] and all(passed for _, passed, _ in facts["checks"])
    assert any("compared bit by bit" in words for *_, words in facts["checks"])
    saved = sorted(path.name for path in Path(run["output"]).glob("*.safetensors"))
    assert saved == (["model.safetensors"] if method == "none" else ["adapter_model.safetensors"])
    measured = evaluate(run)
    assert measured["loss"] == pytest.approx(facts["after"]["loss"], rel=1e-6)
    answers = predict(run)
    assert len(answers) == 4
    if method == "lora":
        output = Path(run["output"])
        merge(run["model"]["path"], str(output), str(output / "merged"))
        merged = run | {"model": run["model"] | {"path": str(output / "merged")}}
        assert predict(merged | {"output": str(output / "other")}) == answers


@pytest.mark.long
@pytest.mark.parametrize("family", ZOO)
@pytest.mark.parametrize("method", ADAPTERS)
def test_every_adapter_trains(
    family: str, method: str, config: Callable[..., dict[str, Any]]
) -> None:
    """A run whose loss falls, an adapter folder that loads and answers."""
    row = ADAPTERS[method]
    options = {k: list(v) if isinstance(v, tuple) else v for k, v in row.options.items()}
    if options["method"] == "reft":
        options["positions"] = "f1+l1" if options["positions"] != "all" else "all"
    train = {"steps": 8, "batch": 16, "micro_batch": 16}  # all rows in each step
    run = config(family, adapter=options, train=train, optim={"lr": 5e-3})
    run["data"] |= {"packing": "none"}
    finetune(run)
    lines = (Path(run["output"]) / "metrics.jsonl").read_text().splitlines()
    losses = [
        found["loss"] for found in map(json.loads, lines) if "loss" in found and "step" in found
    ]
    assert losses[-1] < losses[0]
    assert len(predict(run)) == 4


def test_glm_learns_to_fill_blanks(config: Callable[..., dict[str, Any]], tmp_path: Path) -> None:
    run = config("glm_legacy", adapter={"method": "lora", "rank": 4})
    rows = [
        {"text": f"the box is in the room {i}. how many apples? seven in the box."}
        for i in range(16)
    ]
    (tmp_path / "texts.json").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = {"path": str(tmp_path / "texts.json"), "blanks": "mixed", "validation_share": 0.25}
    run["data"] = run["data"] | data
    run["evaluate"] = {"every": "end"}
    facts = finetune(run)
    assert facts["checks"] and all(passed for _, passed, _ in facts["checks"])


@pytest.mark.parametrize("family", ZOO)
def test_their_rows_are_verified(family: str, config: Callable[..., dict[str, Any]]) -> None:
    """Answers and messages told by their text; a trained <sop> is named."""
    said: list[str] = []
    figures = verify_data(resolve(config(family)), said.append)
    assert figures["train"]["rows"] == figures["train"]["prompts"] == 16
    assert (
        figures["train"]["answers"] == figures["train"]["ended"] == (20 if family == "qwen" else 16)
    )
    assert any("'<sop>'" in line for line in said) == (family == "chatglm")


METHODS = {
    "none": {},
    "lora": {"method": "lora", "rank": 4},
    "prefix": {"method": "prefix", "num_prefix_tokens": 4},
    "prompt": {"method": "prompt", "num_prefix_tokens": 4},
}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("family", ZOO)
def test_a_step_is_that_of_the_plain_model(
    family: str, method: str, config: Callable[..., dict[str, Any]]
) -> None:
    """`verify loss`: the model's own forward, positions, mask and loss on padded rows."""
    said: list[str] = []
    figures = verify_loss(resolve(config(family, adapter=METHODS[method])), said.append)
    assert said[-1] == "verify loss: ok"
    assert len(figures["differences"]) == 3


@pytest.mark.parametrize("family", ZOO)
def test_packing_is_verified(family: str, config: Callable[..., dict[str, Any]]) -> None:
    said: list[str] = []
    verify_packing(resolve(config(family)), said.append)
    assert said[-1] == "verify packing: ok"


@pytest.mark.parametrize("family", ZOO)
def test_packed_rows_are_the_models_own_on_each_document(
    family: str, config: Callable[..., dict[str, Any]], relative: Callable[..., float]
) -> None:
    """Hidden states and loss of the first step against the plain model, which makes positions and mask itself."""
    made = resolve(config(family)).config
    text = open_text(made)
    data = open_data(made, text)
    batches = data.loader.peek()
    data.loader.close()
    built = build(made, train=False)
    model: Any = built.model
    assert max(len(Layout.of(batch).segments) / len(batch.rows) for batch in batches) > 1
    for batch in batches:
        assert batch.position_ids.ndim == (3 if family in ("chatglm", "glm_legacy") else 2)
        with torch.no_grad():
            hidden = built.stage(batch)
        for s in Layout.of(batch).segments:
            ids = batch.input_ids[s.row : s.row + 1, s.start : s.stop]
            labels = batch.labels[s.row, s.start : s.stop]
            inputs: dict[str, Any] = {"input_ids": ids}
            if family == "glm_legacy":
                inputs["position_ids"] = infilling_positions(model.config, ids, None)
                inputs["attention_mask"] = context_mask(inputs["position_ids"], None)
            with torch.no_grad():
                # GLM's own labels are aligned, the others' are shifted by the model
                given = labels[None]
                if family != "glm_legacy":
                    given = torch.cat([torch.tensor([IGNORE]), labels[:-1]])[None]
                plain = model(**inputs, labels=given, use_cache=False)
                logits = built.stage.head(hidden[s.row, s.start : s.stop])
            assert relative(logits, plain.logits[0]) < 1e-5  # rounding over three layers in fp32
            keep = labels != IGNORE
            loss = torch.nn.functional.cross_entropy(logits[keep], labels[keep])
            assert float(loss) == pytest.approx(float(plain.loss), rel=1e-5)


@pytest.mark.parametrize("family", ["chatglm", "glm_legacy"])
def test_the_start_up_check_sees_contexts(
    family: str,
    config: Callable[..., dict[str, Any]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    built = build(resolve(config(family)).config, train=False)
    check_stage(built.stage)
    # a stage whose attention forgets that a context is seen in both directions
    monkeypatch.setattr(Layout, "in_context", None)
    with pytest.raises(Refused, match="hidden states in a packed row differ"):
        check_stage(Stage(built.model))
    assert position_axes(built.model.config.model_type) == 2


@pytest.mark.parametrize("family", ZOO)
def test_rows_of_the_embedding_without_a_token_are_no_text(
    family: str, config: Callable[..., dict[str, Any]]
) -> None:
    """A model that is hardly trained generates such ids."""
    text = open_text(resolve(config(family)).config)
    ids = text.tokenizer("the box", add_special_tokens=False)["input_ids"]
    last = text.model_config.vocab_size - 1
    assert text.renderer.decode([*ids, last]) == text.renderer.decode(ids)


@pytest.mark.parametrize("family", LENGTH)
@pytest.mark.parametrize("scheme", ["nf4", "int4"])
def test_a_quantised_folder_is_the_model_quantised_while_read(
    family: str, scheme: str, checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    """int4 too, whose layout has tensors of the names that the original ChatGLM code gives to its own."""
    asked = {"weights": scheme}
    quantize_model(
        {
            "model": {"path": str(checkpoint(family))},
            "quantize": asked,
            "output": str(tmp_path / "out"),
        }
    )
    written, wanted = load(tmp_path / "out")[0], load(checkpoint(family), quantize=asked)[0]
    theirs = wanted.state_dict()
    for name, tensor in written.state_dict().items():
        # scales are written as scale, not as absmax
        assert torch.allclose(tensor.double(), theirs[name].double(), rtol=1e-6, atol=0), name
