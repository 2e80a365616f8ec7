"""A few processes that stay up and run functions together, as the ranks of a run: starting them is what is slow."""

from __future__ import annotations

import math
import multiprocessing
import os
import socket
import sys
import traceback
import warnings
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from typing import Any

from luthier.config_parallel import AXES, ParallelConfig
from luthier.parallel.joining import Place
from luthier.parallel.world import World


def free_port() -> int:
    with socket.socket() as made:
        made.bind(("127.0.0.1", 0))
        return made.getsockname()[1]


_context = multiprocessing.get_context("spawn")
_ranks: list[tuple[Any, Connection]] = []  # process, our end of its pipe


def run_ranks(degrees: dict[str, Any], function: Callable[..., Any], *args: Any) -> list[Any]:
    """`function(world, *args)` on every rank of a world of these degrees; what each gave, by rank."""
    size = math.prod(degrees.get(axis, 1) for axis in AXES)
    new: list[Connection] = []
    while len(_ranks) < size:
        ours, theirs = _context.Pipe()
        process = _context.Process(target=_serve, args=(theirs,), daemon=True)
        process.start()
        _ranks.append((process, ours))
        new.append(ours)
    for pipe in new:  # started side by side; minutes on a machine that has much else to do
        assert pipe.poll(400.0), "a rank does not start"
        pipe.recv()
    port = free_port()
    for rank in range(size):
        place = Place(rank=rank, size=size, local_rank=rank, local_size=size, port=port)
        _ranks[rank][1].send((place, degrees, function, args))
    found: dict[Any, tuple[bool, Any]] = {}
    waiting = [pipe for _, pipe in _ranks[:size]]
    seconds = 180.0
    while waiting and (ready := wait(waiting, seconds)):
        for pipe in ready:
            waiting.remove(pipe)  # pyright: ignore[reportArgumentType]
            found[pipe] = pipe.recv()  # pyright: ignore[reportAttributeAccessIssue]
            # the others may wait for a rank that failed
            seconds = seconds if found[pipe][0] else 5.0
    if waiting and all(ok for ok, _ in found.values()):
        end_ranks()
        raise AssertionError(f"{function.__name__}: the ranks hang with {degrees}")
    errors = [text for ok, text in found.values() if not ok]
    if errors:
        end_ranks()  # whatever they were in the middle of
    assert not errors, "\n".join(errors)
    return [found[pipe][1] for _, pipe in _ranks[:size]]


def end_ranks() -> None:
    """The next call starts new processes."""
    while _ranks:
        process, _ = _ranks.pop()
        process.kill()
        process.join()


def _serve(pipe: Connection) -> None:
    import torch

    import luthier.assemble  # noqa: F401

    pipe.send(None)
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    sys.stdout = open(os.devnull, "w")  # noqa: SIM115, PTH123
    while True:
        try:
            place, degrees, function, args = pipe.recv()
        except EOFError:
            return
        try:
            world = World.join(place, ParallelConfig.model_validate(degrees), "cpu", {})
            value = function(world, *args)
            world.close()
            pipe.send((True, value))
        except BaseException:
            pipe.send((False, f"rank {place.rank}:\n{traceback.format_exc()}"))
