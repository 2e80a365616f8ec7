"""Services that draw curves: TensorBoard, Weights & Biases, MLflow, SwanLab, Trackio.

A sink takes numbers by name at a step. All but TensorBoard are optional packages, asked for before any
work. Where and as whom they log in is their own configuration, from their own environment variables.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from luthier.errors import Failed, need

PROJECT = "luthier"
Values = Mapping[str, float]


class Sink(Protocol):
    def log(self, step: int, values: Values) -> None: ...

    def close(self) -> None: ...


class TensorBoard:
    """Event files in `output/tensorboard`. On a resume, what was shown of later steps is purged."""

    def __init__(self, output: Path, step: int, config: Mapping[str, Any]) -> None:
        from torch.utils.tensorboard.writer import SummaryWriter

        self._writer = SummaryWriter(
            str(output / "tensorboard"), purge_step=step + 1 if step else None
        )

    def log(self, step: int, values: Values) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


class Wandb:
    def __init__(self, output: Path, step: int, config: Mapping[str, Any]) -> None:
        import wandb  # pyright: ignore[reportMissingImports]

        self._run = wandb.init(
            project=PROJECT, name=output.name, dir=str(output), config=dict(config)
        )

    def log(self, step: int, values: Values) -> None:
        self._run.log(dict(values), step=step)

    def close(self) -> None:
        self._run.finish()


class MLflow:
    def __init__(self, output: Path, step: int, config: Mapping[str, Any]) -> None:
        import mlflow  # pyright: ignore[reportMissingImports]

        self._mlflow = mlflow
        mlflow.set_experiment(PROJECT)
        mlflow.start_run(run_name=output.name)
        mlflow.log_dict(dict(config), "config.json")

    def log(self, step: int, values: Values) -> None:
        self._mlflow.log_metrics(dict(values), step=step)

    def close(self) -> None:
        self._mlflow.end_run()


class SwanLab:
    def __init__(self, output: Path, step: int, config: Mapping[str, Any]) -> None:
        import swanlab  # pyright: ignore[reportMissingImports]

        self._swanlab = swanlab
        swanlab.init(
            project=PROJECT,
            experiment_name=output.name,
            logdir=str(output / "swanlab"),
            config=dict(config),
        )

    def log(self, step: int, values: Values) -> None:
        self._swanlab.log(dict(values), step=step)

    def close(self) -> None:
        self._swanlab.finish()


class Trackio:
    def __init__(self, output: Path, step: int, config: Mapping[str, Any]) -> None:
        import trackio  # pyright: ignore[reportMissingImports]

        self._run = trackio.init(
            project=PROJECT, name=output.name, config=dict(config), resume="allow"
        )

    def log(self, step: int, values: Values) -> None:
        self._run.log(dict(values), step=step)

    def close(self) -> None:
        self._run.finish()


SINKS: dict[str, Callable[[Path, int, Mapping[str, Any]], Sink]] = {
    "tensorboard": TensorBoard,
    "wandb": Wandb,
    "mlflow": MLflow,
    "swanlab": SwanLab,
    "trackio": Trackio,
}


def check_sinks(names: Sequence[str]) -> None:
    """Raise Refused when the package of a sink is not installed. Imports nothing."""
    for name in names:
        if importlib.util.find_spec(name) is None:
            raise need(name, name, f"log.sinks={name}")


def open_sinks(
    names: Sequence[str], output: Path, step: int, config: Mapping[str, Any]
) -> list[Sink]:
    """Open sinks by name; `step` is where the run goes on from, 0 for a new one.

    Raises Refused when a package is missing, Failed when a service cannot be opened.
    """
    check_sinks(names)
    opened = []
    for name in names:
        try:
            opened.append(SINKS[name](output, step, config))
        except Exception as error:
            raise Failed(
                f"opening log.sinks={name}",
                f"{type(error).__name__}: {error}",
                "set that service up, or leave it out",
            ) from error
    return opened
