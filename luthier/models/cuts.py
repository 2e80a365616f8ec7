"""Which linear layers of a model tensor parallelism cuts, and what else follows from it.

From the `tp_plan` of transformers' families, or from `families.plan_of` for those with fused layers. What cannot be
cut is refused here, on a model without values, before any work; the cutting is `parallel/tensor.py`'s.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from torch import nn
from transformers import PreTrainedModel

from luthier.errors import Refused
from luthier.layers import features, is_linear, is_quantized
from luthier.models.families import plan_of
from luthier.parts import Part

STYLES = {"colwise": "outputs", "rowwise": "inputs"}
KEYS_VALUES = ("k_proj", "v_proj")  # layers whose outputs are heads of keys and values
SHARED = "replicated_with_grad_allreduce"  # transformers' word for norms of single heads
PROVEN = (
    "gpt2",
    "opt",
)  # families with fused layers of which tests/parallel compares every gradient


@dataclass(frozen=True)
class LayerCut:
    """Side of a linear layer that is cut, and the lengths of what lies one after the other along it; `copies`:
    how many ranks have the same part."""

    along: Literal["outputs", "inputs"]
    sizes: tuple[int, ...]
    copies: int = 1


@dataclass(frozen=True)
class Cuts:
    """`layers` by path; `shares`: paths of modules whose gradient is the sum of the ranks'; `counts`: (module,
    attribute) that hold numbers of a whole attention layer, to be a rank's own; `embedding` and `head`: paths of what
    is cut by rows of the vocabulary (the head is one of `layers`), `tied` if they are one tensor."""

    layers: dict[str, LayerCut] = field(default_factory=dict)
    shares: list[str] = field(default_factory=list)
    counts: list[tuple[str, str]] = field(default_factory=list)
    embedding: str | None = None
    head: str | None = None
    tied: bool = False

    @property
    def copied(self) -> bool:
        """Whether several ranks have the same heads of keys and values."""
        return any(cut.copies > 1 for cut in self.layers.values())

    def settle(self, model: PreTrainedModel, rank: int, ranks: int) -> None:
        """Make the counts a rank's own, and tell attention layers which of the heads are here (for dropout)."""
        heads = model.config.get_text_config().num_attention_heads
        for module in model.modules():
            if hasattr(module, "layer_idx"):
                module.heads_here = Part(-3, (heads,), rank, ranks)  # pyright: ignore[reportArgumentType]
                if self.copied and hasattr(module, "num_key_value_groups"):
                    module.num_key_value_groups = heads // ranks  # pyright: ignore[reportArgumentType]
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
        _by_styles(model, found, asked, _copies(model, ranks))
    _check(model, found, ranks, asked)
    return _with_vocabulary(model, found)


def _with_vocabulary(model: PreTrainedModel, found: Cuts) -> Cuts:
    """Embedding and head cut by rows; both or none of them where they are one tensor."""
    paths = {id(module): path for path, module in model.named_modules()}
    embedding: Any = model.get_input_embeddings()
    head: Any = model.get_output_embeddings()
    plain = isinstance(embedding, nn.Embedding) and embedding.max_norm is None
    linear = head is not None and is_linear(head) and not is_quantized(head)
    tied = linear and head.weight is embedding.weight
    if (tied and not plain) or (plain and head is embedding):
        return found
    if linear:
        found.layers[paths[id(head)]] = LayerCut("outputs", (features(head)[1],))
        found = replace(found, head=paths[id(head)], tied=tied)
    return replace(found, embedding=paths[id(embedding)]) if plain else found


def _copies(model: PreTrainedModel, ranks: int) -> int:
    """How many ranks have the same head of keys and values: more than one where there are fewer of these."""
    groups = getattr(model.config.get_text_config(), "num_key_value_heads", None)
    return ranks // groups if groups and ranks > groups and ranks % groups == 0 else 1


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


def _by_styles(model: PreTrainedModel, found: Cuts, asked: str, copies: int) -> None:
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
            own = copies if path.rpartition(".")[2] in KEYS_VALUES else 1
            found.layers[path] = LayerCut(along, (side,), own)
        else:
            raise Refused(asked, f"its '{name}' is of the style {style}, unknown here", _instead())
    if missing := sorted(set(plan) - used):
        raise Refused(asked, f"it has no layers '{missing[0]}' of its plan", _instead())


def _check(model: PreTrainedModel, found: Cuts, ranks: int, asked: str) -> None:
    config = model.config.get_text_config()
    heads = config.num_attention_heads
    groups = getattr(config, "num_key_value_heads", None) or heads
    fewer = found.copied and ranks % groups == 0
    for what, number in (("attention heads", heads), ("heads of keys and values", groups)):
        if number % ranks and not (number == groups and fewer):
            raise Refused(
                asked,
                f"it has {number} {what}, which {ranks} ranks cannot share evenly",
                f"give a parallel.tensor that divides {number}",
            )
    for path, cut in found.layers.items():
        if any(size % (ranks // cut.copies) for size in cut.sizes):
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
