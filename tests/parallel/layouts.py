"""What a few steps of training come to on any layout: losses, gradients, rows, weights. Run on every rank."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
from tiny_runs import tiny_config

from luthier.assemble import build, make_updater, open_data, open_text
from luthier.config import RunConfig
from luthier.configfile import from_mapping
from luthier.parallel.degrees import fit_batch
from luthier.parallel.shard import gathered
from luthier.parallel.world import World
from luthier.parts import marked

Found = dict[str, Any]


def config_of(folders: tuple[Path, Path, Path], keys: dict[str, Any], dtype: str) -> RunConfig:
    config = from_mapping(tiny_config(*folders, **keys)).config
    return config.model_copy(update={"model": config.model.model_copy(update={"dtype": dtype})})


def steps(
    world: World,
    folders: tuple[Path, Path, Path],
    keys: dict[str, Any],
    number: int = 3,
    dtype: str = "float64",
) -> Found:
    """`number` steps by the run's own parts, in double precision, which hides no error behind rounding.

    Names -> arrays of the (clipped) gradients of each step and of the weights afterwards, whole; the losses,
    norms and the serial numbers of the rows that this rank saw.
    """
    config = fit_batch(config_of(folders, keys, dtype), world.data_size, world.sizes["pipeline"])
    data = open_data(config, open_text(config), world=world)
    built = build(config, train=True, world=world)
    updater = make_updater(config, built)
    gradients: list[dict[str, np.ndarray]] = []

    def record(*_: Any) -> None:
        named = [(name, p, p.grad) for name, p in updater.master.named if p.grad is not None]
        whole = gathered({name: marked(g, p) for name, p, g in named}, world, keep=True)
        gradients.append({name: g.numpy().copy() for name, g in whole.items()})

    updater.optimizer.register_step_pre_hook(record)
    batches = data.loader.step_batches()
    found: Found = {"loss": [], "norm": [], "tokens": [], "rows": []}
    for step in range(1, number + 1):
        micro = next(batches)
        report = updater.update(micro, step=step, lr=0.01)
        found["loss"].append(report.loss)
        found["norm"].append(report.grad_norm)
        found["tokens"].append((report.num_supervised, report.num_tokens))
        found["rows"].append([row for b in micro if not b.is_filler for row in b.rows])
    data.loader.close()
    weights = gathered(dict(updater.weights()), world, keep=True)
    found["weights"] = {name: w.detach().numpy().copy() for name, w in weights.items()}
    found["gradients"] = gradients
    return found


def steps_in_double(world: World, *args: Any) -> Found:
    """`steps` of a family whose routers compute in float32 in any model (`logits.float()`): here in double precision too."""
    with patch.object(torch.Tensor, "float", torch.Tensor.double):
        return steps(world, *args)


def with_layout(keys: dict[str, Any], layout: dict[str, Any]) -> dict[str, Any]:
    return keys | {f"parallel__{name}": value for name, value in layout.items()}


def cases(short: list[tuple[Any, ...]], long: list[tuple[Any, ...]]) -> list[Any]:
    """Parameters of one test, of which the `long` ones run with `make test-all` only."""
    return [*short, *(pytest.param(*case, marks=pytest.mark.long) for case in long)]


def worst(ours: dict[str, np.ndarray], theirs: dict[str, np.ndarray]) -> tuple[float, str]:
    """The largest ||difference|| / ||reference|| of all tensors, and whose it is."""
    assert ours.keys() == theirs.keys()
    scale = max(float(np.linalg.norm(t)) for t in theirs.values())
    found = [(0.0, "")]
    for name, reference in theirs.items():
        size = float(np.linalg.norm(reference))
        distance = float(np.linalg.norm(ours[name] - reference))
        # a gradient that is zero but for rounding has no digits to compare
        found.append((distance / size if size > 1e-12 * scale else distance / scale, name))
    return max(found)


def same_run(ours: Found, theirs: Found, tolerance: float = 1e-9, *, norm: float = 1e-7) -> None:
    """The same tokens, losses, norms, gradients of every step and weights."""
    assert ours["tokens"] == theirs["tokens"]
    assert ours["loss"] == pytest.approx(theirs["loss"], rel=tolerance)
    assert ours["norm"] == pytest.approx(theirs["norm"], rel=norm)  # their norms are float32's
    for step, (mine, other) in enumerate(
        zip(ours["gradients"], theirs["gradients"], strict=True), 1
    ):
        error, name = worst(mine, other)
        assert error < tolerance, f"gradient of {name} in step {step}: {error}"
    error, name = worst(ours["weights"], theirs["weights"])
    assert error < tolerance, f"{name}: {error}"
