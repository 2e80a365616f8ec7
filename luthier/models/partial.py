"""The part of a model that a pipeline stage has: the rest is set aside, and something empty stands in its place.

Layers keep their numbers and names: those of other stages are replaced (`Absent`), never deleted. Embedding, tables of
positions and what else works on embeddings belong to the first stage; final norm and head to the last; of
a tied embedding and head each has its own copy. What is set aside keeps its shape on the meta device, so that
the whole can be put together again for writing. Who sends and receives is `parallel/pipeline.py`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from luthier.crossing import Border, Crossing, crossing
from luthier.errors import Refused
from luthier.layers import count
from luthier.models.absent import Absent, Blank, Nothing
from luthier.models.families import plan_of
from luthier.models.stage import decoder_layers
from luthier.parts import whole_numel


@dataclass(frozen=True)
class Places:
    """Paths in a model: `layers`; `ahead`, the embedding first, and `behind`, the head last; `tables`, of `ahead`,
    are added to embeddings. `tuples`: a layer gives a tuple."""

    layers: str
    ahead: tuple[str, ...]
    behind: tuple[str, ...]
    tables: tuple[str, ...] = ()
    tuples: bool = False


@dataclass(frozen=True)
class Chunk:
    """One stage of the pipeline: its number and its layers; a rank has several with virtual stages."""

    number: int
    layers: range
    first: bool
    last: bool

    def border(self, *given: Tensor) -> Border:
        """Its border for a forward that is given these hidden states, and maybe those of tokens aside."""
        ends = (self.layers[0], self.layers[-1])
        beside = Border(*ends, given=given[1] if len(given) > 1 else None)
        return Border(*ends, given=given[0] if given else None, aside=beside)


def places_of(model: PreTrainedModel) -> Places:
    """What lies where. Refused for a family of which nobody says it."""
    asked = f"parallel.pipeline for the model family '{model.config.model_type}'"
    plan = plan_of(model.config.model_type)
    if plan is not None:
        found = Places(
            plan.layers, (plan.embedding, *plan.adds, *plan.first), (plan.norm, plan.head),
            plan.adds, plan.tuples,
        )  # fmt: skip
    else:
        given = [*(getattr(model.config.get_text_config(), "base_model_pp_plan", None) or {})]
        if not given or "layers" not in given:
            raise Refused(
                asked,
                "nobody says which of its modules belong to the first and the last stage",
                "use parallel.shard (with parallel.stage=3 for models that do not fit)",
            )
        names = {id(module): name for name, module in model.named_modules()}
        base = names[id(model.base_model)]
        cut = given.index("layers")
        paths = [f"{base}.{name}".removeprefix(".") for name in given]
        head: Any = model.get_output_embeddings()
        found = Places(paths[cut], tuple(paths[:cut]), (*paths[cut + 1 :], names[id(head)]))
    embedding: Any = model.get_input_embeddings()
    if model.get_submodule(found.layers) is not decoder_layers(model) or (
        model.get_submodule(found.ahead[0]) is not embedding
    ):
        raise Refused(asked, "its modules lie elsewhere than its plan says", "use parallel.shard")
    if embedding.weight.shape[1] != model.config.get_text_config().hidden_size:
        raise Refused(
            asked,
            "its embedding is of another width than its layers",
            "use parallel.shard (with parallel.stage=3 for models that do not fit)",
        )
    return found


def costs_of(model: PreTrainedModel, places: Places) -> tuple[list[int], int]:
    """Numbers of each layer, and of the head: what a token costs is proportional to them.

    The embedding is looked up, not multiplied: it costs nothing. Of fused experts a token sees few.
    """
    text = model.config.get_text_config()
    layers = []
    for layer in decoder_layers(model):
        every = count(layer)[1]
        stacked = sum(p.numel() for p in layer.parameters() if p.ndim == 3)
        experts = max((p.shape[0] for p in layer.parameters() if p.ndim == 3), default=1)
        chosen = min(getattr(text, "num_experts_per_tok", None) or experts, experts)
        layers.append(every - stacked + stacked * chosen // experts)
    head: Any = model.get_submodule(places.behind[-1])
    return layers, whole_numel(head.weight)


def balanced(costs: Sequence[int], head: int, stages: int) -> list[range]:
    """The layers of each stage, in order, so that the dearest stage is as cheap as it can be.

    The last stage bears the head too. Every stage has a layer: there are at least as many layers as stages.
    """
    total = [0]
    for cost in costs:
        total.append(total[-1] + cost)
    number = len(costs)
    # best[s][n]: (the dearest of s stages over the first n layers, where the last of them begins)
    best: list[list[tuple[float, int]]] = [[(0.0, 0)] + [(float("inf"), 0)] * number]
    for stage in range(1, stages + 1):
        extra = head if stage == stages else 0
        row: list[tuple[float, int]] = [(float("inf"), 0)] * (number + 1)
        for stop in range(stage, number + 1):
            row[stop] = min(
                (max(best[-1][start][0], total[stop] - total[start] + extra), -start)
                for start in range(stage - 1, stop)
            )
        best.append(row)
    stops = [number]
    for stage in range(stages, 0, -1):
        stops.append(-best[stage][stops[-1]][1])
    return [range(a, b) for a, b in pairwise(reversed(stops))]


class Share:
    """What a rank has of a model: `chunks`, in the order of the pipeline. Made by leaving out the rest of `model`."""

    def __init__(
        self, model: PreTrainedModel, places: Places, chunks: Sequence[Chunk], relay: Crossing
    ) -> None:
        self.model, self.places, self.chunks, self.relay = model, places, list(chunks), relay
        self.layers: Any = model.get_submodule(places.layers)
        self.has_first = any(chunk.first for chunk in chunks)
        self.has_last = any(chunk.last for chunk in chunks)
        head: Any = model.get_submodule(places.behind[-1])
        embedding: Any = model.get_submodule(places.ahead[0])
        self.tied = head.weight is embedding.weight
        self.total, self.dtype = _counts(model), model.dtype
        own = {number for chunk in chunks for number in chunk.layers}
        swaps: dict[str, nn.Module] = {
            f"{places.layers}.{i}": Absent(layer, i, relay, places.tuples)
            for i, layer in enumerate(self.layers)
            if i not in own
        }
        hidden = model.config.get_text_config().hidden_size
        if not self.has_first:
            for path in places.ahead:
                if path == places.ahead[0] and self.tied and self.has_last:
                    continue  # the head's weight goes by the embedding's name
                module = model.get_submodule(path)
                kind = Nothing if path in places.tables else Blank
                swaps[path] = kind(module, hidden if path == places.ahead[0] else None)
        if not self.has_last:
            for path in places.behind:
                module = model.get_submodule(path)
                # also of a head that is cut
                rows = whole_numel(head.weight) // head.weight.shape[1]
                width = rows if path == places.behind[-1] else None
                swaps[path] = Blank(module, width)
        self.swaps = swaps
        for path, standin in swaps.items():
            model.set_submodule(path, standin)
        _to_meta([vars(m)["kept"] for m in swaps.values()], model)
        whole = [swaps.get(f"{places.layers}.{i}") for i in range(len(self.layers))]
        self.here = {
            chunk.number: {
                str(i): self.layers[i]
                if i in chunk.layers
                else whole[i] or Absent(self.layers[i], i, relay, places.tuples)
                for i in range(len(self.layers))
            }
            for chunk in chunks
        }
        self.everything = dict(self.layers._modules)

    @contextmanager
    def scope(self, chunk: Chunk, border: Border) -> Iterator[None]:
        """The forward of the whole model is that of `chunk` inside: other layers are passed by."""
        self.layers._modules = self.here[chunk.number]
        try:
            with crossing(border):
                yield
        finally:
            self.layers._modules = self.everything

    def parameters(self, chunk: Chunk) -> Iterator[nn.Parameter]:
        """Those that the gradient of a chunk may reach."""
        inside = {id(p): i for i, layer in enumerate(self.layers) for p in layer.parameters()}
        for p in self.model.parameters():
            if inside.get(id(p)) in (None, *chunk.layers):
                yield p

    def tensors(self) -> dict[str, Tensor]:
        """What is here of the model, by every name that it has."""
        named = [*self.model.named_parameters(remove_duplicate=False), *self.model.named_buffers()]
        return dict(named)

    @contextmanager
    def put_back(self, found: Mapping[str, Tensor]) -> Iterator[None]:
        """What was set aside is in its place inside, with these values; what is not among them stays on meta."""
        kept = {path: vars(standin)["kept"] for path, standin in self.swaps.items()}
        for path, module in kept.items():
            self.model.set_submodule(path, module)
        changed: list[tuple[dict[str, Any], str, Tensor]] = []
        made: dict[int, Tensor] = {}
        for module_path, module in self.model.named_modules(remove_duplicate=False):
            for table in (module._parameters, module._buffers):
                for name, old in table.items():
                    new = found.get(f"{module_path}.{name}".removeprefix("."))
                    if old is None or not old.is_meta or new is None:
                        continue
                    one = nn.Parameter(new, False) if isinstance(old, nn.Parameter) else new
                    changed.append((table, name, old))
                    table[name] = made.setdefault(id(old), one)  # pyright: ignore[reportArgumentType]
        try:
            yield
        finally:
            for table, name, old in changed:
                table[name] = old
            for path, standin in self.swaps.items():
                self.model.set_submodule(path, standin)


def _counts(model: nn.Module) -> tuple[int, int]:
    """Trained parameters, and all of the base."""
    trained = sum(whole_numel(p) for p in model.parameters() if p.requires_grad)
    added = sum(whole_numel(p) for n, p in model.named_parameters() if ".adapter." in f".{n}")
    return trained, count(model)[1] - added


def _to_meta(modules: Sequence[nn.Module], kept: nn.Module) -> None:
    """Free the tensors of `modules` that `kept` does not have; shapes stay."""
    here = {id(t) for t in (*kept.parameters(), *kept.buffers())}
    made: dict[int, Tensor] = {}
    for module in modules:
        for owner in module.modules():
            for table in (owner._parameters, owner._buffers):
                for name, tensor in table.items():
                    if tensor is None or id(tensor) in here or tensor.is_meta:
                        continue
                    if id(tensor) not in made:
                        one: Tensor = torch.empty_like(tensor, device="meta")
                        if isinstance(tensor, nn.Parameter):
                            one = nn.Parameter(one, requires_grad=tensor.requires_grad)
                        made[id(tensor)] = one
                    table[name] = made[id(tensor)]  # pyright: ignore[reportArgumentType]
