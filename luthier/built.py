"""A model ready to run, with the adapters and the cut it has, and its way to and from disk.

It is made by `assemble.build`. Sharded weights are gathered here for whoever needs them whole.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch.nn import Parameter
from transformers import PreTrainedModel

from luthier.adapters import ADAPTERS, adapters_of, whole_parameters
from luthier.adapters.base import Adapter
from luthier.adapters.facts import plain
from luthier.adapters.store import copy_adapter
from luthier.config import AdapterConfig, RopeScaling
from luthier.config_parallel import ParallelConfig
from luthier.layers import count
from luthier.models.cuts import cuts_of
from luthier.models.export import FullModel, full_model
from luthier.models.folder import original_hash
from luthier.models.rotary import config_changes
from luthier.models.stage import Stage, decoder_layers, same_stage
from luthier.parallel.shard import Sharding, whole
from luthier.parallel.tensor import check_adapters, cut_layers
from luthier.parallel.world import World
from luthier.parts import whole_numel
from luthier.text import Text

# names under which the families of transformers say that they are mixtures of experts
EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")


@dataclass
class Built:
    """A model ready to run: weights read, adapter attached, attention installed."""

    model: PreTrainedModel
    stage: Stage
    device: torch.device
    base: str  # folder or hub name of the base
    base_hash: str | None = None
    num_layers: int | None = None
    init: str = "pretrained"
    scaling: RopeScaling | None = None
    quantize: dict[str, Any] = field(
        default_factory=dict
    )  # the options that are not the usual ones
    adapter: AdapterConfig | None = None
    remarks: list[str] = field(default_factory=list)
    world: World = field(default_factory=World)
    sharding: Sharding | None = None
    full: FullModel | None = None  # how it is written, once that was asked for

    def settle(self) -> None:
        """Free what a forward without backward left gathered."""
        if self.sharding is not None:
            self.sharding.settle()

    def gathered(self) -> AbstractContextManager[None]:
        """Every rank has the whole model inside, and computes on its own."""
        return nullcontext() if self.sharding is None else self.sharding.gathered()

    @property
    def kernel(self) -> str:
        """The attention kernel that was installed."""
        kernels = (getattr(module, "attention_kernel", None) for module in self.model.modules())
        return next(kernel for kernel in kernels if kernel)

    @property
    def rounding(self) -> float:
        """What packing may change in a hidden state: nothing, but for mixtures of experts."""
        text = self.model.config.get_text_config()
        experts = any(getattr(text, name, None) for name in EXPERTS)
        return 8 * torch.finfo(self.model.dtype).eps if experts else 0.0

    @property
    def trained(self) -> list[tuple[str, Parameter]]:
        return [(n, p) for n, p in self.model.named_parameters() if p.requires_grad]

    @property
    def num_trained(self) -> int:
        return sum(whole_numel(p) for _, p in self.trained)

    @property
    def num_base(self) -> int:
        added = (whole_numel(p) for n, p in self.model.named_parameters() if ".adapter." in f".{n}")
        return count(self.model)[1] - sum(added)

    @property
    def reserved(self) -> int:
        """Positions of the model that the adapter takes from every document."""
        return ADAPTERS[self.adapter.method].reserve(self.adapter) if self.adapter else 0


def cut(built: Built, parallel: ParallelConfig) -> None:
    """Cut the model over the shard axis of its world.

    Adapters that some rows do not reach stay whole: which ranks have gradients of them differs from step to
    step. So do those that are put back under a constraint, which needs all of a matrix.
    """
    idle = [
        adapter
        for adapter in adapters_of(built.model).values()
        if adapter.may_idle or type(adapter).retract is not Adapter.retract
    ]
    built.sharding = Sharding(
        built.stage,
        list(decoder_layers(built.model)),
        built.world,
        stage=parallel.stage,
        offload=parallel.offload,
        whole=[p for adapter in idle for p in adapter.parameters()],
    )


def cut_tensor(built: Built) -> None:
    """Cut the model's layers, and the adapters on them, over the tensor axis of its world."""
    world = built.world
    found, adapters = cuts_of(built.model, world.sizes["tensor"]), adapters_of(built.model)
    check_adapters(found.layers, adapters, world)
    with same_stage(built.stage):
        cut_layers(built.model, found.layers, adapters, found.shares, world)
        found.settle(built.model, world.mesh.get_local_rank("tensor"), world.sizes["tensor"])


@dataclass(frozen=True)
class AdapterFolder:
    """`train.saving.ModelCopy` of adapters: PEFT's folder has one file of weights, which rank 0 writes."""

    save: Callable[[Path], None] | None

    def write(self, folder: Path, weights: Any, rank: int, ranks: int) -> dict[str, Any]:
        return {"files": {}}

    def complete(self, folder: Path, parts: list[dict[str, Any]]) -> None:
        if self.save is not None:
            self.save(folder)


def copy_model(built: Built, text: Text) -> AdapterFolder | FullModel:
    """The trained thing as others read it, on its way to disk: a PEFT folder, or a Hugging Face folder with its
    tokenizer. Every rank must ask."""
    if built.adapter is None:
        if built.full is None:
            keep_stops(built.model, text.renderer.stop_ids)
            built.full = full_model(built.model, text.tokenizer)
        return built.full
    made = {"num_layers": built.num_layers, "init": built.init}
    if built.scaling is not None:
        made |= {"rope_scaling": plain(built.scaling)}
        made |= {"config_changes": config_changes(built.model.config)}
    made |= {"quantize": built.quantize} if built.quantize else {}
    if built.base_hash and (origin := original_hash(built.base)):
        made |= {"original_hash": origin}
    owners = [name.rpartition(".")[0] for name in whole_parameters(built.model)]
    modules = [*adapters_of(built.model).values(), *map(built.model.get_submodule, owners)]
    with whole(*modules, world=built.world, keep=built.world.is_main):
        if not built.world.is_main:
            return AdapterFolder(None)
        return AdapterFolder(
            copy_adapter(built.model, built.adapter, built.base, built.base_hash, made)
        )


def keep_stops(model: PreTrainedModel, stop_ids: Sequence[int]) -> None:
    """Record every end token in the generation config, so that whoever serves the model stops there."""
    if model.generation_config is not None and stop_ids:
        ends = list(stop_ids)
        model.generation_config.eos_token_id = ends if len(ends) > 1 else ends[0]


def name_of(dtype: torch.dtype) -> str:
    """`bfloat16` of torch.bfloat16."""
    return str(dtype).removeprefix("torch.")
