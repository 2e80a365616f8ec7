"""Several adapters on one base: loaded, switched, weighed and unloaded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from adapter_table import fill, options, run
from torch import Tensor

from luthier.adapters import adapters_of, attach, detach, fold_into, save_adapter, whole_parameters
from luthier.adapters.several import Adapters
from luthier.config import AdapterConfig
from luthier.errors import Refused

CONFIGS: dict[str, AdapterConfig] = {
    "law": options("lora"),
    "tone": AdapterConfig(method="lora", rank=2, targets=("q_proj", "down_proj")),
    "mora": AdapterConfig(method="mora", rank=2),
    "edit": AdapterConfig(method="reft", rank=2),
    "dora": AdapterConfig(method="lora", rank=2, dora=True),
    "head": AdapterConfig(method="lora", rank=2, targets="q_proj", modules_to_save=("norm",)),
    "virtual": AdapterConfig(method="prefix", num_prefix_tokens=2),
}


@pytest.fixture(scope="module")
def folders(tiny_model: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("adapters")
    for seed, (name, config) in enumerate(CONFIGS.items()):
        model = tiny_model("llama")
        attach(model, config, seed=1)
        fill(model, seed=seed)
        with torch.no_grad():
            for parameter in whole_parameters(model).values():
                parameter.mul_(1.5)
        save_adapter(model, root / name, config, "base", "0123")
    return {name: root / name for name in CONFIGS}


@pytest.fixture(scope="module")
def alone(tiny_model: Any, random_batch: Any, folders: dict[str, Path]) -> dict[str, Tensor]:
    """Logits of the base and of each adapter alone."""
    found = {"base": run(tiny_model("llama"), random_batch())}
    for name in CONFIGS:
        several = Adapters(tiny_model("llama"))
        several.load(name, folders[name])
        several.use(name)
        found[name] = run(several.model, random_batch())
    return found


@pytest.fixture
def several(tiny_model: Any, folders: dict[str, Path]) -> Adapters:
    found = Adapters(tiny_model("llama"))
    for name, folder in folders.items():
        found.load(name, folder, base_hash="0123")
    return found


def logits(several: Adapters, batch: Any) -> Tensor:
    return run(several.model, batch)


def test_switching(several: Adapters, alone: dict[str, Tensor], random_batch: Any) -> None:
    batch = random_batch()
    assert several.names == list(CONFIGS) and not several.active
    assert torch.equal(logits(several, batch), alone["base"])
    for name in [*CONFIGS, *reversed(CONFIGS), None, "law"]:
        several.use(name)
        assert torch.equal(logits(several, batch), alone[name or "base"]), name
        assert several.active == ({name: 1.0} if name else {})
    assert not any(p.requires_grad for p in several.model.parameters())


def test_a_weighted_sum(several: Adapters, alone: dict[str, Tensor], random_batch: Any) -> None:
    """What each adds to a layer's weight is added with its weight; 0 is none, 1 is the adapter alone."""
    batch, layer = random_batch(), "model.layers.1.mlp.down_proj"
    weight = several.model.get_submodule(layer).weight.clone()
    changes = {}
    for name in ("law", "tone", "mora"):
        several.use(name)
        changes[name] = adapters_of(several.model)[layer].fold(weight) - weight
    several.use({"law": 0.7, "tone": -0.5, "mora": 2.0})
    mixed = logits(several, batch)
    wanted = weight + 0.7 * changes["law"] - 0.5 * changes["tone"] + 2 * changes["mora"]
    fold_into(several.model)
    torch.testing.assert_close(several.model.get_submodule(layer).weight, wanted)
    torch.testing.assert_close(run(several.model, batch), mixed, rtol=1e-4, atol=1e-4)


def test_weights_of_nothing_and_all(
    several: Adapters, alone: dict[str, Tensor], random_batch: Any
) -> None:
    several.use({"law": 1.0, "tone": 0.0})
    torch.testing.assert_close(logits(several, random_batch()), alone["law"])
    several.use({"law": 0.0})
    torch.testing.assert_close(logits(several, random_batch()), alone["base"])


def test_unloading(several: Adapters, alone: dict[str, Tensor], random_batch: Any) -> None:
    several.use("head")
    several.unload("head")
    assert torch.equal(logits(several, random_batch()), alone["base"])
    assert "head" not in several.names
    with pytest.raises(Refused, match=r"using the adapter 'head'.*loaded are law"):
        several.use("head")
    with pytest.raises(Refused, match="unloading the adapter 'head'"):
        several.unload("head")
    several.use("tone")
    several.unload("law")
    assert torch.equal(logits(several, random_batch()), alone["tone"])


def test_the_one_that_is_there(
    tiny_model: Any, folders: dict[str, Path], random_batch: Any
) -> None:
    model = tiny_model("llama")
    attach(model, CONFIGS["law"], seed=1)
    fill(model, seed=9)
    before = run(model, random_batch())
    several = Adapters(model)
    assert several.names == ["default"] and several.active == {"default": 1.0}
    several.load("tone", folders["tone"])
    assert torch.equal(logits(several, random_batch()), before)  # loading changes nothing
    several.use("tone")
    several.use("default")
    assert torch.equal(logits(several, random_batch()), before)
    detach(model)


@pytest.mark.parametrize(
    ("weights", "why"),
    [
        ({"edit": 0.5}, "method=reft does more than add"),
        ({"law": 1, "dora": 1}, "dora=true does more than add"),
        ({"law": 1, "virtual": 1}, "method=prefix does more than add"),
        ({"law": 1, "head": 1}, "whole modules of its own"),
        ({"law": 1, "lwa": 1}, "did you mean 'law'"),
    ],
)
def test_sums_without_a_meaning(
    several: Adapters, alone: dict[str, Tensor], random_batch: Any, weights: Any, why: str
) -> None:
    several.use("law")
    with pytest.raises(Refused, match=why):
        several.use(weights)
    assert torch.equal(logits(several, random_batch()), alone["law"])


def test_names_and_folders(
    several: Adapters, folders: dict[str, Path], alone: dict[str, Tensor], random_batch: Any
) -> None:
    several.use("law")
    with pytest.raises(Refused, match="an adapter of this name is loaded"):
        several.load("law", folders["tone"])
    with pytest.raises(Refused, match="no such folder"):
        several.load("other", "nowhere")
    with pytest.raises(Refused, match="other weights"):
        several.load("other", folders["tone"], base_hash="9999")
    assert torch.equal(logits(several, random_batch()), alone["law"])
