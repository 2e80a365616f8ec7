"""Ranks of a run as processes that a test may kill: each runs the command line, forked from one that imported all."""

from __future__ import annotations

import faulthandler
import hashlib
import multiprocessing
import os
import random
import resource
import signal
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pytest
from ranks import free_port
from torch.distributed import TCPStore  # pyright: ignore[reportPrivateImportUsage]

from luthier.files import PARTIAL, damage
from luthier.parallel.restarts import VARIABLE, Note, Restart, read_notes
from luthier.train.checkpoint import steps_in
from luthier.train.metrics import read_metrics

PRELOAD = [
    "killed_ranks",
    "luthier.recipes",
    "torch.distributed.fsdp",
    "torch._dynamo",
    "transformers.models.llama.modeling_llama",
]
LIMIT = "TEST_FILE_LIMIT"  # bytes that a rank may write into a file: a full disk
DIES = "TEST_DIES_SAVING"  # a rank that is gone when its first save begins
HANG = 300.0  # seconds that no end takes, on two cores that have much else to do
_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(PRELOAD)


def rank_child(words: list[str], env: dict[str, str], log: str) -> None:
    """One rank: the command line, its output in a file, in whose folder it works."""
    import torch

    from luthier.cli import main

    torch.set_num_threads(1)
    os.environ.update(env)
    os.chdir(Path(log).parent)
    if LIMIT in env:
        _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (int(env[LIMIT]), hard))
    with open(log, "ab") as file:  # noqa: PTH123
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    faulthandler.register(signal.SIGUSR1)
    if DIES in env:
        from luthier.train.saving import Saver

        setattr(Saver, "begin", lambda *_: os.kill(os.getpid(), signal.SIGKILL))  # noqa: B010
    code = main(words)
    sys.stdout.flush()
    os._exit(code)


class Ranks:
    """One attempt of a run in `size` processes; `number` counts the attempts, `limits` are files' by rank, `dies`
    is a rank that is gone when its first save begins."""

    def __init__(
        self,
        words: list[str],
        size: int,
        folder: Path,
        number: int = 0,
        limits: Mapping[int, int] = MappingProxyType({}),
        dies: int | None = None,
    ) -> None:
        self.log, notes = folder / f"log-{number}.txt", folder / f"notes-{number}"
        notes.mkdir()
        self.notes_folder = notes
        port, told = free_port(), Restart(number, "a test", time.time(), size, str(notes))
        # as a launcher does, this process serves the store: it outlives every rank
        self.store = TCPStore("127.0.0.1", port, is_master=True, wait_for_workers=False)
        self.processes = []
        with pytest.MonkeyPatch.context() as environment:
            # the server that imports for all is started by the first process
            environment.setenv("PYTHONPATH", os.pathsep.join(filter(None, sys.path)))
            environment.setenv("OMP_NUM_THREADS", "1")
            for rank in range(size):
                env = {"RANK": str(rank), "WORLD_SIZE": str(size), "LOCAL_RANK": str(rank)}
                env |= {"TORCHELASTIC_USE_AGENT_STORE": "True"}
                env |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), VARIABLE: told.text}
                env |= {LIMIT: str(limits[rank])} if rank in limits else {}
                env |= {DIES: "1"} if rank == dies else {}
                process = _context.Process(target=rank_child, args=(words, env, str(self.log)))
                process.start()
                self.processes.append(process)

    @property
    def alive(self) -> bool:
        return all(p.is_alive() for p in self.processes)

    def text(self) -> str:
        return self.log.read_text("utf-8", "replace") if self.log.exists() else ""

    def wait(self, seconds: float = HANG) -> list[int | None]:
        """Exit codes; what does not end by itself is an error, which shows its stack."""
        until = time.monotonic() + seconds
        for process in self.processes:
            process.join(max(0.0, until - time.monotonic()))
        codes = [p.exitcode for p in self.processes]
        if None in codes:
            for process in self.processes:
                if process.is_alive() and process.pid:
                    os.kill(process.pid, signal.SIGUSR1)
            time.sleep(2)  # to write its stack
        self.end()
        assert None not in codes, f"a rank did not end by itself: {codes}\n{self.text()}"
        return codes

    def wait_for(self, happened: Any, seconds: float = HANG) -> None:
        """Until `happened()` or the end of a rank."""
        until = time.monotonic() + seconds
        while not happened() and self.alive:
            assert time.monotonic() < until, self.text()
            time.sleep(0.004)

    def signal(self, rank: int, number: int) -> None:
        os.kill(self.processes[rank].pid or 0, number)

    def end_rest(self) -> list[int | None]:
        """What a launcher does once a rank has failed; exit codes."""
        for process in self.processes:
            if process.is_alive() and process.pid:
                os.kill(process.pid, signal.SIGTERM)
        return self.wait()

    def notes(self) -> dict[int, Note]:
        return read_notes(self.notes_folder)

    def end(self) -> None:
        for process in self.processes:
            process.kill()
            process.join()


def trained(output: Path) -> list[int]:
    path = output / "metrics.jsonl"
    records = read_metrics(path) if path.exists() else []
    return [r["step"] for r in records if r["kind"] == "train"]


def result(output: Path) -> tuple[str, list[Any]]:
    """A hash of the final weights, and the losses and norms of all steps."""
    digest = hashlib.sha256()
    files = sorted(output.glob("*.safetensors"))
    assert files
    for path in files:
        digest.update(path.read_bytes())
    records = [r for r in read_metrics(output / "metrics.jsonl") if r["kind"] == "train"]
    return digest.hexdigest(), [(r["step"], r["loss"], r["grad_norm"]) for r in records]


def saving(output: Path) -> bool:
    return any((output / "checkpoints").glob(f"{PARTIAL}step-*"))


def kill_until_done(
    words: list[str], size: int, output: Path, chance: random.Random, kills: int
) -> dict[str, Any]:
    """Run to the end, with `kills` SIGKILLs of random ranks at random moments; every second one while saving.

    Nothing unreadable may be left at any time: what has a checkpoint's name is whole.
    """
    counts: dict[str, Any] = {"kills": 0, "saving": 0, "first": 0, "recovery": []}
    folder, attempt = output.parent, 0
    while True:
        run = Ranks([*words, f"output={output}"], size, folder, attempt)
        before = max(trained(output), default=0)
        try:
            if counts["kills"] >= kills:
                assert run.wait() == [0] * size, run.text()
                break
            if attempt % 2:
                run.wait_for(lambda: saving(output))
                time.sleep(chance.random() * 0.01)
            else:
                goal = before + chance.randrange(0, 3)
                run.wait_for(lambda goal=goal: max(trained(output), default=0) >= goal)
                time.sleep(chance.random() * 0.1)
            if not run.alive:
                assert run.wait() == [0] * size, run.text()
                break
            caught = saving(output)
            who = chance.randrange(size)
            run.signal(who, signal.SIGKILL)
            codes = run.end_rest()
            counts["kills"] += 1
            counts["saving"] += caught
            counts["first"] += who == 0
            assert codes[who] == -signal.SIGKILL and 0 not in codes, (codes, run.text())
            for _, path in steps_in(output):
                assert damage(path) is None, path
        finally:
            run.end()
        attempt += 1
    restarts = [r for r in read_metrics(output / "metrics.jsonl") if r["kind"] == "restart"]
    counts["recovery"] = [r["recovery_seconds"] for r in restarts]
    counts["repeated"] = sum(r["repeated_steps"] for r in restarts)
    assert not list(output.rglob(f"{PARTIAL}*"))
    return counts
