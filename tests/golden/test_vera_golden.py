"""VeRA against PEFT's numbers (shared random projections) and PaddleNLP's (a layer's own, from the SVD)."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from golden_cases import adapted, cases, compare, layer_of, results, tensors_of

from luthier.adapters import attach
from luthier.config import AdapterConfig


@pytest.mark.parametrize("case", cases("vera", prefix="hf."))
def test_paper(case: dict[str, Any]) -> None:
    tensors, hyper = tensors_of(case), case["hyper"]
    options = {"method": "vera", "rank": hyper["r"], "d_initial": hyper["d_initial"]}
    options["projection_seed"] = hyper["projection_prng_key"]
    layer = layer_of(tensors, paddle=False)
    model = torch.nn.ModuleDict({"layer": layer})
    adapter: Any = attach(model, AdapterConfig(**options), seed=0)["layer"]
    # drawn as PEFT draws them, bit for bit
    assert torch.equal(adapter.projections.A, tensors["vera_A"])
    assert torch.equal(adapter.projections.B, tensors["vera_B"])
    assert (adapter.vera_lambda_b == hyper["lambda_b_init"]).all()
    assert (adapter.vera_lambda_d == hyper["lambda_d_init"]).all()
    with torch.no_grad():
        adapter.vera_lambda_b.copy_(tensors["lambda_b"])
        adapter.vera_lambda_d.copy_(tensors["lambda_d"])
    ours = results(model, adapter, tensors)
    for part in "bd":
        ours[f"grad_lambda_{part}"] = ours.pop(f"grad_vera_lambda_{part}")
    compare(ours, tensors, case)


@pytest.mark.parametrize("case", cases("vera", prefix="paddlenlp."))
def test_paddlenlp(case: dict[str, Any]) -> None:
    tensors, hyper = tensors_of(case), case["hyper"]
    options = {"method": "vera", "form": "paddlenlp", "rank": hyper["r"]}
    options["alpha"] = hyper["vera_alpha"]
    model, adapter = adapted(layer_of(tensors, paddle=True), **options)
    if hyper["pissa_init"]:
        # signs are free: the product is compared, then theirs are used
        with torch.no_grad():
            adapter.initialise(model["layer"], torch.Generator())
        product = adapter.vera_A.t() @ adapter.vera_B0.t()
        torch.testing.assert_close(product, tensors["vera_AB0"], **case["tolerance"])
        sign = (adapter.vera_A * tensors["vera_A"].t()).sum(1).sign()
        b0 = adapter.vera_B0 * sign
    else:
        b0 = torch.zeros_like(adapter.vera_B0)
    with torch.no_grad():
        adapter.vera_A.copy_(tensors["vera_A"].t())
        adapter.vera_B0.copy_(b0)
        adapter.vera_B.copy_(tensors["vera_B"].t())
        adapter.vera_lambda_b.copy_(tensors["vera_b"])
        adapter.vera_lambda_d.copy_(tensors["vera_d"])
    ours = results(model, adapter, tensors)
    ours["grad_vera_B"] = ours["grad_vera_B"].t()
    for part in "bd":
        ours[f"grad_vera_{part}"] = ours.pop(f"grad_vera_lambda_{part}")
    compare(ours, tensors, case)
