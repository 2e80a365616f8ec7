"""`--nproc N`: starts N processes of this command on this machine, by torchrun's own launcher.

The launcher (torch's elastic agent) ends all processes when one fails and hands signals on. With
`--max-restarts` they are started again here, as `restarts.after` decides. Errors are told by the processes
themselves; here only those that had no chance to are, and what is done about them.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from luthier.errors import Failed, Refused
from luthier.parallel.restarts import VARIABLE, Ended, Restart, after, read_notes
from luthier.parallel.world import place, shared_threads

SAVING_SECONDS = 1800  # for the processes to save what they have after a signal


def launch(
    words: Sequence[str],
    processes: int,
    max_restarts: int = 0,
    *,
    fewer: Callable[[int], int | None] = lambda processes: None,
    newest: Callable[[], object] = lambda: None,
) -> int:
    """Run `python -m luthier WORDS` in `processes` processes and return their exit code (the first's that failed).

    `fewer(n)` is the largest number of processes below n that the config allows; `newest()` the newest
    checkpoint. Raises Failed when a process was ended from outside, which it cannot tell itself.
    """
    if place().size > 1:
        raise Refused(
            f"--nproc {processes}",
            f"a launcher has started {place().size} processes already",
            "leave --nproc out, or start `luthier` without the launcher",
        )
    history: list[Ended] = []
    restart = Restart()
    with kept_handlers():
        while True:
            ended = _start(words, processes, restart, newest)
            if isinstance(ended, int):
                return ended
            history.append(ended)
            again = after(history, fewer) if len(history) <= max_restarts else None
            if again is None:
                return _exit_code(ended, len(history) - 1)
            for handler in (signal.SIGTERM, signal.SIGINT):
                signal.signal(handler, _leave)  # none of the processes is there to be told
            where = ended.newest or "the beginning: no checkpoint was made yet"
            number = f"{again.processes} processes" if again.processes > 1 else "one process"
            _tell(
                f"{ended.reason}. Restart {len(history)} of {max_restarts} in {number}"
                f"{f' ({again.why})' if again.why else ''}, from {where}"
            )
            time.sleep(again.pause)
            restart = Restart(len(history), ended.reason, ended.at, processes)
            processes = again.processes


def _tell(text: str) -> None:
    print(f"luthier: {text}.", file=sys.stderr, flush=True)


def _leave(number: int, frame: object) -> None:
    """A signal between two attempts."""
    _tell(f"stopped by {signal.Signals(number).name} before the restart")
    os._exit(128 + number)


def _start(
    words: Sequence[str], processes: int, restart: Restart, newest: Callable[[], object]
) -> Ended | int:
    """One attempt: an exit code, or how it failed."""
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, launch_agent

    for name in ("agent.server.api", "agent.server.local_elastic_agent", "multiprocessing.api"):
        logging.getLogger(f"torch.distributed.elastic.{name}").setLevel(logging.CRITICAL)
    with shared_threads(processes), tempfile.TemporaryDirectory(prefix="luthier-") as folder:
        notes, logs = Path(folder, "notes"), Path(folder, "logs")
        notes.mkdir()
        told = Restart(restart.attempt, restart.reason, restart.at, restart.before, str(notes))
        os.environ[VARIABLE] = told.text  # shared_threads puts the environment back
        config = LaunchConfig(
            min_nodes=1,
            max_nodes=1,
            nproc_per_node=processes,
            run_id=uuid.uuid4().hex,
            rdzv_backend="c10d",
            rdzv_endpoint="localhost:0",
            max_restarts=0,
            monitor_interval=0.1,
            logs_specs=DefaultLogsSpecs(log_dir=str(logs)),
            shutdown_timeout=SAVING_SECONDS,
            signals_to_handle="SIGTERM,SIGINT",
        )
        try:
            launch_agent(config, sys.executable, ["-m", "luthier", *words])
        except SignalException as error:
            return 128 + int(error.sigval)
        except ChildFailedError as error:
            return Ended(
                processes,
                codes={rank: failure.exitcode for rank, failure in error.failures.items()},
                notes=read_notes(notes),
                at=min(float(failure.timestamp) for failure in error.failures.values()),
                newest=newest(),
            )
    return 0


@contextmanager
def kept_handlers() -> Iterator[None]:
    """Put the handlers of signals back that torch's launcher replaces."""
    kept = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in kept.items():
            signal.signal(number, handler)


def _exit_code(ended: Ended, restarts: int) -> int:
    """The exit code of a run that is over; raises Failed for what no process could tell."""
    if ended.killed and ended.culprits == ended.killed:
        more = f" after {restarts} restart{'s' if restarts > 1 else ''}" if restarts else ""
        raise Failed(
            f"the run of {ended.processes} processes{more}",
            ended.reason,
            "what was saved is whole: go on with checkpoint.resume=auto",
        )
    told = [code for code in ended.codes.values() if code > 0]
    own = [ended.codes[r] for r in ended.culprits if ended.codes.get(r, 0) > 0]
    return (own or told or [128 + int(signal.SIGTERM)])[0]
