"""MoRA against its authors' numbers (nn.Linear) and PaddleNLP's (weights [in, out], our Conv1D)."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from golden_cases import adapted, cases, compare, layer_of, results, tensors_of


@pytest.mark.parametrize("case", cases("mora"))
def test_layer(case: dict[str, Any]) -> None:
    tensors, hyper = tensors_of(case), case["hyper"]
    paddle = case["id"].startswith("paddlenlp")
    form = "paddlenlp" if paddle else f"type{hyper['mora_type']}"
    model, adapter = adapted(layer_of(tensors, paddle), method="mora", form=form, rank=hyper["r"])
    assert adapter.mora_M.shape == (hyper["new_r"], hyper["new_r"])
    with torch.no_grad():
        adapter.mora_M.copy_(tensors["lora_A"])
    ours = results(model, adapter, tensors)
    ours["grad_lora_A"] = ours.pop("grad_mora_M")
    ours["merged_weight_from_forward"] = ours.pop("merged_weight")
    compare(ours, tensors, case)
