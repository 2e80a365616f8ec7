"""What a run does with faults that it survives, and what it keeps when it does not."""

from __future__ import annotations

import errno
import json
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from small_run import Changed, Rows, everything, fit, same, small_run

import luthier.train.ending
from luthier.batch import Batch, Layout
from luthier.errors import Failed, NotFinite, Unwritten
from luthier.files import damage, partial_of
from luthier.parallel.pieces import pieces_of
from luthier.parallel.world import World
from luthier.train.bad_rows import keep_rows
from luthier.train.checkpoint import steps_in
from luthier.train.metrics import Metrics, read_metrics
from luthier.train.state import Stored, write_index, write_pieces

BAD = 319  # a token whose embedding is NaN


def with_bad_rows(trainer: Any, serials: list[int]) -> Any:
    """Rows of these serial numbers (of the first epoch) hold a token whose embedding is NaN."""
    for serial in serials:
        trainer.data.all.input_ids[trainer.data.order(0)[serial], 0] = BAD
    return trainer


def poison(trainer: Any) -> None:
    with torch.no_grad():
        trainer.updater.stage.model.get_parameter("model.embed_tokens.weight")[BAD] = torch.nan


# ---- steps that are not finite


def test_a_step_that_is_not_finite_is_passed_over_and_its_rows_are_kept(tmp_path: Path) -> None:
    trainer = with_bad_rows(
        small_run(tmp_path, steps=3, evaluate_every="never", every="never"), [5]
    )
    poison(trainer)
    updater = trainer.updater
    updater.on_nan = "skip"
    updater.keep_rows = lambda step, rows, batches: keep_rows(
        tmp_path, World(), lambda serial: [f"rows.json:{serial}"], str, step, rows, batches
    )
    steps: list[dict[str, torch.Tensor]] = []
    schedule = trainer.schedule

    def note(step: int) -> float:
        steps.append(everything(trainer))
        return schedule(step)

    trainer.schedule = note
    trainer.fit()
    steps.append(everything(trainer))

    def unchanged(a: int, b: int) -> bool:
        return all(
            torch.equal(t.nan_to_num(), steps[b][n].nan_to_num()) for n, t in steps[a].items()
        )

    assert not unchanged(0, 1) and unchanged(1, 2) and not unchanged(2, 3)
    records = read_metrics(tmp_path / "metrics.jsonl")
    logged = [r for r in records if r["kind"] == "train"]
    assert [r["skipped_steps"] for r in logged] == [0, 1, 0]
    assert logged[1]["loss"] is None and logged[2]["loss"] is not None
    told = next(r["text"] for r in records if r["kind"] == "remark" and r["step"] == 2)
    assert "step 2 over rows 5" in told and "the step is skipped" in told
    kept = json.loads((tmp_path / "not_finite/step-2.json").read_text())
    assert [row["row"] for row in kept["rows"]] == [5]
    (first, *_) = kept["rows"][0]["documents"]
    assert first["from"] == "rows.json:5" and str(BAD) in first["text"]


def test_too_many_such_steps_in_a_row_end_the_run(tmp_path: Path) -> None:
    trainer = with_bad_rows(small_run(tmp_path, evaluate_every="never"), [4, 8])  # steps 2 and 3
    poison(trainer)
    trainer.updater.on_nan, trainer.updater.max_nan_steps = "skip", 1
    trainer.plan = trainer.plan.__class__(steps=7, save_every="never", evaluate_every="never")
    with pytest.raises(NotFinite, match=r"step 3 over rows 8, 9\. 2 steps in a row"):
        trainer.fit()


def test_good_steps_in_between_begin_the_count_anew(tmp_path: Path) -> None:
    """Step 2 of each epoch is bad; a resume goes on counting."""
    for steps in (2, 7):
        trainer = small_run(tmp_path, steps=steps, evaluate_every="never", every="never")
        trainer.data = Changed(
            lambda index, batch: batch if index % 3 != 1 else _bad(batch)  # steps 2, 5
        )
        poison(trainer)
        trainer.updater.on_nan, trainer.updater.max_nan_steps = "skip", 1
        trainer.fit()
    state = trainer.updater.state()
    assert state["nan_steps"] == 0
    trainer.updater._nan_steps = 1
    state = {name: pieces_of(t) for name, t in trainer.updater.tensors().items()}
    write_index(tmp_path, [write_pieces(tmp_path, 0, state)[1]])
    again = small_run(tmp_path / "b").updater
    again.load(Stored(tmp_path), trainer.updater.state())
    assert again.state()["nan_steps"] == 1


def _bad(batch: Batch) -> Batch:
    batch.input_ids[0, 0] = BAD
    return batch


# ---- what is kept of a run that fails


def broken_at(index: int, error: Exception) -> Changed:
    def change(at: int, batch: Batch) -> Batch:
        if at == index:
            raise error
        return batch

    return Changed(change)


def test_the_last_finished_step_is_saved_and_goes_on_bit_for_bit(tmp_path: Path) -> None:
    expected, _ = fit(tmp_path / "a", steps=7, evaluate_every="never")
    data = broken_at(4, RuntimeError("the device is gone"))
    with pytest.raises(Failed) as caught:
        fit(tmp_path / "b", steps=7, evaluate_every="never", every="never", data=data)
    saved = tmp_path / "b/checkpoints/step-4"
    assert f"the last finished step, 4, was saved as {saved}" in str(caught.value)
    assert "the device is gone" in str(caught.value) and damage(saved) is None
    resumed, _ = fit(tmp_path / "b", steps=7, evaluate_every="never")
    assert same(everything(resumed), everything(expected))


def test_a_stop_over_nan_keeps_the_steps_before(tmp_path: Path) -> None:
    trainer = with_bad_rows(small_run(tmp_path, evaluate_every="never", every="never"), [8])
    embedding = trainer.updater.stage.model.get_parameter("model.embed_tokens.weight")
    embedding.register_hook(lambda g: g * torch.inf if trainer.done == 2 else g)
    with pytest.raises(NotFinite, match=r"the last finished step, 2, was saved as"):
        trainer.fit()
    assert [step for step, _ in steps_in(tmp_path)] == [2]


def test_half_updated_weights_are_never_saved(tmp_path: Path) -> None:
    trainer = small_run(tmp_path, evaluate_every="never", every=2)
    write_back = trainer.updater.master.write_back

    def fails() -> None:
        if trainer.done == 3:
            raise RuntimeError("in the middle")
        write_back()

    trainer.updater.master.write_back = fails  # pyright: ignore[reportAttributeAccessIssue]
    with pytest.raises(Failed, match=r"step, 3, is not kept: its weights are half updated"):
        trainer.fit()
    assert [step for step, _ in steps_in(tmp_path)] == [2]


# ---- file systems


def unwritable(trainer: Any, steps: set[int]) -> list[int]:
    """Saving these steps fails as on a full disk; the steps that were tried."""
    tried: list[int] = []
    copy = trainer.copy_model

    def full(world: Any) -> Any:
        made = copy(world)
        write, step = made.write, trainer.done

        def fails(*args: Any) -> Any:
            tried.append(step)
            if step in steps:
                raise OSError(errno.ENOSPC, "No space left on device")
            return write(*args)

        made.write = fails
        return made

    trainer.copy_model = full
    return tried


def test_a_checkpoint_that_cannot_be_written_is_left_out(tmp_path: Path) -> None:
    expected, _ = fit(tmp_path / "a", steps=6, evaluate_every=2, every=2)
    trainer = small_run(tmp_path / "b", steps=6, evaluate_every=2, every=2)
    trainer.evaluate = lambda: {"loss": {2: 1.0, 4: 0.5, 6: 2.0}[trainer.done]}
    tried = unwritable(trainer, {4})
    result = trainer.fit()
    assert tried == [2, 4, 6]
    assert [step for step, _ in steps_in(tmp_path / "b")] == [2, 6]
    (told,) = [r for r in result.remarks if "NOT SAVED" in r]
    assert "step-4" in told and "No space left" in told
    assert result.final_step == 2  # the best that there is, not the one that is lost
    assert expected.done == trainer.done


def test_the_last_save_is_tried_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    waited: list[float] = []
    monkeypatch.setattr(luthier.train.ending.time, "sleep", waited.append)
    trainer = small_run(tmp_path / "a", steps=2, every="end", evaluate_every="never")
    copy = trainer.copy_model
    tried = unwritable(trainer, {2})
    failing = trainer.copy_model
    trainer.copy_model = lambda world: (failing if len(tried) < 2 else copy)(world)
    trainer.fit()
    assert [s for s in waited if s] == [5.0, 20.0] and [
        step for step, _ in steps_in(tmp_path / "a")
    ] == [2]
    again = small_run(tmp_path / "b", steps=2, every="end", evaluate_every="never")
    unwritable(again, {2})
    with pytest.raises(Unwritten, match="No space left"):
        again.fit()
    assert [s for s in waited if s] == [5.0, 20.0, 5.0, 20.0, 60.0]


@pytest.mark.parametrize("background", [True, False])
def test_a_run_that_shall_stop_does(tmp_path: Path, background: bool) -> None:
    """In the background, the step that is under way when the save fails is the last one."""
    trainer = small_run(tmp_path, steps=6, every=2, evaluate_every="never", background=background)
    trainer.stop_unwritten = True
    unwritable(trainer, {4})
    schedule, saver = trainer.schedule, trainer.checkpoints.saver

    def until_written(step: int) -> float:
        while saver._now is not None and not saver._now.ended:
            time.sleep(0.001)
        return schedule(step)

    trainer.schedule = until_written
    with pytest.raises(Unwritten, match="No space left"):
        trainer.fit()
    assert trainer.done == (5 if background else 4)
    assert [step for step, _ in steps_in(tmp_path)] == [2]


def test_a_save_that_was_begun_is_not_a_save(tmp_path: Path) -> None:
    """A peer is lost while step 4 is saved in the background: step 4 is saved again."""
    lost = RuntimeError("Connection closed by peer")
    trainer = small_run(tmp_path, steps=7, every=2, evaluate_every="never", data=broken_at(4, lost))
    copy, begun = trainer.copy_model, []

    def once(world: Any) -> Any:
        made = copy(world)

        def fails(*args: Any) -> Any:
            raise lost

        if trainer.done == 4 and not begun:
            begun.append(4)
            made.write = fails  # pyright: ignore[reportAttributeAccessIssue]
        return made

    trainer.copy_model = once
    with pytest.raises(Failed) as caught:
        trainer.fit()
    saved = tmp_path / "checkpoints/step-4"
    assert begun and damage(saved) is None
    assert f"the last finished step, 4, was saved as {saved}" in str(caught.value)


def test_last_words_are_written_beside_what_another_copy_still_saves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rank 2 of three copies; rank 0 is at the same step's checkpoint, and removes its files when it notices."""
    theirs = partial_of(tmp_path / "checkpoints/step-4")

    def lose(at: int, batch: Batch) -> Batch:
        if at == 4:
            theirs.mkdir(parents=True)
            trainer.world = World(rank=2, size=3, data_size=3)
            raise RuntimeError("Connection closed by peer")
        return batch

    trainer = small_run(tmp_path, every="never", evaluate_every="never", data=Changed(lose))
    copy = trainer.copy_model

    def full(world: World) -> Any:
        made = copy(world)
        write = made.write

        def between(*args: Any) -> Any:
            told = write(*args)
            shutil.rmtree(theirs)
            return told

        made.write = between  # pyright: ignore[reportAttributeAccessIssue]
        return made

    trainer.copy_model = full
    monkeypatch.setattr(World, "first", lambda *_: True)
    with pytest.raises(Failed, match=r"the last finished step, 4, was saved as"):
        trainer.fit()
    assert damage(tmp_path / "checkpoints/step-4") is None


def test_metrics_that_cannot_be_written_wait_for_a_better_time(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """/dev/full takes no byte: the lines come when the file can be written again."""
    file = tmp_path / "metrics.jsonl"
    with Metrics(tmp_path, progress="plain") as metrics:
        metrics.start()
        file.unlink()
        file.symlink_to("/dev/full")
        assert metrics._file is not None
        metrics._file.close()
        metrics._file = file.open("ab", buffering=0)
        for step in (1, 2):
            metrics.log("other", step, {"value": step})
            metrics.flush()
        file.unlink()
        metrics.log("other", 3, {"value": 3})
        metrics.log("other", 4, {"value": 4})
    assert [r["step"] for r in read_metrics(file)] == [1, 2, 3, 4]
    assert capsys.readouterr().err.count("gets no more lines") == 1


LIMITED = """
import resource, sys
from pathlib import Path
from luthier.train.metrics import Metrics, read_metrics

output = Path(sys.argv[1])
_, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
with Metrics(output, progress="none") as metrics:
    metrics.start()
    metrics.log("train", 1, {"value": 1})
    whole = metrics.path.read_bytes()
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(whole) + 10, hard))  # takes ten bytes of a line
    metrics.log("train", 2, {"value": 2})
    assert len(metrics.path.read_bytes()) == len(whole) + 10
    metrics.log("train", 3, {"value": 3})
    assert [r["step"] for r in read_metrics(metrics.path)] == [1]  # what is torn is no record
    resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
    metrics.log("train", 4, {"value": 4})
print(metrics.path.read_text(), end="")
"""


def test_a_line_of_metrics_that_was_written_in_part_is_written_again_whole(tmp_path: Path) -> None:
    """A limit of the file's size tears a line as a full disk does."""
    done = subprocess.run(
        [sys.executable, "-c", LIMITED, str(tmp_path)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert [json.loads(line)["step"] for line in done.stdout.splitlines()] == [1, 2, 3, 4]


def test_metrics_go_on_in_a_new_file_where_the_old_one_is_gone(tmp_path: Path) -> None:
    with Metrics(tmp_path, progress="none") as metrics:
        metrics.start()
        metrics.log("train", 1, {"value": 1})
        assert metrics._file is not None
        metrics._file.close()
        metrics._file = open("/dev/full", "ab", buffering=0)  # noqa: SIM115, PTH123
        metrics.log("train", 2, {"value": 2})
        metrics.path.unlink()
        metrics.log("train", 3, {"value": 3})
    assert [json.loads(t)["step"] for t in metrics.path.read_text().splitlines()] == [2, 3]


def test_rows_are_told_where_the_rows_of_later_epochs_come_from(tmp_path: Path) -> None:
    from small_run import real_loader, write_rows

    loader = real_loader(write_rows(tmp_path / "data"), "packed")
    found: dict[int, tuple[list[str], Batch, int]] = {}
    steps = loader.step_batches()
    for _ in range(2 * (loader.steps_per_epoch or 0)):
        for batch in next(steps):
            found |= {n: (loader.origin(n), batch, i) for i, n in enumerate(batch.rows)}
    loader.close()
    assert set(found) == set(range(2 * (loader.num_rows or 0)))
    rows = [json.loads(t) for t in (tmp_path / "data/train.json").read_text().splitlines()]
    decode = loader.dataset.encoder.renderer.decode  # pyright: ignore
    for places, batch, i in found.values():
        documents = [s for s in Layout.of(batch).segments if s.row == i]
        for place, document in zip(places, documents, strict=True):
            text = decode(batch.input_ids[i, document.start : document.stop].tolist())
            number = int(place.rpartition(":")[2]) - 1
            assert text.startswith(rows[number]["src"]), (place, text)


def test_the_stand_in_has_the_rows_that_the_tests_speak_of() -> None:
    assert Rows().steps_per_epoch == 3
