"""MoRA (Jiang et al. 2024, arXiv:2405.12130): one square matrix M of LoRA's number of parameters.

M [R, R], R = sqrt((in + out) rank), is applied to x made R wide and its result is made `out` wide again; how
that is done is the form, named after the authors' types. `type6`, the default: x is cut into chunks of R,
chunk c is rotated by RoPE at position c and multiplied by M, and the chunks follow each other, tiled or cut to
the output. Types 1 to 4 add up chunks or neighbours, multiply once, and tile or repeat. `paddlenlp` is type 6
with M stored transposed. There is no alpha: the scale is 1.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

import torch
from pydantic import ValidationError
from torch import Tensor, nn

from luthier.adapters.base import ADAPTERS, Adapter, Additive, check_rank
from luthier.adapters.targets import pattern_value
from luthier.config import AdapterConfig
from luthier.errors import Refused
from luthier.layers import features
from luthier.stacks import linear_of

ROTATED = ("type6", "paddlenlp")
BASE = 10000.0  # of the rotation's angles


@ADAPTERS.register("mora")
class MoRA(Additive):
    """A square update of one linear layer.

    Whole under tensor parallelism (`follows` is empty): each output reads inputs of all ranks.
    """

    uses = frozenset({"rank", "dropout", "targets", "rank_pattern"})
    peft_types = ("LUTHIER_MORA",)
    suffixes = ("mora_M.weight",)
    cos: Tensor
    sin: Tensor

    def __init__(self, layer: nn.Module, config: AdapterConfig, *, name: str, seed: int) -> None:
        super().__init__(layer, config, name=name, seed=seed)
        self.form = config.form_
        self.num_in, self.num_out = features(layer)
        size = square(self.num_in, self.num_out, config.rank, self.form)
        self.mora_M = self.new_parameter(layer, size, size)  # [R, R]
        if self.form in ROTATED:
            # chunks beyond the output's width are cut off: they are not computed
            chunks = math.ceil(min(self.num_in, self.num_out) / size)
            for part in ("cos", "sin"):
                table = self.new_tensor(layer, chunks, 1, size // 2)  # [C, 1, R/2]
                self.register_buffer(part, table, persistent=False)
            self._fill_tables()

    @classmethod
    def plan(cls, model: nn.Module, config: AdapterConfig) -> dict[str, AdapterConfig]:
        plan = super().plan(model, config)
        check_rank(model, plan)
        for name, each in plan.items():
            num_in, num_out = features(linear_of(model, name))
            size = square(num_in, num_out, each.rank, each.form_)
            grouped = {"type2": min(num_in, num_out), "type3": num_in, "type4": num_out}
            most = grouped.get(each.form_, size)
            if size > most:
                raise Refused(
                    f"adapter.rank={each.rank} with adapter.form={each.form_}",
                    f"layer '{name}' is {num_in} -> {num_out}: its square matrix would be {size} wide, "
                    f"and {most} features cannot be put into {size} groups",
                    f"give adapter.rank={max(most * most // (num_in + num_out), 1)} or less, or adapter.form=type6",
                )
        return plan

    def delta(self, x: Tensor) -> Tensor:
        return self._act(self.drop(x))

    def update(self) -> Tensor:
        eye = torch.eye(self.num_in, dtype=self.mora_M.dtype, device=self.mora_M.device)
        return self._act(eye).t()

    def initialise(self, layer: nn.Module, generator: torch.Generator) -> None:
        super().initialise(layer, generator)
        self._fill_tables()

    def take(self, tensors: Mapping[str, Tensor]) -> None:
        super().take(tensors)
        self._fill_tables()

    def _act(self, x: Tensor) -> Tensor:
        matrix = self.mora_M.t() if self.form == "paddlenlp" else self.mora_M
        if self.form in ROTATED:
            return tile(self._rotated(x, matrix), self.num_out)
        size = len(matrix)
        summed = add_groups(x, size) if self.form in ("type2", "type3") else add_chunks(x, size)
        small = summed @ matrix.t().to(x.dtype)  # [..., R]
        spread = repeat if self.form in ("type2", "type4") else tile
        return spread(small, self.num_out)

    def _rotated(self, x: Tensor, matrix: Tensor) -> Tensor:
        """x [..., in] -> its chunks, rotated and multiplied, [..., C * R]."""
        cos, sin, size = self.cos, self.sin, len(matrix)
        shape = x.shape[:-1]
        # [C, N, R]
        chunks = tile(x, len(cos) * size).reshape(-1, len(cos), size).transpose(0, 1)
        if chunks.shape[1] >= size:
            # M R_c x_c: the rotation goes to M, which is less than all tokens
            first, second = matrix.chunk(2, dim=1)
            turned = torch.cat([first * cos + second * sin, second * cos - first * sin], -1)
            out = chunks @ turned.to(x.dtype).transpose(1, 2)
        else:
            cos, sin = cos.to(x.dtype), sin.to(x.dtype)
            first, second = chunks.chunk(2, dim=-1)
            turned = torch.cat([first * cos - second * sin, second * cos + first * sin], -1)
            out = turned @ matrix.t().to(x.dtype)
        return out.transpose(0, 1).reshape(*shape, len(out) * size)

    def _fill_tables(self) -> None:
        """Computed again wherever values are given: the layer may have been made without any."""
        if self.form in ROTATED:
            chunks, _, half = self.cos.shape
            turns = BASE ** (-torch.arange(half, dtype=torch.float64) / half)
            angles = torch.arange(chunks, dtype=torch.float64)[:, None, None] * turns
            self.cos.copy_(angles.cos())
            self.sin.copy_(angles.sin())

    @classmethod
    def to_peft(cls, config: AdapterConfig, adapters: Mapping[str, Adapter]) -> dict[str, Any]:
        ranks = {name: adapter.config.rank for name, adapter in adapters.items()}
        return {
            "peft_type": "LUTHIER_MORA",
            "r": config.rank,
            "form": config.form_,
            "dropout": config.dropout,
            "rank_pattern": {re.escape(n): r for n, r in ranks.items() if r != config.rank},
        }

    @classmethod
    def from_peft(
        cls, fields: Mapping[str, Any], layers: list[str]
    ) -> tuple[AdapterConfig, dict[str, AdapterConfig], list[str]]:
        rank, ranks = fields.get("r", 0), fields.get("rank_pattern") or {}
        plan = {name: _options(fields, pattern_value(ranks, name, rank)) for name in layers}
        return _options(fields, rank), plan, []


def square(num_in: int, num_out: int, rank: int, form: str) -> int:
    """R, the width of M; even where it is rotated in pairs."""
    size = int(math.sqrt((num_in + num_out) * rank) + 0.5)
    return max(size // 2 * 2, 2) if form in ROTATED else size


def tile(x: Tensor, width: int) -> Tensor:
    """x [..., n] -> [..., width]: x again and again, cut at the end."""
    times, rest = divmod(width, x.shape[-1])
    parts = [x] * times + ([x[..., :rest]] if rest else [])
    return parts[0] if len(parts) == 1 else torch.cat(parts, -1)


def repeat(x: Tensor, width: int) -> Tensor:
    """x [..., n] -> [..., width]: each entry again and again; the first entries once more than the last."""
    size, longer = divmod(width, x.shape[-1])
    first = x[..., :longer, None].expand(*x.shape[:-1], longer, size + 1).flatten(-2)
    rest = x[..., longer:, None].expand(*x.shape[:-1], x.shape[-1] - longer, size).flatten(-2)
    return torch.cat([first, rest], -1)


def add_chunks(x: Tensor, size: int) -> Tensor:
    """x [..., n] -> [..., size]: the sum of its chunks, the last one filled up with x's own first entries."""
    chunks = math.ceil(x.shape[-1] / size)
    full = (chunks - 1) * size
    last = tile(torch.cat([x[..., full:], x], -1), size)
    return x[..., :full].unflatten(-1, (chunks - 1, size)).sum(-2) + last


def add_groups(x: Tensor, size: int) -> Tensor:
    """x [..., n] -> [..., size]: sums of neighbours; the first groups are one longer than the last."""
    length, longer = divmod(x.shape[-1], size)
    border = longer * (length + 1)
    first = x[..., :border].unflatten(-1, (longer, length + 1)).sum(-1)
    rest = x[..., border:].unflatten(-1, (size - longer, length)).sum(-1)
    return torch.cat([first, rest], -1)


def _options(fields: Mapping[str, Any], rank: Any) -> AdapterConfig:
    form, dropout = fields.get("form"), fields.get("dropout", 0.0)
    try:
        values = {"method": "mora", "form": form, "rank": rank, "dropout": dropout}
        return AdapterConfig.model_validate(values)
    except ValidationError as error:
        raise Refused(
            "reading adapter_config.json",
            f"r={rank}, form={form}, dropout={dropout} are no MoRA options",
            "mend the file",
        ) from error
