"""What the launcher decides when processes end: pure functions of exit codes and notes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from tiny_runs import resolved, tiny_config

from luthier.cli import main
from luthier.parallel.degrees import fewer
from luthier.parallel.restarts import Again, Ended, Note, Restart, after, leave_note, read_notes
from luthier.train.ending import newest_in

KILLED, ENDED = -9, -15
LOST = Note("another process of the run is gone", lost=True)


def ended(codes: dict[int, int], notes: dict[int, Note] | None = None, newest: object = 1) -> Ended:
    return Ended(len(codes), codes, notes or {}, 0.0, newest)


def none(number: int) -> int | None:
    return None


def test_a_killed_rank_is_the_reason_and_all_start_again() -> None:
    last = ended({0: 1, 1: KILLED, 2: ENDED}, {0: LOST})
    assert last.culprits == [1]
    assert last.reason == "rank 1 was ended by SIGKILL (often: out of memory)"
    assert after([last], none) == Again(3)


def test_a_rank_that_told_an_error_is_the_reason_even_if_others_had_to_be_killed() -> None:
    last = ended({0: KILLED, 1: 1}, {1: Note("hung in step 3")})
    assert last.culprits == [1] and last.reason == "rank 1: hung in step 3"


@pytest.mark.parametrize(
    ("codes", "notes"),
    [
        ({0: 143, 1: 143}, {}),  # stopped by a signal
        ({0: 130, 1: ENDED}, {}),
        ({0: 2, 1: 2}, {}),  # refused
        ({0: 1, 1: 1}, {0: Note("NaN", final=True)}),  # would be the same again
    ],
)
def test_some_ends_are_left_at_that(codes: dict[int, int], notes: dict[int, Note]) -> None:
    assert after([ended(codes, notes)], none) is None


def test_a_rank_that_fails_twice_on_the_spot_does_not_return() -> None:
    def half(number: int) -> int | None:
        return number // 2

    first = ended({0: 1, 1: KILLED, 2: 1, 3: 1}, dict.fromkeys((0, 2, 3), LOST), newest="step-4")
    assert after([first], half) == Again(4)
    again = after([first, first], half)
    assert again is not None and again.processes == 2 and again.pause > 0
    assert again.why == "rank 1 failed twice with no new checkpoint in between"
    progressed = ended({**first.codes}, {**first.notes}, newest="step-6")
    assert after([first, progressed], half) == Again(4)
    other = ended({0: 1, 1: 1, 2: KILLED, 3: 1}, dict.fromkeys((0, 1, 3), LOST), newest="step-4")
    assert after([first, other], half) == Again(4, pause=again.pause)
    assert after([first, first], none) == Again(4, pause=again.pause)


def test_fewer_processes_still_share_the_batch_evenly(tmp_path: Path) -> None:
    def run(**keys: object):
        return resolved(tiny_config(tmp_path, tmp_path, tmp_path / "out", **keys)).config

    assert fewer(run(train__batch=12), 5) == 4
    assert fewer(run(train__batch=12), 4) == 3
    assert fewer(run(train__batch=12), 1) is None
    # three steps of two rows on each of four: 24 rows, which three ranks share and no other accumulation gives
    counted = {"train__batch": None, "train__micro_batch": 2, "train__accumulation": 3}
    assert fewer(run(**counted), 4) == 3
    assert fewer(run(**counted, parallel__replicate=-1, parallel__shard=1), 5) == 3
    assert fewer(run(train__batch=12, parallel__tensor=2), 4) == 2
    fixed = {"parallel__replicate": 4, "parallel__shard": 1}
    assert fewer(run(train__batch=12, **fixed), 4) is None


def test_the_first_note_of_a_rank_stays(tmp_path: Path) -> None:
    restart = Restart(notes=str(tmp_path))
    leave_note(restart, 3, Note("the cause"))
    leave_note(restart, 3, Note("what followed", lost=True))
    (tmp_path / "rank-4.json").write_text('{"te')
    assert read_notes(tmp_path) == {3: Note("the cause")}
    assert Restart.from_text(restart.text) == restart and Restart.from_text(None) is None


def test_restarts_are_refused_where_nothing_is_kept(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], model_folder: Callable[[str], Path]
) -> None:
    import yaml

    tree = tiny_config(model_folder("llama"), tmp_path, tmp_path / "out")
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(tree))
    words = [str(tmp_path / "run.yaml"), "--max-restarts", "2"]
    assert main(["finetune", *words, "checkpoint.every=never"]) == 2
    assert main(["finetune", *words, "checkpoint.every=end", "--nproc", "2"]) == 2
    assert main(["evaluate", *words]) == 2
    told = capsys.readouterr().err
    assert told.count("there would be no checkpoint to go on from") == 2
    assert "only finetune leaves checkpoints" in told
    assert newest_in(tmp_path / "out") is None
