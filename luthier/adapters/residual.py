"""PiSSA on a quantised base: what of each weight is quantised, as QPiSSA has it (arXiv:2404.02948, section 4).

That is W - s B0 A0. A0 and B0 are made of the original weight while it is read, or are those in an adapter's
folder. The layer carries them (`split`) to the adapter that is put on it, which then adds s B A alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from luthier import seeding
from luthier.adapters.facts import own_options, read_adapter_config
from luthier.adapters.lora import principal_factors, scale_of
from luthier.adapters.store import layer_of, read_tensors
from luthier.adapters.targets import options_of
from luthier.config import AdapterConfig

Split = tuple[Tensor, Tensor, Tensor]
"""(what is quantised [out, in], A0 [R, in], B0 [out, R]) of a weight."""


class FirstSplit:
    """Splits the weights that a new adapter goes to; `plan` as of `plan_of`."""

    def __init__(self, plan: Mapping[str, AdapterConfig], *, seed: int) -> None:
        self.plan, self.seed = plan, seed

    def __call__(self, name: str, weight: Tensor) -> Split | None:
        """The split of layer `name`'s weight [out, in]; None where no adapter goes to it."""
        if name not in self.plan:
            return None
        options, draw = self.plan[name], seeding.generator(self.seed, "adapter", name)
        A, B = principal_factors(weight.float(), options, draw)
        return _rest(weight, A, B, options), A, B


class SavedSplit:
    """Splits weights as those were that the adapter in `folder` was trained on."""

    def __init__(self, folder: Path) -> None:
        self.parts: dict[str, tuple[Tensor, Tensor, AdapterConfig]] = {}
        options = own_options(folder, read_adapter_config(folder))
        if options is None or not options.pissa:
            return
        tensors = read_tensors(folder)
        for name, found in tensors.items():
            layer = layer_of(name, "lora_A.weight")
            if layer is not None:
                other = tensors[name.replace("lora_A", "lora_B")]
                # the file holds [A; A0] and [B, -B0]
                self.parts[layer] = (
                    found.chunk(2)[1],
                    -other.chunk(2, 1)[1],
                    options_of(options, layer),
                )

    def __call__(self, name: str, weight: Tensor) -> Split | None:
        """As of `FirstSplit`."""
        if name not in self.parts:
            return None
        A, B, options = self.parts[name]
        return _rest(weight, A, B, options), A, B


def _rest(weight: Tensor, A: Tensor, B: Tensor, options: AdapterConfig) -> Tensor:
    wide = weight.to(A.dtype)
    return (wide - scale_of(options) * (B.to(wide.device) @ A.to(wide.device))).to(weight.dtype)
