"""What `luthier plan` says of a run, beside what the run took: told once, after its first steps.

The prediction is made then, not at the start, which it would delay; a model that cannot be planned leaves the
reason in its place. The numbers are `plan.py`'s.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from luthier.config import RunConfig
from luthier.errors import LuthierError
from luthier.footprint import footprint
from luthier.parallel.world import World
from luthier.plan import measured_flops
from luthier.spread import Way, estimate
from luthier.train.metrics import memory


@dataclass(frozen=True)
class Prediction:
    """`before`: bytes in use on the device before the model was built; None where the system does not tell.
    `copied()`: bytes of the largest copy that a save took so far."""

    config: RunConfig
    world: World
    device: torch.device
    before: int | None
    copied: Callable[[], int]

    def compare(self, seconds: float) -> dict[str, Any]:
        """Predicted and measured bytes per process and seconds per step, and a sentence (`text`). Errors are
        predicted / measured - 1. `seconds`: a step's, as measured.

        The prediction is the fullest process's, the measurement rank 0's. Seconds are those of
        arithmetic alone, at this machine's rate of matrix products, and only on a CPU.
        """
        if self.config.parallel.offload:
            return self._no("parallel.offload is not planned")
        try:
            found = footprint(self.config, self.device)
        except LuthierError as error:
            return self._no(str(error).splitlines()[0])
        way = Way(**self.world.sizes, stage=self.config.parallel.stage)
        flops = measured_flops(found.dtype) if self.device.type == "cpu" else None
        saving = self.copied() > 0
        one = estimate(self.config, found, way, flops=flops, bandwidth=None, saving=saving)
        values: dict[str, Any] = {"predicted_memory": one.total}
        words = [f"memory {one.total / 2**30:.2f} GiB predicted"]
        peak = memory(self.device).peak
        if peak is not None and self.before is not None:
            used = peak - self.before
            values |= {"measured_memory": used, "memory_error": one.total / used - 1}
            words[0] += f", {used / 2**30:.2f} measured ({values['memory_error']:+.0%})"
        if one.seconds is not None:
            values |= {"predicted_seconds": one.seconds, "measured_seconds": seconds}
            values["seconds_error"] = one.seconds / seconds - 1
            words.append(
                f"step {one.seconds:.3g} s of arithmetic, {seconds:.3g} measured "
                f"({values['seconds_error']:+.0%})"
            )
        return {**values, "text": f"plan: {'; '.join(words)}"}

    def _no(self, reason: str) -> dict[str, Any]:
        return {"text": "", "reason": reason}
