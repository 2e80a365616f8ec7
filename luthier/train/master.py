"""Half-precision weights that are trained: float32 master copies, and loss scaling for float16.

`MasterWeights` gathers gradients in float32 over the micro-batches, gives the optimiser float32
parameters and writes the rounded result back into the model. Weights that are float32 already (LoRA's)
pass through. `LossScaler` keeps float16 gradients representable. Clipping and stepping are the loop's.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor
from torch.nn import Parameter

from luthier.errors import Failed, Refused
from luthier.parts import marked
from luthier.train.optim import multiply

HALF = (torch.float16, torch.bfloat16)


class MasterWeights:
    """What the optimiser trains, in place of the model's own parameters.

    `named` is the list to hand to `make_optimizer`: under "float32" each half-precision parameter is
    replaced by a float32 copy, under "none" every parameter stands for itself. One step is

        backward of each micro-batch, each followed by collect(); clip, optimizer.step(); write_back()
    """

    def __init__(
        self,
        named_parameters: list[tuple[str, Parameter]],
        master_dtype: Literal["float32", "none"],
    ) -> None:
        """Raises Refused for float16 without masters: its updates and moments vanish by rounding."""
        if master_dtype == "none":
            for name, p in named_parameters:
                if p.dtype == torch.float16:
                    raise Refused(
                        "model.master_dtype=none",
                        f"{name} is float16, in which gradients and updates round to zero",
                        "use model.master_dtype=float32 or model.dtype=bfloat16",
                    )
        self.named: list[tuple[str, Parameter]] = []
        self._pairs: list[tuple[str, Parameter, Parameter]] = []  # name, model's, master
        for name, p in named_parameters:
            if master_dtype == "float32" and p.dtype in HALF:
                master = marked(Parameter(p.detach().float()), p)
                self._pairs.append((name, p, master))
                self.named.append((name, master))
            else:
                self.named.append((name, p))

    @property
    def parameters(self) -> list[Parameter]:
        """What is clipped and stepped."""
        return [p for _, p in self.named]

    def collect(self) -> None:
        """Add the gradients of one backward to the masters' in float32 and drop them from the model."""
        for _, p, master in self._pairs:
            if p.grad is None:
                continue
            if master.grad is None:
                master.grad = p.grad.float()
            else:
                master.grad += p.grad  # bfloat16 is widened first: the sum is float32
            p.grad = None

    def gradients(self) -> dict[str, Tensor | None]:
        """Name -> gradient of the whole step so far, for the gates. Call after `collect`."""
        return {name: p.grad for name, p in self.named}

    def zero_grad(self) -> None:
        for _, p in self.named:
            p.grad = None

    @torch.no_grad()
    def write_back(self) -> None:
        """Round the masters into the model's weights (to nearest)."""
        for _, p, master in self._pairs:
            p.copy_(master)

    def tensors(self) -> dict[str, Tensor]:
        """The masters by parameter name, live, to be saved and read again; empty if there are none."""
        return {name: marked(master.detach(), master) for name, _, master in self._pairs}


class LossScaler:
    """Dynamic loss scale for float16: loss x scale, gradients / scale, steps that overflow are skipped.

    `start`: first scale; doubled after `growth_interval` good steps in a row, halved after an overflow.
    Scales are powers of two, so they change no digit of what does not overflow or vanish. With
    `enabled=False` (float32, bfloat16) the scale stays 1 and every step counts.

        (loss * scaler.scale).backward(); scaler.unscale(parameters); norm = clip_gradients(...)
        if scaler.update(math.isfinite(norm)): optimizer.step()
    """

    def __init__(
        self, enabled: bool, *, start: float = 2.0**15, growth_interval: int = 2000
    ) -> None:
        self.enabled = enabled
        self.scale = start if enabled else 1.0
        self.growth_interval = growth_interval
        self.good_steps = 0

    def unscale(self, parameters: list[Parameter]) -> None:
        """Divide the gradients by the scale."""
        gradients = [p.grad for p in parameters if p.grad is not None]
        if gradients and self.scale != 1.0:
            multiply(gradients, 1.0 / self.scale)

    def update(self, finite: bool) -> bool:
        """Adapt the scale to this step's outcome; True if the step may be taken.

        Raises Failed once the scale is used up: then no scale helps, the values themselves are broken.
        """
        if not self.enabled:
            return True
        if finite:
            self.good_steps += 1
            if self.good_steps == self.growth_interval:
                self.scale, self.good_steps = min(self.scale * 2.0, 2.0**24), 0
            return True
        self.scale, self.good_steps = self.scale / 2.0, 0
        if self.scale < 1.0:
            raise Failed(
                "training in float16",
                "gradients overflow at every loss scale down to 1",
                "use model.dtype=bfloat16 or float32, or a smaller optim.lr",
            )
        return False

    def state(self) -> dict[str, float | int]:
        return {"scale": self.scale, "good_steps": self.good_steps}

    def load_state(self, state: Mapping[str, float | int]) -> None:
        self.scale, self.good_steps = float(state["scale"]), int(state["good_steps"])
