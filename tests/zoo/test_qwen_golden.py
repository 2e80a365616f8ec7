"""Qwen v1 against numbers of its original code, and mistakes that these must show."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from zoo_golden import faults, folders

import luthier.models.attention  # noqa: F401 - registers the attention function
from luthier.models.zoo import qwen
from luthier.models.zoo.qwen import QWenLMHeadModel


def modules(model: Any) -> dict[str, nn.Module]:
    base = model.transformer
    layers = {f"layer.{i}": layer for i, layer in enumerate(base.h)}
    return {"embed": base.drop, "final_norm": base.ln_f} | layers


@pytest.mark.parametrize("attention", ["eager", "luthier"])
@pytest.mark.parametrize("folder", folders("qwen"))
def test_qwen_as_the_original(folder: Path, attention: str) -> None:
    assert list(faults(QWenLMHeadModel, folder, modules, attention)) == []


# ---- mistakes: (what is patched before loading, what is done to the model)


def gate_is_w1(patch: Any) -> None:
    patch.setattr(
        qwen.QWenMLP, "forward", lambda self, x: self.c_proj(F.silu(self.w1(x)) * self.w2(x))
    )


def ntk_in_training_too(patch: Any) -> None:
    right = qwen.QWenModel._plain_alpha

    def alpha(self: Any, *args: Any) -> Tensor:
        training, self.training = self.training, False
        try:
            return right(self, *args)
        finally:
            self.training = training

    patch.setattr(qwen.QWenModel, "_plain_alpha", alpha)


def logn_in_training_too(patch: Any) -> None:
    right = qwen.QWenModel._logn

    def logn(self: Any, places: Tensor) -> Tensor | None:
        training, self.training = self.training, False
        try:
            return right(self, places)
        finally:
            self.training = training

    patch.setattr(qwen.QWenModel, "_logn", logn)


def no_ntk(patch: Any) -> None:
    patch.setattr(qwen, "ntk_alpha", lambda lengths, seq: torch.ones_like(lengths).double())


def no_logn(patch: Any) -> None:
    patch.setattr(qwen.QWenModel, "_logn", lambda self, places: None)


def one_alpha_for_the_batch(patch: Any) -> None:
    right = qwen.QWenModel._plain_alpha
    patch.setattr(
        qwen.QWenModel, "_plain_alpha", lambda self, mask, *rest: right(self, None, *rest)
    )


def alpha_anew_while_decoding(patch: Any) -> None:
    right = qwen.QWenModel._plain_alpha
    patch.setattr(
        qwen.QWenModel,
        "_plain_alpha",
        lambda self, mask, total, cache, device: right(self, mask, total, None, device),
    )


def alpha_grows_smoothly(patch: Any) -> None:
    patch.setattr(
        qwen, "ntk_alpha", lambda lengths, seq: (2 * lengths.double() / seq - 1).clamp(min=1)
    )


def logn_counts_real_tokens(patch: Any) -> None:
    """The rotary turn alone does not care where padding ends."""
    forward, logn = qwen.QWenModel.forward, qwen.QWenModel._logn

    def noting(self: Any, *args: Any, attention_mask: Any = None, **kwargs: Any) -> Any:
        self.pads = 0 if attention_mask is None else (attention_mask == 0).sum(1, keepdim=True)
        return forward(self, *args, attention_mask=attention_mask, **kwargs)

    patch.setattr(qwen.QWenModel, "forward", noting)
    patch.setattr(qwen.QWenModel, "_logn", lambda self, p: logn(self, (p - self.pads).clamp(min=0)))


def interleaved_pairs(patch: Any) -> None:
    def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        turned = torch.stack([-x[..., 1::2], x[..., 0::2]], dim=-1).flatten(-2)
        return x * cos[:, None] + turned * sin[:, None]

    patch.setattr(qwen, "rotate", rotate)


def norm_without_weight(patch: Any) -> None:
    right = qwen.RMSNorm.forward
    patch.setattr(qwen.RMSNorm, "forward", lambda self, x: right(self, x) / self.weight)


def heads_each_with_its_keys(model: Any) -> None:
    """The fused projection read as [N, 3, d]."""
    heads = model.config.num_attention_heads
    for layer in model.transformer.h:
        for p in layer.attn.c_attn.parameters():
            p.data = p.data.unflatten(0, (heads, 3, -1)).transpose(0, 1).flatten(0, 2).contiguous()


def tied_head(model: Any) -> None:
    model.lm_head.weight = model.transformer.wte.weight


MISTAKES = [
    gate_is_w1,
    ntk_in_training_too,
    no_ntk,
    no_logn,
    one_alpha_for_the_batch,
    alpha_anew_while_decoding,
    alpha_grows_smoothly,
    logn_counts_real_tokens,
    logn_in_training_too,
    interleaved_pairs,
    norm_without_weight,
]


@pytest.mark.parametrize("folder", folders("qwen"))
@pytest.mark.parametrize("mistake", MISTAKES, ids=lambda f: f.__name__)
def test_a_mistake_is_caught(mistake: Any, folder: Path, monkeypatch: Any) -> None:
    mistake(monkeypatch)
    assert next(faults(QWenLMHeadModel, folder, modules), None)


@pytest.mark.parametrize("folder", folders("qwen"))
@pytest.mark.parametrize("change", [heads_each_with_its_keys, tied_head], ids=lambda f: f.__name__)
def test_a_wrong_layout_is_caught(change: Any, folder: Path) -> None:
    assert next(faults(QWenLMHeadModel, folder, modules, change=change), None)
