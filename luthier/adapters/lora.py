"""LoRA (Hu et al. 2021, arXiv:2106.09685): y = W x + b + s B A drop(x), s = alpha / rank, and its variants.

A [rank, in] starts uniform within 1/sqrt(in) of zero, B [out, rank] at zero. rsLoRA (arXiv:2312.03732):
s = alpha / sqrt(rank). LoRA+ (arXiv:2402.12354): B learns at a multiple of A's rate. MoSLoRA
(arXiv:2406.11909): B M A with a trained M. PiSSA (arXiv:2404.02948): A and B start as the principal part of W.
DoRA (arXiv:2402.09353): each output's weights V = W + s B A are scaled to a trained norm, m V / ||V||.
Folders of PEFT are read and written in `peft_lora.py`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from luthier.adapters import peft_lora
from luthier.adapters.base import ADAPTERS, Adapter, Additive, LowRank, check_rank
from luthier.adapters.svd import principal
from luthier.config import AdapterConfig
from luthier.layers import features, times_weight

MAGNITUDE = "lora_magnitude_vector"  # DoRA's m, in PEFT's name


@ADAPTERS.register("lora")
class LoRA(Additive):
    """A low-rank update of one linear layer.

    PiSSA's split of W into a residual and s B0 A0 is not made: beside the trained A and B stand the first
    ones, A0 and B0, and the update is s (B A - B0 A0), which is the same. The base stays as it is,
    in its precision, and the update is exactly zero at first. In the file it is a plain LoRA of twice the rank,
    [B, -B0] [A; A0], for the original base.
    Dropout acts before the update alone, also with DoRA, where PEFT drops before the base's share as well.
    """

    uses = frozenset(
        {
            *("rank", "alpha", "dropout", "targets", "rank_pattern", "alpha_pattern"),
            *("rslora", "lora_plus", "pissa", "dora", "mixer"),
        }
    )
    follows: ClassVar = {
        "colwise": {"lora_B": 0, "first_B": 0, MAGNITUDE: 0, "norms": 0},
        "rowwise": {"lora_A": 1, "first_A": 1},
    }
    peft_types = (peft_lora.LORA, peft_lora.MIXER)
    suffixes = ("lora_A.weight", "lora_B.weight", "lora_AB.weight", MAGNITUDE)
    first_A: Tensor
    first_B: Tensor
    norms: Tensor | None

    def __init__(self, layer: nn.Module, config: AdapterConfig, *, name: str, seed: int) -> None:
        super().__init__(layer, config, name=name, seed=seed)
        num_in, num_out = features(layer)
        rank = config.rank
        self.scale = scale_of(config)
        self.lora_A = self.new_parameter(layer, rank, num_in)  # [R, in]
        self.lora_B = self.new_parameter(layer, num_out, rank)  # [out, R]
        zero = {"lora_A"}
        if config.mixer:
            self.lora_AB = self.new_parameter(layer, rank, rank)  # [R, R]
            zero.add("lora_AB")
        if config.pissa:
            self.register_buffer("first_A", self.new_tensor(layer, rank, num_in))
            self.register_buffer("first_B", self.new_tensor(layer, num_out, rank))
            zero.clear()
        # on a quantised base: the layer holds W - s B0 A0, so the update adds B0 A0 too (`residual.py`)
        self.on_residual = config.pissa and getattr(layer, "split", None) is not None
        if config.dora:
            self.register_parameter(MAGNITUDE, self.new_parameter(layer, num_out))
            # squared norms of the base's outputs [out], once its weights are read: at the first forward
            self.register_buffer("norms", None, persistent=False)
            # past nn.Module's registration: the layer is no part of its adapter
            vars(self)["layer"] = layer
        self.zero_at_start = frozenset(zero)

    @classmethod
    def plan(cls, model: nn.Module, config: AdapterConfig) -> dict[str, AdapterConfig]:
        plan = super().plan(model, config)
        check_rank(model, plan)
        return plan

    def low_rank(self) -> LowRank:
        down, up = self._factors()
        return LowRank(down, up, self._gain(down, up) if self.config.dora else None)

    def _factors(self) -> tuple[Tensor, Tensor]:
        """(down [K, in], up [out, K]) with up down = the update of the weight; K is the rank, PiSSA's twice."""
        down, up = self.lora_A, self.lora_B
        if self.config.mixer:
            up = up @ self.lora_AB
        if self.config.pissa and not self.on_residual:
            # not [B, -B0] [A; A0]: their sum is a small difference of large numbers, which half precision
            # cannot hold. B (A - A0) + (B - B0) A0 is the same, made of small differences
            down = torch.cat([down - self.first_A, self.first_A])
            up = torch.cat([up, up - self.first_B], 1)
        return down, self.scale * up

    def _gain(self, down: Tensor, up: Tensor) -> Tensor:
        """m / ||W + up down|| - 1 [out]; the norm is a constant to the gradient (the paper's section 4.3).

        ||W + up down||^2 is taken apart, so that no matrix of W's size is made.
        """
        down, up = down.detach(), up.detach()
        layer = vars(self)["layer"]
        if self.norms is None:
            self.norms = self.total(self.weight_of(layer).square().sum(1))
        image = times_weight(layer, down)  # [K, out]
        cross = (up * image.t().to(up.dtype)).sum(1)
        change = 2 * cross + (up * (up @ (down @ down.t()))).sum(1)
        square = self.norms + self.total(
            change
        )  # a norm is over all inputs, also where they are cut
        return _excess(self.get_parameter(MAGNITUDE), square.clamp_min(0).sqrt())

    def delta(self, x: Tensor) -> Tensor:
        down, up = self._factors()
        low = F.linear(self.drop(x), down.to(x.dtype))  # [..., K]
        return F.linear(low, up.to(x.dtype))  # [..., out]

    def after(self, x: Tensor, y: Tensor) -> Tensor:
        y = super().after(x, y)
        if not self.config.dora:
            return y
        bias = getattr(vars(self)["layer"], "bias", None)
        plain = y if bias is None else y - bias
        return torch.addcmul(y, plain, self._gain(*self._factors()).to(y.dtype))

    def update(self) -> Tensor:
        down, up = self._factors()
        return up @ down

    def fold(self, weight: Tensor) -> Tensor:
        folded = super().fold(weight)
        if not self.config.dora:
            return folded
        axis = 0 if self.transposed else 1
        magnitude = getattr(self, MAGNITUDE).to(folded.dtype)
        # a constant to the gradient, where a stack is folded on the fly
        norm = self.total(folded.detach().square().sum(axis)).sqrt()
        gain = _excess(magnitude, norm).unsqueeze(axis)
        return torch.addcmul(folded, folded, gain)

    def initialise(self, layer: nn.Module, generator: torch.Generator) -> None:
        if self.config.pissa:
            split: Any = getattr(layer, "split", None)
            if split is None:
                split = principal_factors(self.weight_of(layer), self.config, generator)
            for name, value in zip("AB", split, strict=True):
                getattr(self, f"lora_{name}").copy_(value)
                getattr(self, f"first_{name}").copy_(value)
        else:
            _draw(self.lora_A, generator)
            self.lora_B.zero_()
        if self.config.mixer:
            _draw(self.lora_AB, generator)
        if self.config.dora:
            norms = self.weight_of(layer).square().sum(1)
            self.get_parameter(MAGNITUDE).copy_(norms.sqrt())
            if not self.stacked:  # an expert of a stack is folded, which takes its norms anew
                self.norms = norms
            if self.on_residual:
                whole = self.weight_of(layer) + self.update()
                self.get_parameter(MAGNITUDE).copy_(whole.norm(dim=1))

    def lr_scale(self, parameter: str) -> float:
        return self.config.lora_plus if parameter == "lora_B" else 1.0

    def tensors(self) -> dict[str, Tensor]:
        A, B = self.lora_A, self.lora_B
        if self.config.pissa:
            A, B = torch.cat([A, self.first_A]), torch.cat([B, -self.first_B], 1)
        found = {"lora_A.weight": A, "lora_B.weight": B}
        if self.config.mixer:
            found["lora_AB.weight"] = self.lora_AB
        if self.config.dora:
            found[MAGNITUDE] = self.get_parameter(MAGNITUDE)
        return found

    def take(self, tensors: Mapping[str, Tensor]) -> None:
        if not self.config.pissa:
            return super().take(tensors)
        A, first_A = tensors["lora_A.weight"].chunk(2)
        B, first_B = tensors["lora_B.weight"].chunk(2, 1)
        self.lora_A.copy_(A)
        self.first_A.copy_(first_A)
        self.lora_B.copy_(B)
        self.first_B.copy_(-first_B)
        if self.config.dora:
            self.get_parameter(MAGNITUDE).copy_(tensors[MAGNITUDE])

    @classmethod
    def to_peft(cls, config: AdapterConfig, adapters: Mapping[str, Adapter]) -> dict[str, Any]:
        options = {name: adapter.config for name, adapter in adapters.items()}
        transposed = any(isinstance(a, Additive) and a.transposed for a in adapters.values())
        return peft_lora.write_options(config, options, transposed)

    @classmethod
    def from_peft(
        cls, fields: Mapping[str, Any], layers: list[str]
    ) -> tuple[AdapterConfig, dict[str, AdapterConfig], list[str]]:
        return peft_lora.read_options(fields, layers)


def scale_of(config: AdapterConfig) -> float:
    """s of the update s B A."""
    rank = config.rank
    return config.scale_alpha / (math.sqrt(rank) if config.rslora else rank)


def principal_factors(
    weight: Tensor, config: AdapterConfig, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """A [R, in] and B [out, R] such that s B A is the principal part of weight [out, in], float32 or wider."""
    u, s, v = principal(weight, config.rank, generator)
    root = (s / scale_of(config)).sqrt()
    return (v * root).t(), u * root


def _excess(magnitude: Tensor, norm: Tensor) -> Tensor:
    """magnitude / norm - 1, exactly 0 where they are equal, also where both are 0."""
    return (magnitude - norm) / norm.clamp_min(torch.finfo(norm.dtype).tiny)


def _draw(parameter: Tensor, generator: torch.Generator) -> None:
    """Uniform within 1 / sqrt(inputs) of zero."""
    bound = 1 / math.sqrt(parameter.shape[1])
    # drawn on the CPU in float32: the same values on every device and for every precision of the base
    drawn = torch.empty(parameter.shape).uniform_(-bound, bound, generator=generator)
    parameter.copy_(drawn)
