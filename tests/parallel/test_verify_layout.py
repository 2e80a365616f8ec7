"""`verify layout` agrees with right layouts and finds faults that no loss curve shows."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from layouts import config_of
from ranks import run_ranks
from tiny_runs import resolved, tiny_config

import luthier.built
import luthier.crossing
import luthier.parallel.shard
import luthier.parallel.tensor
import luthier.train.step
from luthier.errors import Failed, Refused
from luthier.parallel.context import Context
from luthier.parallel.world import World
from luthier.verify.layout import compare_layout, verify_layout

FULL = {"adapter__method": "none", "adapter__rank": None}
COPIES = {"replicate": 2, "shard": 1}


def nothing_is_summed(*_: Any) -> None:
    """The all-reduce of the gradients, forgotten."""


def own_counts(self: Any, micro_batches: Any) -> list[int]:
    """Each rank divides by its own tokens."""
    return [sum(b.num_supervised for b in micro_batches), 1, 1]


def averaged(root: Any, *rest: Any, **options: Any) -> Any:
    """Gradients of shards averaged instead of summed: every divisor is the number of ranks too large."""
    module = luthier.parallel.shard.REAL(root, *rest, **options)
    real = module.set_gradient_divide_factor
    module.set_gradient_divide_factor = lambda factor: real(float(options["mesh"].size()))
    return module


def one_row_lost(self: Any, step: Any) -> Any:
    from luthier.data.loader import Loader

    batches = Loader.REAL(self, step)  # pyright: ignore[reportAttributeAccessIssue]
    return batches[:1] if self.ranks > 1 else batches


@contextmanager
def bias_on_each_rank() -> Iterator[None]:
    """The bias of a layer that is cut by its inputs stays in the layer too: the sum has it once more per rank.

    Such a model is refused at the start: here it is not looked at there.
    """
    here = patch.object(luthier.built, "same_stage", lambda stage: nullcontext())
    with here, patch.object(luthier.parallel.tensor, "_hide_bias", lambda layer: None):
        yield


def border_lost(self: Any, batch: Any) -> Any:
    """In rows longer than those that are looked at when the run starts, the first two documents are one."""
    if batch.input_ids.shape[1] > 32:
        ids = batch.document_ids
        batch = replace(batch, document_ids=torch.where(ids > 0, ids - 1, ids))
    return Context.REAL(self, batch)  # pyright: ignore[reportAttributeAccessIssue]


def scaled(self: Any, number: int, hidden: Any) -> Any:
    """A stage that scales what it is given, as granite's model scales embeddings."""
    out = BORDER(self, number, hidden)
    return out * 1.5 if out is self.given else out


BORDER = luthier.crossing.Border.at


def check(world: World, folders: Any, keys: dict[str, Any], fault: str | None) -> Any:
    from luthier.data.loader import Loader

    said: list[str] = []
    luthier.parallel.shard.REAL = luthier.parallel.shard.fully_shard  # pyright: ignore
    Loader.REAL = Loader._batches  # pyright: ignore[reportAttributeAccessIssue]
    Context.REAL = Context.split  # pyright: ignore[reportAttributeAccessIssue]
    faults: dict[str | None, Any] = {
        None: patch.object(world.__class__, "attempt", 0),
        "sum": patch.object(luthier.train.step, "reduce", nothing_is_summed),
        "count": patch.object(luthier.train.step.Updater, "_counts", own_counts),
        "average": patch.object(luthier.parallel.shard, "fully_shard", averaged),
        "row": patch.object(Loader, "_batches", one_row_lost),
        "norms of heads": patch.object(luthier.parallel.shard, "is_share", lambda p: False),
        "bias": bias_on_each_rank(),
        "border": patch.object(Context, "split", border_lost),
        "scale": patch.object(luthier.crossing.Border, "at", scaled),
        "copies": patch.object(luthier.train.step, "sum_copies", nothing_is_summed),
    }
    with faults[fault]:
        try:
            found = compare_layout(config_of(folders, keys, "float32"), world, said.append)
        except Failed as error:
            return str(error), said
    return found, said


BATCH = {"train__batch": 8, "train__micro_batch": 2}


@pytest.mark.parametrize(
    ("layout", "keys"), [(COPIES, {}), ({"shard": 2}, FULL), ({"shard": 2}, {"parallel__stage": 3})]
)
def test_right_layouts_agree(layout: dict[str, Any], keys: dict[str, Any], folders: Any) -> None:
    given = BATCH | keys | {f"parallel__{name}": value for name, value in layout.items()}
    for found, said in run_ranks(layout, check, folders, given, None):
        ((what, figures),) = found.items()
        assert what == "2 processes = one process"
        assert figures["loss"] < 1e-6 and figures["worst"] < 1e-5
        assert said[-1] == "verify layout: ok"


@pytest.mark.parametrize(
    ("fault", "layout", "keys"),
    [
        ("sum", COPIES, {}),
        ("count", COPIES, FULL),
        ("count", {"shard": 2}, {}),
        ("average", {"shard": 2}, FULL),
        ("row", {"shard": 2}, {}),
    ],
)
def test_faults_are_found(
    fault: str, layout: dict[str, Any], keys: dict[str, Any], folders: Any
) -> None:
    given = BATCH | keys | {f"parallel__{name}": value for name, value in layout.items()}
    for found, _ in run_ranks(layout, check, folders, given, fault):
        assert isinstance(found, str) and "more than rounding" in found
        assert "the gradient of" in found


@pytest.mark.parametrize("sequence", [True, False])
@pytest.mark.parametrize("family", ["qwen3", "gpt2"])
def test_tensor_ranks_agree(
    family: str, sequence: bool, folders: Any, model_folder: Callable[[str], Path]
) -> None:
    cut = {"parallel__tensor": 2, "parallel__sequence": sequence}
    given, here = BATCH | FULL | cut, (model_folder(family), *folders[1:])
    for found, said in run_ranks({"tensor": 2}, check, here, given, None):
        assert found["2 processes = one process"]["worst"] < 1e-5
        assert said[-1] == "verify layout: ok"


@pytest.mark.parametrize(
    ("fault", "family", "name", "keys"),
    [
        ("norms of heads", "qwen3", "_norm.weight", FULL),
        ("norms of heads", "llama", "lora_", {}),
        ("bias", "gpt2", "", FULL),
    ],
)
@pytest.mark.parametrize("sequence", [True, False])
def test_faults_of_tensor_ranks_are_found(
    fault: str,
    family: str,
    name: str,
    keys: dict[str, Any],
    sequence: bool,
    folders: Any,
    model_folder: Callable[[str], Path],
) -> None:
    keys = keys | {"parallel__tensor": 2, "parallel__sequence": sequence}
    given, here = BATCH | keys, (model_folder(family), *folders[1:])
    for found, _ in run_ranks({"tensor": 2}, check, here, given, fault):
        assert isinstance(found, str) and "more than rounding" in found
        assert name in found.split("the gradient of")[1].split(" by ")[0]


CONTEXT = {"context": 2}


@pytest.mark.parametrize(
    ("family", "keys"), [("qwen3", FULL), ("bloom", {"parallel__context_method": "gather"})]
)
def test_context_ranks_agree(
    family: str, keys: dict[str, Any], folders: Any, model_folder: Callable[[str], Path]
) -> None:
    given, here = BATCH | keys | {"parallel__context": 2}, (model_folder(family), *folders[1:])
    for found, said in run_ranks(CONTEXT, check, here, given, None):
        assert found["2 processes = one process"]["worst"] < 1e-5
        assert said[-1] == "verify layout: ok"


@pytest.mark.parametrize("method", ["gather", "heads"])
@pytest.mark.parametrize("fault", ["border", "sum"])
def test_faults_of_context_ranks_are_found(fault: str, method: str, folders: Any) -> None:
    given = BATCH | {"parallel__context": 2, "parallel__context_method": method}
    for found, _ in run_ranks(CONTEXT, check, folders, given, fault):
        assert isinstance(found, str) and "more than rounding" in found
        assert "the gradient of" in found


@pytest.mark.parametrize(
    ("family", "keys"), [("granite", FULL), ("qwen2", {"train__recompute": "layer"})]
)
def test_stages_of_a_pipeline_agree(
    family: str, keys: dict[str, Any], folders: Any, model_folder: Callable[[str], Path]
) -> None:
    given, here = BATCH | keys | {"parallel__pipeline": 2}, (model_folder(family), *folders[1:])
    for found, said in run_ranks({"pipeline": 2}, check, here, given, None):
        assert found["2 processes = one process"]["worst"] < 1e-5
        assert said[-1] == "verify layout: ok"


@pytest.mark.parametrize(
    ("fault", "family", "name"), [("scale", "granite", ""), ("copies", "qwen2", "embed_tokens")]
)
def test_faults_of_stages_are_found(
    fault: str,
    family: str,
    name: str,
    folders: Any,
    model_folder: Callable[[str], Path],
) -> None:
    """A stage that scales its input; tied embeddings whose two gradients are not added."""
    given, here = BATCH | FULL | {"parallel__pipeline": 2}, (model_folder(family), *folders[1:])
    for found, _ in run_ranks({"pipeline": 2}, check, here, given, fault):
        assert isinstance(found, str) and "more than rounding" in found
        assert name in found.split("the gradient of")[1].split(" by ")[0]


def test_one_process_has_nothing_to_compare(folders: Any, tmp_path: Path) -> None:
    tree = tiny_config(folders[0], folders[1], tmp_path / "out")
    with pytest.raises(Refused, match="verify layout FILE --nproc 2"):
        verify_layout(resolved(tree))
