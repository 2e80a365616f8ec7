"""What a model of `zoo/` differs in from the golden numbers of its original code."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from luthier.models.load import quiet

ROOT = (
    Path(os.environ.get("LUTHIER_GOLDEN", Path(__file__).parents[1] / "golden" / "data")) / "models"
)
# absolute for logits and hidden states (of a size of 4 to 17) and loss, relative to the largest for gradients
TOLERANCE = {"logits": 1e-4, "hidden": 1e-4, "loss": 1e-5, "grads": 1e-4}


def folders(family: str) -> list[Any]:
    """The golden folders of a family as parameters of a test; one that is skipped where there are none."""
    found = [file.parent for file in sorted((ROOT / family).glob("*/golden.json"))]
    if not found:
        reason = pytest.mark.skip(reason=f"{ROOT / family} is absent")
        return [pytest.param(None, id="absent", marks=reason)]
    return [pytest.param(folder, id=folder.name) for folder in found]


def tokenizer_golden(family: str) -> dict[str, Any]:
    file = ROOT / family / "tokenizer" / "tokenizer_golden.json"
    if not file.is_file():
        pytest.skip(f"{file} is absent")
    return json.loads(file.read_text("utf-8"))


def load(cls: Any, folder: Path, attention: str = "sdpa", **overrides: Any) -> Any:
    with quiet():
        config = cls.config_class.from_pretrained(folder, **overrides)
        return cls.from_pretrained(
            folder, config=config, dtype=torch.float32, attn_implementation=attention
        )


def faults(
    cls: Any,
    folder: Path,
    modules: Callable[[Any], dict[str, nn.Module]],
    attention: str = "sdpa",
    change: Callable[[Any], None] = lambda model: None,
) -> Iterator[str]:
    """Names of what is off. `modules(model)`: name of a hidden state in the file -> the module that gives it;
    `change(model)` is applied to each model after loading."""
    tensors = load_file(folder / "golden.safetensors")
    meta = json.loads((folder / "golden.json").read_text("utf-8"))
    for case in meta["cases"]:
        if "logits" not in case["outputs"]:
            continue  # multiple choice, which has a test of its own
        model = load(cls, folder, attention, **case.get("config_overrides", {}))
        change(model)
        yield from _case(model, case, tensors, modules(model))
    for record in meta["generation"]:
        model = load(cls, folder, attention, **record.get("config_overrides", {}))
        change(model)
        inputs = {key: tensors[value] for key, value in record["inputs"].items()}
        for cache in (True, False):
            wanted = record["new_ids"]
            if not cache:
                wanted = record.get("new_ids_without_cache", wanted)
            if greedy(model, inputs, record["max_new_tokens"], cache) != wanted:
                yield f"{record['name']}: greedy ids, cache={cache}"


def greedy(model: Any, inputs: dict[str, Tensor], count: int, cache: bool) -> list[list[int]]:
    with quiet(), torch.no_grad():
        out = model.eval().generate(
            **inputs,
            max_new_tokens=count,
            do_sample=False,
            use_cache=cache,
            pad_token_id=0,
            eos_token_id=None,
        )
    return out[:, inputs["input_ids"].shape[1] :].tolist()


def _case(
    model: Any, case: dict[str, Any], tensors: dict[str, Tensor], modules: dict[str, nn.Module]
) -> Iterator[str]:
    name, outputs = case["name"], case["outputs"]
    seen: dict[str, Tensor] = {}
    hooks = [
        module.register_forward_hook(lambda m, i, out, key=key: seen.update({key: out}))
        for key, module in modules.items()
    ]
    model.train(case["mode"] == "train").zero_grad()
    out = model(**{key: tensors[value] for key, value in case["inputs"].items()})
    logits = out.logits.detach()
    for hook in hooks:
        hook.remove()
    valid = torch.ones(logits.shape[:2], dtype=torch.bool)
    if "inputs_valid_mask" in case:
        valid = tensors[case["inputs_valid_mask"]].bool()

    def off(kind: str, error: Tensor | float) -> bool:
        return not float(error) <= TOLERANCE[kind]  # also for NaN

    if off("logits", (logits - tensors[outputs["logits"]])[valid].abs().max()):
        yield f"{name}: logits"
    for key, value in outputs.get("hidden", {}).items():
        if off("hidden", (seen[key].detach() - tensors[value])[valid].abs().max()):
            yield f"{name}: {key}"
    if "loss" in outputs:
        if off("loss", abs(out.loss.detach() - tensors[outputs["loss"]])):
            yield f"{name}: loss"
        out.loss.backward()
        parameters = dict(model.named_parameters())
        for key, value in outputs.get("grads", {}).items():
            grad = parameters.get(key, parameters.get(f"glm.{key}")).grad  # pyright: ignore[reportOptionalMemberAccess]
            if grad is None or off(
                "grads", (grad - tensors[value]).abs().max() / tensors[value].abs().max()
            ):
                yield f"{name}: gradient of {key}"
