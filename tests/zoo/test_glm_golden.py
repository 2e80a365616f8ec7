"""GLM against numbers of its original code, and mistakes that these must show."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F
from zoo_golden import faults, folders, load

import luthier.models.attention  # noqa: F401 - registers the attention function
from luthier.models.zoo import glm
from luthier.models.zoo.glm import GLMForConditionalGeneration


def modules(model: Any) -> dict[str, nn.Module]:
    stack = model.glm.transformer
    layers = {f"layer.{i}": layer for i, layer in enumerate(stack.layers)}
    return {"embed": stack.embedding_dropout, "final_norm": stack.final_layernorm} | layers


@pytest.mark.parametrize("attention", ["eager", "luthier"])
@pytest.mark.parametrize("folder", folders("glm"))
def test_glm_as_the_original(folder: Path, attention: str) -> None:
    assert list(faults(GLMForConditionalGeneration, folder, modules, attention)) == []


@pytest.mark.parametrize("folder", folders("glm"))
def test_multiple_choice(folder: Path) -> None:
    """Spans at one blank: summed log-probabilities of each, from one row with a mask of its own."""
    tensors = load_file(folder / "golden.safetensors")
    model = load(GLMForConditionalGeneration, folder).eval()
    cases = [
        c
        for c in json.loads((folder / "golden.json").read_text("utf-8"))["cases"]
        if "choice_logits" in c["outputs"]
    ]
    for case in cases:
        inputs = {k: tensors[v] for k, v in case["inputs"].items() if k != "labels"}
        with torch.no_grad():
            table = model(**inputs).logits.log_softmax(-1)
        ours = torch.tensor(
            [
                [float(table[i, where, ids].sum()) for ids, where in zip(*choices, strict=True)]
                for i, choices in enumerate(
                    zip(case["choice_ids"], case["choice_indices"], strict=True)
                )
            ]
        )
        # a sum over up to six tokens, each within the 1e-4 of the logits
        assert (ours - tensors[case["outputs"]["choice_logits"]]).abs().max() < 6e-4
        loss = F.cross_entropy(ours, tensors[case["inputs"]["labels"]])
        assert abs(float(loss) - case["loss"]) < 6e-4


# ---- mistakes


def tanh_gelu(patch: Any) -> None:
    stand_in = SimpleNamespace(**vars(F) | {"gelu": lambda x: F.gelu(x, approximate="tanh")})
    patch.setattr(glm, "F", stand_in)


def shifted_loss(patch: Any) -> None:
    def loss(logits: Tensor, labels: Tensor, ignore_index: int) -> Tensor:
        # rows follow each other: the border between them is wrong too, which is a mistake as well
        return F.cross_entropy(logits[:-1], labels[1:], ignore_index=ignore_index)

    patch.setattr(glm, "F", SimpleNamespace(**vars(F) | {"cross_entropy": loss}))


def causal_context(patch: Any) -> None:
    right = glm.visible
    patch.setattr(glm, "visible", lambda mask, *rest: right(mask, *rest) & right(None, *rest))


def number_of_leading_tokens_off_by_one(patch: Any) -> None:
    right = glm.visible

    def visible(mask: Any, *rest: Any) -> Tensor:
        return right(mask + 1 if mask is not None and mask.ndim < 2 else mask, *rest)

    patch.setattr(glm, "visible", visible)


def hidden_means_one(patch: Any) -> None:
    right = glm.visible

    def visible(mask: Any, *rest: Any) -> Tensor:
        seen = right(mask, *rest)
        return ~seen if mask is not None and mask.ndim == 4 else seen

    patch.setattr(glm, "visible", visible)


def residual_after_the_norm(patch: Any) -> None:
    def forward(self: Any, hidden_states: Tensor, **kwargs: Any) -> Tensor:
        x = self.input_layernorm(hidden_states)
        h = x + self.attention(x, **kwargs)[0]
        return h + self.mlp(self.post_attention_layernorm(h))

    patch.setattr(glm.GLMBlock, "forward", forward)


def epsilon(patch: Any) -> None:
    patch.setattr(glm, "EPSILON", 1e-3)


def one_axis(patch: Any) -> None:
    right = glm.GLMModel.forward

    def forward(self: Any, *args: Any, position_ids: Any = None, **kwargs: Any) -> Any:
        if position_ids is not None:
            position_ids = position_ids[:, 0]
        return right(self, *args, position_ids=position_ids, **kwargs)

    patch.setattr(glm.GLMModel, "forward", forward)


def axes_swapped(patch: Any) -> None:
    right = glm.GLMModel.forward

    def forward(self: Any, *args: Any, position_ids: Any = None, **kwargs: Any) -> Any:
        swapped = None if position_ids is None else position_ids.flip(1)
        return right(self, *args, position_ids=swapped, **kwargs)

    patch.setattr(glm.GLMModel, "forward", forward)


def heads_each_with_its_keys(model: Any) -> None:
    """The fused projection read as [N, 3, d]."""
    heads = model.config.num_attention_heads
    for layer in model.glm.transformer.layers:
        for p in layer.attention.query_key_value.parameters():
            p.data = p.data.unflatten(0, (heads, 3, -1)).transpose(0, 1).flatten(0, 2).contiguous()


def head_of_its_own(model: Any) -> None:
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().clone())


MISTAKES = [
    tanh_gelu,
    shifted_loss,
    causal_context,
    number_of_leading_tokens_off_by_one,
    hidden_means_one,
    residual_after_the_norm,
    epsilon,
    one_axis,
    axes_swapped,
]


@pytest.mark.parametrize("folder", folders("glm"))
@pytest.mark.parametrize("mistake", MISTAKES, ids=lambda f: f.__name__)
def test_a_mistake_is_caught(mistake: Any, folder: Path, monkeypatch: Any) -> None:
    mistake(monkeypatch)
    assert next(faults(GLMForConditionalGeneration, folder, modules), None)


@pytest.mark.parametrize("folder", folders("glm"))
@pytest.mark.parametrize(
    "change", [heads_each_with_its_keys, head_of_its_own], ids=lambda f: f.__name__
)
def test_a_wrong_layout_is_caught(change: Any, folder: Path) -> None:
    assert next(faults(GLMForConditionalGeneration, folder, modules, change=change), None)
