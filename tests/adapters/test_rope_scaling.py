"""An adapter that was trained under stretched positions is used with them: recorded, asked for, merged in."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from tiny_runs import resolved, tiny_config, write_data
from transformers import AutoModelForCausalLM

import luthier
from luthier.assemble import build
from luthier.errors import Refused
from luthier.recipes import finetune
from luthier.train.metrics import read_metrics
from luthier.use import evaluate

pytestmark = pytest.mark.filterwarnings(
    "ignore:.is_gradient_checkpointing. is deprecated:FutureWarning"
)
SCALING = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
IDS = torch.arange(3, 40)[None]


@pytest.fixture(scope="module")
def run(model_folder, tmp_path_factory):
    """A LoRA run under YaRN: its tree and its base."""
    folder = tmp_path_factory.mktemp("stretched")
    tree = tiny_config(
        model_folder("llama"),
        write_data(folder / "data"),
        folder / "out",
        model__rope_scaling=SCALING,
        optim__lr=0.02,
    )
    finetune(tree)
    return tree


def logits(model):
    with torch.no_grad():
        return model(input_ids=IDS).logits


def test_the_folder_says_how_its_base_was_made(run, relative):
    out, base = run["output"], run["model"]["path"]
    facts = json.loads(Path(out, "luthier.json").read_text())["base_options"]
    assert facts["rope_scaling"] == SCALING
    ours = logits(luthier.load(base, out)[0])
    # plain transformers and PEFT: what differs in config.json is written down
    plain = AutoModelForCausalLM.from_pretrained(base, **facts["config_changes"])
    assert relative(ours, logits(PeftModel.from_pretrained(plain, out))) < 1e-6
    plain = AutoModelForCausalLM.from_pretrained(base)
    assert relative(ours, logits(PeftModel.from_pretrained(plain, out))) > 1e-3


def test_merging_keeps_the_positions(run, tmp_path, relative):
    out, base = run["output"], run["model"]["path"]
    luthier.merge(base, out, tmp_path / "merged")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert plain.config.rope_parameters["rope_type"] == "yarn"
    assert relative(logits(luthier.load(base, out)[0]), logits(plain)) < 2e-6


def test_other_positions_are_refused(run):
    other = {**run, "adapter": {**run["adapter"], "path": run["output"]}}
    for scaling, words in (
        (None, "no model.rope_scaling"),
        ({**SCALING, "factor": 2.0}, "'factor': 2.0"),
    ):
        tree = {**other, "model": {**run["model"], "rope_scaling": scaling}}
        with pytest.raises(Refused, match=f"{words}.*give model.rope_scaling=.*factor: 4.0"):
            build(resolved(tree).config, train=False)
    build(resolved(other).config, train=False)


def test_it_is_not_put_on_other_positions(run):
    """Several adapters share one base: all of them want its positions."""
    several = luthier.Adapters(luthier.load(run["model"]["path"])[0])
    with pytest.raises(Refused, match="not those that the adapter was trained with"):
        several.load("long", run["output"])
    luthier.Adapters(luthier.load(run["model"]["path"], run["output"])[0]).load("b", run["output"])


def test_an_adapter_may_be_taken_to_longer_documents(model_folder, tmp_path):
    """One that knew no scaling goes on under one."""
    data = write_data(tmp_path / "data")
    tree = tiny_config(model_folder("llama"), data, tmp_path / "first")
    finetune(tree)
    again = {**tree, "output": str(tmp_path / "second")}
    again["adapter"] = {**tree["adapter"], "path": tree["output"]}
    again["model"] = {**tree["model"], "rope_scaling": SCALING}
    finetune(again)
    facts = json.loads((tmp_path / "second" / "luthier.json").read_text())["base_options"]
    assert facts["rope_scaling"] == SCALING


def test_a_full_run_saves_and_evaluates_its_positions(model_folder, tmp_path, relative):
    """The saved folder is whole as it is: it is not stretched a second time."""
    tree = tiny_config(
        model_folder("llama"),
        write_data(tmp_path / "data"),
        tmp_path / "out",
        adapter=None,
        adapter__method="none",
        adapter__rank=None,
        model__rope_scaling={"type": "ntk", "factor": 4.0},
    )
    finetune(tree)
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    theta = 10000.0 * 4 ** (16 / 14)
    assert saved.config.rope_parameters["rope_theta"] == pytest.approx(theta)
    assert saved.config.max_position_embeddings == 1024
    assert relative(logits(luthier.load(tmp_path / "out")[0]), logits(saved)) < 1e-6
    records = read_metrics(tmp_path / "out" / "metrics.jsonl")
    (loss,) = (r["loss"] for r in records if r["kind"] == "evaluate")
    assert evaluate(tree)["loss"] == pytest.approx(loss, rel=1e-5)
