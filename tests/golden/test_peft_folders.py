"""Adapter folders saved by PEFT give PEFT's logits on our models, with adapters and merged."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from golden_cases import ROOT, VARIABLE, skip_absent
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from luthier.adapters import fold_into, load_adapter
from luthier.errors import Refused
from luthier.models.attention import install

FOLDER = ROOT / "peft" / "peft-adapters"
SUPPORTED = {"LOKR", "LORA", "PREFIX_TUNING", "VERA"}
TOLERANCE = {"rtol": 1e-3, "atol": 1e-4}  # the spec's for whole models


def folders() -> list[Any]:
    path = FOLDER / "manifest.json"
    if not path.is_file():
        mark = skip_absent(path)
        return [pytest.param("", {}, id="absent", marks=mark)]
    params = []
    for name, entry in json.loads(path.read_text("utf-8"))["adapters"].items():
        marks = ()
        if "expected" not in entry:
            marks = pytest.mark.skip(reason="a stage of a conversion, no test target")
        elif not (FOLDER / entry["folder"]).is_dir() or not (FOLDER / entry["base"]).is_dir():
            marks = pytest.mark.skip(reason=f"{name} or its base is absent: see {VARIABLE}")
        params.append(pytest.param(name, entry, id=name, marks=marks))
    return params


@pytest.mark.parametrize(("name", "entry"), folders())
def test_folder(name: str, entry: dict[str, Any]) -> None:
    folder = FOLDER / entry["folder"]
    fields = json.loads((folder / "adapter_config.json").read_text("utf-8"))
    model = AutoModelForCausalLM.from_pretrained(FOLDER / entry["base"]).eval()
    install(model, "auto")
    if fields["peft_type"] not in SUPPORTED:
        with pytest.raises(Refused, match=fields["peft_type"]):
            load_adapter(model, folder)
        pytest.skip(f"refused by name; {fields['peft_type']} folder {name} is for a later method")
    expected = load_file(folder / entry["expected"])
    if entry["base"] == "base/":  # logits_base are the original model's
        close(logits(model, expected), expected["logits_base"], expected)
    load_adapter(model, folder)
    close(logits(model, expected), expected["logits_adapter"], expected)
    if entry["has_merged"]:
        fold_into(model)
        close(logits(model, expected), expected["logits_merged"], expected)


def logits(model: Any, expected: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        return model(
            input_ids=expected["input_ids"], attention_mask=expected["attention_mask"]
        ).logits


def close(ours: Tensor, theirs: Tensor, expected: dict[str, Tensor]) -> None:
    seen = expected["attention_mask"].bool()
    torch.testing.assert_close(ours[seen], theirs[seen], **TOLERANCE)
