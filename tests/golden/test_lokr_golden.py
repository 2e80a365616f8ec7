"""LoKr against numbers of PEFT, PaddleNLP and LyCORIS, and the table of how dimensions are split."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from golden_cases import FOLDER, VARIABLE, adapted, cases, compare, layer_of, results, tensors_of

from luthier.adapters.lokr import split

TABLE = FOLDER / "lokr_factorization.json"
ALL = cases("lokr")


@pytest.mark.skipif(not TABLE.is_file(), reason=f"{TABLE} is absent: see {VARIABLE}")
def test_splits() -> None:
    for dimension, pairs in json.loads(TABLE.read_text("utf-8"))["table"].items():
        for factor, pair in pairs.items():
            assert split(int(dimension), int(factor)) == tuple(pair), (dimension, factor)


@pytest.mark.parametrize("case", cases("lokr", prefix="hf.") + cases("lokr", prefix="paddlenlp."))
def test_layer(case: dict[str, Any]) -> None:
    tensors, hyper = tensors_of(case), case["hyper"]
    if paddle := case["id"].startswith("paddlenlp"):
        rank, alpha, factor = hyper["lokr_dim"], hyper["lokr_alpha"] or None, hyper["factor"]
    else:
        rank, alpha, factor = hyper["r"], hyper["alpha"], hyper["decompose_factor"]
    options = {"form": "paddlenlp" if paddle else "peft", "rank": rank, "alpha": alpha}
    options |= {"factor": factor, "decompose_both": hyper["decompose_both"]}
    model, adapter = adapted(layer_of(tensors, paddle), method="lokr", **options)
    fill(adapter, tensors)
    delta = adapter.update()
    ours = results(model, adapter, tensors)
    ours["delta_weight"] = delta.t() if paddle else delta
    compare(ours, tensors, case)


@pytest.mark.parametrize("case", cases("lokr", prefix="lycoris."))
def test_lycoris(case: dict[str, Any]) -> None:
    """On the weights and inputs of PaddleNLP's case of the same number."""
    same = case["id"].replace("lycoris", "paddlenlp")
    tensors = next(tensors_of(p.values[0]) for p in ALL if p.id == same)
    hyper = case["hyper"]
    options = {"form": "lycoris", "rank": hyper["lora_dim"], "alpha": hyper["alpha"]}
    options |= {"factor": hyper["factor"], "decompose_both": hyper["decompose_both"]}
    model, adapter = adapted(layer_of(tensors, paddle=True), method="lokr", **options)
    fill(adapter, tensors)
    compare({"y": model["layer"](tensors["x"]).detach()}, tensors_of(case), case)


def fill(adapter: Any, tensors: dict[str, torch.Tensor]) -> None:
    with torch.no_grad():
        for name, parameter in adapter.named_parameters():
            parameter.copy_(tensors[name])
