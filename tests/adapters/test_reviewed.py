"""Whole-run defects that a review found, each with the run that showed it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from adapter_table import METHODS, fill, options

import luthier
from luthier.adapters import attach, save_adapter
from luthier.adapters.facts import FACTS
from luthier.config import AdapterConfig
from luthier.errors import Refused
from luthier.exchange import merge
from luthier.models.cpu_attention import helps
from luthier.recipes import finetune
from luthier.verify import CHECKS
from tests.tiny_runs import resolved, tiny_config, write_data

LINEAR = [name for name, row in METHODS.items() if row.on == "linear"]


@pytest.fixture
def config(model_folder: Callable[..., Path], tmp_path: Path) -> Callable[..., dict[str, Any]]:
    data = write_data(tmp_path / "data")

    def make(output: str = "run", family: str = "llama", **keys: Any) -> dict[str, Any]:
        base = model_folder(family)
        return tiny_config(base, data, tmp_path / output, **keys)

    return make


def keys_of(row: str, **changes: Any) -> dict[str, Any]:
    found = {f"adapter__{k}": v for k, v in {**METHODS[row].options, **changes}.items()}
    return {"adapter__rank": None, **found}


@pytest.mark.parametrize("row", LINEAR)
def test_the_output_layer_can_be_adapted(config: Any, row: str) -> None:
    finetune(config(**keys_of(row, targets=["lm_head", "q_proj"]), train__steps=1))


def test_an_adapted_layer_whose_weight_is_trained_whole_elsewhere(tiny_model: Any) -> None:
    """Tied embeddings: the head's weight is the embedding's."""
    asked = AdapterConfig(
        method="lora", rank=2, targets=("lm_head", "q_proj"), modules_to_save=("embed_tokens",)
    )
    with pytest.raises(Refused, match=r"modules_to_save 'embed_tokens'.*'lm_head' is to get"):
        attach(tiny_model("qwen2"), asked, seed=0)


@pytest.mark.parametrize(
    "row", ["lora", "reft", "reft_tiny_all", "prefix", "prefix_network", "prompt"]
)
def test_verify_loss_knows_every_method(config: Any, row: str) -> None:
    CHECKS["loss"](resolved(config(**keys_of(row))))


def test_going_on_with_longer_documents_than_fit(config: Any, tmp_path: Path) -> None:
    keys = {"adapter__method": "prompt", "adapter__rank": None, "adapter__num_prefix_tokens": 4}
    finetune(config("first", "gpt2", **keys, data__length=100, train__steps=1))
    more = {"adapter__path": str(tmp_path / "first"), "data__length": 256}
    with pytest.raises(Refused, match="num_prefix_tokens=4 with documents of 256 tokens"):
        finetune(config("second", "gpt2", **keys, **more, train__steps=1))


@pytest.mark.parametrize("layers", ["1-0", "0-99999999", "3,2-1"])
def test_ranges_that_run_backwards(layers: str) -> None:
    with pytest.raises(ValueError, match="does not run from a smaller"):
        AdapterConfig(method="reft", layers=layers)


def test_patterns_that_fit_nothing(tiny_model: Any) -> None:
    for key in ("rank_pattern", "alpha_pattern"):
        asked = AdapterConfig.model_validate({"method": "lora", "rank": 2, key: {"q_prj": 4}})
        with pytest.raises(Refused, match=rf"adapter.{key} 'q_prj'.*did you mean 'q_proj'"):
            attach(tiny_model("llama"), asked, seed=0)


def test_an_edit_that_nothing_reads(tiny_model: Any) -> None:
    asked = AdapterConfig(method="reft", rank=2, layers="1", positions="f1")
    with pytest.raises(Refused, match="nothing would be trained"):
        attach(tiny_model("llama"), asked, seed=0)


@pytest.mark.parametrize(
    "keys",
    [
        {"targets": "q_proj"},
        {"targets": ".*mlp.*"},
        {"targets": ["v_proj", "q_proj"]},
        {"layers": "0"},
        {"alpha": 4.0},
        {"rank_pattern": {"q_proj": 1}},
        {"dropout": 0.1, "lora_plus": 4.0},
        {"rslora": True, "pissa": True},
        {"dora": True},
        {"modules_to_save": ["norm"]},
    ],
    ids=str,
)
def test_going_on_with_the_config_that_made_the_adapter(
    config: Any, tmp_path: Path, keys: dict[str, Any]
) -> None:
    given = {f"adapter__{key}": value for key, value in keys.items()}
    finetune(config("first", **given, train__steps=1))
    finetune(config("second", **given, adapter__path=str(tmp_path / "first"), train__steps=1))


def test_options_of_training_alone_may_change(config: Any, tmp_path: Path) -> None:
    finetune(config("first", train__steps=1))
    more = {"adapter__path": str(tmp_path / "first"), "train__steps": 1}
    finetune(config("second", **more, adapter__dropout=0.5, adapter__lora_plus=8.0))
    options = json.loads((tmp_path / "second" / FACTS).read_text())["options"]
    assert options["dropout"] == 0.5 and options["lora_plus"] == 8.0
    with pytest.raises(Refused, match=r"adapter\.rank=3 with adapter\.path"):
        finetune(config("third", **more, adapter__rank=3))


def test_heads_of_two_sizes_keep_to_torch() -> None:
    q, v = torch.randn(4, 2, 8).bfloat16().requires_grad_(), torch.randn(4, 2, 6).bfloat16()
    assert helps(q, q, q) and not helps(q, q, v)


def test_several_adapters_check_the_base(
    model_folder: Callable[..., Path], tiny_model: Any, tmp_path: Path
) -> None:
    model = tiny_model("llama")
    attach(model, options("lora"), seed=1)
    fill(model)
    save_adapter(model, tmp_path, options("lora"), "base", "0123")
    loaded, _ = luthier.load(model_folder("llama"))
    with pytest.raises(Refused, match="trained on a base with other weights"):
        luthier.Adapters(loaded).load("x", tmp_path)
    for wrong in (["x"], {"x": "a"}, {"x": float("nan")}):
        with pytest.raises(Refused, match="a mapping of names to numbers"):
            luthier.Adapters(loaded).use(wrong)  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize(
    "change", [{"base_hash": 5}, {"base_options": [1]}, {"base_options": {"num_layers": "x"}}]
)
def test_facts_of_another_type(
    model_folder: Callable[..., Path], tiny_model: Any, tmp_path: Path, change: dict[str, Any]
) -> None:
    model = tiny_model("llama")
    attach(model, options("lora"), seed=1)
    save_adapter(model, tmp_path, options("lora"), "base", None)
    path = tmp_path / FACTS
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(Refused, match="of another type than it was written with"):
        luthier.load(model_folder("llama"), adapter=tmp_path)


def test_merging_what_cannot_be_merged_is_refused_before_the_base_is_read(
    tiny_model: Any, tmp_path: Path
) -> None:
    model = tiny_model("llama")
    attach(model, options("reft"), seed=1)
    save_adapter(model, tmp_path / "a", options("reft"), "base", None)
    with pytest.raises(Refused, match=r"LUTHIER_REFT does is no change of a weight"):
        merge("no such base", str(tmp_path / "a"), str(tmp_path / "out"))


def test_the_public_functions_stay_functions(tmp_path: Path) -> None:
    for _ in range(2):
        with pytest.raises(Refused, match="no such file"):
            luthier.convert("nothing", str(tmp_path / "out"))
    assert callable(luthier.merge)


def test_edits_of_prompts_that_are_not_there(
    model_folder: Callable[..., Path], tmp_path: Path
) -> None:
    rows = [json.dumps({"text": f"the rain of day {i} is what the sun does"}) for i in range(8)]
    (tmp_path / "rows.json").write_text("\n".join(rows))
    base, data = model_folder("llama"), tmp_path / "rows.json"
    keys = {"adapter__method": "reft", "data__format": "text", "evaluate__every": "never"}
    with pytest.raises(Refused, match=r"no document .* has a prompt.*adapter\.positions=all"):
        finetune(tiny_config(base, data, tmp_path / "out", **keys))
    finetune(tiny_config(base, data, tmp_path / "out", **keys, adapter__positions="all"))


@pytest.mark.parametrize(
    ("name", "file", "change"),
    [
        ("lora", "lora_config.json", {"r": "eight"}),
        ("lora", "lora_config.json", {"r": 0}),
        ("lora", "lora_config.json", {"lora_alpha": None}),
        ("prefix", "prefix_config.json", {"num_hidden_layers": "two"}),
        ("loreft", "config.json", {"intervention_types": None}),
        ("loreft", "config.json", {"representations": "all"}),
        ("loreft", "config.json", {"position": "first"}),
    ],
)
def test_paddlenlp_folders_that_do_not_fit_together(
    tmp_path: Path, name: str, file: str, change: dict[str, Any]
) -> None:
    source = Path(__file__).parents[1] / "golden" / "data" / "paddlenlp_adapters"
    folder = shutil.copytree(source / name, tmp_path / name)
    path = folder / file
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(Refused, match="its files do not fit together"):
        luthier.convert(str(folder), str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()
