"""A model ready to run, with the adapters and the cut it has, and its way to and from disk.

It is made by `assemble.build`. Sharded weights are gathered here for whoever needs them whole.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from itertools import zip_longest
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import Parameter
from transformers import PreTrainedModel

from luthier.adapters import ADAPTERS, adapters_of, whole_parameters
from luthier.adapters.base import Adapter
from luthier.adapters.facts import plain
from luthier.adapters.store import copy_adapter
from luthier.batch import Batch
from luthier.config import AdapterConfig, RopeScaling
from luthier.config_parallel import ParallelConfig
from luthier.errors import Refused
from luthier.heap import return_freed_memory
from luthier.held import release
from luthier.layers import count
from luthier.models.absent import present
from luthier.models.cuts import cuts_of
from luthier.models.export import FullModel, full_model
from luthier.models.folder import original_hash
from luthier.models.partial import Chunk, Share, balanced, costs_of, places_of
from luthier.models.reading import LeaveOut
from luthier.models.rotary import config_changes
from luthier.models.sequence import tokens_of
from luthier.models.stage import Stage, check_shared, decoder_layers, same_stage
from luthier.parallel.branches import cut_branches
from luthier.parallel.collectives import Axis, whole_rows
from luthier.parallel.context import Context
from luthier.parallel.degrees import check_stages
from luthier.parallel.pipeline import OneStage, Pipeline, Relay
from luthier.parallel.sequence import split_sequence
from luthier.parallel.shard import Sharding, collected, whole
from luthier.parallel.tensor import by_heads, cut_layers
from luthier.parallel.together import reading_ways as reading_ways
from luthier.parallel.vocabulary import cut_vocabulary
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
    context: Context | None = None
    tokens: tuple[int, int] = (0, 1)  # which stretch of a row's tokens is here between the layers
    # what a router gives of these tokens, [B*s, E], -> of all, [B*S, E]
    join: Callable[[Tensor, Batch], Tensor] | None = None
    full: FullModel | None = None  # how it is written, once that was asked for

    def settle(self) -> None:
        """Free what reading the weights left behind (tens of MB), or a forward without backward gathered."""
        if self.sharding is not None:
            self.sharding.settle()
        return_freed_memory()

    def gathered(self) -> AbstractContextManager[None]:
        """Every rank has the whole model inside, and computes on its own."""
        return nullcontext() if self.sharding is None else self.sharding.gathered()

    def pipeline(self, parallel: ParallelConfig) -> Pipeline | OneStage:
        """What runs the micro-batches of a step through the model's stages."""
        share, split = self.stage.share, self.context and self.context.split
        if share is None:
            return OneStage(self.sharding, split)
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
            split=split,
        )

    @property
    def dtype(self) -> torch.dtype:
        """The type of the whole model, which a part of it may not show."""
        return self.model.dtype if self.stage.share is None else self.stage.share.dtype

    @property
    def head_dim(self) -> int | None:
        """Size of an attention head, where the family says so."""
        config = self.model.config
        heads, width = (getattr(config, n, None) for n in ("num_attention_heads", "hidden_size"))
        return getattr(config, "head_dim", None) or (width // heads if heads and width else None)

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


def cut_tensor(
    built: Built, parallel: ParallelConfig, stages: StagePlan | None, *, tell: bool = True
) -> None:
    """Cut the model's layers and vocabulary, and the adapters on them, over the tensor axis of its world; with
    `parallel.sequence` also the tokens between the layers of each of the `stages`, where the family can; `tell`:
    remark where it cannot."""
    model, axis = built.model, Axis.of(built.world)
    found, adapters = cuts_of(model, axis.ranks), adapters_of(model)
    tokens = tokens_of(model, found) if parallel.sequence else None
    if isinstance(tokens, str):
        asked = f"parallel.sequence=true for the model family '{model.config.model_type}'"
        if parallel.sequence is True:
            raise Refused(asked, tokens, "leave parallel.sequence out")
        built.remarks += [f"parallel.sequence is off: {tokens}"] if tell else []
        tokens = None
    with same_stage(built.stage):
        embedding, head = (
            None if path is None else model.get_submodule(path)
            for path in (found.embedding, found.head)
        )
        cut_layers(
            model,
            found.layers,
            adapters,
            found.shares,
            axis,
            by_tokens=tokens is not None,
            whole=[found.head] if found.head else [],
        )
        cut_branches(model, found, adapters, axis, by_tokens=tokens is not None)
        built.stage.vocabulary = cut_vocabulary(embedding, head, axis, tied=found.tied)
        by_heads(adapters, axis)
        if tokens is not None:
            layers = list(decoder_layers(model))
            runs = [layers] if stages is None else stages.runs(model, layers)
            split_sequence(model, runs, tokens.entries, tokens.shares, axis)
            built.tokens = axis.rank, axis.ranks
            for adapter in adapters.values():
                adapter.tokens = built.tokens
            built.join = partial(_joined, axis)
        found.settle(model, axis.rank, axis.ranks)
        release(model, "tensor")  # what every tensor rank has whole


def _joined(axis: Axis, x: Tensor, batch: Batch) -> Tensor:
    rows, width = batch.input_ids.shape
    return whole_rows(x, axis, (rows, width), shares=False)


def share_tokens(built: Built, method: str) -> None:
    """Let the context ranks share each row's tokens; refused where something beside attention looks at several."""
    built.context = Context(built.world, method)
    check_shared(built.stage, built.context.split)


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

    def runs(self, model: PreTrainedModel, layers: Sequence[nn.Module]) -> list[list[nn.Module]]:
        """The `layers` of each stage."""
        if not self.chunks:
            self.absent(model)
        return [[layers[i] for i in chunk.layers] for chunk in self.chunks]

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
    mine = {number for chunk in own for number in chunk.layers}
    # a layer of each stage in turn: what a rank gets, it gives of others
    turns = zip_longest(*(chunk.layers for chunk in plan.chunks))
    for number in (n for turn in turns for n in turn if n is not None):
        release(decoder_layers(model)[number], "pipeline", keep=number in mine)
    release(model, "pipeline")
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


@dataclass(frozen=True)
class AdapterFolder:
    """`train.saving.ModelCopy` of adapters: PEFT's folder has one file of weights, which rank 0 writes."""

    save: Callable[[Path], None] | None

    def write(self, folder: Path, weights: Any, rank: int, ranks: int) -> dict[str, Any]:
        return {"files": {}}

    def complete(self, folder: Path, parts: list[dict[str, Any]]) -> None:
        if self.save is not None:
            self.save(folder)


def copy_model(built: Built, text: Text, world: World) -> AdapterFolder | FullModel:
    """The trained thing as others read it, on its way to disk: a PEFT folder, or a Hugging Face folder with its
    tokenizer. Every rank of `world` must ask: the run's, or one of its copies on its own."""
    if built.adapter is None:
        if built.full is None:
            keep_stops(built.model, text.renderer.stop_ids)
            built.full = full_model(built.model, built.dtype, text.tokenizer)
        return built.full
    made = {"num_layers": built.num_layers, "init": built.init}
    if built.scaling is not None:
        made |= {"rope_scaling": plain(built.scaling)}
        made |= {"config_changes": config_changes(built.model.config)}
    made |= {"quantize": built.quantize} if built.quantize else {}
    if built.base_hash and (origin := original_hash(built.base)):
        made |= {"original_hash": origin}
    alone = world.size < built.world.size
    with nullcontext() if alone else _adapters_whole(built):
        if not world.is_main:
            return AdapterFolder(None)
        return AdapterFolder(
            copy_adapter(built.model, built.adapter, built.base, built.base_hash, made)
        )


@contextmanager
def _adapters_whole(built: Built) -> Iterator[None]:
    """Rank 0 has whole adapters inside, on the CPU, and those of all stages; every rank enters."""
    model, world, share = built.model, built.world, built.stage.share
    kept = whole_parameters(model)
    adapters = adapters_of(model).values()
    modules = [*adapters, *(model.get_submodule(name.rpartition(".")[0]) for name in kept)]
    hands = world.rank % world.stage_size == 0
    with ExitStack() as stack:
        keep = world.is_main or (share is not None and hands)
        stack.enter_context(whole(*modules, world=world, keep=keep))
        if share is not None:
            own = tuple(f"{adapter.path}." for adapter in adapters)
            here = {n: t for n, t in share.tensors().items() if n in kept or n.startswith(own)}
            found = collected(here if hands and world.rank else None, world)
            stack.enter_context(share.put_back(dict(found)))
        yield


def keep_stops(model: PreTrainedModel, stop_ids: Sequence[int]) -> None:
    """Record every end token in the generation config, so that whoever serves the model stops there."""
    if model.generation_config is not None and stop_ids:
        ends = list(stop_ids)
        model.generation_config.eos_token_id = ends if len(ends) > 1 else ends[0]


def name_of(dtype: torch.dtype) -> str:
    """`bfloat16` of torch.bfloat16."""
    return str(dtype).removeprefix("torch.")
