"""A model ready to run, with the adapters and the cut it has, and its way to and from disk.

It is made by `assemble.build`. Sharded weights are gathered here for whoever needs them whole.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.nn import Parameter
from transformers import PreTrainedModel

from luthier.adapters import ADAPTERS, adapters_of, whole_parameters
from luthier.adapters.base import Adapter
from luthier.adapters.facts import plain
from luthier.adapters.store import load_tensors, save_adapter
from luthier.config import AdapterConfig, RopeScaling, RunConfig
from luthier.config_parallel import ParallelConfig
from luthier.layers import count
from luthier.models.absent import present
from luthier.models.cuts import cuts_of
from luthier.models.folder import original_hash
from luthier.models.load import build_model, save_model
from luthier.models.partial import Chunk, Share, balanced, costs_of, places_of
from luthier.models.reading import LeaveOut
from luthier.models.rotary import config_changes
from luthier.models.stage import Stage, decoder_layers, same_stage
from luthier.parallel.branches import cut_branches
from luthier.parallel.degrees import check_stages
from luthier.parallel.pipeline import OneStage, Pipeline, Relay
from luthier.parallel.shard import Sharding, assign, collected, whole
from luthier.parallel.tensor import check_adapters, cut_layers
from luthier.parallel.world import World
from luthier.parts import Copy, mark_copy, whole_numel
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

    def settle(self) -> None:
        """Free what a forward without backward left gathered."""
        if self.sharding is not None:
            self.sharding.settle()

    def gathered(self) -> AbstractContextManager[None]:
        """Every rank has the whole model inside, and computes on its own."""
        return nullcontext() if self.sharding is None else self.sharding.gathered()

    @contextmanager
    def held(self) -> Iterator[None]:
        """Rank 0 has the whole model inside, on the CPU, to write it; every rank enters."""
        with ExitStack() as stack:
            share, hands = self.stage.share, self.world.rank % self.world.stage_size == 0
            if self.sharding is not None or self.world.sizes["tensor"] > 1:
                keep = self.world.is_main or (share is not None and hands)
                stack.enter_context(whole(self.model, world=self.world, keep=keep))
            if share is not None:
                given = share.tensors() if hands and self.world.rank else None
                found = collected(given, self.world)
                stack.enter_context(share.put_back(dict(found)))
            yield

    def pipeline(self, parallel: ParallelConfig) -> Pipeline | OneStage:
        """What runs the micro-batches of a step through the model's stages."""
        share = self.stage.share
        if share is None:
            return OneStage(self.sharding)
        adapters = adapters_of(self.model).values()
        return Pipeline(
            share,
            self.world,
            num_stages=self.world.sizes["pipeline"] * parallel.virtual_stages,
            schedule=parallel.schedule,
            width=self.model.config.get_text_config().hidden_size,
            dtype=self.dtype,
            device=self.device,
            beside=max((adapter.tokens_aside for adapter in adapters), default=0),
            sharding=self.sharding,
        )

    @property
    def dtype(self) -> torch.dtype:
        """The type of the whole model, which a part of it may not show."""
        return self.model.dtype if self.stage.share is None else self.stage.share.dtype

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
        return 8 * torch.finfo(self.dtype).eps if experts else 0.0

    @property
    def trained(self) -> list[tuple[str, Parameter]]:
        return [(n, p) for n, p in self.model.named_parameters() if p.requires_grad]

    @property
    def num_trained(self) -> int:
        if self.stage.share is not None:
            return self.stage.share.total[0]
        return sum(whole_numel(p) for _, p in self.trained)

    @property
    def num_base(self) -> int:
        if self.stage.share is not None:
            return self.stage.share.total[1]
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
        present(decoder_layers(built.model)),
        built.world,
        stage=parallel.stage,
        offload=parallel.offload,
        whole=[p for adapter in idle for p in adapter.parameters()],
    )


def cut_tensor(built: Built) -> None:
    """Cut the model's layers, and the adapters on them, over the tensor axis of its world."""
    world = built.world
    found, adapters = cuts_of(built.model, world.sizes["tensor"]), adapters_of(built.model)
    check_adapters(found.adapted, adapters, world)
    with same_stage(built.stage):
        cut_layers(built.model, found.layers, adapters, found.shares, world)
        cut_branches(built.model, found, adapters, world)
        found.settle(built.model, world.mesh.get_local_rank("tensor"), world.sizes["tensor"])


class StagePlan:
    """Which layers the ranks of a pipeline have, decided on a model that is whole or on meta."""

    def __init__(self, parallel: ParallelConfig, world: World, partly: bool = True) -> None:
        """`partly`: whether a rank need not read the layers of others."""
        self.parallel, self.ranks, self.partly = parallel, world.sizes["pipeline"], partly
        self.here = world.mesh.get_local_rank("pipeline")
        self.chunks: list[Chunk] = []

    def absent(self, model: PreTrainedModel) -> set[int]:
        """The layers of `model` that this rank has not."""
        places = places_of(model)
        check_stages(self.parallel, self.ranks, model.config.get_text_config().num_hidden_layers)
        number = self.ranks * self.parallel.virtual_stages
        parts = balanced(*costs_of(model, places), number)
        self.chunks = [Chunk(i, part, i == 0, i == number - 1) for i, part in enumerate(parts)]
        others = [chunk for chunk in self.chunks if chunk.number % self.ranks != self.here]
        return {layer for chunk in others for layer in chunk.layers}

    @property
    def leave_out(self) -> LeaveOut | None:
        return self.absent if self.partly else None

    @property
    def words(self) -> str:
        """The layers of each stage."""
        parts = (
            f"{c.layers[0]} to {c.layers[-1]}" if len(c.layers) > 1 else str(c.layers[0])
            for c in self.chunks
        )
        return f"stages of the pipeline: layers {'; '.join(parts)} and the head"


def plan_stages(
    parallel: ParallelConfig, world: World, new: AdapterConfig | None
) -> StagePlan | None:
    """The stages of `world`, if it has some; `new`: options of an adapter that will get its first values.

    Tensor parallelism cuts a whole model, and first values of some methods are a function of it.
    """
    if world.sizes["pipeline"] == 1:
        return None
    alone = new is None or new.method == "none" or ADAPTERS[new.method].from_layer
    return StagePlan(parallel, world, partly=alone and world.sizes["tensor"] == 1)


def cut_stages(built: Built, plan: StagePlan) -> None:
    """Leave out what other stages of the pipeline have of the model."""
    model, world = built.model, built.world
    if not plan.chunks:
        plan.absent(model)
    places, here = places_of(model), plan.here
    owners = [chunk.number % plan.ranks for chunk in plan.chunks for _ in chunk.layers]
    own = [chunk for chunk in plan.chunks if chunk.number % plan.ranks == here]
    relay = Relay(owners, world)
    built.stage.share = share = Share(model, places, own, relay)
    if share.tied and share.has_first != share.has_last:
        head: Any = model.get_submodule(places.ahead[0])
        mark_copy(head.weight, Copy(everywhere=False, counts=share.has_first))
    for adapter in adapters_of(model).values():
        if not adapter.name:  # of all layers together
            for parameter in adapter.parameters():
                mark_copy(parameter, Copy(everywhere=True, counts=here == 0))
    model.register_forward_hook(partial(_tell_logits, relay))
    built.remarks.append(plan.words)


def _tell_logits(relay: Relay, model: Any, args: Any, output: Any) -> Any:
    """A plain call of a cut model gives the last stage's logits on every rank."""
    output.logits = relay.tell(output.logits)
    return output


def write_model(built: Built, text: Text, folder: Path) -> None:
    """The trained thing as others read it: a PEFT folder, or a Hugging Face folder with its tokenizer."""
    if built.adapter is not None:
        made = {"num_layers": built.num_layers, "init": built.init}
        if built.scaling is not None:
            made |= {"rope_scaling": plain(built.scaling)}
            made |= {"config_changes": config_changes(built.model.config)}
        made |= {"quantize": built.quantize} if built.quantize else {}
        if built.base_hash and (origin := original_hash(built.base)):
            made |= {"original_hash": origin}
        save_adapter(built.model, folder, built.adapter, built.base, built.base_hash, made)
        return
    keep_stops(built.model, text.renderer.stop_ids)
    save_model(built.model, folder, text.tokenizer)


def read_model(built: Built, config: RunConfig, folder: Path) -> None:
    """Put the weights that `write_model` wrote back into the live model, bit for bit."""
    if built.adapter is not None:
        owners = [name.rpartition(".")[0] for name in whole_parameters(built.model)]
        modules = [*adapters_of(built.model).values(), *map(built.model.get_submodule, owners)]
        with whole(*modules, world=built.world, write=True):
            load_tensors(built.model, folder)
        return
    again = config.model.model_copy(
        update={"path": str(folder), "init": "pretrained", "dtype": name_of(built.dtype)}
        | {"device": "cpu", "attention": "math", "num_layers": None, "rope_scaling": None}
    )
    staged = built.stage.share is not None
    leave_out = StagePlan(config.parallel, built.world).absent if staged else None
    saved = build_model(again, seed=config.train.seed, leave_out=leave_out).state_dict()
    with torch.no_grad():
        for name, tensor in built.model.state_dict(keep_vars=True).items():
            assign(tensor, saved[name])


def keep_stops(model: PreTrainedModel, stop_ids: Sequence[int]) -> None:
    """Record every end token in the generation config, so that whoever serves the model stops there."""
    if model.generation_config is not None and stop_ids:
        ends = list(stop_ids)
        model.generation_config.eos_token_id = ends if len(ends) > 1 else ends[0]


def name_of(dtype: torch.dtype) -> str:
    """`bfloat16` of torch.bfloat16."""
    return str(dtype).removeprefix("torch.")
