"""Prefix tuning of whole models against PaddleNLP's numbers, in both forms: positions from 0 and from P."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from golden_cases import FOLDER, cases
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

import luthier.models.attention as seam
from luthier.adapters import adapters_of, attach
from luthier.config import AdapterConfig

# our parameter -> PaddleNLP's, whose weights are [in, out]
NETWORK = {
    "embedding": "embedding",
    "linear1": "proj1_weight",
    "bias1": "proj1_bias",
    "linear2": "proj2_weight",
    "bias2": "proj2_bias",
}


@pytest.mark.parametrize("form", ["paddlenlp", "paper"])
@pytest.mark.parametrize("case", cases("prefix"))
def test_model(case: dict[str, Any], form: str) -> None:
    stored = load_file(FOLDER / case["file"])
    tensors = {name: stored[entry["key"]] for name, entry in case["tensors"].items()}
    hyper = case["hyper"]
    model = base_of(hyper, tensors)
    ids = tensors["input_ids"]
    close = {**case["tolerance"]}
    torch.testing.assert_close(model(input_ids=ids).logits, tensors["base_logits"], **close)
    options = {
        "method": "prefix",
        "form": form,
        "num_prefix_tokens": hyper["num_prefix_tokens"],
        "prefix_projection": hyper["prefix_projection"],
        "projection_size": hyper["prefix_projection_hidden_size"],
    }
    attach(model, AdapterConfig.model_validate(options), seed=0)
    adapter: Any = adapters_of(model)[""]
    own = dict(adapter.named_parameters())
    with torch.no_grad():
        for name, parameter in own.items():
            parameter.copy_(turned(tensors[NETWORK[name]], name, hyper))

    logits = model(input_ids=ids).logits
    (logits * tensors["grad_logits"]).sum().backward()
    kept = adapter.kept.layers
    for which, name in enumerate(("prefix_keys", "prefix_values")):
        ours = torch.stack([kept[i][which] for i in range(hyper["num_hidden_layers"])])
        torch.testing.assert_close(ours, tensors[name][:, 0], **close)
    if form == "paper":
        torch.testing.assert_close(logits, tensors["logits_offset_positions"], **close)
        return
    torch.testing.assert_close(logits, tensors["logits"], **close)
    for name, parameter in own.items():
        expected = turned(tensors[f"grad_{NETWORK[name]}"], name, hyper)
        assert parameter.grad is not None
        torch.testing.assert_close(
            parameter.grad, expected, **close, msg=lambda m, n=name: f"{n}: {m}"
        )


def base_of(hyper: dict[str, Any], tensors: dict[str, Tensor]) -> Any:
    names = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "rms_norm_eps")
    names += ("num_attention_heads", "num_key_value_heads")
    fields = {name: hyper[name] for name in names}
    fields["rope_parameters"] = {"rope_type": "default", "rope_theta": hyper["rope_theta"]}
    config = AutoConfig.for_model(hyper["arch"], **fields, tie_word_embeddings=False)
    model = AutoModelForCausalLM.from_config(config)
    model.load_state_dict(
        {n.removeprefix("base/"): t for n, t in tensors.items() if n.startswith("base/")}
    )
    seam.install(model, "auto")
    return model.eval()


def turned(tensor: Tensor, name: str, hyper: dict[str, Any]) -> Tensor:
    """PaddleNLP's tensor in our layout. Its features are in the order (kind, layer, head, dim)."""
    layers = hyper["num_hidden_layers"]
    last = {False: "embedding", True: ("linear2", "bias2")}[hyper["prefix_projection"]]
    if name in last:
        tensor = tensor.unflatten(-1, (2, layers, -1)).transpose(-3, -2).flatten(-3)
    return tensor.t() if name.startswith("linear") else tensor
