"""What `families.plan_of` says about tensor and pipeline parallelism, tried on tiny models in one process."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from luthier.batch import Batch, Layout, layout_scope
from luthier.models.families import _PLANS, Cut, Plan, plan_of
from luthier.models.fused import heads_of
from luthier.models.stage import Stage, decoder_layers
from luthier.positions import position_axes

ZOO = ("chatglm", "chatglm2", "glm_legacy", "qwen")
each = pytest.mark.parametrize("family", _PLANS)


def part_sizes(cut: Cut, config: Any, size: int) -> list[int]:
    """Lengths of the parts of a side of `size` numbers."""
    heads, groups = heads_of(config)
    counts = [groups if part == "groups" else heads for part in cut.parts]
    if set(cut.parts) <= {"inner", "per_head"}:
        counts = [1] * len(cut.parts)
    return [size * count // sum(counts) for count in counts]


def order(cut: Cut, config: Any, size: int) -> Tensor:
    """Another order of the cut side: all heads the other way round, of the MLP's numbers too."""
    heads, groups = heads_of(config)
    number = {"heads": heads, "per_head": heads, "groups": groups}
    found, start = [], 0
    for part, length in zip(cut.parts, part_sizes(cut, config, size), strict=True):
        whole = torch.arange(start, start + length)
        found.append(whole.unflatten(0, (number.get(part, length), -1)).flip(0).flatten())
        start += length
    return torch.cat(found)


def side(layer: nn.Module, cut: Cut) -> int:
    """The dim of the weight that is cut."""
    return int((cut.along == "inputs") != isinstance(layer, Conv1D))


def logits(model: Any, batch: Batch) -> Tensor:
    stage = Stage(model)
    with torch.no_grad():
        return stage.head(stage(batch))


@each
def test_heads_lie_where_the_plan_says(
    family: str, tiny_model: Any, random_batch: Any, relative: Any
) -> None:
    """Heads in another order give the same model; with one layer forgotten, they do not."""
    plan, batch = plan_of(family), two_axes(tiny_model(family), random_batch())
    assert plan is not None
    wanted = logits(tiny_model(family), batch)
    for forgotten in (None, *plan.cuts):
        model = tiny_model(family)
        for layer in decoder_layers(model):
            for path, cut in plan.cuts.items():
                linear: Any = layer.get_submodule(path)
                dim = side(linear, cut)
                way = order(cut, model.config, linear.weight.shape[dim])
                if path == forgotten:
                    continue
                linear.weight.data = linear.weight.data.index_select(dim, way)
                if cut.along == "outputs" and linear.bias is not None:
                    linear.bias.data = linear.bias.data[way]
            for path in plan.by_head:
                stem, _, name = path.rpartition(".")
                owner = layer.get_submodule(stem)
                if getattr(owner, name) is not None:
                    setattr(owner, name, getattr(owner, name).flip(0))
        error = relative(logits(model, batch), wanted)
        assert error < 2e-6 if forgotten is None else error > 1e-3, forgotten


@pytest.mark.parametrize("family", ZOO)
def test_parts_of_two_ranks_make_the_whole(
    family: str, tiny_model: Any, random_batch: Any, relative: Any
) -> None:
    """Each rank's attention and MLP on its part of the weights; what they give is added up."""
    plan, model = plan_of(family), tiny_model(family)
    assert plan is not None
    batch = two_axes(model, random_batch())
    calls: dict[str, Any] = {}
    layer = decoder_layers(model)[1]
    for name in {path.partition(".")[0] for path in plan.cuts}:
        layer.get_submodule(name).register_forward_hook(
            lambda m, args, kwargs, out, name=name: calls.update({name: (args, kwargs, out)}),
            with_kwargs=True,
        )
    with layout_scope(Layout.of(batch)), torch.no_grad():
        model.base_model(
            input_ids=batch.input_ids, position_ids=batch.position_ids, use_cache=False
        )
        for name, (args, kwargs, out) in calls.items():
            parts = []
            for rank in range(2):
                module: Any = copy.deepcopy(layer.get_submodule(name))
                module._forward_hooks.clear()
                for path, cut in plan.cuts.items():
                    if path.startswith(f"{name}."):
                        shrink(module, path.partition(".")[2], cut, model.config, rank)
                for count in plan.counts if hasattr(module, "layer_idx") else ():
                    setattr(module, count, [size // 2 for size in getattr(module, count)])
                found = module(*args, **kwargs)
                parts.append(found[0] if isinstance(found, tuple) else found)
            whole = out[0] if isinstance(out, tuple) else out
            assert relative(parts[0] + parts[1], whole) < 1e-6, name


def two_axes(model: Any, batch: Batch) -> Batch:
    if position_axes(model.config.model_type) == 1:
        return batch
    places = torch.stack([batch.position_ids, (batch.position_ids - 2).clamp(min=0)], dim=1)
    return Batch(batch.input_ids, batch.labels, places, batch.document_ids, batch.rows)


def shrink(module: nn.Module, path: str, cut: Cut, config: Any, rank: int) -> None:
    """Keep rank's half of each part; of a bias that is added once, the first rank has all."""
    linear: Any = module.get_submodule(path)
    dim = 0 if cut.along == "outputs" else 1

    def half(tensor: Tensor, dim: int) -> Tensor:
        pieces = tensor.split(part_sizes(cut, config, tensor.shape[dim]), dim)
        return torch.cat([piece.chunk(2, dim)[rank] for piece in pieces], dim)

    linear.weight = nn.Parameter(half(linear.weight.data, dim))
    if linear.bias is not None and cut.along == "outputs":
        linear.bias = nn.Parameter(half(linear.bias.data, 0))
    elif linear.bias is not None and rank:
        linear.bias = None


class Absent(nn.Module):
    """Stands for a layer of another stage."""

    def __init__(self, plan: Plan) -> None:
        super().__init__()
        self.tuples = plan.tuples

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        return (hidden_states,) if self.tuples else hidden_states


class Nothing(nn.Module):
    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        return torch.zeros(())


def first_stage(model: Any, plan: Plan) -> None:
    layers = model.get_submodule(plan.layers)
    layers[1] = Absent(plan)
    model.set_submodule(plan.norm, nn.Identity())


def last_stage(model: Any, plan: Plan) -> None:
    layers = model.get_submodule(plan.layers)
    layers[0] = Absent(plan)
    for path in plan.adds:
        model.set_submodule(path, Nothing())
    for path in plan.first:
        model.set_submodule(path, nn.Identity())


@each
def test_two_stages_make_the_whole(
    family: str, tiny_model: Any, random_batch: Any, relative: Any
) -> None:
    plan = plan_of(family)
    assert plan is not None
    whole, first, last = (tiny_model(family) for _ in range(3))
    batch = two_axes(whole, random_batch())
    wanted = logits(whole, batch)
    assert whole.get_submodule(plan.embedding) is whole.get_input_embeddings()
    assert whole.get_submodule(plan.head) is whole.get_output_embeddings()
    assert whole.get_submodule(plan.layers) is decoder_layers(whole)
    first_stage(first, plan)
    last_stage(last, plan)
    mask = torch.ones_like(batch.input_ids)
    with layout_scope(Layout.of(batch)), torch.no_grad():
        given = {"position_ids": batch.position_ids, "attention_mask": mask, "use_cache": False}
        between = first.base_model(input_ids=batch.input_ids, **given)[0]
        hidden = last.base_model(inputs_embeds=between, **given)[0]
    assert relative(Stage(last).head(hidden), wanted) < 1e-6
