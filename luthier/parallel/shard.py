"""Weights, gradients and optimiser state cut over the `shard` axis, by torch's `fully_shard` (FSDP2).

The three stages are three rhythms of one mechanism: between steps every process holds a part of each trained
tensor (and so its part of the optimiser's state); 3 gathers a layer only while it computes; 2 keeps the weights
whole during a step; 1 also the gradients, which are reduced once per step. Frozen weights are cut in stage 3
only. With one part there is nothing to cut, and gradients are summed over the replicas by `reduce`.
Losses are divided by global counts, so gradients are summed over ranks, never averaged.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
)
from torch.distributed.tensor import DTensor
from torch.nn import Parameter

from luthier.batch import current_capture
from luthier.errors import Refused
from luthier.held import release
from luthier.parallel.collectives import all_parts
from luthier.parallel.world import World
from luthier.parts import Part, copy_of, cut_of, is_share, marked

BUCKET = 2**25  # numbers that are summed over the replicas at once


class Sharding:
    """A sharded model: `root` (with what no layer holds) and `layers`, each gathered and freed as one."""

    def __init__(
        self,
        root: nn.Module,
        layers: Sequence[nn.Module],
        world: World,
        *,
        stage: int,
        offload: bool,
        whole: Iterable[Parameter] = (),
    ) -> None:
        """Cut the parameters of `root`, whose forward is the model's, over `world`'s shard axis.

        `whole`: parameters that stay whole on every rank. What is frozen does too, below stage 3. Raises
        Refused where one layer trains tensors of several types.
        """
        self.stage = stage
        kept = {id(p) for p in whole}
        ignored = {
            p for p in root.parameters() if id(p) in kept or (stage < 3 and not p.requires_grad)
        }
        half = any(p.requires_grad and p.dtype.itemsize == 2 for p in root.parameters())
        options: dict[str, Any] = {
            "mesh": _mesh(world),
            "ignored_params": ignored,
            # half-precision gradients of many ranks are added in float32
            "mp_policy": MixedPrecisionPolicy(reduce_dtype=torch.float32 if half else None),
            "offload_policy": CPUOffloadPolicy() if offload else OffloadPolicy(),
        }
        # the marks alone: whole parameters would live on until all are cut
        marks = {name: marked(torch.empty(0), p) for name, p in root.named_parameters()}
        inside = {id(p) for layer in layers for p in layer.parameters()}
        rest = [p for p in root.parameters() if id(p) not in inside]
        for group in (*(list(layer.parameters()) for layer in layers), rest):
            _check_types([p for p in group if p.requires_grad and p not in ignored])
        for layer in layers:
            release(layer)
            fully_shard(layer, reshard_after_forward=stage == 3, **options)
            layer.register_forward_hook(_gather_for_captured)
        release(root)
        fully_shard(root, reshard_after_forward=False, **options)
        for name, p in root.named_parameters():
            marked(p, marks[name])
        self.root: Any = root
        self.parts: list[Any] = [m for m in root.modules() if isinstance(m, FSDPModule)]
        for part in self.parts:
            part.set_gradient_divide_factor(1.0)
            part.set_force_sum_reduction_for_comms(True)

    def micro_batch(self, last: bool) -> None:
        """Say before each forward of a step whether its micro-batch is the last one."""
        if self.stage == 1:
            self.root.set_requires_gradient_sync(last)
        if self.stage < 3:
            self.root.set_reshard_after_backward(last)

    def hold(self) -> None:
        """Weights stay whole (below stage 3), and gradients are summed by `sum_held` alone."""
        self.root.set_requires_gradient_sync(False)
        self.root.set_reshard_after_backward(False)

    def sum_held(self) -> None:
        """Sum the gradients over the ranks and cut them, as the last backward would: torch's pipelines do the same."""
        self.root.set_requires_gradient_sync(True)
        self.root.set_reshard_after_backward(True)
        state: Any = self.root._get_fsdp_state()
        for inner in state._state_ctx.all_states:
            for group in inner._fsdp_param_groups:
                group.post_backward()
        state._root_post_backward_final_callback()

    def settle(self) -> None:
        """Free what a forward without backward left gathered: weights may change from here on."""
        for part in self.parts:
            part.reshard()

    @contextmanager
    def gathered(self) -> Iterator[None]:
        """Every weight is whole on every rank inside, for forwards whose number differs between ranks."""
        for part in self.parts:
            part.set_reshard_after_forward(False, recurse=False)
            part.unshard()
        try:
            yield
        finally:
            for part in self.parts:
                freed = self.stage == 3 and part is not self.root
                part.set_reshard_after_forward(freed, recurse=False)
            self.settle()


@torch.compiler.disable()
def _gather_for_captured(layer: Any, args: Any, output: Any) -> None:
    """Let keys and values that were taken out of a layer (virtual tokens') gather its weights in their backward.

    FSDP2 does so when the gradient of the layer's output comes. Nobody uses the last layer's in such a forward.
    """
    found = current_capture()
    if found:
        for tensor in found[max(found)]:
            if tensor.requires_grad:
                tensor.register_hook(lambda gradient: layer.unshard())


def _mesh(world: World) -> Any:
    """What `fully_shard` cuts over: the shard axis, and the context axis with it, whose gradients are summed too."""
    copies, inner = world.sizes["replicate"] > 1, "shard"
    if world.sizes["context"] > 1:
        inner = "shard_context"
        flat = world.mesh["shard", "context"]._flatten(inner)
        if not copies:
            return flat
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Slicing a flattened dim from root mesh")
        return world.mesh["replicate", inner] if copies else world.mesh[inner]


def _check_types(trained: Sequence[Parameter]) -> None:
    kinds = sorted({str(p.dtype).removeprefix("torch.") for p in trained})
    if len(kinds) > 1:
        raise Refused(
            "parallel.shard above 1",
            f"one layer trains tensors in {' and '.join(kinds)}, which cannot be cut together",
            "give model.dtype=float32, leave adapter.modules_to_save out, or use parallel.replicate",
        )


# ---- one tensor


def local(tensor: Tensor) -> Tensor:
    """This rank's part of a sharded tensor, a view; any other tensor as it is."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def full(tensor: Tensor, world: World) -> Tensor:
    """The whole of a sharded or cut tensor (all ranks must ask); any other tensor as it is."""
    one = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
    how = cut_of(tensor)
    if how is None:
        return one
    return all_parts(one.detach(), world.mesh.get_group("tensor"), how)


@torch.no_grad()
def part_of(tensor: Tensor, like: Tensor) -> Tensor:
    """A whole tensor cut as `like` is, without communication; `tensor` itself if that is whole."""
    how = cut_of(like)
    if how is not None and tensor.shape == how.whole_shape(like.shape):
        tensor = how.of(tensor)
    if not isinstance(like, DTensor) or isinstance(tensor, DTensor) or tensor.shape != like.shape:
        return tensor
    mine = tensor
    for axis, placement in enumerate(like.placements):
        if placement.is_shard():
            dim: int = placement.dim  # pyright: ignore[reportAttributeAccessIssue]
            parts = mine.chunk(like.device_mesh.size(axis), dim)
            at = like.device_mesh.get_local_rank(axis)
            mine = parts[at] if at < len(parts) else mine.narrow(dim, 0, 0)
    mine = mine.to(like.to_local().device, copy=True, memory_format=torch.contiguous_format)
    size: dict[str, Any] = {"shape": like.shape, "stride": like.stride()}
    return DTensor.from_local(mine, like.device_mesh, like.placements, run_check=False, **size)


@torch.no_grad()
def assign(target: Tensor, value: Tensor) -> None:
    """Copy a whole tensor into a (maybe sharded) one."""
    target.copy_(part_of(value, target))


@contextmanager
def whole(
    *modules: nn.Module, world: World, keep: bool = True, write: bool = False
) -> Iterator[None]:
    """Inside, the modules' sharded or cut parameters and buffers are whole plain tensors; all ranks must enter.

    Tensors are gathered one by one, onto the CPU if `keep` says that this rank wants them, else to be
    dropped. With `write`, what is changed inside goes into the parts (every rank must change it alike).
    """
    swapped: list[tuple[dict[str, Any], str, Tensor]] = []
    made: dict[int, Tensor] = {}
    for owner in (inner for module in modules for inner in module.modules()):
        for table in (owner._parameters, owner._buffers):
            for name, p in table.items():
                if p is None or not (isinstance(p, DTensor) or cut_of(p) is not None):
                    continue
                if id(p) not in made:
                    one = full(marked(p.detach(), p), world)
                    one = one if write else one.cpu() if keep else one.to("meta")
                    is_parameter = isinstance(p, Parameter)
                    made[id(p)] = Parameter(one, p.requires_grad) if is_parameter else one
                swapped.append((table, name, p))
    for table, name, p in swapped:
        table[name] = made[id(p)]
    try:
        yield
    finally:
        for table, name, p in swapped:
            changed, table[name] = table[name], p
            if write and changed is not None and id(p) in made:
                assign(p, made.pop(id(p)).detach())


# ---- gradients


def reduce(parameters: Sequence[Parameter], world: World) -> None:
    """Sum the gradients of tensors that are not sharded over the ranks with other rows or other tokens of them, and
    shares over the tensor ranks.

    A rank whose rows did not reach a tensor has none for it: zero, if another rank has one. The gradients of
    sharded tensors were summed in their backward.
    """
    own = [p for p in parameters if not isinstance(p, DTensor)]
    # a pipeline's stages ask together, also one that trains nothing
    if world.data_size * world.sizes["context"] > 1 and (own or world.sizes["pipeline"] > 1):
        _fill(own, world)
        groups = [None]
        # those that see other tokens, not those that cut the layers
        if world.size > world.data_size:
            axes = [a for a in ("replicate", "shard", "context") if world.sizes[a] > 1]
            groups = [world.mesh.get_group(axis) for axis in axes]
        for group in groups:
            _sum_buckets([p.grad for p in own if p.grad is not None], group)
    if world.sizes["tensor"] > 1:
        shares = [local(p.grad) for p in parameters if is_share(p) and p.grad is not None]
        _sum_buckets(shares, world.mesh.get_group("tensor"))
        for p in parameters:
            how = cut_of(p)
            if p.grad is not None and how is not None and (mask := _copied(p)) is not None:
                _sum_copies(local(p.grad), mask, how, world)


def _counted(gradient: Tensor, how: Part | None) -> Tensor:
    """This rank's numbers of a gradient, zero where a rank before it has the same."""
    own = local(gradient)
    mask = None if how is None or how.rank == how.holders[0] else _copied(gradient)
    return own if mask is None else own.masked_fill(mask, 0)


def _copied(tensor: Tensor) -> Tensor | None:
    """`Part.copied` of this rank's numbers of a tensor, sharded or not."""
    how = cut_of(tensor)
    mask = None if how is None else how.copied(tensor)
    return None if mask is None else local(part_of(mask, tensor))


def _sum_copies(gradient: Tensor, mask: Tensor, how: Part, world: World) -> None:
    """Sum, in place, what neighbours have of the gradient of the same numbers."""
    own = gradient.contiguous()
    found = [torch.empty_like(own) for _ in range(how.ranks)]
    torch.distributed.all_gather(found, own, group=world.mesh.get_group("tensor"))
    wide = torch.promote_types(own.dtype, torch.float32)
    total = sum(found[rank].to(wide) for rank in how.holders)
    gradient.copy_(torch.where(mask, total, own.to(wide)))


def _fill(own: list[Parameter], world: World) -> None:
    """Zero for the gradient that a rank has not and another one has."""
    reached = world.of_stage(world.gather([p.grad is not None for p in own]))
    for p, flags in zip(own, zip(*reached, strict=True), strict=True):
        if p.grad is None and any(flags):
            p.grad = torch.zeros_like(p)


def _sum_buckets(gradients: Iterable[Tensor], group: Any) -> None:
    bucket: list[Tensor] = []
    for gradient in gradients:
        if bucket and (
            sum(g.numel() for g in bucket) + gradient.numel() > BUCKET
            or (bucket[0].dtype, bucket[0].device) != (gradient.dtype, gradient.device)
        ):
            _all_reduce(bucket, group)
            bucket = []
        bucket.append(gradient)
    if bucket:
        _all_reduce(bucket, group)


def _all_reduce(tensors: list[Tensor], group: Any) -> None:
    """Sum tensors of one type over a group of ranks, in place; half precision is added in float32."""
    wide = torch.promote_types(tensors[0].dtype, torch.float32)
    flat = torch.cat([t.reshape(-1).to(wide) for t in tensors])
    torch.distributed.all_reduce(flat, group=group)
    for tensor, total in zip(tensors, flat.split([t.numel() for t in tensors]), strict=True):
        tensor.copy_(total.view_as(tensor))


def gathered(tensors: Mapping[str, Tensor], world: World, *, keep: bool) -> dict[str, Tensor]:
    """The whole of each tensor on the CPU, one after the other; nothing where `keep` is False. All must ask.

    Rank 0 gets the tensors of all pipeline stages, another rank those of its own.
    """
    out = {}
    hands = world.sizes["pipeline"] > 1 and world.rank % world.stage_size == 0
    for name, tensor in tensors.items():
        one = full(tensor, world)
        if keep or hands:
            out[name] = one.cpu()
    if world.sizes["pipeline"] > 1:
        out.update(collected(out if hands and world.rank else None, world))
    return out if keep else {}


def collected(tensors: Mapping[str, Tensor] | None, world: World) -> Iterator[tuple[str, Tensor]]:
    """On rank 0, name and value of every tensor that the first rank of each other stage hands over, one by one.

    All ranks must ask; only those first ranks give `tensors`.
    """
    ours = [(n, list(t.shape), str(t.dtype).split(".")[1]) for n, t in (tensors or {}).items()]
    facts = world.gather(ours)
    for tensor in (tensors or {}).values():
        torch.distributed.send(tensor.detach().cpu().contiguous(), dst=0)
    for rank, (name, shape, dtype) in ((r, fact) for r, each in enumerate(facts) for fact in each):
        if world.is_main:
            one = torch.empty(shape, dtype=getattr(torch, dtype))
            torch.distributed.recv(one, src=rank)
            yield name, one


def total_norm(gradients: Sequence[Tensor], world: World) -> float:
    """The L2 norm of all gradients together, of which some are sharded or cut; NaN or infinite if one is.

    Squares are summed in float64, so that neither the number of ranks nor their order shows.
    """

    def square(tensors: list[Tensor]) -> float:
        if not tensors:
            return 0.0
        wide = torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32
        norms = torch._foreach_norm(tensors, 2, wide)  # pyright: ignore[reportPrivateImportUsage]
        return float(torch.stack([n.double() for n in norms]).square().sum())

    kinds: dict[tuple[bool, bool], list[Tensor]] = {}
    for g in gradients:
        if (copy := copy_of(g)) is not None and not copy.counts:
            continue
        how = cut_of(g)
        kinds.setdefault((isinstance(g, DTensor), how is not None), []).append(_counted(g, how))
    both = [square(kinds.get(kind, [])) for kind in ((True, True), (True, False), (False, True))]
    # each replica of a part has the same gradient: count the parts of one replica
    tensor = world.sizes["tensor"]
    size = world.sizes["shard"] * world.sizes["context"] * tensor
    rows = world.vectors(both)[world.rank // size * size :][:size]
    parts = sum(row[0] for row in rows) + sum(row[1] for row in rows[::tensor])
    parts += sum(row[2] for row in rows[:tensor])
    return world.over_stages(square(kinds.get((False, False), [])) + parts) ** 0.5
