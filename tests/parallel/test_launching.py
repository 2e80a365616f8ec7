"""`luthier finetune FILE --nproc 2` as a user types it: exit codes, signals, a process that dies, one voice."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from tiny_runs import tiny_config, write_data

from luthier.cli import main
from luthier.train.checkpoint import steps_in
from luthier.train.metrics import read_metrics

ENDLESS = {"train__steps": 10**6, "log__every": 10**6, "log__progress": "plain"}
ENDLESS |= {"evaluate__every": "never", "checkpoint__every": "never"}


@pytest.fixture
def run_file(tmp_path: Path, model_folder: Callable[[str], Path]) -> Callable[..., Path]:
    def make(**keys: Any) -> Path:
        data = write_data(tmp_path / "data", train=20, dev=4)
        tree = tiny_config(model_folder("llama"), data, tmp_path / "out", **keys)
        (tmp_path / "run.yaml").write_text(yaml.safe_dump(tree))
        return tmp_path / "run.yaml"

    return make


class Running:
    """A command that is running, its output in a file."""

    def __init__(self, words: list[str], folder: Path) -> None:
        self.log = folder / "log.txt"
        with self.log.open("w") as out:
            self.process = subprocess.Popen(words, stdout=out, stderr=out, cwd=folder)

    def text(self) -> str:
        return self.log.read_text("utf-8", "replace")

    def wait_for(self, words: str) -> None:
        self.until(lambda: words in self.text())
        assert words in self.text(), self.text()

    def until(self, happened: Callable[[], bool]) -> None:
        """Wait for something or for the end; a busy machine takes minutes to start two processes."""
        for _ in range(6000):
            if happened() or self.process.poll() is not None:
                return
            time.sleep(0.05)
        self.process.terminate()
        raise AssertionError(self.text())

    def end(self) -> int:
        try:
            return self.process.wait(240)
        finally:
            self.process.kill()

    def ranks(self) -> list[int]:
        found = subprocess.run(
            ["ps", "-o", "pid=,args=", "--ppid", str(self.process.pid)],
            capture_output=True,
            text=True,
            check=False,
        ).stdout.splitlines()
        return [int(line.split()[0]) for line in found if "-m luthier" in line]


WAITS = """
import sys, time
from luthier import cli
from luthier.errors import Failed

class Waits:
    def __del__(self):
        time.sleep(600)

def fail(words):
    waits = Waits()
    print("said before")
    raise Failed("training", "another process of the run is gone")

cli.COMMANDS["finetune"] = fail
sys.exit(cli.main(["finetune", "run.yaml"]))
"""
LUTHIER = [sys.executable, "-m", "luthier", "finetune"]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]


def test_a_signal_reaches_all_and_saves_once(run_file: Callable[..., Path]) -> None:
    path = run_file(**ENDLESS)
    run = Running([*LUTHIER, str(path), "--nproc", "2"], path.parent)
    run.wait_for("trained parameters")
    time.sleep(1)
    run.process.send_signal(signal.SIGTERM)
    assert run.end() == 143
    text = run.text()
    assert text.count("stopping after this step") == text.count("stopped by SIGTERM") == 1
    assert text.count("2 processes (shard 2), stage 2") == 1
    assert len(steps_in(path.parent / "out")) == 1


def test_a_process_that_dies_ends_all(run_file: Callable[..., Path]) -> None:
    path = run_file(**ENDLESS)
    run = Running([*LUTHIER, str(path), "--nproc", "2"], path.parent)
    run.wait_for("trained parameters")
    ranks = run.ranks()
    assert len(ranks) == 2
    begin = time.monotonic()
    os.kill(ranks[1], signal.SIGKILL)
    assert run.end() == 1
    assert time.monotonic() - begin < 240  # a machine that has much else to do
    assert "was ended by SIGKILL" in run.text()
    assert run.text().count("another process of the run is gone") <= 1
    for pid in ranks:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


def test_one_of_several_processes_leaves_at_once_after_its_last_words() -> None:
    """However it was started, and whatever would be waited for on the way out."""
    env = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    run = subprocess.run(
        [sys.executable, "-c", WAITS],
        env=os.environ | env,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert (run.returncode, run.stdout) == (1, "said before\n"), run.stderr
    assert run.stderr == "luthier: training. another process of the run is gone.\n"


@pytest.mark.parametrize(
    "start",
    [LUTHIER, pytest.param([*TORCHRUN, "-m", "luthier", "finetune"], marks=pytest.mark.long)],
)
def test_bad_input_is_told_once(start: list[str], run_file: Callable[..., Path]) -> None:
    path = run_file(data__path="nowhere")
    more = ["--nproc", "2"] if start is LUTHIER else []
    run = Running([*start, str(path), *more], path.parent)
    code = run.end()
    assert code == (2 if more else 1), run.text()
    assert run.text().count("luthier: data was looked for at nowhere") == 1
    assert more or "traceback : data was looked for at nowhere" in run.text()
    assert not (path.parent / "out").exists()


def test_what_the_config_tells_is_refused_before_processes_are_started(
    run_file: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    path = str(run_file())
    begin = time.monotonic()
    assert main(["finetune", path, "parallel.context=3", "--nproc", "2"]) == 2
    assert main(["finetune", path, "train.batch=7", "--nproc=2"]) == 2
    assert main(["finetune", path, "optim.name=adafactor", "--nproc", "2"]) == 2
    assert main(["finetune", path, "--nproc", "none"]) == 2
    assert main(["verify", "loss", path, "--nproc", "2"]) == 2
    assert time.monotonic() - begin < 5
    told = capsys.readouterr().err
    assert "parallel.context=3" in told and "2 data ranks" in told
    assert "optim.name=adafactor with parallel.shard=2" in told and "--nproc none" in told
    assert "only `verify layout` compares several" in told


def test_keys_that_cut_nothing_are_told(
    run_file: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    path = str(run_file(train__steps=1, evaluate__every="never", log__progress="plain"))
    assert main(["finetune", path, "parallel.stage=3", "parallel.sequence=true"]) == 0
    told = capsys.readouterr().err
    assert "parallel.stage=3 cuts nothing" in told
    assert "parallel.sequence=true cuts nothing" in told


@pytest.mark.long
def test_a_killed_process_is_started_again_and_nothing_is_lost(
    run_file: Callable[..., Path],
) -> None:
    """Two kills of the same rank with no checkpoint in between: it goes on in one process."""
    path = run_file(
        train__steps=150, checkpoint__every=60, log__progress="plain", evaluate__every="never"
    )
    output = path.parent / "out"
    run = Running([*LUTHIER, str(path), "--nproc", "2", "--max-restarts", "3"], path.parent)
    for kill in (1, 2):
        if kill == 1:
            run.until(lambda: "step-60" in run.text())
        while len(ranks := run.ranks()) < 2:
            assert run.process.poll() is None, run.text()
            time.sleep(0.05)
        os.kill(ranks[1], signal.SIGKILL)
        run.wait_for(f"Restart {kill} of 3")
    run.until(lambda: False)
    assert run.process.returncode == 0, run.text()
    text = run.text()
    assert text.count("rank 1 was ended by SIGKILL") == 2
    assert "Restart 1 of 3 in 2 processes, from" in text and "checkpoints/step-60" in text
    assert "Restart 2 of 3 in one process (rank 1 failed twice" in text
    records = read_metrics(output / "metrics.jsonl")
    assert [r["step"] for r in records if r["kind"] == "train"] == list(range(1, 151))
    restarts = [r for r in records if r["kind"] == "restart"]
    assert restarts[-1]["processes"] == 1 and restarts[-1]["processes_before"] == 2
    assert restarts[-1]["step"] == 61 and restarts[-1]["recovery_seconds"] > 0
    assert "restarts" in (output / "report.html").read_text("utf-8")
