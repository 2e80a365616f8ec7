"""Stages of a model one after the other on the mesh's `pipeline` axis, by torch's schedules.

Only hidden states cross, and their gradients: every rank of a pipeline reads the same rows. A step's micro-batches
are made equally large, as torch's stages want them. `OneStage` is the pipeline of a run without one.
`Relay` runs the stages one after the other without gradients, for whatever calls the model between steps. Which part
of the model is here is told by `models/partial.py`, what a micro-batch computes by `train/step.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.pipelining import PipelineStage, Schedule1F1B
from torch.distributed.pipelining.schedules import (
    ScheduleInterleaved1F1B,
    ScheduleInterleavedZeroBubble,
)
from torch.nn import Parameter

from luthier.batch import FILLER, IGNORE, PADDING, Batch
from luthier.errors import Failed, Refused
from luthier.parallel.shard import local
from luthier.parallel.world import World
from luthier.parts import copy_of

LOOPED = {"interleaved": ScheduleInterleaved1F1B, "zero_bubble": ScheduleInterleavedZeroBubble}
AHEAD = 4  # messages of a relay that may wait to be received


Split = Callable[[Batch], Batch]  # a context rank's tokens of a batch


class Passes(Protocol):
    """What one step computes of each micro-batch."""

    def forward(self, batch: Batch, *where: Any) -> Any: ...  # hidden states
    def loss(self, hidden: Tensor, batch: Batch) -> Tensor: ...  # to be differentiated
    def done(self) -> None: ...  # after each backward


class Rhythm(Protocol):
    """`shard.Sharding`: is told before the backward of each micro-batch whether it is the last one; or to hold the
    gradients of all of them, and then to sum these."""

    def micro_batch(self, last: bool) -> None: ...
    def hold(self) -> None: ...
    def sum_held(self) -> None: ...


@dataclass(frozen=True)
class OneStage:
    """A pipeline of one stage: forward and backward of one micro-batch after the other."""

    sharding: Rhythm | None = None
    split: Split | None = None

    def run(self, micro_batches: Sequence[Batch], passes: Passes) -> None:
        for i, batch in enumerate(micro_batches):
            if self.sharding is not None:
                self.sharding.micro_batch(last=i == len(micro_batches) - 1)
            batch = self.split(batch) if self.split else batch
            passes.loss(passes.forward(batch), batch).backward()
            passes.done()


class Pipeline:
    """This rank's stages among all of them. `run` computes a step's gradients by the schedule."""

    def __init__(
        self,
        share: Any,
        world: World,
        *,
        num_stages: int,
        schedule: str,
        width: int,
        dtype: torch.dtype,
        device: torch.device,
        beside: int = 0,
        sharding: Rhythm | None = None,
        split: Split | None = None,
    ) -> None:
        """`share`: `models.partial.Share`. Hidden states are [B, S, width] of `dtype`; `beside`: tokens that cross
        with them (`crossing.Border.aside`). `split` as of `OneStage`: a context rank's tokens of a batch."""
        self.share, self.num_stages, self.name = share, num_stages, schedule
        self.group, self.ranks = world.mesh.get_group("pipeline"), world.sizes["pipeline"]
        self.width, self.dtype, self.device, self.beside = width, dtype, device, beside
        self.sharding, self.split = sharding, split
        self.batches: list[Batch] = []
        self.passes: Passes | None = None
        self._made: tuple[Any, Any] = (None, None)  # shape, schedule

    def run(self, micro_batches: Sequence[Batch], passes: Passes) -> None:
        """The gradients of all micro-batches, added up; those of other data ranks are not."""
        number = enough(len(micro_batches), self.ranks, self.name)
        self.batches = alike(micro_batches, number)
        if self.split is not None:
            self.batches = list(map(self.split, self.batches))
        self.passes = passes
        index = torch.arange(number)
        schedule = self._schedule(number, tuple(self.batches[0].input_ids.shape))
        for stage in self._stages:
            stage.left = number
        # zero bubble takes gradients of weights past the hooks that would sum those of shards
        late = self.sharding if self.name == "zero_bubble" else None
        if late is not None:
            late.hold()
        schedule.step(number=index, target=index, return_outputs=False)
        if late is not None:
            late.sum_held()
        self.batches, self.passes = [], None

    def _schedule(self, number: int, shape: tuple[int, ...]) -> Any:
        if self._made[0] != (number, shape):
            sizes = [(*shape, self.width)] + [(1, self.beside, self.width)] * (self.beside > 0)
            crossing = tuple(
                torch.empty(size, dtype=self.dtype, device="meta", requires_grad=True)
                for size in sizes
            )
            self._stages = [
                _Stage(
                    self,
                    _Part(self, chunk),
                    chunk.number,
                    self.num_stages,
                    self.device,
                    input_args=() if chunk.first else crossing,
                    output_args=crossing[:1] if chunk.last else crossing,
                    group=self.group,
                )
                for chunk in self.share.chunks
            ]
            options: dict[str, Any] = {"loss_fn": self._loss, "scale_grads": False}
            if self.name == "1f1b":
                made: Any = Schedule1F1B(self._stages[0], number, **options)
            else:
                stages: Any = self._stages
                made = LOOPED[self.name](stages, number, **options)
            self._made = (number, shape), made
        return self._made[1]

    def _loss(self, hidden: Tensor, number: Tensor) -> Tensor:
        assert self.passes is not None
        return self.passes.loss(hidden, self.batches[int(number)])


class _Part(nn.Module):
    """One stage as torch's pipeline calls it: hidden states of the stage before -> those for the next."""

    def __init__(self, pipeline: Pipeline, chunk: Any) -> None:
        super().__init__()
        vars(self)["pipeline"] = pipeline
        self.chunk = chunk

    def parameters(self, recurse: bool = True) -> Iterator[Parameter]:
        """Those that its gradient reaches."""
        pipeline: Pipeline = vars(self)["pipeline"]
        return iter(p for p in pipeline.share.parameters(self.chunk) if p.requires_grad)

    def forward(self, *given: Tensor, number: Tensor) -> Any:
        pipeline: Pipeline = vars(self)["pipeline"]
        assert pipeline.passes is not None
        batch = pipeline.batches[int(number)]
        out = pipeline.passes.forward(batch, self.chunk.border(*given), self.chunk)
        first = out[0] if isinstance(out, tuple) else out
        if first.dtype != pipeline.dtype:
            raise Failed(
                "the pipeline",
                f"stage {self.chunk.number} gives hidden states in {first.dtype}, "
                f"where {pipeline.dtype} was expected",
                "use parallel.shard in place of parallel.pipeline, and report this",
            )
        return out


class _Stage(PipelineStage):
    """torch's stage, which says when a micro-batch's backward begins and is done."""

    def __init__(self, pipeline: Pipeline, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.pipeline = pipeline
        self.left = 0  # micro-batches whose backward is to come

    def _around(self, work: Callable[..., None], *args: Any, last: bool, **options: Any) -> None:
        pipeline = self.pipeline
        if pipeline.sharding is not None and pipeline.name != "zero_bubble":
            pipeline.sharding.micro_batch(last=last and self.left == 1)
        work(*args, **options)
        self._laid_out()
        self.left -= last
        assert pipeline.passes is not None
        pipeline.passes.done()

    def backward_one_chunk(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, bwd_chunk_id: int, loss: Any = None, full_backward: bool = True, **options: Any
    ) -> None:
        self._around(
            super().backward_one_chunk,
            bwd_chunk_id,
            loss,
            full_backward,
            last=full_backward,
            **options,
        )

    def backward_weight_one_chunk(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, bwd_chunk_id: int, **options: Any
    ) -> None:
        self._around(super().backward_weight_one_chunk, bwd_chunk_id, last=True, **options)

    def _laid_out(self) -> None:
        """Gradients as autograd accumulates them: a fused optimiser takes them to lie in memory as their tensors do."""
        for p in self.submod.parameters():
            if p.grad is not None and local(p.grad).stride() != local(p).stride():
                p.grad = torch.empty_like(p).copy_(p.grad)


def enough(number: int, ranks: int, schedule: str) -> int:
    """The smallest number of micro-batches, at least `number`, that the schedule can run."""
    number = max(number, ranks)
    while schedule != "1f1b" and number % (number // ranks):
        number += 1
    return number


def alike(batches: Sequence[Batch], number: int) -> list[Batch]:
    """`number` batches of one shape: shorter ones get padding, missing rows and batches count for nothing."""
    rows = max(len(b.input_ids) for b in batches)
    width = max(b.input_ids.shape[1] for b in batches)

    def padded(x: Tensor, value: int) -> Tensor:
        ends = (0, width - x.shape[-1]) + (0, 0) * (x.ndim - 2) + (0, rows - len(x))
        return nn.functional.pad(x, ends, value=value)

    found = [
        Batch(
            padded(b.input_ids, int(b.input_ids[0, 0])),
            padded(b.labels, IGNORE),
            padded(b.position_ids, 0),
            padded(b.document_ids, PADDING),
            (*b.rows, *[FILLER] * (rows - len(b.rows))),
        )
        for b in batches
    ]
    empty = replace(
        found[0], labels=torch.full_like(found[0].labels, IGNORE), rows=(FILLER,) * rows
    )
    return found + [empty] * (number - len(found))


class Relay:
    """Runs a cut model without gradients: every rank calls it alike, and each layer is computed where it is."""

    def __init__(self, owners: Sequence[int], world: World) -> None:
        """`owners`: of each layer its place on the pipeline axis."""
        self.owners = list(owners)
        self.group = world.mesh.get_group("pipeline")
        self.here = world.mesh.get_local_rank("pipeline")
        self.quiet = False
        self._sent: list[tuple[Any, Tensor]] = []

    def at(self, number: int, hidden: Tensor) -> Tensor:
        """In the place of layer `number`, of another rank."""
        if number > 0 and self.owners[number - 1] == self.here:
            one = hidden.detach().contiguous()
            work = dist.isend(one, group=self.group, group_dst=self.owners[number])
            self._sent.append((work, one))
            while len(self._sent) > AHEAD:
                self._sent.pop(0)[0].wait()
        if number + 1 < len(self.owners) and self.owners[number + 1] == self.here:
            hidden = torch.empty_like(hidden, memory_format=torch.contiguous_format)
            dist.recv(hidden, group=self.group, group_src=self.owners[number])
        return hidden

    def tell(self, tensor: Tensor) -> Tensor:
        """The last stage's tensor, which has this shape on every rank, for all; unless `quietly`."""
        if self.quiet:
            return tensor
        one = tensor.detach().clone(memory_format=torch.contiguous_format)
        dist.broadcast(one, group=self.group, group_src=self.owners[-1])
        return one

    @contextmanager
    def quietly(self) -> Iterator[None]:
        """Inside, the last stage keeps its result for itself."""
        self.quiet = True
        try:
            yield
        finally:
            self.quiet = False


def check_trained(number: int, world: World) -> None:
    """Refuse, on every rank, a model of which nothing is trained. `number`: of trained tensors here; stages may have none."""
    if not any(world.gather(number)):
        raise Refused("training", "no parameter is trainable", "check adapter.targets")


# ---- tensors that are on several stages


@torch.no_grad()
def sum_copies(parameters: Sequence[Parameter], world: World) -> None:
    """Sum the gradients of what is on several stages (`parts.Copy`), so that the copies stay equal."""
    if world.sizes["pipeline"] == 1:
        return
    group, last = world.mesh.get_group("pipeline"), world.sizes["pipeline"] - 1
    here = world.mesh.get_local_rank("pipeline")
    for p in parameters:
        how = copy_of(p)
        if how is None:
            continue
        if p.grad is None:
            p.grad = torch.zeros_like(p)
        mine = local(p.grad)
        if how.everywhere:
            dist.all_reduce(mine, group=group)
            continue
        mine = mine.contiguous()
        theirs = torch.empty_like(mine)
        other = last if here == 0 else 0
        # as one operation: on a GPU a send by itself would wait for the other's receive behind its send
        both = [
            dist.P2POp(dist.isend, mine, group=group, group_peer=other),
            dist.P2POp(dist.irecv, theirs, group=group, group_peer=other),
        ]
        for work in dist.batch_isend_irecv(both):
            work.wait()
        local(p.grad).add_(theirs)
