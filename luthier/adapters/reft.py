"""ReFT (Wu et al. 2024, arXiv:2404.03592): edits of hidden states h [D] between decoder layers, at some tokens.

loreft  h + R (act(W h + b) - R^T h)     R [D, rank] is kept orthonormal
noreft  the same, R is free
direft  h + R act(W h + b)               R is free
tiny    h + ((h A * a) B) * b            PaddleNLP's TinyIntervention

By default the first and the last tokens of the prompt have an edit each, as in the authors' code. A prompt of
p tokens has no more than p // 2 first and p // 2 last ones. Where prompts lie is said by the layout, or in plain
calls by `calls.py`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from pydantic import ValidationError
from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer

from luthier import seeding
from luthier.adapters.base import ADAPTERS, Adapter, Removable
from luthier.adapters.calls import Prompt, current_call, watch_calls
from luthier.adapters.reft_places import Places, find_rows, numbers_of, on_rank
from luthier.adapters.targets import decoders
from luthier.batch import current_layout
from luthier.config import AdapterConfig
from luthier.errors import Failed, Refused

_PARTS = ("first", "last", "both", "all")  # tokens that have an edit of their own; `both` is tied
_OPTIONS = ("form", "rank", "positions", "tied", "act_fn", "add_bias", "dropout", "layers")
_ALSO = {"peft_type", "task_type", "base_model_name_or_path", "inference_mode"}
_ALSO |= {"target_modules", "modules_to_save"}


class Edit(nn.Module):
    """What one edit adds to hidden states, [..., D] -> [..., D] in their dtype."""

    zero_at_start: frozenset[str] = frozenset()

    def initialise(self, generator: torch.Generator) -> None:
        """First values, with which nothing is added."""
        raise TypeError(f"{type(self).__name__} has no first values")

    def retract(self) -> None:
        """Back to the constraint, after a step of the optimiser."""


class SubspaceEdit(Edit):
    """loreft, noreft and direft: an edit inside of the space that the columns of `subspace` span."""

    def __init__(self, config: AdapterConfig, width: int, **where: Any) -> None:
        super().__init__()
        self.form, self.act_fn = config.form_, config.act_fn
        self.subspace = _parameter(width, config.rank, **where)  # R [D, rank]
        self.source = _parameter(config.rank, width, **where)  # W [rank, D]
        self.source_bias = _parameter(config.rank, **where) if config.add_bias else None
        # act(W h) = R^T h for all h is possible with the linear act only: else a free R starts at zero
        self.starts_empty = self.form == "direft" or (
            self.form == "noreft" and self.act_fn != "linear"
        )
        if self.starts_empty:
            self.zero_at_start = frozenset(
                {"source", "source_bias"} & dict(self.named_parameters()).keys()
            )

    def forward(self, h: Tensor) -> Tensor:
        basis = self.subspace
        bias = None if self.source_bias is None else self.source_bias.to(h.dtype)
        if self.form != "direft" and self.act_fn == "linear":
            # one product with the difference: two of nearly the same size, each rounded to half
            # precision, would leave little of it
            low = F.linear(h, (self.source - basis.t()).to(h.dtype), bias)  # [..., rank]
        else:
            low = F.linear(h, self.source.to(h.dtype), bias)
            low = F.relu(low) if self.act_fn == "relu" else low
            if self.form != "direft":
                low = low - F.linear(h, basis.t().to(h.dtype))
        return F.linear(low, basis.to(h.dtype))

    def initialise(self, generator: torch.Generator) -> None:
        drawn = torch.randn(self.subspace.shape, generator=generator)
        basis = orthonormal(drawn.double())
        self.source.copy_(basis.t())
        if self.starts_empty:
            self.subspace.zero_()
        else:
            self.subspace.copy_(basis)
        if self.source_bias is not None:
            self.source_bias.zero_()

    def retract(self) -> None:
        if self.form == "loreft":
            self.subspace.copy_(orthonormal(self.subspace))


class TinyEdit(Edit):
    """PaddleNLP's TinyIntervention: a low-rank update as VeRA's, with trained matrices."""

    zero_at_start = frozenset({"down", "down_scale", "up_scale"})

    def __init__(self, config: AdapterConfig, width: int, **where: Any) -> None:
        super().__init__()
        self.down = _parameter(width, config.rank, **where)  # A [D, rank]
        self.up = _parameter(config.rank, width, **where)  # B [rank, D]
        self.down_scale = _parameter(config.rank, **where)  # a
        self.up_scale = _parameter(width, **where)  # b [D]

    def forward(self, h: Tensor) -> Tensor:
        low = F.linear(h, (self.down * self.down_scale).t().to(h.dtype))  # [..., rank]
        return F.linear(low, (self.up * self.up_scale).t().to(h.dtype))

    def initialise(self, generator: torch.Generator) -> None:
        bound = math.sqrt(6 / len(self.down))  # Kaiming's uniform, as the source
        drawn = torch.empty(self.down.shape).uniform_(-bound, bound, generator=generator)
        self.down.copy_(drawn)
        self.up.zero_()
        self.down_scale.fill_(1)
        self.up_scale.fill_(1)


@ADAPTERS.register("reft")
class ReFT(Adapter):
    """The edits of one decoder layer's output."""

    uses = frozenset({"rank", "positions", "tied", "act_fn", "add_bias", "dropout"})
    peft_types = ("LUTHIER_REFT",)
    suffixes = tuple(
        f"{part}.{name}.weight"
        for part in _PARTS
        for name in (
            *("subspace", "source", "source_bias"),
            *("down", "up", "down_scale", "up_scale"),
        )
    )

    def __init__(self, layer: nn.Module, config: AdapterConfig, *, name: str, seed: int) -> None:
        super().__init__(layer, config, name=name, seed=seed)
        self.parts = parts_of(config)

    @classmethod
    def plan(cls, model: nn.Module, config: AdapterConfig) -> dict[str, AdapterConfig]:
        for key in ("act_fn", "add_bias") if config.form_ == "tiny" else ():
            if key in config.changed():
                raise Refused(
                    f"adapter.{key}={getattr(config, key)} with adapter.form=tiny",
                    "this form of ReFT has no source: neither act_fn nor bias",
                    "leave it out, or use another form",
                )
        names = decoders(model, config.layer_numbers)
        if not names:
            raise Refused(
                "adapter.method=reft",
                f"{type(model).__name__} has no decoder layers as transformers' families have",
                "use another method",
            )
        width = _width(model)
        if config.rank > width:
            raise Refused(
                f"adapter.rank={config.rank}",
                f"hidden states have {width} dimensions: there are no more directions to edit",
                f"give adapter.rank={width} or less",
            )
        chosen = config.layer_numbers
        numbers = list(range(len(names))) if chosen is None else sorted(chosen)
        if numbers == [len(names) - 1] and parts_of(config) == ("first",):
            raise Refused(
                f"adapter.positions={config.positions} in the last layer alone",
                "no answer is read from the first tokens there: nothing would be trained",
                "give earlier layers too, or last positions (l7)",
            )
        return {names[number]: config for number in numbers}

    @classmethod
    def check_length(cls, config: AdapterConfig, length: int, positions: int | None) -> None:
        most = max(numbers_of(config.positions))
        if most > length:
            raise Refused(
                f"adapter.positions={config.positions}",
                f"prompts have {length} tokens at most (data.length)",
                "give smaller numbers, or a larger data.length",
            )

    @classmethod
    def accepts(cls, layer: nn.Module) -> bool:
        return isinstance(layer, GradientCheckpointingLayer)

    @classmethod
    def share(cls, model: nn.Module, adapters: Mapping[str, Adapter]) -> None:
        """Make the edits: the width of hidden states is a fact of the model, no layer tells it reliably."""
        final = decoders(model)[-1]
        for path, adapter in adapters.items():
            like = adapter.new_tensor(model.get_submodule(path))
            kind = TinyEdit if adapter.config.form_ == "tiny" else SubspaceEdit
            for part in parts_of(adapter.config):
                edit = kind(adapter.config, _width(model), dtype=like.dtype, device=like.device)
                adapter.add_module(part, edit)
                adapter.zero_at_start |= {f"{part}.{name}" for name in edit.zero_at_start}
                if path == final and part == "first":  # no answer is read from there
                    adapter.may_idle |= {f"{part}.{name}" for name, _ in edit.named_parameters()}

    @classmethod
    def connect(cls, model: nn.Module, adapters: Mapping[str, Adapter]) -> list[Removable]:
        everywhere = all(adapter.config.positions == "all" for adapter in adapters.values())
        return [] if everywhere else watch_calls(model)

    def after(self, x: Tensor, y: Tensor) -> Tensor:
        if self.config.positions == "all":  # padding's hidden states mean nothing, edited or not
            return self.drop(y + self._edit("all")(y).to(y.dtype))
        return self._edit_prompts(y)

    @torch.compiler.disable()  # the number of edited tokens must not enter a compiled graph
    def _edit_prompts(self, y: Tensor) -> Tensor:
        places = self._places(y.device)
        if not len(places.index) and not torch.is_grad_enabled():
            return y  # a generated token
        flat = y.reshape(-1, y.shape[-1])  # [B*S, D]
        old = flat.index_select(0, places.index)  # [N, D]
        pieces = old.split([sum(rows) for rows in places.counts])
        edits = zip(self.parts, pieces, strict=True)
        added = torch.cat([self._edit(part)(h) for part, h in edits]).to(y.dtype)
        if self.training and self.config.dropout:
            new = self._drop_rows(old + added, places)
            return flat.index_copy(0, places.index, new).view_as(y)
        return flat.index_add(0, places.index, added).view_as(y)

    def _edit(self, part: str) -> Edit:
        edit = getattr(self, part)
        assert isinstance(edit, Edit)
        return edit

    def _places(self, device: torch.device) -> Places:
        layout, call = current_layout(), current_call()
        scope = layout or call
        if scope is None:
            raise Failed(
                f"the edits of layer '{self.name}'",
                "it runs outside of a forward of its model: nothing says where prompts begin and end",
                "call the whole model, and recompute its layers through its stage only",
            )
        key = f"reft {self.config.positions} {'+'.join(self.parts)}"
        if key not in scope.cache:
            if layout is not None:
                num_rows, width = layout.document_ids.shape
                documents = zip(layout.segments, layout.prompt_lengths, strict=True)
                prompts = [Prompt(s.row, s.start, length) for s, length in documents]
            else:
                assert call is not None
                num_rows, width, prompts = len(call.prompts), call.width, call.prompts
            rows = find_rows(self.parts, self.config.positions, prompts, num_rows, width)
            chosen = ()
            if layout is not None and layout.share is not None:
                width, (rows, chosen) = layout.shape[1], on_rank(rows, layout.share.places)
            index = [
                row * width + i for part in rows for row, found in enumerate(part) for i in found
            ]
            counts = tuple(tuple(map(len, part)) for part in rows)
            at = torch.tensor(index, dtype=torch.long).to(device)
            scope.cache[key] = Places(at, counts, chosen)
        return scope.cache[key]

    def _drop_rows(self, x: Tensor, places: Places) -> Tensor:
        """`Adapter.drop` of the edited tokens x [N, D]: a function of (seed, layer, row) here too."""
        layout = current_layout()
        if layout is None:
            return F.dropout(x, self.config.dropout)
        numbers = layout.rows or tuple(range(len(layout.document_ids)))
        every = places.chosen or [[None] * len(numbers)] * len(self.parts)
        pieces = iter(x.split([n for rows in places.counts for n in rows]))
        dropped = [
            seeding.dropout(
                next(pieces)[None],  # [1, n, D]
                self.config.dropout,
                seed=self.seed,
                name=f"{self.name}.adapter.{part}",
                rows=(row,),
                part=chosen,
            )[0]
            for part, some in zip(self.parts, every, strict=True)
            for row, chosen in zip(numbers, some, strict=True)
        ]
        return torch.cat(dropped)

    def initialise(self, layer: nn.Module, generator: torch.Generator) -> None:
        for part in self.parts:
            self._edit(part).initialise(generator)

    def retract(self) -> None:
        for part in self.parts:
            self._edit(part).retract()

    @classmethod
    def to_peft(cls, config: AdapterConfig, adapters: Mapping[str, Adapter]) -> dict[str, Any]:
        options = config.model_dump(mode="json", include=set(_OPTIONS))
        return {
            "peft_type": "LUTHIER_REFT",
            **options,
            "form": config.form_,
            "target_modules": list(adapters),
        }

    @classmethod
    def from_peft(
        cls, fields: Mapping[str, Any], layers: list[str]
    ) -> tuple[AdapterConfig, dict[str, AdapterConfig], list[str]]:
        unknown = [key for key in fields if key not in _ALSO and key not in _OPTIONS]
        remarks = [
            f"adapter_config.json has an unknown option {key}={fields[key]}: ignored"
            for key in unknown
        ]
        values = {key: fields[key] for key in _OPTIONS if key in fields}
        try:
            config = AdapterConfig.model_validate({"method": "reft", **values})
        except ValidationError as error:
            raise Refused(
                "reading adapter_config.json",
                f"{values} are no options of ReFT ({error.errors()[0]['msg']})",
                "mend the file",
            ) from error
        return config, dict.fromkeys(layers, config), remarks


def parts_of(config: AdapterConfig) -> tuple[str, ...]:
    """The edits of a layer, by the tokens that they act on."""
    if config.positions == "all":
        return ("all",)
    first, last = numbers_of(config.positions)
    if first and last:
        return ("both",) if config.tied else ("first", "last")
    return ("first",) if first else ("last",)


def orthonormal(matrix: Tensor) -> Tensor:
    """Orthonormal columns that span what those of `matrix` [D, rank] do: the Q of a QR decomposition, whose
    signs are such that a matrix with orthonormal columns stays what it is."""
    q, r = torch.linalg.qr(matrix)
    return q * torch.where(r.diagonal() < 0, -1, 1)


def _width(model: Any) -> int:
    return model.config.get_text_config().hidden_size


def _parameter(*shape: int, **where: Any) -> nn.Parameter:
    return nn.Parameter(torch.zeros(shape, **where))
