"""A run's largest step, evaluation and save before its first step: nothing comes of it, and what does not fit is named."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_runs import tiny_config

from luthier.assemble import open_data, open_text
from luthier.cli import main
from luthier.config import RunConfig
from luthier.configfile import from_mapping
from luthier.errors import Refused
from luthier.recipes import finetune
from luthier.rehearsal import wanted
from luthier.train.metrics import read_metrics
from luthier.train.step import Updater

KEYS: dict[str, Any] = {
    "train__steps": 4,
    "train__micro_batch": 2,
    "adapter__dropout": 0.2,
    "adapter__neftune_alpha": 5,
    "optim__schedule": "constant",
    "evaluate__every": 2,
    "checkpoint__every": 2,
}


def config_of(folders: tuple[Path, Path, Path], **keys: Any) -> RunConfig:
    return from_mapping(tiny_config(*folders, **KEYS | keys)).config


def losses(output: Path) -> dict[tuple[str, int], tuple[float, float | None]]:
    """By kind and step: loss and norm of the gradients."""
    records = read_metrics(output / "metrics.jsonl")
    return {
        (r["kind"], r["step"]): (r["loss"], r.get("grad_norm"))
        for r in records
        if r["kind"] in ("train", "evaluate")
    }


def test_a_run_is_the_same_with_it_bit_for_bit_also_a_resumed_one(
    folders: tuple[Path, Path, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    model, data, _ = folders
    finetune(tiny_config(model, data, tmp_path / "plain", **KEYS))
    assert "rehearsed" not in capsys.readouterr().out  # on a CPU only where it is asked for
    seen: list[Any] = []
    run = Updater.rehearse

    def spy(self: Updater, micro_batches: Any) -> None:
        run(self, micro_batches)
        seen.append(micro_batches)
        assert all(p.grad is None for p in self.stage.model.parameters())
        assert not self.optimizer.state

    monkeypatch.setattr(Updater, "rehearse", spy)
    generator = torch.get_rng_state()
    other = tmp_path / "rehearsed"
    finetune(tiny_config(model, data, other, **KEYS | {"train__steps": 2, "train__rehearse": True}))
    told = capsys.readouterr().out
    assert "an evaluation batch of" in told and "the copy of a save" in told and "a step of" in told
    again = {"train__rehearse": True, "checkpoint__resume": "auto"}
    finetune(tiny_config(model, data, other, **KEYS | again))
    assert torch.equal(generator, torch.get_rng_state())
    assert losses(other) == losses(tmp_path / "plain")
    for name in ("adapter_model.safetensors", "ledger.json"):
        assert (other / name).read_bytes() == (tmp_path / "plain" / name).read_bytes()
    for micro_batches in seen:  # two are enough for gradients that are added up
        assert len(micro_batches) == 2 and len(micro_batches[0].rows) == 2
    assert len(seen) == 2


def test_no_batch_of_any_epoch_is_larger(folders: tuple[Path, Path, Path]) -> None:
    for packing in ("none", "best"):
        config = config_of(folders, data__packing=packing)
        loader = open_data(config, open_text(config)).loader
        before = json.dumps(loader.state()), loader.dataset.ledger.to_dict()
        largest = loader.largest()
        assert (json.dumps(loader.state()), loader.dataset.ledger.to_dict()) == before
        steps = loader.step_batches()
        sizes = [
            b.input_ids.numel() for _ in range(3 * loader.steps_per_epoch) for b in next(steps)
        ]
        assert largest.input_ids.numel() >= max(sizes)
        loader.close()


def test_of_lazy_data_the_next_step_is_known(folders: tuple[Path, Path, Path]) -> None:
    config = config_of(folders, data__lazy=True)
    loader = open_data(config, open_text(config)).loader
    wide = max(batch.input_ids.numel() for batch in loader.peek())
    assert loader.largest().input_ids.numel() == wide
    loader.close()


@pytest.mark.parametrize(
    ("where", "part", "do"),
    [
        ("luthier.train.step.token_loss", "a step of 2 rows of", "train.micro_batch"),
        ("luthier.rehearsal.token_stats", "an evaluation batch of", "evaluate.micro_batch"),
        ("luthier.train.saving._copied", "the copy of a save", "checkpoint.background=false"),
        ("luthier.rehearsal._filled", "the state of optim.name=adamw", "train fewer weights"),
    ],
)
def test_what_does_not_fit_is_named_and_nothing_is_written(
    where: str,
    part: str,
    do: str,
    folders: tuple[Path, Path, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise MemoryError("no room")

    monkeypatch.setattr(where, full)
    model, data, _ = folders
    with pytest.raises(Refused, match="no room") as caught:
        finetune(tiny_config(model, data, tmp_path / "run", **KEYS, train__rehearse=True))
    assert part in caught.value.asked and do in caught.value.do
    assert not (tmp_path / "run").exists()


def test_other_errors_stay_what_they_are(
    folders: tuple[Path, Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: Any, **__: Any) -> None:
        raise RuntimeError("shapes differ")

    monkeypatch.setattr("luthier.train.step.token_loss", broken)
    model, data, _ = folders
    with pytest.raises(RuntimeError, match="shapes differ"):
        finetune(tiny_config(model, data, tmp_path / "run", **KEYS, train__rehearse=True))


def test_who_rehearses_by_itself(folders: tuple[Path, Path, Path]) -> None:
    usual = config_of(folders)
    assert wanted(usual, torch.device("cuda")) and not wanted(usual, torch.device("cpu"))
    for asked in (True, False):
        config = config_of(folders, train__rehearse=asked)
        assert wanted(config, torch.device("cuda")) == wanted(config, torch.device("cpu")) == asked


def test_the_key_is_known(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["model.path=m", "data.path=d", "output=o", "train.rehearse=perhaps"]
    assert main(["show", *words]) == 2
    assert "train.rehearse" in capsys.readouterr().err
