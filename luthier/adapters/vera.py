"""VeRA (Kopiczko et al. 2024, arXiv:2310.11454): y = W x + b * B (d * A drop(x)), b and d trained vectors.

`paper`, the default: A [rank, in] and B [out, rank] are random, frozen and the same for all layers, which
take their top left corners. They come from one seed, as PEFT draws them, and need not be saved. There is no
alpha. `paddlenlp`: each layer has its own A and B from the SVD of its weight, and B is trained too. PaddleNLP
subtracts what they are at first from the weight; here the weight stays, and the difference is what is added.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from pydantic import ValidationError
from torch import Tensor, nn

from luthier.adapters.base import ADAPTERS, Adapter, Additive, LowRank, check_rank
from luthier.adapters.svd import principal
from luthier.config import AdapterConfig
from luthier.errors import Refused
from luthier.layers import features, weight_dtype
from luthier.stacks import linear_of

A, B = SHARED = ("base_model.vera_A", "base_model.vera_B")  # their names in the file
_READ = {"r", "vera_dropout", "d_initial", "projection_prng_key", "save_projection"}
_READ |= {"peft_type", "base_model_name_or_path", "modules_to_save", "bias", "alpha"}
_INERT = {
    *("task_type", "inference_mode", "revision", "auto_mapping", "peft_version"),
    *("target_modules", "layers_to_transform", "layers_pattern", "fan_in_fan_out", "init_weights"),
}
_OF_FORM = {
    "paper": frozenset({"d_initial", "projection_seed", "save_projection"}),
    "paddlenlp": frozenset({"alpha"}),
}


class Projections(nn.Module):
    """The random matrices of a model, once for all its layers; they have no values at first."""

    A: Tensor
    B: Tensor
    low: Tensor | None

    def __init__(self, A: Tensor, B: Tensor, dtype: torch.dtype) -> None:
        super().__init__()
        self.register_buffer("A", A, persistent=False)  # [R, largest in]
        self.register_buffer("B", B, persistent=False)  # [largest out, R]
        # A as half-precision layers multiply by it: a copy of each would be kept for the backward
        low = None if dtype == A.dtype else A.to(dtype)
        self.register_buffer("low", low, persistent=False)
        self.filled = False

    def fill(self, A: Tensor, B: Tensor) -> None:
        """Take the top left corners of these."""
        self.A.copy_(A[:, : self.A.shape[1]])
        self.B.copy_(B[: self.B.shape[0]])
        if self.low is not None:
            self.low.copy_(self.A)
        self.filled = True

    def draw(self, seed: int) -> None:
        """He uniform, A before B, from one generator on the CPU."""
        stream = torch.Generator().manual_seed(seed)
        shapes = self.A.shape, self.B.shape
        bounds = (math.sqrt(6 / shape[1]) for shape in shapes)
        drawn = [
            torch.empty(shape).uniform_(-bound, bound, generator=stream)
            for shape, bound in zip(shapes, bounds, strict=True)
        ]
        self.fill(*drawn)

    def left(self, num_in: int) -> Tensor:
        """A [R, in] of a layer."""
        return (self.A if self.low is None else self.low)[:, :num_in]


@ADAPTERS.register("vera")
class VeRA(Additive):
    """Trained vectors around two fixed matrices.

    Whole under tensor parallelism (`follows` is empty), as the matrices are that the layers share.
    """

    from_layer = False
    uses = frozenset({"rank", "dropout", "targets"}) | _OF_FORM["paper"] | _OF_FORM["paddlenlp"]
    peft_types = ("VERA", "LUTHIER_VERA_SVD")
    suffixes = ("vera_lambda_b", "vera_lambda_d", "vera_A", "vera_B", "vera_B0")
    shared_names = SHARED
    projections: Projections
    vera_A: Tensor
    vera_B0: Tensor

    def __init__(self, layer: nn.Module, config: AdapterConfig, *, name: str, seed: int) -> None:
        super().__init__(layer, config, name=name, seed=seed)
        self.num_in, self.num_out = features(layer)
        self.shared = config.form_ == "paper"
        self.vera_lambda_b = self.new_parameter(layer, self.num_out)
        self.vera_lambda_d = self.new_parameter(layer, config.rank)
        if self.shared:
            self.zero_at_start = frozenset({"vera_lambda_d"})
            return
        self.scale = config.scale_alpha / config.rank
        self.vera_B = self.new_parameter(layer, self.num_out, config.rank)
        A, B0 = (config.rank, self.num_in), (self.num_out, config.rank)
        self.register_buffer("vera_A", self.new_tensor(layer, *A), persistent=False)
        self.register_buffer("vera_B0", self.new_tensor(layer, *B0), persistent=False)

    @classmethod
    def plan(cls, model: nn.Module, config: AdapterConfig) -> dict[str, AdapterConfig]:
        other = next(options for form, options in _OF_FORM.items() if form != config.form_)
        for key in sorted(config.changed().keys() & other):
            raise Refused(
                f"adapter.{key}={getattr(config, key)}",
                f"adapter.form={config.form_} of adapter.method=vera has no such option",
                f"its own are {', '.join(sorted(_OF_FORM[config.form_]))}",
            )
        plan = super().plan(model, config)
        if config.form_ == "paddlenlp":  # random matrices may have any rank
            check_rank(model, plan)
        return plan

    @classmethod
    def share(cls, model: nn.Module, adapters: Mapping[str, Adapter]) -> None:
        mine = [adapter for adapter in _of(adapters) if adapter.shared]
        if mine:
            layer = linear_of(model, mine[0].name)
            rank, new = mine[0].config.rank, mine[0].new_tensor(layer, 0)
            projections = Projections(
                new.new_zeros(rank, max(a.num_in for a in mine)),
                new.new_zeros(max(a.num_out for a in mine), rank),
                weight_dtype(layer),
            )
            for adapter in mine:
                adapter.projections = projections

    def low_rank(self) -> LowRank:
        b, d = self.vera_lambda_b[:, None], self.vera_lambda_d
        if self.shared:
            return LowRank(
                self.projections.left(self.num_in), b * self.projections.B[: self.num_out] * d
            )
        # the difference before any product: exactly zero at first, and no cancellation of large outputs
        return LowRank(self.vera_A, self.scale * (b * self.vera_B * d - self.vera_B0))

    def delta(self, x: Tensor) -> Tensor:
        down, up, _ = self.low_rank()
        return F.linear(F.linear(self.drop(x), down.to(x.dtype)), up.to(x.dtype))  # [..., out]

    def update(self) -> Tensor:
        down = self.projections.A[:, : self.num_in] if self.shared else self.vera_A
        return self.low_rank().up @ down

    def initialise(self, layer: nn.Module, generator: torch.Generator) -> None:
        if self.shared:
            self.vera_lambda_b.zero_()
            self.vera_lambda_d.fill_(self.config.d_initial)
            if not self.projections.filled:
                self.projections.draw(self.projection_seed)
            return
        u, s, v = principal(self.weight_of(layer), self.config.rank, generator)
        self.vera_lambda_b.fill_(1.0)
        self.vera_lambda_d.fill_(1.0)
        self.vera_A.copy_((v * s.sqrt()).t())
        self.vera_B.copy_(u * s.sqrt())
        self.vera_B0.copy_(self.vera_B)

    @property
    def projection_seed(self) -> int:
        own = self.config.projection_seed
        return self.seed if own is None else own

    def tensors(self) -> dict[str, Tensor]:
        fixed = {} if self.shared else {"vera_A": self.vera_A, "vera_B0": self.vera_B0}
        return {**dict(self.named_parameters()), **fixed}

    @classmethod
    def shared_tensors(cls, adapters: Mapping[str, Adapter]) -> dict[str, Tensor]:
        first = _of(adapters)[0]
        if not first.config.save_projection:
            return {}
        return {A: first.projections.A, B: first.projections.B}

    @classmethod
    def take_shared(cls, adapters: Mapping[str, Adapter], tensors: Mapping[str, Tensor]) -> None:
        first = _of(adapters)[0]
        if not first.shared:
            wanted: dict[str, tuple[int, ...]] = {}
        elif not tensors:
            return first.projections.draw(first.projection_seed)
        else:
            wanted = {A: tuple(first.projections.A.shape), B: tuple(first.projections.B.shape)}
        for name in sorted(wanted.keys() | tensors.keys()):
            found = tuple(tensors[name].shape) if name in tensors else ()
            fits = name in wanted and len(found) == 2 and all(map(int.__ge__, found, wanted[name]))
            if not fits or found[SHARED.index(name)] != first.config.rank:
                raise Refused(
                    f"the projections of a VeRA adapter ({name})",
                    f"the shape is {found or 'none'}, here {wanted.get(name, 'none')} is needed",
                    "give the base it was trained on, or copy the folder again",
                )
        if wanted:
            first.projections.fill(tensors[A], tensors[B])
        return None

    @classmethod
    def settle(cls, config: AdapterConfig, adapters: Mapping[str, Adapter]) -> AdapterConfig:
        first = _of(adapters)[0]
        seed = first.projection_seed if first.shared else None
        return config.model_copy(update={"projection_seed": seed})

    @classmethod
    def to_peft(cls, config: AdapterConfig, adapters: Mapping[str, Adapter]) -> dict[str, Any]:
        first = _of(adapters)[0]
        if not first.shared:
            return {
                "peft_type": "LUTHIER_VERA_SVD",
                "r": config.rank,
                "alpha": config.scale_alpha,
                "vera_dropout": config.dropout,
            }
        return {
            "peft_type": "VERA",
            "r": config.rank,
            "vera_dropout": config.dropout,
            "d_initial": config.d_initial,
            "projection_prng_key": first.projection_seed,
            "save_projection": config.save_projection,
            "fan_in_fan_out": any(adapter.transposed for adapter in _of(adapters)),
            "bias": "none",
            "init_weights": True,
        }

    @classmethod
    def from_peft(
        cls, fields: Mapping[str, Any], layers: list[str]
    ) -> tuple[AdapterConfig, dict[str, AdapterConfig], list[str]]:
        if not layers:
            raise Refused("a VeRA folder", "it holds no layer's vectors", "copy the folder again")
        remarks = [
            f"adapter_config.json has an unknown option {key}={value}: ignored"
            for key, value in fields.items()
            if key not in _READ | _INERT
        ]
        config = _options(fields)
        return config, dict.fromkeys(layers, config), remarks


def _of(adapters: Mapping[str, Adapter]) -> list[Any]:
    return list(adapters.values())  # all of them are VeRA's


def _options(fields: Mapping[str, Any]) -> AdapterConfig:
    values = {
        "method": "vera",
        "rank": fields.get("r", 256),
        "dropout": fields.get("vera_dropout", 0.0),
    }
    if fields["peft_type"] == "VERA":
        values["d_initial"] = fields.get("d_initial", 0.1)
        values["projection_seed"] = fields.get("projection_prng_key", 0)
        values["save_projection"] = fields.get("save_projection", True)
    else:
        values |= {"form": "paddlenlp", "alpha": fields.get("alpha")}
    try:
        return AdapterConfig.model_validate(values)
    except ValidationError as error:
        key = error.errors()[0]["loc"]
        raise Refused(
            "reading adapter_config.json",
            f"it says {', '.join(f'{k}={v}' for k, v in values.items())}, which are no VeRA options {key}",
            "mend the file",
        ) from error
