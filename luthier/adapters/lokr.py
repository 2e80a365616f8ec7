"""LoKr (Yeh et al. 2024, arXiv:2309.14859, LyCORIS): W grows by scale * kron(w1, w2).

in = m_i n_i and out = m_o n_o; w1 is [m_o, m_i], w2 [n_o, n_i], each whole or of low rank. The forms agree in that
and differ in details. `peft`, the default: scale alpha / rank, w1 zero at first, the others uniform within
1/sqrt(columns). `paddlenlp`: within 1/sqrt(rows). `lycoris`: scale 1 where both factors are whole, the smaller
part of each split first, w2 zero at first. The matrix [out, in] is only made to be folded.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from pydantic import ValidationError
from torch import Tensor, nn

from luthier.adapters.base import ADAPTERS, Adapter, Additive
from luthier.adapters.targets import pattern_value
from luthier.config import AdapterConfig
from luthier.errors import Refused
from luthier.layers import features
from luthier.stacks import linear_of

_READ = {"r", "alpha", "rank_pattern", "alpha_pattern", "decompose_both", "decompose_factor"}
_READ |= {"form", "peft_type", "base_model_name_or_path", "modules_to_save"}
_INERT = {
    *("task_type", "inference_mode", "revision", "auto_mapping", "peft_version", "init_weights"),
    *("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern"),
    *("use_effective_conv2d", "rank_dropout_scale"),
}
_DROPOUTS = {"rank_dropout", "module_dropout"}  # of the matrix itself, while training


@ADAPTERS.register("lokr")
class LoKr(Additive):
    """A Kronecker product as the update of one linear layer."""

    uses = frozenset({"rank", "alpha", "targets", "rank_pattern", "alpha_pattern"})
    uses |= {"factor", "decompose_both"}
    # the outer factor is cut: its parts must divide by the number of ranks
    follows: ClassVar = {
        "colwise": {"lokr_w1": 0, "lokr_w1_a": 0},
        "rowwise": {"lokr_w1": 1, "lokr_w1_b": 1},
    }
    peft_types = ("LOKR", "LUTHIER_LOKR")
    suffixes = ("lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b")
    lokr_w2: Tensor  # or its factors
    lokr_w2_a: Tensor
    lokr_w2_b: Tensor

    def __init__(self, layer: nn.Module, config: AdapterConfig, *, name: str, seed: int) -> None:
        super().__init__(layer, config, name=name, seed=seed)
        num_in, num_out = features(layer)
        rank, lycoris = config.rank, config.form_ == "lycoris"
        (m_in, n_in), (m_out, n_out) = (split(n, config.factor, lycoris) for n in (num_in, num_out))
        low1 = config.decompose_both and rank < max(m_out, m_in) / 2
        low2 = rank < max(n_out, n_in) / 2
        for factor, low, rows, columns in (
            ("lokr_w1", low1, m_out, m_in),
            ("lokr_w2", low2, n_out, n_in),
        ):
            parts = {"_a": (rows, rank), "_b": (rank, columns)} if low else {"": (rows, columns)}
            for part, shape in parts.items():
                setattr(self, factor + part, self.new_parameter(layer, *shape))
        self.scale = 1.0 if lycoris and not (low1 or low2) else config.scale_alpha / rank
        zero = {"lokr_w2", "lokr_w2_b"} if lycoris else {"lokr_w1", "lokr_w1_a"}
        names = {name for name, _ in self.named_parameters()}
        self.zeros = zero & names  # what is zero at first: the others get no gradient then
        self.zero_at_start = frozenset(names - self.zeros)

    @classmethod
    def plan(cls, model: nn.Module, config: AdapterConfig) -> dict[str, AdapterConfig]:
        plan = super().plan(model, config)
        if config.factor == -1:
            return plan
        for name in plan:
            num_in, num_out = features(linear_of(model, name))
            if config.factor < 1 or num_in % config.factor or num_out % config.factor:
                near = near_divisors(math.gcd(num_in, num_out), config.factor)
                raise Refused(
                    f"adapter.factor={config.factor}",
                    f"it does not divide both dimensions of layer '{name}' ({num_in} -> {num_out})",
                    f"{' or '.join(map(str, near))} would; -1 splits each nearest to its square root",
                )
        return plan

    def delta(self, x: Tensor) -> Tensor:
        w1 = (self.scale * self._factor("lokr_w1")).to(x.dtype)  # [m_o, m_i]
        m_out, m_in = w1.shape
        shape, x = x.shape[:-1], x.reshape(-1, m_in, x.shape[-1] // m_in)  # [N, m_i, n_i]
        if hasattr(self, "lokr_w2"):
            w2 = self.lokr_w2.to(x.dtype)  # [n_o, n_i]
            n_out, n_in = w2.shape
            if m_in * n_out * (n_in + m_out) <= m_out * n_in * (m_in + n_out):
                y = across(w1, along(w2, x))
            else:
                y = along(w2, across(w1, x))
        else:  # w1 acts where the rows are shortest
            low = across(w1, along(self.lokr_w2_b.to(x.dtype), x))  # [N, m_o, R]
            y = along(self.lokr_w2_a.to(x.dtype), low)
        return y.flatten(1).view(*shape, y.shape[1] * y.shape[2])  # [..., out]

    def update(self) -> Tensor:
        return torch.kron(self.scale * self._factor("lokr_w1"), self._factor("lokr_w2"))

    def _factor(self, name: str) -> Tensor:
        whole = getattr(self, name, None)
        return getattr(self, f"{name}_a") @ getattr(self, f"{name}_b") if whole is None else whole

    def initialise(self, layer: nn.Module, generator: torch.Generator) -> None:
        for name, parameter in self.named_parameters():
            if name in self.zeros:
                parameter.zero_()
                continue
            rows, columns = parameter.shape
            bound = 1 / math.sqrt(rows if self.config.form_ == "paddlenlp" else columns)
            drawn = torch.empty(rows, columns).uniform_(-bound, bound, generator=generator)
            parameter.copy_(drawn)

    def tensors(self) -> dict[str, Tensor]:
        return dict(self.named_parameters())

    @classmethod
    def to_peft(cls, config: AdapterConfig, adapters: Mapping[str, Adapter]) -> dict[str, Any]:
        options = {name: adapter.config for name, adapter in adapters.items()}
        usual, lycoris = config.scale_alpha, config.form_ == "lycoris"
        ranks = {n: o.rank for n, o in options.items() if o.rank != config.rank}
        alphas = {n: o.scale_alpha for n, o in options.items() if o.scale_alpha != usual}
        return {
            # PaddleNLP's form differs from PEFT's in the first values only
            "peft_type": "LUTHIER_LOKR" if lycoris else "LOKR",
            **({"form": "lycoris"} if lycoris else {}),
            "r": config.rank,
            "alpha": usual,
            "rank_pattern": {re.escape(name): rank for name, rank in ranks.items()},
            "alpha_pattern": {re.escape(name): alpha for name, alpha in alphas.items()},
            "decompose_both": config.decompose_both,
            "decompose_factor": config.factor,
            "rank_dropout": 0.0,
            "module_dropout": 0.0,
            "use_effective_conv2d": False,
            "init_weights": True,
        }

    @classmethod
    def from_peft(
        cls, fields: Mapping[str, Any], layers: list[str]
    ) -> tuple[AdapterConfig, dict[str, AdapterConfig], list[str]]:
        remarks = []
        for key, value in fields.items():
            if key in _DROPOUTS and value:
                remarks.append(
                    f"the adapter was trained with {key}={value}: not used in training it on"
                )
            elif key not in _READ | _INERT | _DROPOUTS:
                remarks.append(f"adapter_config.json has an unknown option {key}={value}: ignored")
        rank, alpha = fields.get("r", 8), fields.get("alpha", 8)
        ranks, alphas = fields.get("rank_pattern") or {}, fields.get("alpha_pattern") or {}
        plan = {
            name: _options(
                fields, pattern_value(ranks, name, rank), pattern_value(alphas, name, alpha)
            )
            for name in layers
        }
        return _options(fields, rank, alpha), plan, remarks


def split(dimension: int, factor: int, ordered: bool = False) -> tuple[int, int]:
    """Two numbers whose product is `dimension`: (factor, the rest) where it divides, else the pair nearest
    to the square root whose first is at most `factor` (any, for -1). `ordered`: the smaller first."""
    if factor > 0 and dimension % factor == 0:
        pair = factor, dimension // factor
        return (min(pair), max(pair)) if ordered else pair
    most = math.isqrt(dimension) if factor == -1 else min(factor, math.isqrt(dimension))
    first = next((d for d in range(most, 0, -1) if dimension % d == 0), 1)
    return first, dimension // first


def near_divisors(number: int, wanted: int) -> list[int]:
    """The divisors next to `wanted`, below and above."""
    divisors = [d for d in range(1, number + 1) if number % d == 0]
    below, above = [d for d in divisors if d < wanted], [d for d in divisors if d > wanted]
    return below[-1:] + above[:1]


def along(w: Tensor, x: Tensor) -> Tensor:
    """w [k, n], x [N, m, n] -> x w^T, [N, m, k]."""
    # as a product of two matrices: of three axes, torch has two orders of summation, by what needs a gradient
    return (x.reshape(-1, x.shape[-1]) @ w.t()).view(*x.shape[:-1], len(w))


def across(w: Tensor, x: Tensor) -> Tensor:
    """w [k, m], x [N, m, n] -> w x, [N, k, n]."""
    return along(w, x.transpose(1, 2)).transpose(1, 2)


def _options(fields: Mapping[str, Any], rank: Any, alpha: Any) -> AdapterConfig:
    values = {
        "method": "lokr",
        "form": fields.get("form"),
        "rank": rank,
        "alpha": alpha,
        "factor": fields.get("decompose_factor", -1),
        "decompose_both": fields.get("decompose_both", False),
    }
    try:
        return AdapterConfig.model_validate(values)
    except ValidationError as error:
        raise Refused(
            "reading adapter_config.json",
            f"it says {', '.join(f'{k}={v}' for k, v in values.items())}, which are no LoKr options",
            "mend the file",
        ) from error
