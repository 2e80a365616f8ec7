"""Whole runs through the public functions: which model is used, what the output folder holds, what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from tiny_runs import copy_model, tiny_config, write_data
from transformers import AutoModelForCausalLM, AutoTokenizer

import luthier
from luthier import recipes
from luthier.errors import Refused
from luthier.use import choose_model

FULL = {"adapter__method": None, "adapter__rank": None, "optim__lr": 1e-3}


@pytest.fixture
def make(tmp_path, model_folder):
    """make(output name, **keys) -> mapping of a run on a copy of a tiny llama that a test may spoil."""
    model = copy_model(model_folder("llama"), tmp_path / "model")
    data = write_data(tmp_path / "data")

    def config(output: str = "run", **keys):
        return tiny_config(model, data, tmp_path / output, **keys)

    return config


def loss_of(config) -> float:
    return luthier.evaluate(config)["loss"]


def test_resume_auto_never_writes_into_a_model_folder(make, tmp_path):
    for output in ("model", "other"):
        if output == "other":
            copy_model(tmp_path / "model", tmp_path / "other")
        before = (tmp_path / output / "model.safetensors").read_bytes()
        with pytest.raises(Refused):
            luthier.finetune(make(output, checkpoint__resume="auto", **FULL))
        assert (tmp_path / output / "model.safetensors").read_bytes() == before


def test_a_run_from_random_weights_is_evaluated_with_what_it_trained(make):
    config = make(model__init="random", model__num_layers=1, train__steps=6, **FULL)
    trained = luthier.finetune(config)["after"]["loss"]
    assert loss_of(config) == pytest.approx(trained, rel=1e-6)


def test_the_config_of_the_final_model_comes_last(make, tmp_path, monkeypatch):
    config = make(**FULL)
    replace = Path.replace

    def crash(self, target):
        if Path(target).name == "tokenizer_config.json" and Path(target).parent.name == "run":
            raise KeyboardInterrupt
        return replace(self, target)

    monkeypatch.setattr(Path, "replace", crash)
    with pytest.raises(KeyboardInterrupt):
        luthier.finetune(config)
    monkeypatch.undo()
    assert not (tmp_path / "run" / "config.json").exists()
    assert "step-3" in choose_model(recipes.resolve(config).config).words


def test_the_final_folder_takes_sub_folders_and_replaces_them(tmp_path):
    for _ in range(2):
        folder = tmp_path / ".partial-final" / "model"
        (folder / "more").mkdir(parents=True)
        (folder / "more" / "a.jinja").write_text("x")
        (folder / "config.json").write_text("{}")
        recipes._move_final(folder, tmp_path)
    assert (tmp_path / "more" / "a.jinja").read_text() == "x"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["config.json", "more"]


def test_answers_before_are_not_shown_as_answers_after(make):
    generate = {"evaluate__before": True, "evaluate__generate": True, "evaluate__max_new_tokens": 4}
    facts = luthier.finetune(make(evaluate__every="never", **generate))
    assert all("before" in s and "after" not in s for s in facts["samples"])
    facts = luthier.finetune(make("second", **generate))
    assert all("before" in s and "after" in s for s in facts["samples"])


def test_a_finished_run_that_is_resumed_keeps_its_answers(make):
    keys = {"evaluate__generate": True, "evaluate__max_new_tokens": 4}
    first = luthier.finetune(make(**keys))
    again = luthier.finetune(make(checkpoint__resume="auto", **keys))
    assert first["samples"] == again["samples"]
    assert first["after"] == again["after"]


def test_merging_builds_the_base_as_the_run_did(make, tmp_path):
    config = make(model__num_layers=1, optim__lr=0.05)
    after = luthier.finetune(config)["after"]["loss"]
    luthier.merge(str(tmp_path / "model"), str(tmp_path / "run"), str(tmp_path / "merged"))
    merged = make("elsewhere", adapter__method=None, adapter__rank=None)
    merged["model"]["path"] = str(tmp_path / "merged")
    assert loss_of(merged) == pytest.approx(after, rel=1e-5)  # float32: summed in another order
    model, _ = luthier.load(tmp_path / "model", adapter=tmp_path / "run")
    assert model.config.num_hidden_layers == 1


def test_an_adapter_on_random_weights_cannot_be_merged(make, tmp_path):
    luthier.finetune(make(model__init="random"))
    with pytest.raises(Refused, match="random weights"):
        luthier.merge(str(tmp_path / "model"), str(tmp_path / "run"), str(tmp_path / "merged"))
    assert not (tmp_path / "merged").exists()


def test_an_extended_run_that_is_not_finished_is_used_from_its_checkpoint(make, tmp_path):
    config = make(checkpoint__every=1)
    luthier.finetune(config)
    assert "final model" in choose_model(recipes.resolve(config).config).words
    report = tmp_path / "run" / "report.json"
    facts = json.loads(report.read_text()) | {"steps": 2}  # as if step 3 came after the last finish
    report.write_text(json.dumps(facts))
    assert "step-3" in choose_model(recipes.resolve(config).config).words


def test_a_template_file_goes_with_the_final_model(make, tmp_path):
    template = tmp_path / "chat.jinja"
    template.write_text(
        "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{{ eos_token }}{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    luthier.finetune(make(data__template=str(template), **FULL))
    assert AutoTokenizer.from_pretrained(tmp_path / "run").chat_template == template.read_text()


def test_going_on_with_an_adapter_on_another_base_is_refused(make, tmp_path):
    luthier.finetune(make())
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    with torch.no_grad():
        model.get_input_embeddings().weight.add_(0.1)
    model.save_pretrained(tmp_path / "model")
    with pytest.raises(Refused, match="other weights"):
        luthier.finetune(make(train__steps=5, checkpoint__resume="auto"))


def test_an_adapter_of_some_layers_is_not_used_on_all_of_them(make):
    luthier.finetune(make(model__num_layers=1))
    with pytest.raises(Refused, match="first 1 layers"):
        luthier.evaluate(make())


def test_a_folder_is_no_file_of_rows_to_answer(make, tmp_path):
    with pytest.raises(Refused, match="it is a folder"):
        luthier.predict(make(predict__input=str(tmp_path / "data")))
