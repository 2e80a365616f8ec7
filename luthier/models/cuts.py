"""Which linear layers of a model tensor parallelism cuts, and what else follows from it.

From the `tp_plan` of transformers' families, or from `families.plan_of` for those with fused layers. What cannot be
cut is refused here, on a model without values, before any work; the cutting is `parallel/tensor.py`'s.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any, Literal

from transformers import PreTrainedModel

from luthier.errors import Refused
from luthier.layers import features, is_linear, is_quantized
from luthier.models.families import plan_of
from luthier.parts import Part

STYLES = {"colwise": "outputs", "rowwise": "inputs"}
SHARED = "replicated_with_grad_allreduce"  # transformers' word for norms of single heads
PROVEN = (
    "gpt2",
    "opt",
)  # families with fused layers of which tests/parallel compares every gradient


@dataclass(frozen=True)
class LayerCut:
    """Side of a linear layer that is cut, and the lengths of what lies one after the other along it."""

    along: Literal["outputs", "inputs"]
    sizes: tuple[int, ...]


@dataclass(frozen=True)
class Cuts:
    """`layers` by path; `shares`: paths of modules whose gradient is the sum of the ranks'; `counts`: (module,
    attribute) that hold numbers of a whole attention layer, to be a rank's own."""

    layers: dict[str, LayerCut] = field(default_factory=dict)
    shares: list[str] = field(default_factory=list)
    counts: list[tuple[str, str]] = field(default_factory=list)

    def settle(self, model: PreTrainedModel, rank: int, ranks: int) -> None:
        """Make the counts a rank's own, and tell attention layers which of the heads are here (for dropout)."""
        heads = model.config.get_text_config().num_attention_heads
        for module in model.modules():
            if hasattr(module, "layer_idx"):
                module.heads_here = Part(-3, (heads,), rank, ranks)  # pyright: ignore[reportArgumentType]
        for path, name in self.counts:
            module = model.get_submodule(path)
            setattr(module, name, getattr(module, name) // ranks)


def cuts_of(model: PreTrainedModel, ranks: int) -> Cuts:
    """The cut of `model` among `ranks`. Refused for families, heads and layers that cannot be."""
    asked = f"parallel.tensor={ranks} for the model family '{model.config.model_type}'"
    kind, plan = model.config.model_type, plan_of(model.config.model_type)
    found = Cuts()
    if plan is not None and kind in PROVEN:
        _by_plan(model, plan, found)
    elif plan is not None or not model.tp_plan:
        raise Refused(asked, "its layers cannot be cut in this version", _instead())
    else:
        _by_styles(model, found, asked)
    _check(model, found, ranks, asked)
    return found


def _by_plan(model: PreTrainedModel, plan: Any, found: Cuts) -> None:
    for number, layer in enumerate(model.get_submodule(plan.layers).children()):
        path = f"{plan.layers}.{number}"
        for name, cut in plan.cuts.items():
            side = features(layer.get_submodule(name))[cut.along == "outputs"]
            sizes = (side // len(cut.parts),) * len(cut.parts)
            found.layers[f"{path}.{name}"] = LayerCut(cut.along, sizes)
        for name in plan.counts:
            owners = (n for n, m in layer.named_modules() if name in vars(m))
            found.counts.extend((f"{path}.{owner}".rstrip("."), name) for owner in owners)


def _by_styles(model: PreTrainedModel, found: Cuts, asked: str) -> None:
    plan = {name: style for name, style in model.tp_plan.items() if ".*." in name}
    used = set()
    for path, module in model.named_modules():
        name = re.sub(r"\.\d+\.", ".*.", path)
        style = plan.get(name)
        if style is None:
            continue
        used.add(name)
        if style == SHARED:
            found.shares.append(path)
        elif style in STYLES and is_linear(module):
            along: Any = STYLES[style]
            side = features(module)[along == "outputs"]
            found.layers[path] = LayerCut(along, (side,))
        else:
            raise Refused(asked, f"its '{name}' is of the style {style}, unknown here", _instead())
    if missing := sorted(set(plan) - used):
        raise Refused(asked, f"it has no layers '{missing[0]}' of its plan", _instead())


def _check(model: PreTrainedModel, found: Cuts, ranks: int, asked: str) -> None:
    config = model.config.get_text_config()
    heads = config.num_attention_heads
    groups = getattr(config, "num_key_value_heads", None) or heads
    for what, number in (("attention heads", heads), ("heads of keys and values", groups)):
        if number % ranks:
            raise Refused(
                asked,
                f"it has {number} {what}, which {ranks} ranks cannot share evenly",
                f"give a parallel.tensor that divides {number}",
            )
    for path, cut in found.layers.items():
        if any(size % ranks for size in cut.sizes):
            raise Refused(
                asked,
                f"layer '{path}' has {sum(cut.sizes)} {cut.along}, which {ranks} ranks cannot share evenly",
                "give a parallel.tensor that divides it",
            )
        if is_quantized(model.get_submodule(path)):
            raise Refused(
                f"parallel.tensor={ranks} with a quantised base",
                "quantised layers cannot be cut in this version",
                "use parallel.shard or parallel.replicate in place of parallel.tensor",
            )


def _instead() -> str:
    return "use parallel.shard (with parallel.stage=3 for models that do not fit) in place of parallel.tensor"
