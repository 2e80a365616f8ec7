"""ChatGLM-6B and ChatGLM2-6B against numbers of their original code, and mistakes that these must show.

Folders under LUTHIER_GOLDEN/models are discovered. `faults` runs all cases of one folder and names what is
off; each mutation of the code must make it name something.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import GenerationMixin
from zoo_golden import ROOT
from zoo_golden import faults as faults_of
from zoo_golden import folders as folders_of
from zoo_golden import load as load_as

from luthier.models.attention import NAME
from luthier.models.zoo import chatglm, chatglm2
from luthier.models.zoo.chatglm import ChatGLMForCausalLM, position_ids_of, visible
from luthier.models.zoo.chatglm2 import ChatGLM2ForCausalLM

CLASSES: dict[str, Any] = {"chatglm": ChatGLMForCausalLM, "chatglm2": ChatGLM2ForCausalLM}
BOTH = [folder for family in CLASSES for folder in folders_of(family)]


def load(folder: Path, attention: str) -> Any:
    return load_as(CLASSES[folder.parent.name], folder, attention)


def modules(model: Any) -> dict[str, nn.Module]:
    """Name of a hidden state in the golden file -> module whose output it is."""
    base = model.transformer
    inner = getattr(base, "encoder", base)
    named = {f"layer.{i}": layer for i, layer in enumerate(inner.layers)}
    return {"embed": model.get_input_embeddings(), "final_norm": inner.final_layernorm} | named


def faults(folder: Path, attention: str = "sdpa") -> Iterator[str]:
    """What differs from the golden numbers of one folder."""
    return faults_of(CLASSES[folder.parent.name], folder, modules, attention)


@pytest.mark.parametrize("attention", ["eager", "sdpa", NAME])
@pytest.mark.parametrize("folder", BOTH)
def test_as_the_original(folder: Path, attention: str) -> None:
    assert list(faults(folder, attention)) == []


@pytest.mark.parametrize("folder", BOTH)
def test_by_hand_without_cache(folder: Path) -> None:
    """Each token from a forward over all ids so far, with what the model makes of ids alone."""
    tensors = load_file(folder / "golden.safetensors")
    model = load(folder, "sdpa").eval()
    for record in json.loads((folder / "golden.json").read_text("utf-8"))["generation"]:
        ids = tensors[record["inputs"]["input_ids"]]
        if len(ids) > 1:
            continue
        start = ids.shape[1]
        for _ in range(record["max_new_tokens"]):
            with torch.no_grad():
                ids = torch.cat([ids, model(ids).logits[:, -1:].argmax(-1)], dim=1)
        assert ids[:, start:].tolist() == record["new_ids"]


@pytest.mark.parametrize("folder", folders_of("chatglm"))
def test_mask_and_positions_from_ids(folder: Path) -> None:
    tensors = load_file(folder / "golden.safetensors")
    config = load(folder, "sdpa").config
    checked = 0
    for case in json.loads((folder / "golden.json").read_text("utf-8"))["cases"]:
        ids, built = tensors[case["inputs"]["input_ids"]], case["model_built"]
        if isinstance(built, str):  # the same as the explicit inputs
            built = case["inputs"]
        positions = position_ids_of(ids, config)
        assert torch.equal(positions, tensors[built["position_ids"]])
        hidden = tensors[built["attention_mask"]].bool()
        assert torch.equal(~visible(positions, 0, None), hidden.expand(len(ids), -1, -1, -1))
        if "inputs_valid_mask" in case:  # padding on the left, as the original's tokenizer counts
            real = tensors[case["inputs_valid_mask"]]
            given = tensors[case["inputs"]["position_ids"]]
            assert torch.equal(position_ids_of(ids, config, real), given)
            assert not torch.equal(positions, given)
        checked += 1
    assert checked


# ---- mistakes


def without_context(patch: Any) -> None:
    patch.setattr(chatglm, "context_of", lambda positions: torch.zeros_like(positions[:, 0]) > 0)


def sop_in_the_context(patch: Any) -> None:
    patch.setattr(chatglm, "context_of", lambda positions: positions[:, 1] <= 1)


def alpha_of_the_depth(patch: Any) -> None:
    patch.setattr(chatglm, "ALPHA", math.sqrt(2 * 3))


def residual_before_the_norm(patch: Any) -> None:
    def forward(self: Any, x: Tensor, **kwargs: Any) -> Tensor:
        x = chatglm.residual(x, self.attention(self.input_layernorm(x), **kwargs)[0])
        return chatglm.residual(x, self.mlp(self.post_attention_layernorm(x)))

    patch.setattr(chatglm.ChatGLMBlock, "forward", forward)


def exact_frequencies(patch: Any) -> None:
    patch.setattr(
        chatglm, "frequencies", lambda dim, device: 10000 ** (-torch.arange(0, dim, 2) / dim)
    )


def axes_swapped(patch: Any) -> None:
    right = chatglm.rotary_table
    patch.setattr(chatglm, "rotary_table", lambda positions, dim: right(positions.flip(1), dim))


def interleaved_pairs(patch: Any) -> None:
    def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        halves = x.unflatten(-1, (2, -1))
        even, odd = halves[..., 0::2], halves[..., 1::2]
        turned = torch.stack([-odd, even], dim=-1).flatten(-2)
        return (halves * cos + turned * sin).flatten(-2)

    patch.setattr(chatglm, "rotate", rotate)


def blocks_of_queries_keys_values(patch: Any) -> None:
    patch.setattr(
        chatglm,
        "split_heads",
        lambda mixed, d: mixed.unflatten(-1, (3, -1, d)).permute(2, 0, 3, 1, 4).unbind(0),
    )


def erf_gelu(patch: Any) -> None:
    patch.setattr(
        chatglm.ChatGLMMLP,
        "forward",
        lambda self, x: self.dense_4h_to_h(F.gelu(self.dense_h_to_4h(x))),
    )


def mask_before_gmask(patch: Any) -> None:
    def swapped(ids: Tensor, config: Any, real: Tensor | None = None) -> Tensor:
        names = {"gmask_token_id": config.mask_token_id, "mask_token_id": config.gmask_token_id}
        return position_ids_of(
            ids, SimpleNamespace(bos_token_id=config.bos_token_id, **names), real
        )

    patch.setattr(chatglm, "position_ids_of", swapped)


def answers_count_on(patch: Any) -> None:
    def counting(ids: Tensor, config: Any, real: Tensor | None = None) -> Tensor:
        right = position_ids_of(ids, config, real)
        return torch.stack([torch.arange(ids.shape[1]).expand_as(ids), right[:, 1]], dim=1)

    patch.setattr(chatglm, "position_ids_of", counting)


def untied_head(patch: Any) -> None:
    patch.setattr(ChatGLMForCausalLM, "_tied_weights_keys", {})


def new_tokens_count_on(patch: Any) -> None:
    patch.setattr(
        ChatGLMForCausalLM,
        "_update_model_kwargs_for_generation",
        GenerationMixin._update_model_kwargs_for_generation,
    )


def numbered_scores(attention: type) -> Callable[[Any], None]:
    """Queries divided by the layer's number and scores not multiplied back."""

    def numbered(patch: Any) -> None:
        right: Any = attention.__init__

        def init(self: Any, config: Any, layer_idx: int) -> None:
            right(self, config, layer_idx)
            self.scaling /= layer_idx + 1

        patch.setattr(attention, "__init__", init)

    return numbered


def unshifted_loss(cls: type) -> Callable[[Any], None]:
    def unshifted(patch: Any) -> None:
        patch.setattr(
            cls,
            "loss_function",
            lambda self, logits, labels, **kwargs: F.cross_entropy(
                logits.flatten(0, 1), labels.flatten()
            ),
        )

    return unshifted


def the_whole_head_rotated(patch: Any) -> None:
    right = chatglm2.rotary_table
    patch.setattr(chatglm2, "rotary_table", lambda positions, dim: right(positions, 2 * dim))


def rotated_halves(patch: Any) -> None:
    def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        size = cos.shape[-1]
        a, b, rest = x[..., :size], x[..., size : 2 * size], x[..., 2 * size :]
        return torch.cat([a * cos - b * sin, b * cos + a * sin, rest], dim=-1)

    patch.setattr(chatglm2, "rotate", rotate)


def frequencies_of_the_whole_head(patch: Any) -> None:
    right = chatglm2.rotary_table
    patch.setattr(
        chatglm2,
        "rotary_table",
        lambda positions, dim: tuple(t[..., : dim // 2] for t in right(positions, 2 * dim)),
    )


def gate_last(patch: Any) -> None:
    right = chatglm2.gated
    patch.setattr(
        chatglm2, "gated", lambda both: right(torch.cat(both.chunk(2, dim=-1)[::-1], dim=-1))
    )


def groups_interleaved(patch: Any) -> None:
    patch.setattr(chatglm2, "of_group", lambda x, groups: x.repeat(1, groups, 1, 1))


def normed_residual(patch: Any) -> None:
    def forward(self: Any, x: Tensor, **kwargs: Any) -> Tensor:
        x = self.input_layernorm(x)
        x = x + self.self_attention(x, **kwargs)[0]
        return x + self.mlp(self.post_attention_layernorm(x))

    patch.setattr(chatglm2.ChatGLM2Block, "forward", forward)


def tied_head(patch: Any) -> None:
    right = ChatGLM2ForCausalLM.forward

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        self.transformer.output_layer.weight = self.get_input_embeddings().weight
        return right(self, *args, **kwargs)

    patch.setattr(ChatGLM2ForCausalLM, "forward", forward)


MISTAKES: dict[str, list[Callable[[Any], None]]] = {
    "chatglm/base": [
        alpha_of_the_depth,
        residual_before_the_norm,
        exact_frequencies,
        axes_swapped,
        interleaved_pairs,
        blocks_of_queries_keys_values,
        erf_gelu,
        without_context,
        sop_in_the_context,
        mask_before_gmask,
        answers_count_on,
        untied_head,
        new_tokens_count_on,
        numbered_scores(chatglm.ChatGLMAttention),
        unshifted_loss(ChatGLMForCausalLM),
    ],
    "chatglm2/base": [
        the_whole_head_rotated,
        rotated_halves,
        frequencies_of_the_whole_head,
        gate_last,
        groups_interleaved,
        normed_residual,
        tied_head,
        numbered_scores(chatglm2.ChatGLM2Attention),
        unshifted_loss(ChatGLM2ForCausalLM),
    ],
}


@pytest.mark.parametrize(
    ("folder", "mistake"),
    [
        pytest.param(
            ROOT / name,
            mistake,
            id=f"{name}-{mistake.__name__}",
            marks=pytest.mark.skipif(not (ROOT / name).is_dir(), reason=f"{ROOT / name} is absent"),
        )
        for name, mistakes in MISTAKES.items()
        for mistake in mistakes
    ],
)
def test_mistakes_show(
    folder: Path, mistake: Callable[[Any], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    mistake(monkeypatch)
    # eager: groups of keys are repeated in this file there, in transformers' elsewhere
    assert next(faults(folder, "eager"), None) is not None
