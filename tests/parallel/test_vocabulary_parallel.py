"""Embedding, head and loss cut by tokens of the vocabulary: exact, and no rank ever has a whole row of logits."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from layouts import config_of, same_run, steps
from ranks import run_ranks
from tiny_runs import copy_model, write_data

import luthier.parallel.vocabulary
import luthier.train.loss
from luthier.assemble import build
from luthier.batch import IGNORE
from luthier.models.load import save_model
from luthier.parallel.collectives import Axis, sum_backward
from luthier.parallel.degrees import fit_batch
from luthier.parallel.vocabulary import Vocabulary
from luthier.parallel.world import World
from luthier.recipes import run_on
from luthier.seeding import generator
from luthier.train.loss import by_native, token_loss, token_stats
from luthier.use import _evaluate, _predict

TP2: dict[str, Any] = {"tensor": 2}
KEYS = {"train__batch": 4, "train__micro_batch": 2, "data__length": 128}
FULL = {"adapter__method": "none", "adapter__rank": None}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_data(tmp_path_factory.mktemp("rows"), train=8, dev=4)


@pytest.fixture(scope="module")
def odd(
    tiny_model: Callable[..., Any],
    model_folder: Callable[[str], Path],
    tmp_path_factory: pytest.TempPathFactory,
) -> Callable[[str], Path]:
    """A family's folder with a vocabulary that two ranks cannot share evenly."""

    def make(family: str) -> Path:
        folder = copy_model(model_folder(family), tmp_path_factory.mktemp(family) / "odd")
        save_model(tiny_model(family, vocab_size=321), folder)
        return folder

    return make


@pytest.mark.parametrize("family", ["llama", "qwen2", "gpt2"])  # the last two are tied
def test_a_vocabulary_that_does_not_divide(
    family: str, odd: Callable[[str], Path], data: Path
) -> None:
    folders, keys = (odd(family), data, Path("unused")), {**KEYS, **FULL}
    theirs = steps(World(), folders, keys)
    for ours in run_ranks(TP2, steps, folders, keys | {"parallel__tensor": 2}):
        same_run(ours, theirs)


def head_of(weight: torch.Tensor, cap: float | None) -> Callable[[torch.Tensor], torch.Tensor]:
    def head(hidden: torch.Tensor) -> torch.Tensor:
        logits = hidden @ weight.t() / 3
        return logits if cap is None else cap * torch.tanh(logits / cap)

    return head


def losses(
    world: World, dtype: torch.dtype, cap: float | None, chunk: int | None
) -> dict[str, Any]:
    """Loss, gradients and accuracy by whole logits and by this rank's columns of them."""
    draw = generator(0, "head")
    hidden = torch.randn(3, 7, 16, generator=draw).to(dtype)
    table = torch.randn(37, 16, generator=draw).to(dtype)
    table[30] = table[4]  # a tie across ranks: the first counts
    hidden[0, :2] = 4 * table[4]
    labels = torch.randint(0, 37, (3, 7), generator=draw)
    labels[0, 0], labels[0, 1], labels[1, :3] = 4, 30, IGNORE
    axis = Axis.of(world)
    vocabulary = Vocabulary(37, axis)
    found: dict[str, Any] = {"length": vocabulary.length}
    for name in ("whole", "part"):
        x = hidden.clone().requires_grad_()
        one = vocabulary if name == "part" else None
        weight = table if one is None else table[one.start : one.start + one.length]
        weight = weight.clone().requires_grad_()
        head = head_of(weight, cap)
        if one is not None:
            columns = head
            head = lambda h, of=columns: of(sum_backward(h, axis))  # noqa: E731
        loss = token_loss(x, labels, head, [weight], chunk_rows=chunk, vocabulary=one)
        loss.backward()
        assert x.grad is not None and weight.grad is not None
        rows = weight.grad
        if one is None:
            rows = rows[vocabulary.start : vocabulary.start + vocabulary.length]
        with torch.no_grad():
            plain = token_loss(x, labels, head, chunk_rows=chunk, vocabulary=one)
        stats = token_stats(x, labels, head, chunk_rows=chunk, vocabulary=one)
        found[name] = [t.double().numpy() for t in (loss.detach(), plain, x.grad, rows)], stats
    return found


@pytest.mark.parametrize("cap", [None, 5.0])
@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [(torch.float64, 1e-14), (torch.float32, 2e-6), (torch.bfloat16, 2**-7)],
    ids=["float64", "float32", "bfloat16"],
)
def test_losses_by_columns(dtype: torch.dtype, tolerance: float, cap: float | None) -> None:
    """37 tokens on 2 ranks, 5 rows at a time: 19 and 18 columns."""
    for rank, found in enumerate(run_ranks(TP2, losses, dtype, cap, 5)):
        assert found["length"] == 19 - rank
        (whole, (loss, correct, count)), (part, stats) = found["whole"], found["part"]
        for ours, theirs in zip(part, whole, strict=True):
            apart = abs(ours - theirs).max() / abs(theirs).max()
            assert apart < tolerance
        assert stats[0] == pytest.approx(loss, rel=max(tolerance, 1e-12))
        assert stats[1:] == (correct, count)
        assert 1 <= correct < count


def test_bfloat16_of_a_part_goes_through_the_native_kernel_too() -> None:
    """What the test above compares in bfloat16 is the kernel's where there is one."""
    assert by_native(torch.zeros(2, 19, dtype=torch.bfloat16)) == (
        luthier.train.loss.native.library() is not None
    )


def logits_seen(world: World, folders: Any, keys: dict[str, Any]) -> list[tuple[int, ...]]:
    """Shapes of the logits of a step. Those of a whole row are gathered in the check at the start, which is of
    documents of 5 and 8 tokens."""
    seen: list[tuple[int, ...]] = []
    real, gather = luthier.train.loss._cross_entropy, luthier.parallel.vocabulary.whole_features

    def record(logits: Any, *rest: Any) -> Any:
        seen.append(tuple(logits.shape))
        return real(logits, *rest)

    def short(x: Any, *rest: Any, **options: Any) -> Any:
        assert x.shape[1] <= 8
        return gather(x, *rest, **options)

    with (
        patch.object(luthier.train.loss, "_cross_entropy", record),
        patch.object(luthier.parallel.vocabulary, "whole_features", short),
    ):
        steps(world, folders, keys, 1, "float32")
    return seen


def test_no_rank_has_all_logits_of_a_row(odd: Callable[[str], Path], data: Path) -> None:
    folders, keys = (odd("gpt2"), data, Path("unused")), {**KEYS, **FULL, "parallel__tensor": 2}
    found = run_ranks(TP2, logits_seen, folders, keys)
    for rank, seen in enumerate(found):
        assert {shape[1] for shape in seen} == {161 - rank}
        assert sum(shape[0] for shape in seen) > 20
    # as many chunks of as many rows on both, for they exchange in each
    assert [shape[0] for shape in found[0]] == [shape[0] for shape in found[1]]


def trained(world: World, folders: Any, keys: dict[str, Any]) -> None:
    run_on(config_of(folders, keys, "float32"), world)


def use(world: World, folders: Any, keys: dict[str, Any]) -> tuple[Any, Any, int]:
    """`luthier evaluate`, `luthier predict` with sampling, and the rows of the embedding that are here."""
    config = fit_batch(config_of(folders, keys, "float32"), world.data_size)
    built = build(config, train=False, world=world)
    rows = len(built.model.get_input_embeddings().weight)  # pyright: ignore[reportArgumentType]
    return _evaluate(config, world), _predict(config, world), rows


@pytest.mark.parametrize(
    "keys", [FULL, {"adapter__targets": ["lm_head", "q_proj", "down_proj"]}], ids=["full", "lora"]
)
def test_evaluation_and_prediction_on_cut_models(
    keys: dict[str, Any], odd: Callable[[str], Path], data: Path, tmp_path: Path
) -> None:
    """Training, evaluating with generated answers, and using the result later: the same as in one process."""
    model = odd("llama" if "adapter__targets" in keys else "qwen2")
    every = {**KEYS, **keys, "train__steps": 2, "optim__lr": 1e-2, "evaluate__max_new_tokens": 5}
    asked = {"evaluate__every": 1, "evaluate__generate": True, "evaluate__top_k": 7}
    one, two = tmp_path / "one", tmp_path / "two"
    trained(World(), (model, data, one), {**every, **asked})
    cut = {"parallel__tensor": 2}
    run_ranks(TP2, trained, (model, data, two), {**every, **asked, **cut})
    reports = [json.loads((folder / "report.json").read_text("utf-8")) for folder in (one, two)]
    assert reports[1]["after"] == pytest.approx(reports[0]["after"], rel=1e-5)
    assert reports[1]["after"]["answers"] == 4
    values, answers, rows = use(World(), (model, data, one), {**every, **asked})
    assert rows == 321
    for rank, found in enumerate(
        run_ranks(TP2, use, (model, data, one), {**every, **asked, **cut})
    ):
        assert found[0] == pytest.approx(values, rel=1e-6)
        assert found[1] == answers
        assert found[2] == 161 - rank
