"""One optimiser step: micro-batches in, updated weights and a report out.

`Updater` joins model, loss, gradients, clipping, loss scaling and optimiser, the same way for full and
adapter training in any dtype, and owns the state of them that a checkpoint holds. When steps happen, at
which rate, and what else happens between them is `loop.py`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn import Module, Parameter
from torch.optim import Optimizer

from luthier.batch import TENSORS, Batch
from luthier.errors import Failed, NotFinite, Refused
from luthier.models.routers import router_logits
from luthier.parallel.extremes import peaks
from luthier.parallel.pieces import pieces_of
from luthier.parallel.pipeline import OneStage, Passes, sum_copies
from luthier.parallel.shard import reduce
from luthier.parallel.world import World
from luthier.parts import marked
from luthier.train.gates import check_finite, num_seeing_several_keys
from luthier.train.loss import token_loss
from luthier.train.master import LossScaler, MasterWeights
from luthier.train.metrics import StepReport
from luthier.train.optim import (
    clip_gradients,
    load_optimizer_tensors,
    optimizer_tensors,
    set_lr,
)
from luthier.train.router import RouterLoss
from luthier.train.state import Stored, model_tensors


class Gate(Protocol):
    """`gates.check_first_gradients` of a model."""

    def __call__(
        self, *, gradients: Mapping[str, Tensor | None], step: int, zeros: bool
    ) -> object: ...


class Stage(Protocol):
    """`models.stage.Stage`: hidden states [B, S, D] of a batch; logits [N, V] of rows [N, D]."""

    @property
    def model(self) -> Module: ...
    @property
    def vocabulary(self) -> Any: ...
    def __call__(self, batch: Batch, /, *where: Any) -> Any: ...
    def head(self, hidden: Tensor, /) -> Tensor: ...
    def relative_logits(self, hidden: Tensor, targets: Tensor, /) -> Tensor: ...
    def head_parameters(self) -> list[Parameter]: ...


class Runner(Protocol):
    """`parallel.pipeline.Pipeline`, or its `OneStage`: the backwards of a step's micro-batches."""

    def run(self, micro_batches: Sequence[Batch], passes: Passes, /) -> None: ...


@dataclass(kw_only=True)
class Updater:
    """Trains the parameters of `master`, over which `optimizer` was made.

    `clip`: largest norm of the gradient, 0 = off. `gate`, which raises to stop, is called before the
    first update, and before the next ones until a step has supervised tokens that see several keys; only
    there with `zeros`, and then `gated` is True. `router`: a loss of the routers' logits, added to what is
    trained, not to the loss that is reported; with several micro-batches it takes a forward of each more, as
    it counts the tokens of the whole step first. `split` gives this rank's tokens of a batch, where ranks share
    them; `pipeline` does so itself. The model's mode (train or eval) is the caller's.
    `on_nan`: a step whose loss or gradient is not finite ends the run (`stop`) or updates nothing (`skip`, at most
    `max_nan_steps` in a row); `keep_rows(step, rows, micro_batches)` writes the rows down and says where.
    """

    stage: Stage
    master: MasterWeights
    optimizer: Optimizer
    scaler: LossScaler = field(default_factory=lambda: LossScaler(False))
    clip: float = 1.0
    gate: Gate | None = None
    device: torch.device | str = "cpu"
    world: World = field(default_factory=World)
    router: RouterLoss | None = None
    pipeline: Runner = field(default_factory=OneStage)
    on_nan: str = "stop"
    max_nan_steps: int = 10
    keep_rows: Callable[[int, Sequence[int], Sequence[Batch]], str] | None = None
    split: Callable[[Batch], Batch] | None = None
    gated: bool = field(default=False, init=False)
    half_updated: bool = field(default=False, init=False)  # inside of the optimiser's step
    _nan_steps: int = field(default=0, init=False)  # in a row

    def update(self, micro_batches: Sequence[Batch], *, step: int, lr: float) -> StepReport:
        """Do optimiser step number `step` (from 1) at rate `lr`; the report has no times yet.

        The loss is the sum over all supervised tokens of the step divided by their count. A step without
        supervised tokens, or one that overflows float16, updates nothing and says so. Raises NotFinite, with
        no weight touched, when the loss or a gradient is not finite and `on_nan` does not skip the step.
        """
        counts = self._counts(micro_batches)
        report = StepReport(
            step=step,
            lr=lr,
            num_supervised=counts[0],
            num_tokens=counts[1],
            num_slots=counts[2],
        )
        if not report.num_supervised:
            return replace(report, skipped="no supervised token")
        try:
            shares = self._shares(micro_batches)
            passes = _Passes(self, report, shares)
            self.pipeline.run(micro_batches, passes)
            reduce(self.master.parameters, self.world)
            sum_copies(self.master.parameters, self.world)
            # floats: the first wait for the device in the step
            loss = self.world.sum_of_tokens(sum(map(float, passes.losses)))
            if self.router is not None:
                (routed,) = self.world.sums([sum(map(float, passes.routed))])
                report = replace(report, router_loss=routed)
            if not math.isfinite(loss):
                return self._not_finite(loss, math.nan, report, micro_batches)
            self.scaler.unscale(self.master.parameters)
            norm = clip_gradients(self.master.parameters, self.clip, self.world)
            if not self.scaler.update(math.isfinite(norm)):
                return replace(report, loss=loss, skipped="float16 overflow")
            if not math.isfinite(norm):
                return self._not_finite(loss, norm, report, micro_batches)
            if self.gate is not None and not self.gated:
                telling = self.world.sum(sum(map(num_seeing_several_keys, micro_batches))) > 0
                self.gate(gradients=self._everywhere(), step=step, zeros=telling)
                self.gated = telling
            set_lr(self.optimizer, lr)
            self.half_updated = True
            self.optimizer.step()
            self.master.write_back()
            self.half_updated, self._nan_steps = False, 0
            return replace(report, loss=loss, grad_norm=norm)
        finally:
            self.master.zero_grad()

    def rehearse(self, micro_batches: Sequence[Batch]) -> None:
        """Forward and backward of a step, whose gradients are dropped: only the memory that they take is of interest."""
        supervised, tokens, slots = self._counts(micro_batches)
        report = StepReport(
            step=0, lr=0.0, num_supervised=max(1, supervised), num_tokens=tokens, num_slots=slots
        )
        try:
            self.pipeline.run(micro_batches, _Passes(self, report, self._shares(micro_batches)))
            reduce(self.master.parameters, self.world)
            sum_copies(self.master.parameters, self.world)
        finally:
            self.master.zero_grad()

    def _counts(self, micro_batches: Sequence[Batch]) -> list[int]:
        """Supervised tokens, real tokens and slots of the step on all ranks."""
        real = [batch for batch in micro_batches if not batch.is_filler]
        ours = [
            float(sum(batch.num_supervised for batch in real)),
            float(sum(batch.num_real_tokens for batch in real)),
            float(sum(batch.input_ids.numel() for batch in real)),
        ]
        theirs = self.world.of_data(self.world.vectors(ours))
        return [int(sum(column)) for column in zip(*theirs, strict=True)]

    def _everywhere(self) -> dict[str, Tensor | None]:
        """Gradients by name; with several ranks what there is of each on any of them."""
        gradients = self.master.gradients()
        return gradients if self.world.size == 1 else peaks(gradients, self.world)

    def _shares(self, micro_batches: Sequence[Batch]) -> Tensor | None:
        """Tokens of the step at each expert; None where one forward tells by itself."""
        if self.router is None or (len(micro_batches) == 1 and self.world.size == 1):
            return None
        total = torch.zeros(())
        for batch in micro_batches:
            batch = self._mine(batch)
            with torch.no_grad(), router_logits() as logits:
                self.stage(batch)
            counts = self.router.shares(logits, batch).cpu()
            total = total + (0 * counts if batch.is_filler else counts)
        return torch.tensor(self.world.sums(total.tolist()))

    def _mine(self, batch: Batch) -> Batch:
        """What this rank computes of a batch, on its device."""
        return (self.split(batch) if self.split else batch).to(self.device)

    def _loss_sum(self, batch: Batch) -> Tensor:
        hidden = self.stage(batch)  # [B, S, D]
        return token_loss(
            hidden,
            batch.labels,
            self.stage.head,
            self.stage.head_parameters(),
            relative=self.stage.relative_logits,
            vocabulary=self.stage.vocabulary,
        )

    def _not_finite(
        self, loss: float, norm: float, report: StepReport, micro_batches: Sequence[Batch]
    ) -> StepReport:
        """Skip the step or raise NotFinite, the same on every rank; names the rows whose own loss is not
        finite, or all rows when none is to blame."""
        rows = [row for batch in micro_batches for row in _single_rows(batch)]
        bad = []
        with torch.no_grad():
            # as many forwards on every rank, for those that gather weights in them
            for i in range(int(self.world.max(len(rows)))):
                row = self._mine(rows[i % len(rows)])
                if not self._loss_sum(row).isfinite() and i < len(rows):
                    bad.append(row.rows[0])
        every = [row.rows[0] for row in rows if not row.is_filler]
        found = self.world.of_tokens(self.world.gather([bad, every]))
        weights: dict[str, Tensor] = dict(self.stage.model.named_parameters())
        if self.world.size > 1:
            weights = {n: t for n, t in peaks(weights, self.world).items() if t is not None}
        blamed = sorted({r for b, _ in found for r in b} or {r for _, e in found for r in e})
        where = self.keep_rows(report.step, blamed, micro_batches) if self.keep_rows else ""
        self._nan_steps += 1
        try:
            check_finite(
                loss,
                norm,
                step=report.step,
                rows=blamed,
                weights=weights,
                gradients=self._everywhere(),
            )
        except NotFinite as error:
            text = f"{error.found}; the rows are in {where}" if where else error.found
            if self.on_nan == "stop" or self._nan_steps > self.max_nan_steps:
                many = f"{self._nan_steps} steps in a row: " if self._nan_steps > 1 else ""
                raise NotFinite(error.asked, many + text, error.do) from None
            report = replace(report, told=f"{error.asked}: {text}; the step is skipped")
        return replace(report, skipped="not finite")

    # ---- what a checkpoint holds besides the model

    def weights(self) -> dict[str, Tensor]:
        """What is trained, by name, in the type in which it is updated."""
        return dict(self.master.named)

    def tensors(self) -> dict[str, Tensor]:
        """The model's own tensors, moments and master weights under `weights/`, `optimizer/` and `master/`; live
        ones, not copies."""
        moments = optimizer_tensors(self.optimizer, self.master.named)
        out = {f"weights/{name}": t for name, t in model_tensors(self.stage.model).items()}
        out |= {f"optimizer/{name}": tensor for name, tensor in moments.items()}
        return out | {f"master/{n}": t for n, t in self.master.tensors().items()}

    def state(self) -> dict[str, Any]:
        return {"scaler": self.scaler.state(), "nan_steps": self._nan_steps}

    def load(self, stored: Stored, state: Mapping[str, Any]) -> None:
        """Put back what `tensors` and `state` gave on whatever layout, bit for bit. Raises Refused when it does not fit."""
        self._check_names(stored)
        self.load_weights(stored)
        for name, master in self.master.tensors().items():
            stored.load(f"master/{name}", master)
        moments = {}
        named = dict(self.master.named)
        for full in stored:
            kind, _, rest = full.partition("/")
            parameter = named.get(rest.partition("/")[2]) if kind == "optimizer" else None
            if parameter is not None:
                moments[rest] = moment = _like(parameter, stored.shape(full), stored.dtype(full))
                stored.load(full, moment)
        load_optimizer_tensors(self.optimizer, self.master.named, moments)
        self.scaler.load_state(state["scaler"])
        self._nan_steps = state.get("nan_steps", 0)

    @torch.no_grad()
    def load_weights(self, stored: Stored) -> None:
        """Put the model's own tensors back, bit for bit."""
        for name, tensor in model_tensors(self.stage.model).items():
            stored.load(f"weights/{name}", tensor)

    def _check_names(self, stored: Stored) -> None:
        """Refuse a state of other tensors than those of this run. A rank may have only some of the run's."""
        ours = {f"weights/{name}" for name in model_tensors(self.stage.model)}
        ours |= {f"master/{name}" for name in self.master.tensors()}
        every = set().union(*self.world.gather(sorted(ours)))
        of_some = {
            n for names in self.world.gather([n for n, _ in self.master.named]) for n in names
        }
        missing = sorted(every - set(stored))
        strange = [
            name
            for name in stored
            if name not in every
            and not (name.startswith("optimizer/") and name.split("/", 2)[2] in of_some)
        ]
        if missing or strange:
            raise Refused(
                f"going on from {stored.folder}",
                f"it lacks '{missing[0]}'" if missing else f"it holds '{strange[0]}', which this run has not",
                "resume with the model, adapter and optim settings of the checkpoint",
            )  # fmt: skip


def _like(parameter: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Memory for a moment of `parameter`: cut as that is, if it has its shape."""
    if pieces_of(parameter).shape == shape:
        return marked(torch.empty_like(parameter, dtype=dtype, requires_grad=False), parameter)
    return torch.empty(shape, dtype=dtype, device=parameter.device)


class _Passes:
    """What a step computes of each micro-batch: its part of the step's mean loss and of the routers'."""

    def __init__(self, updater: Updater, report: StepReport, shares: Tensor | None) -> None:
        self.updater, self.report, self.shares = updater, report, shares
        self.losses: list[Tensor] = []
        self.routed: list[Tensor] = []

    def forward(self, batch: Batch, *where: Any) -> Any:
        """Hidden states, with the routers' loss on their graph."""
        updater = self.updater
        batch = batch.to(updater.device)
        with router_logits() as logits:
            out = updater.stage(batch, *where)
        if updater.router is None:
            return out
        if self.shares is None:
            self.shares = updater.router.shares(logits, batch)
        shares = self.shares.to(updater.device)
        routed = updater.router.loss(logits, batch, shares, self.report.num_tokens)
        routed = 0 * routed if batch.is_filler else routed
        self.routed.append(routed.detach())
        routed = routed * updater.scaler.scale
        if isinstance(out, tuple):
            return _Along.apply(out[0], routed), *out[1:]
        return _Along.apply(out, routed)

    def loss(self, hidden: Tensor, batch: Batch) -> Tensor:
        """The part of the loss, scaled."""
        updater = self.updater
        labels = batch.labels.to(updater.device)
        stage = updater.stage
        parameters = stage.head_parameters()
        how: dict[str, Any] = {"relative": stage.relative_logits, "vocabulary": stage.vocabulary}
        total = token_loss(hidden, labels, stage.head, parameters, **how)
        loss = total / self.report.num_supervised
        if not loss.requires_grad:
            raise Failed(
                "training",
                "the loss does not depend on any trained tensor",
                "check adapter.targets: the layers they name take no part in the model's forward",
            )
        self.losses.append(loss.detach())
        return loss * updater.scaler.scale

    def done(self) -> None:
        self.updater.master.collect()


class _Along(torch.autograd.Function):
    """x -> x; in the backward `loss` is differentiated too."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, loss: Tensor) -> Tensor:
        ctx.like = loss
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        return gradient, torch.ones_like(ctx.like)


def _single_rows(batch: Batch) -> Iterator[Batch]:
    """Each row of a batch as a batch of its own."""
    for i, row in enumerate(batch.rows):
        part = {name: getattr(batch, name)[i : i + 1] for name in TENSORS}
        yield Batch(**part, rows=(row,))
