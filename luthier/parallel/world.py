"""The place of this process in the run, as a plain value.

`World.current()` is the only code that reads the environment variables of a launcher. This version
trains in one process: a launcher that started several is refused instead of training copies side by side.
"""

from __future__ import annotations

import os
from dataclasses import dataclass

from luthier.errors import Refused

# what torchrun and other launchers tell a process about the number of its siblings
SIZES = ("WORLD_SIZE", "PADDLE_TRAINERS_NUM", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE")


@dataclass(frozen=True)
class World:
    """`rank` of `size` processes; `data_rank` of `data_size` groups that read different rows."""

    rank: int = 0
    size: int = 1
    data_rank: int = 0
    data_size: int = 1

    @classmethod
    def current(cls) -> World:
        """This process's place by the launcher's variables. Raises Refused for more than one process."""
        for name in SIZES:
            size = os.environ.get(name, "1")
            if size.strip() != "1":
                raise Refused(
                    f"a run of several processes was started ({name}={size})",
                    "this version of Luthier trains in one process",
                    f"start `luthier` itself, without a launcher, or unset {name}",
                )
        return cls()

    @property
    def is_main(self) -> bool:
        """Whether this process writes files and talks to the user."""
        return self.rank == 0

    def sum(self, value: float) -> float:
        """The sum of `value` over the data ranks."""
        return value
