"""`--nproc N`: starts N processes of this command on this machine, by torchrun's own launcher.

The launcher (torch's elastic agent) restarts the processes as often as allowed, ends all when one fails,
and hands signals on. Errors are told by the processes themselves; here only those that had no chance to are.
"""

from __future__ import annotations

import logging
import signal
import sys
import tempfile
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from luthier.errors import Failed, Refused
from luthier.parallel.world import place, shared_threads

SAVING_SECONDS = 1800  # for the processes to save what they have after a signal


def launch(words: Sequence[str], processes: int, max_restarts: int = 0) -> int:
    """Run `python -m luthier WORDS` in `processes` processes and return their exit code (the first's that failed).

    Raises Failed when a process was ended from outside, which it cannot tell itself.
    """
    if place().size > 1:
        raise Refused(
            f"--nproc {processes}",
            f"a launcher has started {place().size} processes already",
            "leave --nproc out, or start `luthier` without the launcher",
        )
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, launch_agent

    for name in ("agent.server.api", "agent.server.local_elastic_agent", "multiprocessing.api"):
        logging.getLogger(f"torch.distributed.elastic.{name}").setLevel(logging.CRITICAL)
    with (
        shared_threads(processes),
        kept_handlers(),
        tempfile.TemporaryDirectory(prefix="luthier-") as logs,
    ):
        config = LaunchConfig(
            min_nodes=1,
            max_nodes=1,
            nproc_per_node=processes,
            run_id=uuid.uuid4().hex,
            rdzv_backend="c10d",
            rdzv_endpoint="localhost:0",
            max_restarts=max_restarts,
            monitor_interval=0.1,
            logs_specs=DefaultLogsSpecs(log_dir=logs),
            shutdown_timeout=SAVING_SECONDS,
            signals_to_handle="SIGTERM,SIGINT",
        )
        try:
            launch_agent(config, sys.executable, ["-m", "luthier", *words])
        except SignalException as error:
            return 128 + int(error.sigval)
        except ChildFailedError as error:
            codes = {rank: failure.exitcode for rank, failure in error.failures.items()}
            return _exit_code(codes, processes)
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


def _exit_code(codes: dict[int, int], processes: int) -> int:
    """Exit codes by rank -> that of the run. Negative: ended by that signal; SIGTERM comes from the launcher."""
    for rank, code in sorted(codes.items()):
        if code < 0 and code != -signal.SIGTERM:
            name = signal.Signals(-code).name
            more = " (often: out of memory)" if name == "SIGKILL" else ""
            raise Failed(
                f"the run of {processes} processes",
                f"rank {rank} was ended by {name}{more}",
                "what was saved is whole: go on with checkpoint.resume=auto",
            )
    told = [code for code in codes.values() if code > 0]
    return told[0] if told else 128 + int(signal.SIGTERM)
