"""A small whole run for the tests of the loop: tiny llama, full or LoRA, evaluation, checkpoints.

Importable by child processes, which the kill tests stop in the middle.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from conftest import VOCAB, random_batch_, tiny_model_, tiny_tokenizer_

from luthier.adapters import attach
from luthier.adapters.store import copy_adapter
from luthier.batch import TENSORS, Batch
from luthier.built import AdapterFolder
from luthier.config import AdapterConfig, OptimConfig, RunConfig
from luthier.data.dataset import prepare
from luthier.data.encode import Renderer
from luthier.data.loader import Loader
from luthier.errors import LuthierError
from luthier.models.export import full_model
from luthier.models.stage import Stage
from luthier.seeding import generator
from luthier.train.checkpoint import Checkpoints, find
from luthier.train.loop import Trainer
from luthier.train.loss import token_loss
from luthier.train.master import LossScaler, MasterWeights
from luthier.train.metrics import Metrics
from luthier.train.optim import make_optimizer
from luthier.train.plan import FitResult, Plan
from luthier.train.schedules import make_schedule
from luthier.train.step import Updater

STDERR = "stderr.txt"  # what a child process says
ROWS, BATCH = 10, 4  # three steps an epoch, the last one of two rows
LORA = AdapterConfig(method="lora", rank=2, dropout=0.1)


def rows_of(batch: Batch, chosen: list[int], serials: list[int]) -> Batch:
    """A batch of some rows of `batch`, under new serial numbers."""
    return Batch(**{n: getattr(batch, n)[chosen] for n in TENSORS}, rows=tuple(serials))


class Rows:
    """A stand-in for the loader: few packed rows, another order in each epoch."""

    def __init__(self, micro_batch: int = 2) -> None:
        lengths = [[5, 3], [8], [2, 6], [4, 4], [7], [3, 3, 2], [6], [8], [5], [2, 2, 4]]
        self.all = random_batch_(VOCAB, lengths, seed=7)
        self.micro_batch = micro_batch
        self.steps_per_epoch = -(-ROWS // BATCH)
        self.at = 0

    def order(self, epoch: int) -> list[int]:
        return torch.randperm(ROWS, generator=generator(3, "order", epoch)).tolist()

    def step_batches(self) -> Iterator[list[Batch]]:
        while True:
            epoch, index = divmod(self.at, self.steps_per_epoch)
            order = self.order(epoch)
            step = list(range(index * BATCH, min((index + 1) * BATCH, ROWS)))
            parts = [step[i : i + self.micro_batch] for i in range(0, len(step), self.micro_batch)]
            made = [
                rows_of(self.all, [order[i] for i in part], [epoch * ROWS + i for i in part])
                for part in parts
            ]
            self.at += 1
            yield made

    @property
    def epoch(self) -> int:
        return self.at // self.steps_per_epoch

    def state(self) -> dict[str, Any]:
        return {"at": self.at}

    def load_state(self, state: dict[str, Any]) -> None:
        self.at = state["at"]


class Changed(Rows):
    """The same batches, changed by `change(index of the step, batch)`."""

    def __init__(self, change) -> None:
        super().__init__()
        self.change = change

    def step_batches(self):
        for batches in super().step_batches():
            yield [self.change(self.at - 1, b) for b in batches]


class Copy:
    """The model on its way to disk."""

    def __init__(self, made: Any, pause: float) -> None:
        self.made, self.pause = made, pause

    def write(self, folder: Path, weights: Any, rank: int, ranks: int) -> dict[str, Any]:
        time.sleep(self.pause)  # so that a kill meets half-written checkpoints too
        return self.made.write(folder, weights, rank, ranks)

    def complete(self, folder: Path, parts: list[dict[str, Any]]) -> None:
        time.sleep(self.pause)
        self.made.complete(folder, parts)


def small_run(
    output: Path,
    *,
    resume: str = "auto",
    method: str = "none",
    dtype: torch.dtype = torch.float32,
    optimizer: str = "adamw",
    steps: int = 7,
    keep: int = 2,
    identity: dict[str, Any] | None = None,
    micro_batch: int = 2,
    lr: float = 3e-3,
    every: Any = 1,
    evaluate_every: Any = "epoch",
    best: str = "loss",
    log_every: int = 1,
    scale: float = 2.0**15,
    data: Any = None,
    pause: float = 0.0,
    background: bool = True,
    evaluate: Callable[[], dict[str, float]] | None = None,
    **plan: Any,
) -> Trainer:
    """A trainer as `assemble` would make it; `.start_from` is where `fit` should begin."""
    torch.set_num_threads(1)
    model = tiny_model_("llama", dtype)
    if method == "lora":
        attach(model, LORA, seed=1)
    stage = Stage(model)
    master = MasterWeights(
        [(n, p) for n, p in model.named_parameters() if p.requires_grad], "float32"
    )
    config = OptimConfig(name=optimizer, weight_decay=0.01)  # pyright: ignore[reportArgumentType]
    held_out = random_batch_(VOCAB, [[6, 5], [9]], seed=8)

    def loss() -> dict[str, float]:
        time.sleep(pause)
        model.eval()
        with torch.no_grad():
            total = token_loss(stage(held_out), held_out.labels, stage.head)
        model.train()
        return {"loss": float(total) / held_out.num_supervised}

    full = full_model(model, dtype, None) if method == "none" else None

    def copy(world: Any) -> Copy:
        made = full or AdapterFolder(copy_adapter(model, LORA, "tiny", None))
        return Copy(made, pause)

    found = find(output, resume)
    trainer = Trainer(
        updater=Updater(
            stage=stage,
            master=master,
            optimizer=make_optimizer(master.named, config, lr),
            scaler=LossScaler(dtype == torch.float16, start=scale),
        ),
        schedule=make_schedule(config, lr, 12),
        data=data or Rows(micro_batch),
        plan=Plan(steps, plan.pop("tokens", None), evaluate_every, every, log_every, best, **plan),
        metrics=Metrics(output, progress="none"),
        checkpoints=Checkpoints(
            output, keep=keep, identity=identity or {"train.seed": 1}, background=background
        ),
        copy_model=copy,
        evaluate=evaluate or loss,
        remarks=list(found.remarks),
    )
    trainer.start_from = found.path  # pyright: ignore[reportAttributeAccessIssue]
    return trainer


def fit(output: Path, **options: Any) -> tuple[Trainer, FitResult]:
    trainer = small_run(output, **options)
    return trainer, trainer.fit(trainer.start_from)  # pyright: ignore[reportAttributeAccessIssue]


def everything(trainer: Trainer) -> dict[str, torch.Tensor]:
    """Weights, moments and masters: what has to be the same, bit for bit."""
    model = {f"model/{n}": p for n, p in trainer.updater.stage.model.named_parameters()}
    return {n: t.detach().clone() for n, t in (model | trainer.updater.tensors()).items()}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[n], b[n]) for n in a)


def write_rows(folder: Path) -> Path:
    """A folder with 24 rows of training data."""
    folder.mkdir()
    rows = [
        {"src": f"what is {i}?", "tgt": "the answer " * (i % 5 + 1) + str(i)} for i in range(24)
    ]
    (folder / "train.json").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def real_loader(folder: Path | str, kind: str) -> Loader:
    """The real loader on such a folder: `packed` in memory, or `lazy`."""
    config = RunConfig.model_validate(
        {
            "model": {"path": "tiny"},
            "data": {"path": str(folder), "length": 64, "lazy": kind == "lazy", "workers": 0},
            "train": {"steps": 6, "batch": 4},
            "output": "unused",
        }
    )
    dataset = prepare(config, Renderer(tiny_tokenizer_(), length=64), "train")
    assert dataset is not None
    return Loader(
        dataset, batch=4, micro_batch=2, pad_id=0, seed=5, length=64, packing=config.data.packing
    )


def hangs(step: int) -> float:
    print("in the step", file=sys.stderr, flush=True)
    time.sleep(600)
    return 0.0


def child(output: str, options: dict[str, Any]) -> None:
    """A run in a process of its own, which ends as the command line does."""
    Path(output).mkdir(exist_ok=True)
    with (Path(output) / STDERR).open("a") as log:
        os.dup2(log.fileno(), 2)
    if "data" in options:
        options["data"] = real_loader(*options["data"])
    hang = options.pop("hang", False)
    trainer = small_run(Path(output), **options)
    if hang:
        trainer.schedule = hangs
    try:
        trainer.fit(trainer.start_from)  # pyright: ignore[reportAttributeAccessIssue]
    except LuthierError as error:
        print(error, file=sys.stderr)
        sys.exit(error.exit_code)
