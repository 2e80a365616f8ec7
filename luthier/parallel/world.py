"""The place of this process in the run, the mesh of all processes, and the small values they exchange.

The only code that reads the environment variables of a launcher (torchrun's). `World.start` joins the
processes and makes the mesh (pipeline, replicate, shard, context, tensor); a run of one process is a `World()`
and exchanges nothing. What is exchanged here are numbers and JSON, over gloo on the CPU; tensors of the model
are `shard.py`'s. torch is imported where it is needed, so that reading a config stays instant.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from datetime import timedelta
from typing import Any, TypeVar

from luthier import errors
from luthier.config_parallel import AXES, ParallelConfig
from luthier.errors import Failed, LostPeer, LuthierError, NotFinite, Refused
from luthier.parallel import joining, restarts
from luthier.parallel.degrees import mesh_sizes
from luthier.parallel.joining import Place
from luthier.parallel.restarts import Note, Restart, leave_note, leave_record

T = TypeVar("T")

# how launchers other than torchrun number processes: without RANK these cannot join
OTHERS = ("WORLD_SIZE", "PADDLE_TRAINERS_NUM", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE")
WAIT = timedelta(
    hours=4
)  # for rank 0 to write a large model, say; a dead process is noticed at once
_LOST = (
    "Connection closed by peer",
    "Connection reset by peer",
    "Broken pipe",
    "Timed out waiting",
)

_joined: list[
    tuple[Place, Any]
] = []  # this process's place and store, for the error it may end with


def place() -> Place:
    """This process's place by torchrun's variables. Refused for a launcher that sets others."""
    env = os.environ
    restart = Restart.from_text(env.get(restarts.VARIABLE))
    if "RANK" not in env or "MASTER_ADDR" not in env:
        for name in OTHERS:
            if env.get(name, "1").strip() != "1":
                raise Refused(
                    f"a run of several processes was started ({name}={env[name]})",
                    "its launcher does not say which of them this is in torchrun's words (RANK, MASTER_ADDR)",
                    "start `luthier finetune FILE --nproc N` (in place of paddle.distributed.launch, mpirun, ...), "
                    "or `torchrun ... -m luthier finetune FILE`, or unset the variable",
                )
        return Place()
    try:
        return Place(
            rank=int(env["RANK"]),
            size=int(env.get("WORLD_SIZE", "1")),
            local_rank=int(env.get("LOCAL_RANK", env["RANK"])),
            local_size=int(env.get("LOCAL_WORLD_SIZE", env.get("WORLD_SIZE", "1"))),
            attempt=int(env.get("TORCHELASTIC_RESTART_COUNT", "0"))
            + (restart.attempt if restart else 0),
            restart=restart,
            address=env["MASTER_ADDR"],
            port=int(env.get("MASTER_PORT", "29500")),
            served=env.get("TORCHELASTIC_USE_AGENT_STORE") == "True",
        )
    except ValueError as error:
        raise Refused(
            "the place of this process in the run",
            f"RANK, WORLD_SIZE, LOCAL_RANK or MASTER_PORT is no number ({error})",
            "start it by torchrun or with --nproc, which set them",
        ) from error


def speaks() -> bool:
    """Whether this process talks to the user: rank 0, or a process on its own."""
    return not _joined or _joined[-1][0].rank == 0


def tells(error: BaseException) -> bool:
    """Whether this process shows `error`: of all processes of a run, the first that has one."""
    here, store = _joined[-1] if _joined else (_place_or_alone(), None)
    return here.size == 1 or joining.first_to_tell(here, store)


def note(error: BaseException) -> None:
    """Tell the launcher, ours or torchrun, what this process ends with."""
    here = _place_or_alone()
    if not isinstance(error, Exception):
        return
    text = str(error) if isinstance(error, LuthierError) else f"{type(error).__name__}: {error}"
    lost = isinstance(error, LostPeer) or lost_peer(error)
    if here.restart is not None:
        leave_note(here.restart, here.rank, Note(text, lost, final=isinstance(error, NotFinite)))
    elif "TORCHELASTIC_ERROR_FILE" in os.environ and not lost:
        leave_record(os.environ["TORCHELASTIC_ERROR_FILE"], text)


def restarted() -> Restart | None:
    """What the launcher tells of a restart of this run; None for a run that was started once."""
    here = _place_or_alone()
    if here.restart is not None:
        return here.restart if here.restart.attempt else None
    return Restart(here.attempt, "torchrun started the processes again") if here.attempt else None


def processes() -> int:
    """How many processes torchrun or `--nproc` started; 1 where nobody says."""
    return _place_or_alone().size


def _place_or_alone() -> Place:
    try:
        return place()
    except Refused:
        return Place()


@contextmanager
def shared_threads(processes: int) -> Iterator[None]:
    """Share the machine's cores among the processes that are started inside, unless the user did."""
    before = dict(os.environ)
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // processes)))
    try:
        yield
    finally:  # torch's launcher leaves variables of its own behind
        os.environ.clear()
        os.environ.update(before)


def lost_peer(error: BaseException) -> bool:
    """Whether an error only says that another process is gone."""
    return any(words in str(error) for words in _LOST)


@dataclass(frozen=True)
class World:
    """`rank` of `size` processes; `data_rank` of `data_size` groups that read different rows."""

    rank: int = 0
    size: int = 1
    data_rank: int = 0
    data_size: int = 1
    sizes: Mapping[str, int] = field(default_factory=lambda: dict.fromkeys(AXES, 1))
    mesh: Any = None  # DeviceMesh over AXES; None in a run of one process
    attempt: int = 0  # how often the launcher restarted the run
    group: Any = None  # what values are exchanged over; None: the ranks' first group
    beside: Any = None  # a second group of the same ranks (`aside`)

    @classmethod
    def start(
        cls, parallel: ParallelConfig, device: str = "cpu", facts: Mapping[str, Any] | None = None
    ) -> World:
        """Join the run that the environment names; `facts` must be the same on every rank (`joining.meet`).

        `device` is the kind of device that tensors live on, `cpu` or `cuda`. Raises Refused before anything is
        joined for degrees that do not fit the number of processes.
        """
        return cls.join(place(), parallel, device, facts or {})

    @classmethod
    def join(
        cls, here: Place, parallel: ParallelConfig, device: str, facts: Mapping[str, Any]
    ) -> World:
        """As `start`, at a given place."""
        sizes = mesh_sizes(parallel, here.size)
        if here.size == 1:
            return cls(attempt=here.attempt)
        import torch
        import torch.distributed as dist
        from torch.distributed.device_mesh import init_device_mesh

        if device == "cuda":
            count = torch.cuda.device_count()
            if here.local_rank >= count:
                raise Refused(
                    f"{here.local_size} processes on this machine",
                    f"it has {count} GPUs, and each process needs one",
                    f"give --nproc {count}, or model.device=cpu",
                )
            torch.cuda.set_device(here.local_rank)
        store = joining.open_store(here)
        _joined.append((here, store))
        known = {**facts, "Luthier's code": joining.code_hash(), "torch": torch.__version__}
        joining.meet(store, here, known)
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if device == "cuda" else "gloo",
            store=store,
            rank=here.rank,
            world_size=here.size,
            timeout=WAIT,
        )
        mesh = init_device_mesh(device, tuple(sizes.values()), mesh_dim_names=AXES)
        at = dict(zip(AXES, mesh.get_coordinate() or [], strict=True))
        # made now: ranks that make a group wait for one that is gone until the time-out, deaf to signals
        beside = dist.new_group(backend="gloo", timeout=WAIT)
        return cls(
            rank=here.rank,
            size=here.size,
            data_rank=at["replicate"] * sizes["shard"] + at["shard"],
            data_size=sizes["replicate"] * sizes["shard"],
            sizes=sizes,
            mesh=mesh,
            attempt=here.attempt,
            beside=beside,
        )

    def close(self) -> None:
        """Leave the run, when all is done."""
        if self.size > 1:
            import torch.distributed as dist

            dist.destroy_process_group()
            _joined.clear()

    @property
    def is_main(self) -> bool:
        """Whether this process writes files and talks to the user."""
        return self.rank == 0

    @property
    def sharded(self) -> bool:
        return self.sizes["shard"] > 1

    @property
    def words(self) -> str:
        """`4 processes (replicate 2, shard 2)`."""
        axes = ", ".join(f"{axis} {size}" for axis, size in self.sizes.items() if size > 1)
        return f"{self.size} processes ({axes})" if self.size > 1 else "one process"

    def layout(self, parallel: ParallelConfig) -> str:
        """`4 processes (pipeline 2, shard 2), stage 2, schedule interleaved with 2 stages a process`."""
        found = f"{self.words}, stage {parallel.stage}" if self.sharded else self.words
        if self.sizes["pipeline"] > 1:
            found += f", schedule {parallel.schedule}"
            if parallel.virtual_stages > 1:
                found += f" with {parallel.virtual_stages} stages a process"
        return found

    def sum(self, value: float) -> float:
        """The sum of `value` over the data ranks; the same bits on each."""
        return math.fsum(self.of_data(self.values(value)))

    def sum_of_tokens(self, value: float) -> float:
        """As `sum`, of what each rank knows of its own tokens: over the data and context ranks."""
        return math.fsum(self.of_tokens(self.values(value)))

    def of_data(self, values: list[T]) -> list[T]:
        """Of one value per rank, one per data rank: the ranks that cut a model's layers see the same rows.

        In a pipeline those of the last stage, which has the loss.
        """
        own = values[-self.stage_size :]
        return own[:: len(own) // self.data_size]

    def of_stage(self, values: list[T]) -> list[T]:
        """Of one value per rank, those of the ranks with the same pipeline stage."""
        begin = self.rank // self.stage_size * self.stage_size
        return values[begin : begin + self.stage_size]

    @property
    def stage_size(self) -> int:
        """How many ranks a pipeline stage has; they follow each other."""
        return self.size // self.sizes["pipeline"]

    def sums(self, values: list[float]) -> list[float]:
        """Sums over data and context ranks and pipeline stages, of lists that are empty where a stage has none."""
        same = self.sizes["tensor"]  # ranks that cut a layer see the same
        rows = [row for row in self.gather(values)[::same] if row]
        return [math.fsum(column) for column in zip(*rows, strict=True)]

    def over_stages(self, value: float) -> float:
        """The sum of one value per pipeline stage, the same on all of its ranks."""
        if self.sizes["pipeline"] == 1:
            return value
        return math.fsum(self.values(value)[:: self.stage_size])

    def of_tokens(self, values: list[T]) -> list[T]:
        """As `of_data`, one value per part of the tokens: the tensor ranks see the same ones."""
        return values[-self.stage_size :][:: self.sizes["tensor"]]

    def max(self, value: float) -> float:
        return max(self.values(value))

    def values(self, value: float) -> list[float]:
        """`value` of every rank, in their order."""
        return [v for (v,) in self.vectors([value])]

    def vectors(self, values: list[float]) -> list[list[float]]:
        """As `values`, of equally long lists."""
        if self.size == 1:
            return [values]
        import torch
        import torch.distributed as dist

        ours = torch.tensor(values, dtype=torch.float64)
        theirs = [torch.empty_like(ours) for _ in range(self.size)]
        dist.all_gather(theirs, ours, group=self.group)
        return [t.tolist() for t in theirs]

    def gather(self, value: Any) -> list[Any]:
        """`value` (JSON) of every rank, in their order, on every rank."""
        if self.size == 1:
            return [value]
        import torch
        import torch.distributed as dist

        ours = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
        sizes = [int(n) for n in self.values(len(ours))]
        padded = torch.zeros(max(sizes), dtype=torch.uint8)
        padded[: len(ours)] = ours
        theirs = [torch.empty_like(padded) for _ in sizes]
        dist.all_gather(theirs, padded, group=self.group)
        texts = (bytes(t[:n].tolist()) for t, n in zip(theirs, sizes, strict=True))
        return [json.loads(text) for text in texts]

    def broadcast(self, value: Any = None) -> Any:
        """Rank 0's `value` (JSON) on every rank."""
        return self.gather(value if self.is_main else None)[0]

    def first(self, what: str) -> bool:
        """Whether this process is the first of the run to claim `what`; asked of the store, which outlives ranks."""
        if self.size == 1:
            return True
        with contextlib.suppress(Exception):
            return _joined[-1][1].add(f"first/{what}", 1) == 1
        return False

    def barrier(self) -> None:
        """Wait for all ranks."""
        self.values(0.0)

    def lead(self, work: Callable[[], T]) -> T:
        """Do `work` on rank 0 alone; its result (JSON), or its error, is everybody's."""
        if self.size == 1:
            return work()
        result: Any = None
        if self.is_main:
            try:
                result = work()
            except Exception as error:
                self.broadcast({"error": _packed(error)})
                raise
            self.broadcast({"result": result})
            return result
        told = self.broadcast()
        if "error" in told:
            raise _unpacked(told["error"])
        return told["result"]

    def together(self, work: Callable[[], T]) -> list[T]:
        """Do `work` on every rank; the results (JSON) by rank, or the first error, everybody's."""
        told: dict[str, Any] = {}
        ours = None
        try:
            told["result"] = work()
        except Exception as error:
            ours, told = error, {"error": _packed(error)}
        every = self.gather(told)
        if ours is not None:
            raise ours
        for found in every:
            if "error" in found:
                raise _unpacked(found["error"])
        return [found["result"] for found in every]

    def aside(self) -> World:
        """The same ranks with a group of their own, for what one thread exchanges beside the training."""
        return replace(self, group=self.beside)


def _packed(error: Exception) -> list[str]:
    if isinstance(error, (Refused, Failed)):
        return [type(error).__name__, error.asked, error.found, error.do]
    return ["Failed", "the work of another rank", f"{type(error).__name__}: {error}", ""]


def _unpacked(told: list[str]) -> LuthierError:
    kind, *texts = told
    return getattr(errors, kind)(*texts)
