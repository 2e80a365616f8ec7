"""Which tensors of a model tensor parallelism cuts, and what else follows from it.

From the `tp_plan` of transformers' families, and from `fused.split_of` for what it does not tell: fused layers, or
a family without one. Experts are cut by their inner numbers in any family. What cannot be cut is refused here, on a
model without values, before any work; the cutting is `parallel/tensor.py`'s and `parallel/branches.py`'s.
"""

from __future__ import annotations

import copy
import math
import re
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from torch import Tensor, nn
from transformers import PreTrainedModel

from luthier.errors import Refused
from luthier.layers import features, is_linear, is_quantized
from luthier.models import families
from luthier.models.fused import Split, heads_of, split_of
from luthier.models.stage import decoder_layers
from luthier.parts import Part
from luthier.stacks import own_stacks, shape_of

STYLES = {"colwise": "outputs", "rowwise": "inputs"}
SHARED = "replicated_with_grad_allreduce"  # transformers' word for norms of single heads
EXPERTS = ("packed_colwise", "moe_tp_experts", "moe_identity_expert")  # styles of experts


@dataclass(frozen=True)
class LayerCut:
    """Side of a linear layer, or of the matrices of a stack, that is cut; the lengths of what lies one after the other
    along it; and how many neighbouring ranks have the same of each. `entering`: the gradient of its inputs is summed."""

    along: Literal["outputs", "inputs"]
    sizes: tuple[int, ...]
    copies: tuple[int, ...] = ()
    entering: bool = True

    def part(self, dim: int, rank: int, ranks: int) -> Part:
        return Part(dim, self.sizes, rank, ranks, self.copies)


@dataclass(frozen=True)
class Cuts:
    """`layers` by path. `experts`: path of an experts' module -> its stacks. `rows`: tensor cut along its first axis.
    `shares`: modules whose gradient is the sum of the ranks'. `gathered`: norms of the whole width -> how it is cut.
    `branches`: layers whose outputs' gradient is summed. `counts`: (module, attribute) of numbers of a whole layer, to
    be a rank's own; `configs`: modules that read numbers of heads in their config. `embedding` and `head`: paths of what
    is cut by rows of the vocabulary (the head is one of `layers`), `tied` if they are one tensor."""

    layers: dict[str, LayerCut] = field(default_factory=dict)
    experts: dict[str, dict[str, LayerCut]] = field(default_factory=dict)
    rows: dict[str, LayerCut] = field(default_factory=dict)
    shares: list[str] = field(default_factory=list)
    gathered: dict[str, LayerCut] = field(default_factory=dict)
    branches: list[str] = field(default_factory=list)
    counts: list[tuple[str, str]] = field(default_factory=list)
    configs: list[str] = field(default_factory=list)
    embedding: str | None = None
    head: str | None = None
    tied: bool = False

    @property
    def adapted(self) -> dict[str, LayerCut]:
        """By path, whatever may carry an adapter: layers and stacks."""
        stacks = (
            (f"{path}.{name}", how)
            for path, own in self.experts.items()
            for name, how in own.items()
        )
        return self.layers | dict(stacks)

    def settle(self, model: PreTrainedModel, rank: int, ranks: int) -> None:
        """Make the counts a rank's own, and tell attention layers which of the heads are here."""
        heads, groups = heads_of(model.config.get_text_config())
        mine, shared = heads // ranks, max(1, groups // ranks)
        for module in model.modules():
            if hasattr(module, "layer_idx"):
                module.heads_here = Part(-3, (heads,), rank, ranks)  # pyright: ignore[reportArgumentType]
            if hasattr(module, "num_key_value_groups"):
                module.num_key_value_groups = mine // shared  # pyright: ignore[reportArgumentType]
        for path, name in self.counts:
            module: Any = model.get_submodule(path)
            whole = getattr(module, name)
            if isinstance(whole, int):
                setattr(module, name, max(1, whole // ranks))
                continue
            how = next(
                how
                for of, how in self.layers.items()
                if of.startswith(f"{path}.") and how.sizes == tuple(whole)
            )
            setattr(module, name, how.part(0, rank, ranks).own_sizes)
        for path in self.configs:
            module = model.get_submodule(path)
            module.config = copy.copy(module.config)
            module.config.num_attention_heads = mine


def cuts_of(model: PreTrainedModel, ranks: int) -> Cuts:
    """The cut of `model` among `ranks`. Refused for families, heads and layers that cannot be."""
    config = model.config.get_text_config()
    maker = _Maker(model, ranks, split_of(config) or Split())
    found = maker.found
    plan = {name: style for name, style in (model.tp_plan or {}).items() if ".*." in name}
    for path, layer in _layers(model):
        maker.by_split(path, layer)
    maker.by_styles(plan)
    if not found.layers:
        raise Refused(maker.asked, "nothing tells how its layers are cut", _instead())
    _check(model, found, ranks, maker.asked)
    return _with_vocabulary(model, found)


def _with_vocabulary(model: PreTrainedModel, found: Cuts) -> Cuts:
    """Embedding and head cut by rows; both or none of them where they are one tensor."""
    paths = {id(module): path for path, module in model.named_modules()}
    embedding: Any = model.get_input_embeddings()
    head: Any = model.get_output_embeddings()
    plain = isinstance(embedding, nn.Embedding) and embedding.max_norm is None
    if head is None or not is_linear(head) or is_quantized(head):
        head = None
    tied = head is not None and head.weight is embedding.weight
    if tied and not plain:
        return found
    if head is not None:
        found.layers[paths[id(head)]] = LayerCut("outputs", (features(head)[1],))
        found = replace(found, head=paths[id(head)], tied=tied)
    return replace(found, embedding=paths[id(embedding)]) if plain else found


def _layers(model: PreTrainedModel) -> list[tuple[str, Any]]:
    """The decoder layers by path, without those of other pipeline stages."""
    every = {id(layer) for layer in decoder_layers(model) if layer._modules}
    return [(path, module) for path, module in model.named_modules() if id(module) in every]


class _Maker:
    """What cuts are made from: the model, the number of ranks and what is known of the family."""

    def __init__(self, model: PreTrainedModel, ranks: int, split: Split) -> None:
        self.model, self.ranks, self.split, self.found = model, ranks, split, Cuts()
        self.asked = f"parallel.tensor={ranks} for the model family '{model.config.model_type}'"
        self.heads, self.groups = heads_of(model.config.get_text_config())
        for what, number in (
            ("attention heads", self.heads),
            ("heads of keys and values", self.groups),
        ):
            whole = number % ranks == 0 or (number == self.groups and ranks % number == 0)
            if not whole or self.heads % ranks:
                raise Refused(
                    self.asked,
                    f"it has {number} {what}, which {ranks} ranks cannot share evenly",
                    f"give a parallel.tensor that divides {number}",
                )

    def by_split(self, path: str, layer: Any) -> None:
        """A decoder layer by what is known of the family."""
        found, split = self.found, self.split
        behind = (
            {name for names in split.branches.values() for name in names}
            if any(_has(layer, branch) for branch in split.branches)
            else set()
        )
        for name, cut in split.cuts.items():
            if not _has(layer, name):
                continue
            side = features(layer.get_submodule(name))[cut.along == "outputs"]
            found.layers[f"{path}.{name}"] = self.layer_cut(cut, side, name not in behind)
        for name, part in split.rows.items():
            tensor = _tensor(layer, name)
            if tensor is not None:
                cut = families.Cut("outputs", (part,))
                found.rows[f"{path}.{name}"] = self.layer_cut(cut, tensor.shape[0])
        for name in split.counts:
            owners = (n for n, m in layer.named_modules() if name in vars(m))
            found.counts.extend((f"{path}.{owner}".rstrip("."), name) for owner in owners)
        if split.config:
            found.configs.extend(
                f"{path}.{n}" for n, m in layer.named_modules() if hasattr(m, "layer_idx") and n
            )
        for name in split.gathered:
            layer_before = found.layers[f"{path}.{name.replace('_norm', '_proj')}"]
            found.gathered[f"{path}.{name}"] = layer_before
            found.shares.append(f"{path}.{name}")
        found.branches.extend(f"{path}.{name}" for name in split.branches if _has(layer, name))
        found.shares.extend(f"{path}.{name}" for name in behind if name not in split.cuts)
        for name, module in layer.named_modules():
            if stacks := own_stacks(module):
                found.experts[f"{path}.{name}"] = self.experts_cuts(
                    f"{path}.{name}", module, stacks
                )

    def layer_cut(self, cut: families.Cut, side: int, entering: bool = True) -> LayerCut:
        """`side`: the length of the side that is cut."""
        counts = {"heads": self.heads, "groups": self.groups}
        if set(cut.parts) <= counts.keys():
            each = side // sum(counts[part] for part in cut.parts)
            sizes = tuple(counts[part] * each for part in cut.parts)
        else:
            sizes = (side // len(cut.parts),) * len(cut.parts)
        several = max(1, self.ranks // self.groups)  # ranks that need the same keys
        copies = tuple(several if part == "groups" else 1 for part in cut.parts)
        if "per_head" in cut.parts and several > 1:
            raise self.uneven("groups of heads with their keys and values", self.groups)
        return LayerCut(cut.along, sizes, copies if several > 1 else (), entering)

    def experts_cuts(self, path: str, experts: Any, stacks: list[str]) -> dict[str, LayerCut]:
        if experts.has_post_expert_norm:
            raise Refused(
                self.asked, f"its experts '{path}' have a norm of their own outputs", _instead()
            )
        found = {}
        for name in stacks:
            _, rows, columns = shape_of(experts, name)
            if name == "down_proj":
                found[name] = LayerCut("inputs", (columns,))
            elif name == "gate_up_proj" and experts.is_concatenated:
                found[name] = LayerCut("outputs", (rows // 2, rows // 2))
            else:
                found[name] = LayerCut("outputs", (rows,))
                if name == "gate_up_proj" and rows % (
                    2 * self.ranks
                ):  # gate and value of one number
                    raise self.uneven("inner numbers of an expert", rows // 2)
        return found

    def by_styles(self, plan: dict[str, str]) -> None:
        """What transformers' plan says of layers that the family's own facts leave to it."""
        known = {*self.found.adapted, *self.found.gathered}
        for path, module in self.model.named_modules():
            style = plan.get(re.sub(r"\.\d+\.", ".*.", path))
            if style is None or path in known:
                continue
            name = path.rpartition(".")[2]
            if style == SHARED:
                if path not in {of.rpartition(".")[0] for of in self.found.rows}:
                    self.found.shares.append(path)
            elif style in STYLES and is_linear(module):
                along: Any = STYLES[style]
                groups = name in ("k_proj", "v_proj")
                cut = families.Cut(along, ("groups",) if groups else ("inner",))
                side = features(module)[along == "outputs"]
                self.found.layers[path] = self.layer_cut(cut, side)
            elif style not in EXPERTS or path not in self.found.experts:
                raise Refused(
                    self.asked, f"its '{path}' is of the style {style}, unknown here", _instead()
                )

    def uneven(self, what: str, number: int) -> Refused:
        return Refused(
            self.asked,
            f"it has {number} {what}, which {self.ranks} ranks cannot share evenly",
            f"give a parallel.tensor that divides {number}",
        )


def _check(model: PreTrainedModel, found: Cuts, ranks: int, asked: str) -> None:
    for path, cut in found.adapted.items():
        if any(
            size * n % ranks
            for size, n in zip(cut.sizes, cut.copies or (1,) * len(cut.sizes), strict=True)
        ):
            raise Refused(
                asked,
                f"layer '{path}' has {sum(cut.sizes)} {cut.along}, which {ranks} ranks cannot share evenly",
                f"give a parallel.tensor that divides {math.gcd(*cut.sizes)}",
            )
        owner, _, name = path.rpartition(".")
        held: Any = getattr(model.get_submodule(owner), name)
        if is_quantized(held):
            held.check_part(cut.part(-2 if cut.along == "outputs" else -1, 0, ranks), path, asked)


def _has(layer: Any, name: str) -> bool:
    """Whether a decoder layer has this sub-layer."""
    owner, _, last = name.rpartition(".")
    try:
        return getattr(layer.get_submodule(owner), last, None) is not None
    except AttributeError:
        return False


def _tensor(layer: Any, name: str) -> Tensor | None:
    owner, _, last = name.rpartition(".")
    if owner and not _has(layer, owner):
        return None
    found = getattr(layer.get_submodule(owner), last, None)
    return found if isinstance(found, Tensor) else None


def _instead() -> str:
    return "use parallel.shard (with parallel.stage=3 for models that do not fit) in place of parallel.tensor"
