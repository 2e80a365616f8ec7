"""The only training loop: `Trainer.fit` runs a plan, one `Updater` step after the other.

What is trained, how the model is written and read, and what an evaluation measures are handed in. A run
stops only between steps: at its end, on a signal (after saving) or on an error (with the older checkpoints
untouched). A checkpoint holds all that a resumed run needs to go on bit for bit; files and retention are
`checkpoint.py`, one step is `step.py`.
"""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import nullcontext, suppress
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from luthier.batch import Batch
from luthier.errors import Failed, LuthierError, Stopped
from luthier.files import damage
from luthier.parallel.restarts import Restart
from luthier.parallel.shard import local
from luthier.parallel.world import World
from luthier.train.checkpoint import Checkpoints, Saved, non_finite, read
from luthier.train.ending import failure, keep_last_step, recovery, standing, try_save
from luthier.train.metrics import Metrics, StepReport, Window, memory, plain
from luthier.train.plan import Data, Every, FitResult, Pace, Plan
from luthier.train.saving import ModelCopy, Saver
from luthier.train.signals import Interrupted, Signals
from luthier.train.state import Stored
from luthier.train.step import Updater
from luthier.train.watchdog import Watchdog

COMPARED = 20  # steps of this process after which the plan is set beside them


@dataclass(kw_only=True)
class Trainer:
    """Runs `plan`: steps of `updater` on the batches of `data`.

    `schedule(t)` is the learning rate of step t = 0, 1, ... `copy_model(world)` gives the model as others read it, on its way
    to disk. `evaluate()` measures the model; `before()` does so once, before the first step. `facts` are recorded with the
    start of the run; `remarks` are told. `evaluation_data` is a fingerprint of what `evaluate` measures on: values on other
    data are not compared.

    In a run of several processes all of them fit, in step; `world` is where they exchange what they decide on. `restart`:
    what its launcher started it again for. `stop_unwritten`: a checkpoint that cannot be written ends the run.
    `compare(seconds per step)` sets what was predicted beside what the first steps took; rank 0 calls it once.
    """

    updater: Updater
    schedule: Callable[[int], float]
    data: Data
    plan: Plan
    metrics: Metrics
    checkpoints: Checkpoints
    copy_model: Callable[[World], ModelCopy]
    evaluate: Callable[[], Mapping[str, float]] | None = None
    before: Callable[[], Mapping[str, float]] | None = None
    evaluation_data: str = ""
    facts: Mapping[str, Any] = field(default_factory=dict)
    remarks: list[str] = field(default_factory=list)
    world: World = field(default_factory=World)
    watchdog: Watchdog = field(default_factory=Watchdog)
    restart: Restart | None = None
    stop_unwritten: bool = False
    compare: Callable[[float], Mapping[str, Any]] | None = None

    def __post_init__(self) -> None:
        self.done = 0  # optimiser steps so far
        self.num_tokens = 0  # real tokens so far
        self.seconds = 0.0  # in steps, so far
        self.best: dict[str, Any] | None = None  # metric, value, step, values
        self.evaluation: dict[str, Any] | None = None  # step, values: the latest
        self._loss: float | None = None  # of the last step
        self._window = Window()
        self._pace = Pace()
        self._epoch_ended = False  # with the latest step
        self._saved_at = 0  # the step of our latest checkpoint
        self._previous: dict[str, Any] | None = None  # the best before the latest save
        self._unsupervised = False  # a step without supervised tokens was seen
        self._finished: tuple[Any, ...] = ()  # data's and updater's state at the last step

    def step(self, micro_batches: Sequence[Batch]) -> StepReport:
        """The next optimiser step; see `Updater.update`."""
        lr = self.schedule(self.done)
        report = self.updater.update(micro_batches, step=self.done + 1, lr=lr)
        self.done += 1
        self.num_tokens += report.num_tokens
        return report

    def fit(self, path: Path | None = None) -> FitResult:
        """Run to the end of the plan, from checkpoint `path` on if there is one.

        The best weights, if the plan asks for them, are then in the model. Raises Refused when the checkpoint
        does not fit the run; Stopped after a signal, with everything saved; Failed when the run cannot go
        on. Closes `metrics`.
        """
        self.world.lead(lambda: self.checkpoints.start(path) is None)
        saved = None if path is None else read(path)
        with Signals(tell=self.world.is_main) as signals, self.watchdog, self.metrics:
            try:
                self._begin(saved)
                self._run(signals)
                result = self._finish()
                self._stop_if_asked(signals)
                return result
            except LuthierError as error:
                self._last_words(error)
                raise
            except Exception as error:
                text = failure(error, self.done, self.checkpoints.newest())
                self._last_words(text)
                raise text from error

    def _begin(self, saved: Saved | None) -> None:
        if saved is not None:
            self._restore(saved)
        self._finished = self.data.state(), self.updater.state()
        self.metrics.alive = self.watchdog.beat
        self.metrics.start(self.done, evaluated=self._evaluated())
        self.metrics.log("start", self.done, {**self.facts, "resumed": saved is not None})
        for text in self.remarks:
            self.metrics.remark(text, self.done)
        self.updater.stage.model.train()

    def _run(self, signals: Signals) -> None:
        if self.done:  # a signal may have come before the evaluation of the step that was saved
            self._after_step(signals)
        elif self.before is not None:
            self.metrics.log("evaluate", 0, self._measure(self.before, signals))
        batches = self.data.step_batches()
        try:
            while not self._over():
                self._stop_if_asked(signals)
                begin, epoch = time.perf_counter(), self.data.epoch
                micro_batches = next(batches)
                wait = time.perf_counter() - begin
                report = self.step(micro_batches)
                self._epoch_ended = self.data.epoch > epoch
                self._finished = self.data.state(), self.updater.state()
                self.watchdog.stepped(self.done)
                seconds = time.perf_counter() - begin
                self._record(replace(report, seconds=seconds, wait=wait))
                if self.restart is not None:
                    told = recovery(self.restart, self.done, self.metrics.reached, self.world.size)
                    self.metrics.log("restart", self.done, told)
                    self.restart = None
                if len(self._pace.recent) == COMPARED and self.compare and self.world.is_main:
                    self.metrics.log("plan", self.done, self.compare(self._pace.seconds()))
                    self.compare = None
                self._after_step(signals)
        finally:
            if isinstance(batches, Generator):
                batches.close()  # ends its reading ahead

    def _after_step(self, signals: Signals) -> None:
        """Evaluate and save, if due and not done yet. A new best is saved whenever anything is."""
        due = self._due(self.plan.evaluate_every) and not self._evaluated()
        if due:
            self._settle()  # what is best so far must be on disk
        best = self.best
        improved = due and self._evaluate(signals)
        save = self._due(self.plan.save_every) or (improved and self.plan.save_every != "never")
        if save and self._saved_at != self.done:
            self._settle()
            last, self._previous = self._over(), best
            save = partial(self._save, wait=last)
            if not try_save(save, self._remark, last=last, stop=self.stop_unwritten):
                self.best = best  # nothing holds these weights
        self._tell_saved()

    def _over(self) -> bool:
        return self.plan.over(self.done, self.num_tokens)

    def _due(self, every: Every) -> bool:
        """Whether something that happens `every` so often happens after the current step."""
        return self.plan.due(every, self.done, epoch_ended=self._epoch_ended, over=self._over())

    def _epoch(self) -> float:
        """Passes over the data so far; between the ends of lazy data's passes, the whole ones."""
        per_epoch = None if self._epoch_ended else self.data.steps_per_epoch
        return self.done / per_epoch if per_epoch else float(self.data.epoch)

    def _record(self, report: StepReport) -> None:
        """Log the steps since the last logging, if due."""
        self._window.add(report)
        self._pace.add(report.seconds, report.num_tokens)
        self.seconds += report.seconds
        self._loss = report.loss
        if report.told:
            self.metrics.remark(report.told, report.step)
        if not report.num_supervised and not self._unsupervised:
            self._unsupervised = True
            self._remark(
                f"step {report.step} has no supervised token and updates nothing; more such steps "
                "are counted as skipped_steps"
            )
        if self.done % self.plan.log_every and not self._over():
            return
        values = {
            **self._window.values(),
            "lr": report.lr,
            "grad_norm": report.grad_norm,
            "epoch": self._epoch(),
            "tokens": self.num_tokens,
            "memory": memory(self.updater.device).peak,
            "progress": self.plan.progress(self.done, self.num_tokens),
            "total_steps": self.plan.steps,
            "eta_seconds": self._pace.seconds_left(self.plan, self.done, self.num_tokens),
        }
        self.metrics.log("train", self.done, values)
        self._window = Window()

    def _remark(self, text: str) -> None:
        self.remarks.append(text)
        self.metrics.remark(text, self.done)

    # ---- evaluation and the best

    def _evaluated(self) -> bool:
        return self.evaluation is not None and self.evaluation["step"] == self.done

    def _measure(
        self, how: Callable[[], Mapping[str, float]], signals: Signals
    ) -> dict[str, float]:
        """What an evaluation gives. A signal ends it at once, but for several processes, which it would not
        reach at the same place: the resumed run does it again."""
        self.metrics.activity("evaluating")
        interruptible = signals.interruptible if self.world.size == 1 else nullcontext
        try:
            with self.watchdog.phase("evaluating"), interruptible():
                return dict(how())
        except Interrupted:
            self._stop_if_asked(signals)
            raise
        finally:
            self.metrics.activity("")

    def _evaluate(self, signals: Signals) -> bool:
        """Evaluate; True if this is the best so far."""
        if self.evaluate is None:
            return False
        values = self._measure(self.evaluate, signals)
        self.metrics.log("evaluate", self.done, {**values, "epoch": self._epoch()})
        self.evaluation = {"step": self.done, "values": values}
        metric, old = self.plan.best, self.best["value"] if self.best else None
        if metric == "none" or not self.plan.better(values[metric], old):
            return False
        self.best = {"metric": metric, "value": values[metric], "step": self.done, "values": values}
        return True

    # ---- saving, going on, stopping

    def _save(self, *, wait: bool = False) -> Path:
        """Begin to save the last finished step; with `wait`, until it is on disk."""
        live = self.updater.tensors()
        found = self.world.gather(non_finite({name: local(t) for name, t in live.items()}))
        if bad := list(dict.fromkeys(name for names in found for name in names)):
            raise Failed(
                f"saving step {self.done}",
                f"NaN or infinity in {', '.join(bad)}",
                f"nothing was written; go on from {self.checkpoints.newest()} with a lower optim.lr",
            )
        state = {
            "tokens": self.num_tokens,
            "seconds": self.seconds,
            "data": self._finished[0],  # of the last finished step: another one may have begun
            "updater": self._finished[1],
            "epoch_ended": self._epoch_ended,
            "window": asdict(self._window),
            "evaluation": self.evaluation,
            "best": self.best,
            "evaluation_data": self.evaluation_data,
        }
        best = self.best["step"] if self.best else None
        self.metrics.activity("saving")
        self.metrics.flush()  # metrics.jsonl must not be behind the checkpoint
        told = {"best": best == self.done, "epoch": self._epoch()}
        with self.watchdog.phase("saving"):
            make = partial(self.copy_model, self.world)
            path = self.checkpoints.save(self.done, make, live, plain(state), best, told)
            if wait:
                self.checkpoints.saver.wait()
        self.metrics.activity("")
        self._saved_at = self.done
        return path

    def _settle(self) -> None:
        """Wait for the save under way. One that could not be written is told, and the run goes on without it."""
        saver = self.checkpoints.saver
        with self.watchdog.phase("saving"):
            there = try_save(saver.wait, self._remark, last=False, stop=self.stop_unwritten)
        if not there:
            if self.best and self.best["step"] == self._saved_at:
                self.best = self._previous  # nothing holds these weights
            self._saved_at = 0

    def _tell_saved(self) -> None:
        """Record the checkpoints that became whole since the last time."""
        for step, values in self.checkpoints.finished():
            self.metrics.log("checkpoint", step, values)

    def _restore(self, saved: Saved) -> None:
        """Become what the run was when it saved this checkpoint."""
        state = saved.state
        self.updater.load(saved.tensors(), state["updater"])
        self.data.load_state(state["data"])
        self.done, self.num_tokens, self.seconds = saved.step, state["tokens"], state["seconds"]
        self._window, self._epoch_ended = Window(**state["window"]), state["epoch_ended"]
        self.evaluation, self.best = state["evaluation"], state["best"]
        ours = self.checkpoints.path(saved.step)
        self._saved_at = saved.step if saved.path.resolve() == ours.resolve() else 0
        same = state.get("evaluation_data", "") == self.evaluation_data
        self.evaluation = self.evaluation if same else None
        self.best, told = standing(self.best, self.plan.best, same=same, damage=self._damage)
        self.remarks += told

    def _stop_if_asked(self, signals: Signals) -> None:
        """After a signal: save, if that was not done, and raise Stopped."""
        # a signal, and the end of a save, reach the ranks at other times
        ours = [float(signals.received or 0), float(self.checkpoints.saver.failed)]
        received, failed = map(int, map(max, zip(*self.world.vectors(ours), strict=True)))
        if failed:
            self._settle()
        if not received:
            return
        asked = f"stopped by {signal.Signals(received).name} after step {self.done}"
        if not self.done:
            raise Stopped(received, asked, "nothing was trained yet", "start again")
        self._settle()
        ours, there = self.checkpoints.path(self.done), self._saved_at == self.done
        path = ours if there else self._save(wait=True)
        self._tell_saved()
        raise Stopped(received, asked, f"saved as {path}", "go on with checkpoint.resume=auto")

    def _finish(self) -> FitResult:
        """Put the best weights in place and say what the run came to."""
        self._settle()
        self._tell_saved()
        final, evaluation = self.done, self.evaluation if self._evaluated() else None
        if self.best and self.best["step"] != self.done:
            if self.plan.save_every == "never":
                self._remark(
                    f"step {self.best['step']} was best, but checkpoint.every=never kept no weights of it: "
                    "the final model is the last one"
                )
            else:
                self._read_best(self.best["step"])
                final, evaluation = self.best["step"], self.best
        result = FitResult(
            step=self.done,
            epoch=self._epoch(),
            num_tokens=self.num_tokens,
            seconds=self.seconds,
            loss=self._loss,
            final_step=final,
            evaluation=evaluation["values"] if evaluation else None,
            peak_memory=memory(self.updater.device).peak,
            remarks=tuple(self.remarks),
        )
        self.metrics.log("end", self.done, asdict(result))
        return result

    def _damage(self, step: int) -> str | None:
        """What is wrong with the checkpoint of a step; rank 0 looks."""
        return self.world.lead(lambda: damage(self.checkpoints.path(step)))

    def _read_best(self, step: int) -> None:
        path = self.checkpoints.path(step)
        if (reason := self._damage(step)) is not None:
            raise Failed(
                f"taking the best checkpoint, {path}, as the final model",
                reason,
                "give checkpoint.best=none with checkpoint.resume=auto to take the last one",
            )
        self.updater.load_weights(Stored(path))
        self._remark(f"the final model is that of {path.name}, the best by {self.plan.best}")

    def _last_words(self, error: LuthierError) -> None:
        """Save the last finished step, where that can be, and say in `error` what is kept of the run."""

        def save(world: World) -> Path:
            if world is not self.world:  # alone: the others are gone, or still at this checkpoint
                by, self.world = f"rank-{self.world.rank}-", world
                self.checkpoints.saver = Saver(world, background=False, by=by)
            path = self._save(wait=True)
            self._tell_saved()
            return path

        with suppress(LuthierError):  # what was begun is finished first
            self.checkpoints.saver.wait()
            self._tell_saved()
        there = self._saved_at == self.done and self.checkpoints.has(self.done)  # not only begun
        if isinstance(error, Failed) and self.done and not there and self._finished:
            whole = not self.updater.half_updated
            keep_last_step(error, save, self.world, step=self.done, whole=whole)
