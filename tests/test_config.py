"""The config tree: documented, frozen, bounded, and no key that nothing reads."""

from __future__ import annotations

import ast
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel, ValidationError

from luthier.config import DataPart, RunConfig
from luthier.configkeys import KEYS, SECTIONS

ROOT = Path(__file__).resolve().parents[1] / "luthier"
TREE = {"model": {"path": "m"}, "data": {"path": "d"}, "output": "o"}


def make(**sections: Any) -> RunConfig:
    tree = {name: dict(value) if isinstance(value, dict) else value for name, value in TREE.items()}
    for name, value in sections.items():
        tree[name] = {**tree.get(name, {}), **value} if isinstance(value, dict) else value
    return RunConfig.model_validate(tree)


@pytest.mark.parametrize("key", KEYS)
def test_every_key_is_documented(key: str) -> None:
    text = KEYS[key].description or ""
    assert len(text) >= 10 and text.strip() == text and text.endswith((".", "...")), text


# ---- every key is read somewhere


def reads(path: Path) -> set[tuple[str, str]]:
    """(owner, attribute) of every attribute that a file reads: `config.optim.lr` -> (optim, lr)."""
    found: set[tuple[str, str]] = set()
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
            owner = node.value
            name = owner.attr if isinstance(owner, ast.Attribute) else getattr(owner, "id", "")
            found.add((name, node.attr))
        elif isinstance(node, ast.Call) and getattr(node.func, "id", "") == "getattr":
            owner, name = node.args[:2]
            owned = owner.attr if isinstance(owner, ast.Attribute) else getattr(owner, "id", "")
            found.add((owned, str(getattr(name, "value", ""))))
    return found


def derived() -> dict[tuple[str, str], str]:
    """(section, key) that a property of the config reads -> name of the property."""
    found: dict[tuple[str, str], str] = {}
    tree = ast.parse((ROOT / "config.py").read_text("utf-8"))
    for cls in (node for node in tree.body if isinstance(node, ast.ClassDef)):
        for function in (node for node in cls.body if isinstance(node, ast.FunctionDef)):
            if any(getattr(d, "id", "") == "property" for d in function.decorator_list):
                for node in ast.walk(function):
                    if isinstance(node, ast.Attribute):
                        owner = node.value
                        name = getattr(owner, "attr", getattr(owner, "id", ""))
                        found[cls.name if name == "self" else name, node.attr] = function.name
    return found


UNREAD: set[str] = set()
SKIPPED = {"config", "configfile", "configkeys", "configtext", "paddlenlp", "paddlenlp_arguments"}


def test_every_key_is_read_somewhere() -> None:
    files = [p for p in ROOT.rglob("*.py") if p.stem not in SKIPPED]
    seen = set().union(*(reads(path) for path in files))
    properties = derived()
    unread = []
    for key in KEYS:
        section, _, name = key.rpartition(".")
        owners = {section, "config", f"{section}_config", "chosen", "options", "self"}
        through = {
            properties.get((section, name)),
            properties.get((SECTIONS[section].__name__, name)) if section else None,
        } - {None}
        direct = any((owner, name) in seen for owner in owners)
        if not direct and not any(attribute in through for _, attribute in seen):
            unread.append(key)
    assert set(unread) == UNREAD


# ---- what the classes refuse


@pytest.mark.parametrize("cls", [RunConfig, DataPart, *SECTIONS.values()])
def test_unknown_keys_are_refused(cls: type[BaseModel]) -> None:
    with pytest.raises(ValidationError, match="Extra inputs"):
        cls.model_validate({"colour": "red"})


def test_a_config_cannot_be_changed() -> None:
    config = make()
    with pytest.raises(ValidationError, match="frozen"):
        config.train.seed = 1  # pyright: ignore[reportAttributeAccessIssue]
    with pytest.raises(ValidationError, match="frozen"):
        config.output = "x"  # pyright: ignore[reportAttributeAccessIssue]


OUT_OF_BOUNDS = {
    "data.length": [0, 1, -5],
    "data.source_length": [0],
    "data.workers": [-1, 257],
    "data.validation_share": [-0.1, 1],
    "adapter.rank": [0, -1],
    "adapter.alpha": [0, -2],
    "adapter.dropout": [-0.1, 1],
    "model.num_layers": [0],
    "optim.lr": [0, -1, 101, float("nan"), float("inf")],
    "optim.betas": [[0.9], [0.9, 1.0], [-0.1, 0.9]],
    "optim.eps": [0, -1e-8],
    "optim.weight_decay": [-0.1],
    "optim.clip": [-1],
    "optim.warmup": [-1, 1.5],
    "train.steps": [0, -1],
    "train.epochs": [0, -1],
    "train.tokens": [0],
    "train.batch": [0, -8],
    "train.micro_batch": [0],
    "train.accumulation": [0],
    "train.seed": [-1],
    "evaluate.every": [0, "sometimes"],
    "evaluate.rows": [0],
    "evaluate.micro_batch": [0],
    "evaluate.max_new_tokens": [0],
    "evaluate.top_k": [-1],
    "evaluate.top_p": [0, 1.1],
    "evaluate.temperature": [-0.5],
    "checkpoint.every": [0, "daily"],
    "checkpoint.keep": [0],
    "checkpoint.best": ["beauty"],
    "log.every": [0],
    "log.sinks": [["visualdl"]],
}


@pytest.mark.parametrize(("key", "value"), [(k, v) for k, vs in OUT_OF_BOUNDS.items() for v in vs])
def test_out_of_bounds(key: str, value: Any) -> None:
    section, name = key.split(".")
    extra: dict[str, Any] = {"method": "lora"} if section == "adapter" else {}
    with pytest.raises(ValidationError):
        make(**{section: {**extra, name: value}})


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"train": {"batch": 8, "micro_batch": 3}}, "4 would divide it|2 would divide it"),
        ({"train": {"batch": 8, "micro_batch": 2, "accumulation": 4}}, "give one"),
        ({"train": {"accumulation": 4}}, "needs train.micro_batch"),
        ({"data": {"lazy": True}}, "needs train.steps or train.tokens"),
        (
            {"data": {"lazy": True, "validation_share": 0.1}, "train": {"steps": 1}},
            "validation_path",
        ),
        ({"checkpoint": {"best": "bleu4"}}, "needs evaluate.generate"),
        ({"optim": {"schedule": "linear", "power": 2.0}}, "optim.power has no meaning"),
        ({"optim": {"schedule": "wsd"}}, "needs optim.decay_start"),
        ({"optim": {"schedule": "anneal"}}, "needs optim.period"),
        ({"optim": {"lr": 1e-4, "lr_end": 1e-3}}, "above optim.lr"),
        ({"model": {"autocast": "bfloat16"}}, "needs model.dtype=float32"),
        ({"adapter": {"rank": 4}}, "adapter.rank has no meaning for adapter.method=none"),
    ],
)
def test_impossible_combinations(sections: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        make(**sections)


# ---- defaults and derived values


def test_defaults_of_the_contract() -> None:
    config = make()
    assert (config.train.epochs, config.batch, config.micro_batch) == (3, 8, 8)
    assert (config.lr, config.optim.schedule, config.optim.clip) == (5e-5, "linear", 1.0)
    assert (config.data.length, config.data.packing, config.data.overlong) == (2048, "best", "cut")
    assert (config.checkpoint.keep, config.checkpoint.best) == (2, "loss")
    assert (config.checkpoint.resume, config.train.seed) == ("never", 42)


def test_the_learning_rate_depends_on_the_method() -> None:
    assert make(adapter={"method": "lora"}).lr == 3e-4
    assert make(adapter={"method": "lora"}, optim={"lr": 1e-5}).lr == 1e-5


def test_alpha_is_twice_the_rank() -> None:
    assert make(adapter={"method": "lora", "rank": 16}).adapter.scale_alpha == 32
    assert make(adapter={"method": "lora", "rank": 16, "alpha": 4}).adapter.scale_alpha == 4


def test_batch_follows_accumulation() -> None:
    config = make(train={"micro_batch": 4, "accumulation": 3})
    assert (config.batch, config.micro_batch, config.evaluate_micro_batch) == (12, 4, 4)


@pytest.mark.parametrize(
    ("short", "name"), [("bf16", "bfloat16"), ("fp16", "float16"), ("fp32", "float32")]
)
def test_short_names_of_types(short: str, name: str) -> None:
    assert make(model={"dtype": short}).model.dtype == name
