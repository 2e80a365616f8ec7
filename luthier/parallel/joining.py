"""How the processes of a run find each other: all there, each once, all with the same config and code.

They meet in a key-value store (torch's TCPStore) at the address that the launcher gave. The store also
decides who tells of an error: the first, and no one after it. Environment variables are `world.py`'s.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import socket
import time
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import luthier
from luthier.errors import Failed, Refused
from luthier.parallel.restarts import Restart

JOIN_SECONDS = 300.0  # to wait for the other processes


@dataclass(frozen=True)
class Place:
    """What the launcher told this process: `rank` of `size`, and where the others are met."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1
    attempt: int = 0  # restarts so far
    restart: Restart | None = None  # what `--nproc` tells of them
    address: str = "127.0.0.1"
    port: int = 0
    served: bool = False  # the launcher itself runs the store

    @property
    def words(self) -> str:
        return f"rank {self.rank} of {self.size}"


def open_store(place: Place, seconds: float | None = None) -> Any:
    """The run's store; rank 0 serves it if the launcher does not. Refused for a port that is taken."""
    from torch.distributed import (
        DistNetworkError,
        DistStoreError,
        PrefixStore,  # pyright: ignore[reportPrivateImportUsage]
        TCPStore,  # pyright: ignore[reportPrivateImportUsage]
    )

    where = f"{place.address}:{place.port}"
    serving = place.rank == 0 and not place.served
    seconds = JOIN_SECONDS if seconds is None else seconds
    try:
        store = TCPStore(
            place.address,
            place.port,
            is_master=serving,
            timeout=timedelta(seconds=seconds),
            wait_for_workers=False,
        )
    except (DistNetworkError, DistStoreError, RuntimeError) as error:
        if serving:
            raise Refused(
                f"meeting the other processes at {where}",
                f"rank 0 cannot listen there ({str(error).splitlines()[0][:120]})",
                "another run uses that port: give another one (torchrun --master-port)",
            ) from error
        raise Failed(
            f"meeting the other processes at {where}",
            f"nothing answers {place.words} there ({str(error).splitlines()[0][:120]})",
            "look at the output of rank 0; check the address and that the network lets the port through",
        ) from error
    return PrefixStore(f"luthier/{place.attempt}", store)


def meet(store: Any, place: Place, facts: Mapping[str, Any], seconds: float | None = None) -> None:
    """Wait until every rank is there, exactly once, with the same `facts` (config, versions) as rank 0.

    Raises Failed naming who is missing after `seconds`; Refused for two processes of one rank (two runs on one
    port) and, on every rank, for facts that differ on one.
    """
    seconds = JOIN_SECONDS if seconds is None else seconds
    if place.rank == 0:
        store.set("facts", json.dumps(facts))
    if store.add(f"here/{place.rank}", 1) > 1:
        raise Refused(
            f"joining the run at {place.address}:{place.port} as {place.words}",
            "a process of that rank is there already: two runs use one address and port",
            "give one of them another port (torchrun --master-port)",
        )
    store.set(f"host/{place.rank}", socket.gethostname())
    begin, missing = time.monotonic(), list(range(place.size))
    while missing := [rank for rank in missing if not store.check([f"host/{rank}"])]:
        if time.monotonic() - begin > seconds:
            named = ", ".join(map(str, missing[:16])) + (" ..." if len(missing) > 16 else "")
            raise Failed(
                f"waiting for the {place.size} processes of the run",
                f"after {seconds:g} seconds rank {named} {'is' if len(missing) == 1 else 'are'} missing",
                "look at their output; every machine needs the same address, port and number of processes",
            )
        time.sleep(0.05)
    theirs, ours = json.loads(store.get("facts")), json.loads(json.dumps(facts))
    changed = [k for k in {**theirs, **ours} if theirs.get(k) != ours.get(k)]
    if changed:
        lines = [f"{k} is {ours.get(k)} here, {theirs.get(k)} on rank 0" for k in changed[:4]]
        here = f"{place.words} on {socket.gethostname()}", "; ".join(lines)
        store.set("different", json.dumps(here))
    # the others would wait for one that has left until the group's time is over
    store.add("compared", 1)
    while store.add("compared", 0) < place.size and time.monotonic() - begin < 2 * seconds:
        time.sleep(0.05)
    if store.check(["different"]):
        who, found = json.loads(store.get("different"))
        store.add("left", 1)
        while place.rank == 0 and store.add("left", 0) < place.size:  # the store may be its own
            if time.monotonic() - begin > 2 * seconds:
                break
            time.sleep(0.05)
        raise Refused(
            f"joining the run as {who}",
            found,
            "start every process with the same config, overrides and version of Luthier",
        )


def code_hash() -> str:
    """A hash of Luthier's own source files."""
    root = Path(luthier.__file__).parent
    digest = hashlib.sha256()
    for path in sorted(root.rglob("*.py")):
        digest.update(str(path.relative_to(root)).encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:12]


def first_to_tell(place: Place, store: Any) -> bool:
    """Whether this process is the first one of the run with an error. True when nobody can say."""
    with contextlib.suppress(Exception):
        store = store or open_store(place, seconds=5)
        return store.add("told", 1) == 1
    return True
