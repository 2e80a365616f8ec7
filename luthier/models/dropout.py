"""The checkpoint's own dropout (gpt2, opt, ...) as a function of (seed, place in the model, row).

Families drop units in `nn.Dropout` modules, in attention, or by a bare function call; each of the three is
led through `seeding.dropout`, so that the same row drops the same units in any micro-batch, after a
resume and when a layer is recomputed. `Stage.forward` finds a family with a dropout that is missed here.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from luthier import seeding
from luthier.batch import current_layout
from luthier.models.families import family_of
from luthier.parts import Stretch, both


class RowDropout(nn.Dropout):
    """`nn.Dropout` whose mask, inside a layout, depends on (seed, name, row). Plain outside of one.

    `tokens` (i, n): where x has fewer tokens than the layout, it is the i-th of n stretches, the last filled up.
    """

    def __init__(self, p: float, seed: int, name: str, tokens: tuple[int, int] = (0, 1)) -> None:
        super().__init__(p)
        self.seed, self.name, self.tokens = seed, name, tokens

    @torch.compiler.disable
    def forward(self, input: Tensor) -> Tensor:
        """x [B, S, ...] or [B*S, ...] -> the same shape."""
        layout = current_layout()
        if layout is None or not self.training:
            return super().forward(input)
        batch, width = layout.shape
        flat = input.shape[0] != batch
        x = input.unflatten(0, (batch, -1)) if flat else input
        rows = layout.rows or tuple(range(batch))
        stretch = Stretch(width, *self.tokens)
        part = both(stretch if x.shape[1] == stretch.length != width else None, layout.share)
        out = seeding.dropout(x, self.p, seed=self.seed, name=self.name, rows=rows, part=part)
        return out.flatten(0, 1) if flat else out


def seed_dropout(model: PreTrainedModel, seed: int, tokens: tuple[int, int] = (0, 1)) -> None:
    """Make every dropout of `model` a function of (seed, module name, row) inside a layout.

    Call it after adapters are attached: an adapter's part of a layer's output is dropped with the rest.
    Parameters and their names stay as they are. `tokens`: as in `RowDropout`.
    """
    for parent_name, parent in list(model.named_modules()):
        if hasattr(parent, "layer_idx"):
            # read by attention.attend
            parent.dropout_key = (seed, f"{parent_name}.attention")  # pyright: ignore[reportArgumentType]
        for name, child in list(parent.named_children()):
            if isinstance(child, nn.Dropout):
                made = RowDropout(child.p, seed, f"{parent_name}.{name}", tokens)
                setattr(parent, name, made.train(child.training))
    _seed_functional(model, seed, tokens)


def _seed_functional(model: PreTrainedModel, seed: int, tokens: tuple[int, int]) -> None:
    """Families that call the function: their own rate becomes 0, and hooks drop the same outputs."""
    table = family_of(model.config.model_type).functional_dropout or {}
    for layer_name, layer in model.named_modules():
        if type(layer).__name__ not in table:
            continue
        attribute, outputs = table[type(layer).__name__]
        rate = getattr(layer, attribute)
        if rate == 0:
            continue
        setattr(layer, attribute, 0.0)
        for output in outputs:
            drop = RowDropout(rate, seed, f"{layer_name}.{output}.dropout", tokens)
            layer.get_submodule(output).register_forward_hook(_Hook(drop))


class _Hook:
    """Drops what a sub-layer gives; an attention layer gives a tuple whose first item counts."""

    def __init__(self, drop: RowDropout) -> None:
        self.drop = drop

    def __call__(self, module: nn.Module, args: Any, output: Any) -> Any:
        self.drop.train(module.training)
        if isinstance(output, tuple):
            return (self.drop(output[0]), *output[1:])
        return self.drop(output)
